"""Kernel maps of functions and methods: the part of a graph that is not made of modules.

Functions go by name, so that ``F.relu``, ``torch.relu`` and ``x.relu()`` share one map.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bolza.core.errors import UnsupportedError
from bolza.meanfield import activations
from bolza.meanfield.kernels.kernel import Kernel, KernelCall, Values
from bolza.meanfield.kernels.kernel_maps import (
    activation_kernel,
    average_kernel,
    averaged,
    conv_kernel,
    embedding_kernel,
    linear_kernel,
    norm_kernel,
)
from bolza.meanfield.kernels.recipes import Product, Recipe, Scaled, Sum
from bolza.meanfield.kernels.windows import Window, sided_padding

__all__ = ["FUNCTION_KERNELS", "MOVES", "WEIGHTED", "function_kernel", "relabel"]

FunctionKernel = Callable[[KernelCall], Kernel]
FUNCTION_KERNELS: dict[str, FunctionKernel] = {}
WEIGHTED = frozenset("linear conv1d conv2d conv3d embedding layer_norm rms_norm group_norm".split())
MOVES = frozenset(
    "view reshape flatten unflatten permute transpose movedim contiguous clone squeeze unsqueeze getitem "
    "slice select narrow detach to float double type_as alias t swapaxes _unsafe_view unsafe_view to_copy".split()
)


def _register(*names: str) -> Callable[[FunctionKernel], FunctionKernel]:
    def add(function: FunctionKernel) -> FunctionKernel:
        FUNCTION_KERNELS.update(dict.fromkeys(names, function))
        return function

    return add


def function_kernel(name: str, call: KernelCall) -> Kernel:
    """Map kernels through a function.

    Args:
        name: plain name of the function.
        call: its inputs, and what is wanted.

    Raises:
        UnsupportedError: there is no map for this function.
    """
    if name in MOVES:
        return relabel(call)
    if name in FUNCTION_KERNELS:
        return FUNCTION_KERNELS[name](call)
    if len(call.inputs) == 1 and (act := _activation(name, call)) is not None:
        return activation_kernel(call, act)
    raise UnsupportedError(
        f"the kernel of function {name!r} (node {call.name!r}) in the limit of infinite width is not known here: put "
        "it into a module of its own and register a map for that with @kernel_map.register"
    )


def _activation(name: str, call: KernelCall) -> activations.Activation | None:
    if "activation" in call.cache:
        return call.cache["activation"]  # type: ignore[no-any-return]
    kind = activations.FUNCTIONS.get(name)
    if name == "erf":
        act = activations.resolve_activation("erf")
    elif kind is not None:
        options = {k: v for k, v in call.kwargs.items() if k not in ("input", "inplace", "training")}
        numbers = [a for a in call.args[1:] if not isinstance(a, bool | Tensor)]
        act = activations.resolve_activation(kind(*numbers, **options))
    elif name in ("sin", "cos", "exp", "square", "abs", "clamp", "clip", "sign", "clamp_min", "pow"):

        def apply(h: Tensor) -> Tensor:
            return call.again(h)  # type: ignore[no-any-return]

        apply.__name__ = name
        act = activations.resolve_activation(apply)
    else:
        return None
    call.cache["activation"] = act
    return act


# ---------------------------------------------------------------------------------------- layers


@_register("linear")
def _(call: KernelCall) -> Kernel:
    weight = call.argument(1, "weight")
    if len(call.inputs) > 1:
        raise UnsupportedError(f"function {call.name!r} is linear with weights that depend on the input")
    return linear_kernel(call, weight, call.argument(2, "bias"))


@_register("conv1d", "conv2d", "conv3d")
def _(call: KernelCall) -> Kernel:
    weight = call.argument(1, "weight")
    size = tuple(weight.shape[2:])

    def each(value: Any) -> tuple[int, ...]:
        return (value,) * len(size) if isinstance(value, int) else tuple(value)

    stride, dilation = each(call.argument(3, "stride", 1)), each(call.argument(5, "dilation", 1))
    padding = sided_padding(call.argument(4, "padding", 0), size, dilation)
    window = Window(size, stride, dilation, padding)
    return conv_kernel(call, weight, call.argument(2, "bias"), window, call.argument(6, "groups", 1))


@_register("embedding")
def _(call: KernelCall) -> Kernel:
    first, second = call.argument(0, "input"), call.argument(1, "weight")
    return embedding_kernel(call, first if first.is_floating_point() else second)


@_register("layer_norm")
def _(call: KernelCall) -> Kernel:
    k = call.kernel(-1)
    if len(call.argument(1, "normalized_shape")) != 1 or k.unit_dim != len(k.space) + 1:
        raise UnsupportedError(
            f"function {call.name!r} normalises over positions: use the module nn.LayerNorm"
        )
    return norm_kernel(
        call, k, call.argument(2, "weight"), call.argument(3, "bias"), call.argument(4, "eps", 1e-5)
    )


@_register("rms_norm")
def _(call: KernelCall) -> Kernel:
    eps = call.argument(3, "eps")
    eps = torch.finfo(call.output.dtype).eps if eps is None else eps
    return norm_kernel(call, call.kernel(-1), call.argument(2, "weight"), None, eps, centre=False)


@_register("group_norm")
def _(call: KernelCall) -> Kernel:
    return norm_kernel(
        call, call.kernel(1), call.argument(2, "weight"), call.argument(3, "bias"),
        call.argument(4, "eps", 1e-5), over_positions=True,
    )  # fmt: skip


@_register("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout")
def _(call: KernelCall) -> Kernel:
    if call.argument(2, "training", True) and call.argument(1, "p", 0.5) > 0:
        raise UnsupportedError(f"function {call.name!r} drops units at random: call model.eval() first")
    return call.kernel()


@_register("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
           "adaptive_avg_pool3d")  # fmt: skip
def _(call: KernelCall) -> Kernel:
    return average_kernel(call, call.again)


# ------------------------------------------------------------------------------------ arithmetic


def _operand(call: KernelCall, index: int, like: Kernel | None) -> Kernel:
    given = call.inputs[index]
    if not isinstance(given, Values):
        return given
    return given.kernel(-1 if like is None else like.unit_dim, call.all_pairs)


def _is_data(value: Any) -> bool:
    """Whether an argument stands for data; parameters and numbers are given as they are."""
    return isinstance(value, Tensor) and value.device.type == "meta"


def _two(call: KernelCall) -> tuple[Kernel, Kernel]:
    """Both operands in the same layout, independent of each other."""
    known = next(k for k in call.inputs if isinstance(k, Kernel))
    m, n = _operand(call, 0, known), _operand(call, 1, known)
    if (m.space, m.units, m.unit_dim) != (n.space, n.units, n.unit_dim):
        raise UnsupportedError(
            f"node {call.name!r} joins values of shapes {m.space} × {m.units} and {n.space} × {n.units} by "
            "broadcasting, whose kernel is not known here"
        )
    if m.sources & n.sources:
        both = ", ".join(sorted(m.sources & n.sources))
        raise UnsupportedError(
            f"node {call.name!r} joins two values that stem from the same random layer ({both}) without another "
            "between, so they are not independent in the limit and their kernel is not known here"
        )
    if m.all_pairs != n.all_pairs:
        m, n = m.reduced(), n.reduced()
    return m, n


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


@_register("add", "sub")
def _(call: KernelCall) -> Kernel:
    """K = K₁ + K₂ + the products of the means: independent summands."""
    left, right = call.args[0], call.argument(1, "other")
    sign = (-1.0 if call.function == "sub" else 1.0) * call.kwargs.get("alpha", 1)
    if len(call.inputs) == 1 and _is_data(left) and _is_data(right):  # a value with itself
        k = call.kernel()
        known = _scaled(k, 1 + sign)
        return k.map(
            lambda t: (1 + sign) ** 2 * t, mean=None if k.mean is None else (1 + sign) * k.mean, known=known
        )
    if len(call.inputs) == 1:
        k = call.kernel()
        other = right if _is_data(left) else left
        if isinstance(other, Tensor) and other.numel() > 1:
            return _constant(call, k, other)
        shift = float(other) * (sign if other is right else 1.0)
        flip = sign if other is left else 1.0
        cross = flip * shift * (k.left.mean + k.right.mean)
        mean = None if k.mean is None else flip * k.mean + shift
        ntk = k.ntk if k.ntk is None or abs(flip) == 1 else flip**2 * k.ntk
        nngp = flip**2 * k.nngp + cross + shift**2
        return k.with_(
            nngp=nngp, ntk=ntk, mean=mean, gaussian=k.gaussian and shift == 0, known=_scaled(k, flip, shift)
        )
    m, n = _two(call)
    if sign != 1:
        n = n.with_(nngp=sign**2 * n.nngp, ntk=None if n.ntk is None else sign**2 * n.ntk)
    cross = sign * (m.left.mean * n.right.mean + n.left.mean * m.right.mean)
    mean = None if m.mean is None or n.mean is None else m.mean + sign * n.mean
    return m.with_(
        nngp=m.nngp + n.nngp + cross, ntk=_plus(m.ntk, n.ntk), mean=mean,
        gaussian=m.gaussian and n.gaussian, sources=m.sources | n.sources, known=_joined(Sum, m, n, sign),
    )  # fmt: skip


def _scaled(k: Kernel, factor: float, shift: float = 0.0) -> Recipe | None:
    recipe = k.recipe
    return None if recipe is None else Scaled(recipe, factor, shift)


def _joined(kind: type[Sum], m: Kernel, n: Kernel, sign: float = 1.0) -> Recipe | None:
    one, two = m.recipe, n.recipe
    if one is None or two is None:
        return None
    return kind(one, two if sign == 1 else Scaled(two, sign))


def _constant(call: KernelCall, k: Kernel, other: Tensor) -> Kernel:
    """A table of parameters, such as an embedding of positions, added to every input: rows count as random."""
    shape = tuple(call.output.shape[1:])
    try:
        table = other.detach().expand(1, *shape)
    except RuntimeError as error:
        raise UnsupportedError(f"node {call.name!r} adds a tensor that differs between inputs") from error
    rows = table[0].movedim(k.unit_dim - 1, -1).reshape(-1, k.units).to(k.nngp)  # (P, units)
    gram = rows @ rows.T / k.units
    gram = gram if k.all_pairs else gram.diagonal()
    gram = gram.reshape(*gram.shape, *([1] * (k.nngp.ndim - gram.ndim)))
    ntk = k.ntk
    if call.ntk and other.requires_grad:
        same = torch.eye(len(rows)).to(k.nngp) if k.all_pairs else torch.ones(len(rows)).to(k.nngp)
        same = same.reshape(gram.shape).expand_as(k.nngp)
        ntk = same.clone() if ntk is None else ntk + same
    return k.with_(nngp=k.nngp + gram, ntk=ntk)


@_register("mul", "div")
def _(call: KernelCall) -> Kernel:
    """By a number: its square. Of independent values: K = K₁ K₂, Θ = Θ₁ K₂ + K₁ Θ₂."""
    if len(call.inputs) == 1:
        k = call.kernel()
        other = call.argument(1, "other")
        if _is_data(other) and _is_data(call.args[0]):
            raise UnsupportedError(f"node {call.name!r} multiplies a value with itself: use torch.square")
        other = call.args[0] if _is_data(other) else other
        reciprocal = call.function == "div"
        if (isinstance(other, Tensor) and other.numel() > 1) or (reciprocal and other is call.args[0]):
            raise UnsupportedError(f"node {call.name!r} scales by a tensor or divides by a value")
        factor = 1 / float(other) if reciprocal else float(other)
        mean = None if k.mean is None else factor * k.mean
        return k.map(lambda t: factor**2 * t, mean=mean, known=_scaled(k, factor))
    if call.function == "div":
        raise UnsupportedError(f"node {call.name!r} is a quotient of two values")
    m, n = _two(call)
    ntk = _plus(None if m.ntk is None else m.ntk * n.nngp, None if n.ntk is None else m.nngp * n.ntk)
    mean = None if m.mean is None or n.mean is None else m.mean * n.mean
    return m.with_(
        nngp=m.nngp * n.nngp, ntk=ntk, mean=mean, gaussian=False, sources=m.sources | n.sources,
        known=_joined(Product, m, n),
    )  # fmt: skip


@_register("cat", "concat")
def _(call: KernelCall) -> Kernel:
    """Along the units: kernels average with the numbers of units as weights."""
    known = next(k for k in call.inputs if isinstance(k, Kernel))
    parts = [_operand(call, i, known) for i in range(len(call.inputs))]
    dim = call.argument(1, "dim", call.kwargs.get("axis", 0)) % call.output.ndim
    if dim != known.unit_dim or any((p.space, p.unit_dim) != (known.space, known.unit_dim) for p in parts):
        raise UnsupportedError(
            f"node {call.name!r} joins values along positions: its kernel is not known here"
        )
    if any(p.all_pairs != parts[0].all_pairs for p in parts):
        parts = [p.reduced() for p in parts]
    units = sum(p.units for p in parts)
    out = parts[0].map(lambda t: t * (parts[0].units / units))
    nngp, ntk, mean = out.nngp, out.ntk, out.mean
    mean = None if mean is None else mean * (parts[0].units / units)
    for p in parts[1:]:
        w = p.units / units
        nngp = nngp + w * p.nngp
        ntk = _plus(ntk, None if p.ntk is None else w * p.ntk)
        mean = None if mean is None or p.mean is None else mean + w * p.mean
    sources = frozenset().union(*(p.sources for p in parts))
    return out.with_(nngp=nngp, ntk=ntk, mean=mean, units=units, gaussian=False, sources=sources)


@_register("mean")
def _(call: KernelCall) -> Kernel:
    """A mean over positions."""
    k = call.kernel(1)
    dims = call.argument(1, "dim")
    ndim = len(k.space) + 2
    if dims is None:
        raise UnsupportedError(f"node {call.name!r} is a mean over samples")
    over = {d % ndim for d in ([dims] if isinstance(dims, int) else dims)}
    if 0 in over or k.unit_dim in over:
        raise UnsupportedError(
            f"node {call.name!r} is a mean over samples or units: its kernel is not known here"
        )
    k = k.paired()
    p = k.positions
    a = call.again(torch.eye(p, dtype=torch.float64).reshape(p, *k.space).unsqueeze(k.unit_dim))
    unit_dim = k.unit_dim - (0 if a.ndim == ndim else sum(d < k.unit_dim for d in over))
    space = tuple(s for d, s in enumerate(a.shape) if d not in (0, unit_dim))
    return averaged(k, a.reshape(p, -1).T, space, unit_dim, call.all_pairs)


# ------------------------------------------------------------------------------- moving numbers


def relabel(call: KernelCall) -> Kernel:
    """Any operation that only moves numbers (views, flattening, slices), read from where it moves labels."""
    k = call.kernel()
    if "moved" not in call.cache:
        call.cache["moved"] = _moved(call, k)
    how, index, space, units, unit_dim = call.cache["moved"]
    if how == "select":

        def take(t: Tensor) -> Tensor:
            t = t.index_select(0, at)
            return t.index_select(1, at) if k.all_pairs else t

        at = index.to(k.nngp.device)
        if torch.equal(index, torch.arange(k.positions)):
            return k.with_(space=space, unit_dim=unit_dim)
        return k.map(take, space=space, unit_dim=unit_dim, mean=None if k.mean is None else k.mean[at])
    k = k.reduced()
    weights = index.to(k.nngp)  # (out, P): shares of the positions in each output item
    out = k.map(lambda t: torch.tensordot(weights, t, dims=1), space=space, units=units, unit_dim=unit_dim)
    return out.with_(mean=None if k.mean is None else weights @ k.mean)


def _moved(call: KernelCall, k: Kernel) -> tuple[str, Tensor, tuple[int, ...], int, int]:
    """Where the labels of positions and units go: ('select', positions, …) or ('merge', shares, …)."""
    first = next(a for a in call.args if _is_data(a))
    batch, shape = first.shape[0], list(first.shape)
    side = [1] * len(shape)
    side[k.unit_dim] = k.units
    lead = [s for d, s in enumerate(shape) if d not in (0, k.unit_dim)]
    place = torch.arange(math.prod(lead)).reshape(1, *lead).unsqueeze(k.unit_dim).expand(shape)
    unit = torch.arange(k.units).reshape(side).expand(shape)
    sample = torch.arange(batch).reshape([batch] + [1] * (len(shape) - 1)).expand(shape)
    try:
        places, units, samples = (
            call.again(t.to(torch.float64)).long() for t in (place.clone(), unit.clone(), sample.clone())
        )
    except Exception as error:
        raise UnsupportedError(
            f"node {call.name!r} moves numbers in a way that cannot be followed: {error}"
        ) from error
    own = torch.arange(batch).reshape(batch, *[1] * (samples.ndim - 1))
    if samples.ndim < 2 or len(samples) != batch or bool((samples != own).any()):
        raise UnsupportedError(f"node {call.name!r} mixes the samples of a batch")
    for d in (units.ndim - 1, *range(1, units.ndim - 1)):
        rows = places[0].movedim(d - 1, -1)
        labels = units[0].movedim(d - 1, -1)
        space = tuple(rows.shape[:-1])
        rows, labels = rows.reshape(-1, rows.shape[-1]), labels.reshape(-1, labels.shape[-1])
        if labels.shape[-1] == k.units and bool((labels == torch.arange(k.units)).all()):
            if bool((rows == rows[:, :1]).all()):
                return "select", rows[:, 0], space, k.units, d
    d = units.ndim - 1
    rows = places[0].reshape(-1, places.shape[-1])
    labels = units[0].reshape(-1, places.shape[-1])
    space = tuple(places.shape[1:-1])
    counts = torch.zeros(len(rows), k.positions, dtype=torch.float64)
    counts.scatter_add_(1, rows, torch.ones_like(rows, dtype=torch.float64))
    code = (rows * k.units + labels).sort(-1).values
    # Every unit of each of its positions, so that an output item is a plain union of whole items.
    whole = bool((code[:, 1:] > code[:, :-1]).all()) and bool(((counts == 0) | (counts == k.units)).all())
    if (len(rows) > 1 and call.all_pairs) or not whole:
        raise UnsupportedError(
            f"node {call.name!r} splits the units, or joins units of several positions into one of several items: its "
            "kernel is not known here"
        )
    return "merge", counts / rows.shape[-1], space, rows.shape[-1], d
