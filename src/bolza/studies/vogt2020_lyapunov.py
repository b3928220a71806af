r"""Lyapunov spectra of recurrent networks, checked where they are known, and what they say about gradients.

    Z = J_t Q_t,   QR = Z,   λᵢ = (1/T) Σ_t log |R_t|ᵢᵢ

The paper offers the spectrum, found by QR on the Jacobians along a driven trajectory, as a readout of whether
gradients explode or vanish. Here the method is held against every value that is known: maps with closed forms,
Lorenz-63, the mean-field theory of random networks, the determinant of an LSTM. Then the readout is tested: the
gradient of a loss with respect to a state T steps earlier should change as e^{λ₁ T}.

Reference: Vogt, Puelma Touzel, Shlizerman & Lajoie (2022), arXiv:2006.14123; values of the maps are textbook ones.

Departures. Natural logarithms. The state of an LSTM is (h, c): with ∂h'/∂h alone, the sum rule fails, and so does
the largest exponent. No network is trained here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from bolza.meanfield import fixed_point
from bolza.report import Figure, role
from bolza.stability import LyapunovSpectrum, lyapunov_exponents
from bolza.stability.lyapunov import VOGT
from bolza.stability.recurrent import as_driven_map
from bolza.studies._study import Progress, Row, Scale, StudyResult
from bolza.systems import ODESystem

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "vogt2020_lyapunov"
TITLE = "Lyapunov spectra of recurrent networks"
CLAIM = "The QR method gives the Lyapunov spectrum of a recurrent network, and λ₁ the growth of its gradients"
REFERENCE = VOGT

F64 = torch.float64
GAINS = (0.5, 0.8, 1.2, 1.5, 2.0, 3.0)
LORENZ = (0.906, 0.0, -14.57)


@dataclass(frozen=True)
class Budget:
    """Size of the runs."""

    lorenz_steps: int
    lorenz_samples: int
    width: int
    steps: int
    lstm_steps: int


BUDGETS = {
    "small": Budget(lorenz_steps=700, lorenz_samples=512, width=200, steps=400, lstm_steps=300),
    "full": Budget(lorenz_steps=4000, lorenz_samples=1024, width=1000, steps=2000, lstm_steps=3000),
}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Compute the spectra and judge them.

    Args:
        scale: ``"small"``: some ten seconds on one core; ``"full"``: longer trajectories, wider networks.
        progress: called with the share done and a few words.

    Returns:
        The rows, two figures, and the spectra among the facts.

    Example:
        >>> from bolza.studies import get
        >>> get("2006.14123").key
        'vogt2020_lyapunov'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    report(0.0, "maps")
    rows = map_rows()
    report(0.15, "Lorenz")
    lorenz = lorenz_spectrum(budget)
    rows += lorenz_rows(lorenz)
    report(0.45, "random networks")
    gains, largest, radius = random_networks(budget)
    rows += gain_rows(gains, largest, radius, budget.width)
    report(0.7, "LSTM and GRU")
    cells = {name: cell_spectrum(kind, budget) for name, kind in (("LSTM", nn.LSTM), ("GRU", nn.GRU))}
    for name, (found, determinant, pulled) in cells.items():
        rows += cell_rows(name, found, determinant, pulled)
    rows.append(zero_lstm_row())
    spectra = {name: found for name, (found, _, _) in cells.items()}
    figures = (_lorenz_figure(lorenz), _network_figure(gains, largest, budget.width, spectra))
    notes = (
        f"Lorenz-63 from {budget.lorenz_samples} first states over {budget.lorenz_steps} steps of RK4 with dt = 0.03; "
        "the errors are standard errors over these.",
        f"The random networks have width {budget.width}; the theory is that of infinite width.",
        "The paper trains its networks; here they have random weights, so that every number can be checked.",
    )
    facts = {
        "lorenz": lorenz.exponents.tolist(),
        "gains": list(gains),
        "largest": largest.tolist(),
        **{name: found.exponents.tolist() for name, found in spectra.items()},
    }
    report(1.0, "done")
    return StudyResult(KEY, TITLE, REFERENCE, CLAIM, scale, rows, figures, notes, facts)


# ----------------------------------------------------------------------------------- known systems


def map_rows() -> list[Row]:
    """The logistic, Hénon and cat maps."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.rand(500, 2, generator=generator, dtype=F64)
    logistic = lyapunov_exponents(lambda x: 4 * x * (1 - x), starts[:, :1], 200, warmup=20)

    def henon(x: Tensor) -> Tensor:
        return torch.stack([1 - 1.4 * x[..., 0] ** 2 + x[..., 1], 0.3 * x[..., 0]], -1)

    found = lyapunov_exponents(henon, 0.05 * starts, 300, warmup=60)
    matrix = torch.tensor([[2.0, 1.0], [1.0, 1.0]], dtype=F64)
    cat = lyapunov_exponents(lambda x: (x @ matrix.T) % 1, starts[0], 200, warmup=40)
    rows = [
        _close("logistic map at r = 4: λ", math.log(2), logistic.largest.value, logistic.largest.error, 0.01),
        _close("Hénon map: λ₁", 0.419, found.largest.value, found.largest.error, 0.01),
        _close("Hénon map: λ₂", -1.623, float(found.exponents[1]), float(found.error[1]), 0.01),
        _close("Hénon map: λ₁ + λ₂ = log 0.3", math.log(0.3), found.sum.value, 0.0, 1e-10),
        _close("cat map: λ₁ = log of the squared golden ratio", 0.962424, cat.largest.value, 0.0, 1e-6),
        _close("cat map: λ₂ = −λ₁", -0.962424, float(cat.exponents[1]), 0.0, 1e-6),
    ]
    return rows


