r"""Training in depth slices that run at the same time: penalty and augmented Lagrangian against back-propagation.

    L = φ(X_{K−1}) + Σ_k [ κ_k·(X_{k−1} − λ_k) + β/2 |X_{k−1} − λ_k|² ],   X_k = S_k(λ_k; W_k)

The paper reports accuracy on a par with serial training for residual networks cut into a few slices. Here: digits, 12
residual blocks of width 32 with step 1/3, three slices, SGD 0.1 with momentum 0.9, β = 1, η_λ = 0.5, equal epochs. Four
courses from the same start: serial, penalty, augmented Lagrangian with multipliers that start at zero and take full
steps (ρ = 1), and with what the library does: they start as the costates of one serial pass and take steps of ρ = 0.3.

Reference: Sun et al. (2020), arXiv:2009.01462.

Departures: a small multi-layer perceptron instead of a convolutional network on CIFAR; one machine, so that the
critical path is counted, not timed: a unit for a stage forward, two backward.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.data import digits
from bolza.optim import LayerParallel
from bolza.optim.layer_parallel import REFERENCE
from bolza.report import Figure, role
from bolza.studies._study import Progress, Row, Scale, StudyResult, mean_error

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "sun2020_layer_parallel"
TITLE = "Depth slices tied by multipliers train side by side"
CLAIM = "Layer-parallel training by penalty or augmented Lagrangian reaches the accuracy of serial training"

COURSES: dict[str, tuple[str, dict[str, Any]]] = {
    "serial": ("back-propagation", {"slices": 1}),
    "penalty": ("penalty", {"slices": 3, "method": "penalty"}),
    "published": ("augmented Lagrangian, ρ = 1, κ = 0 first", {"slices": 3, "start": "states", "rho": 1.0}),
    "lagrangian": ("augmented Lagrangian of the library", {"slices": 3}),
}


@dataclass(frozen=True)
class Budget:
    """Size of the runs."""

    epochs: int = 15
    seeds: int = 3
    blocks: int = 12
    width: int = 32
    batch: int = 64


FIRST_SEED = 100  # ρ was chosen on seeds 0 and 1
BUDGETS = {"small": Budget(epochs=10), "full": Budget(seeds=8, epochs=30)}


@dataclass
class Course:
    """One way of training over the seeds: a list an epoch each."""

    accuracy: list[list[float]] = field(default_factory=list)
    path: list[list[float]] = field(default_factory=list)  # critical path so far, in serial epochs
    violation: list[list[float]] = field(default_factory=list)


class Block(nn.Module):
    """The residual block x + h tanh(W x + b)."""

    def __init__(self, width: int, h: float) -> None:
        super().__init__()
        self.h, self.layer = h, nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the next state."""
        return x + self.h * torch.tanh(self.layer(x))


def network(budget: Budget, seed: int, time: float = 4.0) -> nn.Sequential:
    """Stem, blocks with the total time ``time``, head."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        blocks = [Block(budget.width, time / budget.blocks) for _ in range(budget.blocks)]
        return nn.Sequential(nn.Linear(64, budget.width), *blocks, nn.Linear(budget.width, 10))


def unit_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Digits with pixels from 0 to 1."""
    data = digits()
    low, high = data.train_x.amin(), data.train_x.amax()
    return (data.train_x - low) / (high - low), data.train_y, (data.test_x - low) / (high - low), data.test_y


def train(options: dict[str, Any], budget: Budget, seed: int, course: Course) -> nn.Module:
    """Train one network, and note test accuracy, critical path and mismatch after each epoch."""
    x, y, x_test, y_test = unit_digits()
    net = network(budget, seed)
    parallel = LayerParallel(net, F.cross_entropy, samples=len(x), beta=1.0, interface_lr=0.5, **options)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    draw = torch.Generator().manual_seed(seed)
    accuracy, path, violation, waited = [], [], [], 0.0
    for _ in range(budget.epochs):
        worst = []
        order = torch.randperm(len(x), generator=draw).split(budget.batch)
        for rows in order:
            optimizer.zero_grad()
            parallel.backward(x[rows], y[rows], rows)
            optimizer.step()
            waited += parallel.critical_path / parallel.serial_path / len(order)
            worst.append(parallel.violation)
        with torch.no_grad():
            accuracy.append(float((net(x_test).argmax(1) == y_test).float().mean()))
        path.append(waited)
        violation.append(statistics.median(worst))
    course.accuracy.append(accuracy)
    course.path.append(path)
    course.violation.append(violation)
    return net


