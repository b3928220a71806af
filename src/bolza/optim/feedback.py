r"""The Bellman sweep of one network, for a value function of rank one a sample.

A terminal cost φ whose second derivative is taken as s²·∇φ∇φᵀ has, at every layer, a gradient and a Hessian along
one vector, the costate of that sample, P = ∂φ/∂x. Then two numbers a sample and layer carry the whole sweep,

    V_x = β P,   V_xx = α² P Pᵀ

and no second backward pass is needed. With G the gradient of one sample in the weights of a stage, M their
curvature, and N = Gᵀ M⁻¹ G, the sweep from a stage's end to its beginning is

    t₁ = αβN,  t₂ = α²N,   β ← β − α t₁,  α ← α √(1 − t₂)                 (the exact recursion)
    N ← N/B,   β ← β − α t₁/(1 + t₂),  α ← α/√(1 + t₂)                    (damped)

and the feedback of a deviation δx of the sample's state at the stage's beginning changes the weight with which its
gradient counts from β to β + α·c, c = α P·δx.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Mode", "ValueFactors", "feedback_weights", "value_factors"]

Mode = Literal["damped", "paper"]


@dataclass(frozen=True)
class ValueFactors:
    """Factors of the value function after each stage, V_x = β P and V_xx = α² P Pᵀ.

    Attributes:
        beta: shape ``(T + 1, n)``; row t + 1 belongs to the end of stage t.
        alpha: likewise.
        room: 1 + t₂ of each stage if damped, shape ``(T, n)``; ones otherwise.
    """

    beta: Tensor
    alpha: Tensor
    room: Tensor


def value_factors(norms: Tensor, *, batch: int, scale: float = 0.5, mode: Mode = "damped") -> ValueFactors:
    r"""Run the sweep from the last stage to the first.

    Args:
        norms: N_{t,i} = G_{t,i}ᵀ M_t⁻¹ G_{t,i} of the gradients of single samples (each of its own φ, without the
            1/B of the mean), shape ``(T, n)``.
        batch: B, the samples that M_t was made for; the damped form trusts each of them by 1/B.
        scale: s in V_xx(T) = s² P Pᵀ.
        mode: ``"damped"``, or ``"paper"`` for the exact recursion, where 1 − t₂ is kept from becoming negative.

    Returns:
        ValueFactors.

    Reference: Liu, Chen & Theodorou (2021), arXiv:2002.08809, §3; the damped form is this library's.

    Example:
        >>> factors = value_factors(torch.tensor([[0.0], [0.5]]), batch=1, scale=1.0, mode="paper")
        >>> factors.beta.flatten(), factors.alpha.flatten()
        (tensor([0.5000, 0.5000, 1.0000]), tensor([0.7071, 0.7071, 1.0000]))
    """
    steps, n = norms.shape
    beta, alpha = norms.new_ones(steps + 1, n), norms.new_full((steps + 1, n), scale)
    room = torch.ones_like(norms)
    for t in reversed(range(steps)):
        if mode == "damped":
            t2 = alpha[t + 1].square() * norms[t] / batch
            room[t] += t2
            beta[t] = beta[t + 1] / room[t]
            alpha[t] = alpha[t + 1] * room[t].rsqrt()
        else:
            t2 = alpha[t + 1].square() * norms[t]
            beta[t] = beta[t + 1] * (1 - t2)
            alpha[t] = alpha[t + 1] * (1 - t2).clamp_min(0).sqrt()
    return ValueFactors(beta, alpha, room)


def feedback_weights(
    factors: ValueFactors, t: int, deviation: Tensor | None, mode: Mode = "damped"
) -> Tensor:
    r"""With which weight the gradient of each sample counts in stage ``t``, β + α c.

    Args:
        factors: from :func:`value_factors`.
        t: the stage.
        deviation: P_{t,i} · δx_{t,i}, shape ``(n,)``; ``None`` where the state has not changed.
        mode: damped feedback is c = clip(α P·δx/(1 + t₂), ±1); the paper's is α P·δx.

    Returns:
        Shape ``(n,)``; ones are the plain gradient.

    Example:
        >>> feedback_weights(value_factors(torch.zeros(1, 2), batch=2), 0, torch.tensor([0.4, -9.0]))
        tensor([1.1000, 0.5000])
    """
    weights = factors.beta[t + 1]
    if deviation is None:
        return weights
    c = factors.alpha[t + 1] * deviation
    if mode == "damped":
        c = (c / factors.room[t]).clamp(-1.0, 1.0)
    return weights + c * factors.alpha[t + 1]
