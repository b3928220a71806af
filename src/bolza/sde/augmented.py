r"""Methods with memory as diffusions of an augmented state: momentum, Nesterov, stale gradients, RMSProp, Adam.

A state has shape (..., parts, d): the position θ, then the velocity or first moment, then the second moment. Each
function gives the drift and the factor of one method, in the letters of its paper; g is the gradient, C the covariance
of the mini-batch gradient.

Reference: Li, Tai & E (2019), *Stochastic Modified Equations and Dynamics of Stochastic Gradient Algorithms I*,
momentum; An, Lu & Ying (2020), asynchronous; Su, Boyd & Candès (2016), Nesterov; Malladi et al. (2022), *On the SDEs
and Scaling Rules for Adaptive Gradient Algorithms*, RMSProp and Adam.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from bolza.sde.fields import Field

__all__ = ["Terms", "adaptive", "asynchronous", "momentum", "nesterov", "sgd"]

Drift: TypeAlias = Callable[[float, Tensor], Tensor]
Factor: TypeAlias = Callable[[float, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Terms:
    """Drift and factor of a method, the number of parts of its state, and the time that one iteration takes."""

    drift: Drift
    factor: Factor
    parts: int
    time_step: float
    velocity: Callable[[Tensor], Tensor] | None = None
    """Velocity at the start from the positions, where it is not zero."""


def _stack(*parts: Tensor) -> Tensor:
    return torch.stack(parts, -2)


def sgd(field: Field, lr: float, scale: float, order: int) -> Terms:
    """Plain descent x ← x − ηg: dX = −∇(f + [η/4 |∇f|²]) dt + (ηC)^{1/2} dW, the bracket in order 2; t = kη."""

    def drift(t: float, x: Tensor) -> Tensor:
        if order == 1:
            return -field.gradient(x)
        g, bent = field.products(x)
        return -g - lr / 2 * bent

    root = math.sqrt(lr * scale)
    return Terms(drift, lambda t, x, xi: root * field.noise(x, xi), 1, lr)


def _heavy(field: Field, lr: float, scale: float, mu: float, order: int, hessian: float) -> Terms:
    r"""Heavy ball and Nesterov differ in the second order only, by the weight of ∇²f Y.

    With h = √η and V = hY a step is V′ = V − h(cV + g), x′ = x + hV′, c = (1 − μ)/h. What the flow of b₀ + h b₁ over h
    agrees with to h³ is b₁ = (first-order rest of the map) − ½ b₀′ b₀; here in Y and t = kη. The noise is part of the
    gradient, so that it enters wherever b₁ has g: on the velocity alone it leaves the spread an error of h of itself.
    """
    friction = (1 - mu) / lr
    pulled = 1 + (1 - mu) / 2 if order == 2 else 1.0  # weight of g/η in dY

    def drift(t: float, z: Tensor) -> Tensor:
        x, y = z.unbind(-2)
        if order == 1:
            return _stack(y, -friction * y - field.gradient(x) / lr)
        g, bent = field.products(x, y)
        dx = (1 + mu) / 2 * y - g / 2
        dy = -friction * pulled * y - pulled / lr * g + hessian * bent
        return _stack(dx, dy)

    root = math.sqrt(scale / lr)

    def factor(t: float, z: Tensor, xi: Tensor) -> Tensor:
        kick = root * field.noise(z[..., 0, :], xi)
        return _stack(torch.zeros_like(kick) if order == 1 else lr / 2 * kick, pulled * kick)

    return Terms(drift, factor, 2, lr)


def momentum(field: Field, lr: float, scale: float, mu: float, order: int) -> Terms:
    r"""Heavy ball v ← μv − ηg, x ← x + v, with Y = v/η, in t = kη.

    dX = Y dt, dY = −(1−μ)/η Y dt − ∇f/η dt + (C/η)^{1/2} dW
    """
    return _heavy(field, lr, scale, mu, order, 0.5)


def nesterov(field: Field, lr: float, scale: float, mu: float | None, order: int) -> Terms:
    """The same with the gradient at x + μv; without μ the schedule (k−1)/(k+2), in t = k√η.

    Scheduled: dX = V dt, dV = −3/(t + 2√η) V dt − ∇f dt + η^{1/4} C^{1/2} dW.
    """
    if mu is not None:
        return _heavy(field, lr, scale, mu, order, 0.5 - mu)
    h = math.sqrt(lr)

    def drift(t: float, z: Tensor) -> Tensor:
        x, v = z.unbind(-2)
        return _stack(v, -3 / (t + 2 * h) * v - field.gradient(x))

    root = math.sqrt(h * scale)

    def factor(t: float, z: Tensor, xi: Tensor) -> Tensor:
        kick = root * field.noise(z[..., 0, :], xi)
        return _stack(torch.zeros_like(kick), kick)

    return Terms(drift, factor, 2, h)


def asynchronous(field: Field, lr: float, scale: float, mu: float) -> Terms:
    """Stale gradients x_{k+1} = x_k − η g(x_{k−τ}), P(τ = j) = (1−μ)μʲ, in t = k √(η(1−μ)).

    dX = Y dt + η^{3/4} (1−μ)^{−1/4} C^{1/2} dW, dY = −∇f dt − √((1−μ)/η) Y dt. The noise is on the position: each
    step draws a sample of its own, and only the mean gradient is smoothed by the delay. Before the start all
    gradients are those of x_0, so that Y(0) = −√(η/(1−μ)) ∇f(x_0). The spread of a gradient over delays is left out.
    """
    friction = math.sqrt((1 - mu) / lr)

    def drift(t: float, z: Tensor) -> Tensor:
        x, y = z.unbind(-2)
        return _stack(y, -field.gradient(x) - friction * y)

    root = lr**0.75 * (1 - mu) ** -0.25 * math.sqrt(scale)

    def factor(t: float, z: Tensor, xi: Tensor) -> Tensor:
        kick = root * field.noise(z[..., 0, :], xi)
        return _stack(kick, torch.zeros_like(kick))

    return Terms(drift, factor, 2, math.sqrt(lr * (1 - mu)), lambda x: -field.gradient(x) / friction)


def adaptive(
    field: Field, lr: float, scale: float, beta1: float | None, beta2: float, eps: float, correct: bool
) -> Terms:
    r"""Adam (θ, m, v), and RMSProp (θ, v), which has no β₁; t = kη, κᵢ = (1 − βᵢ)/η.

        dm = κ₁(∇f − m) dt + κ₁ (ηC)^{1/2} dW,    dv = κ₂(∇f² + diag C − v) dt
        dθ = −m̃/(√ṽ + ε) dt − (1 − β₁)(ηC)^{1/2} dW/(√ṽ + ε)

    m̃ = β₁m + (1 − β₁)∇f and ṽ are the moments as the next step makes them, each divided by 1 − βᵢ^{k+1} where the
    method corrects its bias: the first step is then that of the method, and nothing is 0/0. That v fluctuates is left
    out, its mean E g² = ∇f² + diag C is not.
    """
    b1 = beta1 or 0.0
    kappa1, kappa2 = (1 - b1) / lr, (1 - beta2) / lr

    def grown(beta: float, t: float) -> float:
        return -math.expm1(math.log(beta) * (t / lr + 1)) if correct and beta else 1.0

    kept: list[tuple[float, Tensor, int, tuple[Tensor, Tensor, Tensor]]] = []

    def measured(t: float, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """∇f, E g², and (1 − β₁^{k+1})(√ṽ + ε); drift and factor at one point share them."""
        if kept and kept[0][0] == t and kept[0][1] is z and kept[0][2] == z._version:
            return kept[0][3]
        x, v = z[..., 0, :], z[..., -1, :]
        g = field.gradient(x)
        square = g.square() + scale * field.variance(x)
        new = (beta2 * v + (1 - beta2) * square) / grown(beta2, t)
        below = grown(b1, t) * (new.clamp_min(0).sqrt() + eps)
        kept[:] = [(t, z, z._version, (g, square, below))]
        return g, square, below

    def drift(t: float, z: Tensor) -> Tensor:
        g, square, below = measured(t, z)
        dv = kappa2 * (square - z[..., -1, :])
        if beta1 is None:
            return _stack(-g / below, dv)
        m = z[..., 1, :]
        return _stack(-(b1 * m + (1 - b1) * g) / below, kappa1 * (g - m), dv)

    def factor(t: float, z: Tensor, xi: Tensor) -> Tensor:
        below = measured(t, z)[2]
        kick = math.sqrt(lr * scale) * field.noise(z[..., 0, :], xi)
        step, rest = -(1 - b1) * kick / below, torch.zeros_like(kick)
        return _stack(step, rest) if beta1 is None else _stack(step, kappa1 * kick, rest)

    return Terms(drift, factor, 2 if beta1 is None else 3, lr)
