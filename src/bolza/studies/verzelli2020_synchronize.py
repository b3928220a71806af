r"""When does a reservoir become a function of what drives it, and what can be read from it then?

    r_t = tanh(ρ W r_{t−1} + W_in u_t),   u: the x coordinate of Lorenz-63

The paper explains reservoir computing by generalised synchronisation: a read-out can learn a task only if the
    state of
the reservoir is a function of that of the driver, and can reconstruct the driver only if this function can be
inverted. Here the spectral radius ρ is swept, and four numbers are set side by side: the distance of two copies
with different first states, the conditional Lyapunov exponent, the mutual false nearest neighbours of driver and
reservoir, and the error of a read-out of z, which the reservoir has never seen.

Reference: Verzelli, Alippi & Livi (2021), arXiv:2010.02860.

Departures. Several random reservoirs, with standard errors over them. Expected numbers are earlier runs of ours
with one reservoir; the claims are about their shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bolza.core import rollout
from bolza.report import Figure, log_axis, role
from bolza.stability import drive, lyapunov_exponents, mutual_false_neighbours
from bolza.stability.synchronize import VERZELLI, apart
from bolza.studies._study import Progress, Row, Scale, StudyResult
from bolza.systems import ODESystem

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "verzelli2020_synchronize"
TITLE = "Synchronisation of a reservoir with its driver"
CLAIM = (
    "A read-out can learn a task where the reservoir synchronises with the driver, and not where it does not"
)
REFERENCE = VERZELLI

F64 = torch.float64
RADII = (0.3, 0.6, 0.9, 1.1, 1.3, 1.5, 2.0, 3.0)
DT, TRANSIENT, DENSITY, INPUT_SCALE, RIDGE = 0.02, 500, 0.05, 0.1, 1e-8


@dataclass(frozen=True)
class Budget:
    """Size of the sweep."""

    steps: int
    units: int
    draws: int
    neighbours: int


BUDGETS = {
    "small": Budget(steps=2000, units=200, draws=5, neighbours=150),
    "full": Budget(steps=4000, units=200, draws=10, neighbours=1000),
}


@dataclass(frozen=True)
class Sweep:
    """What was measured, each ``(draws, radii)``."""

    apart: Tensor
    exponent: Tensor
    neighbours: Tensor
    error: Tensor

    def at(self, name: str, radius: float) -> Tensor:
        """One column."""
        return getattr(self, name)[:, RADII.index(radius)]


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Sweep the spectral radius.

    Args:
        scale: ``"small"``: five reservoirs, some ten seconds on one core; ``"full"``: ten reservoirs, longer
            series.
        progress: called with the share done and a few words.

    Returns:
        The rows, a figure of the four numbers over ρ, and the numbers.

    Example:
        >>> from bolza.studies import get
        >>> get("2010.02860").key
        'verzelli2020_synchronize'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    report(0.0, "the driver")
    driver = lorenz(budget.steps + TRANSIENT)
    report(0.1, "reservoirs")
    found = sweep(budget, driver, report)
    rows = judge(found, driver)
    notes = (
        f"{budget.draws} reservoirs of {budget.units} units, {DENSITY:.0%} of the connections, input scale "
        f"{INPUT_SCALE}, standardised input; {budget.steps} steps of {DT} after {TRANSIENT}. Errors are standard "
        "errors over reservoirs.",
        "The read-out is ridge regression from [r, 1] to z, trained on the first 60 % and judged on the rest; the "
        f"index of neighbours is the median over {min(budget.neighbours, budget.steps)} points.",
        "Two lessons: the index is also high where the reservoir is synchronised but remembers too little to embed the "
        "driver, and a negative conditional exponent does not exclude two attracting responses.",
    )
    facts = {"radii": list(RADII), **{name: value.tolist() for name, value in vars(found).items()}}
    report(1.0, "done")
    return StudyResult(KEY, TITLE, REFERENCE, CLAIM, scale, rows, (_figure(found),), notes, facts)


def lorenz(steps: int) -> Tensor:
    """A trajectory of Lorenz-63, sampled every ``DT``, after its own transient."""

    def field(s: float, x: Tensor, u: Any) -> Tensor:
        a, b, c = x.unbind(-1)
        return torch.stack([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c], -1)

    system = ODESystem(field, horizon=steps + 500, dt=DT, method="rk4")
    with torch.no_grad():
        return torch.stack(rollout(system, torch.tensor([1.0, 1.0, 20.0], dtype=F64)).states[501:])


def sweep(budget: Budget, driver: Tensor, report: Progress) -> Sweep:
    """All reservoirs and all radii in one batch."""
    generator = torch.Generator().manual_seed(0)
    shape = (budget.draws, budget.units, budget.units)
    w = torch.randn(shape, generator=generator, dtype=F64)
    w = w * (torch.rand(shape, generator=generator, dtype=F64) < DENSITY)
    w = w / torch.linalg.eigvals(w).abs().amax(-1)[:, None, None]
    w_in = INPUT_SCALE * (2 * torch.rand(budget.draws, 1, budget.units, generator=generator, dtype=F64) - 1)
    radii = torch.tensor(RADII, dtype=F64)
    u = driver[:, :1]
    u = (u - u.mean()) / u.std()

    def step(r: Tensor, value: Tensor) -> Tensor:
        """Rows are (draw, radius, copy); each is alone with its own matrix."""
        state = r.reshape(budget.draws, -1, budget.units)
        scale = radii.repeat_interleave(state.shape[1] // len(RADII))[:, None]
        return torch.tanh(scale * (state @ w.mT) + value * w_in).reshape(r.shape)

    rows = budget.draws * len(RADII)
    start = 2 * torch.rand(2 * rows, budget.units, generator=generator, dtype=F64) - 1
    both = drive(step, u, start, warmup=TRANSIENT).unflatten(1, (budget.draws, len(RADII), 2))
    report(0.4, "conditional exponents")
    spectrum = lyapunov_exponents(step, start[::2], inputs=u, k=1, warmup=TRANSIENT)
    exponent = spectrum.per_sample.reshape(budget.draws, len(RADII))
    truth = driver[TRANSIENT:]
    distances, neighbours, errors = (torch.zeros(budget.draws, len(RADII), dtype=F64) for _ in range(3))
    for draw in range(budget.draws):
        report(0.6 + 0.4 * draw / budget.draws, "neighbours and read-outs")
        for i in range(len(RADII)):
            response = both[:, draw, i]
            distances[draw, i] = apart(response[-200:])
            index = mutual_false_neighbours(truth, response[:, 0], max_points=budget.neighbours)
            neighbours[draw, i] = index.median
            errors[draw, i] = read_out(response[:, 0], truth[:, 2])
    return Sweep(distances, exponent, neighbours, errors)


def read_out(states: Tensor, target: Tensor) -> float:
    """Error of ridge regression from [r, 1], over the standard deviation of the target."""
    a = torch.cat([states, torch.ones_like(states[:, :1])], 1)
    n = int(0.6 * len(a))
    gram = a[:n].T @ a[:n] + RIDGE * torch.eye(a.shape[1], dtype=a.dtype)
    weights = torch.linalg.solve(gram, a[:n].T @ target[:n])
    return float((a[n:] @ weights - target[n:]).square().mean().sqrt() / target[n:].std())


def judge(found: Sweep, driver: Tensor) -> list[Row]:
    """The shape of the table."""
    rows = []
    for radius, expected in ((0.3, "0"), (0.6, "5e−18"), (0.9, "2e−17")):
        worst = float(found.at("apart", radius).max())
        claim = f"ρ = {radius}: two copies of the reservoir fall together"
        rows.append(Row(claim, expected, worst, None, worst < 1e-8, "below 1e−8 in every reservoir"))
    for radius, number in ((1.5, 0.60), (3.0, 1.04)):
        value, error = _mean(found.at("apart", radius))
        rows.append(Row(f"ρ = {radius}: they do not", number, value, error, value > 0.1, "above 0.1"))
    for radius, number in ((0.3, -1.207), (0.6, -0.514), (0.9, -0.113), (3.0, 0.255)):
        value, error = _mean(found.at("exponent", radius))
        holds = (value < 0) == (number < 0)
        rows.append(Row(f"ρ = {radius}: conditional exponent", number, value, error, holds, "by its sign"))
    for radius, number, sign in ((1.1, -0.049, "negative"), (1.5, 0.034, "positive")):
        value, error = _mean(found.at("exponent", radius))
        verdict = (value < 0) == (number < 0) if abs(value) > 2 * error else None
        note = "open within two errors of 0"
        if radius == 1.1:
            note += "; some of these reservoirs rest on a cycle, whose phase is neutral"
        rows.append(Row(f"ρ = {radius}: conditional exponent, {sign}", number, value, error, verdict, note))
    value, error = _mean(found.at("neighbours", 0.9))
    rows.append(Row("ρ = 0.9: mutual false neighbours, median", 1.0, value, error, value < 3, "below 3"))
    value, error = _mean(found.at("neighbours", 2.0))
    rows.append(Row("ρ = 2: mutual false neighbours, median", "> 10", value, error, value > 10, "above 10"))
    short, error = _mean(found.at("neighbours", 0.3))
    limit = float(found.at("neighbours", 0.9).mean())
    claim = "ρ = 0.3: they are high although it is synchronised, for it forgets too fast"
    rows.append(Row(claim, 9.6, short, error, short > 2 * limit, "more than twice those at 0.9"))
    near = torch.minimum(found.at("error", 0.9), found.at("error", 1.1))
    value, error = _mean(near)
    far, other = _mean(found.at("error", 2.0))
    rows += [
        Row(
            "near ρ = 1 a read-out learns z: error of the better of 0.9 and 1.1",
            0.205,
            value,
            error,
            value < 0.6,
        ),
        Row("without synchronisation it does not: error at ρ = 2", "about 1", far, other, far > 0.8),
    ]
    same = mutual_false_neighbours(driver, driver, max_points=200).values
    rows.append(
        Row(
            "an identical response has the index 1 at every point",
            1.0,
            float(same.max()),
            None,
            bool((same == 1).all()),
        )
    )
    return rows


def _mean(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def _figure(found: Sweep) -> Figure:
    return Figure(
        "A reservoir over its spectral radius",
        partial(_draw, found=found),
        caption=(
            "Left: below ρ = 1 copies fall together and the conditional exponent is negative; it stays at 0 for a "
            "while, where copies keep their phases apart, and is positive beyond. Right: neighbours correspond, and z "
            "can be read out, only in a window below ρ = 1."
        ),
        alt="Conditional exponent, distance of copies, false neighbours and read-out error against spectral radius.",
        size=(9.2, 3.6),
        key="reservoir",
    )


def _draw(canvas: Any, found: Sweep) -> None:
    left, right = canvas.subplots(1, 2)
    series = (
        (left, "exponent", "first", "o", "conditional exponent per step"),
        (left, "apart", "second", "s", "distance of two copies"),
        (right, "neighbours", "third", "^", "mutual false neighbours, median"),
        (right, "error", "fourth", "D", "error of the read-out of z"),
    )
    for axes, name, colour, marker, label in series:
        values = getattr(found, name)
        axes.plot(RADII, values.T.numpy(), marker, color=role(colour), markersize=3, alpha=0.45)
        middle = values.median(0).values if name != "exponent" else values.mean(0)
        axes.plot(RADII, middle.numpy(), marker + "-", color=role(colour), markersize=5, label=label)
    for axes in (left, right):
        axes.axvline(1.0, color=role("muted"), linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set(xlabel="spectral radius $\\rho$")
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0))  # points lie everywhere below
    left.axhline(0.0, color=role("muted"), linewidth=0.8)
    log_axis(right)
