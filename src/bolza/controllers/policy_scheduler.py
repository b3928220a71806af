"""A policy worn like a torch scheduler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bolza.controllers.controller import Controller
from bolza.core import Policy
from bolza.core.errors import ArgumentError

__all__ = ["MEASUREMENTS", "PolicyScheduler"]


def _square_norm(tensors: list[Tensor]) -> float:
    """Σ‖·‖², accumulated in float64."""
    return sum(float(n) ** 2 for n in torch._foreach_norm(tensors)) if tensors else 0.0


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.detach() for group in optimizer.param_groups for p in group["params"]]


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


MEASUREMENTS: dict[str, Callable[[torch.optim.Optimizer], float]] = {
    "parameter_square_norm": lambda optimizer: _square_norm(_parameters(optimizer)),
    "gradient_square_norm": lambda optimizer: _square_norm(_gradients(optimizer)),
}
"""What :class:`PolicyScheduler` measures itself, if the policy lists it in its attribute ``observes``."""


class PolicyScheduler(Controller):
    """Apply a feedback law to the hyper-parameters of an optimizer.

    Call ``step`` after ``optimizer.step()``. The policy observes what is passed to ``step``, the hyper-parameters of
    the first parameter group with a rate other than 0 under their own names (``lr``, ``momentum``, …), and the
    measurements that it lists in its attribute ``observes``. Its action is written to every group; a new
    ``lr`` keeps the ratios between groups.

    Args:
        optimizer: any ``torch.optim.Optimizer``.
        policy: a :class:`bolza.core.Policy`.

    Raises:
        ArgumentError: the policy lacks ``init`` or ``update``, or observes what cannot be measured.

    Example:
        >>> class Halve:
        ...     def init(self):
        ...         return {}
        ...     def update(self, state, observation):
        ...         return state, {"lr": observation["lr"] / 2}
        >>> optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=1.0)
        >>> scheduler = PolicyScheduler(optimizer, Halve())
        >>> scheduler.step(loss=0.3)
        {'lr': 0.5}
        >>> optimizer.param_groups[0]["lr"]
        0.5
    """

    def __init__(self, optimizer: torch.optim.Optimizer, policy: Policy[Any]) -> None:
        if not isinstance(policy, Policy):
            raise ArgumentError(f"policy={policy!r} has no init() and update(state, observation)")
        unknown = [name for name in getattr(policy, "observes", ()) if name not in MEASUREMENTS]
        if unknown:
            raise ArgumentError(
                f"the policy observes {unknown[0]!r}, which is not measured: choose among "
                f"{', '.join(MEASUREMENTS)}, or pass it to step()"
            )
        super().__init__(optimizer)
        self.policy = policy
        self.state = policy.init()

    def decide(self, observation: Mapping[str, Any]) -> dict[str, float]:
        """Ask the policy."""
        seen = {
            key: value for key, value in self.optimizer.param_groups[self.leader].items() if key != "params"
        }
        for name in getattr(self.policy, "observes", ()):
            seen[name] = MEASUREMENTS[name](self.optimizer)
        if self.batches is not None:
            seen["batch_size"] = self.batches.batch_size
        self.state, action = self.policy.update(self.state, seen | dict(observation))
        return action

    def log(self) -> dict[str, float]:
        """What the policy's own ``log(state)`` gives, if it has one."""
        log = getattr(self.policy, "log", None)
        return {} if log is None else log(self.state)

    def memory(self) -> Any:
        """State of the policy."""
        return self.state

    def load_memory(self, memory: Any) -> None:
        """Take up a state of the policy."""
        self.state = memory
