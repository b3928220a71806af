"""Planned learning rates: closed forms, exact moments, and guarantees."""

import math

import numpy as np
import pytest
import torch

from bolza.controllers.rate_plan import _Problem, plan_rates
from bolza.core.errors import ArgumentError, ShapeError

F = torch.float64
LAM, NOISE, START = (torch.tensor(v, dtype=F) for v in ((3.0, 0.5, 0.01), (0.3, 0.2, 0.1), (1.0, 2.0, 3.0)))


def small_steps(pieces, **options):
    """One mode of a = Σ = 1, η = 0.2, m₀ = 1 over T = 5, in steps so small that time is continuous."""
    steps = 50 * 10_000
    one, dt = torch.ones(1, dtype=F), 5 / steps
    settings = {"steps": steps, "lr_max": dt, "pieces": pieces, "iterations": 500}
    return plan_rates(one, 0.2 / dt * one, 2**0.5 * one, **(settings | options)), dt


def test_fifty_pieces_of_one_mode_reach_the_known_loss_and_constant():
    plan, dt = small_steps(50)
    assert plan.objective == pytest.approx(0.0220890, abs=1e-7)
    assert plan.constant_objective == pytest.approx(0.0313580, abs=1e-7)
    assert plan.constant / dt == pytest.approx(0.52767, abs=5e-4)  # the loss is flat about it


def test_the_optimum_keeps_the_full_rate_until_the_noise_floor_and_then_anneals_as_one_over_t():
    plan, dt = small_steps(200)
    switch = math.log(4 / 0.2 - 1) / 2  # t* = 1.4722195
    assert plan.objective == pytest.approx(0.1 / (1 + 5 - switch), rel=2e-5)
    middle = (plan.lengths.cumsum(0) - plan.lengths / 2) * dt
    law = (1 / (1 + (middle - switch).clamp_min(0))).numpy()
    assert np.abs(plan.rates.numpy() / dt - law).max() < 0.01


def stepped(rates, lengths, mu):
    """Loss after the pieces, step by step."""
    moments = [np.diag([float(x) ** 2, 0.0]) for x in START]
    for eta, n in zip(rates, lengths, strict=True):
        for _ in range(n):
            for j, (lam, c) in enumerate(zip(LAM.tolist(), NOISE.tolist(), strict=True)):
                step, force = np.array([[1 - eta * lam, -eta * mu], [lam, mu]]), np.array([-eta, 1.0])
                moments[j] = step @ moments[j] @ step.T + c * np.outer(force, force)
    return sum(lam * m[0, 0] for lam, m in zip(LAM.tolist(), moments, strict=True)) / 2


def problem(lengths, mu, objective="terminal"):
    return _Problem(LAM.numpy(), NOISE.numpy(), START.numpy() ** 2, np.array(lengths), mu, objective)


@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9])
def test_moments_of_many_steps_are_those_of_each_step_after_another(mu):
    rates, lengths = np.array([0.3, 0.2, 0.05]), [3, 1, 7]
    assert problem(lengths, mu).value(rates) == pytest.approx(stepped(rates, lengths, mu), rel=1e-10)


@pytest.mark.parametrize("mu", [0.0, 0.9])
@pytest.mark.parametrize("objective", ["terminal", "average"])
def test_the_gradient_in_log_rates_is_that_of_the_objective(mu, objective):
    rates, of = np.array([0.3, 0.2, 0.05]), problem([3, 1, 7], mu, objective)
    value, slope = of.value_and_slope(rates)
    assert value == of.value(rates)
    for p in range(3):
        moved = [rates * np.exp(sign * 1e-5 * np.eye(3)[p]) for sign in (1, -1)]
        assert slope[p] == pytest.approx((of.value(moved[0]) - of.value(moved[1])) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("mu", [0.0, 0.8])
@pytest.mark.parametrize("objective", ["terminal", "average"])
@pytest.mark.parametrize("steps", [1, 30, 3000])
def test_a_plan_is_never_worse_than_the_best_constant_rate_nor_than_its_start(mu, objective, steps):
    settings = {"steps": steps, "momentum": mu, "objective": objective, "pieces": 6}
    plan = plan_rates(LAM, NOISE, START, **settings)
    constants = np.geomspace(1e-5, 1, 60) * plan.limit
    lengths = plan.lengths.numpy()
    tried = [problem(lengths, mu, objective).value(np.full(len(lengths), r)) for r in constants]
    assert plan.objective <= plan.constant_objective <= min(tried) * (1 + 1e-6)
    again = plan_rates(LAM, NOISE, START, start=plan.rates, iterations=1, **settings)
    assert again.objective <= plan.objective * (1 + 1e-12)


def test_rates_stay_below_the_stability_limit_and_the_given_one():
    assert float(plan_rates(LAM, NOISE, START, steps=100, lr_max=100.0).rates.max()) < 2 / 3
    assert float(plan_rates(LAM, NOISE, START, steps=100, momentum=0.5).rates.max()) < 2 * 1.5 / 3
    assert float(plan_rates(LAM, NOISE, START, steps=100, lr_max=0.1).rates.max()) <= 0.1


def test_modes_of_one_curvature_count_as_one_with_their_sums():
    same = torch.full((4,), 0.7, dtype=F)
    many = plan_rates(same, same / 10, same, steps=40, lr_max=1.0)
    one = plan_rates(same[:1], same[:1] / 10 * 4, same[:1] * 2, steps=40, lr_max=1.0)
    torch.testing.assert_close(many.losses, one.losses)


def test_noise_of_each_piece_is_used_where_it_is():
    alike = plan_rates(LAM, NOISE.expand(5, 3), START, steps=50, pieces=5)
    torch.testing.assert_close(alike.losses, plan_rates(LAM, NOISE, START, steps=50, pieces=5).losses)
    loud = NOISE * torch.tensor([1.0, 1.0, 1.0, 1.0, 9.0], dtype=F)[:, None]
    assert plan_rates(LAM, loud, START, steps=50, pieces=5).rates[-1] < alike.rates[-1] / 2


def test_a_plan_tells_the_rate_of_each_step():
    plan = plan_rates(LAM, NOISE, START, steps=10, pieces=[3, 7])
    assert [plan.rate(k) for k in (0, 2, 3, 9, 50)] == plan.rates[[0, 0, 1, 1, 1]].tolist()


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"momentum": 1.0},
        {"lr_max": -1.0},
        {"objective": "best"},
        {"pieces": 0},
        {"pieces": [3, 3]},
        {"curvature": -LAM},
        {"noise": -NOISE},
        {"offset": START / 0},
    ],
)
def test_settings_that_make_no_sense_are_named(change):
    given = {"curvature": LAM, "noise": NOISE, "offset": START, "steps": 10} | change
    with pytest.raises(ArgumentError):
        plan_rates(**given)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ShapeError, match="modes"):
        plan_rates(LAM, NOISE[:2], START, steps=10)
    with pytest.raises(ShapeError, match="4 pieces"):
        plan_rates(LAM, NOISE.expand(4, 3), START, steps=10, pieces=5)
    with pytest.raises(ShapeError, match="start"):
        plan_rates(LAM, NOISE, START, steps=10, pieces=5, start=[0.1])
