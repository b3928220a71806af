"""Langevin dynamics by splitting: exact for springs, order two, one force a step."""

from math import log2, sqrt

import numpy as np
import pytest
import torch
from pytest import approx
from scipy.linalg import expm, solve_discrete_lyapunov

from bolza.core import langevin, simulate, stepper

F64 = torch.float64


def generator(seed):
    return torch.Generator().manual_seed(seed)


K, FRICTION, HEAT = 1.7, 0.8, 0.6
SPRING = langevin(lambda x: -K * x, friction=FRICTION, temperature=HEAT)


def linear_map(h, scheme="splitting"):
    """The matrix and the noise covariance of one step of the spring."""
    step = stepper(SPRING, scheme)
    zero = torch.zeros(1, dtype=F64)
    columns = [step(0.0, e.reshape(2, 1), h, zero).flatten() for e in torch.eye(2, dtype=F64)]
    q = step(0.0, torch.zeros(2, 1, dtype=F64), h, zero + 1).flatten()
    return torch.stack(columns, 1).numpy(), torch.outer(q, q).numpy()


@pytest.mark.parametrize("h", [0.1, 0.8, 1.5])
def test_splitting_keeps_the_variance_of_a_spring_exactly_at_any_step(h):
    matrix, noise = linear_map(h)
    rest = solve_discrete_lyapunov(matrix, noise)
    assert rest[0, 0] == approx(HEAT / K, rel=1e-12)


def test_the_covariance_of_splitting_converges_with_order_two_and_that_of_heun_too():
    field = np.array([[0, 1], [-K, -FRICTION]])
    rest = np.diag([HEAT / K, HEAT])
    start = np.diag([1.0, 0.2])
    flow = expm(field * 2.0)
    exact = flow @ (start - rest) @ flow.T + rest

    def error(n, scheme):
        matrix, noise = linear_map(2.0 / n, scheme)
        covariance = start
        for _ in range(n):
            covariance = matrix @ covariance @ matrix.T + noise
        return abs(covariance - exact).max()

    for scheme, order in (("splitting", 2), ("heun", 2), ("euler", 1)):
        assert log2(error(32, scheme) / error(128, scheme)) / 2 == approx(order, abs=0.1)


def test_splitting_costs_one_force_a_step():
    calls = []

    def force(x):
        calls.append(x.shape)
        return -x

    system = langevin(force, friction=1.0, temperature=1.0)
    simulate(system, torch.zeros(7, 2, 3), dt=0.1, steps=20, scheme="splitting", generator=generator(0))
    assert calls == [(7, 3)] * 21


def test_langevin_dynamics_rest_at_the_law_of_gibbs():
    """E x² in the quartic well x⁴/4 at T = 1 is 2 Γ(3/4)/Γ(1/4) = 0.675978."""
    system = langevin(lambda x: -(x**3), friction=1.0, temperature=1.0)
    x0 = torch.zeros(20_000, 2, 1, dtype=F64)
    x = simulate(system, x0, dt=0.25, steps=80, scheme="splitting", generator=generator(3))[0]
    squares = x[:, 0, 0] ** 2
    assert abs(float(squares.mean()) - 0.675978) < 4 * float(squares.std()) / sqrt(20_000)
    assert abs(float((x[:, 1] ** 2).mean()) - 1) < 4 * sqrt(2 / 20_000) + 0.02  # order h² at work in v
