"""Derivatives of optimal trajectories: closed forms, central differences, and autograd through rollouts."""

import pytest
import torch
from pytest import approx
from torch.testing import assert_close

from bolza.core import CallableCost, rollout
from bolza.core.errors import ArgumentError
from bolza.solve import ilqr, optimal_trajectory, trajectory_sensitivity
from bolza.systems import LinearSystem, QuadraticCost
from plants import COSTS, PENDULUM, STARTS, pendulum

F64 = torch.float64
ONE = torch.eye(1, dtype=F64)
TRUE = torch.tensor(PENDULUM, dtype=F64)
GUESS = TRUE + torch.tensor([0.05, -0.05, 0.02, 0.3, -0.1], dtype=F64)
FAST = {"batched": True, "time_invariant": True}


@pytest.fixture(scope="module")
def demonstrations():
    return optimal_trajectory(pendulum, TRUE, STARTS, **FAST)


def distance(run, target):
    """Sum of squared distances of all states and controls, the mean over demonstrations."""
    pairs = [*zip(run.states, target.states, strict=True), *zip(run.controls, target.controls, strict=True)]
    return sum((a - b).square().sum() for a, b in pairs) / len(run.states[0])


def imitate(theta, target, **options):
    return optimal_trajectory(pendulum, theta, STARTS, target.controls, **FAST, **options)


def test_the_trajectory_is_the_solver_s(demonstrations):
    assert demonstrations.value.tolist() == approx(list(COSTS), abs=1e-4)
    assert not demonstrations.states[1].requires_grad  # nothing asked for a derivative


def test_the_gradient_of_imitation_equals_central_differences(demonstrations):
    theta = GUESS.clone().requires_grad_()
    distance(imitate(theta, demonstrations), demonstrations).backward()
    assert theta.grad.tolist() == approx([372.85, 178.03, -35.76, 12.44, -138.65], abs=0.006)
    draw = torch.Generator().manual_seed(0)
    for _ in range(2):  # along random directions
        away = torch.randn(5, dtype=F64, generator=draw)
        up, down = (
            float(distance(imitate(GUESS + e * away, demonstrations), demonstrations)) for e in (1e-5, -1e-5)
        )
        assert (up - down) / 2e-5 == approx(float(theta.grad @ away), rel=1e-5)


def test_one_transposed_column_gives_what_a_column_for_each_parameter_gives(demonstrations):
    theta = GUESS.clone().requires_grad_()
    run = imitate(theta, demonstrations)
    loss = distance(run, demonstrations)
    (gradient,) = torch.autograd.grad(loss, theta)
    found = trajectory_sensitivity(pendulum, GUESS, run, **FAST)
    assert found.states[3].shape == (5, 2, 5) and found.controls[3].shape == (5, 1, 5)
    columns = zip(
        [*run.states, *run.controls],
        [*demonstrations.states, *demonstrations.controls],
        [*found.states, *found.controls],
        strict=True,
    )
    by_columns = sum(torch.einsum("bn,bnp->p", 2 * (a - b) / 5, X) for a, b, X in columns)
    assert_close(by_columns, gradient, rtol=1e-9, atol=1e-9)


def test_the_derivative_of_the_optimal_cost_is_that_with_the_trajectory_held(demonstrations):
    """The envelope theorem, in θ and, where it is the costate, in the first state."""
    theta, x0 = TRUE.clone().requires_grad_(), STARTS.clone().requires_grad_()
    run = optimal_trajectory(pendulum, theta, x0, demonstrations.controls, **FAST)
    run.value.sum().backward()
    assert_close(x0.grad, run.costates[0], rtol=1e-10, atol=1e-10)
    system, cost = pendulum(still := TRUE.clone().requires_grad_())
    held = rollout(system, STARTS, [u.detach() for u in run.controls])
    value = cost.terminal(held.states[-1]).sum()
    for t in range(20):  # its weight of u does not depend on θ
        value = value + cost.running(t, held.states[t], held.controls[t]).sum()
    value.backward()
    assert_close(theta.grad, still.grad, rtol=1e-6, atol=1e-6)


def test_the_weight_of_the_control_has_its_closed_form():
    """x′ = x + u for one step, r u² + x′²: u = −x/(1 + r), so du/dr = x/(1 + r)²; and du/dx = −1/(1 + r)."""

    def problem(r):
        return LinearSystem(ONE, ONE, horizon=1), QuadraticCost(ONE, r * ONE)

    r, x0 = (
        torch.tensor(0.7, dtype=F64, requires_grad=True),
        torch.tensor([1.3], dtype=F64, requires_grad=True),
    )
    run = optimal_trajectory(problem, r, x0)
    run.controls[0].sum().backward()
    assert float(r.grad) == approx(1.3 / 1.7**2, rel=1e-12) and float(x0.grad) == approx(-1 / 1.7, rel=1e-12)
    columns = trajectory_sensitivity(problem, r, run)
    assert float(columns.controls[0]) == approx(1.3 / 1.7**2, rel=1e-12)


