"""What the studies of adversarial training share: data in [0, 1], networks, training by one rule, an honest number."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.data import digits, mnist5k
from bolza.robust import AdversarialStep, fast, free, pgd_training, robust_accuracy, yopo
from bolza.robust.adversarial_training import backward_at
from bolza.systems import as_system

__all__ = ["Trained", "network", "pixels", "robustness", "train"]


@dataclass(frozen=True)
class Trained:
    """A network after a run.

    Attributes:
        model: in evaluation mode.
        passes: full forward and backward passes.
        steps: steps of the weights.
        seconds: processor time of the training.
    """

    model: nn.Module
    passes: int
    steps: int
    seconds: float


@cache
def pixels(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test samples with pixels in [0, 1], shuffled; images for the larger set."""
    data = digits() if name == "digits" else mnist5k()
    low, high = data.train_x.min(), data.train_x.max()
    parts = [((x - low) / (high - low)).clamp(0, 1) for x in (data.train_x, data.test_x)]
    if name != "digits":
        parts = [x.reshape(-1, 1, 28, 28) for x in parts]
    draw = torch.Generator().manual_seed(0)  # the larger set is sorted by class
    train, test = (torch.randperm(len(x), generator=draw) for x in parts)
    return parts[0][train], data.train_y[train], parts[1][test], data.test_y[test]


def network(name: str, seed: int) -> nn.Module:
    """An MLP for vectors, a small convolutional network for images, started from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        if name == "digits":
            return nn.Sequential(
                nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
            )
        return nn.Sequential(
            nn.Conv2d(1, 16, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 49, 100),
            nn.ReLU(),
            nn.Linear(100, 10),
        )


def train(
    name: str, rule: str, seed: int, *, eps: float, lr: float, batch: int, passes: int = 0, epochs: int = 0
) -> Trained:
    """Train a new network by one rule, for a budget of full passes or a number of epochs.

    Args:
        name: the data.
        rule: ``natural``, ``fast``, ``PGD-k``, ``Free-m`` or ``YOPO-m-n``.
        seed: of the start and the batches.
        eps: radius, largest entry.
        lr: learning rate of Adam; it falls to a tenth for the last quarter.
        batch: samples a step.
        passes: budget of full passes.
        epochs: or how often the samples are seen; Free sees each m times as often.
    """
    x, y, _, _ = pixels(name)
    model = network(name, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    start = time.process_time()
    play = _player(model, rule, x[:2], eps, torch.Generator().manual_seed(1000 + seed))
    spent = steps = 0
    total = passes or epochs * (len(x) // batch) * _passes_a_step(rule)
    for rows in _batches(len(x), batch, seed, repeat=int(rule[5:]) if rule.startswith("Free") else 1):
        if spent >= total:
            break
        for group in optimizer.param_groups:
            group["lr"] = lr if spent < 0.75 * total else lr / 10
        optimizer.zero_grad()
        step = play(x[rows], y[rows])
        optimizer.step()
        spent, steps = spent + step.full_passes, steps + 1
    return Trained(model.eval(), spent, steps, time.process_time() - start)


def robustness(trained: Trained, name: str, *, eps: float, samples: int, suite: dict[str, Any]) -> Any:
    """Accuracy under the independent suite, on the first test samples."""
    _, _, x, y = pixels(name)
    trained.model.zero_grad()
    return robust_accuracy(trained.model, x[:samples], y[:samples], eps, **suite)


def _player(
    model: nn.Module, rule: str, example: Tensor, eps: float, generator: torch.Generator
) -> Callable[[Tensor, Tensor], AdversarialStep]:
    loss = F.cross_entropy
    if rule == "natural":
        return lambda x, y: AdversarialStep(backward_at(model, loss, x, y)[0], x, 1)
    if rule == "fast":
        return lambda x, y: fast(model, loss, x, y, eps, generator=generator)
    if rule.startswith("PGD-"):
        steps = int(rule[4:])
        return lambda x, y: pgd_training(model, loss, x, y, eps, steps, generator=generator)
    if rule.startswith("YOPO-"):
        outer, inner = (int(part) for part in rule[5:].split("-"))
        system = as_system(model, example)
        return lambda x, y: yopo(system, loss, x, y, eps, outer, inner, generator=generator)
    carried: list[Tensor | None] = [None]

    def replay(x: Tensor, y: Tensor) -> AdversarialStep:
        step, carried[0] = free(model, loss, x, y, eps, carried[0])
        return step

    return replay


def _passes_a_step(rule: str) -> int:
    if rule.startswith("PGD-"):
        return int(rule[4:]) + 1
    if rule.startswith("YOPO-"):
        return int(rule[5:].split("-")[0])
    return 2 if rule == "fast" else 1


def _batches(n: int, batch: int, seed: int, repeat: int) -> Iterator[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(n, generator=draw)
        for rows in order[: n // batch * batch].split(batch):
            for _ in range(repeat):
                yield rows
