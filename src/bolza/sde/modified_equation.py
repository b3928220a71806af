r"""Stochastic modified equations: the diffusion that a stochastic gradient method follows in law.

    θ_{k+1} = θ_k − η g_B(θ_k)
    order 1    dΘ = −∇f dt + (η C)^{1/2} dW                    t = kη
    order 2    dΘ = −∇(f + (η/4)|∇f|²) dt + (η C)^{1/2} dW
    C = Σ/B, times (N − B)/(N − 1) without replacement

The agreement is weak, of laws and not of paths, with an error of η or η² at a fixed time T = kη. At rest, as
T → ∞, both orders err by η² where the noise is additive, and the second is not the better one.

Reference: Li, Tai & E (2017), Theorem 1; Li, Tai & E (2019), Theorems 9 and 13; further methods in
:mod:`bolza.sde.augmented`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from bolza.core.diffusion import Diffusion
from bolza.core.errors import ArgumentError, ShapeError, UnsupportedError
from bolza.core.reference import Reference, cites
from bolza.ops.batches import Data, Loss
from bolza.sde import augmented
from bolza.sde.fields import Field, Network, Potential, PotentialNoise, field_of

__all__ = ["Method", "ModifiedEquation", "modified_equation"]

LI = Reference(
    key="li2017stochastic",
    authors="Li, Qianxiao and Tai, Cheng and E, Weinan",
    title="Stochastic Modified Equations and Adaptive Stochastic Gradient Algorithms",
    year=2017,
    venue="International Conference on Machine Learning",
    arxiv="1511.06251",
)
FOUNDATIONS = Reference(
    key="li2019stochastic",
    authors="Li, Qianxiao and Tai, Cheng and E, Weinan",
    title="Stochastic Modified Equations and Dynamics of Stochastic Gradient Algorithms I: Mathematical Foundations",
    year=2019,
    venue="Journal of Machine Learning Research",
    arxiv="1811.01558",
)
AN = Reference(
    key="an2018stochastic",
    authors="An, Jing and Lu, Jianfeng and Ying, Lexing",
    title="Stochastic Modified Equations for the Asynchronous Stochastic Gradient Descent",
    year=2018,
    arxiv="1805.08244",
)
MALLADI = Reference(
    key="malladi2022sdes",
    authors="Malladi, Sadhika and Lyu, Kaifeng and Panigrahi, Abhishek and Arora, Sanjeev",
    title="On the SDEs and Scaling Rules for Adaptive Gradient Algorithms",
    year=2022,
    venue="Advances in Neural Information Processing Systems",
    arxiv="2205.10287",
)

Method: TypeAlias = Literal["sgd", "momentum", "nesterov", "asynchronous", "rmsprop", "adam"]
_METHODS = ("sgd", "momentum", "nesterov", "asynchronous", "rmsprop", "adam")
_ORDER_2 = ("sgd", "momentum", "nesterov")


@dataclass(frozen=True)
class ModifiedEquation(Diffusion):
    """A diffusion that stands for a stochastic gradient method, with its unit of time. See `modified_equation`.

    Args:
        method: name of the method.
        order: weak order of the equation.
        time_step: time that one iteration of the method takes, in the time of the equation.
        parts: parts of a state: 1 for plain positions ``(..., d)``, else ``(..., parts, d)``.
        field: the objective: ``field.value``, ``field.gradient`` and so on at positions ``(..., d)``.
        start: flat parameters of the network at the time of the call; None for a potential.
        velocity: positions → velocity at the start, where it is not zero (stale gradients).
    """

    method: Method = "sgd"
    order: int = 1
    time_step: float = 1.0
    parts: int = 1
    field: Field | None = None
    start: Tensor | None = None
    velocity: Callable[[Tensor], Tensor] | None = None

    def initial(self, theta: Tensor | None = None, *, paths: int | None = None) -> Tensor:
        """State at time 0: the given positions, and the memory with which the method starts.

        Args:
            theta: positions ``(..., d)``; the parameters of the network by default.
            paths: give them this many times over, in a new first dimension.

        Returns:
            ``(..., d)``, or ``(..., parts, d)`` for a method with memory.

        Raises:
            ArgumentError: no positions for a potential.
        """
        theta = self.start if theta is None else theta
        if theta is None:
            raise ArgumentError(
                "theta is None, but the objective is a potential: give the positions to start at"
            )
        if paths is not None:
            theta = theta.expand(paths, *theta.shape).clone()
        if self.parts == 1:
            return theta
        memory = [torch.zeros_like(theta) for _ in range(self.parts - 1)]
        if self.velocity is not None:
            memory[0] = self.velocity(theta)
        return torch.stack([theta, *memory], -2)

    def position(self, state: Tensor) -> Tensor:
        """Positions θ ``(..., d)`` of states."""
        return state if self.parts == 1 else state[..., 0, :]

    def loss(self, state: Tensor) -> Tensor:
        """The objective f at the positions of states, shape ``(...)``."""
        assert self.field is not None
        return self.field.value(self.position(state))


@cites(LI, FOUNDATIONS, AN, MALLADI)
def modified_equation(
    objective: nn.Module | Callable[[Tensor], Tensor],
    loss: Loss | None = None,
    data: Data | None = None,
    *,
    lr: float,
    order: int = 1,
    batch_size: int = 1,
    replacement: bool = True,
    momentum: float | None = 0.0,
    method: Method = "sgd",
    noise: Literal["local", "frozen"] | PotentialNoise | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    bias_correction: bool = True,
    samples: int | None = None,
) -> ModifiedEquation:
    r"""The diffusion that a stochastic gradient method follows in law: drift, noise and unit of time.

        sgd           dΘ = −∇(f + [η/4 |∇f|²]) dt + (ηC)^{1/2} dW                                 t = kη
        momentum      dX = Y dt,  dY = −((1−μ)/η) Y dt − ∇f/η dt + (C/η)^{1/2} dW                  t = kη
        nesterov      the same; with ``momentum=None``, friction 3/(t + 2√η), in                   t = k√η
        asynchronous  dX = Y dt + η^{3/4}(1−μ)^{−1/4} C^{1/2} dW,  dY = −∇f dt − √((1−μ)/η) Y dt   t = k√(η(1−μ))
        rmsprop, adam states with a second moment that relaxes to ∇f² + diag C                    t = kη

    C is the covariance of the mini-batch gradient at the present position. Simulate with :func:`bolza.core.simulate`
    and a ``dt`` below ``time_step``. For sgd, with ``dt = time_step``, the Euler–Maruyama scheme is the method itself
    with Gaussian noise, which is closer to the method than the equation is. With a velocity it is another method, whose
    paths run away unless dt < (1 − μ)/λ_max: take ``scheme="heun"`` and ``dt = time_step / 4``.

    For a network a drift of order 1 costs one gradient of the whole of ``data`` for each path, order 2 a Hessian
    product more, and a draw of the noise one gradient: subsample ``data`` where it is large. rmsprop and adam need the
    variance of single gradients, ``paths · N · d`` numbers computed in pieces. Paths go through the network together; a
    network with an operation that torch cannot batch over parameters (nn.LSTM) goes path by path.

    Args:
        objective: a network, with ``loss`` and ``data``; or a potential x ``(..., d)`` → f ``(...)``.
        loss: ``loss(prediction, y)``, a mean over samples.
        data: one pair ``(x, y)``, or an iterable of batches that repeats.
        lr: learning rate η.
        order: weak order 1 or 2; 2 for sgd, momentum and nesterov with constant momentum.
        batch_size: B.
        replacement: whether a batch is drawn with replacement.
        momentum: μ of momentum and nesterov (None: its schedule (k−1)/(k+2)); with ``"asynchronous"`` the delay is
            geometric, P(τ = j) = (1 − μ)μʲ. Plain ``"sgd"`` with a momentum above 0 is ``"momentum"``.
        method: which method.
        noise: for a network ``"local"`` (Σ at each position; the default) or ``"frozen"`` (Σ at the present
            parameters). For a potential the covariance Σ of a single sample: a variance, a diagonal ``(d,)``, a matrix
            ``(d, d)``, or (x, ξ) → Σ(x)^{1/2} ξ; no noise by default.
        betas: of adam; rmsprop takes the second.
        eps: of rmsprop and adam.
        bias_correction: of adam.
        samples: N behind a potential, needed without replacement.

    Returns:
        ModifiedEquation, a `bolza.core.Diffusion`; ``initial`` makes its states, ``position`` reads them.

    Raises:
        ArgumentError: a number out of range, or an argument that does not belong to the objective.
        UnsupportedError: order 2 of a method that has none here.

    Reference: Li, Tai & E (2017), Theorem 1; (2019), Theorems 9, 13 (order 2 of momentum, here in t = kη); An, Lu &
    Ying (2018), §2; Malladi et al. (2022) for rmsprop and adam. Departures: order 2 of nesterov is ours (the Hessian
    term changes its weight from ½ to ½ − μ); in order 2 of both the noise enters wherever the gradient does, in the
    position too, which the order does not need, but the spread does; the second moment of rmsprop and adam
    counts its own mean only, so that their spread comes out too wide where ∇f² is not small against diag C.

    Example:
        >>> from bolza.core import simulate
        >>> bowl = lambda x: 0.5 * x.square().sum(-1)
        >>> sde = modified_equation(bowl, lr=0.1, order=2, batch_size=4, noise=1.0)
        >>> sde.drift(0.0, torch.ones(2))                       # −(1 + η/2) x
        tensor([-1.0500, -1.0500])
        >>> x = simulate(sde, torch.ones(1000, 2), dt=sde.time_step / 4, steps=160)[-1]
        >>> bool(abs(x.var() - 0.1 / 4 / 2.1) < 0.001)          # η/(2B (1 + η/2))
        True
        >>> ball = modified_equation(bowl, lr=0.1, momentum=0.9)
        >>> ball.initial(torch.ones(3, 2)).shape
        torch.Size([3, 2, 2])
    """
    _check(lr, order, batch_size, momentum, method, betas, eps)
    if method == "sgd" and momentum is not None and momentum > 0:
        method = "momentum"
    if order == 2 and (method not in _ORDER_2 or (method == "nesterov" and momentum is None)):
        raise UnsupportedError(
            f"order is 2, but for method {method!r} with momentum {momentum} only order 1 is known: take order=1"
        )
    field = field_of(objective, loss, data, noise, samples)
    terms = _terms(
        field,
        lr,
        order,
        _scale(field.samples, batch_size, replacement),
        momentum,
        method,
        betas,
        eps,
        bias_correction,
    )
    return ModifiedEquation(
        drift=terms.drift,
        factor=terms.factor,
        noise_shape=lambda z: field.noise_shape(_position(z, terms.parts)),
        diagonal=terms.parts == 1 and isinstance(field, Potential) and field.elementwise,
        method=method,
        order=order,
        time_step=terms.time_step,
        parts=terms.parts,
        field=field,
        start=field.start if isinstance(field, Network) else None,
        velocity=terms.velocity,
    )


def _position(z: Tensor, parts: int) -> Tensor:
    if parts == 1:
        return z
    if z.ndim < 2 or z.shape[-2] != parts:
        raise ShapeError(
            f"states have shape {tuple(z.shape)}: this method needs (..., {parts}, d), which `initial` makes"
        )
    return z[..., 0, :]


def _check(
    lr: float,
    order: int,
    batch_size: int,
    momentum: float | None,
    method: str,
    betas: tuple[float, float],
    eps: float,
) -> None:
    if not 0 < lr < float("inf"):
        raise ArgumentError(f"lr is {lr}: it must be positive and finite")
    if order not in (1, 2):
        raise ArgumentError(f"order is {order}: choose 1 or 2")
    if batch_size < 1:
        raise ArgumentError(f"batch_size is {batch_size}: it must be at least 1")
    if method not in _METHODS:
        raise ArgumentError(f"method is {method!r}: choose from {', '.join(_METHODS)}")
    if momentum is None and method != "nesterov":
        raise ArgumentError(f"momentum is None: only 'nesterov' has a schedule of its own, not {method!r}")
    if momentum is not None and not 0 <= momentum < 1:
        raise ArgumentError(f"momentum is {momentum}: it must be at least 0 and below 1")
    if momentum and method in ("rmsprop", "adam"):
        raise ArgumentError(f"momentum is {momentum}: {method!r} takes betas instead")
    if not all(0 <= beta < 1 for beta in betas) or not eps >= 0:
        raise ArgumentError(f"betas are {betas} and eps is {eps}: 0 ≤ β < 1 and ε ≥ 0")


def _scale(samples: int | None, batch_size: int, replacement: bool) -> float:
    """Factor from Σ to C."""
    if replacement:
        return 1 / batch_size
    if samples is None:
        raise ArgumentError("replacement is False, but the number of samples is unknown: give samples=")
    if batch_size > samples:
        raise ArgumentError(f"batch_size is {batch_size}: without replacement at most the {samples} samples")
    return (samples - batch_size) / (batch_size * (samples - 1)) if samples > 1 else 0.0


def _terms(
    field: Field,
    lr: float,
    order: int,
    scale: float,
    momentum: float | None,
    method: Method,
    betas: tuple[float, float],
    eps: float,
    correct: bool,
) -> augmented.Terms:
    if method == "sgd":
        return augmented.sgd(field, lr, scale, order)
    if method == "nesterov":
        return augmented.nesterov(field, lr, scale, momentum, order)
    if method == "rmsprop":
        return augmented.adaptive(field, lr, scale, None, betas[1], eps, False)
    if method == "adam":
        return augmented.adaptive(field, lr, scale, betas[0], betas[1], eps, correct)
    mu = momentum or 0.0
    if method == "momentum":
        return augmented.momentum(field, lr, scale, mu, order)
    return augmented.asynchronous(field, lr, scale, mu)
