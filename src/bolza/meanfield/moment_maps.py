r"""How a layer maps second moments forward, and variances of gradients backward.

`moment_map` is open: it dispatches on the type of a module, and a user registers a layer of his own
with ``@moment_map.register``. Functions (``F.relu``, ``torch.cat``, operators of exported graphs)
have their maps in `bolza.meanfield.function_maps`. A map that cannot say anything returns a `Missing`
with the reason, and the layer is measured instead.

Weights of different layers, and of the forward and the backward pass, count as independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.meanfield.activations import ELEMENTWISE_MODULES, Activation, resolve_activation
from bolza.meanfield.moments import Moments

__all__ = ["Call", "Missing", "Step", "moment_map"]

_TOLERANCE = 3e-5  # of two-point moments, relative: far below what finite width does
Backward = Callable[[Tensor], Sequence[Tensor | None]]


@dataclass(frozen=True)
class Call:
    """One evaluation of a layer or function.

    Args:
        name: name of the node, unique in the graph.
        inputs: moments of the tensor inputs that carry data, in order.
        args: actual arguments.
        kwargs: actual keyword arguments.
        output: actual output.
        training: whether dropout and batch statistics are on.

    Example:
        >>> from bolza.meanfield.moments import measure
        >>> x, layer = torch.randn(3, 8), nn.Linear(8, 16, bias=False)
        >>> step = moment_map(layer, Call("layer", (measure(x, 1),), (x,), {}, layer(x)))
        >>> bool(torch.isclose(step.out.variances[0, 0], step.weight_var * x[0].double().square().mean()))
        True
    """

    name: str
    inputs: tuple[Moments, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    training: bool = False


@dataclass(frozen=True)
class Step:
    """What theory says about a call.

    Args:
        out: moments of the output.
        backward: from the variances of the gradient at the output, ``(groups, items)`` as in ``out``,
            to those at each input.
        weight_var: σ_w² of a layer with weights.
        bias_var: σ_b².
        gain: E φ'² of an activation, mean over items.
        kept: share of the variance that zero padding leaves, from layer to layer.
        activation: the activation, of a layer that is one.
        note: remark for the reader.

    Example:
        >>> from bolza.meanfield.moments import measure
        >>> Step(measure(torch.ones(2, 3), 1), lambda g: [g]).out.units
        3
    """

    out: Moments
    backward: Backward
    weight_var: float | None = None
    bias_var: float | None = None
    gain: float | None = None
    kept: float = 1.0
    activation: Activation | None = None
    note: str = ""


@dataclass(frozen=True)
class Missing:
    """Theory has nothing to say about a call.

    Args:
        reason: why, for the reader.
        layer: whether this is a layer to be reported (not mere moving of numbers).

    Example:
        >>> x = torch.zeros(1, 4, 8)
        >>> moment_map(nn.MaxPool1d(2), Call("pool", (), (x,), {}, x)).reason
        'no moment map for MaxPool1d'
    """

    reason: str
    layer: bool = field(default=True)


@singledispatch
def moment_map(layer: nn.Module, call: Call) -> Step | Missing:
    """Map moments through a layer.

    Args:
        layer: the module; the map is chosen by its type.
        call: its inputs, as moments and as numbers.

    Returns:
        A `Step`, or `Missing` with the reason.

    Example:
        A layer of one's own that multiplies by two:

        >>> class Double(nn.Module):
        ...     def forward(self, x):
        ...         return 2 * x
        >>> @moment_map.register
        ... def _(layer: Double, call):
        ...     m = call.inputs[0]
        ...     return Step(m.with_(kernel=4 * m.kernel, mean=2 * m.mean), lambda g: [4 * g])
    """
    return Missing(f"no moment map for {type(layer).__name__}")


# ------------------------------------------------------------------------------------ weights


def linear_step(call: Call, weight: Tensor, bias: Tensor | None) -> Step | Missing:
    """K' = σ_w² K + σ_b²; a gradient's variance gains σ_w² n_out/n_in."""
    m = call.inputs[0]
    fan_out, fan_in = weight.shape
    if m.units != fan_in or m.unit_dim != len(m.lead):
        return Missing("a linear layer along positions")
    w = fan_in * float(weight.detach().double().square().mean())
    b = 0.0 if bias is None else float(bias.detach().double().square().mean())
    out = m.with_(
        kernel=w * m.kernel + b, mean=torch.zeros_like(m.mean), units=fan_out, gaussian=True,
        sources=frozenset({call.name}),
    )  # fmt: skip
    return Step(out, lambda g: [g * (w * fan_out / fan_in)], w, b)


@moment_map.register
def _(layer: nn.Linear, call: Call) -> Step | Missing:
    return linear_step(call, layer.weight, layer.bias)


@moment_map.register(nn.Conv1d)
@moment_map.register(nn.Conv2d)
@moment_map.register(nn.Conv3d)
def _(layer: Any, call: Call) -> Step | Missing:
    m = call.inputs[0]
    if m.unit_dim != 1 or m.units != layer.in_channels:
        return Missing("a convolution along other dimensions than the trailing ones")
    squares = layer.weight.detach().to("cpu", torch.float64).square().mean((0, 1))  # per tap
    taps = squares * (layer.in_channels // layer.groups)
    back_taps = squares * (layer.out_channels // layer.groups)
    b = 0.0 if layer.bias is None else float(layer.bias.detach().double().square().mean())
    spatial, space = m.lead[1:], tuple(call.output.shape[2:])

    def slide(field: Tensor, kernel: Tensor) -> Tensor:
        """Weighted sums of (n, *spatial) over the window."""
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padded = F.pad(field[:, None], layer._reversed_padding_repeated_twice, mode=mode)
        conv = (F.conv1d, F.conv2d, F.conv3d)[field.ndim - 2]
        return conv(padded, kernel[None, None], stride=layer.stride, dilation=layer.dilation)[:, 0]

    if m.full:
        kernel = _slide_pairs(m, layer, taps, space)
    else:
        s = m.samples
        field = m.kernel.permute(1, 2, 0).reshape(s * s, *spatial)
        kernel = slide(field, taps).reshape(s, s, -1).permute(2, 0, 1)
    lead = (m.samples, *space)
    mean = torch.zeros(kernel.shape[:2], dtype=torch.float64)
    out = m.with_(
        kernel=kernel + b, mean=mean, lead=lead, units=layer.out_channels, gaussian=True,
        sources=frozenset({call.name}),
    )  # fmt: skip

    def backward(g: Tensor) -> list[Tensor]:
        # The adjoint of sliding: every output position hands its gradient to its window.
        fields = _as_fields(g, m.full, m.samples, space)
        with torch.enable_grad():
            probe = torch.zeros(m.samples, *spatial, dtype=torch.float64, requires_grad=True)
            (back,) = torch.autograd.grad(slide(probe, back_taps), probe, fields)
        return [_from_fields(back, m.full)]

    return Step(out, backward, float(taps.sum()), b, kept=_kept(slide, taps, spatial, space))


def _kept(
    slide: Callable[[Tensor, Tensor], Tensor], taps: Tensor, spatial: tuple[int, ...], space: tuple[int, ...]
) -> float:
    """Largest eigenvalue of sliding a window of weights that add up to 1, or its mean for other sizes."""
    total = float(taps.sum())
    if total == 0:
        return 1.0
    share = taps / total
    field = torch.ones(1, *spatial, dtype=torch.float64)
    if spatial != space:
        return float(slide(field, share).mean())
    for _ in range(30):
        field = slide(field, share)
        size = float(field.max())
        if size <= 0:
            return 1.0
        field = field / size
    return size


def _slide_pairs(m: Moments, layer: Any, taps: Tensor, space: tuple[int, ...]) -> Tensor:
    """K'[(a,p),(b,p')] = Σ_k v_k K[(a,p+k),(b,p'+k)], one tap after the other."""
    spatial = m.lead[1:]
    cells = torch.arange(math.prod(spatial), dtype=torch.float64).reshape(1, 1, *spatial) + 1
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(cells, layer._reversed_padding_repeated_twice, mode=mode)[0, 0].long() - 1  # -1: outside
    s, p = m.samples, math.prod(spatial)
    k = m.kernel.reshape(s, p, s, p)
    total = torch.zeros(s, math.prod(space), s, math.prod(space), dtype=torch.float64)
    for tap in torch.cartesian_prod(*(torch.arange(n) for n in taps.shape)).reshape(-1, taps.ndim):
        weight = taps[tuple(tap)]
        if weight == 0:
            continue
        index = tuple(
            slice(int(t) * d, int(t) * d + (n - 1) * st + 1, st)
            for t, d, st, n in zip(tap, layer.dilation, layer.stride, space, strict=True)
        )
        at = padded[index].reshape(-1)
        inside = (at >= 0).double()
        block = k[:, at.clamp_min(0)][:, :, :, at.clamp_min(0)]
        total += weight * inside[:, None, None] * inside * block
    items = s * math.prod(space)
    return total.reshape(1, items, items)


def _as_fields(g: Tensor, full: bool, samples: int, space: tuple[int, ...]) -> Tensor:
    """(groups, items) as (samples, *space)."""
    return (g.reshape(samples, -1) if full else g.T).reshape(samples, *space)


def _from_fields(field: Tensor, full: bool) -> Tensor:
    flat = field.reshape(len(field), -1)
    return flat.reshape(1, -1) if full else flat.T


def embedding_step(call: Call, tokens: Tensor, weight: Tensor) -> Step | Missing:
    """Rows are independent: K = σ² where two tokens agree, else 0."""
    if tokens.ndim < 1 or tokens.shape[0] == 0:
        return Missing("an embedding without a batch")
    var = float(weight.detach().double().square().mean())
    full = tokens.numel() <= 512
    ids = tokens.detach().cpu().reshape(tokens.shape[0], -1)
    ids = ids.reshape(1, -1) if full else ids.T
    kernel = var * (ids[:, :, None] == ids[:, None, :]).double()
    out = Moments(
        kernel, torch.zeros(kernel.shape[:2], dtype=torch.float64), tuple(tokens.shape), weight.shape[1],
        tokens.ndim, full, True, frozenset({call.name}),
    )  # fmt: skip
    return Step(out, lambda g: [], var, 0.0)


@moment_map.register
def _(layer: nn.Embedding, call: Call) -> Step | Missing:
    return embedding_step(call, call.args[0], layer.weight)


# -------------------------------------------------------------------------------- activations


def activation_step(call: Call, act: Activation) -> Step | Missing:
    """K'_ab = E φ(u)φ(v) over Gaussians with kernel K."""
    m = call.inputs[0]
    if act.name == "linear":
        return Step(m, lambda g: [g], gain=1.0, activation=act)
    if not m.gaussian:
        return Missing("its input is not Gaussian (no random layer just before it)")
    q = m.variances.clamp_min(0)
    scale = (q[..., :, None] * q[..., None, :]).sqrt()
    c = torch.where(scale > 0, m.kernel / scale, 0.0).clamp(-1, 1)
    kernel = act.cross(q[..., :, None], q[..., None, :], c, tol=_TOLERANCE)
    kernel = (kernel + kernel.transpose(-1, -2)) / 2
    kernel.diagonal(dim1=-2, dim2=-1).copy_(act.second(q))
    slope = act.slope(q)
    out = m.with_(kernel=kernel, mean=act.mean(q), gaussian=False)
    return Step(out, lambda g: [g * slope], gain=float(slope.mean()), activation=act)


def _elementwise(layer: nn.Module, call: Call) -> Step | Missing:
    return activation_step(call, resolve_activation(layer))


for _kind in ELEMENTWISE_MODULES:
    moment_map.register(_kind, _elementwise)


def dropout_step(call: Call, rate: float, training: bool) -> Step | Missing:
    """Independent masks: the diagonal grows by 1/ρ, pairs keep their product; so do gradients' variances."""
    m = call.inputs[0]
    if not training or rate == 0:
        return Step(m, lambda g: [g])
    if rate >= 1:
        return Missing("dropout of everything")
    extra = torch.diag_embed(m.variances * (1 / (1 - rate) - 1))
    return Step(m.with_(kernel=m.kernel + extra), lambda g: [g / (1 - rate)], note=f"keeps {1 - rate:g}")


@moment_map.register
def _(layer: nn.Dropout, call: Call) -> Step | Missing:
    return dropout_step(call, layer.p, layer.training)


# ------------------------------------------------------------------------------ normalisation


def _affine(layer: Any) -> tuple[float, float]:
    """Mean squares of the scale and the shift."""
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    g2 = 1.0 if weight is None else float(weight.detach().double().square().mean())
    b2 = 0.0 if bias is None else float(bias.detach().double().square().mean())
    return g2, b2


def unit_norm_step(call: Call, g2: float, b2: float, eps: float, centre: bool) -> Step | Missing:
    """Layer norm (centred) and RMS norm over the units: K'_ab = γ² K_ab/√(K_aa K_bb) + β²."""
    m = call.inputs[0]
    kernel = m.kernel - m.mean[..., :, None] * m.mean[..., None, :] if centre else m.kernel
    var = kernel.diagonal(dim1=-2, dim2=-1) + eps
    scale = (var[..., :, None] * var[..., None, :]).sqrt()
    out = m.with_(
        kernel=g2 * kernel / scale + b2, mean=torch.zeros_like(m.mean) if centre else m.mean / var.sqrt()
    )
    # Orthogonal to the value (and to the constants): one (two) of n directions is lost.
    kept = max(0.0, 1 - (2 if centre else 1) / m.units)
    return Step(out, lambda g: [g * (g2 * kept) / var])


@moment_map.register
def _(layer: nn.LayerNorm, call: Call) -> Step | Missing:
    m = call.inputs[0]
    if len(layer.normalized_shape) != 1 or m.unit_dim != len(m.lead):
        return _group_norm(layer, call, layer.eps)
    return unit_norm_step(call, *_affine(layer), layer.eps, True)


@moment_map.register
def _(layer: nn.RMSNorm, call: Call) -> Step | Missing:
    m = call.inputs[0]
    if len(layer.normalized_shape) != 1 or m.unit_dim != len(m.lead):
        return Missing("an RMS norm over positions")
    eps = layer.eps if layer.eps is not None else torch.finfo(call.output.dtype).eps
    return unit_norm_step(call, *_affine(layer), eps, False)


@moment_map.register
def _(layer: nn.GroupNorm, call: Call) -> Step | Missing:
    return _group_norm(layer, call, layer.eps)


def _group_norm(layer: Any, call: Call, eps: float) -> Step | Missing:
    """Normalisation of each sample over units and positions together."""
    m = call.inputs[0]
    if m.unit_dim != 1:
        return Missing("a group norm along other dimensions")
    g2, b2 = _affine(layer)

    def per_sample(t: Tensor) -> Tensor:
        """Mean over positions, spread over the items again."""
        if m.full:
            each = t.reshape(m.samples, -1).mean(-1, keepdim=True)
            return each.expand(-1, m.positions).reshape(1, -1)
        return t.mean(0, keepdim=True).expand_as(t)

    centre = per_sample(m.mean)
    kernel = (
        m.kernel - centre[..., :, None] * m.mean[..., None, :] - m.mean[..., :, None] * centre[..., None, :]
    )
    kernel = kernel + centre[..., :, None] * centre[..., None, :]
    var = per_sample(kernel.diagonal(dim1=-2, dim2=-1)) + eps
    scale = (var[..., :, None] * var[..., None, :]).sqrt()
    out = m.with_(kernel=g2 * kernel / scale + b2, mean=(m.mean - centre) / var.sqrt())
    return Step(out, lambda g: [g * g2 / var])


@moment_map.register(nn.BatchNorm1d)
@moment_map.register(nn.BatchNorm2d)
@moment_map.register(nn.BatchNorm3d)
def _(layer: Any, call: Call) -> Step | Missing:
    m = call.inputs[0]
    if m.unit_dim != 1:
        return Missing("a batch norm along other dimensions")
    g2, b2 = _affine(layer)
    if not layer.training and layer.running_var is not None:
        weight = torch.ones_like(layer.running_var) if layer.weight is None else layer.weight
        shift = torch.zeros_like(weight) if layer.bias is None else layer.bias
        factor = (weight / (layer.running_var + layer.eps).sqrt()).detach().double()
        offset = shift.detach().double() - factor * layer.running_mean.double()
        scale, square = float(factor.square().mean()), float(offset.square().mean())
        drift = float(offset.mean())
        mixed = float((factor * offset).mean())
        cross = mixed * (m.mean[..., :, None] + m.mean[..., None, :])
        mean = float(factor.mean()) * m.mean + drift
        return Step(m.with_(kernel=scale * m.kernel + cross + square, mean=mean), lambda g: [g * scale])
    if not m.full:
        return Missing("a batch norm over more than 512 samples × positions")
    if not m.gaussian:
        return Missing("a batch norm whose input is not Gaussian")
    normed, inverse = _batch_normalised(m.kernel[0], layer.eps)
    items = m.kernel.shape[-1]
    out = m.with_(kernel=g2 * normed[None] + b2, mean=torch.zeros_like(m.mean))
    return Step(
        out, lambda g: [g * (g2 * inverse * (items - 2) / items)], note=f"statistics of {items} items"
    )


def _batch_normalised(kernel: Tensor, eps: float) -> tuple[Tensor, float]:
    r"""E[y yᵀ] and E[1/σ²] for y = (h - h̄)/√(σ² + ε), h ~ N(0, kernel), σ² the variance in the batch.

    With λ the eigenvalues of the centred kernel, E[λ_i z_i²/(Σ_j λ_j z_j² + Nε)]
    = ∫_0^∞ e^{-Nεs} λ_i/(1+2λ_i s) Π_j (1+2λ_j s)^{-1/2} ds: exact for every batch size.
    """
    n = len(kernel)
    centre = torch.eye(n, dtype=torch.float64) - 1 / n
    values, vectors = torch.linalg.eigh(centre @ kernel @ centre)
    values = values.clamp_min(0)
    total = float(values.sum())
    if total == 0:
        return torch.zeros_like(kernel), 1 / eps
    x = torch.linspace(math.log(1e-9), math.log(1e12), 600, dtype=torch.float64)
    s = torch.exp(x) / total
    log_weight = x - math.log(total) - n * eps * s - 0.5 * torch.log1p(2 * values * s[:, None]).sum(-1)
    weight = torch.exp(log_weight) * (x[1] - x[0])
    shares = (weight[:, None] * values / (1 + 2 * values * s[:, None])).sum(0) * n
    return (vectors * shares) @ vectors.T, float(weight.sum()) * n


# ------------------------------------------------------------------------------------ pooling


def pool_step(call: Call, pool: Callable[[Tensor], Tensor]) -> Step | Missing:
    """A linear average over positions, found by pooling the indicator of each position."""
    m = call.inputs[0]
    if m.unit_dim != 1:
        return Missing("a pooling along other dimensions")
    if not m.full:
        return Missing("an average over more than 512 samples × positions")
    p = m.positions
    basis = torch.eye(p, dtype=torch.float64).reshape(p, 1, *m.lead[1:])
    a = pool(basis).reshape(p, -1).T  # (positions out, positions in)
    return averaged(m, a, tuple(call.output.shape[2:]), 1)


def averaged(m: Moments, a: Tensor, space: tuple[int, ...], unit_dim: int) -> Step:
    """Moments after the positions are mixed by ``a`` (out, in)."""
    s, p = m.samples, m.positions
    k = torch.einsum("op,apbq,rq->aobr", a, m.kernel.reshape(s, p, s, p), a)
    items = s * len(a)
    out = m.with_(
        kernel=k.reshape(1, items, items), mean=(m.mean.reshape(s, p) @ a.T).reshape(1, -1), lead=(s, *space),
        unit_dim=unit_dim,
    )  # fmt: skip
    return Step(out, lambda g: [(g.reshape(s, -1) @ a.square()).reshape(1, -1)])


@moment_map.register(nn.AvgPool1d)
@moment_map.register(nn.AvgPool2d)
@moment_map.register(nn.AvgPool3d)
@moment_map.register(nn.AdaptiveAvgPool1d)
@moment_map.register(nn.AdaptiveAvgPool2d)
@moment_map.register(nn.AdaptiveAvgPool3d)
def _(layer: nn.Module, call: Call) -> Step | Missing:
    return pool_step(call, layer)
