"""How many steps to 90 % training accuracy, by initialiser and depth?

    python benchmarks/initialisers.py [--full] [--depths 20 50 100] [--activations tanh relu]

Digits (1,438 images of 8 × 8), fully connected networks of one width, SGD with momentum 0.9, batches of 64. Each
initialiser gets its own learning rate from the same grid: the one that is fastest with seed 0; then other seeds
with that rate alone. What counts is the accuracy on 512 training images, looked at every 10 steps. "–" means that
no rate reached it within the budget; a rate at the edge of the grid is marked with *.

Beside `critical_init_` (schemes orthogonal, gaussian, and mirrored where the activation allows it): PyTorch's
default, Xavier, He, orthogonal with the gain that PyTorch recommends, and LSUV written by hand (orthogonal weights,
then each layer rescaled to unit variance on 256 images).

By default one seed for tuning and three for the figure, depths 20 and 50, width 48: about two minutes of a quiet
core. `--full`: depths 20, 50 and 100, width 64, five seeds; tens of minutes.
"""

from __future__ import annotations

import _bench  # isort: skip  # sets the number of threads before torch is imported

import argparse
import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.data import digits
from bolza.meanfield import critical_init_
from bolza.models import mlp

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
EVERY = 10
TARGET = 0.9
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": torch.relu, "gelu": F.gelu}


def linears(net: nn.Module) -> list[nn.Linear]:
    return [m for m in net.modules() if isinstance(m, nn.Linear)]


def with_zero_biases(fill: Callable[[Tensor], Any]) -> Callable[..., None]:
    def init(net: nn.Module, x: Tensor, generator: torch.Generator) -> None:
        for layer in linears(net):
            fill(layer.weight)
            nn.init.zeros_(layer.bias)

    return init


def lsuv(net: nn.Module, x: Tensor, generator: torch.Generator) -> None:
    h = x[:256]
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight)
                nn.init.zeros_(layer.bias)
                for _ in range(3):
                    layer.weight.div_(layer(h).std())
            h = layer(h)


def critical(scheme: str) -> Callable[..., None]:
    def init(net: nn.Module, x: Tensor, generator: torch.Generator) -> None:
        critical_init_(net, x[:256], scheme=scheme, generator=generator)

    return init


