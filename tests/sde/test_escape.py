"""Escape times: closed forms, exact quadrature, and the table of the quartic double well."""

from math import atan, exp, inf, log, pi, sqrt

import pytest
import torch
from pytest import approx

from bolza.core.errors import ArgumentError, BolzaError, ShapeError
from bolza.sde import jump_escape_time, kramers_time, mean_first_passage, saddle_time, stable_flight_time

F64 = torch.float64


def double_well(x):
    return x**4 / 4 - x**2 / 2


@pytest.mark.parametrize(
    ("temperature", "kramers", "well", "saddle"),
    [
        (0.03, 18483.6, 19485.8, 9739.6),
        (0.05, 659.382, 729.671, 361.904),
        (0.08, 101.120, 120.006, 57.478),
        (0.10, 54.125, 66.269, 30.821),
    ],
)
def test_the_table_of_the_double_well(temperature, kramers, well, saddle):
    assert kramers_time(2.0, -1.0, 0.25, temperature) == approx(kramers, rel=1e-5)
    assert mean_first_passage(double_well, -1.0, (-inf, 1.0), temperature) == approx(well, rel=1e-5)
    assert mean_first_passage(double_well, -1.0, (-inf, 0.0), temperature) == approx(saddle, rel=1e-5)


# ------------------------------------------------------------------------------------------- Kramers


def test_in_many_dimensions_only_the_determinants_come_in_whatever_the_axes():
    q = torch.linalg.qr(torch.randn(4, 4, dtype=F64, generator=torch.Generator().manual_seed(0))).Q
    well = q @ torch.diag(torch.tensor([2.0, 1.0, 3.0, 0.5], dtype=F64)) @ q.T
    saddle = q @ torch.diag(torch.tensor([-1.0, 4.0, 3.0, 0.5], dtype=F64)) @ q.T
    one = kramers_time(2.0, -1.0, 0.25, 0.05)
    assert kramers_time(well, saddle, 0.25, 0.05) == approx(2 * one, rel=1e-12)  # √(4/1): a narrow pass costs


def test_friction_slows_the_passage_and_without_it_the_rate_is_that_of_counting_crossings():
    heavy = kramers_time(2.0, -1.0, 0.25, 0.05, friction=1e4)
    assert heavy == approx(1e4 * kramers_time(2.0, -1.0, 0.25, 0.05), rel=1e-7)
    light = kramers_time(2.0, -1.0, 0.25, 0.05, friction=1e-9)
    assert light == approx(2 * pi / sqrt(2) * exp(0.25 / 0.05), rel=1e-8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((-2.0, -1.0, 0.25, 0.1), "minimum"),
        ((2.0, 1.0, 0.25, 0.1), "exactly one"),
        ((2.0, -1.0, 0.0, 0.1), "barrier"),
        ((2.0, -1.0, 0.25, -0.1), "temperature"),
        ((torch.eye(2), -1.0, 0.25, 0.1), "shape"),
    ],
)
def test_what_is_not_a_valley_with_a_saddle_is_refused(options, words):
    with pytest.raises(ArgumentError, match=words):
        kramers_time(*options)
    with pytest.raises(ArgumentError, match="friction"):
        kramers_time(2.0, -1.0, 0.25, 0.1, friction=0.0)


def test_a_time_beyond_all_numbers_is_infinite():
    assert kramers_time(2.0, -1.0, 1.0, 1e-3) == inf
    assert mean_first_passage(lambda x: 4 * double_well(x), -1.0, (-inf, 1.0), 1e-3) == inf


# ---------------------------------------------------------------------------------- exact, quadrature


def test_brownian_motion_leaves_an_interval_after_its_product_of_distances():
    found = mean_first_passage(lambda x: 0 * x, 0.3, (-1.0, 2.0), 0.5)
    assert found == approx(1.3 * 1.7, rel=1e-12)
    assert mean_first_passage(lambda x: 0 * x, 2.0, (-1.0, 2.0), 0.5) == 0


def test_noise_that_varies_in_space():
    """D = 1 + x² and no force, from 0 out of (−1, 1): ∫₀¹ atan y dy."""
    found = mean_first_passage(lambda x: 0 * x, 0.0, (-1.0, 1.0), lambda x: 1 + x**2)
    assert found == approx(pi / 4 - log(2) / 2, rel=1e-11)
    assert atan(1) == approx(pi / 4)
    # a force and a varying noise that cancel in φ: U' = x D gives s = e^{x²/2}, as U = x²/2 at T = 1, and m = 1/(D s)
    one = mean_first_passage(lambda x: x**2 / 2 + x**4 / 4, 0.5, (-inf, 1.0), lambda x: 1 + x**2)
    y = torch.linspace(-9, 1, 200_001, dtype=F64)
    mass = torch.cumulative_trapezoid(torch.exp(-(y**2) / 2) / (1 + y**2), y)
    times = torch.exp(y[1:] ** 2 / 2) * mass
    assert one == approx(float(torch.trapezoid(times[y[1:] >= 0.5], y[1:][y[1:] >= 0.5])), rel=1e-4)


def test_left_and_right_are_mirror_images_and_a_far_wall_that_absorbs_is_not_felt():
    tilted = lambda x: double_well(x) + 0.1 * x  # noqa: E731
    left = mean_first_passage(tilted, -1.0, (-inf, 0.5), 0.1)
    assert mean_first_passage(lambda x: tilted(-x), 1.0, (-0.5, inf), 0.1) == approx(left, rel=1e-12)
    assert mean_first_passage(tilted, -1.0, (-4.0, 0.5), 0.1) == approx(left, rel=1e-9)


