r"""The information plane of a small network, with its criticism.

The paper trains 12-10-7-5-4-3-2 tanh networks on all 4096 inputs of 12 bits, reads I(X;T) and I(T;Y) of each
layer through bins, and sees two phases: a short one in which I(T;Y) rises while the gradient stands above its
noise (drift), and a long one in which I(X;T) falls while the noise stands above the gradient (diffusion). The
fall, "compression", is said to be general and to be what makes networks generalise.

Saxe et al. (2018) repeat it with ReLU: no compression, and no worse a network. With bins, compression is the
saturation of tanh: its units reach ±1 and fall into the same two bins.

Reference: Shwartz-Ziv & Tishby (2017), arXiv:1703.00810; Saxe, Bansal, Dapello, Advani, Kolchinsky, Tracey & Cox
(2018), *On the Information Bottleneck Theory of Deep Learning*.

Departures. The label is 1 where the chosen vertices of an icosahedron are less balanced than usual, which like
the paper's rule does not change under rotation; it is a function of the input, so I(X;Y) = 1 bit. SGD has
momentum. Networks train on all inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.data import Dataset
from bolza.information import (
    InformationPlane,
    binned_information,
    gaussian_bottleneck,
    pairwise_information,
)
from bolza.information.estimators import SHWARTZ_ZIV
from bolza.ops.krylov import Estimate
from bolza.report import Figure, role
from bolza.sde import DriftDiffusion
from bolza.studies._study import Progress, Row, Scale, StudyResult
from bolza.training import train

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "shwartz2017_bottleneck"
TITLE = "Information plane and the two phases of SGD"
CLAIM = "Training first fits (drift), then compresses the input (diffusion); but only where units saturate"
REFERENCE = SHWARTZ_ZIV

SIZES = (12, 10, 7, 5, 4, 3, 2)
BATCH = 256
WIDTH = 1 / 15  # 30 bins over the range of tanh
READINGS = 30  # of the signal-to-noise ratio
FITTED = 0.5  # bits of I(T;Y) from which the last hidden layer counts as fitted

# ρ = 0.8: β → α², I(T;X), I(T;Y) in nats
BOTTLENECK = {2.0: (0.777778, 0.287682, 0.164252), 5.0: (6.111111, 0.980829, 0.399254)}


@dataclass(frozen=True)
class Budget:
    """Size of the experiment."""

    epochs: tuple[int, ...]  # at which the plane is read
    seeds: int


BUDGETS = {
    "small": Budget((0, 1, 3, 6, 10, 15, 20, 26, 33, 45, 60), 2),
    "full": Budget((0, 1, 3, 6, 10, 15, 20, 26, 33, 45, 60, 100, 150, 200, 300), 8),
}


@dataclass(frozen=True)
class Trained:
    """One network's run."""

    plane: InformationPlane
    watch: DriftDiffusion
    accuracy: float

    def last_hidden(self) -> Tensor:
        """I(X;T) of the last hidden layer along the run."""
        return self.plane.curve(self.plane.layers[-2])[0]

    def compression(self) -> float:
        """Change of I(X;T) of the last hidden layer from where it is half fitted to the end, in bits."""
        about_x, about_y = self.plane.curve(self.plane.layers[-2])
        fitted = (about_y >= FITTED).nonzero()
        return float(about_x[-1] - about_x[int(fitted[0])]) if len(fitted) else math.nan


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Train tanh and ReLU networks and read their information planes.

    Args:
        scale: ``"small"``: two seeds, 60 epochs, about ten seconds on one core; ``"full"``: eight seeds, 300 epochs.
        progress: called with the share done and a few words.

    Returns:
        The rows, the planes and the signal-to-noise ratio along the run.

    Example:
        >>> from bolza.studies import get
        >>> get("shwartz2017_bottleneck").reference.arxiv
        '1703.00810'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    x, y = task()
    runs: dict[str, list[Trained]] = {"tanh": [], "relu": []}
    total = 2 * budget.seeds
    for i, (name, seed) in enumerate((n, s) for n in runs for s in range(budget.seeds)):
        report(i / total, f"training a {name} network")
        runs[name].append(_train(name, x, y, budget, seed))
    report(1.0, "done")
    rows = [*estimator_rows(x, y), *plane_rows(runs, budget), *phase_rows(runs["tanh"]), *bottleneck_rows()]
    figures = (_plane_figure(runs, budget), _phases_figure(runs["tanh"][0]))
    notes = (
        "I(X;T) is infinite for a continuous deterministic layer: each number is a property of bins of width 1/15.",
        "A network whose units never saturate does not compress, and classifies as well (Saxe et al., 2018).",
        f"Labels are a rotation-invariant function of which of 12 vertices of an icosahedron are chosen; SGD with "
        f"batches of {BATCH}, lr = 0.1 and momentum 0.9 on all 4096 inputs.",
    )
    facts = {
        "epochs": budget.epochs,
        "input_information": {n: [r.last_hidden().tolist() for r in rs] for n, rs in runs.items()},
        "signal_to_noise": [r.watch.curve()[0].tolist() for r in runs["tanh"]],
    }
    return StudyResult(KEY, TITLE, REFERENCE, CLAIM, scale, rows, figures, notes, facts)


