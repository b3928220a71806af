r"""Algorithms as feedback systems: what robust control says of optimizers, and of optimizers in a loop with a plant.

A first-order method is a linear system in a loop with the gradient. All that is known of the gradient of an m-strongly
convex function with an L-Lipschitz gradient is a sector, so that the smallest certain rate is a semidefinite programme.
Checked here:

* gradient descent is certified at its exact rate max(|1 − ηm|, |1 − ηL|), Nesterov's method below √(1 − 1/√κ);
* the heavy ball tuned for quadratics, the fastest on them, loses its certificate as κ = L/m grows; at κ = 25 it cycles
  on a convex function, so that the refusal is no mere caution;
* no run on a function of the class is slower than its certificate;
* feedback optimisation u⁺ = u − η(Gᵀ(y − r) + λu) on a running plant finds the best input without knowing the
  disturbance, exactly as long as the spectral radius of the closed loop is below 1.

Reference: Dörfler, He, Belgioioso, Bolognani, Lygeros & Muehlebach (2024), arXiv:2401.14029; rates and the cycling
example: Lessard, Recht & Packard (2016), arXiv:1408.3595.

Departures: the paper gives no numbers to reproduce; the plant and its constants are chosen here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bolza.report import Figure, log_axis, role
from bolza.stability import (
    FeedbackOptimization,
    FirstOrderMethod,
    RateCertificate,
    certified_rate,
    gradient_descent,
    heavy_ball,
    nesterov,
    quadratic_rate,
)
from bolza.stability.lure import SYSTEMS as REFERENCE
from bolza.studies._study import Progress, Row, Scale, StudyResult

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "dorfler2024_systems"
TITLE = "Optimizers as feedback systems"
CLAIM = (
    "Optimizers are feedback systems: robust control certifies how fast they converge, and small loops with a plant "
    "converge exactly while the closed loop is stable"
)
F64 = torch.float64
NAMES = ("gradient descent", "Nesterov", "heavy ball")
COLOURS = {"gradient descent": "second", "Nesterov": "third", "heavy ball": "first"}


@dataclass(frozen=True)
class Budget:
    """Size of the experiment."""

    kappas: int = 13
    runs: int = 200
    steps: int = 200


BUDGETS = {"small": Budget(), "full": Budget(kappas=49, runs=5000, steps=1000)}


def tuned(name: str, kappa: float) -> FirstOrderMethod:
    """A method with its usual parameters for the sector [1, κ]."""
    root = math.sqrt(kappa)
    momentum = (root - 1) / (root + 1)
    if name == "gradient descent":
        return gradient_descent(2 / (1 + kappa))
    if name == "Nesterov":
        return nesterov(1 / kappa, momentum)
    return heavy_ball(4 / (root + 1) ** 2, momentum**2)


def textbook(name: str, kappa: float) -> float:
    """The rate that is known: exact, a bound, and that on quadratics."""
    root = math.sqrt(kappa)
    if name == "gradient descent":
        return (kappa - 1) / (kappa + 1)
    if name == "Nesterov":
        return math.sqrt(1 - 1 / root)
    return (root - 1) / (root + 1)


def piecewise_slope(x: Tensor) -> Tensor:
    """Gradient of a function of curvature 25, 1 and 25 with the minimum at 0: in the sector [1, 25]."""
    return torch.where(x < 1, 25 * x, torch.where(x < 2, x + 24, 25 * x - 24))


def course(method: FirstOrderMethod, slope: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> Tensor:
    """States of many runs of one coordinate, shape ``(steps + 1, n, runs)``."""
    state = start.expand(len(method.A), -1)
    states = [state]
    for _ in range(steps):
        state = method.A @ state + method.B @ slope(method.C @ state)
        states.append(state)
    return torch.stack(states)


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Certify three methods over a range of condition numbers, and close a loop around a plant.

    Args:
        scale: ``"small"``: 13 condition numbers and 200 runs; ``"full"``: 49 and 5000.
        progress: called with the share done and a few words.

    Returns:
        Rows on rates, the cycle, and the loop; two figures. Needs the extra ``certify``.

    Example:
        >>> from bolza.studies import get
        >>> get("dorfler2024_systems").title
        'Optimizers as feedback systems'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    kappas = torch.logspace(0.3, 4, budget.kappas, dtype=F64).tolist()
    found: dict[str, list[RateCertificate]] = {name: [] for name in NAMES}
    for k, kappa in enumerate(kappas):
        report(0.8 * k / len(kappas), f"certificates at κ = {kappa:.0f}")
        for name in NAMES:
            found[name].append(certified_rate(tuned(name, kappa), 1, kappa))
    report(0.8, "runs")
    rows = [*rate_rows(kappas, found), *quadratic_rows(), *cycle_rows(), class_row(budget), *loop_rows()]
    report(1.0, "done")
    return StudyResult(
        KEY,
        TITLE,
        REFERENCE,
        CLAIM,
        scale,
        rows,
        (_rate_figure(kappas, found), _loop_figure()),
        notes=(
            "The certificate uses the sector and the weighted off-by-one constraint; each counts only after the "
            "eigenvalues of both matrices were computed.",
            "The plant is y⁺ = 0.9 y + 0.1 (Gu + d) with G = [[1, 0.5], [0.2, 2]] and λ = 0.01.",
        ),
        facts={
            "kappas": kappas,
            "rates": {name: [c.rate for c in certificates] for name, certificates in found.items()},
            "quadratic": {name: [c.lower for c in certificates] for name, certificates in found.items()},
        },
    )


# ------------------------------------------------------------------------------------------- rows


def rate_rows(kappas: list[float], found: dict[str, list[RateCertificate]]) -> list[Row]:
    """Certified rates against known ones."""
    exact = max(
        abs(certified_rate(gradient_descent(lr), 1, 10).rate - max(abs(1 - lr), abs(1 - 10 * lr)))
        for lr in (0.02, 0.05, 0.1, 0.15, 2 / 11, 0.19)
    )
    slack = max(
        c.rate - textbook("Nesterov", kappa) for kappa, c in zip(kappas, found["Nesterov"], strict=True)
    )
    margins = [c.margin for certificates in found.values() for c in certificates if c.stable]
    low, high = 4.0, 100.0
    for _ in range(14):
        middle = math.sqrt(low * high)
        stable = certified_rate(tuned("heavy ball", middle), 1, middle).stable
        low, high = (middle, high) if stable else (low, middle)
    return [
        Row(
            "gradient descent: largest distance of the certified rate from max(|1 − ηm|, |1 − ηL|), six learning rates",
            0.0,
            exact,
            1e-7,
            exact < 1e-6,
            "m = 1, L = 10; judged to 1e-6",
        ),
        Row(
            f"Nesterov: largest of the certified rate − √(1 − 1/√κ), κ from {kappas[0]:.0f} to {kappas[-1]:.0f}",
            "below 0",
            slack,
            1e-7,
            slack < 0,
        ),
        Row(
            "largest eigenvalue of the matrix inequality over all certificates, computed afterwards",
            "below 0",
            max(margins),
            None,
            max(margins) < 0,
            f"{len(margins)} certificates",
        ),
        Row(
            "heavy ball tuned for quadratics: largest κ at which convergence is certain",
            "below 25, where it cycles",
            low,
            high - low,
            4 < low < high < 25,
            "by bisection from 4 to 100",
        ),
    ]


def quadratic_rows() -> list[Row]:
    """Gradient descent on the eigenvalues 1, 3, 10: the bound, and what a run shows."""
    rows = []
    curvatures = torch.tensor([1.0, 3.0, 10.0], dtype=F64)
    for lr in (2 / 11, 0.1):
        bound = quadratic_rate(gradient_descent(lr), 1, 10)
        error = (1 - lr * curvatures) ** 100
        seen = float((error.norm() / math.sqrt(3)) ** 0.01)
        rows.append(
            Row(
                f"gradient descent on curvatures 1, 3, 10 at η = {lr:.3g}: mean rate over 100 steps",
                f"at most {bound:.4f}",
                seen,
                None,
                bound - 0.02 < seen <= bound,
                "judged to 0.02 below the bound",
            )
        )
    return rows


def cycle_rows() -> list[Row]:
    """The heavy ball on a function of the class at κ = 25."""
    start = torch.tensor([3.3], dtype=F64)
    rest = {name: course(tuned(name, 25), piecewise_slope, start, 600)[-3:, 0, 0] for name in NAMES}
    cycle = rest["heavy ball"]
    others = max(float(rest[name].abs().max()) for name in NAMES[:2])
    words = ", ".join(f"{v:.4f}" for v in sorted(cycle.tolist()))
    return [
        Row(
            "heavy ball on a convex function with κ = 25: distance from the minimum after 600 steps",
            "does not converge",
            float(cycle.abs().max()),
            None,
            float(cycle.abs().max()) > 0.5,
            f"it cycles through {words}",
        ),
        Row(
            "gradient descent and Nesterov on the same function from the same start: distance after 600 steps",
            0.0,
            others,
            None,
            others < 1e-10,
            "judged to 1e-10",
        ),
    ]


def class_row(budget: Budget) -> Row:
    """Runs on random piecewise quadratic functions of the class against the certificate of Nesterov's method."""
    kappa = 25.0
    method = tuned("Nesterov", kappa)
    certificate = certified_rate(method, 1, kappa)
    draw = torch.Generator().manual_seed(0)
    runs = budget.runs
    # slopes that alternate between 1 and κ over intervals of random length, odd in x: convex, minimum at 0
    knots = torch.rand(runs, 12, generator=draw, dtype=F64).cumsum(1)
    widths = knots - torch.cat([torch.zeros(runs, 1, dtype=F64), knots[:, :-1]], 1)
    first = torch.rand(runs, 1, generator=draw).round().to(F64)
    steep = (first + torch.arange(13)) % 2
    curvature = 1 + (kappa - 1) * steep
    heights = (curvature[:, :-1] * widths).cumsum(1)

    def slope(x: Tensor) -> Tensor:
        size = x.abs()
        index = (size[0][:, None] >= knots).sum(1, keepdim=True)
        zero = torch.zeros(runs, 1, dtype=F64)
        left = torch.cat([zero, knots], 1).gather(1, index)
        base = torch.cat([zero, heights], 1).gather(1, index)
        value = base + curvature.gather(1, index) * (size[0][:, None] - left)
        return x.sign() * value.mT

    states = course(method, slope, 8 * torch.rand(runs, generator=draw, dtype=F64), budget.steps)
    size = states.norm(dim=1)
    late = budget.steps // 2
    rates = (size[late] / size[0]) ** (1 / late)
    worst = float(rates.max())
    assert certificate.P is not None
    condition = float(torch.linalg.cond(certificate.P))
    bound = certificate.rate * condition ** (0.5 / late)  # the distance is at most cond(P)^½ ρᵏ of the first
    return Row(
        f"Nesterov at κ = 25: slowest mean rate in {runs} runs on random convex functions, {late} steps",
        f"at most {bound:.4f}",
        worst,
        None,
        worst <= bound,
        f"certified rate {certificate.rate:.4f}, on quadratics {certificate.lower:.4f}",
    )


