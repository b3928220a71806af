"""What the contracts share: the error, and bit-for-bit comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["ContractError", "identical", "require"]


class ContractError(AssertionError):
    """A clause of a contract does not hold.

    Args:
        clause: name of the clause.
        message: what was seen, and what usually causes it.
    """

    def __init__(self, clause: str, message: str) -> None:
        super().__init__(f"{clause}: {message}")
        self.clause = clause


def require(holds: bool, clause: str, message: str) -> None:
    """Raise a ContractError unless ``holds``."""
    if not holds:
        raise ContractError(clause, message)


def identical(a: Any, b: Any) -> bool:
    """Whether two containers have the same structure, types and bits (NaN equals NaN).

    Example:
        >>> identical({"x": torch.ones(2)}, {"x": torch.ones(2)})
        True
        >>> identical([torch.ones(2)], [torch.ones(2, dtype=torch.float64)])
        False
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same_kind = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
        return same_kind and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    if type(a) is not type(b):
        return False
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, Sequence) and not isinstance(a, str | bytes):
        return len(a) == len(b) and all(map(identical, a, b))
    return bool(a == b or (a != a and b != b))
