r"""The statistical tests behind the words: drift, growth, and how errors add up over a run.

Every look at a run tests at its own level, and the levels of all looks together stay below the one that was asked
for: the i-th look has level/(i(i+1)), and Σ 1/(i(i+1)) = 1.

Drift. For equal blocks of a window, with m₁, m₂ the means over the first and the second half and s the standard error
of their difference, z = (m₁ − m₂)/s has Student's law with blocks − 2 degrees of freedom if nothing drifts and a block
is longer than the memory of the run; a shorter block makes |z| larger, so that a run is called stationary too late
rather than too early. For ‖θ‖² it is the fluctuation–dissipation identity with triangular weights, for any optimizer
whose settings do not change (see `bolza.controllers.stationarity_z`).

Growth. Kendall's statistic S = Σ_{i<j} sign(x_j − x_i) over a short window; n(n−1)(2n+5)/18 is its variance without
trend. Neighbours in a run are not independent, so a rise must also be large.

Reference: Yaida (2019), *Fluctuation-dissipation relations for stochastic gradient descent*, arXiv:1810.00004; Kendall
(1938), *A new measure of rank correlation*.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bolza.controllers import stationarity_z
from bolza.core.errors import ArgumentError

__all__ = ["Balance", "Drift", "balance", "drift", "drift_limit", "kendall_z", "level_of_look"]


@dataclass(frozen=True)
class Drift:
    """The difference between the two halves of a window.

    Attributes:
        z: difference over its standard error, positive where the quantity falls.
        change: second half less first half.
        error: standard error of ``change``.
        mean: over the window.
    """

    z: Tensor
    change: Tensor
    error: Tensor
    mean: Tensor


def drift(values: Tensor, blocks: int = 20) -> Drift:
    """Compare the two halves of a window, with an error bar from the spread of block means.

    Args:
        values: ``(..., n)``, evenly spaced; what does not fill whole blocks is left out at the start.
        blocks: even, at least 4; at most n.

    Raises:
        ArgumentError: there are fewer values than blocks.

    Example:
        >>> noise = torch.randn(2000, generator=torch.Generator().manual_seed(0))
        >>> bool(drift(noise).z.abs() < 4), bool(drift(noise - 0.01 * torch.arange(2000)).z > 6)
        (True, True)
    """
    n = values.shape[-1]
    if n < blocks:
        raise ArgumentError(
            f"values has {n} entries for {blocks} blocks: note more steps, or use fewer blocks"
        )
    length = n // blocks
    means = values[..., n - length * blocks :].double().unflatten(-1, (blocks, length)).mean(-1)
    first, second = means.unflatten(-1, (2, blocks // 2)).unbind(-2)
    change = second.mean(-1) - first.mean(-1)
    error = ((first.var(-1) + second.var(-1)) / (blocks // 2)).sqrt()
    return Drift(stationarity_z(means), change, error, means.mean(-1))


@dataclass(frozen=True)
class Balance:
    """Both sides of the fluctuation–dissipation identity, equal in the mean of a stationary run.

    Attributes:
        gain: mean of θ·g.
        gain_error: its standard error.
        noise: mean of (η/2)(1 + μ)‖v‖².
        noise_error: its standard error.
    """

    gain: float
    gain_error: float
    noise: float
    noise_error: float


def balance(
    lr: Tensor, pull: Tensor, turn: Tensor, square: Tensor, momentum: float, blocks: int = 20
) -> Balance | None:
    r"""E[θ·∇f] against (η/2)(1 + μ) E‖v‖² for v ← μv + g, with θ, g and v as they are after the step θ ← θ − ηv.

    Args:
        lr: η, ``(n,)``.
        pull: θ·g after the step; before it, θ·g is larger by η v·g.
        turn: v·g.
        square: ‖v‖².
        momentum: μ.
        blocks: for the errors; at most n.

    Returns:
        Both sides; None where a number is not finite.

    Example:
        >>> one = torch.ones(40)
        >>> sides = balance(0.5 * one, 0 * one, one, 2 * one, momentum=0.0)
        >>> sides.gain, sides.noise
        (0.5, 0.5)
    """
    sides = torch.stack([pull + lr * turn, lr / 2 * (1 + momentum) * square]).double()
    if not bool(sides.isfinite().all()):
        return None
    length = sides.shape[1] // blocks
    means = sides[:, sides.shape[1] - length * blocks :].unflatten(1, (blocks, length)).mean(2)
    (gain, noise), errors = means.mean(1).tolist(), means.std(1) / math.sqrt(blocks)
    return Balance(gain, float(errors[0]), noise, float(errors[1]))


def drift_limit(level: float, quantities: int = 1, blocks: int = 20) -> float:
    """Largest |z| of a stationary window: it is exceeded by one or more of the quantities with probability ``level``.

    Example:
        >>> round(drift_limit(0.05), 2), round(drift_limit(0.05, quantities=2), 2)
        (2.1, 2.45)
    """
    from scipy.stats import t

    return float(t.isf(level / (2 * quantities), blocks - 2))


def level_of_look(level: float, look: int) -> float:
    """Share of ``level`` for the look number ``look`` = 1, 2, …; over all looks they sum to ``level``.

    Example:
        >>> level_of_look(0.01, 1), round(sum(level_of_look(0.01, i) for i in range(1, 10_000)), 5)
        (0.005, 0.01)
    """
    return level / (look * (look + 1))


def kendall_z(values: Tensor) -> float:
    """Trend of a short series in standard errors, by the signs of all differences.

    Args:
        values: ``(n,)``; what is not finite counts as larger than everything before it.

    Example:
        >>> round(kendall_z(torch.arange(16.0)), 2)
        5.4
    """
    n = len(values)
    x = torch.nan_to_num(values.double(), nan=math.inf, posinf=math.inf)
    later, earlier = x[None, :], x[:, None]
    signs = (later > earlier).long() - (later < earlier).long()
    total = int(signs.triu(1).sum())
    return total / math.sqrt(n * (n - 1) * (2 * n + 5) / 18) if n > 2 else 0.0
