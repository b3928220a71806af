r"""Means and covariances of linear equations and linear recursions, exactly, at any time; weak errors without chance.

    dz = (L z + b) dt + G dW       mean and covariance at t by one matrix exponential and doublings
    z_{k+1} = M z_k + ξ_k          after k steps by squarings

For a quadratic objective with additive noise both a stochastic gradient method and its modified equation are linear, so
that the difference of their laws is known to rounding: an order of convergence takes no Monte Carlo.

Reference: Van Loan (1978), *Computing integrals involving the matrix exponential*; Li, Tai & E (2017), §3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bolza.core.diffusion import Diffusion
from bolza.core.errors import ArgumentError, ShapeError, UnsupportedError
from bolza.core.reference import cites
from bolza.sde.modified_equation import FOUNDATIONS, LI, Method, modified_equation

__all__ = ["LinearLaw", "WeakErrors", "iterate_law", "linear_law", "stale_law", "weak_errors"]


@dataclass(frozen=True)
class LinearLaw:
    """Mean and covariance of the state of a linear equation; see :func:`linear_law`.

    Args:
        mean: ``(*state)``, float64.
        covariance: ``(*state, *state)``, float64.

    Example:
        >>> LinearLaw(torch.ones(1), torch.full((1, 1), 0.5)).second.item()
        1.5
    """

    mean: Tensor
    covariance: Tensor

    @property
    def second(self) -> Tensor:
        """Second moment E z zᵀ, ``(*state, *state)``."""
        m = self.mean.reshape(-1)
        return self.covariance + torch.outer(m, m).reshape(self.covariance.shape)


def _matrices(diffusion: Diffusion, state: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    """L, b and G Gᵀ of a diffusion with linear drift and constant noise; checked at random points and times."""
    n = math.prod(state)
    probes = torch.randn(3, *state, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    points = torch.cat(
        [
            torch.zeros(1, *state, dtype=torch.float64),
            torch.eye(n, dtype=torch.float64).reshape(n, *state),
            probes,
        ]
    )
    drift = diffusion.drift(0.0, points).reshape(-1, n)
    b, L = drift[0], (drift[1 : n + 1] - drift[0]).mT
    flat = probes.reshape(3, n)
    late = diffusion.drift(1.7, probes).reshape(3, n)
    size = 1e-9 * max(1.0, float(drift.abs().max()))
    if not (_close(flat @ L.mT + b, drift[n + 1 :], size) and _close(late, drift[n + 1 :], size)):
        raise UnsupportedError(
            "the drift is not linear with constant coefficients: exact moments need a quadratic objective and a "
            "method without a schedule; simulate paths instead"
        )
    m = math.prod(diffusion.noise_shape(points[:1])[1:])
    axes = torch.eye(m, dtype=torch.float64)

    def factor(at: Tensor) -> Tensor:
        where = at.expand(m, *state)
        return diffusion.factor(0.0, where, axes.reshape(diffusion.noise_shape(where))).reshape(m, n).mT

    G = factor(points[0])
    if not all(_close(G, factor(probe), 1e-9 * max(1.0, float(G.abs().max()))) for probe in probes):
        raise UnsupportedError(
            "the noise depends on the state: the law is not Gaussian, and its moments are not linear; simulate paths"
        )
    return L, b, G @ G.mT


def _close(a: Tensor, b: Tensor, tol: float) -> bool:
    return bool(torch.allclose(a, b, rtol=1e-9, atol=tol))


def _flow(L: Tensor, b: Tensor, Q: Tensor, time: float) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices e^{LT}, ∫e^{Ls}b ds, ∫e^{Ls}Q e^{Lᵀs} ds: a short time by Van Loan, then doublings."""
    n = len(L)
    doublings = max(0, math.ceil(math.log2(max(1e-300, float(torch.linalg.matrix_norm(L, 1)) * time))))
    h = time / 2**doublings
    block = torch.zeros(2 * n + 1, 2 * n + 1, dtype=L.dtype)
    block[:n, :n], block[:n, n : 2 * n], block[n : 2 * n, n : 2 * n] = -L, Q, L.mT
    power = torch.linalg.matrix_exp(block * h)
    phi = power[n : 2 * n, n : 2 * n].mT
    P = phi @ power[:n, n : 2 * n]
    lifted = torch.zeros(n + 1, n + 1, dtype=L.dtype)
    lifted[:n, :n], lifted[:n, n] = L, b
    shift = torch.linalg.matrix_exp(lifted * h)[:n, n]
    return _doubled(phi, shift, P, doublings)


