r"""E φ(u)φ(v) and E φ'(u)φ'(v) for whole kernel matrices.

ReLU, leaky ReLU and erf: closed forms, both moments from one angle. Other activations: with s = √q and
θ = arccos c both moments are smooth in (s_u, s_v, θ), at θ = 0 too and for functions with a kink at 0 too
(κ₁ of ReLU is sin θ + (π - θ) cos θ, entire). They are tabulated once a layer, on Chebyshev points in the three
variables that cover the actual range, by the accurate moments of `Activation`; an entry of the kernel then costs a
few dozen multiplications. The size of the dropped and of the last coefficients says what the error is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bolza.meanfield.activations import Activation
from bolza.meanfield.closed_forms import ErfForm, RectifierForm
from bolza.ops.gaussian import pair_expectation

__all__ = ["PairTable", "dual"]

# Degrees of Mehler's series: a jump in φ' makes it converge slowly, and quadrature in the plane dear.
_SMOOTH_DEGREE, _KINKED_DEGREE = 1024, 2048


def dual(
    act: Activation,
    nngp: Tensor,
    second_left: Tensor,
    second_right: Tensor,
    slope: bool,
    roots: Any,
    cache: dict[Any, Any],
) -> tuple[Tensor, Tensor | None]:
    """Moments after an activation, for second moments ``nngp`` before it.

    Args:
        act: the activation.
        nngp: ``(…, n1, n2)``.
        second_left: ``(…, n1, 1)``.
        second_right: ``(…, 1, n2)``.
        slope: whether E φ'φ' is wanted.
        roots: gives the range of the roots of the second moments, for a table.
        cache: keeps the tables.

    Returns:
        E φφ, and E φ'φ' or None.
    """
    if isinstance(act.closed, RectifierForm):
        return _rectifier(act.closed.negative, nngp, second_left, second_right, slope)
    if isinstance(act.closed, ErfForm):
        return _erf(nngp, second_left, second_right, slope)
    c = correlation(nngp, second_left, second_right)
    if act.closed is not None:
        ends = (second_left.double(), second_right.double(), c.double())
        return act.closed.cross(*ends).to(c), act.closed.cross_slope(*ends).to(c) if slope else None
    half = bool((c >= 0).all())
    angle = torch.acos(c)
    left, right = second_left.clamp_min(0).sqrt(), second_right.clamp_min(0).sqrt()
    out = []
    for which in (False, True)[: 1 + slope]:
        out.append(_table(act, which, half, nngp.dtype, roots(), cache)(left, right, angle))
    return out[0], out[1] if slope else None


def _table(
    act: Activation,
    slope: bool,
    half: bool,
    dtype: torch.dtype,
    roots: tuple[float, float],
    cache: dict[Any, Any],
) -> PairTable:
    """The table from the cache, or a new one if that does not cover the range of √q."""
    known, (low, high) = cache.get((slope, half)), roots
    if known is None or low < known.low or high > known.high:
        if known is not None:  # ranges of later inputs are not known yet: leave room for them
            low, high = 0.8 * min(low, known.low), 1.2 * max(high, known.high)
        tol = 1e-12 if dtype == torch.float64 else 1e-7
        known = PairTable.build(act, slope, low, high, math.pi / (2 if half else 1), tol)
        cache[slope, half] = known
    return known


def correlation(nngp: Tensor, second_left: Tensor, second_right: Tensor) -> Tensor:
    """C = K_ab/√(K_aa K_bb), 0 where an input is silent."""
    return (nngp * _inverse_root(second_left)).mul_(_inverse_root(second_right)).clamp_(-1, 1)


def _inverse_root(second: Tensor) -> Tensor:
    return torch.where(second > 0, second.clamp_min(torch.finfo(second.dtype).tiny).rsqrt(), 0.0)


def _rectifier(
    negative: float, nngp: Tensor, left: Tensor, right: Tensor, slope: bool
) -> tuple[Tensor, Tensor | None]:
    """√(q_u q_v)[(1-α)² κ₁/2 + α c] and (1-α)² κ₀/2 + α, from the angle θ = arccos c."""
    if negative == 1:
        return nngp, torch.ones_like(nngp) if slope else None
    half = (1 - negative) ** 2 / 2
    c = correlation(nngp, left, right)
    t = 1 - c  # exact near c = 1, where 1 - c² would not be
    s = (2 - t).mul_(t).sqrt_()
    share = t.copy_(c).acos_().mul_(-half / math.pi).add_(half + negative)  # (1-α)² κ₀/2 + α
    out = s.mul_(half / math.pi).addcmul_(share, c)
    out.mul_(left.clamp_min(0).sqrt()).mul_(right.clamp_min(0).sqrt())
    return out, share if slope else None


def _erf(nngp: Tensor, left: Tensor, right: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
    """2/π arcsin(2K/D) and 4/π (D² - 4K²)^(-1/2), D² = (1+2q_u)(1+2q_v)."""
    root = torch.addcmul((1 + 2 * left) * (1 + 2 * right), nngp, nngp, value=-4)
    root.clamp_min_(1).sqrt_()  # D² - 4K² ≥ 1 + 2q_u + 2q_v
    return (2 / math.pi) * torch.atan2(2 * nngp, root), (4 / math.pi) / root if slope else None


def _moments_on_grid(act: Activation, slope: bool, q: Tensor, c: Tensor) -> Tensor:
    """E φφ, or E φ'φ' with ``slope``, for all pairs of variances ``(m,)`` and all correlations ``(k,)``: (m, m, k).

    One Mehler series of high degree serves all of them; what it leaves out (known by Parseval's identity) is for
    quadrature in the plane.
    """
    degree, tol = (_KINKED_DEGREE, 1e-12) if act.kinks else (_SMOOTH_DEGREE, 1e-13)
    tol = tol if float(q.max()) < 10 else 1e-10  # quadrature for large variances is slow
    f = act.derivative if slope else act.phi
    a = act.coefficients(q, degree, f)
    power = act.slope(q) if slope else act.second(q)
    powers = c ** torch.arange(degree + 1, dtype=torch.float64)[:, None]
    values = (a[:, None] * a) @ powers
    left = (power - a.square().sum(-1)).clamp_min(0)
    size = (power[:, None] * power).sqrt()
    missing = (left[:, None] * left).sqrt()[..., None] * c.abs() ** (degree + 1)
    i, j, k = (missing > tol * size[..., None]).nonzero(as_tuple=True)
    upper = i <= j
    i, j, k = i[upper], j[upper], k[upper]
    if len(i):
        w, kinks = act.width, tuple(kink / act.width for kink in act.kinks)
        exact = pair_expectation(
            lambda u, v: f(w * u) * f(w * v), q[i] / w**2, q[j] / w**2, c[k], kinks, kinks
        )
        values[i, j, k] = exact
        values[j, i, k] = exact
    return values


def _chebyshev_points(n: int, low: float, high: float) -> Tensor:
    x = torch.cos(math.pi * (torch.arange(n, dtype=torch.float64) + 0.5) / n)
    return (low + high) / 2 + (high - low) / 2 * x


def _to_coefficients(values: Tensor, dim: int) -> Tensor:
    """Chebyshev coefficients along one dimension, from values at the Chebyshev points."""
    n = values.shape[dim]
    k = torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi * k[:, None] * (k + 0.5) / n) * (2 / n)
    matrix[0] /= 2
    return torch.tensordot(matrix, values, dims=([1], [dim])).movedim(0, dim)


class PairTable:
    """A polynomial in (√q_u, √q_v, θ) for one of the two moments.

    Args:
        coefficients: Chebyshev coefficients ``(m, m, k)``.
        low: smallest √q.
        high: largest √q.
        reach: largest θ.
        error: estimated largest error relative to the largest value.

    Example:
        >>> from bolza.meanfield import resolve_activation
        >>> table = PairTable.build(resolve_activation("tanh"), False, 0.5, 1.5, math.pi)
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> exact = resolve_activation("tanh").cross(one, one, one.cos())
        >>> bool((table(one, one, one) - exact).abs() < 1e-12), table.error < 1e-10
        (True, True)
    """

    def __init__(self, coefficients: Tensor, low: float, high: float, reach: float, error: float) -> None:
        self.coefficients, self.low, self.high, self.reach = coefficients, low, high, reach
        self.error = error

    @classmethod
    def build(
        cls, act: Activation, slope: bool, low: float, high: float, reach: float, tol: float = 1e-12
    ) -> PairTable:
        """Tabulate E φφ, or E φ'φ' with ``slope``, over √q in [low, high] and θ in [0, reach]."""
        if high - low <= 1e-12 * high:
            low = high
        for m, k in ((12, 40), (24, 64), (36, 112)) if not act.kinks else ((12, 28),):
            m = 1 if low == high else m
            q = _chebyshev_points(m, low, high).square()
            values = _moments_on_grid(act, slope, q, torch.cos(_chebyshev_points(k, 0.0, reach)))
            for dim in range(3):
                values = _to_coefficients(values, dim)
            top = float(values.abs().max())
            last = values[:, :, -2:].norm() + (2 * values[-2:].norm() if m > 1 else 0.0)
            if float(last) <= tol * top:
                break
        # Leave out the high orders that do not matter.
        size = values.abs()
        kept_k = _needed(size.amax((0, 1)), tol * top / 8)
        kept_m = _needed(size.amax((1, 2)), tol * top / 8)
        kept = values[:kept_m, :kept_m, :kept_k].contiguous()
        values[:kept_m, :kept_m, :kept_k] = 0
        error = 0.0 if top == 0 else float(values.norm() + last) / top
        return cls(kept, low, high, reach, error)

    def __call__(self, left: Tensor, right: Tensor, angle: Tensor) -> Tensor:
        """Values for √q ``(…, n1, 1)`` and ``(…, 1, n2)`` and angles ``(…, n1, n2)``."""
        m, k = self.coefficients.shape[1:]
        table = self.coefficients.to(angle)
        x = angle * (4 / self.reach) - 2  # twice the variable of the polynomials, which lies in [-1, 1]
        if m == 1:
            levels: Any = table[0, 0].tolist()
        else:
            a = self._basis(left, m).mT  # (…, n1, m)
            b = self._basis(right.mT, m)  # (…, m, n2)
            levels = [(a @ table[:, :, i]) @ b for i in range(k)]
        before, now = torch.zeros_like(x), torch.zeros_like(x)
        for i in range(k - 1, 0, -1):
            before, now = now, before.neg_().addcmul_(x, now).add_(levels[i])
        return before.neg_().addcmul_(x, now, value=0.5).add_(levels[0])

    def _basis(self, root: Tensor, m: int) -> Tensor:
        """Chebyshev polynomials at √q ``(…, n, 1)``: ``(…, m, n)``."""
        t = ((root.mT - self.low) * (2 / (self.high - self.low)) - 1).clamp(-1, 1)
        rows = [torch.ones_like(t), t]
        for _ in range(2, m):
            rows.append(2 * t * rows[-1] - rows[-2])
        return torch.cat(rows[:m], -2)


def _needed(size: Tensor, tol: float) -> int:
    """How many leading orders to keep so that no later one is larger than ``tol``."""
    large = (size > tol).nonzero()
    return int(large.max()) + 1 if len(large) else 1