def test_passages_add_up_along_a_line():
    """From a to c over b in between: a path must pass b."""
    parts = [mean_first_passage(double_well, a, (-inf, b), 0.08) for a, b in ((-1, -0.2), (-0.2, 0.9))]
    assert sum(parts) == approx(mean_first_passage(double_well, -1.0, (-inf, 0.9), 0.08), rel=1e-9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((2.0, (-1.0, 1.0), 0.1), "start inside"),
        ((0.0, (-inf, inf), 0.1), "one end at least finite"),
        ((0.0, (-1.0, 1.0), 0.0), "positive"),
        ((0.0, (-1.0, 1.0), lambda x: x), "positive"),
    ],
)
def test_senseless_intervals_are_refused(options, words):
    with pytest.raises(ArgumentError, match=words):
        mean_first_passage(double_well, *options)


def test_a_potential_that_does_not_confine_is_refused():
    with pytest.raises(ArgumentError, match="does not confine"):
        mean_first_passage(lambda x: 0 * x, 0.0, (-inf, 1.0), 0.1)


# --------------------------------------------------------------------------------- saddles and jumps


@pytest.mark.parametrize(("lr", "expected"), [(1e-2, 3.284), (1e-3, 4.436), (1e-4, 5.587)])
def test_a_saddle_costs_the_logarithm_of_the_noise(lr, expected):
    """Temperature lr/2 for unit noise, rate and radius 1; exact by quadrature to the order T."""
    found = saddle_time(1.0, lr / 2)
    assert found == approx(expected, abs=5e-4)
    exact = mean_first_passage(lambda x: -(x**2) / 2, 0.0, (-1.0, 1.0), lr / 2)
    assert abs(found - exact) < lr


def test_the_units_of_a_saddle_are_those_of_its_equation():
    assert saddle_time(3.0, 0.02, 0.7) == approx(saddle_time(1.0, 0.02 / (3.0 * 0.7**2)) / 3.0, rel=1e-12)
    with pytest.raises(ArgumentError, match="weak|below"):
        saddle_time(1.0, 2.0)


@pytest.mark.parametrize(("alpha", "expected"), [(1.2, 0.9076), (1.5, 0.7523), (1.8, 0.5965)])
def test_a_free_flight_leaves_the_unit_interval_in_one_over_gamma(alpha, expected):
    assert stable_flight_time(alpha) == approx(expected, abs=5e-5)


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_at_index_two_a_flight_is_brownian_motion_of_doubled_variance(dim):
    assert stable_flight_time(2.0, 1.5, start=0.5, dim=dim) == approx(
        (1.5**2 - 0.5**2) / (2 * dim), rel=1e-12
    )


def test_jumps_count_the_width_and_not_the_height():
    assert jump_escape_time(1.2, 0.1, 1.0, 1.0) == approx(28.5, abs=0.05)
    assert jump_escape_time(1.2, 0.05, 1.0, 1.0) == approx(65.5, abs=0.05)
    assert jump_escape_time(1.5, 0.1, 2.0, 2.0) == approx(2**1.5 * jump_escape_time(1.5, 0.1, 1.0, 1.0))
    assert jump_escape_time(1.5, 0.1, 1.0, inf) == approx(2 * jump_escape_time(1.5, 0.1, 1.0, 1.0))
    # α = 1: the Cauchy tail is exact, 1/π x^{−1} a side
    assert jump_escape_time(1.0, 0.01, 1.0, 1.0) == approx(pi / 2 / 0.01)


def test_indices_and_starts_out_of_range_are_refused():
    with pytest.raises(ArgumentError, match="kramers_time"):
        jump_escape_time(2.0, 0.1, 1.0, 1.0)
    with pytest.raises(ArgumentError, match="alpha"):
        stable_flight_time(2.5)
    with pytest.raises(ArgumentError, match="start"):
        stable_flight_time(1.5, 1.0, start=1.5)


# ------------------------------------------------------------------------------- what broke the quadrature


def test_a_steep_slope_is_not_taken_for_a_barrier_without_end():
    with pytest.raises(BolzaError, match="start nearer"):
        mean_first_passage(double_well, -30.0, (-inf, 1.0), 0.1)
    assert mean_first_passage(double_well, -1.0, (-inf, 50.0), 0.1) == inf


def test_a_start_next_to_the_end_sees_the_whole_valley():
    at = [mean_first_passage(double_well, 1 - h, (-inf, 1.0), 0.1) / h for h in (1e-9, 1e-6)]
    assert at[0] == approx(at[1], rel=1e-4)


def test_a_temperature_may_be_a_tensor_or_a_constant_function():
    exact = mean_first_passage(double_well, -1.0, (-inf, 1.0), 0.1)
    for heat in (torch.tensor(0.1, dtype=F64), lambda x: 0.1):
        assert mean_first_passage(double_well, -1.0, (-inf, 1.0), heat) == approx(exact, rel=1e-9)
    assert mean_first_passage(torch.zeros_like, 0.0, (-1.0, 1.0), torch.ones_like) == approx(0.5)
    with pytest.raises(ShapeError, match="one number for each x"):
        mean_first_passage(lambda x: double_well(x).sum(-1), -1.0, (-inf, 1.0), 0.1)
