"""What a `Watch` can be given, refused by name where it makes no sense."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError
from bolza.training import default_loss

__all__ = ["checked_arguments", "checked_loss"]


def checked_arguments(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor] | None,
    data: Any,
    optimizer: torch.optim.Optimizer | None,
    whole: Mapping[str, int | None],
    samples: int,
    level: float,
    budget: float,
) -> Callable[[Any, Any], Tensor]:
    """The loss, given or that of the data.

    Raises:
        ArgumentError: an argument makes no sense.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}: give the torch.nn.Module that is trained")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ArgumentError(
            f"optimizer is a {type(optimizer).__name__}: give the torch.optim.Optimizer of the run"
        )
    if data is None:
        raise ArgumentError("data is None: give the training data, on a part of which the network is probed")
    if loss is None:
        if not hasattr(data, "task"):
            raise ArgumentError(
                "loss is None, which only a bolza.data.Dataset can replace: give loss(outputs, targets)"
            )
        loss = default_loss(data.task)
    for name, value in whole.items():
        if value is not None and value < 1:
            raise ArgumentError(f"{name}={value} must be at least 1")
    if samples < 2:
        raise ArgumentError(
            f"samples={samples} is too few: covariances need at least 2, error bars 32 or more"
        )
    if not 0 < level < 1:
        raise ArgumentError(f"level={level} must lie between 0 and 1: it is the probability of a false alarm")
    if not 0 < budget < math.inf:
        raise ArgumentError(
            f"budget={budget} must be positive: it is a share of the training time, such as 0.1"
        )
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
        raise ArgumentError("model has parameters without a value yet: run it once first")
    return loss


def checked_loss(loss: float | Tensor) -> float | Tensor:
    """The loss of a step, one number, without its graph.

    Raises:
        ArgumentError: it is something else.

    Example:
        >>> checked_loss(torch.tensor([2.0], requires_grad=True))
        tensor(2.)
    """
    if isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_complex():
        return loss.detach().reshape(())
    try:
        return float(loss)
    except (TypeError, ValueError, RuntimeError):
        shape = (
            f"of the shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        )
        raise ArgumentError(
            f"loss is {shape}: give the one number that the step reduced, or nothing"
        ) from None
