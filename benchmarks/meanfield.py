"""How fast and how right are the mean-field numbers, beside what one would write with scipy or Gauss–Hermite?

    python benchmarks/meanfield.py [--repeat 5]

All in this process, one thread, CPU seconds, medians; ``times`` is a contender's time over ours.

1. The critical line of tanh at 50 values of q: `critical_line`, scipy's `quad` for each point, Gauss–Hermite with 64
   nodes, and the trapezoid rule written by hand. The reference for errors is `quad` at its tightest tolerance.
2. ξ_c of tanh at 50 values of σ_w² in [1, 4], σ_b² = 0.05, errors against 30-digit values (tests/meanfield/data). The
   bar is 0.3 s and a relative error of 1e-8. Beside it the published way: iterate the maps 300 times with
   Gauss–Hermite nodes; and one point with scipy's `quad` and `dblquad` in a root finder.
3. Phase diagrams of tanh, every field at once: 50 × 50 (bar 0.5 s) and 200 × 200 (bar 10 s).
4. One step of the correlation map by `dblquad`.
"""

from __future__ import annotations

from _bench import emit, environment, timed  # isort: skip  (sets the threads before torch loads)

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.integrate import IntegrationWarning, dblquad, quad
from scipy.optimize import brentq
from torch import Tensor

from bolza.meanfield import critical_line, fixed_point

BENCH = "meanfield"
QS = np.linspace(1e-5, 2.25, 50)
BIAS = 0.05
ORACLE = Path(__file__).parents[1] / "tests" / "meanfield" / "data" / "tanh_depth_scales.json"


def density(z: float) -> float:
    """Of a standard normal number."""
    return np.exp(-z * z / 2) / np.sqrt(2 * np.pi)


def line_by_quad(qs: np.ndarray, **options: float) -> np.ndarray:
    """Critical (σ_w², σ_b²), point by point."""
    out = []
    for s in np.sqrt(qs):
        slope = quad(lambda z, s=s: density(z) * np.cosh(s * z) ** -4, -12, 12, **options)[0]
        second = quad(lambda z, s=s: density(z) * np.tanh(s * z) ** 2, -12, 12, **options)[0]
        out.append((1 / slope, s * s - second / slope))
    return np.array(out)


def rule_hermite(nodes: int) -> tuple[Tensor, Tensor]:
    """Gauss–Hermite nodes and weights for a standard normal number."""
    z, w = np.polynomial.hermite_e.hermegauss(nodes)
    return torch.tensor(z), torch.tensor(w / np.sqrt(2 * np.pi))


def rule_trapezoid(nodes: int) -> tuple[Tensor, Tensor]:
    """Even nodes on [-9, 9]."""
    z = torch.linspace(-9, 9, nodes, dtype=torch.float64)
    return z, torch.exp(-z * z / 2) * (z[1] - z[0]) / (2 * np.pi) ** 0.5


def line_by_rule(qs: np.ndarray, rule: tuple[Tensor, Tensor]) -> np.ndarray:
    """Critical (σ_w², σ_b²) by one matrix product."""
    z, w = rule
    t = torch.tanh(torch.tensor(qs).sqrt()[:, None] * z)
    weight = 1 / (((1 - t * t) ** 2) @ w)
    return torch.stack([weight, torch.tensor(qs) - weight * ((t * t) @ w)], 1).numpy()


def line_by_bolza(qs: np.ndarray) -> np.ndarray:
    """Critical (σ_w², σ_b²) by the library."""
    line = critical_line("tanh", q=torch.tensor(qs))
    return torch.stack([line.weight_var, line.bias_var], 1).numpy()


def scales_by_iteration(weight: Tensor, steps: int = 300, nodes: int = 64, tol: float = 1e-6) -> Tensor:
    """ξ_c by iterating both maps from (0.8, 0.6), as published code does."""
    z, w = rule_hermite(nodes)
    q = torch.full_like(weight, 0.8)
    for _ in range(steps):
        q = BIAS + weight * ((torch.tanh(q.sqrt()[:, None] * z) ** 2) @ w)
    s, c = q.sqrt(), torch.full_like(q, 0.6)
    for _ in range(steps):
        u = s[:, None, None] * z[:, None]
        v = s[:, None, None] * (
            c[:, None, None] * z[:, None] + (1 - c * c).clamp_min(0).sqrt()[:, None, None] * z
        )
        new = (BIAS + weight * ((torch.tanh(u) * torch.tanh(v)) @ w @ w)) / q
        moved = (new - c).abs().max()
        c = new.clamp(-1, 1)
        if moved < tol:
            break
    v = s[:, None, None] * (
        c[:, None, None] * z[:, None] + (1 - c * c).clamp_min(0).sqrt()[:, None, None] * z
    )
    slope = ((1 - torch.tanh(u) ** 2) * (1 - torch.tanh(v) ** 2)) @ w @ w
    return -1 / torch.log(weight * slope)


