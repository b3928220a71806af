r"""How long a noisy descent stays: in a valley, on a saddle, under noise with jumps.

    dx = −∇U dt + √(2T) dW

    valley (Kramers, Eyring)   τ ≃ (2π/|λ₋|) √(|det H_b|/det H_a) e^{ΔU/T}          exponential in 1/T
    saddle                     τ ≃ (1/2λ) [log(2λR²/T) + γ_E]                       logarithmic in 1/T
    jumps of index α < 2       τ ≃ ε^{−α} / [½ C_α (l^{−α} + r^{−α})]               the width counts, no height

One dimension is also solved exactly, by quadrature, for any noise intensity D(x). The temperature of stochastic
gradient descent along a direction is η σ²/(2B), σ² the per-sample variance of the gradient there; a unit of time is 1/η
steps.

Reference: Hänggi, Talkner & Borkovec (1990); Hu, Li, Li & Liu (2019); Getoor (1961).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bolza.core.errors import ArgumentError, BolzaError, ShapeError
from bolza.core.reference import Reference, cites

__all__ = ["jump_escape_time", "kramers_time", "mean_first_passage", "saddle_time", "stable_flight_time"]

HANGGI = Reference(
    "hanggi1990reaction",
    "Hänggi, Peter and Talkner, Peter and Borkovec, Michal",
    "Reaction-Rate Theory: Fifty Years After Kramers",
    1990,
    venue="Reviews of Modern Physics",
    doi="10.1103/RevModPhys.62.251",
)
GETOOR = Reference(
    "getoor1961first",
    "Getoor, Ronald K.",
    "First Passage Times for Symmetric Stable Processes in Space",
    1961,
    venue="Transactions of the American Mathematical Society",
)
HU = Reference(
    "hu2019diffusion",
    "Hu, Wenqing and Li, Chris Junchi and Li, Lei and Liu, Jian-Guo",
    "On the Diffusion Approximation of Nonconvex Stochastic Gradient Descent",
    2019,
    venue="Annals of Mathematical Sciences and Applications",
    arxiv="1705.07562",
)

Curvature = float | Tensor
Potential = Callable[[Tensor], Tensor]


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ArgumentError(f"{name} is {value}: it must be positive")


@cites(HANGGI)
def kramers_time(
    well: Curvature,
    saddle: Curvature,
    barrier: float,
    temperature: float,
    *,
    friction: float | None = None,
) -> float:
    r"""Mean time from a valley over a saddle into the next one, for a barrier well above the temperature.

        overdamped  τ = (2π/|λ₋|) √(|det H_b|/det H_a) e^{ΔU/T}
        Langevin    the same with κ = √(γ²/4 + |λ₋|) − γ/2 in the place of |λ₋|

    The relative error is of the order T/ΔU: one fifth at ΔU = 2.5 T, and always too short. The first passage to the
    saddle itself takes half of it.

    Args:
        well: U'' at the minimum, or the Hessian ``(d, d)`` there.
        saddle: U'' < 0 at the saddle, or the Hessian there, with exactly one negative eigenvalue λ₋.
        barrier: ΔU, height of the saddle above the minimum.
        temperature: T, in the unit of U.
        friction: γ of :func:`bolza.core.langevin` (unit mass); None for the overdamped equation.

    Returns:
        τ, in the time unit of the equation (1/η steps for stochastic gradient descent); inf beyond the largest float.

    Raises:
        ArgumentError: a curvature has the wrong sign, sizes differ, or a number is not positive.

    Reference: Hänggi, Talkner & Borkovec (1990), §IV; the time is the inverse of their rate.

    Example:
        >>> round(kramers_time(2.0, -1.0, 0.25, 0.1), 3)                    # U = x⁴/4 − x²/2
        54.125
    """
    _positive(barrier=barrier, temperature=temperature)
    a, b = (torch.as_tensor(h, dtype=torch.float64).detach().cpu() for h in (well, saddle))
    a, b = (h.reshape(1, 1) if h.dim() == 0 else h for h in (a, b))
    if a.shape != b.shape or a.dim() != 2 or a.shape[0] != a.shape[1]:
        raise ArgumentError(
            f"well has shape {tuple(a.shape)} and saddle {tuple(b.shape)}: give two numbers, or two (d, d) Hessians"
        )
    low, high = torch.linalg.eigvalsh(a), torch.linalg.eigvalsh(b)
    if not bool((low > 0).all()):
        raise ArgumentError(
            f"the Hessian at the minimum has eigenvalue {float(low[0]):g}: all must be positive"
        )
    if not (high[0] < 0 and bool((high[1:] > 0).all())):
        raise ArgumentError(
            f"the Hessian at the saddle has {int((high < 0).sum())} negative of {len(high)} eigenvalues: "
            "exactly one must be negative and none zero"
        )
    growth = -float(high[0])
    if friction is not None:
        _positive(friction=friction)
        growth = growth / (math.sqrt(friction**2 / 4 + growth) + friction / 2)  # no cancellation at large γ
    exponent = float(high.abs().log().sum() - low.log().sum()) / 2 + barrier / temperature
    return 2 * math.pi / growth * (math.exp(exponent) if exponent < 700 else math.inf)


@cites(HU)
def saddle_time(rate: float, temperature: float, radius: float = 1.0) -> float:
    r"""Mean time to leave a saddle (or a maximum) from its very point, for weak noise.

        dx = λx dt + √(2T) dW,  |x| = R:    τ ≃ (1/2λ) [log(2λR²/T) + γ_E]

    Halving the learning rate of stochastic gradient descent adds log 2/(2λ) units of time, against a factor for a
    valley. The relative error is of the order T/(λR²).

    Args:
        rate: λ > 0, minus the most negative curvature.
        temperature: T along that direction.
        radius: R, the distance at which the saddle counts as left.

    Returns:
        τ.

    Raises:
        ArgumentError: a number is not positive, or the noise is not weak: T ≥ λR².

    Reference: Hu, Li, Li & Liu (2019), whose statement is the order; the constant is that of the linear equation,
    where x e^{−λt} settles to a normal variable of variance T/λ and E log|N(0, 1)| = −(γ_E + log 2)/2.

    Example:
        >>> round(saddle_time(1.0, 0.005), 3)
        3.284
    """
    _positive(rate=rate, temperature=temperature, radius=radius)
    if temperature >= rate * radius**2:
        raise ArgumentError(
            f"temperature is {temperature}, not below rate · radius² = {rate * radius**2:g}: the noise alone leaves at "
            "once; use mean_first_passage"
        )
    return (math.log(2 * rate * radius**2 / temperature) + float(np.euler_gamma)) / (2 * rate)


@cites(GETOOR)
def stable_flight_time(alpha: float, radius: float = 1.0, *, start: float = 0.0, dim: int = 1) -> float:
    r"""Mean time in which a free symmetric α-stable flight leaves a ball.

        E τ = Γ(d/2) (R² − |x|²)^{α/2} / [2^α Γ(1 + α/2) Γ((d + α)/2)],    1/Γ(1 + α) for d = R = 1, x = 0

    Args:
        alpha: α in (0, 2]; characteristic function exp(−t|u|^α), at 2 that of √2 times Brownian motion.
        radius: R.
        start: |x|, distance of the start from the centre.
        dim: d; the flight is isotropic (for d > 1 its coordinates are not independent).

    Returns:
        E τ.

    Raises:
        ArgumentError: alpha is outside (0, 2], or the start outside the ball.

    Reference: Getoor (1961), theorem 5.2.

    Example:
        >>> round(stable_flight_time(1.5), 4)
        0.7523
    """
    _positive(radius=radius, dim=dim)
    _index(alpha)
    if not 0 <= start <= radius:
        raise ArgumentError(f"start is {start}: it lies between 0 and the radius {radius}")
    log = math.lgamma(dim / 2) - math.lgamma(1 + alpha / 2) - math.lgamma((dim + alpha) / 2)
    return math.exp(log) * (radius**2 - start**2) ** (alpha / 2) / 2**alpha


def jump_escape_time(alpha: float, noise: float, left: float, right: float) -> float:
    r"""Mean time in which weak jump noise leaves a valley: one large jump, over the width, at any height.

        dx = −U' dt + ε dL:    1/τ ≃ ½ C_α ε^α (l^{−α} + r^{−α}),    C_α = (2/π) Γ(α) sin(πα/2)

    Doubling the width multiplies the time by 2^α; doubling the barrier changes nothing. Correct as ε → 0 with the
    valley's own times fixed; at finite ε too long, by 4 % at ε = 0.1 and α = 1.2 in a parabola.

    Args:
        alpha: α in (0, 2), strictly below 2; characteristic function of L at unit time exp(−|u|^α).
        noise: ε; for stochastic gradient descent η^{(α−1)/α} times the scale of its noise.
        left: l, distance from the minimum to the left end of the valley; inf if there is none.
        right: r, to the right end.

    Returns:
        τ.

    Raises:
        ArgumentError: alpha is outside (0, 2), or a number is not positive.

    Reference: the rate of jumps longer than the distance, from the Lévy measure of a stable law; departures: one
    dimension only.

    Example:
        >>> round(jump_escape_time(1.2, 0.1, 1.0, 1.0), 1)
        28.5
    """
    from bolza.ops.stable_law import tail_constant

    _positive(noise=noise, left=left, right=right)
    _index(alpha)
    if alpha == 2:
        raise ArgumentError("alpha is 2: Brownian noise has no jumps; use kramers_time")
    rate = tail_constant(alpha) / 2 * noise**alpha * (left**-alpha + right**-alpha)
    return 1 / rate if rate > 0 else math.inf


def _index(alpha: float) -> None:
    if not 0 < alpha <= 2:
        raise ArgumentError(f"alpha is {alpha}: the index of stability lies in (0, 2]")


# ------------------------------------------------------------------------------------- exact, by quadrature

_NODES = 16


@cites(HANGGI)
def mean_first_passage(
    potential: Potential,
    start: float,
    interval: tuple[float, float],
    temperature: float | Potential,
) -> float:
    r"""Exact mean time in which a one-dimensional diffusion leaves an interval.

        dx = −U'(x) dt + √(2D(x)) dW  (Itô),    φ' = U'/D,    s = e^φ,    m = e^{−φ}/D

        one end b        τ = ∫_x^b s(y) ∫_{−∞}^y m(z) dz dy
        two ends a < b   τ = [S(x, b) ∫_a^x S(a, z) m(z) dz + S(a, x) ∫_x^b S(z, b) m(z) dz]/S(a, b),  S(u, v) = ∫_u^v s

    Args:
        potential: U, float64 tensor → tensor of its shape, entry by entry; differentiable by autograd if D varies.
        start: x.
        interval: the ends (a, b); an end may be ∓inf, and then U must rise towards it.
        temperature: D, a number T, or a positive function of x like U (noise of stochastic gradient descent that
            grows with the curvature, say).

    Returns:
        τ, to about ten digits, in the time unit of the equation.

    Raises:
        ArgumentError: the start is outside, both ends are infinite, U does not confine towards an infinite end, or D
            is not positive.
        ShapeError: U or D does not give one number for each x.
        BolzaError: U varies too fast for the quadrature.

    Reference: Hänggi, Talkner & Borkovec (1990), §VII.

    Example:
        >>> well = lambda x: x**4 / 4 - x**2 / 2
        >>> round(mean_first_passage(well, -1.0, (-math.inf, 1.0), 0.1), 3)
        66.269
    """
    a, b = (float(v) for v in interval)
    if not a <= start <= b or a >= b or (math.isinf(a) and math.isinf(b)):
        raise ArgumentError(
            f"start is {start} and interval {interval}: start inside, and one end at least finite"
        )
    if not callable(temperature):
        temperature = float(temperature)
        _positive(temperature=temperature)
    if start in (a, b):
        return 0.0
    if math.isinf(b):  # mirrored, so that an infinite end is the left one

        def mirrored(f: Potential) -> Potential:
            return lambda x: f(-x)

        heat = mirrored(temperature) if callable(temperature) else temperature
        return mean_first_passage(mirrored(potential), -start, (-b, -a), heat)
    wall = not math.isinf(a)
    low = a if wall else _far(potential, start, b, temperature)
    logs = [_passage(potential, start, low, b, temperature, wall, panels) for panels in (128, 256)]
    # also where both times overflow: a coarse grid may only take a steep slope for a barrier
    while not abs(logs[-1] - logs[-2]) <= (1e-10 if min(logs[-2:]) < 2000 else 1e-3) * max(
        1.0, abs(logs[-1])
    ):
        panels = 256 * 2 ** (len(logs) - 1)
        if panels > 2**14:
            raise BolzaError(
                f"the quadrature of log τ stays uncertain ({logs[-2]:.10g}, {logs[-1]:.10g}): U varies too fast "
                "for it, so start nearer, or shorten the interval where U is high"
            )
        logs.append(_passage(potential, start, low, b, temperature, wall, panels))
    return math.exp(logs[-1]) if logs[-1] < 700 else math.inf


def _far(potential: Potential, start: float, end: float, temperature: float | Potential) -> float:
    """A point so far left that next to no mass lies beyond."""
    step = end - start
    for _ in range(150):  # the end may be very near
        edge = start - step
        x, phi = _phi(potential, edge, end, temperature, 64)[:2]
        inside = x >= edge + step / 2  # the outer half must lie high throughout, not only at its end
        if np.isfinite(phi).all() and phi[~inside].min() - phi.min() > 45:
            return edge
        step *= 1.3
    raise ArgumentError(
        f"U does not confine to the left of {start}: give that end of the interval a finite value"
    )


@lru_cache
def _rule() -> tuple[Any, Any]:
    """Gauss' nodes, and the antiderivative from −1 of the polynomial through values there, at the nodes and at 1."""
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    basis = np.polynomial.legendre.legvander(nodes, _NODES - 1)
    integrated = np.polynomial.legendre.legint(np.eye(_NODES), lbnd=-1)
    at = np.polynomial.legendre.legval(np.append(nodes, 1.0), integrated).T
    rule = at @ np.linalg.inv(basis)
    rule[-1] = weights
    return nodes, rule


