"""Replacing a method of one object for a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Patched"]


class Patched:
    """A method of one object, replaced by a function that is given the original first.

    A deep copy of the object gets its own, unreplaced method.
    """

    def __init__(self, owner: Any, name: str, function: Callable[..., Any] | None) -> None:
        self.owner, self.name, self.function = owner, name, function
        self.before = owner.__dict__.get(name)
        if function is not None:
            owner.__dict__[name] = self

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method that was replaced."""
        if self.before is not None:
            return self.before(*args, **kwargs)
        return getattr(type(self.owner), self.name)(self.owner, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the replacement."""
        if self.function is None:
            return self.original(*args, **kwargs)
        return self.function(self.original, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Patched:
        return Patched(memo.get(id(self.owner), self.owner), self.name, None)

    def undo(self) -> None:
        """Give the object its own method back."""
        self.function = None  # where something else was put on top, this stays in place and does nothing
        if self.owner.__dict__.get(self.name) is self:
            del self.owner.__dict__[self.name]
            if self.before is not None:
                self.owner.__dict__[self.name] = self.before
