r"""The symmetric stable law: draws, moments, tails.

    E exp(iuX) = exp(−|u|^α),      0 < α ≤ 2

The sum of n independent draws is n^{1/α} times one draw, so an increment over a time dt is dt^{1/α} times one. α = 2
is the normal law of variance **two**, α = 1 the Cauchy law; below 2 the variance is infinite, at 1 and below the mean
does not exist.

Reference: Chambers, Mallows & Stuck (1976), *A Method for Simulating Stable Random Variables*; Samorodnitsky & Taqqu
(1994), *Stable Non-Gaussian Random Processes*, properties 1.2.15–1.2.17; Zolotarev (1986), *One-Dimensional Stable
Distributions*, for the moments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bolza.ops.errors import ArgumentError

__all__ = ["absolute_moment", "log_moments", "stable_noise", "tail_constant"]

_LARGEST = 709.0  # logarithm beyond which a float is infinite
_BLOCK = 2**15  # numbers made at a time: what they need stays in the cache


def _checked(alpha: float) -> float:
    if not 0 < alpha <= 2:
        raise ArgumentError(f"alpha is {alpha}: the stability index lies in (0, 2]")
    return float(alpha)


def stable_noise(
    shape: Sequence[int],
    alpha: float,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Independent draws of the symmetric α-stable law.

        X = sin(αU) / cos(U)^{1/α} · (cos((1 − α)U) / W)^{(1−α)/α},    U ~ Uniform(−π/2, π/2), W ~ Exp(1)

    Made in float64 whatever the dtype: the tail is that of U and W near the ends of their range, where
    float32 has a lattice of 6e−8.

    Args:
        shape: of the result.
        alpha: stability index α in (0, 2]; 2 gives N(0, 2).
        generator: source of randomness.
        dtype: floating dtype; torch's default.
        device: that of the generator, else the CPU.

    Returns:
        Tensor of that shape. Below α ≈ 0.5 some draws exceed the range of float32 and are infinite.

    Raises:
        ArgumentError: α is not in (0, 2], or the dtype is not of floating point.

    Reference: Chambers, Mallows & Stuck (1976), symmetric case.

    Example:
        >>> x = stable_noise((3, 5), 1.5, generator=torch.Generator().manual_seed(0))
        >>> x.shape, x.dtype
        (torch.Size([3, 5]), torch.float32)
    """
    a = _checked(alpha)
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not dtype.is_floating_point:
        raise ArgumentError(f"dtype is {dtype}: the draws are of floating point")
    place = (
        torch.device(device)
        if device is not None
        else generator.device
        if generator is not None
        else torch.device("cpu")
    )
    if a == 2:
        return torch.randn(tuple(shape), dtype=dtype, device=place, generator=generator).mul_(math.sqrt(2))
    out = torch.empty(tuple(shape), dtype=dtype, device=place)
    block = _BLOCK if place.type == "cpu" else max(out.numel(), 1)
    for part in torch.split(out.view(-1), block):
        part.copy_(_draws(part.numel(), a, generator, place))
    return out


def _draws(count: int, a: float, generator: torch.Generator | None, device: torch.device) -> Tensor:
    u = torch.rand(count, dtype=torch.float64, device=device, generator=generator)
    u.sub_(0.5).mul_(math.pi)
    if a == 1:
        return u.tan_()
    w = torch.rand(count, dtype=torch.float64, device=device, generator=generator)
    w.neg_().log1p_().neg_()
    # (cos((1−α)U)/W)^{(1−α)/α} cos(U)^{−1/α} through one exponential
    scale = (u * (1 - a)).cos_().div_(w).log_().mul_(1 - a)
    scale.sub_(u.cos().log_()).div_(a).exp_()
    return u.mul_(a).sin_().mul_(scale)


def absolute_moment(p: float, alpha: float, *, scale: float = 1.0) -> float:
    r"""Absolute moment E|X|^p of the symmetric stable law.

        E|X|^p = s^p 2^p Γ((1+p)/2) Γ(1 − p/α) / (√π Γ(1 − p/2)),    −1 < p < α;  infinite for p ≥ α below 2

    Args:
        p: order, above −1.
        alpha: stability index α in (0, 2].
        scale: s; the characteristic function is exp(−|su|^α).

    Returns:
        The moment, possibly infinite; also where it is beyond the range of a float.

    Raises:
        ArgumentError: α or p out of range, or the scale is negative.

    Example:
        >>> round(absolute_moment(0.45, 1.5), 4), round(absolute_moment(2, 2), 4), absolute_moment(1.5, 1.5)
        (1.0563, 2.0, inf)
    """
    a = _checked(alpha)
    if not p > -1 or not math.isfinite(p):
        raise ArgumentError(f"p is {p}: moments exist for finite orders above -1")
    if not scale >= 0:
        raise ArgumentError(f"scale is {scale}: it must not be negative")
    if a < 2 and p >= a:
        return math.inf
    if scale == 0:
        return 0.0 if p > 0 else 1.0 if p == 0 else math.inf
    # at α = 2 the two Gammas cancel, poles included
    ratio = 0.0 if a == 2 else math.lgamma(1 - p / a) - math.lgamma(1 - p / 2)
    log = p * math.log(2 * scale) + math.lgamma((1 + p) / 2) + ratio
    return math.exp(log) / math.sqrt(math.pi) if log < _LARGEST else math.inf


def log_moments(alpha: float) -> tuple[float, float]:
    r"""Mean and variance of log|X|, which are finite for every α.

        E log|X| = γ (1/α − 1),    Var log|X| = π²/6 · (1/α² + 1/2)

    Args:
        alpha: stability index α in (0, 2].

    Returns:
        Mean and variance.

    Raises:
        ArgumentError: α is not in (0, 2].

    Example:
        >>> [round(value, 4) for value in log_moments(1.0)]        # Cauchy: 0 and π²/4
        [0.0, 2.4674]
    """
    a = _checked(alpha)
    euler = 0.57721566490153286
    return euler * (1 / a - 1), math.pi**2 / 6 * (1 / a**2 + 0.5)


def tail_constant(alpha: float) -> float:
    r"""Constant of the tail: P(|X| > x) ~ C x^{−α} for large x.

        C = (2/π) Γ(α) sin(πα/2),    zero at α = 2

    Args:
        alpha: stability index α in (0, 2].

    Returns:
        C.

    Raises:
        ArgumentError: α is not in (0, 2].

    Example:
        >>> round(tail_constant(1.0), 4)                           # Cauchy: 2/π
        0.6366
    """
    a = _checked(alpha)
    return 0.0 if a == 2 else 2 / math.pi * math.gamma(a) * math.sin(math.pi * a / 2)
