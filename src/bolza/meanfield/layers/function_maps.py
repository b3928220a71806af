"""Moment maps of functions and methods: the part of a graph that is not made of modules.

Functions go by name, so that ``F.relu``, ``torch.relu``, ``x.relu()`` and ``aten.relu`` share one map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bolza.core.errors import BolzaError
from bolza.meanfield import activations
from bolza.meanfield.layers.conv_maps import conv_step
from bolza.meanfield.layers.moment_maps import (
    Call,
    Missing,
    Step,
    activation_step,
    dropout_step,
    embedding_step,
    linear_step,
)
from bolza.meanfield.layers.moments import Moments, measure
from bolza.meanfield.layers.norm_maps import averaged, batch_norm_step, unit_norm_step

__all__ = ["FUNCTION_MAPS", "function_name", "relabel"]

FunctionMap = Callable[[Call, Callable[[Tensor], Any]], Step | Missing]
FUNCTION_MAPS: dict[str, FunctionMap] = {}

MOVES = frozenset(
    "view reshape flatten unflatten permute transpose movedim contiguous clone squeeze unsqueeze getitem "
    "slice select narrow expand expand_as repeat detach to float double type_as alias t swapaxes "
    "_unsafe_view _to_copy lift_fresh_copy cls".split()
)


def function_name(target: Any) -> str:
    """Plain name of a function, method or operator: ``'relu'`` for all spellings of it."""
    packet = getattr(target, "overloadpacket", None)
    name = target if isinstance(target, str) else getattr(packet or target, "__name__", type(target).__name__)
    name = name.strip("_") if name.startswith("__") or name.endswith("_") else name
    return {"iadd": "add", "imul": "mul", "isub": "sub", "itruediv": "div", "truediv": "div", "concat": "cat",
            "radd": "add", "rmul": "mul"}.get(name, name)  # fmt: skip


def _register(*names: str) -> Callable[[FunctionMap], FunctionMap]:
    def add(function: FunctionMap) -> FunctionMap:
        FUNCTION_MAPS.update(dict.fromkeys(names, function))
        return function

    return add


def _argument(call: Call, place: int, name: str, default: Any = None) -> Any:
    return call.args[place] if len(call.args) > place else call.kwargs.get(name, default)


# ---------------------------------------------------------------------------------------- layers


@_register("linear")
def _(call: Call, again: Callable[[Tensor], Any]) -> Step | Missing:
    weight, bias = _argument(call, 1, "weight"), _argument(call, 2, "bias")
    return (
        linear_step(call, weight, bias)
        if len(call.inputs) == 1
        else Missing("weights that depend on the data")
    )


@_register("conv1d", "conv2d", "conv3d")
def _(call: Call, again: Callable[[Tensor], Any]) -> Step | Missing:
    names = {1: "weight", 2: "bias", 3: "stride", 4: "padding", 5: "dilation", 6: "groups"}
    usual = {2: None, 3: 1, 4: 0, 5: 1, 6: 1}
    weight, bias, stride, padding, dilation, groups = (
        _argument(call, i, n, usual.get(i)) for i, n in names.items()
    )
    if len(call.inputs) != 1:
        return Missing("weights that depend on the data")
    sizes = weight.shape[2:]
    stride, dilation = (
        tuple(v) * (1 if len(v) > 1 else len(sizes)) if isinstance(v, Sequence) else (v,) * len(sizes)
        for v in (stride, dilation)
    )
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, sizes, strict=True)]
        pads = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
    else:
        each = tuple(padding) if isinstance(padding, Sequence) else (padding,)
        each = each * (1 if len(each) > 1 else len(sizes))
        pads = [n for n in reversed(each) for _ in range(2)]
    return conv_step(call, weight, bias, stride, pads, dilation, groups)


@_register("batch_norm")
def _(call: Call, again: Callable[[Tensor], Any]) -> Step | Missing:
    places = ((1, "running_mean"), (2, "running_var"), (3, "weight"), (4, "bias"))
    mean, var, weight, bias = (_argument(call, i, n) for i, n in places)
    training, eps = _argument(call, 5, "training", False), _argument(call, 7, "eps", 1e-5)
    return batch_norm_step(call, weight, bias, mean, var, training, eps)


@_register("embedding")
def _(call: Call, again: Callable[[Tensor], Any]) -> Step | Missing:
    first, second = _argument(call, 0, "input"), _argument(call, 1, "weight")
    weight, tokens = (
        (first, second) if first.is_floating_point() else (second, first)
    )  # aten has the weight first
    return embedding_step(call, tokens, weight)


@_register("layer_norm")
def _(call: Call, again: Callable[[Tensor], Any]) -> Step | Missing:
    m = call.inputs[0]
    if len(_argument(call, 1, "normalized_shape")) != 1 or m.unit_dim != len(m.lead):
        return Missing("a layer norm over positions")
    weight, bias, eps = (
        _argument(call, i, n, d) for i, n, d in ((2, "weight", None), (3, "bias", None), (4, "eps", 1e-5))
    )
    g2 = 1.0 if weight is None else float(weight.detach().double().square().mean())
    b2 = 0.0 if bias is None else float(bias.detach().double().square().mean())
    return unit_norm_step(call, g2, b2, eps, True)


@_register("rms_norm")
def _(call: Call, again: Callable[[Tensor], Any]) -> Step | Missing:
    m = call.inputs[0]
    if len(_argument(call, 1, "normalized_shape")) != 1 or m.unit_dim != len(m.lead):
        return Missing("an RMS norm over positions")
    weight, eps = _argument(call, 2, "weight"), _argument(call, 3, "eps")
    g2 = 1.0 if weight is None else float(weight.detach().double().square().mean())
    return unit_norm_step(call, g2, 0.0, torch.finfo(call.output.dtype).eps if eps is None else eps, False)


@_register("dropout", "native_dropout")
def _(call: Call, again: Callable[[Tensor], Any]) -> Step | Missing:
    training = _argument(call, 2, "training", True)
    return dropout_step(call, _argument(call, 1, "p", 0.5), bool(training))


def activation_map(name: str) -> FunctionMap | None:
    """Map of an elementwise function by name, or none if the name is not one."""
    if name == "erf":
        return lambda call, again: activation_step(call, activations.resolve_activation("erf"))
    if name in ("sin", "cos", "exp", "square", "abs", "clamp", "clip", "sign", "clamp_min"):
        return lambda call, again: _of_function(call, again, name)
    kind = activations.FUNCTIONS.get(name)
    return None if kind is None else lambda call, again: _of_kind(call, kind)


def _of_kind(call: Call, kind: type[nn.Module]) -> Step | Missing:
    options = {k: v for k, v in call.kwargs.items() if k not in ("input", "inplace", "training")}
    numbers = [a for a in call.args[1:] if not isinstance(a, bool | Tensor)]
    return activation_step(call, activations.resolve_activation(kind(*numbers, **options)))


def _of_function(call: Call, again: Callable[[Tensor], Any], name: str) -> Step | Missing:
    again.__name__ = name
    try:
        return activation_step(call, activations.resolve_activation(again))
    except BolzaError as error:
        return Missing(str(error))


# ------------------------------------------------------------------------------------ arithmetic


def _signed_sum(call: Call, sign: float) -> Step | Missing:
    if call.kwargs.get("alpha", 1) != 1:
        return Missing("a sum with a factor", layer=False)
    left, right = call.args[0], _argument(call, 1, "other")
    numbers = [v for v in (left, right) if not isinstance(v, Tensor)]
    m = call.inputs[0]
    if left is right:
        return Missing("a sum of a value with itself", layer=False)
    if numbers:
        shift = float(numbers[0]) * (sign if right is numbers[0] else 1.0)
        flip = sign if left is numbers[0] else 1.0
        mean = flip * m.mean
        kernel = m.kernel + shift * (mean[..., :, None] + mean[..., None, :]) + shift**2
        return Step(
            m.with_(kernel=kernel, mean=mean + shift, gaussian=m.gaussian and shift == 0), lambda g: [g]
        )
    if len(call.inputs) == 1:  # a parameter or buffer, spread over the samples
        other = right if m.lead and tuple(left.shape) == tuple(call.output.shape) else left
        constant = measure(other.expand_as(call.output), m.unit_dim, full=m.full, gaussian=True)
        return (
            _sum(m, constant, sign, call) if _same(m, constant) else Missing("a broadcast sum", layer=False)
        )
    n = call.inputs[1]
    if m.full != n.full:
        return Missing("a sum of two layouts", layer=False)
    if not _same(m, n):
        return Missing("a sum of values of different shapes", layer=False)
    if dependent(m, n):
        return Missing("a sum of two values that stem from the same random layer")
    return _sum(m, n, sign, call)


def dependent(m: Moments, n: Moments) -> bool:
    """Whether two values stem from the same units of a random layer."""

    def read(source: str) -> tuple[str, str]:
        name, _, part = source.partition("[")
        return name, part

    left, right = [read(s) for s in m.sources], [read(s) for s in n.sources]
    return any(a == b and (p == q or not p or not q) for a, p in left for b, q in right)


def _same(m: Moments, n: Moments) -> bool:
    return (m.lead, m.units, m.unit_dim, m.full) == (n.lead, n.units, n.unit_dim, n.full)


def _sum(m: Moments, n: Moments, sign: float, call: Call) -> Step:
    """K = K₁ + K₂ + the product of the means: independent summands."""
    a, b = m.mean, sign * n.mean
    mixed = a[..., :, None] * b[..., None, :] + b[..., :, None] * a[..., None, :]
    out = m.with_(
        kernel=m.kernel + n.kernel + mixed, mean=a + b, gaussian=m.gaussian and n.gaussian,
        sources=m.sources | n.sources,
    )  # fmt: skip
    return Step(out, lambda g: [g] * len(call.inputs))


@_register("add")
def _(call: Call, again: Callable[[Tensor], Any]) -> Step | Missing:
    return _signed_sum(call, 1.0)


@_register("sub")
def _(call: Call, again: Callable[[Tensor], Any]) -> Step | Missing:
    return _signed_sum(call, -1.0)


@_register("mul", "div")
def _(call: Call, again: Callable[[Tensor], Any]) -> Step | Missing:
    m = call.inputs[0]
    if len(call.inputs) == 1 and isinstance(call.args[0], Tensor) and isinstance(call.args[1], int | float):
        probe = float(again(torch.ones((), dtype=torch.float64)))
        return Step(
            m.with_(kernel=probe**2 * m.kernel, mean=probe * m.mean),
            lambda g: [probe**2 * g],
            note=f"times {probe:g}",
        )
    factor = _factor(call, again) if len(call.inputs) == 1 else None
    if factor is None:
        itself = len(call.args) > 1 and call.args[0] is call.args[1]
        return Missing("a product of values", layer=itself or len(call.inputs) > 1)
    square, mean = float(factor.square().mean()), float(factor.mean())
    same = bool((factor == factor[0]).all())
    out = m.with_(kernel=square * m.kernel, mean=mean * m.mean, gaussian=m.gaussian and same)
    return Step(out, lambda g: [square * g])


def _factor(call: Call, again: Callable[[Tensor], Any]) -> Tensor | None:
    """What each unit is multiplied by, if a parameter or buffer does that and nothing else."""
    m = call.inputs[0]
    operands = [call.args[0], _argument(call, 1, "other")]
    if not all(isinstance(v, Tensor) for v in operands) or operands[0] is operands[1]:
        return None
    shape = list(call.output.shape)
    probe = again(torch.ones(shape, dtype=torch.float64, device=call.output.device))
    if not isinstance(probe, Tensor) or list(probe.shape) != shape:
        return None
    rows = probe.detach().cpu().movedim(m.unit_dim, -1).reshape(-1, m.units)
    return rows[0] if bool((rows == rows[:1]).all()) else None


@_register("cat")
def _(call: Call, again: Callable[[Tensor], Any]) -> Step | Missing:
    """Along the units: the kernels average with the numbers of units as weights, exactly."""
    parts, dim = call.inputs, _argument(call, 1, "dim", call.kwargs.get("axis", 0))
    first = parts[0]
    alike = all((p.lead, p.unit_dim, p.full) == (first.lead, first.unit_dim, first.full) for p in parts)
    if not alike or dim % call.output.ndim != first.unit_dim or len(parts) != len(call.args[0]):
        return Missing("a concatenation along positions", layer=False)
    units = sum(p.units for p in parts)
    kernel = sum((p.kernel * p.units / units for p in parts), torch.zeros_like(first.kernel))
    mean = sum((p.mean * p.units / units for p in parts), torch.zeros_like(first.mean))
    sources = frozenset().union(*(p.sources for p in parts))
    # Units of different variance are a mixture of Gaussians; a Gaussian only if the variances agree.
    close = all(torch.allclose(p.kernel, first.kernel, rtol=0.05) for p in parts)
    out = first.with_(
        kernel=kernel,
        mean=mean,
        units=units,
        sources=sources,
        gaussian=close and all(p.gaussian for p in parts),
    )
    return Step(out, lambda g: [g] * len(parts))


@_register("mean")
def _(call: Call, again: Callable[[Tensor], Any]) -> Step | Missing:
    m = call.inputs[0]
    dims = _argument(call, 1, "dim")
    if dims is None:
        return Missing("a mean over everything", layer=False)
    dims = {d % (len(m.lead) + 1) for d in ([dims] if isinstance(dims, int) else dims)}
    if 0 in dims or m.unit_dim in dims:
        return Missing("a mean over samples or units", layer=False)
    if not m.full:
        return Missing("an average over more than 512 samples × positions")
    # The indicator of each position goes through the same mean, with the samples' place taken by it.
    p = m.positions
    basis = torch.eye(p, dtype=torch.float64).reshape(p, *m.lead[1:])
    basis = basis.unsqueeze(m.unit_dim)
    a = again(basis)
    unit_dim = m.unit_dim - (0 if a.ndim == basis.ndim else sum(d < m.unit_dim for d in dims))
    space = tuple(s for d, s in enumerate(a.shape) if d not in (0, unit_dim))
    return averaged(m, a.reshape(p, -1).T, space, unit_dim)


# ------------------------------------------------------------------------------- moving numbers


def relabel(call: Call, again: Callable[[Tensor], Any]) -> Step | Missing:
    """Any operation that only moves numbers (views, flattening, slices), read from where it moves labels."""
    m = call.inputs[0]
    lead = list(m.lead)
    shape = [*lead[: m.unit_dim], m.units, *lead[m.unit_dim :]]
    item = torch.arange(m.samples * m.positions).reshape(lead).unsqueeze(m.unit_dim).expand(shape)
    side = [1] * len(shape)
    side[m.unit_dim] = m.units
    unit = torch.arange(m.units).reshape(side).expand(shape)
    items, units = again(item.double()), again(unit.double())
    if not isinstance(items, Tensor) or items.ndim < 2:
        return Missing("units are gone", layer=False)
    items, units = items.long(), units.long()
    for whole in (True, False):
        for d in dict.fromkeys((items.ndim - 1, 1, *range(1, items.ndim))):
            rows, labels = items.movedim(d, -1), units.movedim(d, -1)
            left = tuple(rows.shape[:-1])
            rows, labels = rows.reshape(-1, rows.shape[-1]), labels.reshape(-1, labels.shape[-1])
            if whole:
                if bool((labels == labels[:1]).all()) and bool((rows == rows[:, :1]).all()):
                    return _select(_some(m, labels[0]), rows[:, 0], left, d, m.units)
            elif bool((labels == labels[:1]).all()):
                return _merge(m, rows, left, d)
    return Missing("a reshape that splits the units", layer=False)


def _some(m: Moments, units: Tensor) -> Moments:
    """Some of the units (a chunk), or all in another order; those of other chunks are independent of them."""
    if len(units) == m.units and bool((units == torch.arange(m.units)).all()):
        return m
    part = f"[{hash(tuple(units.tolist())):x}]"
    return m.with_(units=len(units), sources=frozenset(s + part for s in m.sources))


def _select(m: Moments, items: Tensor, lead: tuple[int, ...], unit_dim: int, units: int) -> Step | Missing:
    """Each output item is one input item; of its units some are left."""
    share = m.units / units
    if m.full:
        out = m.with_(
            kernel=m.kernel[:, items][:, :, items], mean=m.mean[:, items], lead=lead, unit_dim=unit_dim
        )

        def scatter(g: Tensor) -> list[Tensor]:
            half = g.new_zeros(1, m.kernel.shape[1], len(items)).index_add_(1, items, share * g)
            return [torch.zeros_like(m.kernel).index_add_(2, items, half)]

        return Step(out, scatter)
    if lead[0] != m.samples:
        return Missing("a reshape across samples", layer=False)
    grid = items.reshape(m.samples, -1)
    at = grid[0] % m.positions
    if not bool((grid == torch.arange(m.samples)[:, None] * m.positions + at).all()):
        return Missing("a reshape across samples", layer=False)
    full = len(at) == 1
    out = m.with_(kernel=m.kernel[at], mean=m.mean[at], lead=lead, unit_dim=unit_dim, full=full)
    return Step(out, lambda g: [torch.zeros_like(m.kernel).index_add_(0, at, share * g)])


def _merge(m: Moments, rows: Tensor, lead: tuple[int, ...], unit_dim: int) -> Step | Missing:
    """Each output item joins the units of several input items, in the same order for every row."""
    size = rows.shape[-1]
    columns, counts = rows.T.unique(dim=0, return_counts=True)  # (m, rows)
    share = counts.double() / size
    if m.full:
        k = m.kernel[0]
        kernel = sum((w * k[c][:, c] for w, c in zip(share, columns, strict=True)), torch.zeros(1, 1))
        mean = (share[:, None] * m.mean[0][columns]).sum(0)
        full = True
        kernel, mean = kernel[None], mean[None]
    else:
        at = columns[:, 0] % m.positions
        if len(lead) != 1 or not bool((columns == torch.arange(m.samples) * m.positions + at[:, None]).all()):
            return Missing("a reshape across positions", layer=False)
        kernel = (share[:, None, None] * m.kernel[at]).sum(0, keepdim=True)
        mean = (share[:, None] * m.mean[at]).sum(0, keepdim=True)
        full = True

    def backward(g: Tensor) -> list[Tensor]:
        back = torch.zeros_like(m.kernel)
        for w, c in zip(counts.double() / m.units, columns, strict=True):
            if m.full:
                back[0][c[:, None], c] += w * g[0]
            else:
                back[c[0] % m.positions] += w * g[0]
        return [back]

    out = m.with_(kernel=kernel, mean=mean, lead=lead, units=size, unit_dim=unit_dim, full=full)
    return Step(out, backward)
