r"""What a run costs, its costates, and its Hamiltonian.

    J = Φ(x_T) + Σ_t L_t(x_t, u_t)
    H_t(x, p, u) = L_t(x, u) + ⟨p, f_t(x, u)⟩,   p_T = ∇Φ(x_T),   p_t = ∇_x H_t(x_t, p_{t+1}, u_t)

The sign is that of autograd: p_t = ∂J/∂x_t, and an optimal control *minimises* H. Papers with the
maximum convention have −p and −H. The mean over samples is taken once, inside Φ and L; costates
then carry its 1/batch, and H is summed over samples.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from bolza.core.costate_step import attach, check_costate, check_scalar, pull_back, step_back
from bolza.core.errors import ArgumentError, ShapeError
from bolza.core.minimizers import Minimizer, proximal_minimizer
from bolza.core.system import System, check_step
from bolza.core.trajectory import Trajectory
from bolza.ops.trees import (
    Tree,
    float_leaves,
    is_differentiable,
    tree_add,
    tree_dot,
    tree_map,
    tree_norm,
)

__all__ = [
    "CallableCost",
    "Cost",
    "MaximumPrincipleResiduals",
    "TerminalCost",
    "adjoint",
    "extended_hamiltonian",
    "hamiltonian",
    "hamiltonian_gap",
    "maximum_principle_residuals",
]


@runtime_checkable
class Cost(Protocol):
    """Terminal cost Φ(x_T) and running cost L_t(x, u), both scalars in the units of the loss.

    Example:
        >>> isinstance(CallableCost(terminal=lambda x: x.sum()), Cost)
        True
    """

    def terminal(self, x: Tree) -> Tensor:
        """Cost of ending at ``x``."""
        ...

    def running(self, t: int, x: Tree, u: Tree) -> Tensor | float:
        """Cost of using ``u`` at ``x`` in step ``t``."""
        ...


@dataclass(frozen=True)
class CallableCost:
    """A cost from two functions.

    Args:
        terminal: Φ(x_T) → scalar tensor; zero by default.
        running: L(t, x, u) → scalar tensor or number; zero by default.

    Example:
        >>> cost = CallableCost(terminal=lambda x: x.square().sum() / 2)
        >>> cost.terminal(torch.ones(2)), cost.running(0, None, None)
        (tensor(1.), 0.0)
    """

    terminal: Callable[[Tree], Tensor] = lambda x: torch.zeros(())
    running: Callable[[int, Tree, Tree], Tensor | float] = lambda t, x, u: 0.0


@dataclass(frozen=True)
class TerminalCost:
    """The loss of a network's output against its targets, Φ(x_T) = loss(x_T, y), and no running cost.

    Args:
        loss: (prediction, target) → scalar, the mean over samples taken inside.
        target: what the loss compares with.

    Example:
        >>> cost = TerminalCost(torch.nn.functional.mse_loss, torch.zeros(3, 1))
        >>> cost.terminal(torch.ones(3, 1))
        tensor(1.)
    """

    loss: Callable[[Any, Any], Tensor]
    target: Any

    def terminal(self, x: Tree) -> Tensor:
        """Return loss(x, target)."""
        return self.loss(x, self.target)

    def running(self, t: int, x: Tree, u: Tree) -> float:
        """Return zero."""
        return 0.0


def hamiltonian(system: System, cost: Cost, t: int, x: Tree, p: Tree, u: Tree) -> Tensor:
    r"""Discrete-time Hamiltonian H_t = L_t(x, u) + ⟨p, f_t(x, u)⟩, to be minimised over u.

    Args:
        system: dynamics f; only ``system.step(t, x, u)`` is used.
        cost: running cost L, in the units of the loss.
        t: step, ``0 <= t < system.horizon``.
        x: state of step t.
        p: costate of step t + 1, with the structure of f_t(x, u).
        u: control of step t.

    Returns:
        Scalar tensor, differentiable in x, p and u.

    Raises:
        ArgumentError: ``t`` is not a step of the system.
        ShapeError: p does not have the shape of the next state.

    Reference: Li, Chen, Tai & E (2018), *Maximum Principle Based Algorithms for Deep Learning*,
    arXiv:1710.09513. Departure: the sign of p is reversed, so that p is the gradient and H is minimised.

    Example:
        >>> from bolza.systems import LinearSystem
        >>> system = LinearSystem(torch.eye(1), torch.eye(1), horizon=1)
        >>> hamiltonian(system, CallableCost(), 0, torch.ones(1), torch.full((1,), 3.0), torch.ones(1))
        tensor(6.)
    """
    check_step(system, t)
    following = system.step(t, x, u)
    check_costate(t, p, following)
    return tree_dot(p, following) + cost.running(t, x, u)


def extended_hamiltonian(
    system: System,
    cost: Cost,
    t: int,
    x: Tree,
    p: Tree,
    u: Tree,
    *,
    following: Tree,
    costate: Tree | None = None,
    rho: float = 1.0,
    samples: int = 1,
) -> Tensor:
    r"""Hamiltonian with the price of leaving the trajectory, to be minimised over u with all else held.

        H̃_t(u) = H_t(x, p, u) + ρ/(2S) ‖x_{t+1} − f_t(x, u)‖² + ρS/2 ‖p_t − ∇_x H_t(x, p, u)‖²

    A lower H_t lowers J only as long as the new control keeps states and costates near the ones it was chosen for; the
    two further terms, both zero at the present control, see to that. With S the number of samples whose mean the cost
    takes, H̃ is the mean over samples of the extended Hamiltonian of each, whatever S is.

    Args:
        system: dynamics f.
        cost: running cost L, in the units of the loss.
        t: step, ``0 <= t < system.horizon``.
        x: state x_t.
        p: costate p_{t+1}, with the structure of f_t(x, u).
        u: control.
        following: the state x_{t+1} that the trajectory has after the step.
        costate: the costate p_t of the trajectory; without it, and for leaves that are None, the last term is left out.
        rho: weight ρ of both terms, zero or positive.
        samples: S; 1 where the cost is a sum over samples.

    Returns:
        Scalar tensor, differentiable in u.

    Raises:
        ArgumentError: ``t`` is not a step of the system, ``rho`` is negative, or ``samples`` is below 1.
        ShapeError: p or ``following`` does not have the shape of the next state.

    Reference: Li, Chen, Tai & E (2018), arXiv:1710.09513, the extended maximum principle. Departures: the sign of H
    and p is reversed, and the terms do not depend on the size of the batch.

    Example:
        >>> from bolza.systems import LinearSystem
        >>> system, one = LinearSystem(torch.eye(1), torch.eye(1), horizon=1), torch.ones(1)
        >>> far = extended_hamiltonian(system, CallableCost(), 0, one, one, 2 * one, following=2 * one, rho=4.0)
        >>> far, hamiltonian(system, CallableCost(), 0, one, one, 2 * one)  # the control is off by one
        (tensor(5.), tensor(3.))
    """
    if not (rho >= 0 and samples >= 1):
        raise ArgumentError(
            f"rho is {rho} and samples is {samples}: rho must not be negative, and samples be at least 1"
        )
    check_step(system, t)
    wanted = [leaf for leaf in float_leaves(costate) if rho] if costate is not None else []
    held = tree_map(Tensor.detach, x)
    if wanted:
        held = tree_map(Tensor.requires_grad_, held)
    with torch.enable_grad() if wanted else nullcontext():
        reached = system.step(t, tree_map(Tensor.clone, held), u)
        check_costate(t, p, reached)
        value = tree_dot(p, reached) + cost.running(t, held, u)
        if not rho:
            return value
        extended = value + rho / (2 * samples) * _squared_distance(t, following, reached)
        if wanted:
            slopes = torch.autograd.grad(
                value, float_leaves(held), create_graph=True, allow_unused=True, materialize_grads=True
            )
            gaps = [
                (slope - known).square().sum()
                for known, slope in zip(_float_or_none(held, costate), slopes, strict=True)
                if known is not None
            ]
            extended = extended + rho * samples / 2 * torch.stack(gaps).sum()
    return extended if torch.is_grad_enabled() else extended.detach()


def _float_or_none(x: Tree, costate: Tree) -> list[Tensor | None]:
    """Leaves of a costate beside those of its state that have a derivative; None stays None."""
    leaves = torch.utils._pytree.tree_leaves(x)
    kept = torch.utils._pytree.tree_leaves(costate)
    return [p for leaf, p in zip(leaves, kept, strict=True) if is_differentiable(leaf)]


def _squared_distance(t: int, following: Tree, reached: Tree) -> Tensor:
    given, found = float_leaves(following), float_leaves(reached)
    if [a.shape for a in given] != [b.shape for b in found]:
        raise ShapeError(
            f"step {t} returned a state of shape {[tuple(b.shape) for b in found]}, but following has the shape "
            f"{[tuple(a.shape) for a in given]}: they must belong to the same batch and mode of the model"
        )
    return torch.stack([(a - b).square().sum() for a, b in zip(given, found, strict=True)]).sum()


def adjoint(system: System, cost: Cost, trajectory: Trajectory, *, create_graph: bool = False) -> Trajectory:
    r"""Run the costate equation backwards: p_T = ∇Φ(x_T), p_t = ∇_x H_t(x_t, p_{t+1}, u_t).

    Each step is evaluated once more and differentiated by itself, so that memory is that of one
    step beside the stored states: back-propagation with a checkpoint at every state.

    Args:
        system: the dynamics that made the trajectory.
        cost: terminal and running cost.
        trajectory: states and controls, as :func:`~bolza.core.rollout` returns them.
        create_graph: keep the result differentiable in the states and controls; the trajectory must
            then be attached to its graph.

    Returns:
        The trajectory with ``costates`` (T+1), ``gradients`` ∂J/∂u_t (T) and ``value`` J. Leaves
        without a derivative (integers, masks) have the costate ``None``.

    Raises:
        ShapeError: the terminal cost is not a scalar, or the trajectory is not one of a rollout.

    Reference: Liu & Theodorou (2019), arXiv:1908.10920, §II; back-propagation as the adjoint: LeCun (1988).

    Example:
        >>> from bolza.core import rollout
        >>> from bolza.systems import LinearSystem
        >>> system = LinearSystem(2 * torch.eye(1), torch.eye(1), horizon=2)
        >>> run = rollout(system, torch.ones(1), [torch.zeros(1)] * 2)
        >>> adjoint(system, CallableCost(terminal=lambda x: x.sum()), run).costates
        (tensor([4.]), tensor([2.]), tensor([1.]))
    """
    if len(trajectory.states) != trajectory.horizon + 1:
        raise ShapeError(
            f"the trajectory has {len(trajectory.states)} states for {trajectory.horizon} controls: there must "
            "be one state more than controls, as rollout returns them"
        )

    with torch.enable_grad():
        last = tree_map(partial(attach, create_graph=create_graph), trajectory.states[-1])
        value = cost.terminal(last)
        check_scalar("terminal", value)
        (costate,) = pull_back([value], [None], [last], create_graph)
        costates, gradients = [costate], []
        for t in reversed(range(trajectory.horizon)):
            x, u = trajectory.states[t], trajectory.controls[t]
            costate, gradient, running = step_back(system, cost, t, x, u, costates[-1], create_graph)
            costates.append(costate)
            gradients.append(gradient)
            value = value + running
    if not create_graph:
        value = value.detach()
    return replace(
        trajectory, costates=tuple(reversed(costates)), gradients=tuple(reversed(gradients)), value=value
    )


def hamiltonian_gap(
    system: System, cost: Cost, trajectory: Trajectory, minimizer: Minimizer | None = None
) -> tuple[float, ...]:
    r"""How far each control is from minimising its Hamiltonian: H_t(u_t) − H_t(v_t) ≥ 0.

    v_t is what ``minimizer`` finds from u_t, with states and costates held. By Pontryagin's
    principle all gaps vanish at an optimum; by default the minimum is taken near u_t
    (:func:`proximal_minimizer`), so that the gap is finite and, to first order, ‖∇_u H_t‖²/ρ.

    Args:
        system: the dynamics.
        cost: the cost.
        trajectory: with states; the costates are computed if they are missing.
        minimizer: (H, u) → v with H(v) ≤ H(u).

    Returns:
        One number a step, in the units of the loss.

    Reference: Li, Chen, Tai & E (2018), arXiv:1710.09513; sign reversed.

    Example:
        >>> from bolza.core import rollout
        >>> from bolza.systems import LinearSystem
        >>> system = LinearSystem(torch.eye(1), torch.eye(1), horizon=1)
        >>> run = rollout(system, torch.zeros(1), [torch.zeros(1)])
        >>> hamiltonian_gap(system, CallableCost(terminal=lambda x: 2 * x.sum()), run)
        (4.0,)
    """
    minimizer = minimizer or proximal_minimizer()
    if trajectory.costates is None:
        trajectory = adjoint(system, cost, trajectory)
    assert trajectory.costates is not None
    gaps = []
    for t in range(trajectory.horizon):
        x, u = tree_map(Tensor.detach, trajectory.states[t]), tree_map(Tensor.detach, trajectory.controls[t])
        p = trajectory.costates[t + 1]

        def at(v: Tree, t: int = t, x: Tree = x, p: Tree = p) -> Tensor:
            return hamiltonian(system, cost, t, tree_map(Tensor.clone, x), p, v)

        better = minimizer(at, u)
        with torch.no_grad():
            gaps.append(float(at(u) - at(better)))
    return tuple(gaps)


@dataclass(frozen=True)
class MaximumPrincipleResiduals:
    """How well a trajectory satisfies Pontryagin's conditions, one number a step.

    Attributes:
        state: ‖x_{t+1} − f_t(x_t, u_t)‖.
        costate: ‖p_t − ∇_x H_t‖.
        stationarity: ‖∇_u H_t‖, zero at an interior optimum.
        terminal: ‖p_T − ∇Φ(x_T)‖.
    """

    state: tuple[float, ...]
    costate: tuple[float, ...]
    stationarity: tuple[float, ...]
    terminal: float


def maximum_principle_residuals(
    system: System, cost: Cost, trajectory: Trajectory
) -> MaximumPrincipleResiduals:
    r"""Residuals of the state, costate and stationarity conditions along a trajectory.

    Unlike :func:`adjoint`, which solves the costate equation, this takes the trajectory's states and
    costates as they are, from wherever they come, and says by how much each condition fails.

    Args:
        system: the dynamics.
        cost: the cost.
        trajectory: with states, controls and costates.

    Returns:
        MaximumPrincipleResiduals.

    Raises:
        ArgumentError: the trajectory has no costates.

    Reference: Liu & Theodorou (2019), arXiv:1908.10920, §II.

    Example:
        >>> from bolza.core import rollout
        >>> from bolza.systems import LinearSystem
        >>> system = LinearSystem(torch.eye(1), torch.eye(1), horizon=1)
        >>> cost = CallableCost(terminal=lambda x: x.sum())
        >>> run = adjoint(system, cost, rollout(system, torch.zeros(1), [torch.zeros(1)]))
        >>> maximum_principle_residuals(system, cost, run).stationarity
        (1.0,)
    """
    if trajectory.costates is None:
        raise ArgumentError(
            "the trajectory has no costates: call adjoint(system, cost, trajectory), or record them"
        )
    state, costate, stationarity = [], [], []
    for t in range(trajectory.horizon):
        piece = Trajectory(
            states=(trajectory.states[t], trajectory.states[t + 1]), controls=(trajectory.controls[t],)
        )
        p_next = trajectory.costates[t + 1]
        one_step = _OneStep(system, cost, t, p_next)
        solved = adjoint(one_step, one_step, piece)
        assert solved.costates is not None and solved.gradients is not None
        with torch.no_grad():
            following = system.step(t, tree_map(Tensor.clone, trajectory.states[t]), trajectory.controls[t])
        state.append(_distance(trajectory.states[t + 1], following))
        costate.append(_distance(trajectory.costates[t], solved.costates[0]))
        stationarity.append(
            float(tree_norm(solved.gradients[0])) if float_leaves(solved.gradients[0]) else 0.0
        )
    end = Trajectory(states=trajectory.states[-1:], controls=())
    final = adjoint(system, cost, end).costates
    assert final is not None
    return MaximumPrincipleResiduals(
        tuple(state), tuple(costate), tuple(stationarity), _distance(trajectory.costates[-1], final[0])
    )


def _distance(x: Tree, y: Tree) -> float:
    with torch.no_grad():
        return float(tree_norm(tree_add(x, y, alpha=-1.0))) if float_leaves(x) else 0.0


@dataclass(frozen=True)
class _OneStep:
    """Step t of a system as a system of its own, with terminal cost ⟨p_{t+1}, x⟩."""

    system: System
    cost: Cost
    t: int
    p: Tree
    horizon: int = 1
    controls: tuple[Tree, ...] = ()

    def step(self, t: int, x: Tree, u: Tree) -> Tree:
        return self.system.step(self.t, x, u)

    def terminal(self, x: Tree) -> Tensor:
        return tree_dot(x, self.p)

    def running(self, t: int, x: Tree, u: Tree) -> Tensor | float:
        return self.cost.running(self.t, x, u)
