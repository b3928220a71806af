"""Does second-order training of a Neural ODE pay in time, beside what one would use instead?

Two networks: digits through the flow of a dense field (64 → 32, hidden 48, ten Euler steps), and digits as images
through the flow of a convolutional field of 16 channels (four RK4 steps). For each: CPU time of a step over that of
Adam, and CPU time to a target loss, every method at the best of three learning rates, methods in turn over seeds.
``target`` is the loss that every run of the best Adam reaches. Then the time of one refresh, and what a refresh
iteration keeps in memory, with and without the adjoint.

``--quick``: one seed and two epochs.
"""

from __future__ import annotations

from _bench import emit, environment, timed  # isort: skip  (sets the threads before torch loads)

import argparse
import statistics
import time
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from bolza.data import digits
from bolza.models.continuous import ContinuousBlock, NeuralODE
from bolza.optim import SNOpt

BENCH = "snopt"


def dense(seed: int, gradient: str = "autograd", steps: int = 10) -> nn.Module:
    torch.manual_seed(seed)
    field = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32))
    block = NeuralODE(field, method="euler", steps=steps, gradient=gradient)
    return nn.Sequential(nn.Linear(64, 32), block, nn.Linear(32, 10))


def conv(seed: int, gradient: str = "autograd", steps: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    field = nn.Sequential(nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 3, padding=1), nn.Tanh())
    block = ContinuousBlock(field, method="rk4", steps=steps, gradient=gradient)
    head = (nn.AvgPool2d(2), nn.Flatten(), nn.Linear(144, 10))
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3), nn.ReLU(), block, *head)


def methods():
    adam, sgd = torch.optim.Adam, torch.optim.SGD
    return {
        "snopt": {lr: partial(SNOpt, lr=lr, refresh=20) for lr in (0.02, 0.05, 0.1)},
        "adam": {lr: lambda m, lr=lr: adam(m.parameters(), lr=lr) for lr in (3e-3, 1e-2, 3e-2)},
        "momentum": {
            lr: lambda m, lr=lr: sgd(m.parameters(), lr=lr, momentum=0.9) for lr in (0.03, 0.1, 0.3)
        },
    }


def train(net, optimizer, x, y, epochs: int, seed: int):
    """CPU seconds of training and the loss on all data, noted every half epoch; step times."""
    draw, spent, course, steps, number = torch.Generator().manual_seed(seed), 0.0, [], [], 0
    every = len(x) // 64 // 2
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=draw)[: len(x) // 64 * 64].split(64):
            clock = time.process_time()
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
            steps.append(time.process_time() - clock)
            spent += steps[-1]
            number += 1
            if number % every == 0:
                with torch.no_grad():
                    course.append((spent, float(F.cross_entropy(net(x), y))))
    return course, statistics.mean(steps)


def time_to(course, target: float) -> float:
    before = (0.0, course[0][1])
    for spent, loss in course:
        if loss <= target:
            share = (before[1] - target) / (before[1] - loss) if before[1] > loss else 1.0
            return before[0] + min(max(share, 0.0), 1.0) * (spent - before[0])
        before = (spent, loss)
    return float("inf")


def compare(name: str, build, x, y, epochs: int, seeds: int) -> None:
    runs = {method: {lr: [] for lr in rates} for method, rates in methods().items()}
    for seed in range(seeds):
        for method, rates in methods().items():
            for lr, make in rates.items():
                net = build(seed)
                runs[method][lr].append(train(net, make(net), x, y, epochs, seed))
    best = {m: min(r, key=lambda lr: sum(c[-1][1] for c, _ in r[lr])) for m, r in runs.items()}
    chosen = {m: runs[m][lr] for m, lr in best.items()}
    target = max(course[-1][1] for course, _ in chosen["adam"])
    reference = statistics.median(time_to(course, target) for course, _ in chosen["adam"])
    cost = statistics.median(step for _, step in chosen["adam"])
    for method, found in chosen.items():
        times = [time_to(course, target) for course, _ in found]
        reached = statistics.median(times)
        emit(
            BENCH,
            f"{name}: {method}",
            lr=best[method],
            loss=statistics.median(course[-1][1] for course, _ in found),
            losses=[course[-1][1] for course, _ in found],
            target=target,
            cpu_s_to_target=None if reached == float("inf") else reached,
            time_over_adam=None if reached == float("inf") else reached / reference,
            step_over_adam=statistics.median(step for _, step in found) / cost,
        )


def refresh(name: str, build, x, y) -> None:
    """CPU time of a step that computes factors and eigenvectors, over an ordinary one; the two in turn."""
    ratios = []
    steppers = []
    for every in (1, 10**9):
        net = build(0)
        optimizer = SNOpt(net, lr=0.0, refresh=every)

        def step(net=net, optimizer=optimizer) -> None:
            optimizer.zero_grad()
            F.cross_entropy(net(x[:64]), y[:64]).backward()
            optimizer.step()

        step()
        steppers.append(step)
    for _ in range(5):
        times = [timed(step, repeat=5, warmup=0)["cpu_s"] for step in steppers]
        ratios.append(times[0] / times[1])
    emit(BENCH, f"{name}: refresh step over ordinary step", ratio=statistics.median(ratios))


def memory(name: str, build, x, y) -> None:
    """Bytes that autograd keeps in a refresh iteration."""
    held = {}
    for gradient in ("autograd", "adjoint"):
        for steps in (10, 100):
            net = build(0, gradient, steps)
            optimizer = SNOpt(net, refresh=1)
            kept: dict[int, int] = {}

            def keep(t, kept=kept):
                kept[t.data_ptr()] = t.numel() * t.element_size()
                return t

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                loss = F.cross_entropy(net(x[:64]), y[:64])
            loss.backward()
            optimizer.close()
            held[f"{gradient}_{steps}"] = sum(kept.values()) / 1024
    emit(BENCH, f"{name}: kB kept for backward in a refresh iteration", **held)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, two epochs")
    quick = parser.parse_args().quick
    emit(BENCH, "environment", **environment())
    data = digits()
    low, high = data.train_x.amin(), data.train_x.amax()
    x, y = (data.train_x - low) / (high - low), data.train_y
    for name, build in (("dense field", dense), ("convolutional field", conv)):
        compare(name, build, x, y, epochs=2 if quick else 6, seeds=1 if quick else 3)
        refresh(name, build, x, y)
        memory(name, build, x, y)


if __name__ == "__main__":
    main()
