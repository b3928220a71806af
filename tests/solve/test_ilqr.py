"""Trajectory optimisation: linear problems in one iteration, known swing-ups, networks as plants."""

import math

import pytest
import torch
from pytest import approx
from torch import nn
from torch.testing import assert_close

from bolza.core import CallableCost, TerminalCost, adjoint, maximum_principle_residuals, rollout
from bolza.core.errors import ArgumentError, ConvergenceWarning, DivergenceError, ShapeError
from bolza.solve import ilqr
from bolza.systems import LinearSystem, ODESystem, QuadraticCost, Separable, as_system
from plants import COSTS, STARTS, Pendulum, pendulum, pendulum_cost

F64 = torch.float64
ONE = torch.eye(1, dtype=F64)


def test_the_scalar_problem_has_its_known_gains_and_value_after_one_iteration():
    """x′ = x + u, ½ Σ (x² + u²) over five steps: gains are ratios of Fibonacci numbers."""
    for hessian in ("gauss-newton", "ddp"):
        result = ilqr(LinearSystem(ONE, ONE, horizon=5), QuadraticCost(ONE, ONE), ONE[0], hessian=hessian)
        expected = [-0.6179775, -0.6176471, -0.6153846, -0.6, -0.5]
        assert torch.cat(result.gains).flatten().tolist() == approx(expected, abs=0.51e-7)
        assert float(result.history[1]) == approx(144 / 89 / 2, rel=1e-15)  # 1.6179775 / 2
        assert result.iterations == 2 and bool(result.converged)  # the second only finds that it has arrived


def test_one_iteration_solves_a_random_linear_chain_to_rounding():
    g = torch.Generator().manual_seed(0)
    T, n, m = 6, 4, 3

    def draw(*shape):
        return torch.randn(*shape, dtype=F64, generator=g)

    roots = draw(T + 1, n, n), draw(T, m, m)
    Q, R = roots[0] @ roots[0].mT, roots[1] @ roots[1].mT + torch.eye(m, dtype=F64)
    system = LinearSystem(list(draw(T, n, n) / 2), list(draw(T, n, m)))
    cost, x0 = QuadraticCost(list(Q[:T]), list(R), Q[T]), draw(n)

    def total(flat):
        run = rollout(system, x0, list(flat.reshape(T, m)))
        steps = zip(run.states, run.controls, strict=False)
        return cost.terminal(run.states[-1]) + sum(cost.running(t, x, u) for t, (x, u) in enumerate(steps))

    start = draw(T * m)
    H, slope = torch.func.hessian(total)(start), torch.func.grad(total)(start)
    best = start - torch.linalg.solve(H, slope)
    result = ilqr(system, cost, x0, list(start.reshape(T, m)), iterations=1, warn=False)
    assert_close(torch.cat(result.trajectory.controls), best, rtol=0, atol=1e-12)
    # what the sweep replaces: one Newton step of each stage by itself, costates held
    blocks = [slice(t * m, (t + 1) * m) for t in range(T)]
    alone = torch.cat([start[b] - torch.linalg.solve(R[t], slope[b]) for t, b in enumerate(blocks)])
    assert total(alone) > total(start) > total(best)


def test_five_pendulums_at_once_swing_up_at_their_known_costs():
    result = ilqr(*pendulum(), STARTS, batched=True, time_invariant=True)
    assert result.value.tolist() == approx(list(COSTS), abs=1e-4)
    assert bool(result.converged.all())
    assert (result.history.diff(dim=0) <= 1e-9).all()  # never uphill
    near = [0.99 * u for u in result.trajectory.controls]
    exact = ilqr(*pendulum(), STARTS, near, batched=True, time_invariant=True, hessian="ddp")
    assert_close(exact.trajectory.controls[3], result.trajectory.controls[3], rtol=1e-7, atol=1e-7)


def test_a_batch_of_starts_is_solved_as_its_members_are():
    system, cost = Pendulum(horizon=9), pendulum_cost()
    together = ilqr(system, cost, STARTS[:2], batched=True, time_invariant=True)
    alone = ilqr(system, cost, STARTS[1])  # and step by step, without the promise of time invariance
    assert_close(together.trajectory.states[7][1], alone.trajectory.states[7], rtol=1e-8, atol=1e-8)
    assert_close(together.gains[3][1], alone.gains[3], rtol=1e-7, atol=1e-7)
    assert_close(together.trajectory.costates[0][1], alone.trajectory.costates[0], rtol=1e-6, atol=1e-6)


