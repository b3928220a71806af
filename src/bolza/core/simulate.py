r"""Paths of stochastic differential equations: five schemes, many paths at once.

    euler      x + b h + g ΔW                                                 strong ½ (1 additive), weak 1
    heun       x + ½ (b + b(x̂)) h + g ΔW,   x̂ = x + b h + g ΔW, g at t + ½h   weak 2 for additive noise, else 1
    milstein   euler + (g(x⁺) − g) (ΔW² − h)/(2√h),   x⁺ = x + b h + g √h     strong 1, diagonal noise
    srk        x + ½ (b + b(x̂)) h + ¼ (g(x⁺) + g(x⁻) + 2g) ΔW
               + ¼ (g(x⁺) − g(x⁻)) (ΔW² − h)/√h,   x^± = x + b h ± g √h       strong 1, weak 2, diagonal noise
    splitting  velocity and position, by halves about the exact friction      weak 2, Langevin equations

b, g without argument are taken at (t, x), the others at t + h; ΔW = √h ξ. All are read in the sense of Itô: the
diffusion factor of ``heun`` is taken at the first state of the step only, so no Stratonovich drift comes in.

Reference: Kloeden & Platen (1992), *Numerical Solution of Stochastic Differential Equations*, §10.2 (euler), (10.3)
and §11.1 (milstein, without derivatives), §15.1 (srk: the explicit scheme of weak order 2); Leimkuhler & Matthews
(2013) (splitting).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from bolza.core.diffusion import Diffusion, Isotropic
from bolza.core.errors import ArgumentError, DivergenceError, UnsupportedError

__all__ = ["Scheme", "Step", "draw_noise", "simulate", "stepper"]

Scheme = Literal["euler", "heun", "milstein", "srk", "splitting"]
Step = Callable[[float, Tensor, float, Tensor], Tensor]
"""(t, x, h, ξ) → the state at t + h; ξ is noise of unit scale."""

BLOCK = 100_000  # numbers worked on at once: few enough for the cache, enough to hide what each call costs
LOOK = 100  # steps between two looks for paths that are no longer finite


# ----------------------------------------------------------------------------------------- one step


def _product(sde: Diffusion, t: float, x: Tensor, xi: Tensor) -> tuple[Tensor, float]:
    """The product of the factor with the noise, as a tensor and a number yet to be multiplied."""
    if isinstance(sde.factor, Isotropic):
        return xi, sde.factor.sigma
    return sde.factor(t, x, xi), 1.0


def euler_step(sde: Diffusion, t: float, x: Tensor, h: float, xi: Tensor) -> Tensor:
    """Euler–Maruyama: x + b h + g h^{1/α} ξ."""
    b, (g, scale) = sde.drift(t, x), _product(sde, t, x, xi)
    # a fresh tensor, then in place: no temporary, and what the caller keeps of x stays as it was
    return torch.add(x, b, alpha=h).add_(g, alpha=scale * h ** (1 / sde.alpha))


def heun_step(sde: Diffusion, t: float, x: Tensor, h: float, xi: Tensor) -> Tensor:
    """Heun in the drift: x + ½ (b + b(x̂)) h + g ΔW, x̂ the Euler step; g at the middle of its time."""
    b, (g, scale) = sde.drift(t, x), _product(sde, t + h / 2, x, xi)
    noisy = torch.add(x, g, alpha=scale * h**0.5)
    ahead = sde.drift(t + h, torch.add(noisy, b, alpha=h))
    return noisy.add(b, alpha=h / 2).add_(ahead, alpha=h / 2)


def milstein_step(sde: Diffusion, t: float, x: Tensor, h: float, xi: Tensor) -> Tensor:
    """Milstein: x + b h + g ΔW + (g(x⁺) − g) (ΔW² − h)/(2√h), the derivative g g' by a difference."""
    root = h**0.5
    ones = torch.ones_like(xi)
    b, g = sde.drift(t, x), sde.factor(t, x, ones)
    middle = torch.add(x, b, alpha=h)
    rise = sde.factor(t, torch.add(middle, g, alpha=root), ones) - g
    return middle.add(g * xi, alpha=root).add_(rise * (xi * xi - 1), alpha=root / 2)


