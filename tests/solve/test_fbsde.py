"""Parabolic equations along stochastic paths, against closed forms."""

import math

import pytest
import torch
from pytest import approx
from torch import nn

from bolza.core.errors import ArgumentError, DivergenceError, ShapeError
from bolza.models import InputResidualNet
from bolza.solve import FBSDE, cole_hopf_value, solve_fbsde
from bolza.solve.fbsde import _noise, _path_loss


def squares(x):
    return x.square().sum(-1, keepdim=True)


def barenblatt(dim=10, dtype=torch.float32, coupled=False):
    """Black–Scholes–Barenblatt: u = e^{(r + σ²)(T − t)}|x|²."""
    return FBSDE(
        torch.tensor([1.0, 0.5] * (dim // 2), dtype=dtype),
        1.0,
        squares,
        driver=lambda t, x, y, z: 0.05 * (y - (x * z).sum(-1, keepdim=True)),
        diffusion=lambda t, x, y, w: 0.4 * x * w,
        coupled=coupled,
    )


def exact(t, x):
    return torch.exp(0.21 * (1 - t)) * squares(x)


def small_net(dim, seed=0, width=24):
    torch.manual_seed(seed)
    return InputResidualNet(dim + 1, width=width, depth=2)


def draws(problem, steps, paths, seed=0):
    return _noise(problem, steps, paths, torch.Generator().manual_seed(seed))


def test_the_exact_solution_leaves_a_loss_that_falls_with_order_one_in_the_time_step():
    problem = barenblatt(4, torch.float64)
    losses = [float(_path_loss(problem, exact, draws(problem, n, 4000))[0].detach()) for n in (10, 40)]
    assert math.log(losses[0] / losses[1]) / math.log(4) == approx(1, abs=0.15)
    value = _path_loss(problem, exact, draws(problem, 2, 3))[1]
    assert float(value.detach()) == approx(math.exp(0.21) * 2.5)


def test_the_loop_in_time_gives_what_all_points_at_once_give():
    apart, together = barenblatt(4, torch.float64, coupled=True), barenblatt(4, torch.float64)
    net = small_net(4).double()

    def u(t, x):
        return net(torch.cat([t.expand(*x.shape[:-1], 1), x], -1))

    noise = draws(together, 5, 7)
    for one, other in zip(_path_loss(apart, u, noise), _path_loss(together, u, noise), strict=True):
        torch.testing.assert_close(one, other)


def test_a_fully_coupled_equation_has_no_loss_at_its_solution():
    """dX = σY dW with φ = 0 and g = x: the solution u = x makes X a geometric walk, without error of the Euler step."""
    problem = FBSDE(
        torch.tensor([2.0], dtype=torch.float64),
        1.0,
        lambda x: x,
        driver=lambda t, x, y, z: torch.zeros_like(y),
        diffusion=lambda t, x, y, w: 0.3 * y * w,
        coupled=True,
    )
    loss, value = _path_loss(problem, lambda t, x: x * 1.0, draws(problem, 6, 5))
    assert float(loss.detach()) == approx(0, abs=1e-25) and float(value.detach()) == 2.0
    found = solve_fbsde(problem, small_net(1).double(), steps=4, paths=16, iterations=5)
    assert math.isfinite(found.value)


def test_ten_dimensions_to_within_two_percent_with_the_last_condition_built_in():
    found = solve_fbsde(
        barenblatt(), small_net(10), steps=10, paths=32, iterations=80, lr=5e-3, hard_terminal=True
    )
    assert found.value == approx(math.exp(0.21) * 6.25, rel=0.02)  # 7.7105
    x = torch.rand(6, 10)
    torch.testing.assert_close(found.u(1.0, x), squares(x))
    gradient = found.gradient(torch.ones(1), x)
    torch.testing.assert_close(gradient, 2 * x)
    assert float(found.losses[-10:].mean()) < float(found.losses[0]) / 4


def test_units_of_value_and_state_do_not_matter_to_standardised_training():
    plain = barenblatt(2, torch.float64)
    scaled = FBSDE(
        100 * plain.x0, 1.0, lambda x: 7 * squares(x / 100), driver=plain.driver, diffusion=plain.diffusion
    )
    options = {"steps": 5, "paths": 16, "iterations": 3}
    one, other = (solve_fbsde(p, small_net(2).double(), **options) for p in (plain, scaled))
    # not the gradient's own term, which has the units of u over x: compare the value at the start
    torch.testing.assert_close(7 * one.values[0], other.values[0])


def test_runs_repeat_from_their_seed_and_the_network_is_the_one_that_was_given():
    net, twin = small_net(2), small_net(2)
    runs = [solve_fbsde(barenblatt(2), n, steps=3, paths=8, iterations=4, seed=5) for n in (net, twin)]
    assert torch.equal(runs[0].values, runs[1].values)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))
    assert runs[0].module.network is net and all(p.grad is None for p in net.parameters())


def test_the_transform_of_cole_and_hopf_agrees_with_two_closed_forms():
    g, x = torch.Generator().manual_seed(0), torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
    slope = torch.tensor([0.4, 0.1, -0.3], dtype=torch.float64)
    found, error = cole_hopf_value(lambda at: (at * slope).sum(-1, keepdim=True), x, 0.7, generator=g)
    assert abs(float(found - (slope @ x - 0.7 * slope @ slope))) < 4 * float(error)
    found, error = cole_hopf_value(lambda at: 0.5 * squares(at), x, 0.7, generator=g)
    spread = 1 + 4 * 0.5 * 0.7
    assert abs(float(found - (1.5 * math.log(spread) + 0.5 * x @ x / spread))) < 4 * float(error)


def test_bad_arguments_are_named():
    problem = barenblatt(2)
    with pytest.raises(ArgumentError, match="paths=0"):
        solve_fbsde(problem, small_net(2), paths=0)
    with pytest.raises(ShapeError, match="3 features"):
        solve_fbsde(problem, nn.Linear(3, 2), iterations=1)
    with pytest.raises(ArgumentError, match="time is 0"):
        FBSDE(problem.x0, 0.0, squares, problem.driver, problem.diffusion)
    with pytest.raises(ShapeError, match="one vector"):
        FBSDE(problem.x0[None], 1.0, squares, problem.driver, problem.diffusion)
    with pytest.raises(ArgumentError, match="samples is 1"):
        cole_hopf_value(squares, problem.x0, 1.0, samples=1)
    with pytest.raises(DivergenceError, match="not finite"):
        broken = FBSDE(problem.x0, 1.0, lambda x: squares(x) * math.nan, problem.driver, problem.diffusion)
        solve_fbsde(broken, small_net(2), steps=2, paths=4, iterations=1)
