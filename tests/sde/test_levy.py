"""SGD with stable noise, and the tails that SGD makes by itself."""

import math

import pytest
import torch
from scipy import integrate
from torch import nn

from bolza.core import simulate
from bolza.core.errors import ArgumentError, DivergenceError
from bolza.ops.stable_law import absolute_moment, stable_noise
from bolza.sde import (
    inject_stable_noise,
    least_squares_stability,
    levy_sgd,
    regression_tails,
    stablest_index,
    stationary_scale,
    tail_index,
)
from bolza.sde.levy import _log_growth

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("alpha", [0.8, 1.5, 2.0])
def test_euler_steps_of_the_equation_are_sgd_with_stable_noise(alpha):
    lr, curvature = 0.1, torch.tensor([1.0, 3.0], dtype=F64)
    equation = levy_sgd(lambda x: curvature * x, lr=lr, alpha=alpha, scale=0.7)
    x0 = torch.ones(4, 2, dtype=F64)
    (found,) = simulate(equation, x0, dt=lr, steps=1, generator=generator())
    xi = stable_noise((4, 2), alpha, generator=generator(), dtype=F64)
    assert torch.allclose(found, x0 - lr * (curvature * x0 - 0.7 * xi), atol=1e-12)


def test_noise_may_depend_on_the_state_or_the_coordinate():
    x0 = torch.tensor([[1.0, -2.0]], dtype=F64)
    each = torch.tensor([0.0, 1.0], dtype=F64)
    one = simulate(
        levy_sgd(torch.zeros_like, lr=0.1, alpha=1.5, scale=each), x0, dt=0.1, steps=1, generator=generator()
    )
    other = simulate(
        levy_sgd(torch.zeros_like, lr=0.1, alpha=1.5, scale=lambda x: (x < 0).double()),
        x0,
        dt=0.1,
        steps=1,
        generator=generator(),
    )
    assert torch.equal(one, other) and float(one[0, 0, 0]) == 1.0


def test_the_stationary_scale_is_that_of_the_geometric_series_and_of_the_flow():
    alpha, rate, lr = 1.4, 2.0, 0.3
    terms = sum((lr * abs(1 - lr * rate) ** k) ** alpha for k in range(400))
    assert stationary_scale(rate, alpha, lr=lr) == pytest.approx(terms ** (1 / alpha))
    # a small step of η² noise in each coordinate of time is the flow: order one in η
    gaps = []
    for small in (0.02, 0.01):
        sigma = small ** ((1 - alpha) / alpha)  # undoes η^{(α−1)/α}
        gaps.append(stationary_scale(rate, alpha, scale=sigma, lr=small) - stationary_scale(rate, alpha))
    assert math.log2(gaps[0] / gaps[1]) == pytest.approx(1, abs=0.05)
    assert stationary_scale(1.0, 2.0, lr=0.1) ** 2 == pytest.approx(0.1 / 1.9)


def test_moments_of_a_simulated_process_are_those_of_its_stationary_law():
    exact = absolute_moment(0.7, 1.5, scale=stationary_scale(2.0, 1.5))
    assert exact == pytest.approx(0.7340, abs=5e-5)
    lr, paths = 0.05, 20_000
    equation = levy_sgd(lambda x: 2 * x, lr=lr, alpha=1.5)
    (x,) = simulate(equation, torch.zeros(paths, 1, dtype=F64), dt=lr, steps=80, generator=generator())
    s = stationary_scale(2.0, 1.5, lr=lr)
    moment = absolute_moment(0.7, 1.5, scale=s)
    deviation = math.sqrt((absolute_moment(1.4, 1.5, scale=s) - moment**2) / paths)
    assert abs(float(x.abs().pow(0.7).mean()) - moment) < 4 * deviation


def test_the_gap_is_the_formula_and_infinite_for_the_squared_loss():
    p, alpha, rate, other = 0.9, 1.3, 2.0, 2.5
    constant = (
        2**p
        * math.gamma((1 + p) / 2)
        * math.gamma(1 - p / alpha)
        / math.sqrt(math.pi)
        / math.gamma(1 - p / 2)
    )
    exact = constant * abs((alpha * rate) ** (-p / alpha) - (alpha * other) ** (-p / alpha))
    assert least_squares_stability(rate, other, alpha, p=p) == pytest.approx(exact)
    assert least_squares_stability(rate, other, alpha, p=p, scale=2.0) == pytest.approx(2**p * exact)
    assert least_squares_stability(rate, other, 1.99, p=2.0) == math.inf
    assert least_squares_stability(1.0, 2.0, 2.0, p=2.0) == pytest.approx(0.5)  # variances 1 and 1/2


@pytest.mark.parametrize(
    ("rate", "index"), [(1, 2.0), (50, 2.0), (100, 1.709), (200, 1.478), (500, 1.337), (1000, 1.275)]
)
def test_heavier_tails_help_only_large_data_and_only_so_far(rate, index):
    assert stablest_index(rate, 1.05 * rate) == pytest.approx(index, abs=6e-4)


