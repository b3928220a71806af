"""A network read for certificates: which of its operations are affine, which are activations, which have a known gain.

The graph is that of the network in evaluation mode, in float64, for one sample. An operation that is none of the
three is refused by name, or, where only some certificates can use it (softmax, layer norm, a product of two values,
attention), left to them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils import _pytree

from bolza.core.errors import ArgumentError, DataError, DivergenceError, TraceError, UnsupportedError
from bolza.stability.operator_norm import adaptive_windows
from bolza.stability.slopes import Slopes, function_slopes, layer_slopes
from bolza.systems.replay import Replay
from bolza.systems.roles import is_guard
from bolza.systems.trace import trace

__all__ = ["Reading", "Step", "read_network"]

Kind = Literal["affine", "activation", "gain", "product"]

_AFFINE_LAYERS = (
    nn.Linear,
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.dropout._DropoutNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.Flatten,
    nn.Unflatten,
    nn.Identity,
    nn.Upsample,
    nn.modules.padding._ConstantPadNd,
    nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd,
    nn.modules.padding._CircularPadNd,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
    nn.Fold,
    nn.Unfold,
)
_LINEAR = frozenset(
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d flatten unflatten reshape view view_as permute "
    "transpose t swapaxes movedim contiguous squeeze unsqueeze chunk split tensor_split getitem cat concat stack mean "
    "sum neg negative clone detach to float double type_as expand expand_as repeat flip roll pad interpolate add sub "
    "iadd isub mul imul div truediv true_divide multiply subtract matmul mm bmm mv einsum unfold fold narrow select "
    "unbind pixel_shuffle pixel_unshuffle batch_norm dropout dropout1d dropout2d dropout3d cumsum index_select "
    "rsub pos positive baddbmm addmm tile ravel diff triu tril masked_fill identity channel_shuffle".split()
)
_BILINEAR = frozenset(
    "mul imul multiply matmul mm bmm mv einsum baddbmm addmm linear conv1d conv2d conv3d".split()
)
_QUOTIENT = frozenset("div truediv true_divide".split())
_SUMS = frozenset(
    "cat concat stack add sub iadd isub subtract rsub view_as expand_as type_as to".split()
)  # linear in several values at once
_MAX_POOLS = (nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd)
_ATTENTION = "scaled_dot_product_attention"
_PRODUCT = (
    "it multiplies two values that both depend on the input, as dot-product attention and gates do, which has no "
    "Lipschitz constant on all of space: bound the outputs on a box with interval_bounds"
)


@dataclass(frozen=True, eq=False)
class Step:
    """One operation.

    Attributes:
        node: in the graph.
        kind: what it is.
        sources: values it is computed from that depend on the input.
        slopes: of an activation.
        gain: Lipschitz constant of an operation that is neither affine nor elementwise; infinite if it has none.
        rule: which one that is.
        reason: why the gain is infinite, or what makes it large.
    """

    node: Node
    kind: Kind
    sources: tuple[Node, ...]
    slopes: Slopes | None = None
    gain: float = 1.0
    rule: str = ""
    reason: str = ""


class Reading:
    """A network as a list of steps from its input to its output.

    Attributes:
        module: a copy in float64 and in evaluation mode.
        start: the node of the input.
        end: the node of the output.
        steps: the operations on the way, in order.
        example: the example, in float64.
    """

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        self.module, self.example = module, example
        one = example[:1]
        self.traced = trace(module, one)
        if self.traced.kind != "fx":
            raise UnsupportedError(
                f"{type(module).__name__} can only be read operator by operator, which certificates do not cover: "
                "write its forward pass with layers and functions that torch.fx can follow"
            )
        (self.start,) = self.traced.placeholders
        result = self.traced.result
        if not isinstance(result, Node):
            raise UnsupportedError(
                f"{type(module).__name__} returns {type(result).__name__}: a certificate needs one tensor"
            )
        self.end = result
        nodes = [n for n in self.traced.nodes if n.op != "placeholder"]
        with torch.no_grad():
            replay = Replay(module, nodes, self.traced.constants)
            self.values: dict[Node, Any] = replay({self.start: one}, {})
        needed = _ancestors(self.end)
        self.steps = tuple(
            self._step(n) for n in nodes if n in needed and n.meta["role"] == "data" and not is_guard(n)
        )

    @cached_property
    def by_node(self) -> dict[Node, Step]:
        """Steps by their nodes."""
        return {step.node: step for step in self.steps}

    def shape(self, node: Node) -> torch.Size:
        """Shape of a value, one sample."""
        shape: torch.Size = self.values[node].shape
        return shape

    def size(self, node: Node) -> int:
        """Numbers in a value, one sample."""
        return int(self.values[node].numel())

    def evaluate(self, node: Node, given: Mapping[Node, Any]) -> Any:
        """One operation on given values of its sources; what is not given is that of the example."""

        def fill(tree: Any) -> Any:
            return map_arg(tree, lambda n: given[n] if n in given else self.values[n])

        args, kwargs = fill(node.args), fill(node.kwargs)
        if node.op == "call_module":
            layer = self.module.get_submodule(str(node.target))
            if getattr(layer, "inplace", False) is True:  # keep what is given
                args = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
            return layer(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def linear_part(self, step: Step, source: Node, rows: Any) -> Any:
        """The linear part of an affine step, in one of its sources, on a batch of directions."""
        zeros = {s: _pytree.tree_map(torch.zeros_like, self.values[s]) for s in step.sources}
        offset = self.evaluate(step.node, zeros)

        def one(direction: Any) -> Any:
            value = self.evaluate(step.node, {**zeros, source: direction})
            return _pytree.tree_map(lambda v, o: torch.where(torch.isfinite(o), v - o, 0.0), value, offset)

        return torch.func.vmap(one)(rows)

    def layer(self, step: Step) -> nn.Module | None:
        """The layer that a step calls, if it calls one."""
        return self.module.get_submodule(str(step.node.target)) if step.node.op == "call_module" else None

    def name(self, node: Node) -> str:
        """What messages call a node."""
        return str(node.target) if node.op == "call_module" else node.name

    def cuts(self) -> list[Node]:
        """Values through which everything passes, the input first and the output last."""
        order = {self.start: 0} | {step.node: i for i, step in enumerate(self.steps, 1)}
        reach = 0  # the last reader of what was made before
        last = dict.fromkeys(order, 0)
        for step in self.steps:
            for source in step.sources:
                last[source] = max(last[source], order[step.node])
        found = []
        for node, i in order.items():
            if reach <= i and isinstance(self.values[node], Tensor):
                found.append(node)
            reach = max(reach, last[node])
        return found

    # -- what an operation is

    def _step(self, node: Node) -> Step:
        sources = tuple(dict.fromkeys(n for n in node.all_input_nodes if n.meta["role"] == "data"))
        for leaf in _pytree.tree_leaves(self.values[node]):
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                raise self._refusal(node, "its result is not made of real numbers that depend on the input")
            if torch.finfo(leaf.dtype).bits < 32:
                raise self._refusal(node, f"it rounds to {leaf.dtype}, which jumps; leave casts to autocast")
        if node.meta["random"]:
            raise self._refusal(node, "it draws random numbers, in evaluation mode too")
        if node.op == "call_module":
            return self._layer_step(node, sources)
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        name = str(name).strip("_")
        if node.target is getattr:
            if node.args[1] in ("T", "mT"):
                return Step(node, "affine", sources)
            raise self._refusal(node, f"the attribute {node.args[1]!r} is not known to be linear")
        return self._function_step(node, name, sources)

    def _layer_step(self, node: Node, sources: tuple[Node, ...]) -> Step:
        layer = self.module.get_submodule(str(node.target))
        slopes = layer_slopes(layer, self.values[sources[0]])
        if slopes is not None:
            return Step(node, "activation", sources, slopes)
        if isinstance(layer, nn.modules.batchnorm._BatchNorm | nn.modules.instancenorm._InstanceNorm):
            if not layer.track_running_stats or layer.running_mean is None:
                return Step(
                    node,
                    "gain",
                    sources,
                    gain=math.inf,
                    rule="statistics",
                    reason="it normalises by statistics of what passes; give it running statistics",
                )
            return Step(node, "affine", sources)
        if isinstance(layer, _AFFINE_LAYERS):
            return Step(node, "affine", sources)
        if isinstance(layer, _MAX_POOLS):
            if layer.return_indices:
                raise self._refusal(node, "it returns indices, which jump")
            return Step(node, "gain", sources, gain=self._pool_gain(layer, node, sources[0]), rule="max")
        if isinstance(layer, nn.Softmax | nn.LogSoftmax):
            return self._softmax(node, sources, isinstance(layer, nn.LogSoftmax), layer.dim)
        if isinstance(layer, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm):
            weight = 1.0 if layer.weight is None else float(layer.weight.detach().abs().max())
            gain = math.inf if not layer.eps else weight / math.sqrt(layer.eps)
            reason = f"its constant is max|γ|/√ε = {gain:.3g}, which inputs of little variance attain"
            return Step(node, "gain", sources, gain=gain, rule="norm", reason=reason)
        if isinstance(layer, nn.MultiheadAttention):
            return Step(node, "product", sources, gain=math.inf, rule="unknown", reason=_PRODUCT)
        raise self._refusal(node, f"nothing is known of the layer {type(layer).__name__}")

    def _function_step(self, node: Node, name: str, sources: tuple[Node, ...]) -> Step:
        if name == _ATTENTION:
            return Step(node, "product", sources, gain=math.inf, rule="attention", reason=_PRODUCT)
        if name in ("softmax", "log_softmax"):
            dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
            return self._softmax(node, sources, name == "log_softmax", dim)
        if name in ("max_pool1d", "max_pool2d", "max_pool3d"):
            kind = {"1": nn.MaxPool1d, "2": nn.MaxPool2d, "3": nn.MaxPool3d}[name[-2]]
            keys = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
            settings: dict[str, Any] = {**dict(zip(keys, node.args[1:], strict=False)), **node.kwargs}
            settings.pop("return_indices", None)
            layer = kind(**{k: v for k, v in settings.items() if v not in (None, ())})
            return Step(node, "gain", sources, gain=self._pool_gain(layer, node, sources[0]), rule="max")
        rest = map_arg(node.args[1:], lambda n: self.values[n])
        if len(sources) == 1 and node.args and node.args[0] is sources[0]:
            slopes = function_slopes(name, tuple(rest), dict(node.kwargs))
            if slopes is not None:
                return Step(node, "activation", sources, slopes)
        if name in _LINEAR:
            if name in _QUOTIENT and any(s in (*node.args[1:], *node.kwargs.values()) for s in sources):
                return Step(node, "product", sources, gain=math.inf, rule="quotient", reason=_PRODUCT)
            data = [a for a in _pytree.tree_leaves((node.args, node.kwargs)) if a in sources]
            if name in _BILINEAR and len(data) > 1 and name not in ("baddbmm", "addmm"):
                return Step(node, "product", sources, gain=math.inf, rule=name, reason=_PRODUCT)
            if len(data) > 1 and name not in _SUMS:
                raise self._refusal(node, _PRODUCT)
            if node.kwargs.get("rounding_mode") is not None:
                raise self._refusal(node, "it rounds, which jumps")
            if name == "batch_norm" and node.kwargs.get("training", (*node.args, *[False] * 6)[5]):
                raise self._refusal(node, "it normalises by statistics of what passes")
            return Step(node, "affine", sources)
        raise self._refusal(node, "it is neither known to be affine nor an activation with known slopes")

    def _softmax(self, node: Node, sources: tuple[Node, ...], log: bool, dim: Any) -> Step:
        if dim is None:
            raise self._refusal(node, "it was not told its dimension; give it dim=")
        dim = int(dim)
        entries = self.shape(sources[0])[dim]
        return Step(
            node,
            "gain",
            sources,
            gain=math.sqrt(entries) if log else 0.5,
            rule="log_softmax" if log else "softmax",
        )

    def _pool_gain(self, layer: Any, node: Node, source: Node) -> float:
        """√(largest number of windows that share a pixel)."""
        spatial, out = self.shape(source), self.shape(node)
        if isinstance(layer, nn.modules.pooling._AdaptiveMaxPoolNd):
            windows = (adaptive_windows(a, b) for a, b in zip(spatial[2:], out[2:], strict=True))
            return math.sqrt(math.prod(int((w > 0).sum(1).max()) for w in windows))
        dims = int(type(layer).__name__[-2])
        kernel, stride, dilation = (
            (v,) * dims if isinstance(v, int) else tuple(v)
            for v in (layer.kernel_size, layer.stride or layer.kernel_size, layer.dilation)
        )
        return math.sqrt(
            math.prod(
                math.ceil(k / s) if d == 1 else k for k, s, d in zip(kernel, stride, dilation, strict=True)
            )
        )

    def _refusal(self, node: Node, reason: str) -> UnsupportedError:
        return UnsupportedError(
            f"no certificate covers {self.name(node)!r} ({node.op.replace('_', ' ')} {_target(self, node)}): {reason}"
        )


def _target(reading: Reading, node: Node) -> str:
    if node.op == "call_module":
        return type(reading.module.get_submodule(str(node.target))).__name__
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _ancestors(node: Node) -> set[Node]:
    found: set[Node] = set()
    stack = [node]
    while stack:
        here = stack.pop()
        if here not in found:
            found.add(here)
            stack += here.all_input_nodes
    return found


def read_network(model: nn.Module, example: Tensor | None = None) -> Reading:
    """Read a network for certificates; the network itself is copied and not changed.

    Args:
        model: any network that maps one tensor, samples first, to one tensor.
        example: a batch of inputs; may be left out if the first layer is ``nn.Linear``.

    Raises:
        ArgumentError: ``model`` is no module, or the example is needed.
        DataError: the example is not a floating-point batch of samples, or not finite.
        DivergenceError: a parameter is not finite.
        TraceError: the network cannot be read.
        UnsupportedError: it has an operation that no certificate covers.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is of type {type(model).__name__}: give a torch.nn.Module")
    own = next((p for p in model.parameters()), None)
    device = torch.device("cpu") if own is None else own.device
    if example is None:
        first = next((layer for layer in model.modules() if not list(layer.children())), None)
        while isinstance(first, nn.Flatten):
            first = None
        if not isinstance(first, nn.Linear):
            raise ArgumentError(
                "example is None, and the first layer is not nn.Linear: give a batch of inputs"
            )
        example = torch.zeros(1, first.in_features, device=device)
    if not isinstance(example, Tensor):
        raise UnsupportedError(
            f"example is of type {type(example).__name__}: certificates cover networks of one input, a tensor"
        )
    if not example.is_floating_point() or example.ndim < 2 or example.shape[0] == 0:
        raise DataError(
            f"example has dtype {example.dtype} and shape {tuple(example.shape)}: give a batch of real inputs"
        )
    if not bool(torch.isfinite(example).all()):
        raise DataError("example has entries that are not finite: clean the data first")
    for name, p in _named_tensors(model):
        if not bool(torch.isfinite(p).all()):
            raise DivergenceError(f"{name} is not finite: restore a checkpoint", layer=name)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is None:
            raise UnsupportedError(
                f"no certificate covers {name!r}: it normalises by the statistics of the batch, so outputs depend "
                "on other samples; give it track_running_stats=True"
            )
    try:
        twin = copy.deepcopy(model).to(torch.float64).eval()
    except Exception as error:
        raise UnsupportedError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}): certificates work on a copy in float64"
        ) from error
    _plain_weights(twin)
    twin.requires_grad_(False)
    point = example.detach().to(device, torch.float64)
    _refuse_hooks(twin)
    try:
        reading = Reading(twin, point)
    except TraceError as error:
        try:
            reading = Reading(_OnACopy(twin), point)
        except TraceError:
            raise error from None
    _check_rows(reading)
    return reading


