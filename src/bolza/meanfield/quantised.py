r"""Quantised activations: staircases of N levels, and how deep a network of them can be.

    φ(h) = -1 + 2/(N-1) Σ_k H(h - t_k),    t_k = (k - N/2) D,   k = 1, …, N-1

Two inputs that lie on two sides of a step separate however close they are, so the slope of the correlation
map is infinite at c = 1 and no choice of variances is critical. Without biases inputs become orthogonal at the
rate

    χ = a_1² / E φ²,    a_1 = E[z φ(√q z)]

per layer, and χ, a correlation, is below 1. It depends on the ratio of D to √q alone; at its largest, 1 - χ
is the distortion of the best uniform quantiser of a Gaussian, and ξ = 1/|log χ| grows a little slower than N².
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError
from bolza.core.reference import Reference, cites
from bolza.meanfield.activations import Activation
from bolza.meanfield.layers.moment_maps import Call, Missing, Step, activation_step, moment_map

__all__ = ["BLUMENFELD", "QuantisedDepth", "Staircase", "quantised_depth", "staircase"]

BLUMENFELD = Reference(
    "blumenfeld2019quantized",
    "Blumenfeld, Yaniv and Gilboa, Dar and Soudry, Daniel",
    "A Mean Field Theory of Quantized Deep Networks: The Quantization-Depth Trade-Off",
    2019,
    venue="NeurIPS",
    arxiv="1906.00771",
)

_CHUNK = 1 << 20


def _check(levels: int, spacing: float) -> None:
    if int(levels) != levels or levels < 2:
        raise ArgumentError(f"levels={levels} must be a whole number of at least 2.")
    if not (math.isfinite(spacing) and spacing > 0):
        raise ArgumentError(f"spacing={spacing} must be positive.")


class _Rounded(torch.autograd.Function):
    """The staircase forward, a straight line as wide as the staircase backward."""

    @staticmethod
    def forward(ctx: object, h: Tensor, levels: int, spacing: float) -> Tensor:
        ctx.save_for_backward(h)  # type: ignore[attr-defined]
        ctx.shape_of = levels, spacing  # type: ignore[attr-defined]
        return _steps(h, levels, spacing)

    @staticmethod
    def backward(ctx: object, g: Tensor) -> tuple[Tensor, None, None]:
        (h,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return g * _line(h, *ctx.shape_of), None, None  # type: ignore[attr-defined]


def _steps(h: Tensor, levels: int, spacing: float) -> Tensor:
    step = torch.floor(h / spacing + levels / 2).clamp(0, levels - 1)
    return step * (2 / (levels - 1)) - 1


def _line(h: Tensor, levels: int, spacing: float) -> Tensor:
    """Slope of the staircase at large, between its first and its last level."""
    slope = 2 / ((levels - 1) * spacing)
    return torch.where(h.abs() <= levels * spacing / 2, slope, 0.0).to(h.dtype)


class Staircase(nn.Module):
    r"""An activation of N evenly spaced levels in [-1, 1]; gradients pass straight through.

    Backward the staircase counts as the line through its levels, of slope 2/((N-1) D) for |h| ≤ N D/2 and
    flat beyond.

    Args:
        levels: N, at least 2 (the sign function).
        spacing: D, distance of two steps; by default a unit pre-activation variance is best served
            (`quantised_depth`).

    Raises:
        ArgumentError: fewer than two levels, or a spacing that is not positive.

    Example:
        >>> Staircase(3, spacing=1.0)(torch.tensor([-2.0, -0.4, 0.0, 0.6]))
        tensor([-1.,  0.,  0.,  1.])
    """

    one_operation = True  # a tracer reads it like a layer of torch.nn

    def __init__(self, levels: int, spacing: float | None = None) -> None:
        super().__init__()
        if spacing is None:
            spacing = float(quantised_depth(levels).spacing)
        _check(levels, spacing)
        self.levels, self.spacing = int(levels), float(spacing)

    def forward(self, h: Tensor) -> Tensor:
        """Round each number."""
        return _Rounded.apply(h, self.levels, self.spacing)  # type: ignore[no-any-return, no-untyped-call]

    def extra_repr(self) -> str:
        """Levels and spacing."""
        return f"levels={self.levels}, spacing={self.spacing:g}"


@cites(BLUMENFELD)
def staircase(levels: int, spacing: float = 1.0) -> Activation:
    """The staircase as mean-field theory sees it: the jumps forward, the straight line backward.

    Args:
        levels: N.
        spacing: D.

    Returns:
        An `Activation`; `fixed_point` of it has an infinite ``chi_1``, and gradients that the line passes.

    Raises:
        ArgumentError: fewer than two levels, or a spacing that is not positive.

    Example:
        >>> from bolza.meanfield import fixed_point
        >>> point = fixed_point(staircase(4), 4.0, 0.0)
        >>> f"{point.q:.3f} {point.c:.3f} {point.chi_1} {point.chi_c:.3f}"
        '2.235 0.000 inf 0.855'
    """
    _check(levels, spacing)
    kinks = [(k - levels / 2) * spacing for k in range(1, levels)]
    ends = [-levels * spacing / 2, levels * spacing / 2]  # of the line
    return _Stairs(
        f"staircase of {levels}",
        lambda h: _steps(h, levels, spacing),
        lambda h: _line(h, levels, spacing),
        tuple(sorted(kinks + ends)),
        true_derivative=torch.zeros_like,
    )


class _Stairs(Activation):
    r"""A staircase, whose two-point moments are integrals over an angle.

    d/dc P(u > s, v > t) = exp(-(s² + t² - 2cst)/(2(1-c²))) / (2π √(1-c²)),    c = sin θ
    """

    def cross(self, q_u: Tensor, q_v: Tensor, c: Tensor, tol: float = 1e-13) -> Tensor:
        """E φ(u)φ(v) for correlation c; arguments broadcast."""
        steps = torch.tensor(self.kinks[1:-1], dtype=torch.float64)
        height = torch.full_like(steps, 2 / len(steps))
        q_u, q_v, c = (torch.as_tensor(x, dtype=torch.float64) for x in (q_u, q_v, c))
        found = _covariance(steps, height, q_u, q_v, c)
        return super().cross(q_u, q_v, c, tol) if found is None else found

    def cross_slope(self, q_u: Tensor, q_v: Tensor, c: Tensor, tol: float = 1e-13) -> Tensor:
        """E of the product of the line's slopes at u and v: both must lie between its ends."""
        ends = torch.tensor([self.kinks[0], self.kinks[-1]], dtype=torch.float64)
        slope = float(self.derivative(torch.zeros(1, dtype=torch.float64)))
        q_u, q_v, c = (torch.as_tensor(x, dtype=torch.float64) for x in (q_u, q_v, c))
        found = _covariance(ends, torch.tensor([slope, -slope], dtype=torch.float64), q_u, q_v, c)
        if found is None:
            return super().cross_slope(q_u, q_v, c, tol)
        inside = [torch.special.erf(ends[1] / (2 * q).sqrt().clamp_min(1e-150)) for q in (q_u, q_v)]
        return found + slope**2 * inside[0] * inside[1]


