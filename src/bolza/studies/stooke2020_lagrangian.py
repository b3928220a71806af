r"""The multiplier of a constraint as a PID controller: what the proportional term damps.

    minimise ½ax² − bx  subject to  x ≤ d:    λ = max(0, K_p e + I),  I ← max(0, I + K_i e),  e = x − d

Gradient ascent on the multiplier is the integral alone, and it oscillates. On the quadratic the damping is known; on
digits a network is trained under a bound on the mean size of its weights, with the gain that theory calls critical.

Reference: Stooke, Achiam & Abbeel (2020), arXiv:2007.03964.

Departures: supervised problems instead of Safety Gym; no moving average of the violation, which is exact here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.controllers import PIDLagrangian, critical_gain, damping
from bolza.controllers.pid_lagrangian import REFERENCE
from bolza.data import digits
from bolza.report import Figure, role
from bolza.studies._study import Progress, Row, Scale, StudyResult, mean_error

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "stooke2020_lagrangian"
TITLE = "Multipliers with a proportional term"
CLAIM = (
    "A proportional term damps the oscillation of Lagrange multipliers, and with it overshoot and violation"
)

A, B, D, LR, KI = 0.1, 2.0, 1.0, 0.05, 0.05
GAINS = (0.0, 0.5, 1.0, 2.0)
MODULI = (0.99750, 0.98489, 0.97211, 0.96597)
OVERSHOOTS = (1.763, 1.282, 0.998, 0.682)
VIOLATIONS = (260.8, 60.3, 43.2, 38.0)
RATE, LIMIT = 0.1, 0.04  # of the network: learning rate, bound on the mean of |w|


@dataclass(frozen=True)
class Budget:
    """Size of the runs."""

    quadratic_steps: int
    steps: int
    seeds: int
    width: int = 32
    batch: int = 64


BUDGETS = {
    "small": Budget(quadratic_steps=3000, steps=800, seeds=3),
    "full": Budget(quadratic_steps=5000, steps=3000, seeds=10),
}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Run the quadratic under four gains, and train networks under two.

    Args:
        scale: ``"small"``: some ten seconds on one core, three seeds; ``"full"``: ten seeds, longer.
        progress: called with the share done and a few words.

    Returns:
        The rows, a figure, and the courses.

    Example:
        >>> from bolza.studies import get
        >>> get("stooke2020_lagrangian").reference.year
        2020
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    report(0.0, "a quadratic")
    courses = quadratic(budget.quadratic_steps)
    rows = quadratic_rows(courses)
    kp = network_gain(budget.width)
    runs = []
    for seed in range(budget.seeds):
        report(0.3 + 0.7 * seed / budget.seeds, f"digits, seed {seed}")
        runs.append({name: network(gain, budget, seed) for name, gain in (("I", 0.0), ("PI", kp))})
    rows += network_rows(runs)
    report(1.0, "done")
    notes = (
        f"Quadratic: a = {A}, b = {B:g}, d = {D:g}, η = {LR}, K_i = {KI}, from x = 0; the modulus is that of the "
        "recursion e ← tr·e − det·e fitted to the run once the constraint is active.",
        f"Digits: 64-{budget.width}-10 with tanh, SGD of rate {RATE}, batch {budget.batch}, {budget.steps} steps, "
        f"{budget.seeds} seeds; the cost is the mean of |w| over its bound {LIMIT}; K_i = {KI}, and K_p = {kp:.2f} is "
        "the critical gain for the rate η‖∇c‖². Errors are over seeds. Criteria were fixed before the runs.",
    )
    facts = {
        "quadratic": {str(kp): e[:600].tolist() for kp, e in courses.items()},
        "accuracy": {name: [found[name]["accuracy"] for found in runs] for name in ("I", "PI")},
    }
    return StudyResult(KEY, TITLE, REFERENCE, CLAIM, scale, rows, (_figure(courses, runs),), notes, facts)


# --------------------------------------------------------------------------------------- the quadratic


def quadratic(steps: int) -> dict[float, Tensor]:
    """Errors x − d over the steps for each gain, from x = 0: one run whose four coordinates are four controllers."""
    x = torch.zeros(len(GAINS), dtype=torch.float64)
    lag = PIDLagrangian([D] * len(GAINS), kp=0.0, ki=KI, kd=0.0, smooth=0.0, normalise=False)
    lag.control.retune(kp=torch.tensor(GAINS, dtype=torch.float64))
    zero = x.new_zeros(())
    errors = [x - D]
    for _ in range(steps):
        lag(zero, x)
        x = x - LR * (A * x - B + lag.multiplier)
        errors.append(x - D)
    return dict(zip(GAINS, torch.stack(errors, 1), strict=True))


def fitted_modulus(errors: Tensor) -> float:
    """Largest modulus of the two-term recursion that the errors of an active constraint obey."""
    past = torch.stack([errors[1:-1], errors[:-2]], 1)
    trace, minus = torch.linalg.lstsq(past, errors[2:, None]).solution[:, 0].tolist()
    companion = torch.tensor([[trace, minus], [1.0, 0.0]], dtype=errors.dtype)
    return float(torch.linalg.eigvals(companion).abs().max())


def quadratic_rows(courses: dict[float, Tensor]) -> list[Row]:
    """Modulus, overshoot and violation against theory and earlier runs."""
    rows = []
    for (kp, errors), modulus in zip(courses.items(), MODULI, strict=True):
        window = errors[1500:2500] if kp == 0 else errors[200:500]  # active, and above rounding
        exact, found = damping(A, kp, KI, LR).modulus, fitted_modulus(window)
        holds = abs(found - exact) < 1e-4 and abs(exact - modulus) < 6e-6
        rows.append(
            Row(f"modulus of the error, K_p = {kp:g}", round(exact, 5), found, None, holds, "within 1e-4")
        )
    critical = critical_gain(A, KI, LR)
    oscillates = [damping(A, critical + s, KI, LR).oscillates for s in (-0.01, 0.01)]
    rows.append(
        Row(
            "gain of critical damping",
            1.85,
            critical,
            None,
            oscillates == [True, False],
            "oscillates below it only",
        )
    )
    for (kp, errors), overshoot, violation in zip(courses.items(), OVERSHOOTS, VIOLATIONS, strict=True):
        above = errors.clamp_min(0)
        found, total = float(above.max()), float(above.sum())
        rows.append(
            Row(
                f"overshoot, K_p = {kp:g}",
                overshoot,
                found,
                None,
                abs(found - overshoot) < 1e-3,
                "within 0.001",
            )
        )
        rows.append(
            Row(
                f"summed violation, K_p = {kp:g}",
                violation,
                total,
                None,
                abs(total / violation - 1) < 0.005,
                "within 0.5 %",
            )
        )
    return rows


# ----------------------------------------------------------------------------------------- the network


def network_gain(width: int) -> float:
    """Critical gain for the cost (mean of |w|)/LIMIT: it moves at the rate η‖∇c‖², and ‖∇c‖² = 1/(weights · LIMIT²)."""
    weights = 64 * width + width * 10
    return critical_gain(0.0, KI, RATE / (weights * LIMIT**2))


def network(kp: float, budget: Budget, seed: int) -> dict[str, Any]:
    """Train a network with its mean |w| bounded; the cost step by step, multiplier, and test accuracy."""
    data = digits()
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        net = nn.Sequential(nn.Linear(64, budget.width), nn.Tanh(), nn.Linear(budget.width, 10))
    weights = [p for p in net.parameters() if p.ndim == 2]
    count = sum(w.numel() for w in weights)
    lag = PIDLagrangian(1.0, kp=kp, ki=KI, kd=0.0, smooth=0.0, normalise=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    draw = torch.Generator().manual_seed(seed)
    costs, multipliers = [], []
    for _ in range(budget.steps):
        rows = torch.randint(len(data.train_x), (budget.batch,), generator=draw)
        cost = torch.stack([w.abs().sum() for w in weights]).sum() / (count * LIMIT)
        optimizer.zero_grad()
        lag(F.cross_entropy(net(data.train_x[rows]), data.train_y[rows]), cost).backward()
        optimizer.step()
        costs.append(float(cost.detach()))
        multipliers.append(float(lag.multiplier))
    with torch.no_grad():
        accuracy = float((net(data.test_x).argmax(1) == data.test_y).float().mean())
    return {"cost": costs, "multiplier": multipliers, "accuracy": accuracy}


def network_rows(runs: list[dict[str, dict[str, Any]]]) -> list[Row]:
    """Constraint and violation on digits, seed by seed."""
    final = [sum(found["PI"]["cost"][-100:]) / len(found["PI"]["cost"][-100:]) for found in runs]
    mean, error = mean_error(final)
    rows = [
        Row(
            "digits: mean |w| over its bound, with the proportional term",
            1.0,
            mean,
            error,
            max(abs(cost - 1) for cost in final) < 0.02,
            "mean of the last 100 steps within 2 % in every seed",
        )
    ]
    total = {
        name: [sum(max(0.0, cost - 1) for cost in found[name]["cost"]) for found in runs]
        for name in ("I", "PI")
    }
    mean, error = mean_error([pi / i for pi, i in zip(total["PI"], total["I"], strict=True)])
    rows.append(
        Row(
            "digits: summed violation over that of the integral alone, equal K_i",
            "below 1",
            mean,
            error,
            mean + 2 * error < 1,
            "judged to two standard errors",
        )
    )
    worst = {name: [1 - min(found[name]["cost"]) for found in runs] for name in ("I", "PI")}
    mean, error = mean_error([pi - i for pi, i in zip(worst["PI"], worst["I"], strict=True)])
    rows.append(
        Row(
            "digits: how far the cost falls below its bound, minus that of the integral alone",
            "below 0",
            mean,
            error,
            mean + 2 * error < 0,
            "judged to two standard errors",
        )
    )
    gain = [found["PI"]["accuracy"] - found["I"]["accuracy"] for found in runs]
    mean, error = mean_error(gain)
    rows.append(
        Row(
            "digits: test accuracy minus that of the integral alone",
            "no loss",
            mean,
            error,
            mean > -0.01,
            "judged at one point",
        )
    )
    return rows


def _figure(courses: dict[float, Tensor], runs: list[dict[str, dict[str, Any]]]) -> Figure:
    return Figure(
        "What the proportional term damps",
        partial(_draw, courses=courses, runs=runs),
        caption="Left: distance from the constraint on a quadratic, with more and more proportional gain. Middle and "
        "right: mean weight of a network over its bound, and the multiplier, every seed.",
        alt="Oscillating errors that die out sooner with a larger gain; costs and multipliers of networks.",
        size=(9.6, 3.3),
        key="lagrangian",
    )


def _draw(canvas: Any, courses: dict[float, Tensor], runs: list[dict[str, dict[str, Any]]]) -> None:
    left, middle, right = canvas.subplots(1, 3)
    for (kp, errors), alpha in zip(
        courses.items(), (1.0, 0.75, 0.55, 0.35)[: len(courses)][::-1], strict=True
    ):
        left.plot(errors[:500], color=role("first"), alpha=alpha, label=f"$K_p$ = {kp:g}")
    left.axhline(0, color=role("muted"), linewidth=0.8)
    left.set(xlabel="step", ylabel="x − d")
    left.legend(loc="upper right")
    for name, colour, label in (("I", "second", "integral alone"), ("PI", "first", "critical $K_p$")):
        for k, found in enumerate(runs):
            style = {"color": role(colour), "linewidth": 0.9, "label": label if k == 0 else None}
            middle.plot(found[name]["cost"], **style)
            right.plot(found[name]["multiplier"], **style)
    middle.axhline(1, color=role("muted"), linewidth=0.8)
    middle.set(xlabel="step", ylabel="mean |w| / bound")
    right.set(xlabel="step", ylabel="multiplier")
    middle.legend()
