r"""Tangents of a run in its hyper-parameters, carried through the steps of an optimizer of torch.

A tangent is the derivative of the optimizer's state in one hyper-parameter h: θ̇ = ∂θ/∂h of the parameters, and that of
what the optimizer remembers. With Hθ̇ the Hessian product, one step of SGD, of rate η, momentum μ and decay λ, gives

    ġ = Hθ̇ + λθ̇,   v̇ ← μv̇ + ġ,   θ̇ ← θ̇ − ηv̇

and in h's own coordinate what the step gains from h directly: d = θ' − θ to θ̇ for log η, (1 − μ)μv to v̇ for logit μ,
λθ to ġ for log λ. Adam's step is differentiated in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bolza.core.errors import UnsupportedError

__all__ = ["Part", "Tangent", "check_optimizer", "inner", "norm"]


def inner(x: Sequence[Tensor], y: Sequence[Tensor]) -> float:
    """Inner product over lists of tensors."""
    return _total([torch.dot(a.reshape(-1), b.reshape(-1)) for a, b in zip(x, y, strict=True)])


def norm(x: Sequence[Tensor]) -> float:
    """Euclidean norm over a list of tensors."""
    found = list(torch._foreach_norm(list(x))) if x else []
    return math.hypot(*(v.item() for v in found)) if _on_cpu(found) else float(torch.stack(found).norm())


def _total(values: list[Tensor]) -> float:
    # one by one is fastest where nothing has to be waited for
    return sum(v.item() for v in values) if _on_cpu(values) else float(torch.stack(values).sum())


def _on_cpu(values: list[Tensor]) -> bool:
    return not values or values[0].device.type == "cpu"


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer whose step has no tangent here.

    Raises:
        UnsupportedError: it is none of SGD, Adam, AdamW, or uses dampening or amsgrad.
    """
    if not isinstance(optimizer, torch.optim.SGD | torch.optim.Adam):
        raise UnsupportedError(
            f"{type(optimizer).__name__} has no tangent: use SGD, Adam or AdamW, or follow the learning rate alone and "
            "pass no model"
        )
    for group in optimizer.param_groups:
        for name in ("dampening", "amsgrad"):
            if group.get(name):
                raise UnsupportedError(f"{name}={group[name]!r} has no tangent: leave it out")


@dataclass
class Part:
    """The parameters of one group in one step, with what the step did to them."""

    group: dict[str, Any]
    state: Any
    lr: float
    parameters: list[Tensor]
    before: list[Tensor]
    gradient: list[Tensor]
    step: list[Tensor]

    def adam(self) -> bool:
        """Whether the group is one of Adam's."""
        return "betas" in self.group


