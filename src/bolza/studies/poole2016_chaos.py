r"""Transient chaos makes deep random networks expressive: a circle grows exponentially long with depth.

Propagated through a random tanh network, a circle of inputs keeps the variance q* of the length map, while
correlations follow c_{l+1} = C(c_l). For pre-activations normalised by the width, the speed and the
curvature of the curve obey

    g_{l+1} = χ₁ g_l,      κ²_{l+1} = 3 χ₂/χ₁² + κ²_l/χ₁,      χ₂ = σ_w² E φ''(√q* z)²,

so its length grows like χ₁^{l/2}. In the chaotic phase the curvature settles at 3χ₂/(χ₁(χ₁ - 1)) and the
length of the curve of tangent directions, ∫ κ √g, explodes as fast: the network bends the curve everywhere.
In the ordered phase the curve shrinks and straightens no further: the tangents turn about as much as at first.

Reference: Poole, Lahiri, Raghu, Sohl-Dickstein & Ganguli (2016), with their σ_w = 1.3, 2.5, 4 and
σ_b = 0.3. Departures: h, its speed and its acceleration are carried exactly through each layer instead of
being read off neighbouring points; widths are smaller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bolza.meanfield import FixedPoint, correlation_map, fixed_point, length_map, resolve_activation
from bolza.meanfield.fixed_point import POOLE
from bolza.report import Figure, role
from bolza.studies._study import Progress, Row, Scale, StudyResult

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "poole2016_chaos"
TITLE = "Transient chaos and exponential expressivity"
CLAIM = (
    "In the chaotic phase a random network stretches and bends a curve of inputs exponentially with depth; "
    "in the ordered phase it contracts it"
)
REFERENCE = POOLE

BIAS_VAR = 0.09
WEIGHT_STDS = (1.3, 2.5, 4.0)
# (σ_w², q*, χ₁, c*) at σ_b² = 0.09, solved to all digits shown.
POINTS = (
    (1.69, 0.607047, 0.939807, 1.0),
    (6.25, 4.079124, 1.585225, 0.122104),
    (16.0, 12.604149, 2.367261, 0.029696),
)


@dataclass(frozen=True)
class Budget:
    """Size of the simulation."""

    width: int
    points: int
    depth: int
    seeds: int


BUDGETS = {"small": Budget(400, 64, 12, 3), "full": Budget(2000, 256, 16, 8)}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Solve the theory and push circles through random networks.

    Args:
        scale: ``"small"``: width 400, three networks a variance, a few seconds; ``"full"``: width 2000, eight.
        progress: called with the share done and a few words.

    Returns:
        The rows, the growth of the curve and its picture layer by layer.

    Example:
        >>> from bolza.studies import get
        >>> get("1606.05340").key
        'poole2016_chaos'
    """
    budget, report = BUDGETS[scale], progress or (lambda share, text: None)
    rows, curves, theory, pictures = _points(), [], [], []
    for i, std in enumerate(WEIGHT_STDS):
        report(i / len(WEIGHT_STDS), f"circles through networks of σ_w = {std:g}")
        point = fixed_point("tanh", std**2, BIAS_VAR)
        runs = [circle(std**2, point, budget, seed) for seed in range(budget.seeds)]
        curves.append(torch.stack([measured for measured, _ in runs]))
        pictures.append(runs[0][1])
        theory.append(curve_theory(std**2, point, budget.depth))
        rows += _curve_rows(std, point, curves[-1], theory[-1], budget)
    rows += _memory_rows()
    report(1.0, "done")
    figures = (
        Figure(
            "How fast a circle grows",
            partial(_draw_growth, curves=curves, theory=theory),
            caption=(
                "Length of the image of a circle (left) and of its curve of tangent directions (right), relative to "
                "the input's. Lines: theory. Dots: mean over networks. In chaos both grow exponentially with depth."
            ),
            alt="Two panels of length over depth on a logarithmic axis for three weight scales.",
            size=(9.2, 4.2),
            key="growth",
        ),
        Figure(
            "A circle on its way through the layers",
            partial(_draw_circles, pictures=pictures, layers=_shown(budget.depth)),
            caption=(
                "The image of a circle in the plane of its two largest principal components, one network a row. "
                "Order shrinks it, chaos folds it until nothing of its shape is left."
            ),
            alt="Grid of closed curves by weight scale and layer.",
            size=(9.2, 6.0),
            key="circles",
        ),
    )
    notes = (
        f"{budget.seeds} networks of width {budget.width} for each σ_w; the limit of infinite width is reached up to "
        f"corrections of order depth/width = {budget.depth / budget.width:.1%}, which the verdicts allow for.",
        "Speed and acceleration of the curve are carried through each layer by the chain rule.",
    )
    facts = {
        "weight_stds": WEIGHT_STDS,
        "bias_var": BIAS_VAR,
        "growth": [c.mean(0).tolist() for c in curves],
        "theory": [t.tolist() for t in theory],
        "budget": vars(budget),
    }
    return StudyResult(KEY, TITLE, REFERENCE, CLAIM, scale, rows, figures, notes, facts)


