r"""The tail index of gradient noise, and what the estimator also calls heavy.

    1/α = (mean log|Y| − mean log|X|) / log M,      Y the sums of M successive draws of X

The paper reads α well below 2 from the gradients of networks, all coordinates in one series, and concludes that SGD
is driven by jumps. The estimator is right on stable draws; on Laplace, Student and unequally scaled Gaussian noise it
reads below 2 as well. Here the noise of networks is read coordinate by coordinate, beside a Gaussian surrogate of the
same covariance, at the start and after training, over batch sizes.

Reference: Şimşekli, Sagun & Gürbüzbalaban (2019), *A Tail-Index Analysis of Stochastic Gradient Noise in Deep Neural
    Networks*.

Departures. Digits and (at full scale) 4,000 images of MNIST with small networks, for MNIST and CIFAR-10 with large
ones. Batches are drawn independently at fixed parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bolza.data import Dataset, digits, digits_images, mnist5k
from bolza.ops.stable_law import stable_noise
from bolza.report import Figure, role
from bolza.sde import GradientTails, gradient_tails, tail_index, tail_report
from bolza.sde.block_sums import SIMSEKLI
from bolza.studies._study import Progress, Row, Scale, StudyResult

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "simsekli2019_tails"
TITLE = "Is gradient noise heavy-tailed? The tail index and its controls"
CLAIM = "The noise of mini-batch gradients is α-stable with an index well below 2, whatever the batch size"
REFERENCE = SIMSEKLI

F64 = torch.float64
EULER = 0.5772156649015329


@dataclass(frozen=True)
class Budget:
    """Size of the runs."""

    draws: int  # of the estimator's own check
    trap_draws: int
    networks: tuple[str, ...]
    steps: int
    batches: tuple[int, ...]
    batch_draws: int
    coordinates: int
    seeds: int


BUDGETS = {
    "small": Budget(1_000_000, 2500, ("MLP", "convolutional"), 800, (1, 4, 16, 64, 256), 2500, 48, 1),
    "full": Budget(
        1_000_000,
        10_000,
        ("MLP", "convolutional", "MLP on MNIST", "convolutional on MNIST"),
        1500,
        (1, 4, 16, 64, 256, 1024),
        5000,
        64,
        2,
    ),
}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Check the estimator, set its traps, and read the noise of networks.

    Args:
        scale: ``"small"``: some seconds on one core; ``"full"``: more draws, MNIST, several seeds.
        progress: called with the share done and a few words.

    Returns:
        The rows, a figure, and the numbers.
    """
    budget = BUDGETS[scale]

    def tell(share: float, words: str) -> None:
        if progress is not None:
            progress(share, words)

    tell(0.0, "stable draws")
    rows = estimator_rows(budget.draws)
    tell(0.1, "traps")
    more, curves = trap_rows(budget.trap_draws)
    rows += more
    readings: list[Reading] = []
    for i, name in enumerate(budget.networks):
        for seed in range(budget.seeds):
            tell(0.2 + 0.8 * (i + seed / budget.seeds) / len(budget.networks), name)
            readings.append(read_network(name, budget, seed))
    for name in budget.networks:
        rows += network_rows(name, [one for one in readings if one.name == name], budget)
    tell(1.0, "done")
    return StudyResult(
        KEY,
        TITLE,
        REFERENCE,
        CLAIM,
        scale,
        rows,
        figures=[_figure(curves, readings[0], budget.batches)],
        notes=[
            "Small networks on digits and MNIST; batches are drawn with replacement at fixed parameters.",
            "Per-sample gradients of N samples have finite variance by construction: 'heavy-tailed' is about sums "
            "of up to √draws batches, the scale on which a run feels the noise.",
            "Coordinates that are zero in more than one draw of a hundred (units that are mostly off) are left out.",
        ],
        facts={
            f"{one.name}, seed {one.seed}, {when}": {
                str(b): {
                    "index": tails.whole.index,
                    "error": tails.whole.error,
                    "pooled": tails.whole.pooled,
                    "pooled_surrogate": tails.whole.pooled_surrogate,
                    "verdict": tails.whole.verdict,
                }
                for b, tails in zip(budget.batches, found, strict=True)
            }
            for one in readings
            for when, found in (("start", one.start), ("trained", one.trained))
        },
    )


