r"""The discrete Riccati equation: linear dynamics, quadratic cost, and the feedback that is optimal.

    x_{t+1} = A_t x_t + B_t u_t,   J = ½ Σ_t (x_tᵀ Q_t x_t + u_tᵀ R_t u_t) + ½ x_Tᵀ Q_T x_T
    V_t(x) = ½ xᵀ P_t x,   u_t = −K_t x_t

Matrices may carry leading batch dimensions, which broadcast. The recursions run in float64 and
return the dtype they were given, the default one for integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from bolza.ops.bellman import bellman_sweep, common_length
from bolza.ops.errors import ArgumentError, DivergenceError, ShapeError

__all__ = ["RiccatiSolution", "riccati_recursion", "stationary_riccati"]

Matrices: TypeAlias = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class RiccatiSolution:
    """Value matrices and feedback gains.

    Attributes:
        P: V(x) = ½ xᵀPx; shape ``(T+1, *batch, n, n)``, or ``(*batch, n, n)`` if stationary.
        K: u = −K x; shape ``(T, *batch, m, n)``, or ``(*batch, m, n)`` if stationary.
    """

    P: Tensor
    K: Tensor


def riccati_recursion(
    A: Matrices,
    B: Matrices,
    Q: Matrices,
    R: Matrices,
    terminal: Tensor,
    horizon: int | None = None,
) -> RiccatiSolution:
    r"""Solve the linear-quadratic problem of finite horizon, backwards from P_T.

        K_t = (R + BᵀP_{t+1}B)⁻¹ BᵀP_{t+1}A
        P_t = Q + K_tᵀRK_t + (A − BK_t)ᵀP_{t+1}(A − BK_t)

    The second line is the form that keeps P symmetric and non-negative under rounding.

    Args:
        A: dynamics, shape ``(*batch, n, n)``; or a sequence of them, one a step.
        B: input matrix, shape ``(*batch, n, m)``; or a sequence.
        Q: weight of the state, symmetric, shape ``(*batch, n, n)``; or a sequence.
        R: weight of the control, symmetric, shape ``(*batch, m, m)``; or a sequence.
        terminal: P_T = Q_T, shape ``(*batch, n, n)``.
        horizon: number T of steps; needed unless one of the others is a sequence.

    Returns:
        RiccatiSolution with ``P`` for t = 0 … T and ``K`` for t = 0 … T−1; differentiable.

    Raises:
        ArgumentError: no horizon, or R + BᵀPB is not positive definite.
        ShapeError: shapes do not belong together, or the sequences have unequal lengths.

    Reference: Anderson & Moore (1990), *Optimal Control: Linear Quadratic Methods*, §2.4.

    Example:
        >>> one = torch.eye(1)
        >>> riccati_recursion(one, one, one, one, one, horizon=2).K.flatten()
        tensor([0.6000, 0.5000])
    """
    steps = common_length(horizon, A=A, B=B, Q=Q, R=R)
    for t in range(steps):
        a, b, q, r = (_at(M, t) for M in (A, B, Q, R))
        _check_shapes(a, b, q, r, terminal)
    sweep = bellman_sweep(A, B, Q, R, terminal, horizon=horizon)
    P0, *rest = torch.broadcast_tensors(*sweep.P)  # type: ignore[no-untyped-call]
    return RiccatiSolution(torch.stack([P0, *rest]), -torch.stack(sweep.K))


def stationary_riccati(
    A: Tensor, B: Tensor, Q: Tensor, R: Tensor, *, tol: float = 1e-14, max_doublings: int = 60
) -> RiccatiSolution:
    r"""Solve the linear-quadratic problem of infinite horizon, by doubling.

    One pass turns the cost over 2ᵏ steps into the cost over 2ᵏ⁺¹ steps, so that the number of
    passes is the logarithm of the settling time, also near the stability limit:

        W = I + GH,   A ← A W⁻¹A,   G ← G + A W⁻¹G Aᵀ,   H ← H + AᵀH W⁻¹A,   H → P

    from G = BR⁻¹Bᵀ and H = Q. The limit is the value of the problem; it is the stabilising
    solution of the algebraic equation where Q sees every unstable mode.

    Args:
        A: dynamics, shape ``(*batch, n, n)``.
        B: input matrix, shape ``(*batch, n, m)``.
        Q: weight of the state, symmetric non-negative, shape ``(*batch, n, n)``.
        R: weight of the control, symmetric positive, shape ``(*batch, m, m)``.
        tol: stop when a pass changes P by less than this, relative to P.
        max_doublings: passes; 60 are 10¹⁸ steps.

    Returns:
        RiccatiSolution with ``P`` and ``K`` without a time dimension.

    Raises:
        ArgumentError: R is not positive definite.
        DivergenceError: the value is not finite: B does not reach an unstable mode that Q sees.
        ShapeError: shapes do not belong together.

    Reference: Chu, Fan, Lin & Wang (2004), *Structure-preserving algorithms for periodic
    discrete-time algebraic Riccati equations*, International Journal of Control 77.

    Example:
        >>> one = torch.eye(1, dtype=torch.float64)
        >>> stationary_riccati(one, one, one, one).P          # the golden ratio
        tensor([[1.6180]], dtype=torch.float64)
    """
    a, b, q, r = (M.double() for M in (A, B, Q, R))
    _check_shapes(a, b, q, r, q)
    identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    q, r = _symmetric(q), _symmetric(r)  # the cost sees no more of them
    F, G, H = a, b @ torch.cholesky_solve(b.mT, _cholesky(r, "R")), q
    like = A.dtype if A.is_floating_point() else torch.get_default_dtype()
    for _ in range(max_doublings):
        n = F.shape[-1]
        solved = torch.linalg.solve(identity + G @ H, torch.cat(torch.broadcast_tensors(F, G), dim=-1))  # type: ignore[no-untyped-call]
        left, right = solved[..., :n], solved[..., n:]
        change = F.mT @ H @ left
        F, G, H = F @ left, _symmetric(G + F @ right @ F.mT), _symmetric(H + change)
        size = change.abs().amax(dim=(-2, -1))
        if not bool(torch.isfinite(size).all()):
            break
        if bool((size <= tol * H.abs().amax(dim=(-2, -1))).all()):
            return RiccatiSolution(H.to(like), _gain(a, b, r, H, "the limit").to(like))
    raise DivergenceError(
        "the cost of the infinite horizon is not finite: B does not reach an unstable mode of A that Q weighs, "
        "so add an input or take the weight off that mode"
    )


def _at(matrices: Matrices, t: int) -> Tensor:
    return matrices if isinstance(matrices, Tensor) else matrices[t]


def _check_shapes(a: Tensor, b: Tensor, q: Tensor, r: Tensor, p: Tensor) -> None:
    if a.ndim < 2 or b.ndim < 2:
        raise ShapeError(f"A has shape {tuple(a.shape)} and B {tuple(b.shape)}: they must be matrices")
    out, n, m = a.shape[-2], a.shape[-1], b.shape[-1]
    wanted = {"A": (out, n), "B": (out, m), "Q": (n, n), "R": (m, m), "P": (out, out)}
    given = {"A": a, "B": b, "Q": q, "R": r, "P": p}
    for name, matrix in given.items():
        if tuple(matrix.shape[-2:]) != wanted[name]:
            raise ShapeError(
                f"{name} has shape {tuple(matrix.shape)}, but its last two sizes must be {wanted[name]} "
                f"beside A of {tuple(a.shape)} and B of {tuple(b.shape)}"
            )


def _gain(a: Tensor, b: Tensor, r: Tensor, P: Tensor, where: str) -> Tensor:
    return torch.cholesky_solve(b.mT @ P @ a, _cholesky(_symmetric(r + b.mT @ P @ b), f"R + BᵀPB at {where}"))


def _cholesky(matrix: Tensor, name: str) -> Tensor:
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if bool((info != 0).any()) or not bool(torch.isfinite(factor).all()):
        raise ArgumentError(f"{name} is not positive definite: every control must cost something, so raise R")
    return factor


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2