def task() -> tuple[Tensor, Tensor]:
    """All 4096 inputs of ±1 and their labels."""
    golden = (1 + 5**0.5) / 2
    corners = [v for a in (-1, 1) for b in (-golden, golden) for v in ((0, a, b), (a, b, 0), (b, 0, a))]
    vertices = F.normalize(torch.tensor(corners), dim=1)
    bits = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 12)
    imbalance = (bits @ vertices).square().sum(1)
    return 2 * bits - 1, (imbalance > imbalance.median() + 1e-4).long()


def network(activation: str, seed: int) -> nn.Sequential:
    """The paper's network, W ~ N(0, gain/fan_in)."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(SIZES, SIZES[1:], strict=False):
        linear = nn.Linear(fan_in, fan_out)
        gain = 1.0 if activation == "tanh" else 2.0
        with torch.no_grad():
            linear.weight.copy_(torch.randn(fan_out, fan_in, generator=generator) * math.sqrt(gain / fan_in))
            linear.bias.zero_()
        layers += [linear, nn.Tanh() if activation == "tanh" else nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _train(activation: str, x: Tensor, y: Tensor, budget: Budget, seed: int) -> Trained:
    model = network(activation, seed)
    an_epoch = len(x) // BATCH
    at = [epoch * an_epoch for epoch in budget.epochs]
    plane = InformationPlane(model, x, y, partial(binned_information, width=WIDTH), at)
    some = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:1024]
    often = [round(at[-1] * i / READINGS) for i in range(READINGS + 1)] if activation == "tanh" else []
    watch = DriftDiffusion(model, F.cross_entropy, x[some], y[some], BATCH, often)

    def note(step: int, steps: int, values: object = None) -> None:
        plane.note(step)
        watch.note(step)

    note(0, at[-1])
    data = Dataset(x, y, x[:0], y[:0], name="12 bits")
    train(model, data, lr=0.1, momentum=0.9, batch_size=BATCH, steps=at[-1], seed=seed, progress=note)
    with torch.no_grad():
        accuracy = float((model(x).argmax(1) == y).double().mean())
    return Trained(plane, watch, accuracy)


# ------------------------------------------------------------------------------------- rows


def estimator_rows(x: Tensor, y: Tensor) -> list[Row]:
    """What is known exactly about the estimators."""
    binned = binned_information(x, y, width=WIDTH)
    pair = pairwise_information(x, y, noise_var=0.01)
    return [
        Row("bins: I(X;T) of T = X, bits", 12.0, binned.input, None, abs(binned.input - 12) < 1e-9),
        Row("pairs: I(X;T) of T = X, bits", 12.0, pair.input_lower, None, abs(pair.input_lower - 12) < 1e-6),
        Row(
            "bins: T = X holds the bit of the label", 1.0, binned.output, None, abs(binned.output - 1) < 1e-2
        ),
    ]


def plane_rows(runs: dict[str, list[Trained]], budget: Budget) -> list[Row]:
    """Claims on the planes."""
    most = max(
        float(r.plane.curve(layer)[0].max()) for rs in runs.values() for r in rs for layer in r.plane.layers
    )
    rows = [Row("no layer holds more than the 12 bits of the input", "≤ 12", most, None, most <= 12 + 1e-5)]
    orders = [_falls_with_depth(r) for rs in runs.values() for r in rs]
    rows.append(
        Row(
            "I(X;T) does not grow from layer to layer at the end, up to",
            "bin effects",
            max(orders),
            None,
            max(orders) < 0.5,
            "bits; binning each layer by itself breaks the data processing inequality a little",
        )  # fmt: skip
    )
    for name, claim in (
        ("tanh", "tanh: once fitted, I(X;T) of the last hidden layer changes by, bits"),
        ("relu", "ReLU: once fitted, I(X;T) of the last hidden layer changes by, bits"),
    ):
        change = torch.tensor([r.compression() for r in runs[name]], dtype=torch.float64)
        note = f"from I(T;Y) = {FITTED} bits to epoch {budget.epochs[-1]}, {len(change)} networks"
        if name == "relu":
            note += (
                "; the paper takes compression to be general, Saxe et al. (2018) find as here that it is not"
            )
        if bool(change.isnan().any()):
            rows.append(Row(claim, "falls", None, note="not every network was fitted"))
            continue
        mean = float(change.mean())
        error = float(change.std() / len(change) ** 0.5) if len(change) > 1 else None
        rows.append(Row(claim, "falls", mean, error, mean < 0, note))
    for name, rs in runs.items():
        shown = min(r.accuracy for r in rs)
        rows.append(
            Row(
                f"{name}: accuracy of the worst network",
                "> 0.95",
                shown,
                None,
                None if shown <= 0.95 else True,
                "of the inputs it was trained on: all there are",
            )  # fmt: skip
        )
    return rows


def _falls_with_depth(trained: Trained) -> float:
    """Largest rise of I(X;T) from a hidden layer to the next, at the end of a run."""
    values = [float(trained.plane.curve(layer)[0][-1]) for layer in trained.plane.layers[:-1]]
    return max(b - a for a, b in zip(values, values[1:], strict=False))


def phase_rows(runs: list[Trained]) -> list[Row]:
    """Claims on drift and diffusion."""
    start = min(float(r.watch.curve()[0][0]) for r in runs)
    found = [_transition(r) for r in runs]
    most = min(float(r.watch.curve()[0].max()) for r in runs)
    rows = [
        Row(
            "the run starts in drift: least signal-to-noise ratio of the first step",
            "> 1",
            start,
            None,
            start > 1,
            "here training starts on a plateau: a layer that reads the input linearly knows nothing about the label",
        ),
        Row(
            "the gradient leads while the network fits: its largest signal-to-noise ratio",
            "> 1",
            most,
            None,
            most > 1,
        ),
    ]
    claim = "the ratio falls for good, to 1/e of its largest value, at step"
    known = [t for t in found if t is not None]
    last = runs[0].plane.steps[-1]
    if len(known) < len(runs):
        rows.append(Row(claim, "before the end", None, note="the ratio of a run has not fallen by its end"))
        return rows
    step, error = _mean(known)
    note = f"of {last} steps, {len(known)} networks"
    # the paper's line is 1: a fall from below it is no change of phase
    if most <= 1:
        note += "; the ratio never stood above 1, so that this is no transition from drift to diffusion"
    rows.append(Row(claim, "before the end", step, error, step < last if most > 1 else None, note))
    return rows


def _transition(trained: Trained) -> Estimate | None:
    """Step from which the signal-to-noise ratio stays below 1/e of its largest value."""
    peak = float(trained.watch.curve()[0].max())
    return trained.watch.transition(threshold=peak / math.e) if peak > 0 else None


def _mean(values: list[Estimate]) -> tuple[float, float]:
    """Mean and its error, from the spread and the errors of the values together."""
    steps = torch.tensor([v.value for v in values], dtype=torch.float64)
    own = sum(v.error**2 for v in values) / len(values) ** 2
    spread = float(steps.var() / len(values)) if len(values) > 1 else 0.0
    return float(steps.mean()), math.sqrt(max(own, spread))


def bottleneck_rows() -> list[Row]:
    """The Gaussian bottleneck in closed form."""
    rows = []
    for beta, expected in BOTTLENECK.items():
        found = gaussian_bottleneck(0.8, beta)
        values = (float(found.gains), float(found.input), float(found.output))
        for word, want, got in zip(("α²", "I(T;X)", "I(T;Y)"), expected, values, strict=True):
            rows.append(
                Row(
                    f"Gaussian bottleneck, ρ = 0.8, β = {beta:g}: {word}",
                    want,
                    got,
                    None,
                    abs(want - got) < 1e-6,
                )
            )
    critical = float(gaussian_bottleneck(0.8, 1.0).critical)
    rows.append(Row("nothing is kept below β = 1/ρ²", 1.5625, critical, None, abs(critical - 1.5625) < 1e-12))
    return rows


# ---------------------------------------------------------------------------------- figures


def _plane_figure(runs: dict[str, list[Trained]], budget: Budget) -> Figure:
    return Figure(
        "The information plane along the run",
        partial(_draw_planes, runs=runs, epochs=budget.epochs),
        caption=(
            "Each line is a layer, from the first hidden one (dark) to the output (light); small to large dots are "
            f"epochs {budget.epochs[0]} to {budget.epochs[-1]}. tanh layers turn left: bins of width 1/15 "
            "see their units saturate. ReLU layers do not, and classify as well."
        ),
        alt="Two panels of I(T;Y) over I(X;T), one for tanh and one for ReLU, a line for each layer.",
        size=(9.2, 4.2),
        key="plane",
    )


def _draw_planes(canvas: Any, runs: dict[str, list[Trained]], epochs: tuple[int, ...]) -> None:
    from matplotlib import colormaps

    panels = canvas.subplots(1, 2, sharey=True)
    for axes, (name, rs) in zip(panels, runs.items(), strict=True):
        plane = rs[0].plane
        for i, layer in enumerate(plane.layers):
            about_x, about_y = plane.curve(layer)
            color = colormaps["viridis"](0.9 * i / (len(plane.layers) - 1))
            axes.plot(about_x, about_y, "-", color=color, linewidth=1.1)
            sizes = [10 + 60 * k / (len(epochs) - 1) for k in range(len(epochs))]
            axes.scatter(about_x, about_y, s=sizes, color=color, edgecolor="#ffffff", linewidth=0.6, zorder=3)
        axes.set_title({"tanh": "tanh", "relu": "ReLU"}[name])
        axes.set_xlabel("I(X;T), bits")
        axes.set_xlim(-0.4, 12.4)
    panels[0].set_ylabel("I(T;Y), bits")


def _phases_figure(trained: Trained) -> Figure:
    return Figure(
        "Drift and diffusion",
        partial(_draw_phases, trained=trained),
        caption=(
            "Signal-to-noise ratio of a step, B |∇f|²/tr Σ, with its error over samples, for one tanh network; below 1 "
            "the noise leads. Dashed: I(X;T) of the last hidden layer, which falls in the diffusion phase."
        ),
        alt="The signal-to-noise ratio of the gradient over steps, with the step from which it stays low.",
        size=(9.2, 3.8),
        key="phases",
    )


def _draw_phases(canvas: Any, trained: Trained) -> None:
    axes = canvas.subplots()
    steps = torch.tensor(trained.watch.steps)
    ratio, error = trained.watch.curve()
    axes.errorbar(steps, ratio, error, fmt="o-", color=role("first"), capsize=3)
    axes.axhline(1, color=role("ink"), linewidth=0.9)
    axes.axhline(0, color=role("ink"), linewidth=0.9, linestyle=":")
    axes.set_ylim(-0.5, max(2.0, 1.3 * float(ratio.max())))
    axes.set_xlabel("step")
    axes.set_ylabel("signal to noise of a step", color=role("first"))
    at = _transition(trained)
    if at is not None:
        low, high = at.value - at.error, at.value + at.error
        axes.axvspan(low, high, color=role("first"), alpha=0.15, linewidth=0)
        place = {"xytext": (-6, 4), "textcoords": "offset points", "ha": "right"}
        axes.annotate("the ratio has fallen to 1/e", (low, 0.93), xycoords=("data", "axes fraction"), **place)
    other = axes.twinx()
    other.grid(False)
    other.plot(trained.plane.steps, trained.last_hidden(), "s--", color=role("second"))
    other.set_ylabel("I(X;T) of the last hidden layer, bits", color=role("second"))
