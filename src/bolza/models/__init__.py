"""Networks as a user would write them: the zoo that diagnosis and training are shown on."""

from bolza.models.convolutional import DenseBlock, ResidualBlock, cnn, densenet, resnet
from bolza.models.make import NAMES, make
from bolza.models.mlp import ACTIVATIONS, activation_module, mlp
from bolza.models.recurrent import GRU, MinimalRNN, gru
from bolza.models.transformers import GPT, TransformerBlock, VisionTransformer, gpt, vit

__all__ = [
    "ACTIVATIONS",
    "GPT",
    "GRU",
    "NAMES",
    "DenseBlock",
    "MinimalRNN",
    "ResidualBlock",
    "TransformerBlock",
    "VisionTransformer",
    "activation_module",
    "cnn",
    "densenet",
    "gpt",
    "gru",
    "make",
    "mlp",
    "resnet",
    "vit",
]