def test_what_it_returns_satisfies_the_maximum_principle():
    system, cost = pendulum()
    result = ilqr(system, cost, STARTS[4], time_invariant=True, tolerance=1e-12)
    residuals = maximum_principle_residuals(system, cost, result.trajectory)
    assert max(residuals.state) < 1e-12 and max(residuals.costate) < 1e-10
    assert max(residuals.stationarity) < 1e-9
    by_adjoint = adjoint(system, cost, rollout(system, STARTS[4], result.trajectory.controls))
    assert float(by_adjoint.value) == approx(float(result.value), rel=1e-14)


def test_differential_dynamic_programming_converges_quadratically_and_gauss_newton_does_not():
    """x′ = x + u + x²/2 towards a point that costs to reach: the curvature of the dynamics matters."""

    class Curved:
        horizon, controls = 4, (torch.zeros(1, dtype=F64),) * 4

        def step(self, t, x, u):
            return x + u + x.square() / 2

    cost = CallableCost(terminal=lambda x: (x + 2).square().sum(), running=lambda t, x, u: u.square().sum())

    def excess(hessian):  # of the cost, which is the square of the distance
        history = ilqr(Curved(), cost, ONE[0] / 2, hessian=hessian, iterations=12, warn=False).history
        return (history - best).clamp(min=0).tolist()

    best = ilqr(Curved(), cost, ONE[0] / 2, hessian="ddp", tolerance=1e-14, warn=False).value
    ddp, gauss_newton = excess("ddp"), excess("gauss-newton")
    orders = [math.log(b) / math.log(a) for a, b in zip(ddp, ddp[1:], strict=False) if a < 0.05 and b > 1e-14]
    assert len(orders) >= 2 and min(orders) > 1.7
    assert ddp[-1] < 1e-14 and gauss_newton[len(ddp) - 1] > 1e-12


def test_one_control_for_a_batch_of_samples_is_had_by_stacking_their_states():
    """All samples are driven by one control, as those of a network are by its weights."""
    g = torch.Generator().manual_seed(1)
    A, B = torch.randn(3, 3, dtype=F64, generator=g), torch.randn(3, 2, dtype=F64, generator=g)
    x0 = torch.randn(6, 3, dtype=F64, generator=g)
    system = LinearSystem(A, B, horizon=3)
    cost = QuadraticCost(torch.eye(3, dtype=F64), 0.1 * torch.eye(2, dtype=F64))  # the mean over samples

    def total(flat):
        run = rollout(system, x0, list(flat.reshape(3, 2)))
        return cost.terminal(run.states[-1]) + sum(
            cost.running(t, run.states[t], run.controls[t]) for t in range(3)
        )

    zero = torch.zeros(6, dtype=F64)
    best = -torch.linalg.solve(torch.func.hessian(total)(zero), torch.func.grad(total)(zero))
    result = ilqr(system, cost, x0)
    assert_close(torch.cat(result.trajectory.controls), best, rtol=1e-10, atol=1e-10)
    assert result.gains[0].shape == (2, 18)  # of the whole batch


def test_the_weights_of_a_small_network_are_controls_like_any_others():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = torch.randn(6, 2, dtype=F64)
    y = torch.sin(2 * x[:, :1])
    system, loss = as_system(net, x), TerminalCost(nn.functional.mse_loss, y)
    cost = CallableCost(
        terminal=loss.terminal,
        running=lambda t, x, u: 0.01 * sum(w.square().sum() for w in u.values()),
    )
    before = {name: p.clone() for name, p in net.named_parameters()}
    result = ilqr(system, cost, x, hessian="ddp")
    gradient = torch.cat([g.flatten() for u in result.trajectory.gradients for g in u.values()])
    assert bool(result.converged) and gradient.abs().max() < 1e-9  # a stationary point, to rounding
    assert (result.history.diff() <= 0).all() and float(result.history[-1]) < 0.2 * float(result.history[0])
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())  # the model is left alone


def test_the_policy_is_the_optimum_from_a_disturbed_state_too():
    A = torch.tensor([[1.0, 0.1], [0.0, 1.0]], dtype=F64)
    B = torch.tensor([[0.0], [0.1]], dtype=F64)
    system, cost = LinearSystem(A, B, horizon=8), QuadraticCost(torch.eye(2, dtype=F64), ONE)
    start, other = torch.tensor([1.0, 0.0], dtype=F64), torch.tensor([0.3, -0.4], dtype=F64)
    result = ilqr(system, cost, start)
    assert torch.equal(result.policy(2, result.trajectory.states[2]), result.trajectory.controls[2])
    fresh = ilqr(system, cost, other)
    assert_close(result.policy(0, other), fresh.trajectory.controls[0], rtol=1e-10, atol=1e-10)
    batch = ilqr(system, cost, torch.stack([start, other]), batched=True)
    assert_close(batch.policy(0, torch.stack([other, start]))[0], fresh.trajectory.controls[0])


