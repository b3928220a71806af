r"""The exponent field of a trained classifier: it expands along the decision boundary and contracts away from it.

    λ(x) = (1/L) log σ_max(∂h_L/∂x)

The paper takes layers for time and looks at the finite-time maximum Lyapunov exponent of each input. Two things
are asked
here: does the field trace the boundary (two moons), and is it a warning of errors (digits), beside the plain
    baseline of
one minus the largest softmax probability.

Reference: Kondo, Sunada & Niiyama (2021), *Lyapunov exponent analysis for multilayer neural networks*.

Departures. Digits of 8 × 8 pixels and two moons stand for the paper's data. The head is not a layer. The baseline
is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bolza.data import digits
from bolza.report import Figure, role
from bolza.stability import ftmle
from bolza.stability.multilayer import KONDO
from bolza.studies._study import Progress, Row, Scale, StudyResult

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "kondo2021_multilayer"
TITLE = "Finite-time exponents of a classifier"
CLAIM = "A trained network expands near its decision boundary and contracts far from it"
REFERENCE = KONDO


@dataclass(frozen=True)
class Budget:
    """Size of the two experiments."""

    points: int
    moon_epochs: int
    grid: int
    digit_epochs: int
    seeds: int


BUDGETS = {
    "small": Budget(points=500, moon_epochs=150, grid=60, digit_epochs=30, seeds=1),
    "full": Budget(points=1000, moon_epochs=300, grid=120, digit_epochs=40, seeds=5),
}
BOX = ((-1.6, 2.6), (-1.1, 1.6))


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Train the two kinds of network, and measure their fields.

    Args:
        scale: ``"small"``: one seed, some ten seconds on one core; ``"full"``: five seeds.
        progress: called with the share done and a few words.

    Returns:
        The rows, the field as a figure, and the numbers behind them.

    Example:
        >>> from bolza.studies import get
        >>> get("kondo2021_multilayer").reference.year
        2021
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    fields, warnings = [], []
    for seed in range(budget.seeds):
        report(seed / budget.seeds, "two moons")
        fields.append(moons_field(budget, seed))
        report((seed + 0.5) / budget.seeds, "digits")
        warnings.append(digits_warning(budget, seed))
    rows = [*field_rows(fields), *warning_rows(warnings)]
    rows.append(orthogonal_row())
    notes = (
        f"Two moons: {budget.points} points with noise 0.15, eight hidden tanh layers of 20, {budget.moon_epochs} "
        "epochs of Adam. Near is the twentieth of the grid with the smallest logit margin, far the half with the "
        "largest.",
        f"Digits: four hidden tanh layers of 64, {budget.digit_epochs} epochs of Adam. AUROC is the chance that a "
        "misclassified test sample is ranked above a right one.",
        "As a detector of errors the exponent is below the softmax baseline: it tells where the boundary is, not how "
        "far the classes overlap there.",
    )
    facts = {
        "spearman": [float(field.spearman) for field in fields],
        "near": [float(field.near) for field in fields],
        "far": [float(field.far) for field in fields],
        "auroc": [w.auroc for w in warnings],
        "auroc_probability": [w.baseline for w in warnings],
    }
    report(1.0, "done")
    return StudyResult(KEY, TITLE, REFERENCE, CLAIM, scale, rows, (_figure(fields[0]),), notes, facts)


# --------------------------------------------------------------------------------------- two moons


@dataclass(frozen=True)
class Field:
    """Exponent and margin on a grid."""

    x: Tensor
    y: Tensor
    exponent: Tensor  # (rows, columns)
    margin: Tensor  # logit of class 1 minus that of class 0
    points: Tensor
    labels: Tensor

    @property
    def spearman(self) -> float:
        """Rank correlation of the exponent with the distance of the logits."""
        return rank_correlation(self.exponent.flatten(), self.margin.abs().flatten())

    @property
    def near(self) -> float:
        """Mean exponent on the 5 % of the grid nearest to the boundary, by margin."""
        order = self.margin.abs().flatten().argsort()
        return float(self.exponent.flatten()[order[: len(order) // 20]].mean())

    @property
    def far(self) -> float:
        """Mean exponent on the half of the grid furthest from it."""
        order = self.margin.abs().flatten().argsort()
        return float(self.exponent.flatten()[order[len(order) // 2 :]].mean())


def tanh_net(sizes: list[int], seed: int) -> nn.Sequential:
    """Tanh layers of these widths, and a linear head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hidden = [
            m for a, b in zip(sizes[:-2], sizes[1:-1], strict=True) for m in (nn.Linear(a, b), nn.Tanh())
        ]
        return nn.Sequential(*hidden, nn.Linear(sizes[-2], sizes[-1]))


