"""What a run asks of its arguments before it begins, and how code of the user's that fails is named."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError, BolzaError, UserCodeError

__all__ = [
    "at_least_one",
    "check_loss",
    "check_model",
    "check_seed",
    "count_steps",
    "make_controller",
    "stepping",
    "usable_device",
    "user_call",
]


def at_least_one(name: str, value: int) -> int:
    """Return ``value``, or refuse it by name.

    Example:
        >>> at_least_one("steps", 3)
        3
    """
    try:
        whole = operator.index(value)
    except TypeError as error:
        raise ArgumentError(f"{name}={value!r} is a {type(value).__name__}: give a whole number") from error
    if whole < 1:
        raise ArgumentError(f"{name}={value} must be at least 1")
    return whole


def check_seed(seed: int) -> None:
    """Refuse a seed that torch's generators cannot hold."""
    if not -(2**63) <= seed < 2**63:
        raise ArgumentError(f"seed={seed} has more than 64 bits: choose a smaller number")


def usable_device(device: torch.device | str, asked_as: str | None = None) -> torch.device:
    """The device of that name, tried out; ``asked_as`` is how an error calls the request.

    Example:
        >>> usable_device("cpu")
        device(type='cpu')
    """
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except Exception as error:
        reason = str(error).splitlines()[0].split(",")[0]
        request = asked_as or f"device={str(device)!r}"
        raise ArgumentError(f"{request} cannot be used here ({reason}): try 'cpu'") from error
    return found


def count_steps(steps: int | None, epochs: float | None, steps_per_epoch: int) -> int:
    """Length of a run in steps, from either way to say it; 20 epochs where neither is given.

    Example:
        >>> count_steps(None, 0.5, 10)
        5
    """
    if steps is not None and epochs is not None:
        raise ArgumentError(f"steps={steps} and epochs={epochs} were both given: leave one out")
    if steps is not None:
        return at_least_one("steps", steps)
    epochs = 20 if epochs is None else epochs
    if not 0 < epochs < math.inf:
        raise ArgumentError(f"epochs={epochs} must be positive and finite: it is the passes through the data")
    return max(1, round(epochs * steps_per_epoch))


def check_model(model: nn.Module) -> nn.Parameter:
    """Give the first parameter to train, or say why there is none that could be trained."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}: give a torch.nn.Module")
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ArgumentError(
            f"the model {type(model).__name__} has no parameter that requires a gradient: there is nothing "
            "to train; call requires_grad_(True) on what should learn"
        )
    for name, p in model.named_parameters():
        if p.is_meta:
            raise ArgumentError(
                f"the parameter {name!r} is on the meta device, where tensors hold no values: make the model "
                "outside torch.device('meta')"
            )
        if p.dtype == torch.float16 and p.device.type == "cpu":
            raise ArgumentError(
                f"the parameter {name!r} is float16 on the CPU, where its range is too small to train in: "
                "use dtype=torch.float32 or torch.bfloat16, or a CUDA device"
            )
    return trainable[0]


def check_loss(loss: object) -> None:
    """Refuse what a loss function returned unless backward can start from it."""
    if not isinstance(loss, Tensor) or loss.ndim > 0 or not loss.is_floating_point():
        found = f"type {type(loss).__name__}"
        if isinstance(loss, Tensor):
            found = f"shape {tuple(loss.shape)}" if loss.ndim else f"dtype {loss.dtype}"
        raise ArgumentError(
            f"the loss has {found}, but must be a scalar tensor of a real floating type: take the mean over "
            "samples, for example with reduction='mean'"
        )
    if not loss.requires_grad:
        raise ArgumentError(
            "the loss does not depend on any parameter that requires a gradient: look for detach(), "
            "no_grad() or item() in the model or the loss"
        )


def make_controller(
    controller: Any, optimizer: torch.optim.Optimizer, steps: int, name: str = "controller"
) -> Any:
    """The controller (or callback, as ``name`` says) itself, or what the function (optimizer, steps) makes."""
    if controller is None or (hasattr(controller, "step") and not isinstance(controller, type)):
        return controller
    if not callable(controller):
        raise ArgumentError(
            f"{name}={controller!r} has no step() and is no function (optimizer, steps): use "
            + ("bolza.controllers.make or a torch scheduler" if name == "controller" else "bolza.Watch")
        )
    return controller(optimizer, steps)


@contextmanager
def stepping(role: str, one: Any, step: int) -> Iterator[None]:
    """Name the controller or callback whose step or log raises, and the step."""
    try:
        yield
    except (BolzaError, MemoryError):
        raise
    except Exception as error:
        text = (str(error).strip().splitlines() or ["no message"])[0].rstrip(".")
        raise UserCodeError(
            f"the {role} {type(one).__name__} raised {type(error).__name__} at step {step}: {text}; it is called as "
            "step(loss=…) after every update, and what its log() gives must be numbers"
        ) from error


def user_call(what: str, call: Callable[[], Any], x: Tensor, step: int = 0) -> Any:
    """Run the model or the loss; name what it raises, the inputs it was given and the step."""
    try:
        return call()
    except (BolzaError, MemoryError):
        raise
    except Exception as error:
        text = (str(error).strip().splitlines() or ["no message"])[0].rstrip(".")
        when = f" at step {step}" if step else ""
        kind = str(x.dtype).removeprefix("torch.")
        remedy = "give outputs and targets that it takes" if what == "the loss" else _remedy(x, text, kind)
        raise UserCodeError(
            f"{what} raised {type(error).__name__}{when} on {kind} inputs of shape {tuple(x.shape)}: {text}; {remedy}"
        ) from error


def _remedy(x: Tensor, text: str, kind: str) -> str:
    if "dtype" in text and not x.is_floating_point():
        return f"convert the inputs, which are {kind}, with x.float()"
    return "give data of the shape and type that its forward expects"
