"""Plants whose costs and dynamics are learned from demonstrations, and two ways to learn them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from bolza.core import CallableCost
from bolza.core.errors import DivergenceError
from bolza.solve import ILQRResult, ilqr, optimal_trajectory, trajectory_sensitivity
from bolza.solve.pdp import Problem

F64 = torch.float64
MANY: dict[str, Any] = {"batched": True, "time_invariant": True}


# ------------------------------------------------------------------------------------------- plants


@dataclass
class Pendulum:
    """(m l²/3) q̈ = u − m g l sin q − b q̇, by Euler's method."""

    theta: Tensor
    horizon: int = 20
    dt: float = 0.1

    @property
    def controls(self) -> tuple[Tensor, ...]:
        """Nothing."""
        return (self.theta.new_zeros(1),) * self.horizon

    def step(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        """State (angle, speed) after a step."""
        length, mass, friction = self.theta[0], self.theta[1], self.theta[2]
        q, speed = x[..., 0], x[..., 1]
        torque = u[..., 0] - mass * 10 * length * torch.sin(q) - friction * speed
        return x + self.dt * torch.stack([speed, torque / (mass * length**2 / 3)], -1)


@dataclass
class CartPole:
    """A pole on a cart that is pushed, by Euler's method; state (position, angle, and their speeds)."""

    theta: Tensor
    horizon: int = 30
    dt: float = 0.1

    @property
    def controls(self) -> tuple[Tensor, ...]:
        """Nothing."""
        return (self.theta.new_zeros(1),) * self.horizon

    def step(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        """State after a step."""
        cart, pole, length = self.theta[0], self.theta[1], self.theta[2]
        _, q, v, w = x.unbind(-1)
        sin, cos, force = q.sin(), q.cos(), u[..., 0]
        mass = cart + pole * sin**2
        push = (force + pole * sin * (length * w**2 + 10 * cos)) / mass
        turn = (-force * cos - pole * length * w**2 * cos * sin - (cart + pole) * 10 * sin) / (length * mass)
        return x + self.dt * torch.stack([v, w, push, turn], -1)


def tracking(weights: Tensor, goal: Tensor, effort: float) -> CallableCost:
    """Squared distance from the goal at every step and at the end, and squared control."""

    def at(x: Tensor) -> Tensor:
        return (weights * (x - goal).square()).sum()

    return CallableCost(terminal=at, running=lambda t, x, u: at(x) + effort * u.square().sum())


def _goal(like: Tensor, *values: float) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)


def pendulum(theta: Tensor) -> tuple[Pendulum, CallableCost]:
    """Pendulum that is to stand upright."""
    return Pendulum(theta), tracking(theta[3:], _goal(theta, math.pi, 0.0), 0.001)


def cart_pole(theta: Tensor) -> tuple[CartPole, CallableCost]:
    """Cart-pole that is to stand upright at the origin."""
    return CartPole(theta), tracking(theta[3:], _goal(theta, 0.0, math.pi, 0.0, 0.0), 0.1)


@dataclass(frozen=True)
class Task:
    """A plant, its true parameters, and where the demonstrations start."""

    name: str
    problem: Problem
    theta: Tensor
    starts: Tensor
    lr: float
    hessian: Literal["gauss-newton", "ddp"]  # what arrives sooner from a warm start


def _starts(angles: list[float], size: int) -> Tensor:
    x = torch.zeros(len(angles), size, dtype=F64)
    x[:, 0 if size == 2 else 1] = torch.tensor(angles, dtype=F64)
    return x


PENDULUM = Task(
    "pendulum",
    pendulum,
    torch.tensor([1.0, 1.0, 0.1, 10.0, 1.0], dtype=F64),
    _starts([0.0, -1.0, -0.5, 0.5, 1.0], 2),
    1e-5,
    "gauss-newton",
)
COSTS = (465.03276, 807.76416, 624.58537, 329.06029, 216.57206)  # of its five swing-ups
CART_POLE = Task(
    "cart-pole",
    cart_pole,
    torch.tensor([0.5, 0.5, 1.0, 1.0, 6.0, 1.0, 1.0], dtype=F64),
    _starts([0.0, -0.5, -0.25, 0.25, 0.5], 4),
    1e-4,
    "ddp",
)


# ------------------------------------------------------------------------------------------- learning


def solve(task: Task, theta: Tensor, near: ILQRResult | None = None, polish: bool = False) -> ILQRResult:
    """Optimal trajectories, from the feedback law of another solution if there is one."""
    system, cost = task.problem(theta)
    controls = None
    if near is not None:
        x, controls = task.starts, []
        for t in range(system.horizon):
            controls.append(near.policy(t, x))
            x = system.step(t, x, controls[-1])
        if not bool(torch.isfinite(x).all()):
            controls = list(near.trajectory.controls)
    found = ilqr(system, cost, task.starts, controls, iterations=40, warn=False, **MANY)
    if polish and not bool(found.converged.all()):
        found = ilqr(
            system,
            cost,
            task.starts,
            found.trajectory.controls,
            hessian="ddp",
            warn=False,
            **MANY,
        )
    return found


def flat(states: Any, controls: Any) -> Tensor:
    """All states after the first and all controls, one row a demonstration."""
    return torch.cat([*states[1:], *controls], dim=1)


def distance(run: Any, target: Any) -> Tensor:
    """Sum of squared distances, the mean over demonstrations."""
    difference = flat(run.states, run.controls) - flat(target.states, target.controls)
    return difference.square().sum() / len(difference)


@dataclass
class Learned:
    """Course of one run."""

    start: Tensor
    theta: Tensor
    losses: list[float] = field(default_factory=list)

    def error(self, task: Task) -> float:
        """Largest error of a parameter."""
        return float((self.theta - task.theta).abs().max())


def descend(
    task: Task, target: ILQRResult, start: Tensor, steps: int, report: Callable[[float], None]
) -> Learned:
    """Gradient descent as in the paper, at its learning rate."""
    run = Learned(start, start.clone())
    near = solve(task, start)
    for step in range(steps):
        report(step / steps)
        theta = run.theta.clone().requires_grad_()
        now = optimal_trajectory(
            task.problem, theta, task.starts, near.trajectory.controls, hessian=task.hessian, **MANY
        )
        loss = distance(now, target.trajectory)
        (gradient,) = torch.autograd.grad(loss, theta)
        run.losses.append(float(loss.detach()))
        run.theta = run.theta - task.lr * gradient
        near = solve(task, run.theta, near)
    run.losses.append(float(distance(near.trajectory, target.trajectory)))
    return run


def attempt(task: Task, theta: Tensor, near: ILQRResult) -> ILQRResult | None:
    """Optimal trajectories, if the parameters make sense and the plant does not run away."""
    if not bool((theta > 0).all()):
        return None
    try:
        return solve(task, theta, near, polish=True)
    except DivergenceError:
        return None


def fit(task: Task, target: ILQRResult, start: Tensor, steps: int = 25) -> Learned:
    """Levenberg–Marquardt on the residuals of all states and controls."""
    run, damping = Learned(start, start.clone()), 1e-3
    goal = flat(target.trajectory.states, target.trajectory.controls)
    near = solve(task, start, polish=True)
    residual = flat(near.trajectory.states, near.trajectory.controls) - goal
    run.losses.append(float(residual.square().sum() / len(goal)))
    for _ in range(steps):
        found = trajectory_sensitivity(task.problem, run.theta, near.trajectory, **MANY)
        J = torch.cat([*found.states[1:], *found.controls], dim=1).flatten(0, 1)
        H, slope = J.mT @ J, J.mT @ residual.flatten()
        for _ in range(8):
            trial = run.theta - torch.linalg.solve(H + damping * H.diag().diag(), slope)
            there = attempt(task, trial, near)
            if there is not None:
                moved = flat(there.trajectory.states, there.trajectory.controls) - goal
                loss = float(moved.square().sum() / len(goal))
                if loss < run.losses[-1]:
                    run.theta, near, residual, damping = trial, there, moved, damping / 10
                    run.losses.append(loss)
                    break
            damping *= 10
        else:
            break
        if run.losses[-1] < 1e-12:
            break
    return run


def guess(task: Task, seed: int, spread: float = 0.45) -> Tensor:
    """True parameters ± 0.45, as in the paper; not below 0.02, as lengths and masses are positive."""
    draw = torch.Generator().manual_seed(seed)
    away = 2 * torch.rand(len(task.theta), dtype=F64, generator=draw) - 1
    return (task.theta + spread * away).clamp(min=0.02)
