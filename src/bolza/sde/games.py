r"""Two players in training, such as the networks of a generative adversarial network, as a stochastic equation.

    b(z) = (−∂_θ ℓ_G, −∂_ω ℓ_D),   z = (θ, ω);      L(z) v = (∂_ω b_θ v_ω, 0)
    simultaneous   z ← z + η (b(z) + noise)           alternating   ω first, then θ against the new ω

    order 1      dz = b dt + √η Σ^{1/2} dW
    order 2      dz = (b − (η/2) (Db) b) dt + √η Σ^{1/2} dW                                  simultaneous
                 dz = (b − (η/2) (Db) b + η L b) dt + √η (I + η L) Σ^{1/2} dW                alternating

in the time t = kη. The equations hold over a fixed time as η → 0; linear games are solved exactly beside them.

Reference: Cao & Guo (2020), *SDE approximations of GANs training and its long-run behavior*.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.func import jvp

from bolza.core.diffusion import Diffusion
from bolza.core.errors import ArgumentError, ShapeError
from bolza.core.reference import Reference, cites
from bolza.ops.lyapunov import continuous_lyapunov, discrete_lyapunov

__all__ = [
    "CAO",
    "FluctuationDissipation",
    "Game",
    "LinearGame",
    "game_fluctuation_dissipation",
    "game_sde",
    "game_step",
    "linear_game",
]

Mode = Literal["simultaneous", "alternating"]
Noise: TypeAlias = float | Tensor | Callable[[Tensor, Tensor], Tensor]
_BLOCKS = 20
_EDGE = 1e-10  # closer than this to marginal stability nothing is stationary

CAO = Reference(
    "cao2020sde",
    "Cao, Haoyang and Guo, Xin",
    "SDE approximations of GANs training and its long-run behavior",
    2020,
    arxiv="2006.02047",
)


@dataclass(frozen=True)
class Game:
    """Two players: a field of velocities, and where the numbers of the second one begin.

    Args:
        field: z ↦ b(z) on ``(..., d)``: what each player adds to its parameters, per unit of learning rate.
        split: numbers of the first player (the generator); the rest belong to the second.
        noise: covariance Σ of the noise in b: σ², a diagonal ``(d,)``, a matrix ``(d, d)``, or (z, ξ) ↦ Σ(z)^{1/2} ξ.
        noise_shape: z ↦ shape of ξ, for a function; the shape of z by default.

    Attributes:
        noise_product: (z, ξ) ↦ Σ^{1/2} ξ.

    Raises:
        ArgumentError: ``split`` is not positive.
    """

    field: Callable[[Tensor], Tensor]
    split: int
    noise: Noise = 0.0
    noise_shape: Callable[[Tensor], tuple[int, ...]] = lambda z: tuple(z.shape)
    noise_product: Callable[[Tensor, Tensor], Tensor] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the split, and take the root of a covariance once."""
        if self.split < 1:
            raise ArgumentError(f"split is {self.split}: the first player needs a parameter at least")
        object.__setattr__(self, "noise_product", _root(self.noise))


def _root(noise: Noise) -> Callable[[Tensor, Tensor], Tensor]:
    """(z, ξ) ↦ Σ^{1/2} ξ."""
    if callable(noise):
        return noise
    if isinstance(noise, Tensor) and noise.ndim == 2:
        values, vectors = torch.linalg.eigh(noise)
        if float(values[0]) < -1e-8 * float(values[-1].abs()):
            raise ArgumentError(
                f"noise has the eigenvalue {float(values[0]):.3g}: a covariance has none below zero"
            )
        root = vectors * values.clamp_min(0).sqrt()
        return lambda z, xi: xi @ root.to(xi).T
    scale = torch.as_tensor(noise, dtype=torch.float64)
    if scale.ndim > 1 or bool((scale < 0).any()):
        raise ArgumentError(
            f"noise is {noise!r}: give a variance, one for each parameter, a covariance matrix, or a function"
        )
    return lambda z, xi: scale.sqrt().to(xi) * xi


def _answer(game: Game, z: Tensor, v: Tensor) -> Tensor:
    """L v: what the first player's velocity gains when the second moves by v."""
    moved = torch.cat([torch.zeros_like(v[..., : game.split]), v[..., game.split :]], -1)
    change = jvp(game.field, (z,), (moved,))[1]
    return torch.cat([change[..., : game.split], torch.zeros_like(v[..., game.split :])], -1)


def _check(lr: float, mode: str, batch_size: int = 1) -> None:
    if not lr > 0 or batch_size < 1 or mode not in ("simultaneous", "alternating"):
        raise ArgumentError(
            f"lr is {lr}, batch_size {batch_size} and mode {mode!r}: both numbers must be positive, and mode is "
            "'simultaneous' or 'alternating'"
        )


