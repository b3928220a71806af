r"""One Bellman sweep of a linear-quadratic problem: the step that every method of second order shares.

    x_{t+1} = A_t x_t + B_t u_t + c_t
    J = Σ_t [½ xᵀQx + uᵀSx + ½ uᵀRu + qᵀx + rᵀu] + ½ x_TᵀQ_T x_T + q_Tᵀx_T
    V_t(x) = ½ xᵀP_t x + p_tᵀx + v_t,   u_t = K_t x_t + k_t

The vectors c, q, r may be k columns beside each other: k problems that share their matrices and so their
gains K. One column is a step of differential dynamic programming, as many columns as there are
parameters differentiate an optimal trajectory. Matrices may carry leading batch dimensions, which
broadcast, and sizes may change from step to step. All runs in float64 and comes back in the dtype it
was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from bolza.ops.errors import ArgumentError, ShapeError

__all__ = ["BellmanStep", "BellmanSweep", "bellman_step", "bellman_sweep", "closed_loop"]

Matrices: TypeAlias = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class BellmanStep:
    """Policy and value of one step.

    Attributes:
        P: second derivative of the value, shape ``(*batch, n, n)``.
        p: first derivative, shape ``(*batch, n, k)``.
        K: feedback gain, u = K x + k; shape ``(*batch, m, n)``.
        k: feed-forward term, shape ``(*batch, m, k)``.
        Qu: derivative of the step's cost-to-go in u at x = u = 0, shape ``(*batch, m, k)``.
        first: Quᵀk for each column, the slope of the cost along k; shape ``(*batch, k)``, not positive.
        second: kᵀ Quu k for each column, without the regularisation; shape ``(*batch, k)``.
        definite: whether Quu was positive definite; where not, K and k are zero. Shape ``(*batch,)``.
    """

    P: Tensor
    p: Tensor
    K: Tensor
    k: Tensor
    Qu: Tensor
    first: Tensor
    second: Tensor
    definite: Tensor


@dataclass(frozen=True)
class BellmanSweep:
    """Policies and values of all steps; what does not depend on columns comes without a column.

    Attributes:
        P: T+1 matrices of shape ``(*batch, n, n)``.
        p: T+1 blocks of columns, shape ``(*batch, n, k)``.
        K: T gains of shape ``(*batch, m, n)``.
        k: T feed-forward terms, shape ``(*batch, m, k)``.
        first: sum over the steps of Quᵀk, shape ``(*batch, k)``. A step of length α along the policy
            changes the cost by α·first + ½α²·second where all c are zero.
        second: sum over the steps of kᵀQuu k, shape ``(*batch, k)``.
        definite: whether all Quu were positive definite, shape ``(*batch,)``.
    """

    P: tuple[Tensor, ...]
    p: tuple[Tensor, ...]
    K: tuple[Tensor, ...]
    k: tuple[Tensor, ...]
    first: Tensor
    second: Tensor
    definite: Tensor


def bellman_step(
    A: Tensor,
    B: Tensor,
    Q: Tensor,
    R: Tensor,
    P: Tensor,
    p: Tensor,
    *,
    S: Tensor | None = None,
    q: Tensor | None = None,
    r: Tensor | None = None,
    c: Tensor | None = None,
    regularization: float | Tensor = 0.0,
) -> BellmanStep:
    r"""One step of the Bellman recursion, from the value after it to the value before it.

        Quu = R + BᵀPB + μI,   Qux = S + BᵀPA,   Qu = r + Bᵀ(Pc + p)
        K = −Quu⁻¹Qux,   k = −Quu⁻¹Qu,   F = A + BK
        P ← Q + KᵀS + SᵀK + KᵀRK + FᵀPF
        p ← q + Kᵀr + (Sᵀ + KᵀR)k + Fᵀ(P(Bk + c) + p)

    The last two lines are the value of the policy (K, k) itself, so that they stay true with a
    regularisation μ, and P stays symmetric and non-negative under rounding.

    Args:
        A: dynamics, shape ``(*batch, n', n)``.
        B: input matrix, shape ``(*batch, n', m)``.
        Q: second derivative of the cost in x, shape ``(*batch, n, n)``.
        R: second derivative in u, shape ``(*batch, m, m)``.
        P: second derivative of the value after the step, shape ``(*batch, n', n')``.
        p: its first derivative, shape ``(*batch, n', k)``.
        S: mixed derivative ∂²/∂u∂x, shape ``(*batch, m, n)``; zero by default.
        q: derivative of the cost in x, shape ``(*batch, n, k)``; zero by default.
        r: derivative in u, shape ``(*batch, m, k)``; zero by default.
        c: drift of the dynamics, shape ``(*batch, n', k)``; zero by default.
        regularization: μ ≥ 0, added to the diagonal of Quu; a number, or one for each entry of the batch.

    Returns:
        BellmanStep in float64; entries of the batch whose Quu is not positive definite are marked.

    Raises:
        ShapeError: shapes do not belong together.

    Example:
        >>> one, zero = torch.eye(1), torch.zeros(1, 1)
        >>> bellman_step(one, one, one, one, one, zero).K
        tensor([[-0.5000]], dtype=torch.float64)
    """
    A, B, Q, R, P, p = (M.double() for M in (A, B, Q, R, P, p))
    if A.ndim < 2 or B.ndim < 2:
        raise ShapeError(f"A has shape {tuple(A.shape)} and B {tuple(B.shape)}: they must be matrices")
    _check(A, B, Q, R, P, p, S, q, r, c)
    PB = P @ B
    Quu, Qux = _symmetric(R + B.mT @ PB), PB.mT @ A
    if S is not None:
        S = S.double()
        Qux = Qux + S
    drifted = p if c is None else p + P @ c.double()
    Qu = B.mT @ drifted
    if r is not None:
        r = r.double()
        Qu = Qu + r
    factor, definite = _factor(_shifted(Quu, regularization))
    K, k = -torch.cholesky_solve(Qux, factor), -torch.cholesky_solve(Qu, factor)
    if not bool(definite.all()):
        keep = definite[..., None, None]
        K, k = torch.where(keep, K, 0.0), torch.where(keep, k, 0.0)
    F = A + B @ K
    value = Q + K.mT @ R @ K + F.mT @ P @ F
    slope = F.mT @ (drifted + PB @ k) + K.mT @ (R @ k)
    if S is not None:
        cross = S.mT @ K
        value = value + cross + cross.mT
        slope = slope + S.mT @ k
    if r is not None:
        slope = slope + K.mT @ r
    if q is not None:
        slope = slope + q.double()
    first, second = (Qu * k).sum(-2), (k * (Quu @ k)).sum(-2)
    return BellmanStep(_symmetric(value), slope, K, k, Qu, first, second, definite)


def bellman_sweep(
    A: Matrices,
    B: Matrices,
    Q: Matrices,
    R: Matrices,
    terminal: Tensor,
    *,
    S: Matrices | None = None,
    q: Matrices | None = None,
    r: Matrices | None = None,
    c: Matrices | None = None,
    terminal_gradient: Tensor | None = None,
    horizon: int | None = None,
    regularization: float | Tensor = 0.0,
    strict: bool = True,
) -> BellmanSweep:
    r"""Solve a linear-quadratic problem with linear terms, backwards from its last step.

    Each argument is one tensor for all steps or a sequence of tensors, one a step; shapes as in
    :func:`bellman_step`.

    Args:
        A: dynamics ∂x_{t+1}/∂x_t.
        B: dynamics ∂x_{t+1}/∂u_t.
        Q: cost ∂²/∂x².
        R: cost ∂²/∂u².
        terminal: P_T = Q_T, shape ``(*batch, n, n)``.
        S: cost ∂²/∂u∂x; zero by default.
        q: cost ∂/∂x, columns; zero by default.
        r: cost ∂/∂u, columns; zero by default.
        c: drift, columns; zero by default.
        terminal_gradient: p_T = q_T, columns; zero by default.
        horizon: number T of steps; needed unless another argument is a sequence.
        regularization: μ, added to the diagonal of each Quu.
        strict: raise where Quu is not positive definite; otherwise mark it in ``definite``.

    Returns:
        BellmanSweep in the dtype of ``terminal`` (the default one for integers); differentiable.

    Raises:
        ArgumentError: no horizon, or Quu is not positive definite.
        ShapeError: shapes or numbers of steps do not belong together.

    Reference: Anderson & Moore (1990), *Optimal Control: Linear Quadratic Methods*, §2.4; with linear
    terms, Jacobson & Mayne (1970), *Differential Dynamic Programming*.

    Example:
        >>> one = torch.eye(1)
        >>> [float(K) for K in bellman_sweep(one, one, one, one, one, horizon=2).K]
        [-0.6000000238418579, -0.5]
    """
    given = {
        name: M
        for name, M in (("A", A), ("B", B), ("Q", Q), ("R", R), ("S", S), ("q", q), ("r", r), ("c", c))
        if M is not None
    }
    steps = common_length(horizon, **given)
    P = _symmetric(terminal.double())
    columns = _columns(q, r, c, terminal_gradient)
    p = P.new_zeros(*P.shape[:-1], columns) if terminal_gradient is None else terminal_gradient.double()
    values, slopes, gains, terms = [P], [p], [], []
    first = second = definite = None
    for t in reversed(range(steps)):
        a, b, q_, r_ = (_at(M, t) for M in (A, B, Q, R))
        S_t, q_t, r_t, c_t = (None if M is None else _at(M, t) for M in (S, q, r, c))
        step = bellman_step(a, b, q_, r_, P, p, S=S_t, q=q_t, r=r_t, c=c_t, regularization=regularization)
        if strict and not bool(step.definite.all()):
            raise ArgumentError(
                f"R + BᵀPB at step {t} is not positive definite, or not finite: every control must cost "
                "something, so raise R, or give a regularization"
            )
        P, p = step.P, step.p
        values.append(P)
        slopes.append(p)
        gains.append(step.K)
        terms.append(step.k)
        first = step.first if first is None else first + step.first
        second = step.second if second is None else second + step.second
        definite = step.definite if definite is None else definite & step.definite
    assert first is not None and second is not None and definite is not None
    like = terminal.dtype if terminal.is_floating_point() else torch.get_default_dtype()

    def forwards(tensors: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(tensor.to(like) for tensor in reversed(tensors))

    return BellmanSweep(
        forwards(values),
        forwards(slopes),
        forwards(gains),
        forwards(terms),
        first.to(like),
        second.to(like),
        definite,
    )


def closed_loop(
    A: Matrices,
    B: Matrices,
    K: Sequence[Tensor | None],
    k: Sequence[Tensor],
    x0: Tensor,
    *,
    c: Matrices | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    r"""Follow linear dynamics under an affine policy: u_t = K_t x_t + k_t, x_{t+1} = A_t x_t + B_t u_t + c_t.

    Args:
        A: dynamics, shape ``(*batch, n', n)``; one for all steps, or a sequence.
        B: input matrix, shape ``(*batch, n', m)``; likewise.
        K: gains of shape ``(*batch, m, n)``, one a step; ``None`` for no feedback.
        k: feed-forward terms of shape ``(*batch, m, k)``, one a step.
        x0: first state, shape ``(*batch, n, k)``.
        c: drift, shape ``(*batch, n', k)``; zero by default.

    Returns:
        The T+1 states and the T controls.

    Example:
        >>> one = torch.eye(1)
        >>> states, controls = closed_loop(one, one, [-0.5 * one] * 2, [0 * one] * 2, one)
        >>> [float(x) for x in states]
        [1.0, 0.5, 0.25]
    """
    states, controls = [x0], []
    for t, (gain, term) in enumerate(zip(K, k, strict=True)):
        x = states[-1]
        u = term if gain is None else gain @ x + term
        following = _at(A, t) @ x + _at(B, t) @ u
        states.append(following if c is None else following + _at(c, t))
        controls.append(u)
    return tuple(states), tuple(controls)


def common_length(horizon: int | None, **matrices: Matrices) -> int:
    """The number of steps that all sequences and ``horizon`` agree on.

    Raises:
        ArgumentError: nothing gives a number of steps, or it is not positive.
        ShapeError: the numbers differ.
    """
    lengths = {name: len(M) for name, M in matrices.items() if not isinstance(M, Tensor)}
    if horizon is not None:
        lengths["horizon"] = horizon
    if not lengths:
        raise ArgumentError("horizon is None, but no matrix is a sequence: give the number of steps")
    if len(set(lengths.values())) > 1:
        raise ShapeError(
            f"the numbers of steps differ, {lengths}: give one matrix a step, or one for all steps"
        )
    steps = next(iter(lengths.values()))
    if steps < 1:
        raise ArgumentError(f"horizon is {steps}: there must be at least one step")
    return steps


def _at(matrices: Matrices, t: int) -> Tensor:
    return matrices if isinstance(matrices, Tensor) else matrices[t]


def _columns(*blocks: Matrices | None) -> int:
    for block in blocks:
        if block is not None:
            return (block if isinstance(block, Tensor) else block[0]).shape[-1]
    return 1


def _check(
    A: Tensor,
    B: Tensor,
    Q: Tensor,
    R: Tensor,
    P: Tensor,
    p: Tensor,
    S: Tensor | None,
    q: Tensor | None,
    r: Tensor | None,
    c: Tensor | None,
) -> None:
    out, n, m, k = A.shape[-2], A.shape[-1], B.shape[-1], p.shape[-1]
    wanted: tuple[tuple[str, Tensor | None, tuple[int, int]], ...] = (
        ("B", B, (out, m)),
        ("Q", Q, (n, n)),
        ("R", R, (m, m)),
        ("P", P, (out, out)),
        ("p", p, (out, k)),
        ("S", S, (m, n)),
        ("q", q, (n, k)),
        ("r", r, (m, k)),
        ("c", c, (out, k)),
    )
    for name, matrix, shape in wanted:
        if matrix is not None and (matrix.ndim < 2 or tuple(matrix.shape[-2:]) != shape):
            raise ShapeError(
                f"{name} has shape {tuple(matrix.shape)}, but its last two sizes must be {shape} "
                f"beside A of {tuple(A.shape)}, B of {tuple(B.shape)} and {k} columns"
            )


def _shifted(matrix: Tensor, by: float | Tensor) -> Tensor:
    if not isinstance(by, Tensor):
        if by == 0:
            return matrix
        return matrix + by * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return matrix + by.to(matrix)[..., None, None] * eye


def _factor(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factor, and where it exists; the identity stands where it does not."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    definite = (info == 0) & torch.isfinite(factor.sum((-2, -1)))
    if not bool(definite.all()):
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        factor = torch.where(definite[..., None, None], factor, eye)
    return factor, definite


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2