def _doubled(M: Tensor, c: Tensor, P: Tensor, times: int) -> tuple[Tensor, Tensor, Tensor]:
    for _ in range(times):
        M, c, P = M @ M, M @ c + c, M @ P @ M.mT + P
    return M, c, (P + P.mT) / 2


def linear_law(
    diffusion: Diffusion, start: Tensor, time: float, *, covariance: Tensor | None = None
) -> LinearLaw:
    r"""Exact mean and covariance at a time, of a diffusion with linear drift and constant noise.

        ṁ = L m + b,    Ṗ = L P + P Lᵀ + G Gᵀ

    L, b and G are read off the equation by products, and it is checked that the equation is linear.

    Args:
        diffusion: the equation; a state of n numbers costs n³.
        start: mean at time 0, one state ``(*state)``.
        time: in the unit of the equation.
        covariance: at time 0, ``(*state, *state)``; none by default.

    Returns:
        LinearLaw, float64.

    Raises:
        ArgumentError: the time is not positive.
        UnsupportedError: the drift is not linear, depends on time, or the noise depends on the state.

    Reference: Van Loan (1978). Departure: by doublings, which do not overflow for stiff equations.

    Example:
        >>> ornstein = Diffusion(lambda t, x: -x, lambda t, x, noise: 0.5 * noise)
        >>> law = linear_law(ornstein, torch.ones(1), 1.0)
        >>> round(law.mean.item(), 6), round(law.covariance.item(), 6)      # e⁻¹ and (1 − e⁻²)/8
        (0.367879, 0.108083)
    """
    if not time > 0:
        raise ArgumentError(f"time is {time}: it must be positive")
    if diffusion.alpha != 2:
        raise UnsupportedError(f"alpha is {diffusion.alpha}: below 2 there is no covariance")
    state, start = start.shape, start.detach().to("cpu", torch.float64)
    L, b, Q = _matrices(diffusion, state)
    phi, shift, P = _flow(L, b, Q, time)
    if covariance is not None:
        P = P + phi @ covariance.to(P).reshape(P.shape) @ phi.mT
    return LinearLaw((phi @ start.reshape(-1) + shift).reshape(state), P.reshape(*state, *state))


def iterate_law(
    matrix: Tensor, noise: Tensor, start: Tensor, steps: int, *, covariance: Tensor | None = None
) -> LinearLaw:
    r"""Exact mean and covariance of z_{k+1} = M z_k + ξ_k, Cov ξ = Q, after some steps, by squarings.

    Args:
        matrix: M ``(n, n)``.
        noise: Q ``(n, n)``.
        start: mean at the start ``(n,)``.
        steps: k.
        covariance: at the start ``(n, n)``; none by default.

    Returns:
        LinearLaw, float64.

    Raises:
        ArgumentError: fewer than 0 steps.
        ShapeError: the shapes differ.

    Example:
        >>> one = torch.eye(1, dtype=torch.float64)
        >>> law = iterate_law(0.9 * one, 0.01 * one, torch.ones(1), 10)
        >>> round(law.second.item(), 7)                 # SGD with η = 0.1 on x²/2 at time 1
        0.1678095
    """
    if steps < 0:
        raise ArgumentError(f"steps is {steps}: it must not be negative")
    M, Q, m = (a.detach().to("cpu", torch.float64) for a in (matrix, noise, start))
    if M.shape != Q.shape or M.shape != (len(m), len(m)):
        raise ShapeError(
            f"matrix {tuple(M.shape)}, noise {tuple(Q.shape)} and start {tuple(m.shape)} do not fit together"
        )
    P = torch.zeros_like(M) if covariance is None else covariance.to(M)
    while steps:
        if steps & 1:
            m, P = M @ m, M @ P @ M.mT + Q
        M, Q, steps = M @ M, M @ Q @ M.mT + Q, steps >> 1
    return LinearLaw(m, P)


