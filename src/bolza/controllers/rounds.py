"""Batches for what a controller measures, beside those of the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bolza.core.errors import DataError
from bolza.ops.batches import batches_of, to_device

__all__ = ["Rounds"]

_BATCH = 32  # of what is drawn from a data set


class Rounds:
    """Batches of a pair, a list, a loader or a data set, round and round.

    Args:
        data: what to read; ``None`` for nothing.
        seed: of the order in which a data set is read.

    Attributes:
        there: whether there is anything to read.
        read: batches read so far; may be set, to go on from there.
    """

    def __init__(self, data: Any, seed: int) -> None:
        self.there = data is not None
        if hasattr(data, "train_x"):
            data = _Shuffled(data.train_x, data.train_y, seed)
        self.batches: Any = batches_of(data) if data is not None else ()
        self.read = 0
        self._passed = 0
        self._iterator: Iterator[Any] = iter(())

    def __getstate__(self) -> dict[str, Any]:
        """All but the iterator: a copy reads up to its place."""
        return vars(self) | {"_passed": 0, "_iterator": iter(())}

    def next(self, like: Tensor) -> Any:
        """The next pair (x, y), on the device of ``like`` and, from a data set, in its dtype."""
        if isinstance(self.batches, _Shuffled):
            x, y = self.batches.batch(self.read)
            found = (x.to(like.dtype) if x.is_floating_point() else x, y)
        elif isinstance(self.batches, Sequence):
            found = self.batches[self.read % len(self.batches)]
        else:
            if self.read < self._passed:
                self._passed, self._iterator = 0, iter(())
            while self._passed <= self.read:
                found = self._advance()
        self.read += 1
        return to_device(found[0], like.device), to_device(found[1], like.device)

    def _advance(self) -> Any:
        found = next(self._iterator, None)
        if found is None:
            self._iterator = iter(self.batches)
            found = next(self._iterator, None)
            if found is None:
                raise DataError("data has no batches: is the loader empty?")
        self._passed += 1
        return found


class _Shuffled(list[Any]):
    """Mini-batches of a data set in an order that follows from the seed and the epoch."""

    def __init__(self, x: Tensor, y: Tensor, seed: int) -> None:
        super().__init__([(x, y)])
        self.seed, self.epoch = seed, -1
        self.order = torch.arange(0)

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        x, y = self[0]
        size = min(_BATCH, len(x))
        epoch, place = divmod(number, len(x) // size)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self.epoch, self.order = epoch, torch.randperm(len(x), generator=generator)
        rows = self.order[place * size : (place + 1) * size].to(x.device)
        return x[rows], y[rows]
