"""What does a controller cost beside a step of stochastic gradient descent?

    python benchmarks/controller_overhead.py [--repeats 30] [--only NAME ...]

Four networks: a ReLU perceptron of 1.46 million parameters with batches of 128, a small one on digits, a convolutional
network on 28×28 images and a residual network of 8 layers. In turns with all others, so that all meet the same machine:
forward, backward and update, then the controller. Reported is the CPU time of both beside a step of plain SGD, for CSGD
and CMSGD by entry, by layer and in all, observing at every step and at every tenth, for a torch scheduler, and for
Prodigy, which tunes its rate in the update. One pass over six numbers an entry is the floor of any law by entry.
"""

from __future__ import annotations

from _bench import emit, environment  # first: sets the number of threads

# isort: split

import argparse
import copy
import time
from collections.abc import Callable
from statistics import mean, median
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bolza.controllers import CMSGD, CSGD
from bolza.models import cnn, resnet

Setup = Callable[[nn.Module], tuple[Any, Any]]


def sgd(model: nn.Module, momentum: float = 0.0) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=momentum)


def worn(kind: Any, momentum: float = 0.0, **options: Any) -> Setup:
    def make(model: nn.Module) -> tuple[Any, Any]:
        optimizer = sgd(model, momentum)
        return optimizer, kind(optimizer, **options)

    return make


def cosine(model: nn.Module) -> tuple[Any, Any]:
    optimizer = sgd(model)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10**6)


def prodigy(model: nn.Module) -> tuple[Any, Any]:
    from pytorch_optimizer import Prodigy

    return Prodigy(model.parameters()), None


class OnePass:
    """The least that six numbers an entry can cost: to read and write them once, with gradient and position."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        size = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        self.rows, self.gradient, self.position = torch.ones(6, size), torch.ones(size), torch.ones(size)

    def step(self, loss: float) -> None:
        self.rows.mul_(1.0)
        self.position.add_(self.gradient, alpha=1e-6)


SETUPS: dict[str, Setup] = {
    "SGD": lambda model: (sgd(model), None),
    "SGD momentum": lambda model: (sgd(model, 0.9), None),
    "Adam": lambda model: (torch.optim.Adam(model.parameters(), 1e-3), None),
    "SGD, cosine": cosine,
    "Prodigy": prodigy,
    "one pass over the memory of CSGD": worn(OnePass),
    "CSGD": worn(CSGD),
    "CSGD every 10": worn(CSGD, every=10),
    "CSGD layer": worn(CSGD, granularity="layer"),
    "CSGD layer every 10": worn(CSGD, granularity="layer", every=10),
    "CSGD global": worn(CSGD, granularity="global"),
    "CSGD global every 10": worn(CSGD, granularity="global", every=10),
    "CSGD momentum every 10": worn(CSGD, 0.9, every=10),
    "CMSGD every 10": worn(CMSGD, 0.9, every=10),
}


def perceptron() -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(784, 512)]
    for _ in range(4):
        layers += [nn.ReLU(), nn.Linear(512, 512)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(512, 10))


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...], int]]:
    torch.manual_seed(0)
    return {
        "MLP 1.46 M, batch 128": (perceptron(), (128, 784), 1),
        "MLP digits, batch 32": (
            nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
            (32, 64),
            8,
        ),
        "conv 28×28, batch 32": (cnn(), (32, 1, 28, 28), 1),
        "ResNet-8 28×28, batch 32": (resnet(), (32, 1, 28, 28), 1),
    }


def measure(
    name: str, base: nn.Module, shape: tuple[int, ...], rounds: int, repeats: int, names: list[str]
) -> None:
    """Step each setup in turns; a turn of a small network is several steps."""
    draw = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(shape, generator=draw), torch.randint(10, shape[:1], generator=draw)) for _ in range(4)
    ]
    runs: dict[str, Any] = {}
    for key in names:
        model = copy.deepcopy(base)
        runs[key] = (model, *SETUPS[key](model), [], [])
    for turn in range(repeats + 4):
        for model, optimizer, controller, steps, controls in runs.values():
            for i in range(rounds):
                x, y = batches[(turn + i) % 4]
                start = time.process_time()
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                value = loss.item()
                middle = time.process_time()
                if isinstance(controller, torch.optim.lr_scheduler.LRScheduler):
                    controller.step()
                elif controller is not None:
                    controller.step(loss=value)
                if turn >= 4:
                    steps.append(middle - start)
                    controls.append(time.process_time() - middle)
    plain = median(runs["SGD"][3])
    for key, (_, _, _, steps, controls) in runs.items():
        # a mean over ten: one of them observes
        tens = [mean(controls[i : i + 10]) for i in range(0, len(controls) - 9, 10)]
        extra = median(tens)
        emit(
            "controller_overhead",
            f"{name}: {key}",
            step_ms=1e3 * median(steps),
            controller_ms=1e3 * extra,
            step_over_sgd=median(steps) / plain,
            controller_over_sgd=extra / plain,
            bar_met=extra / plain <= 0.1 if key.startswith("CSGD") else None,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--only", nargs="*", default=[], help="setups beside SGD")
    arguments = parser.parse_args()
    names = ["SGD", *[n for n in SETUPS if n != "SGD" and (not arguments.only or n in arguments.only)]]
    emit("controller_overhead", "environment", **environment("pytorch_optimizer"))
    for name, (model, shape, rounds) in networks().items():
        measure(name, model, shape, rounds, arguments.repeats, names)


if __name__ == "__main__":
    main()
