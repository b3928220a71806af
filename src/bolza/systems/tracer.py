"""Symbolic tracing that knows the values of one example.

A plain symbolic tracer stops at ``if x.shape[1] > 3``, ``for t in range(x.shape[1])``,
``torch.arange(T)`` and ``assert T <= limit``. Here every proxy carries the value that it has for
an example, so that control flow on *sizes* can be followed; each such decision leaves a guard in the
graph, a node that checks it again whenever the graph runs. Control flow on the *entries* of a tensor
is refused.

In-place operations are recorded as their functional twins, so that a piece of the graph may run
without overwriting what it is given.
"""

from __future__ import annotations

import builtins
import functools
import linecache
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy, Tracer
from torch.fx.node import map_arg
from torch.utils import _pytree, checkpoint

from bolza.core.errors import TraceError
from bolza.systems.roles import require, role_of

__all__ = ["ExampleTracer", "plain_checkpoints"]

_CONSTRUCTORS = (
    "arange", "as_tensor", "empty", "eye", "finfo", "full", "iinfo", "linspace", "logspace", "ones",
    "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
)  # fmt: skip
_RANDOM_CONSTRUCTORS = ("normal", "rand", "randint", "randn", "randperm")
# These hold a stack of layers and nothing else: one stage for all of them would tell little.
_STACKS = (nn.Sequential, nn.Transformer, nn.TransformerDecoder, nn.TransformerEncoder)
_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(__file__) + os.sep
_NO_TWIN = frozenset({"requires_grad_", "retain_grad_", "share_memory_"})


class ExampleProxy(Proxy):
    """A value of the graph together with what it is for the example."""

    tracer: ExampleTracer

    def __getattr__(self, name: str) -> Any:
        value = self.node.meta["val"]
        found = getattr(value, name)  # an AttributeError here is the one that the user's code would see
        if callable(found) and not isinstance(found, (Tensor, torch.dtype)):
            return functools.partial(self._call, name)
        if name in ("ndim", "is_cuda", "is_cpu", "layout", "requires_grad", "is_nested", "is_sparse", "type"):
            return found
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.create_proxy("call_method", name, (self, *args), kwargs)

    def __bool__(self) -> bool:
        return bool(self.tracer.decide(self, bool))

    def __index__(self) -> int:
        return int(self.tracer.decide(self, int))

    def __int__(self) -> int:
        return int(self.tracer.decide(self, int))

    def __float__(self) -> float:
        return float(self.tracer.decide(self, float))

    def __len__(self) -> int:
        value = self.node.meta["val"]
        if isinstance(value, Tensor):
            return int(self.tracer.decide(self.shape[0], int))
        return len(value)

    def __iter__(self) -> Iterator[Any]:
        value = self.node.meta["val"]
        if isinstance(value, dict):
            return iter(value)
        return iter([self[i] for i in range(len(self))])  # type: ignore[index]

    def __contains__(self, item: Any) -> bool:
        value = self.node.meta["val"]
        if isinstance(value, dict):
            return item in value
        return any(bool(entry == item) for entry in self)

    def __setitem__(self, index: Any, value: Any) -> None:
        proxy = self.tracer.create_proxy("call_function", with_items, (self, index, value), {})
        self.node = proxy.node

    def keys(self) -> Any:
        return self.node.meta["val"].keys()


def with_items(x: Tensor, index: Any, value: Any) -> Tensor:
    """Return a copy of ``x`` with ``x[index] = value``."""
    x = x.clone()
    x[index] = value
    return x


