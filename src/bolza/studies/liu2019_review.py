r"""The two panels of the review: the phase diagram, and trainability over depth × σ_w².

The review's message is that a network with random weights of variance σ_w²/n and biases of variance σ_b²
can be trained up to a depth that is a small multiple of the correlation depth scale

    ξ_c = −1 / log χ_c,      χ_c = σ_w² E[φ'(u₁) φ'(u₂)]  at the stable correlation c*,

so that arbitrarily deep networks train only on the critical line χ₁ = 1. Panel (a) recomputes the critical
line and the depth scales of tanh. Panel (b) trains tanh networks of σ_b² = 0.05 for a short budget and
draws their training accuracy over depth × σ_w², with ξ_c, 2 ξ_c and 4.5 ξ_c on top.

What is reported is the ratio *largest trainable depth / ξ_c* of each side, with its spread over seeds and
columns: on the published data the ratio is 7.4–7.7 on the ordered side and 4.6–5.7 on the chaotic one, so
no single constant describes both.

Reference: Liu & Theodorou (2019), arXiv:1908.10920; the experiment is that of Schoenholz, Gilmer, Ganguli &
Sohl-Dickstein (2017), *Deep Information Propagation*.

Departures. Handwritten digits of 8 × 8 pixels instead of MNIST. Weights are scaled by the fan-in in every
layer. The small scale is narrower and takes fewer, larger steps; lr × width × steps, the time that the
linearised network sees, is the paper's own 60.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bolza.data import Dataset, digits
from bolza.meanfield import critical_weight_var, fixed_point
from bolza.meanfield.fixed_point import REVIEW
from bolza.models import mlp
from bolza.report import Figure, role
from bolza.studies._study import Progress, Row, Scale, StudyResult
from bolza.training import ensemble_parameters, train_ensemble

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "liu2019_review"
TITLE = "Phase diagram and trainability of tanh networks"
CLAIM = (
    "A random network trains up to a depth of a few correlation depth scales ξ_c, "
    "and at any depth on the critical line"
)
REFERENCE = REVIEW

BIAS_VAR = 0.05
TRAINABLE = 0.3  # training accuracy from which a network counts as trained within the budget; chance is 0.1
PAPER_TIME = 60.0  # lr × width × steps of the paper: 1e-3 × 300 × 200

# σ_b² → σ_w² on the critical line of tanh, solved to all digits shown.
CRITICAL_LINE = {0.01: 1.424205, 0.05: 1.760955, 0.10: 1.986073, 0.20: 2.285152, 0.25: 2.401489}
# σ_w² → ξ_c at σ_b² = 0.05; the first and the last are stored results of the review's companion code.
DEPTH_SCALES = {1.0: 3.6270, 1.5: 15.7910, 2.5: 11.7956, 4.0: 6.9803}


@dataclass(frozen=True)
class Budget:
    """Size of the trainability experiment."""

    weight_vars: tuple[float, ...]
    depths: tuple[int, ...]
    seeds: int
    width: int
    batch: int
    steps: int

    @property
    def lr(self) -> float:
        """Learning rate that gives the paper's lr × width × steps."""
        return PAPER_TIME / (self.width * self.steps)