def largest_difference(budget: Budget) -> float:
    """Gradient of one slice against that of autograd, for a batch."""
    x, y, *_ = unit_digits()
    net, twin = network(budget, 0), network(budget, 0)
    LayerParallel(net, F.cross_entropy, 1).backward(x[:64], y[:64])
    F.cross_entropy(twin(x[:64]), y[:64]).backward()
    pairs = zip(net.parameters(), twin.parameters(), strict=True)
    return max(float((a.grad - b.grad).abs().max()) for a, b in pairs)  # type: ignore[operator, union-attr]


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Train in the four ways and compare.

    Args:
        scale: ``"small"``: 10 epochs, three seeds; ``"full"``: 30 epochs, eight seeds.
        progress: called with the share done and a few words.

    Returns:
        Rows on accuracy and critical path, one figure.

    Example:
        >>> from bolza.studies import get
        >>> get("2009.01462").key
        'sun2020_layer_parallel'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    found = {key: Course() for key in COURSES}
    total = budget.seeds * len(COURSES)
    for seed in range(budget.seeds):
        for i, (key, (name, options)) in enumerate(COURSES.items()):
            report((seed * len(COURSES) + i) / total, f"{name}, seed {seed}")
            train(options, budget, FIRST_SEED + seed, found[key])
    report(1.0, "done")
    return StudyResult(
        KEY,
        TITLE,
        REFERENCE,
        CLAIM,
        scale,
        rows(found, budget),
        (_figure(found),),
        notes=(
            f"{budget.seeds} seeds, {budget.epochs} epochs; the network starts, and the batches come, in the same way "
            "for all four courses.",
            "Where an example comes for the first time, a serial pass begins its inputs and multipliers: the first "
            "epoch is not parallel.",
            "ρ = 0.3 was chosen among 0.1, 0.3 and 1 on two other seeds.",
            "The critical path counts stages that wait for one another; on one machine nothing is gained.",
        ),
        facts={key: vars(course) for key, course in found.items()},
    )


def rows(found: dict[str, Course], budget: Budget) -> list[Row]:
    """Judge accuracy and critical path."""
    final = {key: [a[-1] for a in course.accuracy] for key, course in found.items()}
    serial = mean_error(final["serial"])
    table = [
        Row(
            "one slice: largest difference from back-propagation",
            0.0,
            largest_difference(budget),
            None,
            largest_difference(budget) == 0.0,
            "bit for bit",
        )
    ]
    for key in ("lagrangian", "published", "penalty"):
        gaps = [a - b for a, b in zip(final[key], final["serial"], strict=True)]
        mean, error = mean_error(gaps)
        table.append(
            Row(
                f"test accuracy minus serial: {COURSES[key][0]}",
                "0 (on a par)",
                mean,
                error,
                mean >= -0.05,
                f"{mean_error(final[key])[0]:.3f} against {serial[0]:.3f}; judged to 0.05",
            )
        )
    gaps = [a - b for a, b in zip(final["lagrangian"], final["penalty"], strict=True)]
    mean, error = mean_error(gaps)
    table.append(
        Row(
            "test accuracy: augmented Lagrangian minus penalty",
            "≥ 0",
            mean,
            error,
            mean >= -error,
            "judged to one error",
        )
    )
    path = found["lagrangian"].path[0]
    share = (path[-1] - path[0]) / (len(path) - 1) if len(path) > 1 else path[0]
    stages = budget.blocks + 2
    expected = -(-stages // 3) / stages
    table.append(
        Row(
            "critical path of an epoch after the first, over that of a serial one",
            expected,
            share,
            None,
            abs(share - expected) < 1e-9,
            f"the longest of three slices of {stages} stages",
        )
    )
    return table


def _figure(found: dict[str, Course]) -> Figure:
    return Figure(
        "Slices side by side",
        partial(_draw, found=found),
        caption="Error on test data over epochs, and over the critical path in units of a serial epoch (mean and "
        "range over seeds); right, how far the end of a slice is from the input of the next.",
        alt="Three panels: test error over epochs, test error over critical path, relative mismatch over epochs.",
        size=(10.4, 3.4),
        key="courses",
    )


def _draw(canvas: Any, found: dict[str, Course]) -> None:
    panels = canvas.subplots(1, 3)
    styles = {
        "serial": ("ink", "-"), "penalty": ("third", "--"), "published": ("fourth", ":"), "lagrangian": ("first", "-"),
    }  # fmt: skip
    for key, course in found.items():
        colour, dash = styles[key]
        error = 1 - torch.tensor(course.accuracy)
        epochs = torch.arange(1, error.shape[1] + 1)
        for axes, across in ((panels[0], epochs), (panels[1], torch.tensor(course.path).mean(0))):
            axes.plot(across, error.mean(0), dash, color=role(colour), label=COURSES[key][0])
            axes.fill_between(
                across, error.amin(0), error.amax(0), color=role(colour), alpha=0.12, linewidth=0
            )
        if key != "serial":
            panels[2].plot(epochs, torch.tensor(course.violation).mean(0), dash, color=role(colour))
    for axes in panels[:2]:
        axes.set(ylim=(0, 0.6))
    panels[0].set(xlabel="epoch", ylabel="test error")
    panels[1].set(xlabel="critical path, serial epochs")
    panels[2].set(xlabel="epoch", ylabel="relative mismatch of slices", ylim=(0, None))
    panels[1].legend(fontsize=8)
