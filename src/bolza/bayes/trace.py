"""The weights that a chain passed through, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError, CheckpointError, DivergenceError, ShapeError
from bolza.core.tree_files import load_tree, save_tree

__all__ = ["Trace"]


class Trace:
    """A collector of samples of a network's weights, thinned so that they never outgrow a given number.

    When it is full every second sample is dropped and only half as many are taken from then on: what is kept is
    always spread evenly over the whole run. Floating-point buffers, such as running statistics, are kept with the
    weights they belong to.

    Args:
        model: the network that the sampler moves.
        thin: keep one of so many calls of :meth:`record`.
        warmup: calls that are left out first.
        capacity: the largest number of samples, at least 2; memory is that many copies of the weights.
        names: parameters and buffers to keep; all that are floating-point by default.
        dtype: store in this type, for instance ``torch.bfloat16``; that of the weights by default.
        device: store on this device; that of the weights by default.

    Attributes:
        thin: the present thinning.
        seen: number of calls so far.

    Raises:
        ArgumentError: a number is out of its range, or a name is unknown.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> trace = Trace(net, warmup=2, capacity=4)
        >>> for k in range(12):
        ...     _ = nn.init.constant_(net.weight, k)
        ...     _ = trace.record()
        >>> trace.samples["weight"].flatten(), trace.thin
        (tensor([5., 9.]), 4)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        thin: int = 1,
        warmup: int = 0,
        capacity: int = 100,
        names: Iterable[str] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if thin < 1 or warmup < 0 or capacity < 2:
            raise ArgumentError(
                f"thin={thin} must be at least 1, warmup={warmup} at least 0, capacity={capacity} at least 2"
            )
        known = {
            name: value
            for name, value in (*model.named_parameters(), *model.named_buffers())
            if value.is_floating_point()
        }
        chosen = list(known) if names is None else list(names)
        unknown = [name for name in chosen if name not in known]
        if unknown or not chosen:
            raise ArgumentError(
                f"names holds {unknown}, which the model does not have: choose from {list(known)}"
            )
        self.model, self.names = model, chosen
        self.thin, self.warmup, self.capacity, self.seen, self.count = thin, warmup, capacity, 0, 0
        self._store = {
            name: torch.empty(
                (capacity, *known[name].shape),
                dtype=dtype or known[name].dtype,
                device=device or known[name].device,
            )
            for name in chosen
        }

    def record(self) -> bool:
        """Look at the weights, after a step of the sampler.

        Returns:
            Whether they were kept.

        Raises:
            DivergenceError: they are to be kept, but are not finite.
        """
        self.seen += 1
        after = self.seen - self.warmup
        if after < 1 or after % self.thin:
            return False
        if self.count == self.capacity:
            self._halve()
            if after % self.thin:
                return False
        values = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        for name in self.names:
            value = values[name].detach()
            if not bool(torch.isfinite(value).all()):
                raise DivergenceError(
                    f"{name} is not finite at step {self.seen}: the chain diverged, take a smaller learning rate",
                    step=self.seen,
                    layer=name,
                )
            self._store[name][self.count].copy_(value)
        self.count += 1
        return True

    def _halve(self) -> None:
        """Keep the samples that the doubled thinning would have kept, the second, the fourth and so on."""
        kept = self.count // 2
        for stored in self._store.values():
            stored[:kept] = stored[1 : 2 * kept : 2].clone()
        self.count, self.thin = kept, 2 * self.thin

    def __len__(self) -> int:
        return self.count

    @property
    def samples(self) -> dict[str, Tensor]:
        """The kept weights and buffers by name, each ``(draws, *shape)``, oldest first; views of the store."""
        return {name: stored[: self.count] for name, stored in self._store.items()}

    def matrix(self) -> Tensor:
        """The kept weights and buffers as rows, ``(draws, d)``: stack those of several chains for :func:`rhat`."""
        return torch.cat([value.flatten(1) for value in self.samples.values()], 1)

    def state_dict(self) -> dict[str, Any]:
        """Samples and counters, for a checkpoint."""
        return {
            "samples": {name: value.clone() for name, value in self.samples.items()},
            "thin": self.thin,
            "warmup": self.warmup,
            "capacity": self.capacity,
            "seen": self.seen,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with stored samples.

        Raises:
            CheckpointError: they belong to other weights.
        """
        try:
            samples = dict(state["samples"])
            numbers = {name: int(state[name]) for name in ("capacity", "thin", "warmup", "seen")}
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the state holds no trace of samples ({error!r})") from error
        same = samples.keys() == self._store.keys() and all(
            samples[name].shape[1:] == stored.shape[1:] for name, stored in self._store.items()
        )
        if not same:
            raise CheckpointError(
                "the stored samples have other names or shapes than the weights of this model"
            )
        counts = {len(value) for value in samples.values()}
        fits = len(counts) == 1 and max(counts) <= numbers["capacity"] and numbers["capacity"] >= 2
        if not fits or numbers["thin"] < 1 or min(numbers["warmup"], numbers["seen"]) < 0:
            raise CheckpointError(
                f"the state of the trace contradicts itself: {sorted(counts)} samples with {numbers}"
            )
        self.capacity, self.thin, self.warmup, self.seen = numbers.values()
        self.count = counts.pop()
        for name, stored in self._store.items():
            fresh = stored.new_empty((self.capacity, *stored.shape[1:]))
            fresh[: self.count] = samples[name]
            self._store[name] = fresh

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write samples and counters to one safetensors file, whole or not at all.

        Raises:
            CheckpointError: the path cannot be written.
        """
        save_tree({"trace": self.state_dict()}, path)

    def load(self, path: str | os.PathLike[str]) -> Trace:
        """Read what :meth:`save` wrote, and go on with it.

        Raises:
            CheckpointError: the file is missing, damaged, or of other weights.
        """
        tree = load_tree(path)
        if not isinstance(tree, dict) or "trace" not in tree:
            raise CheckpointError(f"the file {str(path)!r} holds no trace of samples")
        self.load_state_dict(tree["trace"])
        return self


def samples_of(samples: Trace | Mapping[str, Tensor] | Iterable[Trace]) -> dict[str, Tensor]:
    """Samples by name from a trace, several traces (one a chain), or a dict as it is."""
    if isinstance(samples, Trace):
        found = samples.samples
    elif isinstance(samples, Mapping):
        found = dict(samples)
    else:
        parts = [trace.samples for trace in samples]
        if not parts:
            raise ArgumentError("samples is empty: give at least one trace")
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    counts = {len(value) for value in found.values()}
    if len(counts) != 1 or 0 in counts:
        raise ShapeError(
            f"samples have {sorted(counts)} draws: every name needs the same number, and at least one; was the warm-up "
            "longer than the run?"
        )
    return found