def _covariance(at: Tensor, height: Tensor, q_u: Tensor, q_v: Tensor, c: Tensor) -> Tensor | None:
    """Cov of f(u) and f(v) for f with these jumps and flat between; none if that would take too long."""
    full = torch.broadcast_tensors(q_u, q_v, c)  # type: ignore[no-untyped-call]
    shape, (a, b, cc) = full[0].shape, (x.reshape(-1) for x in full)
    nodes = 24 + 6 * len(at)
    work = len(at) ** 2 * nodes
    if work * len(cc) > 1 << 29:
        return None
    x, w = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(nodes))
    top = torch.asin(cc.clamp(-1, 1))[:, None] / 2
    angle, weight = top * (x + 1), top * w * (1 / (2 * math.pi))
    out = torch.empty_like(cc)
    for part in torch.arange(len(cc)).split(max(1, (1 << 21) // work)):
        s, t = (at / v[part].clamp_min(1e-280).sqrt()[:, None] for v in (a, b))
        sin, cos2 = angle[part].sin()[:, None, None, :], angle[part].cos().square()[:, None, None, :]
        s, t = s[:, :, None, None], t[:, None, :, None]
        # s² + t² - 2st sin θ = (s-t)² + 2st(1 - sin θ): no digits lost as θ → π/2
        power = ((s - t) ** 2 + 2 * s * t * (1 - sin)) / (2 * cos2)
        pairs = (torch.exp(-power) * weight[part][:, None, None, :]).sum(-1)
        out[part] = torch.einsum("nij,i,j->n", pairs, height, height)
    return out.reshape(shape)


@moment_map.register
def _(layer: Staircase, call: Call) -> Step | Missing:
    return activation_step(call, staircase(layer.levels, layer.spacing))


@dataclass(frozen=True)
class QuantisedDepth:
    """How far correlations survive in a network of staircases without biases; fields have the inputs' shape.

    Args:
        spacing: D, in units of √q, the standard deviation of pre-activations.
        chi: factor by which the correlation of two inputs falls per layer.
        xi: layers in which it falls by e, 1/|log χ|.
        weight_var: σ_w² that keeps the variance q of pre-activations at 1, where ``spacing`` is D itself.
        chi_grad: factor of a gradient's variance per layer at that σ_w², through the straight line.

    Example:
        >>> round(float(quantised_depth(2).xi), 4)   # the sign function: χ = 2/π
        2.2144
    """

    spacing: Tensor
    chi: Tensor
    xi: Tensor
    weight_var: Tensor
    chi_grad: Tensor


@cites(BLUMENFELD)
def quantised_depth(levels: Tensor | int, spacing: Tensor | float | None = None) -> QuantisedDepth:
    r"""Depth scale of a network with N-level activations and no biases, at the best spacing or a given one.

    Args:
        levels: N, any shape.
        spacing: D/√q; by default the one that carries correlations furthest.

    Returns:
        A `QuantisedDepth`. With biases the depth scale is shorter (`fixed_point` of `staircase` has it).

    Raises:
        ArgumentError: fewer than two levels, or a spacing that is not positive.

    Reference: Blumenfeld, Gilboa & Soudry (2019). Departure: their implicit equation for the depth is solved
    through the ratio a_1²/E φ² of the staircase itself.

    Example:
        >>> depth = quantised_depth(torch.tensor([4, 16, 64]))
        >>> [round(float(x), 1) for x in depth.xi]
        [7.9, 86.1, 961.0]
    """
    n = torch.as_tensor(levels)
    if bool((n < 2).any()) or bool((n != n.round()).any()):
        raise ArgumentError(f"levels={levels} must be whole numbers of at least 2.")
    if spacing is None:
        flat = n.reshape(-1).tolist()
        best = {count: _best_spacing(int(count)) for count in set(flat)}
        d = torch.tensor([best[count] for count in flat], dtype=torch.float64).reshape(n.shape)
    else:
        d = torch.as_tensor(spacing, dtype=torch.float64)
        if bool((d <= 0).any()) or not bool(torch.isfinite(d).all()):
            raise ArgumentError(f"spacing={spacing} must be positive.")
        n, d = torch.broadcast_tensors(n, d)  # type: ignore[no-untyped-call]
    pairs = zip(n.reshape(-1).tolist(), d.reshape(-1), strict=True)
    rows = [_moments(int(count), at.reshape(1)) for count, at in pairs]
    first, second = (torch.cat([row[i] for row in rows]).reshape(n.shape) for i in (0, 1))
    chi = first.square() / second
    slope = 2 / ((n - 1) * d)
    inside = torch.special.erf(n * d / 2 / math.sqrt(2))
    return QuantisedDepth(d, chi, -1 / torch.log(chi), 1 / second, slope.square() * inside / second)


def _moments(levels: int, d: Tensor) -> tuple[Tensor, Tensor]:
    """a_1 = E z φ(z) and E φ(z)² for spacings ``(n,)``."""
    k = torch.arange(1, levels, dtype=torch.float64) - levels / 2
    height = 2 / (levels - 1)
    first, second = [], []
    for part in d.split(max(1, _CHUNK // levels)):
        t = k * part[:, None]
        first.append(height * (torch.exp(-t * t / 2) / math.sqrt(2 * math.pi)).sum(-1))
        # E φ² = 1 - Σ_k P(z > t_k) (φ²_{k-1} - φ²_k), which loses no digits: every φ² lies in [0, 1]
        level = torch.arange(levels, dtype=torch.float64) * height - 1
        jumps = level[1:].square() - level[:-1].square()
        second.append(1 + (torch.special.ndtr(-t) * jumps).sum(-1))
    return torch.cat(first), torch.cat(second)


def _best_spacing(levels: int) -> float:
    """The spacing of the largest χ, by refining a grid; the sign function has none, and gets 1."""
    if levels == 2:
        return 1.0
    low, high = 1e-3 / levels, 8.0
    for _ in range(6):
        grid = torch.logspace(math.log10(low), math.log10(high), 65, dtype=torch.float64)
        first, second = _moments(levels, grid)
        at = int((first.square() / second).argmax())
        low, high = float(grid[max(at - 1, 0)]), float(grid[min(at + 1, len(grid) - 1)])
    return math.sqrt(low * high)
