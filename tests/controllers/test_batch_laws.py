"""Batch laws on the quadratic: closed forms, optimality, and the equal of c-SGD."""

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import minimize

from bolza.controllers import csgd_batch_size, held_excess, least_excess, priced_batch_size, switch_time
from bolza.core.errors import ArgumentError

A, ETA, NOISE = 1.3, 0.05, 0.8


def terminal(batches, excess, horizon):
    """m(T) of the moment equation under B(t), by quadrature."""
    inner, _ = quad(
        lambda t: A * ETA * NOISE / (2 * batches(t)) * math.exp(-2 * A * (horizon - t)), 0, horizon
    )
    return excess * math.exp(-2 * A * horizon) + inner


def spent(batches, horizon):
    return quad(lambda t: batches(t) / ETA, 0, horizon)[0]


def test_the_batch_is_that_of_c_sgd_divided_by_its_rate():
    base, m = 4, 0.002
    u = min(1.0, 2 * m / (ETA * NOISE / base))
    assert csgd_batch_size(ETA, NOISE, m) == pytest.approx(base / u)
    assert csgd_batch_size(ETA, NOISE, m, momentum=0.9) == pytest.approx(10 * base / u)
    assert csgd_batch_size(ETA, NOISE, 0.0) == math.inf and csgd_batch_size(ETA, 0.0, 0.0) == 0.0


def test_the_held_loss_is_the_moment_recursion_with_the_law_put_in():
    m, samples = 0.3, 0.0
    for _ in range(40):
        b = csgd_batch_size(ETA, NOISE, m)
        samples += b
        m = (1 - ETA * A) ** 2 * m + ETA**2 * A * NOISE / (2 * b)
    assert held_excess(0.3, A, ETA, 40, NOISE) == pytest.approx((m, samples), rel=1e-12)
    assert held_excess(0.3, A, 1 / A, 5, NOISE)[0] == 0.3  # at ηa = 1 the noise makes up for the descent


def test_batches_and_annealing_reach_the_same_loss_with_equal_samples_and_far_fewer_steps():
    # both m → Σ/(2as): the annealed rate u = 1/(1 + a(t − t*)) at B = 1, the batch law from the same place
    for eta, tolerance in ((0.02, 0.02), (0.002, 0.002)):
        start = eta * NOISE / 2
        steps = math.ceil(math.log(1e4) / (A * eta))
        m, samples = held_excess(start, A, eta, steps, NOISE)
        annealed = start / (1 + A * eta * samples)  # one sample a step
        assert m == pytest.approx(annealed, rel=1.5 * tolerance * A)
        assert m == pytest.approx(NOISE / (2 * A * samples), rel=2 * tolerance * A + 2e-3)
        assert steps < samples / 500


def test_the_priced_batch_is_the_minimum_of_loss_and_price():
    price, horizon, excess = 3e-6, 2.0, 1.0

    def cost(batches):
        return terminal(batches, excess, horizon) + price * spent(batches, horizon)

    def best(t):
        return priced_batch_size(A, ETA, NOISE, price, horizon - t)

    optimum = cost(best)
    for change in (
        lambda t: 1.1,
        lambda t: 0.9,
        lambda t: 1 + 0.2 * math.sin(3 * t),
        lambda t: math.exp(0.1 * t),
    ):
        assert cost(lambda t, c=change: best(t) * c(t)) > optimum
    edges = np.linspace(0, horizon, 41)

    def stepwise(logs):
        decay = np.exp(-2 * A * (horizon - edges))
        weights = (decay[1:] - decay[:-1]) / (2 * A)
        b = np.exp(logs)
        return float(A * ETA * NOISE / 2 * (weights / b).sum() + price / ETA * (b * np.diff(edges)).sum())

    found = minimize(stepwise, np.zeros(40), method="L-BFGS-B", options={"maxiter": 2000, "maxfun": 10**6})
    pieces = found.fun + excess * math.exp(-2 * A * horizon)
    assert optimum < pieces < optimum * 1.003


def test_the_least_loss_on_a_budget_is_reached_by_exponential_batches_and_is_that_of_an_efficient_estimate():
    horizon, samples, excess = 2.0, 500.0, 0.7

    def batches(t):
        return samples * ETA * A * math.exp(-A * (horizon - t)) / (1 - math.exp(-A * horizon))

    assert spent(batches, horizon) == pytest.approx(samples)
    least = least_excess(excess, A, NOISE, horizon, samples)
    assert terminal(batches, excess, horizon) == pytest.approx(least, rel=1e-9)
    constant = samples * ETA / horizon
    assert terminal(lambda t: constant, excess, horizon) > least
    # ½ a Var of the mean of S gradients over a: nothing unbiased is better
    assert least_excess(excess, A, NOISE, 60.0, samples) == pytest.approx(NOISE / (2 * A * samples))


def test_the_switch_is_where_the_larger_batch_begins_to_pay():
    price, small, large, horizon = 3e-6, 4.0, 64.0, 2.0
    at = horizon - switch_time(A, ETA, NOISE, price, small, large)
    assert 0 < at < horizon

    def cost(when):
        early, _ = quad(lambda t: math.exp(-2 * A * (horizon - t)), 0, when)
        late, _ = quad(lambda t: math.exp(-2 * A * (horizon - t)), when, horizon)
        noise = A * ETA * NOISE / 2 * (early / small + late / large)
        return noise + price / ETA * (small * when + large * (horizon - when))

    assert all(cost(at) < cost(at + shift) for shift in (-0.1, -0.01, 0.01, 0.1))
    assert switch_time(A, ETA, NOISE, 1.0, small, large) == 0.0


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: csgd_batch_size(0.0, 1.0, 1.0), "lr=0.0"),
        (lambda: csgd_batch_size(0.1, -1.0, 1.0), "noise=-1.0"),
        (lambda: csgd_batch_size(0.1, 1.0, 1.0, momentum=1.0), "momentum=1.0"),
        (lambda: switch_time(1, 1, 1, 1, 8, 8), "large=8"),
        (lambda: least_excess(1, 1, 1, 1, math.inf), "samples=inf"),
    ],
)
def test_what_makes_no_sense_is_refused(call, match):
    with pytest.raises(ArgumentError, match=match):
        call()