class _OnACopy(nn.Module):
    """A network that may overwrite what it is given."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Run it on a copy."""
        out: Tensor = self.network(x.clone())
        return out


def _plain_weights(module: nn.Module) -> None:
    """Replace weights that are computed (weight norm, spectral norm, orthogonal …) by what they are now."""
    for layer in list(module.modules()):
        if parametrize.is_parametrized(
            layer
        ):  # torch would take the property from the class, the user's as well
            now = {name: getattr(layer, name).detach() for name in layer.parametrizations}  # type: ignore[union-attr]
            del layer.parametrizations
            layer.__class__ = type(layer).__bases__[0]
            for name, value in now.items():
                layer.register_parameter(name, nn.Parameter(value.clone()))
        for hook in list(layer._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm | SpectralNorm):
                (remove_weight_norm if isinstance(hook, WeightNorm) else remove_spectral_norm)(
                    layer, hook.name
                )


def _refuse_hooks(module: nn.Module) -> None:
    """Raise where a hook may change values, which a graph does not show."""
    for name, layer in module.named_modules():
        for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
            for hook in hooks.values():
                raise UnsupportedError(
                    f"no certificate covers the hook {getattr(hook, '__name__', type(hook).__name__)!r} on "
                    f"{name or 'the network'!r}, which may change values: remove it first"
                )


def _check_rows(reading: Reading) -> None:
    """Raise if the output for a sample is another one when a second sample stands beside it."""
    one = reading.example[:1]
    alone = reading.values[reading.end]
    other = reading.example[1:2] if len(reading.example) > 1 else 1.5 * one + 1
    try:
        with torch.no_grad():
            both = reading.module(torch.cat([one, other]))
    except Exception:
        return  # it takes one sample at a time, and then there is nothing to mix
    if len(both) != 2 or not torch.allclose(both[:1], alone, rtol=1e-6, atol=1e-9, equal_nan=True):
        raise UnsupportedError(
            f"{type(reading.module).__name__} gives a sample another output when there are other samples in the "
            "batch: certificates are for one sample; reduce over other dimensions than the first"
        )


def _named_tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        if p.is_floating_point():
            yield name, p
