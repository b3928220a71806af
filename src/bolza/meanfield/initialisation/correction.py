r"""Weights corrected from data, where theory has no say or a network is too narrow for it.

Layer-sequential: one forward pass, in which each layer is rescaled as soon as it has spoken, so that the
layers after it see the corrected signal. A layer that is linear in its weights needs one scale,
√(target / measured). Recurrent layers take the scale of what they read into their input weights.

Finite width: the squared norm of a signal takes a random step at each layer (its logarithm has variance 5/n
for Gaussian weights after ReLU), forward and backward. A scale per layer cannot set both to one; half of what
is measured backward minimises the sum of the squares of what remains.

Reference: Mishkin & Matas (2016), *All you need is a good init*, for the sequential pass. Departures: the
targets are those of mean-field theory, not one; gradients count; layers with theory are left alone by default.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from bolza.core.reference import Reference
from bolza.meanfield.initialisation.weights import assign
from bolza.ops.replay import frozen_statistics, same_randomness

__all__ = ["MISHKIN", "Goal", "balance", "correct_forward", "loose_parameters"]

MISHKIN = Reference(
    "mishkin2016lsuv",
    "Mishkin, Dmytro and Matas, Jiri",
    "All you need is a good init",
    2016,
    venue="ICLR",
    arxiv="1511.06422",
)

_CONVOLUTIONS = (
    torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
)  # fmt: skip
_WITH_BIAS: tuple[Any, ...] = (F.linear, *_CONVOLUTIONS)
_LINEAR: tuple[Any, ...] = (
    *_WITH_BIAS, torch.matmul, torch.mm, torch.bmm, torch.einsum, F.bilinear, Tensor.matmul, Tensor.mm, Tensor.bmm,
    Tensor.__matmul__, Tensor.__rmatmul__, torch.addmm, torch.baddbmm,
)  # fmt: skip
_VIEWS: tuple[Any, ...] = (
    Tensor.t, Tensor.transpose, Tensor.permute, Tensor.view, Tensor.reshape, Tensor.unsqueeze, Tensor.squeeze,
    Tensor.expand, Tensor.flatten, Tensor.contiguous,
    *(getattr(Tensor, name).__get__ for name in ("T", "mT")), torch.t, torch.transpose,
    torch.permute, torch.reshape, torch.unsqueeze, torch.flatten,
)  # fmt: skip
_KNOWN = (
    nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention, nn.RNNBase,
    nn.RNNCellBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.PReLU,
)  # fmt: skip


@dataclass
class Goal:
    """What a layer's output is to have.

    Args:
        square: mean square of the output; ``nan`` for a recurrent layer, whose inputs count instead.
        bias_var: part of it that the biases bring.
        relative: whether ``square`` is in units of the mean square of the layer's input.
    """

    square: float
    bias_var: float = 0.0
    relative: bool = False


def loose_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters with two or more dimensions that belong to modules without theory, by name.

    Args:
        model: the network.
    """
    covered = {
        id(p) for m in model.modules() if isinstance(m, _KNOWN) for p in m.parameters() if p is not None
    }
    return {n: p for n, p in model.named_parameters() if p.ndim >= 2 and id(p) not in covered}


def _mean_square(value: Any) -> float:
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
        return math.nan
    wide = torch.promote_types(value.dtype, torch.float32)
    return float(value.detach().to(wide).square().mean())


