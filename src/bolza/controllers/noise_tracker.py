r"""The noise of mini-batch gradients, from these gradients alone.

With weights w_i that decay as β^{k−i} and sum to one, ḡ = Σ w_i g_i and independent batches of B_i samples,

    E Σ w_i |g_i|² = |∇f|² + tr Σ · h_1,      h_1 = Σ w_i/B_i
    E |ḡ|²         = |∇f|² + tr Σ · h_2,      h_2 = Σ w_i²/B_i

are two equations for two unknowns, exact however the batch size changes, as long as ∇f and Σ stand still over the
1/(1 − β) steps of the average. The simple noise scale is tr Σ/|∇f|².

Reference: McCandlish, Kaplan, Amodei & OpenAI Dota Team (2018), arXiv:1812.06162, appendix A.1, which compares two
batch sizes of one step instead of one batch and a moving average.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError
from bolza.core.reference import Reference, cites

__all__ = ["NoiseTracker"]

MCCANDLISH = Reference(
    "mccandlish2018empirical",
    "McCandlish, Sam and Kaplan, Jared and Amodei, Dario and {OpenAI Dota Team}",
    "An Empirical Model of Large-Batch Training",
    2018,
    arxiv="1812.06162",
)


@cites(MCCANDLISH)
class NoiseTracker:
    r"""Trace of the gradient noise and square of the gradient, from moving averages of mini-batch gradients.

    One copy of the gradient in memory, two passes over it a step, and no gradients of single samples.

    Args:
        beta: decay of the averages; 1/(1 − β) steps should be few against the time in which ∇f changes. In shuffled
            epochs |∇f|² comes out lower by up to tr Σ/N, as batches of one epoch make up for each other.

    Attributes:
        noise: tr Σ of a single sample, not negative; nan before the second gradient.
        signal: |∇f|², without bias, so that it may come out negative; nan before the second gradient.
        count: gradients seen.

    Raises:
        ArgumentError: ``beta`` is not in (0, 1).

    Reference: McCandlish et al. (2018), appendix A.1; departure: the average over steps in place of a large batch.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> tracker = NoiseTracker(beta=0.99)
        >>> for _ in range(500):  # |∇f|² = 100, tr Σ = 800, batches of 8
        ...     g = 1 + torch.randn(8, 100, generator=generator) * 8**0.5
        ...     _ = tracker.update([g.mean(0)], batch_size=8)
        >>> round(tracker.noise / 800, 1), round(tracker.signal / 100, 1)
        (1.0, 1.0)
    """

    def __init__(self, beta: float = 0.9) -> None:
        if not 0 < beta < 1:
            raise ArgumentError(f"beta={beta} must be between 0 and 1")
        self.beta = beta
        self.count = 0
        self._mean: dict[int, Tensor] = {}
        self._sums = [0.0, 0.0, 0.0]  # of w |g|², w/B and w²/B, not yet divided by the sum of the weights
        self._read: tuple[float, float] | None = None  # solved when asked for: |ḡ|² is one more pass

    @torch.no_grad()
    def update(self, gradients: Sequence[Tensor | None], batch_size: float) -> bool:
        """Take in the gradient of a mini-batch.

        Args:
            gradients: one a parameter, the same parameters every time; None counts as zero.
            batch_size: samples that it is the mean of.

        Returns:
            Whether it was taken: a gradient that is not finite is left out.
        """
        present = {i: g for i, g in enumerate(gradients) if g is not None}
        square = _square(list(present.values()))
        if not math.isfinite(square):
            return False
        rest = 1 - self.beta
        for i, g in present.items():
            held = self._mean.get(i)
            if held is None:
                self._mean[i] = torch.zeros_like(g, dtype=torch.promote_types(g.dtype, torch.float32))
            elif held.device != g.device:  # loaded from a file
                self._mean[i] = held.to(g.device)
        absent = [m for i, m in self._mean.items() if i not in present]
        if absent:
            torch._foreach_mul_(absent, self.beta)
        if present:
            into = [self._mean[i] for i in present]
            same = [g.to(m.dtype) for g, m in zip(present.values(), into, strict=True)]
            torch._foreach_lerp_(into, same, rest)
        a, b, c = self._sums
        self._sums = [
            self.beta * a + rest * square,
            self.beta * b + rest / batch_size,
            self.beta**2 * c + rest**2 / batch_size,
        ]
        self.count += 1
        self._read = None
        return True

    @property
    def noise(self) -> float:
        """Trace of Σ."""
        return self._solve()[0]

    @property
    def signal(self) -> float:
        """|∇f|²."""
        return self._solve()[1]

    def _solve(self) -> tuple[float, float]:
        if self.count < 2:
            return math.nan, math.nan
        if self._read is not None:
            return self._read
        total = 1 - self.beta**self.count
        square, h1, h2 = self._sums[0] / total, self._sums[1] / total, self._sums[2] / total**2
        mean = _square(list(self._mean.values())) / total**2
        noise = max(0.0, (square - mean) / (h1 - h2))
        self._read = noise, square - noise * h1
        return self._read

    def state_dict(self) -> dict[str, Any]:
        """The averages."""
        return {
            "count": self.count,
            "mean": {i: m.clone() for i, m in self._mean.items()},
            "sums": list(self._sums),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.count, self._sums = state["count"], list(state["sums"])
        self._mean = {i: m.clone() for i, m in state["mean"].items()}
        self._read = None


def _square(tensors: list[Tensor]) -> float:
    """Σ|·|², one reading from the device."""
    if not tensors:
        return 0.0
    norms = torch._foreach_norm(tensors)
    return float(torch.stack([n.to(norms[0].device, torch.float64) for n in norms]).square().sum())
