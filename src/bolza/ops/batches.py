"""What a user hands over as ``(model, loss, data, params)``, read in one place.

``data`` is one pair ``(x, y)`` (a tuple), or any iterable of such pairs: a list, a ``DataLoader``. ``x`` is
what the model takes: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from bolza.ops.errors import ArgumentError, DataError, DivergenceError, ShapeError, UnsupportedError

__all__ = [
    "Batch",
    "Data",
    "Loss",
    "apply",
    "batches_of",
    "checked_loss",
    "count_samples",
    "read",
    "select_parameters",
    "to_device",
    "unflatten",
]

Batch: TypeAlias = tuple[Any, Any]
Data: TypeAlias = Batch | Iterable[Batch]
Loss: TypeAlias = Callable[[Any, Any], Tensor]


def batches_of(data: Data) -> Iterable[Batch]:
    """An iterable of ``(x, y)`` that can be read again; an iterator is read into memory.

    Raises:
        ArgumentError: ``data`` is neither a pair nor an iterable of pairs.
        DataError: it is an empty list.

    Example:
        >>> len(list(batches_of((torch.zeros(3, 2), torch.zeros(3)))))
        1
    """
    if isinstance(data, tuple):
        if len(data) != 2:
            raise ArgumentError(
                f"data is a tuple of {len(data)}: give one pair (x, y), or a list of such pairs"
            )
        if all(isinstance(part, tuple) and len(part) == 2 for part in data):
            raise ArgumentError(
                "data is a tuple of pairs: a tuple is one batch (x, y), so give batches as a list"
            )
        return [data]
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise ArgumentError(
            f"data is a {type(data).__name__}: give a pair (x, y) or an iterable of such pairs"
        )
    batches = list(data) if isinstance(data, Iterator) else data
    if isinstance(batches, Sequence) and len(batches) == 0:
        raise DataError("data has no batches: give at least one pair (x, y)")
    return batches


def read(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches on a device; an empty source and a malformed batch are named.

    Raises:
        DataError: no batches, or one that is not a pair.
    """
    empty = True
    for batch in batches:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise DataError(f"a batch of data is a {type(batch).__name__}, not a pair (x, y)")
        empty = False
        yield to_device(batch[0], device), to_device(batch[1], device)
    if empty:
        raise DataError("data has no batches: is the loader empty, or was an iterator already used up?")


def to_device(tree: Any, device: torch.device) -> Any:
    """Move every tensor of a tree."""
    return _pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, tree)


def apply(model: Callable[..., Any], x: Any) -> Any:
    """Call the model on ``x``: a tuple as positional, a dict as keyword arguments."""
    if isinstance(x, tuple):
        return model(*x)
    return model(**x) if isinstance(x, dict) else model(x)


def count_samples(x: Any) -> int:
    """Length of the first dimension of the first tensor in ``x``.

    Raises:
        DataError: there is none, or it is empty.
    """
    for leaf in _pytree.tree_leaves(x):
        if isinstance(leaf, Tensor) and leaf.ndim:
            if leaf.shape[0] == 0:
                raise DataError("a batch of data has no samples: drop empty batches")
            return int(leaf.shape[0])
    raise DataError("a batch of data holds no tensor with a sample dimension: x needs one, samples first")


def checked_loss(value: Any) -> Tensor:
    """The loss as a scalar that can be differentiated.

    Raises:
        ShapeError: it is not a scalar tensor.
        DivergenceError: it is not finite.
    """
    if not isinstance(value, Tensor):
        raise ShapeError(f"loss returned a {type(value).__name__}: it must return a scalar tensor")
    if value.numel() != 1:
        raise ShapeError(
            f"loss returned a tensor of shape {tuple(value.shape)}: it must be a scalar, so average it "
            "over the batch"
        )
    if not bool(torch.isfinite(value.detach())):
        raise DivergenceError(
            f"loss is {float(value.detach())}: check the data and the parameters for nan and inf"
        )
    return value.reshape(())


def select_parameters(model: nn.Module, params: Iterable[str] | None = None) -> dict[str, nn.Parameter]:
    """Trainable parameters by name, in the order of ``model.parameters()``; a shared one appears once.

    Args:
        model: the network.
        params: names to keep: those of ``named_parameters()``, or of modules, which stand for all
            parameters below them; every parameter with ``requires_grad`` by default.

    Raises:
        ArgumentError: nothing to select, an unknown name, or a frozen parameter asked for by its name.
        UnsupportedError: half-precision parameters, or a parameter without a value yet.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        >>> list(select_parameters(net, ["1"])), list(select_parameters(net, ["0.bias", "1.bias"]))
        (['1.weight', '1.bias'], ['0.bias', '1.bias'])
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if params is not None:
        wanted = [params] if isinstance(params, str) else list(params)
        known = dict(model.named_parameters(remove_duplicate=False))
        kept: set[int] = set()
        for name in wanted:
            inside = [
                p for full, p in known.items() if full == name or full.startswith(f"{name}.") or name == ""
            ]
            if not inside:
                raise ArgumentError(f"params names {name!r}, but the model has no such parameter or module")
            if name in known and not known[name].requires_grad:
                raise ArgumentError(
                    f"params names {name!r}, which is frozen: set requires_grad on it, or leave it out"
                )
            kept.update(id(p) for p in inside)
        trainable = {name: p for name, p in trainable.items() if id(p) in kept}
    if not trainable:
        raise ArgumentError("no parameter to differentiate: all are frozen, or the model has none")
    for name, p in trainable.items():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise UnsupportedError(f"parameter {name!r} has no value yet: run the model once first")
        if p.is_complex():
            raise UnsupportedError(
                f"parameter {name!r} is {str(p.dtype).removeprefix('torch.')}: write the network in real and imaginary "
                "parts, as curvature and gradient noise are those of real parameters"
            )
        if p.dtype not in (torch.float32, torch.float64):
            raise UnsupportedError(
                f"parameter {name!r} is {str(p.dtype).removeprefix('torch.')}: curvature and gradient noise "
                "are lost to rounding in half precision, so call model.float() first"
            )
    return trainable


def unflatten(vector: Tensor, like: Iterable[Tensor]) -> list[Tensor]:
    """Cut a flat vector ``(n,)`` or block ``(k, n)`` into tensors of the shapes of ``like``."""
    parts, at = [], 0
    for p in like:
        piece = vector[..., at : at + p.numel()]
        parts.append(piece.reshape((*vector.shape[:-1], *p.shape)).to(p.dtype))
        at += p.numel()
    return parts
