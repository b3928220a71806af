r"""Wide networks train as their linearisation: the prediction from the kernel at the start, against training.

Before training a network has a kernel Θ = J Jᵀ. Were it linear in its parameters, its outputs under full-batch
gradient descent would be

    f_k − y = (1 − η Θ)^k (f_0 − y)                     on the training set
    f_k(x) = f_0(x) − Θ(x, X) Θ⁻¹ (1 − (1 − η Θ)^k)(f_0(X) − y)      elsewhere,

stable for η < 2/λ_max(Θ). The wider the network, the less its kernel moves and the better this holds: both the gap of
the outputs and the change of the kernel over a fixed number of steps fall at least as 1/√width. That is a statement
about wide networks: the gap of a narrow one is bounded, because both it and its prediction end at the targets.

Measured on digits: 48 training points, even against odd, one hidden layer, η = 1/λ_max, 150 steps. Two further
checks belong to the same theory: the Gram matrix of Du et al. (2019) for two points in closed form, and that training
begins to diverge at 2/λ_max.

Reference: Lee, Xiao, Schoenholz, Bahri, Novak, Sohl-Dickstein & Pennington (2019), arXiv:1902.06720.

Departures: handwritten digits of 8 × 8 pixels, one hidden layer of ReLU without biases. The parametrisation in which
weights are σ/√fan_in times standard normal variables is had by learning rates of each layer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bolza.data import digits
from bolza.meanfield.kernels import Linearized, empirical_ntk, linearized, ntk, two_layer_gram
from bolza.meanfield.kernels.linearized import REFERENCE
from bolza.report import Figure, log_axis, role
from bolza.studies._study import Progress, Row, Scale, StudyResult, mean_error

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "lee2019_linearized"
TITLE = "Wide networks train as linear models"
CLAIM = (
    "Training of a wide network is predicted by its tangent kernel before training, "
    "with a gap that falls at least as 1/√width"
)
GAIN = 2.0  # σ_w² of every layer


@dataclass(frozen=True)
class Budget:
    """Size of the experiment."""

    widths: tuple[int, ...] = (64, 256, 1024, 2048)
    seeds: int = 5
    points: int = 48
    tests: int = 48
    steps: int = 150


BUDGETS = {
    "small": Budget(),
    "full": Budget(widths=(64, 128, 256, 512, 1024, 2048, 4096, 8192), seeds=20, tests=200),
}


@dataclass
class Measured:
    """What was measured at one width, a number a seed each."""

    train_gap: list[float] = field(default_factory=list)
    test_gap: list[float] = field(default_factory=list)
    kernel_change: list[float] = field(default_factory=list)
    onset: list[float] = field(default_factory=list)
    curve: list[Tensor] = field(default_factory=list)  # loss of the network
    theory: list[Tensor] = field(default_factory=list)  # and of its linearisation


def network(width: int, seed: int) -> tuple[nn.Sequential, dict[str, float]]:
    """A network with weights N(0, σ²/fan_in), and σ²/fan_in by parameter."""
    draw = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, width, bias=False), nn.ReLU(), nn.Linear(width, 1, bias=False))
    scales = {}
    for name, p in net.named_parameters():
        scales[name] = GAIN / p.shape[1]
        with torch.no_grad():
            p.copy_(torch.randn(p.shape, generator=draw) * scales[name] ** 0.5)
    return net, scales


def train(
    net: nn.Sequential, scales: dict[str, float], x: Tensor, y: Tensor, lr: float, steps: int
) -> tuple[nn.Sequential, Tensor]:
    """Full-batch gradient descent on ½ Σ (f − y)²; the trained copy, and the loss before each step and at the end."""
    net = copy.deepcopy(net)
    optimizer = torch.optim.SGD(
        [{"params": [p], "lr": lr * scales[name]} for name, p in net.named_parameters()]
    )
    losses = []
    for step in range(steps + 1):
        loss = 0.5 * (net(x) - y).square().sum()
        losses.append(loss.detach())
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net, torch.stack(losses)


def onset_of_divergence(net: nn.Sequential, scales: dict[str, float], x: Tensor, theory: Linearized) -> float:
    """Learning rate, in units of 2/λ_max, at which the leading mode of the residual begins to grow.

    Under descent its factor is 1 − η λ a step, so that |factor| = 1 is the limit. It is measured over a few steps from
    a target displaced along that mode by a small amount, which keeps the network where its kernel was taken.
    """
    limit = theory.max_learning_rate()
    kernel = empirical_ntk(net, x, scales=scales)
    mode = torch.linalg.eigh(kernel.double())[1][:, -1:].to(x)
    with torch.no_grad():
        target = net(x) - 1e-2 * mode  # the residual is this mode, and nothing else
    low, high = 0.8, 1.25
    for _ in range(8):
        middle = (low * high) ** 0.5
        _, losses = train(net, scales, x, target, middle * limit, 8)
        low, high = (low, middle) if losses[-1] > losses[0] else (middle, high)
    return (low * high) ** 0.5


def measure(width: int, budget: Budget, problem: tuple[Tensor, Tensor, Tensor]) -> Measured:
    """Train networks of one width and compare each with its own prediction."""
    x, y, x_test = problem
    out = Measured()
    for seed in range(budget.seeds):
        net, scales = network(width, seed)
        theory = linearized(net, x, y, reduction="half", scales=scales)
        lr = 0.5 * theory.max_learning_rate()  # 1/λ_max
        trained, losses = train(net, scales, x, y, lr, budget.steps)
        steps = torch.arange(budget.steps + 1)
        with torch.no_grad():
            for inputs, found in ((None, out.train_gap), (x_test, out.test_gap)):
                predicted = theory.descent(budget.steps, lr, inputs)
                actual = trained(x if inputs is None else inputs)
                found.append(float((actual - predicted).square().mean().sqrt()))
        before, after = (empirical_ntk(m, x, scales=scales) for m in (net, trained))
        out.kernel_change.append(float((after - before).norm() / before.norm()))
        if width == max(budget.widths) and seed < 3:
            out.onset.append(onset_of_divergence(net, scales, x, theory))
        out.curve.append(losses.double())
        out.theory.append(theory.loss(theory.descent(steps, lr)).double())
    return out


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Train networks of several widths beside their predictions.

    Args:
        scale: ``"small"``: widths 64 to 2048, five seeds; ``"full"``: widths 64 to 8192, twenty seeds.
        progress: called with the share done and a few words.

    Returns:
        Rows on the gaps, the kernel and the stability limit, two figures.

    Example:
        >>> from bolza.studies import get
        >>> get("lee2019_linearized").title
        'Wide networks train as linear models'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    problem = parity(budget)
    found: dict[int, Measured] = {}
    total = sum(width + 200 for width in budget.widths)
    done = 0
    for width in budget.widths:
        report(done / total, f"training {budget.seeds} networks of width {width}")
        found[width] = measure(width, budget, problem)
        done += width + 200
    report(1.0, "done")
    return StudyResult(
        KEY,
        TITLE,
        REFERENCE,
        CLAIM,
        scale,
        [*gap_rows(found), *limit_rows(found), *curve_rows(found), *closed_form_rows(budget, problem[0])],
        (_gap_figure(found), _curve_figure(found)),
        notes=(
            f"Digits of 8 × 8 pixels, even against odd as ±1, {budget.points} training points, one hidden layer of "
            f"ReLU without biases, σ_w² = {GAIN:g}, learning rate 1/λ_max, {budget.steps} steps.",
            "Each network is compared with the prediction from its own kernel, not from that of infinite width.",
        ),
        facts={
            str(width): {
                "train_gap": m.train_gap,
                "test_gap": m.test_gap,
                "kernel_change": m.kernel_change,
                "onset": m.onset,
            }
            for width, m in found.items()
        },
    )


def parity(budget: Budget) -> tuple[Tensor, Tensor, Tensor]:
    """Training inputs with pixels from 0 to 1, whether the digit is even as ±1, and test inputs."""
    data = digits()
    low, high = data.train_x.amin(), data.train_x.amax()
    picked = torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(0))[: budget.points]
    x, x_test = ((part - low) / (high - low) for part in (data.train_x[picked], data.test_x[: budget.tests]))
    return x, 1.0 - 2.0 * (data.train_y[picked] % 2).float()[:, None], x_test


# ------------------------------------------------------------------------------------------- rows


def exponent(widths: Sequence[int], values: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Slope of the logarithm against that of the width, and its standard error from the spread over seeds.

    Example:
        >>> exponent([10, 100], [[1.0, 1.0], [0.1, 0.1]])
        (-1.0, 0.0)
    """
    x = torch.tensor([math.log(w) for w in widths], dtype=torch.float64)
    x = x - x.mean()
    logs = torch.tensor(values, dtype=torch.float64).log()  # (widths, seeds)
    weights = x / x.square().sum()
    error = (weights.square() * logs.var(1) / logs.shape[1]).sum().sqrt()
    return round(float(weights @ logs.mean(1)), 12), float(error)


