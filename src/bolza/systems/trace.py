"""The data-flow graph of a network, read along one example.

Three readers are tried in turn: a symbolic trace that knows the example's sizes
(:mod:`bolza.systems.tracer`), ``torch.export``, and the symbolic trace again with those sub-modules
taken as single operations that cannot be looked into. Whatever reads the graph, it is accepted only
if it gives the network's own output and gradients for the example.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree

from bolza.core.errors import ArgumentError, ShapeError, TraceError
from bolza.ops.replay import frozen_statistics
from bolza.ops.trees import float_leaves
from bolza.systems.exporter import export_graph
from bolza.systems.patched import Patched
from bolza.systems.replay import Replay, plain_kernels, restored_randomness
from bolza.systems.roles import is_guard, require
from bolza.systems.tracer import ExampleTracer, plain_checkpoints

__all__ = ["Traced", "example_arguments", "trace"]

library_runs: ContextVar[bool] = ContextVar("library_runs", default=False)  # a recorder must not note these


@dataclass(frozen=True, eq=False)
class Traced:
    """The graph of a network.

    Every node has in ``meta``: ``val``, its value for the example (tensors on the ``meta`` device: shape and
    dtype without entries; numbers as they are), ``role`` (``constant``, ``size`` or ``data``, see
    :mod:`bolza.systems.roles`), ``random`` and ``no_grad``.

    Attributes:
        module: the network that was read; its parameters are not copied.
        graph_module: the graph with its parameters and layers, as ``torch.fx`` has it.
        kind: ``'fx'``: calls of layers and functions, or ``'export'``: calls of ATen operators.
        opaque: paths of the sub-modules that could not be looked into and are one operation each.
        example: the arguments it was read with.
        constants: tensors that the graph mentions and the network does not hold.

    Example:
        >>> traced = trace(nn.Sequential(nn.Linear(2, 3), nn.Tanh()), torch.zeros(5, 2))
        >>> [(node.name, tuple(node.meta["val"].shape)) for node in traced.nodes]
        [('input_1', (5, 2)), ('_0', (5, 3)), ('_1', (5, 3))]
    """

    module: nn.Module
    graph_module: GraphModule
    kind: Literal["fx", "export"]
    opaque: tuple[str, ...]
    example: tuple[Any, ...]
    constants: dict[str, Any] = field(repr=False)

    @property
    def graph(self) -> Graph:
        """The data-flow graph."""
        return self.graph_module.graph

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All nodes in order, without the output node and the guards."""
        return tuple(node for node in self.graph.nodes if node.op != "output" and not is_guard(node))

    @property
    def placeholders(self) -> tuple[Node, ...]:
        """The nodes of the arguments."""
        return tuple(node for node in self.graph.nodes if node.op == "placeholder")

    @property
    def result(self) -> Any:
        """What the network returns: a tree of nodes."""
        result = next(iter(reversed(self.graph.nodes))).args[0]
        if self.kind == "fx":
            return result
        leaves: Any = result  # an exported graph returns them in a row, and has the tree beside it
        codegen: Any = self.graph._codegen
        return _pytree.tree_unflatten(leaves, codegen.pytree_info.out_spec)

    def accepts(self, *args: Any) -> bool:
        """Whether the graph holds for these arguments: the sizes that steer the control flow agree."""
        given, known = _pytree.tree_leaves(args), _pytree.tree_leaves(self.example)
        if [kind_of(leaf) for leaf in given] != [kind_of(leaf) for leaf in known]:
            return False
        same = [
            a.shape == b.shape if isinstance(a, Tensor) else a == b for a, b in zip(given, known, strict=True)
        ]
        if all(same):
            return True
        guards = [node for node in self.graph.nodes if is_guard(node)]
        needed = _with_ancestors(guards)
        if any(node.meta["role"] == "data" and node.op != "placeholder" for node in needed):
            return False  # a size inside the network; only a run could tell
        try:
            replay = Replay(self.module, [n for n in needed if n.op != "placeholder"], self.constants)
            replay(dict(zip(self.placeholders, args, strict=True)), {})
        except ShapeError:
            return False
        return True


