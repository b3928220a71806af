r"""Local entropy: the loss smoothed by a Hamilton–Jacobi equation with viscosity.

    u_t = −½ |∇u|² + ½ T Δu,   u(·, 0) = f
    u(x, t) = −T log ∫ N(y; x, tT I) e^{−f(y)/T} dy          (Cole–Hopf)
    ∇u = (x − ⟨y⟩)/t,   ⟨·⟩ the mean under exp(−(f(y) + |x − y|²/2t)/T)

t is 1/γ for the scope γ of Entropy-SGD and T the temperature of its inner chain. u is also the least cost
E[f(x_t) + ½ ∫ |α|²] of dx = α ds + √T dW from x, with the feedback α = −∇u; for T → 0 it is the Moreau envelope
min_y f(y) + |x − y|²/2t, and ⟨y⟩ the proximal point.

Reference: Chaudhari, Oberman, Osher, Soatto & Carlier (2018), *Deep Relaxation: Partial Differential Equations for
Optimizing Deep Neural Networks*, arXiv:1704.04932.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError, DivergenceError, ShapeError, UnsupportedError
from bolza.core.reference import Reference, cites

__all__ = ["LocalEntropy", "hamilton_jacobi_residual", "local_entropy", "sampled_local_entropy"]

CHAUDHARI = Reference(
    "chaudhari2018relaxation",
    "Chaudhari, Pratik and Oberman, Adam and Osher, Stanley and Soatto, Stefano and Carlier, Guillaume",
    "Deep Relaxation: Partial Differential Equations for Optimizing Deep Neural Networks",
    2018,
    venue="Research in the Mathematical Sciences",
    arxiv="1704.04932",
)

Potential = Callable[[Tensor], Tensor]

FAR = 60.0  # exponents this far below the largest weigh nothing in float64
NEAR = 42.0
EVALUATIONS = 2**21  # of the potential at once


@dataclass(frozen=True)
class LocalEntropy:
    """The smoothed loss at given points.

    Attributes:
        value: u(x, t), ``(...)``.
        gradient: ∇u, ``(..., d)``.
        mean: ⟨y⟩, ``(..., d)``; the proximal point at temperature 0.
        spread: tr Cov(y) under the same law, ``(...)``; Δu = (d − spread/(tT))/t.
        error: of the value, ``(...)``: what half of the nodes change, or a standard error.
        gradient_error: of each entry of the gradient, ``(..., d)``, likewise.
    """

    value: Tensor
    gradient: Tensor
    mean: Tensor
    spread: Tensor
    error: Tensor
    gradient_error: Tensor


@cites(CHAUDHARI)
def local_entropy(
    potential: Potential, x: Tensor, *, t: float, temperature: float, nodes: int | None = None
) -> LocalEntropy:
    r"""The smoothed loss u(x, t) and its gradient in one or two dimensions, by quadrature.

    The trapezoidal rule on the region where the integrand has weight, which is searched for each point apart: its error
    falls faster than any power of the number of nodes. At temperature 0 the minimum on ever finer grids. The search
    looks 8 √t far, and further where it must; valleys narrower than √t/25 (√t/5 in two dimensions) may escape it.

    Args:
        potential: f, points ``(..., d)`` → ``(...)``.
        x: points ``(..., d)``, d at most 2; float64 is best.
        t: smoothing time 1/γ, in units of squared length over f.
        temperature: T, in units of f; 0 for the Moreau envelope.
        nodes: in each coordinate, 401 for d = 1 and 161 for d = 2 by default. A law of several narrow peaks needs
            more, which ``error`` shows.

    Returns:
        LocalEntropy, in the dtype of x.

    Raises:
        ArgumentError: t or the temperature makes no sense, or there are fewer than 9 nodes.
        ShapeError: the potential does not give one number a point.
        DivergenceError: f falls too fast for u to be finite, f ≤ −|y|²/2t far away, or is not finite.
        UnsupportedError: more than two dimensions.

    Reference: Chaudhari et al. (2018), §3, where T is β⁻¹.

    Example:
        >>> bowl = lambda y: y.square().sum(-1)
        >>> found = local_entropy(bowl, torch.tensor([0.9], dtype=torch.float64), t=0.7, temperature=0.3)
        >>> print(f"{found.value.item():.7f}")
        0.4688203
    """
    points, d = _checked(x, t, temperature)
    if d > 2:
        raise UnsupportedError(
            f"x has {d} coordinates: quadrature is for one or two, use sampled_local_entropy"
        )
    count = (401 if d == 1 else 161) if nodes is None else nodes
    if count < 9:
        raise ArgumentError(f"nodes is {nodes}: at least 9 are needed")
    count += 1 - count % 2  # odd, so that every other node is a grid of its own
    parts = [
        _quadrature(potential, part, t, temperature, count)
        for part in points.split(max(1, EVALUATIONS // max(count, 401 if d == 1 else 81) ** d))
    ]
    value, mean, spread, error, mean_error = (torch.cat(column) for column in zip(*parts, strict=True))
    shape = x.shape[:-1]
    return LocalEntropy(
        value.reshape(shape).to(x),
        ((points - mean) / t).reshape(x.shape).to(x),
        mean.reshape(x.shape).to(x),
        spread.reshape(shape).to(x),
        error.reshape(shape).to(x),
        (mean_error / t).reshape(x.shape).to(x),
    )


def _checked(x: Tensor, t: float, temperature: float) -> tuple[Tensor, int]:
    if not (t > 0 and math.isfinite(t)):
        raise ArgumentError(f"t is {t}: it must be positive; it is 1/γ")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ArgumentError(f"temperature is {temperature}: it must be zero or positive")
    if not x.ndim or not x.shape[-1]:
        raise ShapeError(f"x has shape {tuple(x.shape)}: give points (..., d)")
    return x.detach().reshape(-1, x.shape[-1]).to(torch.float64), x.shape[-1]


def _values(potential: Potential, y: Tensor) -> Tensor:
    value = potential(y)
    if value.shape != y.shape[:-1]:
        raise ShapeError(
            f"potential gives {tuple(value.shape)} for points {tuple(y.shape)}: it must give one number a point"
        )
    return value


def _grid(middle: Tensor, half: Tensor, count: int) -> Tensor:
    """Nodes ``(points, count, …, d)`` of boxes given by their middle and half widths ``(points, d)``."""
    unit = torch.linspace(-1, 1, count, dtype=middle.dtype, device=middle.device)
    d = middle.shape[-1]
    mesh = torch.stack(torch.meshgrid(*[unit] * d, indexing="ij"), -1)
    lift = (slice(None), *[None] * d)
    return middle[lift] + half[lift] * mesh


def _quadrature(
    f: Potential, x: Tensor, t: float, temperature: float, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Value, mean, spread and the errors of value and mean at points ``(points, d)``."""
    d = x.shape[-1]
    axes, lift = tuple(range(1, d + 1)), (slice(None), *[None] * d)

    def action(y: Tensor) -> Tensor:
        return _values(f, y).to(y) + (y - x[lift]).square().sum(-1) / (2 * t)

    rough = 401 if d == 1 else 81
    # a valley deeper by c is worth a way of √(2tc): look as far as c = 32, or 32 T, from the start
    half = torch.full_like(x, 8 * math.sqrt(t * max(temperature, 1.0)))
    far = FAR * temperature
    for _ in range(60):
        y = _grid(x, half, rough)
        cost = action(y)
        least = cost.amin(axes)
        edge = _rim(cost, d)
        short = ~(edge > least + far) | ~(edge > least)
        if not bool(short.any()):
            break
        half = torch.where(short[:, None], 2 * half, half)
    else:
        raise DivergenceError(
            "the potential falls faster than −|y|²/2t far away, or is not finite: take a smaller t"
        )
    middle = x
    if not temperature:
        best = torch.zeros_like(x)
        for _ in range(40):
            y = _grid(middle, half, rough)
            cost = action(y).flatten(1)
            least, where = cost.min(1)
            best = y.flatten(1, d).gather(1, where[:, None, None].expand(-1, 1, d))[:, 0]
            middle, half = best, half * 4 / (rough - 1)
            if bool((half <= 1e-12 * (1 + best.abs())).all()):
                break
        nothing = torch.zeros_like(least)
        return least, best, nothing, nothing, (half + 1e-8 * (1 + best.abs())).detach()
    for _ in range(6):  # narrow the box to where there is weight
        y = _grid(middle, half, rough)
        cost = action(y)
        inside = cost <= cost.amin(axes)[lift] + NEAR * temperature
        low, high = _span(y, inside, d)
        cell = 2 * half / (rough - 1)
        low, high = torch.maximum(low - cell, middle - half), torch.minimum(high + cell, middle + half)
        narrowed = bool(((high - low) < 1.8 * half).any())
        middle, half = (low + high) / 2, (high - low) / 2
        if not narrowed:
            break
    y = _grid(middle, half, count)
    cost = -action(y) / temperature
    fine = _moments(cost, y, 2 * half / (count - 1), d)
    every = (slice(None), *[slice(None, None, 2)] * d)
    coarse = _moments(cost[every], y[every], 4 * half / (count - 1), d)
    free = d / 2 * math.log(2 * math.pi * t * temperature)
    value = -temperature * (fine[0] - free)
    return value, fine[1], fine[2], temperature * (fine[0] - coarse[0]).abs(), (fine[1] - coarse[1]).abs()


