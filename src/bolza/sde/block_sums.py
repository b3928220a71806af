r"""Tail indices with errors: by the growth of block sums, and from the largest order statistics.

For n = K·M independent draws x with blocks of M, each block of r finer sums of m = M/r draws,

    1/α = mean over blocks of (log|Y^{(M)}| − mean log|Y^{(m)}|) / log r,     Y^{(m)} a sum of m draws

because a sum of r stable variables is r^{1/α} times one. With m = 1 this is the block estimator of the tail index;
blocks are independent, so their scatter is the error. It does not depend on scale, so every coordinate may have its
own, and so may every stretch of time that is longer than a block.

Reference: Mohammadi, Mohammadpour & Ogata (2015), *On estimating the tail index and the spectral measure of
multivariate α-stable distributions*; Şimşekli, Sagun & Gürbüzbalaban (2019), *A Tail-Index Analysis of Stochastic
Gradient Noise in Deep Neural Networks*, theorem 2; Hill (1975) for the estimator from order statistics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError, DataError
from bolza.core.reference import Reference, cites

__all__ = [
    "SIMSEKLI",
    "Centre",
    "TailIndex",
    "block_sizes",
    "centred_draws",
    "growth",
    "hill",
    "mean_and_error",
    "over_coordinates",
    "tail_index",
    "tail_of",
]

SIMSEKLI = Reference(
    key="simsekli2019tail",
    authors="Şimşekli, Umut and Sagun, Levent and Gürbüzbalaban, Mert",
    title="A Tail-Index Analysis of Stochastic Gradient Noise in Deep Neural Networks",
    year=2019,
    venue="International Conference on Machine Learning",
    arxiv="1901.06053",
)
HILL = Reference(
    key="hill1975simple",
    authors="Hill, Bruce M.",
    title="A Simple General Approach to Inference About the Tail of a Distribution",
    year=1975,
    venue="The Annals of Statistics",
)

Centre = Literal["mean", "median", "pairs", "none"]
_FEWEST = 4  # blocks that give an error at all
_ATOM = 0.01  # share of draws that are zero, or equal to the one before, above which a coordinate is left out


@dataclass(frozen=True)
class TailIndex:
    """Tail indices with standard errors.

    Attributes:
        index: α, float64; nan where a coordinate does not vary or repeats one value, infinite where the sums do not
            grow at all. May exceed 2 by its error.
        error: its standard error.
        block: draws in a block; 1 for estimates from order statistics.
        used: blocks, or order statistics, that the error rests on.
    """

    index: Tensor
    error: Tensor
    block: int
    used: int

    def __iter__(self) -> Iterator[Tensor]:
        """Index and error, for unpacking."""
        return iter((self.index, self.error))


def centred_draws(x: Tensor, dim: int, centre: Centre) -> Tensor:
    """Centred draws in float64, along the last dimension."""
    if not x.is_floating_point():
        raise ArgumentError(f"x has dtype {x.dtype}: tails are those of floating-point draws")
    if not -x.ndim <= dim < x.ndim:
        raise ArgumentError(f"dim is {dim} for x of shape {tuple(x.shape)}: give the dimension of the draws")
    x = x.detach().movedim(dim, -1).double()
    if not math.isfinite(float(x.sum())) and not bool(torch.isfinite(x).all()):
        raise DataError("x holds values that are not finite: leave those draws out")
    if centre == "pairs":
        n = x.shape[-1] // 2 * 2
        return x[..., 0:n:2] - x[..., 1:n:2]
    if centre == "mean":
        return x - x.mean(-1, keepdim=True)
    if centre == "median":
        return x - x.median(-1, keepdim=True).values
    if centre == "none":
        return x
    raise ArgumentError(f"centre is {centre!r}: choose from 'mean', 'median', 'pairs', 'none'")


def _log_magnitude(sums: Tensor) -> Tensor:
    """log|Y| along the last dimensions; a rare zero counts as the smallest value seen beside it."""
    size = sums.abs()
    zero = size == 0
    if bool(zero.any()):
        smallest = torch.where(zero, math.inf, size).amin(-1, keepdim=True)
        size = torch.where(zero, smallest, size)
    return size.log()


def growth(x: Tensor, fine: int, block: int, centre: Centre, atoms: bool = False) -> Tensor:
    """(log|Y^{(M)}| − mean log|Y^{(m)}|) / log r of each block, nan where a series has atoms: (..., K).

    Atoms are let pass with ``atoms``.
    """
    n = x.shape[-1]
    k, r = n // block, block // fine
    short = x[..., : k * block].unflatten(-1, (k * r, fine)).sum(-1)
    long = short.unflatten(-1, (k, r)).sum(-1)
    z = _log_magnitude(long) - _log_magnitude(short).unflatten(-1, (k, r)).mean(-1)
    if centre == "mean":  # sums of deviations from the mean of n draws are smaller by √(1 − M/n)
        z = z - (math.log1p(-block / n) - math.log1p(-fine / n)) / 2
    if atoms:
        return z / math.log(r)
    # logarithms of deviations say nothing where many draws are the same: at zero, or one after the other
    same = torch.maximum((x == 0).sum(-1), (x[..., 1:] == x[..., :-1]).sum(-1))
    return torch.where((same - 1 > _ATOM * n)[..., None], math.nan, z) / math.log(r)


def block_sizes(n: int, block: int | None, fine: int | None) -> tuple[int, int]:
    """Block M and fine m, with m a divisor of M; M = √n and m near √M where they are left open."""
    wide = math.isqrt(n) if block is None else block
    if fine is not None:
        narrow = fine
    elif block is None:
        narrow = max(1, round(math.sqrt(wide)))
    else:
        narrow = max((m for m in range(1, math.isqrt(max(wide, 1)) + 1) if wide % m == 0), default=1)
    if block is None:
        wide -= wide % max(narrow, 1)
    if narrow < 1 or wide < 2 * narrow or wide % narrow or n // wide < _FEWEST:
        raise ArgumentError(
            f"block is {wide} and fine is {narrow} for {n} draws: block must be a multiple of fine, at least twice "
            f"as large, and there must be at least {_FEWEST} blocks"
        )
    return narrow, wide


def mean_and_error(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the last dimension and its standard error."""
    return z.mean(-1), z.std(-1) / math.sqrt(z.shape[-1])


