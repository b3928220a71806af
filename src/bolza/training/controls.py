"""The hyper-parameters of a run, noted step after step."""

from __future__ import annotations

from typing import Any

import torch

from bolza.core.history import History
from bolza.training.order import BatchOrder
from bolza.training.run import Run

__all__ = ["ControlRecord", "hyper_parameters"]

_GROUPS = 8  # parameter groups whose learning rates are told apart


def hyper_parameters(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Learning rates of the first groups; momentum and weight decay of the first.

    Args:
        optimizer: any ``torch.optim.Optimizer``; the first of ``betas`` is told as momentum.

    Example:
        >>> weight = torch.ones(1, requires_grad=True)
        >>> hyper_parameters(torch.optim.SGD([weight], lr=0.1, momentum=0.9))
        {'lr': 0.1, 'momentum': 0.9, 'weight_decay': 0.0}
    """
    groups = optimizer.param_groups
    found = {
        "lr" if not i else f"lr_{i}": group["lr"] for i, group in enumerate(groups[:_GROUPS]) if "lr" in group
    }
    first = groups[0]
    if "momentum" in first:
        found["momentum"] = first["momentum"]
    elif isinstance(first.get("betas"), tuple | list):
        found["momentum"] = first["betas"][0]
    if "weight_decay" in first:
        found["weight_decay"] = first["weight_decay"]
    return {name: float(value) for name, value in found.items() if value is not None}


class ControlRecord:
    """Notes into a `Run` what each step was made with.

    Args:
        optimizer: whose hyper-parameters change.
        order: whose batch size may change.
        controller: what changes them; its ``log()`` is noted if it is a `bolza.controllers.Controller`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, order: BatchOrder, controller: Any) -> None:
        self._optimizer, self._order = optimizer, order
        self._log = controller.log if hasattr(controller, "readings") else dict
        self._history = History()
        self._settings: dict[str, float] | None = None

    def before(self, step: int) -> None:
        """Look at the settings of a step that is about to be made."""
        wanted = self._history.wants(step)
        batch = {"batch_size": float(self._order.batch_size)}
        self._settings = hyper_parameters(self._optimizer) | batch if wanted else None

    def after(self, step: int, run: Run) -> None:
        """Note them, and what the controller has to say."""
        if self._settings is None:
            return
        self._history.add(step, {**self._settings, **self._log(), **self._settings})
        run.control_steps, run.controls = self._history.steps, self._history.values

    def resume(self, run: Run) -> None:
        """Go on with what a run has noted."""
        steps = run.control_steps
        stride = steps[-1] - steps[-2] if len(steps) > 1 else 1
        self._history = History(steps, run.controls, stride)
