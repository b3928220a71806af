r"""Mutual information of a layer with input and label, by an estimator and a noise that are said aloud.

For a deterministic network with continuous states I(X;T) is infinite, or the entropy of X: every finite
number is a property of the bins or of the noise that were put in. So both are arguments here, never defaults.

Binning:     T̂ = ⌊T/w⌋,   I(X;T̂) = H(T̂),   I(T̂;Y) = H(T̂) − H(T̂|Y)
Pairwise:    T̃ = T + √s ξ,   −(1/N) Σ_i ln (1/N) Σ_j e^{−|t_i−t_j|²/(8s)}  ≤  I(X;T̃)  ≤  the same with 2s

All numbers are in bits, over the given inputs as equally likely: they are exact for a complete list of
inputs, and never above log₂ N for N of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError, ShapeError
from bolza.core.reference import Reference, cites

__all__ = ["InformationEstimate", "binned_information", "pairwise_information"]

SHWARTZ_ZIV = Reference(
    key="shwartzziv2017opening",
    authors="Shwartz-Ziv, Ravid and Tishby, Naftali",
    title="Opening the Black Box of Deep Neural Networks via Information",
    year=2017,
    arxiv="1703.00810",
)
KOLCHINSKY = Reference(
    key="kolchinsky2017estimating",
    authors="Kolchinsky, Artemy and Tracey, Brendan D.",
    title="Estimating Mixture Entropy with Pairwise Distances",
    year=2017,
    venue="Entropy",
    arxiv="1706.02419",
    doi="10.3390/e19070361",
)

_ROWS = 2**19  # pairs looked at together, which stay in the cache


@dataclass(frozen=True)
class InformationEstimate:
    """I(X;T) and I(T;Y) of one layer in bits, as intervals; both ends agree where the value is exact.

    Args:
        input_lower: lower bound of I(X;T).
        input_upper: upper bound of I(X;T).
        output_lower: lower bound of I(T;Y); nan without labels.
        output_upper: upper bound of I(T;Y); nan without labels.
        estimator: how T was made random or discrete, in words.

    Example:
        >>> InformationEstimate(1.0, 2.0, 0.5, 0.75, "bins of 0.1").input
        1.5
    """

    input_lower: float
    input_upper: float
    output_lower: float
    output_upper: float
    estimator: str

    @property
    def input(self) -> float:
        """Middle of the interval of I(X;T)."""
        return (self.input_lower + self.input_upper) / 2

    @property
    def output(self) -> float:
        """Middle of the interval of I(T;Y)."""
        return (self.output_lower + self.output_upper) / 2


@cites(SHWARTZ_ZIV)
def binned_information(
    states: Tensor,
    labels: Tensor | None = None,
    *,
    width: float | None = None,
    edges: Tensor | None = None,
) -> InformationEstimate:
    r"""I(X;T̂) = H(T̂) and I(T̂;Y) = H(T̂) − H(T̂|Y) of a layer whose units are read with a finite resolution.

    Two states are the same T̂ if every unit falls into the same bin. A deterministic T̂ has H(T̂|X) = 0.

    Args:
        states: T of each input, ``(inputs, units)`` or ``(inputs, ...)``; complex units count as two.
        labels: Y of each input as integers, ``(inputs,)``.
        width: width of the bins, in the units of the states; bins start at 0.
        edges: in place of ``width``: increasing inner edges of the bins, ``(bins − 1,)``.

    Returns:
        :class:`InformationEstimate` whose intervals have no width.

    Raises:
        ArgumentError: neither or both of ``width`` and ``edges`` are given, or they are no bins.
        ShapeError: labels do not fit.

    Reference: Shwartz-Ziv & Tishby (2017), §3, with 30 bins over the range of tanh (``width=1/15``). Departure: no
    sum over pairs of marginals; identical rows are counted.

    Example:
        >>> bits = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4)
        >>> found = binned_information(bits, bits[:, 0].long(), width=0.5)
        >>> found.input, found.output
        (4.0, 1.0)
    """
    t = _states(states).double()  # half precision would overflow, or lose the bin
    if (width is None) == (edges is None):
        raise ArgumentError("give either width= or edges=: the value found is a property of the bins")
    if edges is not None:
        edges = torch.as_tensor(edges).to(t)
        if edges.ndim != 1 or not len(edges) or not bool(edges.isfinite().all() & (edges.diff() > 0).all()):
            raise ArgumentError(f"edges of shape {tuple(edges.shape)} must be a list of increasing numbers")
        cells = torch.bucketize(t, edges, right=True)
        words = f"{len(edges) + 1} bins"
    else:
        assert width is not None
        if not 0 < width < math.inf:
            raise ArgumentError(f"width={width} must be positive and finite")
        cells = torch.floor(t / width)
        if cells.numel() and not float(cells.abs().max()) < 2**53:
            raise ArgumentError(
                f"width={width} is too small for states up to {float(t.abs().max()):.3g}: bins that narrow cannot be "
                "told apart in float64; give a larger width"
            )
        cells = cells.long()
        words = f"bins of {width:g}"
    symbols = _symbols(cells)
    total = _entropy(symbols)
    if labels is None:
        return InformationEstimate(total, total, math.nan, math.nan, words)
    y = _labels(labels, len(t))
    inner = sum(float((y == c).double().mean()) * _entropy(symbols[y == c]) for c in y.unique())
    shared = max(0.0, total - inner)
    return InformationEstimate(total, total, shared, shared, words)


@cites(KOLCHINSKY)
def pairwise_information(
    states: Tensor, labels: Tensor | None = None, *, noise_var: float
) -> InformationEstimate:
    r"""Bounds on I(X;T̃) and I(T̃;Y) of a layer that is read through Gaussian noise, T̃ = T + √s ξ, ξ ~ N(0, I).

        I(X;T̃) ≥ −(1/N) Σ_i ln (1/N) Σ_j exp(−|t_i − t_j|²/(8s))           (Chernoff, α = 1/2)
        I(X;T̃) ≤ −(1/N) Σ_i ln (1/N) Σ_j exp(−|t_i − t_j|²/(2s))           (Kullback–Leibler)
        I(T̃;Y) = I(X;T̃) − I(X;T̃|Y), each between its bounds, and between 0 and H(Y)

    Both bounds are exact where states are equal or many √s apart.

    Args:
        states: T of each input, ``(inputs, units)`` or ``(inputs, ...)``.
        labels: Y of each input as integers, ``(inputs,)``.
        noise_var: variance s of the noise on every unit, in the squared units of the states.

    Returns:
        :class:`InformationEstimate`.

    Raises:
        ArgumentError: ``noise_var`` is not positive.
        ShapeError: labels do not fit.

    Reference: Kolchinsky & Tracey (2017), eq. 10 and §4; the component entropies cancel in I(X;T̃).

    Example:
        >>> far = torch.tensor([[0.0], [100.0], [200.0], [300.0]])
        >>> found = pairwise_information(far, torch.tensor([0, 0, 1, 1]), noise_var=1.0)
        >>> round(found.input_lower, 6), round(found.input_upper, 6), round(found.output, 6)
        (2.0, 2.0, 1.0)
    """
    t = _states(states).double()
    if not 0 < noise_var < math.inf:
        raise ArgumentError(f"noise_var={noise_var} must be positive and finite")
    if not math.isfinite(float(t.square().sum(1).max()) / noise_var):
        raise ArgumentError(
            f"noise_var={noise_var} is too small for states up to {float(t.abs().max()):.3g}: their squared distances "
            "in units of the noise are beyond float64; rescale the states"
        )
    words = f"Gaussian noise of variance {noise_var:g}"
    lower, upper = _pairwise(t, noise_var)
    if labels is None:
        return InformationEstimate(lower, upper, math.nan, math.nan, words)
    y = _labels(labels, len(t))
    within = [0.0, 0.0]
    for c in y.unique():
        share = float((y == c).double().mean())
        for i, value in enumerate(_pairwise(t[y == c], noise_var)):
            within[i] += share * value
    most = min(_entropy(y), upper)
    shared = max(0.0, lower - within[1]), max(0.0, min(most, upper - within[0]))
    return InformationEstimate(lower, upper, min(shared), max(shared), words)


def _pairwise(t: Tensor, noise_var: float) -> tuple[float, float]:
    """Lower and upper bound of I(X;T̃) in bits."""
    t = t - t.mean(0)
    squares = t.square().sum(1)
    count = len(t)
    sums = [0.0, 0.0]
    rows = max(1, _ROWS // count)
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        distance = (squares[part, None] + squares - 2 * t[part] @ t.T).clamp_min_(0)
        distance[torch.arange(len(distance)), torch.arange(start, start + len(distance))] = 0
        kernel = distance.mul_(-1 / (8 * noise_var)).exp_()  # its fourth power is that of the other bound
        sums[0] += float(kernel.sum(1).log().sum())  # at least 1, from the diagonal
        sums[1] += float(kernel.square_().square_().sum(1).log().sum())
    lower, upper = ((math.log(count) - total / count) / math.log(2) for total in sums)
    return max(0.0, lower), max(0.0, upper)


def _states(states: Tensor) -> Tensor:
    if not isinstance(states, Tensor) or states.ndim == 0 or not len(states):
        raise ShapeError("states must be a tensor (inputs, units) with at least one input")
    t = states.detach()
    t = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t).reshape(len(states), -1)
    if not t.is_floating_point():
        t = t.double()
    if not bool(t.isfinite().all()):
        raise ArgumentError("states hold values that are not finite")
    return t


def _labels(labels: Tensor, count: int) -> Tensor:
    y = torch.as_tensor(labels)
    if y.ndim != 1 or len(y) != count or y.is_floating_point():
        raise ShapeError(
            f"labels of shape {tuple(y.shape)} and type {y.dtype} must be one integer for each of {count} inputs"
        )
    return y


def _symbols(cells: Tensor) -> Tensor:
    """One 64-bit number a row, the same for equal rows (and for others with probability 2⁻⁶⁴)."""
    generator = torch.Generator().manual_seed(0)
    high = 2**63 - 1
    factors = torch.randint(-high, high, (cells.shape[1],), generator=generator).to(cells.device) | 1
    mixed = (cells + 0x5DEECE66D) * factors  # wraps around, which is what a hash wants
    return (mixed ^ (mixed >> 29)).sum(1)


def _entropy(symbols: Tensor) -> float:
    """Entropy in bits of symbols that are equally likely by position."""
    counts = symbols.unique(return_counts=True)[1].double()
    p = counts / counts.sum()
    return float(-(p * p.log2()).sum()) + 0.0