def srk_step(sde: Diffusion, t: float, x: Tensor, h: float, xi: Tensor) -> Tensor:
    """The explicit scheme of weak order 2 of Platen, entry by entry."""
    root = h**0.5
    ones = torch.ones_like(xi)
    b, g = sde.drift(t, x), sde.factor(t, x, ones)
    middle = torch.add(x, b, alpha=h)
    ahead = sde.drift(t + h, torch.addcmul(middle, g, xi, value=root))
    up = sde.factor(t + h, torch.add(middle, g, alpha=root), ones)
    down = sde.factor(t + h, torch.sub(middle, g, alpha=root), ones)
    x = torch.add(x, b, alpha=h / 2).add_(ahead, alpha=h / 2)
    return x.add_((up + down + 2 * g) * xi, alpha=root / 4).add_((up - down) * (xi * xi - 1), alpha=root / 4)


class SplittingStep:
    r"""Half a kick, half a drift, exact friction and noise, half a drift, half a kick.

        v ← v + ½ h F(x);  x ← x + ½ h v;  v ← c v + √((1 − c²) T) ξ, c = e^{−γh};  x ← x + ½ h v;  v ← v + ½ h F(x)

    The last force of a step is the first of the next, so that a step costs one force.
    """

    def __init__(self, sde: Diffusion) -> None:
        if sde.split is None:
            raise UnsupportedError(
                "scheme='splitting' needs Diffusion.split, the parts of a Langevin equation: "
                "build the equation with bolza.core.langevin, or use scheme='heun'"
            )
        self.split = sde.split
        self._last: tuple[Tensor, Tensor, tuple[int, bool]] | None = None

    def __call__(self, t: float, x: Tensor, h: float, xi: Tensor) -> Tensor:
        """One step of length h."""
        split = self.split
        q, v = x[..., 0, :], x[..., 1, :]
        known = self._last is not None and self._last[0] is x and self._last[2] == _mark(x)
        force = self._last[1] if known and self._last is not None else split.force(q)
        rate = torch.as_tensor(split.friction, dtype=x.dtype, device=x.device) * h
        spread = (
            torch.as_tensor(split.temperature, dtype=x.dtype, device=x.device) * -(-2 * rate).expm1()
        ).sqrt()
        v = torch.add(v, force, alpha=h / 2)
        q = torch.add(q, v, alpha=h / 2)
        v = torch.exp(-rate) * v + spread * xi
        q = q.add_(v, alpha=h / 2)
        force = split.force(q)
        new = torch.stack([q, torch.add(v, force, alpha=h / 2)], -2)
        self._last = (new, force, _mark(new))
        return new


def _mark(x: Tensor) -> tuple[int, bool]:
    """What tells that a tensor was changed in place, or asked to carry a gradient, since."""
    return 0 if x.is_inference() else x._version, x.requires_grad


_PLAIN: dict[str, Callable[[Diffusion, float, Tensor, float, Tensor], Tensor]] = {
    "euler": euler_step,
    "heun": heun_step,
    "milstein": milstein_step,
    "srk": srk_step,
}


def stepper(diffusion: Diffusion, scheme: Scheme = "euler") -> Step:
    r"""The one-step map of a scheme.

    Args:
        diffusion: the equation.
        scheme: see :func:`simulate`.

    Returns:
        A function (t, x, h, ξ) → state at t + h; ξ of the shape ``diffusion.noise_shape(x)`` and of unit scale.

    Raises:
        ArgumentError: the scheme is unknown.
        UnsupportedError: the scheme does not fit the noise of this equation.

    Example:
        >>> step = stepper(Diffusion(lambda t, x: -x, lambda t, x, noise: noise))
        >>> step(0.0, torch.ones(1), 0.25, torch.ones(1))
        tensor([1.2500])
    """
    if scheme not in (*_PLAIN, "splitting"):
        raise ArgumentError(f"scheme={scheme!r} is unknown: choose from {', '.join(_PLAIN)}, splitting")
    if diffusion.alpha < 2 and scheme != "euler":
        raise UnsupportedError(
            f"scheme={scheme!r} is for Brownian noise, and alpha is {diffusion.alpha}: use scheme='euler'"
        )
    if scheme in ("milstein", "srk") and not diffusion.diagonal:
        raise UnsupportedError(
            f"scheme={scheme!r} is for diagonal noise: say Diffusion(..., diagonal=True) if entry i of the factor is "
            "g_i(t, x_i) noise_i; for other additive noise scheme='heun' has weak order 2, else use 'euler'"
        )
    if scheme == "splitting":
        return SplittingStep(diffusion)
    plain = _PLAIN[scheme]
    return lambda t, x, h, xi: plain(diffusion, t, x, h, xi)