def lorenz_spectrum(budget: Budget) -> LyapunovSpectrum:
    """Lorenz-63 at σ = 10, ρ = 28, β = 8/3."""

    def field(s: float, x: Tensor, u: Any) -> Tensor:
        a, b, c = x.unbind(-1)
        return torch.stack([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c], -1)

    generator = torch.Generator().manual_seed(0)
    start = torch.randn(budget.lorenz_samples, 3, generator=generator, dtype=F64)
    start = start + torch.tensor([0.0, 0.0, 25.0], dtype=F64)
    system = ODESystem(field, horizon=budget.lorenz_steps, dt=0.03, method="rk4")
    return lyapunov_exponents(system, start, warmup=200)


def lorenz_rows(found: LyapunovSpectrum) -> list[Row]:
    """The three exponents per unit of time."""
    rows = [
        _close(
            f"Lorenz-63: λ{'₁₂₃'[i]} per unit of time",
            LORENZ[i],
            float(found.exponents[i]),
            float(found.error[i]),
            tol,
        )
        for i, tol in enumerate((0.02, 0.01, 0.05))
    ]
    rows.append(_close("Lorenz-63: Kaplan–Yorke dimension", 2.062, found.dimension, 0.0, 0.005))
    return rows


# --------------------------------------------------------------------------------- random networks


def random_networks(budget: Budget) -> tuple[tuple[float, ...], Tensor, float]:
    """λ₁ of x' = W tanh(x), W of variance g²/width, for several gains in one batch; and the radius of W/g."""
    generator = torch.Generator().manual_seed(0)
    n = budget.width
    w = torch.randn(n, n, generator=generator, dtype=F64) / math.sqrt(n)
    gains = torch.tensor(GAINS, dtype=F64)[:, None]
    start = torch.randn(len(GAINS), n, generator=generator, dtype=F64)
    found = lyapunov_exponents(lambda x: gains * (torch.tanh(x) @ w.T), start, budget.steps, k=1, warmup=100)
    radius = float(torch.linalg.eigvals(w).abs().max())
    return GAINS, torch.stack([found.per_sample[:, 0], found.per_sample_error[:, 0]], 1), radius


def theory(gain: float) -> float:
    """½ log χ₁ of mean field theory; below the edge of chaos, g = 1, that is log g."""
    return 0.5 * math.log(float(fixed_point("tanh", gain**2, 0.0).chi_1))