@contextmanager
def _passes(model: nn.Module, device: torch.device) -> Iterator[None]:
    """A pass that leaves buffers and the state of random numbers alone, and calls every module it says it does."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused encoder layer would skip its parts
    try:
        with frozen_statistics(model), same_randomness(0, device):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def correct_forward(
    model: nn.Module, args: tuple[Any, ...], goals: dict[nn.Module, Goal], loose: dict[str, tuple[nn.Parameter, float]]
) -> dict[Any, float]:  # fmt: skip
    """One forward pass; every layer with a goal is rescaled to it as soon as it has spoken.

    Args:
        model: the network; weights change in place.
        args: arguments of its forward pass.
        goals: for modules: linear, convolutional, attention or recurrent.
        loose: for parameters of other modules: the parameter, and the mean square its product is to have.

    Returns:
        The scale each module, and each loose parameter by name, got. What was never reached, or gave nothing
        that is finite and not zero, is not among them.
    """
    done: dict[Any, float] = {}
    handles = []
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for layer in goals:
        if isinstance(layer, nn.RNNBase | nn.RNNCellBase):
            handles.append(layer.register_forward_pre_hook(_recurrent(done)))
        else:
            handles.append(layer.register_forward_hook(_rescale(goals, done)))
    try:
        with _passes(model, device), torch.no_grad():
            if loose:
                with _Products(loose, done):
                    model(*args)
            else:
                model(*args)
    finally:
        for handle in handles:
            handle.remove()
    return done


def _scale(square: float, target: float) -> float | None:
    if not (math.isfinite(square) and square > 0 and math.isfinite(target) and target > 0):
        return None
    return math.sqrt(target / square)


def _rescale(goals: dict[nn.Module, Goal], done: dict[Any, float]) -> Callable[[Any, Any, Any], Any]:
    def hook(layer: Any, inputs: Any, output: Any) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        if layer in done or not isinstance(value, Tensor):
            return None
        goal = goals[layer]
        last = layer.out_proj if isinstance(layer, nn.MultiheadAttention) else layer
        plain = value
        if last.bias is not None:
            spatial = last.weight.ndim - 2
            plain = value - (last.bias.reshape([-1] + [1] * spatial) if spatial > 0 else last.bias)
        target = goal.square - goal.bias_var
        if goal.relative:
            read = inputs[2] if isinstance(layer, nn.MultiheadAttention) and len(inputs) > 2 else inputs[0]
            target *= _mean_square(read)
        scale = _scale(_mean_square(plain), target)
        if scale is None:
            return None
        done[layer] = scale
        assign(last, last.weight.detach() * scale)
        value = plain * scale + (value - plain)
        return (value, *output[1:]) if isinstance(output, tuple) else value

    return hook


def _recurrent(done: dict[Any, float]) -> Callable[[Any, Any], None]:
    """Input weights take the scale of what they read; layers above the first are run to know what they read."""

    def hook(layer: Any, inputs: Any) -> None:
        if layer in done or not inputs or not isinstance(inputs[0], Tensor | nn.utils.rnn.PackedSequence):
            return
        x = inputs[0]
        packed = not isinstance(x, Tensor)
        square = _mean_square(x.data if packed else x)
        scale = _scale(square, 1.0)
        if scale is None:
            return
        done[layer] = scale
        if isinstance(layer, nn.RNNCellBase):
            layer.weight_ih.mul_(scale)
            return
        directions = 2 if layer.bidirectional else 1
        for level in range(layer.num_layers):
            if level:
                one = _level(layer, level - 1)
                x = one(x)[0]
                scale = _scale(_mean_square(x.data if packed else x), 1.0) or 1.0
            for suffix in ("", "_reverse")[:directions]:
                getattr(layer, f"weight_ih_l{level}{suffix}").mul_(scale)

    return hook


def _level(layer: Any, level: int) -> Any:
    """One level of a stacked recurrent layer as a layer of its own."""
    one = copy.copy(layer)
    one._parameters, one._forward_pre_hooks, one._forward_hooks = {}, {}, {}  # type: ignore[assignment]
    one.num_layers, one.dropout = 1, 0.0
    one._flat_weights_names, one._all_weights = [], []
    suffixes = ("", "_reverse") if layer.bidirectional else ("",)
    for suffix in suffixes:
        names = [n for n in layer._all_weights[0] if not n.endswith("_reverse")]
        own = [n.removesuffix("_l0") + f"_l0{suffix}" for n in names]
        for mine, name in zip(own, names, strict=True):
            one._parameters[mine] = layer._parameters[name.removesuffix("_l0") + f"_l{level}{suffix}"]
        one._all_weights.append(own)
        one._flat_weights_names += own
    one._flat_weights = [one._parameters[n] for n in one._flat_weights_names]
    one._flat_weight_refs = [None for _ in one._flat_weights]
    width = one._parameters[one._flat_weights_names[0]].shape[1]
    one.input_size = width
    return one


class _Products(TorchFunctionMode):
    """Sees every product with a loose parameter, or a view of it, and rescales the parameter at the first."""

    def __init__(self, loose: dict[str, tuple[nn.Parameter, float]], done: dict[Any, float]) -> None:
        super().__init__()
        self.loose, self.done = loose, done
        self.names = {id(p): name for name, (p, _) in loose.items()}
        self.views: list[Tensor] = []  # kept alive, so that no other tensor takes their id

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function, and look at it."""
        out = func(*args, **(kwargs or {}))
        flat = [a for arg in args for a in (arg if isinstance(arg, list | tuple) else (arg,))]
        held = [self.names[id(a)] for a in flat if isinstance(a, Tensor) and id(a) in self.names]
        if len(held) != 1 or not isinstance(out, Tensor):
            return out
        name = held[0]
        if func in _VIEWS:
            self.names[id(out)] = name
            self.views.append(out)
        elif func in _LINEAR and name not in self.done:
            bias = (args[2] if len(args) > 2 else (kwargs or {}).get("bias")) if func in _WITH_BIAS else None
            plain = out
            if isinstance(bias, Tensor):
                plain = out - (bias.reshape([-1] + [1] * (out.ndim - 2)) if func in _CONVOLUTIONS else bias)
            parameter, target = self.loose[name]
            scale = _scale(_mean_square(plain), target)
            if scale is not None:
                self.done[name] = scale
                parameter.mul_(scale)
                out = plain * scale + (out - plain)
        return out


