r"""Free adversarial training: one backward pass moves the weights and the perturbation.

    (g_θ, g_x) = ∇ℓ(f_θ(x + δ), y),   θ ← θ − η g_θ,   δ ← Π[δ + ε sign g_x]

Each batch is played m times in a row, and δ is carried on, also to the next batch.

Reference: Shafahi, Najibi, Ghiasi, Xu, Dickerson, Studer, Davis, Taylor & Goldstein (2019).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bolza.core.errors import ShapeError
from bolza.core.reference import Reference, cites
from bolza.ops.batches import Loss, apply
from bolza.robust.adversarial_training import AdversarialStep, finite_mean
from bolza.robust.balls import Ball, Clip, Norm, attacked_input

__all__ = ["SHAFAHI", "free"]

SHAFAHI = Reference(
    "shafahi2019free",
    "Shafahi, Ali and Najibi, Mahyar and Ghiasi, Amin and Xu, Zheng and Dickerson, John and Studer, Christoph and "
    "Davis, Larry S. and Taylor, Gavin and Goldstein, Tom",
    "Adversarial Training for Free!",
    2019,
    venue="Advances in Neural Information Processing Systems",
    arxiv="1904.12843",
)


@cites(SHAFAHI)
def free(
    model: nn.Module,
    loss: Loss,
    x: Any,
    y: Any,
    eps: float | Tensor,
    perturbation: Tensor | None = None,
    *,
    norm: Norm = "linf",
    step_size: float | Tensor | None = None,
    clip: Clip = (0.0, 1.0),
) -> tuple[AdversarialStep, Tensor]:
    r"""Free adversarial training: one full pass gives the gradient of the weights and moves the perturbation.

        δ ← Π[δ + α sign ∇ₓℓ(f(x + δ), y)],   α = ε

    One replay of a batch; the loop plays each batch m times, with a step of the optimizer each time, and trains for
    an m-th of the epochs:

        for _ in range(m):
            optimizer.zero_grad()
            step, delta = free(model, loss, x, y, eps, delta)
            optimizer.step()

    Args:
        model: the network, in training mode.
        loss: ``loss(output, y)``: a mean over the samples, or one number a sample.
        x: inputs, shape ``(n, *input)``; or a tuple or dict of which one entry is a floating tensor.
        y: targets.
        eps: radius in the units of x, one number or one a sample.
        perturbation: δ of the call before, zero by default. A smaller batch uses its first rows, and leaves the others
            as they are.
        norm: ``"linf"`` or ``"l2"``.
        step_size: α in the units of x; ε by default.
        clip: range of the data; None for no limits.

    Returns:
        AdversarialStep, with the inputs at which the gradient was taken and added to ``.grad``; and the next δ.

    Raises:
        ArgumentError: a radius or norm that makes no sense.
        DataError: x has no floating tensor, is not finite, or lies outside of the range.
        DivergenceError: the loss is not finite.
        ShapeError: δ has another shape than a sample, or fewer rows.

    Reference: Shafahi et al. (2019), algorithm 1. Departure: x + δ stays in the range of the data, δ with it.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> x, y = torch.rand(5, 4), torch.arange(5) % 3
        >>> step, delta = free(net, nn.functional.cross_entropy, x, y, eps=0.1)
        >>> step.full_passes, delta.shape, bool(delta.abs().max() <= 0.1 + 1e-6)
        (1, torch.Size([5, 4]), True)
    """
    centre, put = attacked_input(x)
    ball = Ball(centre, eps, norm, clip)
    n = len(centre)
    if perturbation is None:
        perturbation = torch.zeros_like(ball.x)
    elif perturbation.shape[1:] != centre.shape[1:] or len(perturbation) < n:
        raise ShapeError(
            f"perturbation has shape {tuple(perturbation.shape)}, but the batch has {tuple(centre.shape)}: start with "
            "the largest batch, or with perturbation=None"
        )
    step = ball.eps if step_size is None else ball.per_sample(step_size, "step_size")
    at = ball.project(ball.x + perturbation[:n].detach().to(centre)).requires_grad_()
    with torch.enable_grad():
        value = finite_mean(loss(apply(model, put(at)), y))
        value.backward()
    slope = at.grad if at.grad is not None else torch.zeros_like(at)
    moved = ball.ascend(at.detach(), slope, step) - ball.x
    following = moved if len(perturbation) == n else torch.cat([moved, perturbation[n:].to(centre)])
    return AdversarialStep(value.detach(), put(at.detach()), 1), following
