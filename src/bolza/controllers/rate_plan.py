r"""The best learning rates for a quadratic loss, from the moments of SGD that they give rise to.

A mode of curvature λ, whose mini-batch gradient λx + ξ has the noise Var ξ = c, moves under heavy ball as

    b ← μ b + λ x + ξ,   x ← x − η b;        for μ = 0   E x² ← (1 − ηλ)² E x² + η² c

The moments of n steps at one rate are a linear map in closed form (powers of a 2 × 2 matrix about its stationary
covariance), so that a plan of P pieces costs P small maps whatever the number of steps. Costates of these maps give
the gradient in log η_p, and L-BFGS the rates; it starts at the best constant rate and only ever descends.

For one mode and small steps, m = λ E x²/2 obeys ṁ = −2aum + ½aηΣu², whose solution is known: full rate until
m = ηΣ/2, then u = 1/(1 + a(t − t*)).

Reference: Li, Tai & E (2017), §4.1, for the controlled moments of one mode. Departures: exact discrete steps, many
modes under one rate, momentum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from bolza.controllers.moments import LI
from bolza.core.errors import ArgumentError, ShapeError
from bolza.core.reference import cites

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.float64]

__all__ = ["RatePlan", "plan_rates"]

Objective = Literal["terminal", "average"]

_LEAST = 1e-6  # smallest rate of a plan, as a share of the largest
_EDGE = 1 - 1e-6  # largest rate, as a share of the stability limit
_NUDGE = 1e-6  # step of the derivative in log η
_FLAT = 1e-12  # curvature below this share of the largest counts as this share


@dataclass(frozen=True)
class RatePlan:
    """Learning rates for the steps of a run, constant over pieces.

    Attributes:
        rates: rate of each piece, ``(P,)``, float64.
        lengths: steps of each piece, ``(P,)``.
        losses: loss above the bottom that the plan predicts at the start and after each piece, ``(P + 1,)``.
        objective: what was minimised: the last loss, or the mean of those after the pieces, weighted by length.
        constant: the best constant rate.
        constant_objective: what it would have reached.
        limit: largest rate that the plan was allowed.

    Example:
        >>> plan = plan_rates(torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([2.0]), steps=100, pieces=4)
        >>> plan.objective < plan.constant_objective, plan.rate(0) > plan.rate(99), plan.steps
        (True, True, 100)
    """

    rates: Tensor
    lengths: Tensor
    losses: Tensor
    objective: float
    constant: float
    constant_objective: float
    limit: float

    @property
    def steps(self) -> int:
        """Steps of the whole plan."""
        return int(self.lengths.sum())

    def rate(self, step: int) -> float:
        """Rate of a step, counted from 0; after the end, that of the last piece."""
        piece = int(torch.searchsorted(self.lengths.cumsum(0), step, right=True))
        return float(self.rates[min(piece, len(self.rates) - 1)])


@cites(LI)
def plan_rates(
    curvature: Tensor,
    noise: Tensor,
    offset: Tensor,
    *,
    steps: int,
    lr_max: float | None = None,
    momentum: float = 0.0,
    pieces: int | Sequence[int] = 20,
    objective: Objective = "terminal",
    start: Sequence[float] | Tensor | None = None,
    iterations: int = 100,
) -> RatePlan:
    r"""Plan the learning rates of a run: those that minimise its predicted loss on a quadratic with gradient noise.

        E x_j² ← (1 − ηλ_j)² E x_j² + η² c_j,     loss = ½ Σ_j λ_j E x_j²     (μ = 0; with momentum, see the module)

    Directions of the same curvature count as one mode with the sum of their noises and squared offsets, so that a
    bulk is one more mode. The plan is never worse than the best constant rate, nor than ``start``.

    Args:
        curvature: λ, not negative, one positive, ``(k,)``.
        noise: c, variance of the mini-batch gradient along each mode, ``(k,)``: Σ_jj/B; or of each piece, ``(P, k)``.
        offset: distance from the bottom along each mode, ``(k,)``.
        steps: length of the run.
        lr_max: largest rate; never above the stability limit 2(1 + μ)/λ_max, which is the default.
        momentum: heavy-ball μ.
        pieces: number of pieces of equal length, or the length of each; as many as steps plans every step.
        objective: ``"terminal"``, the loss at the end, or ``"average"``, the mean of the losses after the pieces.
        start: rates of the pieces to start from, beside the best constant one.
        iterations: L-BFGS iterations at most.

    Returns:
        RatePlan.

    Raises:
        ArgumentError: a setting is out of range.
        ShapeError: shapes do not belong together.

    Reference: Li, Tai & E (2017), §4.1; departures in the module's text.

    Example:
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> plan = plan_rates(one, one, 2**0.5 * one, steps=50, lr_max=0.2, pieces=50)
        >>> round(plan.rate(0), 4), round(plan.rate(49), 4), plan.objective < 0.8 * plan.constant_objective
        (0.2, 0.0208, True)
    """
    import numpy as np

    if steps < 1:
        raise ArgumentError(f"steps={steps} must be at least 1")
    lam, x = _vector(curvature, "curvature"), _vector(offset, "offset")
    lengths = _lengths(pieces, steps)
    varying = torch.as_tensor(noise).ndim == 2
    c = np.stack([_vector(row, "noise") for row in noise]) if varying else _vector(noise, "noise")
    if not lam.shape == c.shape[-1:] == x.shape:
        raise ShapeError(
            f"curvature has {lam.size} modes, noise {c.shape[-1]} and offset {x.size}: give one each"
        )
    if varying and len(c) != len(lengths):
        raise ShapeError(
            f"noise is given for {len(c)} pieces, but there are {len(lengths)}: give one row each"
        )
    if lam.size == 0 or lam.min() < 0 or lam.max() <= 0 or c.min() < 0:
        raise ArgumentError("curvature and noise must not be negative, and one curvature must be positive")
    if not 0 <= momentum < 1 or objective not in ("terminal", "average"):
        raise ArgumentError(
            f"momentum is {momentum} and objective {objective!r}: momentum must be in [0, 1), and objective 'terminal' "
            "or 'average'"
        )
    top = _EDGE * 2 * (1 + momentum) / float(lam.max())
    if lr_max is not None:
        if not lr_max > 0:
            raise ArgumentError(f"lr_max={lr_max} must be positive")
        top = min(top, lr_max)
    problem = _Problem(np.maximum(lam, _FLAT * lam.max()), c, x**2, lengths, momentum, objective)

    constant, value = _best_constant(problem, top)
    rates = np.full(len(lengths), constant)
    if start is not None:
        given = np.clip(_vector(torch.as_tensor(start), "start"), _LEAST * top, top)
        if given.shape != rates.shape:
            raise ShapeError(f"start has {given.size} rates for {len(lengths)} pieces: give one each")
        if problem.value(given) < value:
            rates = given
    if len(rates) > 1 or start is not None:
        rates = _descend(problem, rates, top, iterations)
    losses = problem.losses(rates)
    return RatePlan(
        torch.from_numpy(rates),
        torch.from_numpy(lengths.copy()),
        torch.from_numpy(losses),
        float(problem.of(losses)),
        constant,
        value,
        top,
    )


def _vector(t: Tensor, name: str) -> Array:
    given = torch.as_tensor(t).detach().cpu().double()
    if given.ndim != 1:
        raise ShapeError(f"{name} has shape {tuple(given.shape)}: give one number a mode, (k,)")
    if not bool(torch.isfinite(given).all()):
        raise ArgumentError(f"{name} is not finite: {given.tolist()}")
    return given.numpy()


def _lengths(pieces: int | Sequence[int], steps: int) -> npt.NDArray[np.int64]:
    import numpy as np

    if isinstance(pieces, int):
        if pieces < 1:
            raise ArgumentError(f"pieces={pieces} must be at least 1")
        count = min(pieces, steps)
        return np.diff(np.arange(count + 1, dtype=np.int64) * steps // count)
    lengths = np.asarray(list(pieces), dtype=np.int64)
    if lengths.size == 0 or lengths.min() < 1 or lengths.sum() != steps:
        raise ArgumentError(f"pieces={list(pieces)} must be positive lengths that add up to steps={steps}")
    return lengths


@dataclass(frozen=True)
class _Problem:
    """Predicted loss as a function of the rates of the pieces."""

    curvature: Array  # (k,)
    noise: Array
    square: Array  # x₀²
    lengths: Any
    momentum: float
    objective: Objective

    @property
    def initial(self) -> Array:
        """Moments at the start: E x², and with momentum E xb and E b², ``(k, m)``."""
        import numpy as np

        first = np.zeros((len(self.curvature), 3 if self.momentum else 1))
        first[:, 0] = self.square
        return first

    def maps(self, rates: Array, lengths: Any) -> tuple[Array, Array]:
        """Moments after n steps at one rate, w ← T w + q, for every rate: ``(…, k, m, m)`` and ``(…, k, m)``."""
        eta, n = rates[..., None], lengths[..., None]
        if self.momentum:
            return _heavy_ball(eta, n, self.curvature, self.noise, self.momentum)
        import numpy as np

        x = eta * self.curvature  # 1 − (1 − x)² = x(2 − x)
        x = x * (2 - x)
        with np.errstate(divide="ignore"):
            lost = -np.expm1(n * np.log1p(-x))  # 1 − ρⁿ
        added = eta**2 * self.noise * lost / x
        return (1 - lost)[..., None, None], added[..., None]

    def losses(self, rates: Array) -> Array:
        """Loss at the start and after each piece, ``(…, P + 1)`` for rates ``(…, P)``."""
        import numpy as np

        transition, source = self.maps(rates, self.lengths)
        w = np.broadcast_to(self.initial, (*rates.shape[:-1], *self.initial.shape))
        found = [w[..., 0]]
        for p in range(len(self.lengths)):
            w = (transition[..., p, :, :, :] @ w[..., None])[..., 0] + source[..., p, :, :]
            found.append(w[..., 0])
        losses: Array = 0.5 * np.stack(found, -2) @ self.curvature
        return losses

    def of(self, losses: Array) -> Array:
        """Objective, from the losses."""
        if self.objective == "terminal":
            return losses[..., -1]
        mean: Array = losses[..., 1:] @ self.lengths / self.lengths.sum()
        return mean

    def value(self, rates: Array) -> float:
        """Objective of rates."""
        return float(self.of(self.losses(rates)))

    def value_and_slope(self, rates: Array) -> tuple[float, Array]:
        """Objective and its gradient in log rates, by costates of the maps."""
        import numpy as np

        nudged = np.stack([rates, rates * math.exp(_NUDGE), rates * math.exp(-_NUDGE)])
        transitions, sources = self.maps(nudged, self.lengths)
        transition, source = transitions[0], sources[0]
        turned = (transitions[1] - transitions[2]) / (2 * _NUDGE)
        pushed = (sources[1] - sources[2]) / (2 * _NUDGE)
        path = [self.initial]
        for step, add in zip(transition, source, strict=True):
            path.append((step @ path[-1][..., None])[..., 0] + add)
        w = np.stack(path)
        losses = 0.5 * w[..., 0] @ self.curvature

        last = np.zeros_like(path[0])
        last[:, 0] = 0.5 * self.curvature
        share = self.lengths / self.lengths.sum()
        costate, costates = np.zeros_like(last), np.empty_like(w[1:])
        for p in reversed(range(len(rates))):
            if self.objective == "average":
                costate = costate + share[p] * last
            elif p == len(rates) - 1:
                costate = last
            costates[p] = costate
            costate = (costate[..., None, :] @ transition[p])[..., 0, :]
        along = (turned @ w[:-1, ..., None])[..., 0] + pushed
        return float(self.of(losses)), (costates * along).sum((1, 2))


def _heavy_ball(eta: Array, n: Any, lam: Array, c: Array, mu: float) -> tuple[Array, Array]:
    """Moments (E x², E xb, E b²) after n steps: powers of the step about the stationary covariance."""
    import numpy as np

    trace = 1 + mu - eta * lam
    root = np.sqrt((trace**2 / 4 - mu).astype(complex))
    root = np.where(np.abs(root) < 1e-7, 1e-7, root)
    upper, lower = trace / 2 + root, trace / 2 - root
    with np.errstate(under="ignore"):
        power = ((upper**n - lower**n) / (2 * root)).real  # Mⁿ = s_n M − μ s_{n−1} I
        before = ((upper ** (n - 1) - lower ** (n - 1)) / (2 * root)).real
    a, b = power * (1 - eta * lam) - mu * before, -power * eta * mu
    d, e = power * lam, power * mu - mu * before
    matrix = np.empty((*a.shape, 3, 3))
    rows = ((a * a, 2 * a * b, b * b), (a * d, a * e + b * d, b * e), (d * d, 2 * d * e, e * e))
    for i, row in enumerate(rows):
        for j, entry in enumerate(row):
            matrix[..., i, j] = entry
    xx = eta * (1 + mu) / (lam * (1 - mu) * (2 * (1 + mu) - eta * lam))
    bb = (lam**2 * xx + 1) / (1 - mu**2 + eta * mu * lam)
    rest = np.empty((*np.broadcast_shapes(a.shape, c.shape), 3))
    for i, entry in enumerate((xx, -eta / 2 * bb, bb)):
        rest[..., i] = entry * c
    return matrix, rest - (matrix @ rest[..., None])[..., 0]


def _best_constant(problem: _Problem, top: float) -> tuple[float, float]:
    """The best constant rate by finer and finer grids, and its objective."""
    import numpy as np

    low, high = math.log(_LEAST * top), math.log(top)
    rate = value = float("nan")
    for points in (61, 13, 13, 13):
        grid = np.exp(np.linspace(low, high, points))
        grid[-1] = min(grid[-1], top)
        values = problem.of(problem.losses(np.repeat(grid[:, None], len(problem.lengths), 1)))
        best = int(np.nanargmin(values))
        rate, value = float(grid[best]), float(values[best])
        low, high = math.log(grid[max(best - 1, 0)]), math.log(grid[min(best + 1, points - 1)])
    return rate, value


def _descend(problem: _Problem, rates: Array, top: float, iterations: int) -> Array:
    """Rates that L-BFGS reaches from here, or these if they are not better."""
    import numpy as np
    from scipy.optimize import minimize

    first = problem.value(rates)
    if first <= 0:
        return rates

    def scaled(log_rates: Array) -> tuple[float, Array]:
        value, slope = problem.value_and_slope(np.minimum(np.exp(log_rates), top))
        return value / first, slope / first

    bound = (math.log(_LEAST * top), math.log(top))
    found = minimize(
        scaled,
        np.log(rates),
        jac=True,
        method="L-BFGS-B",
        bounds=[bound] * len(rates),
        options={"maxiter": iterations, "ftol": 1e-10, "gtol": 1e-7, "maxcor": 20},
    )
    better: Array = np.minimum(np.exp(found.x), top)
    return better if problem.value(better) <= first else rates
