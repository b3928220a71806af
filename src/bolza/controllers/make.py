"""Controllers by name, for a run of known length."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import lr_scheduler

from bolza.controllers.policy_scheduler import PolicyScheduler
from bolza.controllers.stationarity_annealing import StationarityAnnealing
from bolza.core.errors import ArgumentError

__all__ = ["NAMES", "make"]

NAMES = ("constant", "cosine", "linear", "onecycle", "stationarity")
"""Names that :func:`make` knows."""


def make(name: str, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """A controller of the learning rate for a run of ``steps`` steps, to be stepped after each update.

    Args:
        name: ``'constant'``; ``'cosine'`` and ``'linear'``, from the optimizer's rate down to 0;
            ``'onecycle'``, up to the optimizer's rate and down again; ``'stationarity'``, divided by ten
            whenever the run is stationary, see :class:`StationarityAnnealing`, looked at ten times a run.
        optimizer: its learning rates are the reference.
        steps: length of the run.

    Returns:
        A torch scheduler or a :class:`PolicyScheduler`.

    Raises:
        ArgumentError: the name is not known, or ``steps`` is not positive.

    Example:
        >>> optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)
        >>> type(make("cosine", optimizer, 100)).__name__
        'CosineAnnealingLR'
    """
    if name not in NAMES:
        raise ArgumentError(f"controller {name!r} is not known: choose one of {', '.join(NAMES)}")
    if steps < 1:
        raise ArgumentError(f"steps={steps} must be at least 1")
    if name == "constant":
        return lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)
    if name == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    if name == "linear":
        return lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps)
    if name == "onecycle":
        peaks = [float(group["lr"]) for group in optimizer.param_groups]
        return lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=steps + 1, cycle_momentum=False)
    blocks = StationarityAnnealing.blocks
    window = max(1, steps // (10 * blocks)) * blocks
    return PolicyScheduler(optimizer, StationarityAnnealing(window=window))