def fit(net: nn.Module, x: Tensor, y: Tensor, epochs: int, batch: int, lr: float, seed: int) -> None:
    """Train by Adam on the cross entropy."""
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for part in torch.randperm(len(x), generator=generator).split(batch):
            optimizer.zero_grad()
            cross_entropy(net(x[part]), y[part]).backward()
            optimizer.step()


def moons_field(budget: Budget, seed: int) -> Field:
    """Train on two moons, and measure the field on a grid."""
    from sklearn.datasets import make_moons

    points, labels = make_moons(budget.points, noise=0.15, random_state=seed)
    x, y = torch.tensor(points, dtype=torch.float32), torch.tensor(labels)
    net = tanh_net([2, *[20] * 8, 2], seed)
    fit(net, x, y, budget.moon_epochs, 50, 3e-3, seed)
    columns, rows = (torch.linspace(*side, budget.grid) for side in BOX)
    grid = torch.cartesian_prod(rows, columns).flip(1)  # (row, column) → (x, y)
    found = ftmle(net, grid)
    with torch.no_grad():
        scores = net(grid)
    shape = (budget.grid, budget.grid)
    margin = (scores[:, 1] - scores[:, 0]).double()
    return Field(columns, rows, found.exponents.reshape(shape), margin.reshape(shape), x, y)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's coefficient."""
    ranks = torch.stack([v.argsort().argsort().double() for v in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def field_rows(fields: list[Field]) -> list[Row]:
    """Whether the field follows the boundary."""
    spearman, e1 = _mean([f.spearman for f in fields])
    gap, e2 = _mean([f.near - f.far for f in fields])
    near, e3 = _mean([f.near for f in fields])
    far, e4 = _mean([f.far for f in fields])
    return [
        Row(
            "two moons: rank correlation of exponent and logit margin",
            -0.976,
            spearman,
            e1,
            spearman <= -0.8,
            "at most −0.8; expected is an earlier run of ours",
        ),
        Row(
            "two moons: exponent near the boundary minus far from it",
            0.462,
            gap,
            e2,
            gap >= 0.2,
            "at least 0.2",
        ),
        Row("two moons: the network expands near the boundary", "> 0", near, e3, near > 0),
        Row("two moons: it contracts far from it", "< 0", far, e4, far < 0),
    ]


# ------------------------------------------------------------------------------------------ digits


@dataclass(frozen=True)
class Warning:
    """How well two scores rank errors above right answers."""

    auroc: float
    baseline: float
    errors: int
    confidence: float


def auroc(score: Tensor, wrong: Tensor) -> float:
    """Chance that a wrong sample has the larger score, ties counted half."""
    a, b = score[wrong], score[~wrong]
    if not len(a) or not len(b):
        return float("nan")
    return float(((a[:, None] > b).double() + 0.5 * (a[:, None] == b).double()).mean())


def digits_warning(budget: Budget, seed: int) -> Warning:
    """Train on digits, and rank the test errors by exponent and by confidence."""
    data = digits()
    net = tanh_net([64, *[64] * 4, 10], seed)
    fit(net, data.train_x, data.train_y, budget.digit_epochs, 64, 1e-3, seed)
    with torch.no_grad():
        probability = net(data.test_x).softmax(1).max(1)
    wrong = probability.indices != data.test_y
    exponent = ftmle(net, data.test_x).exponents
    return Warning(
        auroc(exponent, wrong),
        auroc(1 - probability.values, wrong),
        int(wrong.sum()),
        rank_correlation(exponent, probability.values),
    )


def warning_rows(warnings: list[Warning]) -> list[Row]:
    """AUROC of the exponent and of the softmax probability."""
    value = _mean([w.auroc for w in warnings])[0]
    baseline = _mean([w.baseline for w in warnings])[0]
    confidence, spread = _mean([w.confidence for w in warnings])
    count = sum(w.errors for w in warnings)
    error, other = (
        (a * (1 - a) / max(count, 1)) ** 0.5 for a in (value, baseline)
    )  # binomial, over the errors
    return [
        Row(
            "digits: AUROC of the exponent for test errors",
            0.881,
            value,
            error,
            value >= 0.8,
            f"at least 0.8; {count} errors in all",
        ),
        Row(
            "digits: 1 − largest probability, the baseline, has no smaller AUROC",
            0.948,
            baseline,
            other,
            baseline >= value - other,
            "within one error; not a claim of the paper",
        ),
        Row(
            "digits: rank correlation of exponent and confidence",
            "< 0",
            confidence,
            spread,
            confidence < 0,
        ),
    ]


def orthogonal_row() -> Row:
    """The limit that is known."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(20, 20).double() for _ in range(9)]
        for layer in layers:
            nn.init.orthogonal_(layer.weight)
        net = nn.Sequential(*layers)
        worst = float(ftmle(net, torch.randn(50, 20, dtype=torch.float64)).exponents.abs().max())
    return Row("an orthogonal linear stack has exponent 0 at every input", 0.0, worst, 1e-12, worst < 1e-12)


def _mean(values: list[float]) -> tuple[float, float | None]:
    v = torch.tensor(values, dtype=torch.float64)
    return float(v.mean()), float(v.std()) / len(values) ** 0.5 if len(values) > 1 else None


# ------------------------------------------------------------------------------------------ figure


def _figure(field: Field) -> Figure:
    return Figure(
        "The exponent field traces the decision boundary",
        partial(_draw, field=field),
        caption=(
            "Left: the finite-time exponent over the plane of inputs, with the decision boundary and the training "
            "points. Right: the exponent at each grid point against the distance of the two logits."
        ),
        alt="Heat map of the exponent with the boundary along its ridge; scatter of exponent against logit margin.",
        size=(9.2, 3.8),
        key="field",
    )


def _draw(canvas: Any, field: Field) -> None:
    left, right = canvas.subplots(1, 2, width_ratios=(1.45, 1))
    left.grid(False)
    x, y = field.x.numpy(), field.y.numpy()
    mesh = left.pcolormesh(x, y, field.exponent.numpy(), cmap="cividis", rasterized=True, shading="nearest")
    left.contour(x, y, field.margin.numpy(), levels=[0.0], colors="#ffffff", linewidths=1.8)
    for label, marker, colour in ((0, "o", "first"), (1, "s", "cool")):
        mine = field.points[field.labels == label].numpy()
        left.plot(mine[:, 0], mine[:, 1], marker, color=role(colour), markersize=2, alpha=0.7)
    left.set(xlabel="$x_1$", ylabel="$x_2$", xlim=BOX[0], ylim=BOX[1])
    bar = canvas.colorbar(mesh, ax=left, pad=0.02, label="exponent per layer")
    bar.outline.set_visible(False)
    distance, exponent = field.margin.abs().flatten().numpy(), field.exponent.flatten().numpy()
    right.plot(distance, exponent, ".", color=role("second"), markersize=2)
    right.axhline(0.0, color=role("muted"), linewidth=0.8)
    right.set(
        xlabel="distance of the logits",
        ylabel="exponent per layer",
        title=f"Spearman {field.spearman:.2f}".replace("-", "−"),
    )