@dataclass
class Tangent:
    """Derivative of parameters and optimizer state in a hyper-parameter of some groups.

    Attributes:
        name: the hyper-parameter.
        own: whether it is that of a group, one flag a group.
        theta: θ̇, one tensor a parameter.
        memory: derivatives of what the optimizer remembers, by name.
    """

    name: str
    own: list[bool]
    theta: list[Tensor]
    memory: dict[str, list[Tensor]] = field(default_factory=dict)

    def discount(self, rho: float) -> None:
        """Forget the share 1 − ρ of all that lies in the past."""
        for tensors in (self.theta, *self.memory.values()):
            torch._foreach_mul_(tensors, rho)

    def damping(self, parts: Sequence[Part], curved: list[Tensor]) -> float:
        """Share s of Hθ̇ with which θ̇ does not grow by curvature: ‖θ̇ − s w‖ ≤ ‖θ̇‖, w the step that Hθ̇ makes."""
        made, at = [], 0
        for part in parts:
            for p in part.parameters:
                made.append(_sized(part, p, curved[at]))
                at += 1
        size, length = inner(made, made), inner(self.theta, self.theta)
        if size <= length:
            return 1.0
        return min(1.0, max(0.0, 2 * inner(self.theta, made) / size))

    def advance(self, parts: Sequence[Part], curved: list[Tensor]) -> None:
        """Carry the tangent through one step, given Hθ̇ at the parameters before it."""
        at = 0
        for part, own in zip(parts, self.own, strict=True):
            act = self._adam if part.adam() else self._sgd
            for i in range(len(part.parameters)):
                act(part, i, at, self.name if own else "", curved[at])
                at += 1

    def _kept(self, name: str) -> list[Tensor]:
        if name not in self.memory:
            self.memory[name] = [torch.zeros_like(z) for z in self.theta]
        return self.memory[name]

    def _sgd(self, part: Part, i: int, at: int, own: str, curved: Tensor) -> None:
        decay, mu, lr = (float(part.group[k]) for k in ("weight_decay", "momentum", "lr"))
        lr, z, theta = part.lr, self.theta[at], part.before[i]
        push = curved.add(z, alpha=decay)
        if own == "weight_decay":
            push.add_(theta, alpha=decay)
        if mu:
            after = part.state.get(part.parameters[i], {}).get("momentum_buffer")
            if after is None:  # no gradient yet, so no step
                return
            velocity = self._kept("velocity")[at]
            velocity.mul_(mu).add_(push)
            if (
                own == "momentum"
            ):  # what is left of the velocity without this step's gradient is μ times the old one
                velocity.add_(after - part.gradient[i] - decay * theta, alpha=1 - mu)
            if part.group["nesterov"]:
                push.add_(velocity, alpha=mu)
                if own == "momentum":
                    push.add_(after, alpha=mu * (1 - mu))
            else:
                push = velocity
        z.sub_(push, alpha=lr)
        if own == "lr":
            z.add_(part.step[i])

    def _adam(self, part: Part, i: int, at: int, own: str, curved: Tensor) -> None:
        state = part.state.get(part.parameters[i])
        if not state:
            return
        decay, lr, decoupled = float(part.group["weight_decay"]), part.lr, _decoupled(part.group)
        z, theta, g = self.theta[at], part.before[i], part.gradient[i]
        push = curved if decoupled else curved.add(z, alpha=decay)
        if not decoupled:
            g = g.add(theta, alpha=decay)
            if own == "weight_decay":
                push = push.add(theta, alpha=decay)
        beta1, beta2 = (float(b) for b in part.group["betas"])
        first, second = self._kept("exp_avg")[at], self._kept("exp_avg_sq")[at]
        first.mul_(beta1).add_(push, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(g, push, value=2 * (1 - beta2))
        one, root, below = _adam_scales(part, state)
        turn = first / one
        there = root > 0  # the root has no derivative at zero
        two = (1 - beta2 ** float(state["step"])) ** 0.5
        turn -= torch.where(there, state["exp_avg"] / one / below * second / (2 * two * root), 0.0)
        if decoupled:
            z.mul_(1 - lr * decay)
            if own == "weight_decay":
                z.add_(theta, alpha=-lr * decay)
        z.addcdiv_(turn, below, value=-lr)
        if own == "lr":
            z.add_(part.step[i])


def _decoupled(group: dict[str, Any]) -> bool:
    return bool(group.get("decoupled_weight_decay", False))


def _adam_scales(part: Part, state: dict[str, Any]) -> tuple[float, Tensor, Tensor]:
    """Bias correction of the mean, √v, and what the mean is divided by."""
    beta1, beta2 = (float(b) for b in part.group["betas"])
    count = float(state["step"])
    root = state["exp_avg_sq"].sqrt()
    return 1 - beta1**count, root, root / (1 - beta2**count) ** 0.5 + part.group["eps"]


def _sized(part: Part, p: Tensor, curved: Tensor) -> Tensor:
    """Hθ̇ as the step makes use of it, in units of what the optimizer's momentum can bear."""
    if not part.adam():
        return curved * (part.lr / (1 + float(part.group["momentum"])))
    state = part.state.get(p)
    if not state:
        return torch.zeros_like(curved)
    beta1 = float(part.group["betas"][0])
    one, _, below = _adam_scales(part, state)
    return curved / below * (part.lr * (1 - beta1) / (1 + beta1) / one)