@pytest.mark.parametrize(
    ("lr", "index"), [(0.5, 2.904), (2 / 3, 2.0), (0.8, 1.546), (1.0, 1.091), (1.3, 0.667)]
)
def test_the_tail_index_of_regression_solves_its_equation(lr, index):
    found = regression_tails(lr).index
    assert found == pytest.approx(index, abs=6e-4)
    value = integrate.quad(
        lambda z: 2 * abs(1 - lr * z * z) ** found * math.exp(-z * z / 2) / math.sqrt(2 * math.pi),
        0,
        20,
        points=[1 / math.sqrt(lr)],
        limit=200,
    )[0]
    assert value == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize(("b", "d"), [(1, 1), (1, 2), (5, 10), (10, 3), (50, 200)])
def test_the_variance_is_infinite_above_two_b_over_d_plus_b_plus_one(b, d):
    limit = 2 * b / (d + b + 1)
    found = regression_tails(limit / 3, batch_size=b, dim=d, variance=3.0)
    assert found.variance_limit == pytest.approx(limit / 3) and found.index == pytest.approx(2, abs=1e-6)
    assert found.stationary_limit > found.variance_limit
    wider = regression_tails(limit / 2, batch_size=b, dim=d)
    assert wider.index > 2 > regression_tails(1.0001 * limit, batch_size=b, dim=d).index


def test_growth_of_the_error_is_that_of_sampled_matrices():
    b, d, h = 3, 4, 0.2
    growth, log_weight = _log_growth(h, b, d, 0.0)
    assert float(log_weight.exp().sum()) == pytest.approx(1, abs=1e-10)
    a = torch.randn(100_000, b, d, dtype=F64, generator=generator())
    e = torch.eye(d, dtype=F64)[0]
    sampled = (e - h * torch.einsum("nbd,nb->nd", a, a[:, :, 0])).norm(dim=1)
    for alpha in (0.5, 1.3):
        exact = float((alpha * growth + log_weight).exp().sum())
        values = sampled**alpha
        assert abs(float(values.mean()) - exact) < 4 * float(values.std()) / math.sqrt(100_000)


def test_no_stationary_law_above_a_rate_of_2_4212():
    assert regression_tails(1.0).stationary_limit == pytest.approx(2.42125, abs=1e-4)
    assert regression_tails(2.43).index == 0
    assert 0 < regression_tails(2.41).index < 0.01


@pytest.mark.parametrize("d", [10**5, 10**7])
def test_with_very_many_inputs_the_two_limits_meet_from_their_own_sides(d):
    tails = regression_tails(1 / d, dim=d)
    # for one row E log‖I − h a aᵀ‖² vanishes where E‖·‖² is 1, but for O(d^-2)
    assert tails.variance_limit <= tails.stationary_limit < tails.variance_limit * (1 + 1e-8)
    assert regression_tails(0.9999 * tails.variance_limit, dim=d).index > 2


def test_noise_in_the_gradients_of_a_network_has_its_index():
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 1))
    model[1].bias.requires_grad_(False)
    model(torch.zeros(1, 100)).sum().backward()
    clean = model[0].weight.grad.clone()
    inject_stable_noise(model.parameters(), 1.5, scale=1e3, generator=generator())
    noise = (model[0].weight.grad - clean).flatten()
    found = tail_index(noise, centre="none")
    assert abs(float(found.index) - 1.5) < 4 * float(found.error)
    assert float(noise.abs().median()) == pytest.approx(969, rel=0.05)  # P(|X| < 0.969) = 1/2 at α = 1.5
    assert model[1].bias.grad is None


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: levy_sgd(torch.zeros_like, lr=0.0, alpha=1.5), ArgumentError, "lr is 0"),
        (lambda: levy_sgd(torch.zeros_like, lr=0.1, alpha=0.0), ArgumentError, "alpha is 0"),
        (lambda: inject_stable_noise([], 3.0), ArgumentError, "alpha is 3"),
        (lambda: inject_stable_noise([], 1.0, scale=-1), ArgumentError, "scale is -1"),
        (lambda: stationary_scale(-1.0, 1.5), ArgumentError, "rate is -1"),
        (lambda: stationary_scale(1.0, 1.5, lr=2.5), DivergenceError, "stable below 2"),
        (lambda: stationary_scale(1.0, 1.5, scale=-1.0), ArgumentError, "scale is -1"),
        (lambda: stablest_index(1.0, 1.0), ArgumentError, "both 1"),
        (lambda: stablest_index(1.0, 2.0, p=2.0), ArgumentError, "p is 2"),
        (lambda: regression_tails(0.1, dim=0), ArgumentError, "dim is 0"),
    ],
)
def test_what_makes_no_sense_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
