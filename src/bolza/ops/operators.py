"""A symmetric matrix given by its products, and a number with its error bar."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bolza.ops.errors import DivergenceError, ShapeError

if TYPE_CHECKING:
    import numpy as np
    from scipy.sparse.linalg import LinearOperator as ScipyOperator

__all__ = ["Estimate", "LinearOperator"]


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error (0 when it is exact).

    Example:
        >>> print(Estimate(6.131, 0.02))
        6.131 ± 0.02
    """

    value: float
    error: float = 0.0

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.error:.1g}" if self.error else f"{self.value:.6g}"


@dataclass(frozen=True)
class LinearOperator:
    """A symmetric matrix A of size (n, n), given by v ↦ A v on flat vectors.

    ``op @ v`` takes a vector ``(n,)`` or a matrix ``(n, k)``.

    Args:
        product: v ↦ A v; ``(n,)`` to ``(n,)``, and ``(n, k)`` to ``(n, k)`` if ``blocks``.
        size: n.
        dtype: of the vectors.
        device: of the vectors.
        blocks: whether ``product`` takes several columns at once.

    Raises:
        ShapeError: ``op @ v`` with a ``v`` of another length.
        DivergenceError: a product is not finite.

    Example:
        >>> double = LinearOperator(lambda v: 2 * v, size=3)
        >>> double.shape, double @ torch.ones(3)
        ((3, 3), tensor([2., 2., 2.]))
    """

    product: Callable[[Tensor], Tensor]
    size: int
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    blocks: bool = False

    @classmethod
    def from_matrix(cls, matrix: Tensor) -> LinearOperator:
        """Wrap a dense symmetric matrix."""
        return cls(lambda v: matrix @ v, matrix.shape[0], matrix.dtype, matrix.device, blocks=True)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        return (self.size, self.size)

    def matvec(self, v: Tensor) -> Tensor:
        """Return A v for a vector ``(n,)`` or for the columns of ``(n, k)``."""
        return self @ v

    def __matmul__(self, v: Tensor) -> Tensor:
        if v.ndim not in (1, 2) or v.shape[0] != self.size:
            raise ShapeError(
                f"v has shape {tuple(v.shape)}, but the operator is {self.size} × {self.size}: "
                f"give a vector of length {self.size} or a matrix with that many rows"
            )
        v = v.to(self.device, self.dtype)
        if v.ndim == 1 or self.blocks:
            out = self.product(v)
        else:
            out = torch.stack([self.product(column) for column in v.unbind(1)], 1)
        if not torch.isfinite(out).all():
            raise DivergenceError("a product with the operator is not finite: check model, loss and data")
        return out

    def dense(self) -> Tensor:
        """Return A as a matrix, by n products; for small n only."""
        return self @ torch.eye(self.size, dtype=self.dtype, device=self.device)

    def to_scipy(self) -> ScipyOperator:
        """Return the same operator for ``scipy.sparse.linalg``."""
        import numpy as np
        from scipy.sparse.linalg import LinearOperator as ScipyOperator

        def product(v: np.ndarray) -> np.ndarray:
            columns = torch.from_numpy(np.ascontiguousarray(v).reshape(self.size, -1))
            out: np.ndarray = (self @ columns).cpu().numpy()
            return out.reshape(v.shape)

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        names = ("matvec", "rmatvec", "matmat", "rmatmat")
        return ScipyOperator(self.shape, dtype=dtype, **dict.fromkeys(names, product))