def balance(
    model: nn.Module, args: tuple[Any, ...], chain: Sequence[nn.Module], seed: int = 0
) -> dict[nn.Module, float]:
    """Backward half of the correction, for layers that follow one another without sums.

    Let B_l = |∂/∂h_{l−1}|² / |∂/∂h_l|². With forward gains already 1, a scale α_l² = B_l^{−1/2} makes the
    forward gain B_l^{−1/2} and the backward gain B_l^{1/2}: the least Σ log² there is.

    Args:
        model: the network; weights change in place.
        args: arguments of its forward pass.
        chain: layers in order of execution; those with as many outputs as inputs are rescaled.
        seed: of the direction that is sent back from the output.

    Returns:
        The scale each layer got.
    """
    outputs: dict[nn.Module, Tensor] = {}

    def hook(layer: nn.Module, _: Any, output: Any) -> None:
        fit = isinstance(output, Tensor) and layer not in outputs and output.requires_grad
        if fit and math.isfinite(_mean_square(output)):
            outputs[layer] = output

    handles = [layer.register_forward_hook(hook) for layer in chain]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        with _passes(model, device), torch.enable_grad():
            out = model(*args)
            found = [
                v for v in torch.utils._pytree.tree_leaves(out) if isinstance(v, Tensor) and v.requires_grad
            ]
            if not found:
                return {}
            generator = torch.Generator().manual_seed(seed)
            total = sum((v * torch.randn(v.shape, generator=generator).to(v)).sum() for v in found)
            layers = [layer for layer in chain if layer in outputs]
            grads = torch.autograd.grad(total, [outputs[la] for la in layers], allow_unused=True)  # type: ignore[arg-type]
    finally:
        for handle in handles:
            handle.remove()
    norms = [math.nan if g is None else float(g.double().square().sum()) for g in grads]
    done: dict[nn.Module, float] = {}
    for i in range(1, len(layers)):
        gain = norms[i - 1] / norms[i] if norms[i] > 0 else math.nan
        shape: Any = layers[i].weight.shape
        square = shape[0] == shape[1] * getattr(layers[i], "groups", 1)  # else theory's gain is not 1
        if not (square and math.isfinite(gain) and gain > 0):
            continue
        done[layers[i]] = gain**-0.25
        assign(layers[i], layers[i].weight.detach() * done[layers[i]])  # type: ignore[operator, union-attr]
    return done
