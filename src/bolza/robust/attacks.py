r"""Attacks on inputs: the inner player of min_θ E max_{‖δ‖ ≤ ε} ℓ(f(x + δ), y).

Steepest ascent in the norm of the ball, with projection:

    linf:  x ← Π[x + α sign ∇ℓ]        l2:  x ← Π[x + α ∇ℓ / ‖∇ℓ‖]

For a linear score the worst loss is known: ℓ falls to that of the margin  y wᵀx − ε‖w‖, in the dual norm.

Reference: Goodfellow, Shlens & Szegedy (2015); Madry, Makelov, Schmidt, Tsipras & Vladu (2018).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError, DivergenceError
from bolza.core.reference import Reference, cites
from bolza.ops.batches import Loss, apply
from bolza.ops.replay import frozen_statistics
from bolza.ops.sample_losses import sample_losses, without_reduction
from bolza.robust.balls import Ball, Clip, Norm, attacked_input, parameters_at_rest

__all__ = ["GOODFELLOW", "MADRY", "fgsm", "pgd"]

GOODFELLOW = Reference(
    "goodfellow2015adversarial",
    "Goodfellow, Ian J. and Shlens, Jonathon and Szegedy, Christian",
    "Explaining and Harnessing Adversarial Examples",
    2015,
    venue="International Conference on Learning Representations",
    arxiv="1412.6572",
)
MADRY = Reference(
    "madry2018towards",
    "Madry, Aleksander and Makelov, Aleksandar and Schmidt, Ludwig and Tsipras, Dimitris and Vladu, Adrian",
    "Towards Deep Learning Models Resistant to Adversarial Attacks",
    2018,
    venue="International Conference on Learning Representations",
    arxiv="1706.06083",
)


@cites(GOODFELLOW)
def fgsm(
    model: Callable[..., Any],
    loss: Loss,
    x: Any,
    y: Any,
    eps: float | Tensor,
    *,
    norm: Norm = "linf",
    clip: Clip = (0.0, 1.0),
    targeted: bool = False,
) -> Any:
    r"""Adversarial inputs by one step along the sign of the gradient: x + ε sign ∇ₓℓ, clipped.

    Exact for a linear score inside of the range; for a network a weak attack, and no measure of robustness.

    Args:
        model: the network or function under attack, in the mode it is in; nothing of it changes.
        loss: ``loss(output, y)``: a mean over the samples, or one number a sample.
        x: inputs, shape ``(n, *input)``; or a tuple or dict of which one entry is a floating tensor.
        y: labels; with ``targeted`` those that the attack wants to see.
        eps: radius in the units of x, one number or one a sample.
        norm: ``"linf"``, or ``"l2"``: a step of length ε along the gradient.
        clip: range of the data; None for no limits.
        targeted: descend the loss towards ``y``.

    Returns:
        Inputs like ``x``.

    Raises:
        ArgumentError: the radius or the norm makes no sense.
        DataError: x has no floating tensor, is not finite, or lies outside of the range.
        DivergenceError: the loss is not finite.

    Reference: Goodfellow, Shlens & Szegedy (2015), section 4.

    Example:
        >>> w, x, y = torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([[0.3, 0.1, -0.4]]), torch.ones(1, 1)
        >>> loss = torch.nn.functional.binary_cross_entropy_with_logits
        >>> attacked = fgsm(lambda x: x @ w.T, loss, x, y, eps=0.1, clip=None)
        >>> print(f"{loss(x @ w.T, y):.5f} {loss(attacked @ w.T, y):.5f}")
        0.74440 0.94325
    """
    return pgd(
        model,
        loss,
        x,
        y,
        eps,
        1,
        norm=norm,
        step_size=eps,
        clip=clip,
        targeted=targeted,
        random_start=False,
        best=False,
    )


@cites(MADRY)
def pgd(
    model: Callable[..., Any],
    loss: Loss,
    x: Any,
    y: Any,
    eps: float | Tensor,
    steps: int = 20,
    *,
    norm: Norm = "linf",
    step_size: float | Tensor | None = None,
    restarts: int = 1,
    clip: Clip = (0.0, 1.0),
    targeted: bool = False,
    random_start: bool = True,
    best: bool = True,
    generator: torch.Generator | None = None,
) -> Any:
    r"""Adversarial inputs by projected gradient ascent of the loss, the best of all steps and restarts.

        x_{k+1} = Π[x_k + α sign ∇ℓ(f(x_k), y)],   x_0 drawn uniformly from the ball

    Each sample keeps the point where its own loss was largest. Costs ``restarts · (steps + 1)`` forward and
    ``restarts · steps`` backward passes; gradients of parameters are not computed, running statistics stay.

    Args:
        model: the network or function under attack, in the mode it is in; nothing of it changes.
        loss: ``loss(output, y)``: a mean over the samples, or one number a sample.
        x: inputs, shape ``(n, *input)``; or a tuple or dict of which one entry is a floating tensor.
        y: labels; with ``targeted`` those that the attack wants to see.
        eps: radius in the units of x, one number or one a sample.
        steps: ascent steps of each restart.
        norm: ``"linf"``, or ``"l2"``: steps along the gradient over its length.
        step_size: α in the units of x, one number or one a sample; 2.5 ε / steps by default.
        restarts: how often to start anew.
        clip: range of the data, numbers or tensors that broadcast against x; None for no limits.
        targeted: descend the loss towards ``y``.
        random_start: start from a random point of the ball, not from x.
        best: keep the best point of each sample; otherwise return the last one of the last restart, which
            spares the last forward pass.
        generator: where random numbers come from, on the device of x.

    Returns:
        Inputs like ``x``, in its dtype and on its device, without a gradient.

    Raises:
        ArgumentError: steps or restarts below 1, or a radius or norm that makes no sense.
        DataError: x has no floating tensor, is not finite, or lies outside of the range.
        DivergenceError: the loss is not finite.

    Reference: Madry et al. (2018), section 2.1. Departures: the best point is kept sample by sample; the step is
    2.5 ε / steps by default, as in the authors' later code.

    Example:
        >>> w, x, y = torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([[0.3, 0.1, -0.4]]), torch.ones(1, 1)
        >>> loss = torch.nn.functional.binary_cross_entropy_with_logits
        >>> attacked = pgd(lambda x: x @ w.T, loss, x, y, eps=0.1, norm="l2", step_size=0.1, clip=None)
        >>> print(f"{loss(attacked @ w.T, y):.5f}")
        0.87119
    """
    if steps < 1 or restarts < 1:
        raise ArgumentError(f"steps={steps} and restarts={restarts} must both be at least 1")
    centre, put = attacked_input(x)
    ball = Ball(centre, eps, norm, clip)
    step = 2.5 / steps * ball.eps if step_size is None else ball.per_sample(step_size, "step_size")
    sign, n = -1.0 if targeted else 1.0, len(centre)
    found, value = ball.x, torch.full((n,), -torch.inf, dtype=centre.dtype, device=centre.device)
    each, finite = None, torch.ones((), dtype=torch.bool, device=centre.device)
    with ExitStack() as stack:
        if isinstance(model, nn.Module):
            stack.enter_context(frozen_statistics(model))
        stack.enter_context(parameters_at_rest(model))
        stack.enter_context(torch.enable_grad())
        for _ in range(restarts):
            at = ball.random(generator) if random_start else ball.x
            for k in range(steps + best):
                last = k == steps
                at = at.detach().requires_grad_(not last)
                out = apply(model, put(at))
                if not best:
                    total = loss(out, y)
                    total = total.sum() if total.ndim else n * total
                else:
                    each = each or without_reduction(loss, out, y, n)
                    losses = sign * sample_losses(each, out, y, n)
                    total = sign * losses.sum()
                    now = losses.detach().to(value.dtype)
                    better = (now > value).reshape(-1, *[1] * (at.ndim - 1))
                    found, value = torch.where(better, at.detach(), found), torch.maximum(value, now)
                if not last:
                    slope = slope_at(total, at)
                    finite = finite & torch.isfinite(total.detach() + slope.sum())  # the sign of nan is 0
                    at = ball.ascend(at.detach(), slope if sign > 0 else -slope, step)
    if not bool(finite) or (best and not bool(torch.isfinite(value).all())):
        raise DivergenceError(
            "the loss or its gradient is not finite somewhere in the ball: check the model's parameters, "
            "or lower eps"
        )
    return put(found if best else at.detach())


def slope_at(total: Tensor, at: Tensor) -> Tensor:
    """Gradient of the loss in the inputs.

    Raises:
        ArgumentError: the loss does not depend on the inputs.
    """
    if not total.requires_grad:
        raise ArgumentError(
            "loss(model(x), y) has no gradient in x: the model detaches its input, or rounds it; attack a smooth "
            "version of it"
        )
    (slope,) = torch.autograd.grad(total, at, allow_unused=True)
    if slope is None:
        raise ArgumentError(
            "loss(model(x), y) does not depend on x: is it the model's input that is attacked?"
        )
    return slope
