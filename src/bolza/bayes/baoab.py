r"""Langevin dynamics by exact parts: kick, drift, friction, drift, kick.

    m ← m − h ∇U(θ);   θ ← θ + (h/2) m;   m ← c m + √((1 − c²)T) ξ;   θ ← θ + (h/2) m,      c = e^{−γh}

The two half kicks that meet at a position use one gradient and are done at once. On a quadratic potential the variance
of θ is exact at every stable step, h < 2/√λ_max, and on others its error is of second order.

Reference: Leimkuhler & Matthews (2013), arXiv:1203.5428.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bolza.bayes._sampler import MomentumSampler, momenta, spread
from bolza.core.langevin import LEIMKUHLER as REFERENCE
from bolza.core.reference import cites

__all__ = ["BAOAB", "REFERENCE", "baoab_step"]


def baoab_step(
    theta: Tensor,
    m: Tensor,
    grad: Tensor,
    h: float,
    noise: Tensor,
    friction: float,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """One step of length h with ``grad`` of U and ``noise`` ξ; ``friction`` γ in inverse units of time.

    Returns:
        The new θ, and m before its last half kick.

    Example:
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> baoab_step(one, zero, one, 0.5, zero, friction=0.0)
        (tensor([0.7500]), tensor([-0.5000]))
    """
    c = math.exp(-friction * h)
    m = m - h * grad
    new = c * m + math.sqrt((1 - c * c) * temperature) * noise
    return theta + (h / 2) * (m + new), new


@cites(REFERENCE)
class BAOAB(MomentumSampler):
    r"""Langevin dynamics by splitting, as a ``torch.optim.Optimizer``: the sampler to begin with.

    m ← m − √(ηN)(g + λθ/N), then half a drift, m ← cm + √((1 − c²)T) ξ, half a drift, with c = 1 − α. One gradient a
    step. Where the posterior is Gaussian its variance is exact at every stable rate, ηλ_max < 4 for λ_max the largest
    curvature of the mean loss with its prior; elsewhere the error is of second order in √η.

    Args:
        params: parameters, or groups of them.
        lr: η, as of SGD with momentum on the mean loss; the step on U is h = √(η/N). At temperature 0 it is SGD with
            momentum c at the rate η(1 + c)/2.
        num_data: N, the number of samples of the whole training set.
        prior_precision: λ of the Gaussian prior N(0, 1/λ) of every weight.
        temperature: T; 1 samples the posterior.
        friction: α = 1 − c, the share of the momentum that is lost in a step, in (0, 1].
        noise_estimate: V̂, as for :class:`SGLD`: a number, ``"running"``, or ``None``.
        seed: as for :class:`SGLD`.

    Raises:
        ArgumentError: a setting is out of its range.
        UnsupportedError: (in ``step``) a gradient is sparse.

    Reference: Leimkuhler & Matthews (2013). Departures: the two half kicks at a position are one, with one gradient;
    what the batches heat is taken off the noise of the friction.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(4000))         # four thousand chains, precision 3
        >>> sampler = BAOAB([w], lr=0.04, num_data=1, prior_precision=0.0, friction=0.2, seed=0)
        >>> for _ in range(60):
        ...     sampler.zero_grad()
        ...     (3 * w**2 / 2).sum().backward()
        ...     sampler.step()
        >>> round(w.var().item(), 2)                          # a third at every step
        0.33
    """

    def _advance(
        self,
        group: dict[str, Any],
        theta: list[Tensor],
        g: list[Tensor],
        batch_noise: list[Tensor] | float,
        normal: Callable[[], list[Tensor]],
    ) -> None:
        scaled = float(group["lr"]) * group["num_data"]
        c, half = 1 - group["friction"], math.sqrt(scaled) / group["num_data"] / 2
        m = momenta(self, theta)
        torch._foreach_add_(m, g, alpha=-math.sqrt(scaled))
        torch._foreach_add_(theta, m, alpha=half)
        torch._foreach_mul_(m, c)
        heat = (1 - c * c) * group["temperature"]
        if heat and scaled:
            torch._foreach_add_(m, spread(heat, batch_noise, _felt(c) * scaled, normal()))
        torch._foreach_add_(theta, m, alpha=half)

    def _allowed(self, group: dict[str, Any], p: Tensor) -> float:
        scaled, c = float(group["lr"]) * group["num_data"], 1 - group["friction"]
        return (1 - c * c) * group["temperature"] / (_felt(c) * scaled) if scaled else float("inf")


def _felt(c: float) -> float:
    """How much wider θ grows by noise of the kick, as a multiple of noise of the friction.

    A kick drives the half drift before the friction whole and the one after it by c: ((1 + c)/2)² where the step is
    small, and 1/(1 − h²λ/4) times that at curvature λ.
    """
    return (1 + c) ** 2 / 4
