"""What a value in a traced graph depends on.

Every node has one of three roles:

* ``constant``: parameters, buffers, and what is computed from them alone;
* ``size``: what the input decides by its sizes, types and devices, but not by its entries;
* ``data``: what depends on the entries of the input, or on random numbers.

Constants and sizes can be computed again wherever they are needed; data is what a state must carry.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from bolza.core.errors import ShapeError

__all__ = ["Role", "is_guard", "reads_metadata", "require", "role_of"]

Role = Literal["constant", "size", "data"]

_ATTRIBUTES = frozenset(
    "device dtype is_cpu is_cuda is_nested is_sparse itemsize layout nbytes ndim requires_grad shape".split()
)
_METHODS = frozenset(
    "dim element_size get_device is_complex is_contiguous is_floating_point is_signed ndimension nelement "
    "numel size stride type_as_size new_empty new_full new_ones new_zeros".split()
)
_FUNCTIONS: frozenset[Any] = frozenset(
    {
        len,
        torch.empty_like,
        torch.full_like,
        torch.is_complex,
        torch.is_floating_point,
        torch.is_tensor,
        torch.numel,
        torch.ones_like,
        torch.zeros_like,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.full_like.default,
        torch.ops.aten.new_zeros.default,
        torch.ops.aten.new_ones.default,
        torch.ops.aten.ones_like.default,
        torch.ops.aten.sym_numel.default,
        torch.ops.aten.sym_size.int,
        torch.ops.aten.sym_stride.int,
        torch.ops.aten.zeros_like.default,
    }
)


def require(value: Any, expected: Any, where: str) -> None:
    """Check that a size, on which the control flow of the network was read, is what it was at tracing."""
    same = math.isclose(value, expected) if isinstance(expected, float) else value == expected
    if not same:
        raise ShapeError(
            f"the network's control flow depends on the sizes of its input ({where}): it was read with the "
            f"value {expected!r}, and this input gives {value!r}; read it again with an example of this size"
        )


def is_guard(node: Node) -> bool:
    """Whether the node only checks a size."""
    return node.op == "call_function" and node.target is require


def reads_metadata(node: Node) -> bool:
    """Whether the node uses no more of its first argument, a tensor, than its size, type and device."""
    if not node.args or not isinstance(node.args[0], Node):
        return False
    if not isinstance(node.args[0].meta.get("val"), Tensor):
        return False
    if node.op == "call_method":
        return node.target in _METHODS
    if node.op == "call_function":
        if node.target is getattr:
            return node.args[1] in _ATTRIBUTES
        return node.target in _FUNCTIONS
    return False


def role_of(node: Node) -> Role:
    """Role of a node whose arguments have their roles, and whose own value is in ``meta["val"]``."""
    if node.op == "get_attr":
        return "constant"
    if node.op == "placeholder":
        return "size" if isinstance(node.meta["val"], (bool, int, float, str, type(None))) else "data"
    if node.meta.get("random"):
        return "data"
    roles = [arg.meta["role"] for arg in node.all_input_nodes]
    if reads_metadata(node):
        first = node.args[0]
        rest = [arg.meta["role"] for arg in node.all_input_nodes if arg is not first]
        assert isinstance(first, Node)
        roles = [*rest, "size" if first.meta["role"] == "data" else first.meta["role"]]
    for role in ("data", "size"):
        if role in roles:
            return role  # type: ignore[return-value]
    return "constant"