PLANT = (
    0.9 * torch.eye(2, dtype=F64),
    torch.tensor([[1.0, 0.5], [0.2, 2.0]], dtype=F64),
    torch.tensor([1.0, -1.0], dtype=F64),
    torch.tensor([0.3, 0.7], dtype=F64),
)


def close_loop(lr: float, steps: int) -> tuple[FeedbackOptimization, Tensor]:
    """Distance of the input from the best one, at every step."""
    A, G, r, d = PLANT
    loop = FeedbackOptimization(A, G, lr, 0.01)
    y, u, best = torch.zeros(2, dtype=F64), torch.zeros(2, dtype=F64), loop.optimum(r, d)
    errors = []
    for _ in range(steps):
        y, u = loop.step(y, u, r, d)
        errors.append((u - best).norm())
    return loop, torch.stack(errors)


def loop_rows() -> list[Row]:
    """Feedback optimisation below and above its limit."""
    slow, calm = close_loop(0.04, 800)
    fast, wild = close_loop(0.3, 800)
    low, high = 0.04, 0.3
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if FeedbackOptimization(*PLANT[:2], middle, 0.01).rate < 1 else (low, middle)
        )
    below, above = close_loop(0.95 * low, 1500)[1], close_loop(1.05 * low, 1500)[1]
    still = 2 / (float(torch.linalg.matrix_norm(PLANT[1], 2)) ** 2 + 0.01)
    return [
        Row(
            "feedback optimisation: spectral radius at η = 0.04",
            0.958,
            slow.rate,
            5e-4,
            abs(slow.rate - 0.958) < 5e-4,
        ),
        Row(
            "feedback optimisation: spectral radius at η = 0.3",
            1.016,
            fast.rate,
            5e-4,
            abs(fast.rate - 1.016) < 5e-4,
        ),
        Row(
            "distance from the best input after 800 steps at η = 0.04, the disturbance unknown",
            0.0,
            float(calm[-1]),
            None,
            float(calm[-1]) < 1e-12,
            "judged to 1e-12",
        ),
        Row("the same at η = 0.3", "diverges", float(wild[-1]), None, float(wild[-1]) > 1e3),
        Row(
            "where the spectral radius crosses 1, runs 5 % below converge and 5 % above diverge",
            "yes",
            "yes" if below[-1] < 0.1 * below[0] and above[-1] > 10 * above[0] else "no",
            None,
            bool(below[-1] < 0.1 * below[0] and above[-1] > 10 * above[0]),
            f"the limit is η = {low:.4f}; a plant that is at rest at each step would allow {still:.4f}",
        ),
    ]


