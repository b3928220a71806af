"""What the studies of game-theoretic optimizers share: networks with branches, and training at several rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bolza.data import digits, digits_images
from bolza.studies._study import mean_error

Make = Callable[[nn.Module, float], torch.optim.Optimizer]

__all__ = ["Arm", "Block", "Curve", "inception_data", "residual_data", "residual_net", "train", "tune"]


class Block(nn.Module):
    """tanh(two(tanh(one(x))) + skip(x))."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(inputs, width), nn.Linear(width, width)
        self.skip = nn.Linear(inputs, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Batch of vectors to batch of vectors."""
        return torch.tanh(self.two(torch.tanh(self.one(x))) + self.skip(x))


def residual_net(width: int = 32) -> nn.Module:
    """64 pixels, three residual blocks with a linear skip each, ten classes."""
    return nn.Sequential(Block(64, width), Block(width, width), Block(width, width), nn.Linear(width, 10))


def residual_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Handwritten digits as vectors of pixels between 0 and 1: training and test."""
    data = digits()
    train_x, test_x = _scaled(data.train_x, data.test_x)
    return train_x, test_x, data.train_y, data.test_y


def inception_data(points: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same as images, so many for training."""
    data = digits_images()
    train_x, test_x = _scaled(data.train_x, data.test_x)
    return train_x[:points], test_x, data.train_y[:points], data.test_y


def _scaled(*parts: Tensor) -> tuple[Tensor, ...]:
    low, high = parts[0].amin(), parts[0].amax()
    return tuple((part - low) / (high - low) for part in parts)


@dataclass
class Curve:
    """One run: smoothed loss before each step, loss on the training set and accuracy on the test set at the end."""

    losses: list[float] = field(default_factory=list)
    train_loss: float = math.nan
    accuracy: float = math.nan

    @property
    def diverged(self) -> bool:
        """Whether the loss at the end is not finite, or above that of guessing by half."""
        return not self.train_loss < 1.5 * math.log(10)


@dataclass
class Arm:
    """One method at several learning rates, several runs each."""

    name: str
    runs: dict[float, list[Curve]] = field(default_factory=dict)

    def best_rate(self) -> float:
        """The rate with the smallest mean training loss."""
        return min(self.runs, key=lambda lr: _finite_mean([run.train_loss for run in self.runs[lr]]))

    def best(self) -> list[Curve]:
        """The runs at that rate."""
        return self.runs[self.best_rate()]

    def accuracy(self, lr: float) -> tuple[float, float]:
        """Mean accuracy at a rate and its standard error."""
        return mean_error([run.accuracy for run in self.runs[lr]])


def train(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    steps: int,
    batch: int,
    seed: int,
) -> Curve:
    """Train on cross-entropy; batches are drawn anew each epoch, from the seed."""
    x, x_test, y, y_test = data
    draw = torch.Generator().manual_seed(seed)
    curve, order = Curve(), torch.empty(0, dtype=torch.long)
    average = math.log(10)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(x), generator=draw)
        picked, order = order[:batch], order[batch:]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x[picked]), y[picked])
        if not bool(loss.isfinite()):
            curve.losses += [math.inf] * (steps - len(curve.losses))
            break
        loss.backward()
        average = 0.9 * average + 0.1 * loss.item()
        curve.losses.append(average)
        try:
            optimizer.step()
        except ArithmeticError:  # a curvature that is not finite any more
            curve.losses += [math.inf] * (steps - len(curve.losses))
            break
    net.eval()
    with torch.no_grad():
        curve.train_loss = nn.functional.cross_entropy(net(x), y).item()
        curve.accuracy = (net(x_test).argmax(1) == y_test).double().mean().item()
    return curve


def tune(
    arms: dict[str, Make],
    build: Callable[[], nn.Module],
    data: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    rates: Sequence[float] | dict[str, Sequence[float]],
    seeds: int,
    steps: int,
    batch: int,
    report: Callable[[float, str], None],
) -> dict[str, Arm]:
    """Train with each method at each rate, from the same weights and with the same batches for all."""
    found = {name: Arm(name) for name in arms}
    grid = {name: rates[name] if isinstance(rates, dict) else rates for name in arms}
    total, done = seeds * sum(len(g) for g in grid.values()), 0
    for name, make in arms.items():
        for lr in grid[name]:
            for seed in range(seeds):
                report(done / total, f"{name} at learning rate {lr:g}")
                done += 1
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    net = build()
                    curve = train(net, make(net, lr), data, steps=steps, batch=batch, seed=seed)
                found[name].runs.setdefault(lr, []).append(curve)
    return found


def _finite_mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if all(math.isfinite(v) for v in values) else math.inf
