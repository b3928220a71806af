"""What kind of function is this? Noise, kinks, its scale, and whether its derivative is its derivative.

Quadrature needs to know where a function has kinks and how fast it varies, and whether it is a function
at all: one that draws random numbers is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError, UserCodeError
from bolza.meanfield.sampled import differentiate, frozen_noise
from bolza.ops.gaussian import expectation

__all__ = ["Probed", "check_elementwise", "find_kinks", "probe", "scaled_expectation"]

Elementwise = Callable[[Tensor], Tensor]
MOST_KINKS = 16  # beyond, quadrature in the plane costs more than sampling
_REACH, _CELLS, _CANDIDATES = 64.0, 12_801, 256


@dataclass(frozen=True)
class Probed:
    """How to integrate a function.

    Args:
        noisy: it draws random numbers.
        kinks: places where it or its derivative jumps.
        width: scale on which it varies, for quadrature: 1, or 1/8 for a fast one.
        rough: no quadrature at hand is right.
        true_derivative: its derivative, where autograd gives another one (a surrogate); else None.
    """

    noisy: bool = False
    kinks: tuple[float, ...] = ()
    width: float = 1.0
    rough: bool = False
    true_derivative: Elementwise | None = None


def scaled_expectation(
    f: Elementwise, q: Tensor, kinks: Sequence[float], width: float, mean: Tensor | None = None
) -> Tensor:
    """E f(h), h ~ N(mean, q), with nodes fine enough for a function that varies on the scale ``width``."""
    if width == 1.0:
        return expectation(f, q, kinks, mean)
    mean = None if mean is None else mean / width
    return expectation(lambda h: f(width * h), q / width**2, tuple(k / width for k in kinks), mean)


def check_elementwise(f: Elementwise, name: str) -> bool:
    """Refuse what is not an elementwise function; return whether it draws random numbers.

    Raises:
        ArgumentError: the result has another shape, mixes elements, or is not finite on [-3, 3].
        UserCodeError: the function raised.
    """
    at = torch.linspace(-3, 3, 7, dtype=torch.float64)
    moved = at.clone()
    moved[-1] += 0.25
    try:
        with torch.no_grad(), frozen_noise(1):
            first = f(at.clone())
        with torch.no_grad(), frozen_noise(1):
            again = f(at.clone())
        with torch.no_grad(), frozen_noise(1):
            other = f(moved)
        with torch.no_grad(), frozen_noise(2):  # many numbers: the noise may be rare
            draws = [f(at.repeat(2000)) for _ in range(2)]
    except Exception as error:
        raise UserCodeError(f"activation {name!r} raised on a tensor of 7 numbers: {error}.") from error
    refusal = ArgumentError(
        f"activation {name!r} is not elementwise: it must map a tensor to one of the same shape, "
        "each number by itself."
    )
    if not isinstance(first, Tensor) or first.shape != at.shape:
        raise refusal
    tracked = torch.allclose(first, again, equal_nan=True)  # its noise comes from torch's generator
    if tracked and not torch.allclose(first[:-1], other[:-1], equal_nan=True):
        raise refusal
    if not bool(torch.isfinite(first).all()):
        raise ArgumentError(f"activation {name!r} is not finite on [-3, 3]: {first.tolist()}.")
    return not tracked or not torch.equal(draws[0].nan_to_num(), draws[1].nan_to_num())


def probe(phi: Elementwise, derivative: Elementwise) -> Probed:
    """Look at a function without noise; see `Probed`."""
    kinks = find_kinks(phi, derivative)
    if len(kinks) > MOST_KINKS:
        return Probed(rough=True)
    width = _width(phi, derivative, kinks)
    if width is None:
        return Probed(rough=True)
    true: Elementwise | None = None
    at = torch.linspace(-7.93, 7.97, 400, dtype=torch.float64)
    for kink in kinks:
        at = at[(at - kink).abs() > 1e-2]
    difference = _stencil(phi, at)
    if not torch.allclose(difference, derivative(at), rtol=1e-6, atol=1e-6):
        if bool((difference.abs() < 1e-9).all()):
            true = torch.zeros_like
        elif kinks:
            return Probed(rough=True)
        else:
            true = lambda h: _stencil(phi, h)  # noqa: E731
    return Probed(kinks=kinks, width=width, true_derivative=true)


def _stencil(f: Elementwise, h: Tensor, step: float = 2e-3) -> Tensor:
    """f'(h) by the difference of sixth order."""
    weights = ((1, 45.0), (2, -9.0), (3, 1.0))
    return sum(w * (f(h + k * step) - f(h - k * step)) for k, w in weights) / (60 * step)  # type: ignore[return-value]


def _width(phi: Elementwise, derivative: Elementwise, kinks: Sequence[float]) -> float | None:
    """The coarser of two scales at which refining the rule changes nothing; None if neither does."""
    q = torch.logspace(-2.0, 1.5, 24, dtype=torch.float64)  # many: even nodes alias some of them away

    def means(width: float) -> Tensor:
        return torch.stack(
            [scaled_expectation(lambda h, g=g: g(h) ** 2, q, kinks, width) for g in (phi, derivative)]  # type: ignore[misc]
        )

    coarse = means(1.0)
    for width in (1.0, 1 / 8):
        fine = means(width / 8)
        if bool(((coarse - fine).abs() <= 1e-9 * fine.abs() + 1e-14).all()):
            return width
        coarse = fine
    return None


def find_kinks(phi: Elementwise, derivative: Elementwise) -> tuple[float, ...]:
    """Jumps of the function or of its derivative within [-64, 64], located by bisection.

    A smooth function changes less and less as an interval shrinks; a jump stays. Where to look: the
    intervals whose change differs most from that of their neighbours.

    Args:
        phi: the function.
        derivative: its derivative.

    Returns:
        The places, in ascending order.
    """
    found: list[float] = []
    for f in (phi, derivative):
        grid = torch.linspace(-_REACH, _REACH, _CELLS + 1, dtype=torch.float64)  # 0 is not on the grid
        step = f(grid).diff()
        odd = torch.nn.functional.pad((2 * step[1:-1] - step[:-2] - step[2:]).abs(), (1, 1))
        odd = odd.nan_to_num(0.0) / (1e-3 + f(grid)[:-1].abs().nan_to_num(0.0))
        # a kink on a node divides its oddness between two intervals; a large one makes its neighbours odd
        keep = odd.argsort(descending=True)[:_CANDIDATES]
        low, high = grid[:-1][keep], grid[1:][keep]
        for _ in range(45):
            middle = (low + high) / 2
            left = (f(middle) - f(low)).abs() >= (f(high) - f(middle)).abs()
            low, high = torch.where(left, low, middle), torch.where(left, middle, high)
        size = (f(high) - f(low)).abs() / f(high).abs().clamp_min(1.0)
        found += ((low + high) / 2)[size > 1e-7].tolist()
    merged: list[float] = []
    for kink in sorted(found):
        if not merged or kink - merged[-1] > 1e-6:
            merged.append(round(kink, 12) + 0.0)
    return tuple(merged)


def autograd(f: Elementwise) -> Elementwise:
    """The derivative that autograd gives."""
    return lambda h: differentiate(f, h)
