"""What does a step of adversarial training cost, in passes and in seconds, beside plain training?

Networks of growing depth on random pictures; each rule's step with gradients in ``.grad``. The unit is the plain
forward and backward pass on the same batch, measured in the same round. YOPO saves passes; whether it saves seconds
depends on the share of the first layer, so its time is printed beside it.
"""

from __future__ import annotations

from _bench import emit, environment  # isort: skip  (sets the threads before torch loads)

import argparse
import statistics
import time

import torch
from torch import nn
from torch.nn import functional as F

from bolza.robust import fast, free, pgd_training, trades, yopo
from bolza.systems import as_system

BENCH = "adversarial_training"
EPS = 0.1


def network(kind: str) -> tuple[nn.Module, torch.Tensor]:
    """A network and a batch."""
    torch.manual_seed(0)
    if kind == "mlp, 3 layers":
        widths = [64, 128, 128]
        layers = [
            part for a, b in zip(widths, widths[1:], strict=False) for part in (nn.Linear(a, b), nn.ReLU())
        ]
        return nn.Sequential(*layers, nn.Linear(128, 10)), torch.rand(128, 64)
    depth = int(kind.split(", ")[1].split()[0])
    body = [
        part
        for _ in range(depth - 1)
        for part in (nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
    ]
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        *body,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    return net, torch.rand(32, 3, 16, 16)


def main() -> None:
    """Time them round by round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--nets", nargs="+", default=["mlp, 3 layers", "conv, 4 layers", "conv, 16 layers"])
    options = parser.parse_args()
    emit(BENCH, "environment", **environment())
    for kind in options.nets:
        net, x = network(kind)
        y, system = torch.arange(len(x)) % 10, as_system(net, x)

        def first(net=net, x=x):
            at = x.clone().requires_grad_()
            z = net[0](at)
            torch.autograd.grad(z, at, torch.ones_like(z))

        about = (F.cross_entropy, x, y, EPS)
        calls = {
            "plain": lambda net=net, x=x, y=y: F.cross_entropy(net(x), y).backward(),
            "first layer alone": first,
            "fast": lambda net=net, about=about: fast(net, *about),
            "free": lambda net=net, about=about: free(net, *about),
            "PGD-7": lambda net=net, about=about: pgd_training(net, *about, 7),
            "PGD-10": lambda net=net, about=about: pgd_training(net, *about, 10),
            "YOPO-5-3": lambda system=system, about=about: yopo(system, *about, 5, 3),
            "TRADES-10": lambda net=net, about=about: trades(net, *about, 10),
        }
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        passes = {}
        for round_ in range(options.rounds + 1):
            for name, call in calls.items():
                start = time.process_time()
                step = call()
                if round_:
                    seconds[name].append(time.process_time() - start)
                step = step[0] if isinstance(step, tuple) else step
                passes[name] = getattr(step, "full_passes", None)
        for name in calls:
            ratios = [a / b for a, b in zip(seconds[name], seconds["plain"], strict=True)]
            emit(
                BENCH,
                f"{kind}, {name}",
                cpu_s=statistics.median(seconds[name]),
                over_plain=statistics.median(ratios),
                full_passes=passes[name],
            )


if __name__ == "__main__":
    main()