def gain_rows(gains: tuple[float, ...], largest: Tensor, radius: float, width: int) -> list[Row]:
    """λ₁ against the spectral radius below the edge of chaos, and against ½ log χ₁ above it."""
    rows = []
    for gain, (value, error) in zip(gains, largest.tolist(), strict=True):
        if gain < 1:
            exact, tolerance = math.log(gain * radius), 0.02
            claim = f"random tanh network, g = {gain:g}: λ₁ = log of the spectral radius of W"
            note = f"within {tolerance:g}; at infinite width it is log g = {math.log(gain):.4f}"
        else:
            exact, tolerance = theory(gain), 0.7 / math.sqrt(width)
            claim = f"random tanh network, g = {gain:g}: λ₁ = ½ log χ₁"
            note = f"within 0.7/√width = {tolerance:.2g}; the error is of this one network over time"
        holds: bool | None = abs(value - exact) <= tolerance
        if holds and abs(exact) <= tolerance:
            holds, note = None, note + "; at this width λ₁ cannot be told from 0"
        rows.append(Row(claim, exact, value, error, holds, note))
    return rows


# ------------------------------------------------------------------------------------- gated cells


def cell_spectrum(kind: Any, budget: Budget) -> tuple[LyapunovSpectrum, float, tuple[float, float]]:
    """Spectrum of a random gated network under noise, its mean log determinant, and its gradient's rate."""
    torch.manual_seed(0)
    module = kind(4, 24).to(F64)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "weight_hh" in name:
                p.mul_(2.0)
    inputs = torch.randn(budget.lstm_steps, 1, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
    found = lyapunov_exponents(module, inputs=inputs)
    driven = as_driven_map(module, None, inputs)
    sizes = [part.shape for part in driven.state]

    def flat(v: Tensor, u: Tensor) -> Tensor:
        parts = [p.reshape(s) for p, s in zip(v.split([s.numel() for s in sizes]), sizes, strict=True)]
        return torch.cat([p.flatten() for p in driven.step(0, tuple(parts), u)])

    states = [torch.cat([part.flatten() for part in driven.state])]
    with torch.no_grad():
        for u in inputs:
            states.append(flat(states[-1], u))
    jacobians = torch.vmap(torch.func.jacrev(flat))(torch.stack(states[:-1]), inputs)
    determinant = float(torch.linalg.slogdet(jacobians)[1].mean())
    # back-propagation: the costate of a random loss at the end, step by step
    p = torch.randn(len(states[0]), generator=torch.Generator().manual_seed(2), dtype=F64)
    logs = []
    for jacobian in jacobians.flip(0):
        p = p @ jacobian
        logs.append(float(p.norm().log()))
        p = p / p.norm()
    rates = torch.tensor(logs[20:], dtype=F64)
    blocks = torch.stack([part.mean() for part in rates.tensor_split(10)])
    return found, determinant, (float(rates.mean()), float(blocks.std()) / math.sqrt(10))


def cell_rows(
    name: str, found: LyapunovSpectrum, determinant: float, pulled: tuple[float, float]
) -> list[Row]:
    """The sum rule, and the rate at which a back-propagated gradient changes."""
    rate, error = pulled
    both = math.hypot(error, found.largest.error)
    return [
        _close(f"{name}: Σ λᵢ = mean log |det J|", determinant, found.sum.value, 0.0, 1e-6),
        Row(
            f"{name}: a gradient sent back changes as e^(λ₁ T), λ₁",
            found.largest.value,
            rate,
            both,
            abs(rate - found.largest.value) <= max(3 * both, 0.01),
            "the rate of back-propagation over the same trajectory; within three errors",
        ),
    ]


def zero_lstm_row() -> Row:
    """With all weights zero the forget gate is the memory."""
    module = nn.LSTM(4, 24).to(F64)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
        cast(Tensor, module.bias_ih_l0)[24:48] = 1.0
    found = lyapunov_exponents(module, steps=20, warmup=2)
    half = float(found.exponents[:24].mean())
    exact = math.log(1 / (1 + math.exp(-1)))
    singular = bool((found.exponents[24:] == -math.inf).all())
    return Row(
        "LSTM without weights: half of the exponents are log sigmoid(1), the rest −∞",
        exact,
        half,
        1e-12,
        abs(half - exact) < 1e-9 and singular,
        "the mean of the finite half",
    )


def _close(claim: str, expected: float, measured: float, error: float, tolerance: float) -> Row:
    note = f"within {tolerance:g}"
    return Row(claim, expected, measured, error or None, abs(measured - expected) <= tolerance, note)


# ----------------------------------------------------------------------------------------- figures


def _lorenz_figure(found: LyapunovSpectrum) -> Figure:
    return Figure(
        "Lorenz-63: exponents over a finite time settle",
        partial(_draw_lorenz, found=found),
        caption=(
            "Each curve is the mean over first states of an exponent up to a time, its band the spread of single "
            "trajectories. The mean settles long before any one trajectory does."
        ),
        alt="Three panels of finite-time Lyapunov exponents against time, converging to 0.906, 0 and −14.57.",
        size=(9.2, 3.2),
        key="lorenz",
    )


def _draw_lorenz(canvas: Any, found: LyapunovSpectrum) -> None:
    panels = canvas.subplots(1, 3)
    for i, axes in enumerate(panels):
        values = found.finite_time[:, :, i]
        mean, spread, times = values.mean(1).numpy(), values.std(1).numpy(), found.times.numpy()
        colour = role(("first", "second", "third")[i])
        axes.fill_between(times, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)
        axes.plot(times, mean, color=colour)
        axes.axhline(LORENZ[i], color=role("ink"), linewidth=1.0, linestyle=(0, (4, 3)))
        reach = 3 * float(spread[len(spread) // 4])
        axes.set(
            title=f"$\\lambda_{i + 1}$ = {float(found.exponents[i]):.3f}",
            xlabel="time",
            ylim=(LORENZ[i] - reach, LORENZ[i] + reach),
        )
    panels[0].set_ylabel("exponent per unit of time")


def _network_figure(
    gains: tuple[float, ...], largest: Tensor, width: int, spectra: dict[str, LyapunovSpectrum]
) -> Figure:
    return Figure(
        "Random recurrent networks: the edge of chaos, and the spectra of gated cells",
        partial(_draw_networks, gains=gains, largest=largest, width=width, spectra=spectra),
        caption=(
            "Left: the largest exponent crosses zero at gain 1, where mean field theory says it does. Right: an LSTM "
            "forgets half of its directions within a step, those of its output; the other half, its cell states, and "
            "the directions of a GRU fade over a few steps."
        ),
        alt="Largest exponent over gain against theory; sorted exponents of an LSTM and a GRU.",
        size=(9.2, 3.6),
        key="networks",
    )


def _draw_networks(
    canvas: Any, gains: tuple[float, ...], largest: Tensor, width: int, spectra: dict[str, LyapunovSpectrum]
) -> None:
    left, right = canvas.subplots(1, 2)
    fine = torch.linspace(gains[0], gains[-1], 120).tolist()
    left.plot(fine, [theory(g) for g in fine], color=role("second"), label="theory, infinite width")
    left.errorbar(
        gains,
        largest[:, 0].numpy(),
        yerr=largest[:, 1].numpy(),
        fmt="o",
        color=role("first"),
        label=f"measured, width {width}",
    )
    left.axhline(0.0, color=role("muted"), linewidth=0.8)
    left.set(xlabel="gain g", ylabel="$\\lambda_1$ per step", title="x' = W tanh(x)")
    left.legend(loc="lower right")
    for (name, found), colour, marker in zip(spectra.items(), ("first", "second"), "os", strict=True):
        share = ((torch.arange(found.k) + 0.5) / found.k).numpy()
        right.plot(
            share,
            found.exponents.numpy(),
            marker,
            color=role(colour),
            markersize=4,
            label=f"{name}, {found.size} numbers",
        )
    right.axhline(0.0, color=role("muted"), linewidth=0.8)
    right.set(xlabel="share of the spectrum", ylabel="exponent per step", title="Gated cells under noise")
    right.legend(loc="lower left")
