r"""The neural tangent kernel: deterministic in the limit of infinite width, and constant during training.

    Θ(x, x') = Σ_θ ∂f(x)/∂θ ∂f(x')/∂θ  →  Θ^L,   Θ^{l+1} = K^{l+1} + σ_w² E φ'(u)φ'(v) ∘ Θ^l

for networks f = σ_w/√n W^L φ(… σ_w/√n_0 W¹ x) with W ~ N(0, 1). What is looked at: the recursion's values; Θ of finite
networks at their beginning, whose mean is the limit and whose spread falls as n^{-1/2}; how far gradient descent moves
Θ; and what the trained networks predict, beside kernel regression with the limit.

Reference: Jacot, Gabriel & Hongler (2018), arXiv:1806.07572, theorems 1 and 2.

Departures. No biases. Handwritten digits (zero against one) for training; the paper has points on a circle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bolza.meanfield.kernels import infinite_kernels
from bolza.meanfield.kernels.infinite import JACOT
from bolza.report import Figure, role
from bolza.studies._study import Progress, Row, Scale, StudyResult

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "jacot2018_ntk"
TITLE = "The neural tangent kernel"
CLAIM = "The tangent kernel of a wide network is that of infinite width, and stays so while the network is trained"
REFERENCE = JACOT

WEIGHT_VAR = 2.0
ANGLE_VALUES = {1: 1.00448601, 2: 1.42601153, 3: 1.81963263}  # unit vectors one radian apart
REVIEW_VALUES = {0.0: (0.318310, 0.685709, 1.060388, 1.430390), 0.5: (0.942331, 1.351480, 1.737845, 2.107113)}


@dataclass(frozen=True)
class Budget:
    """Size of the experiments."""

    widths: tuple[int, ...]
    draws: int
    trained_widths: tuple[int, ...]
    seeds: int
    train: int
    steps: int


BUDGETS = {
    "small": Budget((64, 256, 1024), 40, (64, 256, 1024), 3, 20, 150),
    "full": Budget((64, 256, 1024, 4096), 200, (64, 256, 1024, 4096), 6, 40, 600),
}


def network(depth: int, inputs: int) -> nn.Module:
    """The architecture, for the kernels of infinite width."""
    layers: list[nn.Module] = [nn.Linear(inputs, 4, bias=False)]
    for i in range(depth):
        layers += [nn.ReLU(), nn.Linear(4, 4 if i < depth - 1 else 1, bias=False)]
    return nn.Sequential(*layers)


def draw(width: int, depth: int, inputs: int, generator: torch.Generator) -> list[Tensor]:
    """Weights W ~ N(0, 1) of a network with ``depth`` hidden layers and one output."""
    sizes = [inputs, *[width] * depth, 1]
    return [
        torch.randn(n, m, generator=generator, dtype=torch.float64)
        for n, m in zip(sizes, sizes[1:], strict=False)
    ]


def forward(weights: list[Tensor], x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Outputs ``(n,)``, the inputs of each layer and the gates φ' between the layers."""
    h, inputs, gates = x, [], []
    for i, w in enumerate(weights):
        if i:
            gates.append((h > 0).to(h.dtype))
            h = h.relu()
        inputs.append(h)
        h = h @ w * math.sqrt(WEIGHT_VAR / len(w))
    return h[:, 0], inputs, gates


def backward(weights: list[Tensor], gates: list[Tensor], g: Tensor) -> list[Tensor]:
    """Gradients ``(n, units)`` at the output of each layer, for gradients ``(n,)`` at the network's output."""
    grads = [g[:, None]]
    for w, gate in zip(reversed(weights[1:]), reversed(gates), strict=True):
        grads.insert(0, grads[0] @ w.T * math.sqrt(WEIGHT_VAR / len(w)) * gate)
    return grads


def tangent_kernel(weights: list[Tensor], x: Tensor) -> Tensor:
    """Θ of this network: Σ over layers of σ_w²/n (A Aᵀ) ∘ (B Bᵀ)."""
    out, inputs, gates = forward(weights, x)
    grads = backward(weights, gates, torch.ones_like(out))
    return sum((WEIGHT_VAR / len(w) * (a @ a.T) * (b @ b.T) for w, a, b in zip(weights, inputs, grads, strict=True)),
               torch.zeros(1, dtype=x.dtype))  # fmt: skip


