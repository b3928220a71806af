r"""Descent of the local entropy under label noise, against descent of the loss with an equal number of gradients.

Wide valleys are what the local entropy prefers, and a network that fits noisy labels sits in a narrow one. Measured on
digits with a network 64-256-10 and batches of 64, with 30 % of the training labels drawn at random and with clean ones.
Each gradient counts: the inner chain of 20 steps costs 20. Both methods run with and without Nesterov momentum, at the
same learning rate, and descent is also stopped at a fifth of the budget, where it has not yet fitted the noise.

The comparisons that decide are those with descent that is stopped early or has no momentum, because the chain, which
falls back to its mean every 20 steps, is also simply slower.

Reference: Chaudhari et al. (2017), arXiv:1611.01838.

Departures: digits and a dense network; learning rates are not annealed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.data import digits
from bolza.optim import EntropySGD
from bolza.optim.entropy import REFERENCE
from bolza.report import Figure, log_axis, role
from bolza.studies._study import Progress, Row, Scale, StudyResult, mean_error

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "chaudhari2017_entropy"
TITLE = "Local entropy and noisy labels"
CLAIM = "Descent of the local entropy finds wide valleys, which generalise where descent of the loss fits the noise"
RATE, WIDTH, BATCH, CHAIN = 0.1, 256, 64, 20


@dataclass(frozen=True)
class Budget:
    """Size of the experiment."""

    seeds: int = 3
    gradients: int = 2100
    noise: float = 0.3
    gammas: tuple[float, ...] = (0.01, 1.0)


BUDGETS = {"small": Budget(), "full": Budget(seeds=16, gammas=(0.01, 0.1, 1.0, 10.0))}


@dataclass
class Course:
    """One method: a list over seeds at each note, for noisy and for clean labels."""

    gradients: list[int] = field(default_factory=list)
    loss: list[Tensor] = field(default_factory=list)  # (1 or 2, seeds)
    accuracy: list[Tensor] = field(default_factory=list)  # (1 or 2, seeds)


@dataclass(frozen=True)
class Problem:
    """Data of all runs, stacked: noisy labels first, then clean ones."""

    x: Tensor
    labels: Tensor  # (2·seeds, samples)
    x_test: Tensor
    y_test: Tensor


def problem(budget: Budget) -> Problem:
    """Digits with pixels from 0 to 1; a share of the labels of the first half of the runs is drawn at random."""
    data = digits()
    low, high = data.train_x.amin(), data.train_x.amax()
    labels = data.train_y.repeat(2 * budget.seeds, 1)
    for seed in range(budget.seeds):
        draw = torch.Generator().manual_seed(seed)
        wrong = torch.rand(len(data.train_y), generator=draw) < budget.noise
        labels[seed, wrong] = torch.randint(0, 10, (int(wrong.sum()),), generator=draw)
    return Problem(
        (data.train_x - low) / (high - low), labels, (data.test_x - low) / (high - low), data.test_y
    )


def stacked_network(seeds: int, kinds: int = 1) -> list[nn.Parameter]:
    """Weights and biases of two layers for all runs, with torch's default law; all kinds of labels start alike."""
    made: list[list[Tensor]] = [[], [], [], []]
    with torch.random.fork_rng(devices=[]):
        for seed in range(seeds):
            torch.manual_seed(seed)
            for layer, k in ((nn.Linear(64, WIDTH), 0), (nn.Linear(WIDTH, 10), 2)):
                made[k].append(layer.weight.detach().T)
                made[k + 1].append(layer.bias.detach()[None])
    return [nn.Parameter(torch.stack(parts * kinds)) for parts in made]


def scores(parameters: Sequence[Tensor], x: Tensor) -> Tensor:
    """Outputs of all networks, (runs, samples, 10), for inputs (samples, 64) or (runs, samples, 64)."""
    a, b, c, d = parameters
    return torch.relu(x @ a + b) @ c + d


