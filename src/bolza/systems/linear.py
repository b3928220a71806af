r"""Linear dynamics and quadratic cost: the problem whose every answer is known.

    x_{t+1} = A_t x_t + B_t u_t
    J = ½ x_Tᵀ Q_T x_T + ½ Σ_t (x_tᵀ Q_t x_t + u_tᵀ R_t u_t)

The optimal control and the costates come from :mod:`bolza.ops.riccati`: with one sample, or with
``reduction="sum"``, p_t = P_t x_t along the optimum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError, ShapeError

__all__ = ["LinearSystem", "QuadraticCost"]

Matrices: TypeAlias = Tensor | Sequence[Tensor]


class LinearSystem:
    r"""The system x_{t+1} = A_t x_t + B_t u_t.

    States have shape ``(*batch, n)`` and controls ``(*batch, m)``, or ``(m,)`` where one control
    drives all samples.

    Args:
        A: shape ``(n, n)`` or ``(*batch, n, n)``; or a sequence of matrices, one a step, whose sizes
            may change from step to step.
        B: shape ``(n, m)`` or ``(*batch, n, m)``; or a sequence.
        horizon: number of steps; needed unless A or B is a sequence.
        controls: nominal controls, one a step; zeros of shape ``(m,)`` by default.

    Raises:
        ArgumentError: no horizon, or one that is not positive.
        ShapeError: shapes or lengths do not belong together.

    Example:
        >>> from bolza.core import rollout
        >>> double_integrator = LinearSystem(
        ...     torch.tensor([[1.0, 0.5], [0.0, 1.0]]), torch.tensor([[0.0], [0.5]]), horizon=4)
        >>> rollout(double_integrator, torch.tensor([[0.0, 1.0], [0.0, -1.0]])).states[-1]
        tensor([[ 2.,  1.],
                [-2., -1.]])
    """

    def __init__(
        self, A: Matrices, B: Matrices, horizon: int | None = None, controls: Sequence[Tensor] | None = None
    ) -> None:
        lengths = {name: len(M) for name, M in (("A", A), ("B", B)) if not isinstance(M, Tensor)}
        lengths |= {} if horizon is None else {"horizon": horizon}
        lengths |= {} if controls is None else {"controls": len(controls)}
        if not lengths:
            raise ArgumentError(
                "horizon is None, but neither A nor B is a sequence: give the number of steps"
            )
        if len(set(lengths.values())) > 1:
            raise ShapeError(
                f"the numbers of steps differ, {lengths}: give one matrix a step, or one for all steps"
            )
        self.horizon = next(iter(lengths.values()))
        if self.horizon < 1:
            raise ArgumentError(f"horizon is {self.horizon}: there must be at least one step")
        self.A = (A,) * self.horizon if isinstance(A, Tensor) else tuple(A)
        self.B = (B,) * self.horizon if isinstance(B, Tensor) else tuple(B)
        size = self.A[0].shape[-1]
        for t, (a, b) in enumerate(zip(self.A, self.B, strict=True)):
            if a.shape[-1] != size or b.shape[-2] != a.shape[-2]:
                raise ShapeError(
                    f"in step {t} A has shape {tuple(a.shape)} and B {tuple(b.shape)}, but the state has {size} "
                    "entries: A needs as many columns, and B as many rows as A"
                )
            size = a.shape[-2]
        self.controls = (
            tuple(b.new_zeros(b.shape[-1]) for b in self.B) if controls is None else tuple(controls)
        )

    def step(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        """Return A_t x + B_t u."""
        return _apply(self.A[t], x) + _apply(self.B[t], u)


class QuadraticCost:
    r"""The cost ½ x_TᵀQ_T x_T + ½ Σ_t (x_tᵀQ_t x_t + u_tᵀR_t u_t), with the halves.

    Over leading dimensions the quadratic forms are averaged, as losses are; a control without
    them, which all samples share, counts once.

    Args:
        Q: weight of the state, symmetric, shape ``(n, n)``; or a sequence, one a step.
        R: weight of the control, symmetric, shape ``(m, m)``; or a sequence.
        Q_T: weight of the last state; by default Q, which must then be one matrix.
        reduction: ``"mean"`` or ``"sum"`` over samples.

    Raises:
        ArgumentError: no Q_T although Q is a sequence, or an unknown reduction.

    Example:
        >>> cost = QuadraticCost(torch.eye(2), torch.eye(1))
        >>> cost.running(0, torch.ones(2), torch.ones(1)), cost.terminal(torch.ones(2))
        (tensor(1.5000), tensor(1.))
    """

    def __init__(
        self,
        Q: Matrices,
        R: Matrices,
        Q_T: Tensor | None = None,
        *,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        if reduction not in ("mean", "sum"):
            raise ArgumentError(f"reduction is {reduction!r}: it must be 'mean' or 'sum'")
        if Q_T is None:
            if not isinstance(Q, Tensor):
                raise ArgumentError("Q_T is None, but Q is a sequence: give the weight of the last state")
            Q_T = Q
        self.Q, self.R, self.Q_T, self.reduction = Q, R, Q_T, reduction

    def terminal(self, x: Tensor) -> Tensor:
        """Return ½ xᵀQ_T x."""
        return self._half(self.Q_T, x)

    def running(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        """Return ½ xᵀQ_t x + ½ uᵀR_t u."""
        Q = self.Q if isinstance(self.Q, Tensor) else self.Q[t]
        R = self.R if isinstance(self.R, Tensor) else self.R[t]
        return self._half(Q, x) + self._half(R, u)

    def _half(self, weight: Tensor, x: Tensor) -> Tensor:
        forms = (x * _apply(weight, x)).sum(-1) / 2
        return forms.mean() if self.reduction == "mean" else forms.sum()


def _apply(matrix: Tensor, vectors: Tensor) -> Tensor:
    if matrix.ndim == 2:
        return vectors @ matrix.mT
    return torch.einsum("...ij,...j->...i", matrix, vectors)
