r"""Kernels of activations that read values which are not Gaussian, as in relu(x + f(x)).

A unit of such a value is a function h of a few independent Gaussians, one a random layer: x = φ(u) and f(x) = g give
h = φ(φ(u) + g). The function is kept as a tree, its *recipe*, and

    K = E h(a) h(b)              Θ = Σ_ℓ Θ_ℓ E ∂h(a)/∂u_ℓ ∂h(b)/∂u_ℓ       over the Gaussians u_ℓ of the recipe

(not E φ'φ' Θ: the tangent kernel of x + f(x) differs from unit to unit, along with its value). Both means are over
quasi-random points, in mirrored pairs, whitened so that second moments are exact, and the same for every pair of
inputs: what they leave is smooth in the kernels, and the difference between halves of the points says how large it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bolza.core.errors import UnsupportedError
from bolza.meanfield.activations import Activation

__all__ = ["Applied", "Leaf", "Product", "Recipe", "Scaled", "SampledMoments", "Sum", "sampled_moments"]

# Points × pairs in one array of samples: a few such arrays stay in the cache of a core.
_NUMBERS = 1 << 16

Slopes = dict[int, Tensor | None]  # None stands for 1


class Recipe:
    """How a unit comes from independent Gaussians."""

    def leaves(self) -> list[Leaf]:
        """The Gaussians, each once.

        Raises:
            UnsupportedError: two of them depend on each other.
        """
        found: list[Leaf] = []
        self._collect(found)
        for i, one in enumerate(found):
            for other in found[:i]:
                if one.sources & other.sources:
                    both = ", ".join(sorted(one.sources & other.sources))
                    raise UnsupportedError(
                        f"an activation reads two different values that stem from the same random layer ({both}), "
                        "whose kernel is not known here"
                    )
        return found

    def _collect(self, found: list[Leaf]) -> None:
        raise NotImplementedError

    def value(self, drawn: dict[int, Tensor], slope: bool) -> tuple[Tensor, Slopes]:
        """The value, and its derivatives with respect to the leaves by number of the leaf."""
        raise NotImplementedError

    def map(self, f: Callable[[Leaf], Leaf]) -> Recipe:
        """The recipe with other leaves."""
        raise NotImplementedError


@dataclass(frozen=True)
class Leaf(Recipe):
    """A Gaussian: its kernels, the second moments at both ends (which broadcast with them), and its random layers."""

    nngp: Tensor
    ntk: Tensor | None
    left: Tensor
    right: Tensor
    sources: frozenset[str]
    origin: Tensor

    def _collect(self, found: list[Leaf]) -> None:
        if all(leaf.origin is not self.origin for leaf in found):
            found.append(self)

    def value(self, drawn: dict[int, Tensor], slope: bool) -> tuple[Tensor, Slopes]:
        """The value and its derivatives."""
        h = drawn[id(self.origin)]
        return h, {id(self.origin): None} if slope else {}

    def map(self, f: Callable[[Leaf], Leaf]) -> Recipe:
        """The same with other leaves."""
        return f(self)


@dataclass(frozen=True)
class Applied(Recipe):
    """An activation of a value."""

    act: Activation
    inner: Recipe

    def _collect(self, found: list[Leaf]) -> None:
        self.inner._collect(found)

    def value(self, drawn: dict[int, Tensor], slope: bool) -> tuple[Tensor, Slopes]:
        """The value and its derivatives."""
        h, slopes = self.inner.value(drawn, slope)
        gain = self.act.derivative(h).to(h) if slope else h
        return self.act.phi(h).to(h), _times(slopes, gain)

    def map(self, f: Callable[[Leaf], Leaf]) -> Recipe:
        """The same with other leaves."""
        return Applied(self.act, self.inner.map(f))


@dataclass(frozen=True)
class Scaled(Recipe):
    """factor · h + shift."""

    inner: Recipe
    factor: float = 1.0
    shift: float = 0.0

    def _collect(self, found: list[Leaf]) -> None:
        self.inner._collect(found)

    def value(self, drawn: dict[int, Tensor], slope: bool) -> tuple[Tensor, Slopes]:
        """The value and its derivatives."""
        h, slopes = self.inner.value(drawn, slope)
        factor = torch.full_like(h, self.factor)
        return self.factor * h + self.shift, _times(slopes, factor)

    def map(self, f: Callable[[Leaf], Leaf]) -> Recipe:
        """The same with other leaves."""
        return Scaled(self.inner.map(f), self.factor, self.shift)


@dataclass(frozen=True)
class Sum(Recipe):
    """The sum of two values."""

    first: Recipe
    second: Recipe

    def _collect(self, found: list[Leaf]) -> None:
        self.first._collect(found)
        self.second._collect(found)

    def value(self, drawn: dict[int, Tensor], slope: bool) -> tuple[Tensor, Slopes]:
        """The value and its derivatives."""
        (one, left), (two, right) = self.first.value(drawn, slope), self.second.value(drawn, slope)
        return one + two, _added(left, right)

    def map(self, f: Callable[[Leaf], Leaf]) -> Recipe:
        """The same with other leaves."""
        return type(self)(self.first.map(f), self.second.map(f))


class Product(Sum):
    """The product of two values."""

    def value(self, drawn: dict[int, Tensor], slope: bool) -> tuple[Tensor, Slopes]:
        """The value and its derivatives."""
        (one, left), (two, right) = self.first.value(drawn, slope), self.second.value(drawn, slope)
        return one * two, _added(_times(left, two), _times(right, one))


def _times(slopes: Slopes, factor: Tensor) -> Slopes:
    return {leaf: factor if s is None else s * factor for leaf, s in slopes.items()}


def _added(left: Slopes, right: Slopes) -> Slopes:
    both = dict(left)
    for leaf, s in right.items():
        if leaf in both:
            was = both[leaf]
            both[leaf] = (1.0 if was is None else was) + (torch.ones(()) if s is None else s)
        else:
            both[leaf] = s
    return both


@dataclass
class SampledMoments:
    """Points for a number of Gaussians, and the largest relative error met with them."""

    points: Tensor
    error: float = 0.0


def sampled_moments(
    recipe: Recipe, slope: bool, cache: dict[Any, Any], samples: int, seed: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """E h(a) h(b), Σ_ℓ Θ_ℓ E ∂_ℓ h(a) ∂_ℓ h(b) and E h(a), for every pair of the kernels of the leaves.

    Args:
        recipe: of h.
        slope: whether the tangent kernel is wanted.
        cache: keeps the points, and the error.
        samples: number of points.
        seed: of the points.
    """
    leaves = recipe.leaves()
    shape, like = leaves[0].nngp.shape, leaves[0].nngp
    key = ("sampled", len(leaves))
    if key not in cache:
        cache[key] = SampledMoments(_points(2 * len(leaves), samples, seed))
    known: SampledMoments = cache[key]
    z = known.points.to(
        like.device, torch.float32
    )  # (2 leaves, points); far more digits than the points give
    scales = [_scales(leaf, shape) for leaf in leaves]
    slope = slope and any(leaf.ntk is not None for leaf in leaves)
    tangents = [
        leaf.ntk.expand(shape).reshape(-1) if slope and leaf.ntk is not None else None for leaf in leaves
    ]
    nngp, mean = like.new_empty(shape.numel()), like.new_empty(shape.numel())
    ntk = torch.zeros_like(nngp) if slope else None
    step = max(1, _NUMBERS // z.shape[1])
    apart = z.new_zeros(())
    for start in range(0, len(nngp), step):
        at = slice(start, start + step)
        drawn: tuple[dict[int, Tensor], dict[int, Tensor]] = ({}, {})
        for i, (leaf, (left, along, across)) in enumerate(zip(leaves, scales, strict=True)):
            drawn[0][id(leaf.origin)] = left[at] * z[2 * i]
            drawn[1][id(leaf.origin)] = torch.addcmul(along[at] * z[2 * i], across[at], z[2 * i + 1])
        (one, before), (two, after) = (recipe.value(d, slope) for d in drawn)
        mean[at] = one.mean(-1)
        halves = (one * two).unflatten(-1, (2, -1)).mean(-1)
        nngp[at] = halves.mean(-1)
        apart = torch.maximum(apart, halves.diff(dim=-1).abs().max() / 2)
        if ntk is not None:
            for leaf, tangent in zip(leaves, tangents, strict=True):
                if tangent is not None:
                    ntk[at] += tangent[at] * _mean_product(before[id(leaf.origin)], after[id(leaf.origin)])
    top = float(nngp.abs().max())
    known.error = max(known.error, float(apart) / top if top else 0.0)
    return nngp.reshape(shape), None if ntk is None else ntk.reshape(shape), mean.reshape(shape)


def _scales(leaf: Leaf, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    """√q_a, and √q_b c and √q_b √(1 - c²), as columns: u(a) and u(b) from two standard normals."""
    k, left, right = (t.expand(shape).reshape(-1, 1).double() for t in (leaf.nngp, leaf.left, leaf.right))
    left, right = left.clamp_min(0).sqrt(), right.clamp_min(0).sqrt()
    size = left * right
    c = torch.where(size > 0, k / size.clamp_min(torch.finfo(k.dtype).tiny), 1.0).clamp(-1, 1)
    return left.float(), (right * c).float(), (right * ((1 - c) * (1 + c)).sqrt()).float()


def _mean_product(one: Tensor | None, two: Tensor | None) -> Tensor | float:
    if one is None or two is None:
        return 1.0
    return (one * two).mean(-1)


def _points(dims: int, samples: int, seed: int) -> Tensor:
    """Standard normal points ``(dims, samples)``; either half of them is made of mirrored pairs."""
    half = max(samples // 2, 2 * dims)
    half += half % 2
    uniform = torch.quasirandom.SobolEngine(dims, scramble=True, seed=seed).draw(half, dtype=torch.float64)
    z = torch.special.ndtri(uniform.clamp(1e-9, 1 - 1e-9)).T
    factor = torch.linalg.cholesky(z @ z.T / half)
    z = torch.linalg.solve_triangular(factor, z, upper=False)
    first, second = z.chunk(2, -1)
    return torch.cat([first, -first, second, -second], -1)