def losses(parameters: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of each network."""
    return F.cross_entropy(scores(parameters, x).mT, y, reduction="none").mean(1)


def batches(problem: Problem, seeds: int, kinds: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches; every run of a seed has the same ones."""
    draws = [torch.Generator().manual_seed(1000 + seed) for seed in range(seeds)]
    count = len(problem.x) // BATCH * BATCH
    runs = torch.arange(kinds * seeds)[:, None]
    while True:
        orders = torch.stack([torch.randperm(len(problem.x), generator=draw)[:count] for draw in draws])
        for rows in orders.repeat(kinds, 1).split(BATCH, 1):
            yield problem.x[rows], problem.labels[runs, rows]


def train(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    problem: Problem,
    budget: Budget,
    clean: bool = True,
) -> Course:
    """Train all networks at once; they share no parameter, so that each is as if trained alone."""
    kinds = 2 if clean else 1
    parameters = stacked_network(budget.seeds, kinds)
    optimizer = make(parameters)
    source = batches(problem, budget.seeds, kinds)
    labels = problem.labels[: kinds * budget.seeds]
    course, every = Course(), max(CHAIN, budget.gradients // 20 // CHAIN * CHAIN)
    for step in range(1, budget.gradients + 1):
        optimizer.zero_grad()
        losses(parameters, *next(source)).sum().backward()
        optimizer.step()
        if step % every == 0 or step == budget.gradients:
            with torch.no_grad():
                right = scores(parameters, problem.x_test).argmax(2) == problem.y_test
                course.gradients.append(step)
                course.loss.append(losses(parameters, problem.x, labels).view(kinds, -1).double())
                course.accuracy.append(right.double().mean(1).view(kinds, -1))
    return course


def methods(budget: Budget) -> dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]:
    """Descent and descent of the local entropy, with and without momentum."""
    made: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
        "SGD with momentum": partial(torch.optim.SGD, lr=RATE, momentum=0.9, nesterov=True),
        "SGD": partial(torch.optim.SGD, lr=RATE),
    }
    for gamma in budget.gammas:
        made[f"entropy with momentum, γ₀ = {gamma:g}"] = partial(
            EntropySGD, lr=RATE, inner_steps=CHAIN, gamma=gamma
        )
    made[f"entropy, γ₀ = {budget.gammas[0]:g}"] = partial(
        EntropySGD, lr=RATE, inner_steps=CHAIN, gamma=budget.gammas[0], momentum=0.0
    )
    return made


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Train with noisy and with clean labels.

    Args:
        scale: ``"small"``: three seeds and two scopes; ``"full"``: sixteen seeds and four scopes.
        progress: called with the share done and a few words.

    Returns:
        Rows on accuracy under label noise, on what it costs without, and on the formulas; one figure.

    Example:
        >>> from bolza.studies import get
        >>> get("chaudhari2017_entropy").title
        'Local entropy and noisy labels'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    data, made = problem(budget), methods(budget)
    found = {}
    for k, (name, make) in enumerate(made.items()):
        clean = "with momentum" in name
        report(k / len(made), f"training {budget.seeds * (1 + clean)} networks by {name}")
        found[name] = train(make, data, budget, clean)
    report(1.0, "done")
    return StudyResult(
        KEY,
        TITLE,
        REFERENCE,
        CLAIM,
        scale,
        [*accuracy_rows(found), *formula_rows()],
        (_figure(found, budget),),
        notes=(
            f"Digits of 8 × 8 pixels, 64-{WIDTH}-10 with ReLU, batch {BATCH}, learning rate {RATE:g}, chains of "
            f"{CHAIN} steps, {budget.seeds} seeds; {budget.noise:.0%} of the labels of the noisy runs are drawn at "
            "random.",
            "One gradient of one batch is the unit of all budgets.",
            "A claim is judged where it is two standard errors from its limit.",
            "Descent without momentum at the same rate is a tenth as fast, and does not fit the noise within the "
            "budget either: where it is as accurate, the gain over momentum is one of speed.",
        ),
        facts={
            name: {
                "gradients": course.gradients,
                "noisy accuracy": [a[0].tolist() for a in course.accuracy],
                "clean accuracy": [a[1].tolist() for a in course.accuracy if len(a) > 1],
                "noisy loss": [v[0].tolist() for v in course.loss],
            }
            for name, course in found.items()
        },
    )


