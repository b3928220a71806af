r"""A network as a controlled system: x_{t+1} = f_t(x_t, u_t), t the stage, u_t its parameters.

The stages are found in the data-flow graph of the unmodified network, see
:mod:`bolza.systems.stages`. One step is a pure function of its state and control: running
statistics stay as they are (in training mode batches are normalised by their own statistics), random
numbers (dropout) are those of the moment when the system was made, and in-place layers work
on copies. Batch normalisation couples the samples of a batch: costates are those of the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph
from torch.fx.node import map_arg

from bolza.core.errors import ArgumentError, ShapeError, TraceError
from bolza.core.system import check_step
from bolza.systems.replay import Replay, restored_randomness
from bolza.systems.stages import Split, Stage, split_into_stages
from bolza.systems.trace import Traced, example_arguments, trace, untouched
from bolza.systems.tracer import random_states

__all__ = ["ModuleSystem", "as_system"]


@dataclass(frozen=True, eq=False)
class _Program:
    """The stages of one mode of the network, ready to run."""

    traced: Traced
    stages: tuple[Stage, ...]
    replays: tuple[Replay, ...]
    randomness: tuple[list[Tensor] | None, ...]  # generator states at the entry of each random stage
    modes: tuple[tuple[tuple[nn.Module, bool], ...], ...]  # what each stage calls, and in which mode


class ModuleSystem:
    """A network cut into stages: a :class:`~bolza.core.System` whose controls are the network's parameters.

    Made by :func:`as_system`. Parameters are live: after a step of an optimizer the system's
    controls are the new ones. The system follows the network's mode: after ``module.eval()`` it is the
    network in evaluation mode.

    States are tensors, or tuples where more than one value is alive between two stages; the first
    state is the argument of ``forward``, or the tuple of its arguments, and the last one what
    ``forward`` returns. Controls are dicts of tensors with the names of ``module.named_parameters()``;
    parameters that do not require a gradient are part of the dynamics, not controls. A parameter that
    several stages share stands in the control of each.

    Attributes:
        module: the network.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> system = as_system(net, torch.zeros(4, 2))
        >>> system.horizon, [sorted(u) for u in system.controls]
        (2, [['0.bias', '0.weight'], ['2.bias', '2.weight']])
    """

    def __init__(
        self, traced: Traced, *, split: Split = "parameters", stages: Sequence[str] | None = None
    ) -> None:
        self.module = traced.module
        self._split: Split = split
        self._cuts = list(stages) if isinstance(stages, (list, tuple)) else stages
        self._example = traced.example
        self._parts = tuple(self.module.modules())
        self._start = random_states(traced.example)
        self._programs = {self._mode(): self._prepare(traced)}
        self._latest = next(iter(self._programs.values()))

    # -- the protocol of a system

    @property
    def horizon(self) -> int:
        """Number of stages."""
        return len(self._program().stages)

    @property
    def controls(self) -> tuple[dict[str, Tensor], ...]:
        """The parameters that each stage uses and that require a gradient; live references."""
        parameters = dict(self.module.named_parameters())
        return tuple(
            {name: parameters[name] for name in replay.names if parameters[name].requires_grad}
            for replay in self._program().replays
        )

    def step(self, t: int, x: Any, u: Mapping[str, Tensor]) -> Any:
        """Return the state after stage ``t``.

        Args:
            t: stage, ``0 <= t < horizon``.
            x: state of the stage.
            u: values of the stage's parameters by name; the network's own where a name is left out.

        Returns:
            The next state.

        Raises:
            ArgumentError: ``t`` is not a stage, or ``u`` has a name that the stage does not use.
            ShapeError: the state does not have the form, or a size, that the stage was read with.
        """
        program = self._latest
        if not (0 <= t < len(program.stages)) or any(
            part.training != mode for part, mode in program.modes[t]
        ):
            check_step(self, t)
            program = self._program()
        stage, replay = program.stages[t], program.replays[t]
        unknown = [name for name in u if name not in replay.names]
        if unknown:
            raise ArgumentError(
                f"u has the entry {unknown[0]!r}, but stage {t} ({stage.name!r}) uses "
                f"{', '.join(map(repr, replay.names)) or 'no parameters'}"
            )
        randomness = program.randomness[t]
        with nullcontext() if randomness is None else restored_randomness(randomness, self._example):
            try:
                return advance(stage, replay, x, u)
            except RuntimeError as error:
                error.add_note(f"in stage {t} ({stage.name!r}) of {type(self.module).__name__}")
                raise

    # -- what it was made of

    @property
    def random(self) -> bool:
        """Whether a stage draws random numbers (dropout) in the present mode."""
        return any(state is not None for state in self._program().randomness)

    @contextmanager
    def drawing_from(self, start: Sequence[Tensor] | None, states: Sequence[Any]) -> Iterator[None]:
        """A context in which random stages draw what a forward pass of the network drew.

        Args:
            start: states of the generators when that pass began; ``None`` leaves all as it is.
            states: its states x_0, x_1, …
        """
        if start is None or not self.random:
            yield
            return
        program = self._program()
        drawn: list[list[Tensor] | None] = []
        with (
            torch.no_grad(),
            untouched(self.module, self._example),
            restored_randomness(start, self._example),
        ):
            for stage, replay, x in zip(program.stages, program.replays, states, strict=False):
                drawn.append(random_states(self._example) if replay.random else None)
                if replay.random:
                    advance(stage, replay, x, {})
        mode = self._mode()
        self._latest = self._programs[mode] = replace(program, randomness=tuple(drawn))
        try:
            yield
        finally:
            self._latest = self._programs[mode] = program

    @property
    def stage_names(self) -> tuple[str, ...]:
        """Name of every stage: the layers it consists of."""
        return tuple(stage.name for stage in self._program().stages)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages: nodes, states and sizes of each."""
        return self._program().stages

    @property
    def stage_modules(self) -> tuple[tuple[str, ...], ...]:
        """Paths of the layers (and single parameters) that each stage calls, in order."""
        return tuple(
            tuple(dict.fromkeys(str(n.target) for n in stage.nodes if n.op == "call_module"))
            for stage in self._program().stages
        )

    def uses(self) -> dict[str, set[tuple[int, str | None]]]:
        """Where each parameter is used: the stage, and the path of the layer that holds it.

        The path is ``None`` where the parameter is used without a layer of its own.
        """
        names = {id(value): name for name, value in self.module.named_parameters()}
        paths = {part: path for path, part in self.module.named_modules()}
        found: dict[str, set[tuple[int, str | None]]] = {}
        for t, replay in enumerate(self._program().replays):
            for name in replay.read_alone:
                found.setdefault(name, set()).add((t, None))
            for layer in replay.layers:
                for part in layer.modules():
                    for value in part._parameters.values():
                        if value is not None:
                            found.setdefault(names[id(value)], set()).add((t, paths[part]))
        return found

    @property
    def traced(self) -> Traced:
        """The traced network in its present mode."""
        return self._program().traced

    @property
    def graph(self) -> Graph:
        """The data-flow graph in the network's present mode."""
        return self.traced.graph

    @property
    def example(self) -> tuple[Any, ...]:
        """The arguments that the network was read with."""
        return self._example

    def stage_of(self, name: str) -> int:
        """The stage that computes a node, or first calls a module or uses a parameter.

        Raises:
            ArgumentError: nothing of that name is computed.

        Example:
            >>> from bolza.systems import as_system
            >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
            >>> system = as_system(net, torch.zeros(4, 2))
            >>> system.stage_of("1"), system.stage_of("2.weight")
            (0, 1)
        """
        for t, (stage, replay) in enumerate(zip(self.stages, self._program().replays, strict=True)):
            if name in replay.names:
                return t
            for node in stage.own:
                paths = [str(value[0]) for value in (node.meta.get("nn_module_stack") or {}).values()]
                if name == node.name or name in paths:
                    return t
        raise ArgumentError(
            f"no stage computes {name!r}; the stages are {', '.join(map(repr, self.stage_names))}"
        )

    def initial_state(self, *args: Any) -> Any:
        """The state x_0 that belongs to arguments of ``forward``.

        Raises:
            ArgumentError: the number of arguments is not that of the example.
            ShapeError: a size that steers the network's control flow is not that of the example.
        """
        if len(args) != len(self._example):
            raise ArgumentError(
                f"{len(args)} arguments are given, but the network was read with {len(self._example)}"
            )
        if not self.traced.accepts(*args):
            shapes = [tuple(a.shape) if isinstance(a, Tensor) else a for a in args]
            raise ShapeError(
                "the network's control flow depends on the sizes and kinds of its arguments, and differs for "
                f"{shapes}: make the system with an example like this"
            )
        return args[0] if len(args) == 1 else args

    def read_again(self, example: Any) -> ModuleSystem:
        """The same network and rule of cutting, read along another example."""
        return ModuleSystem(trace(self.module, example), split=self._split, stages=self._cuts)

    def reseed(self, seed: int | None = None) -> None:
        """Draw the random numbers of random stages (dropout) anew.

        Args:
            seed: where to start; by default where torch's own generators stand, which are not advanced.
        """
        with restored_randomness(None, self._example):
            if seed is not None:
                torch.manual_seed(seed)
            self._start = random_states(self._example)
        mode = self._mode()
        self._latest = self._prepare(self._program().traced)
        self._programs = {mode: self._latest}

    def __repr__(self) -> str:
        rows = [("stage", "name", "parameters", "state after it")]
        for t, (stage, replay) in enumerate(zip(self.stages, self._program().replays, strict=True)):
            parameters = dict(self.module.named_parameters())
            count = sum(parameters[name].numel() for name in replay.names)
            rows.append((str(t), stage.name, f"{count:,}", _describe(stage.outputs)))
        widths = [max(len(row[k]) for row in rows) for k in range(3)]
        lines = [
            f"{a.rjust(widths[0])}  {b.ljust(widths[1])}  {c.rjust(widths[2])}  {d}".rstrip()
            for a, b, c, d in rows
        ]
        return f"ModuleSystem of {type(self.module).__name__}, horizon {self.horizon}\n" + "\n".join(lines)

    # -- modes

    def _mode(self) -> tuple[bool, ...]:
        return tuple(part.training for part in self._parts)

    def _program(self) -> _Program:
        parts = tuple(self.module.modules())
        if len(parts) != len(self._parts) or any(a is not b for a, b in zip(parts, self._parts, strict=True)):
            raise TraceError(
                f"layers of {type(self.module).__name__} were added, removed or replaced after it was read: "
                "make the system again"
            )
        mode = self._mode()
        if mode not in self._programs:
            program = self._prepare(trace(self.module, self._example))
            known = [stage.name for stage in next(iter(self._programs.values())).stages]
            if [stage.name for stage in program.stages] != known:
                raise TraceError(
                    f"{type(self.module).__name__} has other stages now that its mode has changed: "
                    "make a second system for this mode"
                )
            self._programs[mode] = program
        self._latest = self._programs[mode]
        return self._latest

    def _stages(self, traced: Traced) -> tuple[Stage, ...]:
        return split_into_stages(traced, split=self._split, stages=self._cuts)

    def _prepare(self, traced: Traced) -> _Program:
        stages = self._stages(traced)
        replays = tuple(Replay(self.module, stage.nodes, traced.constants) for stage in stages)
        randomness: list[list[Tensor] | None] = [None] * len(stages)
        if any(replay.random for replay in replays):
            x = self._example[0] if len(self._example) == 1 else self._example
            with torch.no_grad(), untouched(self.module, self._example):
                with restored_randomness(self._start, self._example):
                    for t, (stage, replay) in enumerate(zip(stages, replays, strict=True)):
                        if replay.random:
                            randomness[t] = random_states(self._example)
                        x = advance(stage, replay, x, {})
        modes = tuple(
            tuple((part, part.training) for part in self._called(traced, stage)) for stage in stages
        )
        return _Program(traced, stages, replays, tuple(randomness), modes)

    def _called(self, traced: Traced, stage: Stage) -> list[nn.Module]:
        """The modules whose mode can matter to a stage."""
        if traced.kind == "export":
            return list(self._parts)
        paths = {""}
        for node in stage.nodes:
            paths |= {str(value[0]) for value in (node.meta.get("nn_module_stack") or {}).values()}
            if node.op == "call_module":
                layer = self.module.get_submodule(str(node.target))
                paths |= {f"{node.target}.{name}".rstrip(".") for name, _ in layer.named_modules()}
        return [self.module.get_submodule(path) for path in sorted(paths)]


