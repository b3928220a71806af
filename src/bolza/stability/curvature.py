r"""Curvature of the loss from the growth of a nearby twin trajectory, at one extra gradient a step.

    v ← v ∓ η H v,   log-growth per unit of time η:   descent → log(1 − η λ_min)/η,   ascent → log(1 + η λ_max)/η

Gradient descent separates neighbours as fast as the loss curves downwards; run backwards, it shows the sharpness
λ_max. The twin may be a finite difference of two gradients, so that nothing but gradients is ever computed. λ_max
in turn sets the learning rate: η = c/λ_max with 0 < c < 2 is stable.

Reference: Sasdelli, Ajanthan, Chin & Carneiro (2021), *A Chaos Theory Approach to Understand Neural Network
    Optimization*.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError, DivergenceError, ShapeError
from bolza.core.reference import Reference, cites
from bolza.ops.operators import LinearOperator

_SETTLE = 30  # twin steps in the first call

__all__ = ["CurvatureExponent", "TwinCurvature", "curvature_exponent", "twin_operator"]

SASDELLI = Reference(
    "sasdelli2021chaos",
    "Sasdelli, Michele and Ajanthan, Thalaiyasingam and Chin, Tat-Jun and Carneiro, Gustavo",
    "A Chaos Theory Approach to Understand Neural Network Optimization",
    2021,
    venue="Digital Image Computing: Techniques and Applications (DICTA)",
)


@dataclass(frozen=True)
class CurvatureExponent:
    """A Lyapunov exponent of gradient dynamics at fixed weights, and the curvature behind it.

    Attributes:
        exponent: log-growth per unit of time (step × lr), over the last half of the steps.
        curvature: the eigenvalue that gives this exponent: λ_max by ascent, λ_min by descent.
        residual: ‖Hv − ρv‖ at the last twin direction v, ρ = vᵀHv: some eigenvalue lies this close to ρ.
        rayleigh: ρ.
        products: gradients (or Hessian products) that it took.
    """

    exponent: float
    curvature: float
    residual: float
    rayleigh: float
    products: int


@cites(SASDELLI)
def curvature_exponent(
    hessian: LinearOperator,
    *,
    lr: float,
    steps: int,
    direction: Literal["ascent", "descent"] = "ascent",
    seed: int = 0,
) -> CurvatureExponent:
    r"""Largest exponent of gradient descent, or of ascent, at fixed weights: v ← v ∓ lr·H v.

    Args:
        hessian: H, from :func:`bolza.ops.curvature.hessian_operator` (exact), or :func:`twin_operator` (gradients
            only).
        lr: η, the step of the dynamics.
        steps: twin steps; the first half lets the direction settle and does not count.
        direction: ``"ascent"`` for the largest eigenvalue, ``"descent"`` for the smallest.
        seed: of the first direction.

    Returns:
        CurvatureExponent. Convergence is e^{−gap·lr·steps} with the gap to the next eigenvalue: ``residual`` shows
        how far it got.

    Raises:
        ArgumentError: ``lr`` or ``steps`` not positive, or an unknown direction.
        DivergenceError: the twin is not finite.

    Reference: Sasdelli et al. (2021). Departure: the exponent is inverted exactly, λ = (e^{ηΛ} − 1)/η, instead of
        λ ≈ Λ.

    Example:
        >>> hessian = LinearOperator.from_matrix(torch.diag(torch.tensor([5.0, 1.0, -0.5], dtype=torch.float64)))
        >>> round(curvature_exponent(hessian, lr=0.1, steps=200).curvature, 6)
        5.0
        >>> round(curvature_exponent(hessian, lr=0.1, steps=800, direction="descent").curvature, 6)
        -0.5
    """
    if not lr > 0 or steps < 2 or direction not in ("ascent", "descent"):
        raise ArgumentError(
            f"lr is {lr}, steps {steps} and direction {direction!r}: a positive lr, two steps or more, and 'ascent' or "
            "'descent' are needed"
        )
    sign = 1.0 if direction == "ascent" else -1.0
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(hessian.size, generator=generator, dtype=torch.float64).to(hessian.device, hessian.dtype)
    v = v / v.norm()
    total, counted = 0.0, 0
    rayleigh = residual = math.nan
    for t in range(steps):
        hv = hessian @ v
        if t == steps - 1:
            rayleigh = float(v @ hv)
            residual = float((hv - rayleigh * v).norm())
        v = v + sign * lr * hv
        growth = float(v.norm())
        if not (math.isfinite(growth) and growth > 0):
            raise DivergenceError(f"the twin has the length {growth} at step {t}: check the loss", step=t)
        v = v / growth
        if t >= steps // 2:
            total, counted = total + math.log(growth), counted + 1
    exponent = total / (counted * lr)
    return CurvatureExponent(
        exponent, sign * math.expm1(lr * exponent) / lr, residual, rayleigh, products=steps
    )


@cites(SASDELLI)
def twin_operator(
    gradient: Callable[[Tensor], Tensor], theta: Tensor, epsilon: float | None = None
) -> LinearOperator:
    r"""Hessian from a twin: H v ≈ (∇f(θ + ε v) − ∇f(θ))/ε, one gradient a product.

    Args:
        gradient: θ ↦ ∇f(θ) on flat vectors.
        theta: where, flat.
        epsilon: distance of the twin for a unit vector v; by default the square root of the rounding unit times 1
            + ‖θ‖.

    Returns:
        LinearOperator; its error is of the order ε.

    Reference: Sasdelli et al. (2021).

    Example:
        >>> hessian = twin_operator(lambda w: w**3, torch.ones(2, dtype=torch.float64))
        >>> (hessian @ torch.tensor([1.0, 0.0])).round(decimals=4)
        tensor([3., 0.], dtype=torch.float64)
    """
    theta = theta.detach()
    if epsilon is None:
        epsilon = math.sqrt(torch.finfo(theta.dtype).eps) * (1 + float(theta.norm()))
    base = gradient(theta).detach()

    def product(v: Tensor) -> Tensor:
        return (gradient(theta + epsilon * v).detach() - base) / epsilon

    return LinearOperator(product, theta.numel(), theta.dtype, theta.device)


@cites(SASDELLI)
class TwinCurvature:
    r"""Sharpness λ_max followed along a training run, at one extra gradient a step.

        v ← v + s (∇f(θ + ε v) − ∇f(θ))/ε,   λ̂ = (‖v‖ − 1)/s,   v ← v/‖v‖,   s = 10/λ̂

    The twin direction is kept from step to step, while θ moves: it follows the top eigenvector. Only gradients are
    computed, and parameters are restored bit for bit.

    Args:
        params: the parameters that are trained.
        epsilon: distance of the twin; by default the square root of the rounding unit times 1 + ‖θ‖.
        seed: of the first direction.

    Attributes:
        sharpness: the estimate λ̂ of the last call of :meth:`update`; nan before.

    Raises:
        ArgumentError: there is no parameter to train.

    Reference: Sasdelli et al. (2021). Departure: the step s of the twin is its own, larger than the learning rate, so
    that the direction settles in a few steps.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
        >>> loss = lambda: 2 * w[0] ** 2 + w[1] ** 2 / 2
        >>> twin, opt = TwinCurvature([w]), torch.optim.SGD([w], lr=0.0)
        >>> for _ in range(30):
        ...     opt.zero_grad()
        ...     loss().backward()
        ...     _ = twin.update(loss, [w.grad])
        ...     opt.param_groups[0]["lr"] = twin.rate(1.0)
        ...     opt.step()
        >>> round(twin.sharpness, 4)
        4.0
    """

    def __init__(self, params: Iterable[Tensor], epsilon: float | None = None, seed: int = 0) -> None:
        self.params = [p for p in params if p.requires_grad]
        if not self.params:
            raise ArgumentError(
                "params has no tensor that requires a gradient: give the parameters that are trained"
            )
        generator = torch.Generator().manual_seed(seed)
        self._v = [
            torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device, p.dtype)
            for p in self.params
        ]
        _scale(self._v, 1 / _length(self._v))
        self._epsilon = epsilon
        self.sharpness = math.nan

    def update(self, closure: Callable[[], Tensor], gradient: Iterable[Tensor | None] | None = None) -> float:
        """Move the twin at the present parameters; the first call moves it until its growth settles.

        Args:
            closure: returns the loss at the present parameters, on the same batch at both evaluations.
            gradient: the gradient at the present parameters, in the order of ``params``, which saves one of two
                passes: ``[p.grad for p in params]`` right after ``backward``. It must not be an older one.

        Returns:
            The sharpness.

        Raises:
            DivergenceError: a gradient is not finite.
            ShapeError: ``gradient`` does not have the shapes of the parameters.
        """
        given = list(self._gradient(closure)) if gradient is None else list(gradient)
        gradients = [
            torch.zeros_like(p) if g is None else g.detach()
            for p, g in zip(self.params, [*given, *[None] * (len(self.params) - len(given))], strict=False)
        ]
        if [g.shape for g in gradients] != [p.shape for p in self.params] or len(given) != len(self.params):
            raise ShapeError(
                f"gradient has {len(given)} tensors for {len(self.params)} parameters: give one of the same shape each"
            )
        if math.isfinite(self.sharpness):
            return self._move(gradients, closure)
        for _ in range(_SETTLE):  # a first direction at random would promise far too large a rate
            last = self.sharpness
            if abs(self._move(gradients, closure) - last) <= 1e-2 * abs(last):
                break
        return self.sharpness

    def _move(self, here: list[Tensor], closure: Callable[[], Tensor]) -> float:
        epsilon = self._epsilon
        if epsilon is None:
            eps = torch.finfo(self.params[0].dtype).eps
            epsilon = math.sqrt(eps) * (1 + _length([p.detach() for p in self.params]))
        kept = [p.detach().clone() for p in self.params]
        try:
            with torch.no_grad():
                for p, v in zip(self.params, self._v, strict=True):
                    p.add_(v, alpha=epsilon)
            there = self._gradient(closure)
        finally:
            with torch.no_grad():
                for p, value in zip(self.params, kept, strict=True):
                    p.copy_(value)
        hv = [(b - a) / epsilon for a, b in zip(here, there, strict=True)]
        size = _length(hv)
        if not math.isfinite(size):
            raise DivergenceError(
                "the gradient beside the trajectory is not finite: the run has left every bound"
            )
        s = 10 / max(self.sharpness if self.sharpness > 0 else size, 1e-12)
        moved = [v + s * h for v, h in zip(self._v, hv, strict=True)]
        growth = _length(moved)
        self.sharpness = (growth - 1) / s
        if growth > 0:
            self._v = moved
            _scale(self._v, 1 / growth)
        return self.sharpness

    def rate(self, c: float = 1.9) -> float:
        """Learning rate c/λ̂; stable for gradient descent if 0 < c < 2.

        Raises:
            ArgumentError: c outside (0, 2), or no curvature found yet.
        """
        if not 0 < c < 2:
            raise ArgumentError(f"c is {c}: gradient descent is stable for 0 < c < 2")
        if not self.sharpness > 0:
            raise ArgumentError(
                f"the sharpness is {self.sharpness}: call update first, where the loss curves upwards"
            )
        return c / self.sharpness

    def _gradient(self, closure: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return torch.autograd.grad(closure(), self.params, materialize_grads=True, allow_unused=True)


def _length(parts: list[Tensor]) -> float:
    return math.sqrt(sum(float(part.double().square().sum()) for part in parts))


def _scale(parts: list[Tensor], by: float) -> None:
    for part in parts:
        part.mul_(by)
