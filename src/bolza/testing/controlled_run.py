"""What the contract of a controller runs: a small network, its optimizer and its batches."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bolza.data import Dataset
from bolza.testing.clauses import ContractError
from bolza.training import BatchOrder

__all__ = [
    "LONGEST",
    "OPTIMIZERS",
    "ControlledRun",
    "finite",
    "hooks",
    "leaves",
    "remembered",
    "through_file",
]

LONGEST = 1024
"""Entries of a list in a state: what a record of a thousand points may hold."""

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "SGD with momentum": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "SGD with a tensor as lr": lambda params: torch.optim.SGD(params, lr=torch.tensor(0.1), foreach=False),
}


class _Net(nn.Module):
    """A small network with a normalisation, dropout, and a shared, a frozen and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.middle = nn.Linear(6, 6)
        self.again = nn.Linear(6, 6)
        self.again.weight = self.middle.weight
        self.drop = nn.Dropout(0.2)
        self.last = nn.Linear(6, 3)
        self.unused = nn.Parameter(torch.ones(2))
        self.first.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.first(x)))
        x = torch.tanh(self.again(torch.tanh(self.middle(x))))
        return self.last(self.drop(x))


class ControlledRun:
    """A run of one network, its optimizer, and a controller made by the factory under test."""

    def __init__(
        self,
        factory: Callable[..., Any],
        takes_model: bool,
        optimizer: Callable[[Any], torch.optim.Optimizer] = OPTIMIZERS["SGD with momentum"],
        *,
        dtype: torch.dtype = torch.float32,
        groups: bool = False,
        set_to_none: bool = True,
        loss_as: Callable[[Tensor], Any] = Tensor.item,
        weights: int = 0,
    ) -> None:
        draw = torch.Generator().manual_seed(weights)
        self.net = _Net().to(dtype)
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=draw, dtype=dtype))
        draw.manual_seed(7)
        x, y = torch.randn(32, 4, generator=draw, dtype=dtype), torch.arange(32) % 3
        self.data = Dataset(x, y, x[:8], y[:8], "classification", num_classes=3)
        self.order = BatchOrder(x, y, 8, seed=0)
        self.loss = nn.functional.cross_entropy
        self.set_to_none, self.loss_as = set_to_none, loss_as
        params: Any = self.net.parameters()
        if groups:
            last = list(self.net.last.parameters())
            rest = [p for p in self.net.parameters() if all(p is not q for q in last)]
            params = [{"params": rest}, {"params": last}]
        self.optimizer = optimizer(params)
        if groups:
            self.optimizer.param_groups[1]["lr"] = 0.5 * self.optimizer.param_groups[0]["lr"]
        self.hooks = hooks(self)
        torch.manual_seed(1)
        rest_of_run = (self.net, self.loss, self.data) if takes_model else ()
        self.controller = factory(self.optimizer, *rest_of_run)
        if hasattr(self.controller, "attach_batches"):
            self.controller.attach_batches(self.order)

    def backward(self) -> Tensor:
        """Gradient of the next batch, and its loss."""
        x, y = self.order.next()
        self.optimizer.zero_grad(set_to_none=self.set_to_none)
        loss = self.loss(self.net(x), y)
        loss.backward()
        return loss.detach()

    def step(self) -> Any:
        """One step of the loop, the controller last."""
        loss = self.backward()
        self.optimizer.step()
        return self.controller.step(loss=self.loss_as(loss))

    def steps(self, count: int) -> None:
        """So many of them."""
        for _ in range(count):
            self.step()

    def values(self) -> dict[str, Tensor]:
        """Copies of parameters and buffers."""
        return {name: value.detach().clone() for name, value in self.net.state_dict().items()}

    def settings(self) -> list[dict[str, Any]]:
        """The parameter groups without the parameters."""
        groups = self.optimizer.param_groups
        return [{k: v for k, v in group.items() if k != "params"} for group in groups]

    def all(self) -> dict[str, Any]:
        """All that two runs that are the same share."""
        return {
            "parameters": self.values(),
            "settings": self.settings(),
            "batch size": self.order.batch_size,
            "state": self.controller.state_dict(),
        }


def hooks(case: ControlledRun) -> int:
    """Number of hooks on the optimizer, the parameters and the layers."""
    places = [
        *(vars(p).get(name) for p in case.net.parameters() for name in ("_post_accumulate_grad_hooks",)),
        *(p._backward_hooks for p in case.net.parameters()),
        *(v for k, v in vars(case.optimizer).items() if k.endswith("_hooks")),
        *(v for m in case.net.modules() for k, v in vars(m).items() if k.endswith("_hooks")),
    ]
    return sum(len(place) for place in places if place)


def leaves(tree: Any) -> Iterator[Any]:
    """Numbers, tensors and strings of a state; lists too, for their length."""
    if isinstance(tree, Mapping):
        for value in tree.values():
            yield from leaves(value)
        return
    yield tree
    if isinstance(tree, list | tuple):
        for value in tree:
            yield from leaves(value)


def finite(value: Any) -> bool:
    """Whether a leaf holds no infinity and no NaN."""
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    return not isinstance(value, float) or math.isfinite(value)


def remembered(state: Any) -> Any:
    """What the decisions depend on: the state without the record of what was drawn."""
    if isinstance(state, Mapping):
        return {key: value for key, value in state.items() if key != "history"}
    return state


def through_file(state: Any, clause: str) -> Any:
    """What is left of a state after ``torch.save`` and a ``torch.load`` that runs no code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    try:
        return torch.load(file, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ContractError(
            clause, f"state_dict() holds more than tensors, numbers, strings and containers of them: {error}"
        ) from error
