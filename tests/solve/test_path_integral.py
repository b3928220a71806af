"""Kullback–Leibler control, against the linear-quadratic closed form and quadrature."""

import math

import pytest
import torch
from pytest import approx

from bolza.core import CallableCost
from bolza.core.errors import ArgumentError, DivergenceError, ShapeError
from bolza.solve import linear_kl_control, path_integral_policy
from bolza.systems import LinearSystem, ODESystem

F = torch.float64
I = torch.eye(1, dtype=F)  # noqa: E741
SYSTEM = LinearSystem(1.1 * I, I, horizon=8)
COST = CallableCost(lambda x: x.square().sum() / 2, lambda t, x, u: 0.15 * x.square().sum())
EXACT = linear_kl_control(1.1 * I, I, 0.3 * I, I, 0.4 * I, 8)
X0 = torch.tensor([1.5], dtype=F)


def sampled(samples, seed=0, x0=X0, **options):
    generator = torch.Generator().manual_seed(seed)
    return path_integral_policy(SYSTEM, COST, x0, 0.4 * I, samples=samples, generator=generator, **options)


def test_the_scalar_problem_has_its_known_value_and_policy():
    assert float(EXACT.value(0, X0)) == approx(3.18351, abs=5e-6)
    assert float(-EXACT.K[0] @ X0) == approx(-0.5835, abs=5e-5)
    assert float(EXACT.covariance[0]) == approx(0.2585, abs=5e-5)


def test_the_exact_value_satisfies_the_log_mean_exp_recursion():
    nodes, weights = torch.linspace(-8, 8, 4001, dtype=F), None
    weights = torch.exp(-(nodes**2) / 0.8)
    weights /= weights.sum()  # N(0, 0.4) by the trapezoid rule, exact to rounding
    for t in (0, 3, 7):
        following = EXACT.value(t + 1, (1.1 * X0 + nodes)[:, None])
        right = 0.15 * X0.square() - torch.log((weights * torch.exp(-following)).sum())
        assert float(EXACT.value(t, X0)) == approx(float(right), abs=1e-10)


def test_a_problem_of_several_inputs_satisfies_the_identity_of_value_and_cost():
    """V(x) is the cost of the optimal law plus λ times its divergence from the reference, at one step."""
    g = torch.Generator().manual_seed(3)
    A, B = torch.randn(3, 3, generator=g, dtype=F), torch.randn(3, 2, generator=g, dtype=F)
    S = torch.tensor([[0.5, 0.2], [0.2, 0.9]], dtype=F)
    Q, lam = torch.eye(3, dtype=F), 0.7
    exact = linear_kl_control(A, B, 0.1 * Q, Q, S, 1, temperature=lam)
    x = torch.tensor([0.3, -1.0, 0.5], dtype=F)
    mean, cov = -exact.K[0] @ x, exact.covariance[0]
    after = A @ x + B @ mean
    cost = 0.05 * x @ x + 0.5 * after @ after + 0.5 * torch.trace(B @ cov @ B.mT)
    inverse = torch.linalg.inv(S)
    kl = 0.5 * (torch.trace(inverse @ cov) - 2 + mean @ inverse @ mean + torch.logdet(S) - torch.logdet(cov))
    assert float(exact.value(0, x)) == approx(float(cost + lam * kl), rel=1e-10)


def test_sampled_values_have_the_exact_mean_within_their_error_bars():
    found = sampled(4000, x0=X0.expand(60, 1))
    bias = found.error.square().mean() / 2  # of a log, to second order
    z = (found.value.mean() - EXACT.value(0, X0) - bias) / (found.value.std() / 60**0.5)
    assert abs(float(z)) < 4
    assert float(found.error.mean()) == approx(float(found.value.std()), rel=0.35)


def test_the_spread_of_the_value_falls_as_one_over_the_root_of_the_samples():
    spreads = [float(sampled(m, x0=X0.expand(150, 1)).value.std()) for m in (250, 4000)]
    assert math.log(spreads[1] / spreads[0]) / math.log(16) == approx(-0.5, abs=0.1)