# ------------------------------------------------------------------------------------------- figures


def _rate_figure(kappas: list[float], found: dict[str, list[RateCertificate]]) -> Figure:
    return Figure(
        "What is certain, and what is not",
        partial(_draw_rates, kappas=kappas, found=found),
        caption="Left: steps to a tenth of the distance that are certain for every convex function of the class "
        "(markers), and the known rates (lines; that of the heavy ball holds on quadratics only). Right: two "
        "methods on one convex function with κ = 25.",
        alt="Certified number of steps against condition number, and courses of two methods on one function.",
        size=(9.2, 3.7),
        key="rates",
    )


def _draw_rates(canvas: Any, kappas: list[float], found: dict[str, list[RateCertificate]]) -> None:
    left, right = canvas.subplots(1, 2)

    def steps(rate: float) -> float:
        return math.log(10) / -math.log(rate)

    for name, marker in zip(NAMES, "oDs", strict=True):
        colour = role(COLOURS[name])
        style = "--" if name == "heavy ball" else "-"
        left.plot(kappas, [steps(textbook(name, k)) for k in kappas], style, color=colour, alpha=0.6)
        sure = [(k, steps(c.rate)) for k, c in zip(kappas, found[name], strict=True) if c.stable]
        left.plot(*zip(*sure, strict=True), marker, color=colour, markersize=5, label=name)
        if name != "Nesterov":  # which lands on the minimum: its step is 1 over the curvature there
            states = course(tuned(name, 25), piecewise_slope, torch.tensor([3.3], dtype=F64), 60)
            right.plot(states[:, 0, 0].abs(), color=colour, label=name)
    lost = min(k for k, c in zip(kappas, found["heavy ball"], strict=True) if not c.stable)
    left.axvspan(lost, kappas[-1], color=role("warm"), alpha=0.6, linewidth=0)
    left.text(lost * 1.15, 0.8, "heavy ball:\nno certificate", color=role("muted"), fontsize=9, va="bottom")
    log_axis(left, "x")
    log_axis(left, "y")
    left.set_xlabel("condition number κ")
    left.set_ylabel("steps to a tenth")
    left.legend(loc="upper left")
    log_axis(right, "y")
    right.set_xlabel("step")
    right.set_ylabel("distance from the minimum")
    right.legend(loc="lower left")