def _points() -> list[Row]:
    rows = []
    for weight, q, chi, c in POINTS:
        point = fixed_point("tanh", weight, BIAS_VAR)
        for name, want, got in (("q*", q, point.q), ("χ₁", chi, point.chi_1), ("c*", c, point.c)):
            claim = f"{name} of tanh at σ_w² = {weight:g}, σ_b² = 0.09"
            rows.append(Row(claim, want, float(got), None, abs(float(got) - want) < 1e-6))
    return rows


def curve_theory(weight_var: float, point: FixedPoint, depth: int) -> Tensor:
    """Length, and length of the tangents' curve, of a circle by layer relative to the input: ``(depth + 1, 2)``."""
    chi = float(point.chi_1)
    chi_2 = weight_var * float(resolve_activation("tanh").curvature(point.q))
    g, curvature = float(point.q), 1 / float(point.q)  # per unit, and κ² times the width
    out = [(math.sqrt(g), math.sqrt(curvature * g))]
    for _ in range(depth):
        g, curvature = chi * g, 3 * chi_2 / chi**2 + curvature / chi
        out.append((math.sqrt(g), math.sqrt(curvature * g)))
    lengths = torch.tensor(out, dtype=torch.float64)
    return lengths / lengths[0]


def circle(weight_var: float, point: FixedPoint, budget: Budget, seed: int) -> tuple[Tensor, Tensor]:
    """Push a great circle of variance q* through a random tanh network.

    Args:
        weight_var: σ_w².
        point: its fixed point.
        budget: sizes.
        seed: of the weights.

    Returns:
        Lengths by layer as in `curve_theory`, and pictures ``(layers, points, 2)`` in principal components.
    """
    draw = torch.Generator().manual_seed(seed)
    n, angle = budget.width, 2 * math.pi * torch.arange(budget.points, dtype=torch.float64) / budget.points
    frame = torch.linalg.qr(torch.randn(n, 2, generator=draw, dtype=torch.float64)).Q * math.sqrt(
        n * float(point.q)
    )
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    h, v = cos * frame[:, 0] + sin * frame[:, 1], cos * frame[:, 1] - sin * frame[:, 0]
    a = -h
    lengths, pictures = [_lengths(v, a)], [_picture(h)]
    for _ in range(budget.depth):
        weight = torch.randn(n, n, generator=draw, dtype=torch.float64) * math.sqrt(weight_var / n)
        bias = math.sqrt(BIAS_VAR) * torch.randn(n, generator=draw, dtype=torch.float64)
        t = torch.tanh(h)
        slope = 1 - t * t
        h, v, a = t @ weight + bias, (slope * v) @ weight, (slope * a - 2 * t * slope * v * v) @ weight
        lengths.append(_lengths(v, a))
        pictures.append(_picture(h))
    table = torch.stack(lengths)
    return table / table[0], torch.stack(pictures)


def _lengths(v: Tensor, a: Tensor) -> Tensor:
    """∫ |v| dθ and ∫ |turn of the tangent| dθ, up to one factor."""
    speed = v.norm(dim=1)
    across = a - (a * v).sum(1, keepdim=True) / speed[:, None] ** 2 * v
    return torch.stack([speed.mean(), (across.norm(dim=1) / speed).mean()])


def _picture(h: Tensor) -> Tensor:
    centred = h - h.mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    return u[:, :2] * s[:2] / math.sqrt(h.shape[1])


