r"""TRADES: accuracy on clean inputs, and outputs that do not move in the ball.

    min_θ E [ ℓ(f(x), y) + β max_{‖δ‖ ≤ ε} KL(f(x) ‖ f(x + δ)) ]

Reference: Zhang, Yu, Jiao, Xing, El Ghaoui & Jordan (2019).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError, ShapeError
from bolza.core.reference import Reference, cites
from bolza.ops.batches import Loss, apply
from bolza.ops.replay import frozen_statistics
from bolza.robust.adversarial_training import AdversarialStep, finite_mean
from bolza.robust.attacks import pgd
from bolza.robust.balls import Clip, Norm, attacked_input

__all__ = ["ZHANG_TRADES", "trades"]

ZHANG_TRADES = Reference(
    "zhang2019trades",
    "Zhang, Hongyang and Yu, Yaodong and Jiao, Jiantao and Xing, Eric P. and El Ghaoui, Laurent and Jordan, Michael I.",
    "Theoretically Principled Trade-off between Robustness and Accuracy",
    2019,
    venue="International Conference on Machine Learning",
    arxiv="1901.08573",
)


def divergence(logits: Tensor, clean: Tensor) -> Tensor:
    """KL(softmax(clean) ‖ softmax(logits)), classes along the second axis; mean over the samples."""
    p, log_p = clean.softmax(1), clean.log_softmax(1)
    return (p * (log_p - logits.log_softmax(1))).sum(1).mean()


@cites(ZHANG_TRADES)
def trades(
    model: nn.Module,
    loss: Loss,
    x: Any,
    y: Any,
    eps: float | Tensor,
    steps: int = 10,
    *,
    beta: float = 6.0,
    norm: Norm = "linf",
    step_size: float | Tensor | None = None,
    clip: Clip = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> AdversarialStep:
    r"""TRADES: the clean loss plus β times the largest divergence of the outputs in the ball.

        ℓ(f(x), y) + β KL(softmax f(x) ‖ softmax f(x + δ)),   δ by k steps of ascent of the second term

    Costs k + 2 full passes for k steps, and a forward pass. A larger β buys robustness with clean accuracy.

    Args:
        model: a classifier that returns logits, classes along the second axis; in training mode. Its running
            statistics see the clean and the adversarial inputs.
        loss: ``loss(output, y)``: a mean over the samples, or one number a sample.
        x: inputs, shape ``(n, *input)``; or a tuple or dict of which one entry is a floating tensor.
        y: targets.
        eps: radius in the units of x, one number or one a sample.
        steps: ascent steps k.
        beta: weight of the divergence.
        norm: ``"linf"`` or ``"l2"``.
        step_size: step in the units of x; 2.5 ε / steps by default.
        clip: range of the data; None for no limits.
        generator: where the random start comes from.

    Returns:
        AdversarialStep; the gradient has been added to ``.grad``.

    Raises:
        ArgumentError: beta is negative, steps below 1, or a radius or norm that makes no sense.
        DataError: x has no floating tensor, is not finite, or lies outside of the range.
        DivergenceError: the loss is not finite.
        ShapeError: the outputs are not logits of classes.

    Reference: Zhang, Yu et al. (2019), algorithm 1. Departure: a start drawn uniformly from the ball in place of
    10⁻³ times a Gaussian.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> x, y = torch.rand(5, 4), torch.arange(5) % 3
        >>> trades(net, nn.functional.cross_entropy, x, y, eps=0.1, steps=2).full_passes
        4
    """
    if not beta >= 0:
        raise ArgumentError(f"beta={beta} must not be negative")
    attacked_input(x)
    with torch.no_grad(), frozen_statistics(model):
        clean = apply(model, x)
    if not isinstance(clean, Tensor) or clean.ndim < 2 or clean.shape[1] < 2:
        got = tuple(clean.shape) if isinstance(clean, Tensor) else type(clean).__name__
        raise ShapeError(
            f"model(x) has shape {got}: the divergence compares logits of two classes or more along the second axis; "
            "give a binary classifier two outputs, and take pgd_training for a regression"
        )
    inputs = pgd(
        model, divergence, x, clean, eps, steps,
        norm=norm, step_size=step_size, clip=clip, best=False, generator=generator,
    )  # fmt: skip
    with torch.enable_grad():
        out = apply(model, x)
        robust = divergence(apply(model, inputs), out)
        value = finite_mean(loss(out, y).mean() + beta * robust)
        value.backward()
    return AdversarialStep(value.detach(), inputs, steps + 2)