BUDGETS = {
    "small": Budget(
        weight_vars=(1.0, 1.2, 1.4, 1.761, 2.8, 3.6),
        depths=(10, 20, 35, 60),
        seeds=2,
        width=100,
        batch=32,
        steps=100,
    ),
    "full": Budget(
        weight_vars=(
            *(v / 10 for v in range(10, 18)),
            1.761,
            1.8,
            1.9,
            2.0,
            2.2,
            2.4,
            2.6,
            2.8,
            3.2,
            3.6,
            4.0,
        ),
        depths=(10, 15, 20, 25, 30, 35, 40, 50, 60, 70, 80, 100),
        seeds=3,
        width=200,
        batch=128,
        steps=200,
    ),
}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Recompute both panels.

    Args:
        scale: ``"small"``: 24 points, width 100, half a minute on one core; ``"full"``: 228 points, width
            200, 200 steps and three seeds, an hour or two on one core.
        progress: called with the share done and a few words.

    Returns:
        The rows of both panels, the figures, and the accuracy map among the facts.

    Example:
        >>> from bolza.studies import get
        >>> get("liu2019_review").title
        'Phase diagram and trainability of tanh networks'
    """
    from bolza.studies._phase import PhaseMap

    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    report(0.0, "phase diagram")
    rows = phase_rows()
    accuracy = train_map(budget, report)  # (seed, weight_var, depth)
    columns = torch.tensor(budget.weight_vars, dtype=torch.float64)
    xi = fixed_point("tanh", columns, BIAS_VAR).xi_c
    critical = float(critical_weight_var("tanh", BIAS_VAR))
    ratios = depth_ratios(accuracy, budget.depths, xi)
    rows += trainability_rows(accuracy, budget, ratios, critical)
    figures = (
        PhaseMap.compute("tanh", (0.5, 3.0), (0.0, 0.25)).figure(line_at=BIAS_VAR),
        _trainability_figure(accuracy.mean(0), budget, critical),
    )
    notes = (
        f"The networks have width {budget.width} and see {budget.steps} steps of plain SGD with batches of "
        f"{budget.batch} at lr = {budget.lr:.2g}; the paper has width 300, 200 steps, batches of 256 and lr = 0.001. "
        f"lr × width × steps is {PAPER_TIME:g} in both.",
        f"A depth counts as trainable while the training accuracy, linear between depths, stays above {TRAINABLE}. "
        "A σ_w² for which any seed has its limit outside the depths tried is left out of the ratio.",
        "The data are 8 × 8 handwritten digits in [−0.5, 0.5], the paper's are MNIST; accuracy is that of the whole "
        "training set, as in the paper.",
    )
    facts = {
        "weight_vars": budget.weight_vars,
        "depths": budget.depths,
        "xi_c": xi.tolist(),
        "train_accuracy": accuracy.tolist(),
        "depth_over_xi": ratios.tolist(),
        "critical_weight_var": critical,
        "budget": vars(budget) | {"lr": budget.lr},
    }
    return StudyResult(KEY, TITLE, REFERENCE, CLAIM, scale, rows, figures, notes, facts)


# ---------------------------------------------------------------------------------- panel (a)


def phase_rows() -> list[Row]:
    """Claims on the critical line, the depth scales, and what happens near the line."""
    biases = torch.tensor(list(CRITICAL_LINE), dtype=torch.float64)
    found = critical_weight_var("tanh", biases)
    rows = []
    for bias, want, got in zip(CRITICAL_LINE, CRITICAL_LINE.values(), found.tolist(), strict=True):
        rows.append(Row(f"critical σ_w² of tanh at σ_b² = {bias:g}", want, got, None, abs(got - want) < 1e-6))
    scales = fixed_point(
        "tanh", torch.tensor(list(DEPTH_SCALES), dtype=torch.float64), BIAS_VAR
    ).xi_c.tolist()
    for weight, want, got in zip(DEPTH_SCALES, DEPTH_SCALES.values(), scales, strict=True):
        rows.append(Row(f"ξ_c at σ_w² = {weight:g}, σ_b² = 0.05", want, got, None, abs(got - want) < 1e-4))
    centre = float(critical_weight_var("tanh", BIAS_VAR))
    for side, sign in (("below", -1), ("above", 1)):
        offset = 1e-4
        product = offset * float(fixed_point("tanh", centre + sign * offset, BIAS_VAR).xi_c)
        rows.append(
            Row(
                f"ξ_c · |σ_w² − critical| tends to a constant, from {side}",
                4.69,
                product,
                None,
                abs(product - 4.69) < 0.01,
                "measured 10⁻⁴ away from the line",
            )
        )
    sides = fixed_point("tanh", torch.tensor([0.9, 1.1], dtype=torch.float64) * centre, BIAS_VAR).regime
    words = " / ".join(str(s) for s in sides)
    rows.append(
        Row(
            "left of the line is ordered, right is chaotic",
            "ordered / chaotic",
            words,
            None,
            words == "ordered / chaotic",
        )
    )
    return rows


# ---------------------------------------------------------------------------------- panel (b)


def train_map(budget: Budget, report: Progress) -> Tensor:
    """Training accuracy after the budget, shape (seeds, weight variances, depths).

    All networks of one depth, every σ_w² and every seed, are trained together. Networks of one seed share
    their random numbers across σ_w², so that a row of the map shows its effect and not the luck of the draw.
    """
    data = _digits_as_in_the_paper()
    shape = (budget.seeds, len(budget.weight_vars))
    total, before, accuracy = sum(budget.depths), 0, []
    for depth in budget.depths:
        make = partial(
            mlp, depth, budget.width, "tanh", in_features=data.input_shape[0], out_features=data.output_size
        )
        draws = [
            ensemble_parameters(make, budget.weight_vars, BIAS_VAR, seed=1000 * s + depth)
            for s in range(budget.seeds)
        ]

        def tell(done: int, steps: int, depth: int = depth, before: int = before) -> None:
            report(
                (before + depth * done / steps) / total,
                f"training {math.prod(shape)} networks of depth {depth}",
            )

        trained = train_ensemble(
            make,
            data,
            parameters={name: torch.cat([draw[name] for draw in draws]) for name in draws[0]},
            lr=budget.lr,
            batch_size=budget.batch,
            steps=budget.steps,
            progress=tell,
        )
        accuracy.append(trained.train_accuracy.double().reshape(shape))
        before += depth
    return torch.stack(accuracy, -1)


def _digits_as_in_the_paper() -> Dataset:
    """Digits with pixels in [−0.5, 0.5]; the accuracy that counts is that of the training set."""
    data = digits()
    low, high = data.train_x.amin(), data.train_x.amax()
    pixels = ((data.train_x - low) / (high - low) - 0.5).flatten(1)
    return replace(data, train_x=pixels, test_x=pixels[:0], test_y=data.test_y[:0])


def largest_depth(accuracy: Sequence[float], depths: Sequence[int], threshold: float = TRAINABLE) -> float:
    """Depth at which the accuracy first falls to the threshold, linear between the depths tried.

    Args:
        accuracy: one a depth.
        depths: increasing.
        threshold: accuracy of a network that counts as trained.

    Returns:
        The depth; ``nan`` if it lies below the first or beyond the last depth tried.

    Example:
        >>> largest_depth([0.8, 0.4, 0.2], [10, 20, 30])
        25.0
    """
    for i in range(1, len(depths)):
        high, low = accuracy[i - 1], accuracy[i]
        if high >= threshold > low:
            return depths[i - 1] + (high - threshold) / (high - low) * (depths[i] - depths[i - 1])
        if high < threshold:
            break
    return math.nan


def depth_ratios(accuracy: Tensor, depths: Sequence[int], xi: Tensor) -> Tensor:
    """Largest trainable depth over ξ_c, shape (seeds, weight variances); nan where it was not bracketed."""
    limits = [[largest_depth(column, depths) for column in seed] for seed in accuracy.tolist()]
    return torch.tensor(limits, dtype=torch.float64) / xi


def trainability_rows(accuracy: Tensor, budget: Budget, ratios: Tensor, critical: float) -> list[Row]:
    """Claims on the accuracy map."""
    columns = torch.tensor(budget.weight_vars, dtype=torch.float64)
    near = (columns - critical).abs().argmin()
    rows, means = [], []
    for side, mask, paper in (
        ("ordered", columns < critical - 0.01, "7.4–7.7"),
        ("chaotic", columns > critical + 0.01, "4.6–5.7"),
    ):
        claim = f"largest trainable depth / ξ_c, {side} side"
        whole = mask & ~ratios.isnan().any(0)  # a column with a limit beyond the grid would bias the mean
        known = ratios[:, whole].flatten()
        if known.numel() < 2:
            rows.append(Row(claim, "4–8", None, note="no column had its limit within the depths tried"))
            continue
        mean, error = float(known.mean()), float(known.std() / known.numel() ** 0.5)
        means.append((mean, error))
        used = ", ".join(f"{w:g}" for w in columns[whole].tolist())
        note = (
            f"the paper's data give {paper}; here σ_w² = {used}, {known.numel()} runs between "
            f"{float(known.min()):.1f} and {float(known.max()):.1f}"
        )
        rows.append(Row(claim, "4–8", mean, error, 4.0 <= mean <= 8.0, note))
    rows.append(_asymmetry(means))
    deepest = accuracy[:, :, -1]
    at_line = deepest[:, near]
    rows.append(
        Row(
            f"on the critical line depth {budget.depths[-1]} trains (accuracy above {TRAINABLE})",
            f"> {TRAINABLE}",
            float(at_line.mean()),
            float(at_line.std() / len(at_line) ** 0.5),
            bool(at_line.mean() > TRAINABLE),
        )
    )
    best = float(columns[deepest.mean(0).argmax()])
    gap = float((columns - columns[near]).abs().sort().values[1])
    rows.append(
        Row(
            f"the best σ_w² at depth {budget.depths[-1]} is the critical one",
            f"{critical:.3f}",
            f"{best:g}",
            None,
            abs(best - critical) <= gap,
            "to the nearest column of the grid",
        )
    )
    return rows


def _asymmetry(means: Sequence[tuple[float, float]]) -> Row:
    """Whether the ratio is larger on the ordered side, as it is in the paper's data."""
    claim = "the ratio is larger on the ordered side, by"
    if len(means) < 2:
        return Row(claim, "about 2.5", None, note="one side has no ratio")
    (ordered, e1), (chaotic, e2) = means
    gap, error = ordered - chaotic, math.hypot(e1, e2)
    holds = None if abs(gap) <= 2 * error else gap > 0
    return Row(
        claim, "about 2.5", gap, error, holds, "in the paper's data; open within two standard errors of 0"
    )


