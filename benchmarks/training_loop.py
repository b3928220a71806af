"""What does the run loop cost beside a loop written by hand, and what does training an ensemble at once save?

    python benchmarks/training_loop.py [--repeats 3] [--json FILE]

Both sides of each comparison run in this process, one after the other, on one thread, in CPU seconds (wall
seconds mean little on a shared machine); medians over the repeats.

1. A 50-layer tanh network of width 100 on digits, batch 64, SGD with momentum: `bolza.training.train` with its
   checks of loss and gradient at every step, with two records (start and end) and with the default twenty, against
   the shortest loop a user would write, which records nothing, with a `DataLoader` and with plain indexing.
2. M perceptrons with different initial variances: `train_ensemble` against M runs one after the other.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from bolza.data import Dataset, digits
from bolza.models import mlp
from bolza.training import BatchOrder, ensemble_parameters, train, train_ensemble

OPTIONS = {"lr": 0.01, "momentum": 0.9}


def by_hand(model: nn.Module, data: Dataset, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), **OPTIONS)
    for _ in range(steps):
        chosen = torch.randint(len(data), (64,))
        x, y = data.train_x[chosen], data.train_y[chosen]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def with_loader(model: nn.Module, data: Dataset, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), **OPTIONS)
    loader = DataLoader(
        TensorDataset(data.train_x, data.train_y), batch_size=64, shuffle=True, drop_last=True
    )
    done = 0
    while True:
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            done += 1
            if done == steps:
                return


def ours(model: nn.Module, data: Dataset, steps: int) -> None:
    train(model, data, steps=steps, eval_every=steps, **OPTIONS)


def ours_with_records(model: nn.Module, data: Dataset, steps: int) -> None:
    train(model, data, steps=steps, **OPTIONS)


def one_by_one(depth: int, width: int, data: Dataset, steps: int, weight_vars: list[float]) -> None:
    start = ensemble_parameters(lambda: mlp(depth, width), weight_vars)
    for m in range(len(weight_vars)):
        model = mlp(depth, width)
        model.load_state_dict({name: p[m] for name, p in start.items()})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        order = BatchOrder(data.train_x, data.train_y, 64, seed=0)
        for _ in range(steps):
            x, y = order.next()
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


def at_once(depth: int, width: int, data: Dataset, steps: int, weight_vars: list[float]) -> None:
    train_ensemble(lambda: mlp(depth, width), data, weight_vars=weight_vars, lr=0.1, steps=steps)


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data, steps = digits(), arguments.steps
    record: dict[str, object] = {
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "threads": 1,
    }

    loops = {
        "train()": ours,
        "train(), 20 records": ours_with_records,
        "by hand, indexing": by_hand,
        "by hand, DataLoader": with_loader,
    }
    times: dict[str, list[float]] = {name: [] for name in loops}
    by_hand(mlp(50, 100), data, 10)
    for _ in range(arguments.repeats):  # interleaved, so that a busy machine slows all alike
        for name, loop in loops.items():
            model = mlp(50, 100)
            times[name].append(seconds(lambda loop=loop, model=model: loop(model, data, steps)))
    print("50-layer tanh network, width 100, digits, batch 64")
    for name, values in times.items():
        print(
            f"  {name:22s} {steps / median(values):7.1f} steps/s  (spread {min(values):.2f}–{max(values):.2f} s)"
        )
    record["steps_per_second"] = {name: steps / median(values) for name, values in times.items()}

    print("ensembles: CPU seconds for 50 steps of every member")
    rows = []
    for depth, width, members in ((10, 16, 64), (10, 32, 64), (20, 64, 32), (30, 100, 16)):
        variances = torch.linspace(0.5, 3, members).tolist()
        case = (depth, width, data, 50, variances)
        alone = median(seconds(partial(one_by_one, *case)) for _ in range(arguments.repeats))
        together = median(seconds(partial(at_once, *case)) for _ in range(arguments.repeats))
        rows.append({"depth": depth, "width": width, "members": members, "alone": alone, "at_once": together})
        print(
            f"  depth {depth:3d}, width {width:3d}, {members:3d} members: one by one {alone:6.2f}, "
            f"at once {together:6.2f}, ratio {alone / together:.1f}"
        )
    record["ensembles"] = rows
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=2)


if __name__ == "__main__":
    main()
