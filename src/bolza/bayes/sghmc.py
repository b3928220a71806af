r"""Stochastic gradient Hamiltonian Monte Carlo: momentum, friction, and noise that pays for both.

    m ← (1 − α) m − h ∇U(θ) + √(2αT − h²V̂) ξ,    θ ← θ + h m,    α = h · friction

V̂ is the variance of the gradient's own noise. θ moves by the new m; moving it by the old one (explicit Euler) makes
the chain far too wide at the same cost.

Reference: Chen, Fox & Guestrin (2014), arXiv:1402.4102.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bolza.bayes._sampler import MomentumSampler, momenta, spread
from bolza.core.reference import Reference, cites

__all__ = ["REFERENCE", "SGHMC", "sghmc_step"]

REFERENCE = Reference(
    "chen2014sghmc",
    "Chen, Tianqi and Fox, Emily B. and Guestrin, Carlos",
    "Stochastic Gradient Hamiltonian Monte Carlo",
    2014,
    venue="International Conference on Machine Learning",
    arxiv="1402.4102",
)


def sghmc_step(
    theta: Tensor,
    m: Tensor,
    grad: Tensor,
    h: float,
    noise: Tensor,
    friction: float,
    temperature: float = 1.0,
    explicit: bool = False,
) -> tuple[Tensor, Tensor]:
    """One step of length h with ``grad`` of U and ``noise`` ξ; ``friction`` in inverse units of time.

    Returns:
        The new θ and m.

    Example:
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> sghmc_step(one, zero, one, 0.5, zero, friction=1.0)
        (tensor([0.7500]), tensor([-0.5000]))
    """
    new = (1 - h * friction) * m - h * grad + math.sqrt(2 * h * friction * temperature) * noise
    return theta + h * (m if explicit else new), new


@cites(REFERENCE)
class SGHMC(MomentumSampler):
    r"""Stochastic gradient Hamiltonian Monte Carlo, as a ``torch.optim.Optimizer``: momentum SGD that samples.

    m ← (1 − α)m − √(ηN)(g + λθ/N) + √(2αT − ηNV̂) ξ, θ ← θ + √(η/N) m. At temperature 0 and a constant rate it is SGD
    with momentum 1 − α and weight decay λ/N. The momenta have unit mass and rest at N(0, T) whatever the rate, so a
    schedule may change it.

    Args:
        params: parameters, or groups of them.
        lr: η, as of SGD with momentum on the mean loss; the step on U is h = √(η/N).
        num_data: N, the number of samples of the whole training set.
        prior_precision: λ of the Gaussian prior N(0, 1/λ) of every weight.
        temperature: T; 1 samples the posterior, 0 is SGD with momentum.
        friction: α, the share of the momentum that is lost in a step, in (0, 1]; 1 − α is the momentum of SGD.
        noise_estimate: V̂, as for :class:`SGLD`: a number, ``"running"``, or ``None``.
        seed: as for :class:`SGLD`.

    Raises:
        ArgumentError: a setting is out of its range.
        UnsupportedError: (in ``step``) a gradient is sparse.

    Reference: Chen et al. (2014), eq. (15): v = h m, its η is ours over N. Departure: V̂ may be estimated as it runs.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(4000))         # four thousand chains, precision 3
        >>> sampler = SGHMC([w], lr=0.04, num_data=1, prior_precision=0.0, friction=0.2, seed=0)
        >>> for _ in range(60):
        ...     sampler.zero_grad()
        ...     (3 * w**2 / 2).sum().backward()
        ...     sampler.step()
        >>> round(w.var().item(), 2)                          # 0.345; a third at a small step
        0.34
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
        m = momenta(self, theta)
        torch._foreach_mul_(m, 1 - group["friction"])
        torch._foreach_add_(m, g, alpha=-math.sqrt(scaled))
        heat = 2 * group["friction"] * group["temperature"]
        if heat and scaled:  # a group that stands still needs no heat
            torch._foreach_add_(m, spread(heat, batch_noise, scaled, normal()))
        torch._foreach_add_(theta, m, alpha=math.sqrt(scaled) / group["num_data"])

    def _allowed(self, group: dict[str, Any], p: Tensor) -> float:
        scaled = float(group["lr"]) * group["num_data"]
        return 2 * group["friction"] * group["temperature"] / scaled if scaled else float("inf")
