"""The symmetric stable law."""

import math

import pytest
import torch

from bolza.ops.errors import ArgumentError
from bolza.ops.stable_law import absolute_moment, log_moments, stable_noise, tail_constant

F64 = torch.float64
N = 200_000


def draws(alpha, n=N, seed=0, dtype=F64):
    return stable_noise((n,), alpha, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2, 1.5, 1.8, 2.0])
def test_the_characteristic_function_is_exp_of_minus_u_to_the_alpha(alpha):
    x = draws(alpha)
    for u in (0.3, 1.0, 2.0):
        exact = math.exp(-(u**alpha))
        # Var cos(uX) = (1 + φ(2u))/2 − φ(u)²
        deviation = math.sqrt(((1 + math.exp(-((2 * u) ** alpha))) / 2 - exact**2) / N)
        assert abs(float((u * x).cos().mean()) - exact) < 4 * deviation
        assert abs(float((u * x).sin().mean())) < 4 / math.sqrt(2 * N)


def test_probabilities_of_large_draws_are_those_of_the_inverted_characteristic_function():
    from scipy.integrate import quad

    x = draws(1.5)
    for point in (0.5, 1.0, 3.0, 10.0):
        inside = quad(
            lambda u, x=point: math.exp(-(u**1.5)) * x * math.sin(u * x) / (u * x), 0, 12, limit=200
        )[0]
        exact = 1 - 2 / math.pi * inside
        assert abs(float((x.abs() > point).double().mean()) - exact) < 4 * math.sqrt(exact / N)


@pytest.mark.parametrize("alpha", [0.7, 1.0, 1.5, 2.0])
def test_the_logarithm_has_its_mean_and_variance(alpha):
    mean, variance = log_moments(alpha)
    values = draws(alpha, seed=1).abs().log()
    assert abs(float(values.mean()) - mean) < 4 * math.sqrt(variance / N)
    spread = float((values - values.mean()).square().var()) ** 0.5
    assert abs(float(values.var()) - variance) < 4 * spread / math.sqrt(N)


@pytest.mark.parametrize(
    ("alpha", "p", "value"), [(1.2, 0.36, 1.0949), (1.5, 0.45, 1.0563), (1.8, 0.54, 1.0195)]
)
def test_fractional_moments_in_closed_form_are_those_of_the_draws(alpha, p, value):
    exact = absolute_moment(p, alpha)
    assert exact == pytest.approx(value, abs=5e-5)
    deviation = math.sqrt((absolute_moment(2 * p, alpha) - exact**2) / N)
    assert abs(float(draws(alpha).abs().pow(p).mean()) - exact) < 4 * deviation


def test_moments_at_known_points():
    assert absolute_moment(2, 2) == pytest.approx(2) and absolute_moment(4, 2) == pytest.approx(12)
    assert absolute_moment(1, 1.5) == pytest.approx(2 * math.gamma(1 / 3) / math.pi)
    assert absolute_moment(0, 0.3) == pytest.approx(1)
    assert absolute_moment(0.5, 1, scale=4.0) == pytest.approx(2 * math.sqrt(2))  # Cauchy: 1/cos(π/4)
    # ∂p of the moment at 0 is the mean of the logarithm
    slope = (absolute_moment(1e-5, 1.3) - absolute_moment(-1e-5, 1.3)) / 2e-5
    assert slope == pytest.approx(log_moments(1.3)[0], abs=1e-8)


def test_tails_follow_the_constant():
    far = 30.0
    for alpha in (0.8, 1.5):
        exact = tail_constant(alpha) * far**-alpha
        found = float((draws(alpha).abs() > far).double().mean())
        assert abs(found - exact) < 4 * math.sqrt(exact / N) + 0.02 * exact  # next order: 2 % at x = 30
    assert tail_constant(2.0) == 0


def test_float32_draws_are_the_float64_ones_rounded_and_keep_their_tail():
    assert torch.equal(draws(1.2, dtype=torch.float32), draws(1.2).float())
    assert torch.equal(draws(1.7, 70_000, 3), draws(1.7, 70_000, 3))
    assert stable_noise((2, 0), 1.5).shape == (2, 0)


@pytest.mark.parametrize("alpha", [0.0, 2.5, math.nan])
def test_an_index_outside_its_range_is_refused(alpha):
    with pytest.raises(ArgumentError, match="alpha is"):
        stable_noise((3,), alpha)
    with pytest.raises(ArgumentError, match="alpha is"):
        absolute_moment(0.5, alpha)


def test_moments_at_the_ends_of_their_range_are_told_and_not_raised():
    assert [absolute_moment(p, 1.5, scale=0.0) for p in (0.5, 0.0, -0.5)] == [0.0, 1.0, math.inf]
    assert absolute_moment(400, 2) == math.inf and absolute_moment(0, 0.7) == pytest.approx(1)
    # E|N(0, 2)|^100 = 2^50 · 99!!
    assert absolute_moment(100, 2) == pytest.approx(2.0**50 * math.prod(range(1, 100, 2)), rel=1e-11)
    with pytest.raises(ArgumentError, match="int32"):
        stable_noise((2,), 1.5, dtype=torch.int32)


def test_orders_without_a_moment_are_refused_or_infinite():
    assert absolute_moment(1.5, 1.5) == math.inf
    with pytest.raises(ArgumentError, match="p is -1"):
        absolute_moment(-1, 1.5)
    with pytest.raises(ArgumentError, match="scale is"):
        absolute_moment(0.5, 1.5, scale=-1.0)
