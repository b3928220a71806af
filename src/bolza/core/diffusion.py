r"""A stochastic differential equation, matrix-free.

dx = drift(t, x) dt + factor(t, x) dW          (Itô)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError, DivergenceError

__all__ = ["Diffusion", "simulate"]


@dataclass(frozen=True)
class Diffusion:
    r"""An Itô equation dx = drift(t, x) dt + factor(t, x) dW, applied by products.

    Args:
        drift: (t, x) → tensor of the shape of x.
        factor: (t, x, noise) → tensor of the shape of x: the product of the diffusion factor with a
            standard normal noise; the factor itself is never formed.
        noise_shape: x → shape of that noise; the shape of x by default.

    Example:
        >>> ornstein = Diffusion(drift=lambda t, x: -x, factor=lambda t, x, noise: 0.5 * noise)
        >>> ornstein.drift(0.0, torch.ones(1))
        tensor([-1.])
    """

    drift: Callable[[float, Tensor], Tensor]
    factor: Callable[[float, Tensor, Tensor], Tensor]
    noise_shape: Callable[[Tensor], tuple[int, ...]] = lambda x: tuple(x.shape)


def simulate(
    diffusion: Diffusion,
    x0: Tensor,
    *,
    dt: float,
    steps: int,
    save_every: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Euler–Maruyama paths: x_{k+1} = x_k + drift dt + factor √dt ξ_k (strong order 1/2, weak order 1).

    Args:
        diffusion: the equation.
        x0: initial states, all paths at once, shape ``(paths, *state)``.
        dt: time step, in the time unit of the drift.
        steps: number of steps.
        save_every: keep every so many steps; only the last state by default.
        generator: source of randomness on the device of x0.

    Returns:
        Tensor of shape ``(saved, paths, *state)``, the initial state first when states are saved,
        else ``(1, paths, *state)``.

    Raises:
        ArgumentError: ``dt`` or ``steps`` is not positive.
        DivergenceError: a path left the finite numbers; ``step`` says by when.

    Reference: Kloeden & Platen (1992), *Numerical Solution of Stochastic Differential Equations*, §10.2.

    Example:
        >>> ornstein = Diffusion(drift=lambda t, x: -x, factor=lambda t, x, noise: 0.0 * noise)
        >>> simulate(ornstein, torch.ones(1), dt=0.5, steps=2)
        tensor([[0.2500]])
    """
    if not (dt > 0 and steps > 0):
        raise ArgumentError(f"dt is {dt} and steps is {steps}: both must be positive")
    if save_every is not None and save_every < 1:
        raise ArgumentError(f"save_every is {save_every}: it must be a positive number of steps, or None")
    x, saved = x0, [] if save_every is None else [x0]
    for k in range(steps):
        noise = torch.randn(diffusion.noise_shape(x), dtype=x.dtype, device=x.device, generator=generator)
        x = x + dt * diffusion.drift(k * dt, x) + dt**0.5 * diffusion.factor(k * dt, x, noise)
        if save_every is not None and (k + 1) % save_every == 0:
            saved.append(x)
        # once it is not finite a path stays so; a look now and then costs nothing and stops early
        if ((k + 1) % 100 == 0 or k + 1 == steps) and not bool(torch.isfinite(x).all()):
            raise DivergenceError(
                f"a path left the finite numbers by step {k + 1} of {steps} with dt = {dt}: take a smaller dt",
                step=k + 1,
            )
    if save_every is None:
        saved.append(x)
    return torch.stack(saved)
