"""A feedback law for hyper-parameters: what a run shows goes in, what the optimizer does next comes out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

__all__ = ["Policy"]

S = TypeVar("S")


@runtime_checkable
class Policy(Protocol[S]):
    """A feedback law u = π(history), as a pure pair of functions.

    ``init()`` gives the state of the law before the run; ``update(state, observation)`` takes what
    the run showed in one step and returns the new state and the action: new values for entries of
    the optimizer's parameter groups (``{"lr": 0.1}``). The state is plain data (numbers, tensors,
    dicts, tuples) so that it can be saved with a checkpoint.

    Example:
        >>> class Halve:
        ...     def init(self):
        ...         return {"lr": 1.0}
        ...     def update(self, state, observation):
        ...         lr = state["lr"] / 2
        ...         return {"lr": lr}, {"lr": lr}
        >>> isinstance(Halve(), Policy)
        True
    """

    def init(self) -> S:
        """State of the law before the first step."""
        ...

    def update(self, state: S, observation: Mapping[str, Any]) -> tuple[S, dict[str, float]]:
        """New state and action after one observation."""
        ...
