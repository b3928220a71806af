"""Running a piece of a traced graph as a pure function of its inputs and parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

from bolza.ops.replay import differentiable_kernels, frozen_statistics
from bolza.systems.tracer import random_states

__all__ = ["Replay", "restored_randomness"]

_ATTENTION = ("attention", "Attention", "Transformer")


class Replay:
    """Some nodes of a graph, in order, as a function of the values they need and of parameters.

    Calling it does not change the module: parameters come from the caller and are put in place for
    the time of the call, running statistics are frozen, in-place layers work out of place.

    Args:
        module: the network; its parameters and buffers are read at each call.
        nodes: what is computed.
        constants: tensors that the graph mentions and the network does not hold.

    Attributes:
        names: the parameters that are used, as ``module.named_parameters()`` names them.
        random: whether random numbers are drawn.
    """

    def __init__(self, module: nn.Module, nodes: Sequence[Node], constants: Mapping[str, Any]) -> None:
        self.nodes = tuple(nodes)
        self.random = any(node.meta.get("random") for node in nodes)
        names = {id(value): name for name, value in module.named_parameters()}
        order = {name: i for i, name in enumerate(names.values())}
        self._layers: dict[Node, nn.Module] = {}
        self._attributes: dict[Node, tuple[Any, str, str | None]] = {}
        self._places: list[tuple[nn.Module, str, str]] = []
        self._out_of_place: list[nn.Module] = []
        self._stateful: list[nn.Module] = []
        found: set[str] = set()
        for node in nodes:
            if node.op == "get_attr":
                owner, attribute = _owner(module, str(node.target), constants)
                value = owner[attribute] if isinstance(owner, Mapping) else getattr(owner, attribute)
                name = names.get(id(value)) if isinstance(value, nn.Parameter) else None
                self._attributes[node] = (owner, attribute, name)
                if name is not None:
                    found.add(name)
            elif node.op == "call_module":
                layer = module.get_submodule(str(node.target))
                if layer not in self._layers.values():
                    found |= self._add_layer(layer, names)
                self._layers[node] = layer
        self.names = tuple(sorted(found, key=order.__getitem__))
        self._fused = any(_has_fused_kernels(node, self._layers.get(node)) for node in nodes)

    def _add_layer(self, layer: nn.Module, names: Mapping[int, str]) -> set[str]:
        found = set()
        for part in layer.modules():
            for local, value in part._parameters.items():
                if value is not None:
                    self._places.append((part, local, names[id(value)]))
                    found.add(names[id(value)])
        if getattr(layer, "inplace", False) is True:
            self._out_of_place.append(layer)
        if next(layer.buffers(), None) is not None:
            self._stateful.append(layer)
        return found

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        """The layers that are called."""
        return tuple(dict.fromkeys(self._layers.values()))

    @property
    def read_alone(self) -> tuple[str, ...]:
        """The parameters that are read without calling a layer."""
        return tuple(name for _, _, name in self._attributes.values() if name is not None)

    def __call__(self, values: Mapping[Node, Any], parameters: Mapping[str, Any]) -> dict[Node, Any]:
        """Compute all nodes.

        Args:
            values: values of the nodes that are not computed here.
            parameters: values by name; the module's own for those not given.

        Returns:
            ``values`` and the value of every node.
        """
        env = dict(values)
        places = [
            place
            for place in self._places
            if place[2] in parameters and parameters[place[2]] is not place[0]._parameters[place[1]]
        ]
        if places or self._out_of_place or self._stateful or self._fused:
            with self._pure(places, parameters):
                self._run(env, parameters)
        else:
            self._run(env, parameters)
        return env

    def in_place(self, values: Mapping[Node, Any]) -> dict[Node, Any]:
        """Compute all nodes as the network itself would: with its own parameters; running statistics move."""
        env = dict(values)
        with self._without_overwriting():
            self._run(env, {})
        return env

    def _run(self, env: dict[Node, Any], parameters: Mapping[str, Any]) -> None:
        for node in self.nodes:
            if node.meta["no_grad"]:
                with torch.no_grad():
                    env[node] = self._value(node, env, parameters)
            else:
                env[node] = self._value(node, env, parameters)

    def _value(self, node: Node, env: dict[Node, Any], parameters: Mapping[str, Any]) -> Any:
        if node.op == "get_attr":
            owner, attribute, name = self._attributes[node]
            if name is not None and name in parameters:
                return parameters[name]
            return owner[attribute] if isinstance(owner, Mapping) else getattr(owner, attribute)
        args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
        if node.op == "call_module":
            return self._layers[node](*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    @contextmanager
    def _pure(
        self, places: Sequence[tuple[nn.Module, str, str]], parameters: Mapping[str, Any]
    ) -> Iterator[None]:
        with ExitStack() as stack:
            for layer in self._stateful:
                stack.enter_context(frozen_statistics(layer))
            if self._fused:
                stack.enter_context(plain_kernels())
            kept = []
            try:
                for part, local, name in places:
                    kept.append((part, local, part._parameters[local]))
                    _put(part, local, parameters[name])
                with self._without_overwriting():
                    yield
            finally:
                for part, local, value in kept:
                    _put(part, local, value)

    @contextmanager
    def _without_overwriting(self) -> Iterator[None]:
        try:
            for layer in self._out_of_place:
                layer.__dict__["inplace"] = False
            yield
        finally:
            for layer in self._out_of_place:
                layer.__dict__["inplace"] = True


def _put(part: nn.Module, local: str, value: Any) -> None:
    part._parameters[local] = value
    if isinstance(part, nn.RNNBase):  # it keeps a second list of its weights
        part._flat_weights[part._flat_weights_names.index(local)] = value


def _owner(module: nn.Module, path: str, constants: Mapping[str, Any]) -> tuple[Any, str]:
    if path in constants:
        return constants, path
    owner, _, attribute = path.rpartition(".")
    return module.get_submodule(owner), attribute


def _has_fused_kernels(node: Node, layer: nn.Module | None) -> bool:
    if layer is None:
        return node.op == "call_function" and any(word in str(node.target) for word in _ATTENTION)
    if any(isinstance(part, (nn.MultiheadAttention, nn.RNNBase)) for part in layer.modules()):
        return True
    return not type(layer).__module__.startswith("torch.nn")  # an opaque layer may call anything


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Kernels with all derivatives; the attention modules' own inference shortcut is off as well."""
    shortcut = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with differentiable_kernels():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(shortcut)


@contextmanager
def restored_randomness(states: Sequence[Tensor] | None, like: Any) -> Iterator[None]:
    """Draw random numbers from stored generator states, and leave the generators as they are.

    Args:
        states: what :func:`random_states` returned; ``None`` to start from the present states.
        like: a tree with the tensors whose devices' generators are meant.
    """
    kept = random_states(like)
    try:
        if states is not None:
            _set_states(states, like)
        yield
    finally:
        _set_states(kept, like)


def _set_states(states: Sequence[Tensor], like: Any) -> None:
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(like) if isinstance(leaf, Tensor)]
    devices = sorted({leaf.get_device() for leaf in leaves if leaf.is_cuda})
    torch.set_rng_state(states[0])
    for device, state in zip(devices, states[1:], strict=False):
        torch.cuda.set_rng_state(state, device)
