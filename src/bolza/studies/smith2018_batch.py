r"""Do not decay the learning rate, increase the batch size: equal losses per sample, far fewer updates.

    η_t/B_t is what matters:   cut η by k   ⇔   grow B by k;    in closed form ηΣ/2B = m, m_k = m_0(1 − ηa + η²a²)^k

First where everything is known: a quadratic, whose annealed rate 1/t and whose batch by feedback reach the same loss
with the same samples. Then a network on digits under a schedule that cuts the rate, one that grows the batch, and one
that does half of each; and the batch by feedback from what a run shows.

Reference: Smith, Kindermans, Ying & Le (2018), arXiv:1711.00489.

Departures: a small MLP on digits in place of residual networks on CIFAR-10; factors of 3 in place of 5, as batches have
to stay well below 1,438 samples; the feedback law is that of :mod:`bolza.controllers.batch_laws`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bolza.controllers import BatchSizeController, csgd_batch_size, held_excess, least_excess
from bolza.controllers.batch_laws import SMITH as REFERENCE
from bolza.data import AdjustableBatchSampler, digits
from bolza.report import Figure, role
from bolza.sde import grow_batch
from bolza.studies._study import Progress, Row, Scale, StudyResult, mean_error

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "smith2018_batch"
TITLE = "Batch size in place of learning rate"
CLAIM = "Growing the batch gives the learning curves of decaying the rate, per sample, with far fewer updates"

F = torch.float64
A, ETA, NOISE = 1.0, 0.1, 1.0  # curvature, rate and noise of the quadratic
RATES = (0.3, 0.1, 0.1 / 3)
BATCH = 16
FEEDBACK_BATCH = 8  # at first
CLOSE = 0.01  # of test accuracy: what counts as equal


@dataclass(frozen=True)
class Budget:
    """Size of the runs."""

    chains: int
    samples: int
    seeds: int
    epochs: int
    controlled: int
    feedback_epochs: int


BUDGETS = {
    "small": Budget(chains=4000, samples=2000, seeds=6, epochs=5, controlled=3, feedback_epochs=6),
    "full": Budget(chains=40_000, samples=10_000, seeds=32, epochs=20, controlled=10, feedback_epochs=30),
}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Compare schedules of the rate with schedules of the batch, and with the batch by feedback.

    Args:
        scale: ``"small"``: some ten seconds on one core; ``"full"``: more chains, seeds and epochs.
        progress: called with the share done and a few words.

    Returns:
        The rows, a figure, and the numbers.

    Example:
        >>> from bolza.studies import get
        >>> get("smith2018_batch").reference.arxiv
        '1711.00489'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    report(0.0, "a quadratic")
    quadratic = {"batch": by_batch(budget), "rate": by_rate(budget)}
    rows = quadratic_rows(quadratic, budget)
    report(0.2, "schedules on digits")
    curves = {name: network(stages, budget) for name, stages in schedules().items()}
    rows += network_rows(curves)
    report(0.7, "feedback on digits")
    found = {name: feedback(name, budget) for name in ("constant", "cosine", "feedback")}
    rows += feedback_rows(found)
    notes = (
        f"Quadratic: a = {A:g}, η = {ETA:g}, Σ = {NOISE:g}, from the loss ηΣ/2 at which c-SGD begins to anneal with "
        f"batches of one; {budget.chains} chains; batches are rounded.",
        f"Schedules: MLP 64-32-10 with tanh on digits, three stages of {budget.epochs} epochs from η = {RATES[0]} and "
        f"B = {BATCH}, {budget.seeds} random starts trained side by side. Constant stays at the first stage.",
        f"Feedback: MLP 64-32-10 with tanh, η = 1 and batches of {FEEDBACK_BATCH} at first, "
        f"{budget.feedback_epochs} epochs, {budget.controlled} seeds; the noise is measured on mini-batch gradients "
        "alone. Cosine lowers the rate to 0.",
    )
    facts: dict[str, Any] = {
        "quadratic": {n: {"samples": s[-1], "steps": k[-1], "loss": m[-1]} for n, (k, s, m, _) in quadratic.items()},
        "schedules": {n: {"updates": curve.updates, "accuracy": curve.accuracy} for n, curve in curves.items()},
        "feedback": found,
    }  # fmt: skip
    report(1.0, "done")
    return StudyResult(
        KEY, TITLE, REFERENCE, CLAIM, scale, rows, (_figure(quadratic, curves, budget),), notes, facts
    )


# -------------------------------------------------------------------------------------- the quadratic

Course = tuple[list[int], list[float], list[float], list[float]]
"""Steps, samples, mean loss over chains and its standard error."""


def _start(budget: Budget, generator: torch.Generator) -> Tensor:
    return (ETA * NOISE / A) ** 0.5 * torch.randn(
        budget.chains, dtype=F, generator=generator
    )  # E ½ax² = ηΣ/2


def _note(course: Course, step: int, samples: float, x: Tensor) -> None:
    loss = A / 2 * x.square()
    course[0].append(step)
    course[1].append(samples)
    course[2].append(float(loss.mean()))
    course[3].append(float(loss.std() / len(x) ** 0.5))


def by_batch(budget: Budget) -> Course:
    """Chains under the batch of c-SGD, from the known loss, until the samples are used up."""
    generator = torch.Generator().manual_seed(0)
    x, samples, step = _start(budget, generator), 0.0, 0
    course: Course = ([], [], [], [])
    _note(course, 0, 0.0, x)
    while samples < budget.samples:
        size = max(
            1, round(csgd_batch_size(ETA, NOISE, held_excess(ETA * NOISE / 2, A, ETA, step, NOISE)[0]))
        )
        x = x - ETA * (A * x + (NOISE / size) ** 0.5 * torch.randn(len(x), dtype=F, generator=generator))
        samples, step = samples + size, step + 1
        _note(course, step, samples, x)
    return course


def by_rate(budget: Budget) -> Course:
    """Chains under the annealed rate u = 1/(1 + aηk) with batches of one."""
    generator = torch.Generator().manual_seed(1)
    x = _start(budget, generator)
    course: Course = ([], [], [], [])
    _note(course, 0, 0.0, x)
    for step in range(1, budget.samples + 1):
        u = 1 / (1 + A * ETA * (step - 1))
        x = x - ETA * u * (A * x + NOISE**0.5 * torch.randn(len(x), dtype=F, generator=generator))
        if step % 20 == 0 or step == budget.samples:
            _note(course, step, float(step), x)
    return course


def quadratic_rows(found: dict[str, Course], budget: Budget) -> list[Row]:
    """Simulation against closed form, and batch against rate at equal samples."""
    steps, samples, loss, error = found["batch"]
    exact = held_excess(ETA * NOISE / 2, A, ETA, steps[-1], NOISE)[0]
    least = least_excess(ETA * NOISE / 2, A, NOISE, 1e3, samples[-1])
    annealed, spread = found["rate"][2][-1], found["rate"][3][-1]
    ratio = loss[-1] * samples[-1] / (annealed * budget.samples)
    wobble = ratio * math.hypot(error[-1] / loss[-1], spread / annealed)
    return [
        Row("loss under the batch of c-SGD, simulated over closed form", 1.0, loss[-1] / exact, error[-1] / exact,
            abs(loss[-1] - exact) <= 3 * error[-1] + 0.02 * exact, "three errors and the rounding of batches"),
        Row("loss × samples, batch over annealed rate", 1.0, ratio, wobble, abs(ratio - 1) <= 3 * wobble + ETA * A,
            "equal up to ηa"),
        Row("loss over the least that so many samples allow, Σ/2aS", "1 + O(ηa)", loss[-1] / least,
            error[-1] / least, abs(loss[-1] / least - 1) <= 3 * error[-1] / least + 2 * ETA * A, ""),
        Row("updates, annealed rate over batch", "samples/log samples", budget.samples / steps[-1], None,
            budget.samples / steps[-1] > 10, f"{budget.samples} against {steps[-1]}"),
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------- schedules


@dataclass
class Curve:
    """What a schedule did: training loss after each epoch, ``(epochs, seeds)``; updates; test accuracy by seed."""

    loss: Tensor
    after: list[int]
    accuracy: list[float]

    @property
    def updates(self) -> int:
        """Updates in all."""
        return self.after[-1]


def schedules() -> dict[str, list[tuple[float, int]]]:
    """Rate and batch of each stage."""
    grown = grow_batch(RATES, BATCH)
    half = [(RATES[0], BATCH), (RATES[1], BATCH), (RATES[1], 3 * BATCH)]
    return {
        "decay": [(lr, BATCH) for lr in RATES],
        "grow": grown,
        "hybrid": half,
        "constant": [(RATES[0], BATCH)] * 3,
    }


def network(stages: Sequence[tuple[float, int]], budget: Budget) -> Curve:
    """Networks from different starts, trained side by side with plain SGD."""
    data = digits()
    x, y = data.train_x, data.train_y
    generator = torch.Generator().manual_seed(0)
    seeds = budget.seeds
    shapes = ((64, 32), (1, 32), (32, 10), (1, 10))
    weights = [
        torch.randn(seeds, *shape, generator=generator) * (shape[0] ** -0.5 if shape[0] > 1 else 0.0)
        for shape in shapes
    ]

    def outputs(inputs: Tensor, w: Sequence[Tensor]) -> Tensor:
        return torch.tanh(inputs @ w[0] + w[1]) @ w[2] + w[3]

    def losses(inputs: Tensor, labels: Tensor, w: Sequence[Tensor]) -> Tensor:
        scores = outputs(inputs, w).transpose(1, 2)
        return nn.functional.cross_entropy(scores, labels, reduction="none").mean(1)

    seen, after, updates = [], [], 0
    for lr, size in stages:
        for _ in range(budget.epochs):
            order = torch.rand(seeds, len(y), generator=generator).argsort(1)
            for start in range(0, len(y) - size + 1, size):
                at = order[:, start : start + size]
                w = [p.requires_grad_() for p in weights]
                gradients = torch.autograd.grad(losses(x[at], y[at], w).sum(), w)
                weights = [p.detach().sub(g, alpha=lr) for p, g in zip(w, gradients, strict=True)]
                updates += 1
            with torch.no_grad():
                seen.append(losses(x.expand(seeds, -1, -1), y.expand(seeds, -1), weights))
            after.append(updates)
    with torch.no_grad():
        right = outputs(data.test_x.expand(seeds, -1, -1), weights).argmax(-1) == data.test_y
    return Curve(torch.stack(seen), after, right.float().mean(1).tolist())


def network_rows(curves: dict[str, Curve]) -> list[Row]:
    """Curves against those of the decaying rate; the starts are common, so that differences are paired."""
    rows = []
    decay = curves["decay"]
    for name in ("grow", "hybrid", "constant"):
        curve = curves[name]
        logs = (curve.loss / decay.loss).log().mean(0)  # of each seed, over the epochs
        half = len(curve.loss) // 3
        late = (curve.loss[half:] / decay.loss[half:]).log().mean(0)
        mean, error = mean_error(late.tolist())
        equal = name != "constant"
        rows.append(
            Row(f"training loss after the first cut, {name} over decay: mean log ratio", 0.0 if equal else "not 0",
                mean, error, (abs(mean) <= max(0.1, 3 * error)) == equal,
                f"10 %; over all epochs {float(logs.mean()):.3f}" if equal else "a check that the test can fail"),
        )  # fmt: skip
    for name in ("grow", "hybrid"):
        change = [a - b for a, b in zip(curves[name].accuracy, decay.accuracy, strict=True)]
        mean, error = mean_error(change)
        rows.append(
            Row(f"test accuracy, {name} less decay", 0.0, mean, error, abs(mean) <= max(CLOSE, 2 * error),
                f"one point; decay reaches {mean_error(decay.accuracy)[0]:.3f}"),
        )  # fmt: skip
    updates = {name: curve.updates for name, curve in curves.items()}
    rows.append(
        Row("updates, grown batch over decaying rate", 13 / 27, updates["grow"] / updates["decay"], None,
            updates["grow"] < updates["hybrid"] < updates["decay"],
            f"hybrid {updates['hybrid'] / updates['decay']:.2f}")
    )  # fmt: skip
    return rows


# ------------------------------------------------------------------------------------------ feedback


def feedback(name: str, budget: Budget) -> dict[str, list[float]]:
    """Runs with a constant rate, a cosine, and the batch by feedback, with equal samples."""
    data = digits()
    n = len(data.train_y)
    found: dict[str, list[float]] = {"accuracy": [], "loss": [], "updates": [], "batch": []}
    for seed in range(budget.controlled):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0, fused=True)
        sampler = AdjustableBatchSampler(n, FEEDBACK_BATCH, seed=seed)
        controller = BatchSizeController(optimizer, sampler, largest=256) if name == "feedback" else None
        updates = samples = 0
        for _ in range(budget.feedback_epochs):
            for at in sampler:
                if name == "cosine":
                    share = samples / (n * budget.feedback_epochs)
                    optimizer.param_groups[0]["lr"] = (1 + math.cos(math.pi * share)) / 2
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(net(data.train_x[at]), data.train_y[at])
                loss.backward()
                optimizer.step()
                if controller is not None:
                    controller.step(loss=loss, batch_size=len(at))
                updates, samples = updates + 1, samples + len(at)
        with torch.no_grad():
            found["accuracy"].append(float((net(data.test_x).argmax(1) == data.test_y).float().mean()))
            found["loss"].append(float(nn.functional.cross_entropy(net(data.train_x), data.train_y)))
        found["updates"].append(float(updates))
        found["batch"].append(float(sampler.batch_size))
    return found


def feedback_rows(found: dict[str, dict[str, list[float]]]) -> list[Row]:
    """Accuracy at equal samples, and what it took."""
    ours, constant, cosine = (found[name] for name in ("feedback", "constant", "cosine"))
    less = mean_error([a - b for a, b in zip(ours["accuracy"], cosine["accuracy"], strict=True)])
    gain = mean_error([a - b for a, b in zip(ours["accuracy"], constant["accuracy"], strict=True)])
    share = mean_error([a / b for a, b in zip(ours["updates"], cosine["updates"], strict=True)])
    return [
        Row("batch by feedback: test accuracy less that of the cosine", 0.0, *less, less[0] >= -max(CLOSE, 2 * less[1]),
            f"no more than a point below; cosine reaches {mean_error(cosine['accuracy'])[0]:.3f}"),
        Row("batch by feedback: test accuracy less that of the constant rate", "≥ 0", *gain, gain[0] >= -2 * gain[1],
            f"constant reaches {mean_error(constant['accuracy'])[0]:.3f}"),
        Row("batch by feedback: updates over those of the cosine", "below 0.5", *share, share[0] < 0.5,
            f"batches of {mean_error(ours['batch'])[0]:.0f} at the end"),
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------- the figure


def _figure(quadratic: dict[str, Course], curves: dict[str, Curve], budget: Budget) -> Figure:
    return Figure(
        "The same curve per sample, another one per update",
        partial(_draw, quadratic=quadratic, curves=curves),
        caption=(
            "Left: expected loss on a quadratic under an annealed rate and under a batch that grows by feedback, over "
            "samples (solid) and over updates (dashed); the thin line is Σ/2as. Middle: training loss of a network on "
            "digits over epochs under four schedules. Right: the same over updates."
        ),
        alt="Loss over samples and updates on a quadratic; training loss over epochs and over updates on digits.",
        size=(9.6, 3.2),
        key="batch",
    )


def _draw(canvas: Any, quadratic: dict[str, Course], curves: dict[str, Curve]) -> None:
    left, middle, right = canvas.subplots(1, 3)
    for name, colour, label in (("rate", "second", "annealed rate"), ("batch", "first", "growing batch")):
        steps, samples, loss, _ = quadratic[name]
        left.plot(samples[1:], loss[1:], color=role(colour), label=label)
        if name == "batch":
            left.plot(steps[1:], loss[1:], color=role(colour), linestyle="--", label="the same over updates")
    known = torch.logspace(1.5, math.log10(quadratic["rate"][1][-1]), 20)
    left.plot(known, NOISE / (2 * A * known), color=role("muted"), linewidth=0.8)
    left.set(xlabel="samples (dashed: updates)", ylabel="loss above minimum", xscale="log", yscale="log")
    left.legend(loc="upper right")
    styles = {
        "constant": ("muted", "-"),
        "decay": ("second", "-"),
        "hybrid": ("third", "--"),
        "grow": ("first", ":"),
    }
    for name, (colour, line) in styles.items():
        mean = curves[name].loss.mean(1)
        middle.plot(range(1, len(mean) + 1), mean, color=role(colour), linestyle=line, label=name)
        right.plot(curves[name].after, mean, color=role(colour), linestyle=line, label=name)
    middle.set(xlabel="epoch", ylabel="training loss", yscale="log")
    right.set(xlabel="update", yscale="log")
    middle.legend(loc="lower left")