def _functional_twin(kind: str, target: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Target and arguments of the operation that does out of place what this one does in place."""
    if (
        kind == "call_method"
        and target.endswith("_")
        and not target.startswith("_")
        and target not in _NO_TWIN
    ):
        name = target[:-1]
        return (name if hasattr(Tensor, name) else on_a_copy(target)), kwargs
    if kind == "call_function":
        name = getattr(target, "__name__", "")
        if kwargs.get("inplace") is True:
            return target, {**kwargs, "inplace": False}
        if name.endswith("_") and not name.startswith("_") and name not in _NO_TWIN:
            for home in (torch, nn.functional, Tensor):
                twin = getattr(home, name[:-1], None)
                if getattr(home, name, None) is target and twin is not None:
                    return twin, kwargs
    return None


@functools.cache
def on_a_copy(method: str) -> Callable[..., Tensor]:
    """A function that applies an in-place method to a copy of its first argument."""

    def apply(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return getattr(x.clone(), method)(*args, **kwargs)

    apply.__name__ = f"copy_{method.strip('_')}"
    return apply


@functools.cache
def _applied(function: type) -> Callable[..., Any]:
    """The ``apply`` of an autograd function, as a plain function that a graph can name."""

    def apply(*args: Any) -> Any:
        return function.apply(*args)  # type: ignore[attr-defined]

    apply.__name__ = apply.__qualname__ = function.__name__
    return apply


class ExampleTracer(Tracer):
    """Reads the graph of a module along one example.

    Args:
        opaque: paths of sub-modules that are taken as one operation each.
        stacks: whether to look into the layer stacks of ``torch.nn`` (its ``TransformerEncoder`` and so on).
    """

    proxy_buffer_attributes = True

    def __init__(self, opaque: frozenset[str] = frozenset(), stacks: bool = True) -> None:
        super().__init__()
        self.opaque = opaque
        self.stacks = stacks
        self._evaluating = False
        self._example: tuple[Any, ...] = ()
        self._decided: set[tuple[Node, Any]] = set()
        self._overwritten: list[tuple[int, Tensor, Node]] = []  # address, what of it, by which node

    def read(self, module: nn.Module, example: tuple[Any, ...]) -> Graph:
        """Return the graph of ``module(*example)``; each node has its value in ``meta["val"]``."""
        self._example = example
        with torch.enable_grad(), self._constructors(), _proxies_are_tensors(), plain_checkpoints():
            return self.trace(module)

    def failed_in(self) -> str | None:
        """Path of the innermost sub-module that was being read when tracing stopped."""
        return next(reversed(self.module_stack.values()))[0] if self.module_stack else None

    # -- hooks of the base class

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """Make a placeholder of each argument in the example; the others keep their defaults."""
        names = root_fn.__code__.co_varnames[1 : root_fn.__code__.co_argcount]
        proxies = []
        for i, value in enumerate(self._example):
            name = names[i] if i < len(names) else f"input_{i}"
            node = self.create_node("placeholder", name, (), {})
            node.meta.update(val=value, random=False, no_grad=False)
            node.meta["role"] = role_of(node)
            proxies.append(self.proxy(node))
        return root_fn, [self.root, *proxies]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one operation of the graph: of ``torch.nn``, or because its class says so."""
        if module_qualified_name in self.opaque or getattr(type(m), "one_operation", False):
            return True
        if self.stacks and type(m) in _STACKS:
            return False
        return super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: Node) -> Proxy:
        """Wrap a node."""
        return ExampleProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        """Turn an argument into nodes and constants."""
        if type(a) is ExampleProxy:
            return a.node  # before the tests on the type, which a proxy of a tensor would pass
        arg = super().create_arg(a)
        if isinstance(arg, Node) and "val" not in arg.meta:
            self._evaluate(arg)
        return arg

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any | None = None,
        proxy_factory_fn: Any = None,
    ) -> Any:
        """Record an operation and evaluate it on the example."""
        first = args[0] if args and type(args[0]) is ExampleProxy else None
        self._refuse_stale((args, kwargs))
        twin = _functional_twin(kind, target, kwargs) if first is not None else None
        if twin is not None:
            target, kwargs = twin
            kind = "call_method" if isinstance(target, str) else "call_function"
        proxy = super().create_proxy(kind, target, args, kwargs, name, type_expr)
        self._evaluate(proxy.node)
        overwrites = (
            kind == "call_module" and getattr(self.root.get_submodule(target), "inplace", False) is True
        )
        if first is not None and (twin is not None or overwrites or target is with_items):
            self._note_overwritten(first.node, proxy.node)
        if first is not None and (twin is not None or overwrites):
            first.node = proxy.node  # who reads the overwritten value from now on reads this one
            return first
        return proxy

    def _note_overwritten(self, old: Node, new: Node) -> None:
        """Mark the memory that the network would have written to: older values there are stale now."""
        value = old.meta["val"]
        if isinstance(value, Tensor) and value.numel():
            storage = value.untyped_storage()
            mark = torch.zeros(storage.nbytes() // value.element_size(), dtype=torch.bool)
            mark.as_strided(value.shape, value.stride(), value.storage_offset()).fill_(True)
            self._overwritten.append((storage.data_ptr(), mark, new))

    def _refuse_stale(self, tree: Any) -> None:
        """Stop where a value is used that an in-place operation on another view of it has changed."""
        if not self._overwritten:
            return
        for proxy in _pytree.tree_leaves(tree):
            if type(proxy) is not ExampleProxy:
                continue
            for value in _pytree.tree_leaves(proxy.node.meta["val"]):
                if not isinstance(value, Tensor) or not value.numel():
                    continue
                for address, mark, new in self._overwritten:
                    here = value.untyped_storage().data_ptr() == address and proxy.node < new
                    if here and mark.as_strided(value.shape, value.stride(), value.storage_offset()).any():
                        raise NotImplementedError(
                            f"{proxy.node.name} is used after an in-place operation wrote through a view of it"
                        )

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Record, or look into, a call of a sub-module."""
        if self._evaluating:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        call = path, self.num_calls.get(path, 0)
        for i, arg in enumerate(args):
            if type(arg) is ExampleProxy:
                arg.node.meta.setdefault("passed_to", []).append((*call, i))
        result = super().call_module(m, forward, args, kwargs)
        if type(result) is ExampleProxy:
            result.node.meta.setdefault("returned_by", []).append(call)
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Proxy]) -> Any:
        """Read an attribute of a module: a parameter or buffer becomes a node."""
        if self._evaluating:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    # -- values

    def _evaluate(self, node: Node) -> None:
        args = map_arg(node.args, lambda n: n.meta["val"])
        kwargs = map_arg(node.kwargs, lambda n: n.meta["val"])
        before = random_states(self._example)
        self._evaluating = True
        node.meta["no_grad"] = not torch.is_grad_enabled()
        try:
            with torch.no_grad():
                node.meta["val"] = self._apply(node, args, kwargs)
        finally:
            self._evaluating = False
        after = random_states(self._example)
        node.meta["random"] = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        node.meta["role"] = role_of(node)

    def _apply(self, node: Node, args: Any, kwargs: Any) -> Any:
        target: Any = node.target
        if node.op == "get_attr":
            return functools.reduce(getattr, target.split("."), self.root)
        if node.op == "call_module":
            layer = self.root.get_submodule(target)
            if getattr(layer, "inplace", False) is True:
                with mock.patch.dict(layer.__dict__, inplace=False):
                    return layer(*args, **kwargs)
            return layer(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)

    def decide(self, proxy: Any, kind: type) -> Any:
        """Turn a size into a Python number, because the control flow asks for one, and guard it."""
        if type(proxy) is not ExampleProxy:
            return proxy
        node, value = proxy.node, proxy.node.meta["val"]
        where = _where()
        if node.meta["role"] == "data" or (node.meta["role"] == "constant" and self._reads_parameter(node)):
            what = "bool" if kind is bool else "number"
            raise TraceError(
                f"{type(self.root).__name__} turns the entries of a tensor into a Python {what}, at {where}: "
                "which operations run must not depend on them; use torch.where, or put the branch into a "
                "sub-module of its own, which then is read as one operation"
            )
        value = value.item() if isinstance(value, Tensor) else value
        expected = value if isinstance(value, (bool, int, float)) else bool(value)
        if (node, expected) not in self._decided:
            self._decided.add((node, expected))
            guard = self.create_node("call_function", require, (node, expected, where), {})
            guard.meta.update(val=None, role=node.meta["role"], random=False, no_grad=False)
        return value

    def _reads_parameter(self, node: Node) -> bool:
        if node.op == "get_attr":
            return isinstance(node.meta["val"], nn.Parameter)
        return any(
            self._reads_parameter(n) for n in node.all_input_nodes if isinstance(n.meta["val"], Tensor)
        )

    @contextmanager
    def _constructors(self) -> Iterator[None]:
        """Record the functions that make a tensor, or read one, without passing through its class."""
        apply = torch.autograd.Function.__dict__["apply"]

        def function_apply(cls: type, *args: Any) -> Any:
            if self._evaluating or not _has_proxy(args):
                return apply.__get__(None, cls)(*args)
            return self.create_proxy("call_function", _applied(cls), args, {})

        with ExitStack() as stack:
            for name in (*_CONSTRUCTORS, *_RANDOM_CONSTRUCTORS):
                original = getattr(torch, name)
                if isinstance(original, type):
                    continue
                wrapped = self._recorded(original, always=name in _RANDOM_CONSTRUCTORS)
                stack.enter_context(mock.patch.object(torch, name, wrapped))
            patch: Any = mock.patch.object(torch.autograd.Function, "apply", classmethod(function_apply))
            stack.enter_context(patch)
            yield

    def _recorded(self, function: Callable[..., Any], *, always: bool) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if self._evaluating or not (always or _has_proxy((args, kwargs))):
                return function(*args, **kwargs)
            return self.create_proxy("call_function", function, args, kwargs)

        return wrapper


@contextmanager
def _proxies_are_tensors() -> Iterator[None]:
    """Let ``isinstance(x, torch.Tensor)`` hold in Python code, for proxies of tensors.

    A proxy that lied about its ``__class__`` would deceive C++ code as well, which then reads its memory.
    """
    original = builtins.isinstance

    def with_proxies(x: Any, kinds: Any) -> bool:
        if type(x) is ExampleProxy and original(x.node.meta.get("val"), Tensor):
            return original(x, kinds) or issubclass(Tensor, kinds)
        return original(x, kinds)

    with mock.patch.object(builtins, "isinstance", with_proxies):
        yield


@contextmanager
def plain_checkpoints() -> Iterator[None]:
    """Let ``torch.utils.checkpoint`` run what it is given, and recompute nothing."""

    def no_frame(*args: Any, **kwargs: Any) -> Iterator[None]:
        yield

    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return function(*args)

    with (
        mock.patch.object(checkpoint, "_checkpoint_without_reentrant_generator", no_frame),
        mock.patch.object(checkpoint.CheckpointFunction, "apply", apply),
    ):
        yield


def _has_proxy(tree: Any) -> bool:
    return any(type(leaf) is ExampleProxy for leaf in _pytree.tree_leaves(tree))


def random_states(tree: Any) -> list[Tensor]:
    """States of the generators that a network on these tensors draws from: the CPU's and the devices'."""
    leaves = [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    devices = sorted({leaf.get_device() for leaf in leaves if leaf.is_cuda})
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def _where() -> str:
    """File, line and text of the user's code that is running."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_TORCH, _HERE)):
        frame = frame.f_back
    name, line = frame.f_code.co_filename, frame.f_lineno
    text = linecache.getline(name, line).strip()
    return f"{os.path.basename(name)}:{line}" + (f" `{text}`" if text else "")
