"""What does it cost to score every example of a pool, beside training on it, and what memory does it take?

MLP and a small convolutional network on digits, T steps of full-batch descent. The unit is the plain run of T
gradients, measured in the same round. Contenders: autograd through the whole run in one graph, and what one would do by
hand at each step, the costate and each example's gradient by ``torch.func.vmap``. Each in a process of its own, so that
its peak memory is its own; ``agreement`` is the largest relative difference of the scores from ours.
"""

from __future__ import annotations

from _bench import emit, environment, memory, peak_memory  # isort: skip  (sets the threads before torch loads)

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from bolza.controllers import data_values
from bolza.data import digits, digits_images

BENCH = "data_values"
RATE, POOL, TARGET = 0.2, 1000, 100
WAYS = ("plain run", "data_values", "data_values, chunks of 100", "autograd through the run", "vmap by hand")


def problem(kind: str):
    """Network, pool and target."""
    torch.manual_seed(0)
    data = digits() if kind == "mlp" else digits_images()
    net = (
        nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10))
        if kind == "mlp"
        else nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(128, 10),
        )
    )
    pool = data.train_x[:POOL], data.train_y[:POOL]
    return net, pool, (data.train_x[POOL : POOL + TARGET], data.train_y[POOL : POOL + TARGET])


def plain_run(net, pool, target, steps):
    params = {name: p.detach() for name, p in net.named_parameters()}
    for _ in range(steps):
        leaves = {name: p.requires_grad_() for name, p in params.items()}
        slopes = torch.autograd.grad(
            F.cross_entropy(functional_call(net, leaves, pool[0]), pool[1]), list(leaves.values())
        )
        with torch.no_grad():
            params = {name: p - RATE * g for (name, p), g in zip(leaves.items(), slopes, strict=True)}
    return torch.zeros(POOL)


def unrolled(net, pool, target, steps):
    params = {name: p.detach().requires_grad_() for name, p in net.named_parameters()}
    gamma = torch.full((POOL,), 1 / POOL, requires_grad=True)
    area = torch.zeros(())
    for _ in range(steps):
        losses = F.cross_entropy(functional_call(net, params, pool[0]), pool[1], reduction="none")
        slopes = torch.autograd.grad((gamma * losses).sum(), list(params.values()), create_graph=True)
        params = {name: p - RATE * g for (name, p), g in zip(params.items(), slopes, strict=True)}
        area = area + F.cross_entropy(functional_call(net, params, target[0]), target[1])
    return -torch.autograd.grad(area, gamma)[0]


def by_hand(net, pool, target, steps):
    def loss(params, batch):
        return F.cross_entropy(functional_call(net, params, batch[0]), batch[1])

    def one(params, x, y):
        return loss(params, (x[None], y[None]))

    slope, each = grad(loss), vmap(grad(one), in_dims=(None, 0, 0), chunk_size=250)
    states = [{name: p.detach() for name, p in net.named_parameters()}]
    for _ in range(steps):
        g = slope(states[-1], pool)
        states.append({name: p - RATE * g[name] for name, p in states[-1].items()})
    costate, scores = slope(states.pop(), target), torch.zeros(POOL)
    for t in range(steps - 1, -1, -1):
        params = states.pop()
        rows = each(params, *pool)
        scores += RATE * sum((rows[name].flatten(1) @ costate[name].flatten()) for name in rows)
        along = torch.func.jvp(lambda p: slope(p, pool), (params,), (costate,))[1]
        add = slope(params, target) if t else {name: torch.zeros_like(p) for name, p in params.items()}
        costate = {name: costate[name] - RATE * along[name] + add[name] for name in costate}
    return scores


def ours(chunk):
    def run(net, pool, target, steps):
        return data_values(net, F.cross_entropy, pool, target, steps=steps, lr=RATE, chunk=chunk).scores

    return run


RUNS = dict(zip(WAYS, (plain_run, ours(None), ours(100), unrolled, by_hand), strict=True))


def child(kind: str, way: str, steps: int, repeat: int) -> None:
    """One way in this process: CPU seconds a run beside those of the plain run, and memory above the start."""
    net, pool, target = problem(kind)
    for run in (plain_run, RUNS[way]):
        run(net, pool, target, 2)  # what loads once is loaded
    before, seconds, units, scores = memory(), [], [], torch.zeros(0)
    for _ in range(repeat):
        for run, into in ((plain_run, units), (RUNS[way], seconds)):
            start = time.process_time()
            scores = run(net, pool, target, steps)
            into.append(time.process_time() - start)
    ratios = [a / b for a, b in zip(seconds, units, strict=True)]
    print(
        json.dumps(
            {
                "cpu_s": statistics.median(seconds),
                "plain_runs": statistics.median(ratios),
                "memory_mib": max(0.0, peak_memory() - before),
                "scores": scores.tolist(),
            }
        )
    )


def main() -> None:
    """Run every way on every network."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child, args.steps, args.repeat)
        return
    emit(BENCH, "environment", **environment())
    for kind in ("mlp", "conv"):
        found = {}
        for way in WAYS:
            options = ["--steps", str(args.steps), "--repeat", str(args.repeat)]
            command = [sys.executable, __file__, "--child", kind, way, *options]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[way] = json.loads(output.splitlines()[-1])
        exact = torch.tensor(found["data_values"]["scores"])
        for way, row in found.items():
            scores = torch.tensor(row.pop("scores"))
            if way != "plain run":
                row["agreement"] = float((scores - exact).abs().max() / exact.abs().max())
            emit(BENCH, f"{kind}: {way}", steps=args.steps, **row)


if __name__ == "__main__":
    main()
