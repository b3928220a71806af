r"""The critical line χ_1 = 1 between order and chaos, parametrised by the variance q on it.

    σ_w²(q) = 1/E φ'(√q z)²,     σ_b²(q) = q - σ_w²(q) E φ(√q z)²

Without bias a smooth odd activation is critical at q = 0, σ_w² = 1/φ'(0)². For an activation that draws
random numbers this is where the gradient keeps its size; its correlations have no critical point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError
from bolza.core.reference import cites
from bolza.meanfield.activations import Activation, resolve_activation
from bolza.meanfield.fixed_point import POOLE, SCHOENHOLZ
from bolza.ops.roots import bracketed_root

__all__ = ["CriticalLine", "critical_line", "critical_weight_var"]

_Q_SCAN = torch.logspace(-12, 5, 137, dtype=torch.float64)


@dataclass(frozen=True)
class CriticalLine:
    """Points with χ_1 = 1.

    Args:
        q: variance of the pre-activations there.
        weight_var: σ_w².
        bias_var: σ_b²; negative where no network has this ``q`` and χ_1 = 1.

    Example:
        >>> line = critical_line("erf", q=0.5)
        >>> f"{line.weight_var:.6f} {line.bias_var:.7f}"
        '1.360350 0.0465502'
    """

    q: Tensor
    weight_var: Tensor
    bias_var: Tensor


@cites(POOLE, SCHOENHOLZ)
def critical_line(
    activation: Any, *, q: Tensor | float | None = None, bias_var: Tensor | float | None = None
) -> CriticalLine:
    """Points of the critical line, given the variance on it or the variance of the biases.

    Args:
        activation: anything `resolve_activation` reads.
        q: variances of the pre-activations, any shape; or
        bias_var: σ_b², any shape. Give one of the two.

    Returns:
        The points, float64.

    Raises:
        ArgumentError: not exactly one of ``q`` and ``bias_var`` is given, one is negative, or no
            critical point has this ``bias_var`` (ReLU: only σ_b² = 0, where every q will do, and
            q = 1 is returned).

    Example:
        >>> line = critical_line("tanh", bias_var=torch.tensor([0.01, 0.05]))
        >>> [round(float(v), 6) for v in line.weight_var]
        [1.424205, 1.760955]
    """
    act = resolve_activation(activation)
    if (q is None) == (bias_var is None):
        raise ArgumentError("critical_line needs either q or bias_var, and not both.")
    if q is None:
        q = _q_of_bias(act, torch.as_tensor(bias_var, dtype=torch.float64).detach().cpu())
        weight, _ = _point(act, q)
        return CriticalLine(q, weight, torch.as_tensor(bias_var, dtype=torch.float64).detach().cpu())
    q = torch.as_tensor(q, dtype=torch.float64).detach().cpu()
    if bool(((q < 0) | ~torch.isfinite(q)).any()):
        raise ArgumentError(f"q is {q}; a variance must be finite and not negative.")
    return CriticalLine(q, *_point(act, q))


@cites(POOLE, SCHOENHOLZ)
def critical_weight_var(activation: Any, bias_var: Tensor | float = 0.0) -> Tensor:
    """σ_w² at which χ_1 = 1 for given σ_b².

    Args:
        activation: anything `resolve_activation` reads.
        bias_var: σ_b², any shape.

    Returns:
        Float64 tensor of the shape of ``bias_var``.

    Raises:
        ArgumentError: no critical point has this ``bias_var``.

    Example:
        >>> print(f"{critical_weight_var('tanh', 0.05):.6f}")
        1.760955
    """
    return critical_line(activation, bias_var=bias_var).weight_var


def _point(act: Activation, q: Tensor) -> tuple[Tensor, Tensor]:
    weight = 1 / act.slope(q)
    return weight, q - weight * act.second(q)


def _q_of_bias(act: Activation, bias: Tensor) -> Tensor:
    """Smallest q on the critical line with this σ_b² at which the variance itself is stable."""
    if bool(((bias < 0) | ~torch.isfinite(bias)).any()):
        raise ArgumentError(f"bias_var is {bias}; a variance must be finite and not negative.")
    target = bias.reshape(-1)
    if act.jumps:
        raise ArgumentError(
            f"{act.name} has no critical point: where it jumps, inputs however close are torn apart (χ_1 is "
            "infinite at any weight_var)."
        )
    if act.scale_free:
        if bool((target > 0).any()):
            raise ArgumentError(
                f"{act.name} has no critical point with bias_var = {float(target.max()):g}: its variance "
                f"stays bounded only at bias_var = 0, weight_var = {float(_point(act, torch.ones(()))[0]):g}."
            )
        return torch.ones_like(bias)
    weight, offset = _point(act, _Q_SCAN)
    stable = weight * act.second_rate(_Q_SCAN) < 1 + 1e-13
    gap = offset - target[:, None]
    crossing = (gap[:, :-1] * gap[:, 1:] <= 0) & (stable[:-1] | stable[1:])
    # Without bias, a critical point of φ with φ(0) = 0 sits at q = 0, if small signals do not grow.
    origin = (target == 0) & stable[0] & (offset[0].abs() <= 1e-6 * _Q_SCAN[0] ** 0.5)
    first = torch.where(crossing, torch.arange(crossing.shape[1]), crossing.shape[1]).min(-1).values
    missing = (first == crossing.shape[1]) & ~origin
    if bool(missing.any()):
        raise ArgumentError(
            f"{act.name} has no critical point with bias_var = {float(target[missing][0]):g} and a stable "
            f"variance; on its critical line bias_var lies between {float(offset[stable].min()):g} and "
            f"{float(offset[stable].max()):g}."
            if bool(stable.any())
            else f"{act.name} has no critical point with a stable variance."
        )
    q = torch.zeros_like(target)
    go = (~origin).nonzero().squeeze(1)
    if len(go):
        at = first[go]

        def residual(x: Tensor, i: Tensor) -> Tensor:
            return (_point(act, x)[1] - target[go][i]) / x

        q[go] = bracketed_root(residual, _Q_SCAN[at], _Q_SCAN[at + 1])
    return q.reshape(bias.shape)
