"""What the studies of tilting share: a random split of the digits, wrong labels, networks, accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor, nn

from bolza.data import digits

__all__ = ["accuracy", "batches", "mlp", "seeded", "split", "with_wrong_labels"]

Split = tuple[Tensor, Tensor, Tensor, Tensor]


@cache
def _pixels() -> tuple[Tensor, Tensor]:
    data = digits()
    x, y = torch.cat([data.train_x, data.test_x]), torch.cat([data.train_y, data.test_y])
    return (x - x.min()) / (x.max() - x.min()), y


def split(seed: int, training: int = 1200) -> Split:
    """Digits with pixels from 0 to 1, split at random; the test set has the other 597, whatever ``training`` is."""
    x, y = _pixels()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[:training], order[1200:]
    return x[train], y[train], x[test], y[test]


def with_wrong_labels(y: Tensor, share: float, seed: int) -> Tensor:
    """Labels of which a random share is replaced by another class."""
    draw = torch.Generator().manual_seed(10_000 + seed)
    y = y.clone()
    rows = torch.randperm(len(y), generator=draw)[: round(share * len(y))]
    y[rows] = (y[rows] + torch.randint(1, 10, (len(rows),), generator=draw)) % 10
    return y


def seeded(seed: int, *layers: tuple[type[nn.Module], tuple[int, ...]]) -> nn.Sequential:
    """A chain of layers, started from a seed without touching the global one."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return nn.Sequential(*(kind(*sizes) for kind, sizes in layers))


def mlp(seed: int, width: int = 64) -> nn.Sequential:
    """64-width-10 with ReLU."""
    return seeded(seed, (nn.Linear, (64, width)), (nn.ReLU, ()), (nn.Linear, (width, 10)))


def batches(n: int, batch: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Rows of each batch; the last batch of an epoch is dropped where it is smaller."""
    draw = torch.Generator().manual_seed(20_000 + seed)
    for _ in range(epochs):
        yield from torch.randperm(n, generator=draw)[: n // batch * batch].split(batch)


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of samples that are classified right, in evaluation mode."""
    was = net.training
    net.eval()
    with torch.no_grad():
        right = float((net(x).argmax(1) == y).double().mean())
    net.train(was)
    return right
