"""How fast is the Lyapunov spectrum, beside building every Jacobian?

    python benchmarks/lyapunov.py [--repeat 3]

All in this process, one thread, CPU seconds, medians, contenders interleaved; ``times`` is a contender's time over
ours. Our time includes everything that `lyapunov_exponents` does, the recording of the tangent among it. The
contenders run the same QR method on the same trajectory, and must agree on λ₁.

1. An LSTM of 128 units (256 numbers of state) driven for 200 steps, the 8 largest exponents and all of them:
   Jacobians by `torch.func.jacrev`, and by `torch.func.jacfwd`, of each step.
2. Four trajectories at once of a random tanh network of 300 units, 200 steps, the largest exponent: the same
   Jacobians, batched by `torch.vmap`.
3. Lorenz-63, 256 first states, 1000 steps of RK4: the same.
"""

from __future__ import annotations

from _bench import emit, environment  # isort: skip  (sets the threads before torch loads)

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bolza.stability import lyapunov_exponents
from bolza.stability.recurrent import as_driven_map
from bolza.systems import ODESystem

BENCH = "lyapunov"
F64 = torch.float64


def with_jacobians(
    step: Callable[[int, Tensor], Tensor], x: Tensor, steps: int, k: int, jacobian: Callable[..., Any]
) -> Tensor:
    """The QR method as one writes it down: states (batch, n), a Jacobian a step, a product, a QR."""
    frame = torch.linalg.qr(torch.randn(x.shape[0], x.shape[1], k, dtype=x.dtype)).Q
    sums = x.new_zeros(x.shape[0], k)
    with torch.no_grad():
        for t in range(steps):
            j = torch.vmap(jacobian(lambda v, t=t: step(t, v[None])[0]))(x)
            frame, r = torch.linalg.qr(j @ frame)
            sums += r.diagonal(dim1=-2, dim2=-1).abs().log()
            x = step(t, x)
    return (sums / steps).mean(0)


def race(
    contenders: dict[str, Callable[[], Tensor]], repeat: int
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Median CPU seconds of each, one after the other in turn, and what each found."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    found = {}
    for _ in range(repeat):
        for name, run in contenders.items():
            start = time.process_time()
            found[name] = run()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}, found


def report(name: str, contenders: dict[str, Callable[[], Tensor]], repeat: int, **values: Any) -> None:
    """One line a contender, the first being ours."""
    seconds, found = race(contenders, repeat)
    ours = next(iter(contenders))
    for contender, taken in seconds.items():
        emit(
            BENCH,
            name,
            contender=contender,
            cpu_s=taken,
            times=taken / seconds[ours],
            largest=float(found[contender][0]),
            **values,
        )


def lstm(repeat: int, width: int = 128, steps: int = 200) -> None:
    """A driven LSTM."""
    torch.manual_seed(0)
    module, inputs = nn.LSTM(16, width).to(F64), torch.randn(steps, 1, 16, dtype=F64)
    driven = as_driven_map(module, None, inputs)

    def step(t: int, v: Tensor) -> Tensor:
        parts = tuple(part[:, None] for part in v.split(width, 1))
        return torch.cat([part.flatten(1) for part in driven.step(t, parts, driven.input(t))], 1)

    start = torch.cat([part.flatten(1) for part in driven.state], 1)
    for k in (8, 2 * width):
        contenders = {
            "bolza": lambda k=k: lyapunov_exponents(module, inputs=inputs, k=k).exponents,
            "jacrev": lambda k=k: with_jacobians(step, start, steps, k, torch.func.jacrev),
            "jacfwd": lambda k=k: with_jacobians(step, start, steps, k, torch.func.jacfwd),
        }
        report("lstm", contenders, repeat, size=2 * width, k=k, steps=steps)


def tanh_network(repeat: int, width: int = 300, steps: int = 200) -> None:
    """The largest exponent of a random network."""
    generator = torch.Generator().manual_seed(0)
    w = 2 * torch.randn(width, width, generator=generator, dtype=F64) / math.sqrt(width)
    start = torch.randn(4, width, generator=generator, dtype=F64)
    contenders = {
        "bolza": lambda: lyapunov_exponents(lambda x: torch.tanh(x) @ w.T, start, steps, k=1).exponents,
        "jacrev": lambda: with_jacobians(
            lambda t, x: torch.tanh(x) @ w.T, start, steps, 1, torch.func.jacrev
        ),
    }
    report("tanh network", contenders, repeat, size=width, k=1, batch=4, steps=steps)


def lorenz(repeat: int, steps: int = 1000) -> None:
    """Three exponents of many trajectories."""

    def field(s: float, x: Tensor, u: Any) -> Tensor:
        a, b, c = x.unbind(-1)
        return torch.stack([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c], -1)

    system = ODESystem(field, horizon=steps, dt=0.02, method="rk4")
    start = torch.randn(256, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    contenders = {
        "bolza": lambda: lyapunov_exponents(system, start).exponents * 0.02,
        "jacfwd": lambda: with_jacobians(
            lambda t, x: system.step(0, x, {}), start, steps, 3, torch.func.jacfwd
        ),
        "jacrev": lambda: with_jacobians(
            lambda t, x: system.step(0, x, {}), start, steps, 3, torch.func.jacrev
        ),
    }
    report("lorenz", contenders, repeat, size=3, k=3, batch=256, steps=steps)


def main() -> None:
    """Run all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    repeat = parser.parse_args().repeat
    emit(BENCH, "environment", **environment())
    lstm(repeat)
    tanh_network(repeat)
    lorenz(repeat)


if __name__ == "__main__":
    main()
