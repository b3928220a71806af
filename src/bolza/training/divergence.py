"""Where a number first stopped being finite."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bolza.ops.replay import frozen_statistics

__all__ = ["first_nonfinite_gradient", "first_nonfinite_layer", "first_nonfinite_state"]


def first_nonfinite_state(model: nn.Module, buffers: bool = True) -> str | None:
    """Name of the first parameter, or buffer if they are asked for, that holds nan or inf.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> _ = model.weight.data.fill_(float("inf"))
        >>> first_nonfinite_state(model)
        'weight'
    """
    return _first((*model.named_parameters(), *(model.named_buffers() if buffers else ())))


def first_nonfinite_gradient(model: nn.Module) -> str | None:
    """Name of the parameter nearest to the output whose gradient holds nan or inf.

    Backward runs from the output, so this is where the number went wrong first.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> for p in model.parameters():
        ...     p.grad = torch.full_like(p, float("nan"))
        >>> first_nonfinite_gradient(model)
        '1.bias'
    """
    return _first(
        (name, p.grad) for name, p in reversed(list(model.named_parameters())) if p.grad is not None
    )


def first_nonfinite_layer(model: nn.Module, x: Tensor) -> str | None:
    """Name of the first layer, in order of execution, whose output holds nan or inf for inputs ``x``.

    The network is evaluated once more, without a trace left in its buffers. With noise inside the
    network (dropout), set the random state of the first evaluation before the call.

    Args:
        model: the network, in the mode of the failing step.
        x: the inputs of that step.

    Returns:
        Name as in ``model.named_modules()``; ``None`` if every output is finite.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
        >>> _ = model[0].bias.data.fill_(float("nan"))
        >>> first_nonfinite_layer(model, torch.zeros(1, 2))
        '0'
    """
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and any(not _finite(t) for t in _tensors(output)):
                found.append(name)

        return hook

    # leaves first: a container ends after its parts, so the part is noted before it
    handles = [m.register_forward_hook(watch(name or type(m).__name__)) for name, m in model.named_modules()]
    try:
        with torch.no_grad(), frozen_statistics(model):
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _tensors(output: Any) -> Iterable[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _first(named: Iterable[tuple[str, Tensor]]) -> str | None:
    return next((name for name, tensor in named if not _finite(tensor)), None)
