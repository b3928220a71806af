r"""Gates make criticality a region: minimalRNN against the plain recurrent network.

A wide recurrent network with random weights forgets: the variance of a small difference between two states that
read the same input changes by χ per step, and so does that of a gradient on its way back. The plain network
h' = tanh(W h + V x) has χ near 1 on a line of σ_w² only. minimalRNN,

    h' = u h + (1 - u) z,   u = sigm(W h + V z + b),        χ = E u² + σ_w² E u'² (Q + R),

has it in a whole region, which a bias b of the gate towards memory opens. The study recomputes χ at four points
and measures it in wide networks with the same weights at every step, compares the two regions, and trains
minimalRNN to remember an image over a gap of noise, for three biases.

Reference: Chen, Pennington & Schoenholz (2018), arXiv:1806.05394.

Departures. The networks that are trained are small and see 8 × 8 digits row by row, followed by noise; the
paper trains on sequences of MNIST and CIFAR-10 and on language.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bolza.data import digits
from bolza.meanfield import critical_weight_var, recurrent_fixed_point
from bolza.meanfield.recurrent import CHEN
from bolza.models import MinimalRNN
from bolza.report import Figure, role
from bolza.studies._study import Progress, Row, Scale, StudyResult

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "chen2018_recurrent"
TITLE = "Gates make criticality of recurrent networks a region"
CLAIM = (
    "A gated recurrent network passes signals and gradients over many steps for a whole region of its "
    "initial weights and biases, a plain one only on a line"
)
REFERENCE = CHEN

# (σ_w², σ_v², gate bias, R) → χ of the theory.
POINTS = {(1.0, 1.0, 0.0, 1.0): 0.3645, (4.0, 1.0, 2.0, 1.0): 0.798, (6.0, 0.1, 4.0, 1.0): 0.964,
          (20.0, 1.0, 0.0, 1.0): 0.966}  # fmt: skip
LONG = (20.0, 80.0)  # steps; memory scales that count as long
ROWS = 8  # of an image, one a step


@dataclass(frozen=True)
class Budget:
    """Size of the simulations and of the training.

    Args:
        width: units of the simulated networks.
        networks: how many of them.
        biases: gate biases of the trained networks.
        gaps: steps of noise after the image.
        units: width of the trained networks.
        steps: training steps.
        grid: points along each axis of the phase diagrams.
    """

    width: int
    networks: int
    biases: tuple[float, ...]
    gaps: tuple[int, ...]
    units: int
    steps: int
    grid: int


BUDGETS = {
    "small": Budget(250, 2, (0.0, 2.0, 4.0), (0, 32), 64, 80, 60),
    "full": Budget(1500, 6, (0.0, 1.0, 2.0, 4.0, 6.0), (0, 4, 8, 16, 32, 64, 128), 128, 300, 200),
}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Compare rates, regions and training.

    Args:
        scale: ``"small"``: networks of 250 units, six trainings; ``"full"``: 1500 units, 35 trainings.
        progress: called with the share done and a few words.

    Returns:
        The rows, a figure of the two phase diagrams and one of what was learnt.

    Example:
        >>> from bolza.studies import get
        >>> get("chen2018_recurrent").title
        'Gates make criticality of recurrent networks a region'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    rows = []
    for i, (point, expected) in enumerate(POINTS.items()):
        report(0.3 * i / len(POINTS), "wide networks")
        rows.append(_rate_row(point, expected, budget))
    report(0.3, "phase diagrams")
    weights = torch.linspace(0.05, 6.0, budget.grid, dtype=torch.float64)
    biases = torch.linspace(-2.0, 8.0, budget.grid, dtype=torch.float64)
    inputs = torch.logspace(-3, 0.5, budget.grid, dtype=torch.float64)
    gated = recurrent_fixed_point("minimal", weights[:, None], 0.1, gate_bias=biases)
    plain = recurrent_fixed_point("rnn", weights[:, None], inputs)
    shares = [[float((p.xi > steps).double().mean()) for steps in LONG] for p in (gated, plain)]
    rows += _region_rows(*shares)
    scores = train(budget, lambda share: report(0.35 + 0.65 * share, "training"))
    scales = recurrent_fixed_point("minimal", 1.0, 1.0, gate_bias=torch.tensor(budget.biases)).xi
    rows += _training_rows(scores, scales, budget)
    report(1.0, "done")
    figures = (
        Figure(
            "Where a recurrent network remembers",
            partial(
                _draw_phases, weights=weights, biases=biases, inputs=inputs, gated=gated.xi, plain=plain.xi
            ),
            caption=(
                "Memory scale 1/|log χ| in steps. Left: minimalRNN keeps signals for many steps wherever its gate is "
                "biased towards memory. Right: the plain network does so along one line."
            ),
            alt="Two heat maps of the memory scale: wide bright region for minimalRNN, thin line for the plain cell.",
            size=(9.2, 3.9),
            key="phases",
        ),
        Figure(
            "Which gaps are learnt",
            partial(_draw_training, scores=scores, scales=scales, budget=budget),
            caption=(
                f"Accuracy on digits that are shown row by row and followed by noise, mean of the last ten of "
                f"{budget.steps} training steps. The dashed line is chance."
            ),
            alt="Accuracy over the length of the gap, one curve a gate bias; larger biases bridge longer gaps.",
            size=(7.6, 3.9),
            key="gaps",
        ),
    )
    notes = (
        f"χ is measured as the mean growth of the variance of a small difference in {budget.networks} networks of "
        f"width {budget.width}, over 40 steps after 20, with the same weights at each step; the theory takes gates at "
        "different times as independent.",
        f"Networks of {budget.units} units are trained with Adam (lr = 0.005) on batches of 64; σ_w² = σ_v² = 1.",
    )
    facts = {
        "biases": budget.biases,
        "gaps": budget.gaps,
        "xi": scales.tolist(),
        "accuracy": scores.tolist(),
        "share_of_long_memory": {"steps": LONG, "minimal": shares[0], "plain": shares[1]},
        "budget": vars(budget),
    }
    return StudyResult(KEY, TITLE, REFERENCE, CLAIM, scale, rows, figures, notes, facts)


# ------------------------------------------------------------------------------------- rates


def _rate_row(point: tuple[float, float, float, float], expected: float, budget: Budget) -> Row:
    weight, into, keep, power = point
    theory = float(recurrent_fixed_point("minimal", weight, into, 0.0, keep, power).chi)
    rates = torch.tensor([simulate(point, budget.width, seed) for seed in range(budget.networks)])
    mean, error = float(rates.mean()), float(rates.std() / math.sqrt(len(rates)))
    return Row(
        f"χ of minimalRNN at σ_w² = {weight:g}, σ_v² = {into:g}, b = {keep:g}, R = {power:g}",
        expected,
        mean,
        error,
        abs(theory - expected) < 1e-3 and abs(mean / theory - 1) < 0.05,
        f"theory {theory:.4f}; simulated within 5 %",
    )


def simulate(point: tuple[float, float, float, float], width: int, seed: int, steps: int = 60) -> float:
    """χ of one minimalRNN of finite width, by the growth of a small difference.

    Args:
        point: σ_w², σ_v², gate bias and R.
        width: number of units.
        seed: of its weights and inputs.
        steps: how long; the first third is left out.
    """
    weight, into, keep, power = point
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int, variance: float) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64) * math.sqrt(variance)

    w, v = (draw(width, width, variance=s / width) for s in (weight, into))
    h, d, logs = torch.zeros(2, width, dtype=torch.float64), draw(2, width, variance=1.0), []
    for t in range(steps):
        z = draw(2, width, variance=power)
        u = torch.sigmoid(h @ w.T + z @ v.T + keep)
        d = u * d + u * (1 - u) * (h - z) * (d @ w.T)
        h = u * h + (1 - u) * z
        size = d.square().sum(1)
        d = d / size.sqrt()[:, None]
        if t >= steps // 3:
            logs.append(size.log())
    return math.exp(float(torch.stack(logs).mean()))


def _region_rows(gated: list[float], plain: list[float]) -> list[Row]:
    """Around a line, the area with a memory longer than n steps goes as 1/n."""
    few, many = LONG
    line = float(critical_weight_var("tanh", 0.0))
    return [
        Row(
            f"plain cell: the area with memory above {many:g} steps over that above {few:g}, as around a line",
            few / many,
            plain[1] / plain[0],
            None,
            plain[1] / plain[0] < 1.4 * few / many,
            f"{plain[0]:.3f} and {plain[1]:.3f} of the (σ_w², σ_v²) plane; within 40 %, for it is a strip of a grid",
        ),
        Row(
            "minimalRNN: the same share stays above one half, as in a region",
            0.5,
            gated[1] / gated[0],
            None,
            gated[1] / gated[0] > 0.5,
            f"{gated[0]:.3f} and {gated[1]:.3f} of the (σ_w², b) plane",
        ),
        Row("the plain network without input is critical at σ_w²", 1.0, line, None, abs(line - 1) < 1e-6),
    ]


# ---------------------------------------------------------------------------------- training


def train(budget: Budget, tell: Any = None) -> Tensor:
    """Accuracy at the end of the budget, ``(biases, gaps)``."""
    data = digits()
    x = data.train_x.flatten(1)
    x = ((x - x.mean()) / x.std()).reshape(len(x), ROWS, -1)
    total = len(budget.biases) * len(budget.gaps)
    scores = []
    for bias in budget.biases:
        for gap in budget.gaps:
            scores.append(_train_one(x, data.train_y, bias, gap, budget))
            if tell is not None:
                tell(len(scores) / total)
    return torch.tensor(scores, dtype=torch.float64).reshape(len(budget.biases), len(budget.gaps))


def _train_one(x: Tensor, y: Tensor, bias: float, gap: int, budget: Budget) -> float:
    g = torch.Generator().manual_seed(0)
    net, head = (
        MinimalRNN(x.shape[-1], budget.units, batch_first=True, gate_bias=bias),
        nn.Linear(budget.units, 10),
    )
    for p in [*net.parameters(), *head.parameters()]:
        if p.ndim == 2:
            nn.init.normal_(p, std=p.shape[1] ** -0.5, generator=g)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.Adam([*net.parameters(), *head.parameters()], lr=5e-3)
    right = []
    for _ in range(budget.steps):
        at = torch.randint(len(x), (64,), generator=g)
        noise = torch.randn(64, gap, x.shape[-1], generator=g)
        scores = head(net(torch.cat([x[at], noise], 1))[1])
        optimizer.zero_grad()
        nn.functional.cross_entropy(scores, y[at]).backward()
        optimizer.step()
        right.append((scores.argmax(1) == y[at]).double().mean())
    return float(torch.stack(right[-10:]).mean())


def _training_rows(scores: Tensor, scales: Tensor, budget: Budget) -> list[Row]:
    gap = 32
    column = scores[:, budget.gaps.index(gap)]
    low, high = float(column[0]), float(column[-1])
    error = math.sqrt(0.25 / 640)  # of a share of 640 answers, at most
    return [
        Row(
            f"a gap of {gap} steps is learnt where the memory scale is {float(scales[-1]):.3g} steps: accuracy above",
            0.5,
            high,
            error,
            high - 2 * error > 0.5,
            f"gate bias {budget.biases[-1]:g}",
        ),
        Row(
            f"and is not where it is {float(scales[0]):.3g} steps: accuracy below",
            0.3,
            low,
            error,
            low + 2 * error < 0.3,
            f"gate bias {budget.biases[0]:g}; chance is 0.1",
        ),
        Row(
            "accuracy without a gap does not depend on the bias: largest difference below",
            0.2,
            float(scores[:, 0].max() - scores[:, 0].min()),
            error,
            float(scores[:, 0].max() - scores[:, 0].min()) < 0.2,
        ),
    ]


# ----------------------------------------------------------------------------------- figures


def _draw_phases(
    canvas: Any, weights: Tensor, biases: Tensor, inputs: Tensor, gated: Tensor, plain: Tensor
) -> None:
    from matplotlib.colors import LogNorm

    left, right = canvas.subplots(1, 2, sharey=True)
    norm = LogNorm(0.3, 100)
    for axes, x, xi, name in ((left, biases, gated, "minimalRNN"), (right, inputs, plain, "plain, tanh")):
        axes.grid(False)
        mesh = axes.pcolormesh(
            x.numpy(), weights.numpy(), xi.clamp(0.3, 100).numpy(), cmap="cividis", norm=norm, rasterized=True
        )
        axes.contour(
            x.numpy(),
            weights.numpy(),
            xi.clamp(0.3, 1e4).numpy(),
            [LONG[0]],
            colors=[role("first")],
            linewidths=1.6,
        )
        axes.set_title(name)
    left.set(xlabel="bias of the gate $b$", ylabel="weight variance $\\sigma_w^2$")
    right.set(xlabel="input variance $\\sigma_v^2 R$", xscale="log")
    bar = canvas.colorbar(
        mesh, ax=[left, right], label=f"memory scale, steps (line: {LONG[0]:g})", extend="both"
    )
    bar.outline.set_visible(False)


def _draw_training(canvas: Any, scores: Tensor, scales: Tensor, budget: Budget) -> None:
    axes = canvas.subplots()
    colours = ("first", "second", "third", "fourth", "accent")
    for i, (bias, xi, line) in enumerate(zip(budget.biases, scales.tolist(), scores.tolist(), strict=True)):
        axes.plot(
            [g + ROWS for g in budget.gaps], line, marker="osD^v"[i % 5], color=role(colours[i % 5]),
            label=f"$b$ = {bias:g} ({xi:.2g} steps)",
        )  # fmt: skip
    axes.axhline(0.1, color=role("muted"), linestyle="--", linewidth=1)
    axes.set(xlabel="length of the sequence, image and gap", ylabel="training accuracy", ylim=(0, 1.05))
    axes.legend(
        loc="upper left", bbox_to_anchor=(1.01, 1.0), title="gate bias (memory scale)", alignment="left"
    )
