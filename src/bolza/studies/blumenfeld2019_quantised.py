r"""Quantisation against depth: staircases of N levels have no critical point, and a depth that grows with N.

With an activation of N evenly spaced levels two inputs that differ at all fall on two sides of a step somewhere, so
the slope of the correlation map at c = 1 is infinite and every network is chaotic. Without biases correlations die
out at the rate χ = a_1²/E φ² per layer, at best 1 minus the distortion of a uniform quantiser of a Gaussian. The
depth scale 1/|log χ| at the best spacing is computed over N, its exponent is fitted, and compared with the slope of the
correlations in wide networks; small networks of several depths and numbers of levels are then trained.

Reference: Blumenfeld, Gilboa & Soudry (2019), arXiv:1906.00771.

Departures. Digits of 8 × 8 pixels instead of MNIST. The exponent is that of the computed depth scales over N from 16
to 1024: in truth the local exponent rises slowly towards 2, as N²/log N.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bolza.data import digits
from bolza.meanfield import Staircase, fixed_point, quantised_depth, staircase
from bolza.meanfield.quantised import BLUMENFELD
from bolza.report import Figure, role
from bolza.studies._study import Progress, Row, Scale, StudyResult

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "blumenfeld2019_quantised"
TITLE = "Depth of networks with quantised activations"
CLAIM = "A network whose activations have N levels has no critical point; it trains to a depth that grows like N^1.82"
REFERENCE = BLUMENFELD

EXPONENT = 1.82
LEVELS = tuple(2**k for k in range(1, 11))


@dataclass(frozen=True)
class Budget:
    """Size of the simulations and of the training.

    Args:
        width: units of the simulated networks.
        networks: how many of them.
        levels: numbers of levels that are trained.
        depths: hidden layers that are trained.
        units: width of the trained networks.
        steps: training steps.
    """

    width: int
    networks: int
    levels: tuple[int, ...]
    depths: tuple[int, ...]
    units: int
    steps: int


BUDGETS = {
    "small": Budget(800, 3, (2, 4, 16), (2, 24), 80, 60),
    "full": Budget(2000, 10, (2, 3, 4, 8, 16, 32), (2, 4, 8, 16, 32, 64, 100), 200, 600),
}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Compute depth scales, check them in wide networks, and train.

    Args:
        scale: ``"small"``: six trainings of at most 24 layers; ``"full"``: 42 of at most 100.
        progress: called with the share done and a few words.

    Returns:
        The rows, and figures of the depth scale and of the accuracy.

    Example:
        >>> from bolza.studies import get
        >>> get("blumenfeld2019_quantised").title
        'Depth of networks with quantised activations'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    report(0.0, "depth scales")
    xi = quantised_depth(torch.tensor(LEVELS)).xi
    rows = [*_scale_rows(xi), *_phase_rows()]
    report(0.1, "wide networks")
    rows.append(_simulated_row(budget))
    scores = train(budget, lambda share: report(0.2 + 0.8 * share, "training"))
    rows += _training_rows(scores, budget)
    report(1.0, "done")
    figures = (
        Figure(
            "Depth scale over the number of levels",
            partial(_draw_scales, xi=xi),
            caption="Layers in which correlations fall by e, at the best spacing, without biases. Line: slope 1.82.",
            alt="Depth scale over number of levels, both logarithmic, along a straight line of slope 1.82.",
            size=(5.6, 3.9),
            key="scale",
        ),
        Figure(
            "Which depths train",
            partial(_draw_training, scores=scores, budget=budget),
            caption=(
                f"Training accuracy after {budget.steps} steps, gradients straight through. Dotted: six depth scales."
            ),
            alt="Training accuracy over depth, one curve a number of levels; few levels fail at smaller depth.",
            size=(6.4, 3.9),
            key="training",
        ),
    )
    notes = (
        "Spacing and weights are the best of the theory; there are no biases.",
        f"Networks of width {budget.units} are trained on 8 × 8 digits with SGD, momentum 0.9, lr = 0.02, batches of "
        "64 and gradients clipped to norm 1.",
    )
    facts = {
        "levels": LEVELS,
        "xi": xi.tolist(),
        "trained_levels": budget.levels,
        "depths": budget.depths,
        "accuracy": scores.tolist(),
        "budget": vars(budget),
    }
    return StudyResult(KEY, TITLE, REFERENCE, CLAIM, scale, rows, figures, notes, facts)


# ------------------------------------------------------------------------------------ theory


def slope(levels: Tensor, xi: Tensor) -> tuple[float, float]:
    """Least-squares slope of log ξ over log N, and its standard error."""
    x, y = levels.double().log(), xi.log()
    x, y = x - x.mean(), y - y.mean()
    b = float((x * y).sum() / x.square().sum())
    error = (y - b * x).square().sum() / (len(x) - 2) / x.square().sum()
    return b, float(error.sqrt())


def _scale_rows(xi: Tensor) -> list[Row]:
    n = torch.tensor(LEVELS)
    many = n >= 16
    exponent, error = slope(n[many], xi[many])
    local = (xi[1:] / xi[:-1]).log() / math.log(2)
    sign = 1 / math.log(math.pi / 2)
    return [
        Row(
            "exponent of the depth scale over N from 16 to 1024",
            EXPONENT,
            exponent,
            error,
            abs(exponent - EXPONENT) < 0.05,
            f"within 0.05; between neighbours it rises from {float(local[3]):.3f} to {float(local[-1]):.3f}",
        ),
        Row(
            "depth scale of the sign function, 1/log(π/2)",
            sign,
            float(xi[0]),
            None,
            abs(float(xi[0]) - sign) < 1e-9,
        ),
    ]


def _phase_rows() -> list[Row]:
    depth = quantised_depth(8)
    act = staircase(8, float(depth.spacing))
    factors = torch.tensor([0.4, 1.0, 2.5], dtype=torch.float64) * float(depth.weight_var)
    point = fixed_point(act, factors[:, None], torch.tensor([0.0, 0.05, 0.3]))
    largest = float(point.chi_c.max())
    steepest = float(point.chi_1.min())
    best = float(depth.chi)
    return [
        Row(
            "8 levels: the slope of the correlation map at c = 1 is infinite for every (σ_w², σ_b²)",
            "inf",
            f"{steepest:g}",
            None,
            math.isinf(steepest),
            "9 points",
        ),
        Row(
            "8 levels: no (σ_w², σ_b²) carries correlations further than the best one without biases, χ at most",
            best,
            largest,
            None,
            largest <= best * (1 + 1e-6) < 1,
        ),
    ]


def _simulated_row(budget: Budget) -> Row:
    depth = quantised_depth(4)
    ratios = torch.cat([_ratios(budget.width, seed) for seed in range(budget.networks)])
    mean, error = float(ratios.mean()), float(ratios.std() / math.sqrt(len(ratios)))
    expected = float(depth.chi)
    return Row(
        f"4 levels: correlations fall by χ per layer in networks of width {budget.width}",
        expected,
        mean,
        error,
        abs(mean - expected) < 3 * error + 0.01,
        "between c = 0.3 and 0, within 3 standard errors and 0.01, for the curvature of the map",
    )


def _ratios(width: int, seed: int, pairs: int = 32) -> Tensor:
    """c_{l+1}/c_l over one layer for many pairs of inputs that start near c = 0.25."""
    depth, g = quantised_depth(4), torch.Generator().manual_seed(seed)
    common = torch.randn(1, width, generator=g, dtype=torch.float64)
    h = 0.5 * common + math.sqrt(0.75) * torch.randn(pairs, width, generator=g, dtype=torch.float64)
    layer, out = Staircase(4, float(depth.spacing)).double(), []
    for _ in range(4):
        w = torch.randn(width, width, generator=g, dtype=torch.float64) * math.sqrt(
            float(depth.weight_var) / width
        )
        new = layer(h) @ w.T
        off = ~torch.eye(pairs, dtype=torch.bool)
        before, after = (torch.corrcoef(x)[off].mean() for x in (h, new))
        out.append(after / before)
        h = new
    return torch.stack(out)


# ---------------------------------------------------------------------------------- training


def train(budget: Budget, tell: Any = None) -> Tensor:
    """Training accuracy at the end of the budget, ``(levels, depths)``."""
    data = digits()
    x = data.train_x.flatten(1)
    x = (x - x.mean()) / x.std()
    scores = []
    total = len(budget.levels) * len(budget.depths)
    for levels in budget.levels:
        for depth in budget.depths:
            scores.append(_train_one(x, data.train_y, levels, depth, budget))
            if tell is not None:
                tell(len(scores) / total)
    return torch.tensor(scores, dtype=torch.float64).reshape(len(budget.levels), len(budget.depths))


def _train_one(x: Tensor, y: Tensor, levels: int, depth: int, budget: Budget) -> float:
    g = torch.Generator().manual_seed(0)
    best = quantised_depth(levels)
    layers: list[nn.Module] = []
    sizes = [x.shape[1]] + [budget.units] * depth
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
        linear = nn.Linear(fan_in, fan_out, bias=False)
        variance = 1.0 if not layers else float(best.weight_var)
        nn.init.normal_(linear.weight, std=math.sqrt(variance / fan_in), generator=g)
        layers += [linear, Staircase(levels, float(best.spacing))]
    head = nn.Linear(budget.units, 10)
    nn.init.normal_(head.weight, std=budget.units**-0.5, generator=g)
    nn.init.zeros_(head.bias)
    net = nn.Sequential(*layers, head)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    right = []
    for _ in range(budget.steps):
        at = torch.randint(len(x), (64,), generator=g)
        scores = net(x[at])
        optimizer.zero_grad()
        nn.functional.cross_entropy(scores, y[at]).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        right.append((scores.argmax(1) == y[at]).double().mean())
    return float(torch.stack(right[-10:]).mean())


def _training_rows(scores: Tensor, budget: Budget) -> list[Row]:
    error = math.sqrt(0.25 / 640)
    few, many = float(scores[0, -1]), float(scores[-1, -1])
    return [
        Row(
            f"depth {budget.depths[-1]}: {budget.levels[-1]} levels train better than {budget.levels[0]}, accuracy by",
            "more than 0",
            many - few,
            error * math.sqrt(2),
            many - few > 3 * error,
            f"{many:.2f} against {few:.2f}, chance 0.1",
        ),
        Row(
            f"at depth {budget.depths[0]} both train: smaller accuracy above",
            0.5,
            float(scores[:, 0].min()),
            error,
            float(scores[:, 0].min()) > 0.5,
        ),
    ]


# ----------------------------------------------------------------------------------- figures


def _draw_scales(canvas: Any, xi: Tensor) -> None:
    axes = canvas.subplots()
    n = torch.tensor(LEVELS, dtype=torch.float64)
    line = float(xi[3]) * (n / n[3]) ** EXPONENT
    axes.loglog(n.numpy(), line.numpy(), color=role("muted"), linestyle="--", label="slope 1.82")
    axes.loglog(n.numpy(), xi.numpy(), "o", color=role("first"), label="theory, best spacing")
    axes.set(xlabel="levels $N$", ylabel="depth scale, layers")
    axes.legend(loc="upper left")


def _draw_training(canvas: Any, scores: Tensor, budget: Budget) -> None:
    axes = canvas.subplots()
    colours = ("first", "second", "third", "fourth", "accent", "ink")
    for i, (levels, line) in enumerate(zip(budget.levels, scores.tolist(), strict=True)):
        colour = role(colours[i % 6])
        axes.plot(budget.depths, line, marker="osD^vP"[i % 6], color=colour, label=f"{levels} levels")
        limit = 6 * float(quantised_depth(levels).xi)
        if limit < 1.3 * budget.depths[-1]:
            axes.axvline(limit, color=colour, linestyle=":", linewidth=1.2)
            axes.annotate("6 ξ", (limit, 1.0), xytext=(4, 0), textcoords="offset points", color=colour)
    axes.axhline(0.1, color=role("muted"), linestyle="--", linewidth=1)
    axes.set(xlabel="hidden layers", ylabel="training accuracy", ylim=(0, 1.05))
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 0.1))