def _curve_rows(std: float, point: FixedPoint, runs: Tensor, theory: Tensor, budget: Budget) -> list[Row]:
    rows, side = [], str(point.regime)
    finite = budget.depth / budget.width
    for column, name in ((0, "length of the circle"), (1, "length of its curve of tangents")):
        rate = (runs[:, -1, column] / runs[:, 2, column]).log() / (budget.depth - 2)
        want = float((theory[-1, column] / theory[2, column]).log()) / (budget.depth - 2)
        mean, error = float(rate.mean()), float(rate.std()) / budget.seeds**0.5
        rows.append(
            Row(
                f"growth a layer of the {name}, σ_w = {std:g} ({side})",
                math.exp(want),
                math.exp(mean),
                error * math.exp(mean),
                abs(mean - want) < 3 * error + finite,
                "theory beside networks, layers 3 to the last; within 3 standard errors + depth/width",
            )
        )
    chi, weight = float(point.chi_1), std**2
    bend = 3 * weight * float(resolve_activation("tanh").curvature(point.q)) / chi  # 3 χ₂/χ₁
    if side == "chaotic":
        squares = (runs[:, -1, 1] / runs[:, -1, 0]).square() / float(point.q)
        mean, error, want = float(squares.mean()), float(squares.std()) / budget.seeds**0.5, bend / (chi - 1)
        claim = f"squared curvature settles at 3χ₂/(χ₁(χ₁ − 1)), σ_w = {std:g} (chaotic)"
        allowed = 3 * error + finite * want
        rows.append(
            Row(claim, want, mean, error, abs(mean - want) < allowed, "3 standard errors + depth/width")
        )
    else:
        bound = math.sqrt(1 + bend * float(point.q) / (1 - chi))
        top = float(runs[:, -1, 1].mean())
        claim = (
            f"the tangents' curve never grows beyond √(1 + 3χ₂q*/(χ₁(1 − χ₁))) times, σ_w = {std:g} (ordered)"
        )
        rows.append(Row(claim, f"< {bound:.3g}", top, None, top < bound))
    return rows


def _memory_rows() -> list[Row]:
    starts = torch.tensor([0.2, 1.0, 4.0, 15.0], dtype=torch.float64)
    worst = 0
    for weight, q, _, _ in POINTS:
        orbit = length_map("tanh", weight, BIAS_VAR, starts, 12)
        far = ((orbit / q - 1).abs() > 0.05).any(-1)
        worst = max(worst, int(far.nonzero().max()) + 1)
    rows = [
        Row(
            "layers until the variance is within 5 % of q*, from anywhere",
            "a few",
            worst,
            None,
            worst <= 6,
            "worst of twelve starts",
        )
    ]
    settled = fixed_point("tanh", 6.25, BIAS_VAR).q
    *_, c = correlation_map("tanh", 6.25, BIAS_VAR, settled, settled, 0.999, 60)
    rows.append(
        Row(
            "two inputs of correlation 0.999 part until c* in chaos, σ_w = 2.5",
            POINTS[1][3],
            float(c[-1]),
            None,
            abs(float(c[-1]) - POINTS[1][3]) < 1e-3,
            "after 60 layers",
        )
    )
    return rows


_COLOURS = ("second", "third", "first")


def _draw_growth(canvas: Any, curves: list[Tensor], theory: list[Tensor]) -> None:
    axes = canvas.subplots(1, 2)
    for column, (ax, title) in enumerate(
        zip(axes, ("length of the circle", "length of its curve of tangents"), strict=True)
    ):
        for std, runs, line, colour in zip(WEIGHT_STDS, curves, theory, _COLOURS, strict=True):
            layers = range(len(line))
            ax.plot(layers, line[:, column], color=role(colour), linewidth=1.8)
            ax.plot(
                layers,
                runs[:, :, column].mean(0),
                "o",
                color=role(colour),
                markersize=5,
                label=f"$\\sigma_w$ = {std:g}",
            )
        ax.set_yscale("log")
        ax.set(xlabel="layer", title=title)
    axes[0].set_ylabel("relative to the input")
    axes[1].legend(loc="upper left")


def _shown(depth: int) -> list[int]:
    return [0, 2, 4, 8, depth]


def _draw_circles(canvas: Any, pictures: list[Tensor], layers: list[int]) -> None:
    axes = canvas.subplots(len(pictures), len(layers))
    for row, (std, path) in enumerate(zip(WEIGHT_STDS, pictures, strict=True)):
        for column, layer in enumerate(layers):
            ax = axes[row][column]
            x = torch.cat([path[layer], path[layer, :1]])
            ax.plot(x[:, 0], x[:, 1], color=role(_COLOURS[row]), linewidth=1.1)
            reach = 1.15 * float(path[0].abs().max())
            ax.set(xlim=(-reach, reach), ylim=(-reach, reach), xticks=[], yticks=[], aspect="equal")
            ax.grid(False)
            for spine in ax.spines.values():
                spine.set_visible(False)
            if row == 0:
                ax.set_title("input" if layer == 0 else f"layer {layer}", fontsize=10.5)
            if column == 0:
                ax.set_ylabel(f"$\\sigma_w$ = {std:g}")
