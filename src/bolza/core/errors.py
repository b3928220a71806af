"""What can go wrong, named so that a caller can tell the cases apart.

The definitions are in :mod:`bolza.ops.errors`, the lowest layer, so that every layer can raise them.
"""

from __future__ import annotations

from bolza.ops.errors import (
    ArgumentError,
    BolzaError,
    CheckpointError,
    ConvergenceWarning,
    DataError,
    DivergenceError,
    ReportError,
    ShapeError,
    TraceError,
    UnsupportedError,
    UserCodeError,
)

__all__ = [
    "ArgumentError",
    "BolzaError",
    "CheckpointError",
    "ConvergenceWarning",
    "DataError",
    "DivergenceError",
    "ReportError",
    "ShapeError",
    "TraceError",
    "UnsupportedError",
    "UserCodeError",
]
