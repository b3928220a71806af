"""Plants with known optima, for the tests of the solvers."""

import math

import torch
from torch import Tensor

from bolza.core import CallableCost

F64 = torch.float64
PENDULUM = (1.0, 1.0, 0.1, 10.0, 1.0)  # length, mass, friction, weights of angle and speed


class Pendulum:
    """q̈ = (u − m g l sin q − b q̇) / (m l²/3) by Euler's method, from hanging to upright."""

    def __init__(self, theta=PENDULUM, horizon=20, dt=0.1):
        self.theta, self.horizon, self.dt = theta, horizon, dt
        self.controls = (torch.zeros(1, dtype=F64),) * horizon

    def step(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        length, mass, friction = self.theta[0], self.theta[1], self.theta[2]
        q, speed = x[..., 0], x[..., 1]
        torque = u[..., 0] - mass * 10 * length * torch.sin(q) - friction * speed
        return torch.stack([q + self.dt * speed, speed + self.dt * torque / (mass * length**2 / 3)], -1)


def pendulum_cost(theta=PENDULUM, control=0.001):
    """Quadratic distance from upright and at rest, summed over the steps and the end."""

    def at(x):
        return theta[3] * (x[..., 0] - math.pi) ** 2 + theta[4] * x[..., 1] ** 2

    return CallableCost(terminal=at, running=lambda t, x, u: at(x) + control * u.square().sum())


def pendulum(theta=PENDULUM):
    """Dynamics and cost of the same parameters."""
    return Pendulum(theta), pendulum_cost(theta)


ANGLES = (0.0, -1.0, -0.5, 0.5, 1.0)
COSTS = (465.03276, 807.76416, 624.58537, 329.06029, 216.57206)  # optimal, from these angles at rest
STARTS = torch.tensor([[angle, 0.0] for angle in ANGLES], dtype=F64)
