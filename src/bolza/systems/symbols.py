"""Sizes of a traced network as symbols, to prove that one is a dimension of another value.

Two routes: :func:`labels` follows the input's dimensions through the few layers that plainly keep
them, at no cost; :func:`symbolic_values` runs the whole graph on symbols, which first loads a
computer algebra system.
"""

from __future__ import annotations

import logging
import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree

from bolza.systems.replay import Replay
from bolza.systems.roles import is_guard
from bolza.systems.trace import Traced, untouched

__all__ = ["labels", "symbolic_values"]

Label = tuple[Node, int]  # a dimension of an input

_KEEP_ALL = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.modules.dropout._DropoutNd,
    nn.modules.batchnorm._BatchNorm,
    nn.Identity,
)

_ARITHMETIC = (operator.add, operator.mul, operator.sub, operator.truediv, torch.add, torch.mul, torch.sub)


def labels(traced: Traced) -> dict[Node, tuple[Label | None, ...]]:
    """Which dimension of which input each dimension of a value is, where a glance tells.

    A number has one label; a tensor one for each dimension, ``None`` where nothing is known.
    """
    found: dict[Node, tuple[Label | None, ...]] = {}
    for node in traced.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, Tensor):
            found[node] = tuple((node, k) for k in range(value.dim()))
        if node.target in _ARITHMETIC and isinstance(value, Tensor):
            found[node] = _broadcast(node, found)
            continue
        if not node.all_input_nodes or node.all_input_nodes[0] not in found:
            continue
        source = found[node.all_input_nodes[0]]
        if node.op == "call_module":
            layer = traced.module.get_submodule(str(node.target))
            if isinstance(layer, nn.Linear):
                found[node] = (*source[:-1], None)
            elif isinstance(layer, nn.Embedding):
                found[node] = (*source, None)
            elif isinstance(layer, _KEEP_ALL):
                found[node] = source
        elif node.target is torch.arange and len(node.args) == 1:
            found[node] = source
        elif (
            node.target is getattr
            and node.args[1] == "shape"
            or node.target == "size"
            and len(node.args) == 1
        ):
            found[node] = source
        elif isinstance(value, int) and (node.target is operator.getitem or node.target == "size"):
            k = node.args[1] if len(node.args) > 1 else None
            found[node] = (source[k],) if isinstance(k, int) and -len(source) <= k < len(source) else (None,)
    return found


def _broadcast(node: Node, found: dict[Node, tuple[Label | None, ...]]) -> tuple[Label | None, ...]:
    """Labels of a sum or product: of a dimension that one operand has alone, or that both share."""
    rank = node.meta["val"].dim()
    operands = [arg for arg in node.args if isinstance(arg, Node) and isinstance(arg.meta["val"], Tensor)]
    result: list[Label | None] = []
    for k in range(-rank, 0):
        here = [arg for arg in operands if arg.meta["val"].dim() >= -k]
        candidates = {found[arg][k] if arg in found else None for arg in here}
        result.append(candidates.pop() if len(candidates) == 1 else None)
    return tuple(result)


def symbolic_values(traced: Traced) -> dict[Node, Any]:
    """Values of all nodes for inputs of symbolic sizes.

    Every dimension of every input has a symbol of its own; equal numbers in the example do not
    make two symbols equal. A network that cannot be run on symbols yields an empty answer: then
    nothing is proved.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # these load a computer algebra system
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        environment = ShapeEnv(duck_shape=False, specialize_zero_one=False)
        mode = FakeTensorMode(shape_env=environment, allow_non_fake_inputs=True)
        with untouched(traced.module, traced.example), torch.no_grad(), mode:
            fake = _pytree.tree_map_only(
                Tensor, lambda leaf: mode.from_tensor(leaf, static_shapes=False), traced.example
            )
            nodes = [
                n for n in traced.graph.nodes if n.op not in ("placeholder", "output") and not is_guard(n)
            ]
            replay = Replay(traced.module, nodes, traced.constants)
            return replay(dict(zip(traced.placeholders, fake, strict=True)), {})
    except Exception:  # noqa: BLE001  whatever stops it, the sizes are then carried along
        return {}
    finally:
        logging.disable(level)
