r"""Simulated first passage times: when paths leave a region, with what is not seen between two steps accounted for.

A path looked at every dt misses excursions through the border, which makes exit times too long by a relative √dt. Given
both ends of a step, the path between them is nearly a Brownian bridge, which has crossed a border at the distances
h₀, h₁ > 0 with probability

    p = exp(−2 h₀ h₁ / (s² dt)),    s² = |gᵀ∇h|²  the noise across the border,

so a path that ends the step inside is counted as gone with that probability. The error left is of the order dt.

Reference: Mannella (1999); Gobet (2000) for killed diffusions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bolza.core.diffusion import Diffusion
from bolza.core.errors import ArgumentError, DivergenceError, ShapeError
from bolza.core.reference import Reference, cites
from bolza.core.simulate import Scheme, Step, draw_noise, stepper

__all__ = ["ExitTimes", "exit_times"]

GOBET = Reference(
    "gobet2000weak",
    "Gobet, Emmanuel",
    "Weak Approximation of Killed Diffusion Using Euler Schemes",
    2000,
    venue="Stochastic Processes and their Applications",
)


@dataclass(frozen=True)
class ExitTimes:
    """When each path left, and the mean with its uncertainty.

    Attributes:
        times: float64 tensor ``(paths,)``: the time of exit, or the horizon for paths still inside.
        exited: bool tensor ``(paths,)``: False where the time is only a lower bound.
        horizon: the time at which the simulation ended.
    """

    times: Tensor
    exited: Tensor
    horizon: float

    @property
    def censored(self) -> int:
        """Number of paths still inside at the horizon."""
        return int((~self.exited).sum())

    @property
    def mean(self) -> float:
        """Mean exit time: total time inside over number of exits; inf if there was none.

        Without censored paths this is the sample mean, for any law. With them it supposes an exponential law, as that
        of rare exits is.
        """
        exits = int(self.exited.sum())
        return float(self.times.sum()) / exits if exits else math.inf

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Confidence interval of the mean.

        Args:
            level: probability that the interval holds the mean.

        Returns:
            Lower and upper end. Without censored paths by the sample's spread; with them (or fewer than ten exits)
            that of an exponential law, its upper end inf if there was no exit.

        Raises:
            ArgumentError: the level is not in (0, 1).
        """
        if not 0 < level < 1:
            raise ArgumentError(f"level is {level}: it lies in (0, 1)")
        from scipy.special import chdtri, ndtri

        exits, total = int(self.exited.sum()), float(self.times.sum())
        if self.censored == 0 and exits >= 10:
            width = float(ndtri((1 + level) / 2)) * float(self.times.std()) / math.sqrt(exits)
            return self.mean - width, self.mean + width
        low = 2 * total / float(chdtri(2 * exits + 2, (1 - level) / 2))
        return low, 2 * total / float(chdtri(2 * exits, (1 + level) / 2)) if exits else math.inf

    def survival(self, at: Tensor) -> Tensor:
        """Share of paths still inside at given times up to the horizon.

        Args:
            at: times, any shape.

        Returns:
            Tensor of that shape.
        """
        ends = self.times[self.exited].sort().values
        at = torch.as_tensor(at, dtype=self.times.dtype, device=self.times.device)
        return 1 - torch.searchsorted(ends, at, right=True) / len(self.times)


