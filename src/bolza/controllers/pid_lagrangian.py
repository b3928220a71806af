r"""Multipliers of constraints as the output of a PID controller of the violation.

    minimise f(θ)  subject to  c_i(θ) ≤ d_i,          e_i = c_i − d_i
    I ← max(0, I + K_i e),   λ = max(0, K_p ema(e) + I + K_d max(0, ema(c)_t − ema(c)_{t−n}))
    loss = (f + Σ_i λ_i e_i) / (1 + Σ_i λ_i)

Gradient ascent on the multiplier is the integral alone. On min ½ax² − bx subject to x ≤ d, with the gradient step η
and the constraint active, error and integral move by the matrix

    [1 − η(a + K_p) − ηK_i    −η]
    [K_i                       1]

of determinant 1 − η(a + K_p): where it oscillates its modulus is √(1 − η(a + K_p)), and with a = K_p = 0 it oscillates
for ever. Damping is critical where (η(a + K_p) + ηK_i)² = 4ηK_i.

Reference: Stooke, Achiam & Abbeel (2020), arXiv:2007.03964.

Departures: the moving averages start at their first value, not at zero, and there is no derivative on the first step.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bolza.controllers.set_point import SetPoint
from bolza.core.errors import ArgumentError, ShapeError
from bolza.core.reference import Reference, cites
from bolza.ops.pid import PID

__all__ = ["Damping", "PIDLagrangian", "critical_gain", "damping"]

REFERENCE = Reference(
    "stooke2020lagrangian",
    "Stooke, Adam and Achiam, Joshua and Abbeel, Pieter",
    "Responsive Safety in Reinforcement Learning by PID Lagrangian Methods",
    2020,
    venue="International Conference on Machine Learning (ICML)",
    arxiv="2007.03964",
)


@dataclass(frozen=True)
class Damping:
    """How the error of a constrained quadratic dies out.

    Args:
        matrix: map of (error, integral) in one step.
        eigenvalues: its two eigenvalues.
        modulus: the larger of their moduli: below 1 the error dies out, by this factor a step.
        oscillates: whether they are complex.
        period: steps of one oscillation; infinite without one.
    """

    matrix: tuple[tuple[float, float], tuple[float, float]]
    eigenvalues: tuple[complex, complex]
    modulus: float
    oscillates: bool
    period: float


@cites(REFERENCE)
def damping(a: float, kp: float, ki: float, lr: float) -> Damping:
    r"""Eigenvalues of gradient descent on a quadratic whose active constraint has a PI multiplier.

    Args:
        a: curvature of the objective ½ax² − bx.
        kp: K_p.
        ki: K_i per step.
        lr: learning rate η of x.

    Returns:
        Matrix, eigenvalues, modulus, and whether it oscillates.

    Reference: the matrix in this module's text.

    Example:
        >>> [round(damping(0.1, kp, 0.05, 0.05).modulus, 5) for kp in (0.0, 0.5, 1.0, 2.0)]
        [0.9975, 0.98489, 0.97211, 0.96597]
    """
    matrix = ((1 - lr * (a + kp) - lr * ki, -lr), (ki, 1.0))
    trace, determinant = matrix[0][0] + 1.0, 1 - lr * (a + kp)
    discriminant = trace * trace / 4 - determinant
    root = cmath.sqrt(discriminant)
    first, second = trace / 2 + root, trace / 2 - root
    oscillates = discriminant < 0
    period = 2 * math.pi / abs(cmath.phase(first)) if oscillates else math.inf
    return Damping(matrix, (first, second), max(abs(first), abs(second)), oscillates, period)


@cites(REFERENCE)
def critical_gain(a: float, ki: float, lr: float) -> float:
    r"""Proportional gain of critical damping, K_p = 2√(K_i/η) − K_i − a.

    Args:
        a: curvature of the objective along the constrained direction.
        ki: K_i per step, not negative.
        lr: learning rate η, positive.

    Returns:
        K_p; negative where the objective alone damps the oscillation.

    Raises:
        ArgumentError: ``ki`` is negative or ``lr`` not positive.

    Reference: (η(a + K_p) + ηK_i)² = 4ηK_i, from the matrix in this module's text.

    Example:
        >>> round(critical_gain(0.1, ki=0.05, lr=0.05), 12)
        1.85
    """
    if ki < 0 or not lr > 0:
        raise ArgumentError(f"ki={ki!r} must not be negative and lr={lr!r} positive")
    return 2 * math.sqrt(ki / lr) - ki - a


@cites(REFERENCE)
class PIDLagrangian:
    r"""Loss of a constrained problem, its multipliers moved by a PID controller of the violation.

    ``loss = lag(objective, cost)``, then ``loss.backward()``: one call an update.

    Args:
        limit: d, one number, or one a constraint; the costs are held at or below it.
        kp: K_p per unit of violation; damps the oscillation of the integral, see :func:`critical_gain`.
        ki: K_i per unit of violation and step.
        kd: K_d; acts only while the cost rises.
        delay: steps over which the rise is taken.
        smooth: memory of the moving averages of the proportional and the derivative term. Raise it for noisy
            mini-batch costs, set it to 0 where the cost is exact.
        high: greatest multiplier.
        normalise: divide by 1 + Σλ, so that the loss keeps its size; the price is that the objective's step shrinks
            as the multipliers grow.
        initial: multipliers to start from.

    Attributes:
        limit: d, a float64 tensor; it may be set at any time, to as many entries.
        multiplier: λ in force, a tensor with one entry a constraint, or a scalar tensor for a single number.

    Raises:
        ArgumentError: a setting is out of its range.

    Reference: Stooke et al. (2020), arXiv:2007.03964, algorithm 2. Departures: in the module's text.

    Example:
        >>> x = torch.zeros(1, requires_grad=True)
        >>> lag = PIDLagrangian(1.0, kp=1.0, ki=0.05, kd=0.0, smooth=0.0, normalise=False)
        >>> optimizer = torch.optim.SGD([x], lr=0.05)
        >>> for _ in range(600):  # minimise 0.05 x² − 2x, where x may not exceed 1
        ...     optimizer.zero_grad()
        ...     lag(0.05 * x.square().sum() - 2 * x.sum(), x.sum()).backward()
        ...     optimizer.step()
        >>> round(x.item(), 3), round(lag.multiplier.item(), 3)
        (1.0, 1.9)
    """

    def __init__(
        self,
        limit: float | Sequence[float] | Tensor,
        *,
        kp: float = 0.1,
        ki: float = 0.01,
        kd: float = 0.01,
        delay: int = 10,
        smooth: float = 0.95,
        high: float = math.inf,
        normalise: bool = True,
        initial: float = 0.0,
    ) -> None:
        self._limit: Tensor = _limits(limit)
        for name, gain in (("kp", kp), ("ki", ki), ("kd", kd), ("initial", initial)):
            if not gain >= 0:
                raise ArgumentError(
                    f"{name}={gain!r} must not be negative: the multiplier presses the cost down"
                )
        pid = PID(
            kp=kp,
            ki=ki,
            kd=kd,
            low=0.0,
            high=high,
            smooth_p=smooth,
            smooth_d=smooth,
            delay=delay,
            one_sided=True,
            anti_windup="clamp",
        )
        self.normalise = normalise
        self.control = SetPoint(self.limit, pid, initial=initial)

    @property
    def limit(self) -> Tensor:
        """What the costs are held at or below."""
        return self._limit

    @limit.setter
    def limit(self, value: float | Sequence[float] | Tensor) -> None:
        limits = _limits(value)
        if limits.shape != self._limit.shape:
            raise ShapeError(
                f"limit has shape {tuple(limits.shape)}, but there are multipliers of shape {tuple(self._limit.shape)}"
            )
        self._limit = limits

    @property
    def multiplier(self) -> Tensor:
        """The multipliers in force."""
        return torch.as_tensor(self.control.value).expand(self.limit.shape)

    @property
    def history(self) -> Any:
        """Multipliers (``value``), costs (``measurement``), limits and integrals over the run."""
        return self.control.history

    def __call__(
        self,
        objective: Tensor,
        cost: Tensor | Sequence[Tensor],
        measured: Tensor | Sequence[float] | float | None = None,
        *,
        update: bool = True,
    ) -> Tensor:
        """Move the multipliers and return the loss.

        Args:
            objective: f, a scalar to be minimised.
            cost: c, differentiable: a scalar, or one entry a constraint; a list of scalars is stacked.
            measured: what the controller sees, where that is not ``cost`` itself (an episode's cost, a mean over the
                data beside a mini-batch's surrogate).
            update: whether the multipliers move; not for a look at the validation loss.

        Returns:
            (f + Σλ(c − d))/(1 + Σλ), or without the division; the multipliers carry no gradient.

        Raises:
            ShapeError: there are not as many costs as limits.
        """
        c = cost if isinstance(cost, Tensor) else torch.stack(list(cost))
        d = self.limit.to(c.dtype).to(c.device)
        seen = c.detach() if measured is None else torch.as_tensor(measured).detach().to(c)
        for name, values in (("cost", c), ("measured", seen)):
            if values.shape != d.shape:
                raise ShapeError(
                    f"{name} has shape {tuple(values.shape)}, but limit has {tuple(d.shape)}: one entry a constraint"
                )
        if update:
            self.control.target = d if d.ndim else float(self.limit)
            self.control.step(seen)
        weight = self.control.value
        if not isinstance(weight, Tensor):  # a single constraint, or none seen yet
            loss = objective + weight * (c - d).sum()
            return loss / (1 + weight * d.numel()) if self.normalise else loss
        loss = objective + (weight.to(c) * (c - d)).sum()
        return loss / (1 + weight.to(c).sum()) if self.normalise else loss

    def log(self) -> dict[str, float]:
        """Multipliers, costs, limits and integrals; ``name[i]`` where there are several constraints."""
        return self.control.log()

    def state_dict(self) -> dict[str, Any]:
        """Memory of the law, limits and history; the gains are settings."""
        return self.control.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.control.load_state_dict(state_dict)
        self.limit = torch.as_tensor(self.control.target).cpu()


def _limits(value: float | Sequence[float] | Tensor) -> Tensor:
    limits = torch.as_tensor(value).detach().double()
    if not bool(limits.isfinite().all()) or limits.ndim > 1 or limits.numel() == 0:
        raise ArgumentError(f"limit={value!r} must be a finite number, or a list of them, one a constraint")
    return limits
