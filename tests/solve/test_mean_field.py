"""One control for a population, against the closed form of the scalar problem and gradient optima."""

import math

import pytest
import torch
from pytest import approx

from bolza.core import CallableCost, adjoint, rollout
from bolza.core.errors import ArgumentError, DivergenceError, ShapeError
from bolza.solve import linear_mean_field, mean_field_control
from bolza.systems import ODESystem

F = torch.float64


def drift(x, u):
    return u.expand_as(x)


def half_square(x, y):
    return (x - y).square().sum(-1) / 2


def saturated(x, u):
    return torch.tanh(u * x)


def square(x, y):
    return (x - y).square().sum(-1)


def scalar(z, weight=0.25, **options):
    z = torch.as_tensor(z, dtype=F)[:, None]
    start = options.pop("theta", torch.zeros(10, 1, dtype=F))
    return mean_field_control(drift, half_square, torch.zeros_like(z), z, start, weight=weight, **options)


def modes(samples, seed=0):
    g = torch.Generator().manual_seed(seed)
    side = torch.where(torch.arange(samples) % 2 == 0, 1.0, -1.0).to(F)
    return (side + 0.4 * (torch.rand(samples, generator=g, dtype=F) - 0.5))[:, None], 2 * side[:, None]


def test_the_worked_example_of_the_scalar_problem():
    """λ = ½ in ½λθ², T = 1, mean 1.3, deviation 0.7."""
    z = torch.tensor([0.6, 2.0], dtype=F)
    exact = linear_mean_field(z, 0.25)
    assert float(exact.theta) == approx(0.866667, abs=1e-6)
    assert float(exact.value) == approx(0.526667, abs=1e-6)
    hundred = linear_mean_field(z.repeat(50), 0.25)
    assert float(hundred.deviation) == approx(0.046667, abs=1e-6)
    found = scalar(z, damping=0.3, iterations=30, tolerance=1e-10)
    torch.testing.assert_close(found.theta, exact.theta.expand(10, 1), rtol=0, atol=1e-9)
    assert found.value == approx(float(exact.value), abs=1e-9) and found.converged


@pytest.mark.parametrize(("damping", "multiplier"), [(1.0, -2.0), (0.5, -0.5), (1 / 3, 0.0), (0.25, 0.25)])
def test_each_iteration_multiplies_the_residual_by_the_known_factor(damping, multiplier):
    """θ ← (z̄ − Tθ)/(2λ) has the multiplier −T/(2λ) = −2; damping d makes it 1 − d(1 + 2)."""
    found = scalar([0.6, 2.0], damping=damping, iterations=5, tolerance=1e-14)
    if multiplier == 0:
        assert found.residuals[1] < 1e-12
    else:
        for before, after in zip(found.residuals[:4], found.residuals[1:], strict=False):
            assert after / before == approx(abs(multiplier), rel=1e-6)


def test_the_value_solves_the_hamilton_jacobi_bellman_equation_on_measures():
    z, weight, time, t = torch.tensor([0.2, -1.0, 3.0, 0.7], dtype=F), 0.4, 1.5, 0.3
    found = linear_mean_field(z, weight, time=time, t=t)
    at_t, at_z = (torch.tensor(t, dtype=F).requires_grad_(), z.clone().requires_grad_())
    left = 2 * weight + time - at_t
    value = weight / left * at_z.mean().square() + (at_z - at_z.mean()).square().mean() / 2
    by_t, by_z = torch.autograd.grad(value, (at_t, at_z))
    lions = -len(z) * by_z  # in x = y − z, times the number of samples: the derivative on measures
    torch.testing.assert_close(lions, found.gradient)
    theta = torch.linspace(-3, 3, 100_001, dtype=F)
    infimum = (weight * theta**2 + found.gradient.mean() * theta).min()
    assert float(by_t + infimum.detach()) == approx(0, abs=1e-8)
    assert float(value.detach()) == approx(float(found.value), rel=1e-12)


def test_the_control_from_samples_scatters_as_one_over_the_root_of_their_number():
    g = torch.Generator().manual_seed(0)
    z = 1.3 + 0.7 * torch.randn(2000, 100, generator=g, dtype=F)
    thetas = torch.stack([linear_mean_field(row, 0.25).theta for row in z])
    # the deviation of 2000 estimates is known to 1/√4000
    assert float(thetas.std()) == approx(0.7 / 10 / 1.5, rel=4 / 4000**0.5)