@cites(GOBET)
def exit_times(
    diffusion: Diffusion,
    x0: Tensor,
    inside: Callable[[Tensor], Tensor],
    *,
    dt: float,
    horizon: float,
    scheme: Scheme = "euler",
    bridge: bool = True,
    generator: torch.Generator | None = None,
) -> ExitTimes:
    r"""Simulated times at which paths leave a region, all paths at once, those gone removed.

    Args:
        diffusion: the equation.
        x0: starting states ``(paths, *state)``, all inside.
        inside: x → tensor ``(paths,)``. Best a level: a differentiable function that is positive inside, zero on the
            border and negative outside (1 − x for x < 1), which allows the correction for crossings between steps.
            Or a bool, True inside: exit times are then too long by a relative √dt.
        dt: time step.
        horizon: time at which paths still inside are given up (censored).
        scheme: as in :func:`bolza.core.simulate`; ``"heun"`` for additive noise.
        bridge: use the correction where the level allows it. It is never used for jumps (alpha < 2), which do not
            cross the border but leap over it.
        generator: source of randomness on the device of x0.

    Returns:
        Times, flags and intervals.

    Raises:
        ArgumentError: dt or the horizon is not positive, or a path starts outside.
        ShapeError: ``inside`` does not give one number for each path.
        DivergenceError: a path left the finite numbers inside the region.

    Reference: Gobet (2000), the Brownian bridge in a half space; departures: the border is taken as flat and the noise
    as constant over one step.

    Example:
        >>> motion = Diffusion(lambda t, x: 0 * x, lambda t, x, noise: noise)
        >>> found = exit_times(motion, torch.zeros(2000, 1), lambda x: 1 - x[:, 0].abs(), dt=0.05, horizon=20.0,
        ...                    generator=torch.Generator().manual_seed(0))
        >>> low, high = found.interval()
        >>> low < 1 < high                                     # E τ = 1 for Brownian motion from the middle
        True
    """
    if not (0 < dt < math.inf and 0 < horizon < math.inf):
        raise ArgumentError(f"dt is {dt} and horizon is {horizon}: both must be positive and finite")
    x = x0.detach()
    level, smooth = _level(inside, x)
    if not bool((level > 0).all()):
        raise ArgumentError(
            f"{int((level <= 0).sum())} of {len(x)} paths start outside the region: choose x0 inside"
        )
    border = _Border(diffusion, inside, generator) if bridge and smooth and diffusion.alpha == 2 else None
    step: Step = stepper(diffusion, scheme)
    times = torch.full((len(x),), float(horizon), dtype=torch.float64, device=x.device)
    exited = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    alive = torch.arange(len(x), device=x.device)  # the paths still worked on
    here = torch.ones_like(exited)  # those of them still inside
    for k in range(math.ceil(horizon / dt - 1e-9)):
        t, h = k * dt, min(dt, horizon - k * dt)
        new = step(t, x, h, draw_noise(diffusion, x, generator))
        if new.requires_grad:  # parameters in the equation: without a graph that grows with every step
            new = new.detach()
        after = _level(inside, new)[0]
        gone = here & ~(after > 0)
        crossed = None if border is None else border.crossed(t, x, level, after, h)
        if crossed is not None:
            gone[crossed] = here[crossed]
        if bool(gone.any()):
            if bool(new[gone].isnan().any()):  # it did not leave, it broke
                raise _diverged(k, dt)
            at = torch.full_like(times[: int(gone.sum())], t + h)
            if border is not None:  # by reflection the time of crossing has the same law for h₁ and −h₁
                first, last = level[gone].double(), after[gone].double().abs()
                at -= h * (last / (first + last)).nan_to_num(1.0)
            times[alive[gone]] = at
            exited[alive[gone]] = True
            here &= ~gone
            left = int(here.sum())
            if left == 0:
                break
            if left < 0.9 * len(
                here
            ):  # the others go on a little, which costs less than to move all the time
                new, after, alive = new[here], after[here], alive[here]
                here = torch.ones_like(alive, dtype=torch.bool)
        if k % 100 == 99 and not bool(torch.isfinite(new[here]).all()):
            raise _diverged(k, dt)
        x, level = new, after
    return ExitTimes(times, exited, float(horizon))


def _diverged(k: int, dt: float) -> DivergenceError:
    return DivergenceError(
        f"a path inside the region left the finite numbers by step {k + 1} with dt = {dt}: take a smaller dt",
        step=k + 1,
    )


def _level(inside: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, bool]:
    """The level as a number, and whether it is one."""
    with torch.no_grad():
        value = inside(x)
    if not isinstance(value, Tensor) or value.shape != x.shape[:1]:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ShapeError(
            f"inside gave {shape} for states {tuple(x.shape)}: it must give one number for each path"
        )
    return (value.to(x.dtype), False) if value.dtype == torch.bool else (value, True)


class _Border:
    """Chances that paths touched the border within a step though both its ends are inside."""

    def __init__(
        self, diffusion: Diffusion, inside: Callable[[Tensor], Tensor], generator: torch.Generator | None
    ) -> None:
        self.diffusion, self.inside, self.generator = diffusion, inside, generator
        self.most = 0.0  # the largest noise across the border met so far
        self.steps = 0

    def crossed(self, t: float, x: Tensor, before: Tensor, after: Tensor, h: float) -> Tensor | None:
        """Numbers of the paths that did; None for none."""
        both = (before > 0) & (after > 0)
        if self.most == 0 or self.steps % 50 == 0:  # a look at all, now and then
            near = both.nonzero()[:, 0]
        else:
            # e^−42 for paths further away, by the largest noise met or by three times the square of the largest step
            step = torch.where(both, after - before, 0.0).square().max()
            near = (both & (before * after < (3 * step).clamp_min(21 * self.most * h))).nonzero()[:, 0]
        self.steps += 1
        if len(near) == 0:
            return None
        across = _normal_noise(self.diffusion, self.inside, t, x[near])
        self.most = max(self.most, float(across.nan_to_num(0.0, 0.0).max()))
        chance = torch.exp(
            -2 * before[near] * after[near] / (across * h).clamp_min(torch.finfo(x.dtype).tiny)
        )
        drawn = torch.rand(chance.shape, dtype=chance.dtype, device=x.device, generator=self.generator)
        return near[drawn < chance]


def _normal_noise(diffusion: Diffusion, inside: Callable[[Tensor], Tensor], t: float, x: Tensor) -> Tensor:
    """|gᵀ∇h|² for every path, by two products with transposes."""
    with torch.enable_grad():
        state = x.detach().requires_grad_()
        height = inside(state)
        if not height.requires_grad:  # a step function: nothing is known between its steps
            return torch.zeros(len(x), dtype=x.dtype, device=x.device)
        (normal,) = torch.autograd.grad(height.sum(), state)
        noise = torch.zeros(diffusion.noise_shape(x), dtype=x.dtype, device=x.device, requires_grad=True)
        product = diffusion.factor(t, x, noise)
        if not product.requires_grad:  # no noise at all
            return torch.zeros(len(x), dtype=x.dtype, device=x.device)
        (across,) = torch.autograd.grad((product * normal).sum(), noise)
    return across.square().flatten(1).sum(1) if across.dim() > 1 else across.square()
