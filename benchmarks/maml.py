"""How many outer steps of 5-shot MAML a second, beside the meta-learning library that one would pick instead?

Sinusoids (2 × 40 ReLU units, 25 tasks) and digits (5 ways, 16 tasks; an MLP and a small convolutional network), 5
inner steps, second order, Adam outside. Contenders: torchopt's functional optimizer task by task, the same under
``torch.func.vmap``, and its differentiable ``MetaSGD``; each round runs all of them on one batch, and the ratio is that
of the medians of CPU seconds. ``agreement`` is the largest relative difference of the meta-gradients from ours.
"""

from __future__ import annotations

from _bench import emit, environment  # isort: skip  (sets the threads before torch loads)

import argparse
import gc
import statistics
import time

import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from bolza.data import Sinusoids, digit_tasks
from bolza.meta import MAML

try:
    import torchopt
except ImportError:
    torchopt = None

BENCH = "maml"
LR, STEPS = 0.01, 5


def problem(kind: str):
    """Network, loss and a batch of tasks."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    if kind == "sinusoids":
        net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
        return net, F.mse_loss, Sinusoids(5, 10).sample(25, draw)
    if kind == "digits, MLP":
        net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
        return net, F.cross_entropy, digit_tasks(5, 5, 5, classes=range(6)).sample(16, draw)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 5),
    )
    return net, F.cross_entropy, digit_tasks(5, 5, 5, classes=range(6), images=True).sample(16, draw)


def ours(net, loss, tasks, **options):
    maml = MAML(net, lr=LR, steps=STEPS, loss=loss, **options)
    return lambda: maml(*tasks)


def functional(net, loss, tasks):
    """torchopt's functional optimizer, task by task."""
    (x, y), (qx, qy) = tasks

    def outer():
        total = 0.0
        for i in range(len(x)):
            params = dict(net.named_parameters())
            optimizer = torchopt.FuncOptimizer(torchopt.sgd(lr=LR))
            for _ in range(STEPS):
                params = optimizer.step(loss(functional_call(net, params, x[i]), y[i]), params)
            total = total + loss(functional_call(net, params, qx[i]), qy[i])
        return total / len(x)

    return outer


def batched(net, loss, tasks):
    """torchopt's functional optimizer under vmap."""

    def one(params, x, y, qx, qy):
        optimizer = torchopt.sgd(lr=LR)
        state = optimizer.init(params)
        for _ in range(STEPS):
            slopes = grad(lambda p: loss(functional_call(net, p, x), y))(params)
            updates, state = optimizer.update(slopes, state, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
        return loss(functional_call(net, params, qx), qy)

    (x, y), (qx, qy) = tasks
    return lambda: vmap(one, in_dims=(None, 0, 0, 0, 0))(dict(net.named_parameters()), x, y, qx, qy).mean()


def differentiable(net, loss, tasks):
    """torchopt's MetaSGD with the network's state kept and put back for each task."""
    (x, y), (qx, qy) = tasks

    def outer():
        total = 0.0
        start = torchopt.extract_state_dict(net, by="reference")
        for i in range(len(x)):
            optimizer = torchopt.MetaSGD(net, lr=LR)
            for _ in range(STEPS):
                optimizer.step(loss(net(x[i]), y[i]))
            total = total + loss(net(qx[i]), qy[i])
            torchopt.recover_state_dict(net, start)
        return total / len(x)

    return outer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    emit(BENCH, "environment", **environment("torchopt"))
    for kind in ("sinusoids", "digits, MLP", "digits, convolutional"):
        net, loss, tasks = problem(kind)
        ways = {
            "bolza": ours(net, loss, tasks),
            "bolza, checkpointed": ours(net, loss, tasks, checkpointed=True),
        }
        if torchopt is None:
            emit(BENCH, f"{kind}: torchopt", skipped="not installed: pip install 'bolza[peers]'")
        else:
            ways |= {
                "torchopt, functional": functional(net, loss, tasks),
                "torchopt, functional under vmap": batched(net, loss, tasks),
                "torchopt, MetaSGD": differentiable(net, loss, tasks),
            }
        params = list(net.parameters())
        slopes = {name: torch.autograd.grad(way(), params) for name, way in ways.items()}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        before = net.state_dict()
        outer = torch.optim.Adam(params, lr=1e-3)
        for _ in range(rounds):
            for name, way in ways.items():
                gc.collect()
                start = time.process_time()
                outer.zero_grad()
                way().backward()
                outer.step()
                seconds[name].append(time.process_time() - start)
        net.load_state_dict(before)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        for name, median in medians.items():
            ahead = [
                float((a - b).abs().max() / b.abs().max())
                for a, b in zip(slopes[name], slopes["bolza"], strict=True)
            ]
            emit(
                BENCH,
                f"{kind}: {name}",
                cpu_s=median,
                steps_per_second=1 / median,
                ratio=median / medians["bolza"],
                agreement=max(ahead),
            )


if __name__ == "__main__":
    main()
