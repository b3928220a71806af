r"""Batches in which each example counts by its weight.

For weights γ the objective is Σ_n γ_n ℓ_n / Σ γ. Two ways to follow it with batches:

* draw example n in proportion to γ_n, and take the plain mean of its batch;
* go through all that have a weight, and weigh their losses.

The draws of an epoch are systematic: of D draws example n is taken ⌊Dγ_n/Σγ⌋ or ⌈Dγ_n/Σγ⌉ times, so that equal
weights give an ordinary epoch, each example once, and the noise of drawing is that of the fractions only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Sampler

from bolza.core.errors import ArgumentError, DataError, ShapeError
from bolza.data.dataset import Dataset

__all__ = ["WeightedBatchSampler", "WeightedBatches", "systematic_counts"]


def systematic_counts(weights: Tensor, draws: int, generator: torch.Generator | None = None) -> Tensor:
    r"""How often each example is taken in ``draws`` draws: ⌊Dγ_n⌋ or ⌈Dγ_n⌉ for weights of sum 1, of mean Dγ_n.

    One uniform number U shifts a comb of D teeth over the weights, laid end to end in random order.

    Args:
        weights: γ ≥ 0, shape ``(n,)``, in any scale.
        draws: D.
        generator: source of U and of the order.

    Returns:
        Counts of sum D, shape ``(n,)``, int64, on the CPU.

    Raises:
        ArgumentError: ``draws`` is not positive.
        DataError: a weight is negative or not finite, or all are zero.

    Reference: Madow (1949), *On the theory of systematic sampling, II*.

    Example:
        >>> systematic_counts(torch.tensor([2.0, 0.0, 1.0, 1.0]), 4)
        tensor([2, 0, 1, 1])
    """
    if draws < 1:
        raise ArgumentError(f"draws={draws} must be at least 1")
    w = _checked(weights)
    order = torch.randperm(len(w), generator=generator)
    teeth = (w[order].cumsum(0) * (draws / float(w.sum()))).clamp_max(draws)
    shift = torch.rand((), generator=generator, dtype=torch.float64)
    last = int(w[order].nonzero()[-1])
    teeth[last:] = draws  # rounding must not lose the last draw
    # a sum that is a whole number but for rounding counts as one
    ends = (teeth + 1e-9 - shift).ceil().clamp(0, draws).long()
    ends[last:] = draws
    counts = torch.zeros(len(w), dtype=torch.long)
    counts[order] = ends.diff(prepend=torch.zeros(1, dtype=torch.long))
    return counts


def _checked(weights: Tensor) -> Tensor:
    w = torch.as_tensor(weights).detach().double().cpu()
    if w.ndim != 1:
        raise ShapeError(f"weights has shape {tuple(w.shape)}: give one number an example, (n,)")
    bad = ~(w.isfinite() & (w >= 0))
    if bool(bad.any()):
        n = int(bad.nonzero()[0])
        raise DataError(f"weights[{n}] is {float(w[n])}: weights are finite and not negative")
    if not bool(w.sum() > 0):
        raise DataError("all weights are zero: give at least one example a weight")
    return w


class WeightedBatchSampler(Sampler[list[int]]):
    """Batches of indices, each example in proportion to its weight, for ``DataLoader(batch_sampler=…)``.

    An epoch has as many draws as there are examples. ``weights`` can be set at any time and takes effect with the
    next epoch. A state taken within an epoch goes on with the next batch of that epoch; a loader with workers draws
    ahead of what it hands out, so save at the end of an epoch there.

    Args:
        weights: γ ≥ 0, shape ``(n,)``, in any scale.
        batch_size: draws in a batch.
        draws: of an epoch; n by default.
        drop_last: leave out a last batch that is not whole.
        seed: of the draws.

    Attributes:
        goes_on: whether the next iteration goes on with an epoch that a loaded state was within.

    Raises:
        ArgumentError: ``batch_size`` is not between 1 and the number of draws.
        DataError: a weight is negative or not finite, or all are zero.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> sampler = WeightedBatchSampler(torch.tensor([0.0, 1.0, 1.0, 2.0]), batch_size=2)
        >>> sorted(int(i) for batch in DataLoader(torch.arange(4), batch_sampler=sampler) for i in batch)
        [1, 2, 3, 3]
    """

    def __init__(
        self,
        weights: Tensor,
        batch_size: int,
        *,
        draws: int | None = None,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        self._weights: Tensor = _checked(weights)
        self.draws = len(self._weights) if draws is None else draws
        if not batch_size <= self.draws:
            raise ArgumentError(
                f"batch_size={batch_size} must lie between 1 and the {self.draws} draws of an epoch"
            )
        self.batch_size, self.drop_last = batch_size, drop_last
        self._generator = torch.Generator().manual_seed(seed)
        self._before = self._generator.get_state()  # at the start of the epoch that is under way
        self._epoch, self._position = self._weights, 0
        self._pass = 0
        self.goes_on = False

    @property
    def batch_size(self) -> int:
        """Draws in a batch; settable between epochs."""
        return self._size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        if isinstance(value, bool) or int(value) != value or value < 1:
            raise ArgumentError(f"batch_size={value!r} must be a positive whole number")
        self._size = int(value)

    @property
    def weights(self) -> Tensor:
        """γ of the next epoch."""
        return self._weights

    @weights.setter
    def weights(self, value: Tensor) -> None:
        checked = _checked(value)
        if len(checked) != len(self._weights):
            raise ShapeError(f"weights has {len(checked)} entries for {len(self._weights)} examples")
        self._weights = checked

    def __len__(self) -> int:
        """Batches of an epoch."""
        whole, rest = divmod(self.draws, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        """Batches of one epoch; right after a state was loaded, of what is left of that one."""
        if not self.goes_on:
            self._before, self._epoch, self._position = self._generator.get_state(), self._weights, 0
        self.goes_on = False
        self._pass += 1
        this = self._pass
        self._generator.set_state(self._before)
        counts = systematic_counts(self._epoch, self.draws, self._generator)
        chosen = torch.arange(len(counts)).repeat_interleave(counts)
        chosen = chosen[torch.randperm(self.draws, generator=self._generator)]
        parts = chosen.split(self.batch_size)[: len(self)]
        while self._position < len(parts):
            self._position += 1
            yield parts[self._position - 1].tolist()
            if this != self._pass:
                raise ArgumentError(
                    "a second pass over the batches has begun before the first one ended: give each loop its own"
                )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as tensors and numbers."""
        return {
            "weights": self._weights,
            "draws": self.draws,
            "batch_size": self.batch_size,
            "generator": self._generator.get_state(),
            "before": self._before,
            "epoch": self._epoch,
            "position": self._position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        if len(state["weights"]) != len(self._weights):
            raise ShapeError(
                f"the state is of {len(state['weights'])} examples, but there are {len(self._weights)}: give the same "
                "data"
            )
        self._weights, self.draws, self.batch_size = state["weights"], state["draws"], state["batch_size"]
        self._generator.set_state(state["generator"])
        self._before, self._epoch, self._position = state["before"], state["epoch"], state["position"]
        self.goes_on = 0 < self._position < len(self)


class WeightedBatches:
    r"""Batches of tensors in which each example counts by its weight, epoch after epoch.

    With ``how='draw'`` an example is drawn in proportion to its weight, batches are ``(x, y)`` and the loss is the
    plain mean. With ``how='weigh'`` every example that has a weight comes once an epoch, batches are ``(x, y, w)``,
    and the loss is ``(w * losses).mean()``; the weights w have mean 1 over an epoch.

    Args:
        data: a :class:`~bolza.data.Dataset`, of which the training samples are taken, or a pair ``(x, y)``.
        weights: γ ≥ 0, shape ``(n,)``, in any scale; settable, from the next epoch on.
        batch_size: examples in a batch; the last of an epoch may be smaller.
        how: ``'draw'`` or ``'weigh'``.
        seed: of the order and the draws.

    Raises:
        ArgumentError: ``how`` or ``batch_size`` makes no sense.
        ShapeError: weights are not as many as the examples.
        DataError: a weight is negative or not finite, or all are zero.

    Example:
        >>> pair = (torch.arange(4.0), torch.arange(4))
        >>> batches = WeightedBatches(pair, torch.tensor([0.0, 1.0, 1.0, 2.0]), 2)
        >>> sorted(float(v) for x, y in batches for v in x)
        [1.0, 2.0, 3.0, 3.0]
        >>> sum(float((w * x).sum()) for x, y, w in WeightedBatches(pair, batches.weights, 2, how="weigh"))
        6.75
    """

    def __init__(
        self,
        data: Dataset | tuple[Tensor, Tensor],
        weights: Tensor,
        batch_size: int,
        *,
        how: Literal["draw", "weigh"] = "draw",
        seed: int = 0,
    ) -> None:
        if how not in ("draw", "weigh"):
            raise ArgumentError(f"how={how!r} is not known: choose 'draw' or 'weigh'")
        self.x, self.y = (data.train_x, data.train_y) if isinstance(data, Dataset) else data
        if not len(self.x) == len(self.y) == len(weights):
            raise ShapeError(
                f"there are {len(self.x)} inputs, {len(self.y)} targets and {len(weights)} weights: one for each"
            )
        self.how = how
        self._sampler = WeightedBatchSampler(_checked(weights), batch_size, draws=len(weights), seed=seed)
        self.weights = weights
        self._taken = self._given  # of the epoch that is under way

    @property
    def weights(self) -> Tensor:
        """γ of the next epoch."""
        return self._given

    @weights.setter
    def weights(self, value: Tensor) -> None:
        if len(_checked(value)) != len(self.x):
            raise ShapeError(f"weights has {len(value)} entries for {len(self.x)} examples")
        self._given = torch.as_tensor(value).detach().clone()  # the caller may go on changing his

    @property
    def batch_size(self) -> int:
        """Examples in a batch; settable between epochs."""
        return self._sampler.batch_size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        self._sampler.batch_size = value

    def __len__(self) -> int:
        """Batches of the next epoch."""
        draws = len(self.x) if self.how == "draw" else int((_checked(self._given) > 0).sum())
        return -(-draws // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Batches of one epoch; right after a state was loaded, of what is left of that one."""
        if not self._sampler.goes_on:
            self._taken = self._given
            w = _checked(self._taken)
            if self.how == "draw":
                self._sampler.weights = w
            else:
                self._sampler.weights, self._sampler.draws = (w > 0).double(), int((w > 0).sum())
        w = _checked(self._taken)
        dtype = self.x.dtype if self.x.is_floating_point() else torch.get_default_dtype()
        factors = (w * (int((w > 0).sum()) / float(w.sum()))).to(device=self.x.device, dtype=dtype)
        for rows in self._sampler:
            index = torch.tensor(rows, device=self.x.device)
            batch = (self.x.index_select(0, index), self.y.index_select(0, index))
            yield batch if self.how == "draw" else (*batch, factors.index_select(0, index))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as tensors and numbers."""
        return {"weights": self._given, "taken": self._taken, "sampler": self._sampler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.weights, self._taken = state["weights"], state["taken"]
        self._sampler.load_state_dict(state["sampler"])
