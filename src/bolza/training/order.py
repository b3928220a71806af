"""The order in which a run sees its data, as a state that can be saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError

__all__ = ["BatchOrder"]


class BatchOrder:
    """Mini-batches without replacement, epoch after epoch, resumable at any step.

    Each epoch is a fresh permutation; what it leaves over after the last whole batch is left out. A batch
    of everything is taken as it is, with no permutation and no copy. ``batch_size`` may be set at any time:
    the next batch has the new size, and goes on where the last one ended.

    Args:
        x: inputs, samples along the first axis.
        y: targets.
        batch_size: samples in a batch; at most all of them are taken.
        seed: seed of the permutations.

    Attributes:
        drawn: samples handed out so far.

    Raises:
        ArgumentError: ``batch_size`` is less than 1.

    Example:
        >>> order = BatchOrder(torch.arange(4), torch.arange(4), batch_size=2, seed=0)
        >>> first, second = order.next()[0], order.next()[0]
        >>> sorted([*first.tolist(), *second.tolist()])
        [0, 1, 2, 3]
        >>> order.batch_size = 3
        >>> len(order.next()[0]), order.steps_per_epoch, order.drawn
        (3, 1, 7)
    """

    def __init__(self, x: Tensor, y: Tensor, batch_size: int, seed: int) -> None:
        self.x = x
        self.y = y
        self.batch_size = batch_size
        self.drawn = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._before = self._generator.get_state()
        self._permutation: Tensor | None = None
        self._position = 0  # in samples

    @property
    def batch_size(self) -> int:
        """Samples in the next batch."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        if size < 1:
            raise ArgumentError(f"batch_size={size} must be at least 1")
        self._batch_size = min(int(size), len(self.x))

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches of the present size in the data."""
        return len(self.x) // self.batch_size

    def next(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the next step."""
        size = self.batch_size
        self.drawn += size
        if size == len(self.x):
            return self.x, self.y
        if self._permutation is None or self._position + size > len(self.x):
            self._shuffle()
            self._position = 0
        assert self._permutation is not None
        chosen = self._permutation[self._position : self._position + size]
        self._position += size
        return self.x.index_select(0, chosen), self.y.index_select(0, chosen)

    def _shuffle(self) -> None:
        self._before = self._generator.get_state()
        permutation = torch.randperm(len(self.x), generator=self._generator)
        self._permutation = permutation.to(self.x.device)

    def state_dict(self) -> dict[str, Any]:
        """Random state at the start of this epoch, the position in it and the size of the batches."""
        return {
            "generator": self._before,
            "position": self._position,
            "batch_size": self.batch_size,
            "drawn": self.drawn,
            "started": self._permutation is not None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self._generator.set_state(state["generator"])
        self._permutation = None
        if state["started"]:
            self._shuffle()
        self.batch_size = state["batch_size"]
        self._position, self.drawn = state["position"], state["drawn"]