def advance(stage: Stage, replay: Replay, x: Any, u: Mapping[str, Tensor]) -> Any:
    """Run one stage from a state."""
    env = replay(bind(stage, x), u)
    return map_arg(stage.outputs, env.__getitem__)


def bind(stage: Stage, x: Any) -> dict[Any, Any]:
    """Values of a stage's inputs, and of the sizes that are read off them."""
    values = (x,) if len(stage.inputs) == 1 else x
    if len(stage.inputs) > 1 and (not isinstance(x, (tuple, list)) or len(x) != len(stage.inputs)):
        found = f"{len(x)} values" if isinstance(x, (tuple, list)) else type(x).__name__
        raise ShapeError(
            f"the state of stage {stage.name!r} is {found}, but {len(stage.inputs)} values are needed: "
            + ", ".join(node.name for node in stage.inputs)
        )
    for node, value in zip(stage.inputs, values, strict=True):
        if (node.meta["val"] is None) != (value is None):
            raise ShapeError(
                f"{node.name} is {'given' if value is not None else 'None'}, but the network was read with "
                f"{'None' if value is not None else 'a value'} there: make the system with such an example"
            )
    env = dict(zip(stage.inputs, values, strict=True))
    for node, (i, place) in stage.sizes.items():
        env[node] = values[i].shape[place] if isinstance(place, int) else getattr(values[i], place)
    return env


