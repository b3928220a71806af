r"""Optimal learning rate and momentum of SGD in a quadratic bowl, in closed form.

For f = ½a(θ − b)², mini-batch gradients of variance Σ and the step θ ← θ − uηg the mean loss m = E f obeys

    diffusion, t = kη:   dm/dt = −2aum + ½aηΣu²          step:   m' = (1 − uηa)²m + ½a(uη)²Σ

m' grows with m, so that what is best for the last loss is best for the next: the law that minimises the right sides,

    u* = min(1, 2m/(ηΣ))                                 u* = min(1, 2m/(η(Σ + 2am))),

is optimal for every horizon. The second is the first with the limit uηa ≤ 1 of stability built in. Both keep u = 1 down
to the noise floor and then let it fall like 1/t; the loss falls like 1/m_k = 1/m_0 + 2ak/Σ, whatever η is.

Reference: Li, Tai & E (2017), arXiv:1511.06251, §4. Departures: the law of the step is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError
from bolza.core.reference import Reference, cites

__all__ = [
    "ControlledQuadratic",
    "critical_momentum",
    "learning_rate_law",
    "momentum_law",
    "stationary_loss",
]

LI = Reference(
    "li2017stochastic",
    "Li, Qianxiao and Tai, Cheng and E, Weinan",
    "Stochastic Modified Equations and Adaptive Stochastic Gradient Algorithms",
    2017,
    "International Conference on Machine Learning",
    "1511.06251",
)

Number = float | Tensor


def _tensor(value: Number) -> Tensor:
    return value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)


@cites(LI)
def learning_rate_law(
    loss: Number, noise: Number, lr: Number, curvature: Number, *, exact: bool = True
) -> Tensor:
    r"""Best factor u ∈ [0, 1] on the learning rate for a bowl of known curvature, noise and loss.

        u* = min(1, 2m/(η(Σ + 2am)))   (steps)       u* = min(1, 2m/(ηΣ))   (diffusion)       u* = 1 where a ≤ 0

    Args:
        loss: m = E f above its minimum, without the noise of the mini-batch; any shape.
        noise: Σ, variance of a mini-batch gradient.
        lr: η, the largest learning rate.
        curvature: a.
        exact: the law of the step, which never exceeds 1/(ηa); or that of the diffusion.

    Returns:
        u*, the shape of the arguments together.

    Reference: Li, Tai & E (2017), §4.1. Departure: the law of the step.

    Example:
        >>> round(learning_rate_law(0.01, noise=1.0, lr=0.2, curvature=1.0, exact=False).item(), 6)
        0.1
        >>> learning_rate_law(10.0, noise=0.0, lr=4.0, curvature=1.0).item()     # Newton's step
        0.25
    """
    m, s, eta, a = (_tensor(value) for value in (loss, noise, lr, curvature))
    u = 2 * m / (eta * (s + 2 * a * m if exact else s))
    return torch.where(a > 0, u.clamp(0, 1), 1.0)


@cites(LI)
def critical_momentum(curvature: Number, lr: Number, *, exact: bool = False) -> Tensor:
    r"""Momentum of critical damping in a bowl, the quickest that does not oscillate.

        μ = max(0, 1 − 2√(aη))   (diffusion)         μ = (1 − √(aη))², 0 from aη = 1 on   (steps)

    Args:
        curvature: a.
        lr: η.
        exact: of the step x' = x + v', v' = μv − ηg: the double root of z² − (1 + μ − aη)z + μ.

    Returns:
        μ, the shape of the arguments together; 1 where a ≤ 0.

    Reference: Li, Tai & E (2017), §4.2. Departure: the momentum of the step.

    Example:
        >>> round(critical_momentum(1.0, 0.1).item(), 6), round(critical_momentum(1.0, 0.1, exact=True).item(), 6)
        (0.367544, 0.467544)
    """
    a, eta = _tensor(curvature), _tensor(lr)
    root = (a * eta).clamp_min(0).sqrt()
    mu = (1 - root).clamp_min(0).square() if exact else (1 - 2 * root).clamp_min(0)
    return torch.where(a > 0, mu, 1.0)


@cites(LI)
def momentum_law(loss: Number, noise: Number, lr: Number, curvature: Number) -> Tensor:
    r"""Best momentum for a bowl: critical damping, less where the noise floor would exceed the loss.

        μ* = min{max(0, 1 − 2√(aη)), max(0, 1 − ηΣ/(4m))},      1 where a ≤ 0

    Args:
        loss: m = E f above its minimum, without the noise of the mini-batch; any shape.
        noise: Σ, variance of a mini-batch gradient.
        lr: η.
        curvature: a.

    Returns:
        μ*, the shape of the arguments together.

    Reference: Li, Tai & E (2017), §4.2.

    Example:
        >>> momentum_law(0.1, noise=1.0, lr=0.1, curvature=0.01).item()      # critical damping would be 0.937
        0.75
    """
    m, s, eta, a = (_tensor(value) for value in (loss, noise, lr, curvature))
    quiet = (1 - eta * s / (4 * m).clamp_min(torch.finfo(m.dtype).tiny)).clamp_min(0)
    return torch.where(a > 0, torch.minimum(critical_momentum(a, eta), quiet), 1.0)


def stationary_loss(
    curvature: Number, noise: Number, lr: Number, *, momentum: Number = 0.0, exact: bool = True
) -> Tensor:
    r"""Noise floor: the mean loss at which SGD with momentum comes to rest in a bowl.

        ηΣ(1 + μ) / (2(1 − μ)(2(1 + μ) − ηa))   (steps)          ηΣ/(4(1 − μ))   (diffusion)

    Args:
        curvature: a > 0.
        noise: Σ, variance of a mini-batch gradient.
        lr: η; infinite loss from 2(1 + μ)/a on.
        momentum: μ.
        exact: of the step, or of the diffusion.

    Returns:
        E f at rest.

    Example:
        >>> round(stationary_loss(1.0, 1.0, 0.01, momentum=0.9, exact=False).item(), 6)
        0.025
    """
    a, s, eta, mu = (_tensor(value) for value in (curvature, noise, lr, momentum))
    if not exact:
        return eta * s / (4 * (1 - mu))
    room = 2 * (1 + mu) - eta * a
    return torch.where(room > 0, eta * s * (1 + mu) / (2 * (1 - mu) * room), math.inf)


@cites(LI)
@dataclass(frozen=True)
class ControlledQuadratic:
    r"""SGD in a bowl under the best learning rate of every moment: rate, loss, value, and the best constant.

        u = 1 until t* = log(4m₀/(ηΣ) − 1)/(2a), then u = 1/(1 + a(t − t*)) and m = ½ηΣ/(1 + a(t − t*))

    Time is t = kη. A start below ηΣ/2 anneals at once: u = 2m/(ηΣ), 1/m = 1/m₀ + 2at/(ηΣ).

    Args:
        curvature: a > 0.
        noise: Σ > 0, variance of a mini-batch gradient.
        lr: η > 0, the largest learning rate.
        initial_loss: m₀ > 0.

    Raises:
        ArgumentError: one of them is not positive.

    Reference: Li, Tai & E (2017), §4.1.

    Example:
        >>> bowl = ControlledQuadratic(curvature=1.0, noise=1.0, lr=0.2, initial_loss=1.0)
        >>> round(bowl.switch_time, 7), round(float(bowl.loss(5.0)), 7)
        (1.4722195, 0.0220859)
    """

    curvature: float
    noise: float
    lr: float
    initial_loss: float

    def __post_init__(self) -> None:
        for name in ("curvature", "noise", "lr", "initial_loss"):
            if not getattr(self, name) > 0:
                raise ArgumentError(f"{name}={getattr(self, name)} must be positive")

    @property
    def floor(self) -> float:
        """ηΣ/2, the loss at which annealing begins; twice the floor of the largest rate."""
        return self.lr * self.noise / 2

    @property
    def switch_time(self) -> float:
        """t*, the end of the largest rate; 0 for a start below the floor."""
        return float(self._until_switch(_tensor(self.initial_loss)))

    def _until_switch(self, m: Tensor) -> Tensor:
        ratio = (2 * m / self.floor - 1).clamp_min(1)
        return ratio.log() / (2 * self.curvature)

    def value(self, loss: Number, remaining: Number) -> Tensor:
        """V(m, T − t): the last loss, from the loss m with some time left; solves the Hamilton–Jacobi–Bellman equation.

        Differentiable in both.
        """
        m, left = _tensor(loss), _tensor(remaining)
        a, half = self.curvature, self.floor / 2
        switch = self._until_switch(m)
        descending = half + (m - half) * torch.exp(-2 * a * torch.minimum(left, switch))
        start = torch.minimum(m, _tensor(self.floor).to(m))
        annealing = start / (1 + a * start / self.floor * (left - switch).clamp_min(0))
        return torch.where(left < switch, descending, annealing)

    def loss(self, time: Number) -> Tensor:
        """m(t) under the best rate."""
        return self.value(self.initial_loss, time)

    def rate(self, time: Number) -> Tensor:
        """u(t), the best factor on η."""
        return (self.loss(time) / self.floor).clamp(max=1)

    def constant_loss(self, factor: Number, time: Number) -> Tensor:
        """m(t) under a constant factor u on η."""
        u, t = _tensor(factor), _tensor(time)
        rest = u * self.floor / 2
        return rest + (self.initial_loss - rest) * torch.exp(-2 * self.curvature * u * t)

    def best_constant(self, time: float) -> tuple[float, float]:
        """The constant factor u ∈ (0, 1] with the smallest loss at a time, and that loss."""
        from scipy.optimize import minimize_scalar

        found = minimize_scalar(
            lambda u: float(self.constant_loss(u, time)), bounds=(0, 1), options={"xatol": 1e-10}
        )
        return float(found.x), float(found.fun)

    def iterates(self, steps: int) -> tuple[Tensor, Tensor]:
        """Rates u_0 … u_{n−1} and losses m_0 … m_n of SGD itself, step by step, under the law of the step."""
        m, rates, losses = _tensor(self.initial_loss), [], [_tensor(self.initial_loss)]
        a, eta = self.curvature, self.lr
        for _ in range(steps):
            u = learning_rate_law(m, self.noise, eta, a)
            m = (1 - u * eta * a) ** 2 * m + a * (u * eta) ** 2 * self.noise / 2
            rates.append(u)
            losses.append(m)
        return torch.stack(rates) if rates else torch.empty(0, dtype=torch.float64), torch.stack(losses)
