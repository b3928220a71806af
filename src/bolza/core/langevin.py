r"""Langevin dynamics: a position, a velocity, friction and heat.

dx = v dt,   dv = F(x) dt − γ v dt + √(2γT) dW

Its law at rest is exp(−U(x)/T − |v|²/2T) for F = −∇U. Split into kick, drift and exact friction (``BAOAB``: kick,
drift, friction, drift, kick) it keeps the variance of a quadratic potential exactly at every stable step h < 2/ω.

Reference: Leimkuhler & Matthews (2013).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bolza.core.diffusion import Diffusion, Splitting
from bolza.core.errors import ArgumentError, ShapeError
from bolza.core.reference import Reference, cites

__all__ = ["langevin"]

LEIMKUHLER = Reference(
    "leimkuhler2013rational",
    "Leimkuhler, Benedict and Matthews, Charles",
    "Rational Construction of Stochastic Numerical Methods for Molecular Sampling",
    2013,
    venue="Applied Mathematics Research eXpress",
    arxiv="1203.5428",
)


@cites(LEIMKUHLER)
def langevin(
    force: Callable[[Tensor], Tensor], *, friction: float | Tensor, temperature: float | Tensor
) -> Diffusion:
    r"""Langevin dynamics of a position and a velocity, which the scheme ``"splitting"`` solves by exact parts.

    dx = v dt,   dv = F(x) dt − γ v dt + √(2γT) dW

    Args:
        force: F, x → tensor of the shape of x ``(..., d)``: minus the gradient of the potential, unit mass.
        friction: γ > 0, in inverse units of time; a number, or a tensor that broadcasts to ``(..., d)``.
        temperature: T ≥ 0, in the unit of the potential; a number, or a tensor that broadcasts to ``(..., d)``.

    Returns:
        A diffusion on states ``(..., 2, d)``, part 0 the position and part 1 the velocity, with noise ``(..., d)``.
        Every scheme for non-diagonal noise runs on it; ``"splitting"`` costs one force a step and is the one to
        take.

    Raises:
        ArgumentError: the friction is not positive, or the temperature is negative.
        ShapeError: later, where a state has not two parts.

    Reference: Leimkuhler & Matthews (2013), the method BAOAB.

    Example:
        >>> from bolza.core import simulate
        >>> spring = langevin(lambda x: -x, friction=1.0, temperature=0.5)
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = simulate(spring, torch.zeros(4000, 2, 1), dt=1.0, steps=30, scheme="splitting", generator=generator)
        >>> round(float(x[0, :, 0].var()), 1)
        0.5
    """
    if not bool((torch.as_tensor(friction) > 0).all()):
        raise ArgumentError(
            f"friction is {friction}: it must be positive; for overdamped dynamics use Diffusion itself"
        )
    if not bool((torch.as_tensor(temperature) >= 0).all()):
        raise ArgumentError(f"temperature is {temperature}: it cannot be negative")

    def drift(t: float, x: Tensor) -> Tensor:
        v = x[..., 1, :]
        return torch.stack([v, force(x[..., 0, :]) - friction * v], -2)

    def factor(t: float, x: Tensor, noise: Tensor) -> Tensor:
        kick = torch.as_tensor(2 * friction * temperature, dtype=x.dtype, device=x.device).sqrt() * noise
        return torch.stack([torch.zeros_like(kick), kick], -2)

    def noise_shape(x: Tensor) -> tuple[int, ...]:
        if x.dim() < 2 or x.shape[-2] != 2:
            raise ShapeError(
                f"the state has shape {tuple(x.shape)}: give (..., 2, d), positions and velocities stacked along "
                "the last dimension but one"
            )
        return tuple(x[..., 1, :].shape)

    return Diffusion(
        drift,
        factor,
        noise_shape=noise_shape,
        split=Splitting(force, friction, temperature),
    )
