"""Reading a network for its kernels, and going through the graph with them."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from bolza.core.errors import ArgumentError, UnsupportedError
from bolza.meanfield.activations import ELEMENTWISE_MODULES
from bolza.meanfield.kernels.kernel import Ends, Kernel, KernelCall, NeedsAllPairs, Values, spread
from bolza.meanfield.kernels.kernel_functions import (
    WEIGHTED,
    function_kernel,
    relabel,
)
from bolza.meanfield.kernels.kernel_maps import kernel_map
from bolza.meanfield.layers.function_maps import function_name
from bolza.systems.trace import trace, untouched
from bolza.systems.tracer import ExampleTracer

__all__ = ["Options", "Reader"]

_PLAIN = (*ELEMENTWISE_MODULES, nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)


@dataclass(frozen=True)
class Options:
    """What is wanted of every layer."""

    ntk: bool
    parametrization: str
    weight_var: float | None
    bias_var: float | None
    dtype: torch.dtype
    samples: int = 4096
    seed: int = 0


@dataclass
class _Op:
    """A node on kernels."""

    node: fx.Node
    layer: nn.Module | None
    function: str
    name: str
    data: list[fx.Node]
    all_pairs: bool = False
    cache: dict[Any, Any] = field(default_factory=dict)
    own: list[Ends] = field(default_factory=list)  # moments of each input, for the first and the second batch


class Reader:
    """The graph of a network, split into what is computed on inputs and what on kernels.

    Args:
        model: the network.
        x1: first batch.
        x2: second batch, or None for the first one again.
        options: what is wanted.
        budget: how many pairs of positions and inputs a block of kernels holds at most.
    """

    def __init__(
        self, model: nn.Module, x1: Tensor, x2: Tensor | None, options: Options, budget: int
    ) -> None:
        self.options, self.budget, self.symmetric = options, budget, x2 is None
        reference = next((p for p in model.parameters() if p.is_floating_point()), x1)
        example = x1[: min(2, len(x1))]
        if example.is_floating_point():
            example = example.to(reference.device, reference.dtype)
        self.nodes, self.result, self.meta = _read(model, example)
        batches = [_ready(x, options.dtype) for x in ((x1,) if x2 is None else (x1, x2))]
        self.sizes = (len(x1), len(x1) if x2 is None else len(x2))
        self.ops: list[_Op] = []
        self.values: list[dict[fx.Node, Any]] = [{} for _ in batches]
        self._split(model, batches)
        if self.result not in self._by_node:
            raise ArgumentError(f"{type(model).__name__} has no layer with weights on the way to its output")
        self._readers = Counter(n for op in self.ops for n in op.data if n in self._by_node)
        self._own_moments()

    # -------------------------------------------------------------------------------- reading

    def _split(self, model: nn.Module, batches: list[Tensor]) -> None:
        self._by_node: dict[fx.Node, _Op] = {}
        called: dict[int, str] = {}
        shared: dict[str, dict[Any, Any]] = {}
        for node in self.nodes:
            if node.meta["role"] != "data":
                continue
            layer = model.get_submodule(str(node.target)) if node.op == "call_module" else None
            name = str(node.target) if layer is not None else node.name
            function = "" if layer is not None or node.op == "placeholder" else function_name(node.target)
            data = [n for n in node.all_input_nodes if n.meta["role"] == "data"]
            weighted = layer is not None and not isinstance(layer, _PLAIN) and _has_parameters(layer)
            weighted |= function in WEIGHTED or (layer is not None and _registered_by_user(layer))
            if node.op == "placeholder" or not (weighted or any(n in self._by_node for n in data)):
                for values, x in zip(self.values, batches, strict=True):
                    values[node] = self._evaluate(node, layer, values, x)
                continue
            weights: list[Any] = [layer] if layer is not None and weighted else []
            weights += [n for n in node.all_input_nodes if n.op == "get_attr"]
            for w in weights:
                key = id(w) if isinstance(w, nn.Module) else id(self.meta[w])
                trained = isinstance(w, nn.Module) or isinstance(self.meta[w], nn.Parameter)
                if trained and key in called:
                    raise UnsupportedError(
                        f"{name!r} uses the weights of {called[key]!r} again: kernels of tied weights are not known "
                        "here; give each call a layer of its own"
                    )
                called[key] = name
            op = _Op(node, layer, function, name, data)
            if isinstance(layer, ELEMENTWISE_MODULES) and not _has_parameters(layer):
                op.cache = shared.setdefault(repr(layer), op.cache)  # equal activations share their tables
            self.ops.append(op)
            self._by_node[node] = op

    def _evaluate(self, node: fx.Node, layer: nn.Module | None, values: dict[fx.Node, Any], x: Tensor) -> Any:
        """A node that no random layer precedes, on the actual inputs."""
        if node.op == "placeholder":
            return x

        def value(n: fx.Node) -> Any:
            if n not in values:
                if n.meta["role"] == "size" and any(a in values for a in n.all_input_nodes):
                    values[n] = self._evaluate(n, None, values, x)
                else:
                    values[n] = self.meta[n]
            return values[n]

        args, kwargs = map_arg((node.args, node.kwargs), value)
        if layer is not None:
            layer = copy.deepcopy(layer).to(x.dtype if x.is_floating_point() else None)
        with torch.no_grad():
            return _apply(node, layer, args, kwargs)

    # -------------------------------------------------------------------------- going through

    def _own_moments(self) -> None:
        """Second moments and means of every input at every node; finds where positions are mixed on the way."""
        probe = [values_of(v, slice(0, 1)) for v in self.values[:1]]
        while True:
            try:
                self._run(probe[0], None, None)
                break
            except NeedsAllPairs:
                self._keep_all_pairs(self._at)
        for op in self.ops:
            op.cache.clear()
        cost = self._cost()
        self.diagonals: list[list[Kernel]] = []
        for side, values in enumerate(self.values):
            step, parts, results = max(1, self.budget // cost), [], []
            for start in range(0, self.sizes[side], step):
                found = self._run(values_of(values, slice(start, start + step)), None, None)
                parts.append(found)
                results.append(found[self.result])
            for op in self.ops:
                ks = [part[op.node] for part in parts]
                second = torch.cat([k.second for k in ks], -1)
                mean = torch.cat([_known_mean(k) for k in ks], -1)
                op.own.append(Ends(second, mean))
            self.diagonals.append(results)

    def _keep_all_pairs(self, node: fx.Node) -> None:
        stack = [n for n in self._by_node[node].data if n in self._by_node] or [node]
        while stack:
            op = self._by_node[stack.pop()]
            if not op.all_pairs:
                op.all_pairs = True
                stack += [n for n in op.data if n in self._by_node]
        self._by_node[node].all_pairs |= any(n not in self._by_node for n in self._by_node[node].data)

    def _cost(self) -> int:
        """Numbers in the largest kernel of one pair of inputs."""
        cost = 1
        for op in self.ops:
            p = self._positions[op.node]
            cost = max(cost, p * p if op.all_pairs else p)
        return cost

    def blocks(self) -> Iterator[tuple[slice, slice, Kernel]]:
        """Kernels of the output, block by block; of a symmetric kernel the upper blocks only."""
        side = max(1, math.isqrt(self.budget // self._cost()))
        rows = [slice(s, min(s + side, self.sizes[0])) for s in range(0, self.sizes[0], side)]
        columns = [slice(s, min(s + side, self.sizes[1])) for s in range(0, self.sizes[1], side)]
        for i, row in enumerate(rows):
            left = values_of(self.values[0], row)
            for column in columns[i:] if self.symmetric else columns:
                right = values_of(self.values[-1], column)
                yield row, column, self._run(left, right, (row, column))[self.result]

    def _run(
        self, left: dict[fx.Node, Any], right: dict[fx.Node, Any] | None, at: tuple[slice, slice] | None
    ) -> dict[fx.Node, Kernel]:
        """Go through the nodes on kernels; without ``right`` each input is paired with itself."""
        found: dict[fx.Node, Kernel] = {}
        remaining = dict(self._readers) if at else {}
        positions: dict[fx.Node, int] = {}
        for op in self.ops:
            self._at = op.node
            k = self._step(op, found, left, right)
            if k.all_pairs and (not op.all_pairs or k.positions == 1):
                k = k.reduced()
            positions[op.node] = max([k.positions, *(found[n].positions for n in op.data if n in found)])
            if at is None:
                ends = Ends(k.second, _known_mean(k))
                k = k.with_(
                    left=spread(ends, 0, k.all_pairs, True),
                    right=spread(ends, 1, k.all_pairs, True),
                    mean=ends.mean,
                )
            else:
                both = [
                    Ends(e.second[:, s], e.mean[:, s])
                    for e, s in zip((op.own[0], op.own[-1]), at, strict=True)
                ]
                k = k.with_(
                    left=spread(both[0], 0, k.all_pairs, False), right=spread(both[1], 1, k.all_pairs, False)
                )
                for n in op.data:  # give back what nothing reads any more
                    if n in remaining:
                        remaining[n] -= 1
                        if not remaining[n] and n is not self.result:
                            found.pop(n, None)
            found[op.node] = k
        self._positions = positions
        return found

    def _step(
        self,
        op: _Op,
        found: dict[fx.Node, Kernel],
        left: dict[fx.Node, Any],
        right: dict[fx.Node, Any] | None,
    ) -> Kernel:
        inputs = tuple(
            found[n] if n in found else Values(left[n], None if right is None else right[n]) for n in op.data
        )
        args, kwargs = map_arg((op.node.args, op.node.kwargs), self.meta.__getitem__)

        def again(x: Tensor) -> Any:
            first = op.data[0]
            values = map_arg((op.node.args, op.node.kwargs), lambda n: x if n is first else self.meta[n])
            with torch.no_grad():
                return _apply(op.node, op.layer, *values)

        def roots() -> tuple[float, float]:
            if right is None:
                own = inputs[0]
                return _range([own.second if isinstance(own, Kernel) else torch.ones(1)])
            if "roots" not in op.cache:
                alike = [
                    self._by_node[o.data[0]]
                    for o in self.ops
                    if o.cache is op.cache and o.data[0] in self._by_node
                ]
                op.cache["roots"] = _range([ends.second for o in alike for ends in o.own])
            return op.cache["roots"]  # type: ignore[no-any-return]

        call = KernelCall(
            op.name, op.function, inputs, args, kwargs, self.meta[op.node], op.all_pairs, self.options.ntk,
            self.options.dtype, self.options.parametrization, self.options.weight_var, self.options.bias_var, again,
            op.cache, self.options.samples, self.options.seed, roots,
        )  # fmt: skip
        if op.layer is None:
            return function_kernel(op.function, call)
        if isinstance(op.layer, nn.Flatten | nn.Unflatten):
            return relabel(call)
        return kernel_map(op.layer, call)


def _range(seconds: list[Tensor]) -> tuple[float, float]:
    low = min(float(s.min()) for s in seconds)
    high = max(float(s.max()) for s in seconds)
    return math.sqrt(max(low, 0.0)), math.sqrt(max(high, 0.0))


def _known_mean(k: Kernel) -> Tensor:
    return torch.zeros_like(k.second) if k.mean is None else k.mean


def values_of(values: dict[fx.Node, Any], rows: slice) -> dict[fx.Node, Any]:
    """The rows of every batch among the values."""

    def part(n: fx.Node, value: Any) -> Any:
        batch = isinstance(value, Tensor) and value.ndim and n.meta["role"] == "data"
        return value[rows] if batch else value

    return {n: part(n, value) for n, value in values.items()}


def _ready(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.detach().to(dtype) if x.is_floating_point() else x.detach()


def _has_parameters(layer: nn.Module) -> bool:
    return next(layer.parameters(), None) is not None


def _registered_by_user(layer: nn.Module) -> bool:
    """Whether the map of this type was registered outside this library."""
    handler = kernel_map.dispatch(type(layer))
    return handler is not kernel_map.dispatch(object) and not type(layer).__module__.startswith("torch.")


def _read(model: nn.Module, example: Tensor) -> tuple[list[fx.Node], fx.Node, dict[fx.Node, Any]]:
    """The nodes, the node of the result, and what every node has for the example (tensors of data empty)."""
    own = frozenset(path for path, part in model.named_modules() if path and _registered_by_user(part))
    constants: dict[str, Any] = {}
    if own:
        with untouched(model, (example,)):
            graph = ExampleTracer(own).read(model, (example,))
        nodes = [n for n in graph.nodes if n.op != "output" and "val" in n.meta]
        result: Any = next(iter(reversed(graph.nodes))).args[0]
    else:
        traced = trace(model, example, check=False)
        nodes, result, constants = list(traced.nodes), traced.result, traced.constants
    if not isinstance(result, fx.Node) or not isinstance(result.meta["val"], Tensor):
        raise UnsupportedError(
            f"{type(model).__name__} returns {type(result).__name__}: its output must be one tensor"
        )
    meta: dict[fx.Node, Any] = {}
    for n in nodes:
        value = n.meta["val"]
        if n.op == "get_attr":
            target = str(n.target)
            value = constants[target] if target in constants else _attribute(model, target)
        elif isinstance(value, Tensor) and n.meta["role"] == "data":
            value = torch.empty(value.shape, dtype=value.dtype, device="meta")
        meta[n] = value
    return nodes, result, meta


def _attribute(owner: Any, path: str) -> Any:
    for name in path.split("."):
        owner = getattr(owner, name)
    return owner


def _apply(node: fx.Node, layer: nn.Module | None, args: Any, kwargs: Any) -> Any:
    if layer is not None:
        return layer(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    raise UnsupportedError(f"node {node.name!r} ({node.op}) cannot be evaluated")
