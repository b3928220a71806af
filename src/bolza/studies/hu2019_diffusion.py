r"""How many iterations stochastic gradient descent needs to leave a valley, and to leave a saddle.

    valley   e^{c/η} iterations, c = 2BΔf/σ²;    saddle   (1/η) log(1/η)/(2λ) + …

Descent itself is run, one batch after the other, not its diffusion: every sample's gradient is that of the loss plus or
minus σ, so a batch of B adds the mean of B signs. The loss is x⁴/4 − x²/2 for the valley, (y² − x²)/2 for the saddle.
Beside it stand the exact passage times of the diffusion with temperature ησ²/(2B).

Reference: Hu, Li, Li & Liu (2019), *On the Diffusion Approximation of Nonconvex Stochastic Gradient Descent*.

Departures. The paper proves orders; the constants expected here are those of one-dimensional theory (Kramers, and a
linear saddle). Its experiments with networks are not repeated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bolza.core import Diffusion, Isotropic
from bolza.report import Figure, role
from bolza.sde import ExitTimes, exit_times, kramers_time, mean_first_passage, saddle_time
from bolza.sde.escape import HU
from bolza.studies._study import Progress, Row, Scale, StudyResult

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "hu2019_diffusion"
TITLE = "Leaving valleys and saddles"
CLAIM = "Descent leaves a minimum after exponentially many steps in 1/η, a saddle after nearly linearly many"
REFERENCE = HU

SIGMA = 2.0  # spread of the samples' gradients, valley
BARRIER = 0.25
TEMPERATURE = 0.1


@dataclass(frozen=True)
class Budget:
    """Size of the runs."""

    passages: int  # paths of the diffusion
    dt: float
    valley_rates: tuple[float, ...]
    valley_runs: int
    saddle_rates: tuple[float, ...]
    saddle_runs: int


BUDGETS = {
    "small": Budget(
        passages=400,
        dt=0.15,
        valley_rates=(0.12, 0.09, 0.07, 0.06),
        valley_runs=300,
        saddle_rates=(1e-2, 3e-3, 1e-3),
        saddle_runs=600,
    ),
    "full": Budget(
        passages=8000,
        dt=0.1,
        valley_rates=(0.1, 0.08, 0.06, 0.05, 0.04),
        valley_runs=1000,
        saddle_rates=(1e-2, 3e-3, 1e-3, 3e-4),
        saddle_runs=2000,
    ),
}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Run descent out of a valley and off a saddle at several rates.

    Args:
        scale: ``"small"``: some seven seconds on one core; ``"full"``: more paths and smaller rates.
        progress: called with the share done and a few words.

    Returns:
        The rows, a figure, and the numbers.

    Example:
        >>> from bolza.studies import get
        >>> get("hu2019_diffusion").reference.arxiv
        '1705.07562'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    report(0.0, "passage times of the diffusion")
    rows = [passage_row(budget), width_row(budget)]
    report(0.3, "out of the valley")
    valley = [
        leave_valley(rate, 1, budget.valley_runs, seed) for seed, rate in enumerate(budget.valley_rates)
    ]
    rows += valley_rows(budget.valley_rates, valley)
    report(0.6, "larger batches")
    rate = budget.valley_rates[-2]
    shown = 1.2 * mean_first_passage(double_well, -1.0, (-math.inf, 1.0), rate * SIGMA**2 / 4)
    batches = [valley[-2], leave_valley(rate, 2, budget.valley_runs, 50, horizon=shown)]
    doubled = leave_valley(2 * rate, 2, budget.valley_runs, 60)
    rows.append(batch_row(rate, batches[0], doubled))
    report(0.8, "off the saddle")
    saddle = [leave_saddle(rate, budget.saddle_runs, seed) for seed, rate in enumerate(budget.saddle_rates)]
    rows += saddle_rows(budget.saddle_rates, saddle)
    notes = (
        "A unit of time is 1/η steps. Valley: from −1 to +1 in x⁴/4 − x²/2, σ = 2. Saddle: from the origin until "
        "|x| = 1, σ = 1 in both coordinates.",
        "Descent differs from its diffusion by relative terms of order η: its spread in the valley is larger by ηa/2, "
        "a = 2 the curvature, and the tails of its two-valued noise are lighter. Rows on descent allow "
        "(ηa/2)(1 + Δf/T) for both, beside 2.6 standard errors.",
        "Errors of mean times are those of independent runs; of slopes, propagated.",
    )
    facts = {
        "valley": {
            str(r): [one.mean, error_of(one)] for r, one in zip(budget.valley_rates, valley, strict=True)
        },
        "saddle": {
            str(r): [one.mean, error_of(one)] for r, one in zip(budget.saddle_rates, saddle, strict=True)
        },
    }
    report(1.0, "done")
    figure = Figure(
        "Exponential against logarithmic",
        partial(_draw, budget=budget, valley=valley, saddle=saddle, rate=rate, batches=batches),
        caption=(
            "Left: mean time (in units of 1/η steps) until descent leaves, with 95 % intervals, over 1/η. The valley "
            "follows the exact passage time of its diffusion (line; Kramers' formula dashed), the saddle a logarithm. "
            f"Right: share of runs still in the valley at η = {rate:g}: straight lines in this scale, an exponential "
            "law; twice the batch, half the temperature, many times the stay."
        ),
        alt="Mean exit times over the inverse learning rate; survival curves for two batch sizes.",
        size=(9.2, 3.4),
        key="escape",
    )
    return StudyResult(KEY, TITLE, REFERENCE, CLAIM, scale, rows, (figure,), notes, facts)


def double_well(x: Tensor) -> Tensor:
    """The loss with the valley."""
    return x**4 / 4 - x**2 / 2


def error_of(found: ExitTimes) -> float:
    """Standard error of the mean, every run having left."""
    return float(found.times.std()) / math.sqrt(len(found.times))


# ---------------------------------------------------------------------------------------- the diffusion


def passage_row(budget: Budget) -> Row:
    """Simulated and exact passage from well to well."""
    spread = math.sqrt(2 * TEMPERATURE)
    well = Diffusion(lambda t, x: x - x * x * x, Isotropic(spread), diagonal=True)
    found = exit_times(
        well,
        torch.full((budget.passages, 1), -1.0),
        lambda x: 1 - x[:, 0],
        dt=budget.dt,
        horizon=5000.0,
        scheme="heun",
        generator=torch.Generator().manual_seed(0),
    )
    exact = mean_first_passage(double_well, -1.0, (-math.inf, 1.0), TEMPERATURE)
    error = error_of(found)
    return Row(
        f"mean passage of the diffusion from −1 to +1 at temperature {TEMPERATURE:g}",
        exact,
        found.mean,
        error,
        abs(found.mean - exact) < 2.6 * error + 0.01 * exact,
        f"within 2.6 errors and 1 %; Kramers' formula gives {kramers_time(2.0, -1.0, BARRIER, TEMPERATURE):.3f}",
    )


def width_row(budget: Budget) -> Row:
    """Two valleys of one depth, one four times as curved: the way to the saddle between them."""
    times, errors = [], []
    for seed, side in ((1, -1.0), (2, 0.5)):
        scale = 1.0 if side < 0 else 2.0
        spread = math.sqrt(2 * TEMPERATURE)
        well = Diffusion(
            lambda t, x, s=scale: s * (s * x - (s * x) ** 3),  # type: ignore[misc]
            lambda t, x, noise, s=spread: s * noise,  # type: ignore[misc]
            diagonal=True,
        )
        found = exit_times(
            well,
            torch.full((budget.passages, 1), side),
            (lambda x: -x[:, 0]) if side < 0 else (lambda x: x[:, 0]),
            dt=budget.dt / scale**2,
            horizon=3000.0,
            scheme="heun",
            generator=torch.Generator().manual_seed(seed),
        )
        times.append(found.mean)
        errors.append(error_of(found) / found.mean)
    ratio = times[0] / times[1]
    error = ratio * math.hypot(*errors)
    return Row(
        "a valley as deep and four times as curved is left four times as fast",
        4.0,
        ratio,
        error,
        abs(ratio - 4) < 2.6 * error + 0.04,
        "ratio of the mean times to the saddle; within 2.6 errors and 1 %",
    )


# --------------------------------------------------------------------------------------------- descent


def leave_valley(rate: float, batch: int, runs: int, seed: int, horizon: float = 1e5) -> ExitTimes:
    """Stochastic gradient descent from −1 until it passes +1; times in units of 1/η steps."""
    descent = Diffusion(
        lambda t, x: x - x * x * x,
        # one step of length η adds η · σ · (mean of B signs)
        lambda t, x, noise: math.sqrt(rate) * SIGMA * noise.sign().mean(-1, keepdim=True),
        noise_shape=lambda x: (len(x), batch),
    )
    return exit_times(
        descent,
        torch.full((runs, 1), -1.0),
        lambda x: x[:, 0] < 1,
        dt=rate,
        horizon=horizon,
        generator=torch.Generator().manual_seed(seed),
    )


def leave_saddle(rate: float, runs: int, seed: int) -> ExitTimes:
    """The same from the point of a saddle until |x| = 1."""
    turn = torch.tensor([1.0, -1.0])
    descent = Diffusion(lambda t, x: turn * x, lambda t, x, noise: math.sqrt(rate) * noise.sign())
    return exit_times(
        descent,
        torch.zeros(runs, 2),
        lambda x: x[:, 0].abs() < 1,
        dt=rate,
        horizon=1e3,
        generator=torch.Generator().manual_seed(100 + seed),
    )


def slope(x: list[float], y: list[float], errors: list[float]) -> tuple[float, float]:
    """Weighted least squares: slope and its error."""
    u, v, w = (torch.tensor(a, dtype=torch.float64) for a in (x, y, errors))
    w = w**-2
    centred = u - (w * u).sum() / w.sum()
    size = (w * centred**2).sum()
    return float((w * centred * v).sum() / size), float(size**-0.5)


def valley_rows(rates: tuple[float, ...], found: list[ExitTimes]) -> list[Row]:
    """Exponential in 1/η, with the exponent of the theory."""
    inverse = [1 / rate for rate in rates]
    logs = [math.log(one.mean) for one in found]
    errors = [error_of(one) / one.mean for one in found]
    exact = [mean_first_passage(double_well, -1.0, (-math.inf, 1.0), rate * SIGMA**2 / 2) for rate in rates]
    measured, error = slope(inverse, logs, errors)
    expected = slope(inverse, [math.log(t) for t in exact], errors)[0]
    rate, last = rates[-1], found[-1].mean / exact[-1]
    room = rate * (1 + BARRIER / (rate * SIGMA**2 / 2))  # ηa/2 (1 + Δf/T), a = 2
    return [
        Row(
            "valley: slope of log(mean time) over 1/η",
            expected,
            measured,
            error,
            abs(measured - expected) < 2.6 * error + 0.05 * expected,
            "of the diffusion at the same rates, within 2.6 errors and 5 %; "
            f"2BΔf/σ² = {2 * BARRIER / SIGMA**2:g} as η → 0",
        ),
        Row(
            f"valley: mean time of descent over that of its diffusion at η = {rate:g}",
            1.0,
            last,
            last * errors[-1],
            abs(last - 1) < 2.6 * last * errors[-1] + room,
            f"within 2.6 errors and terms of order η, {room:.2f}",
        ),
    ]


def batch_row(rate: float, one: ExitTimes, two: ExitTimes) -> Row:
    """Rate and batch doubled together."""
    ratio = two.mean / one.mean
    error = ratio * math.hypot(error_of(one) / one.mean, error_of(two) / two.mean)
    room = rate * (1 + BARRIER / (rate * SIGMA**2 / 2))
    return Row(
        "twice the rate with twice the batch stays as long, in units of time",
        1.0,
        ratio,
        error,
        abs(ratio - 1) < 2.6 * error + room,
        f"within 2.6 errors and terms of order η, {room:.2f}",
    )


def saddle_rows(rates: tuple[float, ...], found: list[ExitTimes]) -> list[Row]:
    """Logarithmic in 1/η, with the constant of the linear equation."""
    measured, error = slope(
        [math.log(1 / rate) for rate in rates], [one.mean for one in found], [error_of(one) for one in found]
    )
    expected, last = saddle_time(1.0, rates[-1] / 2), error_of(found[-1])
    return [
        Row(
            "saddle: slope of the mean time over log(1/η)",
            0.5,
            measured,
            error,
            abs(measured - 0.5) < 2.6 * error + 0.01,
            "1/(2λ), within 2.6 errors and 0.01",
        ),
        Row(
            f"saddle: mean time at η = {rates[-1]:g}",
            expected,
            found[-1].mean,
            last,
            abs(found[-1].mean - expected) < 2.6 * last + 2 * math.sqrt(rates[-1]),
            "(1/2λ)[log(4λ/ησ²) + γ_E], within 2.6 errors and two steps of the noise beyond the border",
        ),
    ]


# ---------------------------------------------------------------------------------------------- figure


def _draw(
    canvas: Any,
    budget: Budget,
    valley: list[ExitTimes],
    saddle: list[ExitTimes],
    rate: float,
    batches: list[ExitTimes],
) -> None:
    left, right = canvas.subplots(1, 2)
    rates = budget.valley_rates
    fine = torch.linspace(1 / max(rates), 1 / min(rates), 25).tolist()
    warm = [SIGMA**2 / 2 / u for u in fine]
    left.plot(
        fine,
        [mean_first_passage(double_well, -1.0, (-math.inf, 1.0), heat) for heat in warm],
        color=role("first"),
        label="valley, exact",
    )
    left.plot(
        fine,
        [kramers_time(2.0, -1.0, BARRIER, heat) for heat in warm],
        color=role("first"),
        linestyle="--",
        linewidth=1.0,
        label="valley, Kramers",
    )
    _points(left, [1 / r for r in rates], valley, role("first"), "valley, descent")
    some = [(r, one) for r, one in zip(budget.saddle_rates, saddle, strict=True)]
    wide = torch.logspace(
        math.log10(1 / max(r for r, _ in some)), math.log10(1 / min(r for r, _ in some)), 40
    )
    left.plot(
        wide, [saddle_time(1.0, 0.5 / u) for u in wide.tolist()], color=role("second"), label="saddle, theory"
    )
    _points(left, [1 / r for r, _ in some], [one for _, one in some], role("second"), "saddle, descent")
    left.set(xlabel="1/η", ylabel="mean time, units of 1/η steps", xscale="log", yscale="log")
    left.set_yticks((3, 10, 30, 100), ("3", "10", "30", "100"))
    left.tick_params(axis="y", which="minor", length=0, labelleft=False)
    left.legend(loc="upper right", fontsize=7)
    for batch, one, color in zip((1, 2), batches, (role("first"), role("second")), strict=True):
        mean = mean_first_passage(double_well, -1.0, (-math.inf, 1.0), rate * SIGMA**2 / (2 * batch))
        at = torch.linspace(0, 3 * mean if batch == 1 else 1.2 * mean, 60, dtype=torch.float64)
        share = one.survival(at)
        kept = share > 0
        right.plot(at[kept], share[kept], color=color, drawstyle="steps-post", label=f"batch {batch}")
        right.plot(at, torch.exp(-at / mean), color=color, linestyle=":", linewidth=1.0)
    right.set(xlabel="time, units of 1/η steps", ylabel="share still in the valley", yscale="log")
    right.set_yticks((0.1, 0.3, 1.0), ("0.1", "0.3", "1"))
    right.tick_params(axis="y", which="minor", length=0, labelleft=False)
    right.legend(loc="lower left", fontsize=7)


def _points(axis: Any, x: list[float], found: list[ExitTimes], color: str, label: str) -> None:
    means = [one.mean for one in found]
    bars = [[m - one.interval()[0], one.interval()[1] - m] for m, one in zip(means, found, strict=True)]
    axis.errorbar(
        x, means, yerr=list(zip(*bars, strict=True)), fmt="o", markersize=4, color=color, label=label
    )