# ------------------------------------------------------------------------------------------- rows


def accuracy_rows(found: dict[str, Course]) -> list[Row]:
    """Gains and costs in test accuracy, paired over seeds."""
    sgd, slow = found["SGD with momentum"], found["SGD"]
    fast = {name: c for name, c in found.items() if name.startswith("entropy with")}
    chosen = max(fast, key=lambda name: float(fast[name].accuracy[-1][0].mean()))
    plain = next(c for name, c in found.items() if name.startswith("entropy,"))
    ours = fast[chosen].accuracy[-1]
    early = min(range(len(sgd.gradients)), key=lambda k: abs(sgd.gradients[k] - sgd.gradients[-1] / 5))
    best_time = max(range(len(sgd.gradients)), key=lambda k: float(sgd.accuracy[k][0].mean()))
    total = sgd.gradients[-1]

    def against(words: str, expected: str, gap: Tensor, least: float, note: str = "") -> Row:
        value, error = mean_error(gap)
        sure = abs(value - least) >= 2 * error  # else this many seeds cannot tell
        return Row(words, expected, value, error, value > least if sure else None, note)

    return [
        against(
            f"noisy labels: test accuracy over descent with momentum, {total} gradients each",
            "at least 0.1",
            ours[0] - sgd.accuracy[-1][0],
            0.1,
            f"{chosen}: {float(ours[0].mean()):.3f} against {float(sgd.accuracy[-1][0].mean()):.3f}; the scope is the "
            f"better of {len(fast)}",
        ),
        against(
            f"noisy labels: the same over descent with momentum, stopped after {sgd.gradients[early]} gradients",
            "above −0.01",
            ours[0] - sgd.accuracy[early][0],
            -0.01,
            f"descent then has {float(sgd.accuracy[early][0].mean()):.3f}; at its best time, after "
            f"{sgd.gradients[best_time]}, {float(sgd.accuracy[best_time][0].mean()):.3f}",
        ),
        against(
            "noisy labels: the same over descent with momentum at equal training loss",
            "above 0",
            ours[0] - _accuracy_at(sgd, fast[chosen].loss[-1][0]),
            0.0,
            f"at training loss {float(fast[chosen].loss[-1][0].mean()):.2f}, which descent reaches sooner",
        ),
        against(
            f"noisy labels: the gain without momentum in either, {total} gradients each",
            "above 0",
            plain.accuracy[-1][0] - slow.accuracy[-1][0],
            0.0,
            f"{float(plain.accuracy[-1][0].mean()):.3f} against {float(slow.accuracy[-1][0].mean()):.3f}, at training "
            f"losses {float(plain.loss[-1][0].mean()):.2f} and {float(slow.loss[-1][0].mean()):.2f}",
        ),
        against(
            f"noisy labels: the same with momentum over descent without, {total} gradients each",
            "above 0",
            ours[0] - slow.accuracy[-1][0],
            0.0,
            "whether a slower descent does as well",
        ),
        against(
            f"clean labels: test accuracy over descent with momentum, {total} gradients each",
            "above −0.01",
            ours[1] - sgd.accuracy[-1][1],
            -0.01,
            f"{float(ours[1].mean()):.3f} against {float(sgd.accuracy[-1][1].mean()):.3f}",
        ),
    ]


