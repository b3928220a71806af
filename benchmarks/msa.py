"""What does a step of successive approximation cost, beside a gradient step and beside layer after layer?

Two networks on which a step is bound by the number of operations, not by their size: a 64-64×5-10 MLP with batch 64,
and twenty residual layers of five nodes with 100 points. Each round takes, one after the other, a step of SGD, of MSA
and EMSA with their defaults, of EMSA with ten iterations, and the sweep that EMSA replaces: every layer minimised by
itself, by ``torch.optim.LBFGS`` with ten iterations, from the same states and costates. Processor time, medians over
rounds, ratios to SGD.

    python benchmarks/msa.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

from _bench import emit, environment  # isort: skip  (first: it sets the number of threads)

import torch
from torch import Tensor, nn

from bolza.core import TerminalCost, adjoint, rollout
from bolza.ops.trees import float_leaves, tree_map
from bolza.optim import EMSA, MSA
from bolza.solve import hamiltonian_sweep
from bolza.systems import as_system


class Flow(nn.Module):
    """x ← x + δ tanh(W x + b)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(20))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + 0.25 * torch.tanh(layer(x))
        return x


def mlp() -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(5):
        layers += [nn.Linear(64, 64), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def torch_lbfgs(function, u):
    """The minimiser that a user would take, for one layer."""
    v = tree_map(lambda leaf: leaf.detach().clone().requires_grad_(), u)
    leaves = float_leaves(v)
    solver = torch.optim.LBFGS(leaves, max_iter=10, history_size=10, line_search_fn="strong_wolfe")

    def objective():
        value = function(v)
        for leaf, grad in zip(leaves, torch.autograd.grad(value, leaves), strict=True):
            leaf.grad = grad
        return value

    with torch.enable_grad():
        solver.step(objective)
    return tree_map(Tensor.detach, v)


def cases(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], None]]:
    loss = nn.functional.mse_loss
    steps: dict[str, Callable[[], None]] = {}
    for name, make in {
        "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=1e-3),
        "msa": lambda m: MSA(m, lr=1e-3),
        "emsa": lambda m: EMSA(m, lr=1e-3),
        "emsa, 10 iterations": lambda m: EMSA(m, lr=1e-3, iterations=10),
    }.items():
        model = copy.deepcopy(net)
        optimizer = make(model)

        def step(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()

        steps[name] = step
    system, cost = as_system(copy.deepcopy(net), x), TerminalCost(loss, y)

    def layer_after_layer() -> None:
        with torch.no_grad():
            run = rollout(system, x)
        hamiltonian_sweep(system, cost, adjoint(system, cost, run), torch_lbfgs, rho=1.0, samples=len(x))

    steps["layer after layer, torch.optim.LBFGS, 10 iterations"] = layer_after_layer
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    emit("msa", "environment", **environment())
    torch.manual_seed(0)
    points = torch.linspace(-torch.pi, torch.pi, 100)[:, None].expand(-1, 5).contiguous()
    problems = {
        "MLP 64-64×5-10, batch 64": (mlp(), torch.randn(64, 64), torch.randn(64, 10)),
        "20 residual layers of 5 nodes, 100 points": (Flow(), points, torch.sin(points)),
    }
    for problem, (net, x, y) in problems.items():
        steps = cases(net, x, y)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for step in steps.values():
            step()
        for _ in range(rounds):
            for name, step in steps.items():
                repeats = 10 if name == "sgd" else 1
                start = time.process_time()
                for _ in range(repeats):
                    step()
                times[name].append((time.process_time() - start) / repeats)
        base = statistics.median(times["sgd"])
        for name, found in times.items():
            emit(
                "msa",
                f"{problem}: {name}",
                cpu_s=statistics.median(found),
                over_sgd=statistics.median(found) / base,
            )


if __name__ == "__main__":
    main()
