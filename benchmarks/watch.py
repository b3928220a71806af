"""How much of the training time does a `Watch` take, and does it stay within its budget of 10 %?

Trains the same network twice from the same seed, alternately a stretch without and a stretch with a watch: a small MLP
on digits (short steps, where watching costs most) and a convolutional network on 5000 images of MNIST. The share is
processor time of the watched stretches over that of the others, less one, against the share that the watch itself
reports. The weights of both runs must be equal at the end, bit for bit. "Every 100 steps" takes all readings at fixed
steps whatever they cost, and "norms by hand" is what a user would write instead: the loss, and the norms of weights and
gradient, at each step.

    python benchmarks/watch.py [--stretches 12] [--steps 150] [--only digits]
"""

from __future__ import annotations

import _bench  # isort: skip  # sets the number of threads before torch is loaded
import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import bolza
from bolza.training import BatchOrder

Looker = Callable[[float], None]


class Training:
    """A run in stretches."""

    def __init__(self, model: nn.Module, data: Any, lr: float, batch: int) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, fused=True)
        self.order = BatchOrder(data.train_x, data.train_y, batch, seed=0)
        self.look: Looker = lambda loss: None

    def stretch(self, steps: int) -> float:
        start = time.process_time()
        for _ in range(steps):
            x, y = self.order.next()
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(x), y)
            loss.backward()
            self.optimizer.step()
            self.look(loss.item())
        return time.process_time() - start


def by_hand(run: Training) -> Looker:
    history: list[tuple[float, float, float]] = []
    params = list(run.model.parameters())

    def look(loss: float) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        weights = nn.utils.get_total_norm([p.detach() for p in params])
        history.append((loss, float(weights), float(nn.utils.get_total_norm(grads))))

    return look


def watched(run: Training, data: Any, batch: int, **settings: Any) -> tuple[Looker, bolza.Watch]:
    watch = bolza.Watch(run.model, None, data, run.optimizer, batch_size=batch, **settings)
    return lambda loss: watch.step(loss=loss), watch


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stretches", type=int, default=12)
    parser.add_argument(
        "--steps", type=int, default=150, help="of a stretch of the MLP; a tenth of it for the other"
    )
    parser.add_argument("--only", choices=("digits", "mnist5k"), help="one of the two networks")
    arguments = parser.parse_args()
    _bench.emit("watch", "environment", **_bench.environment())
    digits, images = bolza.data.load("digits"), bolza.data.load("mnist5k")
    cases = {
        "digits, MLP 3 x 64": (
            lambda: bolza.models.mlp(depth=3, width=64),
            digits,
            0.02,
            64,
            arguments.steps,
        ),
        "mnist5k, convolutional": (
            lambda: bolza.models.make("cnn", images),
            images,
            0.02,
            64,
            arguments.steps // 10,
        ),
    }
    for name, (make, data, lr, batch, steps) in cases.items():
        if arguments.only is not None and not name.startswith(arguments.only):
            continue
        runs: dict[str, Training] = {}
        for kind in ("plain", "watch", "every 100 steps", "norms by hand"):
            torch.manual_seed(0)
            runs[kind] = Training(make(), data, lr, batch)
        runs["watch"].look, watch = watched(runs["watch"], data, batch)
        runs["every 100 steps"].look, fixed = watched(runs["every 100 steps"], data, batch, every=100)
        runs["norms by hand"].look = by_hand(runs["norms by hand"])
        times: dict[str, list[float]] = {kind: [] for kind in runs}
        for _ in range(arguments.stretches):
            for kind, run in runs.items():  # interleaved, so that a busy machine slows all alike
                times[kind].append(run.stretch(steps))
        plain = sum(times["plain"])
        kept = list(runs["plain"].model.parameters())
        for kind in ("watch", "every 100 steps", "norms by hand"):
            ratios = sorted(a / b - 1 for a, b in zip(times[kind], times["plain"], strict=True))
            seen = {"watch": watch, "every 100 steps": fixed}.get(kind)
            record = None if seen is None else seen.record()
            _bench.emit(
                "watch",
                f"{name}: {kind}",
                share=sum(times[kind]) / plain - 1,
                median_of_stretches=statistics.median(ratios),
                reported=None if record is None else record.costs["share"],
                step_ms=1e3 * plain / (arguments.stretches * steps),
                steps=arguments.stretches * steps,
                readings=None
                if record is None
                else {key: len(rows) for key, rows in record.readings.items()},
                noted_every=None if record is None else record.costs["stride"],
                weights_equal=all(
                    torch.equal(a, b) for a, b in zip(kept, runs[kind].model.parameters(), strict=True)
                ),
            )


if __name__ == "__main__":
    main()
