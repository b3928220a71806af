"""One pass through a traced network: real values and gradients, and the theory beside them.

The real pass runs on a float64 copy, so that gradients of 1e-40 are still numbers; the model itself,
its buffers and the random state stay as they are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree

from bolza.core.errors import ArgumentError, TraceError
from bolza.meanfield.function_maps import FUNCTION_MAPS, MOVES, activation_map, function_name, relabel
from bolza.meanfield.moment_maps import Call, Missing, Step, moment_map
from bolza.meanfield.moments import MAX_FULL_ITEMS, Moments, measure
from bolza.ops.replay import differentiable_kernels
from bolza.systems.trace import trace

__all__ = ["Visit", "double_copy", "real_pass", "theory_pass"]

# Functions that a reader knows as layers: reported when theory does not cover them.
_REPORTED = frozenset(
    "scaled_dot_product_attention matmul bmm einsum mul softmax max_pool1d max_pool2d max_pool3d batch_norm "
    "group_norm instance_norm conv1d conv2d conv3d convolution add sub cat addmm rnn_tanh lstm gru glu".split()
)
_UNITS_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.MultiheadAttention, nn.RNNBase)
_UNITS_SECOND = (
    nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd,
)  # fmt: skip


@dataclass
class Visit:
    """One node of the graph.

    Args:
        node: the node.
        value: its actual value.
        gradient: actual gradient with respect to it, if there is one.
        layer: the module it calls, if it calls one.
        moments: theory of its value, or measured moments where theory has none; none for sizes.
        step: the theory of this node.
        missing: why theory has nothing to say about this node.
        theory_gradient: theory of the gradient's variance, ``(groups, items)``.
        resumed: whether ``theory_gradient`` was taken from the measurement.
    """

    node: fx.Node
    value: Any
    gradient: Tensor | None = None
    layer: nn.Module | None = None
    moments: Moments | None = None
    step: Step | None = None
    missing: Missing | None = None
    theory_gradient: Tensor | None = None
    resumed: bool = False
    inputs: list[fx.Node] = field(default_factory=list)
    owner: Visit | None = None  # the layer that returned the tuple of which this is the first entry

    @property
    def name(self) -> str:
        """Path of the module, or name of the node."""
        if self.owner is not None:
            return self.owner.name
        return str(self.node.target) if self.node.op == "call_module" else self.node.name

    @property
    def has_weights(self) -> bool:
        """Whether this is a layer with parameters."""
        layer = self.owner.layer if self.owner is not None else self.layer
        if layer is None:
            return self.step is not None and self.step.weight_var is not None
        return next(layer.parameters(), None) is not None

    @property
    def kind(self) -> str:
        """Class of the module, or name of the function."""
        if self.owner is not None:
            return self.owner.kind
        if self.layer is not None:
            return type(self.layer).__name__
        return "input" if self.node.op == "placeholder" else function_name(self.node.target)


def double_copy(model: nn.Module) -> nn.Module:
    """A float64 copy, with in-place layers made out of place, gradients dropped."""
    with torch.no_grad():
        twin = copy.deepcopy(model).double()
    for part in twin.modules():
        if getattr(part, "inplace", False) is True:
            part.inplace = False  # type: ignore[assignment]
    return twin.requires_grad_(True)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _as_double(x: Any) -> Any:
    def cast(t: Tensor) -> Tensor:
        t = t.detach()
        return t.double().requires_grad_(True) if t.is_floating_point() else t

    return _pytree.tree_map_only(Tensor, cast, x)


def real_pass(
    model: nn.Module, args: tuple[Any, ...], objective: Callable[[Any], Tensor], seed: int
) -> dict[fx.Node, Visit]:
    """Trace a float64 copy of ``model`` and run it forward and backward.

    Args:
        model: the network.
        args: its arguments.
        objective: from the output of the network to a scalar.
        seed: of the random numbers (dropout) of this pass.

    Returns:
        A visit for every node, in the order of the graph.

    Raises:
        TraceError: the graph cannot be read.
    """
    twin = double_copy(model)
    inputs = _as_double(args)
    first = next((t for t in _pytree.tree_leaves(inputs) if isinstance(t, Tensor)), None)
    if first is None:
        raise ArgumentError("x holds no tensor; give one batch of inputs, or a tuple of arguments.")
    with _seeded(seed, first.device), differentiable_kernels():
        traced = trace(twin, inputs, check=False)
        visits = _run(traced, twin, inputs)
        result = map_arg(traced.result, lambda n: visits[n].value)
        loss = objective(result)
        if loss.ndim:
            raise ArgumentError(
                f"loss gives a tensor of shape {tuple(loss.shape)}; it must give a scalar: use reduction='mean'."
            )
        wanted = [v for v in visits.values() if isinstance(v.value, Tensor) and v.value.requires_grad]
        if loss.requires_grad and wanted:
            grads = torch.autograd.grad(loss, [v.value for v in wanted], allow_unused=True)
            for visit, grad in zip(wanted, grads, strict=True):
                visit.gradient = grad
    return visits


def _run(traced: Any, twin: nn.Module, inputs: tuple[Any, ...]) -> dict[fx.Node, Visit]:
    visits: dict[fx.Node, Visit] = {}
    given = iter(inputs)
    for node in traced.nodes:
        layer = None
        if node.op == "placeholder":
            value = next(given, None)
        elif node.op == "get_attr":
            target = str(node.target)
            value = traced.constants[target] if target in traced.constants else _attribute(traced, target)
        else:
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: visits[n].value)
            if node.op == "call_module":
                layer = twin.get_submodule(str(node.target))
            with torch.set_grad_enabled(not node.meta.get("no_grad", False)):
                value = _apply(node, layer, args, kwargs)
        if isinstance(value, Tensor) and node.meta["role"] == "data" and not value.requires_grad:
            value = value.detach()
            if value.is_floating_point() and not node.meta.get("no_grad", False):
                value.requires_grad_(True)
        visits[node] = Visit(node, value, layer=layer, inputs=list(node.all_input_nodes))
    return visits


def _attribute(traced: Any, path: str) -> Any:
    owner = traced.graph_module
    for name in path.split("."):
        owner = getattr(owner, name)
    return owner


def _apply(node: fx.Node, layer: nn.Module | None, args: Any, kwargs: Any) -> Any:
    if layer is not None:
        return layer(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


# ----------------------------------------------------------------------------------------- theory


def theory_pass(visits: dict[fx.Node, Visit], training: bool) -> None:
    """Fill in moments forward and variances of gradients backward; measure where theory stops."""
    for visit in visits.values():
        value = visit.value
        if visit.node.meta["role"] != "data" or not _is_signal(value):
            continue
        if visit.node.op == "placeholder":
            visit.moments = _measured(visit, visits)
            continue
        source = visits[visit.inputs[0]] if visit.inputs else visit
        if (
            source.layer is not None
            and isinstance(source.value, tuple | list)
            and visit.node.args[1:] == (0,)
        ):
            visit.owner = source
            visit.missing = Missing(f"no moment map for {type(source.layer).__name__}")
            visit.moments = _measured(visit, visits)
            continue
        result = _theory(visit, visits, training)
        if isinstance(result, Step) and not _consistent(result.out, value):
            result = Missing("the map gave another shape", layer=True)
        if isinstance(result, Step):
            visit.step, visit.moments = result, result.out
        else:
            visit.missing, visit.moments = result, _measured(visit, visits)
    _backward(visits)


def _is_signal(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2 and value.numel() > 0


def _consistent(m: Moments, value: Tensor) -> bool:
    shape = [*m.lead[: m.unit_dim], m.units, *m.lead[m.unit_dim :]]
    return shape == list(value.shape)


def _theory(visit: Visit, visits: dict[fx.Node, Visit], training: bool) -> Step | Missing:
    node = visit.node
    inputs = [visits[n].moments for n in visit.inputs if visits[n].node.meta["role"] == "data"]
    known = tuple(m for m in inputs if m is not None)
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: visits[n].value)
    call = Call(node.name, known, args, kwargs, visit.value, training)
    name = "" if visit.layer is not None else function_name(node.target)
    if visit.layer is not None:
        if isinstance(visit.layer, nn.Flatten | nn.Unflatten | nn.Identity) and known:
            return relabel(call, visit.layer)
        if known or isinstance(visit.layer, nn.Embedding):
            return moment_map(visit.layer, call)
        return moment_map.dispatch(object)(visit.layer, call)

    def again(x: Tensor) -> Any:
        """The function with its (first) data argument replaced."""
        first = next(n for n in visit.inputs if visits[n].node.meta["role"] == "data")
        values = map_arg((node.args, node.kwargs), lambda n: x if n is first else visits[n].value)
        with torch.no_grad():
            return _apply(node, None, *values)

    if not known and name != "embedding":
        return Missing(f"no moment map for {name}", layer=name in _REPORTED)
    if name in MOVES and len(known) == 1:
        return relabel(call, again)
    handler = FUNCTION_MAPS.get(name) or (activation_map(name) if len(known) == 1 else None)
    if handler is None:
        return Missing(f"no moment map for {name}", layer=name in _REPORTED)
    return handler(call, again)


def _measured(visit: Visit, visits: dict[fx.Node, Visit]) -> Moments:
    """Actual moments of a value; theory goes on from them."""
    value = visit.value
    inputs = [m for n in visit.inputs if (m := visits[n].moments) is not None]
    unit_dim = _unit_dim(visit, visits, inputs)
    lead = [s for d, s in enumerate(value.shape) if d != unit_dim % value.ndim]
    moments = measure(value, unit_dim, full=math.prod(lead) <= MAX_FULL_ITEMS)
    own = visit.node.op == "placeholder" or visit.has_weights
    sources = {visit.node.name} if own or not inputs else set().union(*(m.sources for m in inputs))
    return moments.with_(sources=frozenset(sources))


def _unit_dim(visit: Visit, visits: dict[fx.Node, Visit], inputs: list[Moments]) -> int:
    """Which dimension holds the units: what the next layer says, else as before, else by the shape."""
    value = visit.value
    if value.ndim == 2:
        return 1
    queue, seen = [visit.node], {visit.node}
    for _ in range(64):
        if not queue:
            break
        node = queue.pop(0)
        for user in node.users:
            if user in seen or user not in visits:
                continue
            seen.add(user)
            layer = visits[user].layer
            name = "" if layer is not None else function_name(user.target) if user.op != "output" else ""
            same = _is_signal(visits[node].value) and visits[node].value.ndim == value.ndim
            if same and (isinstance(layer, _UNITS_LAST) or name in ("linear", "layer_norm", "rms_norm")):
                return value.ndim - 1
            if same and (
                isinstance(layer, _UNITS_SECOND) or name in ("conv1d", "conv2d", "conv3d", "batch_norm")
            ):
                return 1
            queue.append(user)
    for m in inputs:
        if len(m.lead) + 1 == value.ndim:
            return m.unit_dim
    return 1 if value.ndim >= 4 and visit.node.op == "placeholder" else value.ndim - 1


def _backward(visits: dict[fx.Node, Visit]) -> None:
    """Recursion of gradient variances from the output, with the measured one as its start."""
    parts: dict[fx.Node, list[Tensor | None]] = {}
    for node in reversed(visits):
        visit = visits[node]
        m = visit.moments
        if m is None:
            continue
        given = [part for part in parts.get(node, []) if part is not None]
        if given and len(given) == len(parts[node]) == _uses(node, visits):
            visit.theory_gradient = torch.stack(given).sum(0)
        elif visit.gradient is not None:
            visit.theory_gradient = measure(visit.gradient, m.unit_dim, full=m.full).variances
            visit.resumed = True
        data = [n for n in visit.inputs if visits[n].moments is not None]
        step, g = visit.step, visit.theory_gradient
        back: list[Tensor | None] = list(step.backward(g)) if step is not None and g is not None else []
        back += [None] * (len(data) - len(back))
        for n, part in zip(data, back, strict=False):
            parts.setdefault(n, []).append(part)


def _uses(node: fx.Node, visits: dict[fx.Node, Visit]) -> int:
    """How many signals are computed from this one; other uses (its size, say) pass no gradient."""
    return sum(1 for user in node.users if user in visits and visits[user].gradient is not None)


def fallback_visits(model: nn.Module, args: tuple[Any, ...], objective: Callable[[Any], Tensor], seed: int,
                    reason: TraceError) -> tuple[dict[Any, Visit], str]:  # fmt: skip
    """For a model that cannot be traced: its leaf modules in the order of execution, as a chain of nodes.

    Every leaf gets the theory of one layer, from the moments measured at its own input.
    """
    twin = double_copy(model)
    inputs = _as_double(args)
    graph = fx.Graph()
    visits: dict[Any, Visit] = {}
    names = {m: n for n, m in twin.named_modules()}

    def hook(layer: nn.Module, hook_args: tuple[Any, ...], output: Any) -> None:
        tensor = next((a for a in hook_args if isinstance(a, Tensor)), None)
        out = output[0] if isinstance(output, tuple) else output
        if tensor is None or not isinstance(out, Tensor):
            return
        source = graph.placeholder(f"at_{len(visits)}")
        node = graph.create_node("call_module", names[layer], (source,), name=None)
        for n in (source, node):
            n.meta["role"] = "data"
        visits[source] = Visit(source, tensor)
        visits[node] = Visit(node, out, layer=layer, inputs=[source])

    handles = [m.register_forward_hook(hook) for m in twin.modules() if not any(m.children())]
    device = next(
        (t.device for t in _pytree.tree_leaves(inputs) if isinstance(t, Tensor)), torch.device("cpu")
    )
    try:
        with _seeded(seed, device), differentiable_kernels():
            loss = objective(twin(*inputs))
            wanted = [v for v in visits.values() if v.value.requires_grad]
            grads = torch.autograd.grad(loss, [v.value for v in wanted], allow_unused=True) if wanted else ()
    finally:
        for handle in handles:
            handle.remove()
    for visit, grad in zip(wanted, grads, strict=True):
        visit.gradient = grad
    return (
        visits,
        f"the network could not be traced ({reason}); each layer is compared with the theory of one layer",
    )
