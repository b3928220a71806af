r"""Dynamical isometry: sigmoidal networks with orthogonal weights, rectifiers without.

The input–output Jacobian of L layers at the critical point has squared singular values of mean 1 and

    Var[s²] = L (μ₂/μ₁² − 1 − s₁),     μ_k = E φ'(√q z)^{2k},    s₁ = −1 Gaussian, 0 orthogonal weights.

Orthogonal tanh networks can keep all of them near 1 by working at q ∝ 1/L; Gaussian weights never can, and ReLU
cannot with orthogonal ones. Isometric networks learn faster.

Reference: Pennington, Schoenholz & Ganguli (2017), *Resurrecting the Sigmoid in Deep Learning through Dynamical
Isometry*.

Departures. Digits of 8 × 8 pixels and SGD in place of CIFAR-10 and several optimizers; a last row goes beyond the
paper: with units in pairs (h, −h) a ReLU network is an isometry after all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bolza.data import digits
from bolza.meanfield import critical_init_, isometry, isometry_theory
from bolza.meanfield.isometry import PENNINGTON
from bolza.models import mlp
from bolza.report import Figure, log_axis, role
from bolza.studies._study import Progress, Row, Scale, StudyResult
from bolza.training import train_ensemble

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "pennington2017_isometry"
TITLE = "Dynamical isometry of deep networks"
CLAIM = (
    "Deep tanh networks with orthogonal weights can be isometries at the start of training and then learn faster; "
    "with Gaussian weights or ReLU they cannot"
)
REFERENCE = PENNINGTON


@dataclass(frozen=True)
class Budget:
    """Size of the runs."""

    width: int
    depth: int
    draws: int
    train_depth: int
    train_width: int
    steps: int
    seeds: int
    rates: tuple[float, ...]


BUDGETS = {
    "small": Budget(150, 30, 2, 40, 48, 60, 2, (1e-2, 3e-2, 1e-1, 3e-1)),
    "full": Budget(400, 30, 5, 100, 150, 300, 4, (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)),
}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Measure spectra against theory, and learning with and without isometry.

    Args:
        scale: ``"small"``: width 150, a few seconds; ``"full"``: width 400, and a hundred layers trained.
        progress: called with the share done and a few words.

    Returns:
        Rows, the spectra and the learning curves.

    Example:
        >>> from bolza.studies import get
        >>> get("pennington2017_isometry").reference.arxiv
        '1711.04735'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    report(0.0, "spectra")
    rows, spectra = spectrum_rows(budget)
    report(0.5, "learning with and without isometry")
    curves = learning(budget)
    rows.append(learning_row(curves, budget))
    figures = (
        Figure(
            "Singular values of the Jacobian",
            partial(_draw_spectra, spectra=spectra),
            caption=f"{budget.depth} layers of {budget.width}. The orthogonal tanh network works near 1; the others "
            "stretch a few directions and lose most.",
            alt="Sorted singular values of four networks on a logarithmic axis.",
            size=(7.6, 4.2),
            key="spectra",
        ),
        Figure(
            "Isometry and learning",
            partial(_draw_learning, curves=curves, budget=budget),
            caption=f"tanh, {budget.train_depth} layers of {budget.train_width}, {budget.steps} steps of SGD: training "
            f"accuracy against the learning rate, mean and range of {budget.seeds} seeds.",
            alt="Training accuracy over learning rate for orthogonal and Gaussian critical weights.",
            size=(7.6, 3.8),
            key="learning",
        ),
    )
    notes = (
        f"Spectra of {budget.draws} networks of width {budget.width} at four inputs each, relative to their mean "
        "square; theory is that of infinite width.",
        "Learning: digits, batches of 64, the same learning rates for both; both networks are exactly critical at the "
        "same q = 1/√L, and differ in the law of their weights alone.",
    )
    facts = {
        "singular_values": {name: s.tolist() for name, s in spectra.items()},
        "train_accuracy": {name: a.tolist() for name, a in curves.items()},
        "rates": budget.rates,
    }
    return StudyResult(KEY, TITLE, REFERENCE, CLAIM, scale, rows, figures, notes, facts)


def network(
    width: int, depth: int, activation: type[nn.Module], scheme: str, q: float, seed: int
) -> nn.Sequential:
    """A critical network without read-out, in float64."""
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), activation())]
    net = nn.Sequential(*layers).double()
    critical_init_(net, scheme=scheme, q=q, generator=torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
    return net


def measure(
    budget: Budget, activation: type[nn.Module], scheme: str, q: float, depth: int
) -> tuple[Tensor, float, float, float, float]:
    """Singular values over √(mean square); relative variance and its error; largest relative value and its error."""
    values, variances, largest = [], [], []
    for draw in range(budget.draws):
        net = network(budget.width, depth, activation, scheme, q, draw)
        x = torch.randn(
            4, budget.width, dtype=torch.float64, generator=torch.Generator().manual_seed(99 + draw)
        )
        result = isometry(net, x)
        scale = math.sqrt(result.mean_square.value)
        values.append(result.singular_values / scale)
        variances.append(result.relative_variance)
        largest.append(result.largest.value / scale)
    v, top = torch.tensor(variances), torch.tensor(largest)
    root = math.sqrt(budget.draws)
    return values[0][0], float(v.mean()), float(v.std()) / root, float(top.mean()), float(top.std()) / root


def spectrum_rows(budget: Budget) -> tuple[list[Row], dict[str, Tensor]]:
    """Rows on variances and edges, and one spectrum for each kind of network."""
    rows: list[Row] = []
    spectra: dict[str, Tensor] = {}
    L = budget.depth
    _, variance, error, top, top_error = measure(budget, nn.Identity, "gaussian", 1.0, 5)
    rows.append(Row("Var[s²] of 5 Gaussian layers without activation", 5.0, variance, error,
                    abs(variance / 5 - 1) < 0.2))  # fmt: skip
    rows.append(Row("their largest s², (L+1)^(L+1)/L^L", 14.93, top**2, 2 * top * top_error,
                    0.8 < top**2 / 14.93 < 1.1, "approached from below as the width grows"))  # fmt: skip
    for q in (0.05, 0.01):
        theory = isometry_theory("tanh", q=q, depth=L)
        values, variance, error, top, top_error = measure(budget, nn.Tanh, "orthogonal", q, L)
        spectra[f"tanh, orthogonal, q = {q:g}"] = values
        rows.append(Row(f"Var[s²] of {L} orthogonal tanh layers at q = {q:g}", theory.variance, variance, error,
                        abs(variance / theory.variance - 1) < 0.2))  # fmt: skip
        rows.append(Row(f"their largest s at q = {q:g}", theory.largest, top, top_error,
                        abs(top / theory.largest - 1) < 0.05, "edge from the S-transform"))  # fmt: skip
    gauss = isometry_theory("tanh", q=0.01, depth=L, orthogonal=False)
    values, variance, error, *_ = measure(budget, nn.Tanh, "gaussian", 0.01, L)
    spectra["tanh, Gaussian, q = 0.01"] = values
    rows.append(Row(f"Var[s²] of {L} Gaussian tanh layers at q = 0.01", gauss.variance, variance, error,
                    0.6 < variance / gauss.variance < 1.4, "a few percent of the directions carry it"))  # fmt: skip
    values, variance, error, *_ = measure(budget, nn.ReLU, "orthogonal", 1.0, L)
    spectra["ReLU, orthogonal"] = values
    rows.append(Row(f"Var[s²] of {L} orthogonal ReLU layers is L: no isometry", float(L), variance, error,
                    0.6 < variance / L < 1.6, "theory: μ₂/μ₁² = 2, so L"))  # fmt: skip
    paired = nn.Sequential(nn.Linear(budget.width // 2, budget.width), nn.ReLU(),
                           *network(budget.width, L - 2, nn.ReLU, "orthogonal", 1.0, 0),
                           nn.Linear(budget.width, budget.width // 2)).double()  # fmt: skip
    critical_init_(paired, scheme="mirrored", generator=torch.Generator().manual_seed(0))
    spread = isometry(paired, torch.randn(4, budget.width // 2, dtype=torch.float64)).relative_variance
    rows.append(Row("beyond the paper: Var[s²] of ReLU with units in pairs (h, −h)", 0.0, spread, None,
                    spread < 1e-10, "mirrored weights make the network linear at its start"))  # fmt: skip
    return rows, spectra


def learning(budget: Budget) -> dict[str, Tensor]:
    """Training accuracy after the budget, (seeds, rates), for both laws of the weights."""
    data = digits()
    make = partial(mlp, budget.train_depth, budget.train_width, "tanh")
    start: list[dict[str, Tensor]] = []
    for scheme in ("orthogonal", "gaussian"):
        for seed in range(budget.seeds):
            net = make()
            critical_init_(
                net, data.train_x[:256], scheme=scheme, generator=torch.Generator().manual_seed(seed)
            )  # type: ignore[arg-type]
            start += [{n: p.detach() for n, p in net.named_parameters()}] * len(budget.rates)
    stacked = {name: torch.stack([s[name] for s in start]) for name in start[0]}
    rates = list(budget.rates) * (2 * budget.seeds)
    trained = train_ensemble(make, data, parameters=stacked, lr=rates, batch_size=64, steps=budget.steps)
    accuracy = trained.train_accuracy.double().reshape(2, budget.seeds, len(budget.rates))
    return {"orthogonal": accuracy[0], "gaussian": accuracy[1]}


def learning_row(curves: dict[str, Tensor], budget: Budget) -> Row:
    """Best mean accuracy of each over the same rates."""
    best = {}
    for name, accuracy in curves.items():
        at = int(accuracy.mean(0).argmax())
        best[name] = (float(accuracy[:, at].mean()), float(accuracy[:, at].std()) / math.sqrt(budget.seeds))
    (a, ea), (b, eb) = best["orthogonal"], best["gaussian"]
    gap, error = a - b, math.hypot(ea, eb)
    return Row(
        f"after {budget.steps} steps, each at its best rate, orthogonal is ahead in training accuracy by",
        "more than 0",
        gap,
        error,
        None if abs(gap) <= 2 * error else gap > 0,
        f"{a:.3f} against {b:.3f}",
    )


def _draw_spectra(canvas: Any, spectra: dict[str, Tensor]) -> None:
    axes = canvas.subplots()
    for (name, values), colour, dash in zip(
        spectra.items(), ("first", "third", "second", "fourth"), ("-", "-.", "--", ":"), strict=True
    ):
        share = (torch.arange(len(values)) + 0.5) / len(values)
        axes.plot(share, values.clamp_min(1e-6), dash, color=role(colour), linewidth=2, label=name)
    log_axis(axes)
    axes.axhline(1, color=role("muted"), linewidth=0.8)
    axes.set(xlabel="share of the singular values, largest first", ylabel="s / √(mean s²)", ylim=(1e-4, 20))
    axes.legend(loc="lower right")


def _draw_learning(canvas: Any, curves: dict[str, Tensor], budget: Budget) -> None:
    axes = canvas.subplots()
    for name, colour, mark in (("orthogonal", "first", "o"), ("gaussian", "second", "s")):
        a = curves[name]
        axes.plot(
            budget.rates,
            a.mean(0),
            f"-{mark}",
            color=role(colour),
            label="Gaussian" if name == "gaussian" else name,
        )
        axes.fill_between(budget.rates, a.amin(0), a.amax(0), color=role(colour), alpha=0.15, linewidth=0)
    log_axis(axes, "x")
    axes.set(xlabel="learning rate", ylabel="training accuracy", ylim=(0, 1.02))
    axes.axhline(0.1, color=role("muted"), linewidth=0.8)
    axes.legend(loc="lower left")