def _loop_figure() -> Figure:
    return Figure(
        "An optimizer in a loop with a plant",
        _draw_loop,
        caption="Left: spectral radius of the closed loop against the learning rate. Right: distance of the input from "
        "the best one, for three learning rates.",
        alt="Spectral radius against learning rate, and three courses of feedback optimisation.",
        size=(9.2, 3.5),
        key="loop",
    )


def _draw_loop(canvas: Any) -> None:
    left, right = canvas.subplots(1, 2)
    rates = torch.linspace(0.005, 0.4, 120).tolist()
    radii = [FeedbackOptimization(*PLANT[:2], lr, 0.01).rate for lr in rates]
    left.plot(rates, radii, color=role("ink"))
    left.axhline(1, color=role("muted"), linewidth=0.8)
    for lr, colour in ((0.04, "second"), (0.2, "third"), (0.3, "first")):
        loop, errors = close_loop(lr, 400)
        left.plot([lr], [loop.rate], "o", color=role(colour), markersize=6)
        right.plot(errors.clamp(1e-13, 1e6), color=role(colour), label=f"η = {lr:g}")
    left.set_xlabel("learning rate η")
    left.set_ylabel("spectral radius")
    log_axis(right, "y")
    right.set_xlabel("step")
    right.set_ylabel("distance from the best input")
    right.legend(loc="lower left")
