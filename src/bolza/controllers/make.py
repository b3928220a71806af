"""Controllers by name, for a run of known length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler

from bolza.controllers.policy_scheduler import PolicyScheduler
from bolza.controllers.stationarity_annealing import StationarityAnnealing
from bolza.core.errors import ArgumentError

__all__ = ["NAMES", "make"]

NAMES: dict[str, str] = {
    "constant": "the optimizer's own rate",
    "cosine": "half a cosine from the optimizer's rate to 0",
    "linear": "a straight line from the optimizer's rate to 0",
    "onecycle": "up to the optimizer's rate and down again",
    "power": "one over the square root of the steps, after a tenth of the run",
    "signal": "kept until the loss has halved, then one over the steps",
    "stationarity": "divides the rate by ten whenever the run has become stationary",
    "csgd": "scales every entry of an update by what its curvature and noise allow",
    "csgd-layer": "the same with one factor a layer",
    "csgd-global": "the same with one factor in all, written to the rate",
    "cmsgd": "sets the momentum of every entry by what its curvature and noise allow",
    "cmsgd-layer": "the same with one momentum a layer",
    "cmsgd-global": "the same with one momentum in all",
    "optimal": "plans the rate to the end from measured curvature and noise, and plans again",
    "stability": "keeps the rate below half the limit that the largest curvature sets",
    "hypergradient": "moves the rate along its own gradient, one step ahead",
    "hypergradient-window": "the same over some fifty steps, with a Hessian product a step",
    "batch-size": "grows the batch where c-SGD would lower the rate",
}
"""What :func:`make` knows: names, and what each does."""

_WINDOW = 50


@dataclass(frozen=True)
class _Run:
    """What a controller may need to know of a run."""

    name: str
    optimizer: torch.optim.Optimizer
    steps: int
    model: nn.Module | None
    loss: Any
    data: Any
    batch_size: int | None

    def network(self) -> tuple[nn.Module, Any, tuple[Any, Any]]:
        """Network, loss and training data of the network's kind, for a controller that measures."""
        if self.model is None or self.data is None:
            raise ArgumentError(
                f"controller {self.name!r} measures the network: give model= and data=, and loss= where it is "
                "not that of the data"
            )
        data, loss = self.data, self.loss
        if hasattr(data, "train_x"):
            from bolza.training import default_loss

            first = next(self.model.parameters())
            data = data.to(first.device, first.dtype.to_real())
            loss = loss or default_loss(data.task)
            data = (data.train_x, data.train_y)
        if loss is None:
            raise ArgumentError("loss is None, which only a bolza.data.Dataset can replace: give loss=")
        return self.model, loss, data

    def samples(self) -> int:
        """Samples a step."""
        if self.batch_size is None:
            raise ArgumentError(f"controller {self.name!r} needs the samples of a step: give batch_size=")
        return self.batch_size


def _onecycle(run: _Run) -> Any:
    peaks = [float(group["lr"]) for group in run.optimizer.param_groups]
    return lr_scheduler.OneCycleLR(run.optimizer, peaks, total_steps=run.steps + 1, cycle_momentum=False)


def _stationarity(run: _Run) -> Any:
    blocks = StationarityAnnealing.blocks
    window = max(1, run.steps // (10 * blocks)) * blocks
    return PolicyScheduler(run.optimizer, StationarityAnnealing(window=window))


def _power(run: _Run) -> Any:
    from bolza.controllers.schedules import PowerDecay, SignalDecay

    width = max(1.0, run.steps / 10)
    if run.name == "signal":
        return PolicyScheduler(run.optimizer, SignalDecay(width=width))
    return PolicyScheduler(run.optimizer, PowerDecay(0.5, start=run.steps // 10, width=width))


def _csgd(run: _Run) -> Any:
    from bolza.controllers.csgd import CSGD

    granularity: Any = run.name.partition("-")[2] or "coordinate"
    return CSGD(run.optimizer, granularity=granularity)


def _cmsgd(run: _Run) -> Any:
    from bolza.controllers.cmsgd import CMSGD

    granularity: Any = run.name.partition("-")[2] or "coordinate"
    return CMSGD(run.optimizer, granularity=granularity)


def _stability(run: _Run) -> Any:
    from bolza.controllers.stability_limit import StabilityLimit

    return StabilityLimit(run.optimizer, *run.network())


def _hypergradient(run: _Run) -> Any:
    from bolza.controllers.online_hypergradient import HyperGradient

    if run.name == "hypergradient":
        return HyperGradient(run.optimizer)
    model, loss, (x, y) = run.network()
    size = run.samples()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(
        x.device
    )  # data may be sorted
    batches = [(x[rows], y[rows]) for rows in order.split(size) if len(rows) == min(size, len(x))]
    return HyperGradient(run.optimizer, model, loss, batches, window=_WINDOW)


def _optimal(run: _Run) -> Any:
    from bolza.controllers.optimal_schedule import OptimalSchedule

    return OptimalSchedule(run.optimizer, *run.network(), steps=run.steps, batch_size=run.samples())


def _batch_size(run: _Run) -> Any:
    from bolza.controllers.batch_size import BatchSizeController

    return BatchSizeController(run.optimizer)


_MAKERS: dict[str, Callable[[_Run], Any]] = {
    "constant": lambda run: lr_scheduler.ConstantLR(run.optimizer, factor=1.0, total_iters=0),
    "cosine": lambda run: lr_scheduler.CosineAnnealingLR(run.optimizer, T_max=run.steps),
    "linear": lambda run: lr_scheduler.LinearLR(
        run.optimizer, start_factor=1.0, end_factor=0.0, total_iters=run.steps
    ),
    "onecycle": _onecycle,
    "power": _power,
    "signal": _power,
    "stationarity": _stationarity,
    "csgd": _csgd,
    "csgd-layer": _csgd,
    "csgd-global": _csgd,
    "cmsgd": _cmsgd,
    "cmsgd-layer": _cmsgd,
    "cmsgd-global": _cmsgd,
    "optimal": _optimal,
    "stability": _stability,
    "hypergradient": _hypergradient,
    "hypergradient-window": _hypergradient,
    "batch-size": _batch_size,
}


def make(
    name: str,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    model: nn.Module | None = None,
    loss: Any = None,
    data: Any = None,
    batch_size: int | None = None,
) -> Any:
    """A controller by name for a run of ``steps`` steps, to be stepped after each update.

    Args:
        name: one of :data:`NAMES`, which says what each does.
        optimizer: its learning rates are the reference.
        steps: length of the run.
        model: the network, for controllers that measure it.
        loss: (outputs, targets) → scalar; by default that of the task of ``data``.
        data: a :class:`bolza.data.Dataset` or a pair (x, y), for controllers that measure the network.
        batch_size: samples a step, for controllers that weigh the noise of one.

    Returns:
        A torch scheduler or a :class:`Controller`.

    Raises:
        ArgumentError: the name is not known, ``steps`` is not positive, or the controller needs what was not given.

    Example:
        >>> optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)
        >>> type(make("cosine", optimizer, 100)).__name__
        'CosineAnnealingLR'
    """
    if name not in NAMES:
        raise ArgumentError(f"controller {name!r} is not known: choose one of {', '.join(NAMES)}")
    if steps < 1:
        raise ArgumentError(f"steps={steps} must be at least 1")
    return _MAKERS[name](_Run(name, optimizer, steps, model, loss, data, batch_size))
