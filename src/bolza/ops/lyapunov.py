r"""Lyapunov equations: the covariance at which what noise brings in and what the dynamics damp balance.

    continuous   A S + S Aᵀ = C         of dx = −A x dt + C^{1/2} dW;   stable: every Re λ(A) > 0
    discrete     S = M S Mᵀ + C         of x ← M x + C^{1/2} ξ;         stable: every |λ(M)| < 1

One matrix goes to LAPACK through scipy (Schur form); a batch of small ones is solved at once as linear systems of
size n². Both run in float64, and both are differentiable: the gradient is another Lyapunov equation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from bolza.ops.errors import ArgumentError, DivergenceError, ShapeError

__all__ = ["LyapunovSolution", "continuous_lyapunov", "discrete_lyapunov"]

Clock: TypeAlias = Literal["continuous", "discrete"]

_KRONECKER = 12  # size up to which a batch is solved as linear systems of size n²


@dataclass(frozen=True)
class LyapunovSolution:
    """A stationary covariance.

    Attributes:
        S: covariance, shape ``(*batch, n, n)``, symmetric where C is.
        residual: Frobenius norm of what is left of the equation, relative to that of its largest term, ``(*batch,)``.
        margin: how far the dynamics are from losing stability, ``(*batch,)``: the smallest Re λ(A), or 1 − max |λ(M)|.
    """

    S: Tensor
    residual: Tensor
    margin: Tensor


def continuous_lyapunov(A: Tensor, C: Tensor) -> LyapunovSolution:
    r"""Stationary covariance of a linear stochastic differential equation: A S + S Aᵀ = C.

    Args:
        A: restoring matrix of dx = −A x dt + C^{1/2} dW, shape ``(*batch, n, n)``; it need not be symmetric.
        C: noise covariance a unit of time, shape ``(*batch, n, n)``.

    Returns:
        LyapunovSolution; ``S`` has the dtype and device of A and is differentiable in A and C.

    Raises:
        DivergenceError: A has an eigenvalue without positive real part, so that nothing is stationary.
        ShapeError: A or C is not square, or their sizes differ.

    Reference: Bartels & Stewart (1972), *Solution of the matrix equation AX + XB = C*.

    Example:
        >>> continuous_lyapunov(torch.diag(torch.tensor([1.0, 2.0])), torch.eye(2)).S
        tensor([[0.5000, 0.0000],
                [0.0000, 0.2500]])
    """
    return _solve("continuous", A, C)


def discrete_lyapunov(M: Tensor, C: Tensor) -> LyapunovSolution:
    r"""Stationary covariance of a linear stochastic map: S = M S Mᵀ + C.

    Args:
        M: the map of x ← M x + C^{1/2} ξ, shape ``(*batch, n, n)``; it need not be symmetric.
        C: noise covariance a step, shape ``(*batch, n, n)``.

    Returns:
        LyapunovSolution; ``S`` has the dtype and device of M and is differentiable in M and C.

    Raises:
        DivergenceError: M has an eigenvalue on or outside the unit circle, so that nothing is stationary.
        ShapeError: M or C is not square, or their sizes differ.

    Reference: Kitagawa (1977), *An algorithm for solving the matrix equation X = FXFᵀ + S*.

    Example:
        >>> discrete_lyapunov(torch.tensor([[0.5]]), torch.ones(1, 1)).S      # 1 / (1 − ¼)
        tensor([[1.3333]])
    """
    return _solve("discrete", M, C)


def _solve(clock: Clock, A: Tensor, C: Tensor) -> LyapunovSolution:
    name = "A" if clock == "continuous" else "M"
    if A.ndim < 2 or A.shape[-1] != A.shape[-2] or C.shape[-2:] != A.shape[-2:]:
        raise ShapeError(
            f"{name} has shape {tuple(A.shape)} and C {tuple(C.shape)}: both must be square, of the same last sizes"
        )
    if A.is_complex() or C.is_complex():
        raise ArgumentError(f"{name} or C is complex: give real matrices")
    like = A.dtype if A.is_floating_point() else torch.get_default_dtype()
    a, c = A.double(), C.to(A.device).double()
    a, c = torch.broadcast_tensors(a, c)  # type: ignore[no-untyped-call]
    if not bool(torch.isfinite(a).all() and torch.isfinite(c).all()):
        raise ArgumentError(f"{name} or C is not finite: check the model, the loss and the data it came from")
    values = torch.linalg.eigvals(a.detach())
    margin = values.real.amin(-1) if clock == "continuous" else 1 - values.abs().amax(-1)
    if bool((margin <= 0).any()):
        worst = float(margin.min())
        raise DivergenceError(
            f"A has an eigenvalue of real part {worst:.3g}, so that paths run away and no covariance is stationary: "
            "keep to directions of positive curvature"
            if clock == "continuous"
            else f"M has an eigenvalue of modulus {1 - worst:.6g}, so that paths run away and no covariance is "
            "stationary: lower the step size"
        )
    S: Tensor = _Lyapunov.apply(clock, a, c)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        around, by = _terms(clock, a, S)
        size = torch.stack([_norm(around), _norm(by), _norm(c)]).amax(0)
        residual = _norm(around - by - c) / size.clamp_min(torch.finfo(torch.float64).tiny)
    return LyapunovSolution(S.to(like), residual, margin)


def _terms(clock: Clock, a: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """The equation as first − second = C."""
    return (a @ S, -S @ a.mT) if clock == "continuous" else (S, a @ S @ a.mT)


def _norm(matrix: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.matrix_norm(matrix)
    return norm


class _Lyapunov(torch.autograd.Function):
    """S(A, C), with the gradient by the transposed equation: Λ solves it for the gradient of S."""

    @staticmethod
    def forward(ctx: Any, clock: Clock, a: Tensor, c: Tensor) -> Tensor:
        S = _solution(clock, a, c)
        ctx.clock = clock
        ctx.save_for_backward(a, S)
        return S

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor]:
        a, S = ctx.saved_tensors
        dual: Tensor = _Lyapunov.apply(ctx.clock, a.mT, grads[0])  # type: ignore[no-untyped-call]
        if ctx.clock == "continuous":
            return None, -(dual @ S.mT + dual.mT @ S), dual
        return None, dual @ a @ S.mT + dual.mT @ a @ S, dual


def _solution(clock: Clock, a: Tensor, c: Tensor) -> Tensor:
    n = a.shape[-1]
    if a.ndim > 2 and n <= _KRONECKER:
        one = torch.eye(n, dtype=a.dtype, device=a.device)
        twice = _kron(a, a)
        system = _kron(a, one) + _kron(one, a) if clock == "continuous" else _kron(one, one) - twice
        flat: Tensor = torch.linalg.solve(system, c.reshape(*c.shape[:-2], n * n))
        S = flat.reshape(c.shape)
    else:
        from scipy import linalg

        solver = linalg.solve_continuous_lyapunov if clock == "continuous" else linalg.solve_discrete_lyapunov
        pairs = zip(a.reshape(-1, n, n).cpu().numpy(), c.reshape(-1, n, n).cpu().numpy(), strict=True)
        S = torch.stack([torch.from_numpy(solver(x, y)) for x, y in pairs]).reshape(c.shape).to(a)
    symmetric = torch.equal(c, c.mT)
    return (S + S.mT) / 2 if symmetric else S


def _kron(a: Tensor, b: Tensor) -> Tensor:
    """Kronecker product of the last two dimensions: acts on matrices flattened row by row as S ↦ a S bᵀ."""
    n = a.shape[-1]
    product: Tensor = torch.einsum("...ij,...kl->...ikjl", a, b)
    return product.reshape(*product.shape[:-4], n * n, n * n)
