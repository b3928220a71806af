"""Eight networks as a user writes them, with nothing done to please the library.

``NETWORKS[name]()`` gives ``(model, (x, y), loss)``: small, in training mode, float32, a fixed seed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Case = tuple[nn.Module, tuple[Any, Any], Callable[[Any, Any], Tensor]]
SAMPLES = 6


class ResidualMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


class TiedWeights(nn.Module):
    """The read-out is the transposed encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(5, 4)
        self.middle = nn.Linear(4, 4)
        self.again = self.middle

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.encoder(x))
        h = torch.tanh(self.again(torch.tanh(self.middle(h))))
        return h @ self.encoder.weight


class LSTMClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class CausalBlock(nn.Module):
    """A token model: embedding, position, causal attention, feed-forward, tied read-out."""

    def __init__(self, vocabulary: int = 7, width: int = 4, heads: int = 2, length: int = 5) -> None:
        super().__init__()
        self.heads = heads
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.read = nn.Linear(width, vocabulary, bias=False)
        self.read.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        n, length = tokens.shape
        x = self.token(tokens) + self.position(torch.arange(length, device=tokens.device))
        q, k, v = (
            part.view(n, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, length, -1))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.read(x)


def _classes(classes: int = 3) -> Tensor:
    return torch.arange(SAMPLES) % classes


def mlp() -> Case:
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    return net, (torch.randn(SAMPLES, 5), _classes()), F.cross_entropy


def residual_mlp() -> Case:
    return ResidualMLP(), (torch.randn(SAMPLES, 5), _classes()), F.cross_entropy


def tied_weights() -> Case:
    return TiedWeights(), (torch.randn(SAMPLES, 5), torch.randn(SAMPLES, 5)), F.mse_loss


def cnn_train() -> Case:
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    return net, (torch.randn(SAMPLES, 1, 6, 6), _classes()), F.cross_entropy


def cnn_eval() -> Case:
    net, data, loss = cnn_train()
    net(torch.randn(16, 1, 6, 6) + 0.3)  # running averages that are not those of the batch
    return net.eval(), data, loss


def lstm() -> Case:
    return LSTMClassifier(), (torch.randn(SAMPLES, 4, 3), _classes()), F.cross_entropy


def encoder_layer() -> Case:
    net = nn.Sequential(
        nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), nn.Flatten(), nn.Linear(12, 3)
    )
    return net, (torch.randn(SAMPLES, 3, 4), _classes()), F.cross_entropy


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def causal_attention() -> Case:
    tokens = torch.randint(0, 7, (SAMPLES, 6))
    return CausalBlock(), (tokens[:, :-1], tokens[:, 1:]), token_loss


_MAKERS = {
    "MLP": mlp,
    "residual MLP": residual_mlp,
    "tied weights": tied_weights,
    "CNN with batch norm, training": cnn_train,
    "CNN with batch norm, evaluation": cnn_eval,
    "LSTM": lstm,
    "TransformerEncoderLayer": encoder_layer,
    "causal attention": causal_attention,
}


def _seeded(make: Callable[[], Case]) -> Callable[[], Case]:
    def case() -> Case:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return make()

    return case


NETWORKS: dict[str, Callable[[], Case]] = {name: _seeded(make) for name, make in _MAKERS.items()}


def in_double(case: Case) -> Case:
    """The same case in float64; integer inputs stay integers."""
    model, (x, y), loss = case
    return (
        model.double(),
        (x.double() if x.is_floating_point() else x, y.double() if y.is_floating_point() else y),
        loss,
    )
