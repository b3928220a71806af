r"""SGD with α-stable noise: the equation, its stationary law, and what heavy tails do to least squares.

    dθ = −∇f(θ) dt + η^{(α−1)/α} σ dL^α,      one step of SGD over dt = η:  θ ← θ − η ∇f + η σ ξ

Along an eigenvalue λ of a quadratic this is an Ornstein–Uhlenbeck process, whose stationary law is again stable, so
that moments, and with them the algorithmic stability of least squares, are closed forms. SGD on least squares makes
such tails by itself, without heavy-tailed data: its step multiplies the error by a random matrix, and the tail index
solves E‖(I − η/b AᵀA) e‖^α = 1.

Reference: Şimşekli, Sagun & Gürbüzbalaban (2019), *A Tail-Index Analysis of Stochastic Gradient Noise in Deep Neural
Networks*, eq. 6; Raj, Barsbey, Gürbüzbalaban, Zhu & Şimşekli (2023), *Algorithmic Stability of Heavy-Tailed
Stochastic Gradient Descent on Least Squares*; Gürbüzbalaban, Şimşekli & Zhu (2021), *The Heavy-Tail Phenomenon in
SGD*, theorem 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from bolza.core.diffusion import Diffusion
from bolza.core.errors import ArgumentError, DivergenceError
from bolza.core.reference import Reference, cites
from bolza.ops.stable_law import absolute_moment, stable_noise
from bolza.sde.block_sums import SIMSEKLI

__all__ = [
    "RegressionTails",
    "inject_stable_noise",
    "least_squares_stability",
    "levy_sgd",
    "regression_tails",
    "stablest_index",
    "stationary_scale",
]

RAJ = Reference(
    key="raj2023algorithmic",
    authors="Raj, Anant and Barsbey, Melih and Gürbüzbalaban, Mert and Zhu, Lingjiong and Şimşekli, Umut",
    title="Algorithmic Stability of Heavy-Tailed Stochastic Gradient Descent on Least Squares",
    year=2023,
    venue="International Conference on Algorithmic Learning Theory",
)
PHENOMENON = Reference(
    key="gurbuzbalaban2021heavy",
    authors="Gürbüzbalaban, Mert and Şimşekli, Umut and Zhu, Lingjiong",
    title="The Heavy-Tail Phenomenon in SGD",
    year=2021,
    venue="International Conference on Machine Learning",
    arxiv="2006.04740",
)


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ArgumentError(f"{name} is {value}: it must be positive")


@cites(SIMSEKLI)
def levy_sgd(
    gradient: Callable[[Tensor], Tensor],
    *,
    lr: float,
    alpha: float,
    scale: float | Tensor | Callable[[Tensor], Tensor] = 1.0,
) -> Diffusion:
    r"""SGD with symmetric α-stable gradient noise as a stochastic equation.

        dθ = −∇f(θ) dt + η^{(α−1)/α} σ dL^α,    t = kη

    Euler steps of dt = lr are SGD itself, θ ← θ − η (∇f − σξ) with ξ of characteristic function exp(−|u|^α).

    Args:
        gradient: θ → ∇f(θ), tensors ``(..., d)``; leading dimensions are paths.
        lr: learning rate η.
        alpha: stability index in (0, 2].
        scale: σ of the gradient noise: a number, one a coordinate, or a function of θ. At α = 2 its variance
            is 2σ².

    Returns:
        Diffusion, for :func:`bolza.core.simulate`.

    Raises:
        ArgumentError: lr is not positive, or α out of range.

    Reference: Şimşekli, Sagun & Gürbüzbalaban (2019), eq. 6.

    Example:
        >>> from bolza.core import simulate
        >>> chain = levy_sgd(lambda x: 2 * x, lr=0.1, alpha=1.5, scale=0.0)
        >>> simulate(chain, torch.ones(1), dt=0.1, steps=2)       # (1 − 0.2)²
        tensor([[0.6400]])
    """
    _positive(lr=lr)
    factor = lr ** ((alpha - 1) / alpha) if alpha > 0 else 1.0
    if alpha == 2:  # Brownian increments have half the variance of the stable law
        factor *= math.sqrt(2)
    if callable(scale):
        return Diffusion(
            lambda t, x: -gradient(x), lambda t, x, noise: factor * scale(x) * noise, alpha=alpha
        )
    return Diffusion(
        lambda t, x: -gradient(x),
        lambda t, x, noise: factor * scale * noise,
        alpha=alpha,
        diagonal=True,
    )


def inject_stable_noise(
    params: Iterable[Tensor],
    alpha: float,
    *,
    scale: float = 1.0,
    generator: torch.Generator | None = None,
) -> None:
    r"""Add α-stable noise to the gradients of a network, in place: Lévy-driven SGD with any optimizer.

        g ← g + σ ξ,    E exp(iuξ) = exp(−|u|^α)

    Call it between ``loss.backward()`` and ``optimizer.step()``. Parameters without a gradient are skipped.

    Args:
        params: the parameters, as for an optimizer.
        alpha: stability index in (0, 2].
        scale: σ ≥ 0.
        generator: source of the noise.

    Raises:
        ArgumentError: α or σ out of range.

    Example:
        >>> weight = torch.zeros(3, requires_grad=True)
        >>> weight.sum().backward()
        >>> inject_stable_noise([weight], 1.5, scale=0.1, generator=torch.Generator().manual_seed(0))
        >>> bool((weight.grad != 1).all())
        True
    """
    if not 0 < alpha <= 2:
        raise ArgumentError(f"alpha is {alpha}: the stability index lies in (0, 2]")
    if not (scale >= 0 and math.isfinite(scale)):
        raise ArgumentError(f"scale is {scale}: it must not be negative")
    for p in params:
        if p.grad is not None:
            noise = stable_noise(p.grad.shape, alpha, generator=generator, dtype=p.grad.dtype)
            p.grad.add_(noise.to(p.grad.device), alpha=scale)


@cites(RAJ)
def stationary_scale(rate: float, alpha: float, *, scale: float = 1.0, lr: float | None = None) -> float:
    r"""Scale of the stable law in which SGD with α-stable noise rests along one curvature.

        s = σ / (αλ)^{1/α}                                       dX = −λX dt + σ dL^α
        s = ησ / (1 − |1 − ηλ|^α)^{1/α}                          x ← x − η(λx − σξ)

    The stationary law has the characteristic function exp(−|su|^α); its absolute moments are
    ``absolute_moment(p, alpha, scale=s)`` of :mod:`bolza.ops.stable_law`.

    Args:
        rate: curvature λ > 0.
        alpha: stability index in (0, 2].
        scale: σ, of a unit of time of the process, or of the gradient noise of the chain.
        lr: learning rate η of the chain; without it, the process in continuous time.

    Returns:
        s.

    Raises:
        ArgumentError: an argument out of range.
        DivergenceError: the chain is unstable, ηλ ≥ 2.

    Reference: Raj et al. (2023), §3. Departure: the exact law of the chain beside that of the process.

    Example:
        >>> from bolza.ops.stable_law import absolute_moment
        >>> s = stationary_scale(2.0, 1.5)
        >>> round(absolute_moment(0.7, 1.5, scale=s), 4)
        0.734
    """
    _positive(rate=rate)
    if not 0 < alpha <= 2:
        raise ArgumentError(f"alpha is {alpha}: the stability index lies in (0, 2]")
    if not (scale >= 0 and math.isfinite(scale)):
        raise ArgumentError(f"scale is {scale}: it must not be negative")
    if lr is None:
        return scale / math.pow(alpha * rate, 1 / alpha)
    _positive(lr=lr)
    kept = math.pow(abs(1 - lr * rate), alpha)
    if kept >= 1:
        raise DivergenceError(f"lr is {lr} at the curvature {rate}: the chain is stable below {2 / rate:.4g}")
    return lr * scale / math.pow(1 - kept, 1 / alpha)


@cites(RAJ)
def least_squares_stability(
    rate: float, other: float, alpha: float, *, p: float = 1.0, scale: float = 1.0
) -> float:
    r"""Algorithmic stability of heavy-tailed SGD on least squares: by how much one datum moves the mean loss.

        | E|X|^p − E|X'|^p | = C(p, α) σ^p | (αλ)^{−p/α} − (αλ')^{−p/α} |

    for the loss |x|^p with p < α (that of the squared loss is infinite as soon as α < 2). λ and λ' are
    the curvatures of the data with and without the datum.

    Args:
        rate: λ, the second moment of the data.
        other: λ', with one datum replaced.
        alpha: stability index of the noise, in (0, 2].
        p: order of the loss, 0 < p < α, or p ≤ 2 at α = 2.
        scale: σ of the noise.

    Returns:
        The gap; infinite for p ≥ α below 2.

    Raises:
        ArgumentError: an argument out of range.

    Reference: Raj et al. (2023), §3, one dimension; the process started from its stationary law.

    Example:
        >>> round(least_squares_stability(1.0, 1.05, 1.5), 4)
        0.0417
        >>> least_squares_stability(1.0, 1.05, 1.5, p=2.0)         # the squared loss
        inf
    """
    _positive(rate=rate, other=other, p=p)
    ends = [stationary_scale(value, alpha, scale=scale) for value in (rate, other)]
    first, second = (absolute_moment(p, alpha, scale=s) for s in ends)
    return math.inf if math.isinf(first) else abs(first - second)


@cites(RAJ)
def stablest_index(rate: float, other: float, *, p: float = 1.0) -> float:
    r"""Stability index of the noise at which one datum matters least: how heavy tails may usefully be.

        argmin over α in (p, 2] of C(p, α) | (αλ)^{−p/α} − (αλ')^{−p/α} |

    2 means that Gaussian noise is the most stable. Heavier tails pay only where λ, the second moment of the
    data, is large in the unit of the noise, and up to this index.

    Args:
        rate: λ.
        other: λ', with one datum replaced.
        p: order of the loss, 0 < p < 2.

    Returns:
        The index; exactly 2 at the end of the range.

    Raises:
        ArgumentError: an argument out of range.

    Reference: Raj et al. (2023), the threshold of heavy-tailedness.

    Example:
        >>> [round(stablest_index(rate, 1.05 * rate), 3) for rate in (50.0, 100.0, 1000.0)]
        [2.0, 1.709, 1.275]
    """
    from scipy import optimize

    _positive(rate=rate, other=other, p=p)
    if rate == other:
        raise ArgumentError(
            f"rate and other are both {rate}: a datum that changes nothing is stable at any index"
        )
    if not p < 2:
        raise ArgumentError(f"p is {p}: below 2 there are heavy tails with a finite mean loss")
    found = optimize.minimize_scalar(
        lambda alpha: math.log(least_squares_stability(rate, other, alpha, p=p)),
        bounds=(p * (1 + 1e-6), 2.0),
        method="bounded",
        options={"xatol": 1e-8},
    )
    gaussian = least_squares_stability(rate, other, 2.0, p=p)
    return 2.0 if gaussian <= math.exp(found.fun) * (1 + 1e-9) else float(found.x)


@dataclass(frozen=True)
class RegressionTails:
    """Tails of SGD on linear regression.

    Attributes:
        index: tail index α of the stationary law, P(‖θ‖ > x) ~ x^{−α}; 0 where there is none.
        variance_limit: learning rate at which the index is 2: above it the variance is infinite.
        stationary_limit: learning rate above which there is no stationary law.
    """

    index: float
    variance_limit: float
    stationary_limit: float


def _log_growth(h: float, b: int, d: int, highest: float) -> tuple[Tensor, Tensor]:
    """log‖(I − h AᵀA) e‖ at the nodes of a quadrature over Gaussian A (b, d), and the logarithms of its weights."""
    import numpy as np

    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(120))

    def chi(freedom: int, start: float, end: float) -> tuple[Tensor, Tensor]:
        """Nodes and log weights for the χ law between two points, crowded at the first."""
        v = (nodes + 1) / 2
        r = start + (end - start) * v**3
        density = (freedom - 1) * r.log() - r * r / 2
        constant = (freedom / 2 - 1) * math.log(2) + math.lgamma(freedom / 2)
        return r, density - constant + (weights / 2 * 3 * abs(end - start) * v * v).log()

    # r = ‖Ae‖, from the zero of 1 − h r² outwards; u = the part of AᵀAe across e, over r
    far = 12 + math.sqrt(2 * highest)
    kink, low, top = 1 / math.sqrt(h), max(0.0, math.sqrt(b) - 12), math.sqrt(b) + far
    pieces = [chi(b, kink, low), chi(b, kink, top)] if low < kink < top else [chi(b, low, top)]
    r, log_weight = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    along = (1 - h * r * r).square()
    if d == 1:
        return along.log() / 2, log_weight
    middle = math.sqrt(d - 1)
    u, log_weight_u = chi(d - 1, max(0.0, middle - 12), middle + far)
    square = along[:, None] + (h * r[:, None] * u).square()
    return square.log().flatten() / 2, (log_weight[:, None] + log_weight_u).flatten()


@lru_cache(maxsize=64)
def _stationary_limit(b: int, d: int) -> float:
    """Learning rate at which the mean logarithm of the growth is zero, for inputs of variance 1."""
    from scipy import optimize

    def lyapunov(rate: float) -> float:
        growth, log_weight = _log_growth(rate / b, b, d, 0.0)
        return float((log_weight.exp() * growth).sum())

    low = 2 * b / (d + b + 1)  # where the second moment is stable it is negative
    if lyapunov(low) >= 0:  # to rounding: they differ by O(d^-2) of themselves
        return low
    high = 2 * low
    while lyapunov(high) < 0:
        high *= 2
    return float(optimize.brentq(lyapunov, low, high, xtol=1e-14 * low))


@cites(PHENOMENON)
def regression_tails(
    lr: float, *, batch_size: int = 1, dim: int = 1, variance: float = 1.0
) -> RegressionTails:
    r"""Tail index that SGD on linear regression gives itself, with Gaussian inputs and no heavy-tailed data.

        θ ← θ − (η/b) Aᵀ(Aθ − y),   A (b, d) of rows N(0, vI):      E‖(I − (η/b) AᵀA) e‖^α = 1
        α = 2 at η = 2b / ((d + b + 1) v)

    The index falls with the learning rate and grows with the batch; it does not depend on the noise of y.

    Args:
        lr: learning rate η.
        batch_size: b, rows drawn anew at every step.
        dim: d, number of inputs.
        variance: v, of each input.

    Returns:
        RegressionTails.

    Raises:
        ArgumentError: an argument out of range.

    Reference: Gürbüzbalaban, Şimşekli & Zhu (2021), theorems 2 and 3. The expectation is a quadrature, no Monte
    Carlo.

    Example:
        >>> [round(regression_tails(lr).index, 3) for lr in (0.5, 2 / 3, 1.0, 1.3)]
        [2.904, 2.0, 1.091, 0.667]
        >>> tails = regression_tails(0.5, batch_size=4, dim=10)
        >>> round(tails.variance_limit, 4), tails.index > 2
        (0.5333, True)
    """
    from scipy import optimize

    _positive(lr=lr, variance=variance)
    if batch_size < 1 or dim < 1:
        raise ArgumentError(f"batch_size is {batch_size} and dim is {dim}: both are at least 1")
    b, d = batch_size, dim

    low = 2 * b / ((d + b + 1) * variance)
    limit = _stationary_limit(b, d) / variance
    if lr >= limit:
        return RegressionTails(0.0, low, limit)

    def log_moments(highest: float) -> Callable[[float], float]:
        """α → log E‖(I − η/b AᵀA) e‖^α for α up to a highest one: convex, zero at 0, negative there after."""
        growth, log_weight = _log_growth(lr * variance / b, b, d, highest)
        log_weight = log_weight - torch.logsumexp(
            log_weight, 0
        )  # the constants of the density lose digits in d
        return lambda alpha: float(torch.logsumexp(alpha * growth + log_weight, 0))

    above = 1.0
    while (moment := log_moments(above))(above) < 0:
        above *= 2
        if above > 2**12:
            return RegressionTails(math.inf, low, limit)
    below = above / 2
    while moment(below) > 0 and below > 1e-9:
        below /= 4
    return RegressionTails(float(optimize.brentq(moment, below, above, xtol=1e-12)), low, limit)