def tail_of(inverse: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """α and its error from 1/α and its."""
    infinite = torch.full_like(inverse, math.inf)
    grows = ~(inverse <= 0)  # nan stays nan
    return torch.where(grows, 1 / inverse, infinite), torch.where(grows, error / inverse**2, infinite)


def over_coordinates(z: Tensor) -> tuple[Tensor, int]:
    """Average over all coordinates, block by block: their errors are not independent."""
    flat = z.reshape(-1, z.shape[-1])
    flat = flat[~flat.isnan().any(-1)]
    return (flat.mean(0) if len(flat) else z.new_full((z.shape[-1],), math.nan)), len(flat)


@cites(SIMSEKLI)
def tail_index(
    x: Tensor,
    dim: int = -1,
    *,
    block: int | None = None,
    fine: int = 1,
    centre: Centre = "mean",
    average: bool = False,
) -> TailIndex:
    r"""Tail index of noise by the growth of its block sums, with errors, for many coordinates at once.

        1/α = (mean log|Y| − mean log|X|) / log M,      Y the sums of M successive draws

    An index below 2 is no proof of infinite variance: see :func:`tail_report`.

    Args:
        x: independent draws along ``dim``; all other dimensions are coordinates.
        dim: dimension of the draws.
        block: M; the square root of their number by default.
        fine: draws in the sums that take the place of single draws: above 1 the index of the sums, nearer
            to 2 where the variance is finite.
        centre: what is taken off first: ``"mean"``; ``"median"``, better for symmetric laws of index near 1;
            ``"pairs"``, differences of successive draws, which needs no centre, is symmetric and insensitive
            to slow drift, and halves the draws; ``"none"`` for draws that have zero mean already.
        average: one index for all coordinates (1/α is averaged), with an error that allows for their correlation.

    Returns:
        TailIndex of shape x without ``dim``, or of no dimension with ``average``.

    Raises:
        ArgumentError: too few draws for blocks of that size.
        DataError: a value is not finite.

    Reference: Şimşekli, Sagun & Gürbüzbalaban (2019), theorem 2, after Mohammadi et al. (2015). Departures: the
    paper pools all coordinates of a gradient into one series, here each keeps its own scale; the error is from
    the scatter of blocks.

    Example:
        >>> x = torch.randn(3, 10_000, generator=torch.Generator().manual_seed(0))
        >>> found = tail_index(x, average=True)
        >>> bool((found.index - 2).abs() < 3 * found.error), found.block
        (True, 100)
    """
    x = centred_draws(x, dim, centre)
    _, wide = block_sizes(x.shape[-1], block, fine)
    z = growth(x, fine, wide, centre)
    if average:
        z, _ = over_coordinates(z)
    return TailIndex(*tail_of(*mean_and_error(z)), block=wide, used=z.shape[-1])


@cites(HILL)
def hill(x: Tensor, dim: int = -1, *, k: int | None = None, centre: Centre = "median") -> TailIndex:
    r"""Tail index of a power law from the k largest magnitudes, by the estimator of Hill.

        1/α = (1/k) Σ_{i≤k} log(|x|_{(i)} / |x|_{(k+1)}),    standard error α/√k

    Measures the exponent of the tail itself: 3 for Student's law with 3 degrees, and for a stable law its index,
    though near 2 only from very many draws; a law without a power tail gives a number that grows with their number.

    Args:
        x: draws along ``dim``; all other dimensions are coordinates.
        dim: dimension of the draws.
        k: order statistics used; the number of draws to the power 0.6 by default. The index should not change
            much when it is halved or doubled.
        centre: what is taken off first, as in :func:`tail_index`.

    Returns:
        TailIndex of shape x without ``dim``.

    Raises:
        ArgumentError: k is not between 2 and the number of draws less one.
        DataError: a value is not finite.

    Reference: Hill (1975), eq. 2.3.

    Example:
        >>> u = torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> found = hill(u**-0.5, centre="none")                  # P(X > x) = x^-2
        >>> bool((found.index - 2).abs() < 3 * found.error)
        True
    """
    x = centred_draws(x, dim, centre).abs()
    n = x.shape[-1]
    count = round(n**0.6) if k is None else k
    if not 2 <= count < n:
        raise ArgumentError(f"k is {count}: it must be between 2 and the {n} draws less one")
    logs = torch.topk(x, count + 1, dim=-1).values.log()
    inverse = logs[..., :-1].mean(-1) - logs[..., -1]
    inverse = torch.where(logs[..., -1].isfinite() & (inverse > 0), inverse, math.nan)
    return TailIndex(1 / inverse, 1 / inverse / math.sqrt(count), block=1, used=count)
