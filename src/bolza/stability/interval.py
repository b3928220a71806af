r"""Interval bounds: where every value of a network lies when its input lies in a box.

    y = Wx + b:   centre W c + b, radius |W| r;      φ(y): the extrema of φ on [l, u]

Every bound is widened for rounding. The slopes of the activations on their intervals give local Lipschitz constants
(:func:`bolza.stability.lipschitz` with ``box``).

Reference: Gowal et al. (2018), arXiv:1810.12715.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F
from torch.utils import _pytree

from bolza.core import Reference, cites
from bolza.core.errors import ArgumentError, DivergenceError, ShapeError, UnsupportedError
from bolza.stability.layers import Reading, Step, read_network

__all__ = ["IntervalBounds", "interval_bounds", "propagate", "slopes_on_box"]

GOWAL = Reference(
    "gowal2018effectiveness",
    "Gowal, Sven and Dvijotham, Krishnamurthy and Stanforth, Robert and Bunel, Rudy and Qin, Chongli and "
    "Uesato, Jonathan and Arandjelovic, Relja and Mann, Timothy and Kohli, Pushmeet",
    "On the Effectiveness of Interval Bound Propagation for Training Verifiably Robust Models",
    2018,
    arxiv="1810.12715",
)

Box = tuple[Any, Any]


@dataclass(frozen=True)
class IntervalBounds:
    """Ends of the intervals that hold the outputs.

    Attributes:
        lower: shape of the output, float64.
        upper: the same.
    """

    lower: Tensor
    upper: Tensor

    @property
    def width(self) -> Tensor:
        """Upper minus lower end."""
        return self.upper - self.lower


@cites(GOWAL)
def interval_bounds(model: nn.Module, lower: Tensor, upper: Tensor) -> IntervalBounds:
    """Bounds on every output of a network for all inputs between two ends, sample by sample.

    Covered is what :func:`bolza.stability.lipschitz` covers and, besides, layer norm, products of two values and
    dot-product attention: on a box they are bounded. The cost is that of two forward passes. Bounds grow with depth,
    faster than the true ranges.

    Args:
        model: any network of one input tensor; it is read in evaluation mode and not changed.
        lower: lower ends of the inputs, shape ``(batch, *input)``.
        upper: upper ends, the same shape.

    Returns:
        The bounds, in float64 on the device of the model.

    Raises:
        ArgumentError: a lower end is above its upper end.
        DivergenceError: a bound overflows.
        ShapeError: the ends have different shapes.
        UnsupportedError: an operation that is not covered; the message names it.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
        >>> with torch.no_grad():
        ...     _ = net[0].weight.fill_(2.0), net[0].bias.fill_(-1.0)
        >>> bounds = interval_bounds(net, torch.tensor([[0.0]]), torch.tensor([[1.0]]))
        >>> abs(round(float(bounds.lower), 6)), round(float(bounds.upper), 6)
        (0.0, 1.0)
    """
    lower, upper = torch.as_tensor(lower), torch.as_tensor(upper)
    if lower.shape != upper.shape:
        raise ShapeError(
            f"lower has shape {tuple(lower.shape)}, upper {tuple(upper.shape)}: they must be the same"
        )
    if not bool((lower <= upper).all()):
        raise ArgumentError("lower is above upper somewhere: give the lower ends first")
    reading = read_network(model, (lower + upper) / 2)
    low, high = (end.detach().to(reading.example) for end in (lower, upper))
    with torch.no_grad():
        found = propagate(reading, low, high)[reading.end]
    if any(bool(torch.isnan(end).any()) for end in found):
        raise DivergenceError("the bounds are not numbers, ∞ − ∞ on the way: give a smaller box")
    return IntervalBounds(*found)


def slopes_on_box(reading: Reading, lower: Tensor, upper: Tensor) -> dict[Node, tuple[Tensor, Tensor]]:
    """Least and largest slopes of the activations for inputs in one box; ends have shape ``(1, *input)``."""
    with torch.no_grad():
        boxes = propagate(reading, lower, upper)
        found = {}
        for step in reading.steps:
            if step.slopes is not None:
                low, high = boxes[step.sources[0]]
                found[step.node] = step.slopes.between(low, high)
    return found


def propagate(reading: Reading, lower: Tensor, upper: Tensor) -> dict[Node, Box]:
    """The intervals of all values of a network, for a batch of boxes; the ends have shape ``(batch, *input)``."""
    boxes: dict[Node, Box] = {
        reading.start: (lower[:, None], upper[:, None])
    }  # every sample is a batch of one
    for step in reading.steps:
        try:
            low, high = _interval(reading, step, boxes)
        except (RuntimeError, TypeError) as error:
            raise UnsupportedError(
                f"no interval bound is known of {reading.name(step.node)!r}: {type(error).__name__}: {error}"
            ) from error
        boxes[step.node] = low, high
    if reading.end not in boxes:  # the output does not depend on the input
        constant = reading.values[reading.end].expand(len(lower), 1, *reading.shape(reading.end)[1:])
        boxes[reading.end] = constant, constant
    low, high = boxes[reading.end]
    return boxes | {reading.end: (low.squeeze(1), high.squeeze(1))}


def _wider(low: Any, high: Any) -> Box:
    def margin(a: Tensor, b: Tensor) -> Tensor:
        size = torch.maximum(a.abs(), b.abs())
        return 64 * torch.finfo(a.dtype).eps * size.masked_fill(size == torch.inf, 0.0)  # masks of −∞ stay

    def lower(a: Tensor, b: Tensor) -> Tensor:
        return a - margin(a, b)

    def upper(a: Tensor, b: Tensor) -> Tensor:
        return b + margin(a, b)

    return _pytree.tree_map(lower, low, high), _pytree.tree_map(upper, low, high)


def _interval(reading: Reading, step: Step, boxes: dict[Node, Box]) -> Box:
    if step.kind == "activation":
        assert step.slopes is not None
        return _wider(*step.slopes.values(*boxes[step.sources[0]]))
    if step.kind == "affine":
        return _affine(reading, step, boxes)
    if step.rule == "max":  # monotone
        low, high = (
            _batched(lambda v: reading.evaluate(step.node, {step.sources[0]: v}), e)
            for e in boxes[step.sources[0]]
        )
        return low, high
    if step.rule in ("softmax", "log_softmax"):
        return _softmax(reading, step, *boxes[step.sources[0]])
    if step.rule == "norm":
        return _norm(reading, step, *boxes[step.sources[0]])
    if step.rule == "attention":
        return _attention(reading, step, boxes)
    if step.rule in ("mul", "imul", "multiply", "matmul", "mm", "bmm"):
        return _bilinear(reading, step, boxes)
    raise UnsupportedError(f"no interval bound is known of {reading.name(step.node)!r}: {step.reason}")


def _batched(function: Callable[..., Any], *values: Any) -> Any:
    return torch.func.vmap(function)(*values)


def _affine(reading: Reading, step: Step, boxes: dict[Node, Box]) -> Box:
    """Centre by the operation itself; radius by its linear part with the signs of its coefficients removed."""
    sources = step.sources
    centres = {s: _pytree.tree_map(lambda a, b: (a + b) / 2, *boxes[s]) for s in sources}
    radii = {s: _pytree.tree_map(lambda a, b: (b - a) / 2, *boxes[s]) for s in sources}
    centre = _batched(
        lambda *v: reading.evaluate(step.node, dict(zip(sources, v, strict=True))), *centres.values()
    )
    radius: Any = None
    for s in sources:
        part = _absolute(reading, step, s, radii[s])
        radius = part if radius is None else _pytree.tree_map(torch.add, radius, part)
    return _wider(_pytree.tree_map(torch.sub, centre, radius), _pytree.tree_map(torch.add, centre, radius))


_POSITIVE = frozenset(
    "flatten unflatten reshape view view_as permute transpose t swapaxes movedim contiguous squeeze unsqueeze chunk "
    "split tensor_split getitem cat concat stack add sub iadd isub rsub neg negative clone detach to float double "
    "type_as dropout dropout1d dropout2d dropout3d flip roll narrow select unbind identity positive pos getattr "
    "pixel_shuffle pixel_unshuffle ravel channel_shuffle mean sum avg_pool1d avg_pool2d avg_pool3d expand expand_as "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d repeat tile cumsum unfold pad index_select triu tril "
    "masked_fill".split()
)  # all coefficients in a source have one sign, or are 0


def _absolute(reading: Reading, step: Step, source: Node, radius: Any) -> Any:
    """|A| r for the linear part A of an affine step in one source."""
    layer = reading.layer(step)
    if layer is not None:
        weight = getattr(layer, "weight", None)
        if isinstance(layer, nn.Linear):
            return F.linear(radius, layer.weight.abs())
        if isinstance(layer, nn.modules.conv._ConvNd):
            with _swapped(layer, "weight", layer.weight.abs()):
                return reading.linear_part(step, source, radius)
        if isinstance(weight, Tensor):  # batch norm, instance norm: one factor a channel
            with _swapped(layer, "weight", weight.abs()):
                return reading.linear_part(step, source, radius)
        if isinstance(layer, nn.Upsample) and layer.mode == "bicubic":
            raise UnsupportedError("bicubic interpolation has coefficients of both signs: take bilinear")
        return reading.linear_part(step, source, radius)
    target = step.node.target
    name = (target if isinstance(target, str) else getattr(target, "__name__", "")).strip("_")
    if name in _POSITIVE:
        return _pytree.tree_map(torch.abs, reading.linear_part(step, source, radius))
    if name in ("mul", "imul", "multiply", "div", "truediv", "true_divide"):  # one factor an entry
        return reading.linear_part(step, source, radius).abs()
    return _dense_absolute(reading, step, source, radius)


class _swapped:  # noqa: N801  used as a function
    """A parameter replaced for a moment, in a copy that is ours."""

    def __init__(self, layer: nn.Module, name: str, value: Tensor) -> None:
        self.layer, self.name, self.value = layer, name, nn.Parameter(value, requires_grad=False)

    def __enter__(self) -> None:
        self.old = getattr(self.layer, self.name)
        setattr(self.layer, self.name, self.value)

    def __exit__(self, *_: object) -> None:
        setattr(self.layer, self.name, self.old)


def _dense_absolute(reading: Reading, step: Step, source: Node, radius: Tensor) -> Tensor:
    """|A| r with A written out."""
    value = reading.values[source]
    if not isinstance(value, Tensor) or value.numel() * reading.size(step.node) > 30_000_000:
        raise UnsupportedError(
            f"{reading.name(step.node)!r} is linear, but too large to be written out, and the signs of its "
            "coefficients are not known: replace it by a layer of torch.nn"
        )
    basis = torch.eye(value.numel(), dtype=value.dtype, device=value.device).reshape(-1, *value.shape)
    matrix = reading.linear_part(step, source, basis).reshape(len(basis), -1).abs()
    out = radius.reshape(len(radius), -1) @ matrix
    return out.reshape(len(radius), *reading.shape(step.node))


def _softmax(reading: Reading, step: Step, low: Tensor, high: Tensor) -> Box:
    layer = reading.layer(step)
    node = step.node
    dim = (
        layer.dim if layer is not None else node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else -1)
    )
    dim = low.ndim - 1 if dim is None else int(dim) + 1 if int(dim) >= 0 else low.ndim + int(dim)  # type: ignore[arg-type,call-overload]

    def log_share(own: Tensor, other: Tensor) -> Tensor:
        """Logarithm of e^own / (e^own + Σ over the others of e^other)."""
        total = torch.logsumexp(other, dim, keepdim=True)
        rest = total + torch.log1p(-torch.exp((other - total).clamp(max=-1e-15)))
        return -torch.logaddexp(torch.zeros_like(own), rest - own)

    bottom, top = log_share(low, high), log_share(high, low)
    if step.rule == "softmax":
        return (bottom.exp() * (1 - 1e-12)), (top.exp() * (1 + 1e-12)).clamp(max=1)
    return bottom - 1e-12 * bottom.abs(), (top + 1e-12).clamp(max=0)


def _norm(reading: Reading, step: Step, low: Tensor, high: Tensor) -> Box:
    """A normalised entry lies within ±√n, and is an interval over a positive scale."""
    layer: Any = reading.layer(step)
    shape = low.shape
    if isinstance(layer, nn.GroupNorm):
        grouped = (
            low.reshape(shape[0], 1, layer.num_groups, -1),
            high.reshape(shape[0], 1, layer.num_groups, -1),
        )
    else:
        grouped = tuple(e.flatten(-len(layer.normalized_shape)) for e in (low, high))  # type: ignore[assignment]
    lo, up = grouped
    n = lo.shape[-1]
    if not isinstance(layer, nn.RMSNorm):  # subtract the mean, in which each entry itself takes part
        mean_lo, mean_up = lo.mean(-1, keepdim=True), up.mean(-1, keepdim=True)
        lo, up = lo - mean_up + (up - lo) / n, up - mean_lo - (up - lo) / n
    square = torch.where((lo <= 0) & (up >= 0), 0.0, torch.minimum(lo.abs(), up.abs()) ** 2)
    largest = torch.maximum(lo.abs(), up.abs()) ** 2
    small = (square.mean(-1, keepdim=True) + layer.eps).sqrt()
    large = (largest.mean(-1, keepdim=True) + layer.eps).sqrt()
    limit = math.sqrt(n)
    down = torch.where(lo < 0, lo / small, lo / large).clamp(-limit, limit).reshape(shape)
    top = torch.where(up > 0, up / small, up / large).clamp(-limit, limit).reshape(shape)
    weight: Any = layer.weight
    bias: Any = getattr(layer, "bias", None)
    if weight is not None:
        if isinstance(layer, nn.GroupNorm):
            weight, bias = (v.reshape(-1, *(1,) * (len(shape) - 3)) for v in (weight, bias))
        down, top = torch.minimum(weight * down, weight * top), torch.maximum(weight * down, weight * top)
        if bias is not None:
            down, top = down + bias, top + bias
    return _wider(down - 1e-12, top + 1e-12)


def _attention(reading: Reading, step: Step, boxes: dict[Node, Box]) -> Box:
    """Each output is a mean of values with weights that sum to 1."""
    node = step.node
    value = node.args[2] if len(node.args) > 2 else node.kwargs["value"]
    query = node.args[0] if node.args else node.kwargs["query"]
    if value in boxes:
        low, high = boxes[value]  # type: ignore[index]
    else:
        low = high = reading.values[value][None]  # type: ignore[index]
    count = reading.shape(query)[-2]  # type: ignore[arg-type]
    batch = next(iter(boxes.values()))[0].shape[0]
    ends = (low.amin(-2, keepdim=True), high.amax(-2, keepdim=True))
    if (
        len(node.args) > 3 or node.kwargs.get("attn_mask") is not None
    ):  # a row that is masked altogether gives 0
        ends = (ends[0].clamp(max=0), ends[1].clamp(min=0))
    down, up = (e.expand(batch, *e.shape[1:-2], count, e.shape[-1]) for e in ends)
    return _wider(down, up)


def _bilinear(reading: Reading, step: Step, boxes: dict[Node, Box]) -> Box:
    """Products of intervals in centre and radius: |x y − x₀y₀| ≤ |x₀| r_y + r_x |y₀| + r_x r_y."""
    a, b = (*step.node.args, *step.node.kwargs.values())[:2]
    assert isinstance(a, Node) and isinstance(b, Node)
    (ca, ra), (cb, rb) = (
        ((boxes[n][0] + boxes[n][1]) / 2, (boxes[n][1] - boxes[n][0]) / 2)
        if n in boxes
        else (reading.values[n][None], torch.zeros_like(reading.values[n])[None])
        for n in (a, b)
    )
    times = torch.matmul if step.rule in ("matmul", "mm", "bmm") else torch.mul
    centre = times(ca, cb)
    radius = times(ca.abs(), rb) + times(ra, cb.abs()) + times(ra, rb)
    return _wider(centre - radius, centre + radius)
