r"""Accelerated methods as differential equations: a family of flows, one curve at many speeds.

    X″ + ((p+1)/t) X′ + C p² t^{p−2} ∇f(X) = 0        p = 2, C = ¼: X″ + (3/t) X′ + ∇f = 0, Nesterov's method
    Z = X + (t/p) X′:   X′ = (p/t)(Z − X),   Z′ = −C p t^{p−1} ∇f(X)
    E(t) = ½|Z − x*|² + C t^p (f(X) − f*) never rises for convex f, so that f − f* ≤ |x₀ − x*|² / (2 C t^p)

In u = t^{p/2} the equation is the same for every p: a larger p runs along the same curve faster. What limits a method
is therefore its discretisation: the direct one is unstable for p ≥ 3, and one that matches the rate k^{−p} takes a step
of a method of order p − 1 (gradient descent for 2, cubic-regularised Newton for 3) in each iteration.

Time is t = k √s for Nesterov's method with step s, and t = k ε^{1/p} for the others.

Reference: Su, Boyd & Candès (2014), eq. 3 and Theorem 3; Wibisono, Wilson & Jordan (2016), eq. 8–14 and Theorem 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError, DivergenceError, UnsupportedError
from bolza.core.reference import Reference, cites
from bolza.ops.batches import Data, Loss
from bolza.sde.fields import Network, Potential, field_of

__all__ = [
    "AcceleratedPath",
    "accelerated_descent",
    "accelerated_flow",
    "accelerated_quadratic",
    "nesterov_descent",
]

SU = Reference(
    key="su2014differential",
    authors="Su, Weijie and Boyd, Stephen and Candès, Emmanuel J.",
    title="A Differential Equation for Modeling Nesterov's Accelerated Gradient Method: Theory and Insights",
    year=2014,
    venue="Advances in Neural Information Processing Systems",
    arxiv="1503.01243",
)
WIBISONO = Reference(
    key="wibisono2016variational",
    authors="Wibisono, Andre and Wilson, Ashia C. and Jordan, Michael I.",
    title="A Variational Perspective on Accelerated Methods in Optimization",
    year=2016,
    venue="Proceedings of the National Academy of Sciences",
    arxiv="1603.04245",
)

_NEWTON = 512  # coordinates up to which a Hessian is formed


@dataclass(frozen=True)
class AcceleratedPath:
    """A course of an accelerated flow or method, with its certificate.

    Args:
        times: time t, ``(n,)``; of a method the iteration k.
        positions: X, ``(n, ..., d)``.
        anchors: Z = X + (t/p) X′, ``(n, ..., d)``.
        values: f(X), ``(n, ...)``.
        weights: C t^p, or what takes its place in a method, ``(n,)``.
    """

    times: Tensor
    positions: Tensor
    anchors: Tensor
    values: Tensor
    weights: Tensor

    def _weights(self) -> Tensor:
        return self.weights.reshape(-1, *[1] * (self.values.ndim - 1)).to(self.values)

    def energy(self, minimiser: Tensor, minimum: float | Tensor = 0.0) -> Tensor:
        """½|Z − x*|² + w (f − f*), ``(n, ...)``: it does not rise where f is convex.

        Args:
            minimiser: x* ``(..., d)``.
            minimum: f*.
        """
        apart = 0.5 * (self.anchors - minimiser).square().sum(-1)
        return apart + self._weights() * (self.values - minimum)

    def bound(self, minimiser: Tensor) -> Tensor:
        """|x₀ − x*|² / (2w), ``(n, ...)``: above f − f* at every time where f is convex; infinite at w = 0.

        Args:
            minimiser: x* ``(..., d)``.
        """
        return 0.5 * (self.positions[0] - minimiser).square().sum(-1) / self._weights()

    def rise(self, minimiser: Tensor, minimum: float | Tensor = 0.0) -> float:
        """Largest increase of the energy from one time to the next: 0 or less certifies the bound.

        Args:
            minimiser: x* ``(..., d)``.
            minimum: f*.
        """
        return float(self.energy(minimiser, minimum).diff(dim=0).max())


@cites(SU, WIBISONO)
def accelerated_quadratic(
    t: float | Sequence[float] | Tensor, curvature: float, *, p: float = 2, C: float | None = None
) -> Tensor:
    r"""The accelerated flow on ½ λ x² from x₀ = 1 in closed form: X(t) = 2 J₁(z)/z, z = 2 √(Cλ) t^{p/2}.

    Args:
        t: times, at least 0.
        curvature: λ > 0.
        p: order of the flow.
        C: its constant; 1/p² by default, so that p = 2 is Nesterov's equation.

    Returns:
        X(t), float64, of the shape of t.

    Raises:
        ArgumentError: p, C or λ is not positive.

    Reference: Su, Boyd & Candès (2014), §3.2 (p = 2); for other p by their common curve.

    Example:
        >>> [round(x, 7) for x in accelerated_quadratic([1.0, 2.0, 5.0], 4.0).tolist()]
        [0.5767248, -0.0330217, 0.0086945]
    """
    from scipy.special import j1

    C = _constant(p, C)
    if not curvature > 0:
        raise ArgumentError(f"curvature is {curvature}: it must be positive")
    times = torch.as_tensor(t, dtype=torch.float64)
    z = 2 * math.sqrt(C * curvature) * times.numpy() ** (p / 2)
    small = np.abs(z) < 1e-4  # 2 J₁(z)/z = 1 − z²/8 + …
    safe = np.where(small, 1.0, z)
    return torch.as_tensor(np.where(small, 1 - z**2 / 8, 2 * j1(safe) / safe))


def _constant(p: float, C: float | None) -> float:
    if not p > 0:
        raise ArgumentError(f"p is {p}: the order must be positive")
    C = 1 / p**2 if C is None else C
    if not C > 0:
        raise ArgumentError(f"C is {C}: it must be positive")
    return C


def _start(field: Network | Potential, x0: Tensor | None) -> Tensor:
    if x0 is not None:
        return x0.detach()
    if isinstance(field, Potential):
        raise ArgumentError("x0 is None, but the objective is a potential: give the point to start at")
    return field.start


@cites(SU, WIBISONO)
def accelerated_flow(
    objective: nn.Module | Callable[[Tensor], Tensor],
    x0: Tensor | None = None,
    *,
    times: Sequence[float] | Tensor,
    p: float = 2,
    C: float | None = None,
    loss: Loss | None = None,
    data: Data | None = None,
    rtol: float | None = None,
) -> AcceleratedPath:
    r"""The flow behind accelerated methods, from rest: X″ + ((p+1)/t) X′ + C p² t^{p−2} ∇f(X) = 0.

    Solved in u = t^{p/2}, where it has one form for every p and no large coefficient, by an explicit Runge–Kutta method
    of order 8 with adaptive steps, in float64.

    Args:
        objective: a network, with ``loss`` and ``data``; or a potential x ``(..., d)`` → f ``(...)``.
        x0: start ``(..., d)``; the parameters of the network by default.
        times: where the course is wanted, rising, from 0 on.
        p: order of the flow.
        C: its constant; 1/p² by default, so that p = 2 is Nesterov's equation.
        loss: ``loss(prediction, y)``, a mean over samples.
        data: one pair ``(x, y)``, or an iterable of batches that repeats.
        rtol: relative tolerance; 1e-8 in float64, 1e-5 in float32.

    Returns:
        AcceleratedPath with the dtype and device of x0.

    Raises:
        ArgumentError: times that do not rise, or p or C not positive.
        DivergenceError: the objective is not finite along the way.

    Reference: Su, Boyd & Candès (2014), eq. 3; Wibisono, Wilson & Jordan (2016), eq. 8.

    Example:
        >>> x0 = torch.ones(1, dtype=torch.float64)
        >>> path = accelerated_flow(lambda x: 2 * x.square().sum(-1), x0, times=[0.0, 1.0, 2.0, 5.0])
        >>> [round(x, 7) for x in path.positions[:, 0].tolist()]
        [1.0, 0.5767248, -0.0330217, 0.0086945]
        >>> path.rise(torch.zeros(1)) <= 0
        True
    """
    from scipy.integrate import solve_ivp

    C = _constant(p, C)
    field = field_of(objective, loss, data)
    start = _start(field, x0)
    when = torch.as_tensor(times, dtype=torch.float64)
    rising = when.ndim == 1 and len(when) > 0 and bool(when[0] >= 0) and bool((when.diff() > 0).all())
    if not rising or not bool(when[-1].isfinite()):
        raise ArgumentError(f"times is {times}: give rising times from 0 on, all finite")
    if rtol is None:
        rtol = 1e-8 if start.dtype == torch.float64 else 1e-5
    n = start.numel()

    def tensor(flat: np.ndarray) -> Tensor:
        return torch.as_tensor(flat).to(start).reshape(start.shape)

    def velocity(u: float, y: np.ndarray) -> np.ndarray:
        x, z = y[:n], y[n:]
        slope = field.gradient(tensor(x)).reshape(-1).double().cpu().numpy()
        if not np.isfinite(slope).all():
            raise DivergenceError(f"the gradient is not finite at t = {u ** (2 / p):.6g}")
        # at u = 0 both sides of X′ vanish: Z − X is of order u²
        return np.concatenate([2 / u * (z - x) if u > 0 else np.zeros(n), -2 * C * u * slope])

    first = start.reshape(-1).double().cpu().numpy()
    marks = when.numpy() ** (p / 2)
    y0 = np.concatenate([first, first])
    if marks[-1] > 0:
        found = solve_ivp(
            velocity, (0.0, float(marks[-1])), y0, "DOP853", t_eval=marks, rtol=rtol, atol=rtol * 1e-2
        )
        if not found.success:
            raise DivergenceError(f"the flow could not be followed to t = {float(when[-1])}: {found.message}")
        course = found.y.T
    else:
        course = y0[None]
    positions = torch.stack([tensor(row[:n]) for row in course])
    anchors = torch.stack([tensor(row[n:]) for row in course])
    with torch.no_grad():
        values = field.value(positions)
    return AcceleratedPath(when.to(start), positions, anchors, values, (C * when**p).to(start))


@cites(SU)
def nesterov_descent(
    objective: nn.Module | Callable[[Tensor], Tensor],
    x0: Tensor | None = None,
    *,
    lr: float,
    steps: int,
    loss: Loss | None = None,
    data: Data | None = None,
) -> AcceleratedPath:
    r"""Nesterov's method with momentum (k − 1)/(k + 2): the accelerated flow with p = 2 at t = k √s.

        x_k = y_{k−1} − s ∇f(y_{k−1}),   y_k = x_k + (k−1)/(k+2) (x_k − x_{k−1})

    The certificate holds for convex f with a Lipschitz constant L of ∇f and s ≤ 1/L:
    f(x_k) − f* ≤ 2|x₀ − x*|² / (s (k+1)²).

    Args:
        objective: a network, with ``loss`` and ``data``; or a potential x ``(..., d)`` → f ``(...)``.
        x0: start ``(..., d)``; the parameters of the network by default.
        lr: s.
        steps: iterations.
        loss: ``loss(prediction, y)``, a mean over samples.
        data: one pair ``(x, y)``, or an iterable of batches that repeats.

    Returns:
        AcceleratedPath of ``steps + 1`` points x_k.

    Raises:
        ArgumentError: lr or steps is not positive.
        DivergenceError: an iterate is not finite.

    Reference: Su, Boyd & Candès (2014), eq. 1 and Theorem 6.

    Example:
        >>> path = nesterov_descent(lambda x: x.square().sum(-1), torch.ones(1).double(), lr=1e-4, steps=500)
        >>> round(path.positions[-1].item(), 6)           # the flow at t = 5 is 0.004689
        0.005038
    """
    _positive(lr, steps)
    field = field_of(objective, loss, data)
    x = y = _start(field, x0)
    xs, zs = [x], [x]
    for k in range(1, steps + 1):
        new = y - lr * field.gradient(y)
        y = new + (k - 1) / (k + 2) * (new - x)
        x = new
        xs.append(x)
        zs.append(((k + 2) * y - k * x) / 2)
    ks = torch.arange(steps + 1, dtype=x.dtype, device=x.device)
    return _path(field, ks, xs, zs, lr * (ks + 1).square() / 4)


@cites(WIBISONO)
def accelerated_descent(
    objective: nn.Module | Callable[[Tensor], Tensor],
    x0: Tensor | None = None,
    *,
    lr: float,
    steps: int,
    p: int = 2,
    N: float = 2.0,
    loss: Loss | None = None,
    data: Data | None = None,
) -> AcceleratedPath:
    r"""A method that keeps the rate k^{−p} of the accelerated flow, with a step of order p − 1 inside.

        x_{k+1} = (p z_k + k y_k)/(k + p)
        y_{k+1} = argmin_y [Taylor polynomial of f at x_{k+1} of degree p − 1 + N/(εp) |y − x_{k+1}|^p]
        z_{k+1} = z_k − C p (k+1)⋯(k+p−1) ε ∇f(y_{k+1})

    p = 2: the inner step is gradient descent; p = 3: Newton with a cubic term, for at most 512 coordinates. For convex
    f whose derivative of order p − 1 has the Lipschitz constant (p−1)!/ε the energy does not rise, and
    f(y_k) − f* ≤ |x₀ − x*|² / (2 C ε k(k+1)⋯(k+p−1)).

    Args:
        objective: a network, with ``loss`` and ``data``; or a potential x ``(..., d)`` → f ``(...)``.
        x0: start ``(..., d)``; the parameters of the network by default.
        lr: ε; t = k ε^{1/p}.
        steps: iterations.
        p: 2 or 3.
        N: weight of the inner power, above 1; C = M^{p−1}/p^p with M = (N² − 1)^{(p−2)/(2p−2)}/(2N).
        loss: ``loss(prediction, y)``, a mean over samples.
        data: one pair ``(x, y)``, or an iterable of batches that repeats.

    Returns:
        AcceleratedPath of ``steps + 1`` points y_k.

    Raises:
        ArgumentError: a number out of range.
        UnsupportedError: p is not 2 or 3, or too many coordinates for a Hessian.
        DivergenceError: an iterate is not finite.

    Reference: Wibisono, Wilson & Jordan (2016), eq. 12–14, Lemma 2.

    Example:
        >>> quartic = lambda x: x.pow(4).sum(-1) / 4
        >>> path = accelerated_descent(quartic, torch.ones(2).double(), lr=0.3, steps=50, p=3)
        >>> path.rise(torch.zeros(2)) <= 0, bool((path.values[1:] <= path.bound(torch.zeros(2))[1:]).all())
        (True, True)
    """
    _positive(lr, steps)
    if p not in (2, 3):
        raise UnsupportedError(f"p is {p}: the inner step needs derivatives of order p − 1; choose 2 or 3")
    if not N > 1:
        raise ArgumentError(f"N is {N}: it must be above 1")
    M = (N**2 - 1) ** ((p - 2) / (2 * p - 2)) / (2 * N)
    C = M ** (p - 1) / p**p
    field = field_of(objective, loss, data)
    y = z = _start(field, x0)
    if p == 3 and y.shape[-1] > _NEWTON:
        raise UnsupportedError(
            f"p is 3 and there are {y.shape[-1]} coordinates: it forms the Hessian, for at most {_NEWTON}; take p=2"
        )
    ys, zs = [y], [z]
    for k in range(steps):
        x = (p * z + k * y) / (k + p)
        y = x - lr / N * field.gradient(x) if p == 2 else x + _cubic_newton(field, x, N / lr)
        rising = (k + 1) * (k + 2 if p == 3 else 1)
        z = z - C * p * rising * lr * field.gradient(y)
        ys.append(y)
        zs.append(z)
    ks = torch.arange(steps + 1, dtype=y.dtype, device=y.device)
    weights = C * lr * ks * (ks + 1) * (ks + 2 if p == 3 else 1)
    return _path(field, ks, ys, zs, weights)


def _positive(lr: float, steps: int) -> None:
    if not (lr > 0 and steps > 0):
        raise ArgumentError(f"lr is {lr} and steps is {steps}: both must be positive")


def _path(
    field: Network | Potential, k: Tensor, positions: list[Tensor], anchors: list[Tensor], weights: Tensor
) -> AcceleratedPath:
    points = torch.stack(positions)
    finite = points.isfinite().reshape(len(points), -1).all(1)
    if not bool(finite.all()):
        step = int((~finite).nonzero()[0])
        raise DivergenceError(f"the iterate is not finite at step {step}: take a smaller lr", step=step)
    with torch.no_grad():
        values = field.value(points)
    return AcceleratedPath(k, points, torch.stack(anchors), values, weights)


def _cubic_newton(field: Network | Potential, x: Tensor, weight: float) -> Tensor:
    r"""Argmin_d [g·d + ½ dᵀHd + (weight/3)|d|³]: d = −(H + λ)⁻¹ g with λ = weight |d|."""
    d = x.shape[-1]
    axes = torch.eye(d, dtype=x.dtype, device=x.device).reshape(d, *[1] * (x.ndim - 1), d)
    copies = x.expand(d, *x.shape)
    g, rows = field.products(copies, axes.expand_as(copies))
    values, vectors = torch.linalg.eigh(rows.movedim(0, -1))
    along = (vectors.mT @ g[0][..., None])[..., 0]
    tiny = torch.finfo(x.dtype).tiny
    low = (-values[..., 0]).clamp_min(0)
    # λ − weight |d(λ)| rises and is concave: Newton's steps end left of the root; one that leaves the bracket is halved
    high = low + (weight * along.norm(dim=-1)).sqrt() + tiny
    shift = high
    for _ in range(40):
        below = (values + shift[..., None]).clamp_min(tiny)
        length = (along / below).norm(dim=-1).clamp_min(tiny)
        gap = shift - weight * length
        if bool((gap.abs() <= 4 * torch.finfo(x.dtype).eps * shift).all()):
            break
        high, low = torch.where(gap > 0, shift, high), torch.where(gap > 0, low, shift)
        bend = 1 + weight * (along.square() / below.pow(3)).sum(-1) / length
        newton = shift - gap / bend
        inside = (newton > low) & (newton <= high)
        shift = torch.where(inside, newton, torch.where(gap == 0, shift, (low + high) / 2))
    step = along / (values + shift[..., None]).clamp_min(tiny)
    return -(vectors @ step[..., None])[..., 0]