def gap_rows(found: dict[int, Measured]) -> list[Row]:
    """How gap and kernel change fall with the width."""
    rows = []
    widths = list(found)
    for name, key in (
        ("gap to the trained network on the training points", "train_gap"),
        ("gap to the trained network on test points", "test_gap"),
        ("relative change of the kernel", "kernel_change"),
    ):
        values = [getattr(m, key) for m in found.values()]
        first = next(k for k, w in enumerate(widths) if 4 * w >= widths[-1])  # the law is asymptotic
        slope, error = exponent(widths[first:], values[first:])
        each = ", ".join("{:.3f} ± {:.3f}".format(*mean_error(v)) for v in values)
        rows.append(
            Row(
                f"exponent of the {name}, from width {widths[first]}",
                "−1/2 or below",
                slope,
                error,
                slope < -0.5 + 2 * error,
                f"{each} at width {', '.join(map(str, widths))}; judged to two standard errors",
            )
        )
    return rows


def limit_rows(found: dict[int, Measured]) -> list[Row]:
    """Where training begins to diverge."""
    width = max(found)
    mean, error = mean_error(found[width].onset)
    return [
        Row(
            f"learning rate at which training begins to diverge, over 2/λ_max, at width {width}",
            1.0,
            mean,
            max(error, 1e-3),
            abs(mean - 1) < 0.02,
            "by bisection to a thousandth in three networks, from a residual along the leading mode; judged to 0.02",
        )
    ]