@cites(CAO)
def game_sde(
    game: Game, *, lr: float, mode: Mode = "simultaneous", order: Literal[1, 2] = 1, batch_size: int = 1
) -> Diffusion:
    r"""Modified equation of two players who train by stochastic gradients.

    The two orders of play have the same equation at order 1, and part at order 2: what makes simultaneous play unstable
    is the term −(η/2)(Db)b, which for a bilinear game pushes outwards at the rate η/2 · |z|; alternating cancels it.

    Args:
        game: the players, as fields or from :func:`network_game`.
        lr: learning rate η of both.
        mode: ``"simultaneous"``, or ``"alternating"``: the second player moves first.
        order: weak order of the approximation over a fixed time; states are ``(..., d)``.
        batch_size: B; the noise covariance is Σ/B.

    Returns:
        Diffusion, for :func:`bolza.core.simulate`.

    Raises:
        ArgumentError: ``lr``, ``batch_size``, ``mode`` or ``order`` out of range.

    Reference: Cao & Guo (2020). Departures: one rate for both players; at order 2 the noise of the second player
    reaches the first through (I + η L), which alters the covariance of a step by O(η³) only.

    Example:
        >>> bilinear = Game(lambda z: torch.stack([-z[..., 1], z[..., 0]], -1), split=1)
        >>> z = torch.tensor([1.0, 0.0])
        >>> game_sde(bilinear, lr=0.1, order=2).drift(0.0, z)              # outwards by η/2
        tensor([0.0500, 1.0000])
        >>> game_sde(bilinear, lr=0.1, order=2, mode="alternating").drift(0.0, z)
        tensor([-0.0500,  1.0000])
    """
    _check(lr, mode, batch_size)
    if order not in (1, 2):
        raise ArgumentError(f"order is {order}: choose 1 or 2")
    scale = math.sqrt(lr / batch_size)

    def drift(t: float, z: Tensor) -> Tensor:
        if order == 1:
            return game.field(z)
        b = game.field(z)
        out = b - lr / 2 * jvp(game.field, (z,), (b,))[1]
        return out if mode == "simultaneous" else out + lr * _answer(game, z, b)

    def factor(t: float, z: Tensor, xi: Tensor) -> Tensor:
        noise = game.noise_product(z, xi)
        if order == 2 and mode == "alternating":
            noise = noise + lr * _answer(game, z, noise)
        return scale * noise

    return Diffusion(drift=drift, factor=factor, noise_shape=game.noise_shape)


@cites(CAO)
def game_step(
    game: Game, z: Tensor, lr: float, mode: Mode = "simultaneous", noise: Tensor | None = None
) -> Tensor:
    """One step of both players.

    Args:
        game: the players.
        z: parameters ``(..., d)``.
        lr: η.
        mode: order of play; alternating moves the second player first.
        noise: what the gradients are off by, of the shape of z.

    Example:
        >>> bilinear = Game(lambda z: torch.stack([-z[..., 1], z[..., 0]], -1), split=1)
        >>> game_step(bilinear, torch.tensor([1.0, 0.0]), 0.5), game_step(bilinear, torch.ones(2), 0.5, "alternating")
        (tensor([1.0000, 0.5000]), tensor([0.2500, 1.5000]))
    """
    n = game.split
    b = game.field(z) if noise is None else game.field(z) + noise
    if mode == "simultaneous":
        return z + lr * b
    second = z[..., n:] + lr * b[..., n:]
    first = game.field(torch.cat([z[..., :n], second], -1))[..., :n]
    if noise is not None:
        first = first + noise[..., :n]
    return torch.cat([z[..., :n] + lr * first, second], -1)


@dataclass(frozen=True)
class LinearGame:
    """Exact moments of a linear game b(z) = M z with constant noise.

    Attributes:
        step: matrix J of one step, ``(d, d)``.
        radius: largest |eigenvalue| of J; the game settles if it is below 1.
        noise: covariance of the noise of one step, η² N Σ Nᵀ.
        covariance: that of the invariant measure of the steps, exactly; None if there is none.
        sde_covariance: that of the modified equation of order 1 and of order 2, by order; None if there is none.
        relation: E⟨z, u⟩ and −(η/2) E|u + noise|² of the exact law, which are equal; u is the mean step over η.
    """

    step: Tensor
    radius: float
    noise: Tensor
    covariance: Tensor | None
    sde_covariance: dict[int, Tensor | None]
    relation: tuple[float, float]


