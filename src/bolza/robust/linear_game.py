r"""The linear-quadratic game: a controller that pays for its effort against a disturbance that pays γ² for its own.

    x_{t+1} = A x_t + B u_t + D w_t,   J = Σ_t xᵀQx + uᵀRu − γ² wᵀw,   u minimises, w maximises
    P = Q + Aᵀ P W⁻¹ A,   W = I + (B R⁻¹ Bᵀ − γ⁻² D Dᵀ) P,   γ² I − Dᵀ P D ≻ 0
    u = −R⁻¹ Bᵀ P W⁻¹ A x,   w = γ⁻² Dᵀ P W⁻¹ A x

The value xᵀPx is finite above a smallest price γ*, the gain from disturbances to cost that no controller can beat.
As γ → ∞ the disturbance becomes too dear and the problem is the linear-quadratic regulator.

Reference: Başar & Bernhard (1995), chapter 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError, DivergenceError, ShapeError
from bolza.core.reference import Reference, cites
from bolza.ops.riccati import stationary_riccati

__all__ = ["BASAR", "LinearGame", "critical_price", "linear_game"]

BASAR = Reference(
    "basar1995optimal",
    "Başar, Tamer and Bernhard, Pierre",
    "H-infinity Optimal Control and Related Minimax Design Problems: A Dynamic Game Approach",
    1995,
    venue="Birkhäuser",
)


@dataclass(frozen=True)
class LinearGame:
    """The saddle point of a linear-quadratic game.

    Attributes:
        P: value xᵀPx, shape ``(n, n)``.
        K: controller u = −K x, shape ``(m, n)``.
        L: worst disturbance w = L x, shape ``(k, n)``.
        price: γ; ``inf`` for the regulator.
        closed_loop: A − BK + DL, shape ``(n, n)``; stable.
        margin: smallest eigenvalue of γ²I − DᵀPD; positive, and zero at the smallest price.
    """

    P: Tensor
    K: Tensor
    L: Tensor
    price: float
    closed_loop: Tensor
    margin: float


@cites(BASAR)
def linear_game(A: Tensor, B: Tensor, D: Tensor, Q: Tensor, R: Tensor, price: float) -> LinearGame:
    r"""Saddle point of the linear-quadratic game at price γ of the disturbance, infinite horizon.

        P = Q + Aᵀ P [I + (B R⁻¹ Bᵀ − γ⁻² D Dᵀ) P]⁻¹ A

    Args:
        A: dynamics, shape ``(n, n)``.
        B: how the control enters, shape ``(n, m)``.
        D: how the disturbance enters, shape ``(n, k)``.
        Q: weight of the state, symmetric non-negative, shape ``(n, n)``.
        R: weight of the control, symmetric positive, shape ``(m, m)``.
        price: γ > 0; ``float("inf")`` for no disturbance.

    Returns:
        LinearGame in the dtype of A; computed in float64.

    Raises:
        ArgumentError: the price or R is not positive, Q is negative, or a matrix is not finite.
        DivergenceError: the value is not finite: γ is at or below the smallest price.
        ShapeError: shapes do not belong together.

    Reference: Başar & Bernhard (1995), chapter 3: closed-loop saddle point, both see the state.

    Example:
        >>> one = torch.eye(1, dtype=torch.float64)
        >>> [round(float(linear_game(one, one, one, one, one, g).P), 7) for g in (1.5, 2.0, float("inf"))]
        [1.9317821, 1.7583057, 1.618034]
    """
    _check(A, B, D, Q, R, price)
    found = _solve(A, B, D, Q, R, price)
    if found is None:
        stationary_riccati(A, B, Q, R)  # says why, where there is no regulator
        raise DivergenceError(
            f"the game has no finite value at price={price:.6g}: the disturbance gains more than it pays, so raise the "
            "price above critical_price(A, B, D, Q, R); or Q does not see an unstable mode of A"
        )
    return found


@cites(BASAR)
def critical_price(
    A: Tensor, B: Tensor, D: Tensor, Q: Tensor, R: Tensor, *, tol: float = 1e-12, largest: float = 1e8
) -> float:
    r"""Smallest price γ* at which a linear-quadratic game has a finite value, by bisection.

    It is the least gain √(Σ xᵀQx + uᵀRu) / √(Σ wᵀw) from disturbance to cost that a controller can guarantee.

    Args:
        A: dynamics, shape ``(n, n)``.
        B: how the control enters, shape ``(n, m)``.
        D: how the disturbance enters, shape ``(n, k)``.
        Q: weight of the state, symmetric non-negative, shape ``(n, n)``.
        R: weight of the control, symmetric positive, shape ``(m, m)``.
        tol: relative width of the last bracket.
        largest: where to give up.

    Returns:
        γ*, from above: the game is solvable at the number returned.

    Raises:
        ArgumentError: R is not positive, Q is negative, or a matrix is not finite.
        DivergenceError: even the regulator has no finite value, or γ* is above ``largest``.
        ShapeError: shapes do not belong together.

    Reference: Başar & Bernhard (1995), chapter 3.

    Example:
        >>> one = torch.eye(1, dtype=torch.float64)
        >>> print(f"{critical_price(one, one, one, one, one):.6f}")       # the square root of 2
        1.414214
    """
    _check(A, B, D, Q, R, 1.0)
    stationary_riccati(A, B, Q, R)  # says why, where there is no regulator
    high = 1.0
    while _solve(A, B, D, Q, R, high) is None:
        high *= 2
        if high > largest:
            raise DivergenceError(
                f"no finite value at prices up to {largest:.3g}: scale D down, or raise largest="
            )
    low = high
    while _solve(A, B, D, Q, R, low) is not None:
        high, low = low, low / 2
        if low < 1e-12:
            return high  # the cost does not see the disturbance
    while high - low > tol * high:
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (low, middle) if _solve(A, B, D, Q, R, middle) is not None else (middle, high)
    return high


def _solve(A: Tensor, B: Tensor, D: Tensor, Q: Tensor, R: Tensor, price: float) -> LinearGame | None:
    """The stabilising solution, if it is one of a game with a finite value."""
    a, b, d, q, r = (M.detach().double() for M in (A, B, D, Q, R))
    q, r = (q + q.mT) / 2, (r + r.mT) / 2  # the cost sees no more of them
    like = A.dtype if A.is_floating_point() else torch.get_default_dtype()
    try:
        if price == float("inf"):
            P = stationary_riccati(a, b, q, r).P
        else:
            P = _stabilising(
                a, torch.cat([b, d], 1), q, torch.block_diag(r, -(price**2) * torch.eye(d.shape[1]).to(r))
            )
    except (DivergenceError, ArithmeticError, ValueError):
        return None
    bare = torch.zeros_like(d.mT) if price == float("inf") else d.mT / price**2
    spread = b @ torch.linalg.solve(r, b.mT)
    W = torch.eye(len(a)).to(a) + (spread - d @ bare) @ P
    loop, info = torch.linalg.solve_ex(W, a)
    if int(info) or not bool(torch.isfinite(loop).all()):
        return None
    K, L = torch.linalg.solve(r, b.mT) @ P @ loop, bare @ P @ loop
    margin = (
        float("inf")
        if price == float("inf")
        else float(torch.linalg.eigvalsh(price**2 * torch.eye(d.shape[1]).to(a) - d.mT @ P @ d).min())
    )
    size = float(P.abs().max()) + 1.0
    residual = float((q + a.mT @ P @ loop - P).abs().max())
    stable = float(torch.linalg.eigvals(loop).abs().max()) < 1 + 1e-9
    if (
        residual > 1e-7 * size
        or float(torch.linalg.eigvalsh(P).min()) < -1e-9 * size
        or margin <= 0
        or not stable
    ):
        return None
    return LinearGame(P.to(like), K.to(like), L.to(like), price, loop.to(like), margin)


def _stabilising(a: Tensor, b: Tensor, q: Tensor, r: Tensor) -> Tensor:
    """The stabilising solution of the Riccati equation with an indefinite R."""
    import numpy as np
    from scipy.linalg import LinAlgError, solve_discrete_are

    try:
        P = torch.from_numpy(
            solve_discrete_are(a.cpu().numpy(), b.cpu().numpy(), q.cpu().numpy(), r.cpu().numpy())
        ).to(a)
    except (LinAlgError, np.linalg.LinAlgError) as error:
        raise DivergenceError("no stabilising solution") from error
    return (P + P.mT) / 2


def _check(A: Tensor, B: Tensor, D: Tensor, Q: Tensor, R: Tensor, price: float) -> None:
    if not price > 0:
        raise ArgumentError(f"price={price} must be positive")
    n = A.shape[-1]
    for name, M, rows, columns in (
        ("A", A, n, n),
        ("B", B, n, None),
        ("D", D, n, None),
        ("Q", Q, n, n),
        ("R", R, B.shape[-1], B.shape[-1]),
    ):
        if M.ndim != 2 or M.shape[0] != rows or (columns is not None and M.shape[1] != columns):
            raise ShapeError(
                f"{name} has shape {tuple(M.shape)}, but beside A of {tuple(A.shape)} and B of {tuple(B.shape)} it "
                f"must be a matrix with {rows} rows" + (f" and {columns} columns" if columns else "")
            )
        if not bool(torch.isfinite(M).all()):
            raise ArgumentError(f"{name} has entries that are not finite")
    q, r = (torch.linalg.eigvalsh((M + M.mT) / 2) for M in (Q.detach().double(), R.detach().double()))
    if not bool((r > 0).all()):
        raise ArgumentError("R is not positive definite: every control must cost something, so raise R")
    if bool((q < -1e-6 * q.abs().max()).any()):
        raise ArgumentError(
            f"Q has the eigenvalue {float(q.min()):.4g}: the cost of a state must not be negative, so add to its "
            "diagonal"
        )
