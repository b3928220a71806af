r"""How a layer maps the kernels of an infinitely wide network.

`kernel_map` is open: it dispatches on the type of a module, and a user registers a layer of his own with
``@kernel_map.register``. Functions (``F.relu``, ``+``, ``x.mean(...)``) are in
`bolza.meanfield.kernels.kernel_functions`.

    weights     K' = σ_w² K + σ_b²                Θ' = K' + σ_w² Θ                 (convolution: sums over a window)
    activation  K' = E φ(u)φ(v)                   Θ' = E φ'(u)φ'(v) ∘ Θ
    norm        K' = γ² (K - m m')/(s s') + β²    Θ' = γ² Θ/(s s') + [K̂ + 1 if γ, β train]
    average     K' = A K Aᵀ over positions         Θ' = A Θ Aᵀ

In the standard parametrization the share of the weights in Θ' is n_in K and that of the biases 1: the tangent
kernel of a PyTorch network of its own widths, in the mean over draws. Parameters that do not require a
gradient have no share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from bolza.core.errors import UnsupportedError
from bolza.meanfield.activations import ELEMENTWISE_MODULES, Activation, resolve_activation
from bolza.meanfield.kernels.duals import dual
from bolza.meanfield.kernels.kernel import Kernel, KernelCall, Values
from bolza.meanfield.kernels.recipes import Applied, Recipe, sampled_moments
from bolza.meanfield.kernels.windows import Window, sided_padding, slide_window

__all__ = ["kernel_map"]


@singledispatch
def kernel_map(layer: nn.Module, call: KernelCall) -> Kernel:
    """Map kernels through a layer.

    Args:
        layer: the module; the map is chosen by its type.
        call: its inputs, and what is wanted.

    Returns:
        The kernels of its output.

    Raises:
        UnsupportedError: there is no map for this type of layer.

    Example:
        A layer of one's own that multiplies by two:

        >>> class Double(nn.Module):
        ...     def forward(self, x):
        ...         return 2 * x
        >>> @kernel_map.register
        ... def _(layer: Double, call):
        ...     k = call.kernel()
        ...     return k.map(lambda t: 4 * t, mean=None if k.mean is None else 2 * k.mean)
    """
    kind = type(layer).__name__
    raise UnsupportedError(
        f"layer {call.name!r} is a {kind}, whose kernel in the limit of infinite width is not known here: "
        f"register one with @kernel_map.register for {kind} (a function of the layer and a KernelCall)"
    )


# ------------------------------------------------------------------------------------ weights


def variance_of(weight: Tensor, fan_in: int, given: float | None) -> float:
    """σ_w² = fan_in · mean W², or the value given for all layers."""
    return fan_in * mean_square(weight) if given is None else given


def mean_square(t: Tensor) -> float:
    """Mean of squares in float64."""
    return float(t.detach().double().square().mean())


def with_weights(
    call: KernelCall, k: Kernel, mapped: Tensor, tangent: Tensor | None, weight_share: Callable[[], Tensor],
    weight: Tensor, bias: Tensor | None, **changes: Any,
) -> Kernel:  # fmt: skip
    """Add the bias, and the shares of this layer's own parameters in the tangent kernel.

    Args:
        call: the call.
        k: the input.
        mapped: σ_w² K, summed over the window.
        tangent: the same of Θ.
        weight_share: n_in K, for the standard parametrization.
        weight: the weights.
        bias: the biases.
        changes: fields of the result.
    """
    b = 0.0
    if bias is not None:
        b = mean_square(bias) if call.bias_var is None else call.bias_var
    ntk = None
    if call.ntk:
        ntk = tangent
        shares = []
        if call.parametrization == "standard":
            constant = 1.0 if bias is not None and bias.requires_grad else 0.0
            if weight.requires_grad:
                shares.append(weight_share())
        else:
            constant = b if bias is not None and bias.requires_grad else 0.0
            if weight.requires_grad:
                shares.append(mapped)
        for share in shares:
            ntk = share.clone() if ntk is None else ntk + share
        if constant:
            ntk = torch.full_like(mapped, constant) if ntk is None else ntk.add_(constant)
    nngp = mapped + b if b else mapped
    positions = nngp.shape[0]
    return k.with_(
        nngp=nngp, ntk=ntk, gaussian=True, sources=frozenset({call.name}),
        mean=nngp.new_zeros(positions, nngp.shape[-1]) if k.own else None, **changes,
    )  # fmt: skip


def linear_kernel(call: KernelCall, weight: Tensor, bias: Tensor | None) -> Kernel:
    """A linear layer over the units, at each position by itself."""
    k = call.kernel(-1)
    fan_out, fan_in = weight.shape
    if k.unit_dim != len(k.space) + 1 or k.units != fan_in:
        raise UnsupportedError(
            f"layer {call.name!r} is linear along positions, not along units: its kernel is not known here"
        )
    w = variance_of(weight, fan_in, call.weight_var)
    tangent = None if k.ntk is None else w * k.ntk
    return with_weights(
        call, k, w * k.nngp, tangent, lambda: fan_in * k.nngp, weight, bias, units=fan_out
    )  # fmt: skip


@kernel_map.register
def _(layer: nn.Linear, call: KernelCall) -> Kernel:
    return linear_kernel(call, layer.weight, layer.bias)


def conv_kernel(call: KernelCall, weight: Tensor, bias: Tensor | None, window: Window, groups: int) -> Kernel:
    """K'[p, p'] = Σ_k v_k K[p + k, p' + k] + σ_b², with v_k the variance of tap k times the number of inputs."""
    k = call.kernel(1)
    fan_in = weight.shape[1]
    if k.unit_dim != 1 or k.units != fan_in * groups or len(k.space) != len(window.kernel):
        raise UnsupportedError(f"layer {call.name!r} convolves other dimensions than the trailing ones")
    if call.all_pairs:
        k = k.paired()
    if call.weight_var is None:
        taps = fan_in * weight.detach().to("cpu", torch.float64).square().mean((0, 1))
    else:
        n = math.prod(window.kernel)
        taps = torch.full(window.kernel, call.weight_var / n, dtype=torch.float64)
    space = tuple(call.output.shape[2:])
    slide = partial(slide_window, space=k.space, out=space, window=window, twice=k.all_pairs)
    mapped = slide(k.nngp, taps=taps)
    tangent = None if k.ntk is None else slide(k.ntk, taps=taps)
    ones = torch.ones(window.kernel, dtype=torch.float64)
    out = with_weights(
        call, k, mapped, tangent, lambda: fan_in * slide(k.nngp, taps=ones), weight, bias,
        units=weight.shape[0], space=space,
    )  # fmt: skip
    # Weights times random values are a sum of many only if there are many; times known values they are Gaussian.
    return out.with_(gaussian=fan_in > 1 or isinstance(call.inputs[0], Values))


@kernel_map.register(nn.Conv1d)
@kernel_map.register(nn.Conv2d)
@kernel_map.register(nn.Conv3d)
def _(layer: Any, call: KernelCall) -> Kernel:
    padding = sided_padding(layer.padding, layer.kernel_size, layer.dilation)
    window = Window(layer.kernel_size, layer.stride, layer.dilation, padding, layer.padding_mode)
    return conv_kernel(call, layer.weight, layer.bias, window, layer.groups)


def embedding_kernel(call: KernelCall, weight: Tensor) -> Kernel:
    """Rows of a table are independent: K = σ² where two tokens agree, else 0."""
    given = call.inputs[0]
    assert isinstance(given, Values)
    tokens = given.left.reshape(len(given.left), -1).T  # (P, n)
    other = tokens if given.right is None else given.right.reshape(len(given.right), -1).T
    pairs = call.all_pairs and len(tokens) > 1
    if given.right is not None:
        tokens, other = tokens[..., None], other[..., None, :]
    same = tokens[:, None] == other[None] if pairs else tokens == other
    hot = same.to(call.dtype)
    var = mean_square(weight) if call.weight_var is None else call.weight_var
    own = given.right is None
    silent = [torch.zeros(*tokens.shape[:2], 1).to(hot).transpose(0, 1)]
    silent.append(torch.zeros(len(other), other.shape[-1], 1).to(hot).transpose(0, 1))
    k = Values(silent[0], None if own else silent[1]).kernel(-1, pairs)
    ntk = None
    if call.ntk and weight.requires_grad:
        ntk = hot if call.parametrization == "standard" else var * hot
    return k.with_(
        nngp=var * hot, ntk=ntk, units=weight.shape[1], space=tuple(given.left.shape[1:]),
        unit_dim=given.left.ndim, gaussian=True, sources=frozenset({call.name}),
    )  # fmt: skip


@kernel_map.register
def _(layer: nn.Embedding, call: KernelCall) -> Kernel:
    return embedding_kernel(call, layer.weight)


# -------------------------------------------------------------------------------- activations


def activation_kernel(call: KernelCall, act: Activation) -> Kernel:
    """K' = E φφ and Θ' = E φ'φ' ∘ Θ over Gaussians with kernel K."""
    k = call.kernel()
    if act.name in ("linear", "identity"):
        return k
    recipe = k.recipe
    if recipe is None or (act.noisy and not k.gaussian):
        raise UnsupportedError(
            f"activation {call.name!r} ({act.name}) reads a value that is not Gaussian in the limit, nor a sum or "
            "product of what is: no random layer comes just before it, or a concatenation, an average or a norm of an "
            "earlier activation does. Put a linear or convolutional layer between"
        )
    if not k.gaussian:
        return _sampled_activation(call, k, Applied(act, recipe))
    known = None if act.noisy else Applied(act, recipe)
    slope = k.ntk is not None
    if k.own:
        second = k.second
        if act.closed is None:
            second64 = second.double()
            diagonal, gain, mean = (f(second64).to(second) for f in (act.second, act.slope, act.mean))
        else:
            diagonal, gain, mean = act.second(second), act.slope(second), act.mean(second)
            diagonal, gain, mean = diagonal.to(second), gain.to(second), mean.to(second)
        if not k.all_pairs:
            return k.with_(
                nngp=diagonal,
                ntk=None if k.ntk is None else gain * k.ntk,
                mean=mean,
                gaussian=False,
                known=known,
            )
        by_input = k.nngp.movedim(-1, 0)  # (n, P, P)
        q = second.T
        nngp, slopes = dual(act, by_input, q[:, :, None], q[:, None, :], slope, call.roots, call.cache)
        nngp = nngp.movedim(0, -1).contiguous()
        nngp.diagonal(dim1=0, dim2=1).copy_(diagonal.T)
        ntk = None
        if k.ntk is not None and slopes is not None:
            slopes = slopes.movedim(0, -1).clone()
            slopes.diagonal(dim1=0, dim2=1).copy_(gain.T)
            ntk = slopes * k.ntk
        return k.with_(nngp=nngp, ntk=ntk, mean=mean, gaussian=False, known=known)
    before, left, right = k.nngp, k.left.second, k.right.second
    if k.all_pairs and act.closed is None:  # a table wants few large matrices: (P n1, P n2)
        p, _, n1, n2 = before.shape
        before = before.transpose(1, 2).reshape(p * n1, p * n2)
        left, right = left.reshape(-1, 1), right.reshape(1, -1)
    nngp, slopes = dual(act, before, left, right, slope, call.roots, call.cache)
    if before is not k.nngp:
        nngp = nngp.view(p, n1, p, n2).transpose(1, 2).contiguous()
        slopes = None if slopes is None else slopes.view(p, n1, p, n2).transpose(1, 2)
    ntk = slopes * k.ntk if k.ntk is not None and slopes is not None else None
    return k.with_(nngp=nngp, ntk=ntk, gaussian=False, known=known)


def _sampled_activation(call: KernelCall, k: Kernel, recipe: Recipe) -> Kernel:
    """K' = E hh and Θ' = Σ_ℓ Θ_ℓ E ∂_ℓh ∂_ℓh of a function h of several Gaussians, over common points."""
    nngp, ntk, mean = sampled_moments(recipe, k.ntk is not None, call.cache, call.samples, call.seed)
    own = None
    if k.own:
        own = mean.diagonal(dim1=0, dim2=1).T if k.all_pairs else mean
    return k.with_(nngp=nngp, ntk=ntk, mean=own, known=recipe)


def _elementwise(layer: nn.Module, call: KernelCall) -> Kernel:
    if "activation" not in call.cache:
        call.cache["activation"] = resolve_activation(layer)
    return activation_kernel(call, call.cache["activation"])


for _kind in ELEMENTWISE_MODULES:
    kernel_map.register(_kind, _elementwise)


@kernel_map.register
def _(layer: nn.Identity, call: KernelCall) -> Kernel:
    return call.kernel()


@kernel_map.register(nn.Dropout)
@kernel_map.register(nn.Dropout1d)
@kernel_map.register(nn.Dropout2d)
@kernel_map.register(nn.Dropout3d)
@kernel_map.register(nn.AlphaDropout)
def _(layer: Any, call: KernelCall) -> Kernel:
    if layer.training and layer.p > 0:
        raise UnsupportedError(f"layer {call.name!r} drops units at random: call model.eval() first")
    return call.kernel()


# ------------------------------------------------------------------------------ normalisation


def affine(call: KernelCall, k: Kernel, weight: Tensor | None, bias: Tensor | None) -> Kernel:
    """Scale γ and shift β of each unit: K' = E γ² K + E β²; shifts count as random, scales as equal."""
    g = 1.0 if weight is None else mean_square(weight)
    b = 0.0 if bias is None else mean_square(bias)
    share = weight is not None and weight.requires_grad
    nngp = g * k.nngp + b if b else (k.nngp if g == 1 else g * k.nngp)
    ntk = k.ntk if k.ntk is None or g == 1 else g * k.ntk
    if call.ntk and share:
        ntk = k.nngp.clone() if ntk is None else ntk + k.nngp
    if call.ntk and bias is not None and bias.requires_grad:
        ntk = torch.ones_like(nngp) if ntk is None else ntk + 1
    mean = k.mean
    if mean is not None and weight is not None:
        mean = mean * (1.0 if weight is None else float(weight.detach().mean()))
    return k.with_(nngp=nngp, ntk=ntk, mean=mean)


def norm_kernel(
    call: KernelCall, k: Kernel, weight: Tensor | None, bias: Tensor | None, eps: float,
    centre: bool = True, over_positions: bool = False,
) -> Kernel:  # fmt: skip
    """K' = γ² (K - centre)/(s s') + β², where s² is the variance (or mean square) of each input plus ε."""
    ends = []
    for end in (k.left, k.right):
        second, shift = end.second, end.mean
        if over_positions:
            dims = tuple(range(1 + k.all_pairs))
            second, shift = second.mean(dims, keepdim=True), shift.mean(dims, keepdim=True)
        if not centre:
            shift = torch.zeros_like(shift)
        ends.append((end.mean, shift, (second - shift.square()).clamp_min(0).add(eps).rsqrt()))
    (m1, s1, r1), (m2, s2, r2) = ends
    nngp = k.nngp
    if centre:
        nngp = nngp - s1 * m2 - m1 * s2 + s1 * s2
    nngp = nngp * r1 * r2
    ntk = None if k.ntk is None else k.ntk * r1 * r2
    mean = k.mean
    if mean is not None:
        mean = (mean - s1.reshape(-1, mean.shape[-1])) * r1.reshape(-1, mean.shape[-1])
    return affine(call, k.with_(nngp=nngp, ntk=ntk, mean=mean), weight, bias)


@kernel_map.register
def _(layer: nn.LayerNorm, call: KernelCall) -> Kernel:
    over = len(layer.normalized_shape) > 1
    k = call.kernel(1 if over else -1)
    if over and k.unit_dim == 1 and len(layer.normalized_shape) == len(k.space) + 1:
        return norm_kernel(call, k, layer.weight, layer.bias, layer.eps, over_positions=True)
    if over or k.unit_dim != len(k.space) + 1:
        raise UnsupportedError(
            f"layer {call.name!r} normalises over some positions: its kernel is not known here"
        )
    return norm_kernel(call, k, layer.weight, layer.bias, layer.eps)


@kernel_map.register
def _(layer: nn.RMSNorm, call: KernelCall) -> Kernel:
    k = call.kernel(-1)
    if len(layer.normalized_shape) != 1 or k.unit_dim != len(k.space) + 1:
        raise UnsupportedError(f"layer {call.name!r} normalises over positions: its kernel is not known here")
    eps = torch.finfo(call.output.dtype).eps if layer.eps is None else layer.eps
    return norm_kernel(call, k, layer.weight, None, eps, centre=False)


@kernel_map.register
def _(layer: nn.GroupNorm, call: KernelCall) -> Kernel:
    if layer.num_groups == layer.num_channels and layer.num_groups > 1:
        raise UnsupportedError(
            f"layer {call.name!r} normalises every unit by itself: it has no limit of many units"
        )
    return norm_kernel(call, call.kernel(1), layer.weight, layer.bias, layer.eps, over_positions=True)


@kernel_map.register(nn.BatchNorm1d)
@kernel_map.register(nn.BatchNorm2d)
@kernel_map.register(nn.BatchNorm3d)
def _(layer: Any, call: KernelCall) -> Kernel:
    if layer.training or layer.running_var is None:
        raise UnsupportedError(
            f"layer {call.name!r} normalises with the statistics of a batch, so the network is no function of one "
            "input: call model.eval() first, or use a layer norm"
        )
    k = call.kernel(1)
    root = (layer.running_var.double() + layer.eps).rsqrt()
    offset = layer.running_mean.double() * root
    scale, shift, mixed = (float(t.mean()) for t in (root.square(), offset.square(), root * offset))
    nngp = scale * k.nngp + shift - mixed * (k.left.mean + k.right.mean)
    mean = None if k.mean is None else float(root.mean()) * k.mean - float(offset.mean())
    out = k.map(lambda t: scale * t, mean=mean).with_(nngp=nngp)
    return affine(call, out, layer.weight, layer.bias)


# ------------------------------------------------------------------------------------ pooling


def average_kernel(call: KernelCall, pool: Callable[[Tensor], Tensor]) -> Kernel:
    """A linear average over positions, found by pooling the indicator of each position."""
    k = call.kernel(1)
    if k.unit_dim != 1:
        raise UnsupportedError(f"layer {call.name!r} averages over units: its kernel is not known here")
    k = k.paired()
    if "average" not in call.cache:
        basis = torch.eye(k.positions, dtype=torch.float64).reshape(k.positions, 1, *k.space)
        call.cache["average"] = pool(basis).reshape(k.positions, -1).T
    return averaged(k, call.cache["average"], tuple(call.output.shape[2:]), 1, call.all_pairs)


def averaged(k: Kernel, a: Tensor, space: tuple[int, ...], unit_dim: int, all_pairs: bool) -> Kernel:
    """Kernels after the positions are mixed by ``a`` (out, in); ``k`` has all pairs."""
    a = a.to(k.nngp)
    p = a.shape[1]

    def mix(t: Tensor) -> Tensor:
        pairs = t.shape[2:]
        if len(a) == 1 and bool((a == a[0, 0]).all()):
            return (t.sum((0, 1)) * a[0, 0].square())[None, None]
        half = (a @ t.reshape(p, -1)).reshape(len(a), p, -1)
        return torch.einsum("oqr,sq->osr", half, a).reshape(len(a), len(a), *pairs)

    mean = None if k.mean is None else a @ k.mean
    out = k.map(mix, space=space, unit_dim=unit_dim, mean=mean)
    return out if all_pairs else out.reduced()


@kernel_map.register(nn.AvgPool1d)
@kernel_map.register(nn.AvgPool2d)
@kernel_map.register(nn.AvgPool3d)
@kernel_map.register(nn.AdaptiveAvgPool1d)
@kernel_map.register(nn.AdaptiveAvgPool2d)
@kernel_map.register(nn.AdaptiveAvgPool3d)
def _(layer: nn.Module, call: KernelCall) -> Kernel:
    return average_kernel(call, layer)