def test_linear_quadratic_derivatives_equal_autograd_through_the_dense_solution():
    """Many steps, parameters in the dynamics, a dict of them, in a problem that changes with t."""
    g = torch.Generator().manual_seed(0)
    theta = {name: torch.randn(2, 2, dtype=F64, generator=g) / 2 for name in ("A", "root")}
    x0 = torch.randn(2, dtype=F64, generator=g)
    B = torch.randn(2, 1, dtype=F64, generator=g)

    def problem(theta):
        eye = torch.eye(2, dtype=F64)
        A = [(1 + t / 4) * theta["A"] for t in range(3)]
        return LinearSystem(A, B), QuadraticCost(theta["root"] @ theta["root"].mT + eye, 0.3 * ONE)

    def dense(A, root):
        system, cost = problem({"A": A, "root": root})

        def total(flat):
            run = rollout(system, x0, list(flat[:, None]))
            return cost.terminal(run.states[-1]) + sum(
                cost.running(t, run.states[t], run.controls[t]) for t in range(3)
            )

        zero = torch.zeros(3, dtype=F64)
        return -torch.linalg.solve(torch.func.hessian(total)(zero), torch.func.grad(total)(zero))

    weights = torch.randn(3, dtype=F64, generator=g)
    leaves = [leaf.clone().requires_grad_() for leaf in theta.values()]
    expected = torch.autograd.grad(weights @ dense(*leaves), leaves)
    run = optimal_trajectory(problem, dict(zip(theta, leaves, strict=True)), x0)
    found = torch.autograd.grad(weights @ torch.cat(run.controls), leaves)
    assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_held_controls_give_the_sensitivity_of_identification(demonstrations):
    found = trajectory_sensitivity(pendulum, GUESS, rolled(GUESS, demonstrations), controls="held", **FAST)

    def last(theta):
        return rolled(theta, demonstrations).states[-1]

    assert_close(found.states[-1], torch.func.jacrev(last)(GUESS), rtol=1e-10, atol=1e-10)
    assert not found.controls[0].any()


def rolled(theta, demonstrations):
    return rollout(pendulum(theta)[0], STARTS, demonstrations.controls)


def test_a_policy_gives_the_sensitivity_of_planning():
    """A linear feedback law whose gains are the parameters, through the nonlinear plant."""

    def problem(theta):
        return pendulum()

    def policy(x, theta):
        return (theta * x).sum(-1, keepdim=True)

    def closed(theta):
        x, xs, us = STARTS[1], [STARTS[1]], []
        for t in range(20):
            us.append(policy(x, theta))
            x = pendulum()[0].step(t, x, us[-1])
            xs.append(x)
        return xs, us

    theta = torch.tensor([-0.8, -0.3], dtype=F64)
    run = rollout(pendulum()[0], STARTS[1], closed(theta)[1])
    found = trajectory_sensitivity(problem, theta, run, controls=policy, time_invariant=True)
    assert_close(
        found.states[-1], torch.func.jacrev(lambda th: closed(th)[0][-1])(theta), rtol=1e-9, atol=1e-9
    )
    assert_close(
        found.controls[7], torch.func.jacrev(lambda th: closed(th)[1][7])(theta), rtol=1e-9, atol=1e-9
    )


def test_a_trajectory_that_is_no_strict_optimum_has_no_derivative():
    """The control is free, and the end does not care."""

    def problem(theta):
        free = CallableCost(terminal=lambda x: theta * x[0], running=lambda t, x, u: 0.0)
        return LinearSystem(ONE, ONE, horizon=2), free

    theta = torch.tensor(0.0, dtype=F64, requires_grad=True)
    run = optimal_trajectory(problem, theta, ONE[0])
    with pytest.raises(ArgumentError, match="no strict local optimum"):
        run.states[-1].sum().backward()


def test_what_does_not_fit_is_refused_by_name():
    run = rollout(LinearSystem(ONE, ONE, horizon=1), ONE[0])

    def problem(r):
        return LinearSystem(ONE, ONE, horizon=1), QuadraticCost(ONE, r * ONE)

    with pytest.raises(ArgumentError, match="has no costates"):
        trajectory_sensitivity(problem, ONE[0], run)
    with pytest.raises(ArgumentError, match="controls is 'free'"):
        trajectory_sensitivity(problem, ONE[0], run, controls="free")
    found = ilqr(*problem(ONE), ONE[0]).trajectory
    run_parameter = ONE.clone().requires_grad_()
    run = optimal_trajectory(problem, run_parameter, ONE[0], found.controls)
    (gradient,) = torch.autograd.grad(run.value.square(), run_parameter, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
