"""Is a fixed-step Neural ODE as fast as a loop written by hand, and what do adjoint and checkpoints cost?

    python benchmarks/neural_ode.py [--repeat 9] [--quick]

One forward and backward pass of a field 64-128-64, batch 128, float32, one thread. Contenders run in turn, CPU
seconds, medians; ``times`` is over a plain loop of the same RK4 steps. torchdiffeq's rk4 is the 3/8 rule, of the same
order and cost. ``gradient_error`` is the relative distance from the gradient of back-propagation through 200 RK4
steps in float64, ``kept_mib`` what the graph of the forward pass keeps, each tensor once.
"""

from __future__ import annotations

from _bench import emit, environment  # isort: skip  (sets the threads before torch loads)

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchdiffeq import odeint, odeint_adjoint

from bolza.models import NeuralODE

BENCH = "neural_ode"
TOLERANCE = 1e-5


class Timed(nn.Module):
    """A field with the time first, as torchdiffeq calls it."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.field(x)


def by_hand(field: nn.Module, x: Tensor, steps: int) -> Tensor:
    """Classical Runge–Kutta as one writes it down."""
    h = 1 / steps
    for _ in range(steps):
        k1 = field(x)
        k2 = field(x + h / 2 * k1)
        k3 = field(x + h / 2 * k2)
        k4 = field(x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def contenders(field: nn.Module, x: Tensor, steps: int) -> dict[str, Callable[[], Tensor]]:
    """Each gives the state at time 1."""
    timed, ends = Timed(field), torch.tensor([0.0, 1.0])
    grid = torch.linspace(0, 1, steps + 1)
    loose = {"rtol": TOLERANCE, "atol": TOLERANCE}
    out: dict[str, Callable[[], Tensor]] = {"rk4 by hand": lambda: by_hand(field, x, steps)}
    for gradient in ("autograd", "checkpoint", "adjoint"):
        layer = NeuralODE(field, steps=steps, gradient=gradient)
        out[f"bolza rk4, {gradient}"] = lambda layer=layer: layer(x)
    out["torchdiffeq rk4"] = lambda: odeint(timed, x, grid, method="rk4")[-1]
    out["torchdiffeq rk4, adjoint"] = lambda: odeint_adjoint(
        timed, x, ends, method="rk4", options={"step_size": 1 / steps}
    )[-1]
    for gradient in ("autograd", "adjoint"):
        layer = NeuralODE(field, method="dopri5", gradient=gradient, **loose)
        out[f"bolza dopri5, {gradient}"] = lambda layer=layer: layer(x)
    out["torchdiffeq dopri5"] = lambda: odeint(timed, x, ends, method="dopri5", **loose)[-1]
    out["torchdiffeq dopri5, adjoint"] = lambda: odeint_adjoint(timed, x, ends, method="dopri5", **loose)[-1]
    return out


def gradient_of(field: nn.Module, end: Tensor) -> Tensor:
    """Gradient of the sum of squares in the parameters."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(end.square().sum(), list(field.parameters()))])


def kept(run: Callable[[], Tensor]) -> float:
    """MiB that the graph keeps."""
    sizes: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        run()
    return sum(sizes.values()) / 2**20


def main() -> None:
    """Run all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    repeat, steps, batch = (1, 4, 16) if options.quick else (options.repeat, 20, 128)
    emit(BENCH, "environment", **environment("torchdiffeq"))
    torch.manual_seed(0)
    field = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    x = torch.randn(batch, 64)
    precise = copy.deepcopy(field).double()
    exact = gradient_of(precise, by_hand(precise, x.double(), 200))
    seconds: dict[str, list[float]] = {}
    running = contenders(field, x, steps)
    for _ in range(repeat + 1):  # the first round warms up
        for name, run in running.items():
            start = time.process_time()
            gradient_of(field, run())
            seconds.setdefault(name, []).append(time.process_time() - start)
    base = statistics.median(seconds["rk4 by hand"][1:])
    for name, run in running.items():
        median = statistics.median(seconds[name][1:])
        found = gradient_of(field, run()).double()
        emit(
            BENCH,
            name,
            cpu_s=median,
            times=median / base,
            gradient_error=float((found - exact).norm() / exact.norm()),
            kept_mib=kept(run),
            steps=steps,
            batch=batch,
        )


if __name__ == "__main__":
    main()