# ------------------------------------------------------------------------------- the estimator itself


def estimator_rows(draws: int) -> list[Row]:
    """The index of stable draws, in blocks of a thousand."""
    rows = []
    for seed, alpha in enumerate((2.0, 1.5, 1.0)):
        x = stable_noise((draws,), alpha, generator=torch.Generator().manual_seed(seed), dtype=F64)
        found = tail_index(x, block=min(1000, math.isqrt(draws)), centre="none")
        gap = abs(float(found.index) - alpha)
        rows.append(
            Row(
                f"index of {draws:,} stable draws, α = {alpha:g}",
                alpha,
                float(found.index),
                float(found.error),
                gap < max(0.03, 3 * float(found.error)) if draws < 1_000_000 else gap < 0.03,
                "within 0.03",
            )
        )
    return rows


def _laplace(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    u = torch.rand(shape, dtype=F64, generator=generator) - 0.5
    return -u.sign() * (-2 * u.abs()).log1p()


def _student(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    z = torch.randn((4, *shape), dtype=F64, generator=generator)
    return z[0] / z[1:].square().mean(0).sqrt()


def _scaled(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Gaussian coordinates with scales spread evenly over e^±3.37 on a logarithmic axis."""
    return torch.linspace(-3.37, 3.37, shape[-1], dtype=F64).exp() * torch.randn(
        shape, dtype=F64, generator=generator
    )


def _stable(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return stable_noise(shape, 1.5, generator=generator, dtype=F64)


TRAPS: dict[str, tuple[Callable[[tuple[int, ...], torch.Generator], Tensor], float, float]] = {
    # draws, E log|X| less that of a standard normal, log of the standard deviation
    "Laplace": (_laplace, -EULER + (EULER + math.log(2)) / 2, math.log(2) / 2),
    # E log √(χ²(3)/3) = (ψ(3/2) + log(2/3))/2 with ψ(3/2) = 2 − γ − 2 log 2, subtracted
    "Student, 3 degrees": (
        _student,
        -(2 - EULER - 2 * math.log(2) + math.log(2 / 3)) / 2,
        math.log(3) / 2,
    ),
    # scales s thrown together: ½ log E s² = ½ log(sinh(6.74)/6.74), and E log s = 0
    "unequal variances": (_scaled, 0.0, math.log(math.sinh(6.74) / 6.74) / 2),
}


def trap_rows(draws: int) -> tuple[list[Row], dict[str, tuple[list[int], list[float], list[float]]]]:
    """What the pooled reading says of laws of finite variance, and what the controls say."""
    coordinates, rows, verdicts, curves = 40, [], [], {}
    for i, (name, (law, log_mean, log_deviation)) in enumerate(TRAPS.items()):
        generator = torch.Generator().manual_seed(10 + i)
        series = law((draws, 200), generator).reshape(-1)
        if name == "unequal variances":  # else the sums run through all scales in turn
            series = series[torch.randperm(len(series), generator=generator)]
        found = tail_index(series, block=1000 if len(series) >= 10**5 else None, centre="none")
        expected = 1 / (0.5 + (log_deviation - log_mean) / math.log(found.block))
        slack = 0.02 + 3 * float(found.error)
        rows.append(
            Row(
                f"{name}: finite variance, read as",
                expected,
                float(found.index),
                float(found.error),
                abs(float(found.index) - expected) < slack,
                f"in blocks of {found.block}, all draws in one series; expected for sums that are normal",
            )
        )
        verdicts.append(tail_report(law((draws, coordinates), generator), 0).heavy)
        curves[name] = index_curve(law((draws, coordinates), generator))
    generator = torch.Generator().manual_seed(20)
    stable = _stable((draws, coordinates), generator)
    curves["stable, α = 1.5"] = index_curve(stable)
    report = tail_report(stable, 0)
    rows.append(
        Row(
            "traps that are called heavy-tailed with the controls",
            0.0,
            float(sum(verdicts)),
            None,
            not any(verdicts),
        )
    )
    rows.append(
        Row(
            "stable noise, α = 1.5, with the same controls",
            "heavy-tailed",
            report.verdict,
            None,
            report.heavy,
            str(report),
        )
    )
    return rows, curves


def index_curve(x: Tensor) -> tuple[list[int], list[float], list[float]]:
    """Local index from sums of m to sums of 8m draws, against m."""
    sizes, values, errors = [], [], []
    m = 1
    while len(x) // (8 * m) >= 16:
        found = tail_index(x, 0, block=8 * m, fine=m, centre="none", average=True)
        sizes.append(m)
        values.append(float(found.index))
        errors.append(float(found.error))
        m *= 2
    return sizes, values, errors


# ------------------------------------------------------------------------------------------- networks


@dataclass(frozen=True)
class Reading:
    """Tails of one network at all batch sizes, before and after training."""

    name: str
    seed: int
    start: list[GradientTails]
    trained: list[GradientTails]
    accuracy: float


def network(name: str, seed: int) -> tuple[nn.Module, Dataset]:
    """A network and its data."""
    if name.endswith("MNIST"):
        flat = mnist5k()
        data, side, width = flat, 28, 128
    else:
        data, side, width = digits_images() if name.startswith("conv") else digits(), 8, 64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name.startswith("conv"):
            head: list[nn.Module] = [] if data.input_shape[0] == 1 else [nn.Unflatten(1, (1, side, side))]
            return (
                nn.Sequential(
                    *head,
                    nn.Conv2d(1, 8, 3, padding=1, stride=1 if side == 8 else 2),
                    nn.ReLU(),
                    nn.Conv2d(8, 16, 3, padding=1, stride=2),
                    nn.ReLU(),
                    nn.AdaptiveAvgPool2d(4),
                    nn.Flatten(),
                    nn.Linear(256, 10),
                ),
                data,
            )
        return (
            nn.Sequential(
                nn.Linear(side * side, width),
                nn.ReLU(),
                nn.Linear(width, width),
                nn.ReLU(),
                nn.Linear(width, 10),
            ),
            data,
        )


def read_network(name: str, budget: Budget, seed: int) -> Reading:
    """Tails at the start and after training with batches of 64."""
    model, data = network(name, seed)
    x, y = data.train_x, data.train_y

    def tails() -> list[GradientTails]:
        first = gradient_tails(
            model,
            nn.functional.cross_entropy,
            (x, y),
            budget.batches[0],
            draws=budget.batch_draws,
            coordinates=budget.coordinates,
            generator=torch.Generator().manual_seed(seed),
        )
        return [first, *(first.at(b) for b in budget.batches[1:])]

    start = tails()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(budget.steps):
        part = torch.randint(len(x), (64,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = float((model(x).argmax(1) == y).float().mean())
    return Reading(name, seed, start, tails(), accuracy)


def network_rows(name: str, readings: list[Reading], budget: Budget) -> list[Row]:
    """The paper's reading, its control, and the reading coordinate by coordinate."""
    large = budget.batches.index(max(b for b in budget.batches if b <= 64))
    rows = []
    starts = [one.start[large].whole for one in readings]
    ends = [one.trained[large].whole for one in readings]
    b = budget.batches[large]
    pooled, control = (
        torch.tensor([getattr(report, field) for report in (*starts, *ends)], dtype=F64)
        for field in ("pooled", "pooled_surrogate")
    )
    rows.append(
        Row(
            f"{name}, batch {b}: all coordinates in one series read below 2",
            "below 2",
            float(pooled.mean()),
            float(pooled.std() / math.sqrt(len(pooled))),
            bool((pooled < 1.9).all()),
            "mean over start and end of training; each below 1.9",
        )
    )
    gap = float((control - pooled).mean())
    rows.append(
        Row(
            f"{name}, batch {b}: and by more than 0.2 below a Gaussian surrogate, so that it shows heavy tails",
            "> 0.2",
            gap,
            float((control - pooled).std() / math.sqrt(len(pooled))),
            gap > 0.2,
            f"the surrogate reads {float(control.mean()):.2f}: unequal variances alone",
        )
    )
    verdicts = [report.verdict for report in starts]
    rows.append(
        Row(
            f"{name} at its start, batch {b}: each coordinate by itself",
            "heavy-tailed",
            ", ".join(sorted(set(verdicts))),
            None,
            all(v == "heavy-tailed" for v in verdicts),
            f"index {sum(r.index for r in starts) / len(starts):.3f} ± {starts[0].error:.3f}",
        )
    )
    small = 1 if len(budget.batches) > 1 else 0
    tiny = [one.trained[small].whole for one in readings]
    verdicts = [report.verdict for report in tiny]
    rows.append(
        Row(
            f"{name} after training, batch {budget.batches[small]}: each coordinate by itself",
            "heavy-tailed",
            ", ".join(sorted(set(verdicts))),
            None,
            all(v == "heavy-tailed" for v in verdicts),
            f"index {sum(r.index for r in tiny) / len(tiny):.3f} ± {tiny[0].error:.3f}; accuracy "
            f"{min(one.accuracy for one in readings):.3f}: few samples still have a gradient",
        )
    )
    rises = torch.tensor([one.trained[-1].whole.index - one.trained[small].whole.index for one in readings])
    error = math.hypot(readings[0].trained[-1].whole.error, tiny[0].error)
    rows.append(
        Row(
            f"{name} after training: change of the index from batch {budget.batches[small]} to {budget.batches[-1]}",
            0.0,
            float(rises.mean()),
            error,
            bool(rises.abs().max() < 3 * error),
            "a stable law keeps its index in sums; rising to 2 is the central limit theorem of finite variance",
        )
    )
    return rows


# --------------------------------------------------------------------------------------------- figure


def _figure(curves: dict[str, Any], reading: Reading, batches: tuple[int, ...]) -> Figure:
    return Figure(
        "What reads below 2, and what is heavy",
        partial(_draw, curves=curves, reading=reading, batches=batches),
        caption=(
            "Left: index between sums of m and of 8m draws: finite variance climbs to 2, a stable law stays. Middle: a "
            "network's gradient noise over batch sizes, coordinate by coordinate, before and after training. "
            "Right: all coordinates in one series, beside a Gaussian surrogate of the same covariance."
        ),
        alt="Tail index against the length of sums; tail index against batch size, two panels.",
        size=(9.2, 3.2),
        key="tails",
    )


def _draw(canvas: Any, curves: dict[str, Any], reading: Reading, batches: tuple[int, ...]) -> None:
    left, middle, right = canvas.subplots(1, 3, sharey=True)
    marks = ("o", "s", "^", "D")
    colours = ("first", "third", "muted", "second")
    for (name, (sizes, values, errors)), mark, colour in zip(curves.items(), marks, colours, strict=True):
        left.errorbar(
            sizes, values, errors, marker=mark, markersize=4, color=role(colour), label=name, linewidth=1.2
        )
    left.set(xlabel="shorter sums, m draws", ylabel="tail index α", ylim=(0.6, 2.5), title="known laws")
    left.set_xscale("log", base=2)
    sizes = next(iter(curves.values()))[0]
    left.set_xticks(sizes, [str(m) for m in sizes])
    left.legend(loc="lower left", fontsize=7)
    for tails, colour, label in (
        (reading.start, "first", "start"),
        (reading.trained, "second", "trained"),
    ):
        wholes = [one.whole for one in tails]
        middle.errorbar(
            batches,
            [w.index for w in wholes],
            [w.error for w in wholes],
            marker="o",
            markersize=4,
            color=role(colour),
            label=label,
        )
        right.plot(batches, [w.pooled for w in wholes], "o-", markersize=4, color=role(colour), label=label)
        right.plot(
            batches,
            [w.pooled_surrogate for w in wholes],
            ":",
            color=role(colour),
            label=f"{label}, Gaussian surrogate",
        )
    middle.set(xlabel="batch size", title=f"{reading.name}, each coordinate")
    right.set(xlabel="batch size", title=f"{reading.name}, pooled")
    for axes in (left, middle, right):
        axes.axhline(2, color=role("muted"), linestyle="--", linewidth=0.8, zorder=0)
    for axes in (middle, right):
        axes.set_xscale("log", base=4)
        axes.set_xticks(batches, [str(b) for b in batches])
        axes.legend(loc="lower right" if axes is middle else "upper right", fontsize=7)
