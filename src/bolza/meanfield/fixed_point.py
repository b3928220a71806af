r"""Fixed points of the length and correlation maps, phase, and depth scales.

    q_{t+1} = σ_w²/ρ E φ(√q_t z)² + σ_b²                     (ρ: probability to keep a unit; 1 without dropout)
    c_{t+1} = (σ_w² E φ(u)φ(v) + σ_b²)/√(q^a_{t+1} q^b_{t+1})

    χ_q = dq_{t+1}/dq_t at q*,   χ_1 = σ_w² E φ'(√q* z)²,   χ_c = σ_w² E φ'(u)φ'(v) at the stable c*
    ξ_q = 1/|log|χ_q||,   ξ_c = 1/|log|χ_c||,   ξ_∇ = 1/|log(χ_1/ρ)|

The equations are solved in brackets, not iterated: at criticality the iteration converges like 1/t.
χ_1 decides the phase, χ_c at the stable c* gives the depth scale: two numbers, two names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bolza.core.errors import ArgumentError
from bolza.core.reference import Reference, cites
from bolza.meanfield.activations import Activation, resolve_activation
from bolza.ops.roots import bracketed_root

__all__ = ["FixedPoint", "correlation_map", "fixed_point", "length_map"]

POOLE = Reference(
    "poole2016exponential",
    "Poole, Ben and Lahiri, Subhaneil and Raghu, Maithra and Sohl-Dickstein, Jascha and Ganguli, Surya",
    "Exponential expressivity in deep neural networks through transient chaos",
    2016,
    venue="NeurIPS",
    arxiv="1606.05340",
)
SCHOENHOLZ = Reference(
    "schoenholz2017deep",
    "Schoenholz, Samuel S. and Gilmer, Justin and Ganguli, Surya and Sohl-Dickstein, Jascha",
    "Deep Information Propagation",
    2017,
    venue="ICLR",
    arxiv="1611.01232",
)
REVIEW = Reference(
    "liu2019review",
    "Liu, Guan-Horng and Theodorou, Evangelos A.",
    "Deep Learning Theory Review: An Optimal Control and Dynamical Systems Perspective",
    2019,
    arxiv="1908.10920",
)

# Variances between which a fixed point is looked for; beyond the upper end it counts as infinite.
_Q_TABLE = torch.logspace(-14, 6, 161, dtype=torch.float64)


@dataclass(frozen=True)
class FixedPoint:
    """What depth does to signals and gradients; every field has the broadcast shape of the inputs.

    Args:
        q: variance of pre-activations that deep layers settle at; ``inf`` if it grows without bound.
        c: correlation of two inputs that deep layers settle at (the stable one).
        chi_q: rate of the variance map at ``q``.
        chi_1: slope of the correlation map at c = 1; below 1 ordered, above 1 chaotic; infinite if the
            activation jumps.
        chi_c: rate of the correlation map at the stable ``c``.
        xi_q: layers in which a deviation of the variance falls by e.
        xi_c: layers in which a deviation of the correlation falls by e; infinite at criticality.
        xi_grad: layers in which the variance of a gradient changes by a factor e.
        regime: ``"ordered"``, ``"critical"`` or ``"chaotic"``: a string for scalar input, else a
            numpy array of strings.
        error: standard error of each number above, by its name, if the activation had to be sampled;
            else empty.

    Example:
        >>> point = fixed_point("tanh", 2.5, 0.05)
        >>> f"{point.q:.6f} {point.c:.6f} {point.chi_1:.6f} {point.xi_c:.4f} {point.regime}"
        '1.063958 0.446804 1.133516 11.7956 chaotic'
    """

    q: Tensor
    c: Tensor
    chi_q: Tensor
    chi_1: Tensor
    chi_c: Tensor
    xi_q: Tensor
    xi_c: Tensor
    xi_grad: Tensor
    regime: Any
    error: dict[str, Tensor] = field(default_factory=dict)


@cites(POOLE, SCHOENHOLZ, REVIEW)
def fixed_point(
    activation: Any,
    weight_var: Tensor | float,
    bias_var: Tensor | float = 0.0,
    *,
    keep_prob: Tensor | float = 1.0,
    q0: Tensor | float = 1.0,
    tol: float = 1e-6,
) -> FixedPoint:
    r"""Fixed point of an infinitely wide, infinitely deep random network, and its stability.

    Args:
        activation: anything `resolve_activation` reads.
        weight_var: σ_w² = fan_in · Var(W), any shape; broadcast with the others.
        bias_var: σ_b².
        keep_prob: ρ, probability that dropout keeps a unit; below 1 no critical point exists.
        q0: variance at the first layer. Where several fixed points exist (GELU, SiLU) the one that
            the map reaches from here is given; at ReLU (2, 0) every q is fixed, and q0 comes back.
        tol: ``regime`` is ``"critical"`` if |χ_1/ρ - 1| ≤ tol.

    Returns:
        A `FixedPoint` of float64 tensors. If the variance grows without bound (ReLU, σ_w² > 2):
        ``q = inf``, the rates are their limits for large q, ``regime`` is ``"chaotic"`` because
        gradients explode, and c = 1: an angle has no chaotic phase there. An activation that draws
        random numbers acts as dropout does: c = 1 is no fixed point, and ``regime`` and ``xi_grad``
        are those of the gradient. One that is sampled brings standard errors along.

    Raises:
        ArgumentError: a variance is negative or not finite, or ``keep_prob`` is not in (0, 1].

    Reference: Poole et al. (2016); Schoenholz et al. (2017), dropout in §5. Departure: c* = 1 exactly
    when χ_1 ≤ 1, and brackets instead of 300 iterations, so ξ_c does diverge at criticality.

    Example:
        >>> diagram = fixed_point("tanh", torch.tensor([1.0, 2.0])[:, None], torch.tensor([0.0, 0.05]))
        >>> diagram.regime.tolist()
        [['critical', 'ordered'], ['chaotic', 'chaotic']]
    """
    act = resolve_activation(activation)
    shape, *inputs = _inputs(weight_var, bias_var, keep_prob, q0)
    values = _solve(act, *inputs)
    error = {}
    if act.replicas:
        copies = [_solve(replica, *inputs) for replica in act.replicas]
        for at, name in enumerate(_FIELDS):
            spread = torch.stack([copy[at] for copy in copies]).std(0) / len(copies) ** 0.5
            error[name] = spread.reshape(shape)
    gain = values[-1]
    regime = np.where((gain - 1).abs() <= tol, "critical", np.where(gain < 1, "ordered", "chaotic"))
    label = regime.reshape(shape) if shape else str(regime[0])
    fields = dict(
        zip(_FIELDS, (v.reshape(shape) for v in values), strict=False)
    )  # the last one made the label
    return FixedPoint(**fields, regime=label, error=error)


_FIELDS = ("q", "c", "chi_q", "chi_1", "chi_c", "xi_q", "xi_c", "xi_grad")


def _solve(act: Activation, weight: Tensor, bias: Tensor, keep: Tensor, start: Tensor) -> list[Tensor]:
    """The fields, and the number that decides the regime."""
    q = _solve_length(act, weight / keep, bias, start)
    finite = torch.isfinite(q)
    inner = torch.where(finite, q, torch.full_like(q, _Q_TABLE[-1].item()))
    # Where q is unbounded, all points share the one variance that stands for it: the costliest of all.
    distinct, place = inner.unique(return_inverse=True)
    chi_q = weight / keep * act.second_rate(distinct)[place]
    gain = weight / keep * act.slope(distinct)[place]
    if act.noisy or act.jumps or act.true_derivative is not None:
        chi_1 = weight * act.correlation_slope(distinct, torch.ones_like(distinct))[place]
    else:
        chi_1 = gain * keep
    c = _solve_correlation(act, weight, bias, keep, inner, chi_1, finite)
    chi_c = chi_1.clone()
    below = c < 1
    if bool(below.any()):
        chi_c[below] = weight[below] * act.correlation_slope(inner[below], c[below])
    xi_c = _scale(chi_c)
    xi_c[~finite] = torch.inf  # at infinite q the normalised map has slope 1 at c = 1: a power law
    verdict = gain if act.noisy else chi_1 / keep
    return [q, c, chi_q, chi_1, chi_c, _scale(chi_q), xi_c, _scale(gain), verdict]


def _inputs(*values: Tensor | float) -> tuple[torch.Size, Tensor, Tensor, Tensor, Tensor]:
    names = ("weight_var", "bias_var", "keep_prob", "q0")
    for name, given in zip(names, values, strict=True):
        if isinstance(given, str) or given is None:
            raise ArgumentError(f"{name} is {given!r}; give a number or a tensor.")
    tensors = [torch.as_tensor(v, dtype=torch.float64).detach().cpu() for v in values]
    for name, value in zip(names, tensors, strict=True):
        bad = ~torch.isfinite(value) | (value < 0)
        if bool(bad.any()):
            raise ArgumentError(f"{name} is {value[bad][0]}; a variance must be finite and not negative.")
    if bool(((tensors[2] <= 0) | (tensors[2] > 1)).any()):
        raise ArgumentError(f"keep_prob is {values[2]}; it must lie in (0, 1], 1 without dropout.")
    try:
        full = torch.broadcast_tensors(*tensors)
    except RuntimeError as error:
        shapes = {n: tuple(t.shape) for n, t in zip(names, tensors, strict=True)}
        raise ArgumentError(f"these shapes do not broadcast: {shapes}.") from error
    weight, bias, keep, start = (t.reshape(-1) for t in full)
    return full[0].shape, weight, bias, keep, start


def _scale(chi: Tensor) -> Tensor:
    """1/|log|χ||, infinite where χ is 1 to rounding."""
    rate = torch.log1p(chi.abs() - 1).abs()
    return torch.where(rate < 2e-15, torch.inf, 1 / rate)


def _solve_length(act: Activation, weight: Tensor, bias: Tensor, start: Tensor) -> Tensor:
    """The fixed point of q ← weight·E φ² + bias that the monotone orbit from ``start`` reaches."""
    if act.scale_free:  # a line: bias + slope q
        slope = weight * act.slope(torch.ones_like(weight))
        # σ_w² stored in floating point: a slope within rounding of 1 is 1.
        one = (slope - 1).abs() < 1e-14
        q = torch.where(slope < 1, bias / (1 - slope), torch.full_like(bias, torch.inf))
        q = torch.where((bias == 0) & (slope > 1) & (start == 0), torch.zeros_like(q), q)
        return torch.where(one, torch.where(bias > 0, torch.inf, start), q)
    table = act.second(_Q_TABLE)
    drift = weight[:, None] * table + bias[:, None] - _Q_TABLE  # (n, table)
    up = weight * act.second(start) + bias - start > 0
    knots = torch.arange(len(_Q_TABLE))
    # Going up: the first knot above the start where the drift is not positive; going down: mirrored.
    last = len(_Q_TABLE) - 1
    stop_up = torch.where((_Q_TABLE > start[:, None]) & (drift <= 0), knots, last + 1).min(-1).values
    stop_down = torch.where((_Q_TABLE < start[:, None]) & (drift >= 0), knots, -1).max(-1).values
    unbounded = up & (stop_up > last)
    vanishing = ~up & (stop_down < 0)
    high_up = _Q_TABLE[stop_up.clamp_max(last)]
    low_up = torch.maximum(_Q_TABLE[(stop_up - 1).clamp(0, last)], start).minimum(high_up)
    low_down = _Q_TABLE[stop_down.clamp_min(0)]
    high_down = torch.minimum(_Q_TABLE[(stop_down + 1).clamp_max(last)], start).maximum(low_down)
    low, high = torch.where(up, low_up, low_down), torch.where(up, high_up, high_down)
    solve = ~(unbounded | vanishing)
    q = torch.where(unbounded, torch.inf, 0.0).to(torch.float64)
    w, b = weight[solve], bias[solve]
    if len(w):
        # In units of q: near criticality without bias, q* is small and only the ratio keeps its digits.
        root = bracketed_root(
            lambda x, i: (w[i] * act.second(x) + b[i]) / x - 1, low[solve], high[solve], rtol=1e-15
        )
        q[solve] = root
    # Below the table: a network without bias at or below criticality sends every signal to zero.
    lost = vanishing & (bias > 0)
    q[lost] = bias[lost]
    return q


def _solve_correlation(
    act: Activation, weight: Tensor, bias: Tensor, keep: Tensor, q: Tensor, chi_1: Tensor, finite: Tensor
) -> Tensor:
    """The stable c*: 1 if χ_1 ≤ 1 without dropout, else the root of the secant slope, or of C(c) = c."""
    c = torch.ones_like(q)
    plain = (keep == 1) & (not act.noisy)
    chaotic = plain & (chi_1 > 1) & finite & (q > 0)
    if act.scale_free:
        chaotic &= False  # σ_b² = 0 and the slope is 1 at c = 1: angles always close
    index = chaotic.nonzero().squeeze(1)
    if len(index):
        c[index] = _secant_root(act, weight[index], q[index])
    index = (~plain & finite & (q > 0)).nonzero().squeeze(1)
    if len(index):
        w, b, v = weight[index], bias[index], q[index]

        def residual(x: Tensor, i: Tensor) -> Tensor:
            return (w[i] * act.cross(v[i], v[i], x) + b[i]) / v[i] - x

        c[index] = bracketed_root(residual, torch.zeros_like(w), torch.ones_like(w))
    return c


def _secant_root(act: Activation, weight: Tensor, q: Tensor) -> Tensor:
    """Root of σ_w² [E φ² - E φφ(c)] / (q(1-c)) = 1, which C(c) = c becomes after dividing by 1-c.

    The left side rises from c = 0 to χ_1 at c = 1, so near criticality nothing cancels. With Mehler
    coefficients a_k it is σ_w²/q Σ a_k² (1 + c + … + c^{k-1}).
    """
    out = torch.empty_like(q)
    todo = torch.ones_like(q, dtype=torch.bool)
    if act.closed is None or act.analytic:
        power = act.second(q)
        for degree in (48, 128, 320) if act.analytic else (512,):
            index = todo.nonzero().squeeze(1)
            squares = act.coefficients(q[index], degree).square()
            # What lies beyond the degree: its sum by Parseval (to rounding), its fall by the last terms.
            left = (power[index] - squares.sum(-1)).clamp_min(0)
            left = torch.where(left > 1e-13 * power[index], left, squares[:, -degree // 8 :].sum(-1))
            root = _series_root(squares, left, weight[index] / q[index])
            share = torch.minimum(1 / (1 - root), torch.full_like(root, degree))
            good = left * root**degree * share <= 1e-14 * power[index]
            done = index[good]
            out[done] = root[good]
            todo[done] = False
            if not bool(todo.any()):
                return out
    w, v = weight[todo], q[todo]

    def excess(x: Tensor, i: Tensor) -> Tensor:
        return w[i] * act.half_distance(v[i], x) / (v[i] * (1 - x)) - 1

    out[todo] = bracketed_root(excess, torch.zeros_like(v), torch.full_like(v, 1 - 1e-9), rtol=1e-12)
    return out


def _series_root(squares: Tensor, left: Tensor, ratio: Tensor) -> Tensor:
    """Root c of ratio · Σ_j c^j T_j = 1, T_j = Σ_{k>j} a_k²; rows of ``squares`` are a_k², ``left`` the rest."""
    tails = squares.flip(-1).cumsum(-1).flip(-1)[:, 1:] + left[:, None]
    tails = (tails * ratio[:, None]).T.contiguous()
    cache: list[Tensor] = [torch.arange(len(ratio)), tails]

    def excess(x: Tensor, i: Tensor) -> Tensor:
        if len(i) != len(cache[0]):
            cache[:] = [i, tails[:, i].contiguous()]
        total = torch.zeros_like(x)
        for row in cache[1].flip(0):
            total = torch.addcmul(row, total, x)
        return total - 1

    return bracketed_root(excess, torch.zeros_like(ratio), torch.full_like(ratio, 1 - 1e-15), rtol=1e-15)


def length_map(
    activation: Any,
    weight_var: Tensor | float,
    bias_var: Tensor | float,
    q0: Tensor | float,
    depth: int,
    *,
    keep_prob: Tensor | float = 1.0,
) -> Tensor:
    r"""Variances q_0, …, q_depth of q_{t+1} = σ_w²/ρ E φ(√q_t z)² + σ_b².

    Args:
        activation: anything `resolve_activation` reads.
        weight_var: σ_w², broadcast with ``bias_var``, ``q0`` and ``keep_prob``.
        bias_var: σ_b².
        q0: variance to start from.
        depth: number of layers.
        keep_prob: ρ of dropout.

    Returns:
        Float64 tensor ``(depth + 1, *shape)``.

    Example:
        >>> [round(float(q), 4) for q in length_map("relu", 1.0, 0.5, 3.0, 3)]
        [3.0, 2.0, 1.5, 1.25]
    """
    act = resolve_activation(activation)
    shape, weight, bias, keep, q = _inputs(weight_var, bias_var, keep_prob, q0)
    orbit = [q]
    for _ in range(depth):
        orbit.append(weight / keep * act.second(orbit[-1]) + bias)
    return torch.stack(orbit).reshape(depth + 1, *shape)


def correlation_map(
    activation: Any,
    weight_var: Tensor | float,
    bias_var: Tensor | float,
    q_a: Tensor | float,
    q_b: Tensor | float,
    c: Tensor | float,
    depth: int,
    *,
    keep_prob: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Variances and correlation of two inputs, layer by layer: (q^a_t, q^b_t, c_t), t = 0, …, depth.

    Args:
        activation: anything `resolve_activation` reads.
        weight_var: σ_w²; all numbers broadcast.
        bias_var: σ_b².
        q_a: variance of the first input at layer 0.
        q_b: variance of the second one.
        c: their correlation at layer 0.
        depth: number of layers.
        keep_prob: ρ of dropout, with masks independent between the inputs.

    Returns:
        Three float64 tensors ``(depth + 1, *shape)``.

    Example:
        >>> *_, c = correlation_map("relu", 2.0, 0.0, 1.0, 1.0, 0.0, 3)
        >>> [round(float(x), 6) for x in c]
        [0.0, 0.31831, 0.493731, 0.604826]
    """
    act = resolve_activation(activation)
    values = [torch.as_tensor(v, dtype=torch.float64) for v in (weight_var, bias_var, keep_prob, q_a, q_b, c)]
    weight, bias, keep, qa, qb, corr = (v.clone() for v in torch.broadcast_tensors(*values))
    if bool((corr.abs() > 1).any()):
        raise ArgumentError(f"c is {c}; a correlation lies in [-1, 1].")
    orbit = [(qa, qb, corr)]
    for _ in range(depth):
        cross = weight * act.cross(qa, qb, corr) + bias
        qa = weight / keep * act.second(qa) + bias
        qb = weight / keep * act.second(qb) + bias
        corr = (cross / (qa * qb).sqrt()).clamp(-1, 1)
        orbit.append((qa, qb, corr))
    first, second, third = (torch.stack(t) for t in zip(*orbit, strict=True))
    return first, second, third
