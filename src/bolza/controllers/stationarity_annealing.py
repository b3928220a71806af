r"""Lower the learning rate when the run has become stationary.

For θ' = θ − η v (v the step's direction, for SGD the mini-batch gradient g) the identity

    ‖θ'‖² = ‖θ‖² − 2η θ·v + η² ‖v‖²      so      Δ := θ·v − (η/2)‖v‖² = (‖θ‖² − ‖θ'‖²) / 2η

is exact, and if the law of θ no longer changes, E Δ = 0: for SGD E[θ·∇f] = (η/2) E‖g‖², with no
assumption on f, on the size of η or on the noise. For heavy ball, v ← μv + g, the same E Δ = 0 reads
E[θ·∇f] = (η/2)(1+μ) E‖v‖². On f = ½aθ² with noise variance s² both sides are η s²/(2 − ηa) for SGD.

The test. A plain mean of Δ over n steps telescopes to (‖θ_0‖² − ‖θ_n‖²)/2ηn, which looks at two points
only and whose usual error bar is far too wide. With triangular weights, w_k rising to the middle of the
window and falling again, summation by parts gives instead

    Σ_k w_k Δ_k ∝ mean of ‖θ‖² over the first half − mean of ‖θ‖² over the second half,

a contrast that uses every step and has mean 0 under stationarity. Its standard error follows from the
spread of the means of blocks within each half, which are nearly independent when a block is longer than
the memory of the run.

Reference: the identity is that of a stationary chain, used for annealing by Yaida (2019),
*Fluctuation-dissipation relations for stochastic gradient descent*, arXiv:1810.00004, and, with an error
bar, by Lang, Xiao & Zhang (2019), *Using Statistics to Automate Stochastic Optimization*,
arXiv:1909.09785. Departures: the triangular weights; the window starts afresh after every decision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError
from bolza.core.reference import Reference, cites

__all__ = ["StationarityAnnealing", "fluctuation_dissipation_gap", "stationarity_z"]

YAIDA = Reference(
    "yaida2019fluctuation",
    "Yaida, Sho",
    "Fluctuation-dissipation relations for stochastic gradient descent",
    2019,
    "International Conference on Learning Representations",
    "1810.00004",
)
LANG = Reference(
    "lang2019statistics",
    "Lang, Hunter and Xiao, Lin and Zhang, Pengchuan",
    "Using Statistics to Automate Stochastic Optimization",
    2019,
    "Advances in Neural Information Processing Systems",
    "1909.09785",
)


def fluctuation_dissipation_gap(theta: Tensor, v: Tensor, lr: float) -> Tensor:
    r"""Δ = θ·v − (η/2)‖v‖², whose mean is zero once the chain θ' = θ − η v is stationary.

    Args:
        theta: parameters before the step, shape ``(..., dim)``.
        v: direction of the step, same shape.
        lr: η.

    Returns:
        Δ, shape ``(...)``; equal to (‖θ‖² − ‖θ'‖²)/2η.

    Example:
        >>> theta, v = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 1.0])
        >>> fluctuation_dissipation_gap(theta, v, lr=0.1)
        tensor(2.4375)
    """
    return (theta * v).sum(-1) - lr / 2 * v.square().sum(-1)


def stationarity_z(block_means: Tensor) -> Tensor:
    r"""Z of the weighted identity, from the means of ‖θ‖² over equal blocks of a window.

    z = (m₁ − m₂) / SE with m₁, m₂ the means of the first and the second half of the blocks and
    SE² = (s₁² + s₂²)/(B/2), s² the variance of block means within a half.

    Args:
        block_means: shape ``(..., B)``, B even and at least 4.

    Returns:
        z, shape ``(...)``; Student's t with B − 2 degrees of freedom for independent Gaussian blocks.

    Raises:
        ArgumentError: B is odd or less than 4.

    Example:
        >>> stationarity_z(torch.tensor([1.0, 3.0, 1.0, 3.0]))
        tensor(0.)
    """
    blocks = block_means.shape[-1]
    if blocks < 4 or blocks % 2:
        raise ArgumentError(f"block_means has {blocks} blocks: give an even number, at least 4")
    first, second = block_means.unflatten(-1, (2, blocks // 2)).unbind(-2)
    error = ((first.var(-1) + second.var(-1)) / (blocks // 2)).sqrt()
    return (first.mean(-1) - second.mean(-1)) / error.clamp_min(torch.finfo(error.dtype).tiny)


@cites(YAIDA, LANG)
@dataclass(frozen=True)
class StationarityAnnealing:
    r"""Policy: η ← factor · η when the stationarity identity holds within ``threshold`` standard errors.

    Worn by :class:`PolicyScheduler`; one norm of the parameters a step is all it costs. At a stationary
    run a window is accepted with probability P(|z| < threshold), about 0.67 for threshold 1 and 20 blocks.

    Args:
        window: steps between two decisions, a multiple of ``blocks``. It should span many memories of the
            run: drift that is invisible within a window counts as stationary.
        factor: what η is multiplied by.
        threshold: largest |z| taken for stationary.
        blocks: blocks of the window; even, at least 4.
        min_lr: η is never set below it.

    Raises:
        ArgumentError: a setting makes no sense.

    Reference: Yaida (2019), arXiv:1810.00004, eq. (FDR1); departures in the module's text.

    Example:
        >>> from bolza.controllers import PolicyScheduler
        >>> theta = torch.zeros(3, requires_grad=True)
        >>> optimizer = torch.optim.SGD([theta], lr=0.5)
        >>> scheduler = PolicyScheduler(optimizer, StationarityAnnealing(window=400, factor=0.1))
        >>> generator = torch.Generator().manual_seed(0)
        >>> while optimizer.param_groups[0]["lr"] > 0.4:  # noise about the minimum of ½‖θ‖²
        ...     theta.grad = theta.detach() + torch.randn(3, generator=generator)
        ...     optimizer.step()
        ...     _ = scheduler.step()
        >>> optimizer.param_groups[0]["lr"]
        0.05
    """

    window: int = 1000
    factor: float = 0.1
    threshold: float = 1.0
    blocks: int = 20
    min_lr: float = 0.0

    observes = ("parameter_square_norm",)

    def __post_init__(self) -> None:
        if self.blocks < 4 or self.blocks % 2:
            raise ArgumentError(f"blocks={self.blocks} must be even and at least 4")
        if self.window < self.blocks or self.window % self.blocks:
            raise ArgumentError(f"window={self.window} must be a positive multiple of blocks={self.blocks}")
        if not 0 < self.factor < 1:
            raise ArgumentError(f"factor={self.factor} must lie between 0 and 1: it lowers the learning rate")
        if not self.threshold > 0:
            raise ArgumentError(
                f"threshold={self.threshold} must be positive: it is a number of standard errors"
            )

    def init(self) -> dict[str, Any]:
        """Start an empty window."""
        return {"count": 0, "sum": 0.0, "means": [], "z": None}

    def update(
        self, state: dict[str, Any], observation: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """Add ‖θ‖² to the window; decide at its end."""
        length = self.window // self.blocks
        count = state["count"] + 1
        square = observation["parameter_square_norm"]
        if not math.isfinite(square):  # the run has diverged: nothing is learned from it
            return state, {}
        total = state["sum"] + square
        if count % length:
            return {**state, "count": count, "sum": total}, {}
        means = [*state["means"], total / length]
        if count < self.window:
            return {**state, "count": count, "sum": 0.0, "means": means}, {}
        z = float(stationarity_z(torch.tensor(means, dtype=torch.float64)))
        action = {}
        lr = float(observation["lr"])
        if abs(z) < self.threshold and lr > self.min_lr:
            action = {"lr": max(lr * self.factor, self.min_lr)}
        return {**self.init(), "z": z}, action
