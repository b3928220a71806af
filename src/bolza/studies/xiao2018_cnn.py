r"""Very deep plain convolutional networks: Fourier modes, and delta-orthogonal kernels.

In a wide circular convolutional network the covariance between positions obeys Σ' = A ⋆ C(Σ): each Fourier mode α of
a deviation from the fixed point is multiplied by χ_c λ_α per layer, λ_α being the transform of the kernel's
variances. Kernels with equal variances on all taps kill high frequencies; a delta-orthogonal kernel, an orthogonal
matrix on its centre tap, has λ_α = 1, is an isometry at every frequency, and lets a plain tanh network train at
depths where the usual ones do not.

Reference: Xiao, Bahri, Sohl-Dickstein, Schoenholz & Pennington (2018), *Dynamical Isometry and a Mean Field Theory
of CNNs: How to Train 10,000-Layer Vanilla CNNs*.

Departures. Digits of 8 × 8 pixels in place of MNIST and CIFAR-10; tens of layers trained, a thousand propagated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.data import digits
from bolza.meanfield import critical_init_
from bolza.meanfield.initialisation.initialise import XIAO
from bolza.report import Figure, log_axis, role
from bolza.studies._study import Progress, Row, Scale, StudyResult

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "xiao2018_cnn"
TITLE = "Very deep convolutional networks without skips"
CLAIM = (
    "Plain convolutional networks train at great depth when every Fourier mode of the signal survives, which "
    "delta-orthogonal kernels ensure"
)
REFERENCE = XIAO
POSITIONS = 8
# Transform of three equal taps on a circle of eight: (1 + 2 cos(2πα/8))/3.
MODES = (1.0, 0.8047, 0.3333, -0.1381, -0.3333)


@dataclass(frozen=True)
class Budget:
    """Size of the runs."""

    channels: int
    mode_layers: int
    deep: int
    depth: int
    width: int
    steps: int
    seeds: int
    rates: tuple[float, ...]


BUDGETS = {
    "small": Budget(400, 4, 1000, 40, 12, 60, 1, (1e-2,)),
    "full": Budget(2000, 5, 10_000, 300, 32, 400, 3, (1e-3, 3e-3, 1e-2)),
}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Modes, singular values, norm through a thousand layers, and training.

    Args:
        scale: ``"small"``: 40 layers trained, about ten seconds; ``"full"``: 300 layers, ten thousand propagated.
        progress: called with the share done and a few words.

    Returns:
        Rows, the decay of the modes, and the training curves.

    Example:
        >>> from bolza.studies import get
        >>> get("xiao2018_cnn").reference.arxiv
        '1806.05393'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    report(0.0, "Fourier modes")
    decay = mode_decay(budget)
    rows = mode_rows(decay)
    report(0.2, "singular values")
    rows += isometry_rows(budget)
    report(0.4, f"training {budget.depth} layers")
    curves = {name: training(name, budget) for name in ("delta_orthogonal", "He")}
    rows += training_rows(curves, budget)
    figures = (
        Figure(
            "Fourier modes through the layers",
            partial(_draw_modes, decay=decay),
            caption=f"Variance over positions, circular convolutions with three equal taps, {budget.channels} "
            "channels: the amplitude of each mode (points) falls as |λ|^layer (lines) to what finite width leaves; "
            "with delta-orthogonal kernels none falls.",
            alt="Amplitudes of Fourier modes over layers on a logarithmic axis, with straight lines of theory.",
            size=(7.6, 4.2),
            key="modes",
        ),
        Figure(
            f"Training {budget.depth} plain layers",
            partial(_draw_training, curves=curves),
            caption="Loss over SGD steps, for each the best learning rate of the same grid; the dashed line is chance.",
            alt="Training loss of a delta-orthogonal tanh network and of one with He weights.",
            size=(7.6, 3.6),
            key="training",
        ),
    )
    notes = (
        "The training network reduces the image to 4 × 4 by one strided convolution and keeps that size; weights are "
        f"trained by SGD with momentum 0.9 on batches of 32, {budget.seeds} seed(s), rates {budget.rates}.",
        "At this depth and on these data He weights learn too; what is judged is who is ahead at the end.",
        "Modes are measured in linear networks, χ_c = 1, so that λ_α alone is seen.",
    )
    facts = {"decay": {k: v.tolist() for k, v in decay.items()},
             "loss": {k: v.tolist() for k, v in curves.items()}}  # fmt: skip
    return StudyResult(KEY, TITLE, REFERENCE, CLAIM, scale, rows, figures, notes, facts)


# ---------------------------------------------------------------------------------- Fourier modes


def mode_decay(budget: Budget) -> dict[str, Tensor]:
    """Amplitude of each mode of the variance over positions, (layers + 1, modes), for both kernels."""
    found = {}
    for scheme in ("gaussian", "delta_orthogonal"):
        generator = torch.Generator().manual_seed(0)
        profile = torch.tensor([4.0, 0.2, 2.0, 0.1, 1.0, 0.2, 0.5, 0.4], dtype=torch.float64)
        h = (
            torch.randn(8, budget.channels, POSITIONS, generator=generator, dtype=torch.float64)
            * profile.sqrt()
        )
        amplitudes = [torch.fft.rfft(h.square().mean((0, 1)))]
        for _ in range(budget.mode_layers):
            layer = nn.Conv1d(
                budget.channels, budget.channels, 3, padding=1, padding_mode="circular", bias=False
            )
            critical_init_(layer.double(), scheme=scheme, generator=generator)  # type: ignore[arg-type]
            with torch.no_grad():
                h = layer(h)
            amplitudes.append(torch.fft.rfft(h.square().mean((0, 1))))
        a = torch.stack(amplitudes)
        found[scheme] = (a / a[0]).real
    return found


def mode_rows(decay: dict[str, Tensor]) -> list[Row]:
    """The factor each mode takes in the first layer, against λ."""
    rows = []
    first = decay["gaussian"][1]
    for alpha, want in enumerate(MODES):
        got = float(first[alpha])
        rows.append(Row(f"mode {alpha} of three equal taps on a circle of 8: λ", want, got, None,
                        abs(got - want) < 0.05, "one layer, finite channels: within 0.05"))  # fmt: skip
    kept = float((decay["delta_orthogonal"][-1] - 1).abs().max())
    layers = len(decay["gaussian"]) - 1
    rows.append(Row(f"delta-orthogonal kernels change a mode over {layers} layers by at most", 0.0, kept, None,
                    kept < 1e-9))  # fmt: skip
    return rows


# ------------------------------------------------------------------------------- singular values


def symbol(weight: Tensor, size: int) -> Tensor:
    """Singular values of a circular convolution on ``size`` × ``size`` positions, all frequencies."""
    return torch.linalg.svdvals(torch.fft.fft2(weight.double(), s=(size, size)).flatten(2).permute(2, 0, 1))


def isometry_rows(budget: Budget) -> list[Row]:
    """Singular values of kernels, and the norm through many layers."""
    values = {}
    for scheme in ("delta_orthogonal", "gaussian"):
        layer = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        critical_init_(layer, scheme=scheme, generator=torch.Generator().manual_seed(1))  # type: ignore[arg-type]
        values[scheme] = symbol(layer.weight.detach(), 8)
    off = float((values["delta_orthogonal"] - 1).abs().max())
    low, high = float(values["gaussian"].min()), float(values["gaussian"].max())
    rows = [
        Row("largest deviation of a delta-orthogonal singular value from 1", 0.0, off, 1e-6, off < 1e-6),
        Row("independent weights of the same variance span", ".015 to 2.02", f"{low:.3f} to {high:.2f}", None,
            low < 0.1 and 1.7 < high < 2.4, "16 channels, 3 × 3 taps, 8 × 8 positions"),
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 6, 3, 3, dtype=torch.float64, generator=generator)
    h = x
    for _ in range(budget.deep):
        layer = nn.Conv2d(6, 6, 3, padding=1, bias=False, dtype=torch.float64)
        critical_init_(layer, scheme="delta_orthogonal", generator=generator)
        with torch.no_grad():
            h = layer(h)
    drift = abs(float(h.norm() / x.norm()) - 1)
    rows.append(Row(f"{budget.deep} linear layers change the norm by", 0.0, drift, 1e-12, drift < 1e-11))
    return rows


# --------------------------------------------------------------------------------------- training


def plain_network(depth: int, width: int) -> nn.Sequential:
    """One strided convolution, then ``depth`` − 2 that keep 4 × 4 positions, then a linear layer."""
    layers: list[nn.Module] = [nn.Conv2d(1, width, 3, stride=2, padding=1), nn.Tanh()]
    for _ in range(depth - 2):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.Tanh()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * width, 10))


def training(name: str, budget: Budget) -> Tensor:
    """Loss of each step, (seeds, steps), at the rate of the grid with the lowest mean loss over the last tenth."""
    data = digits()
    x, y = data.train_x.reshape(-1, 1, 8, 8), data.train_y
    best, losses = math.inf, torch.empty(0)
    for rate in budget.rates:
        runs = torch.full((budget.seeds, budget.steps), math.inf)
        for seed in range(budget.seeds):
            generator = torch.Generator().manual_seed(seed)
            net = plain_network(budget.depth, budget.width)
            critical_init_(net, x[:128], scheme="delta_orthogonal", generator=generator)
            if name == "He":
                for layer in net:
                    if isinstance(layer, nn.Conv2d | nn.Linear):
                        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
                        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
            optimizer = torch.optim.SGD(net.parameters(), rate, momentum=0.9)
            for k in range(budget.steps):
                rows = torch.randint(len(x), (32,), generator=generator)
                loss = F.cross_entropy(net(x[rows]), y[rows])
                if not bool(loss.isfinite()):
                    break
                runs[seed, k] = loss.detach()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        end = float(runs[:, -max(1, budget.steps // 10) :].mean())
        if end < best or not losses.numel():
            best, losses = end, runs
    return losses


def training_rows(curves: dict[str, Tensor], budget: Budget) -> list[Row]:
    """Loss at the end of the budget, against chance."""
    tail = max(1, budget.steps // 10)
    ends = {name: float(c[:, -tail:].mean()) for name, c in curves.items()}
    chance = math.log(10)
    gaps = (curves["He"] - curves["delta_orthogonal"])[:, -tail:].mean(1)
    error = float(gaps.std()) / math.sqrt(len(gaps)) if len(gaps) > 1 else None
    gap = ends["He"] - ends["delta_orthogonal"]
    verdict = None if error is None or abs(gap) <= 2 * error else gap > 0
    return [
        Row(f"{budget.depth} plain tanh layers, delta-orthogonal: loss after {budget.steps} steps",
            f"well below chance, {chance:.2f}", ends["delta_orthogonal"], None,
            ends["delta_orthogonal"] < 0.5 * chance),
        Row("the same network with He weights", "above delta-orthogonal", ends["He"], error, verdict,
            "at equal rates, or each at its best of the same grid; the error is that of the difference, and without "
            "several seeds, or within two errors, it stays open"),
    ]  # fmt: skip


def _draw_modes(canvas: Any, decay: dict[str, Tensor]) -> None:
    axes = canvas.subplots()
    a = decay["gaussian"].abs()
    layers = torch.arange(len(a))
    colours = ("ink", "first", "second", "third", "fourth")
    for alpha, (want, colour, mark) in enumerate(zip(MODES, colours, "osD^v", strict=True)):
        axes.plot(layers, abs(want) ** layers.double(), "-", color=role(colour), linewidth=1.2)
        axes.plot(
            layers,
            a[:, alpha],
            mark,
            color=role(colour),
            label=f"mode {alpha}, λ = {want:.3g}".replace("-", "−"),
        )
    axes.plot(
        layers,
        decay["delta_orthogonal"].abs().amin(1),
        "--",
        color=role("muted"),
        label="delta-orthogonal, all",
    )
    log_axis(axes)
    axes.set(xlabel="layer", ylabel="amplitude relative to the input", ylim=(1e-3, 2), xticks=layers.tolist())
    axes.legend(loc="lower left", ncols=2)


def _draw_training(canvas: Any, curves: dict[str, Tensor]) -> None:
    axes = canvas.subplots()
    for (name, losses), colour, dash in zip(curves.items(), ("first", "second"), ("-", "-."), strict=True):
        mean = losses.mean(0)
        smooth = torch.stack([mean[max(0, k - 4) : k + 1].mean() for k in range(len(mean))])
        axes.plot(smooth, dash, color=role(colour), linewidth=2, label=name.replace("_", "-"))
    axes.axhline(math.log(10), linestyle="--", color=role("muted"), linewidth=0.9)
    axes.set(xlabel="step", ylabel="training loss", ylim=(0, 3))
    axes.legend(loc="upper right")