def _trainability_figure(accuracy: Tensor, budget: Budget, critical: float) -> Figure:
    return Figure(
        "Which depths train",
        partial(_draw_map, accuracy=accuracy, budget=budget, critical=critical),
        caption=(
            f"Training accuracy after {budget.steps} steps of SGD, mean over {budget.seeds} seeds. The networks that "
            "train lie below a small multiple of ξ_c, and the region opens to any depth at the critical σ_w²."
        ),
        alt="Heat map of training accuracy over weight variance and depth, with the curves ξ_c, 2 ξ_c and 4.5 ξ_c.",
        size=(9.2, 4.6),
        key="trainability",
    )


def _draw_map(canvas: Any, accuracy: Tensor, budget: Budget, critical: float) -> None:
    from matplotlib.patheffects import withStroke

    axes = canvas.subplots()
    axes.grid(False)
    x, y = _edges(budget.weight_vars), _edges(budget.depths)
    mesh = axes.pcolormesh(x, y, accuracy.T.numpy(), cmap="cividis", vmin=0.1, vmax=1.0, rasterized=True)
    fine = torch.linspace(x[0], x[-1], 400, dtype=torch.float64)
    xi = fixed_point("tanh", fine, BIAS_VAR).xi_c
    halo = [withStroke(linewidth=3.5, foreground="#1b1f24")]
    for factor, dash, name in ((1.0, "-", "$\\xi_c$"), (2.0, "--", "2 $\\xi_c$"), (4.5, ":", "4.5 $\\xi_c$")):
        curve = (factor * xi).clamp_max(3 * y[-1])  # infinite on the critical line
        axes.plot(fine, curve, dash, color="#ffffff", linewidth=1.9, path_effects=halo)
        axes.annotate(
            name,
            (x[-1], float(factor * xi[-1])),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=role("ink"),
            annotation_clip=False,
        ).set_in_layout(False)
    limits = [largest_depth(column, budget.depths) for column in accuracy.tolist()]
    axes.plot(
        budget.weight_vars,
        limits,
        "o",
        color=role("first"),
        markeredgecolor="#ffffff",
        markersize=9,
        label=f"measured: accuracy falls to {TRAINABLE}",
    )
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.0, handletextpad=0.2)
    axes.axvline(critical, color="#ffffff", linewidth=0.9)
    axes.annotate(
        f"critical {critical:.3f}",
        (critical, y[-1]),
        xytext=(0, 4),
        textcoords="offset points",
        ha="center",
        color=role("ink"),
        annotation_clip=False,
    )
    axes.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]), xlabel="weight variance $\\sigma_w^2$", ylabel="depth")
    bar = canvas.colorbar(mesh, ax=axes, pad=0.08, label="training accuracy (chance 0.1)")
    bar.outline.set_visible(False)


def _edges(centres: Sequence[float]) -> list[float]:
    """Edges of the cells around increasing centres."""
    middle = [(a + b) / 2 for a, b in zip(centres[:-1], centres[1:], strict=True)]
    return [centres[0] - (middle[0] - centres[0]), *middle, centres[-1] + (centres[-1] - middle[-1])]