def _phi(
    potential: Potential, low: float, high: float, temperature: float | Potential, panels: int
) -> tuple[Any, Any, Any, Any, Any]:
    """Nodes ``(panels, n)``, φ there up to a constant, D there, and the rule (width/2, antiderivative at nodes)."""
    nodes, rule = _rule()
    edges = np.linspace(low, high, panels + 1)
    half = (edges[1] - edges[0]) / 2
    x = (edges[:-1] + half)[:, None] + half * nodes
    points = torch.tensor(x, dtype=torch.float64)
    if not callable(temperature):
        with torch.no_grad():
            phi = _one_each("potential", potential(points), points) / temperature
        return x, phi, np.full_like(x, temperature), half, rule
    points.requires_grad_()
    with torch.enable_grad():
        height = potential(points)
        _one_each("potential", height, points)
        slope = torch.zeros_like(points)
        if height.requires_grad:
            (slope,) = torch.autograd.grad(height.sum(), points, materialize_grads=True)
    with torch.no_grad():
        heat = _one_each("temperature", temperature(points), points)
    if not (heat > 0).all():
        raise ArgumentError(f"temperature is {heat.min():g} somewhere: the noise intensity must be positive")
    phi = _antiderivative(slope.numpy() / heat, half, rule)[0]
    return x, phi, heat, half, rule


