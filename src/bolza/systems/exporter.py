"""Reading a network through ``torch.export``, for what the symbolic trace cannot read."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree

from bolza.systems.roles import role_of
from bolza.systems.tracer import random_states

__all__ = ["export_graph"]

_aten = torch.ops.aten


def export_graph(module: nn.Module, args: tuple[Any, ...]) -> GraphModule:
    """Return the graph of ``module(*args)`` in ATen operators, with values and roles in its nodes.

    All sizes are free where the network allows it, else only the first one, else none. Updates of
    buffers are left out, and ``meta["updates"]`` of the answer says whether there were any.
    """
    from torch.export import export  # half a second to import, and seldom needed

    error: Exception | None = None
    for dimensions in (None, 1, 0):
        shapes = _pytree.tree_map(lambda leaf: _free(leaf, dimensions), args)  # noqa: B023
        try:
            with _quiet():
                program = export(module, args, dynamic_shapes=shapes, strict=False)
            break
        except Exception as caught:  # noqa: BLE001  the next, less general, attempt may do
            error = caught
    else:
        assert error is not None
        raise error
    graph_module = program.module(check_guards=False)
    assert isinstance(graph_module, GraphModule)
    _drop_updates(graph_module)
    if any(_is_mutable(node) for node in graph_module.graph.nodes):  # a stage must not overwrite its state
        graph_module = program.run_decompositions({}).module(check_guards=False)
        assert isinstance(graph_module, GraphModule)
        _drop_updates(graph_module)
    _Annotate(graph_module).run(*args)
    return graph_module


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes on a failed attempt from the terminal."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(level)


def _free(leaf: Any, dimensions: int | None) -> Any:
    from torch.export import Dim

    if not isinstance(leaf, Tensor):
        return None
    count = leaf.dim() if dimensions is None else min(dimensions, leaf.dim())
    return dict.fromkeys(range(count), Dim.AUTO) or None


def _drop_updates(graph_module: GraphModule) -> None:
    graph = graph_module.graph
    for node in graph.nodes:
        if node.target in (_aten.batch_norm.default, _aten.instance_norm.default) and node.args[5]:
            if node.args[3] is not None:
                graph_module.meta["updates"] = True
            node.args = (*node.args[:3], None, None, *node.args[5:])  # batch statistics; no running averages
    for node in reversed(graph.nodes):
        if not node.users and _is_mutable(node) and node.args and _is_buffer(node.args[0]):
            graph.erase_node(node)
            graph_module.meta["updates"] = True
    graph.eliminate_dead_code()
    graph_module.recompile()


def _is_mutable(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_buffer(arg: Any) -> bool:
    return isinstance(arg, Node) and arg.op == "get_attr"


class _Annotate(Interpreter):
    """Runs the graph once and notes values, roles and the use of random numbers."""

    def run_node(self, n: Node) -> Any:
        before = random_states(None)
        with torch.no_grad():
            value = super().run_node(n)
        if n.op != "output":
            n.meta["val"] = value
            n.meta["no_grad"] = False
            n.meta["random"] = not torch.equal(before[0], random_states(None)[0])
            n.meta["role"] = role_of(n)
        return value
