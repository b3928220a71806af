"""Priors of hyper-parameters that live on a logarithmic scale."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bolza.core.errors import ArgumentError

__all__ = ["LogPrior"]


@dataclass(frozen=True)
class LogPrior:
    r"""Where a hyper-parameter of a population comes from: h = 10^{N(mean, spread²)}, mutated by factors.

    Args:
        mean: decimal logarithm of the median.
        spread: standard deviation of the decimal logarithm.
        low: least value; draws and mutations are cut there.
        high: greatest value.
        complement: the law is that of 1 − h, as for a momentum near 1; ``low`` and ``high`` are of 1 − h too.

    Raises:
        ArgumentError: a negative spread, or bounds in the wrong order.

    Example:
        >>> LogPrior(-2, 0).draw(torch.Generator())
        0.01
        >>> LogPrior(-1, 0, complement=True).draw(torch.Generator())
        0.9
    """

    mean: float
    spread: float
    low: float = 0.0
    high: float = math.inf
    complement: bool = False

    def __post_init__(self) -> None:
        if not self.spread >= 0 or not 0 <= self.low < self.high:
            raise ArgumentError(
                f"spread={self.spread}, low={self.low}, high={self.high}: give spread ≥ 0 and 0 ≤ low < high"
            )

    def draw(self, generator: torch.Generator) -> float:
        """A value."""
        return self._value(10.0 ** (self.mean + self.spread * _normal(generator)))

    def mutate(self, value: float, strength: float, generator: torch.Generator) -> float:
        """The value times 2^{N(0, strength²)}."""
        old = 1 - value if self.complement else value
        return self._value(old * 2.0 ** max(-1000.0, min(1000.0, strength * _normal(generator))))

    def _value(self, value: float) -> float:
        cut = min(max(value, self.low), self.high)
        return 1 - min(cut, 1.0) if self.complement else min(cut, 1e30)


def _normal(generator: torch.Generator) -> float:
    return float(torch.randn((), dtype=torch.float64, generator=generator))
