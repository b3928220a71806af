r"""Residual networks in mean-field theory: moments of the stream, block by block.

    x_{l+1} = x_l + V_l φ(W_l x_l + b_l) + a_l          W: σ_w²/n,  b: σ_b²,  V: σ_v²/n,  a: σ_a²

    q_l = σ_w² p_l + σ_b²                               variance of the pre-activations
    p_{l+1} = p_l + σ_v² E φ(√q_l z)² + σ_a²            mean square of the stream
    γ_{l+1} = γ_l + σ_v² E φ(u)φ(v) + σ_a²              the same of two inputs; c_l = γ_l / p_l
    χ_l = 1 + σ_v² σ_w² E φ'(√q_l z)²                   what a block does to the squared gradient

A tanh stream grows like l and its gradient like exp(O(√l)); a ReLU stream and its gradient both grow by
the factor 1 + σ_v²σ_w²/2 a block, unless σ_v² falls like 1/depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError
from bolza.core.reference import Reference, cites
from bolza.meanfield.activations import resolve_activation

__all__ = ["ResidualOrbit", "residual_map"]

YANG_RESIDUAL = Reference(
    "yang2017residual",
    "Yang, Greg and Schoenholz, Samuel S.",
    "Mean Field Residual Networks: On the Edge of Chaos",
    2017,
    venue="NeurIPS",
    arxiv="1712.08969",
)


@dataclass(frozen=True)
class ResidualOrbit:
    """Moments of a residual network, block by block.

    Args:
        p: mean square of the stream before each block and after the last, ``(depth + 1, *shape)``.
        c: correlation γ/p of two inputs of the same length, ``(depth + 1, *shape)``.
        q: variance of the pre-activations inside each block, ``(depth, *shape)``.
        chi: factor by which each block multiplies the mean square of the gradient on its way back,
            ``(depth, *shape)``.

    Example:
        >>> orbit = residual_map("relu", 2.0, 0.0, depth=3)
        >>> orbit.p.tolist(), orbit.chi.tolist()
        ([1.0, 2.0, 4.0, 8.0], [2.0, 2.0, 2.0])
    """

    p: Tensor
    c: Tensor
    q: Tensor
    chi: Tensor

    @property
    def log_gain(self) -> Tensor:
        """Σ log χ over the first l blocks, l = 0, …, depth: how much the squared gradient grows over them."""
        return torch.cat([torch.zeros_like(self.p[:1]), self.chi.log().cumsum(0)])


@cites(YANG_RESIDUAL)
def residual_map(
    activation: Any,
    weight_var: Tensor | float,
    bias_var: Tensor | float = 0.0,
    *,
    depth: int,
    out_weight_var: Tensor | float | None = 1.0,
    out_bias_var: Tensor | float = 0.0,
    p0: Tensor | float = 1.0,
    c0: Tensor | float = 0.0,
) -> ResidualOrbit:
    r"""Moments of x ← x + V φ(W x + b) + a over ``depth`` blocks, for two inputs of the same length.

    Args:
        activation: anything `resolve_activation` reads.
        weight_var: σ_w² = fan_in · Var(W); all numbers broadcast.
        bias_var: σ_b².
        depth: number of blocks.
        out_weight_var: σ_v² = fan_in · Var(V); ``None`` for x ← x + φ(W x + b), without V.
        out_bias_var: σ_a².
        p0: mean square of the stream at the input.
        c0: correlation of the two inputs.

    Returns:
        A `ResidualOrbit` of float64 tensors.

    Raises:
        ArgumentError: a variance is negative or not finite, or ``c0`` is no correlation.

    Reference: Yang & Schoenholz (2017), full (with V) and reduced (without) residual networks. Departure:
    without V the means of φ add up along the stream; they are counted (they vanish for an odd φ).

    Example:
        >>> orbit = residual_map("tanh", 1.0, 0.05, depth=100, out_weight_var=1 / 100)
        >>> bool(orbit.p[-1] < 2), bool(orbit.chi.prod() < 2.72)   # σ_v² = 1/depth: bounded at any depth
        (True, True)
    """
    act = resolve_activation(activation)
    projected = out_weight_var is not None
    given = {
        "weight_var": weight_var,
        "bias_var": bias_var,
        "out_weight_var": out_weight_var if projected else 1.0,
        "out_bias_var": out_bias_var,
        "p0": p0,
        "c0": c0,
    }
    values = {name: torch.as_tensor(v, dtype=torch.float64).detach().cpu() for name, v in given.items()}
    for name, value in values.items():
        bad = ~torch.isfinite(value) | ((value.abs() > 1) if name == "c0" else (value < 0))
        if bool(bad.any()):
            want = "a correlation in [-1, 1]" if name == "c0" else "finite and not negative"
            raise ArgumentError(f"{name} is {float(value[bad][0]):g}; it must be {want}.")
    w, b, v, a, p, corr = (t.clone() for t in torch.broadcast_tensors(*values.values()))
    gamma, mean = corr * p, torch.zeros_like(p)
    ps, gammas, qs, chis = [p], [gamma], [], []
    for _ in range(depth):
        q = w * p + b
        between = torch.where(q > 0, (w * gamma + b) / q.clamp_min(1e-300), torch.ones_like(q)).clamp(-1, 1)
        cross = act.cross(q, q, between)
        extra = torch.zeros_like(p)
        if not projected:
            step = act.mean(q)
            extra, mean = 2 * mean * step, mean + step
        qs.append(q)
        chis.append(1 + v * w * act.slope(q))
        p, gamma = p + v * act.second(q) + a + extra, gamma + v * cross + a + extra
        ps.append(p)
        gammas.append(gamma)
    stack, empty = torch.stack(ps), p.new_zeros(0, *p.shape)
    correlation = torch.where(
        stack > 0, torch.stack(gammas) / stack.clamp_min(1e-300), torch.ones_like(stack)
    )
    return ResidualOrbit(
        stack,
        correlation.clamp(-1, 1),
        torch.stack(qs) if qs else empty,
        torch.stack(chis) if chis else empty,
    )
