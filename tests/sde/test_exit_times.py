"""Simulated passage times against exact ones."""

from math import inf, log2, sqrt

import pytest
import torch
from pytest import approx

from bolza.core import Diffusion
from bolza.core.errors import ArgumentError, DivergenceError, ShapeError
from bolza.sde import ExitTimes, exit_times, mean_first_passage, stable_flight_time
from bolza.sde.exit_times import _normal_noise

F64 = torch.float64
MOTION = Diffusion(lambda t, x: 0 * x, lambda t, x, noise: noise, diagonal=True)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def slab(x):
    return 1 - x[:, 0].abs()


def brownian(dt, paths, *, bridge, inside=slab, seed=0):
    x0 = torch.zeros(paths, 1, dtype=F64)
    return exit_times(MOTION, x0, inside, dt=dt, horizon=40.0, bridge=bridge, generator=generator(seed))


def test_looking_only_at_the_steps_makes_times_too_long_by_the_root_of_the_step():
    coarse, fine = (brownian(dt, 20_000, bridge=False).mean - 1 for dt in (0.08, 0.02))
    assert coarse > 0.3 and log2(coarse / fine) / 2 == approx(0.5, abs=0.1)


def test_the_bridge_takes_that_error_away():
    found = brownian(0.04, 8000, bridge=True)
    error = sqrt(2 / 3 / 8000)  # Var τ = 2/3 for the unit interval
    assert abs(found.mean - 1) < 4 * error + 0.01  # the rest is of the order dt
    low, high = found.interval(0.9999)
    assert low - 0.01 < 1 < high + 0.01 and high - low == approx(7.78 * error, rel=0.05)


def test_a_bool_border_is_the_same_without_the_bridge():
    plain = brownian(0.1, 200, bridge=False)
    flags = brownian(0.1, 200, bridge=True, inside=lambda x: x[:, 0].abs() < 1)
    assert torch.equal(plain.exited, flags.exited)
    assert (flags.times - plain.times).abs().max() <= 0.1


def test_the_mean_passage_of_a_double_well_is_the_exact_one():
    heat = 0.25
    well = Diffusion(lambda t, x: x - x**3, lambda t, x, noise: sqrt(2 * heat) * noise)
    found = exit_times(
        well,
        torch.full((700, 1), -1.0),
        lambda x: 1 - x[:, 0],
        dt=0.15,
        horizon=400.0,
        scheme="heun",
        generator=generator(0),
    )
    exact = mean_first_passage(lambda x: x**4 / 4 - x**2 / 2, -1.0, (-inf, 1.0), heat)
    low, high = found.interval(0.9999)
    assert found.censored == 0 and low < exact < high
    assert (high - low) / exact < 0.3


def test_the_noise_across_the_border_is_that_of_the_dense_factor():
    """Correlated noise of another shape, a curved border."""
    g = torch.tensor([[1.0, 0.4, 0.0], [-0.3, 0.5, 2.0]], dtype=F64)
    sde = Diffusion(
        lambda t, x: -x,
        lambda t, x, noise: (1 + x[:, :1] ** 2) * (noise @ g.T),
        noise_shape=lambda x: (len(x), 3),
    )
    x = torch.tensor([[0.3, -0.2], [0.1, 0.5]], dtype=F64)
    found = _normal_noise(sde, lambda x: 1 - x.square().sum(1), 0.0, x)
    for row, value in zip(x, found, strict=True):
        dense = (1 + row[0] ** 2) * g
        assert float(value) == approx(float((dense.T @ (-2 * row)).square().sum()), rel=1e-12)


def test_a_disc_in_the_plane_is_left_after_the_mean_time_of_its_radius():
    """E τ = R²/d for Brownian motion in d dimensions; noise turned by a rotation."""
    turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=F64)
    sde = Diffusion(lambda t, x: 0 * x, lambda t, x, noise: noise @ turn.T)
    x0 = torch.zeros(4000, 2, dtype=F64)
    found = exit_times(sde, x0, lambda x: 1 - x.norm(dim=1), dt=0.02, horizon=20.0, generator=generator(1))
    assert abs(found.mean - 0.5) < 4 * float(found.times.std()) / sqrt(4000) + 0.01


def test_flights_leave_by_jumps_a_little_late():
    flight = Diffusion(lambda t, x: 0 * x, lambda t, x, noise: noise, alpha=1.5)
    found = exit_times(
        flight, torch.zeros(3000, 1, dtype=F64), slab, dt=0.01, horizon=30.0, generator=generator(0)
    )
    exact = stable_flight_time(1.5)
    error = float(found.times.std()) / sqrt(3000)
    assert exact - 4 * error < found.mean < 1.08 * exact + 4 * error