def test_policy_mean_and_variance_are_those_of_the_closed_form():
    found = sampled(100_000)
    assert float(found.mean[0, 0]) == approx(float(-EXACT.K[0] @ X0), abs=0.02)
    assert float(found.covariance) == approx(float(EXACT.covariance[0]), abs=0.01)


def test_drawing_around_a_nominal_leaves_the_answer_and_further_passes_even_the_weights():
    wrong = torch.full((8, 1), 0.3, dtype=F)
    off = sampled(20_000, nominal=wrong)
    assert abs(float(off.value - EXACT.value(0, X0))) < 5 * float(off.error)
    once, thrice = sampled(4000), sampled(4000, iterations=3)
    assert float(thrice.effective_samples) > 2 * float(once.effective_samples)
    assert thrice.costs.shape == (3,) and float(thrice.costs[-1]) < float(thrice.costs[0])
    assert abs(float(thrice.value - EXACT.value(0, X0))) < 4 * float(thrice.error)


def test_scaling_cost_and_temperature_together_scales_the_value_and_keeps_the_policy():
    cost = CallableCost(lambda x: 5 * COST.terminal(x), lambda t, x, u: 5 * COST.running(t, x, u))
    scaled = path_integral_policy(
        SYSTEM, cost, X0, 0.4 * I, samples=500, temperature=5.0, generator=torch.Generator().manual_seed(0)
    )
    plain = sampled(500)
    torch.testing.assert_close(scaled.value, 5 * plain.value)
    torch.testing.assert_close(scaled.mean, plain.mean)


def test_a_nonlinear_system_agrees_with_quadrature():
    """One step of a bistable system: everything is one integral over the input."""
    system = ODESystem(lambda s, x, u: x - x**3 + u, horizon=1, dt=0.5)
    cost = CallableCost(lambda x: 3 * (x - 1).square().sum(), lambda t, x, u: x.square().sum())
    x0 = torch.tensor([-0.5], dtype=F)
    found = path_integral_policy(
        system, cost, x0, I, samples=50_000, generator=torch.Generator().manual_seed(0)
    )
    u = torch.linspace(-9, 9, 8001, dtype=F)
    tilted = torch.exp(-(u**2) / 2 - 3 * (x0 + 0.5 * (x0 - x0**3 + u) - 1).square())
    value = 0.25 - torch.log(tilted.sum() / torch.exp(-(u**2) / 2).sum())
    assert abs(float(found.value - value)) < 4 * float(found.error)
    assert float(found.mean[0, 0]) == approx(float((u * tilted).sum() / tilted.sum()), abs=0.03)


def test_planning_from_a_later_step_solves_the_rest_of_the_problem():
    late = sampled(20_000, start=6)
    assert late.mean.shape == (2, 1)
    assert abs(float(late.value - EXACT.value(6, X0))) < 4 * float(late.error)


def test_bad_arguments_are_named():
    with pytest.raises(ArgumentError, match="covariance"):
        path_integral_policy(SYSTEM, COST, X0, 0 * I)
    with pytest.raises(ArgumentError, match="start=8"):
        sampled(10, start=8)
    with pytest.raises(ShapeError, match="nominal"):
        sampled(10, nominal=torch.zeros(3, 1, dtype=F))
    with pytest.raises(DivergenceError, match="no path"):
        bad = CallableCost(lambda x: x.sum() * math.nan)
        path_integral_policy(SYSTEM, bad, X0, I, samples=4)
    with pytest.raises(ArgumentError, match="temperature"):
        linear_kl_control(I, I, I, I, I, 2, temperature=0.0)


def test_paths_of_infinite_cost_carry_no_weight_and_none_left_is_an_error():
    one = torch.eye(1)
    system, draw = LinearSystem(one, one, horizon=1), torch.Generator().manual_seed(0)
    half = CallableCost(lambda x: torch.where(x[0] > 0, math.inf, 0.0))
    found = path_integral_policy(system, half, torch.zeros(1), one, samples=4000, generator=draw)
    assert float(found.value) == approx(math.log(2), abs=0.06)
    with pytest.raises(DivergenceError):
        path_integral_policy(system, CallableCost(lambda x: math.inf + x.sum()), torch.zeros(1), one)
    with pytest.raises(ArgumentError, match="temperature"):
        path_integral_policy(system, half, torch.zeros(1), one, temperature=math.inf)
