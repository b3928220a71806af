r"""EM with a prior as a dynamical system: its Lyapunov function and its rate.

    V(θ) = −log p(y, θ) never rises,      θ_{k+1} − θ* ≈ M (θ_k − θ*),   M = I − I_c⁻¹ I_o

Mixtures of two Gaussians whose means are unknown, closer and farther apart, and a Gaussian seen through another one,
where the rate is known: prediction from the information, the Jacobian of the step, and the run itself.

Reference: Romero, Das, Chen & Pequito (2020), arXiv:2006.12690.

Departures: the paper has theorems and no experiments; the mixtures are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bolza.bayes import EMRate, EMRun, bayesian_em, em_rate, hidden_labels
from bolza.bayes.em import ROMERO as REFERENCE
from bolza.report import Figure, role
from bolza.studies._study import Progress, Row, Scale, StudyResult, mean_error

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "romero2020_em"
TITLE = "Bayesian EM as a dynamical system"
CLAIM = (
    "The negative log posterior is a Lyapunov function of EM with a prior, and convergence is at least linear"
)

D = torch.float64
VARIANCE = 100.0  # of the prior of every mean
EARLIER = {
    1.0: 0.688,
    2.0: 0.442,
    4.0: 0.293,
}  # rates for one draw each, in earlier runs of ours; draws differ


@dataclass(frozen=True)
class Budget:
    """Size of the runs."""

    samples: int = 2000
    seeds: int = 3
    separations: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)


BUDGETS = {
    "small": Budget(),
    "full": Budget(samples=20_000, seeds=20, separations=(1.0, 1.5, 2.0, 3.0, 4.0, 8.0)),
}


@dataclass(frozen=True)
class Found:
    """One mixture."""

    run: EMRun
    predicted: EMRate
    jacobian: float
    oakes: float


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Run EM on mixtures and compare its steps with the prediction.

    Args:
        scale: ``"small"``: a few seconds on one core; ``"full"``: more samples, draws and separations.
        progress: called with the share done and a few words.

    Returns:
        The rows, a figure, and the numbers.

    Example:
        >>> from bolza.studies import get
        >>> get("romero2020_em").reference.year
        2020
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    found: dict[float, list[Found]] = {}
    for i, separation in enumerate(budget.separations):
        report(i / len(budget.separations), f"means {separation:g} apart")
        found[separation] = [mixture_run(separation, seed, budget.samples) for seed in range(budget.seeds)]
    rows = mixture_rows(found) + [gaussian_row(), broken_row()]
    notes = (
        f"Mixtures of two Gaussians of variance 1 and weight ½, the means unknown with prior N(0, {VARIANCE:g}), "
        f"{budget.samples} samples, {budget.seeds} draws. Labels are not identified: the run starts at −½ and ½.",
        "The measured rate is the ratio of the lengths of late steps that are well above rounding.",
    )
    facts = {
        f"{separation:g}": {
            "predicted": [f.predicted.rate for f in each],
            "measured": [f.run.contraction for f in each],
            "steps": [len(f.run.lyapunov) - 1 for f in each],
        }
        for separation, each in found.items()
    }
    report(1.0, "done")
    return StudyResult(KEY, TITLE, REFERENCE, CLAIM, scale, rows, (_figure(found),), notes, facts)


def mixture(separation: float, seed: int, samples: int) -> tuple[Any, Any, Callable[[Tensor], Tensor]]:
    """Q, the log posterior, and the step in closed form."""
    draw = torch.Generator().manual_seed(seed)
    label = torch.randint(2, (samples,), generator=draw)
    y = separation * (label.to(D) - 0.5) + torch.randn(samples, generator=draw, dtype=D)

    def log_joint(means: Tensor) -> Tensor:
        return -((y[:, None] - means) ** 2) / 2

    def step(means: Tensor) -> Tensor:
        share = log_joint(means).softmax(1)
        return (share * y[:, None]).sum(0) / (share.sum(0) + 1 / VARIANCE)

    return *hidden_labels(log_joint, lambda means: -means.square().sum() / (2 * VARIANCE)), step


def mixture_run(separation: float, seed: int, samples: int) -> Found:
    """EM to the end; the rate in three ways."""
    expected, log_posterior, step = mixture(separation, seed, samples)
    start = torch.tensor([-0.5, 0.5], dtype=D)
    found = bayesian_em(start, expected, log_posterior, maximise=step, max_steps=3000, tol=1e-13)
    predicted = em_rate(found.theta, expected)
    jacobian = torch.func.jacrev(step)(found.theta)
    direct = -torch.func.hessian(log_posterior)(found.theta)
    return Found(
        found,
        predicted,
        float(torch.linalg.eigvals(jacobian).abs().max()),
        float((predicted.observed - direct).norm() / direct.norm()),
    )


def mixture_rows(found: dict[float, list[Found]]) -> list[Row]:
    """Descent, the rate in three ways, and the number of steps."""
    every = [f for each in found.values() for f in each]
    rise = max(float((f.run.lyapunov.diff() / f.run.lyapunov[:-1].abs()).max()) for f in every)
    apart = max(abs(f.predicted.rate / f.jacobian - 1) for f in every)
    oakes = max(f.oakes for f in every)
    rows = [
        Row(
            f"V in {len(every)} runs: largest relative rise in a step",
            "≤ 1e−9",
            rise,
            None,
            rise <= 1e-9 and all(f.run.certified and f.run.converged for f in every),
            "and every run is certified and converged",
        ),
        Row(
            "information formula against the Jacobian of the step: largest relative difference of the radii",
            0.0,
            apart,
            1e-6,
            apart < 1e-6,
        ),
        Row(
            "observed information by the mixed derivative against the Hessian of V, relative",
            0.0,
            oakes,
            1e-9,
            oakes < 1e-9,
        ),
    ]
    for separation, each in found.items():
        gaps = [f.run.contraction - f.predicted.rate for f in each]
        rate, error = mean_error(f.run.contraction for f in each)
        usual = f", {EARLIER[separation]:g} for an earlier draw" if separation in EARLIER else ""
        rows.append(
            Row(
                f"means {separation:g} apart: measured contraction",
                mean_error(f.predicted.rate for f in each)[0],
                rate,
                error,
                max(abs(gap) for gap in gaps) < 0.02,
                f"every draw within 0.02 of its own prediction{usual}",
            )
        )
    off = []
    for f in every:
        away = (f.run.path - f.run.theta).norm(dim=1)
        good = [
            k for k in range(len(away)) if float(away[k]) < 0.02 * float(away[0]) and float(away[k]) > 1e-9
        ]
        if len(good) > 1:
            counted = good[-1] - good[0]
            off.append(abs(counted - f.predicted.steps(float(away[good[-1]] / away[good[0]]))))
    rows.append(
        Row(
            "steps for the error to fall as it did, from a fiftieth to 1e−9: largest miss of the prediction",
            "≤ 2",
            float(max(off)) if off else None,
            None,
            max(off) <= 2 if off else None,
        )
    )
    return rows


def gaussian_row() -> Row:
    """For z ~ N(θ, a), y ~ N(z, b) the rate is b/(a + b)."""
    a, b, y = 1.0, 3.0, torch.tensor([1.0, 4.0, -2.0], dtype=D)

    def expected(theta: Tensor, before: Tensor) -> Tensor:
        z = before + (y - before) * a / (a + b)
        return -((z - theta) ** 2).sum() / (2 * a)

    found = bayesian_em(
        torch.zeros(1, dtype=D), expected, lambda theta: -((y - theta) ** 2).sum() / (2 * (a + b)), tol=1e-12
    )
    miss = abs(em_rate(found.theta, expected).rate - 0.75)
    return Row(
        "a Gaussian seen through another, a = 1, b = 3: measured contraction",
        0.75,
        found.contraction,
        1e-6,
        abs(found.contraction - 0.75) < 1e-6 and miss < 1e-12,
        "predicted to 1e−12",
    )


def broken_row() -> Row:
    """A step that goes too far."""
    expected, log_posterior, step = mixture(1.0, 0, 500)

    def wrong(means: Tensor) -> Tensor:
        return means + 8.0 * (step(means) - means)

    found = bayesian_em(
        torch.tensor([-0.5, 0.5], dtype=D), expected, log_posterior, maximise=wrong, max_steps=20
    )
    return Row(
        "a step that overshoots eightfold is not certified",
        "not certified",
        "certified" if found.certified else "not certified",
        None,
        not found.certified,
        "the certificate can fail",
    )


def _figure(found: dict[float, list[Found]]) -> Figure:
    return Figure(
        "EM falls along V at the rate that information predicts",
        partial(_draw, found=found),
        caption=(
            "Left: V above its limit, one run for each separation of the means, with the predicted slope, twice the "
            "logarithm of the rate (dashed). Right: rate against separation, predicted (line) and measured (points, "
            "every draw); far apart, the hidden labels hide nothing."
        ),
        alt="Falling curves of V with dashed slopes; rate against separation.",
        size=(8.6, 3.3),
        key="em",
    )


def _draw(canvas: Any, found: dict[float, list[Found]]) -> None:
    left, right = canvas.subplots(1, 2)
    colours = ("first", "second", "third", "fourth", "muted", "ink")
    for (separation, each), colour in zip(found.items(), colours, strict=False):
        f = each[0]
        above = (f.run.lyapunov - f.run.lyapunov.min()).clamp_min(0)
        last = int((above > 1e-9).sum())
        left.plot(range(last), above[:last], color=role(colour), label=f"{separation:g}")
        middle = last // 2
        slope = [float(above[middle]) * f.predicted.rate ** (2 * (k - middle)) for k in range(last)]
        left.plot(range(middle, last), slope[middle:], "--", color=role("ink"), linewidth=0.9)
    left.set(xlabel="step", ylabel="V − V*", yscale="log", xscale="symlog")
    left.set_xticks([0, 1, 10, 100], ["0", "1", "10", "100"])
    left.legend(title="separation")
    places = list(found)
    right.plot(
        places, [mean_error(f.predicted.rate for f in found[s])[0] for s in places], color=role("muted")
    )
    for separation, each in found.items():
        right.plot(
            [separation] * len(each),
            [f.run.contraction for f in each],
            "o",
            markersize=4,
            color=role("first"),
        )
    right.set(xlabel="separation of the means", ylabel="rate", ylim=(0, 1.02))
