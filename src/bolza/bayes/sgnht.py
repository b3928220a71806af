r"""A thermostat for stochastic gradients: the friction is a variable that finds out how hot the gradients are.

    dθ = m dt,   dm = −∇U dt − ξ m dt + √(2AT) dW,   dξ = (|m|²/n − T) dt

Noise of the gradients makes m too fast, so ξ grows until the mean of m² is T again. If the noise is constant and the
same in all n coordinates the law of θ is exp(−U/T), and the noise need not be known.

Reference: Ding, Fang, Babbush, Chen, Skeel & Neven (2014).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from bolza.bayes._sampler import Sampler, check_number, momenta
from bolza.core.errors import ArgumentError
from bolza.core.reference import Reference, cites

__all__ = ["REFERENCE", "SGNHT", "sgnht_step"]

REFERENCE = Reference(
    "ding2014thermostat",
    "Ding, Nan and Fang, Youhan and Babbush, Ryan and Chen, Changyou and Skeel, Robert D. and Neven, Hartmut",
    "Bayesian Sampling Using Stochastic Gradient Thermostats",
    2014,
    venue="Advances in Neural Information Processing Systems",
)


def sgnht_step(
    theta: Tensor,
    m: Tensor,
    xi: Tensor,
    grad: Tensor,
    h: float,
    noise: Tensor,
    friction: float,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of length h by exact parts, with ``grad`` of U, ``noise`` ξ and the thermostat ``xi``.

    Kick; half a drift; half a step of the thermostat; friction and noise, exact at this friction; the halves again.
    Each row of θ ``(..., n)`` has a thermostat of its own, ``xi`` of shape ``(..., 1)``.

    Returns:
        The new θ, m and xi.

    Example:
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> [round(t.item(), 3) for t in sgnht_step(one, zero, zero, one, 0.5, zero, friction=1.0)]
        [0.738, -0.549, -0.362]
    """
    m = m - h * grad
    theta = theta + (h / 2) * m
    xi = xi + (h / 2) * (m.square().mean(-1, keepdim=True) - temperature)
    # (1 − e^{−2ξh})/(2ξ) is h where ξ is 0, and positive for ξ of either sign
    small = xi.abs() < 1e-6
    safe = torch.where(small, torch.ones_like(xi), xi)
    gained = torch.where(small, torch.full_like(xi, h), -torch.expm1(-2 * safe * h) / (2 * safe))
    m = torch.exp(-xi * h) * m + (2 * friction * temperature * gained).sqrt() * noise
    xi = xi + (h / 2) * (m.square().mean(-1, keepdim=True) - temperature)
    return theta + (h / 2) * m, m, xi


@cites(REFERENCE)
class SGNHT(Sampler):
    r"""Stochastic gradient Nosé–Hoover thermostat: a sampler whose friction adapts to the noise of the batches.

    Each parameter tensor has a thermostat of its own, z ← z + (η/N)^½ (mean m² − T): too hot, and its friction grows.
    The noise of the batches need not be known, but within one tensor it should be alike in all coordinates. The
    thermostat needs many steps to settle; watch ``thermostats()`` come to rest before you collect samples.

    Args:
        params: parameters, or groups of them.
        lr: η, as of SGD with momentum on the mean loss; the step on U is h = √(η/N).
        num_data: N, the number of samples of the whole training set.
        prior_precision: λ of the Gaussian prior N(0, 1/λ) of every weight.
        temperature: T > 0.
        friction: α, the share of the momentum that is lost in a step before the thermostat acts, in (0, 1); it also
            sets the injected noise.
        speed: how fast the thermostats follow, as a multiple of the published law; the law at rest does not depend on
            it. 1 is slow when N is large, since a step is √(η/N) of time.
        seed: as for :class:`SGLD`.

    Raises:
        ArgumentError: a setting is out of its range.
        UnsupportedError: (in ``step``) a gradient is sparse.

    Reference: Ding et al. (2014), Algorithm 2. Departures: a thermostat for each tensor rather than one for all, and a
    step by exact parts.

    Example:
        >>> draw = torch.Generator().manual_seed(1)
        >>> w = torch.nn.Parameter(torch.zeros(4000))         # precision 3, and gradients with noise of variance 4
        >>> sampler = SGNHT([w], lr=0.01, num_data=1, prior_precision=0.0, friction=0.1, seed=0)
        >>> for _ in range(400):
        ...     w.grad = 3 * w.detach() + 2 * torch.randn(4000, generator=draw)
        ...     sampler.step()
        >>> round(w.var().item(), 2)                          # a third; BAOAB would have 0.40
        0.34
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        *,
        num_data: int,
        prior_precision: float = 1.0,
        temperature: float = 1.0,
        friction: float = 0.1,
        speed: float = 1.0,
        seed: int | None = None,
    ) -> None:
        check_number("friction", friction, high=1.0, positive=True)
        check_number("temperature", temperature, positive=True)
        check_number("speed", speed, positive=True)
        if friction == 1:
            raise ArgumentError("friction is 1: the thermostat needs a momentum, give less than 1")
        super().__init__(
            params,
            lr=lr,
            num_data=num_data,
            prior_precision=prior_precision,
            temperature=temperature,
            noise_estimate=None,
            seed=seed,
            friction=friction,
            speed=speed,
        )

    def _advance(
        self,
        group: dict[str, Any],
        theta: list[Tensor],
        g: list[Tensor],
        batch_noise: list[Tensor] | float,
        normal: Callable[[], list[Tensor]],
    ) -> None:
        scaled, T = float(group["lr"]) * group["num_data"], group["temperature"]
        if not scaled:
            return
        start = -math.log1p(-group["friction"])
        m = momenta(self, theta)
        for p in theta:
            if "thermostat" not in self.state[p]:
                self.state[p]["thermostat"] = p.new_full((), start)
        z = [self.state[p]["thermostat"] for p in theta]  # friction in a step: ξh
        gain = group["speed"] * float(group["lr"]) / group["num_data"] / 2
        half = math.sqrt(scaled) / group["num_data"] / 2
        torch._foreach_add_(m, g, alpha=-math.sqrt(scaled))
        torch._foreach_add_(theta, m, alpha=half)
        _heat(z, m, T, gain)
        noise = normal()
        for i, at in enumerate(z):
            # of the rates 2AT = 2T·start (a step) and at: gained (1 − e^{−2z})/(2z)
            small = at.abs() < 1e-4
            safe = torch.where(small, torch.ones_like(at), at)
            gained = torch.where(small, 1 - at, -torch.expm1(-2 * safe) / (2 * safe))
            m[i].mul_(torch.exp(-at)).add_(noise[i].mul_((2 * start * T * gained).sqrt()))
        _heat(z, m, T, gain)
        torch._foreach_add_(theta, m, alpha=half)

    def thermostats(self) -> list[Tensor]:
        """The frictions that the thermostats have found, as the share of the momentum that is lost in a step."""
        return [
            1 - torch.exp(-self.state[p]["thermostat"])
            for group in self.param_groups
            for p in group["params"]
            if "thermostat" in self.state.get(p, {})
        ]

    def noise_excess(self) -> float:
        """Zero: the thermostats take up what the batches bring."""
        return 0.0


def _heat(z: list[Tensor], m: list[Tensor], temperature: float, gain: float) -> None:
    """Half a step of the thermostats, dz = (mean m² − T) gain."""
    for at, speed in zip(z, m, strict=True):
        at.add_(speed.square().mean() - temperature, alpha=gain)