# ------------------------------------------------------------------------------------------- statistics


def test_censored_paths_count_with_the_time_they_stayed():
    found = ExitTimes(
        torch.tensor([1.0, 2.0, 3.0, 3.0], dtype=F64), torch.tensor([True, True, False, False]), 3.0
    )
    assert found.mean == 4.5 and found.censored == 2
    assert found.survival(torch.tensor([0.5, 1.0, 2.5, 3.0])).tolist() == [1.0, 0.75, 0.5, 0.5]
    none = ExitTimes(torch.full((3,), 2.0, dtype=F64), torch.zeros(3, dtype=torch.bool), 2.0)
    assert none.mean == inf and none.interval()[1] == inf
    assert none.interval()[0] == approx(
        6 / 3.6889, rel=1e-4
    )  # −log 0.025, the rule of three at 95 %, two-sided


@pytest.mark.parametrize("horizon", [0.5, 1e9])
def test_intervals_hold_the_mean_as_often_as_they_say(horizon):
    draws = torch.empty(600, 50, dtype=F64).exponential_(generator=generator(0))
    held = 0
    for row in draws:
        low, high = ExitTimes(row.clamp(max=horizon), row < horizon, horizon).interval(0.9)
        held += low < 1 < high
    assert abs(held / 600 - 0.9) < 4 * sqrt(0.09 / 600)


def test_short_runs_censor_and_the_rate_is_still_right():
    """After the first moments the exits of a deep well are exponential."""
    heat = 0.25
    well = Diffusion(lambda t, x: x - x**3, lambda t, x, noise: sqrt(2 * heat) * noise)
    x0 = torch.full((1500, 1), -1.0)
    found = exit_times(
        well, x0, lambda x: -x[:, 0], dt=0.1, horizon=6.0, scheme="heun", generator=generator(0)
    )
    assert 100 < found.censored < 1400
    exact = mean_first_passage(lambda x: x**4 / 4 - x**2 / 2, -1.0, (-inf, 0.0), heat)
    assert found.mean == approx(exact, rel=0.15)


# ---------------------------------------------------------------------------------------------- borders


def test_paths_that_left_may_explode_and_those_inside_may_not():
    runaway = Diffusion(lambda t, x: x**3, lambda t, x, noise: noise)
    x0 = torch.zeros(50, 1, dtype=F64)
    found = exit_times(runaway, x0, slab, dt=0.1, horizon=50.0, generator=generator(0))
    assert bool(found.exited.all()) and bool(found.times.isfinite().all())
    with pytest.raises(DivergenceError, match="inside"):
        exit_times(
            runaway, x0 + 2, lambda x: torch.ones(len(x)), dt=0.5, horizon=200.0, generator=generator(0)
        )


def test_senseless_requests_are_refused():
    x0 = torch.zeros(5, 1)
    with pytest.raises(ArgumentError, match="start outside"):
        exit_times(MOTION, x0 + 2, slab, dt=0.1, horizon=1.0)
    with pytest.raises(ArgumentError, match="positive"):
        exit_times(MOTION, x0, slab, dt=0.1, horizon=0.0)
    with pytest.raises(ArgumentError, match="finite"):
        exit_times(MOTION, x0, slab, dt=0.1, horizon=inf)
    with pytest.raises(ShapeError, match="one number for each path"):
        exit_times(MOTION, x0, lambda x: 1 - x, dt=0.1, horizon=1.0)
    with pytest.raises(ArgumentError, match="level"):
        brownian(0.1, 20, bridge=False).interval(1.0)


@pytest.mark.parametrize("inside", [slab, lambda x: x[:, 0].abs() < 1])
def test_a_path_that_breaks_inside_has_not_left(inside):
    broken = Diffusion(lambda t, x: torch.where(x > 0.5, float("nan"), 0 * x), MOTION.factor)
    with pytest.raises(DivergenceError, match="inside"):
        exit_times(broken, torch.zeros(50, 1), inside, dt=0.05, horizon=9.0, generator=generator(0))


def test_parameters_of_the_equation_do_not_grow_a_graph():
    rate, graphs = torch.ones(1, requires_grad=True), []
    known = Diffusion(
        lambda t, x: graphs.append(x.requires_grad) or -rate * x, lambda t, x, noise: rate * noise
    )
    found = exit_times(known, torch.zeros(9, 1), slab, dt=0.05, horizon=0.5, generator=generator(0))
    assert len(graphs) > 2 and not any(graphs) and not found.times.requires_grad
