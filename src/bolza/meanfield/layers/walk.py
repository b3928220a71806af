"""One pass through a traced network: the real values and gradients of every node.

It runs on a float64 copy, so that gradients of 1e-40 are still numbers; the model itself,
its buffers and the random state stay as they are.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree

from bolza.core.errors import ArgumentError, TraceError
from bolza.meanfield.layers.function_maps import function_name
from bolza.meanfield.layers.moment_maps import Missing, Step, moment_map
from bolza.meanfield.layers.moments import Moments
from bolza.ops.replay import differentiable_kernels
from bolza.systems.trace import trace

__all__ = ["Visit", "double_copy", "evaluate", "fallback_visits", "real_pass", "seeded"]


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
        theory_gradient: theory of the gradient's kernel, in the layout of ``moments``.
        resumed: whether ``theory_gradient`` was taken from the measurement.
        sampled: whether ``step`` comes from virtual units.
        inputs: nodes of the tensors that it is computed from (through tuples).
        owner: the layer that returned the tuple of which this is an entry.
        entry: where in that tuple.
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
    sampled: bool = False
    inputs: list[fx.Node] = field(default_factory=list)
    owner: Visit | None = None
    entry: tuple[int, ...] = ()

    @property
    def calls(self) -> nn.Module | None:
        """The module that computes the value, itself or as an entry of a tuple."""
        return self.layer if self.owner is None else self.owner.layer

    @property
    def name(self) -> str:
        """Path of the module, or name of the node."""
        if self.owner is not None:
            return self.owner.name
        return str(self.node.target) if self.node.op == "call_module" else self.node.name

    @property
    def has_weights(self) -> bool:
        """Whether this is a layer with parameters."""
        if self.calls is None:
            return self.step is not None and self.step.weight_var is not None
        return next(self.calls.parameters(), None) is not None

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
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of this seed inside, the former ones afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _as_double(x: Any) -> Any:
    def cast(t: Tensor) -> Tensor:
        t = t.detach()
        return t.double().requires_grad_(True) if t.is_floating_point() else t

    return _pytree.tree_map_only(Tensor, cast, x)


class _Alone(nn.Module):
    """One layer as a network, so that its call is a node of the graph, under the name of its class."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.name = type(layer).__name__
        self.add_module(self.name, layer)
        self.train(layer.training)

    def forward(self, a: Any, b: Any = None, c: Any = None, d: Any = None) -> Any:
        """Call the layer with what was given."""
        rest = [b, c, d]
        while rest and rest[-1] is None:
            rest.pop()
        return _opened(self.get_submodule(self.name)(a, *rest))


def _opened(out: Any) -> Any:
    """A tuple entry by entry, also while it is traced: then each entry is a node."""
    value = out.node.meta["val"] if isinstance(out, fx.Proxy) else out
    return tuple(_opened(out[i]) for i in range(len(value))) if isinstance(value, tuple) else out


def _by_name(model: nn.Module) -> nn.Module:
    """The model; if it is itself a layer with a map (``nn.GRU``), a network of that layer alone."""
    known = moment_map.dispatch(type(model)) is not moment_map.dispatch(object)
    return _Alone(model) if known and not isinstance(model, nn.Identity) else model


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
    twin = _by_name(double_copy(model))
    inputs = _as_double(args)
    first = next((t for t in _pytree.tree_leaves(inputs) if isinstance(t, Tensor)), None)
    if first is None:
        raise ArgumentError("x holds no tensor; give one batch of inputs, or a tuple of arguments.")
    with seeded(seed, first.device), differentiable_kernels():
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
    _through_tuples(visits)
    return visits


def _through_tuples(visits: dict[fx.Node, Visit]) -> None:
    """Let entries of tuples be computed from what the tuple is computed from, by the layer that returned it."""
    for visit in visits.values():
        inputs: list[fx.Node] = []
        for n in visit.inputs:
            whole = visits[n]
            if not isinstance(whole.value, tuple | list):
                inputs.append(n)
                continue
            inputs += [i for i in whole.inputs if i not in inputs]
            if visit.node.target is operator.getitem and isinstance(visit.node.args[1], int):
                visit.owner = whole.owner if whole.owner is not None else whole
                visit.entry = (*whole.entry, visit.node.args[1])
        visit.inputs = inputs
        if visit.owner is not None and visit.owner.layer is None:
            visit.owner = None  # a function's tuple: the entries are nodes of their own


def evaluate(visits: dict[fx.Node, Visit], node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """The value of a node where some nodes have other values than they really have."""

    def value(n: fx.Node) -> Any:
        if n in values:
            return values[n]
        actual = visits[n].value
        return evaluate(visits, n, values) if isinstance(actual, tuple | list) else actual

    args, kwargs = map_arg((node.args, node.kwargs), value)
    return _apply(node, visits[node].layer, args, kwargs)


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
        with seeded(seed, device), differentiable_kernels():
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