def kind_of(argument: Any) -> str:
    """Whether an argument is missing, a tensor, or something else: what optional arguments are told by."""
    return "None" if argument is None else "tensor" if isinstance(argument, Tensor) else "value"


def _with_ancestors(nodes: Sequence[Node]) -> list[Node]:
    found: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return sorted(found)


def example_arguments(example: Any) -> tuple[Any, ...]:
    """The arguments of ``forward`` that an example stands for: one, or a tuple of several."""
    if isinstance(example, tuple):
        args = example
    elif isinstance(example, list):
        args = tuple(example)
    else:
        args = (example,)
    if not any(isinstance(leaf, Tensor) for leaf in _pytree.tree_leaves(args)):
        raise ArgumentError(
            f"example is {type(example).__name__}, which holds no tensor: give one batch of inputs, "
            "or a tuple with all arguments of forward"
        )
    return _pytree.tree_map_only(Tensor, Tensor.detach, args)


def trace(module: nn.Module, example: Any, *, check: bool = True) -> Traced:
    """Read the data-flow graph of a network along one example.

    Sizes stay symbolic: the graph holds for other batch sizes too, unless the network's control flow
    depends on a size, which is then guarded. The graph is that of the network's present mode (training
    or evaluation). The network is not changed: mode, buffers, gradients, attributes and random state
    stay as they are.

    Args:
        module: any network.
        example: a batch of inputs, or the tuple of the arguments of ``forward``.
        check: compare output and gradients of the graph with the network's own, once.

    Returns:
        The graph, see :class:`Traced`.

    Raises:
        ArgumentError: ``module`` is not a module, or is a compiled one, or ``example`` holds no tensor.
        TraceError: the network cannot be read, or fails on the example; the message says why and what to do.

    Example:
        >>> class Net(nn.Module):
        ...     def forward(self, x):
        ...         return x.view(x.size(0), -1).sin()
        >>> trace(Net(), torch.zeros(4, 2, 3)).kind
        'fx'
    """
    if not isinstance(module, nn.Module):
        raise ArgumentError(f"module is of type {type(module).__name__}: give a torch.nn.Module")
    if isinstance(getattr(module, "_orig_mod", None), nn.Module):
        raise ArgumentError(
            "module is what torch.compile returned: give the network that was compiled, module._orig_mod"
        )
    args = example_arguments(example)
    first: _Obstacle | None = None
    with untouched(module, args):
        for attempt in (_read, _export, _read_opaque):
            if first is not None and first.final and attempt is _export:
                continue  # control flow on entries stops every reader that looks inside
            try:
                traced = attempt(module, args)
                if check:
                    _check(traced)
            except _Obstacle as obstacle:
                first = first or obstacle
            else:
                _forget_values(traced)
                return traced
        try:
            module(*_pytree.tree_map_only(Tensor, Tensor.clone, args))
        except Exception as error:
            raise _own_failure(module, error) from error
    assert first is not None
    if first.final:
        raise TraceError(str(first))
    raise TraceError(
        f"{type(module).__name__} cannot be read as a data-flow graph: {first}; put what cannot be read "
        "into a sub-module of its own, which then is taken as one operation"
    )


class _Obstacle(Exception):
    """One reader's reason to stop.

    Args:
        text: the reason.
        where: path of the sub-module that was being read.
        final: the network itself is the reason, not the reader.
    """

    def __init__(self, text: str, where: str | None = None, final: bool = False) -> None:
        super().__init__(text)
        self.where = where
        self.final = final


def _read(module: nn.Module, args: tuple[Any, ...], opaque: frozenset[str] = frozenset()) -> Traced:
    error: Exception | None = None
    where: str | None = None
    for stacks in (True, False):
        tracer = ExampleTracer(opaque, stacks)
        before = set(module.__dict__)
        try:
            graph = tracer.read(module, args)
            return _finish(module, graph, args, opaque, before)
        except Exception as caught:  # user code may raise anything when it meets a symbol
            if error is None:
                error, where = caught, tracer.failed_in()
            if isinstance(caught, TraceError):
                break
    assert error is not None
    raise _Obstacle(_one_line(error), where, isinstance(error, TraceError)) from error


