"""Values handed along a line of slices, within one process or between several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree

from bolza.core.errors import ArgumentError, UnsupportedError
from bolza.ops.trees import Tree, float_leaves, tree_detach

__all__ = ["Line"]


class Line:
    """K slices in a row, of which this process holds some neighbouring ones.

    Interface k stands between slice k − 1 and slice k. Without a group all slices are here, and nothing
    is sent. With one, each process holds as equal a share as possible, in the order of the ranks.

    Args:
        slices: number K of slices.
        group: a process group of ``torch.distributed``; none for one process.

    Raises:
        ArgumentError: there are more processes than slices.

    Attributes:
        local: the slices of this process.
    """

    def __init__(self, slices: int, group: dist.ProcessGroup | None = None) -> None:
        self.slices, self.group = slices, group
        self.rank, self.world = (
            (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        )
        if self.world > slices:
            raise ArgumentError(
                f"slices is {slices}, but the group has {self.world} processes: cut the network into at least "
                "as many slices"
            )
        starts = [r * slices // self.world for r in range(self.world + 1)]
        self.owner = [
            next(r for r in range(self.world) if starts[r] <= k < starts[r + 1]) for k in range(slices)
        ]
        self.local = range(starts[self.rank], starts[self.rank + 1])
        self._forms: dict[tuple[int, int], Any] = {}

    def up(self, left: Mapping[int, Tree], batch: int) -> dict[int, Tree]:
        """What leaves slice k − 1 arrives at interface k: ``{k: left[k − 1]}`` for the local slices k ≥ 1."""
        return self._exchange(left, batch, +1)

    def down(self, back: Mapping[int, Tree], batch: int) -> dict[int, Tree]:
        """What interface k sends back arrives at the end of slice k − 1: ``{k − 1: back[k]}``."""
        return self._exchange(back, batch, -1)

    def _exchange(self, values: Mapping[int, Tree], batch: int, way: int) -> dict[int, Tree]:
        first, last = self.local[0], self.local[-1]
        out, source = (last, first) if way > 0 else (first, last)
        pending = (
            self._send(values[out], self._interface(out, way), batch, way)
            if self._leads_out(out, way)
            else []
        )
        found = {k + way: values[k] for k in self.local if k + way in self.local}
        if self._leads_out(source, -way):
            found[source] = self._receive(self._interface(source, -way), batch, -way)
        for request in pending:
            request.wait()
        return found

    def sweep_up(self, first: Tree, function: Callable[[int, Tree], Tree], batch: int) -> dict[int, Tree]:
        """Serially x_{k+1} = function(k, x_k) from slice 0: what enters each local slice (and K, what ends)."""
        return self._sweep(first, function, batch, +1)

    def sweep_down(self, last: Tree, function: Callable[[int, Tree], Tree], batch: int) -> dict[int, Tree]:
        """Serially q_{k−1} = function(k, q_k) from slice K − 1: what enters each local slice from behind."""
        return self._sweep(last, function, batch, -1)

    def _sweep(
        self, value: Tree, function: Callable[[int, Tree], Tree], batch: int, way: int
    ) -> dict[int, Tree]:
        order = list(self.local) if way > 0 else list(reversed(self.local))
        if self._leads_out(order[0], -way):
            value = self._receive(self._interface(order[0], -way), batch, -way)
        entered = {}
        for k in order:
            entered[k] = value
            value = function(k, value)
        if self._leads_out(order[-1], way):
            for request in self._send(value, self._interface(order[-1], way), batch, way):
                request.wait()
        else:
            entered[order[-1] + way] = value
        return entered

    def same_everywhere(self, value: Tensor, k: int) -> Tensor:
        """The value that the owner of slice ``k`` has, on every process."""
        if self.world == 1:
            return value
        value = value.detach().clone().contiguous()
        held = self._movable(value)
        dist.broadcast(held, self._global(self.owner[k]), group=self.group)
        return held.to(value.device)

    # -- messages

    def _leads_out(self, k: int, way: int) -> bool:
        """Whether the neighbour of slice k on that side is held by another process."""
        return 0 <= k + way < self.slices and k + way not in self.local

    @staticmethod
    def _interface(k: int, way: int) -> int:
        return k + 1 if way > 0 else k

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def _movable(self, tensor: Tensor) -> Tensor:
        """Gloo moves tensors of the CPU only."""
        return tensor.cpu() if dist.get_backend(self.group) == "gloo" else tensor

    def _send(self, value: Tree, interface: int, batch: int, way: int) -> list[Any]:
        value = tree_detach(value)
        to = self._global(self.rank + way)
        if (interface, batch) not in self._forms:  # the first time the other side cannot know the form
            leaves, spec = _pytree.tree_flatten(value)
            if not all(isinstance(leaf, Tensor) for leaf in leaves):
                raise UnsupportedError(
                    f"between slices {interface - 1} and {interface} stands something that is not a tensor"
                )
            form = (spec, [(tuple(leaf.shape), leaf.dtype) for leaf in leaves])
            dist.send_object_list([form], to, group=self.group)
            self._forms[interface, batch] = form
        return [
            dist.isend(self._movable(leaf.contiguous()), to, group=self.group) for leaf in float_leaves(value)
        ]

    def _receive(self, interface: int, batch: int, way: int) -> Tree:
        source = self._global(self.rank + way)
        if (interface, batch) not in self._forms:
            found: list[Any] = [None]
            dist.recv_object_list(found, source, group=self.group)
            self._forms[interface, batch] = found[0]
        spec, forms = self._forms[interface, batch]
        leaves = []
        for shape, dtype in forms:
            on_cpu = dist.get_backend(self.group) == "gloo"
            leaf = torch.empty(shape, dtype=dtype, device="cpu" if on_cpu else self.device)
            dist.recv(leaf, source, group=self.group)
            leaves.append(leaf.to(self.device))
        return _pytree.tree_unflatten(leaves, spec)

    device: torch.device = torch.device("cpu")
    """Where received values are put."""
