r"""How a layer maps second moments forward, and those of gradients backward.

`moment_map` is open: it dispatches on the type of a module, and a user registers a layer of his own
with ``@moment_map.register``. Functions (``F.relu``, ``torch.cat``, operators of exported graphs)
have their maps in `bolza.meanfield.layers.function_maps`. A map that cannot say anything returns a `Missing`
with the reason, and the layer is measured instead.

Weights of different layers, and of the forward and the backward pass, count as independent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from bolza.meanfield.activations import ELEMENTWISE_MODULES, Activation, resolve_activation
from bolza.meanfield.layers.moments import Moments

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
        entry: of a layer that returns a tuple, where ``output`` sits in it: ``(1, 0)`` is the hidden state
            in ``output, (h, c)``.

    Example:
        >>> from bolza.meanfield.layers.moments import measure
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
    entry: tuple[int, ...] = ()


@dataclass(frozen=True)
class Step:
    """What theory says about a call.

    Args:
        out: moments of the output.
        backward: from the kernel of the gradient at the output, G_ab = (1/n) Σ_i g_i^a g_i^b,
            ``(groups, items, items)`` as in ``out``, to the kernel at each input, in its layout, or None.
        weight_var: σ_w² of a layer with weights.
        bias_var: σ_b².
        gain: E φ'² of an activation, mean over items.
        kept: share of the variance that zero padding leaves, from layer to layer.
        activation: the activation, of a layer that is one.
        note: remark for the reader.
        shared: whether the gradient that torch reports at the output also comes by way of another entry of
            the same call, which theory has only together with that entry.

    Example:
        >>> from bolza.meanfield.layers.moments import measure
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
    shared: bool = False


@dataclass(frozen=True)
class Missing:
    """Theory has nothing to say about a call.

    Args:
        reason: why, for the reader.
        layer: whether this is a layer to be reported (not mere moving of numbers).
        final: whether to measure it at once, because what it holds depends on this network's own weights.

    Example:
        >>> x = torch.zeros(1, 4, 8)
        >>> moment_map(nn.MaxPool1d(2), Call("pool", (), (x,), {}, x)).reason
        'no moment map for MaxPool1d'
    """

    reason: str
    layer: bool = field(default=True)
    final: bool = False


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
    """K' = σ_w² K + σ_b²; a gradient's kernel gains σ_w² n_out/n_in."""
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
    slope = act.slope(q)

    def pairs(cross: Callable[..., Tensor], alone: Tensor) -> Tensor:
        """A two-point moment of all pairs, with the one-point moment on the diagonal."""
        k = cross(q[..., :, None], q[..., None, :], c, tol=_TOLERANCE)
        k = (k + k.transpose(-1, -2)) / 2
        k.diagonal(dim1=-2, dim2=-1).copy_(alone)
        return k

    out = m.with_(kernel=pairs(act.cross, act.second(q)), mean=act.mean(q), gaussian=False)
    return Step(out, lambda g: [g * pairs(act.cross_slope, slope)], gain=float(slope.mean()), activation=act)


def _elementwise(layer: nn.Module, call: Call) -> Step | Missing:
    return activation_step(call, resolve_activation(layer))


for _kind in ELEMENTWISE_MODULES:
    moment_map.register(_kind, _elementwise)


def dropout_step(call: Call, rate: float, training: bool) -> Step | Missing:
    """Independent masks: the diagonal grows by 1/ρ, pairs keep their product; gradients alike."""
    m = call.inputs[0]
    if not training or rate == 0:
        return Step(m, lambda g: [g])
    if rate >= 1:
        return Missing("dropout of everything")

    def grow(k: Tensor) -> Tensor:
        return k + torch.diag_embed(k.diagonal(dim1=-2, dim2=-1) * (1 / (1 - rate) - 1))

    out = m.with_(kernel=grow(m.kernel))
    return Step(out, lambda g: [grow(g)], note=f"keeps {1 - rate:g}")


@moment_map.register
def _(layer: nn.Dropout, call: Call) -> Step | Missing:
    return dropout_step(call, layer.p, layer.training)