def curve_rows(found: dict[int, Measured]) -> list[Row]:
    """The loss over the whole course of training."""
    width = max(found)
    worst = [
        float(((c - t).abs() / c[0]).max())
        for c, t in zip(found[width].curve, found[width].theory, strict=True)
    ]
    mean, error = mean_error(worst)
    return [
        Row(
            f"largest distance of the loss from its prediction in {len(found[width].curve[0]) - 1} steps, over the "
            f"loss at the start, at width {width}",
            0.0,
            mean,
            error,
            mean < 0.02,
            "judged to 0.02",
        )
    ]


def closed_form_rows(budget: Budget, x: Tensor) -> list[Row]:
    """The Gram matrix of Du et al., and the kernel of the widest networks against that of infinite width."""
    pair = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)]], dtype=torch.float64)
    low, high = torch.linalg.eigvalsh(two_layer_gram(pair)).tolist()
    rows = [
        Row(
            f"{name} eigenvalue of H∞ of two unit vectors at inner product 1/2",
            want,
            got,
            None,
            abs(got - want) < 1e-12,
        )
        for name, want, got in (("smaller", 1 / 3, low), ("larger", 2 / 3, high))
    ]
    width = max(budget.widths)
    found = []
    for seed in range(budget.seeds):
        net, scales = network(width, seed)
        found.append(empirical_ntk(net, x, scales=scales).double())
    infinite = ntk(net, x, weight_var=GAIN, bias_var=0.0).double()
    mean = torch.stack(found).mean(0)
    distance = float((mean - infinite).norm() / infinite.norm())
    error = float(
        torch.stack([k - mean for k in found]).square().sum().sqrt() / infinite.norm() / budget.seeds
    )
    rows.append(
        Row(
            f"relative distance of the kernel of infinite width from the mean over {budget.seeds} of width {width}",
            0.0,
            distance,
            error,
            distance < 3 * error,
            "expected: the standard error of the mean",
        )
    )
    return rows


