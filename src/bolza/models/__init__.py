"""Networks as a user would write them: the zoo that diagnosis and training are shown on."""

from bolza.models.branched import InceptionBlock, inception
from bolza.models.continuous import (
    Basis,
    Constant,
    ContinuousBlock,
    ContinuousNet,
    MeanFieldResNet,
    NeuralODE,
    ParticleFlow,
    Piecewise,
    ShootingNet,
    Trajectory,
    continuous_cnn,
    continuous_mlp,
)
from bolza.models.convolutional import DenseBlock, ResidualBlock, cnn, densenet, resnet
from bolza.models.make import NAMES, make
from bolza.models.mlp import ACTIVATIONS, activation_module, mlp
from bolza.models.recurrent import GRU, MinimalRNN, gru
from bolza.models.stable import InputResidualNet, NAISBlock, NAISNet, Sine
from bolza.models.transformers import GPT, TransformerBlock, VisionTransformer, gpt, vit
from bolza.models.vae import VAE, Code, gaussian_kl, vae

__all__ = [
    "ACTIVATIONS",
    "GPT",
    "GRU",
    "NAMES",
    "Basis",
    "Code",
    "Constant",
    "ContinuousBlock",
    "ContinuousNet",
    "DenseBlock",
    "InceptionBlock",
    "InputResidualNet",
    "MeanFieldResNet",
    "MinimalRNN",
    "NAISBlock",
    "NAISNet",
    "NeuralODE",
    "ParticleFlow",
    "Piecewise",
    "ResidualBlock",
    "ShootingNet",
    "Sine",
    "Trajectory",
    "TransformerBlock",
    "VAE",
    "VisionTransformer",
    "activation_module",
    "cnn",
    "continuous_cnn",
    "continuous_mlp",
    "densenet",
    "gaussian_kl",
    "gpt",
    "gru",
    "inception",
    "make",
    "mlp",
    "resnet",
    "vae",
    "vit",
]
