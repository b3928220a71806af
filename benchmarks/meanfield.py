"""How fast and how right are the mean-field numbers, beside what one would write with scipy or Gauss–Hermite?

    python benchmarks/meanfield.py [--repeats 5] [--json FILE]

All in this process, one thread, CPU seconds, medians over the repeats.

1. The critical line of tanh at 50 values of q: `critical_line`, scipy's `quad` for each point, Gauss–Hermite with 64
   nodes, and the trapezoid rule written by hand. The reference for errors is `quad` at its tightest tolerance.
2. Fixed points with phase and depth scales of tanh on a 50 × 50 grid of (σ_w², σ_b²). The bar is 0.5 s. Beside it,
   q*, χ₁ and c* on the same grid by iterating the maps with Gauss–Hermite nodes, as published code does.
3. One ξ_c by nested quadrature (`dblquad`) against `fixed_point`.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import scipy
import torch
from scipy.integrate import IntegrationWarning, dblquad, quad
from torch import Tensor

from bolza.meanfield import critical_line, fixed_point

QS = np.linspace(1e-5, 2.25, 50)
GRID = (torch.linspace(0.5, 4.0, 50, dtype=torch.float64), torch.linspace(0.0, 0.5, 50, dtype=torch.float64))


def density(z: float) -> float:
    return np.exp(-z * z / 2) / np.sqrt(2 * np.pi)


def line_by_quad(qs: np.ndarray, **options: float) -> np.ndarray:
    out = []
    for s in np.sqrt(qs):
        slope = quad(lambda z, s=s: density(z) * np.cosh(s * z) ** -4, -12, 12, **options)[0]
        second = quad(lambda z, s=s: density(z) * np.tanh(s * z) ** 2, -12, 12, **options)[0]
        out.append((1 / slope, s * s - second / slope))
    return np.array(out)


def rule_hermite(nodes: int) -> tuple[Tensor, Tensor]:
    z, w = np.polynomial.hermite_e.hermegauss(nodes)
    return torch.tensor(z), torch.tensor(w / np.sqrt(2 * np.pi))


def rule_trapezoid(nodes: int) -> tuple[Tensor, Tensor]:
    z = torch.linspace(-9, 9, nodes, dtype=torch.float64)
    return z, torch.exp(-z * z / 2) * (z[1] - z[0]) / (2 * np.pi) ** 0.5


def line_by_rule(qs: np.ndarray, rule: tuple[Tensor, Tensor]) -> np.ndarray:
    z, w = rule
    t = torch.tanh(torch.tensor(qs).sqrt()[:, None] * z)
    weight = 1 / (((1 - t * t) ** 2) @ w)
    return torch.stack([weight, torch.tensor(qs) - weight * ((t * t) @ w)], 1).numpy()


def line_by_bolza(qs: np.ndarray) -> np.ndarray:
    line = critical_line("tanh", q=torch.tensor(qs))
    return torch.stack([line.weight_var, line.bias_var], 1).numpy()


def grid_by_iteration(
    steps: int = 400, nodes: int = 64, pair_nodes: int = 24, tol: float = 1e-10
) -> tuple[Tensor, Tensor]:
    """q* and c* by iterating the maps, as published code does; stops at ``tol``, which it misses near the line."""
    z, w = rule_hermite(nodes)
    z2, w2 = rule_hermite(pair_nodes)
    sw, sb = (g.reshape(-1) for g in torch.meshgrid(*GRID, indexing="ij"))
    q = torch.ones_like(sw)
    for _ in range(steps):
        new = sb + sw * ((torch.tanh(q.sqrt()[:, None] * z) ** 2) @ w)
        done = (new - q).abs().max() < tol
        q = new
        if done:
            break
    s, c = q.sqrt(), torch.full_like(q, 0.6)
    ta, active = torch.tanh(s[:, None] * z2), torch.arange(len(q))
    for _ in range(steps):
        ci = c[active][:, None, None]
        u = s[active][:, None, None] * (ci * z2[:, None] + (1 - ci * ci).clamp_min(0).sqrt() * z2[None, :])
        cross = (ta[active] * (torch.tanh(u) @ w2)) @ w2
        new = ((sb[active] + sw[active] * cross) / q[active].clamp_min(1e-300)).clamp(-1, 1)
        moved = (new - c[active]).abs() > tol
        c[active] = new
        active = active[moved]
        if not len(active):
            break
    return q.reshape(50, 50), c.reshape(50, 50)


def correlation_step_by_dblquad(weight: float, bias: float, q: float, c: float) -> float:
    s = np.sqrt(q)

    def integrand(y: float, x: float) -> float:
        return density(x) * density(y) * np.tanh(s * x) * np.tanh(s * (c * x + np.sqrt(1 - c * c) * y))

    return (bias + weight * dblquad(integrand, -9, 9, -9, 9)[0]) / q


def timed(call: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Median CPU seconds of a call, and what it returned; a first call warms up."""
    result, seconds = call(), []
    for _ in range(repeats):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return median(seconds), result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []

    def show(what: str, seconds: float, error: float | None = None, note: str = "") -> None:
        rows.append({"what": what, "cpu_s": seconds, "max_error": error, "note": note})
        print(
            f"{what:<62} {1e3 * seconds:10.3f} ms  {'' if error is None else f'error {error:.1e}':<15} {note}"
        )

    with warnings.catch_warnings():  # quad says that it cannot do better than rounding
        warnings.simplefilter("ignore", IntegrationWarning)
        exact = line_by_quad(QS, epsabs=0.0, epsrel=2e-14)
    hermite, trapezoid = rule_hermite(64), rule_trapezoid(257)
    for name, call in (
        ("critical_line", lambda: line_by_bolza(QS)),
        ("scipy quad, point by point", lambda: line_by_quad(QS)),
        ("Gauss–Hermite, 64 nodes", lambda: line_by_rule(QS, hermite)),
        ("trapezoid by hand, 257 nodes", lambda: line_by_rule(QS, trapezoid)),
    ):
        seconds, line = timed(call, options.repeats)
        show(f"critical line of tanh, 50 points: {name}", seconds, float(np.abs(line - exact).max()))

    seconds, point = timed(lambda: fixed_point("tanh", GRID[0][:, None], GRID[1]), options.repeats)
    show(
        "50 × 50 grid of tanh: fixed_point, all nine fields",
        seconds,
        None,
        f"bar 500 ms: {'met' if seconds < 0.5 else 'MISSED'}",
    )
    seconds, (q, c) = timed(grid_by_iteration, 1)
    show(
        "50 × 50 grid of tanh: q*, c* by iteration, Gauss–Hermite",
        seconds,
        float((c - point.c)[:, 1:].abs().max()),
        f"where σ_b² > 0; q* differs by {float((q - point.q).abs().max()):.1e}",
    )

    seconds, _ = timed(lambda: correlation_step_by_dblquad(1.5, 0.05, 0.5, 0.6), options.repeats)
    show("one step of the correlation map: scipy dblquad", seconds)
    seconds, _ = timed(lambda: fixed_point("tanh", 2.5, 0.05), options.repeats)
    show("one fixed point with all its depth scales: fixed_point", seconds)

    if options.json:
        about = {"python": platform.python_version(), "torch": torch.__version__, "scipy": scipy.__version__}
        with open(options.json, "w") as file:
            json.dump(
                {"benchmark": "meanfield", "versions": about, "threads": 1, "rows": rows}, file, indent=1
            )


if __name__ == "__main__":
    main()