def _read_opaque(module: nn.Module, args: tuple[Any, ...]) -> Traced:
    opaque: frozenset[str] = frozenset()
    for _ in range(64):
        try:
            return _read(module, args, opaque)
        except _Obstacle as obstacle:
            if not obstacle.where or obstacle.where in opaque:
                raise
            opaque |= {obstacle.where}
    raise _Obstacle("more than 64 sub-modules cannot be looked into")


def _export(module: nn.Module, args: tuple[Any, ...]) -> Traced:
    try:
        graph_module = export_graph(module, args)
    except Exception as error:  # the exporter raises many kinds
        raise _Obstacle(_one_line(error)) from error
    constants = {
        str(node.target): _attribute(graph_module, str(node.target))
        for node in graph_module.graph.nodes
        if node.op == "get_attr" and not _has(module, str(node.target))
    }
    return Traced(module, graph_module, "export", (), args, constants)


def _finish(
    module: nn.Module, graph: Graph, args: tuple[Any, ...], opaque: frozenset[str], before: set[str]
) -> Traced:
    graph.eliminate_dead_code(is_impure_node=_is_needed)
    graph_module = GraphModule(module, graph, type(module).__name__)
    constants = {name: value for name, value in module.__dict__.items() if name not in before}
    for name in constants:
        delattr(module, name)
    return Traced(module, graph_module, "fx", tuple(sorted(opaque)), args, constants)


def _is_needed(node: Node) -> bool:
    """Inputs, outputs, guards, and whatever advances the random state."""
    return node.op in ("placeholder", "output") or node.target is require or bool(node.meta.get("random"))


def _attribute(owner: Any, path: str) -> Any:
    for name in path.split("."):
        owner = getattr(owner, name)
    return owner


def _has(owner: Any, path: str) -> bool:
    try:
        _attribute(owner, path)
    except AttributeError:
        return False
    return True


def _one_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0].rstrip(".")
    return line if isinstance(error, TraceError) else f"{type(error).__name__}: {line}"


@contextmanager
def untouched(module: nn.Module, args: Any) -> Iterator[None]:
    """Undo whatever reading or running a network changes in it."""
    kept = [
        (part, dict(part.__dict__), dict(part._parameters), dict(part._buffers), dict(part._modules))
        for part in module.modules()
    ]
    for part, *_ in kept:
        if type(part.__dict__.get("forward")) is Patched:  # a recorder's, which has no signature to export
            del part.__dict__["forward"]
    outer = library_runs.set(True)
    python = random.getstate()
    numpy = sys.modules.get("numpy")
    numbers = numpy.random.get_state() if numpy is not None else None
    try:
        with restored_randomness(None, args), frozen_statistics(module), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        library_runs.reset(outer)
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(numbers)
        for part, attributes, *tables in kept:
            part.__dict__.clear()
            part.__dict__.update(attributes)
            for name, table in zip(("_parameters", "_buffers", "_modules"), tables, strict=True):
                part.__dict__[name].clear()
                part.__dict__[name].update(table)


