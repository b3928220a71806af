r"""A stochastic differential equation, matrix-free.

dx = drift(t, x) dt + factor(t, x) dW          (Itô; L, of index α < 2, in the place of W for jumps)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from bolza.core.errors import ArgumentError

__all__ = ["Diffusion", "Isotropic", "Splitting"]


@dataclass(frozen=True)
class Isotropic:
    r"""The factor σ of noise σ dW, the same in every direction: `simulate` does not multiply it out.

    Args:
        sigma: σ.

    Example:
        >>> import torch
        >>> Isotropic(0.5)(0.0, torch.zeros(2), torch.ones(2))
        tensor([0.5000, 0.5000])
    """

    sigma: float

    def __call__(self, t: float, x: Tensor, noise: Tensor) -> Tensor:
        """The product σ · noise."""
        return self.sigma * noise


@dataclass(frozen=True)
class Splitting:
    r"""The parts of a Langevin equation that are solved exactly one after the other.

        dx = v dt,   dv = force(x) dt − γ v dt + √(2γT) dW

    The state is a tensor ``(..., 2, d)``: part 0 the position x, part 1 the velocity v; the noise ``(..., d)``.

    Args:
        force: x → tensor of the shape of x, ``(..., d)``: minus the gradient of the potential.
        friction: γ > 0, in inverse units of time; a number, or a tensor that broadcasts to v.
        temperature: T ≥ 0, in the unit of the potential; a number, or a tensor that broadcasts to v.
    """

    force: Callable[[Tensor], Tensor]
    friction: float | Tensor
    temperature: float | Tensor


@dataclass(frozen=True)
class Diffusion:
    r"""An Itô equation dx = drift(t, x) dt + factor(t, x) dW, applied by products.

    Args:
        drift: (t, x) → tensor of the shape of x.
        factor: (t, x, noise) → tensor of the shape of x: the product of the diffusion factor with a
            standard normal noise; the factor itself is never formed. ``Isotropic(σ)`` for σ dW.
        noise_shape: x → shape of that noise; the shape of x by default.
        alpha: index of stability of the noise, in (0, 2]. 2: Brownian motion, increments N(0, dt). Below 2:
            independent symmetric α-stable increments of scale dt^{1/α}, characteristic function
            exp(−|u|^α) for a unit of time (at 2 that law would be N(0, 2), not the N(0, 1) used here).
        diagonal: entry i of the product is g_i(t, x_i) noise_i: the factor acts on every entry of the noise
            alone, and depends on its own entry of the state (or on none). Allows the schemes ``"milstein"``
            and ``"srk"``.
        split: the exactly solvable parts of a Langevin equation, for the scheme ``"splitting"``.

    Raises:
        ArgumentError: alpha is outside (0, 2].

    Example:
        >>> import torch
        >>> ornstein = Diffusion(drift=lambda t, x: -x, factor=lambda t, x, noise: 0.5 * noise)
        >>> ornstein.drift(0.0, torch.ones(1))
        tensor([-1.])
    """

    drift: Callable[[float, Tensor], Tensor]
    factor: Callable[[float, Tensor, Tensor], Tensor]
    noise_shape: Callable[[Tensor], tuple[int, ...]] = lambda x: tuple(x.shape)
    alpha: float = 2.0
    diagonal: bool = False
    split: Splitting | None = None

    def __post_init__(self) -> None:
        """Check the index of stability."""
        if not 0 < self.alpha <= 2:
            raise ArgumentError(
                f"alpha is {self.alpha}: the index of stability lies in (0, 2], 2 for Brownian motion"
            )
