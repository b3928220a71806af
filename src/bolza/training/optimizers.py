"""Optimizers by name, class, function or instance; losses by task."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.core.errors import ArgumentError, UserCodeError

__all__ = ["default_loss", "make_optimizer", "optimizer_names"]

OptimizerSpec = (
    str | type[torch.optim.Optimizer] | Callable[..., torch.optim.Optimizer] | torch.optim.Optimizer
)


def _choices() -> dict[str, type[torch.optim.Optimizer]]:
    """Lower-case name → class: all of torch.optim and, where that room exists, all of bolza.optim."""
    modules = [torch.optim]
    if find_spec("bolza.optim") is not None:
        # by name: the run loop serves the optimizers without depending on them
        modules.append(import_module("bolza.optim"))
    found = {}
    for module in modules:
        for name in getattr(module, "__all__", dir(module)):
            thing = getattr(module, name, None)
            if isinstance(thing, type) and issubclass(thing, torch.optim.Optimizer):
                found[name.lower()] = thing
    found.pop("optimizer", None)
    return found


def optimizer_names() -> list[str]:
    """Names that :func:`make_optimizer` knows.

    Example:
        >>> {"sgd", "adam", "adamw"} <= set(optimizer_names())
        True
    """
    return sorted(_choices())


def make_optimizer(spec: OptimizerSpec, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """An optimizer for the trainable parameters of a model.

    Args:
        spec: name of a class of ``torch.optim`` or of this library, in any case; a class; a function of the
            parameters; or an optimizer, which is returned as it is. A class or function whose first
            argument is called ``model`` or ``module`` is given the module in place of its parameters.
        model: the network.
        options: ``lr``, ``momentum``, ``weight_decay`` and others; those that are ``None`` are left to the
            optimizer's defaults.

    Returns:
        The optimizer. Classes of torch use their fused or multi-tensor form where there is one.

    Raises:
        ArgumentError: the name is not known, or the optimizer takes no such option.
        UserCodeError: a user's own class or function raised.

    Example:
        >>> make_optimizer("adam", nn.Linear(2, 1), lr=0.1).param_groups[0]["lr"]
        0.1
    """
    given = {key: value for key, value in options.items() if value is not None}
    for key, value in given.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ArgumentError(f"{key}={value} must be a finite number")
    if isinstance(spec, torch.optim.Optimizer):
        if given:
            raise ArgumentError(
                f"{', '.join(given)} and an optimizer instance were both given: set them when making the "
                "optimizer"
            )
        return spec
    build = spec
    if isinstance(spec, str):
        choices = _choices()
        if spec.lower() not in choices:
            raise ArgumentError(
                f"optimizer={spec!r} is not known: choose one of {', '.join(sorted(choices))}"
            )
        build = choices[spec.lower()]
    if not callable(build):
        raise ArgumentError(f"optimizer={spec!r} is not a name, a class, a function or an optimizer")
    label = getattr(build, "__name__", repr(build))
    try:
        arguments = list(inspect.signature(build).parameters.values())
    except (TypeError, ValueError):
        arguments = []
    takes_any = any(a.kind is inspect.Parameter.VAR_KEYWORD for a in arguments)
    names = [a.name for a in arguments]
    unknown = [key for key in given if key not in names]
    if arguments and unknown and not takes_any:
        raise ArgumentError(
            f"optimizer {label} takes no {' and no '.join(unknown)}: leave it out, or choose one that does"
        )
    subject: Any = model if names and names[0] in ("model", "module") else _trainable(model)
    if _is_torch_class(build):
        given |= _fast_form(names, subject)
    try:
        made = build(subject, **given)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"optimizer {label} does not accept its options: {error}") from error
    except Exception as error:
        raise UserCodeError(f"making the optimizer {label} raised {type(error).__name__}: {error}") from error
    if not isinstance(made, torch.optim.Optimizer):
        raise ArgumentError(f"optimizer {label} made a {type(made).__name__}, not a torch.optim.Optimizer")
    return made


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _is_torch_class(build: object) -> bool:
    return isinstance(build, type) and build.__module__.startswith("torch.optim")


def _fast_form(names: list[str], parameters: list[nn.Parameter]) -> dict[str, bool]:
    """The default of torch loops over parameters on a CPU; its other forms are the same update."""
    plain = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    if plain and "fused" in names:
        return {"fused": True}
    return {"foreach": True} if plain and "foreach" in names else {}


def default_loss(task: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of a task: cross-entropy for labels and tokens, mean squared error for values.

    Args:
        task: ``'classification'``, ``'language'`` or ``'regression'``.

    Returns:
        A function (outputs, targets) → scalar.

    Example:
        >>> default_loss("regression")(torch.ones(2, 1), torch.zeros(2, 1))
        tensor(1.)
    """
    if task == "regression":
        return F.mse_loss
    return F.cross_entropy if task == "classification" else _token_cross_entropy


def _token_cross_entropy(scores: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, -2), tokens.flatten())
