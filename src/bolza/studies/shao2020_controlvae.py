r"""A set-point for the KL of a variational autoencoder: where the weight rests, and what windup does.

    loss = reconstruction + β KL,   β = clip(β_min + K_p σ(e) + Σ K_i e),   e = KL − C

On a linear autoencoder of Gaussian data the resting weight is known, Σ_i max(0, ½ ln(l_i/β)) = C; on digits the KL is
held where a fixed weight collapses it. The published test against windup never holds; here is what that costs.

Reference: Shao, Yao, Sun, Zhang, Liu, Liu, Wang & Abdelzaher (2020), arXiv:2004.05988.

Departures: digits of 8 × 8 pixels and multi-layer perceptrons instead of dSprites, CelebA and text; linear
autoencoders are trained on the expectation of their loss, without sampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bolza.controllers import PID, ControlVAE, SetPoint, resting_beta, water_filling_kl
from bolza.controllers.control_vae import CONTROLVAE as REFERENCE
from bolza.report import Figure, log_axis, role
from bolza.studies._autoencoders import courses
from bolza.studies._study import Progress, Row, Scale, StudyResult, mean_error

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "shao2020_controlvae"
TITLE = "A set-point for the KL divergence"
CLAIM = (
    "A PI controller of the KL weight holds any KL that the data allow, where a fixed weight lets it collapse"
)

SPECTRA = ((4.0, 1.0, 0.25), (9.0, 4.0, 1.0, 0.5), (2.0, 2.0))
SET_POINTS = (1.5, 3.0, 1.0)
PUBLISHED = (0.44626, 0.45960, 0.73576)


@dataclass(frozen=True)
class Budget:
    """Size of the runs."""

    linear_steps: int
    before: int  # steps until the set-point drops
    after: int
    wound: int  # steps of an unreachable set-point
    seeds: int
    hidden: int
    batch: int


BUDGETS = {
    "small": Budget(3000, before=1500, after=500, wound=500, seeds=1, hidden=128, batch=64),
    "full": Budget(6000, before=2000, after=500, wound=500, seeds=5, hidden=128, batch=64),
}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Train linear autoencoders to their rest, and autoencoders of digits under eight weights.

    Args:
        scale: ``"small"``: some ten seconds on one core, one seed; ``"full"``: five seeds, longer.
        progress: called with the share done and a few words.

    Returns:
        The rows, a figure, and the courses.

    Example:
        >>> from bolza.studies import get
        >>> get("shao2020_controlvae").reference.arxiv
        '2004.05988'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    report(0.0, "linear autoencoders")
    rest = linear(budget.linear_steps)
    rows = linear_rows(rest)
    runs = []
    for seed in range(budget.seeds):
        report(0.2 + 0.8 * seed / budget.seeds, f"digits, seed {seed}")
        runs.append(courses(laws(budget), _steps(budget), seed, hidden=budget.hidden, batch=budget.batch))
    rows += digit_rows(runs, budget)
    report(1.0, "done")
    notes = (
        f"Digits: 64-{budget.hidden}-10-{budget.hidden}-64, Bernoulli likelihood, Adam 1e-3, batch {budget.batch}, "
        f"{_steps(budget)} steps, {budget.seeds} seeds; K_p = 0.01, K_i = 0.001, β_min = 0; errors are over seeds.",
        "Held: mean KL of the last 300 steps. Criteria were fixed before the runs. While the network still improves, "
        "its resting weight moves, and the KL lags behind by the speed of β over K_i: a narrower network or a shorter "
        "run (64 wide, 1300 steps, tried first) ends at 5.12 instead of 5, and at 4.49 after a target out of reach.",
        "The gain of the loop is k/2β for k active variables: at C = 25, where β is some 0.03, this K_i oscillates. "
        "A law of ln β (SetPoint with exponential=True, K_i = 0.006) has the gain k/2 everywhere; it is ours.",
        "Linear: codes as long as the data, Adam 0.01 on the expectation of the loss, β from 1.",
    )
    facts = {"linear": rest, "final_beta": {k: [r[k]["beta"][-1] for r in runs] for k in runs[0]}}
    return StudyResult(KEY, TITLE, REFERENCE, CLAIM, scale, rows, (_figure(runs[0], budget),), notes, facts)


# ------------------------------------------------------------------------------- linear autoencoders


def expected_terms(W: Tensor, D: Tensor, log_variance: Tensor, l: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741
    """Reconstruction and KL of linear autoencoders in expectation over N(0, diag l) and the draws.

    Args:
        W: encoders, ``(members, latent, dim)``.
        D: decoders, ``(members, dim, latent)``.
        log_variance: ``(members, latent)``.
        l: eigenvalues, ``(members, dim)``.

    Returns:
        Both terms, each ``(members,)``.
    """
    s2 = log_variance.exp()
    missed = torch.eye(l.shape[1], dtype=l.dtype) - D @ W
    reconstruction = 0.5 * (missed.square() * l[:, None]).sum((1, 2)) + 0.5 * (D.square() * s2[:, None]).sum(
        (1, 2)
    )
    kl = 0.5 * ((W.square() * l[:, None]).sum(2) + s2 - 1 - log_variance).sum(1)
    return reconstruction, kl


def linear(steps: int, seed: int = 0) -> list[dict[str, float]]:
    """Final β and KL of three controlled autoencoders, and of the first at β = 1/2."""
    spectra = [*SPECTRA, SPECTRA[0]]
    dim = max(map(len, spectra))
    l = torch.tensor([[*s, *[1e-6] * (dim - len(s))] for s in spectra], dtype=torch.float64)  # noqa: E741
    g = torch.Generator().manual_seed(seed)
    W, D = (0.3 * torch.randn(len(l), dim, dim, dtype=torch.float64, generator=g) for _ in range(2))
    log_variance = torch.zeros(len(l), dim, dtype=torch.float64)
    optimizer = torch.optim.Adam([p.requires_grad_() for p in (W, D, log_variance)], lr=0.01)
    control = ControlVAE(torch.tensor(SET_POINTS, dtype=torch.float64), initial=1.0)
    half = torch.full((1,), 0.5, dtype=torch.float64)
    for _ in range(steps):
        reconstruction, kl = expected_terms(W, D, log_variance, l)
        beta = torch.cat([torch.as_tensor(control.step(kl[:-1])), half])
        optimizer.zero_grad()
        (reconstruction + beta * kl).sum().backward()
        optimizer.step()
    with torch.no_grad():
        _, kl = expected_terms(W, D, log_variance, l)
    return [{"beta": float(b), "kl": float(k)} for b, k in zip(beta, kl, strict=True)]


def linear_rows(rest: list[dict[str, float]]) -> list[Row]:
    """Resting weights against reverse water-filling."""
    rows = []
    for spectrum, kl, published, found in zip(SPECTRA, SET_POINTS, PUBLISHED, rest[:-1], strict=True):
        exact = resting_beta(torch.tensor(spectrum), kl)
        rows.append(
            Row(
                f"resting β of a linear autoencoder, l = {spectrum}, C = {kl:g}",
                round(exact, 5),
                found["beta"],
                None,
                abs(exact - published) < 6e-6 and abs(found["beta"] / exact - 1) < 0.02,
                f"within 2 %; KL ends at {found['kl']:.4f}",
            )
        )
    exact = float(water_filling_kl(torch.tensor(SPECTRA[0], dtype=torch.float64), 0.5))
    measured = rest[-1]["kl"]
    rows.append(
        Row(
            "KL of the first at the fixed weight 1/2",
            round(exact, 5),
            measured,
            None,
            abs(measured / exact - 1) < 0.01,
            "within 1 %",
        )
    )
    return rows


# -------------------------------------------------------------------------------------------- digits


def laws(budget: Budget) -> dict[str, Callable[[float], float]]:
    """Eight ways to choose β."""

    def drop(step: int) -> float:
        return 25.0 if step < budget.before else 5.0

    def unreachable(step: int) -> float:
        return 1000.0 if step < budget.wound else 5.0

    return {
        "β = 1": lambda kl: 1.0,
        "β = 4": lambda kl: 4.0,
        "C = 5": _law(ControlVAE(5.0)),
        "C = 10": _law(ControlVAE(10.0)),
        "drop": _law(ControlVAE(drop)),
        "wound": _law(ControlVAE(unreachable)),
        "windup": _law(ControlVAE(unreachable, anti_windup="none")),
        "log drop": _law(SetPoint(drop, PID(ki=0.006, low=math.log(1e-4)), exponential=True, initial=1.0)),
    }


def _law(control: SetPoint) -> Callable[[float], float]:
    return lambda kl: float(control.step(kl))


def _steps(budget: Budget) -> int:
    return budget.before + budget.after


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _spread(values: list[float]) -> float:
    mean = _mean(values)
    return _mean([(value - mean) ** 2 for value in values]) ** 0.5


def digit_rows(runs: list[dict[str, dict[str, list[float]]]], budget: Budget) -> list[Row]:
    """What each weight did to the KL on digits."""

    def over(name: str, start: int, stop: int | None = None) -> tuple[float, float]:
        return mean_error(_mean(found[name]["kl"][start:stop]) for found in runs)

    rows = []
    kl, error = over("β = 4", -300)
    rows.append(Row("digits: KL at the fixed weight 4", "0 (collapse)", kl, error, kl < 0.1))
    kl, error = over("β = 1", -300)
    rows.append(Row("digits: KL at the fixed weight 1", "open, some 3", kl, error, 1 < kl < 5))
    for target in (5, 10):
        kl, error = over(f"C = {target}", -300)
        rows.append(
            Row(
                f"digits: KL held at the set-point {target}",
                target,
                kl,
                error,
                abs(kl - target) < 0.1,
                f"within 0.1; β ends at {mean_error(f[f'C = {target}']['beta'][-1] for f in runs)[0]:.3f}",
            )
        )
    end = budget.before + budget.after
    kl, error = over("drop", max(0, end - 100), end)
    rows.append(
        Row(
            "set-point dropped from 25 to 5: KL 400 to 500 steps later",
            5,
            kl,
            error,
            abs(kl - 5) < 0.15,
            "within 0.15",
        )
    )
    steady = slice(budget.before // 2, budget.before)
    ratios = [
        _spread(found["log drop"]["kl"][steady]) / _spread(found["drop"]["kl"][steady]) for found in runs
    ]
    ratio, error = mean_error(ratios)
    rows.append(
        Row(
            "spread of the KL at the set-point 25: a law of ln β over the law of β",
            "below 0.5",
            ratio,
            error,
            ratio < 0.5,
            "ours: the same gain of the loop at every β",
        )
    )
    stop = min(budget.wound + 300, _steps(budget))
    kl, error = over("wound", max(0, stop - 50), stop)
    rows.append(
        Row(
            "unreachable set-point for 500 steps, then 5: KL 250 to 300 steps later",
            5,
            kl,
            error,
            abs(kl - 5) < 0.15,
            "within 0.15",
        )
    )
    kl, error = over("windup", -50)
    rows.append(
        Row(
            f"the same without protection against windup: KL {_steps(budget) - budget.wound} steps later",
            "far above 5",
            kl,
            error,
            kl > 15,
            "judged at three times the set-point",
        )
    )
    return rows


def _figure(found: dict[str, dict[str, list[float]]], budget: Budget) -> Figure:
    return Figure(
        "The KL goes where it is told",
        partial(_draw, found=found, budget=budget),
        caption="KL and weight on digits. Left: fixed weights (dashed) and set-points 5 and 10. Right: the set-point "
        "drops from 25 to 5; it was unreachable until the dotted line, with and without protection against windup.",
        alt="KL over steps under several weights, and the weights below.",
        size=(9.4, 5.2),
        key="controlvae",
    )


def _draw(canvas: Any, found: dict[str, dict[str, list[float]]], budget: Budget) -> None:
    axes = canvas.subplots(2, 2, sharex=True)
    sides = (
        (
            ("β = 1", "muted", "--"),
            ("β = 4", "muted", ":"),
            ("C = 5", "first", "-"),
            ("C = 10", "second", "-"),
        ),
        (
            ("drop", "third", "-"),
            ("log drop", "muted", "-"),
            ("wound", "first", "-"),
            ("windup", "second", "-"),
        ),
    )
    labels = {
        "drop": "25, then 5",
        "log drop": "the same, law of ln β",
        "wound": "1000, then 5",
        "windup": "the same, no protection",
    }
    for (top, bottom), side in zip(axes.T, sides, strict=True):
        for name, colour, dash in side:
            style = {
                "color": role(colour),
                "linestyle": dash,
                "linewidth": 1.0,
                "label": labels.get(name, name),
            }
            top.plot([max(kl, 1e-3) for kl in found[name]["kl"]], **style)
            bottom.plot([max(beta, 1e-4) for beta in found[name]["beta"]], **style)
        log_axis(top, "y")
        log_axis(bottom, "y")
        bottom.set(xlabel="step")
        bottom.set_ylim(1e-3, 10)
    for axis in axes[0]:
        axis.set_ylim(0.02, 400)
        axis.axhline(5.0, color=role("muted"), linewidth=0.6)
    for axis in axes[:, 1]:
        axis.axvline(budget.wound, color=role("muted"), linestyle=":", linewidth=0.8)
    axes[0, 0].set(ylabel="KL (nats)")
    axes[1, 0].set(ylabel="β")
    axes[0, 0].legend(loc="upper right", ncols=2)
    axes[0, 1].legend(loc="lower right")
