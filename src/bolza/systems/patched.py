"""Replacing a method of one object for a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Patched"]


class Patched:
    """A method of one object, replaced by a function that is given the original first.

    A copy or pickle of the object has its own, unreplaced method.
    """

    def __init__(self, owner: Any, name: str, function: Callable[..., Any] | None) -> None:
        self.owner, self.name, self.function = owner, name, function
        self.before = owner.__dict__.get(name)
        # inspect.signature follows this: who asks for the arguments is told those of the original
        self.__wrapped__ = getattr(type(owner), name).__get__(owner) if self.before is None else self.before
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

    def __getstate__(self) -> dict[str, Any]:
        return {"owner": self.owner, "name": self.name, "before": self.before}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, function=None)
        self.__wrapped__ = self.original

    def undo(self) -> None:
        """Give the object its own method back."""
        self.function = None  # where something else was put on top, this stays in place and does nothing
        if self.owner.__dict__.get(self.name) is self:
            del self.owner.__dict__[self.name]
            if self.before is not None:
                self.owner.__dict__[self.name] = self.before
