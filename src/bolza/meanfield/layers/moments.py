r"""Second moments of a layer's values over its units: what the theory carries along the graph.

A value of shape ``(samples, *positions, units)`` (the units may sit in another dimension) is summed
up by K_ab = (1/n) Σ_i h_i^a h_i^b over its n units, for pairs of items (sample, position), and by the
means (1/n) Σ_i h_i^a. Where samples × positions is small every pair is kept (``full``); else only pairs
of samples at the same position, which convolutions, activations and normalisation over units respect.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Estimate", "Moments", "correlation_of", "estimate", "measure"]

MAX_FULL_ITEMS = 512


@dataclass(frozen=True)
class Moments:
    """Kernel and mean of one value.

    Args:
        kernel: ``(groups, items, items)``, float64. One group of all samples × positions if ``full``,
            else one group a position, whose items are the samples.
        mean: ``(groups, items)``.
        lead: sizes of the dimensions other than the units: samples first, then positions.
        units: number of units.
        unit_dim: which dimension of the value holds the units.
        full: which of the two layouts ``kernel`` has.
        gaussian: whether the units are (nearly) independent zero-mean Gaussians.
        sources: random layers from which the value stems without another random layer between; values
            with different sources are independent of each other.

    Example:
        >>> m = measure(torch.ones(3, 5), 1)
        >>> m.kernel.shape, m.units, m.samples
        (torch.Size([1, 3, 3]), 5, 3)
    """

    kernel: Tensor
    mean: Tensor
    lead: tuple[int, ...]
    units: int
    unit_dim: int
    full: bool
    gaussian: bool = False
    sources: frozenset[str] = frozenset()

    @property
    def variances(self) -> Tensor:
        """Diagonal of the kernel, ``(groups, items)``."""
        return self.kernel.diagonal(dim1=-2, dim2=-1)

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self.lead[0]

    @property
    def positions(self) -> int:
        """Number of positions; 1 if the value has none."""
        return math.prod(self.lead[1:])

    @property
    def q(self) -> float:
        """Mean variance over the items."""
        return float(self.variances.mean())

    @property
    def c(self) -> float:
        """Mean correlation over pairs of different items; ``nan`` with one item."""
        return correlation_of(self.kernel)

    @property
    def c_samples(self) -> float:
        """Mean correlation of two samples, each taken whole: over all its positions together."""
        kernel = self.same_positions().kernel.mean(0, keepdim=True)
        return correlation_of(kernel)

    def same_positions(self) -> Moments:
        """The layout that keeps only pairs at the same position."""
        if not self.full or self.positions == 1:
            return self
        s, p = self.samples, self.positions
        kernel = self.kernel.reshape(s, p, s, p).diagonal(dim1=1, dim2=3).permute(2, 0, 1)
        return replace(self, kernel=kernel, mean=self.mean.reshape(s, p).T, full=False)

    def with_(self, **changes: object) -> Moments:
        """A copy with some fields replaced."""
        return replace(self, **changes)  # type: ignore[arg-type]


def correlation_of(kernel: Tensor) -> float:
    """Mean of K_ab/√(K_aa K_bb) over a ≠ b (and groups); ``nan`` with one item or no signal."""
    items = kernel.shape[-1]
    if items < 2:
        return math.nan
    scale = kernel.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    alive = scale > 0
    inverse = torch.where(alive, 1 / scale, 0.0)
    pairs = alive.sum(-1).double()
    pairs = (pairs * (pairs - 1)).sum()
    total = (kernel * inverse[..., None] * inverse[..., None, :]).sum() - alive.sum()
    return float(total / pairs) if pairs > 0 else math.nan


def _items(value: Tensor, unit_dim: int, full: bool) -> Tensor:
    """The value as (groups, items, units) in float64 on the CPU."""
    v = value.detach().movedim(unit_dim, -1).to("cpu", torch.float64)
    v = v.reshape(v.shape[0], -1, v.shape[-1])  # (samples, positions, units)
    return v.reshape(1, -1, v.shape[-1]) if full else v.transpose(0, 1)


def measure(
    value: Tensor, unit_dim: int, *, full: bool | None = None, gaussian: bool = False, source: str = ""
) -> Moments:
    """Moments of an actual value.

    Args:
        value: ``(samples, …)``, at least two dimensions.
        unit_dim: dimension of the units.
        full: keep every pair of items; by default if there are at most 512 items.
        gaussian: passed on.
        source: name of the layer that the value comes from.

    Returns:
        The moments.

    Example:
        >>> measure(torch.tensor([[1.0, -1.0], [2.0, 2.0]]), 1).kernel.tolist()
        [[[1.0, 0.0], [0.0, 4.0]]]
    """
    unit_dim = unit_dim % value.ndim
    lead = tuple(s for d, s in enumerate(value.shape) if d != unit_dim)
    if full is None or math.prod(lead[1:]) == 1:
        full = math.prod(lead) <= MAX_FULL_ITEMS or math.prod(lead[1:]) == 1
    v = _items(value, unit_dim, full)
    kernel = v @ v.transpose(-1, -2) / v.shape[-1]
    sources = frozenset({source} if source else ())
    return Moments(kernel, v.mean(-1), lead, v.shape[-1], unit_dim, full, gaussian, sources)


@dataclass(frozen=True)
class Estimate:
    """A measured mean square and correlation with their standard errors over the units.

    Args:
        q: mean square over units and items.
        q_error: its standard error, from the spread of the units' own mean squares.
        c: mean correlation of pairs of items.
        c_error: its standard error, by the delta method over units.
    """

    q: float
    q_error: float
    c: float
    c_error: float


def estimate(value: Tensor, unit_dim: int, full: bool) -> Estimate:
    """Mean square and correlation of a value, with standard errors over its units.

    Given the layer before, the units of a random layer are independent, so their spread gives the
    error of this layer alone; what earlier layers of finite width added up is not in it.

    Args:
        value: ``(samples, …)``.
        unit_dim: dimension of the units.
        full: whether pairs across positions count.

    Example:
        >>> estimate(torch.ones(4, 8), 1, True)
        Estimate(q=1.0, q_error=0.0, c=1.0, c_error=0.0)
    """
    v = _items(value, unit_dim % value.ndim, full)  # (groups, items, units)
    groups, items, units = v.shape
    share = v.square().mean((0, 1))
    q = float(share.mean())
    kernel_diagonal = v.square().mean(-1, keepdim=True)
    z = v / kernel_diagonal.clamp_min(1e-300).sqrt()
    if items < 2:
        return Estimate(q, _standard_error(share), math.nan, math.nan)
    # Per unit: Σ_{a≠b} z_a z_b, minus the response of the normalisation, Σ_a z_a² Σ_{b≠a} c_ab.
    row = z.sum(1)  # (groups, units)
    products = row.square() - z.square().sum(1)
    c_rows = (z @ row[..., None] / units).squeeze(-1) - z.square().mean(-1)  # Σ_{b≠a} c_ab: (groups, items)
    response = (z.square() * c_rows[..., None]).sum(1)
    pairs = groups * items * (items - 1)
    c = float(products.mean(-1).sum() / pairs)
    influence = (products - response).sum(0) / pairs
    return Estimate(q, _standard_error(share), c, _standard_error(influence))


def _standard_error(per_unit: Tensor) -> float:
    if len(per_unit) < 2:
        return math.nan
    return float(per_unit.std() / math.sqrt(len(per_unit)))
