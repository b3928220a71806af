"""What can go wrong, named so that a caller can tell the cases apart.

Every message names the argument, gives its value and says what to do. Errors that stem from a
wrong value also derive from the built-in exception a Python programmer would expect.
"""

from __future__ import annotations

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


class BolzaError(Exception):
    """Base of every error this library raises on purpose; its text is one sentence for a person."""


class ArgumentError(BolzaError, ValueError):
    """An argument has a value that makes no sense."""


class ShapeError(BolzaError, ValueError):
    """Two tensors that belong together do not have matching shapes."""


class DataError(BolzaError, ValueError):
    """The data cannot be used: not finite, labels out of range, empty, or of unequal length."""


class TraceError(BolzaError):
    """A model cannot be read as a chain of stages."""


class UnsupportedError(BolzaError, TypeError):
    """The request is sound, but lies outside what the method can do."""


class UserCodeError(BolzaError):
    """Code that the user named (a factory, a loader, a loss) raised; the cause is chained."""


class CheckpointError(BolzaError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class ReportError(BolzaError, OSError):
    """A report cannot be written where it was asked for."""


class DivergenceError(BolzaError, ArithmeticError):
    """A number stopped being finite.

    Args:
        message: one sentence.
        step: step of the run at which it happened, if there is one.
        layer: name of the first layer or parameter that was not finite, if it is known.
    """

    def __init__(self, message: str, *, step: int | None = None, layer: str | None = None) -> None:
        super().__init__(message)
        self.step = step
        self.layer = layer


class ConvergenceWarning(UserWarning):
    """An iteration stopped before it met its tolerance; the result says how far it came."""
