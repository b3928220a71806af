"""A network cut where everything passes through one value, and the gain of each piece.

The gain of a chain of pieces is the product of theirs. A piece without operations that only have a gain (pooling by
maxima, softmax), and with few enough units, is written as a linear map in a loop with its activations
(:mod:`bolza.stability.sectors`); for the others gains are multiplied and added along the graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from bolza.core.errors import UnsupportedError
from bolza.stability.layers import Reading, Step
from bolza.stability.operator_norm import adaptive_windows, matrix_norm, operator_gain
from bolza.stability.sectors import SectorNetwork

__all__ = ["Piece", "pieces", "product_gain", "sector_network"]

Box = tuple[Tensor, Tensor]
Coefficients = dict[int, Any]
_DENSE_ENTRIES = 30_000_000  # numbers of a matrix that is written out
_DENSE_SIDE = 3000

_UNIT = frozenset(
    "flatten unflatten reshape view view_as permute transpose t swapaxes movedim contiguous squeeze unsqueeze chunk "
    "split tensor_split getitem cat concat stack add sub iadd isub rsub neg negative clone detach to float double "
    "type_as dropout dropout1d dropout2d dropout3d flip roll narrow select unbind identity positive pos getattr "
    "pixel_shuffle pixel_unshuffle ravel channel_shuffle".split()
)  # norm at most 1 in each of their sources


@dataclass(frozen=True, eq=False)
class Piece:
    """Part of a network between two values that everything passes through.

    Attributes:
        start: value that enters.
        end: value that leaves.
        steps: operations between.
        whole: whether it can be written as a linear map in a loop with activations.
        units: numbers in its signals.
    """

    start: Node
    end: Node
    steps: tuple[Step, ...]
    whole: bool
    units: int


def pieces(reading: Reading, max_units: int) -> list[Piece]:
    """The smallest pieces, then neighbours joined as long as they are whole and have at most ``max_units``."""
    cuts, found = reading.cuts(), []
    order = {step.node: i for i, step in enumerate(reading.steps)} | {reading.start: -1}
    for a, b in zip(cuts, cuts[1:], strict=False):
        steps = reading.steps[order[a] + 1 : order[b] + 1]
        own = sum(reading.size(s.node) for s in steps if s.kind == "activation")
        whole = all(s.kind in ("affine", "activation") for s in steps)
        found.append(Piece(a, b, steps, whole and reading.size(a) + own <= max_units, own))
    joined: list[Piece] = []
    for piece in found:
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.whole
            and piece.whole
            and reading.size(last.start) + last.units + piece.units <= max_units
        ):
            joined[-1] = Piece(
                last.start, piece.end, last.steps + piece.steps, True, last.units + piece.units
            )
        else:
            joined.append(piece)
    return _absorb(joined)


def _absorb(found: list[Piece]) -> list[Piece]:
    """Join neighbours that are not whole, so that a linear map is not split from the one that follows."""
    joined: list[Piece] = []
    for piece in found:
        if joined and not joined[-1].whole and not piece.whole:
            last = joined[-1]
            joined[-1] = Piece(
                last.start, piece.end, last.steps + piece.steps, False, last.units + piece.units
            )
        else:
            joined.append(piece)
    return joined


def _identity(reading: Reading, node: Node) -> Tensor:
    value = reading.values[node]
    return torch.eye(value.numel(), dtype=value.dtype, device=value.device).reshape(-1, *value.shape)


def sector_network(reading: Reading, piece: Piece, slopes: dict[Node, Box] | None = None) -> SectorNetwork:
    """Write a piece as a linear map in a loop with functions of slopes in [0, 1].

    Args:
        reading: the network.
        piece: a whole piece.
        slopes: least and largest slopes of activations, entry by entry, where they are known better than globally.
    """
    coefficients: dict[Node, Coefficients] = {piece.start: {0: _identity(reading, piece.start)}}
    sizes = [reading.size(piece.start)]
    y: dict[tuple[int, int], Tensor] = {}
    for step in piece.steps:
        if step.kind == "affine":
            coefficients[step.node] = _push(reading, step, coefficients)
            continue
        (source,) = step.sources
        assert step.slopes is not None
        low, high = (slopes or {}).get(step.node) or step.slopes.everywhere(reading.values[source])
        low, width = low.flatten(), (high - low).flatten()
        kept = torch.nonzero(width > 0)[:, 0]
        out: Coefficients = {}
        k = len(sizes)
        for j, rows in coefficients[source].items():
            flat = rows.reshape(len(rows), -1)
            if bool(low.any()):
                out[j] = (flat * low).reshape(rows.shape)
            if len(kept):
                y[k, j] = flat[:, kept].mT.contiguous()
        if len(kept):
            basis = torch.zeros(len(kept), len(width), dtype=width.dtype, device=width.device)
            basis[torch.arange(len(kept), device=width.device), kept] = width[kept]
            out[k] = basis.reshape(-1, *reading.shape(step.node))
            sizes.append(len(kept))
        coefficients[step.node] = out
    end = {j: rows.reshape(len(rows), -1).mT.contiguous() for j, rows in coefficients[piece.end].items()}
    if not end:  # the output does not depend on the input
        some = reading.values[piece.end]
        end = {0: some.new_zeros(some.numel(), sizes[0])}
    return SectorNetwork(tuple(sizes), y, end)


def _push(reading: Reading, step: Step, known: dict[Node, Coefficients]) -> Coefficients:
    out: Coefficients = {}
    for source in step.sources:
        for j, rows in known[source].items():
            moved = reading.linear_part(step, source, rows)
            out[j] = moved if j not in out else torch.utils._pytree.tree_map(torch.add, out[j], moved)
    return out


def product_gain(reading: Reading, piece: Piece, gains: dict[Node, float] | None = None) -> float:
    """Gain of a piece by products along paths and sums over them.

    Args:
        reading: the network.
        piece: any piece.
        gains: Lipschitz constants of activations, where they are known better than globally.

    Raises:
        UnsupportedError: an operation has no Lipschitz constant, or no bound on its norm is known.
    """
    size = {piece.start: reading.size(piece.start)}
    constant = {piece.start: 1.0}  # of the opaque values, from the start of the piece
    order = [piece.start]
    # of each affine value, by the opaque values that it is made of: a matrix, or a bound on its norm
    parts: dict[Node, dict[Node, Any]] = {piece.start: {piece.start: _seed(reading, piece.start)}}

    def total(node: Node) -> float:
        known = parts[node]
        return sum(_norm(known[o], size[o]) * constant[o] for o in order if o in known)

    for step in piece.steps:
        if step.kind == "affine":
            parts[step.node] = _combine(reading, step, parts)
            continue
        if step.kind == "product" or not math.isfinite(step.gain):
            raise UnsupportedError(
                f"no Lipschitz constant covers {reading.name(step.node)!r}: {step.reason or 'it has none'}"
            )
        own = step.gain
        if step.slopes is not None:
            own = (gains or {}).get(step.node, math.nan)
            if math.isnan(own):
                low, high = step.slopes.everywhere(reading.values[step.sources[0]])
                own = float(torch.maximum(low.abs(), high.abs()).max())
        constant[step.node] = own * total(step.sources[0])
        size[step.node] = reading.size(step.node)
        order.append(step.node)
        parts[step.node] = {step.node: _seed(reading, step.node)}
    return total(piece.end)


class _Start:
    """The identity on a value, not written out."""


def _seed(reading: Reading, node: Node) -> Any:
    return _Start()


def _norm(part: Any, size: int) -> float:
    if isinstance(part, _Start):
        return 1.0
    return part if isinstance(part, float) else matrix_norm(part.reshape(len(part), -1))


def _combine(reading: Reading, step: Step, known: dict[Node, dict[Node, Any]]) -> dict[Node, Any]:
    out: dict[Node, Any] = {}
    tensors = isinstance(reading.values[step.node], Tensor)
    for source in step.sources:
        for opaque, part in known[source].items():
            n, m = reading.size(opaque), _numbers(reading.values[step.node])
            written = (
                not isinstance(part, float) and n * max(m, _numbers(reading.values[source])) <= _DENSE_ENTRIES
            )
            written = written and min(n, m) <= _DENSE_SIDE
            moved: Any
            if written:
                rows = _identity(reading, opaque) if isinstance(part, _Start) else part
                moved = reading.linear_part(step, source, rows)
            else:
                before = 1.0 if isinstance(part, _Start) else part
                if isinstance(before, Tensor):
                    before = matrix_norm(before.reshape(len(before), -1))
                if not isinstance(before, float):
                    raise _too_large(reading, step)
                moved = before * _step_norm(reading, step, source)
            if opaque in out:
                moved = _sum(out[opaque], moved, tensors)
            out[opaque] = moved
    return out


def _sum(a: Any, b: Any, tensors: bool) -> Any:
    if isinstance(a, float) or isinstance(b, float):
        norms = [v if isinstance(v, float) else matrix_norm(v.reshape(len(v), -1)) for v in (a, b)]
        return norms[0] + norms[1]
    return a + b if tensors else torch.utils._pytree.tree_map(torch.add, a, b)


def _numbers(value: Any) -> int:
    return sum(leaf.numel() for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor))


def _step_norm(reading: Reading, step: Step, source: Node) -> float:
    layer = reading.layer(step)
    if layer is not None:
        bound = operator_gain(layer, reading.shape(source))
        if bound is not None:
            return bound
        if isinstance(layer, torch.nn.modules.pooling._AdaptiveAvgPoolNd):
            return _adaptive(reading, source, step.node)
        raise _too_large(reading, step)
    target = step.node.target
    name = (target if isinstance(target, str) else getattr(target, "__name__", "")).strip("_")
    if name in _UNIT:
        return _unit_norm(reading, step, source, name)
    if name == "linear":
        weight = step.node.args[1] if len(step.node.args) > 1 else step.node.kwargs["weight"]
        return matrix_norm(reading.values[weight] if isinstance(weight, Node) else weight)  # type: ignore[arg-type,index]
    if name in ("mul", "imul", "multiply", "div", "truediv", "true_divide"):
        others = [a for a in (*step.node.args, *step.node.kwargs.values()) if a is not source]
        factor = torch.as_tensor(reading.values[others[0]] if isinstance(others[0], Node) else others[0])
        size = factor.abs().double()
        if reading.size(source) == reading.size(step.node):
            return float(size.max() if "div" not in name else 1 / size.min())
    if name.startswith("adaptive_avg_pool"):
        return _adaptive(reading, source, step.node)
    if name in ("mean", "sum"):
        share = reading.size(source) / max(reading.size(step.node), 1)
        return math.sqrt(share) if name == "sum" else 1 / math.sqrt(share)
    raise _too_large(reading, step)


def _unit_norm(reading: Reading, step: Step, source: Node, name: str) -> float:
    """Copies, cuts and sums: an entry arrives as often as its value is named, repeated or spread out."""
    node = step.node
    if name == "getitem":
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        if any(isinstance(i, Node | Tensor | list | tuple) for i in index):
            raise _too_large(reading, step)  # entries may be taken more than once
        return 1.0
    times = torch.utils._pytree.tree_leaves((node.args, node.kwargs)).count(source)
    scale = max(1.0, abs(float(node.kwargs.get("alpha", 1))))  # type: ignore[arg-type]
    spread = 1.0
    if name in ("add", "sub", "iadd", "isub", "rsub"):
        spread = math.sqrt(reading.size(node) / reading.size(source))
    return times * scale * spread


def _adaptive(reading: Reading, source: Node, node: Node) -> float:
    before, after = reading.shape(source), reading.shape(node)
    return math.prod(
        matrix_norm(adaptive_windows(a, b)) for a, b in zip(before, after, strict=True) if a != b
    )


def _too_large(reading: Reading, step: Step) -> UnsupportedError:
    return UnsupportedError(
        f"{reading.name(step.node)!r} is linear, but too large to be written as a matrix "
        f"({reading.size(step.sources[0])} numbers enter), and no bound on its norm is known without one: "
        "give a smaller example, or replace it by layers of torch.nn"
    )
