r"""Many small minimisations at once: limited-memory BFGS in blocks.

    min F(x) = Σ_b F_b(x_b)

Every block has its own curvature pairs, its own step length and its own line search, as if it were minimised
alone; one evaluation of F and ∇F serves all of them. This is what a sweep of the maximum principle needs, where each
layer of a network has its own Hamiltonian: as many evaluations as one layer takes, in place of as many as all of
them take one after the other.

Reference: Nocedal (1980), *Updating quasi-Newton matrices with limited storage*; Nocedal & Wright (2006),
*Numerical Optimization*, algorithms 7.4 and 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bolza.ops.errors import ArgumentError, ShapeError

__all__ = ["blockwise_lbfgs"]

Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]
_ARMIJO = 1e-4  # share of the predicted decrease that a step must bring
_TRIALS = 12  # step lengths tried before a block is left where it is


class _Blocks:
    """Sums and factors by block of a flat vector."""

    def __init__(self, sizes: Sequence[int], like: Tensor) -> None:
        self.lengths = torch.tensor(list(sizes), device=like.device)
        self.index = torch.repeat_interleave(torch.arange(len(sizes), device=like.device), self.lengths)

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        if len(self.lengths) == 1:
            return torch.dot(a, b)[None]
        return torch.segment_reduce(a * b, "sum", lengths=self.lengths, unsafe=True)

    def times(self, factor: Tensor, a: Tensor) -> Tensor:
        return factor * a if len(self.lengths) == 1 else factor[self.index] * a

    def where(self, chosen: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.where(chosen[self.index], a, b)


def blockwise_lbfgs(
    evaluate: Evaluate,
    x: Tensor,
    sizes: Sequence[int],
    *,
    iterations: int = 10,
    history: int = 10,
    begin: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    r"""Minimise a sum of functions of separate blocks, each by its own L-BFGS, with one evaluation for all.

    The step length of a block starts at 1 (at 1/max(1, ‖∇F_b‖₁) in the first iteration) and shrinks until the decrease
    is a ten-thousandth of the predicted one; pairs without positive curvature are left out. No block ends with a larger
    value than it began with.

    Args:
        evaluate: x → (F_1 … F_B, ∇F): values by block, shape ``(B,)``, and the flat gradient, shape of x.
        x: where to start, one flat vector, block after block. It is not changed.
        sizes: number of entries of each block.
        iterations: iterations, each of one evaluation and further ones where a step was too long.
        history: curvature pairs kept.
        begin: what ``evaluate(x)`` returns, if it is known.

    Returns:
        The minimiser found, flat.

    Raises:
        ArgumentError: ``iterations`` or ``history`` is not positive.
        ShapeError: the sizes do not add up to the length of x.

    Example:
        >>> scale = torch.tensor([1.0, 10.0, 1e-2, 1e-1])
        >>> def evaluate(x):
        ...     return (scale * (x - 1) ** 2 / 2).view(2, 2).sum(1), scale * (x - 1)
        >>> blockwise_lbfgs(evaluate, torch.zeros(4), [2, 2], iterations=12).round(decimals=4)
        tensor([1., 1., 1., 1.])
    """
    if iterations < 1 or history < 1:
        raise ArgumentError(f"iterations is {iterations} and history is {history}: both must be positive")
    if x.ndim != 1 or sum(sizes) != len(x):
        raise ShapeError(
            f"the blocks have {sum(sizes)} entries, but x has the shape {tuple(x.shape)}: x must be flat and the "
            "sizes must add up to its length"
        )
    blocks = _Blocks(sizes, x)
    x = x.clone()
    value, gradient = evaluate(x) if begin is None else begin
    begun, start = value, x
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []  # s, y and 1/yᵀs by block, which is zero where unusable
    scale = torch.ones_like(value)
    for iteration in range(iterations):
        direction = _direction(blocks, gradient, pairs, scale)
        slope = blocks.dot(gradient, direction)
        # a block whose model has gone bad goes downhill again
        bad = ~(slope < 0)
        direction = blocks.where(bad, -gradient, direction)
        slope = torch.where(bad, -blocks.dot(gradient, gradient), slope)
        length = torch.ones_like(value)
        if iteration == 0:
            length = 1 / blocks.dot(gradient, gradient.sign()).clamp(min=1.0)
        moved, value, following = _search(blocks, evaluate, x, value, gradient, direction, slope, length)
        s, y = moved - x, following - gradient
        curvature, size = blocks.dot(s, y), blocks.dot(y, y)
        usable = curvature > torch.finfo(x.dtype).eps * size
        scale = torch.where(usable, curvature / torch.where(usable, size, 1.0), scale)
        pairs.append((s, y, torch.where(usable, 1 / torch.where(usable, curvature, 1.0), 0.0)))
        pairs = pairs[-history:]
        still = bool((s == 0).all())
        x, gradient = moved, following
        if still:
            break
    return blocks.where(value <= begun, x, start)


def _direction(
    blocks: _Blocks, gradient: Tensor, pairs: Sequence[tuple[Tensor, Tensor, Tensor]], scale: Tensor
) -> Tensor:
    """Two-loop recursion, all blocks together."""
    q, alphas = gradient, []
    for s, y, inverse in reversed(pairs):
        alpha = inverse * blocks.dot(s, q)
        q = q - blocks.times(alpha, y)
        alphas.append(alpha)
    r = blocks.times(scale, q)
    for (s, y, inverse), alpha in zip(pairs, reversed(alphas), strict=True):
        r = r + blocks.times(alpha - inverse * blocks.dot(y, r), s)
    return -r


def _search(
    blocks: _Blocks,
    evaluate: Evaluate,
    x: Tensor,
    value: Tensor,
    gradient: Tensor,
    direction: Tensor,
    slope: Tensor,
    length: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shrink the steps of the blocks that do not descend; a block for which none does stays where it is."""
    # values this close are equal to rounding
    slack = 4 * torch.finfo(x.dtype).eps * value.abs()
    for _ in range(_TRIALS):
        moved = x + blocks.times(length, direction)
        new, following = evaluate(moved)
        good = new.isfinite() & (new <= value + _ARMIJO * length * slope + slack)
        good |= length == 0
        if bool(good.all()):
            return moved, new, following
        # the minimum of the parabola through both values and the slope, kept between a tenth and a half
        bend = 2 * (new - value - length * slope)
        shorter = -slope * length.square() / torch.where(bend > 0, bend, 1.0)
        shorter = torch.where((bend > 0) & new.isfinite(), shorter, length / 2)
        length = torch.where(good, length, torch.minimum(torch.maximum(shorter, length / 10), length / 2))
    length = torch.where(good, length, 0.0)
    moved = torch.where((length > 0)[blocks.index], x + blocks.times(length, direction), x)
    new, following = evaluate(moved)
    return moved, torch.where(length > 0, new, value), following
