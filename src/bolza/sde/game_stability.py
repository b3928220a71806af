r"""Whether two players drift apart: the largest |eigenvalue| of the Jacobian of their update, by products.

Two players who both descend may circle and move away from each other, which no sharpness tells. What decides near an
equilibrium is the spectral radius of the joint update, and with it the rate, the momentum and the order of play.

Reference: Cao & Guo (2020), *SDE approximations of GANs training and its long-run behavior*.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import jacfwd, jvp

from bolza.core.errors import ArgumentError, DivergenceError
from bolza.core.reference import cites
from bolza.sde.games import CAO, Game, Mode, _check, game_step

__all__ = ["GameStability", "game_stability"]

_DENSE = 64  # numbers up to which the Jacobian is formed


@dataclass(frozen=True)
class GameStability:
    """What a small deviation from a point does under the training of both players.

    Attributes:
        radius: largest |eigenvalue| of the Jacobian of the update; deviations change by this factor a step.
        eigenvalues: those found, complex, the largest |·| first.
        residual: ‖Jv − ρv‖ of the first.
        velocity: ‖z⁺ − z‖/η at the point: zero at an equilibrium, the only place where the radius decides.
        products: Jacobian products that it took.
        converged: whether the eigenvalue solver met its tolerance.
    """

    radius: float
    eigenvalues: Tensor
    residual: float
    velocity: float
    products: int
    converged: bool

    @property
    def stable(self) -> bool:
        """Whether deviations die out."""
        return self.radius < 1

    @property
    def period(self) -> float:
        """Steps of one turn about the point; infinite if the leading deviation does not circle."""
        angle = abs(math.atan2(float(self.eigenvalues[0].imag), float(self.eigenvalues[0].real)))
        return 2 * math.pi / angle if angle > 0 else math.inf

    @property
    def steps_per_e(self) -> float:
        """Steps in which the deviation changes by a factor e."""
        return 1 / abs(math.log(self.radius)) if self.radius not in (0.0, 1.0) else math.inf


@cites(CAO)
def game_stability(
    game: Game,
    z: Tensor,
    *,
    lr: float,
    mode: Mode = "simultaneous",
    momentum: float = 0.0,
    k: int = 4,
    tol: float = 1e-6,
    max_products: int = 2000,
    seed: int = 0,
) -> GameStability:
    r"""Predict whether two players drift apart: the largest |eigenvalue| of the update's Jacobian, by products.

        v ← μ v + b(z),   z ← z + η v      (alternating: the second player's v and z first)

    Args:
        game: the players.
        z: where, ``(d,)``: best an equilibrium. For networks, the parameters that ``network_game`` returns.
        lr: η of both; for rates of their own that of the first, and a field whose second part is multiplied by the
            ratio of the second to it.
        mode: order of play.
        momentum: μ of both players; it may be negative.
        k: eigenvalues to find.
        tol: relative accuracy of the eigenvalues.
        max_products: Jacobian products, at most.
        seed: of the first direction.

    Returns:
        GameStability; ``converged`` is False if the products did not suffice, and the radius then a lower estimate.

    Raises:
        ArgumentError: an argument out of range.
        DivergenceError: the field is not finite at z.

    Reference: Cao & Guo (2020) for the map; the eigenvalues by implicitly restarted Arnoldi iteration.

    Example:
        >>> bilinear = Game(lambda z: torch.stack([-z[..., 1], z[..., 0]], -1), split=1)
        >>> z = torch.zeros(2, dtype=torch.float64)
        >>> round(game_stability(bilinear, z, lr=0.1).radius ** 2, 6)                  # 1 + η²
        1.01
        >>> round(game_stability(bilinear, z, lr=0.1, mode="alternating").radius, 6)
        1.0
    """
    _check(lr, mode)
    if z.ndim != 1 or not 0 < game.split < z.numel() or k < 1 or not -1 < momentum < 1:
        raise ArgumentError(
            f"z has the shape {tuple(z.shape)}, split is {game.split}, k {k} and momentum {momentum}: give a vector of "
            "both players, k at least 1 and momentum in (−1, 1)"
        )
    d, n = z.numel(), game.split
    z = z.detach()

    def update(state: Tensor) -> Tensor:
        if momentum == 0:
            return game_step(game, state, lr, mode)
        x, v = state[:d], state[d:]
        new = momentum * v + game.field(x)
        if mode == "alternating":
            met = torch.cat([x[:n], (x + lr * new)[n:]])
            new = torch.cat([(momentum * v + game.field(met))[:n], new[n:]])
        return torch.cat([x + lr * new, new])

    here = z if momentum == 0 else torch.cat([z, torch.zeros_like(z)])
    there = update(here)
    if not bool(torch.isfinite(there).all()):
        raise DivergenceError("the field is not finite at z: check the losses and the parameters")
    velocity = float((there[:d] - z).double().norm()) / lr
    return GameStability(**_largest(update, here, k, tol, max_products, seed), velocity=velocity)


def _largest(
    update: Callable[[Tensor], Tensor], here: Tensor, k: int, tol: float, max_products: int, seed: int
) -> dict[str, Any]:
    """Largest eigenvalues of the Jacobian of a map, and the residual of the first."""
    import numpy as np
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigs

    count = 0

    def product(v: Any) -> Any:
        nonlocal count
        count += 1
        tangent = torch.as_tensor(np.ascontiguousarray(v).reshape(-1)).to(here)
        return jvp(update, (here,), (tangent,))[1].double().cpu().numpy()

    size, converged = here.numel(), True
    if size <= _DENSE or k >= size - 1:
        values, vectors = np.linalg.eig(jacfwd(update)(here).double().cpu().numpy())
        count += size
    else:
        operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
        start = np.random.default_rng(seed).standard_normal(size)
        width = min(size, max(2 * k + 1, 20))
        rounds = max(1, max_products // (width - k))
        try:
            values, vectors = eigs(operator, k=k, which="LM", v0=start, tol=tol, ncv=width, maxiter=rounds)
        except ArpackNoConvergence as stopped:
            values, vectors, converged = stopped.eigenvalues, stopped.eigenvectors, False
    if len(values) == 0:
        nothing = torch.full((1,), math.nan, dtype=torch.complex128)
        return {
            "radius": math.nan,
            "eigenvalues": nothing,
            "residual": math.nan,
            "products": count,
            "converged": False,
        }
    order = np.argsort(-np.abs(values))[:k]
    values, first = values[order], vectors[:, order[0]]
    moved = product(first.real) + 1j * product(first.imag)
    return {
        "radius": float(abs(values[0])),
        "eigenvalues": torch.as_tensor(values),
        "residual": float(np.linalg.norm(moved - values[0] * first)),
        "products": count,
        "converged": converged,
    }
