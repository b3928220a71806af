from math import sqrt

import pytest
import torch
from scipy import stats

from bolza.controllers import (
    PolicyScheduler,
    StationarityAnnealing,
    fluctuation_dissipation_gap,
    stationarity_z,
)
from bolza.core.errors import ArgumentError


def chains(lr, mu=0.0, count=4000, steps=400, start=None, seed=0):
    """Heavy ball on ½θ² with unit gradient noise: θ, g, v of every step, shape (steps, count)."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.zeros(count, dtype=torch.float64) if start is None else torch.full((count,), start).double()
    v = torch.zeros_like(theta)
    rows = []
    for _ in range(steps):
        g = theta + torch.randn(count, generator=generator, dtype=torch.float64)
        v = mu * v + g
        rows.append((theta, g, v))
        theta = theta - lr * v
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


def test_the_gap_is_the_change_of_the_squared_norm_for_any_step():
    theta, v = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    after = (theta - 0.3 * v).square().sum(-1)
    expected = (theta.square().sum(-1) - after) / 0.6
    assert torch.allclose(fluctuation_dissipation_gap(theta, v, 0.3), expected, atol=1e-12)


def test_both_sides_of_the_identity_have_their_exact_value_on_a_quadratic():
    """η s²/(2 − ηa) = 0.0526316 at η = 0.1, a = s = 1."""
    lr, count = 0.1, 40_000
    theta, g, _ = (a[-1] for a in chains(lr, count=count, steps=150))
    exact = lr / (2 - lr)
    left, right = theta * g, lr / 2 * g.square()
    for side in (left, right):
        assert abs(side.mean() - exact) < 4 * side.std() / sqrt(count)


@pytest.mark.parametrize("mu", [0.5, 0.9])
def test_with_momentum_the_gradient_form_of_the_identity_has_the_factor_one_plus_mu(mu):
    lr, count = 0.1, 40_000
    theta, g, v = (a[-1] for a in chains(lr, mu, count=count, steps=300))
    difference = theta * g - lr / 2 * (1 + mu) * v.square()
    assert abs(difference.mean()) < 4 * difference.std() / sqrt(count)
    without = theta * g - lr / 2 * v.square()
    assert abs(without.mean()) > 8 * without.std() / sqrt(count)  # the factor is needed


def block_means(theta, blocks=16):
    return theta.square().unflatten(0, (blocks, -1)).mean(1).T


def test_z_of_a_stationary_chain_is_calibrated():
    """Blocks of 200 steps, 20 memories each: mean 0 and P(|z| < 1) that of Student's t."""
    count = 2000
    theta, _, _ = chains(0.2, count=count, steps=3200 + 100)
    z = stationarity_z(block_means(theta[100:]))
    law = stats.t(14)
    assert abs(z.mean()) < 4 * law.std() / sqrt(count)
    share = law.cdf(1) - law.cdf(-1)
    inside = (z.abs() < 1).double().mean()
    # neighbouring blocks share a memory: the share may differ by a few hundredths, besides its own error
    assert abs(inside - share) < 0.03 + 4 * sqrt(share * (1 - share) / count)


def test_z_of_a_chain_that_still_falls_is_far_from_zero():
    theta, _, _ = chains(0.002, count=200, steps=400, start=10.0)
    assert (stationarity_z(block_means(theta)) > 3).all()


def test_triangular_weights_turn_the_identity_into_the_contrast_of_two_halves():
    theta, _, v = chains(0.1, count=3, steps=41)
    gap = (theta[:40].square() - theta[1:].square()) / 0.2
    assert torch.allclose(gap, fluctuation_dissipation_gap(theta[:40, :, None], v[:40, :, None], 0.1))
    k = torch.arange(40.0, dtype=torch.float64)
    weights = torch.minimum(k + 1, 39 - k)[:, None]  # 1 … 20, then 19 … 0
    square = theta[:40].square()
    contrast = (square[:20].sum(0) - square[20:].sum(0)) / 0.2
    assert torch.allclose((weights * gap).sum(0), contrast, atol=1e-10)


def run(policy, start, steps, lr=0.2, dim=50):
    generator = torch.Generator().manual_seed(0)
    theta = torch.full((dim,), start, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=lr)
    scheduler = PolicyScheduler(optimizer, policy)
    lowered = []
    for k in range(steps):
        theta.grad = theta.detach() + torch.randn(dim, generator=generator)
        optimizer.step()
        if scheduler.step():
            lowered.append(k + 1)
    return optimizer.param_groups[0]["lr"], lowered


def test_the_rate_stays_while_the_run_falls_and_drops_once_it_is_stationary():
    falling, never = run(StationarityAnnealing(window=160), start=50.0, steps=480, lr=0.002)
    assert falling == 0.002 and never == []
    settled, lowered = run(StationarityAnnealing(window=1600), start=0.0, steps=8_000)
    assert lowered and settled < 0.2


def test_the_rate_does_not_fall_below_its_floor():
    rate, _ = run(StationarityAnnealing(window=160, min_lr=0.05, threshold=10.0), start=0.0, steps=1000)
    assert rate == 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 110}, "window=110"),
        ({"blocks": 5}, "blocks=5"),
        ({"factor": 1.5}, "factor=1.5"),
        ({"threshold": 0.0}, "threshold=0.0"),
    ],
)
def test_settings_without_sense_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        StationarityAnnealing(**options)


def test_too_few_blocks_are_refused():
    with pytest.raises(ArgumentError, match="3 blocks"):
        stationarity_z(torch.zeros(3))
