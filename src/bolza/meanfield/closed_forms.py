r"""Gaussian moments in closed form: erf, and functions linear on either side of zero.

erf (Williams 1997), with D = √((1+2q_u)(1+2q_v)) and k = c√(q_u q_v):
    E φφ = 2/π arcsin(2k/D),   E φ'φ' = 4/π (D² - 4k²)^(-1/2).
φ(h) = h for h > 0 and αh below (Cho & Saul 2009), with κ₀ = (π - arccos c)/π and
κ₁ = (√(1-c²) + c(π - arccos c))/π:
    E φφ = √(q_u q_v) [(1-α)² κ₁/2 + α c],   E φ'φ' = (1-α)² κ₀/2 + α.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["ClosedForm", "ErfForm", "RandomRectifierForm", "RectifierForm"]


class ClosedForm(Protocol):
    """Moments of an activation, elementwise in float64 tensors of variances and correlations."""

    def mean(self, q: Tensor) -> Tensor:
        """E φ(h)."""

    def second(self, q: Tensor) -> Tensor:
        """E φ(h)²."""

    def slope(self, q: Tensor) -> Tensor:
        """E φ'(h)²."""

    def second_rate(self, q: Tensor) -> Tensor:
        """d/dq E φ(h)²."""

    def cross(self, q_u: Tensor, q_v: Tensor, c: Tensor) -> Tensor:
        """E φ(u)φ(v)."""

    def cross_slope(self, q_u: Tensor, q_v: Tensor, c: Tensor) -> Tensor:
        """E φ'(u)φ'(v)."""


@dataclass(frozen=True)
class ErfForm:
    """The error function."""

    def mean(self, q: Tensor) -> Tensor:
        """Zero: odd function."""
        return torch.zeros_like(q)

    def second(self, q: Tensor) -> Tensor:
        """2/π arcsin(2q/(1+2q)), as an arctangent that keeps its digits for large q."""
        return 2 / pi * torch.atan2(2 * q, (1 + 4 * q).sqrt())

    def slope(self, q: Tensor) -> Tensor:
        """4/π (1+4q)^(-1/2)."""
        return 4 / pi / (1 + 4 * q).sqrt()

    def second_rate(self, q: Tensor) -> Tensor:
        """Derivative of `second`."""
        return 4 / pi / ((1 + 2 * q) * (1 + 4 * q).sqrt())

    def cross(self, q_u: Tensor, q_v: Tensor, c: Tensor) -> Tensor:
        """2/π arcsin(2k/D)."""
        k = 2 * c * (q_u * q_v).sqrt()
        return 2 / pi * torch.atan2(k, self._root(q_u, q_v, c))

    def cross_slope(self, q_u: Tensor, q_v: Tensor, c: Tensor) -> Tensor:
        """4/π (D² - 4k²)^(-1/2)."""
        return 4 / pi / self._root(q_u, q_v, c)

    @staticmethod
    def _root(q_u: Tensor, q_v: Tensor, c: Tensor) -> Tensor:
        return (1 + 2 * (q_u + q_v) + 4 * q_u * q_v * (1 - c) * (1 + c)).sqrt()


@dataclass(frozen=True)
class RectifierForm:
    """φ(h) = h for h > 0, ``negative`` · h below: ReLU (0), leaky ReLU, the identity (1).

    Args:
        negative: slope below zero.
    """

    negative: float

    def mean(self, q: Tensor) -> Tensor:
        """(1-α) √(q/2π)."""
        return (1 - self.negative) * (q / (2 * pi)).sqrt()

    def second(self, q: Tensor) -> Tensor:
        """(1+α²) q/2."""
        return (1 + self.negative**2) / 2 * q

    def slope(self, q: Tensor) -> Tensor:
        """(1+α²)/2, for every q."""
        return torch.full_like(q, (1 + self.negative**2) / 2)

    def second_rate(self, q: Tensor) -> Tensor:
        """(1+α²)/2, for every q."""
        return self.slope(q)

    def cross(self, q_u: Tensor, q_v: Tensor, c: Tensor) -> Tensor:
        """√(q_u q_v) [(1-α)² κ₁/2 + α c]."""
        angle = 2 * torch.atan2((1 - c).clamp_min(0).sqrt(), (1 + c).clamp_min(0).sqrt())
        kappa = (torch.sin(angle) + c * (pi - angle)) / pi
        return (q_u.sqrt() * q_v.sqrt()) * ((1 - self.negative) ** 2 / 2 * kappa + self.negative * c)

    def cross_slope(self, q_u: Tensor, q_v: Tensor, c: Tensor) -> Tensor:
        """(1-α)² κ₀/2 + α."""
        # arccos keeps only half the digits near c = 1; the half-angle form keeps all of them.
        angle = 2 * torch.atan2((1 - c).clamp_min(0).sqrt(), (1 + c).clamp_min(0).sqrt())
        value = (1 - self.negative) ** 2 / 2 * (1 - angle / pi) + self.negative
        return value.expand(torch.broadcast_tensors(q_u, q_v, c)[0].shape)


@dataclass(frozen=True)
class RandomRectifierForm:
    """φ(h) = h for h > 0, αh below, with a random α: PReLU with a slope per channel, RReLU in training.

    Args:
        slope_mean: E α.
        slope_square: E α².
        shared: whether two inputs meet the same α (a slope of the unit) or independent ones (noise).
    """

    slope_mean: float
    slope_square: float
    shared: bool

    def mean(self, q: Tensor) -> Tensor:
        """(1 - E α) √(q/2π)."""
        return RectifierForm(self.slope_mean).mean(q)

    def second(self, q: Tensor) -> Tensor:
        """(1 + E α²) q/2."""
        return (1 + self.slope_square) / 2 * q

    def slope(self, q: Tensor) -> Tensor:
        """(1 + E α²)/2, for every q."""
        return torch.full_like(q, (1 + self.slope_square) / 2)

    def second_rate(self, q: Tensor) -> Tensor:
        """(1 + E α²)/2, for every q."""
        return self.slope(q)

    def cross(self, q_u: Tensor, q_v: Tensor, c: Tensor) -> Tensor:
        """√(q_u q_v) [E(1-α)(1-α') κ₁/2 + E α c]."""
        kappa = RectifierForm(0.0).cross(q_u, q_v, c)
        return self._both * kappa + self.slope_mean * c * (q_u.sqrt() * q_v.sqrt())

    def cross_slope(self, q_u: Tensor, q_v: Tensor, c: Tensor) -> Tensor:
        """E(1-α)(1-α') κ₀/2 + E α."""
        return self._both * RectifierForm(0.0).cross_slope(q_u, q_v, c) + self.slope_mean

    @property
    def _both(self) -> float:
        square = self.slope_square if self.shared else self.slope_mean**2
        return 1 - 2 * self.slope_mean + square