def train(weights: list[Tensor], x: Tensor, y: Tensor, lr: float, steps: int) -> list[Tensor]:
    """Gradient descent on ½Σ(f - y)²."""
    weights = [w.clone() for w in weights]
    for _ in range(steps):
        out, inputs, gates = forward(weights, x)
        grads = backward(weights, gates, out - y)
        for w, a, b in zip(weights, inputs, grads, strict=True):
            w.addmm_(a.T, b, alpha=-lr * math.sqrt(WEIGHT_VAR / len(w)))
    return weights


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Compare the limit with finite networks, before and after training.

    Args:
        scale: ``"small"`` takes some ten seconds on one core, ``"full"`` some minutes.
        progress: called with the share done and a few words.

    Returns:
        The rows, two figures, and the numbers behind them.

    Example:
        >>> from bolza.studies import get
        >>> get("1806.07572").key
        'jacot2018_ntk'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    report(0.0, "kernel values")
    rows = value_rows()
    pair = torch.tensor([[1.0, 0.0], [math.cos(1.0), math.sin(1.0)]], dtype=torch.float64)
    kernels: dict[int, Tensor] = {}
    for i, width in enumerate(budget.widths):
        report(0.05 + 0.4 * i / len(budget.widths), f"kernels at width {width}")
        g = torch.Generator().manual_seed(width)
        kernels[width] = torch.stack(
            [tangent_kernel(draw(width, 2, 2, g), pair)[0, 1] for _ in range(budget.draws)]
        )
    rows += initial_rows(kernels)
    report(0.45, "training")
    trained = train_networks(budget, report)
    rows += training_rows(trained)
    figures = (
        Figure(
            "Kernels of finite networks at their beginning",
            partial(_draw_beginning, kernels=kernels),
            caption=(
                f"Θ of two unit vectors one radian apart, two hidden ReLU layers, {budget.draws} draws for each width. "
                "The line is the limit."
            ),
            alt="Points of finite networks that gather around the limit as the width grows.",
            size=(6.8, 4.0),
            key="beginning",
        ),
        Figure(
            "What training changes",
            partial(_draw_training, trained=trained),
            caption=(
                f"Two hidden layers, {budget.train} digits, {budget.steps} steps at lr = 1/λ_max(Θ): relative change "
                "of the tangent kernel, and distance of the predictions from kernel regression with the limit. Dashed: "
                "width^(-1/2)."
            ),
            alt="Two falling curves over width on logarithmic axes.",
            size=(6.8, 4.0),
            key="training",
        ),
    )
    notes = (
        "Zero against one of the 8 × 8 handwritten digits, scaled to unit length; the paper trains on points of a "
        "circle.",
        "Predictions are compared after taking out what the network said before training, which kernel regression "
        "with the finite network's own beginning does too.",
    )
    facts = {
        "initial": {w: k.tolist() for w, k in kernels.items()},
        "trained": {w: {k: v.tolist() for k, v in r.items()} for w, r in trained.items()},
    }
    return StudyResult(KEY, TITLE, REFERENCE, CLAIM, scale, rows, figures, notes, facts)


def value_rows() -> list[Row]:
    """The recursion at given angles."""
    rows = []
    for depth, want in ANGLE_VALUES.items():
        x = torch.tensor([[1.0, 0.0], [math.cos(1.0), math.sin(1.0)]], dtype=torch.float64)
        got = float(infinite_kernels(network(depth, 2), x, weight_var=WEIGHT_VAR).ntk[0, 1])  # type: ignore[index]
        rows.append(
            Row(
                f"Θ at 1 rad, {depth} hidden layer{'s' if depth > 1 else ''}",
                want,
                got,
                None,
                abs(got - want) < 5e-9,
            )
        )
    for c, values in REVIEW_VALUES.items():
        x = torch.tensor([[1.0, 0.0], [c, math.sqrt(1 - c * c)]], dtype=torch.float64)
        gaps = []
        for depth, want in enumerate(values, 1):
            theta = infinite_kernels(network(depth, 2), x, weight_var=WEIGHT_VAR).ntk
            assert theta is not None
            gaps += [abs(float(theta[0, 1]) - want), abs(float(theta[0, 0]) - depth - 1)]
        rows.append(
            Row(f"Θ at c = {c:g}, one to four hidden layers: largest difference from the table", 0.0, max(gaps), None,
                max(gaps) < 6e-7, "the table has six decimals; the diagonal is L + 1")
        )  # fmt: skip
    return rows


def initial_rows(kernels: dict[int, Tensor]) -> list[Row]:
    """Mean and spread of Θ over draws."""
    rows, limit = [], ANGLE_VALUES[2]
    for width, k in kernels.items():
        error = float(k.std() / math.sqrt(len(k)))
        gap = abs(float(k.mean()) - limit)
        rows.append(
            Row(f"mean of Θ over random networks of width {width}", limit, float(k.mean()), error,
                gap < 3 * error + 0.5 / width, f"spread {float(k.std()):.3f}")
        )  # fmt: skip
    widths = torch.tensor(list(kernels), dtype=torch.float64).log()
    spreads = torch.stack([k.std() for k in kernels.values()]).log()
    slope, error = _slope(widths, spreads, 1 / math.sqrt(2 * len(next(iter(kernels.values())))))
    rows.append(
        Row(
            "the spread of Θ falls as a power of the width: exponent",
            -0.5,
            slope,
            error,
            abs(slope + 0.5) < 3 * error,
        )
    )
    return rows