def pair_by_dblquad(f: Callable[[Any], Any], q: float, c: float) -> float:
    """E f(u) f(v)."""
    s, rest = np.sqrt(q), np.sqrt(1 - c * c)

    def integrand(y: float, x: float) -> float:
        return density(x) * density(y) * f(s * x) * f(s * (c * x + rest * y))

    return dblquad(integrand, -9, 9, -9, 9)[0]


def scale_by_scipy(weight: float) -> float:
    """ξ_c of one chaotic point with the tools of scipy."""
    q = brentq(
        lambda q: BIAS + weight * quad(lambda z: density(z) * np.tanh(q**0.5 * z) ** 2, -9, 9)[0] - q, 0.01, 9
    )
    c = brentq(lambda c: (BIAS + weight * pair_by_dblquad(np.tanh, q, c)) / q - c, 0, 0.97)
    return -1 / np.log(weight * pair_by_dblquad(lambda h: np.cosh(h) ** -2, q, c))


def critical_lines(repeat: int) -> None:
    """Question 1."""
    with warnings.catch_warnings():  # quad says that it cannot do better than rounding
        warnings.simplefilter("ignore", IntegrationWarning)
        exact = line_by_quad(QS, epsabs=0.0, epsrel=2e-14)
    hermite, trapezoid = rule_hermite(64), rule_trapezoid(257)
    ours = timed(lambda: line_by_bolza(QS), repeat=repeat)
    for name, call in (
        ("critical_line", lambda: line_by_bolza(QS)),
        ("scipy quad, point by point", lambda: line_by_quad(QS)),
        ("Gauss–Hermite, 64 nodes", lambda: line_by_rule(QS, hermite)),
        ("trapezoid by hand, 257 nodes", lambda: line_by_rule(QS, trapezoid)),
    ):
        took = ours if name == "critical_line" else timed(call, repeat=repeat)
        error = float(np.abs(call() - exact).max())
        times = took["cpu_s"] / ours["cpu_s"]
        emit(BENCH, f"critical line of tanh, 50 points: {name}", **took, max_error=error, times=times)


def depth_scales(repeat: int) -> None:
    """Question 2."""
    weight = 1 + 3 * torch.arange(50, dtype=torch.float64) / 49
    exact = torch.tensor(
        [float(row["xi_c"]) for row in json.loads(ORACLE.read_text())["rows"]], dtype=torch.float64
    )
    near = int(exact.argmax())

    def ours() -> Tensor:
        return fixed_point("tanh", weight, BIAS).xi_c

    took = timed(ours, repeat=repeat)
    error = float((ours() / exact - 1).abs().max())
    emit(BENCH, "ξ_c of tanh, 50 points: fixed_point", **took, max_relative_error=error, largest=float(ours()[near]),
         exact=float(exact[near]), bar_met=took["cpu_s"] <= 0.3 and error <= 1e-8)  # fmt: skip
    other = timed(lambda: scales_by_iteration(weight), repeat=1, warmup=0)
    found = scales_by_iteration(weight)
    emit(BENCH, "ξ_c of tanh, 50 points: 300 iterations, Gauss–Hermite", **other, largest=float(found[near]),
         max_relative_error=float((found / exact - 1).abs().max()), times=other["cpu_s"] / took["cpu_s"])  # fmt: skip
    one = timed(lambda: scale_by_scipy(2.5), repeat=1, warmup=0)
    single = timed(lambda: fixed_point("tanh", 2.5, BIAS), repeat=repeat)
    emit(BENCH, "ξ_c at σ_w² = 2.5: fixed_point", **single, value=float(fixed_point("tanh", 2.5, BIAS).xi_c))
    emit(BENCH, "ξ_c at σ_w² = 2.5: scipy quad, dblquad, brentq", **one, value=float(scale_by_scipy(2.5)),
         times=one["cpu_s"] / single["cpu_s"])  # fmt: skip


def diagrams(repeat: int) -> None:
    """Questions 3 and 4."""
    for points, bar in ((50, 0.5), (200, 10.0)):
        weights = torch.linspace(0.5, 4.0, points, dtype=torch.float64)[:, None]
        biases = torch.linspace(0.0, 0.5, points, dtype=torch.float64)
        took = timed(
            lambda w=weights, b=biases: fixed_point("tanh", w, b),
            repeat=max(1, repeat if points < 100 else 1),
        )
        emit(
            BENCH,
            f"{points} × {points} diagram of tanh, all fields",
            **took,
            bar_s=bar,
            bar_met=took["cpu_s"] <= bar,
        )
    took = timed(lambda: pair_by_dblquad(np.tanh, 0.5, 0.6), repeat=repeat)
    emit(BENCH, "one step of the correlation map: scipy dblquad", **took)


def main() -> None:
    """Run all comparisons."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_args().repeat
    emit(BENCH, "environment", **environment("scipy"))
    critical_lines(repeat)
    depth_scales(repeat)
    diagrams(repeat)


if __name__ == "__main__":
    main()