# ---------------------------------------------------------------------------------------- figures


def _gap_figure(found: dict[int, Measured]) -> Figure:
    return Figure(
        "The wider, the more linear",
        partial(_draw_gaps, found=found),
        caption="Root mean square gap between trained network and prediction, and relative change of the kernel during "
        "training; each seed, mean, and the slope −1/2.",
        alt="Gap and change of the kernel against width, on logarithmic axes.",
        size=(9.2, 3.6),
        key="gaps",
    )


def _draw_gaps(canvas: Any, found: dict[int, Measured]) -> None:
    panels = canvas.subplots(1, 2)
    widths = list(found)
    series: list[list[tuple[str, str, str]]] = [
        [("train_gap", "first", "training points"), ("test_gap", "third", "test points")],
        [("kernel_change", "second", "kernel")],
    ]
    for axes, lines in zip(panels, series, strict=True):
        for k, (key, colour, name) in enumerate(lines):
            values = [getattr(m, key) for m in found.values()]
            for width, v in zip(widths, values, strict=True):
                axes.plot(
                    [width * (1 + 0.06 * k)] * len(v), v, "o", color=role(colour), alpha=0.3, markersize=3
                )
            means = [mean_error(v)[0] for v in values]
            axes.plot(widths, means, "D-", color=role(colour), markersize=5, label=name)
            if k == 0:
                guide = [means[0] * (widths[0] / w) ** 0.5 for w in widths]
                axes.plot(widths, guide, "--", color=role("muted"), label="width$^{-1/2}$")
        log_axis(axes, "x")
        log_axis(axes, "y")
        axes.set_xticks(widths, [str(w) for w in widths])
        axes.set_xlabel("width")
        axes.legend(loc="lower left")
    panels[0].set_ylabel("gap of the outputs")
    panels[1].set_ylabel("$|\\Theta_{end} - \\Theta_0| / |\\Theta_0|$")


def _curve_figure(found: dict[int, Measured]) -> Figure:
    return Figure(
        "Training as it was predicted",
        partial(_draw_curves, found=found),
        caption="Loss of the networks (lines) and the prediction from the kernel before training (dashes), at the "
        "smallest and at the largest width.",
        alt="Loss over steps for two widths, with predictions.",
        size=(9.2, 3.6),
        key="curves",
    )


def _draw_curves(canvas: Any, found: dict[int, Measured]) -> None:
    panels = canvas.subplots(1, 2, sharey=True)
    for axes, width in zip(panels, (min(found), max(found)), strict=True):
        m = found[width]
        for k in range(min(3, len(m.curve))):
            names = ({"label": "network"}, {"label": "prediction"}) if k == 0 else ({}, {})
            axes.plot(m.curve[k] / m.curve[k][0], color=role("second"), linewidth=2.6, alpha=0.55, **names[0])
            axes.plot(m.theory[k] / m.theory[k][0], "--", color=role("first"), linewidth=1.3, **names[1])
        log_axis(axes, "y")
        axes.set(xlabel="step", title=f"width {width}")
    panels[0].set_ylabel("loss over loss at the start")
    panels[1].legend()
