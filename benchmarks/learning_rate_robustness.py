"""How large a learning rate does DDPNOpt bear, beside stochastic gradient descent without feedback?

    python benchmarks/learning_rate_robustness.py [--quick] [--net NAME ...]

1. Digits (pixels / 16, a quarter held out), perceptron 64-32×4-10 with tanh, batch 16, five epochs, six seeds: test
   accuracy at fixed rates. The two methods differ in ``feedback=`` alone.
2. Convolutional and residual nets on the larger image set, batch 64, three epochs: the rate with the lowest train loss
   of plain descent is found on a grid of factor √10 with one seed; then both methods run at 1, 3 and 10 times it,
   three other seeds each. The rate is not tuned for DDPNOpt.

Two worker processes, one thread each.
"""

from __future__ import annotations

from _bench import emit, environment  # isort: skip  (sets the threads before torch loads)

import argparse
import math
import multiprocessing
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.data import Dataset, mnist5k
from bolza.models import mlp, resnet
from bolza.ops.processes import end_with_parent
from bolza.optim import DDPNOpt
from bolza.training import BatchOrder

BENCH = "learning_rate_robustness"
GRID = tuple(10 ** (k / 2) for k in range(-5, 2))
DIGITS_RATES = (0.1, 0.3, 0.7, 1.0, 1.5)


class Block(nn.Module):
    """x + F(x), normalised by sample, with tanh."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(2, width),
            nn.Tanh(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def conv(activation: Callable[[], nn.Module]) -> nn.Module:
    """Two convolutions of stride 2 and two linear layers."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2),
        activation(),
        nn.Conv2d(8, 16, 5, stride=2),
        activation(),
        nn.Flatten(),
        nn.Linear(256, 64),
        activation(),
        nn.Linear(64, 10),
    )


def residual() -> nn.Module:
    """Three residual blocks of eight channels on 14 × 14 pixels."""
    return nn.Sequential(
        nn.AvgPool2d(2),
        nn.Conv2d(1, 8, 3, padding=1),
        Block(8),
        Block(8),
        Block(8),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * 49, 10),
    )


def normed() -> nn.Module:
    """The library's residual net, whose batch normalisation takes no feedback while it trains, on 14 × 14 pixels."""
    return nn.Sequential(nn.AvgPool2d(2), *resnet(depth=6, width=8))


@dataclass(frozen=True)
class Case:
    """A network, its data and the length of a run."""

    net: Callable[[], nn.Module]
    batch: int
    epochs: int


CASES = {
    "digits, 64-32×4-10 tanh": Case(partial(mlp, 5, 32), 16, 5),
    "conv, ReLU": Case(partial(conv, nn.ReLU), 64, 3),
    "conv, tanh": Case(partial(conv, nn.Tanh), 64, 3),
    "residual, group norm": Case(residual, 64, 3),
    "residual, batch norm": Case(normed, 64, 3),
}
FIRST = next(iter(CASES))


@lru_cache(maxsize=2)
def data(case: str, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test samples; the split of digits is another one for each seed."""
    if case == FIRST:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        x, y = load_digits(return_X_y=True)
        parts = train_test_split(x / 16, y, test_size=0.25, stratify=y, random_state=seed)
        a, b, c, d = (torch.from_numpy(part) for part in parts)
        return a.float(), c, b.float(), d
    flat: Dataset = _images()
    shape = (-1, 1, 28, 28)
    return flat.train_x.reshape(shape), flat.train_y, flat.test_x.reshape(shape), flat.test_y


@lru_cache(maxsize=1)
def _images() -> Dataset:
    return mnist5k()


def run(name: str, rate: float, feedback: bool, seed: int, share: float) -> dict[str, float]:
    """Train one network; loss of the training set and accuracy of the test set, at chance if it diverged."""
    torch.set_num_threads(1)
    case = CASES[name]
    x, y, test_x, test_y = data(name, seed if name == FIRST else 0)
    torch.manual_seed(seed)
    net = case.net()
    optimizer: torch.optim.Optimizer = (
        DDPNOpt(net, lr=rate) if feedback else torch.optim.SGD(net.parameters(), lr=rate)
    )
    order = BatchOrder(x, y, case.batch, seed)
    steps = max(1, round(share * case.epochs * order.steps_per_epoch))
    for _ in range(steps):
        xs, ys = order.next()
        optimizer.zero_grad()
        loss = F.cross_entropy(net(xs), ys)
        if not math.isfinite(loss.item()):
            break
        loss.backward()
        optimizer.step()
    net.eval()
    with torch.no_grad():
        train = float(F.cross_entropy(net(x), y))
        scores = net(test_x)
    broken = not math.isfinite(train)
    accuracy = 0.1 if broken else float((scores.argmax(1) == test_y).double().mean())
    return {"loss": math.inf if broken else train, "accuracy": accuracy}


def told(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def main() -> None:
    """Measure, and print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--net", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--quick", action="store_true", help="a fifth of the steps, two seeds")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    share = 0.2 if args.quick else 1.0
    emit(BENCH, "environment", **environment("mlxtend"), share_of_steps=share)
    lines = ["| network | learning rate | SGD | DDPNOpt |", "| --- | --- | --- | --- |"]
    with ProcessPoolExecutor(
        args.workers, mp_context=multiprocessing.get_context("spawn"), initializer=end_with_parent
    ) as pool:
        plans: dict[str, Any] = {}
        for name in args.net:
            if name == FIRST:
                plans[name] = DIGITS_RATES
            else:
                plans[name] = [pool.submit(run, name, rate, False, 0, share) for rate in GRID]
        for name, plan in plans.items():
            best = None
            if name == FIRST:
                rates = [(rate, f"{rate:g}") for rate in plan]
            else:
                losses = [job.result()["loss"] for job in plan]
                best = GRID[min(range(len(GRID)), key=losses.__getitem__)]
                rates = [(factor * best, f"{factor * best:.2g} = {factor} × best") for factor in (1, 3, 10)]
            seeds = range(1, 3) if args.quick else range(1, 7) if name == FIRST else range(1, 4)
            jobs = {
                (rate, feedback): [pool.submit(run, name, rate, feedback, seed, share) for seed in seeds]
                for rate, _ in rates
                for feedback in (False, True)
            }
            for rate, label in rates:
                row: dict[str, Any] = {"rate": rate, "best_sgd_rate": best, "seeds": len(seeds)}
                cells = []
                for feedback, key in ((False, "sgd"), (True, "ddpnopt")):
                    found = [job.result() for job in jobs[rate, feedback]]
                    mean, deviation = told([f["accuracy"] for f in found])
                    row |= {f"{key}_test_accuracy": mean, f"{key}_deviation": deviation}
                    losses = [f["loss"] for f in found]
                    row[f"{key}_train_loss"] = (
                        statistics.median(losses) if math.isfinite(max(losses)) else None
                    )
                    cells.append(f"{mean:.3f} ± {deviation:.3f}")
                emit(BENCH, name, **row)
                lines.append(f"| {name} | {label} | {cells[0]} | {cells[1]} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