def _one_each(name: str, value: Any, points: Tensor) -> Any:
    """The values as an array, one for each point; a constant may stand for all."""
    value = torch.as_tensor(value, dtype=torch.float64).detach()
    value = value.reshape(()) if value.numel() == 1 else value
    if value.dim() and value.shape != points.shape:
        raise ShapeError(
            f"{name} gives {tuple(value.shape)} for points {tuple(points.shape)}: it must give one number for each x"
        )
    return value.expand(points.shape).numpy()


def _antiderivative(values: Any, half: float, rule: Any) -> tuple[Any, float]:
    """∫ from the left end to every node, and over all."""
    inner = half * values @ rule.T
    before = np.concatenate([[0.0], np.cumsum(inner[:, -1])])
    return inner[:, :-1] + before[:-1, None], float(before[-1])


def _log_antiderivative(logs: Any, half: float, rule: Any) -> tuple[Any, float]:
    """The same of e^logs, in logarithms: neither a barrier nor a slope can overflow."""
    top = logs.max(1, keepdims=True)
    inner = np.log(np.maximum(half * np.exp(logs - top) @ rule.T, 1e-300)) + top
    sums = np.concatenate([[-np.inf], np.logaddexp.accumulate(inner[:, -1])])
    return np.logaddexp(sums[:-1, None], inner[:, :-1]), float(sums[-1])


