r"""Momentum with a derivative: overshoot on a quadratic, and a fair comparison on digits.

    V ← α V + g,   D ← α D + (1 − α)(g − g_prev),   w ← w − η (g + K_i V + K_d D)

The paper reads momentum as the integral of a PID controller, adds the derivative, and reports faster and better
training than momentum. Its comparison is at equal η, where the steps are η (K_i + 1 − α)/η, three to five times, as
large. Both are measured here: the overshoot on a quadratic, where the claim is a theorem, and training with momentum at
the same η and at the same size of step.

Reference: An, Wang, Sun, Xu, Dai & Zhang (2018), CVPR.

Departures: digits of 8 × 8 pixels and a multi-layer perceptron of width 100 instead of MNIST and CIFAR; no derivative
on the first step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bolza.data import digits
from bolza.optim import PIDSGD, equivalent_lr
from bolza.optim.pid import REFERENCE
from bolza.report import Figure, log_axis, role
from bolza.studies._study import Progress, Row, Scale, StudyResult, mean_error

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "an2018_pid"
TITLE = "The derivative in momentum"
CLAIM = "A derivative of the gradient damps the overshoot of momentum, and trains faster and better"
ETA, ALPHA, INTEGRAL = 0.01, 0.9, 3.0
GAINS = (0.0, 50.0, 100.0, 150.0)
OVERSHOOT = (0.351, 0.189, 0.080, 0.018)  # of the recursion on a quadratic of curvature 1


@dataclass(frozen=True)
class Budget:
    """Size of the training runs."""

    epochs: int = 10
    seeds: int = 5
    width: int = 100
    batch: int = 64


BUDGETS = {"small": Budget(), "full": Budget(epochs=20, seeds=20, width=1000)}

Make = Callable[[Any], torch.optim.Optimizer]
COURSES: dict[str, tuple[str, Make]] = {
    "pid": ("PID, $K_d$ = 100", lambda p: PIDSGD(p, ETA, ALPHA, INTEGRAL, 100.0)),
    "pi": ("PI, $K_d$ = 0", lambda p: PIDSGD(p, ETA, ALPHA, INTEGRAL, 0.0)),
    "equal": (
        "momentum at equal steps",
        lambda p: torch.optim.SGD(p, equivalent_lr(ETA, ALPHA, INTEGRAL), momentum=ALPHA),
    ),
    "published": ("momentum at equal η", lambda p: torch.optim.SGD(p, ETA, momentum=ALPHA)),
}


def quadratic(derivative: float, steps: int = 200) -> list[float]:
    """Course of w on ½ w² from w = 1."""
    w = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = PIDSGD([w], ETA, ALPHA, INTEGRAL, derivative)
    found = [1.0]
    for _ in range(steps):
        w.grad = w.detach().clone()
        optimizer.step()
        found.append(w.item())
    return found


def train(make: Make, budget: Budget, seed: int) -> tuple[list[float], float]:
    """Loss on the training set before and after each epoch, and test accuracy at the end."""
    data = digits()
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        net = nn.Sequential(nn.Linear(64, budget.width), nn.ReLU(), nn.Linear(budget.width, 10))
    low, high = data.train_x.amin(), data.train_x.amax()
    x, x_test = ((part - low) / (high - low) for part in (data.train_x, data.test_x))
    optimizer = make(net.parameters())
    draw = torch.Generator().manual_seed(seed)

    def loss() -> float:
        with torch.no_grad():
            return float(F.cross_entropy(net(x), data.train_y))

    losses = [loss()]
    for _ in range(budget.epochs):
        for rows in torch.randperm(len(x), generator=draw).split(budget.batch):
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), data.train_y[rows]).backward()
            optimizer.step()
        losses.append(loss())
    with torch.no_grad():
        return losses, float((net(x_test).argmax(1) == data.test_y).float().mean())


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Measure overshoot, and train in four ways.

    Args:
        scale: ``"small"``: width 100, ten epochs, five seeds; ``"full"``: width 1000, twenty epochs, twenty seeds.
        progress: called with the share done and a few words.

    Returns:
        Rows on overshoot and on loss and accuracy, one figure.

    Example:
        >>> from bolza.studies import get
        >>> get("an2018_pid").reference.year
        2018
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    courses = {gain: quadratic(gain) for gain in GAINS}
    losses: dict[str, list[list[float]]] = {key: [] for key in COURSES}
    accuracy: dict[str, list[float]] = {key: [] for key in COURSES}
    for seed in range(budget.seeds):
        report(seed / budget.seeds, f"training, seed {seed}")
        for key, (_, make) in COURSES.items():
            course, final = train(make, budget, seed)
            losses[key].append(course)
            accuracy[key].append(final)
    report(1.0, "done")
    return StudyResult(
        KEY,
        TITLE,
        REFERENCE,
        CLAIM,
        scale,
        [*overshoot_rows(courses), *training_rows(losses, accuracy)],
        (_figure(courses, losses),),
        notes=(
            f"η = {ETA}, α = {ALPHA}, K_i = {INTEGRAL:g}; momentum at equal steps has the rate "
            f"{equivalent_lr(ETA, ALPHA, INTEGRAL):.3g}. Errors: of the difference, over {budget.seeds} paired seeds.",
            "Expected overshoots are those of the recursion without a derivative on the first step.",
        ),
        facts={"quadratic": {str(k): v for k, v in courses.items()}, "losses": losses, "accuracy": accuracy},
    )


def overshoot_rows(courses: dict[float, list[float]]) -> list[Row]:
    """How far each course goes beyond the minimum, and when it has settled."""
    rows = []
    for (gain, course), expected in zip(courses.items(), OVERSHOOT, strict=True):
        found = max(0.0, -min(course))
        rows.append(
            Row(
                f"overshoot on a quadratic, K_d = {gain:g}",
                expected,
                found,
                None,
                abs(found - expected) < 1e-3,
            )
        )
    first, last = (
        max(t for t, w in enumerate(courses[gain]) if abs(w) > 0.05) + 1 for gain in (GAINS[0], GAINS[-1])
    )
    rows.append(
        Row(
            "steps until |w| stays below 0.05: K_d = 150 against K_d = 0",
            "fewer",
            f"{last} against {first}",
            None,
            last < first,
        )
    )
    return rows


def training_rows(losses: dict[str, list[list[float]]], accuracy: dict[str, list[float]]) -> list[Row]:
    """Training of PID against both momenta, seed by seed."""
    rows = []
    for other, expected in (("published", "below 0"), ("equal", "below 0")):
        ratio = [
            float(torch.tensor(a[-1] / b[-1]).log())
            for a, b in zip(losses["pid"], losses[other], strict=True)
        ]
        mean, error = mean_error(ratio)
        rows.append(
            Row(
                f"log of PID's train loss over that of {COURSES[other][0]}",
                expected,
                mean,
                error,
                mean < -2 * error,
                "judged to two standard errors",
            )
        )
    for other in ("published", "equal"):
        mean, error = mean_error([a - b for a, b in zip(accuracy["pid"], accuracy[other], strict=True)])
        rows.append(
            Row(
                f"PID's test accuracy minus that of {COURSES[other][0]}",
                "above 0",
                mean,
                error,
                mean > 2 * error,
                "judged to two standard errors",
            )
        )
    return rows


def _figure(courses: dict[float, list[float]], losses: dict[str, list[list[float]]]) -> Figure:
    return Figure(
        "What the derivative does, and what the step does",
        partial(_draw, courses=courses, losses=losses),
        caption="Left: a quadratic with more and more derivative. Right: train loss on digits, mean and range over "
        "seeds; at equal steps momentum is the same curve.",
        alt="Courses on a quadratic, and train losses of four optimizers over epochs.",
        size=(9.4, 3.5),
        key="pid",
    )


def _draw(canvas: Any, courses: dict[float, list[float]], losses: dict[str, list[list[float]]]) -> None:
    left, right = canvas.subplots(1, 2)
    for (gain, course), alpha in zip(courses.items(), (0.35, 0.55, 0.75, 1.0), strict=True):
        left.plot(course[:120], color=role("first"), alpha=alpha, label=f"$K_d$ = {gain:g}")
    left.axhline(0, color=role("muted"), linewidth=0.8)
    left.set(xlabel="step", ylabel="w")
    left.legend()
    styles = {
        "published": ("muted", "-"),
        "equal": ("second", "-"),
        "pi": ("third", "--"),
        "pid": ("first", ":"),
    }
    for key, (colour, dash) in styles.items():
        values = torch.tensor(losses[key])
        epochs = range(values.shape[1])
        right.plot(epochs, values.mean(0), dash, color=role(colour), label=COURSES[key][0], linewidth=2)
        right.fill_between(
            epochs, values.amin(0), values.amax(0), color=role(colour), alpha=0.12, linewidth=0
        )
    log_axis(right, "y")
    right.set(xlabel="epoch", ylabel="train loss")
    right.legend(loc="lower left")