def _describe(outputs: Any) -> str:
    values = map_arg(outputs, lambda node: node.meta["val"])
    leaves = torch.utils._pytree.tree_leaves(values)
    return ", ".join(
        ("×".join(map(str, leaf.shape)) or "scalar") if isinstance(leaf, Tensor) else type(leaf).__name__
        for leaf in leaves
    )


def as_system(
    module: nn.Module, example: Any, stages: Sequence[str] | None = None, *, split: Split = "parameters"
) -> ModuleSystem:
    r"""Read a network as a system of stages, x_{t+1} = f_t(x_t, u_t).

    Takes networks as they are: chains, residual and dense connections, normalisation, attention, embeddings,
    recurrent cells unrolled in time. The composition of the stages is the network's own forward, and
    costates are autograd's gradients at the cut points.

    Args:
        module: the network; it is not changed. The system is read in its present mode, and follows it.
        example: a batch of inputs, or the tuple of the arguments of ``forward``. Other batch sizes
            may be used later; two samples or more are a better example than one.
        stages: names of modules or nodes after which to cut, instead of the rule;
            ``'a..b'`` names the stage that ends with ``b``.
        split: ``'parameters'``: a stage begins at an operation with parameters; ``'affine'``: operations
            without parameters, such as activations, are stages of their own, see
            :mod:`bolza.systems.stages`.

    Returns:
        The system.

    Raises:
        TraceError: the network cannot be read; the message names the obstacle and the remedy.
        ArgumentError: a name in ``stages`` is not in the network, or ``split`` is unknown.

    Example:
        >>> from bolza.core import rollout
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> system = as_system(net, torch.zeros(4, 2))
        >>> system
        ModuleSystem of Sequential, horizon 2
        stage  name  parameters  state after it
            0  0              9  4×3
            1  2              4  4×1
        >>> x = torch.randn(8, 2)
        >>> bool((rollout(system, x).states[-1] == net(x)).all())
        True
    """
    args = example_arguments(example)
    return ModuleSystem(trace(module, args), split=split, stages=stages)
