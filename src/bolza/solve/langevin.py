r"""A law of weights at every depth, with an entropy cost: its optimum is where coupled Langevin dynamics come to rest.

    x_{t+1} = x_t + h ∫ f(x_t, a) π_t(da)
    minimise over π   E φ(x_T, y) + h Σ_t ∫ L(a) π_t(da) + (σ²/2) h Σ_t ∫ log π_t dπ_t

    da_t = −E_data[∂_aH(x_t, a_t, p_{t+1})] ds + σ dW,   H = ⟨p, f(x, a)⟩ + L(a)
    at rest   π_t(a) ∝ exp(−(2/σ²) E_data[H(x_t, a, p_{t+1})])

M particles stand for each law; the dynamics is noisy gradient descent on an ensemble of weights a layer.

Reference: Hu, Kazeykina & Ren (2019), arXiv:1909.07278.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError, DivergenceError, ShapeError
from bolza.core.reference import Reference, cites

__all__ = ["LangevinSolution", "mean_field_langevin", "neuron_field"]

HU = Reference(
    "hu2019langevin",
    "Hu, Kaitong and Kazeykina, Anna and Ren, Zhenjie",
    "Mean-field Langevin System, Optimal Control and Deep Neural Networks",
    2019,
    arxiv="1909.07278",
)

Field = Callable[[Tensor, Tensor], Tensor]


def neuron_field(activation: Callable[[Tensor], Tensor] = torch.tanh) -> Field:
    r"""The mean over neurons (w, b, v) of v σ(w·x + b), as a field for :func:`mean_field_langevin`.

    Args:
        activation: σ.

    Returns:
        A function of x ``(samples, d)`` and particles ``(M, 2d + 1)``, columns w, b, v, to ``(samples, d)``.

    Example:
        >>> neuron_field()(torch.zeros(5, 2), torch.ones(100, 5)).shape
        torch.Size([5, 2])
    """

    def field(x: Tensor, a: Tensor) -> Tensor:
        d = x.shape[-1]
        if a.shape[-1] != 2 * d + 1:
            raise ShapeError(f"particles have {a.shape[-1]} entries, but 2d + 1 = {2 * d + 1} are needed")
        w, b, v = a.split([d, 1, d], -1)
        return activation(x @ w.mT + b.mT) @ v / len(a)

    return field


@dataclass(frozen=True)
class LangevinSolution:
    """Particles of the laws, and how they got there.

    Attributes:
        particles: shape ``(steps, M, m)``.
        mean: mean of the particles of each depth over the second half of the run, shape ``(steps, m)``.
        variance: their variance over particles and the second half of the run, shape ``(steps, m)``.
        values: cost without the entropy at each iteration, shape ``(iterations,)``.
    """

    particles: Tensor
    mean: Tensor
    variance: Tensor
    values: Tensor


@cites(HU)
def mean_field_langevin(
    field: Field,
    loss: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    y: Tensor,
    particles: Tensor,
    *,
    noise: float,
    weight: float,
    time: float = 1.0,
    ds: float = 0.01,
    iterations: int = 1000,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    progress: Callable[[float, str], None] | None = None,
) -> LangevinSolution:
    r"""The law of weights that is optimal at every depth under an entropy cost, by coupled Langevin particles.

    One iteration is a ← a − E[∂_aH] ds + σ√ds ξ for all particles of all depths, with states and costates of the
    present ensemble: ∂_aH of a particle is M/h times the gradient of the cost of the whole net. The confining cost is
    L(a) = (c/2)|a|². The step leaves a bias: for quadratic H the variance comes out by 1/(1 − H″ds/2) too large.

    Args:
        field: the *mean over particles* of f(x, aʲ), from x ``(samples, d)`` and particles ``(M, m)`` to
            ``(samples, d)``; :func:`neuron_field` makes one.
        loss: φ, (x_T, y) → the mean over samples, a scalar.
        x0: inputs, shape ``(samples, d)``.
        y: targets, samples first.
        particles: start, shape ``(steps, M, m)``; not changed.
        noise: σ ≥ 0; the temperature is σ²/2. With 0: gradient descent on the ensemble.
        weight: c > 0 of the confining cost, without which there is no law at rest.
        time: T; h = T/steps.
        ds: step of the Langevin time.
        iterations: number of steps; about 3/(c·ds) of them forget the start.
        batch_size: draw so many samples an iteration, with replacement; all by default.
        generator: source of randomness on the device of the particles.
        progress: called with the share done and a few words.

    Returns:
        LangevinSolution.

    Raises:
        ArgumentError: a number is out of range.
        DivergenceError: the particles left the finite numbers.
        ShapeError: particles are not of three dimensions, or the loss is no scalar.

    Reference: Hu, Kazeykina & Ren (2019), arXiv:1909.07278. Departure: the confining cost is quadratic.

    Example:
        >>> law = mean_field_langevin(lambda x, a: a.mean(0).expand_as(x), lambda x, y: (x - y).square().mean() / 2,
        ...     torch.zeros(1, 1), torch.full((1, 1), 2.0), torch.zeros(4, 100, 1), noise=0.4472, weight=0.5, ds=0.05,
        ...     iterations=400, generator=torch.Generator().manual_seed(0))
        >>> bool((law.mean - 4 / 3).abs().max() < 0.1)        # g / (c + T), whatever the noise
        True
    """
    if particles.ndim != 3 or x0.ndim != 2:
        raise ShapeError(
            f"particles has shape {tuple(particles.shape)} and x0 {tuple(x0.shape)}: (steps, M, m) and (samples, d) "
            "are needed"
        )
    if noise < 0 or not (weight > 0 and time > 0 and ds > 0) or iterations < 1:
        raise ArgumentError(
            f"noise={noise} must not be negative; weight={weight}, time={time}, ds={ds} and iterations={iterations} "
            "must be positive"
        )
    if batch_size is not None and batch_size < 1:
        raise ArgumentError(f"batch_size={batch_size} must be positive, or None")
    steps, count = particles.shape[:2]
    h, a = time / steps, particles.detach().clone()
    report = progress or (lambda share, text: None)
    values, total, squares, kept = [], torch.zeros_like(a[:, 0]), torch.zeros_like(a[:, 0]), 0
    for k in range(iterations):
        chosen = (
            slice(None)
            if batch_size is None
            else torch.randint(len(x0), (batch_size,), generator=generator, device=x0.device)
        )
        cost, gradient = _cost_gradient(field, loss, x0[chosen], y[chosen], a, h)
        draws = torch.randn(a.shape, dtype=a.dtype, device=a.device, generator=generator)
        values.append(cost + 0.5 * weight * h * a.square().sum() / count)
        a = a - ds * (gradient * (count / h) + weight * a) + noise * ds**0.5 * draws
        if k >= iterations // 2:
            total, squares, kept = total + a.mean(1), squares + a.square().mean(1), kept + 1
        if (k + 1) % 100 == 0 or k + 1 == iterations:
            if not bool(torch.isfinite(a).all()):
                raise DivergenceError(
                    f"the particles left the finite numbers by iteration {k + 1}: take a smaller ds than {ds}",
                    step=k + 1,
                )
            report((k + 1) / iterations, f"cost {float(values[-1]):.4f}")
    mean = total / kept
    return LangevinSolution(a, mean, squares / kept - mean.square(), torch.stack(values))


def _cost_gradient(
    field: Field, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, a: Tensor, h: float
) -> tuple[Tensor, Tensor]:
    """E φ(x_T, y), and its gradient in all particles."""
    with torch.enable_grad():
        a = a.detach().requires_grad_()
        for at in a.unbind(0):
            x = x + h * field(x, at)
        value = loss(x, y)
        if value.numel() != 1:
            raise ShapeError(
                f"the loss has shape {tuple(value.shape)}, but a scalar is needed: take the mean"
            )
        (gradient,) = torch.autograd.grad(value, a, materialize_grads=True, allow_unused=True)
    return value.detach(), gradient
