r"""Two-layer networks as particles: many neurons follow one limit, at a distance of 1/√m.

The network f(x) = (1/m) Σ_j a_j tanh(w_j x + b_j) is an average over particles θ_j = (a_j, w_j, b_j). Trained with a
rate of η m for each particle, so that a particle moves at a speed that does not depend on m, the distribution of the
particles follows a gradient flow in the space of distributions as m → ∞, and a network of m particles stays within
O(1/√m) of it. Unlike in the limit of the tangent kernel the particles move: features are learnt.

Here the limit is stood in for by a network of very many particles, and networks of few are compared with it over the
whole course of training: sup_k |L_m(k) − L_∞(k)|.

Reference: Mei, Montanari & Nguyen (2018), arXiv:1804.06561. It stands for the mean-field theory of training in
general: Pabari & Zhou's *A mean-field theory of training deep neural networks*, which this study was meant for, could
not be found in any form.

Departures: one input dimension, the target sin 2x, full-batch gradient descent, tanh, no noise and no regulariser.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bolza.core.reference import Reference
from bolza.report import Figure, log_axis, role
from bolza.studies._study import Progress, Row, Scale, StudyResult

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "mei2018_particles"
TITLE = "Two-layer networks as interacting particles"
CLAIM = (
    "A two-layer network of m neurons trains along the path of the infinitely wide one, within O(1/√m), "
    "while its neurons move by an amount that does not depend on m"
)
REFERENCE = Reference(
    "mei2018mean",
    "Mei, Song and Montanari, Andrea and Nguyen, Phan-Minh",
    "A Mean Field View of the Landscape of Two-Layer Neural Networks",
    2018,
    venue="Proceedings of the National Academy of Sciences",
    arxiv="1804.06561",
)


@dataclass(frozen=True)
class Budget:
    """Size of the experiment."""

    sizes: tuple[int, ...] = (40, 160, 640, 2560)
    seeds: int = 12
    limit: int = 12_000
    steps: int = 300
    lr: float = 0.2
    points: int = 32


BUDGETS = {
    "small": Budget(),
    "full": Budget(
        sizes=(50, 100, 200, 400, 800, 1600, 3200, 6400), seeds=48, limit=200_000, steps=400, points=64
    ),
}


@dataclass(frozen=True)
class Course:
    """Training of several networks of one size.

    Args:
        loss: mean of (f − y)²/2, (seeds, steps + 1).
        moved: root mean square distance that a particle went, (seeds,).
        start: particles before training, (seeds, 3, m): a, w, b.
        end: particles after it.
    """

    loss: Tensor
    moved: Tensor
    start: Tensor
    end: Tensor


def train(m: int, seeds: int, budget: Budget, first_seed: int = 0) -> Course:
    """Train networks of m particles, all seeds at once.

    Particle j follows −m ∂L/∂θ_j: with r = f − y its velocity is −E_x[r(x) ∇_θ a tanh(w x + b)], free of m.
    """
    x = torch.linspace(-2.0, 2.0, budget.points)
    y = torch.sin(2 * x)
    draws = [torch.randn(3, m, generator=torch.Generator().manual_seed(first_seed + k)) for k in range(seeds)]
    start = torch.stack(draws)
    a, w, b = (part.contiguous() for part in start.clone().unbind(1))  # (seeds, m)
    losses = []
    for step in range(budget.steps + 1):
        phi = torch.tanh(torch.addcmul(b[:, None, :], x[None, :, None], w[:, None, :]))  # (seeds, points, m)
        r = torch.einsum("spm,sm->sp", phi, a) / m - y
        losses.append(0.5 * r.square().mean(1))
        if step == budget.steps:
            break
        weights = torch.stack([r, r * x], 1) / budget.points  # (seeds, 2, points)
        slope_a = (weights[:, :1] @ phi)[:, 0]
        slope_b, slope_w = (weights @ phi.square_().neg_().add_(1)).unbind(1)
        slope_b, slope_w = slope_b * a, slope_w * a
        a.sub_(slope_a, alpha=budget.lr)
        w.sub_(slope_w, alpha=budget.lr)
        b.sub_(slope_b, alpha=budget.lr)
    end = torch.stack([a, w, b], 1)
    moved = (end - start).square().sum(1).mean(1).sqrt()
    return Course(torch.stack(losses, 1).double(), moved.double(), start, end)


def gaps(course: Course, limit: Tensor) -> Tensor:
    """sup_k |L_m(k) − L_∞(k)| of each seed."""
    return (course.loss - limit).abs().amax(1)


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Train networks of few and of very many particles, and compare their courses.

    Args:
        scale: ``"small"``: 40 to 2560 particles, 12 seeds, the limit by 12,000; ``"full"``: 50 to 6400, 48 seeds, the
            limit by 200,000.
        progress: called with the share done and a few words.

    Returns:
        Rows on the rate and on how far particles move, two figures.

    Example:
        >>> from bolza.studies import get
        >>> get("mei2018_particles").title
        'Two-layer networks as interacting particles'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    report(0.0, f"training {budget.limit} particles")
    limit = train(budget.limit, 1, budget, first_seed=10_000)
    done, total = budget.limit, budget.limit + budget.seeds * sum(budget.sizes)
    courses: dict[int, Course] = {}
    for m in budget.sizes:
        report(done / total, f"training {budget.seeds} networks of {m} particles")
        courses[m] = _in_parts(m, budget)
        done += budget.seeds * m
    report(1.0, "done")
    found = {m: gaps(course, limit.loss[0]) for m, course in courses.items()}
    rms = {m: float(gap.square().mean().sqrt()) for m, gap in found.items()}
    return StudyResult(
        KEY,
        TITLE,
        REFERENCE,
        CLAIM,
        scale,
        rows(found, courses, limit, budget),
        (_rate_figure(found, rms, courses, limit), _course_figure(courses, limit, budget)),
        notes=(
            "Pabari & Zhou, A mean-field theory of training deep neural networks, could not be located; this study "
            "stands in for it.",
            f"The infinite network is stood in for by {budget.limit:,} particles, whose own distance from the limit is "
            "part of every gap.",
            "The target is sin 2x on 32 or 64 points of [−2, 2], without noise, by full-batch gradient descent.",
        ),
        facts={
            "sizes": list(budget.sizes),
            "rms_sup_gap": list(rms.values()),
            "moved": [float(c.moved.mean()) for c in courses.values()],
            "limit_loss": limit.loss[0].tolist(),
        },
    )


def _in_parts(m: int, budget: Budget) -> Course:
    """As many seeds at once as keep the activations in the cache."""
    step = max(1, 40_000 // m)
    parts = [train(m, min(step, budget.seeds - at), budget, at) for at in range(0, budget.seeds, step)]
    return Course(
        *(torch.cat([getattr(part, key) for part in parts]) for key in ("loss", "moved", "start", "end"))
    )


def slope(sizes: list[int], values: list[Tensor]) -> tuple[float, float]:
    """Exponent of the root mean square over seeds against m, with a jackknife error.

    Example:
        >>> slope([10, 100, 1000], [torch.ones(4).double() / m**0.5 for m in (10.0, 100.0, 1000.0)])[0]
        -0.5
    """
    x = torch.tensor([math.log(m) for m in sizes], dtype=torch.float64)
    x = x - x.mean()
    squares = torch.stack([v.double().square() for v in values])  # (sizes, seeds)
    n = squares.shape[1]

    def fit(means: Tensor) -> Tensor:
        return (x[:, None] * 0.5 * means.log()).sum(0) / x.square().sum()

    whole = float(fit(squares.mean(1, keepdim=True)))
    without = fit((squares.sum(1, keepdim=True) - squares) / max(1, n - 1))
    return round(whole, 12), float(((n - 1) / n * (without - without.mean()).square().sum()).sqrt())


def rows(found: dict[int, Tensor], courses: dict[int, Course], limit: Course, budget: Budget) -> list[Row]:
    """Claims on the gaps and on the particles."""
    sizes = list(found)
    first, last = sizes[0], sizes[-1]
    squares = {m: gap.square() for m, gap in found.items()}
    rms = {m: float(s.mean().sqrt()) for m, s in squares.items()}
    n = budget.seeds
    errors = {m: float(s.std() / n**0.5 / (2 * rms[m])) for m, s in squares.items()}
    ratio = rms[first] / rms[last]
    relative = math.hypot(errors[first] / rms[first], errors[last] / rms[last])
    predicted = (last / first) ** 0.5
    exponent, error = slope(sizes, list(found.values()))
    out = [
        Row(
            f"sup over training of |L_m − L_∞|, from m = {first} to {last}, falls by (at least half of √ of the ratio)",
            predicted,
            ratio,
            ratio * relative,
            ratio >= predicted / 2,
            f"root mean square over {n} seeds: {rms[first]:.4f} and {rms[last]:.4f}",
        ),
        Row(
            "exponent of the gap in m",
            -0.5,
            exponent,
            error,
            abs(exponent + 0.5) < max(0.1, 3 * error),
            "within 0.1, or three standard errors",
        ),
    ]
    moved = {m: c.moved for m, c in courses.items()}
    reference = float(limit.moved)
    small, large = moved[first], moved[last]
    change = float(large.mean() / small.mean())
    change_error = change * math.hypot(*(float(v.std() / n**0.5 / v.mean()) for v in (small, large)))
    out.append(
        Row(
            f"distance a particle moves, m = {last} over m = {first}",
            1.0,
            change,
            change_error,
            abs(change - 1) < max(0.1, 3 * change_error),
            f"{reference:.3f} in the limit, of particles of size √3; where the tangent kernel rules it would shrink "
            f"to {(first / last) ** 0.5:.3f}",
        )
    )
    descent = limit.loss[0]
    rises = float((descent[1:] - descent[:-1]).clamp_min(0).max())
    out.append(
        Row(
            "the loss of the limit never rises: a gradient flow in the space of distributions",
            0.0,
            rises,
            None,
            rises <= 1e-7,
            f"it falls from {float(descent[0]):.4f} to {float(descent[-1]):.4f}",
        )
    )
    return out


def _rate_figure(
    found: dict[int, Tensor], rms: dict[int, float], courses: dict[int, Course], limit: Course
) -> Figure:
    return Figure(
        "How far a finite network is from the limit",
        partial(_draw_rate, found=found, rms=rms, courses=courses, limit=limit),
        caption="Left: the largest distance of the loss from that of the limit during training, each seed and the root "
        "mean square, with m^(−1/2). Right: how far a particle moves in training does not depend on m.",
        alt="Gap of the loss against the number of particles on logarithmic axes, and distance moved.",
        size=(9.2, 3.8),
        key="rate",
    )


def _draw_rate(
    canvas: Any, found: dict[int, Tensor], rms: dict[int, float], courses: dict[int, Course], limit: Course
) -> None:
    left, right = canvas.subplots(1, 2)
    sizes = list(found)
    for m, gap in found.items():
        left.plot([m] * len(gap), gap, "o", color=role("second"), alpha=0.25, markersize=3)
    left.plot(sizes, list(rms.values()), "D-", color=role("first"), markersize=5, label="root mean square")
    guide = [rms[sizes[0]] * (sizes[0] / m) ** 0.5 for m in sizes]
    left.plot(sizes, guide, "--", color=role("muted"), label="$m^{-1/2}$")
    log_axis(left, "x")
    log_axis(left, "y")
    left.set(xlabel="particles $m$", ylabel="sup $|L_m - L_\\infty|$")
    left.legend()
    for m, course in courses.items():
        right.plot([m] * len(course.moved), course.moved, "o", color=role("second"), alpha=0.25, markersize=3)
    means = [float(c.moved.mean()) for c in courses.values()]
    right.plot(sizes, means, "D-", color=role("first"), markersize=5, label="mean over seeds")
    right.axhline(float(limit.moved), color=role("third"), linestyle=":", label="limit")
    lazy = [means[0] * (sizes[0] / m) ** 0.5 for m in sizes]
    right.plot(sizes, lazy, "--", color=role("muted"), label="as a tangent kernel: $m^{-1/2}$")
    log_axis(right, "x")
    right.set(xlabel="particles $m$", ylabel="distance a particle moves", ylim=(0, 1.7 * max(means)))
    right.legend(loc="upper right")


def _course_figure(courses: dict[int, Course], limit: Course, budget: Budget) -> Figure:
    return Figure(
        "Training, and where the particles go",
        partial(_draw_course, courses=courses, limit=limit, budget=budget),
        caption=f"Left: the loss of {min(8, budget.seeds)} networks of {budget.sizes[0]} particles around that of the "
        "limit. Right: the particles of the limit in the plane of input and output weight, before and after.",
        alt="Loss over steps, and two clouds of particles.",
        size=(9.2, 3.8),
        key="course",
    )


def _draw_course(canvas: Any, courses: dict[int, Course], limit: Course, budget: Budget) -> None:
    left, before, after = canvas.subplots(1, 3, gridspec_kw={"width_ratios": [1.7, 1, 1]})
    steps = range(budget.steps + 1)
    for m, colour, shade in ((budget.sizes[0], "second", 0.5), (budget.sizes[-1], "third", 0.8)):
        for k, loss in enumerate(courses[m].loss[:8]):
            name = {"label": f"$m$ = {m}"} if k == 0 else {}
            left.plot(steps, loss, color=role(colour), alpha=shade, linewidth=0.9, **name)
    left.plot(steps, limit.loss[0], color=role("first"), label="limit")
    log_axis(left, "y")
    left.set(xlabel="step", ylabel="loss")
    left.legend()
    draw: Callable[[Any, Tensor, str], None] = partial(_cloud, count=3000)
    draw(before, limit.start[0], "before")
    draw(after, limit.end[0], "after")
    after.set_yticklabels([])
    before.set_ylabel("output weight $a$")


def _cloud(axes: Any, particles: Tensor, title: str, count: int) -> None:
    a, w, _ = particles[:, :count]
    axes.plot(w, a, ".", color=role("second"), markersize=1.5, alpha=0.35, rasterized=True)
    axes.set(title=title, xlim=(-5.5, 5.5), ylim=(-7, 7), xlabel="input weight $w$")
