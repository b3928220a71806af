"""SGD as a sampler: rates and preconditioners against the minimum of the divergence itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bolza.core.errors import ArgumentError, DivergenceError, ShapeError
from bolza.sde import (
    gradient_noise,
    posterior_divergence,
    posterior_preconditioner,
    posterior_rate,
    stationary_covariance,
)

F = torch.float64


def spd(seed, d=3):
    g = torch.randn(d, d + 2, dtype=F, generator=torch.Generator().manual_seed(seed))
    return g @ g.T / d


def divergence(a, c, lr, n, batch, p=None):
    s = stationary_covariance(a, c, lr=lr, batch_size=batch, preconditioner=p, exact=False).covariance
    return float(posterior_divergence(s, a, samples=n))


def minimiser(f, low, high):
    from scipy.optimize import minimize_scalar

    return float(minimize_scalar(f, bounds=(low, high), method="bounded", options={"xatol": 1e-9}).x)


def test_the_rate_of_the_review_is_where_the_divergence_is_smallest():
    a = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F)
    c = torch.tensor([[1.0, 0.2], [0.2, 0.6]], dtype=F)
    assert posterior_rate(c, samples=1000, batch_size=10) == pytest.approx(0.025, rel=1e-14)
    assert minimiser(lambda lr: divergence(a, c, lr, 1000, 10), 1e-3, 0.2) == pytest.approx(0.025, abs=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_rate_does_not_depend_on_the_curvature(seed):
    a, c = spd(seed), spd(seed + 10)
    best = posterior_rate(c, samples=500, batch_size=4)
    assert minimiser(lambda lr: divergence(a, c, lr, 500, 4), best / 30, 30 * best) == pytest.approx(
        best, rel=1e-4
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_full_preconditioner_samples_the_posterior_itself(seed):
    a, c = spd(seed), spd(seed + 10)
    p = posterior_preconditioner(c, samples=500, lr=0.01, batch_size=4)
    assert divergence(a, c, 0.01, 500, 4, p) == pytest.approx(0, abs=1e-10)
    q = posterior_preconditioner(c, samples=500, lr=0.01, batch_size=4, diagonal=True)
    scalar = divergence(a, c, posterior_rate(c, samples=500, batch_size=4), 500, 4)
    assert 0 < divergence(a, c, 0.01, 500, 4, q)
    assert scalar > 0 and torch.equal(q, torch.diag(q.diagonal()))


def test_momentum_divides_the_rate_and_a_network_gives_its_own_noise():
    c = spd(3)
    assert posterior_rate(c, samples=100, momentum=0.9) == pytest.approx(0.1 * posterior_rate(c, samples=100))
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    noise = gradient_noise(nn.Linear(2, 1), nn.functional.mse_loss, (x, x[:, :1]))
    dense = noise.covariance.dense()
    assert posterior_rate(noise, samples=30) == pytest.approx(posterior_rate(dense, samples=30), rel=1e-5)


def test_the_divergence_is_that_of_gaussians():
    s, a = spd(4), spd(5)
    from torch.distributions import MultivariateNormal as Normal
    from torch.distributions import kl_divergence

    zero = torch.zeros(3, dtype=F)
    exact = kl_divergence(Normal(zero, s), Normal(zero, precision_matrix=7 * a))
    assert float(posterior_divergence(s, a, samples=7)) == pytest.approx(float(exact), rel=1e-10)


def test_what_cannot_be_sampled_is_named():
    with pytest.raises(ArgumentError, match="without noise"):
        posterior_preconditioner(torch.diag(torch.tensor([1.0, 0.0])), samples=10, lr=0.1)
    with pytest.raises(ArgumentError, match="trace 0"):
        posterior_rate(torch.zeros(2, 2), samples=10)
    with pytest.raises(ArgumentError, match="trace nan"):
        posterior_rate(torch.full((2, 2), float("nan")), samples=10)
    with pytest.raises(ArgumentError, match="eigenvalue or variance of nan"):
        posterior_preconditioner(torch.full((2, 2), float("nan")), samples=10, lr=0.1, diagonal=True)
    with pytest.raises(ShapeError, match="covariance of one sample"):
        posterior_preconditioner(torch.ones(2), samples=10, lr=0.1)
    for call in (
        lambda: posterior_rate(torch.eye(2), samples=0),
        lambda: posterior_preconditioner(torch.eye(2), samples=0, lr=0.1),
        lambda: posterior_divergence(torch.eye(2), torch.eye(2), samples=0),
    ):
        with pytest.raises(ArgumentError, match="samples is 0"):
            call()
    with pytest.raises(DivergenceError, match="not positive definite"):
        posterior_divergence(torch.zeros(2, 2), torch.eye(2), samples=10)
    with pytest.raises(ShapeError, match="hessian"):
        posterior_divergence(torch.eye(3), torch.eye(2), samples=10)
