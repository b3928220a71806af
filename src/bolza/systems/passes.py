"""One forward pass of a network, and what the backward passes through it bring."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree

from bolza.core.trajectory import Trajectory
from bolza.systems.module import ModuleSystem
from bolza.systems.signals import LayerSignal
from bolza.systems.tracer import random_states

if TYPE_CHECKING:
    from bolza.systems.recorder import Recorder

__all__ = ["Layout", "Pass", "Place", "Point"]

# where a cut value shows: (path of the layer, which call of it, 'in' or 'out', which argument)
Point = tuple[str, int, Literal["in", "out"], int]
Place = tuple[int, int, int]  # cut, entry of its state, leaf of the entry


@dataclass(eq=False)
class Layout:
    """How the values at the cuts of one system, in one mode, are seen."""

    system: ModuleSystem
    routed: bool
    # layer → (point, cut, entry of the state)
    points: dict[str, list[tuple[Point, int, int]]] = field(default_factory=dict)
    random: bool = field(init=False)

    def __post_init__(self) -> None:
        self.random = self.system.random


class Pass:
    """One forward pass and the backward passes through it."""

    def __init__(self, recorder: Recorder, layout: Layout, args: tuple[Any, ...], copy: bool) -> None:
        self.recorder = weakref.ref(recorder)
        self.layout = layout
        self.copy = copy
        self.calls: dict[str, int] = {}
        self.controls = layout.system.controls
        self.widths = [len(stage.inputs) for stage in layout.system.stages]
        self.states: list[list[Any]] = [[None] * width for width in self.widths]
        self.seen: list[set[int]] = [set() for _ in self.widths]
        self.versions: list[tuple[int, Tensor, int]] = []
        self.hooked: list[Place] = []  # where costates are expected
        self.asked: list[Tensor] = []  # until the forward pass ends
        self.output: Any = None
        self.received: dict[Place, Tensor] = {}
        self.queued = False
        self.signals: list[LayerSignal] = []
        self.randomness = random_states(args) if layout.random else None  # where the forward starts
        for i, value in enumerate(args):
            self.note(0, i, value)

    def note(self, t: int, i: int, value: Any) -> None:
        """Keep entry ``i`` of the state at cut ``t``, and ask for its gradient."""
        self.seen[t].add(i)
        if isinstance(value, Tensor):  # nearly always; mapping over a tree would cost more than the rest
            self.states[t][i] = self._keep(t, value)
            self._ask((t, i, 0), value)
        else:  # a layer with several outputs
            self.states[t][i] = _pytree.tree_map_only(Tensor, lambda leaf: self._keep(t, leaf), value)
            for j, leaf in enumerate(_pytree.tree_leaves(value)):
                if isinstance(leaf, Tensor):
                    self._ask((t, i, j), leaf)

    def note_output(self, output: Any) -> Any:
        """Keep what the network returns, and return it.

        A leaf that is also a state, or stands there twice, becomes a fresh alias: its gradient is then
        the part that flows through this place alone.
        """
        t = len(self.widths)
        leaves, spec = _pytree.tree_flatten(output)
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                if leaf.requires_grad and any(leaf is other for other in self.asked):
                    leaves[i] = leaf = leaf.view_as(leaf)
                self._ask((t, 0, i), leaf)
        self.asked = []
        self.output = _pytree.tree_unflatten(
            [self._keep(t, leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec
        )
        return _pytree.tree_unflatten(leaves, spec)

    def complete(self) -> bool:
        """Whether every state was noted."""
        return all(len(seen) == width for seen, width in zip(self.seen, self.widths, strict=True))

    def _keep(self, t: int, leaf: Tensor) -> Tensor:
        if self.copy:
            return leaf.detach().clone()
        state = leaf.detach()
        self.versions.append((t, state, state._version))
        return state

    def _ask(self, place: Place, value: Tensor) -> None:
        if value.requires_grad:
            self.hooked.append(place)
            self.asked.append(value)
            value.register_hook(lambda gradient: self._receive(place, gradient))

    def _receive(self, place: Place, gradient: Tensor) -> None:
        self.received[place] = gradient.detach() if gradient.requires_grad else gradient
        if not self.queued:
            self.queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)

    def _finish(self) -> None:
        """Commit at the end of a backward pass that came as far as it could."""
        received, self.received, self.queued = self.received, {}, False
        recorder, first = self.recorder(), min(self.hooked)[0]
        if recorder is None or first not in {t for t, _, _ in received}:
            return
        states = (*(v[0] if len(v) == 1 else tuple(v) for v in self.states), self.output)
        lost = next((t for t in range(first + 1, len(states)) if t not in {h[0] for h in self.hooked}), None)
        if lost is not None:
            recorder._reason = (
                f"the state after stage {lost - 1} ({self.layout.system.stage_names[lost - 1]!r}) is not "
                "connected to the backward pass: was it computed in torch.utils.checkpoint with "
                "use_reentrant=True? Set use_reentrant=False"
            )
            return
        costates = []
        for t, state in enumerate(states):
            entries = self.states[t] if t < len(self.states) else [state]
            found = [self._costate(t, i, entry, received) for i, entry in enumerate(entries)]
            costates.append(found[0] if len(found) == 1 else tuple(found))
        recorder._commit(Trajectory(states=states, controls=self.controls, costates=tuple(costates)), self)

    def _costate(self, t: int, i: int, entry: Any, received: dict[Place, Tensor]) -> Any:
        leaves, spec = _pytree.tree_flatten(entry)
        found: list[Tensor | None] = []
        for j, leaf in enumerate(leaves):
            gradient = received.get((t, i, j))
            if gradient is None and (t, i, j) in self.hooked:
                gradient = torch.zeros_like(leaf)  # the cost does not depend on it
            found.append(gradient)
        return _pytree.tree_unflatten(found, spec)

    def overwritten(self) -> int | None:
        """The first cut whose state was changed after it was noted."""
        return next((t for t, state, version in self.versions if state._version != version), None)