@cites(CAO)
def linear_game(
    matrix: Tensor, noise: Tensor | float, *, lr: float, split: int, mode: Mode = "simultaneous"
) -> LinearGame:
    r"""Invariant measure of a linear game: exact for the steps, and that of its modified equations.

        J S Jᵀ + η² N Σ Nᵀ = S   (steps)          B S + S Bᵀ + η N Σ Nᵀ = 0   (equation of either order)

    Args:
        matrix: M of b(z) = M z, ``(d, d)``.
        noise: Σ, a variance or a covariance matrix.
        lr: η.
        split: numbers of the first player.
        mode: order of play.

    Returns:
        LinearGame. At stationarity order 2 is not better than order 1 by an order of η: orders count over fixed times.

    Raises:
        ArgumentError: ``lr`` or ``mode`` out of range.
        ShapeError: the matrix is not square, or has no place for two players.

    Reference: Cao & Guo (2020), invariant measures; the discrete equation is ours.

    Example:
        >>> M = torch.tensor([[-0.5, -1.0], [1.0, -0.8]], dtype=torch.float64)
        >>> found = linear_game(M, 0.09, lr=0.1, split=1)
        >>> [round(v, 6) for v in found.covariance.diagonal().tolist()]
        [0.008364, 0.007403]
    """
    _check(lr, mode)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not 0 < split < matrix.shape[0]:
        raise ShapeError(
            f"matrix has the shape {tuple(matrix.shape)} and split is {split}: give (d, d) and 0 < split < d"
        )
    m = matrix.double()
    eye = torch.eye(len(m), dtype=m.dtype, device=m.device)
    sigma = (
        noise.to(m)
        if isinstance(noise, Tensor) and noise.ndim == 2
        else torch.as_tensor(noise, dtype=m.dtype).to(m) * eye
    )
    game = Game(lambda z: z @ m.T, split)
    step = game_step(game, eye, lr, mode).T
    answer = torch.zeros_like(m)
    answer[:split, split:] = m[:split, split:]
    through = eye + lr * answer if mode == "alternating" else eye
    covered = through @ sigma @ through.T
    second = m - lr / 2 * m @ m + (lr * answer @ m if mode == "alternating" else 0)

    def of_equation(drift: Tensor, c: Tensor) -> Tensor | None:
        stable = float(torch.linalg.eigvals(drift).real.max()) < -_EDGE
        return continuous_lyapunov(-drift, lr * c).S if stable else None

    radius = float(torch.linalg.eigvals(step).abs().max())
    exact = discrete_lyapunov(step, lr**2 * covered).S if radius < 1 - _EDGE else None
    mean = (step - eye) / lr
    relation = (math.nan, math.nan)
    if exact is not None:
        moved = float((mean @ exact @ mean.T + covered).trace())
        relation = (float((mean @ exact).trace()), -lr / 2 * moved)
    return LinearGame(
        step,
        radius,
        lr**2 * covered,
        exact,
        {1: of_equation(m, sigma), 2: of_equation(second, covered)},
        relation,
    )


@dataclass(frozen=True)
class FluctuationDissipation:
    """Both sides of the relation of a stationary game.

    Attributes:
        work: E⟨z − c, u(z)⟩, u the mean step over η.
        heat: −(η/2) E|Δz/η|², from the steps that were taken.
        error: standard error of their difference, over blocks of time.
    """

    work: float
    heat: float
    error: float

    @property
    def z(self) -> float:
        """Difference over its error: beyond ±3 the run is not stationary (below 0: it still draws inwards)."""
        return (self.work - self.heat) / self.error if self.error > 0 else math.nan


@cites(CAO)
def game_fluctuation_dissipation(
    game: Game, states: Tensor, *, lr: float, mode: Mode = "simultaneous", centre: Tensor | None = None
) -> FluctuationDissipation:
    r"""Fluctuation–dissipation relation E⟨z, b(z)⟩ = −(η/2) E|b + noise|² along a recorded game.

    It holds when, and only when, |z|² has come to rest: a check of stationarity, and of the noise floor.

    Args:
        game: the players.
        states: recorded parameters, every step, ``(steps + 1, d)`` or with paths between, ``(steps + 1, paths, d)``.
        lr: η.
        mode: order of play.
        centre: c; the mean of the states by default.

    Returns:
        FluctuationDissipation.

    Raises:
        ShapeError: fewer than 40 steps.

    Reference: Cao & Guo (2020). Departure: the relation of the steps, with |b|², which is exact at any η.

    Example:
        >>> game = Game(lambda z: -z, split=1, noise=1.0)
        >>> generator, z = torch.Generator().manual_seed(0), [torch.zeros(2)]
        >>> for _ in range(4000):
        ...     z.append(game_step(game, z[-1], 0.1, noise=torch.randn(2, generator=generator)))
        >>> abs(game_fluctuation_dissipation(game, torch.stack(z[100:]), lr=0.1).z) < 4
        True
    """
    _check(lr, mode)
    if states.ndim < 2 or states.shape[0] <= 2 * _BLOCKS:
        raise ShapeError(
            f"states has the shape {tuple(states.shape)}: give more than {2 * _BLOCKS} steps, time first"
        )
    z = states[:-1].reshape(states.shape[0] - 1, -1, states.shape[-1])
    step = states.diff(dim=0).reshape(z.shape).double()
    mean = (game_step(game, z, lr, mode) - z).double() / lr
    about = z.double() - (z.double().mean((0, 1)) if centre is None else centre.to(z).double())
    work = (about * mean).sum(-1).mean(1)
    heat = -step.square().sum(-1).mean(1) / (2 * lr)
    blocks = torch.stack([part.mean() for part in (work - heat).tensor_split(_BLOCKS)])
    return FluctuationDissipation(
        float(work.mean()), float(heat.mean()), float(blocks.std()) / math.sqrt(_BLOCKS)
    )
