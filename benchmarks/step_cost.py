"""What does a step of each optimizer cost beside stochastic gradient descent, and what does it bring in equal time?

    python benchmarks/step_cost.py [--batch 128] [--repeats 25] [--seconds 2.5] [--only NAME ...]

Two networks: a ReLU perceptron 784-512×5-10 and a residual network of 8 layers, on 28×28 images. For each optimizer
the median CPU time of forward, backward and update, in turns with the others so that all meet the same machine; the
memory that stays between steps (states of the optimizer and what it records, by the sizes of the tensors) and the
largest memory of a step (torch's own profiler), relative to gradient descent. Then the perceptron is trained from one
start on the same batches until a number of *descent steps' worth* of CPU time is spent, at each of three rates, and
the best train loss is reported.

Rivals: torch's SGD and Adam, and Muon in float32 (with AdamW for vectors).
"""

from __future__ import annotations

from _bench import emit, environment  # first: sets the number of threads

# isort: split

import argparse
import copy
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from _rivals import Muon
from torch import nn
from torch.nn import functional as F

from bolza.data import mnist5k
from bolza.models import resnet
from bolza.optim import DDPNOpt

Make = Callable[[nn.Module, float], Any]


class Both:
    """Matrices to one optimizer, vectors to another."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def muon(model: nn.Module, lr: float) -> Both:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    return Both(Muon(matrices, lr=lr), torch.optim.AdamW(vectors, lr=1e-3, fused=True))


OPTIMIZERS: dict[str, tuple[Make, tuple[float, ...]]] = {
    "SGD": (lambda m, lr: torch.optim.SGD(m.parameters(), lr, fused=True), (0.1, 0.3, 1.0)),
    "Adam": (lambda m, lr: torch.optim.Adam(m.parameters(), lr, fused=True), (1e-3, 3e-3, 1e-2)),
    "Muon": (muon, (1e-3, 3e-3, 1e-2)),
    "DDPNOpt": (DDPNOpt, (0.1, 0.3, 1.0)),
    "DDPNOpt rmsprop": (lambda m, lr: DDPNOpt(m, lr, curvature="rmsprop"), (3e-4, 1e-3, 3e-3)),
    "DDPNOpt kronecker": (
        lambda m, lr: DDPNOpt(m, lr, curvature="kronecker", momentum=0.9),
        (0.01, 0.03, 0.1),
    ),
    "kronecker, no feedback": (
        lambda m, lr: DDPNOpt(m, lr, curvature="kronecker", momentum=0.9, feedback=False),
        (0.01, 0.03, 0.1),
    ),
}


def perceptron() -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(784, 512)]
    for _ in range(4):
        layers += [nn.ReLU(), nn.Linear(512, 512)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(512, 10))


def one_step(model: nn.Module, optimizer: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def step_memory(model: nn.Module, optimizer: Any, x: torch.Tensor, y: torch.Tensor) -> float:
    """Largest memory allocated in a step, in MiB, beside the network and the batch."""
    with torch.profiler.profile(profile_memory=True, record_shapes=False) as profile:
        one_step(model, optimizer, x, y)
    changes = sorted(
        (event.time_range.start, event.self_cpu_memory_usage)
        for event in profile.events()
        if event.self_cpu_memory_usage
    )
    level = highest = 0
    for _, change in changes:
        level += change
        highest = max(highest, level)
    held = sum(
        value.numel() * value.element_size()
        for part in getattr(optimizer, "optimizers", (optimizer,))
        for state in part.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    return (highest + held) / 2**20


def costs(name: str, base: nn.Module, names: list[str], batch: int, repeats: int) -> dict[str, float]:
    data = mnist5k()
    x, y = data.train_x[:batch].reshape(batch, 1, 28, 28), data.train_y[:batch]
    runs = {}
    for key in names:
        model = copy.deepcopy(base)
        runs[key] = (model, OPTIMIZERS[key][0](model, OPTIMIZERS[key][1][0] / 10), [])
    for _ in range(repeats + 3):
        for model, optimizer, times in runs.values():
            start = time.process_time()
            one_step(model, optimizer, x, y)
            times.append(time.process_time() - start)
    median_of = {key: median(times[3:]) for key, (_, _, times) in runs.items()}
    memory = {key: step_memory(model, optimizer, x, y) for key, (model, optimizer, _) in runs.items()}
    for key in names:
        emit(
            "step_cost",
            f"{name}: {key}",
            cpu_ms=1e3 * median_of[key],
            cost_over_sgd=median_of[key] / median_of["SGD"],
            memory_over_sgd=memory[key] / memory["SGD"],
        )
    return median_of


def race(names: list[str], batch: int, seconds: float, step: dict[str, float]) -> None:
    """Train loss when each has used the time of equally many descent steps."""
    data = mnist5k()
    x, y = data.train_x.reshape(-1, 1, 28, 28), data.train_y
    torch.manual_seed(0)
    base = perceptron()
    budget = seconds / step["SGD"]  # descent steps
    for key in names:
        make, rates = OPTIMIZERS[key]
        steps, best = max(1, round(budget * step["SGD"] / step[key])), {}
        for lr in rates:
            model = copy.deepcopy(base)
            optimizer, draw = make(model, lr), torch.Generator().manual_seed(0)
            try:
                for _ in range(steps):
                    rows = torch.randint(len(x), (batch,), generator=draw)
                    one_step(model, optimizer, x[rows], y[rows])
            except ArithmeticError:
                continue
            with torch.no_grad():
                loss = float(F.cross_entropy(model(x), y))
                accuracy = float(
                    (model(data.test_x.reshape(-1, 1, 28, 28)).argmax(1) == data.test_y).float().mean()
                )
            if loss == loss and (not best or loss < best["train_loss"]):
                best = {"lr": lr, "steps": steps, "train_loss": loss, "test_accuracy": accuracy}
        emit("step_cost", f"equal time: {key}", descent_steps=round(budget), **best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=6.0, help="CPU seconds of each run in the race")
    parser.add_argument("--only", nargs="*", default=list(OPTIMIZERS))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    emit("step_cost", "environment", **environment())
    names = ["SGD", *(name for name in options.only if name != "SGD")]
    torch.manual_seed(0)
    step = costs("perceptron", perceptron(), names, options.batch, options.repeats)
    torch.manual_seed(0)
    costs(
        "residual",
        resnet(),
        names if "Muon" not in names else [n for n in names if n != "Muon"],
        options.batch,
        max(5, options.repeats // 4),
    )
    race(names, options.batch, options.seconds, step)


if __name__ == "__main__":
    main()
