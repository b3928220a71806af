r"""An attack suite that is not ours: AutoAttack on inputs of any shape and range.

Its four attacks (two gradient attacks with a step that adapts itself, one that walks to the boundary, one that sees
outputs only) take images in [0, 1]. Here vectors are laid out as squares, other ranges are mapped to [0, 1], and what
comes back is put into the ball again before it is judged.

Reference: Croce & Hein (2020).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bolza.core.errors import ArgumentError, UnsupportedError
from bolza.core.reference import Reference
from bolza.ops.replay import same_randomness
from bolza.robust.balls import Ball

__all__ = ["AUTOATTACK", "STANDARD", "suite_attacks"]

AUTOATTACK = Reference(
    "croce2020autoattack",
    "Croce, Francesco and Hein, Matthias",
    "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks",
    2020,
    venue="International Conference on Machine Learning",
    arxiv="2003.01690",
)
STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
_SMALLEST_SIDE = 5  # of the picture: the black-box attack in Euclid's norm begins with a grid of five by five


def suite_attacks(
    logits: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    ball: Ball,
    clip: tuple[float, float] | None,
    classes: int,
    names: Sequence[str],
    *,
    steps: int = 100,
    queries: int = 5000,
    seed: int = 0,
) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """The attacks of the suite by name: each takes the rows of the samples to attack, and gives their inputs.

    Args:
        logits: outputs for inputs like x.
        x: inputs, shape ``(n, *input)``.
        y: labels, shape ``(n,)``.
        ball: the balls around them, all of one radius.
        clip: range of the data, two numbers; None for no limits.
        classes: number of classes.
        names: which attacks.
        steps: steps of each gradient attack.
        queries: outputs that the black-box attack may see for each sample.
        seed: of its random numbers.

    Raises:
        ArgumentError: an unknown name, or radii that differ.
        UnsupportedError: the library is not installed.
    """
    try:
        from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
        from pyautoattack.fab_pt import FABAttack_PT
        from pyautoattack.square import SquareAttack
    except ImportError as error:
        raise UnsupportedError(
            "the independent attack suite is pyautoattack, which is not installed: pip install 'bolza[attacks]', "
            "or take attack='pgd', which is weaker"
        ) from error
    unknown = [name for name in names if name not in STANDARD]
    if unknown:
        raise ArgumentError(f"the suite has no attack {unknown[0]!r}: choose from {', '.join(STANDARD)}")
    if ball.eps.ndim:
        raise ArgumentError("eps differs from sample to sample: the suite takes one number; use attack='pgd'")
    picture = _Picture(x, float(ball.eps), clip)
    eps, norm = float(ball.eps) / picture.width, "Linf" if ball.norm == "linf" else "L2"
    if classes < 4 and "apgd-t" in names:  # its targeted loss compares four outputs
        if tuple(names) != STANDARD:
            raise ArgumentError(f"'apgd-t' compares four classes, and the model has {classes}: leave it out")
        names = [name for name in names if name != "apgd-t"]
    targets = min(9, classes - 1)
    silent = logging.Logger("suite")
    silent.addHandler(logging.NullHandler())

    def outputs(z: Tensor) -> Tensor:
        return logits(picture.back(z)).float()

    def model(z: Tensor) -> Tensor:
        if not (z.requires_grad and torch.is_grad_enabled()):
            return outputs(z)
        found: Tensor = _InputOnly.apply(z, outputs)
        return found

    about: dict[str, Any] = {"norm": norm, "eps": eps, "seed": seed, "device": x.device, "verbose": False}
    for name in names:
        attack: Any
        if name == "apgd-ce":
            attack = APGDAttack(model, n_iter=steps, n_restarts=1, loss="ce", logger=silent, **about)
        elif name == "apgd-t":
            attack = APGDAttack_targeted(
                model, n_iter=steps, n_restarts=1, n_target_classes=targets, logger=silent, **about
            )
        elif name == "fab-t":
            attack = FABAttack_PT(
                model, n_restarts=1, n_iter=steps, targeted=True, n_target_classes=targets, **about
            )
        else:
            attack = SquareAttack(model, p_init=0.8, n_queries=queries, resc_schedule=False, **about)

        def run(rows: Tensor, attack: Any = attack) -> Tensor:
            with same_randomness(seed, x.device):
                z = attack.perturb(picture.out(x[rows]), y[rows])
            found: Tensor = picture.back(z.detach())
            return found

        yield name, run


class _InputOnly(torch.autograd.Function):
    """A function whose backward pass stops at its input: attacks that call ``backward`` leave parameters alone."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            ctx.leaf = z.detach().requires_grad_()
            ctx.out = function(ctx.leaf)
        out: Tensor = ctx.out.detach()
        return out

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        # kept: one of the attacks goes backwards once for each class
        return torch.autograd.grad(ctx.out, ctx.leaf, slope, retain_graph=True)[0], None


class _Picture:
    """Inputs of any shape and range as square pictures in [0, 1], and back."""

    def __init__(self, x: Tensor, eps: float, clip: tuple[float, float] | None) -> None:
        low, high = (
            (float(x.min()) - 2 * eps - 1e-3, float(x.max()) + 2 * eps + 1e-3) if clip is None else clip
        )
        self.low, self.width, self.shape, self.dtype = low, high - low, x.shape[1:], x.dtype
        if x.ndim == 4:
            self.side = max(*x.shape[2:], _SMALLEST_SIDE)
        else:
            self.side = max(math.isqrt(max(1, x[0].numel()) - 1) + 1, _SMALLEST_SIDE)

    def out(self, x: Tensor) -> Tensor:
        z = ((x - self.low) / self.width).clamp(0, 1).float()
        if x.ndim == 4:
            return F.pad(z, (0, self.side - x.shape[3], 0, self.side - x.shape[2]), value=0.5)
        flat = z.flatten(1)
        return F.pad(flat, (0, self.side**2 - flat.shape[1]), value=0.5).reshape(
            len(x), 1, self.side, self.side
        )

    def back(self, z: Tensor) -> Tensor:
        if len(self.shape) == 3:
            z = z[..., : self.shape[1], : self.shape[2]]
        else:
            z = z.flatten(1)[:, : math.prod(self.shape)].reshape(len(z), *self.shape)
        return (self.low + self.width * z).to(self.dtype)
