"""Parallel chains: a banana and a logistic regression, against what is known of them."""

import math

import pytest
import torch

from bolza.bayes import effective_sample_size, monte_carlo_error, rhat, sample
from bolza.core.errors import ArgumentError, DataError, DivergenceError, ShapeError

F = torch.float64
S2 = 1.0


def banana(x):
    """x ~ N(0, 1), y given x ~ N(x²/2, 1): mean (0, 1/2), variances 1 and 1 + 1/2."""
    return x[0] ** 2 / 2 + (x[1] - x[0] ** 2 / 2) ** 2 / (2 * S2)


def wide(chains, seed=0):
    return 1.5 * torch.randn(chains, 2, generator=torch.Generator().manual_seed(seed), dtype=F)


def test_a_hundred_chains_that_find_their_own_step_have_the_moments_of_a_banana():
    found = sample(
        lambda x: banana(x.T),
        wide(100),
        steps=150,
        warmup=80,
        method="hmc",
        batched=True,
        generator=torch.Generator().manual_seed(0),
    )
    assert found.samples.shape == (100, 150, 2) and 0.6 < found.acceptance < 0.97
    assert float(rhat(found.samples).max()) < 1.02
    error = monte_carlo_error(found.samples)
    assert (found.mean - torch.tensor([0, 0.5], dtype=F)).abs().lt(4 * error).all()
    square = (found.samples - torch.tensor([0, 0.5], dtype=F)).square()
    error = monte_carlo_error(square)
    assert (square.mean((0, 1)) - torch.tensor([1, S2 + 0.5], dtype=F)).abs().lt(4 * error).all()


def test_baoab_stays_near_the_moments_and_a_batched_potential_is_the_same_chain():
    options = {"steps": 500, "step_size": 0.2, "friction": 0.5, "thin": 5, "warmup": 60}
    one = sample(banana, wide(100), generator=torch.Generator().manual_seed(1), **options)
    square = (one.samples - torch.tensor([0, 0.5], dtype=F)).square()
    allowed = 4 * monte_carlo_error(square) + 0.04 * torch.tensor([1, S2 + 0.5], dtype=F)  # second order in h
    assert (square.mean((0, 1)) - torch.tensor([1, S2 + 0.5], dtype=F)).abs().lt(allowed).all()
    few = {**options, "steps": 20}
    chains = [
        sample(potential, wide(5), generator=torch.Generator().manual_seed(1), batched=batched, **few).samples
        for potential, batched in ((banana, False), (lambda x: banana(x.T), True))
    ]
    assert torch.allclose(*chains)


@pytest.mark.parametrize("method", ["sgld", "sghmc", "sgnht", "baoab"])
def test_each_method_has_its_variance_on_a_gaussian(method):
    draw = torch.Generator().manual_seed(3)
    h = 0.05 if method == "sgld" else 0.3
    found = sample(
        lambda x: x.square().sum(),  # at temperature ½: variance T/λ = ¼
        0.5 * torch.randn(1000, 3, generator=draw),
        method=method,
        steps=60,
        step_size=h,
        temperature=0.5,
        thin=4,
        generator=draw,
    )
    assert found.samples.dtype == torch.float32
    assert float(found.covariance.diagonal().mean()) == pytest.approx(0.25, rel=0.08)


def test_a_step_that_is_too_long_and_wrong_arguments_are_named():
    x = torch.ones(2, 2)
    with pytest.raises(DivergenceError, match="smaller step_size"):
        sample(lambda z: z.pow(4).sum(), 10 * x, steps=300, step_size=1.0)
    with pytest.raises(ArgumentError, match="step_size is None"):
        sample(banana, x, steps=3)
    with pytest.raises(ArgumentError, match="choose 'baoab'"):
        sample(banana, x, steps=3, method="nuts")
    with pytest.raises(ArgumentError, match="thin=9"):
        sample(banana, x, steps=3, step_size=0.1, thin=9)
    with pytest.raises(ShapeError, match="x0"):
        sample(banana, x[0], steps=3, step_size=0.1)
    with pytest.raises(ShapeError, match="for 2 chains"):
        sample(lambda z: z.sum(), x, steps=3, step_size=0.1, batched=True)
    with pytest.raises(ArgumentError, match="temperature"):
        sample(banana, x, steps=3, step_size=0.1, temperature=0.0)


def test_effective_sizes_of_an_autoregressive_chain_are_known():
    """ρ = 0.8: a chain of n is worth n(1 − ρ)/(1 + ρ) for its mean."""
    draw = torch.Generator().manual_seed(0)
    x, rho = torch.randn(8, generator=draw), 0.8
    path = []
    for _ in range(1500):
        x = rho * x + math.sqrt(1 - rho**2) * torch.randn(8, generator=draw)
        path.append(x)
    samples = torch.stack(path, 1)
    exact = samples.numel() * (1 - rho) / (1 + rho)
    assert float(effective_sample_size(samples, "mean")) == pytest.approx(exact, rel=0.15)
    assert float(monte_carlo_error(samples)) == pytest.approx(exact**-0.5, rel=0.15)
    assert effective_sample_size(samples, "tail").shape == ()
    apart = samples + torch.arange(8.0)[:, None]
    assert float(rhat(apart)) > 1.5 > 1.02 > float(rhat(samples))
    with pytest.raises(DataError, match="diverged"):
        rhat(samples / 0)
    with pytest.raises(ShapeError, match="at least 4"):
        rhat(samples[:, :3])


def test_starts_outside_the_support_and_potentials_that_are_no_scalar_are_named():
    x = torch.ones(2, 2)
    with pytest.raises(DivergenceError, match="2 of 2 chains start"):
        sample(lambda z: -z.log().sum(), -x, steps=3, method="hmc")
    for wrong in (lambda z: z.square(), lambda z: 3.0):
        with pytest.raises(ShapeError, match="scalar"):
            sample(wrong, x, steps=3, step_size=0.1)


def test_one_chain_is_compared_with_its_own_halves():
    draws = torch.randn(1, 500, generator=torch.Generator().manual_seed(0))
    assert float(rhat(draws)) < 1.02 < 1.5 < float(rhat(draws + torch.arange(500) / 100))
    assert bool(rhat(torch.ones(2, 10)).isnan())
