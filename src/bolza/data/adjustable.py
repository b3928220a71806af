"""Batches whose size can be changed while an epoch runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from bolza.core.errors import ArgumentError, DataError

__all__ = ["AdjustableBatchSampler"]


class AdjustableBatchSampler(Sampler[list[int]]):
    """Shuffled batches of indices, of a size that may be set at any time.

    For ``DataLoader(data, batch_sampler=...)``. An epoch is a permutation that is cut at the size of the moment, so
    that each sample is seen once an epoch however often the size changes; the next batch drawn has the new size. A
    loader with workers has ``prefetch_factor * num_workers`` batches drawn ahead, of the old size: read the size of a
    batch off the batch.

    Args:
        samples: number of samples, or the data set.
        batch_size: size of the batches, at first.
        shuffle: a fresh permutation every epoch; else the samples in their order.
        drop_last: leave out what remains of an epoch when it is less than a batch; all of it is always a batch.
        seed: seed of the permutations.

    Attributes:
        batch_size: size of the next batch; set it.
        drawn_size: samples in the batch drawn last, fewer at the end of an epoch; 0 before the first.
        epoch: epochs begun.

    Raises:
        ArgumentError: there are no samples, or the size is not positive.

    Example:
        >>> sampler = AdjustableBatchSampler(10, batch_size=2, shuffle=False)
        >>> batches = iter(sampler)
        >>> next(batches), next(batches)
        ([0, 1], [2, 3])
        >>> sampler.batch_size = 4
        >>> list(batches)
        [[4, 5, 6, 7], [8, 9]]
    """

    def __init__(
        self,
        samples: int | Sized,
        batch_size: int,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        self.samples = samples if isinstance(samples, int) else len(samples)
        if self.samples < 1:
            raise ArgumentError(f"samples={self.samples}: there must be at least one")
        self.batch_size = batch_size
        self.shuffle, self.drop_last = shuffle, drop_last
        self.epoch = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._before = self._generator.get_state()
        self._order = torch.empty(0, dtype=torch.long)
        self._cuts: list[int] = []  # where the batches of this epoch begin, and the end of the last one
        self._resuming = False

    @property
    def batch_size(self) -> int:
        """Size of the next batch."""
        return self._size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        if isinstance(value, bool) or int(value) != value or value < 1:
            raise ArgumentError(f"batch_size={value!r} must be a positive whole number")
        self._size = int(value)

    def __iter__(self) -> Iterator[list[int]]:
        """Indices of the batches of a new epoch, or of the rest of one that was loaded."""
        if not self._resuming:
            self.epoch += 1
            self._before = self._generator.get_state()
            self._order, self._cuts = self._permutation(), [0]
        self._resuming = False
        epoch = self.epoch
        while not self._over(start := self._cuts[-1]):
            stop = min(start + self._size, self.samples)
            self._cuts.append(stop)
            yield self._order[start:stop].tolist()
            if epoch != self.epoch:
                raise ArgumentError(
                    "a second pass over the sampler has begun before the first one ended: give each loop its own"
                )

    @property
    def drawn_size(self) -> int:
        """Samples in the batch drawn last."""
        return self._cuts[-1] - self._cuts[-2] if len(self._cuts) > 1 else 0

    def __len__(self) -> int:
        """Batches of a whole epoch at the present size."""
        whole, rest = divmod(self.samples, self._size)
        return max(1, whole) if self.drop_last or not rest else whole + 1

    def state_dict(self, taken: int | None = None) -> dict[str, Any]:
        """Where the epoch stands.

        Args:
            taken: batches that the loop has received since this epoch was begun, or loaded; needed only with a
                loader whose workers have drawn more than that. All that were drawn, by default.
        """
        drawn = max(0, len(self._cuts) - 1)
        count = drawn if taken is None else taken
        if not 0 <= count <= drawn:
            raise ArgumentError(f"taken={taken}: {drawn} batches of this epoch have been drawn")
        return {
            "generator": self._before.clone(),
            "epoch": self.epoch,
            "position": self._cuts[count] if self._cuts else 0,
            "batch_size": self._size,
            "samples": self.samples,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken: the next pass is the rest of that epoch, if any is left."""
        if state.get("samples", self.samples) != self.samples:
            raise DataError(
                f"the state is of {state['samples']} samples, but there are {self.samples}: give the same data"
            )
        self._generator.set_state(state["generator"].cpu())
        self.epoch, self.batch_size = state["epoch"], state["batch_size"]
        self._before = self._generator.get_state()
        if self.epoch > 0:
            self._order, self._cuts = self._permutation(), [state["position"]]
            self._resuming = not self._over(state["position"])

    def _over(self, position: int) -> bool:
        left = self.samples - position
        return left == 0 or (self.drop_last and left < self._size and position > 0)

    def _permutation(self) -> Tensor:
        if not self.shuffle:
            return torch.arange(self.samples)
        return torch.randperm(self.samples, generator=self._generator)
