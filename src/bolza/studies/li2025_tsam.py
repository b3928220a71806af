r"""Sharpness-aware minimisation with a tilt: flat minima, wrong labels, and what the tilt itself adds.

    L^t(θ) = (1/t) log E_ε exp(t L(θ + ε)),      ∇L^t = Σ_j softmax_j(t L(θ + ε_j)) ∇L(θ + ε_j)

Closed forms on a quadratic first; then digits: the sharpness that plain descent, one sample (SAM) and several tilted
ones find, their accuracies, with wrong labels too, and plain descent with as many gradients.

Reference: Li, Zhou & Bilmes (2025), arXiv:2410.22656.

Departures: digits and an MLP in place of images and transformers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.ops.curvature import hessian_operator
from bolza.ops.krylov import top_eigenpairs
from bolza.report import Figure, role
from bolza.robust import TiltedSAM, tilted_mean, tilted_quadratic
from bolza.robust.tilted_sam import LI_TSAM as REFERENCE
from bolza.studies._study import Progress, Row, Scale, StudyResult, mean_error
from bolza.studies._tilted import accuracy, batches, mlp, split, with_wrong_labels

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "li2025_tsam"
TITLE = "Sharpness-aware minimisation with a tilt"
CLAIM = "A tilt over perturbations of the weights finds flatter and better minima than the worst perturbation"

D = torch.float64
CURVATURE, THETA, RHO = (4.0, 1.0, 0.25), (0.5, -1.0, 2.0), 0.3
GAUSSIAN = {0.0: 1.736250, 0.5: 1.894814, 1.0: 2.123887, 2.0: 3.298396}
BALL = {0.01: 1.5481, 1.0: 1.5966, 10.0: 1.928, 100.0: 2.2546, 1000.0: 2.3284}
TOP = {"descent": 1.52, "SAM": 0.45, "tilted": 0.30}
"""Largest eigenvalue of the Hessian in earlier runs."""
WRONG = {"descent": 0.893, "SAM": 0.935, "tilted": 0.932}
"""Accuracy with 30 % wrong labels in earlier runs."""
RULES: dict[str, dict[str, Any]] = {
    "descent": {},
    "descent, 6 × as long": {"longer": 6},
    "SAM": {"samples": 1, "radius": 0.0, "tilt": 0.0},
    "tilted": {"samples": 3, "tilt": 20.0},
    "t = 0": {"samples": 3, "tilt": 0.0},
}


@dataclass(frozen=True)
class Budget:
    """Size of the runs."""

    seeds: int = 2
    epochs: int = 40
    clean: tuple[str, ...] = ("descent", "SAM", "tilted")
    wrong: tuple[str, ...] = ()
    draws: int = 200_000
    chains: int = 60


BUDGETS = {"small": Budget(), "full": Budget(5, clean=tuple(RULES), wrong=tuple(RULES), chains=400)}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Check the quadratic, then train on digits and measure sharpness and accuracy.

    Args:
        scale: ``"small"``: two seeds, clean labels; ``"full"``: five seeds, wrong labels too, and every rule.
        progress: called with the share done and a few words.

    Returns:
        The rows, a figure, and the numbers.

    Example:
        >>> from bolza.studies import get
        >>> get("li2025_tsam").reference.arxiv
        '2410.22656'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    rows = exact_rows(budget.draws, budget.chains)
    found: dict[str, dict[str, list[dict[str, float]]]] = {"clean": {}, "wrong": {}}
    jobs = [("clean", rule) for rule in budget.clean] + [("wrong", rule) for rule in budget.wrong]
    for i, (labels, rule) in enumerate(jobs):
        report(0.1 + 0.9 * i / len(jobs), f"{rule}, {labels} labels")
        found[labels][rule] = [
            train(rule, seed, budget.epochs, 0.3 if labels == "wrong" else 0.0)
            for seed in range(budget.seeds)
        ]
    rows += clean_rows(found["clean"])
    if found["wrong"]:
        rows += wrong_rows(found["wrong"])
    notes = (
        "MLP 64-128-10, 40 epochs in batches of 100, rate 0.1, momentum 0.9; ρ = r = 0.2, three samples, t = 20. The "
        "largest eigenvalue is that of the Hessian of the mean training loss. Expected numbers are of earlier runs "
        "of ours.",
        "A step of SAM takes two gradients, one of the tilted method six; 'descent, 6 × as long' takes as many "
        "gradients as the latter.",
        "Errors are standard errors over seeds; differences are taken seed by seed.",
    )
    report(1.0, "done")
    return StudyResult(KEY, TITLE, REFERENCE, CLAIM, scale, rows, (_figure(found),), notes, found)


def quadratic(theta: Tensor) -> Tensor:
    """½ Σ λ_i θ_i², along the last axis."""
    return 0.5 * (torch.tensor(CURVATURE, dtype=D) * theta**2).sum(-1)


def ball(count: int, dim: int, radius: float, generator: torch.Generator) -> Tensor:
    """Points uniform in a ball, in mirrored pairs."""
    z = torch.randn(count // 2, dim, generator=generator, dtype=D)
    z = radius * z / z.norm(dim=-1, keepdim=True)
    z = z * torch.rand(len(z), 1, generator=generator, dtype=D) ** (1 / dim)
    return torch.cat([z, -z])


def exact_rows(draws: int, chains: int) -> list[Row]:
    """A quadratic: closed form, by draws, in a ball, with few samples, by Hamiltonian dynamics."""
    lam, theta = torch.tensor(CURVATURE, dtype=D), torch.tensor(THETA, dtype=D)
    draw = torch.Generator().manual_seed(0)
    worst = max(abs(float(tilted_quadratic(lam, theta, t, RHO)[0]) - value) for t, value in GAUSSIAN.items())
    slope = tilted_quadratic(lam, theta, 0.5, RHO)[1]
    expected = torch.tensor([2.439024, -1.047120, 0.505689], dtype=D)
    worst = max(worst, float((slope - expected).abs().max()))
    rows = [
        Row(
            "objective and gradient of a quadratic in closed form, largest error",
            0.0,
            worst,
            1e-6,
            worst < 1e-6,
        )
    ]
    half = RHO * torch.randn(draws // 2, 3, generator=draw, dtype=D)
    losses = quadratic(theta + torch.cat([half, -half]))
    error = max(
        abs(float(tilted_mean(losses, t)) / float(tilted_quadratic(lam, theta, t, RHO)[0]) - 1)
        for t in (0.0, 0.5, 1.0)
    )
    rows.append(
        Row(f"the same by {draws} draws, t ≤ 1, largest relative error", "≤ 0.01", error, None, error < 0.01)
    )
    losses = quadratic(theta + ball(draws, 3, RHO, draw))
    error = max(abs(float(tilted_mean(losses, t)) - value) for t, value in BALL.items())
    rows.append(
        Row(
            "uniform in a ball of radius 0.3, t = 0.01 … 1000, largest error",
            0.0,
            error,
            3e-3,
            error < 6e-3,
            "against 1.5481 … 2.3284; the largest loss in the ball is 2.3422",
        )
    )
    few = RHO * torch.randn(20_000, 4, 3, generator=draw, dtype=D)
    low = tilted_mean(quadratic(theta + few), 2.0)
    exact = float(tilted_quadratic(lam, theta, 2.0, RHO)[0])
    bias, error = float(low.mean()) - exact, float(low.std()) / len(low) ** 0.5
    rows.append(
        Row(
            "bias of four samples at t = 2, where the objective is 3.298",
            -1.15,
            bias,
            error,
            abs(bias + 1.15) < 0.15,
            "a weighting of gradients, not an estimate of the objective",
        )
    )
    z, gap = chain_against_closed_form(chains)
    rows.append(
        Row(
            "gradient by Hamiltonian dynamics against the closed form, largest entry in standard errors",
            "≤ 4",
            z,
            None,
            z < 4,
            f"{chains} chains of 12 samples, t = 1; largest error {gap:.3f}",
        )
    )
    return rows


def chain_against_closed_form(chains: int) -> tuple[float, float]:
    """The Hamiltonian sampler's gradient, over steps with other seeds, in standard errors."""
    lam, theta = torch.tensor(CURVATURE, dtype=D), torch.tensor(THETA, dtype=D)
    weight = nn.Parameter(theta.clone())
    optimizer = TiltedSAM(
        torch.optim.SGD([weight], lr=0.0), tilt=1.0, rho=RHO, samples=12, sampler="hamiltonian", leapfrog=3
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = quadratic(weight)
        loss.backward()
        return loss

    slopes = []
    for _ in range(chains):
        optimizer.step(closure)
        assert weight.grad is not None
        slopes.append(weight.grad.clone())
    block = torch.stack(slopes)
    exact = tilted_quadratic(lam, theta, 1.0, RHO)[1]
    gap = (block.mean(0) - exact).abs()
    return float((gap / (block.std(0) / len(block) ** 0.5)).max()), float(gap.max())


def train(rule: str, seed: int, epochs: int, wrong: float) -> dict[str, float]:
    """Accuracy, training loss and largest Hessian eigenvalue after training by one rule."""
    settings = dict(RULES[rule])
    longer = settings.pop("longer", 1)
    x, y, test_x, test_y = split(seed)
    y = with_wrong_labels(y, wrong, seed) if wrong else y
    net = mlp(seed, 128)
    base = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    optimizer = TiltedSAM(base, rho=0.2, seed=seed, model=net, **settings) if settings else base
    for batch in _pairs(x, y, epochs * longer, seed):
        optimizer.step(partial(_closure, net, optimizer, batch))
    with torch.no_grad():
        loss = float(F.cross_entropy(net(x), y))
    top = top_eigenpairs(
        hessian_operator(net, F.cross_entropy, (x, y)),
        tol=1e-2,
        which="largest algebraic",
        generator=torch.Generator().manual_seed(0),
    )
    return {"accuracy": accuracy(net, test_x, test_y), "loss": loss, "top": float(top.eigenvalues[0])}


def _pairs(x: Tensor, y: Tensor, epochs: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    for rows in batches(len(x), 100, epochs, seed):
        yield x[rows], y[rows]


def _closure(net: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> Tensor:
    optimizer.zero_grad()
    loss = F.cross_entropy(net(batch[0]), batch[1])
    loss.backward()
    return loss


def clean_rows(found: dict[str, list[dict[str, float]]]) -> list[Row]:
    """Sharpness and accuracy without wrong labels."""
    rows = []
    top = {rule: mean_error(r["top"] for r in results) for rule, results in found.items()}
    for rule, earlier in TOP.items():
        value, error = top[rule]
        near = 0.5 * earlier < value + 2 * error and value - 2 * error < 2 * earlier
        rows.append(
            Row(
                f"largest eigenvalue of the Hessian, {rule}",
                earlier,
                value,
                error,
                near,
                "within a factor of two and two errors",
            )
        )
    for a, b, factor in (("tilted", "SAM", 1.0), ("SAM", "descent", 0.6)):
        ratio, error = mean_error(r["top"] / s["top"] for r, s in zip(found[a], found[b], strict=True))
        rows.append(
            Row(
                f"sharpness of {a} over that of {b}",
                f"≤ {factor:g}",
                ratio,
                error,
                ratio <= factor if abs(ratio - factor) > 2 * error else None,
                "to two errors, seed by seed",
            )
        )
    gain, error = _difference(found, "tilted", "descent")
    rows.append(Row("accuracy: tilted less descent", "≥ −0.005", gain, error, gain >= -0.005, "seed by seed"))
    if "t = 0" in found:
        rows += [_tilt_row(found, "clean"), _equal_cost_row(found, "clean")]
    return rows


def wrong_rows(found: dict[str, list[dict[str, float]]]) -> list[Row]:
    """Accuracy with 30 % wrong labels."""
    rows = []
    for rule, earlier in WRONG.items():
        value, error = mean_error(r["accuracy"] for r in found[rule])
        rows.append(
            Row(
                f"30 % wrong labels: accuracy, {rule}",
                earlier,
                value,
                error,
                abs(value - earlier) < 0.03 + 2 * error,
                "within 0.03 and two errors of earlier runs",
            )
        )
    for rule in ("SAM", "tilted"):
        gain, error = _difference(found, rule, "descent")
        rows.append(
            Row(
                f"30 % wrong labels: {rule} less descent", "≥ 0.02", gain, error, gain >= 0.02, "seed by seed"
            )
        )
    return [*rows, _tilt_row(found, "30 % wrong"), _equal_cost_row(found, "30 % wrong")]


def _difference(found: dict[str, list[dict[str, float]]], a: str, b: str) -> tuple[float, float]:
    return mean_error(r["accuracy"] - s["accuracy"] for r, s in zip(found[a], found[b], strict=True))


def _tilt_row(found: dict[str, list[dict[str, float]]], labels: str) -> Row:
    """What the tilt adds to averaging as many samples."""
    gain, error = _difference(found, "tilted", "t = 0")
    return Row(
        f"{labels} labels: what the tilt adds, accuracy of t = 20 less that of t = 0",
        "> 0",
        gain,
        error,
        gain > 0 if abs(gain) > 2 * error else None,
        "to two errors; the losses of the samples are nearly equal here",
    )


def _equal_cost_row(found: dict[str, list[dict[str, float]]], labels: str) -> Row:
    gain, error = _difference(found, "tilted", "descent, 6 × as long")
    return Row(
        f"{labels} labels: tilted less descent with as many gradients",
        "> 0",
        gain,
        error,
        gain > 0 if abs(gain) > 2 * error else None,
        "to two errors, seed by seed",
    )


def _figure(found: Any) -> Figure:
    return Figure(
        "The average, the tilted and the worst perturbation",
        partial(_draw, found=found),
        caption=(
            "Left: a tilted objective along a line with a sharp and a flat valley: the larger t, the higher the "
            "sharp one rises. Middle: largest Hessian eigenvalue after training, one point a seed. Right: test "
            "accuracy, with one standard error; hatched: 30 % wrong labels."
        ),
        alt="Curves of tilted objectives; points of sharpness; bars of accuracy.",
        size=(11.0, 3.3),
        key="tsam",
    )


def _draw(canvas: Any, found: Any) -> None:
    left, middle, right = canvas.subplots(1, 3, width_ratios=[1.3, 1, 1.2])
    place = torch.linspace(-1.6, 2.4, 240, dtype=D)

    def valleys(w: Tensor) -> Tensor:
        return 1.2 - 1.2 * torch.exp(-((w + 0.6) ** 2) / 0.02) - torch.exp(-((w - 1.0) ** 2) / 0.4)

    left.plot(place, valleys(place), color=role("muted"), linewidth=1, label="L")
    eps = torch.linspace(-0.35, 0.35, 141, dtype=D)
    around = valleys(place[:, None] + eps)
    for t, colour in ((0.0, "third"), (5.0, "second"), (math.inf, "first")):
        name = "t = ∞" if math.isinf(t) else f"t = {t:g}"
        left.plot(place, tilted_mean(around, t), color=role(colour), label=name)
    left.set(xlabel="θ", ylabel="tilted objective")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, 1.17), ncols=4, columnspacing=1.0)
    names = list(found["clean"])
    for k, name in enumerate(names):
        tops = [r["top"] for r in found["clean"][name]]
        middle.plot(
            [k] * len(tops), tops, "o", color=role("first" if name == "tilted" else "muted"), alpha=0.8
        )
    middle.set_xticks(
        range(len(names)), [name.replace(", ", ",\n") for name in names], rotation=0, fontsize=8
    )
    middle.set(ylabel="largest eigenvalue", ylim=(0, None))
    middle.margins(x=0.15)
    bars = list(found["wrong"] or found["clean"])
    for i, labels in enumerate(("clean", "wrong")):
        shown = [name for name in bars if name in found[labels]]
        if not shown:
            continue
        pairs = [mean_error(r["accuracy"] for r in found[labels][name]) for name in shown]
        right.bar(
            [bars.index(name) + ((i - 0.5) * 0.38 if found["wrong"] else 0) for name in shown],
            [mean for mean, _ in pairs],
            0.36,
            yerr=[error for _, error in pairs],
            color=role("second" if i else "muted"),
            ecolor=role("ink"),
            hatch="//" if i else None,
            label="30 % wrong labels" if i else "clean labels",
        )
    right.set_xticks(range(len(bars)), [name.replace(", ", ",\n") for name in bars], fontsize=8)
    right.set(ylabel="test accuracy", ylim=(0.7, 1.0))
    right.grid(False, axis="x")
    right.legend(loc="upper center", bbox_to_anchor=(0.5, 1.17), ncols=2)