def _accuracy_at(course: Course, losses: Tensor) -> Tensor:
    """Accuracy of the noisy runs where their training loss first is so low, interpolated; else at the end."""
    loss = torch.stack([v[0] for v in course.loss])  # (notes, seeds)
    accuracy = torch.stack([a[0] for a in course.accuracy])
    found = []
    for seed, wanted in enumerate(losses.tolist()):
        below = (loss[:, seed] <= wanted).nonzero().flatten().tolist()
        k = below[0] if below else len(loss) - 1
        share = 1.0
        if below and k > 0:
            share = float((loss[k - 1, seed] - wanted) / (loss[k - 1, seed] - loss[k, seed]))
        found.append(share * accuracy[k, seed] + (1 - share) * accuracy[max(k - 1, 0), seed])
    return torch.stack(found)


def formula_rows() -> list[Row]:
    """No chain is ordinary descent, and on a parabola the step is known."""
    ends = []
    for make in (
        partial(EntropySGD, lr=0.05, inner_steps=0),
        partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    ):
        parameters = [p.double().detach().requires_grad_() for p in stacked_network(1, 2)]
        optimizer = make(parameters)
        x, y = torch.ones(4, 64, dtype=torch.float64), torch.tensor([[0, 1, 2, 3]] * 2)
        for _ in range(20):
            optimizer.zero_grad()
            losses(parameters, x, y).sum().backward()
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in parameters]))
    gap = float((ends[0] - ends[1]).abs().max())
    a, gamma, w = 2.0, 0.5, nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    chain = EntropySGD([w], lr=0.1, inner_steps=200, gamma=gamma, momentum=0.0, noise=0.0)
    for _ in range(200):
        chain.zero_grad()
        (0.5 * a * w.square()).sum().backward()
        chain.step()
    slope = gamma * (3.0 - w.item())
    exact = 3.0 * gamma * a / (gamma + a)  # of −log ∫ exp(−a w′²/2 − γ (w − w′)²/2) dw′
    return [
        Row(
            "largest difference from Nesterov descent after 20 steps without a chain",
            0.0,
            gap,
            None,
            gap < 1e-12,
        ),
        Row(
            "gradient of the local entropy of a parabola, from a long chain",
            exact,
            slope,
            None,
            math.isclose(slope, exact, rel_tol=1e-9),
        ),
    ]


# ----------------------------------------------------------------------------------------- figure


def _figure(found: dict[str, Course], budget: Budget) -> Figure:
    return Figure(
        "Accuracy while the noise is fitted",
        partial(_draw, found=found),
        caption=f"Test accuracy over gradients spent with {budget.noise:.0%} random labels (left), and against the "
        "training loss on these labels (right: the course runs from right to left); mean of the seeds with one "
        "standard error.",
        alt="Test accuracy against gradients and against training loss, for descent and local entropy.",
        size=(9.2, 3.8),
        key="noise",
    )


def _draw(canvas: Any, found: dict[str, Course]) -> None:
    panels = canvas.subplots(1, 2, sharey=True)
    colours = iter(("third", "fourth", "accent", "ink"))
    for name, course in found.items():
        colour = (
            "second"
            if name == "SGD with momentum"
            else "muted"
            if name == "SGD"
            else "first"
            if name.startswith("entropy,")
            else next(colours)
        )
        dash = "-" if name.startswith("entropy") else "--"
        accuracy = torch.stack([a[0] for a in course.accuracy])
        mean = accuracy.mean(1)
        error = accuracy.std(1) / accuracy.shape[1] ** 0.5
        loss = torch.stack([v[0] for v in course.loss]).mean(1)
        panels[0].plot(course.gradients, mean, dash, color=role(colour), label=name)
        panels[0].fill_between(
            course.gradients, mean - error, mean + error, color=role(colour), alpha=0.18, linewidth=0
        )
        panels[1].plot(loss, mean, dash, color=role(colour))
        panels[1].plot(loss[-1:], mean[-1:], "o", color=role(colour), markersize=6)
    panels[0].set(xlabel="gradients", ylabel="test accuracy", ylim=(0.7, 1.0))
    log_axis(panels[1], "x")
    panels[1].set_xlabel("training loss on noisy labels")
    panels[0].legend(loc="lower left", fontsize=8.5)