def draw_noise(diffusion: Diffusion, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    r"""Noise of unit scale for one step from x: N(0, 1), or α-stable with characteristic function exp(−|u|^α).

    Args:
        diffusion: the equation; its ``noise_shape`` and ``alpha`` are used.
        x: the states.
        generator: source of randomness on the device of x.

    Returns:
        Tensor of shape ``diffusion.noise_shape(x)``, of the dtype and on the device of x.

    Example:
        >>> plain = Diffusion(lambda t, x: -x, lambda t, x, noise: noise)
        >>> draw_noise(plain, torch.zeros(3, 2)).shape
        torch.Size([3, 2])
    """
    if diffusion.alpha == 2:
        return torch.randn(diffusion.noise_shape(x), dtype=x.dtype, device=x.device, generator=generator)
    from bolza.ops.stable_law import stable_noise

    return stable_noise(
        diffusion.noise_shape(x), diffusion.alpha, dtype=x.dtype, device=x.device, generator=generator
    )


# ---------------------------------------------------------------------------------------- many steps


def simulate(
    diffusion: Diffusion,
    x0: Tensor,
    *,
    dt: float,
    steps: int | None = None,
    times: Sequence[float] | Tensor | None = None,
    scheme: Scheme = "euler",
    save_every: int | None = None,
    generator: torch.Generator | None = None,
    block: int | Literal["auto"] | None = "auto",
) -> Tensor:
    r"""Paths of a stochastic differential equation, by a scheme of the reader's choice.

    | scheme | strong order | weak order | for | drifts, factors a step |
    | --- | --- | --- | --- | --- |
    | ``"euler"`` | ½; 1 additive | 1 | any noise, α-stable too | 1, 1 |
    | ``"heun"`` | ½; 1 additive | 1; 2 additive | Brownian noise | 2, 1 |
    | ``"milstein"`` | 1 | 1 | diagonal noise | 1, 2 |
    | ``"srk"`` | 1 | 2 | diagonal noise | 2, 3 |
    | ``"splitting"`` | – | 2 | Langevin equations | one force |

    All are read in the sense of Itô. The paths are worked through in blocks that stay in the cache.

    Args:
        diffusion: the equation.
        x0: initial states at time 0, all paths at once, shape ``(paths, *state)``.
        dt: time step, in the time unit of the drift.
        steps: number of steps; or give ``times``.
        times: increasing output times from 0 on, any distance apart: between two of them the steps have length
            dt, and the last is shortened.
        scheme: as above.
        save_every: with ``steps``, keep every so many; only the last state by default.
        generator: source of randomness on the device of x0.
        block: paths worked on at once, when x0 has at least two dimensions: as many as hold 100,000 numbers, but
            1000 at least, by default; None for all, which a drift needs that couples paths or holds a tensor with a
            row for each. Another block is another order of the same draws, so the paths differ.

    Returns:
        Tensor of shape ``(saved, paths, *state)``: with ``times`` the states at these; with ``save_every`` the
        initial state first; else ``(1, paths, *state)``.

    Raises:
        ArgumentError: ``dt``, ``steps``, ``save_every`` or ``block`` is not positive, times do not increase, both or
            none of ``steps`` and ``times`` are given, or the states are not floating-point numbers.
        UnsupportedError: the scheme does not fit the noise of this equation.
        DivergenceError: a path left the finite numbers; ``step`` says by when.

    Reference: Kloeden & Platen (1992), *Numerical Solution of Stochastic Differential Equations*, §§10.2, 11.1, 15.1.

    Example:
        >>> ornstein = Diffusion(drift=lambda t, x: -x, factor=lambda t, x, noise: 0.0 * noise)
        >>> simulate(ornstein, torch.ones(1), dt=0.5, steps=2)
        tensor([[0.2500]])
        >>> simulate(ornstein, torch.ones(1), dt=0.5, times=[0.0, 0.5, 0.6])
        tensor([[1.0000],
                [0.5000],
                [0.4500]])
    """
    stretches = _stretches(dt, steps, times, save_every)
    if isinstance(block, int) and block < 1:
        raise ArgumentError(
            f"block is {block}: it must be a positive number of paths, or None for all at once"
        )
    if not x0.is_floating_point():
        raise ArgumentError(f"x0 has dtype {x0.dtype}: states are floating-point numbers, use x0.float()")
    stepper(diffusion, scheme)  # a scheme that does not fit is refused before anything runs
    parts = [x0]
    if block is not None and x0.dim() > 1:
        size = max(1000, BLOCK // max(1, x0[:1].numel())) if block == "auto" else block
        parts = [x0[i : i + size] for i in range(0, len(x0), size)] or parts
    done = [torch.stack(list(_paths(diffusion, x, dt, stretches, scheme, generator))) for x in parts]
    return done[0] if len(done) == 1 else torch.cat(done, 1)


Stretch = tuple[float, int, float]
"""Start, number of full steps, one shorter step (0 for none); the state at its end is kept."""


def _stretches(
    dt: float, steps: int | None, times: Sequence[float] | Tensor | None, save_every: int | None
) -> list[Stretch]:
    """The run as stretches, each ending in a state that is kept."""
    if (steps is None) == (times is None):
        raise ArgumentError(f"steps={steps} and times={times}: give one of the two")
    if not 0 < dt < float("inf") or (steps is not None and steps < 1):
        raise ArgumentError(f"dt is {dt} and steps is {steps}: both must be positive and finite")
    if save_every is not None and (steps is None or not 1 <= save_every <= steps):
        raise ArgumentError(
            f"save_every is {save_every}: it must be positive, at most the number of steps, or None; None with times"
        )
    if steps is not None:
        if save_every is None:
            return [(0.0, steps, 0.0)]
        starts = range(0, steps - save_every + 1, save_every)
        return [(0.0, 0, 0.0), *((k * dt, save_every, 0.0) for k in starts)]
    assert times is not None
    at = [float(t) for t in times]
    if not at or not at[0] >= 0 or not all(b > a for a, b in pairwise(at)) or at[-1] == float("inf"):
        raise ArgumentError(f"times={at}: give increasing finite times from 0 on")
    found, last = [], 0.0
    for t in at:
        full = int((t - last) / dt + 1e-6)  # rounding must not make a step of length 1e-16
        rest = t - last - full * dt
        found.append((last, full, rest if rest > 1e-6 * dt else 0.0))
        last = t
    return found


def _paths(
    diffusion: Diffusion,
    x: Tensor,
    dt: float,
    stretches: list[Stretch],
    scheme: Scheme,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    """The kept states of one block of paths."""
    step = stepper(diffusion, scheme)
    total = sum(full + (rest > 0) for _, full, rest in stretches)
    k, noise = 0, None
    for start, full, rest in stretches:
        for j in range(full + (rest > 0)):
            if noise is None or x.requires_grad or diffusion.alpha < 2:
                noise = draw_noise(diffusion, x, generator)
            else:  # the same numbers in the same memory, which nothing needs any more
                noise.normal_(generator=generator)
            x = step(start + j * dt, x, dt if j < full else rest, noise)
            k += 1
            # once it is not finite a path stays so; a look now and then costs nothing and stops early
            if (k % LOOK == 0 or k == total) and not bool(torch.isfinite(x).all()):
                raise DivergenceError(
                    f"a path left the finite numbers by step {k} of {total} with dt = {dt}: take a smaller dt",
                    step=k,
                )
        yield x
