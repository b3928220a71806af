r"""Iterative linear-quadratic regulation and differential dynamic programming.

Around a nominal trajectory the value function is expanded to second order, backwards; the policy that
minimises it is followed, forwards:

    Q_x = L_x + f_xᵀV'_x,   Q_u = L_u + f_uᵀV'_x
    Q_xx = L_xx + f_xᵀV'_xx f_x [+ V'_x·f_xx],   Q_ux and Q_uu alike
    k = −Q_uu⁻¹Q_u,   K = −Q_uu⁻¹Q_ux,   û_t = u_t + αk_t + K_t(x̂_t − x_t)

Without the terms in brackets this is the iterative linear-quadratic regulator (Gauss–Newton in the
dynamics), with them differential dynamic programming, which converges quadratically.

Reference: Jacobson & Mayne (1970), *Differential Dynamic Programming*; Li & Todorov (2004); Tassa, Erez &
Todorov (2012) for the regularisation.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from bolza.core import Cost, Reference, System, Trajectory, cites
from bolza.core.errors import ArgumentError, ConvergenceWarning, DivergenceError
from bolza.ops.bellman import BellmanStep, bellman_step
from bolza.ops.trees import Tree
from bolza.solve._vectors import Expansion, Vectors

__all__ = ["ILQRResult", "ilqr"]

ILQR = Reference(
    "tassa2012synthesis",
    "Tassa, Yuval and Erez, Tom and Todorov, Emanuel",
    "Synthesis and Stabilization of Complex Behaviors through Online Trajectory Optimization",
    2012,
    venue="IEEE/RSJ International Conference on Intelligent Robots and Systems",
)

_LENGTHS = tuple(0.5**i for i in range(1, 12))  # of the line search, after the full step
_SUFFICIENT = 1e-4  # of the predicted decrease
_SMALLEST, _LARGEST, _FACTOR = 1e-6, 1e12, 2.0  # regularisation


@dataclass(frozen=True)
class ILQRResult:
    """An optimal trajectory and the policy around it.

    Attributes:
        trajectory: states, controls, costates, gradients ∂J/∂u and the value J; with a leading
            dimension of starts if there were several.
        gains: feedback K_t over flattened states and controls, shape ``(m, n)`` or ``(starts, m, n)``.
        converged: whether max |∂J/∂u| fell below the tolerance; one truth value for each start.
        iterations: expansions that were needed.
        history: J after each iteration, the start first; shape ``(iterations + 1,)`` or with starts behind.
    """

    trajectory: Trajectory
    gains: tuple[Tensor, ...]
    converged: Tensor
    iterations: int
    history: Tensor
    _vectors: Vectors

    @property
    def value(self) -> Tensor:
        """J of the trajectory."""
        assert self.trajectory.value is not None
        return self.trajectory.value

    def policy(self, t: int, x: Tree) -> Tree:
        """Feedback law u_t + K_t (x − x_t).

        Args:
            t: step.
            x: state, with the structure (and the starts) of ``trajectory.states[t]``.
        """
        v = self._vectors
        nominal = v.join(self.trajectory.states[t], v.x_like[t])
        control = v.join(self.trajectory.controls[t], v.u_like[t])
        gain = self.gains[t] if v.batched else self.gains[t][None]
        moved = (gain @ (v.join(x, v.x_like[t]) - nominal)[..., None])[..., 0]
        return v.split(control + moved, v.u_like[t])


@cites(ILQR)
def ilqr(
    system: System,
    cost: Cost,
    x0: Tree,
    controls: Sequence[Tree] | None = None,
    *,
    hessian: Literal["gauss-newton", "ddp"] = "gauss-newton",
    batched: bool = False,
    time_invariant: bool = False,
    iterations: int = 200,
    tolerance: float | None = None,
    regularization: float = 0.0,
    warn: bool = True,
) -> ILQRResult:
    r"""Optimal control of any smooth system from x0, with a feedback law around the optimum.

    Each iteration expands dynamics and cost along the trajectory, solves the linear-quadratic problem
    by one Bellman sweep, and follows its policy with a line search. A linear system with a quadratic
    cost is solved by the first iteration. States and controls may be any trees of tensors; all entries
    of x0 together are one state, so that a control which drives a whole batch of samples (the weights
    of a layer) is had by an x0 that holds the batch.

    Matrices over flattened states and controls are formed: up to a few hundred entries a step is a
    sensible size. Each step has a control of its own, also where a network shares a parameter.

    Args:
        system: dynamics, differentiable by ``torch.func``.
        cost: terminal and running cost, twice differentiable.
        x0: first state.
        controls: where to start; the system's own by default.
        hessian: ``"gauss-newton"`` leaves out the curvature of the dynamics; ``"ddp"`` keeps it.
        batched: x0 has a leading dimension of starts, each a problem with controls of its own; system
            and cost are written for one start and are mapped over them. ``controls`` may then be those
            of one start, or have the leading dimension too.
        time_invariant: step and running cost do not depend on t: all steps are expanded in one call.
        iterations: expansions at most.
        tolerance: stop when max |∂J/∂u| ≤ tolerance · max(1, |J|); by default the machine precision to
            the power 0.6, which is 4e-10 in float64.
        regularization: μ at the start, added to Q_uu; it grows where Q_uu is not positive definite or no
            step length helps, and falls after each success.
        warn: warn where the tolerance was not met.

    Returns:
        ILQRResult.

    Raises:
        ArgumentError: an option makes no sense, or the number of controls is not the horizon.
        DivergenceError: the trajectory of the initial controls is not finite.
        ShapeError: shapes of starts and controls do not belong together.

    Warns:
        ConvergenceWarning: the tolerance was not met.

    Reference: Tassa, Erez & Todorov (2012), §II. Departures: the regularisation is added to Q_uu, each
    start has its own, and all step lengths of the line search are tried at once where starts are batched.

    Example:
        >>> from bolza.systems import LinearSystem, QuadraticCost
        >>> one = torch.eye(1, dtype=torch.float64)
        >>> system, cost = LinearSystem(one, one, horizon=5), QuadraticCost(one, one)
        >>> result = ilqr(system, cost, torch.ones(1, dtype=torch.float64))
        >>> float(2 * result.value), [round(float(K), 7) for K in result.gains]
        (1.6179775280898876, [-0.6179775, -0.6176471, -0.6153846, -0.6, -0.5])
    """
    if hessian not in ("gauss-newton", "ddp"):
        raise ArgumentError(f"hessian is {hessian!r}: it must be 'gauss-newton' or 'ddp'")
    if iterations < 1 or not regularization >= 0:
        raise ArgumentError(
            f"iterations is {iterations} and regularization is {regularization}: the first must be positive, "
            "the second must not be negative"
        )
    v = Vectors(system, cost, x0, controls, batched=batched, time_invariant=time_invariant)
    precision = torch.finfo(v.x0.dtype).eps
    tolerance = precision**0.6 if tolerance is None else tolerance
    xs, us, value = v.rollout(v.x0, lambda x, u: u.clone(), v.u0)
    if not bool(torch.isfinite(value).all()):
        raise DivergenceError(
            "the cost of the initial controls is not finite: start from smaller controls or a shorter horizon"
        )
    search = _Search(v, xs, us, value, hessian == "ddp", float(regularization))
    history = [value]
    for _ in range(iterations):
        search.expand()
        search.solve(tolerance)
        if not bool(search.active.any()):
            break
        search.advance()
        history.append(search.value)
    else:
        search.expand()
        search.solve(tolerance)
    converged = search.converged
    if warn and not bool(converged.all()):
        worst = float(search.optimality().max())
        warnings.warn(
            f"ilqr stopped after {search.expansions} expansions with |∂J/∂u| at {worst:.1e} of max(1, |J|), above "
            f"{tolerance:.1e} in {int((~converged).sum())} of {len(converged)} starts: raise iterations, take "
            "hessian='ddp', or start elsewhere",
            ConvergenceWarning,
            stacklevel=2,
        )
    return _result(search, torch.stack(history))


class _Search:
    """The state of the iteration: nominal trajectories of all starts, their expansions and policies."""

    def __init__(
        self, v: Vectors, xs: list[Tensor], us: list[Tensor], value: Tensor, exact: bool, mu: float
    ) -> None:
        self.v, self.xs, self.us, self.value, self.exact = v, xs, us, value, exact
        self.mu = value.new_full(value.shape, mu, dtype=torch.float64)
        self.growth = torch.ones_like(self.mu)
        self.stuck = torch.zeros_like(value, dtype=torch.bool)
        self.converged = torch.zeros_like(self.stuck)
        self.idle = torch.zeros_like(value)  # steps whose promise is below rounding and that gain nothing
        self.least = torch.full_like(value, math.inf)  # of the optimality so far
        self.fresh, self.expansions = False, 0
        self.steps: list[Expansion] = []
        self.policy: list[BellmanStep] = []

    @property
    def active(self) -> Tensor:
        return ~(self.converged | self.stuck)

    def expand(self) -> None:
        """Expand along the trajectory, unless it has not moved."""
        if self.fresh:
            return
        self.steps = self.v.expand(self.xs, self.us, exact=self.exact)
        self.last = self.v.expand_terminal(self.xs[-1])
        self.ps, self.gradients = self.v.costates(self.steps, self.last[0])
        self.fresh, self.expansions = True, self.expansions + 1

    def optimality(self) -> Tensor:
        """Largest |∂J/∂u| over max(1, |J|), for each start."""
        largest = torch.stack([g.abs().amax(-1) for g in self.gradients]).amax(0)
        return largest / self.value.abs().clamp(min=1.0)

    def solve(self, tolerance: float) -> None:
        """Find the policy, with as much regularisation as it takes, and see who has arrived.

        A gradient that is small beside J is not enough where J falls without end: the step must promise little too.
        """
        flat = self.optimality() <= tolerance
        self.converged = torch.zeros_like(flat)
        while True:
            self.policy = self._sweep()
            failed = self.active & ~torch.stack([s.definite for s in self.policy]).all(0)
            if not bool(failed.any()):
                break
            self._grow(failed)
        promise = -sum(s.first[..., 0] + s.second[..., 0] / 2 for s in self.policy)
        self.converged = flat & (promise <= tolerance**0.5 * self.value.abs().clamp(min=1.0))

    def _sweep(self) -> list[BellmanStep]:
        p, P = self.last[0][..., None], self.last[1]
        policy = []
        for step in reversed(self.steps):
            n = step.A.shape[-1]
            H = step.hamiltonian_curvature(p[..., 0])
            found = bellman_step(
                step.A,
                step.B,
                H[:, :n, :n],
                H[:, n:, n:],
                P,
                p,
                S=H[:, n:, :n],
                q=step.slope[:, :n, None],
                r=step.slope[:, n:, None],
                regularization=self.mu,
            )
            policy.append(found)
            P, p = found.P, found.p
        return policy[::-1]

    def _grow(self, which: Tensor) -> None:
        growth = torch.clamp(self.growth * _FACTOR, min=_FACTOR)
        mu = torch.clamp(self.mu * growth, min=_SMALLEST)
        self.growth = torch.where(which, growth, self.growth)
        self.mu = torch.where(which, mu, self.mu)
        self.stuck = self.stuck | (self.mu > _LARGEST)

    def _shrink(self, which: Tensor) -> None:
        growth = torch.clamp(self.growth / _FACTOR, max=1 / _FACTOR)
        mu = self.mu * growth
        mu = torch.where(mu < _SMALLEST, torch.zeros_like(mu), mu)
        self.growth = torch.where(which, growth, self.growth)
        self.mu = torch.where(which, mu, self.mu)

    def advance(self) -> None:
        """Follow the policy at the longest step that keeps a part of the predicted decrease."""
        first = sum(s.first[..., 0] for s in self.policy)
        second = sum(s.second[..., 0] for s in self.policy)
        assert isinstance(first, Tensor) and isinstance(second, Tensor)
        waiting = self.active
        moved = torch.zeros_like(waiting)
        old = self.value
        noise = 8 * torch.finfo(old.dtype).eps * old.abs()

        def take(length: float, rolled: tuple[list[Tensor], list[Tensor], Tensor]) -> None:
            nonlocal waiting, moved
            predicted = length * first + length**2 / 2 * second
            better = waiting & (rolled[2] - old <= _SUFFICIENT * predicted.to(old) + noise)
            better &= torch.isfinite(rolled[2])
            if bool(better.any()):
                keep = better[:, None]
                self.xs = [torch.where(keep, new, x) for new, x in zip(rolled[0], self.xs, strict=True)]
                self.us = [torch.where(keep, new, u) for new, u in zip(rolled[1], self.us, strict=True)]
                self.value = torch.where(better, rolled[2], self.value)
                waiting, moved = waiting & ~better, moved | better

        nominal = list(self.xs), list(self.us)
        take(1.0, self._follow(nominal, 1.0))
        if bool(waiting.any()):
            if self.v.batched:
                for length, rolled in zip(_LENGTHS, self._follow_all(nominal), strict=True):
                    take(length, rolled)
            else:
                for length in _LENGTHS:
                    take(length, self._follow(nominal, length))
                    if not bool(waiting.any()):
                        break
        # below rounding of J, a step may still bring the gradient down
        optimality = self.optimality()
        idle = ((first + second / 2).abs() < noise) & ~(optimality < self.least)
        self.least = torch.minimum(self.least, optimality)
        self.idle = torch.where(idle, self.idle + 1, 0.0)
        self.stuck = self.stuck | (self.idle > 2)
        self._shrink(moved)
        self._grow(waiting)
        self.fresh = not bool(moved.any())

    def _follow(
        self, nominal: tuple[list[Tensor], list[Tensor]], length: float | Tensor
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        xs, us = nominal
        repeat = len(length) // len(xs[0]) if isinstance(length, Tensor) else 1

        def many(tensor: Tensor) -> Tensor:
            return tensor.repeat(repeat, *[1] * (tensor.ndim - 1)) if repeat > 1 else tensor

        def law(x: Tensor, known: tuple[Tensor, Tensor, Tensor]) -> Tensor:
            nominal_x, u, K = known
            return u + (K @ (x - nominal_x)[..., None])[..., 0]

        given = []
        for x, u, policy in zip(xs, us, self.policy, strict=False):
            K, k = policy.K.to(x), policy.k[..., 0].to(x)
            given.append((many(x), many(u) + length * many(k), many(K)))
        return self.v.rollout(many(self.v.x0), law, given)

    def _follow_all(
        self, nominal: tuple[list[Tensor], list[Tensor]]
    ) -> list[tuple[list[Tensor], list[Tensor], Tensor]]:
        """All shorter steps of all starts, as one larger batch."""
        size, count = len(self.value), len(_LENGTHS)
        lengths = self.value.new_tensor(_LENGTHS).repeat_interleave(size)[:, None]
        xs, us, value = self._follow(nominal, lengths)
        parts = [x.chunk(count) for x in xs], [u.chunk(count) for u in us], value.chunk(count)
        return [([x[i] for x in parts[0]], [u[i] for u in parts[1]], parts[2][i]) for i in range(count)]


def _result(search: _Search, history: Tensor) -> ILQRResult:
    v = search.v

    def one(tensor: Tensor) -> Tensor:
        return tensor.to(v.x0.dtype) if v.batched else tensor[0].to(v.x0.dtype)

    trajectory = replace(
        v.trajectory(search.xs, search.us),
        costates=tuple(v.split(p, like) for p, like in zip(search.ps, v.x_like, strict=True)),
        gradients=tuple(v.split(g, like) for g, like in zip(search.gradients, v.u_like, strict=True)),
        value=one(search.value),
    )
    return ILQRResult(
        trajectory,
        tuple(one(s.K) for s in search.policy),
        search.converged if v.batched else search.converged[0],
        search.expansions,
        history if v.batched else history[:, 0],
        v,
    )