def test_states_and_controls_may_be_trees():
    """A mass on a spring as a pair (q, p) through a symplectic step, and the same as one vector."""
    field = Separable(velocity=lambda s, p, u: p, force=lambda s, q, u: u["force"] - q)
    controls = [{"force": torch.zeros(1, dtype=F64)}] * 6
    pair = ODESystem(field, 6, 0.2, "leapfrog", controls)
    cost = CallableCost(
        terminal=lambda x: 10 * (x[0].square() + x[1].square()).sum(),
        running=lambda t, x, u: u["force"].square().sum(),
    )
    result = ilqr(pair, cost, (torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64)))
    assert bool(result.converged) and result.iterations == 2
    assert isinstance(result.trajectory.states[3], tuple) and set(result.trajectory.controls[0]) == {"force"}
    assert result.gains[0].shape == (1, 2)


def test_single_precision_stays_single_and_finds_the_same_cost():
    class Single(Pendulum):
        controls = property(lambda self: (torch.zeros(1),) * 20, lambda self, value: None)

    result = ilqr(Single(), pendulum_cost(), STARTS[4].float(), time_invariant=True, warn=False)
    assert result.value.dtype == result.gains[0].dtype == result.trajectory.states[1].dtype == torch.float32
    assert float(result.value) == approx(COSTS[4], rel=1e-5)


def test_stopping_early_warns_with_the_number_that_was_too_large():
    with pytest.warns(ConvergenceWarning, match=r"\|∂J/∂u\| at .* in 1 of 1 starts: raise iterations"):
        ilqr(*pendulum(), STARTS[0], iterations=1, time_invariant=True)


def test_what_does_not_fit_is_refused_by_name():
    system, cost = LinearSystem(ONE, ONE, horizon=2), QuadraticCost(ONE, ONE)
    with pytest.raises(ArgumentError, match="hessian is 'full'"):
        ilqr(system, cost, ONE[0], hessian="full")
    with pytest.raises(ArgumentError, match="iterations is 0"):
        ilqr(system, cost, ONE[0], iterations=0)
    with pytest.raises(ArgumentError, match="controls has 3 entries, but the horizon"):
        ilqr(system, cost, ONE[0], [ONE[0]] * 3)
    with pytest.raises(ShapeError, match=r"the control of step 0 .* one for each start|one for each has 2"):
        ilqr(system, cost, torch.ones(2, 1, dtype=F64), [torch.ones(3, 1, dtype=F64)] * 2, batched=True)
    uneven = LinearSystem(ONE, [ONE, torch.ones(1, 2, dtype=F64)])
    with pytest.raises(ArgumentError, match=r"time_invariant is True, but the controls have \[1, 2\]"):
        ilqr(uneven, cost, ONE[0], time_invariant=True)
    with pytest.raises(DivergenceError, match="initial controls is not finite"):
        ilqr(system, cost, ONE[0] * math.inf)
    with pytest.raises(ShapeError, match="the running cost has shape"):
        ilqr(system, CallableCost(running=lambda t, x, u: torch.ones(3)), ONE[0])


def test_a_cost_without_a_floor_is_no_solution():
    """J falls to minus infinity, and its gradient becomes small beside it."""
    system = LinearSystem(ONE, ONE, horizon=1)
    cost = CallableCost(lambda x: -x.square().sum(), lambda t, x, u: 0.1 * u.square().sum())
    with pytest.warns(ConvergenceWarning):
        result = ilqr(system, cost, ONE[0], iterations=40)
    assert not bool(result.converged) and result.value < -1e6


def test_a_slow_end_below_the_rounding_of_the_cost_still_reaches_a_tight_tolerance():
    """Gauss–Newton converges linearly here; J stands still long before the gradient does."""
    system = ODESystem(lambda s, x, u: 1.3 * x.sin() + u, horizon=4, dt=0.4, controls=[0 * ONE[0]] * 4)
    cost = CallableCost(
        lambda x: 2 * x.square().sum(), lambda t, x, u: 0.1 * u.square().sum() + 0.05 * x.square().sum()
    )
    starts = torch.tensor([[0.5], [1.2], [-2.0]], dtype=F64)
    result = ilqr(system, cost, starts, batched=True, time_invariant=True, tolerance=1e-11)
    assert bool(result.converged.all())