def test_the_fixed_point_is_a_minimum_of_the_cost_and_falls_in_depth():
    x, y = modes(60)
    found = mean_field_control(
        saturated, square, x, y, torch.ones(10, 1, dtype=F), weight=0.1, damping=0.5, tolerance=1e-7
    )
    theta = torch.ones(10, 1, dtype=F, requires_grad=True)
    solver = torch.optim.LBFGS([theta], max_iter=100, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def cost(at):
        end = x
        for u in at:
            end = end + 0.1 * saturated(end, u)
        return square(end, y).mean() + 0.1 * 0.1 * at.square().sum()

    def closure():
        solver.zero_grad()
        loss = cost(theta)
        loss.backward()
        return loss

    solver.step(closure)
    torch.testing.assert_close(found.theta, theta.detach(), rtol=0, atol=1e-5)
    assert found.value == approx(float(cost(theta.detach())), abs=1e-10)
    assert bool((found.theta.diff(dim=0) < 0).all())


def test_costates_are_those_of_the_adjoint_of_the_same_system():
    x, y = modes(6)
    theta = torch.linspace(1.2, 0.8, 5, dtype=F)[:, None]
    found = mean_field_control(saturated, square, x, y, theta, weight=1e6, iterations=1, damping=1e-12)
    system = ODESystem(lambda s, at, u: saturated(at, u), horizon=5, dt=0.2, controls=tuple(found.theta))
    run = adjoint(system, CallableCost(lambda end: square(end, y).sum()), rollout(system, x))
    torch.testing.assert_close(found.states, torch.stack(run.states))
    torch.testing.assert_close(found.costates, torch.stack(run.costates))


def test_a_larger_weight_contracts_faster():
    x, y = modes(100)
    rates = []
    for weight in (1.0, 4.0):
        r = mean_field_control(
            saturated, square, x, y, torch.ones(10, 1, dtype=F), weight=weight, iterations=6, tolerance=1e-14
        ).residuals
        rates.append((r[5] / r[2]) ** (1 / 3))
    assert rates[1] < rates[0] / 2 < 0.5


def test_several_controls_and_states_in_single_precision():
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(50, 2, generator=g), torch.randn(50, 2, generator=g)

    def field(at, u):
        return torch.tanh(at @ u[:4].reshape(2, 2).mT + u[4:])

    found = mean_field_control(
        field, square, x, y, torch.zeros(4, 6), weight=0.5, damping=0.7, tolerance=1e-4, iterations=60
    )
    assert found.converged and found.theta.dtype == torch.float32
    assert found.value < found.values[0] and found.states.shape == (5, 50, 2)


def test_bad_arguments_are_named():
    z = torch.ones(3, dtype=F)
    with pytest.raises(ArgumentError, match="weight=0"):
        scalar(z, weight=0.0)
    with pytest.raises(ArgumentError, match="damping=1.5"):
        scalar(z, damping=1.5)
    with pytest.raises(ShapeError, match="theta"):
        scalar(z, theta=torch.zeros(3, dtype=F))
    with pytest.raises(ArgumentError, match="t=2"):
        linear_mean_field(z, 1.0, t=2.0)
    with pytest.raises(DivergenceError, match="larger weight"):
        mean_field_control(
            lambda x, u: x * math.inf, square, z[:, None], z[:, None], torch.zeros(2, 1, dtype=F), weight=1.0
        )


def test_a_loss_that_averages_over_samples_is_refused_as_it_would_weigh_them_twice():
    z = torch.tensor([[0.6], [2.0]])
    for loss in (torch.nn.functional.mse_loss, lambda x, y: (x - y).square()):
        with pytest.raises(ShapeError, match="one number a sample"):
            mean_field_control(lambda x, u: u.expand_as(x), loss, 0 * z, z, torch.zeros(4, 1), weight=1.0)
    with pytest.raises(ShapeError, match="at least one step"):
        mean_field_control(
            lambda x, u: u.expand_as(x), lambda x, y: x[:, 0], 0 * z, z, torch.zeros(0, 1), weight=1.0
        )