def stale_law(
    curvature: Tensor, noise: Tensor, start: Tensor, *, lr: float, momentum: float, steps: int
) -> LinearLaw:
    r"""Exact mean and covariance of SGD with gradients of geometric age on a quadratic objective.

        x_{k+1} = x_k − η (A x_{k−τ} + ξ_k),   P(τ = j) = (1 − μ)μʲ,   Cov ξ = C,   x_j = x_0 for j < 0

    The mean over delays of E x_{k−τ} x_jᵀ is an exponential average of the rows of the table E x_k x_jᵀ, so that the
    table follows row by row; k² d² numbers.

    Args:
        curvature: A ``(d, d)``.
        noise: C ``(d, d)``.
        start: x_0 ``(d,)``.
        lr: η.
        momentum: μ of the delay.
        steps: k.

    Returns:
        LinearLaw of x_k, float64.

    Reference: An, Lu & Ying (2018), §2 for the method; the recursion of moments is ours.

    Example:
        >>> one = torch.eye(1)
        >>> law = stale_law(one, one, torch.zeros(1), lr=0.05, momentum=0.8, steps=400)
        >>> round(law.covariance.item(), 5)             # the equation says 0.03125
        0.03081
    """
    A, C, x0 = (a.detach().to("cpu", torch.float64) for a in (curvature, noise, start))
    d = len(x0)
    first = torch.outer(x0, x0)
    table = torch.zeros(steps + 1, steps + 1, d, d, dtype=torch.float64)  # E x_k x_jᵀ
    table[0, 0] = first
    # mean over delays of rows of the table (columns j ≤ k), and of its diagonal; before the start all is x_0
    row, diagonal = first.expand(steps + 1, d, d).clone(), first
    mean, stale = x0, x0
    for k in range(steps):
        table[k + 1, : k + 1] = table[k, : k + 1] - lr * A @ row[: k + 1]
        table[: k + 1, k + 1] = table[k + 1, : k + 1].mT
        cross = lr * A @ row[k]
        table[k + 1, k + 1] = table[k, k] - cross - cross.mT + lr**2 * (A @ diagonal @ A.mT + C)
        mean = mean - lr * A @ stale
        stale = momentum * stale + (1 - momentum) * mean
        diagonal = momentum * diagonal + (1 - momentum) * table[k + 1, k + 1]
        old = momentum * row[: k + 1] + (1 - momentum) * table[k + 1, : k + 1]
        # the new column j = k + 1 at all ages: Σ_{i≤k+1} p_i E x_{k+1−i} x_{k+1}ᵀ, and x_0 before
        ages = (1 - momentum) * momentum ** torch.arange(k + 2, dtype=torch.float64)
        rows = table[: k + 2, k + 1].flip(0)
        column = (ages[:, None, None] * rows).sum(0) + momentum ** (k + 2) * table[0, k + 1]
        row = torch.cat([old, column[None], row[k + 2 :]])
    return LinearLaw(mean, table[steps, steps] - torch.outer(mean, mean))


@dataclass(frozen=True)
class WeakErrors:
    """Exact laws of a method and of its modified equation at one time; see :func:`weak_errors`.

    Args:
        lrs: learning rates η, ``(n,)``.
        steps: the small step of the expansion: η, or √η for momentum and nesterov; ``(n,)``.
        mean: E x of the method, ``(n, d)``.
        second: E x xᵀ of the method, ``(n, d, d)``.
        mean_errors: largest error of E x, ``(n,)``.
        second_errors: largest error of E x xᵀ, ``(n,)``.
    """

    lrs: Tensor
    steps: Tensor
    mean: Tensor
    second: Tensor
    mean_errors: Tensor
    second_errors: Tensor

    @property
    def mean_order(self) -> float:
        """Order of the error of the mean, between the two smallest steps."""
        return self._order(self.mean_errors)

    @property
    def second_order(self) -> float:
        """Order of the error of the second moment, between the two smallest steps."""
        return self._order(self.second_errors)

    def _order(self, errors: Tensor) -> float:
        a, b = self.steps.argsort()[:2]
        return float((errors[b] / errors[a]).log() / (self.steps[b] / self.steps[a]).log())


