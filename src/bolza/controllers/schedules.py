r"""Learning rates that decay as a power of the step, and how fast: convex, rough and signal-bearing landscapes.

    η_k = η₀ (1 + (k − k_s)/c)^{−β}     after a first phase of k_s steps at η₀

Noise that the rate multiplies leaves a floor ∝ η, and descent sees only s = ∫η dt. Where noiseless descent goes as
s^{−a}, the loss goes as t^{−min(β, a(1−β))}: the best exponent is β = a/(1 + a), and with exponential descent, a → ∞,
β = 1. The spherical two-spin model (Sherrington–Kirkpatrick) has a = 1, p ≥ 3 spins a = 2/3.

Reference: d'Ascoli, Refinetti & Biroli (2022), *Optimal learning rate schedules in high-dimensional non-convex
optimization problems*.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError
from bolza.core.reference import Reference, cites

__all__ = [
    "PowerDecay",
    "SignalDecay",
    "best_exponent",
    "predicted_exponent",
    "quadratic_mean_square",
    "two_spin_energy",
    "two_spin_run",
]

ASCOLI = Reference(
    "dascoli2022optimal",
    "d'Ascoli, Stéphane and Refinetti, Maria and Biroli, Giulio",
    "Optimal learning rate schedules in high-dimensional non-convex optimization problems",
    2022,
    arxiv="2202.04509",
)


def _power(k: float, beta: float, width: float) -> float:
    return float((1.0 + max(k, 0.0) / width) ** -beta)


@cites(ASCOLI)
@dataclass(frozen=True)
class PowerDecay:
    r"""Decay the rate as a power of the step, η_k = η₀ (1 + (k − k_s)/c)^{−β}, after a phase of constant rate.

    A factor for ``torch.optim.lr_scheduler.LambdaLR``, and a policy for :class:`PolicyScheduler`.

    Args:
        beta: β; 0 keeps the rate, see :func:`best_exponent`.
        start: k_s, steps at the full rate.
        width: c, steps after which the rate has fallen to 2^{−β}.

    Raises:
        ArgumentError: a setting is out of range.

    Reference: d'Ascoli, Refinetti & Biroli (2022).

    Example:
        >>> optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.4)
        >>> scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, PowerDecay(0.5, start=2))
        >>> rates = []
        >>> for _ in range(6):
        ...     rates.append(round(optimizer.param_groups[0]["lr"], 4))
        ...     optimizer.step()
        ...     scheduler.step()
        >>> rates
        [0.4, 0.4, 0.4, 0.2828, 0.2309, 0.2]
    """

    beta: float
    start: int = 0
    width: float = 1.0

    def __post_init__(self) -> None:
        if not self.beta >= 0 or self.start < 0 or not self.width > 0:
            raise ArgumentError(
                f"beta is {self.beta}, start {self.start} and width {self.width}: beta and start must not be negative, "
                "width must be positive"
            )

    def __call__(self, step: int) -> float:
        """Factor of the rate at a step, counted from 0."""
        return _power(step - self.start, self.beta, self.width)

    def init(self) -> dict[str, Any]:
        """No step made, the rate not seen yet."""
        return {"step": 0, "lr": None}

    def update(
        self, state: dict[str, Any], observation: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """Rate of the next step."""
        lr = float(observation["lr"]) if state["lr"] is None else state["lr"]
        step = state["step"] + 1
        return {"step": step, "lr": lr}, {"lr": lr * self(step)}


@cites(ASCOLI)
@dataclass(frozen=True)
class SignalDecay:
    r"""Keep the rate until the loss has dropped off its plateau, then decay it as a power of the step.

    In a rough landscape that hides a signal, a large rate is what finds it; from there on descent is as in a convex
    basin, and η ∝ 1/k is best. What shows the finding is the fall of the loss: the decay starts when the smoothed loss
    is below ``drop`` times its largest value since the start.

    Args:
        beta: β of the decay.
        drop: share of the plateau's loss below which the signal counts as found.
        width: c, steps after which the rate has fallen to 2^{−β}.
        smoothing: weight of the old value in the moving mean of the loss.

    Raises:
        ArgumentError: a setting is out of range, or the loss is not passed to ``step``.

    Reference: d'Ascoli, Refinetti & Biroli (2022), §4. Departure: the time of crossing is seen in the loss, not known.

    Example:
        >>> law = SignalDecay(drop=0.5, width=1.0, smoothing=0.0)
        >>> state, rates = law.init(), []
        >>> for loss in (1.0, 1.1, 0.9, 0.4, 0.3):
        ...     state, action = law.update(state, {"lr": 0.1, "loss": loss})
        ...     rates.append(round(action["lr"], 4))
        >>> rates
        [0.1, 0.1, 0.1, 0.1, 0.05]
    """

    beta: float = 1.0
    drop: float = 0.5
    width: float = 100.0
    smoothing: float = 0.95

    def __post_init__(self) -> None:
        if not self.beta >= 0 or not self.width > 0 or not 0 < self.drop < 1 or not 0 <= self.smoothing < 1:
            raise ArgumentError(
                f"beta is {self.beta}, drop {self.drop}, width {self.width} and smoothing {self.smoothing}: beta must "
                "not be negative, width positive, drop between 0 and 1, smoothing in [0, 1)"
            )

    def init(self) -> dict[str, Any]:
        """Nothing seen, nothing found."""
        return {"step": 0, "lr": None, "loss": None, "plateau": 0.0, "found": None}

    def update(
        self, state: dict[str, Any], observation: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """Smooth the loss, look whether it has dropped; rate of the next step."""
        if "loss" not in observation:
            raise ArgumentError("SignalDecay needs the loss: call step(loss=...)")
        value = float(observation["loss"])
        lr = float(observation["lr"]) if state["lr"] is None else state["lr"]
        if not math.isfinite(value):  # not to be remembered
            return dict(state), {}
        old = value if state["loss"] is None else state["loss"]
        loss = self.smoothing * old + (1 - self.smoothing) * value
        step, plateau, found = state["step"] + 1, max(state["plateau"], loss), state["found"]
        if found is None and loss < self.drop * plateau:
            found = step
        rate = lr if found is None else lr * _power(step - found, self.beta, self.width)
        return {"step": step, "lr": lr, "loss": loss, "plateau": plateau, "found": found}, {"lr": rate}


@cites(ASCOLI)
def best_exponent(a: float) -> float:
    r"""Exponent β of the best decay η ∝ t^{−β} where noiseless descent goes as (∫η)^{−a}: β = a/(1 + a).

    Args:
        a: exponent of descent; 1 for the spherical two-spin model, 2/3 for p ≥ 3 spins, infinity for an exponential
            approach, as in a convex basin.

    Returns:
        β, for which the loss goes as t^{−β}.

    Raises:
        ArgumentError: a is not positive.

    Reference: d'Ascoli, Refinetti & Biroli (2022), §3.

    Example:
        >>> best_exponent(1.0), round(best_exponent(2 / 3), 12), best_exponent(float("inf"))
        (0.5, 0.4, 1.0)
    """
    if not a > 0:
        raise ArgumentError(f"a={a} must be positive: noiseless descent goes as (∫η)^(−a)")
    return 1.0 if math.isinf(a) else a / (1 + a)


@cites(ASCOLI)
def predicted_exponent(beta: float, a: float) -> float:
    r"""Exponent of the loss under η ∝ t^{−β}: loss ∝ t^{−min(β, a(1 − β))}.

    The floor of the noise falls as η, descent as (∫η)^{−a}; the slower of the two is seen. An exponential descent,
    a = ∞, is never the slower one below β = 1; at β = 1 it goes as t^{−2η₀λ}, which needs η₀ > 1/(2λ).

    Args:
        beta: β.
        a: exponent of noiseless descent, see :func:`best_exponent`.

    Returns:
        The exponent, not negative; 0 where the loss stops falling.

    Raises:
        ArgumentError: a is not positive, or beta negative.

    Reference: d'Ascoli, Refinetti & Biroli (2022), §3.

    Example:
        >>> [predicted_exponent(beta, 1.0) for beta in (0.0, 0.25, 0.5, 0.75)]
        [0.0, 0.25, 0.5, 0.25]
    """
    if not a > 0 or not beta >= 0:
        raise ArgumentError(f"a is {a} and beta {beta}: a must be positive, beta not negative")
    if math.isinf(a):
        return beta if beta <= 1 else 0.0
    return min(beta, max(0.0, a * (1 - beta)))


@cites(ASCOLI)
def two_spin_energy(s: Tensor) -> Tensor:
    r"""Energy above the ground state of the spherical two-spin model under gradient flow, after ∫η dt = s.

        e(s) = ½ (2 − d/du log[I₁(2u)/u]) = 1 − I₀(4s)/I₁(4s) + 1/(2s),   u = 2s;       3/(8s) for large s

    a spin, from a random start on the sphere, no noise; the couplings' spectrum is the semicircle on [−2, 2].

    Args:
        s: effective time, positive.

    Returns:
        The energy, in the shape of ``s``, float64.

    Raises:
        ArgumentError: a time is not positive.

    Reference: d'Ascoli, Refinetti & Biroli (2022), appendix, for the model; the closed form follows from the moment
    generating function of the semicircle, I₁(2u)/u.

    Example:
        >>> [round(e, 6) for e in two_spin_energy(torch.tensor([5.0, 20.0])).tolist()]
        [0.074012, 0.018691]
    """
    from scipy.special import ive

    time = torch.as_tensor(s).detach().double().cpu()
    if not bool((time > 0).all()):
        raise ArgumentError(f"s is {time.tolist()}: effective times must be positive")
    x = (4 * time).numpy()
    ratio = torch.as_tensor(ive(0, x) / ive(1, x), dtype=torch.float64)
    return 1 - ratio + 1 / (2 * time)


@cites(ASCOLI)
def quadratic_mean_square(
    beta: Tensor,
    steps: int,
    *,
    lr: float,
    curvature: float = 1.0,
    temperature: float = 1.0,
    square: float = 1.0,
) -> Tensor:
    r"""Mean square in a convex basin after so many steps of η_k = η₀ (k + 1)^{−β}, exactly.

        x ← x − η_k (λx + √(2T) ξ),      E x² ← (1 − η_k λ)² E x² + 2T η_k²

    Args:
        beta: exponents, any shape; all of them are run side by side.
        steps: length of the run.
        lr: η₀.
        curvature: λ.
        temperature: T; the rate multiplies the noise as well as the gradient.
        square: E x² at the start.

    Returns:
        E x² at the end, float64, in the shape of ``beta``.

    Raises:
        ArgumentError: a setting is out of range.

    Reference: d'Ascoli, Refinetti & Biroli (2022), §2.

    Example:
        >>> quadratic_mean_square(torch.tensor([0.5, 1.0]), 1000, lr=1.0) * 1000
        tensor([32.3807,  2.0000], dtype=torch.float64)
    """
    if steps < 1 or not lr > 0 or not curvature > 0 or temperature < 0 or square < 0:
        raise ArgumentError(
            f"steps is {steps}, lr {lr}, curvature {curvature}, temperature {temperature} and square {square}: steps, "
            "lr and curvature must be positive, the others not negative"
        )
    import numpy as np

    exponents = torch.as_tensor(beta).detach().double().cpu().numpy()
    value = np.full(exponents.shape, float(square))
    for first in range(0, steps, 1024):
        k = np.arange(first, min(first + 1024, steps)) + 1.0
        eta = lr * k.reshape(-1, *[1] * exponents.ndim) ** -exponents
        for shrink, add in zip((1 - eta * curvature) ** 2, 2 * temperature * eta**2, strict=True):
            value = shrink * value + add
    return torch.as_tensor(value, dtype=torch.float64)


@cites(ASCOLI)
def two_spin_run(
    beta: Tensor,
    steps: int,
    *,
    lr: float = 0.5,
    temperature: float = 1.0,
    spins: int = 8000,
    record: int = 64,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Langevin descent of the spherical two-spin model in the eigenbasis of its couplings, for several decays at once.

        s ← s + η_k (μ s − √(2T) ξ),   |s|² = N after each step,   η_k = η₀ (k + 1)^{−β}

    with μ the quantiles of the semicircle on [−2, 2]; rotations of the sphere leave the noise as it is, so that the
    eigenbasis loses nothing. The energy a spin above the ground state is ½(μ_max − Σ μ s²/N).

    Args:
        beta: exponents of the decay, ``(m,)``, run side by side.
        steps: length of the run.
        lr: η₀.
        temperature: T; the rate multiplies the noise as well as the gradient.
        spins: N.
        record: number of steps, spaced by equal factors, at which the energy is kept.
        generator: of the start and the noise.

    Returns:
        The steps ``(r,)`` and the energies after them ``(r, m)``, float64.

    Raises:
        ArgumentError: a setting is out of range.

    Reference: d'Ascoli, Refinetti & Biroli (2022), §3. Departure: the spectrum's quantiles, not a drawn matrix.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> times, energies = two_spin_run(torch.tensor([0.0, 0.5]), 200, spins=500, generator=draw)
        >>> energies.shape, bool(energies[-1, 1] < energies[-1, 0])
        (torch.Size([45, 2]), True)
    """
    exponents = torch.as_tensor(beta).detach().double().reshape(-1)
    if steps < 1 or not lr > 0 or temperature < 0 or spins < 2 or record < 2:
        raise ArgumentError(
            f"steps is {steps}, lr {lr}, temperature {temperature}, spins {spins} and record {record}: lr must be "
            "positive, temperature not negative, spins and record at least 2, steps at least 1"
        )
    mu = semicircle_quantiles(spins)
    s = torch.randn(spins, generator=generator, dtype=torch.float32)
    s = (s * (spins**0.5 / s.norm())).repeat(len(exponents), 1)
    drift, top = mu.float(), float(mu.max())
    keep = {round(steps ** (i / (record - 1))) for i in range(record)}
    size = (2 * temperature) ** 0.5
    times, energies = [], []
    noise = torch.empty_like(s[0])
    rates = lr * (torch.arange(steps)[:, None] + 1.0) ** -exponents
    growth = torch.empty_like(s)
    for k in range(steps):
        eta = rates[k].float()[:, None]
        noise.normal_(generator=generator)
        torch.mul(s, drift, out=growth)
        growth.sub_(noise, alpha=size)
        s.addcmul_(eta, growth)
        s.mul_(spins**0.5 / s.norm(dim=1, keepdim=True))
        if k + 1 in keep:
            times.append(k + 1)
            energies.append((top - (mu * s.double().square()).sum(1) / spins) / 2)
    return torch.tensor(times, dtype=torch.float64), torch.stack(energies)


def semicircle_quantiles(count: int) -> Tensor:
    """Quantiles (i + ½)/n of the semicircle on [−2, 2], by inverting its distribution function, float64."""
    import numpy as np

    angle = np.linspace(0.0, np.pi, 20001)  # x = −2 cos φ, F = (φ − sin φ cos φ)/π
    share = (angle - np.sin(angle) * np.cos(angle)) / np.pi
    found = np.interp((np.arange(count) + 0.5) / count, share, angle)
    for _ in range(3):  # Newton; the density vanishes at the ends only
        value = (found - np.sin(found) * np.cos(found)) / np.pi - (np.arange(count) + 0.5) / count
        found -= value / np.maximum(2 * np.sin(found) ** 2 / np.pi, 1e-12)
    return torch.as_tensor(-2 * np.cos(found))
