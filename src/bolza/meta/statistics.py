r"""Batch normalisation when every task is a batch of its own.

    support:  m = mean x, v = var x;    query:  y = (x − m)/√(v + ε) · w + b      with m, v of the same task's support

Running averages over tasks are those of no task, and the statistics of a query set make each prediction depend on the
other queries. Here the statistics are the task's own, from its support set, as functions of the adapted parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bolza.core.errors import UnsupportedError

__all__ = ["collected", "fix", "using"]

Seen = dict[nn.Module, list[tuple[Tensor, Tensor]]]
_BatchNorm = nn.modules.batchnorm._BatchNorm


def _normalise(layer: Any, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    shape = (1, -1) + (1,) * (x.ndim - 2)
    out = (x - mean.reshape(shape)) * (var.reshape(shape) + layer.eps).rsqrt()
    if layer.weight is not None:
        out = out * layer.weight.reshape(shape)
    return out if layer.bias is None else out + layer.bias.reshape(shape)


@contextmanager
def _replaced(model: nn.Module, make: Any) -> Iterator[None]:
    """Give the layers that normalise by their batch another forward."""
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None)
    ]
    for layer in layers:
        layer.forward = make(layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward")


@contextmanager
def collected(model: nn.Module) -> Iterator[Seen]:
    """Note the mean and the variance by which each layer normalises, call by call."""
    seen: Seen = {}

    def make(layer: nn.Module) -> Any:
        def forward(x: Tensor) -> Tensor:
            axes = [0, *range(2, x.ndim)]
            var, mean = torch.var_mean(x, axes, correction=0)
            seen.setdefault(layer, []).append((mean, var))
            return _normalise(layer, x, mean, var)

        return forward

    with _replaced(model, make):
        yield seen


@contextmanager
def using(model: nn.Module, seen: Seen) -> Iterator[None]:
    """Normalise by what was noted, call by call."""
    left = {layer: iter(pairs) for layer, pairs in seen.items()}

    def make(layer: nn.Module) -> Any:
        return lambda x: _normalise(layer, x, *next(left[layer]))

    with _replaced(model, make):
        yield


def fix(names: dict[nn.Module, str], network: nn.Module, seen: Seen) -> None:
    """Make what was noted the running averages of a copy of the network, whose layers then use them.

    Raises:
        UnsupportedError: a layer was called more than once, with statistics of each call.
    """
    for layer, pairs in seen.items():
        if len(pairs) > 1:
            raise UnsupportedError(
                f"the batch normalisation {names[layer]!r} is called {len(pairs)} times, with other statistics each "
                "time, which one network cannot hold: use predict, or a layer for each call"
            )
        own: Any = network.get_submodule(names[layer])
        for name, value in zip(("running_mean", "running_var"), pairs[0], strict=True):
            own._buffers[name] = value.detach().clone()
        own.track_running_stats = True
        own.eval()
