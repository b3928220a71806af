"""The order in which a run sees its data, as a state that can be saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["BatchOrder"]


class BatchOrder:
    """Mini-batches without replacement, epoch after epoch, resumable at any step.

    Each epoch is a fresh permutation; what it leaves over after the last whole batch is left out. A batch
    of everything is taken as it is, with no permutation and no copy.

    Args:
        x: inputs, samples along the first axis.
        y: targets.
        batch_size: samples in a batch; at most all of them are taken.
        seed: seed of the permutations.

    Example:
        >>> order = BatchOrder(torch.arange(4), torch.arange(4), batch_size=2, seed=0)
        >>> first, second = order.next()[0], order.next()[0]
        >>> sorted([*first.tolist(), *second.tolist()])
        [0, 1, 2, 3]
    """

    def __init__(self, x: Tensor, y: Tensor, batch_size: int, seed: int) -> None:
        self.x = x
        self.y = y
        self.batch_size = min(batch_size, len(x))
        self.steps_per_epoch = len(x) // self.batch_size
        self._generator = torch.Generator().manual_seed(seed)
        self._before = self._generator.get_state()
        self._permutation: Tensor | None = None
        self._position = 0

    def next(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the next step."""
        if self.batch_size == len(self.x):
            return self.x, self.y
        if self._permutation is None or self._position == self.steps_per_epoch:
            self._shuffle()
            self._position = 0
        assert self._permutation is not None
        start = self._position * self.batch_size
        chosen = self._permutation[start : start + self.batch_size]
        self._position += 1
        return self.x.index_select(0, chosen), self.y.index_select(0, chosen)

    def _shuffle(self) -> None:
        self._before = self._generator.get_state()
        permutation = torch.randperm(len(self.x), generator=self._generator)
        self._permutation = permutation.to(self.x.device)

    def state_dict(self) -> dict[str, Any]:
        """Random state at the start of this epoch and the position in it."""
        return {
            "generator": self._before,
            "position": self._position,
            "started": self._permutation is not None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self._generator.set_state(state["generator"])
        self._permutation = None
        if state["started"]:
            self._shuffle()
        self._position = state["position"]
