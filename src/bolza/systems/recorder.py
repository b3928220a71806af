r"""States and costates of a network in the user's own training loop.

    loss = loss_fn(model(x), y)
    loss.backward()               # p_t = ∂J/∂x_t is noted as backward passes the cut points

Two mechanisms, chosen for each network when it is read:

* *hooks*: every cut value is an input or output of some layer, and no stage before the cut uses it.
  Hooks on those layers note it while the network's own forward runs, untouched.
* *routed*: otherwise (an unrolled recurrent cell, whose states are tuples; weights used without a
  layer) the network's ``forward`` runs the traced graph, stage by stage, and the cut values are
  seen there. Side effects of the Python code of ``forward``, such as attributes that it sets, do
  not happen then.

A copy or pickle of the network is not recorded. A network that is compiled should have its recorder closed
first.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree

from bolza.core.errors import ArgumentError, UnsupportedError
from bolza.core.trajectory import Trajectory
from bolza.ops.persample import RULES
from bolza.ops.trees import is_differentiable, tree_detach
from bolza.systems.module import ModuleSystem, advance, bind
from bolza.systems.passes import Layout, Pass, Point
from bolza.systems.patched import Patched
from bolza.systems.replay import restored_randomness
from bolza.systems.signals import LayerSignal, has_rule
from bolza.systems.stages import Split
from bolza.systems.trace import library_runs, trace, untouched

__all__ = ["Recorder"]


class Recorder:
    """Notes states and costates of a network during ordinary forward and backward passes.

    A pass is committed when ``backward()`` has reached the first stage. Passes without gradients
    (``torch.no_grad()``), and those that no backward follows, leave no trace; the library's own
    evaluations of stages are not noted. The network may change between training and evaluation mode.

    The states share memory with the network's activations; that none was overwritten is checked when
    they are asked for. Costates are those of the cost that ``backward`` was called on. Where there is
    no gradient (integer inputs; inputs that do not require one) the costate is ``None``, and where the
    cost does not depend on a state, zero.

    Args:
        model: a network, or the system made of it.
        example: a batch, as for :func:`~bolza.systems.as_system`; not needed with a system.
        stages: as for :func:`~bolza.systems.as_system`.
        split: as for :func:`~bolza.systems.as_system`.
        keep: ``'last'`` trajectory only, or ``'all'`` since the last ``zero_grad``, one for each backward
            pass (gradient accumulation).
        copy: copy the states, for networks that overwrite them.
        input_costate: have the gradient at the input computed too, p_0 = ∂J/∂x_0.
        optimizer: its ``zero_grad`` clears the recorder, as that of the network does.
        layers: note too what enters each layer whose gradients of single samples are known, and what comes
            back to it, see :attr:`passes`.

    Raises:
        TraceError: the network cannot be read as stages.
        UnsupportedError: recording would keep running statistics from being updated.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> recorder = Recorder(net, torch.zeros(4, 2))
        >>> net(torch.ones(4, 2)).sum().backward()
        >>> [None if p is None else tuple(p.shape) for p in recorder.trajectory.costates]
        [None, (4, 3), (4, 1)]
        >>> recorder.close()
    """

    def __init__(
        self,
        model: nn.Module | ModuleSystem,
        example: Any = None,
        *,
        stages: Sequence[str] | None = None,
        split: Split = "parameters",
        keep: Literal["last", "all"] = "last",
        copy: bool = False,
        input_costate: bool = False,
        optimizer: torch.optim.Optimizer | None = None,
        layers: bool = False,
    ) -> None:
        if keep not in ("last", "all"):
            raise ArgumentError(f"keep is {keep!r}: choose 'last' or 'all'")
        if isinstance(model, ModuleSystem):
            self._make: Callable[[Any], ModuleSystem] = lambda args: model.read_again(args)
            system = model
        else:
            if example is None:
                raise ArgumentError("example is missing: give one batch of inputs beside the network")
            self._make = lambda args: ModuleSystem(trace(model, args), split=split, stages=stages)
            system = self._make(example)
        self.system = system
        self.module = system.module
        self.keep = keep
        self.copy = copy
        self.input_costate = input_costate
        self._names = _argument_names(self.module, len(system.example))
        self._committed: list[tuple[Trajectory, Pass]] = []
        self._pass: Pass | None = None
        self._own_run = False  # a run of the library's that is this recorder's own test
        self._off = 0
        self._reason = "no backward pass has reached the first stage since the recorder was made or cleared"
        self._systems = [system]
        self._layouts: dict[tuple[int, tuple[bool, ...]], Layout] = {}
        self._handles: list[Any] = []
        self._patched: list[Patched] = []
        self._attach(optimizer)
        if layers:
            self._watch_layers()
        try:
            self._layout(system)
        except Exception:
            self.close()
            raise

    # -- what a user asks

    @property
    def trajectory(self) -> Trajectory:
        """States, controls and costates of the last committed pass; the controls are the live parameters.

        Raises:
            ArgumentError: there is none.
            UnsupportedError: a layer overwrote a recorded state.
        """
        if not self._committed:
            raise ArgumentError(f"there is no trajectory: {self._reason}")
        return self._checked(*self._committed[-1])

    @property
    def trajectories(self) -> tuple[Trajectory, ...]:
        """All committed trajectories that are kept, oldest first."""
        return tuple(self._checked(*entry) for entry in self._committed)

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The passes of :attr:`trajectories`, which know the signals of the layers and where the draws began."""
        return tuple(source for _, source in self._committed)

    def clear(self) -> None:
        """Forget what was recorded."""
        self._committed.clear()

    def close(self) -> None:
        """Take all hooks off the network."""
        for handle in self._handles:
            handle.remove()
        for patched in self._patched:
            patched.undo()
        self._handles, self._patched, self._pass = [], [], None

    def paused(self) -> _Paused:
        """A context in which passes are not recorded."""
        return _Paused(self)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- the passes

    def _commit(self, trajectory: Trajectory, source: Pass) -> None:
        if self.keep == "last":
            self._committed.clear()
        self._committed.append((trajectory, source))

    def _checked(self, trajectory: Trajectory, source: Pass) -> Trajectory:
        t = source.overwritten()
        if t is not None:
            names = source.layout.system.stage_names
            which = f"after stage {t - 1} ({names[t - 1]!r})" if t else "at the input"
            raise UnsupportedError(
                f"the state {which} was overwritten by an in-place operation after it was recorded: "
                "set inplace=False in the layer that follows, or record copies with Recorder(..., copy=True)"
            )
        return trajectory

    def _attach(self, optimizer: torch.optim.Optimizer | None) -> None:
        root = self.module

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._begin(args, kwargs) if module is root else None

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            return self._end(output) if module is root else None

        self._handles.append(root.register_forward_pre_hook(_Hook(before), with_kwargs=True))
        self._handles.append(root.register_forward_hook(_Hook(after), with_kwargs=True, always_call=True))
        for owner in (root, optimizer):
            if owner is not None:
                self._patched.append(Patched(owner, "zero_grad", self._cleared))

    def _cleared(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.clear()
        return original(*args, **kwargs)

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if library_runs.get():
            return None
        self._pass = None
        if self._off or not torch.is_grad_enabled():
            return None
        given = self._positional(args, kwargs)
        if given is None:
            self._reason = (
                f"the last forward pass had {len(args) + len(kwargs)} arguments, "
                f"but the network was read with {len(self._names)}: "
                "make the recorder with an example that has all of them"
            )
            return None
        if self.input_costate:
            given = tuple(_with_gradient(value) for value in given)
        layout = self._layout(self._system_for(given))
        self._pass = Pass(self, layout, given, self.copy)
        return (given, {}) if self.input_costate else None

    def _end(self, output: Any) -> Any:
        if library_runs.get():
            return None
        current, self._pass = self._pass, None
        if current is None or output is None:
            return None
        if not current.complete():
            self._reason = "the last forward pass did not call the layers that the example's pass did"
            return None
        return current.note_output(output)

    def _running(self) -> Pass | None:
        """The pass that is to be noted; none while another recorder reads the network in the middle of it."""
        return None if library_runs.get() and not self._own_run else self._pass

    def _positional(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        if len(args) + len(kwargs) != len(self._names):
            return None
        rest = self._names[len(args) :]
        return (*args, *(kwargs[name] for name in rest)) if set(rest) == set(kwargs) else None

    def _system_for(self, args: tuple[Any, ...]) -> ModuleSystem:
        for system in self._systems:
            if system.traced.accepts(*args):
                return system
        with self.paused():
            self._systems.append(self._make(args))
        return self._systems[-1]

    # -- where the cut values are seen

    def _layout(self, system: ModuleSystem) -> Layout:
        key = self._systems.index(system), system._mode()
        if key not in self._layouts:
            with self.paused():
                layout = Layout(system, routed=True)
                found = _points(system)
                if found is not None:
                    layout.points, layout.routed = found, False
                    handles = self._hook(layout)
                    if not self._agrees(layout):
                        layout.points, layout.routed = {}, True
                        for handle in handles:
                            handle.remove()
                    else:
                        self._handles += handles
            if layout.routed and system.traced.kind == "export" and _updates_buffers(system):
                raise UnsupportedError(
                    f"{type(self.module).__name__} cannot be recorded in training mode: its forward would run "
                    "an exported graph, which leaves running statistics as they are; put the part that the "
                    "symbolic trace cannot read into a sub-module of its own"
                )
            self._layouts[key] = layout
            if layout.routed and not any(p.name == "forward" for p in self._patched):
                self._patched.append(Patched(self.module, "forward", self._route))
        return self._layouts[key]

    def _hook(self, layout: Layout) -> list[Any]:
        handles = []
        for path, points in layout.points.items():
            layer = self.module.get_submodule(path)
            before, after = self._watchers(layout, layer, path, points)
            handles.append(layer.register_forward_pre_hook(_Hook(before)))
            if any(point[2] == "out" for point, _, _ in points):
                handles.append(layer.register_forward_hook(_Hook(after)))
        return handles

    def _watchers(
        self, layout: Layout, layer: nn.Module, path: str, points: list[tuple[Point, int, int]]
    ) -> tuple[Callable[..., None], Callable[..., None]]:
        """Hooks before and after a layer that note its inputs and outputs."""

        def active(module: nn.Module) -> Pass | None:
            current = self._running()
            mine = current is not None and current.layout is layout and module is layer
            return current if mine else None

        def before(module: nn.Module, args: Any) -> None:
            if (current := active(module)) is not None:
                number = current.calls[path] = current.calls.get(path, -1) + 1
                for (_, call, side, which), t, i in points:
                    if side == "in" and call == number and which < len(args):
                        current.note(t, i, args[which])

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if (current := active(module)) is not None:
                for (_, call, side, _), t, i in points:
                    if side == "out" and call == current.calls[path]:
                        current.note(t, i, output)

        return before, after

    def _watch_layers(self) -> None:
        def watch(path: str, layer: nn.Module) -> Any:
            def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                current = self._running()
                if current is None or module is not layer or not has_rule(layer):
                    return
                if len(args) == 1 and isinstance(output, Tensor) and output.requires_grad:
                    signal = LayerSignal(path, layer, args[0].detach())
                    current.signals.append(signal)
                    output.register_hook(signal.receive)

            return layer.register_forward_hook(_Hook(note))

        for path, layer in self.module.named_modules():
            if type(layer) in RULES:
                self._handles.append(watch(path, layer))

    def _agrees(self, layout: Layout) -> bool:
        """Whether the hooks see, for the example, the states that the stages compute."""
        system = layout.system
        with torch.no_grad(), untouched(self.module, system.example):
            # copies, because an in-place layer may overwrite a state before it is compared
            current = Pass(self, layout, system.example, copy=True)
            with restored_randomness(None, system.example):
                self._pass, self._own_run = current, True
                try:
                    # the hooks of the network itself stay out of it; those of the layers are what is tested
                    self.module.forward(*system.example)
                finally:
                    self._pass, self._own_run = None, False
            if not current.complete():
                return False
            x = system.example[0] if len(system.example) == 1 else system.example
            for t, (stage, replay) in enumerate(zip(system.stages, system._program().replays, strict=True)):
                if t > 0:
                    seen = current.states[t][0] if len(current.states[t]) == 1 else tuple(current.states[t])
                    if not _same(seen, x):
                        return False
                x = advance(stage, replay, x, {})
        return True

    def _route(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        current = self._running()
        if current is None or not current.layout.routed:
            return original(*args, **kwargs)
        given = self._positional(args, kwargs)
        assert given is not None
        values: Any = given[0] if len(given) == 1 else given
        system = current.layout.system
        for t, (stage, replay) in enumerate(zip(system.stages, system._program().replays, strict=True)):
            if t > 0:
                entries = (values,) if len(stage.inputs) == 1 else values
                # a fresh alias: its gradient is the part that flows through this cut
                entries = _pytree.tree_map_only(
                    Tensor, lambda e: e.view_as(e) if e.requires_grad else e, entries
                )
                for i, entry in enumerate(entries):
                    current.note(t, i, entry)
                values = entries[0] if len(entries) == 1 else entries
            values = map_arg(stage.outputs, replay.in_place(bind(stage, values)).__getitem__)
        return values


class _Hook:
    """A hook that stays behind when its layer is copied or pickled."""

    def __init__(self, function: Callable[..., Any] | None = None) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return None if self.function is None else self.function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()


class _Paused:
    """Context in which a recorder does not record."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def __enter__(self) -> None:
        self.recorder._off += 1

    def __exit__(self, *exc: object) -> None:
        self.recorder._off -= 1


def _updates_buffers(system: ModuleSystem) -> bool:
    """Whether a network, in its mode, keeps running statistics that its exported graph does not."""
    return bool(system.traced.graph_module.meta.get("updates")) or any(
        part.training and getattr(part, "track_running_stats", False) for part in system.module.modules()
    )


def _argument_names(module: nn.Module, count: int) -> tuple[str, ...]:
    names = list(inspect.signature(module.forward).parameters)[:count]
    return (*names, *("",) * (count - len(names)))


def _with_gradient(value: Any) -> Any:
    if isinstance(value, Tensor) and is_differentiable(value) and not value.requires_grad:
        return value.detach().requires_grad_()
    return value


def _same(a: Any, b: Any) -> bool:
    left, right = _pytree.tree_leaves(tree_detach(a)), _pytree.tree_leaves(tree_detach(b))
    if len(left) != len(right):
        return False
    return all(
        p.shape == q.shape and torch.allclose(p, q, rtol=1e-4, atol=1e-5, equal_nan=True)
        if isinstance(p, Tensor) and isinstance(q, Tensor)
        else p == q
        for p, q in zip(left, right, strict=True)
    )


def _points(system: ModuleSystem) -> dict[str, list[tuple[Point, int, int]]] | None:
    """Where each cut value is an input or output of a layer.

    None if one of them is not, or is used by a stage before the cut: then hooks cannot tell its costates.
    """
    found: dict[str, list[tuple[Point, int, int]]] = {}
    used: set[Node] = set()
    for t, stage in enumerate(system.stages):
        if t > 0:
            for i, node in enumerate(stage.inputs):
                point = _point(node)
                if point is None or node in used or node.op == "placeholder":
                    return None
                found.setdefault(point[0], []).append((point, t, i))
        used |= {arg for node in stage.own if node.meta["role"] == "data" for arg in node.all_input_nodes}
    return found


def _point(node: Node) -> Point | None:
    if node.meta.get("returned_by"):
        path, call = node.meta["returned_by"][-1]
        return (path, call, "out", 0) if path else None
    if node.meta.get("passed_to"):
        path, call, i = node.meta["passed_to"][0]
        return (path, call, "in", i) if path else None
    return None
