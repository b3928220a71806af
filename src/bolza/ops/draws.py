r"""Samples of a Gaussian whose empirical covariance is exactly the wanted one.

A layer of infinite width is a Gaussian over its units. ``units`` samples of it stand for the layer where
no closed form does: with mirrored pairs and whitening their first and second moments are exact, so only
moments of higher order carry sampling error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bolza.ops.errors import ArgumentError

__all__ = ["gaussian_draws", "white_draws"]


def white_draws(items: int, units: int, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal ``z`` with z zᵀ/units = I and odd moments zero, exactly.

    Args:
        items: number of rows.
        units: number of samples; even, at least ``2 · items``.
        generator: of the random numbers.

    Returns:
        Float64 tensor ``(items, units)`` on the CPU.

    Raises:
        ArgumentError: too few units.

    Example:
        >>> z = white_draws(3, 64, torch.Generator().manual_seed(0))
        >>> bool(torch.allclose(z @ z.T / 64, torch.eye(3, dtype=torch.float64)))
        True
    """
    if units % 2 or units < 2 * items:
        raise ArgumentError(f"units={units} must be even and at least 2 · items = {2 * items}.")
    half = torch.randn(items, units // 2, generator=generator, dtype=torch.float64)
    factor = torch.linalg.cholesky(half @ half.T / (units // 2))
    half = torch.linalg.solve_triangular(factor, half, upper=False)
    return torch.cat([half, -half], -1)


def gaussian_draws(kernel: Tensor, units: int, generator: torch.Generator | None = None) -> Tensor:
    """Samples h of N(0, kernel) with h hᵀ/units = kernel and odd moments zero, exactly.

    Args:
        kernel: ``(…, items, items)``, positive semi-definite up to rounding (it may be singular).
        units: number of samples; even, at least ``2 · items``.
        generator: of the random numbers.

    Returns:
        Float64 tensor ``(…, items, units)`` on the CPU.

    Raises:
        ArgumentError: too few units.

    Example:
        >>> kernel = torch.tensor([[1.0, 0.5], [0.5, 2.0]], dtype=torch.float64)
        >>> h = gaussian_draws(kernel, 100, torch.Generator().manual_seed(0))
        >>> bool(torch.allclose(h @ h.T / 100, kernel))
        True
    """
    kernel = kernel.detach().to("cpu", torch.float64)
    *lead, items, _ = kernel.shape
    values, vectors = torch.linalg.eigh(kernel)
    root = vectors * values.clamp_min(0).sqrt()[..., None, :]
    blocks = [white_draws(items, units, generator) for _ in range(max(1, int(torch.tensor(lead).prod())))]
    white = torch.stack(blocks).reshape(*lead, items, units)
    return torch.as_tensor(root @ white)
