"""One member of a population: everything it is between two rounds, as plain data, and what a round does to it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError
from bolza.training import BatchOrder, make_optimizer

__all__ = ["Job", "Member", "evaluate", "new_member", "train_member"]

Member = dict[str, Any]
"""``model``, ``optimizer`` and ``order`` (their states), ``hyper`` (value by name)."""

_CHUNK = 2048


@dataclass(frozen=True)
class Job:
    """What all members share; it travels to the processes that train them."""

    make_model: Callable[[], nn.Module]
    optimizer: Any
    loss: Callable[[Any, Tensor], Tensor]
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    batch_size: int
    seed: int

    def model(self, state: Mapping[str, Any] | None = None) -> nn.Module:
        """A network of the kind, with the given state."""
        with forked(None if state is None else 0):
            model = self.make_model()
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"make_model() returned a {type(model).__name__}: return a new nn.Module")
        if state is not None:
            model.load_state_dict(state)
        return model


def forked(seed: int | None) -> Any:
    """Random numbers of their own; with no seed, those that are there already."""
    if seed is None:
        return contextlib.nullcontext()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield

    return context()


def derived_seed(*numbers: int) -> int:
    """A seed from several numbers: neighbours have nothing in common."""
    value = 0x9E3779B97F4A7C15
    for number in numbers:
        value = (value ^ (number + 0x632BE59BD9B4E019)) * 0xBF58476D1CE4E5B9 % 2**64
        value ^= value >> 31
    return value % 2**63


def new_member(job: Job, index: int, hyper: Mapping[str, float]) -> Member:
    """A member before its first step: weights, order of data and random numbers of its own."""
    with forked(derived_seed(job.seed, index)):
        model = job.model()
    order = BatchOrder(*job.train, job.batch_size, derived_seed(job.seed, index, 1) % 2**31)
    return {"model": _copied(model), "optimizer": None, "order": order.state_dict(), "hyper": dict(hyper)}


def set_hyper(
    optimizer: torch.optim.Optimizer, values: Mapping[str, float], fresh: list[dict[str, Any]]
) -> None:
    """Write hyper-parameters to all groups, in the ratios that the groups had when they were new."""
    for name, value in values.items():
        if not isinstance(fresh[0].get(name), int | float | Tensor) or isinstance(fresh[0][name], bool):
            raise ArgumentError(
                f"hyper has {name!r}, which is no number in the groups of {type(optimizer).__name__}: they have "
                + ", ".join(
                    k for k, v in fresh[0].items() if isinstance(v, int | float) and not isinstance(v, bool)
                )
            )
        first = float(fresh[0][name])
        for group, new in zip(optimizer.param_groups, fresh, strict=True):
            scaled = value * float(new[name]) / first if first > 0 else value
            if isinstance(group[name], Tensor):
                group[name].fill_(scaled)
            else:
                group[name] = scaled


def train_member(job: Job, member: Member, index: int, round_: int, steps: int) -> tuple[Member, float]:
    """Steps of gradient descent, and the validation loss after them; inf where a loss was not finite."""
    model = job.model(member["model"])
    parameter = next(model.parameters())
    optimizer = make_optimizer(job.optimizer, model)
    fresh = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    if member["optimizer"] is not None:
        optimizer.load_state_dict(member["optimizer"])
    set_hyper(optimizer, member["hyper"], fresh)
    x, y = (placed(part, parameter) for part in job.train)
    order = BatchOrder(x, y, job.batch_size, 0)
    order.load_state_dict(member["order"])
    model.train()
    with forked(derived_seed(job.seed, index, round_, 2)), torch.enable_grad():
        lost = any(not _step(job, model, optimizer, *order.next()) for _ in range(steps))
    loss = math.inf if lost else evaluate(job, model, job.validation)[0]
    state = {
        "model": _copied(model),
        "optimizer": optimizer.state_dict(),
        "order": order.state_dict(),
        "hyper": dict(member["hyper"]),
    }
    return state, loss


def _step(job: Job, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> bool:
    optimizer.zero_grad()
    loss = job.loss(model(x), y)
    loss.backward()
    if not math.isfinite(loss.item()):
        return False
    values = [loss.detach()]

    def again() -> Tensor:  # for optimizers that ask more than once; the first answer is there already
        if values:
            return values.pop()
        optimizer.zero_grad()
        value = job.loss(model(x), y)
        value.backward()
        return value

    optimizer.step(again)  # type: ignore[arg-type]
    return True


@torch.no_grad()
def evaluate(job: Job, model: nn.Module, data: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Mean loss and, for classes, the share of right answers (else nan), in evaluation mode."""
    mode = model.training
    model.eval()
    parameter = next(model.parameters())
    total, right, count = 0.0, 0, 0
    for x, y in zip(data[0].split(_CHUNK), data[1].split(_CHUNK), strict=True):
        x, y = placed(x, parameter), placed(y, parameter)
        outputs = model(x)
        total += float(job.loss(outputs, y)) * len(y)
        if not y.is_floating_point() and isinstance(outputs, Tensor) and outputs.ndim == y.ndim + 1:
            right += int((outputs.argmax(-1) == y).sum())
            count += y.numel()
    model.train(mode)
    loss = total / max(1, len(data[1]))
    return loss if math.isfinite(loss) else math.inf, right / count if count else math.nan


def placed(values: Tensor, like: Tensor) -> Tensor:
    """On the device and, for floating numbers, in the dtype of a parameter."""
    return values.to(like.device, like.dtype if values.is_floating_point() else values.dtype)


def _copied(model: nn.Module) -> dict[str, Any]:
    return {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in model.state_dict().items()}