def _passage(
    potential: Potential,
    start: float,
    low: float,
    high: float,
    temperature: float | Potential,
    wall: bool,
    panels: int,
) -> float:
    """The logarithm of the formulas, on panels left and right of the start."""
    left = _phi(potential, low, start, temperature, panels)
    right = _phi(potential, start, high, temperature, panels)
    half1, half2, rule = left[3], right[3], left[4]
    phi1, phi2 = left[1], right[1]
    if callable(temperature):  # φ of the right part continues that of the left
        phi2 = phi2 + _edge(left)
    m1, m2 = -phi1 - np.log(left[2]), -phi2 - np.log(right[2])
    if not wall:
        mass = np.logaddexp(_log_antiderivative(m1, half1, rule)[1], _log_antiderivative(m2, half2, rule)[0])
        log = _log_antiderivative(phi2 + mass, half2, rule)[1]
    else:
        scale1, whole1 = _log_antiderivative(phi1, half1, rule)
        rest2, whole2 = _log_antiderivative(phi2[::-1, ::-1], half2, rule)  # from the end b: no cancellation
        near = _log_antiderivative(scale1 + m1, half1, rule)[1]
        far = _log_antiderivative(rest2[::-1, ::-1] + m2, half2, rule)[1]
        log = np.logaddexp(whole2 + near, whole1 + far) - np.logaddexp(whole1, whole2)
    return float(log)


def _edge(part: tuple[Any, Any, Any, Any, Any]) -> float:
    """φ at the right end, by the polynomial of the last panel."""
    x, phi, _, half, _ = part
    nodes = (x[-1] - x[-1].mean()) / half
    return float(np.polynomial.legendre.Legendre.fit(nodes, phi[-1], _NODES - 1, domain=[-1, 1])(1.0))