@cites(LI, FOUNDATIONS)
def weak_errors(
    curvature: float | Tensor,
    noise: float | Tensor = 1.0,
    *,
    lrs: Sequence[float],
    order: int = 1,
    method: Method = "sgd",
    friction: float = 1.0,
    start: float | Tensor = 1.0,
    time: float = 1.0,
) -> WeakErrors:
    r"""Error of a modified equation in law, exactly, for f = ½ xᵀAx with additive noise.

    Both laws are Gaussian and known to rounding at x_k, k = time/step: no Monte Carlo. The momentum of methods that
    have one goes to 1 with the learning rate, as the limit wants it: with friction c and step h

        momentum, nesterov    h = √η,   μ = 1 − c h      asynchronous    μ = 1 − c² η,   h = c η

    Args:
        curvature: A: a number, or ``(d, d)``.
        noise: covariance C of the gradient noise: a number (times the identity), or ``(d, d)``.
        lrs: learning rates η; time/step must be a whole number.
        order: of the equation.
        method: ``"sgd"``, ``"momentum"``, ``"nesterov"`` or ``"asynchronous"``.
        friction: c.
        start: x_0: a number, or ``(d,)``.
        time: T, in units of k · step.

    Returns:
        WeakErrors; ``mean_order`` and ``second_order`` come near ``order``.

    Raises:
        ArgumentError: a time that is no whole number of steps, or a momentum below 0.
        UnsupportedError: another method.

    Reference: Li, Tai & E (2017), Theorem 1; (2019), Theorems 9 and 13.

    Example:
        >>> found = weak_errors(1.0, lrs=[0.1, 0.05, 0.025, 0.0125], order=2)
        >>> [f"{error:.3e}" for error in found.second_errors.tolist()]
        ['3.565e-03', '8.727e-04', '2.160e-04', '5.372e-05']
        >>> round(found.second_order, 1)
        2.0
    """
    A = torch.as_tensor(curvature, dtype=torch.float64)
    A = A.reshape(1, 1) if A.ndim == 0 else A
    d = len(A)
    C = torch.as_tensor(noise, dtype=torch.float64)
    C = C * torch.eye(d, dtype=torch.float64) if C.ndim == 0 else C
    x0 = torch.as_tensor(start, dtype=torch.float64).expand(d)
    if method not in ("sgd", "momentum", "nesterov", "asynchronous"):
        raise UnsupportedError(
            f"method is {method!r}: its second moment makes it nonlinear; simulate paths instead"
        )

    def objective(x: Tensor) -> Tensor:
        return 0.5 * ((x @ A) * x).sum(-1)

    exact, found, steps = [], [], []
    for lr in lrs:
        h, mu = _step_and_momentum(method, lr, friction)
        count = round(time / h)
        if abs(count * h - time) > 1e-9 * time:
            raise ArgumentError(f"lr is {lr}: time / step = {time / h:.6g} must be a whole number of steps")
        sde = modified_equation(objective, lr=lr, order=order, method=method, momentum=mu, noise=C)
        law = linear_law(sde, sde.initial(x0), count * sde.time_step)
        mean, second = sde.position(law.mean), law.second
        found.append((mean, second if sde.parts == 1 else second[0, :, 0, :]))
        exact.append(_law_of_method(method, A, C, x0, lr, mu, count))
        steps.append(h)
    means, seconds = (torch.stack([pair[i] for pair in exact]) for i in (0, 1))
    return WeakErrors(
        torch.tensor(list(lrs), dtype=torch.float64),
        torch.tensor(steps, dtype=torch.float64),
        means,
        seconds,
        (torch.stack([m for m, _ in found]) - means).abs().amax(1),
        (torch.stack([s for _, s in found]) - seconds).abs().amax((1, 2)),
    )


def _step_and_momentum(method: str, lr: float, friction: float) -> tuple[float, float]:
    if method == "sgd":
        return lr, 0.0
    h = lr**0.5 if method != "asynchronous" else friction * lr
    mu = 1 - friction * h
    if not 0 <= mu < 1:
        raise ArgumentError(
            f"friction is {friction}: with lr = {lr} the momentum would be {mu:.3g}, not in [0, 1)"
        )
    return h, mu


def _law_of_method(
    method: str, A: Tensor, C: Tensor, x0: Tensor, lr: float, mu: float, count: int
) -> tuple[Tensor, Tensor]:
    d = len(A)
    eye = torch.eye(d, dtype=torch.float64)
    if method == "asynchronous":
        law = stale_law(A, C, x0, lr=lr, momentum=mu, steps=count)
        return law.mean, law.second
    if method == "sgd":
        law = iterate_law(eye - lr * A, lr**2 * C, x0, count)
        return law.mean, law.second
    # (x, Y), Y = v/η: Y ← μY − g, x ← x + ηY; nesterov takes g at x + μηY
    kept = mu * (eye - lr * A) if method == "nesterov" else mu * eye
    M = torch.cat([torch.cat([eye - lr * A, lr * kept], 1), torch.cat([-A, kept], 1)])
    push = torch.cat([lr * eye, eye])
    law = iterate_law(M, push @ C @ push.mT, torch.cat([x0, torch.zeros_like(x0)]), count)
    return law.mean[:d], law.second[:d, :d]
