r"""Training against an adversary, in the user's own loop: min_θ E max_{‖δ‖ ≤ ε} ℓ(f_θ(x + δ), y).

Each function here is one call between ``optimizer.zero_grad()`` and ``optimizer.step()``: it finds adversarial inputs
and accumulates gradients into ``.grad``, as ``backward()`` would.

    for x, y in loader:
        optimizer.zero_grad()
        pgd_training(model, loss, x, y, eps=0.1)
        optimizer.step()

Reference: Madry et al. (2018); Wong, Rice & Kolter (2020).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bolza.core.errors import DivergenceError
from bolza.core.reference import Reference, cites
from bolza.ops.batches import Loss, apply
from bolza.robust.attacks import MADRY, pgd
from bolza.robust.balls import Clip, Norm

__all__ = ["WONG", "AdversarialStep", "backward_at", "fast", "pgd_training"]

WONG = Reference(
    "wong2020fast",
    "Wong, Eric and Rice, Leslie and Kolter, J. Zico",
    "Fast is better than free: Revisiting adversarial training",
    2020,
    venue="International Conference on Learning Representations",
    arxiv="2001.03994",
)


@dataclass(frozen=True)
class AdversarialStep:
    """What one call of adversarial training did.

    Attributes:
        loss: the loss whose gradient was accumulated, without a graph.
        inputs: the adversarial inputs, like x.
        full_passes: forward and backward passes through the whole network, the unit of cost.
        first_stage_passes: forward and backward passes through its first stage alone.
    """

    loss: Tensor
    inputs: Any
    full_passes: int
    first_stage_passes: int = 0


def backward_at(
    model: Callable[..., Any], loss: Loss, inputs: Any, y: Any, scale: float = 1.0
) -> tuple[Tensor, Any]:
    """Accumulate the gradient of the mean loss at inputs; returns the loss and the output, without a graph.

    Raises:
        DivergenceError: the loss is not finite; no gradient was accumulated.
    """
    with torch.enable_grad():
        out = apply(model, inputs)
        value = finite_mean(loss(out, y))
        (scale * value).backward()
    return value.detach(), out


def finite_mean(value: Tensor) -> Tensor:
    """The mean of losses.

    Raises:
        DivergenceError: it is not finite.
    """
    value = value.mean()
    if not bool(torch.isfinite(value.detach())):
        raise DivergenceError(
            f"the loss on adversarial inputs is {float(value.detach())}: lower the learning rate or eps; nothing was "
            "added to .grad for it"
        )
    return value


@cites(MADRY)
def pgd_training(
    model: nn.Module,
    loss: Loss,
    x: Any,
    y: Any,
    eps: float | Tensor,
    steps: int = 7,
    *,
    norm: Norm = "linf",
    step_size: float | Tensor | None = None,
    clip: Clip = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> AdversarialStep:
    r"""Adversarial training: the gradient of the loss at the last point of projected gradient ascent.

    Costs k + 1 full passes for k steps.

    Args:
        model: the network, in training mode; its running statistics see the adversarial inputs only.
        loss: ``loss(output, y)``: a mean over the samples, or one number a sample.
        x: inputs, shape ``(n, *input)``; or a tuple or dict of which one entry is a floating tensor.
        y: targets.
        eps: radius in the units of x, one number or one a sample.
        steps: ascent steps k.
        norm: ``"linf"`` or ``"l2"``.
        step_size: step in the units of x; 2.5 ε / steps by default.
        clip: range of the data; None for no limits.
        generator: where the random start comes from.

    Returns:
        AdversarialStep; the gradient has been added to ``.grad``.

    Raises:
        ArgumentError: steps below 1, or a radius or norm that makes no sense.
        DataError: x has no floating tensor, is not finite, or lies outside of the range.
        DivergenceError: the loss is not finite.

    Reference: Madry et al. (2018), section 2.1.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> x, y = torch.rand(5, 4), torch.arange(5) % 3
        >>> step = pgd_training(net, nn.functional.cross_entropy, x, y, eps=0.1, steps=3)
        >>> step.full_passes, bool((step.inputs - x).abs().max() <= 0.1 + 1e-6), net[0].weight.grad.shape
        (4, True, torch.Size([8, 4]))
    """
    inputs = pgd(
        model, loss, x, y, eps, steps,
        norm=norm, step_size=step_size, clip=clip, best=False, generator=generator,
    )  # fmt: skip
    value, _ = backward_at(model, loss, inputs, y)
    return AdversarialStep(value, inputs, steps + 1)


@cites(WONG)
def fast(
    model: nn.Module,
    loss: Loss,
    x: Any,
    y: Any,
    eps: float | Tensor,
    *,
    norm: Norm = "linf",
    step_size: float | Tensor | None = None,
    clip: Clip = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> AdversarialStep:
    r"""Fast adversarial training: one step of ascent from a random point of the ball.

        δ ← Π[δ + α sign ∇ℓ(f(x + δ), y)],   δ drawn uniformly,   α = 1.25 ε

    Costs two full passes. Cheap and strong, but it can fail all at once: the network learns to beat this one step and
    nothing else. Watch its accuracy under a few steps of :func:`~bolza.robust.pgd`.

    Args:
        model: the network, in training mode.
        loss: ``loss(output, y)``: a mean over the samples, or one number a sample.
        x: inputs, shape ``(n, *input)``; or a tuple or dict of which one entry is a floating tensor.
        y: targets.
        eps: radius in the units of x, one number or one a sample.
        norm: ``"linf"`` or ``"l2"``.
        step_size: α in the units of x; 1.25 ε by default.
        clip: range of the data; None for no limits.
        generator: where the random start comes from.

    Returns:
        AdversarialStep; the gradient has been added to ``.grad``.

    Raises:
        ArgumentError: a radius or norm that makes no sense.
        DataError: x has no floating tensor, is not finite, or lies outside of the range.
        DivergenceError: the loss is not finite.

    Reference: Wong, Rice & Kolter (2020), algorithm 3.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> x, y = torch.rand(5, 4), torch.arange(5) % 3
        >>> fast(net, nn.functional.cross_entropy, x, y, eps=0.1).full_passes
        2
    """
    inputs = pgd(
        model, loss, x, y, eps, 1,
        norm=norm, step_size=1.25 * eps if step_size is None else step_size, clip=clip, best=False,
        generator=generator,
    )  # fmt: skip
    value, _ = backward_at(model, loss, inputs, y)
    return AdversarialStep(value, inputs, 2)