def initialisers(activation: str) -> dict[str, Callable[..., None]]:
    gain = nn.init.calculate_gain("tanh" if activation == "tanh" else "relu")
    table = {
        "PyTorch default": lambda net, x, generator: None,
        "Xavier": with_zero_biases(nn.init.xavier_normal_),
        "He": with_zero_biases(lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu")),
        "orthogonal": with_zero_biases(lambda w: nn.init.orthogonal_(w, gain)),
        "LSUV": lsuv,
        "critical_init_ gaussian": critical("gaussian"),
        "critical_init_ orthogonal": critical("orthogonal"),
    }
    if activation != "tanh":
        table["critical_init_ mirrored"] = critical("mirrored")
    return table


class Stack:
    """Networks of one shape side by side: weights (members, out, in)."""

    def __init__(self, nets: list[nn.Module], activation: str, rates: list[float]) -> None:
        layers = [linears(net) for net in nets]
        self.phi = ACTIVATIONS[activation]
        self.weights = [torch.stack([n[i].weight.detach() for n in layers]) for i in range(len(layers[0]))]
        self.biases = [
            torch.stack([n[i].bias.detach() for n in layers])[:, None] for i in range(len(layers[0]))
        ]
        self.parameters = [p.requires_grad_() for p in (*self.weights, *self.biases)]
        self.velocity = [torch.zeros_like(p) for p in self.parameters]
        self.rates = torch.tensor(rates)[:, None, None]

    def __call__(self, x: Tensor) -> Tensor:
        h = x.expand(len(self.weights[0]), *x.shape)
        for i, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(b, h if i == 0 else self.phi(h), w.transpose(1, 2))
        return h

    def step(self, x: Tensor, y: Tensor) -> None:
        out = self(x)
        loss = F.cross_entropy(out.flatten(0, 1), y.repeat(len(out)), reduction="sum") / len(y)
        grads = torch.autograd.grad(loss, self.parameters)
        with torch.no_grad():
            for p, v, g in zip(self.parameters, self.velocity, grads, strict=True):
                v.mul_(0.9).add_(g)
                p.sub_(self.rates * v)

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> Tensor:
        return (self(x).argmax(-1) == y).double().mean(1)


def steps_to_target(
    stack: Stack, x: Tensor, y: Tensor, budget: int, seed: int, first_only: bool
) -> list[float]:
    """Steps until each member reaches the target; inf if it does not. ``first_only`` stops with the fastest."""
    generator = torch.Generator().manual_seed(seed)
    reached = [math.inf] * len(stack.rates)
    order = torch.randperm(len(x), generator=generator)
    at = 0
    for k in range(1, budget + 1):
        if at + 64 > len(x):
            order, at = torch.randperm(len(x), generator=generator), 0
        batch = order[at : at + 64]
        at += 64
        stack.step(x[batch], y[batch])
        if k % EVERY == 0:
            for m, a in enumerate(stack.accuracy(x[:512], y[:512]).tolist()):
                if a >= TARGET and reached[m] == math.inf:
                    reached[m] = k
            if all(r < math.inf for r in reached) or (first_only and min(reached) < math.inf):
                break
    return reached


def networks(
    init: Callable[..., None], depth: int, width: int, activation: str, seeds: list[int], x: Tensor
) -> list[nn.Module]:
    nets = []
    for seed in seeds:
        torch.manual_seed(seed)
        net = mlp(depth, width, activation)
        init(net, x, torch.Generator().manual_seed(seed))
        nets.append(net)
    return nets


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--depths", type=int, nargs="+")
    parser.add_argument("--activations", nargs="+", choices=list(ACTIVATIONS), default=["tanh", "relu"])
    options = parser.parse_args()
    depths = options.depths or ([20, 50, 100] if options.full else [20, 50])
    width, budget, seeds = (64, 400, 5) if options.full else (48, 150, 3)
    data = digits()
    x, y = data.train_x.flatten(1), data.train_y
    rows: list[dict[str, Any]] = []
    start = time.process_time()
    for activation in options.activations:
        print(
            f"\n{activation}, width {width}: median steps to {TARGET:.0%} training accuracy (range over {seeds} seeds)"
        )
        for name, init in initialisers(activation).items():
            cells = []
            for depth in depths:
                net = networks(init, depth, width, activation, [0], x)[0]
                tuned = steps_to_target(
                    Stack([net] * len(RATES), activation, list(RATES)), x, y, budget, 0, True
                )
                best = tuned.index(min(tuned)) if min(tuned) < math.inf else None
                steps: list[float] = []
                if best is not None:
                    nets = networks(init, depth, width, activation, list(range(1, seeds + 1)), x)
                    steps = steps_to_target(
                        Stack(nets, activation, [RATES[best]] * seeds), x, y, budget, 1, False
                    )
                rows.append({
                    "activation": activation, "initialiser": name, "depth": depth,
                    "rate": None if best is None else RATES[best],
                    "edge": best in (0, len(RATES) - 1),
                    "steps": [None if math.isinf(s) else int(s) for s in steps],
                    "median": None if not steps or math.isinf(median(steps)) else median(steps),
                })  # fmt: skip
                cells.append(cell(steps, rows[-1]))
            print(
                f"  {name:<26}" + "".join(f"{f'{d}: {c}':<34}" for d, c in zip(depths, cells, strict=True)),
                flush=True,
            )
    seconds = time.process_time() - start
    print(f"\n{seconds:.0f} CPU seconds")
    _bench.emit("initialisers", "environment", **_bench.environment(), width=width, budget=budget, seeds=seeds,
                rates=RATES, batch=64, momentum=0.9, target=TARGET, cpu_s=seconds)  # fmt: skip
    for row in rows:
        name = f"{row['activation']}, depth {row['depth']}: {row['initialiser']}"
        _bench.emit("initialisers", name, **row)


def cell(steps: list[float], row: dict[str, Any]) -> str:
    if not steps:
        return "–"
    words = [f"{s:.0f}" if s < math.inf else "never" for s in (median(steps), min(steps), max(steps))]
    return f"{words[0]} ({words[1]}–{words[2]}) lr {row['rate']:g}{'*' if row['edge'] else ''}"


if __name__ == "__main__":
    main()