def _slope(x: Tensor, y: Tensor, error: float) -> tuple[float, float]:
    """Least-squares slope, with its standard error for errors of ``y`` of the given size."""
    centred = x - x.mean()
    size = float(centred.square().sum())
    return float((centred * y).sum()) / size, error / math.sqrt(size)


def train_networks(budget: Budget, report: Progress) -> dict[int, dict[str, Tensor]]:
    """Relative change of Θ, and distance from kernel regression, for each width over seeds."""
    from sklearn.datasets import load_digits

    data = load_digits()
    chosen = data.target < 2
    x = torch.from_numpy(data.data[chosen])
    x = x / x.norm(dim=1, keepdim=True)
    y = 2.0 * torch.from_numpy(data.target[chosen]).double() - 1
    n = budget.train
    train_x, train_y, test_x = x[:n], y[:n], x[n : n + 100]
    theta = infinite_kernels(network(2, 64), x[: n + 100], weight_var=WEIGHT_VAR).ntk
    assert theta is not None
    inner, cross = theta[:n, :n], theta[n:, :n]
    values, vectors = torch.linalg.eigh(inner)
    lr = 1 / float(values[-1])
    done = (1 - (1 - lr * values) ** budget.steps) / values  # discrete steps, not only their limit
    predict = cross @ (vectors * done) @ vectors.T
    out: dict[int, dict[str, Tensor]] = {}
    for i, width in enumerate(budget.trained_widths):
        report(0.45 + 0.5 * i / len(budget.trained_widths), f"training at width {width}")
        change, distance = [], []
        for seed in range(budget.seeds):
            weights = draw(width, 2, 64, torch.Generator().manual_seed(seed))
            before = tangent_kernel(weights, train_x)
            trained = train(weights, train_x, train_y, lr, budget.steps)
            after = tangent_kernel(trained, train_x)
            change.append((after - before).norm() / before.norm())
            began, start = forward(weights, train_x)[0], forward(weights, test_x)[0]
            expected = start + predict @ (train_y - began)
            distance.append((forward(trained, test_x)[0] - expected).square().mean().sqrt())
        out[width] = {"change": torch.stack(change), "distance": torch.stack(distance)}
    return out


def training_rows(trained: dict[int, dict[str, Tensor]]) -> list[Row]:
    """Θ stays, and predictions are those of kernel regression, the more the wider."""
    widths = torch.tensor(list(trained), dtype=torch.float64).log()
    rows = []
    for key, claim in (
        ("change", "relative change of Θ by training falls with the width: exponent"),
        ("distance", "distance of predictions from kernel regression falls with the width: exponent"),
    ):
        logs = torch.stack([r[key].log().mean() for r in trained.values()])
        scatter = torch.stack([r[key].log().std() for r in trained.values()]).mean() / math.sqrt(
            len(next(iter(trained.values()))[key])
        )
        slope, error = _slope(widths, logs, float(scatter))
        widest = float(next(reversed(trained.values()))[key].mean())
        rows.append(
            Row(
                claim,
                "≤ −0.5",
                slope,
                error,
                slope < -0.5 + 3 * max(error, 0.03),
                f"{widest:.2g} at the widest",
            )
        )
    return rows


def _draw_beginning(canvas: Any, kernels: dict[int, Tensor]) -> None:
    axes = canvas.subplots()
    g = torch.Generator().manual_seed(0)
    for width, k in kernels.items():
        shake = torch.exp(0.12 * (torch.rand(len(k), generator=g, dtype=torch.float64) - 0.5))
        axes.plot(width * shake, k, "o", markersize=4, alpha=0.45, color=role("first"), markeredgewidth=0)
        axes.errorbar(
            [width * 1.25], [float(k.mean())], [float(k.std())], fmt="o", color=role("ink"), capsize=4
        )
    axes.axhline(ANGLE_VALUES[2], color=role("ink"), linewidth=1.0, linestyle="--")
    axes.annotate(
        f"limit {ANGLE_VALUES[2]:.4f}", (0.22, ANGLE_VALUES[2]), xycoords=("axes fraction", "data"), xytext=(0, 4),
        textcoords="offset points", color=role("ink"),
    )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set(xlabel="width", ylabel="tangent kernel Θ(x, x')")


def _draw_training(canvas: Any, trained: dict[int, dict[str, Tensor]]) -> None:
    axes = canvas.subplots()
    widths = list(trained)
    for key, colour, name in (
        ("change", role("first"), "relative change of Θ"),
        ("distance", role("second"), "distance from kernel regression"),
    ):
        means = [float(r[key].mean()) for r in trained.values()]
        spread = [float(r[key].std()) for r in trained.values()]
        axes.errorbar(widths, means, spread, fmt="o-", color=colour, capsize=3, label=name)
        axes.plot(
            widths, [means[0] * math.sqrt(widths[0] / w) for w in widths], "--", color=colour, linewidth=0.9
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="width", ylabel="root mean square")
    axes.legend()
