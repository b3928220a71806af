r"""How steep a loss may be for an optimizer: the stability limit of its update on a quadratic.

Each update rule below is, at fixed preconditioner P, linear in the gradient of ½θᵀHθ; with S the step of each
coordinate, it is stable if and only if the largest eigenvalue κ of S^{1/2} H S^{1/2} stays below a number c:

    gradient descent              S = η             c = 2
    heavy ball  v ← μv + (1−d)g   S = η(1−d)        c = 2(1+μ)
    Nesterov                      S = η             c = 2(1+μ)/(1+2μ)
    Adam, AdamW                   S = η(1−β₁)/P     c = 2(1+β₁)
    RMSProp                       S = η/P           c = 2(1+μ)

Reference: Polyak (1964) for the heavy ball; Cohen, Kaur, Li, Kolter & Talwalkar (2021), *Gradient Descent on Neural
Networks Typically Occurs at the Edge of Stability*, arXiv:2103.00065, for training at the limit; Cohen et al. (2022),
*Adaptive Gradient Methods at the Edge of Stability*, arXiv:2207.14484, for the preconditioned form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError, UnsupportedError
from bolza.core.reference import Reference, cites

__all__ = ["COHEN", "COHEN_ADAPTIVE", "StabilityLimit", "optimizer_limit", "stability_limit"]

COHEN = Reference(
    "cohen2021edge",
    "Cohen, Jeremy M. and Kaur, Simran and Li, Yuanzhi and Kolter, J. Zico and Talwalkar, Ameet",
    "Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability",
    2021,
    venue="International Conference on Learning Representations (ICLR)",
    arxiv="2103.00065",
)
COHEN_ADAPTIVE = Reference(
    "cohen2022adaptive",
    "Cohen, Jeremy M. and Ghorbani, Behrooz and Krishnan, Shankar and Agarwal, Naman and Medapati, Sourabh and Badura, "
    "Michal and Suo, Daniel and Cardoze, David and Nado, Zachary and Dahl, George E. and Gilmer, Justin",
    "Adaptive Gradient Methods at the Edge of Stability",
    2022,
    arxiv="2207.14484",
)


@cites(COHEN, COHEN_ADAPTIVE)
def stability_limit(
    lr: float,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> float:
    r"""Largest curvature at which a full-batch optimizer is still stable.

        heavy ball   2(1 + μ)/(η(1 − d)) − w          Nesterov   2(1 + μ)/(η(1 + 2μ)) − w

    On a quadratic with the curvature λ the step grows if and only if λ is above it. Adam's step is the heavy ball with
    dampening d = β₁ in the preconditioned curvature.

    Args:
        lr: learning rate η.
        momentum: μ.
        dampening: d, as in ``torch.optim.SGD``.
        nesterov: Nesterov's momentum.
        weight_decay: w, added to every curvature by the optimizer.

    Returns:
        The limit, in the units of the loss over parameter squared.

    Raises:
        ArgumentError: the rate is not positive, or momentum or dampening outside [0, 1).

    Reference: Cohen et al. (2021), appendix B. Departures: dampening and weight decay.

    Example:
        >>> stability_limit(0.1), round(stability_limit(0.1, momentum=0.9), 10)
        (20.0, 38.0)
    """
    if not lr > 0 or not 0 <= momentum < 1 or not 0 <= dampening < 1:
        raise ArgumentError(
            f"lr is {lr}, momentum {momentum} and dampening {dampening}: lr must be positive, the others in [0, 1)"
        )
    if nesterov:
        return 2 * (1 + momentum) / (lr * (1 + 2 * momentum)) - weight_decay
    return 2 * (1 + momentum) / (lr * (1 - dampening)) - weight_decay


@dataclass(frozen=True)
class StabilityLimit:
    """The limit of one optimizer at its present settings.

    Attributes:
        lr: learning rate; of several groups, the largest.
        limit: c, the largest stable eigenvalue of S^{1/2} H S^{1/2}.
        steps: S, one flat vector.
        decay: weight decay that is added to the gradient, and so to the diagonal of H, one flat vector.
        unit: u in S = u/P; the sharpness is told as κ/u, the largest eigenvalue of P⁻¹H.
        plain: whether P is 1, so that the sharpness is that of H.
        momentum: μ or β₁: gradients are averaged over 1/(1 − momentum) steps.
        formula: of the limit for the sharpness, in words.
    """

    lr: float
    limit: float
    steps: Tensor
    decay: Tensor
    unit: float
    plain: bool
    momentum: float
    formula: str

    @property
    def bound(self) -> float:
        """The largest stable sharpness."""
        return self.limit / self.unit if self.unit > 0 else float("inf")

    def scale(self) -> Tensor:
        """P^{−1/2}, one flat vector."""
        return (self.steps / self.unit).sqrt() if self.unit > 0 else torch.zeros_like(self.steps)


def optimizer_limit(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> StabilityLimit:
    """The stability limit of an optimizer as it is now.

    Args:
        optimizer: ``torch.optim.SGD``, ``Adam``, ``AdamW`` or ``RMSprop`` with any options but ``maximize``; the
            groups may have rates and weight decays of their own.
        params: the parameters, in the order in which S is wanted; those that the optimizer does not hold have S = 0.

    Raises:
        UnsupportedError: the limit of the update is not known, or its groups have no common one.
        ArgumentError: the optimizer holds none of the parameters, or has not made a step yet.

    Example:
        >>> w = torch.ones(2, requires_grad=True)
        >>> round(optimizer_limit(torch.optim.SGD([w], lr=0.1, momentum=0.9), [w]).bound, 6)
        38.0
    """
    kind = type(optimizer)
    rules = {
        torch.optim.SGD: _sgd,
        torch.optim.Adam: _adam,
        torch.optim.AdamW: _adam,
        torch.optim.RMSprop: _rmsprop,
    }
    if kind not in rules:
        raise UnsupportedError(
            f"the stability limit of {kind.__name__} is not known (those of SGD, RMSprop, Adam and AdamW are): compare "
            "the sharpness with a limit of your own"
        )
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    held = [p for p in params if id(p) in groups]
    if not held:
        raise ArgumentError("optimizer holds none of the parameters whose sharpness is measured")
    if any(groups[id(p)].get("maximize") for p in held):
        raise UnsupportedError(
            f"the stability limit of a {kind.__name__} that maximizes is not known: let it minimize the negative"
        )
    found = {id(p): rules[kind](optimizer, groups[id(p)], p) for p in held}
    if len({entry[3] for entry in found.values()}) > 1:
        raise UnsupportedError(
            f"the parameter groups of {kind.__name__} have different momenta, for which there is no one limit: "
            "measure each group by itself"
        )
    limit, momentum, formula = next(iter(found.values()))[3]
    unit, lr = max(entry[2] for entry in found.values()), max(entry[4] for entry in found.values())
    given = [found[id(p)][:2] if id(p) in found else (0.0, 0.0) for p in params]
    plain = all(isinstance(step, float) for step, _ in given) and len({step for step, _ in given}) == 1
    steps, decay = (
        torch.cat(
            [
                torch.as_tensor(pair[i]).expand_as(p).reshape(-1).to(p)
                for pair, p in zip(given, params, strict=True)
            ]
        )
        for i in (0, 1)
    )
    return StabilityLimit(lr, limit, steps, decay, unit, plain, momentum, formula)


# S, weight decay, the factor of 1/P in S, (c, momentum, formula), rate
_Entry = tuple[float | Tensor, float, float, tuple[float, float, str], float]


def _sgd(optimizer: torch.optim.Optimizer, group: dict[str, Any], p: Tensor) -> _Entry:
    lr, mu, decay = float(group["lr"]), float(group["momentum"]), float(group["weight_decay"])
    limit = stability_limit(1.0, momentum=mu, nesterov=group["nesterov"])
    if group["nesterov"]:
        return lr, decay, lr, (limit, mu, "2(1+μ)/((1+2μ)·lr)"), lr
    damp = float(group["dampening"]) if mu else 0.0  # without momentum it is not used
    formula = "2/lr" if mu == 0 else "2(1+μ)/((1−d)·lr)" if damp else "2(1+μ)/lr"
    return lr * (1 - damp), decay, lr * (1 - damp), (limit, mu, formula), lr


def _adam(optimizer: torch.optim.Optimizer, group: dict[str, Any], p: Tensor) -> _Entry:
    square = _moment(optimizer, p, "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq")
    lr, (beta1, beta2) = float(group["lr"]), (float(b) for b in group["betas"])
    t = float(optimizer.state[p]["step"])
    root = (square / (1 - beta2**t)).sqrt_().add_(float(group["eps"]))
    decoupled = isinstance(optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay", False)
    decay = 0.0 if decoupled else float(group["weight_decay"])
    limit = stability_limit(1.0, momentum=beta1)
    told = (limit, beta1, "2(1+β₁)/((1−β₁)·lr) of the preconditioned Hessian")
    return lr * (1 - beta1) / (1 - beta1**t) / root, decay, lr * (1 - beta1), told, lr


def _rmsprop(optimizer: torch.optim.Optimizer, group: dict[str, Any], p: Tensor) -> _Entry:
    square = _moment(optimizer, p, "square_avg")
    if group["centered"]:
        square = square - optimizer.state[p]["grad_avg"].square()
    lr, mu = float(group["lr"]), float(group["momentum"])
    root = square.clamp_min(0).sqrt_().add_(float(group["eps"]))
    told = (stability_limit(1.0, momentum=mu), mu, "2(1+μ)/lr of the preconditioned Hessian")
    return lr / root, float(group["weight_decay"]), lr, told, lr


def _moment(optimizer: torch.optim.Optimizer, p: Tensor, name: str) -> Tensor:
    """An entry of the state of a parameter."""
    state = optimizer.state.get(p) or {}
    if name not in state:
        raise ArgumentError(
            "optimizer has no state yet for some of its parameters: its preconditioner is known after a step that "
            "reaches them"
        )
    moment: Tensor = state[name].detach()
    return moment
