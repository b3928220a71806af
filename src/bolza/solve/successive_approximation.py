r"""Successive approximation of the maximum principle (Krylov & Chernous'ko; Li, Chen, Tai & E), for any system.

    forward     x_{t+1} = f_t(x_t, u_t)
    backward    p_T = ∇Φ(x_T),  p_t = ∇_x H_t(x_t, p_{t+1}, u_t)
    minimise    u_t ← argmin_v H̃_t(v)      for every t, with states and costates held

With ρ = 0, H̃ is the Hamiltonian, and the method diverges where its minimiser lies far off. With ρ > 0 it is the
extended one (:func:`~bolza.core.extended_hamiltonian`), which prices the change of states and costates; ρ is found by
trial: doubled when J has grown, which is then undone, and halved when it has fallen.

Reference: Li, Chen, Tai & E (2018), *Maximum Principle Based Algorithms for Deep Learning*, arXiv:1710.09513,
algorithms 1 and 2; the error bound behind it in discrete time: Li & Hao (2018), arXiv:1803.01299.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bolza.core import (
    Cost,
    Minimizer,
    Reference,
    System,
    Trajectory,
    adjoint,
    cites,
    extended_hamiltonian,
    hamiltonian,
    lbfgs_minimizer,
    rollout,
)
from bolza.core.errors import ArgumentError
from bolza.ops.trees import Tree, float_leaves, tree_add, tree_map, tree_norm

__all__ = [
    "SuccessiveApproximation",
    "Sweep",
    "hamiltonian_sweep",
    "infeasibility",
    "successive_approximation",
]

REFERENCE = Reference(
    "li2018msa",
    "Li, Qianxiao and Chen, Long and Tai, Cheng and E, Weinan",
    "Maximum Principle Based Algorithms for Deep Learning",
    2018,
    venue="Journal of Machine Learning Research",
    arxiv="1710.09513",
)
CHERNOUSKO = Reference(
    "chernousko1982method",
    "Chernousko, F. L. and Lyubushin, A. A.",
    "Method of successive approximations for solution of optimal control problems",
    1982,
    venue="Optimal Control Applications and Methods",
)


@cites(REFERENCE)
def hamiltonian_sweep(
    system: System,
    cost: Cost,
    trajectory: Trajectory,
    minimizer: Minimizer,
    *,
    rho: float = 0.0,
    samples: int = 1,
) -> tuple[Tree, ...]:
    r"""Controls that minimise the Hamiltonian of each step, with states and costates held.

        v_t = argmin_v H_t(x_t, p_{t+1}, v) + ρ/(2S)‖x_{t+1} − f_t(x_t, v)‖² + ρS/2‖p_t − ∇_x H_t(x_t, p_{t+1}, v)‖²

    The steps know of each other only through the trajectory, so that their order does not matter. The costate of the
    initial state steers nothing, and its term is left out.

    Args:
        system: the dynamics.
        cost: terminal and running cost.
        trajectory: with states; the costates are computed if they are missing.
        minimizer: (H, u) → v, see :mod:`bolza.core.minimizers`.
        rho: weight ρ of the feasibility terms.
        samples: number S of samples whose mean the cost takes; 1 where it is a sum, or there is one.

    Returns:
        One control a step.

    Example:
        >>> from bolza.core import CallableCost, gradient_minimizer
        >>> from bolza.systems import LinearSystem
        >>> system = LinearSystem(torch.eye(1), torch.eye(1), horizon=2)
        >>> run = rollout(system, torch.ones(1))
        >>> hamiltonian_sweep(system, CallableCost(terminal=lambda x: x.sum()), run, gradient_minimizer(0.5))
        (tensor([-0.5000]), tensor([-0.5000]))
    """
    if trajectory.costates is None:
        trajectory = adjoint(system, cost, trajectory)
    assert trajectory.costates is not None
    found = []
    for t, u in enumerate(trajectory.controls):
        x, following = (tree_map(Tensor.detach, trajectory.states[s]) for s in (t, t + 1))
        p, costate = trajectory.costates[t + 1], trajectory.costates[t] if t else None

        def price(
            v: Tree,
            t: int = t,
            x: Tree = x,
            following: Tree = following,
            p: Tree = p,
            costate: Tree = costate,
        ) -> Tensor:
            return extended_hamiltonian(
                system, cost, t, x, p, v, following=following, costate=costate, rho=rho, samples=samples
            )

        found.append(minimizer(price, tree_map(Tensor.detach, u)))
    return tuple(found)


def infeasibility(
    system: System, cost: Cost, trajectory: Trajectory, controls: Sequence[Tree], samples: int = 1
) -> float:
    r"""How far new controls leave the states and costates for which they were chosen.

        Σ_t ‖x_{t+1} − f_t(x_t, v_t)‖²/S + S‖p_t − ∇_x H_t(x_t, p_{t+1}, v_t)‖²

    It is what the error bound of successive approximation charges against the fall of the Hamiltonian.

    Args:
        system: the dynamics.
        cost: the cost.
        trajectory: with states and costates.
        controls: new controls, one a step.
        samples: number S of samples whose mean the cost takes.

    Returns:
        A number; zero if the controls are those of the trajectory.

    Raises:
        ArgumentError: the trajectory has no costates.

    Example:
        >>> from bolza.core import CallableCost
        >>> from bolza.systems import LinearSystem
        >>> system, cost = LinearSystem(torch.eye(1), torch.eye(1), horizon=1), CallableCost()
        >>> run = adjoint(system, cost, rollout(system, torch.zeros(1)))
        >>> infeasibility(system, cost, run, [torch.full((1,), 3.0)])
        9.0
    """
    if trajectory.costates is None:
        raise ArgumentError("the trajectory has no costates: call adjoint(system, cost, trajectory) first")
    total = 0.0
    for t, v in enumerate(controls):
        x, p = tree_map(Tensor.detach, trajectory.states[t]), trajectory.costates[t + 1]
        with torch.no_grad():
            far, near = (
                extended_hamiltonian(
                    system,
                    cost,
                    t,
                    x,
                    p,
                    v,
                    following=trajectory.states[t + 1],
                    costate=trajectory.costates[t] if t else None,
                    rho=rho,
                    samples=samples,
                )
                for rho in (2.0, 0.0)
            )
        total += float(far - near)
    return total


@dataclass(frozen=True)
class Sweep:
    """One sweep of successive approximation.

    Attributes:
        value: the cost J of the controls that it found.
        rho: weight of the feasibility terms.
        accepted: whether the iteration went on from these controls.
        hamiltonian_change: Σ_t H_t(v_t) − H_t(u_t), what the sweep promised; never positive for a minimiser.
        infeasibility: by how much states and costates changed, see :func:`infeasibility`.
        control_change: ‖v − u‖ over all steps.
    """

    value: float
    rho: float
    accepted: bool
    hamiltonian_change: float
    infeasibility: float
    control_change: float


@dataclass(frozen=True)
class SuccessiveApproximation:
    """What successive approximation found.

    Attributes:
        controls: the best controls that were met.
        trajectory: their states and costates.
        value: their cost J.
        start: the cost of the first controls.
        sweeps: one record a sweep.
        converged: whether the controls stopped changing.
    """

    controls: tuple[Tree, ...]
    trajectory: Trajectory
    value: float
    start: float
    sweeps: tuple[Sweep, ...]
    converged: bool

    @property
    def values(self) -> tuple[float, ...]:
        """The cost at the start and after every sweep, rejected ones included."""
        return (self.start, *(one.value for one in self.sweeps))


@cites(REFERENCE, CHERNOUSKO)
def successive_approximation(
    system: System,
    cost: Cost,
    x0: Tree,
    controls: Sequence[Tree] | None = None,
    *,
    minimizer: Minimizer | None = None,
    rho: float = 0.0,
    adapt: bool = False,
    samples: int = 1,
    iterations: int = 20,
    tolerance: float = 1e-9,
    progress: Callable[[int, Sweep], None] | None = None,
) -> SuccessiveApproximation:
    r"""Solve an optimal control problem by successive approximation of the maximum principle.

    ``rho=0`` is the basic method, ``rho>0`` the extended one. With ``adapt`` a sweep is kept only if it lowers J: then
    ρ is halved, otherwise doubled and the sweep repeated from where it began, so that J falls monotonically. Without
    it every sweep is kept, whatever it does; the best controls are returned in either case.

    Cost: a forward and a backward pass a sweep, and the evaluations of one step at a time that the minimiser asks for,
    ten to twenty for L-BFGS, each with second derivatives where ρ > 0.

    Args:
        system: the dynamics. Where several steps share a parameter (tied weights), each gets a control of its own.
        cost: terminal and running cost.
        x0: initial state, samples first.
        controls: where to start; the system's own controls by default, which are not changed.
        minimizer: (H, u) → v; ten iterations of L-BFGS by default.
        rho: weight ρ of the feasibility terms; zero or positive.
        adapt: accept or reject by the true cost. Starting from ρ = 0, the first rejection sets ρ to 1.
        samples: number S of samples whose mean the cost takes, so that ρ means the same for every S; 1 for a sum.
        iterations: largest number of sweeps, rejected ones included.
        tolerance: stop when ‖v − u‖ ≤ tolerance · (1 + ‖u‖).
        progress: called after each sweep with its number and record.

    Returns:
        The best controls, their trajectory, and a record of every sweep.

    Raises:
        ArgumentError: ``rho`` or ``tolerance`` is negative, ``iterations`` or ``samples`` is below 1, or the cost at
            the start is not finite.

    Example:
        >>> from bolza.core import quadratic_minimizer
        >>> from bolza.systems import LinearSystem, QuadraticCost
        >>> eye = torch.eye(1, dtype=torch.float64)
        >>> system = LinearSystem(eye, eye, horizon=5)
        >>> found = successive_approximation(system, QuadraticCost(eye, eye), torch.ones(1, dtype=torch.float64),
        ...                                  minimizer=quadratic_minimizer(), rho=8.0, adapt=True,
        ...                                  iterations=60)
        >>> round(found.value, 6)  # half the solution of the Riccati equation
        0.808989
    """
    if not (rho >= 0 and tolerance >= 0 and iterations >= 1 and samples >= 1):
        raise ArgumentError(
            f"rho={rho}, tolerance={tolerance}, iterations={iterations}, samples={samples}: rho and tolerance must not "
            "be negative, iterations and samples at least 1"
        )
    minimizer = minimizer or lbfgs_minimizer()
    present = _solved(system, cost, x0, system.controls if controls is None else controls)
    value = start = _number(present)
    if not math.isfinite(value):
        raise ArgumentError(
            f"the cost at the start is {value}: give controls under which the system stays finite"
        )
    best, least = present, value
    sweeps: list[Sweep] = []
    converged = False
    for k in range(iterations):
        found = hamiltonian_sweep(system, cost, present, minimizer, rho=rho, samples=samples)
        following = _solved(system, cost, x0, found)
        reached = _number(following)
        # not-a-number compares false, and is rejected
        accepted = reached < value if adapt else math.isfinite(reached)
        change = math.sqrt(
            sum(
                float(tree_norm(tree_add(v, u, alpha=-1.0))) ** 2
                for v, u in zip(found, present.controls, strict=True)
                if float_leaves(u)
            )
        )
        size = math.sqrt(sum(float(tree_norm(u)) ** 2 for u in present.controls if float_leaves(u)))
        sweeps.append(
            Sweep(
                reached,
                rho,
                accepted,
                _promise(system, cost, present, found),
                infeasibility(system, cost, present, found, samples),
                change,
            )
        )
        if progress is not None:
            progress(k, sweeps[-1])
        converged = change <= tolerance * (1 + size)
        if accepted:
            present, value = following, reached
            if value < least:
                best, least = present, value
        if converged or not (accepted or adapt):
            break
        if adapt:
            rho = rho / 2 if accepted else 2 * rho or 1.0
    return SuccessiveApproximation(best.controls, best, least, start, tuple(sweeps), converged)


def _solved(system: System, cost: Cost, x0: Tree, controls: Sequence[Tree]) -> Trajectory:
    controls = tuple(tree_map(lambda leaf: leaf.detach().clone(), u) for u in controls)
    with torch.no_grad():
        run = rollout(system, x0, controls)
    return adjoint(system, cost, run)


def _number(trajectory: Trajectory) -> float:
    assert trajectory.value is not None
    return float(trajectory.value)


def _promise(system: System, cost: Cost, trajectory: Trajectory, controls: Sequence[Tree]) -> float:
    assert trajectory.costates is not None
    total = 0.0
    with torch.no_grad():
        for t, (u, v) in enumerate(zip(trajectory.controls, controls, strict=True)):
            x, p = trajectory.states[t], trajectory.costates[t + 1]
            new, old = (
                hamiltonian(system, cost, t, tree_map(Tensor.clone, x), p, control) for control in (v, u)
            )
            total += float(new - old)
    return total
