r"""Many chains at once on a potential of a few dimensions, all in one tensor.

    sgld    θ ← θ − h∇U + √(2h) ξ                       biased by O(h)
    baoab   Langevin dynamics by exact parts            biased by O(h²), not at all on a Gaussian
    hmc     leapfrog, accepted or refused               unbiased; finds its step and its masses itself

Reference: Leimkuhler & Matthews (2013) for the default; Neal (2011) for Hamiltonian Monte Carlo, and Hoffman & Gelman
(2014), arXiv:1111.4246, for how its step is found.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from bolza.bayes._sampler import check_number
from bolza.bayes.baoab import baoab_step
from bolza.bayes.sghmc import sghmc_step
from bolza.bayes.sgld import REFERENCE as WELLING
from bolza.bayes.sgld import sgld_step
from bolza.bayes.sgnht import sgnht_step
from bolza.core.errors import ArgumentError, DivergenceError, ShapeError
from bolza.core.langevin import LEIMKUHLER
from bolza.core.reference import Reference, cites

__all__ = ["Chains", "sample"]

HOFFMAN = Reference(
    "hoffman2014nuts",
    "Hoffman, Matthew D. and Gelman, Andrew",
    "The No-U-Turn Sampler: Adaptively Setting Path Lengths in Hamiltonian Monte Carlo",
    2014,
    venue="Journal of Machine Learning Research",
    arxiv="1111.4246",
)

Method = Literal["baoab", "sgld", "sghmc", "sgnht", "hmc"]
Gradient = Callable[[Tensor], tuple[Tensor, Tensor]]
_CHECK_EVERY = 200  # steps between two looks for numbers that are not finite
_LONGEST = 64  # leapfrog steps of a trajectory


@dataclass(frozen=True)
class Chains:
    """Samples of many chains.

    Attributes:
        samples: shape ``(chains, draws, d)``.
        step_size: h.
        gradients: gradients that each chain took, warm-up included.
        acceptance: share of proposals that were accepted after the warm-up; 1 for methods that accept all.
    """

    samples: Tensor
    step_size: float
    gradients: int
    acceptance: float = 1.0

    @property
    def mean(self) -> Tensor:
        """Mean over chains and draws, shape ``(d,)``."""
        return self.samples.flatten(0, 1).mean(0)

    @property
    def covariance(self) -> Tensor:
        """Covariance over chains and draws, shape ``(d, d)``."""
        return torch.atleast_2d(torch.cov(self.samples.flatten(0, 1).T))


@cites(LEIMKUHLER, HOFFMAN, WELLING)
def sample(
    potential: Callable[[Tensor], Tensor],
    x0: Tensor,
    *,
    steps: int,
    method: Method = "baoab",
    step_size: float | None = None,
    warmup: int | None = None,
    thin: int = 1,
    friction: float = 1.0,
    temperature: float = 1.0,
    batched: bool = False,
    generator: torch.Generator | None = None,
) -> Chains:
    r"""Samples of exp(−U/T) from many chains that run side by side.

    Args:
        potential: U, one point ``(d,)`` → scalar: minus the log of the density, up to a constant.
        x0: starts, one chain a row, shape ``(chains, d)``; spread them wider than the law, or R̂ cannot warn you.
        steps: steps after the warm-up.
        method: ``"baoab"``, ``"sgld"``, ``"sghmc"``, ``"sgnht"`` (biased by their step) or ``"hmc"`` (unbiased).
        step_size: h; its square must stay below 4 over the largest curvature (``"sgld"``: h below 2 over it).
            ``None`` for ``"hmc"``: found in the warm-up, with a mass for each coordinate.
        warmup: steps that are left out; a fifth of ``steps`` by default.
        thin: keep one draw of so many.
        friction: γ, in inverse units of time, for the methods with momentum and friction.
        temperature: T > 0.
        batched: the potential takes all chains at once, ``(chains, d)`` → ``(chains,)``, and needs no vectorising.
        generator: source of randomness on the device of x0.

    Returns:
        Chains.

    Raises:
        ArgumentError: a number is out of its range, or the step size is missing.
        ShapeError: x0 is no matrix, or the potential is no scalar.
        DivergenceError: a chain left the finite numbers: the step is too long.

    Reference: Leimkuhler & Matthews (2013); Welling & Teh (2011); Chen et al. (2014); Ding et al. (2014). Departure for
    ``"hmc"``: steps and paths of random length, about a quarter turn, not a search for the turn; equal for
    all chains, with a step from the acceptance of all together.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> chains = sample(lambda x: 3 * x.square().sum() / 2, torch.zeros(1000, 1), steps=50, step_size=0.5,
        ...     friction=1.5, generator=draw)
        >>> chains.samples.shape, round(chains.covariance.item(), 2)
        (torch.Size([1000, 50, 1]), 0.33)
    """
    if x0.dim() != 2 or not x0.is_floating_point():
        raise ShapeError(
            f"x0 is {x0.dtype} of shape {tuple(x0.shape)}: give floating-point starts (chains, d)"
        )
    if method not in ("baoab", "sgld", "sghmc", "sgnht", "hmc"):
        raise ArgumentError(f"method is {method!r}: choose 'baoab', 'sgld', 'sghmc', 'sgnht' or 'hmc'")
    warmup = steps // 5 if warmup is None else warmup
    if steps < 1 or warmup < 0 or not 1 <= thin <= steps:
        raise ArgumentError(
            f"steps={steps} must be positive, warmup={warmup} not negative, thin={thin} in [1, steps]"
        )
    check_number("temperature", temperature, positive=True)
    check_number("friction", friction)
    if step_size is not None:
        check_number("step_size", step_size, positive=True)
    elif method != "hmc":
        raise ArgumentError(
            f"step_size is None: {method!r} cannot find it, as it refuses no proposal; give one, or take method='hmc'"
        )
    gradient = _gradient(potential, x0, batched)
    with torch.no_grad():
        if method == "hmc":
            return _hmc(gradient, x0, steps, warmup, thin, step_size, temperature, generator)
        return _langevin(
            gradient, x0, steps, warmup, thin, method, step_size or 0.0, friction, temperature, generator
        )


def _gradient(potential: Callable[[Tensor], Tensor], x0: Tensor, batched: bool) -> Gradient:
    """∇U ``(chains, d)`` and U ``(chains,)`` as a function of x ``(chains, d)``."""
    if not batched:

        def one(x: Tensor) -> Tensor:
            U = potential(x)
            if not isinstance(U, Tensor) or U.dim():
                got = f"shape {tuple(U.shape)}" if isinstance(U, Tensor) else f"type {type(U).__name__}"
                raise ShapeError(
                    f"the potential of one point ({x.shape[0]},) has {got}: it must be a scalar tensor; for one that "
                    "takes all chains at once pass batched=True"
                )
            return U

        found: Gradient = vmap(grad_and_value(one))
        return found

    def gradient(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            U = potential(x)
            if U.shape != x.shape[:1]:
                raise ShapeError(
                    f"the potential has shape {tuple(U.shape)} for {len(x)} chains: give ({len(x)},), or drop batched"
                )
            (slope,) = torch.autograd.grad(U.sum(), x)
        return slope, U.detach()

    return gradient


def _require_finite(x: Tensor, step: int, h: float) -> None:
    if not bool(torch.isfinite(x).all()):
        raise DivergenceError(
            f"a chain left the finite numbers by step {step}: take a smaller step_size than {h:.3g}",
            step=step,
        )


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def _langevin(
    gradient: Gradient,
    x0: Tensor,
    steps: int,
    warmup: int,
    thin: int,
    method: str,
    h: float,
    friction: float,
    temperature: float,
    generator: torch.Generator | None,
) -> Chains:
    x, kept = x0.detach().clone(), x0.new_empty(steps // thin, *x0.shape)
    m = math.sqrt(temperature) * _normal(x, generator)
    xi = x.new_full((len(x), 1), friction)
    for k in range(-warmup, steps):
        slope, noise = gradient(x)[0], _normal(x, generator)
        if method == "baoab":
            x, m = baoab_step(x, m, slope, h, noise, friction, temperature)
        elif method == "sgld":
            x = sgld_step(x, slope, h, noise, temperature)
        elif method == "sghmc":
            x, m = sghmc_step(x, m, slope, h, noise, friction, temperature)
        else:
            x, m, xi = sgnht_step(x, m, xi, slope, h, noise, friction, temperature)
        if k >= 0 and (k + 1) % thin == 0:
            kept[(k + 1) // thin - 1] = x
        if (k + 1) % _CHECK_EVERY == 0 or k == steps - 1:
            _require_finite(x, k + warmup + 1, h)
    return Chains(kept.transpose(0, 1), h, warmup + steps)


def _hmc(
    gradient: Gradient,
    x0: Tensor,
    steps: int,
    warmup: int,
    thin: int,
    step_size: float | None,
    temperature: float,
    generator: torch.Generator | None,
) -> Chains:
    """Leapfrog paths of a random length; the step follows the acceptance until the warm-up ends."""
    x, kept = x0.detach().clone(), x0.new_empty(steps // thin, *x0.shape)
    slope, U = gradient(x)
    outside = ~(torch.isfinite(U) & torch.isfinite(slope).all(1))
    if bool(outside.any()):
        raise DivergenceError(
            f"the potential or its gradient is not finite where {int(outside.sum())} of {len(x)} chains start: no "
            "proposal is accepted from there; move x0 into the support",
            step=0,
        )
    scale = torch.ones_like(x[0])  # root of the inverse mass
    h = step_size or 0.1
    search = _StepSearch(h)
    gradients, accepted = 1, 0.0
    for k in range(-warmup, steps):
        m = math.sqrt(temperature) * _normal(x, generator)
        turn = float(torch.rand((), generator=generator, device=x.device)) + 0.5
        length = max(1, min(_LONGEST, math.ceil(turn * math.pi / 2 / h)))
        y, v, slope_y, U_y = x, m, slope, U
        e = h * (
            0.6 + 0.4 * float(torch.rand((), generator=generator, device=x.device))
        )  # frees who is stuck
        for _ in range(length):
            v = v - e / 2 * scale * slope_y
            y = y + e * scale * v
            slope_y, U_y = gradient(y)
            v = v - e / 2 * scale * slope_y
        gradients += length
        rise = (U_y - U + v.square().sum(-1) / 2 - m.square().sum(-1) / 2) / temperature
        chance = torch.where(torch.isfinite(rise), rise.neg().clamp_max(0.0).exp(), 0.0)
        take = torch.rand(chance.shape, generator=generator, device=x.device, dtype=x.dtype) < chance
        x, slope = torch.where(take[:, None], y, x), torch.where(take[:, None], slope_y, slope)
        U = torch.where(take, U_y, U)
        if k < 0:
            if step_size is None:
                h = search.update(float(chance.mean()))
                if warmup + k == warmup // 2 and len(x) > 2 * x.shape[1]:
                    scale = x.std(0).clamp_min(1e-12)
                    search = _StepSearch(0.5)
                    h = 0.5
                elif k == -1:
                    h = search.settled()
            continue
        accepted += float(chance.mean())
        if (k + 1) % thin == 0:
            kept[(k + 1) // thin - 1] = x
    return Chains(kept.transpose(0, 1), h, gradients, accepted / steps)


class _StepSearch:
    """Dual averaging of log h towards an acceptance of 0.8."""

    def __init__(self, start: float) -> None:
        self.anchor, self.mean, self.error, self.count = math.log(10 * start), 0.0, 0.0, 0

    def update(self, acceptance: float) -> float:
        self.count += 1
        t = self.count
        self.error += ((0.8 - acceptance) - self.error) / (t + 10)
        log_h = self.anchor - math.sqrt(t) / 0.05 * self.error
        weight = t**-0.75
        self.mean = weight * log_h + (1 - weight) * self.mean
        return math.exp(log_h)

    def settled(self) -> float:
        return math.exp(self.mean)
