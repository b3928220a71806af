"""Ctrl-C between two steps instead of within one."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["InterruptGuard"]


class InterruptGuard:
    """Note Ctrl-C, let the work in progress end, and raise only on one that comes too often.

    Inside the context ``requested`` becomes true on Ctrl-C. Guards nest: the inner one takes over, knows of
    what the outer one has noted, and gives back. A handler that is neither Python's own nor a guard's is left
    in place, and so are threads other than the main one, where no signal arrives.

    Args:
        patience: how many times Ctrl-C is only noted; the next one raises ``KeyboardInterrupt``. May be set
            while the guard is in place.

    Example:
        >>> with InterruptGuard() as guard:
        ...     guard.requested
        False
    """

    def __init__(self, patience: int = 1) -> None:
        self.patience = patience
        self.requested = False
        self._noted = 0
        self._before: Any = None

    def __enter__(self) -> InterruptGuard:
        handler = signal.getsignal(signal.SIGINT)
        outer = getattr(handler, "__self__", None)
        nested = isinstance(outer, InterruptGuard)
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and (nested or handler is signal.default_int_handler):
            self._before = handler
            signal.signal(signal.SIGINT, self._note)
            if isinstance(outer, InterruptGuard):
                self.requested = outer.requested
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted >= self.patience:
            raise KeyboardInterrupt
        self._noted += 1
        self.requested = True
