r"""One control for a whole population: the mean-field maximum principle as a fixed point in depth.

    minimise over θ   J = E ℓ(x_T, y) + λ ∫₀ᵀ |θ_s|² ds,   ẋ = F(x, θ_s),   x_0 ~ μ₀
    p_T = ∇_x ℓ(x_T, y),   ṗ = −∂_xF(x, θ_s)ᵀ p
    θ_s minimises   λ|θ|² + E⟨p_s, F(x_s, θ)⟩

One θ_s drives every sample. For a large enough λ the three lines have one solution, Lipschitz in s, and walking
through them again and again contracts to it: no gradient of J is ever taken. From N samples the solution errs as
N^{−1/2}.

References: Bonnet, Cipriani, Fornasier & Huang (2023), arXiv:2107.08707; E, Han & Li (2019), arXiv:1807.01083.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError, DivergenceError, ShapeError
from bolza.core.reference import Reference, cites

__all__ = ["LinearMeanField", "MeanFieldSolution", "linear_mean_field", "mean_field_control"]

BONNET = Reference(
    "bonnet2023meanfield",
    "Bonnet, Benoît and Cipriani, Cristina and Fornasier, Massimo and Huang, Hui",
    "A measure theoretical approach to the mean-field maximum principle for training NeurODEs",
    2023,
    venue="Nonlinear Analysis",
    arxiv="2107.08707",
)
E_HAN_LI = Reference(
    "e2019meanfield",
    "E, Weinan and Han, Jiequn and Li, Qianxiao",
    "A mean-field optimal control formulation of deep learning",
    2019,
    venue="Research in the Mathematical Sciences",
    arxiv="1807.01083",
)

Field = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class MeanFieldSolution:
    """A fixed point of the mean-field maximum principle.

    Attributes:
        theta: control of each step, shape ``(steps, m)``.
        states: x_0 … x_T, shape ``(steps+1, samples, d)``.
        costates: p_0 … p_T of each sample, same shape, without the 1/samples of the mean.
        value: J at ``theta``.
        values: J before every iteration and at the end.
        residuals: max_s |θ_s − argmin| of every iteration: what the maximum principle misses.
        converged: whether the last residual is below the tolerance.
    """

    theta: Tensor
    states: Tensor
    costates: Tensor
    value: float
    values: tuple[float, ...]
    residuals: tuple[float, ...]
    converged: bool


@cites(BONNET, E_HAN_LI)
def mean_field_control(
    field: Field,
    loss: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    y: Tensor,
    theta: Tensor,
    *,
    weight: float,
    time: float = 1.0,
    damping: float = 1.0,
    iterations: int = 50,
    tolerance: float = 1e-6,
    newton: int = 20,
) -> MeanFieldSolution:
    r"""One control for a whole population, by the fixed point of the mean-field maximum principle.

    Each iteration moves the samples forward (x⁺ = x + h F(x, θ_s)), their costates backward
    (p = p⁺ + h ∂_xFᵀp⁺), solves 2λθ + E[∂_θF(x_s, θ)ᵀp_{s+1}] = 0 for all steps at once, and moves
    θ by ``damping`` of the way there. The minimum is found by Newton's method in the m variables of a step, with the
    Hessian made positive and the step halved until the objective falls.

    Args:
        field: F, (x of shape ``(samples, d)``, θ of shape ``(m,)``) → ẋ of shape ``(samples, d)``; smooth in θ,
            a function that ``torch.func`` can transform.
        loss: ℓ, (x_T, y) → ``(samples,)``: one number a sample.
        x0: samples of the initial law, shape ``(samples, d)``; float64 reaches small residuals.
        y: targets, samples first.
        theta: start, shape ``(steps, m)``; the number of steps is read off it. m up to a hundred or so.
        weight: λ > 0, of ∫|θ|². If it is small the iteration swings, and the fixed point may not be the only one: lower
            ``damping``.
        time: T; h = T/steps.
        damping: share of the way to the minimiser that is taken, in (0, 1].
        iterations: at most so many.
        tolerance: of the residual max_s |θ_s − argmin|.
        newton: Newton steps an iteration at most.

    Returns:
        MeanFieldSolution.

    Raises:
        ArgumentError: a number is out of range.
        DivergenceError: the states left the finite numbers.
        ShapeError: shapes do not belong together.

    Reference: Bonnet et al. (2023), arXiv:2107.08707, §4. Departures: costates along the samples in place of a grid
    solution of the backward transport equation, which serves in any dimension; damping.

    Example:
        >>> z = torch.tensor([[0.0], [2.0]], dtype=torch.float64)          # ẋ = θ, to be moved by z
        >>> found = mean_field_control(lambda x, u: u.expand_as(x), lambda x, y: (x - y).square().sum(-1) / 2,
        ...                            torch.zeros_like(z), z, torch.zeros(10, 1, dtype=torch.float64), weight=1.0)
        >>> round(float(found.theta[0]), 4)                                # mean(z) / (2λ + T)
        0.3333
    """
    _check(x0, theta, weight, time, damping, iterations, newton)
    theta, h = theta.detach().clone(), time / len(theta)
    values, residuals = [], []

    def cost_at(at: Tensor, last: Tensor) -> float:
        return float(loss(last, y).mean() + weight * h * at.square().sum())

    for _ in range(iterations):
        states = _forward(field, x0, theta, h)
        costates = _backward(field, loss, y, states, theta, h)
        values.append(cost_at(theta, states[-1]))
        best = _minimisers(field, states[:-1], costates[1:], theta, weight, newton)
        residuals.append(float((best - theta).norm(dim=-1).max()))
        if residuals[-1] <= tolerance:
            break
        theta = theta + damping * (best - theta)
    else:
        states = _forward(field, x0, theta, h)
        costates = _backward(field, loss, y, states, theta, h)
    value = cost_at(theta, states[-1])
    return MeanFieldSolution(
        theta,
        states,
        costates,
        value,
        (*values, value),
        tuple(residuals),
        residuals[-1] <= tolerance,
    )


def _check(
    x0: Tensor, theta: Tensor, weight: float, time: float, damping: float, iterations: int, newton: int
) -> None:
    if x0.ndim != 2 or theta.ndim != 2 or not len(theta):
        raise ShapeError(
            f"x0 has shape {tuple(x0.shape)} and theta {tuple(theta.shape)}: (samples, d) and (steps, m) are needed, "
            "with at least one step"
        )
    if not (weight > 0 and time > 0):
        raise ArgumentError(
            f"weight={weight} and time={time} must be positive: without a weight cost no minimum"
        )
    if not 0 < damping <= 1 or iterations < 1 or newton < 1:
        raise ArgumentError(
            f"damping={damping} must lie in (0, 1]; iterations={iterations} and newton={newton} be at least 1"
        )


@torch.no_grad()
def _forward(field: Field, x0: Tensor, theta: Tensor, h: float) -> Tensor:
    states = [x0]
    for u in theta:
        velocity = field(states[-1], u)
        if velocity.shape != x0.shape:
            raise ShapeError(
                f"the field returned shape {tuple(velocity.shape)} for states of shape {tuple(x0.shape)}"
            )
        states.append(states[-1] + h * velocity)
    if not bool(torch.isfinite(states[-1]).all()):
        raise DivergenceError(
            "the states left the finite numbers: take a larger weight, or a smaller damping"
        )
    return torch.stack(states)


def _backward(
    field: Field,
    loss: Callable[[Tensor, Tensor], Tensor],
    y: Tensor,
    states: Tensor,
    theta: Tensor,
    h: float,
) -> Tensor:
    priced = torch.func.vjp(lambda x: loss(x, y), states[-1])
    if priced[0].shape != states.shape[1:2]:
        raise ShapeError(
            f"the loss has shape {tuple(priced[0].shape)}, but {tuple(states.shape[1:2])} is needed: one "
            "number a sample, so sum over the entries of a sample, and do not average over samples"
        )
    p = priced[1](torch.ones_like(priced[0]))[0]
    costates = [p]
    for x, u in zip(reversed(states[:-1].unbind(0)), reversed(theta.unbind(0)), strict=True):
        p = p + h * torch.func.vjp(lambda at, u=u: field(at, u), x)[1](p)[0]
        costates.append(p)
    return torch.stack(costates[::-1])


def _minimisers(
    field: Field, states: Tensor, costates: Tensor, theta: Tensor, weight: float, steps: int
) -> Tensor:
    """Minimise λ|θ|² + E⟨p, F(x, θ)⟩ from θ, for all depths at once."""

    def energy(u: Tensor, x: Tensor, p: Tensor) -> Tensor:
        return weight * u.square().sum() + (p * field(x, u)).sum() / len(x)

    value = torch.func.vmap(energy)
    slope = torch.func.vmap(torch.func.grad(energy))
    curvature = torch.func.vmap(torch.func.jacrev(torch.func.grad(energy)))
    small = 1000 * torch.finfo(theta.dtype).eps
    u = theta
    for _ in range(steps):
        g = slope(u, states, costates)
        if bool((g.norm(dim=-1) <= small * weight * (1 + u.norm(dim=-1))).all()):
            break
        eigenvalues, vectors = torch.linalg.eigh(curvature(u, states, costates))
        # 2λ is the curvature of the weight cost alone: where F bends down more than that, go down by its size
        scaled = (g[:, None] @ vectors)[:, 0] / eigenvalues.abs().clamp_min(0.1 * weight)
        move = -(vectors @ scaled[..., None])[..., 0]
        now, share = value(u, states, costates), torch.ones_like(move[:, :1])
        for _ in range(20):
            after = value(u + share * move, states, costates)
            worse = after > now + small * now.abs()
            if not bool(worse.any()):
                break
            share = torch.where(worse[:, None], share / 2, share)
        else:
            share = torch.where(worse[:, None], torch.zeros_like(share), share)
        u = u + share * move
    return u.detach()


@dataclass(frozen=True)
class LinearMeanField:
    """Exact answer of the problem ẋ = θ_s, ℓ = ½(x_T − y)² and running cost λθ², with z = y − x.

    Attributes:
        theta: optimal control z̄/(2λ + T), the same at all times.
        value: v(t, μ) = λ/(2λ + T − t)·z̄² + ½Var z, with t the time at which the law of z is ``z``.
        deviation: standard deviation of θ from N independent samples, s/(√N (2λ + T − t)).
        gradient: Lions derivative ∂_μv at each sample, with respect to x.
    """

    theta: Tensor
    value: Tensor
    deviation: Tensor
    gradient: Tensor


@cites(E_HAN_LI)
def linear_mean_field(z: Tensor, weight: float, *, time: float = 1.0, t: float = 0.0) -> LinearMeanField:
    r"""Exact value and control of the scalar mean-field problem, by its Hamilton–Jacobi–Bellman equation.

        ∂_t v + inf_θ { λθ² + E_μ[∂_μv(t, μ)(x) θ] } = 0,   v(T, μ) = ½E z²,   z = y − x
        v(t, μ) = λ/(2λ + T − t)·z̄² + ½Var z,   ∂_μv(x) = −2λ/(2λ + T − t)·z̄ − (z − z̄)

    The infimum is at θ = z̄/(2λ + T − t): feedback on the law of the samples, not on any one of them.

    Args:
        z: distances y − x at time t, shape ``(samples,)``.
        weight: λ > 0.
        time: T.
        t: time at which the samples are at these distances.

    Returns:
        LinearMeanField.

    Raises:
        ArgumentError: λ is not positive, or t is not within [0, T].

    Reference: E, Han & Li (2019), arXiv:1807.01083, §4, worked out for ẋ = θ.

    Example:
        >>> linear_mean_field(torch.tensor([0.6, 2.0]), weight=0.25).theta     # 1.3 / 1.5
        tensor(0.8667)
    """
    if not weight > 0 or not 0 <= t <= time:
        raise ArgumentError(f"weight={weight} must be positive and t={t} lie within [0, {time}]")
    mean, left = z.mean(), 2 * weight + time - t
    centred = z - mean
    variance = centred.square().mean()
    return LinearMeanField(
        mean / left,
        weight / left * mean.square() + variance / 2,
        (variance / len(z)).sqrt() / left,
        -2 * weight / left * mean - centred,
    )
