"""Factors of per-sample gradients, recorded while a network runs.

A hook on every layer that has a rule (:mod:`bolza.ops.persample`) keeps what entered the layer and the place in the
graph where its output appeared. One backward pass to those places gives the signals that come back; with what
entered they are the gradients of every sample, whether they are of a loss or of an output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call, grad, vmap
from torch.utils import _pytree

from bolza.ops.batches import Loss, count_samples
from bolza.ops.errors import UnsupportedError
from bolza.ops.persample import RULES, Block, Dense, Signals, merge

__all__ = ["Use", "blocks_of", "call_with", "cut", "surely_alone", "vmapped", "watching"]

_VMAP_ROOM = 2**25  # numbers in the explicit gradients of one vmapped call


@dataclass
class Use:
    """One call of a layer: what entered, and where its output is in the graph."""

    layer: nn.Module
    names: Mapping[str, str]  # own name of each wanted parameter -> its name in the model
    entered: Tensor
    edge: GradientEdge
    shape: torch.Size
    version: int = field(init=False)

    def __post_init__(self) -> None:
        self.version = self.entered._version

    def signals(self) -> Signals | None:
        """What turns a signal into blocks; None if the rule does not apply, or what entered was overwritten."""
        if self.entered._version != self.version:
            return None
        return RULES[type(self.layer)](self.layer, self.entered)


@contextmanager
def watching(model: nn.Module, wanted: Mapping[str, Tensor], n: int) -> Iterator[list[Use]]:
    """Record the uses of the wanted parameters in layers that have a rule, for a batch of n samples.

    Args:
        model: the network.
        wanted: parameters by name, the very tensors that the layers will hold when they run.
        n: samples; a call whose input or output does not have them first is not recorded.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> with watching(net, dict(net.named_parameters()), 4) as uses:
        ...     _ = net(torch.ones(4, 2))
        >>> [use.names["weight"] for use in uses]
        ['0.weight', '2.weight']
    """
    owner = {id(value): name for name, value in wanted.items()}
    uses: list[Use] = []

    def watch(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        entered = args[0] if args else next(iter(kwargs.values()), None)
        mine = {own: owner[id(p)] for own, p in layer._parameters.items() if id(p) in owner}
        if not mine or not isinstance(entered, Tensor) or not isinstance(out, Tensor):
            return
        if not out.requires_grad or entered.shape[:1] != (n,) or out.shape[:1] != (n,):
            return
        # the edge, not the tensor: a later layer may overwrite the tensor in place, and then it is another value
        uses.append(Use(layer, mine, entered.detach(), get_gradient_edge(out), out.shape))

    hooks = [
        layer.register_forward_hook(watch, with_kwargs=True)
        for layer in model.modules()
        if type(layer) in RULES
    ]
    try:
        yield uses
    finally:
        for hook in hooks:
            hook.remove()


def blocks_of(uses: Sequence[Use], slopes: Sequence[Sequence[Tensor | None]]) -> list[dict[str, Block]]:
    """Gradients of the samples from the signals that came back to the uses.

    Args:
        uses: from :func:`watching`.
        slopes: for each quantity that was differentiated, the gradient at the edge of each use; None is zero.

    Returns:
        For each quantity, a block a parameter; a parameter is missing if the rule of one of its uses is silent.
    """
    found: list[dict[str, list[Block]]] = [{} for _ in slopes]
    silent: set[str] = set()
    for k, use in enumerate(uses):
        rule = use.signals()
        for quantity, slope in zip(found, slopes, strict=True):
            signal = slope[k]
            if signal is None:
                signal = torch.zeros(use.shape, dtype=use.entered.dtype, device=use.entered.device)
            blocks = {} if rule is None else rule(signal)
            silent.update(name for own, name in use.names.items() if own not in blocks)
            for own, block in blocks.items():
                if own in use.names:
                    quantity.setdefault(use.names[own], []).append(block)
    return [{name: merge(b) for name, b in quantity.items() if name not in silent} for quantity in found]


_POINTWISE: frozenset[type[nn.Module]] = frozenset(
    {
        nn.Identity,
        *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
        *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish),
        *(nn.Tanh, nn.Tanhshrink, nn.Hardtanh, nn.Sigmoid, nn.LogSigmoid, nn.Hardsigmoid, nn.Softplus),
        *(nn.Softsign, nn.Softshrink, nn.Hardshrink, nn.Threshold),
        *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
    }
)
_RULED: frozenset[type[nn.Module]] = frozenset(
    {nn.Linear, nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm}
)


def surely_alone(model: nn.Module) -> bool:
    """Whether the structure of the model alone shows that every layer acts on samples apart.

    It does for chains of ``nn.Sequential`` of plain layers in evaluation mode, without hooks or replaced methods.
    False means that it is not obvious.

    Example:
        >>> surely_alone(nn.Sequential(nn.Linear(2, 2), nn.Tanh()))
        True
    """
    for layer in model.modules():
        kind = type(layer)
        plain = (
            kind is nn.Sequential
            or kind in _POINTWISE
            or kind in _RULED
            or (kind is nn.Flatten and layer.start_dim == 1)
            or (isinstance(layer, nn.Unflatten) and isinstance(layer.dim, int) and layer.dim > 0)
            or (isinstance(layer, nn.LayerNorm | nn.RMSNorm) and len(layer.normalized_shape) == 1)
        )
        touched = layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__
        if not plain or touched:
            return False
    return True


def call_with(model: nn.Module, values: dict[str, Tensor], x: Any) -> Any:
    """Call the model with other parameters, named as ``named_parameters()`` names them.

    A shared parameter is replaced wherever it occurs, each place once: a module that is registered twice
    must not be swapped twice, or ``functional_call`` leaves the replacement behind.
    """
    if isinstance(model, nn.DataParallel | torch.jit.ScriptModule):
        raise UnsupportedError(
            f"the model is a {type(model).__name__}, which cannot be called with other parameters: give the module "
            "that was wrapped or compiled (model.module of nn.DataParallel)"
        )
    names = {id(p): name for name, p in model.named_parameters()}
    places = {}
    for prefix, module in model.named_modules():  # each module once
        for own, p in module._parameters.items():
            if p is not None and names.get(id(p)) in values:
                places[f"{prefix}.{own}" if prefix else own] = values[names[id(p)]]
    args, kwargs = (x, {}) if isinstance(x, tuple) else ((), x) if isinstance(x, dict) else ((x,), {})
    return functional_call(model, places, args, kwargs, tie_weights=False)


def cut(tree: Any, start: int, stop: int) -> Any:
    """Samples from start to stop of every tensor of a tree."""
    if isinstance(tree, Tensor):
        return tree[start:stop]
    return _pytree.tree_map(lambda leaf: leaf[start:stop] if isinstance(leaf, Tensor) else leaf, tree)


def vmapped(
    model: nn.Module, values: Mapping[str, Tensor], loss: Loss, x: Any, y: Any, names: Sequence[str]
) -> dict[str, Dense]:
    """Gradients of the loss of each sample in the named parameters, through ``torch.func.vmap``.

    Raises:
        UnsupportedError: the model cannot be vmapped.
    """
    fixed = {name: value.detach() for name, value in values.items() if name not in names}
    free = {name: values[name].detach() for name in names}

    def value(free: dict[str, Tensor], x_one: Any, y_one: Any) -> Tensor:
        x_one, y_one = (
            _pytree.tree_map(lambda leaf: leaf[None] if isinstance(leaf, Tensor) else leaf, tree)
            for tree in (x_one, y_one)
        )
        return loss(call_with(model, fixed | free, x_one), y_one).reshape(())

    def axes(tree: Any) -> Any:
        return _pytree.tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, tree)

    step = max(1, _VMAP_ROOM // sum(value.numel() for value in free.values()))

    def run(repeat: bool) -> list[dict[str, Tensor]]:
        pieces = []
        for at in range(0, count_samples(x), step):
            xs, ys = cut(x, at, at + step), cut(y, at, at + step)
            given = {k: v.expand(count_samples(xs), *v.shape) for k, v in free.items()} if repeat else free
            each: Callable[..., dict[str, Tensor]] = vmap(
                grad(value), (0 if repeat else None, axes(xs), axes(ys)), randomness="different"
            )
            pieces.append(each(given, xs, ys))
        return pieces

    try:
        try:
            pieces = run(repeat=False)
        except RuntimeError:
            # a layer that writes into a buffer it made from the weights (nn.LSTM does) needs them a sample each
            pieces = run(repeat=True)
    except (RuntimeError, NotImplementedError) as error:
        raise UnsupportedError(
            f"the gradient of each sample in {names[0]!r} can be had neither from layer inputs nor by "
            f"torch.func.vmap ({str(error).splitlines()[0]}): choose other parameters with params=[...]"
        ) from error
    return {name: Dense(torch.cat([piece[name].flatten(1) for piece in pieces])) for name in names}