def _check(traced: Traced) -> None:
    """Compare output and gradients of the graph with the network's own on the example."""
    module, args = traced.module, traced.example
    nodes = [node for node in traced.graph.nodes if node.op not in ("placeholder", "output")]
    replay = Replay(module, nodes, traced.constants)
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}

    def run_graph(inputs: tuple[Any, ...]) -> Any:
        env = replay(dict(zip(traced.placeholders, inputs, strict=True)), {})
        return map_arg(traced.result, env.__getitem__)

    def outcome(function: Any) -> tuple[list[Tensor], list[Tensor]]:
        with torch.enable_grad(), restored_randomness(None, args), plain_kernels(), plain_checkpoints():
            inputs = _pytree.tree_map_only(Tensor, _fresh, args)
            result = function(inputs)
            _check_result(result)
            outputs = float_leaves(result)
            leaves = [*float_leaves(inputs), *parameters.values()]
            total = sum((out * _pattern(out)).sum() for out in outputs)
            if isinstance(total, Tensor) and total.requires_grad:
                grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
            else:
                grads = ()
            return [out.detach() for out in outputs], list(grads)

    try:
        mine = outcome(run_graph)
    except TraceError as error:
        raise _Obstacle(str(error), final=True) from error
    except Exception as error:  # a graph that does not run is a wrong graph
        raise _Obstacle(_one_line(error)) from error
    foreign = _foreign_randomness()
    try:
        theirs = outcome(lambda inputs: module(*inputs))
    except Exception as error:
        raise _own_failure(module, error) from error
    if _foreign_randomness() != foreign:
        raise _Obstacle(
            f"the forward pass of {type(module).__name__} draws random numbers from Python's or NumPy's "
            "generators, which cannot be replayed: draw them with torch",
            final=True,
        )
    for what, ours, own in (("output", mine[0], theirs[0]), ("gradients", mine[1], theirs[1])):
        if not _all_close(ours, own):
            raise _Obstacle(
                f"the {what} of its graph differ from its own: a forward pass that keeps state, draws random "
                "numbers outside torch, or writes through views cannot be replayed"
            )


def _check_result(result: Any) -> None:
    """Refuse a result whose tensors nobody would see."""
    for leaf in _pytree.tree_leaves(result):
        held = getattr(leaf, "__dict__", {}).values() if not isinstance(leaf, (Tensor, type)) else ()
        if any(isinstance(value, Tensor) for value in held):
            raise TraceError(
                f"the network returns an object of type {type(leaf).__name__} with tensors in it, which have "
                "no derivative there: return a tensor, or tuples and dicts of tensors, or make the type known "
                "with torch.export.register_dataclass"
            )


def _own_failure(module: nn.Module, error: Exception) -> TraceError:
    return TraceError(
        f"{type(module).__name__} itself fails on the example, with {_one_line(error)}: "
        "give a batch that it can be evaluated and differentiated on"
    )


def _foreign_randomness() -> tuple[Any, ...]:
    """States of the generators of Python and NumPy."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return (random.getstate(),)
    kind, keys, *rest = numpy.random.get_state()
    return random.getstate(), kind, keys.tobytes(), *rest


def _all_close(ours: Sequence[Tensor], own: Sequence[Tensor]) -> bool:
    try:
        return len(ours) == len(own) and all(map(_close, ours, own))
    except RuntimeError:  # tensors of the exporter, without entries
        return False


def _fresh(leaf: Tensor) -> Tensor:
    return leaf.detach().clone().requires_grad_(leaf.is_floating_point() or leaf.is_complex())


def _pattern(like: Tensor) -> Tensor:
    """Fixed weights, with no symmetry that could hide a difference."""
    return torch.sin(1.0 + torch.arange(like.numel(), device=like.device)).to(like.dtype).view(like.shape)


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_sparse or b.is_sparse:  # gradients of embeddings
        a, b = a.to_dense(), b.to_dense()
    finite = torch.isfinite(b)
    if not torch.equal(finite, torch.isfinite(a)):
        return False
    a, b = a[finite].double() if not a.is_complex() else a[finite], b[finite]
    allowed = 1e-3 if torch.finfo(b.dtype).eps > 1e-10 else 1e-8
    return float((a - b).norm()) <= allowed * float(b.norm() + 1e-6)


def _forget_values(traced: Traced) -> None:
    """Keep shape and type of the example's values, and give their memory back."""

    def forget(value: Any) -> Any:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")

    for node in traced.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            node.meta.update(device=value.device, dtype=value.dtype)
        if "val" in node.meta and node.op != "get_attr":
            leaves, spec = _pytree.tree_flatten(value)
            leaves = [forget(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            try:
                node.meta["val"] = _pytree.tree_unflatten(leaves, spec)
            except ValueError:  # a packed sequence checks what it is made of
                node.meta.update(val=leaves, sealed=True)