def _rim(cost: Tensor, d: int) -> Tensor:
    """Smallest value on the edge of each box."""
    sides = [
        cost.select(axis, end)[:, None].flatten(1).amin(1) for axis in range(1, d + 1) for end in (0, -1)
    ]
    return torch.stack(sides).amin(0)


def _span(y: Tensor, inside: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """Box around the nodes that are inside, for each point."""
    axes = tuple(range(1, d + 1))
    low = torch.where(inside[..., None], y, math.inf).amin(axes)
    high = torch.where(inside[..., None], y, -math.inf).amax(axes)
    return low, high


def _moments(logs: Tensor, y: Tensor, cell: Tensor, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logarithm of the integral of exp(logs), mean and total variance under it."""
    axes = tuple(range(1, d + 1))
    total = logs.logsumexp(axes)
    weight = (logs - total[(slice(None), *[None] * d)]).exp()[..., None]
    mean = (weight * y).sum(axes)
    spread = (weight * (y - mean[(slice(None), *[None] * d)]).square()).sum((*axes, -1))
    return total + cell.log().sum(-1), mean, spread


@cites(CHAUDHARI)
def sampled_local_entropy(
    potential: Potential,
    x: Tensor,
    *,
    t: float,
    temperature: float,
    chains: int = 64,
    steps: int = 400,
    rungs: int = 8,
    generator: torch.Generator | None = None,
) -> LocalEntropy:
    r"""The smoothed loss and its gradient in any dimension, by sampled Gibbs averages with error bars.

        u(x, t) = ∫₀¹ ⟨f⟩_λ dλ,      ⟨·⟩_λ the mean under exp(−(λ f(y) + |x − y|²/2t)/T)

    Metropolis-adjusted Langevin chains, started from the Gaussian of λ = 0, run at all points and all λ at once:
    there is no error of the step length. The first half of the steps sets the step lengths and is not counted. The
    integral over λ is Gauss' rule in log(1 + Rλ), R the stiffness t ∇²f as the spread of f at the start shows it.

    Args:
        potential: f, points ``(..., d)`` → ``(...)``, differentiable by autograd.
        x: points ``(..., d)``.
        t: smoothing time 1/γ.
        temperature: T > 0.
        chains: independent chains for each point and λ; their scatter gives the errors.
        steps: steps of each chain.
        rungs: nodes of the integral over λ; 0 leaves the value out (nan) and samples the gradient alone.
        generator: source of randomness, on the device of x.

    Returns:
        LocalEntropy with standard errors, that of the value with what half of the rungs change, and all with what the
        second half of the counted steps changes, if that is more than chance: take more steps then. They do not see a
        valley that no chain has reached.

    Raises:
        ArgumentError: t, temperature, chains, steps or rungs make no sense.
        ShapeError: the potential does not give one number a point.
        DivergenceError: the potential is not finite where the chains are.

    Reference: Chaudhari et al. (2018), §3. Departure: adjusted chains; their own are those of Entropy-SGD, whose
    bias is of the order of the step length.

    Example:
        >>> bowl, x = lambda y: y.square().sum(-1), torch.ones(10)
        >>> found = sampled_local_entropy(bowl, x, t=2.0, temperature=0.1, generator=torch.Generator().manual_seed(0))
        >>> bool(((found.gradient - 0.4).abs() < 5 * found.gradient_error).all())
        True
    """
    _, d = _checked(x, t, temperature)
    if not temperature:
        raise ArgumentError("temperature is 0: nothing is sampled there, the proximal point is a minimum")
    if chains < 2 or steps < 4 or rungs < 0:
        raise ArgumentError(f"chains={chains}, steps={steps}, rungs={rungs}: at least 2, 4 and 0 are needed")
    centre = x.detach().reshape(-1, 1, 1, d)  # (points, λ, chains, d)
    shape = (len(centre), rungs + 1, chains)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=x.dtype, device=x.device)

    def action(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The values f, those of λf + |x − y|²/2t over T, and their gradients."""
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            f = _values(potential, y)
            (slope,) = torch.autograd.grad(f.sum(), y)
        apart = y.detach() - centre
        whole = (ladder * f.detach() + apart.square().sum(-1) / (2 * t)) / temperature
        return f.detach(), whole, (ladder[..., None] * slope + apart / t) / temperature

    base = torch.full((*shape, 1), t * temperature / d ** (1 / 3), dtype=x.dtype, device=x.device)
    y = centre + math.sqrt(t * temperature) * draw(*shape, d)
    with torch.no_grad():
        ladder, rule, halved = _ladder(_values(potential, y).to(y).flatten(1), rungs, temperature)
    f, energy, slope = action(y)
    sums, squares = torch.zeros_like(y), torch.zeros_like(f)
    totals, kept = torch.zeros_like(f), 0
    middle = (kept, sums, totals)
    for k in range(steps):
        if k == steps // 2:  # one for all chains, so that each of them has the same law
            base = base.log().mean(2, keepdim=True).exp()
        # lengths that vary at random free a chain from where the usual one is always refused
        length = base * (0.5 * draw(*shape, 1) - 0.25).exp()
        forward = y - length * slope
        new = forward + (2 * length).sqrt() * draw(*shape, d)
        f_new, energy_new, slope_new = action(new)
        back = new - length * slope_new
        ratio = energy - energy_new
        ratio = ratio + (((new - forward).square() - (y - back).square()).sum(-1) / (4 * length[..., 0]))
        chance = torch.rand(shape, generator=generator, dtype=x.dtype, device=x.device)
        accept = chance.log() < ratio
        y = torch.where(accept[..., None], new, y)
        slope = torch.where(accept[..., None], slope_new, slope)
        f, energy = torch.where(accept, f_new, f), torch.where(accept, energy_new, energy)
        if k < steps // 2:
            base = base * ((accept[..., None].to(x.dtype) - 0.57) / math.sqrt(1 + k / 10)).exp()
        else:
            middle = (kept, sums, totals) if k == (steps // 2 + steps) // 2 else middle
            kept += 1
            sums, totals = sums + y, totals + f
            squares = squares + (y - centre).square().sum(-1)
    if not bool((torch.isfinite(energy) & torch.isfinite(totals)).all()):
        raise DivergenceError("the potential is not finite where the chains are: lower t or the temperature")
    # (second half of what is kept) − (first half), for every chain
    now, gone = kept - middle[0], middle[0]
    moved, lifted = (
        (total - half) / now - half / gone for total, half in ((sums, middle[1]), (totals, middle[2]))
    )
    at = sums[:, -1] / kept
    mean, scatter = at.mean(1), (at.var(1) / chains + _drift(moved[:, -1])).sqrt()
    spread = (squares[:, -1] / kept).mean(1) - (mean - centre[:, 0, 0]).square().sum(-1)
    rung, noise = (totals[:, :-1] / kept).mean(2), (totals[:, :-1] / kept).var(2) / chains
    value, error = (rule * rung).sum(1), (rule.square() * noise).sum(1)
    change = rule - halved
    # what is left of the change after what the noise makes of it
    error += ((change * rung).sum(1).square() - (change.square() * noise).sum(1)).clamp_min(0)
    error = (error + _drift((rule[..., None] * lifted[:, :-1]).sum(1))).sqrt()
    if not rungs:
        value, error = torch.full_like(value, math.nan), torch.full_like(error, math.nan)
    outer = x.shape[:-1]
    return LocalEntropy(
        value.reshape(outer),
        ((centre[:, 0, 0] - mean) / t).reshape(x.shape),
        mean.reshape(x.shape),
        spread.reshape(outer),
        error.reshape(outer),
        (scatter / t).reshape(x.shape),
    )


def _drift(apart: Tensor) -> Tensor:
    """Square of the mean over chains ``(points, chains, ...)``, where it is beyond three standard errors."""
    square = apart.mean(1).square()
    return torch.where(square > 9 * apart.var(1) / apart.shape[1], square, 0.0)


def _ladder(f: Tensor, rungs: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The λ ``(points, rungs + 1, 1)``, the last one 1, their weights, and those of a rule on every other of them.

    From values of f under the Gaussian law, ``(points, draws)``. With ⟨f⟩_λ = c + A/(1 + Rλ), the law of a quadratic
    loss, the slope −Var f/T at λ = 0 gives R, and in log(1 + Rλ) the integral is that of a constant.
    """
    import numpy as np

    stiffness = f.var(1) / (temperature * (f.mean(1) - f.amin(1))).clamp_min(1e-300)
    span = stiffness.double().nan_to_num(1.0, 1e12).clamp(1e-6, 1e12).log1p()[:, None]
    if not rungs:
        return f.new_ones(len(f), 1, 1), f.new_zeros(len(f), 0), f.new_zeros(len(f), 0)
    nodes, gauss = np.polynomial.legendre.leggauss(rungs)
    some = np.arange(rungs) % 2 == (rungs - 1) % 2
    moments = np.zeros(int(some.sum()))
    moments[0] = 2.0
    half = np.zeros(rungs)
    half[some] = (
        0.0
        if rungs == 1
        else np.linalg.solve(np.polynomial.legendre.legvander(nodes[some], len(moments) - 1).T, moments)
    )
    s = span.new_tensor((nodes + 1) / 2)
    lam = torch.cat([(span * s).expm1() / span.expm1(), torch.ones_like(span)], 1)
    pace = span * (span * s).exp() / span.expm1() / 2
    return lam[..., None].to(f), (pace * pace.new_tensor(gauss)).to(f), (pace * pace.new_tensor(half)).to(f)


@cites(CHAUDHARI)
def hamilton_jacobi_residual(
    value: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: float, *, temperature: float
) -> Tensor:
    r"""What is left of the viscous Hamilton–Jacobi equation for a candidate u: u_t + ½ |∇u|² − ½ T Δu.

    Args:
        value: u, from points ``(n, d)`` and times ``(n,)`` to ``(n,)``, twice differentiable by autograd; a formula,
            or a network that learns u.
        x: points ``(n, d)``.
        t: time.
        temperature: T.

    Returns:
        Residuals ``(n,)``.

    Reference: Chaudhari et al. (2018), §3.

    Example:
        >>> u = lambda x, t: x[:, 0] ** 2 / (1 + 2 * t) + 0.05 * (1 + 2 * t).log()
        >>> x = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
        >>> bool(hamilton_jacobi_residual(u, x, 0.3, temperature=0.1).abs().max() < 1e-12)
        True
    """
    with torch.enable_grad():
        points = x.detach().clone().requires_grad_()
        times = torch.full_like(x[:, 0], t).requires_grad_()
        u = value(points, times)
        slope, rate = torch.autograd.grad(u.sum(), (points, times), create_graph=True, materialize_grads=True)
        laplacian = torch.zeros_like(u)
        for i in range(x.shape[1] if slope.requires_grad else 0):  # nothing bends where u is linear
            (row,) = torch.autograd.grad(slope[:, i].sum(), points, retain_graph=True, materialize_grads=True)
            laplacian = laplacian + row[:, i]
    return (rate + slope.square().sum(1) / 2 - temperature / 2 * laplacian).detach()
