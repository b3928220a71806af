"""Noise that grows with the error: closed forms, and the moments of every batch summed up."""

from __future__ import annotations

import itertools

import pytest
import torch

from bolza.core.errors import ArgumentError, DivergenceError, ShapeError
from bolza.sde import least_squares_covariance, mean_square_limit, stationary_covariance

F = torch.float64
ONE = torch.ones(1, 1, dtype=F)


@pytest.mark.parametrize(("batch", "variance"), [(1, 0.0588235), (4, 0.0135135)])
def test_regression_in_one_dimension(batch, variance):
    found = least_squares_covariance(ONE, 1.0, lr=0.1, batch_size=batch)
    assert float(found.covariance) == pytest.approx(variance, abs=1e-7)
    assert float(found.excess_loss) == pytest.approx(variance / 2, abs=1e-7)


@pytest.mark.parametrize("h", [0.5, 3.0])
@pytest.mark.parametrize("batch", [1, 2, 16])
def test_the_limit_in_one_dimension_is_a_fraction(h, batch):
    limit = mean_square_limit(h * ONE, batch_size=batch)
    assert limit * h == pytest.approx(2 / (1 + 2 / batch), rel=1e-9)


def inputs(n=6, d=3, seed=0):
    return torch.randn(n, d, dtype=F, generator=torch.Generator().manual_seed(seed))


def outer(x):
    return x[:, :, None] * x[:, None, :]


def every_batch(samples, batch, replacement):
    """Mean Hessian of every batch that may be drawn, all equally likely."""
    draw = (
        itertools.product(range(len(samples)), repeat=batch)
        if replacement
        else itertools.combinations(range(len(samples)), batch)
    )
    return torch.stack([samples[list(pick)].mean(0) for pick in draw])


def radius_of_every_batch(samples, lr, momentum, batch, replacement):
    """Spectral radius of the second moments of (x, v), averaged over every batch: no formula used."""
    d = samples.shape[-1]
    total = 0
    batches = every_batch(samples, batch, replacement)
    for h in batches:
        v = torch.cat([-lr * h, momentum * torch.eye(d, dtype=F)], 1)
        m = torch.cat([v + torch.eye(d, 2 * d, dtype=F), v])
        total = total + torch.kron(m, m)
    return float(torch.linalg.eigvals(total / len(batches)).abs().max())


@pytest.mark.parametrize(
    ("momentum", "batch", "replacement"),
    [(0.0, 1, True), (0.0, 2, True), (0.0, 3, False), (0.5, 2, False), (0.9, 1, True)],
)
def test_the_limit_is_where_the_moments_of_every_batch_begin_to_grow(momentum, batch, replacement):
    samples = outer(inputs())
    limit = mean_square_limit(
        samples, batch_size=batch, momentum=momentum, samples=None if replacement else len(samples)
    )
    assert radius_of_every_batch(samples, 0.9999 * limit, momentum, batch, replacement) < 1
    assert radius_of_every_batch(samples, 1.0001 * limit, momentum, batch, replacement) > 1
    assert limit < 2 * (1 + momentum) / float(torch.linalg.eigvalsh(samples.mean(0))[-1])


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_the_covariance_is_that_of_all_batches(momentum):
    x = inputs()
    samples = outer(x)
    residual = torch.randn(len(x), dtype=F, generator=torch.Generator().manual_seed(1))
    coefficients = torch.linalg.lstsq(x, residual).solution
    residual = residual - x @ coefficients  # at the minimum the gradients add up to zero
    gradients = residual[:, None] * x
    lr, d = 0.3 * mean_square_limit(samples, batch_size=2, momentum=momentum), 3
    s = torch.zeros(2 * d, 2 * d, dtype=F)
    steps, forces = [], []
    for pick in itertools.product(range(len(x)), repeat=2):
        v = torch.cat([-lr * samples[list(pick)].mean(0), momentum * torch.eye(d, dtype=F)], 1)
        steps.append(torch.cat([v + torch.eye(d, 2 * d, dtype=F), v]))
        g = lr * gradients[list(pick)].mean(0)
        forces.append(torch.cat([g, g]))
    steps, forces = torch.stack(steps), torch.stack(forces)
    push = forces.T @ forces / len(forces)
    for _ in range(2000):
        s = (steps @ s @ steps.mT).mean(0) + push
    found = least_squares_covariance(
        samples, gradients.T @ gradients / len(x), lr=lr, batch_size=2, momentum=momentum
    )
    torch.testing.assert_close(found.covariance, s[:d, :d], rtol=1e-8, atol=1e-12)
    assert float(found.residual) < 1e-10


def test_gaussian_inputs_are_the_limit_of_many_samples():
    h = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F)
    x = inputs(40_000, 2, seed=2) @ torch.linalg.cholesky(h).T
    exact = mean_square_limit(h, batch_size=2, momentum=0.3)
    assert mean_square_limit(outer(x), batch_size=2, momentum=0.3) == pytest.approx(exact, rel=0.05)


def test_large_batches_leave_the_noise_that_does_not_depend_on_the_error():
    h = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F)
    many = least_squares_covariance(h, 0.7, lr=0.2, batch_size=10**6, momentum=0.4)
    plain = stationary_covariance(h, 0.7 * h, lr=0.2, batch_size=10**6, momentum=0.4)
    torch.testing.assert_close(many.covariance, plain.covariance, rtol=1e-5, atol=0)


def test_many_gaussian_inputs_need_no_matrix_of_all_pairs():
    values = torch.linspace(0.01, 1, 80, dtype=F)
    turn = torch.linalg.qr(inputs(80, 80)).Q
    h, noise = turn @ torch.diag(values) @ turn.T, inputs(80, 80, seed=1)
    noise = noise @ noise.T
    lr = 0.9 * mean_square_limit(h, batch_size=8)
    # without momentum the limit is the root of 1 = (η/2B) Σ λ/(1 − ηλ(1 + 1/B)/2)
    top = lr / 0.9
    assert float((top / 16 * values / (1 - top * values * (1 + 1 / 8) / 2)).sum()) == pytest.approx(
        1, rel=1e-9
    )
    S = least_squares_covariance(h, noise, lr=lr, batch_size=8).covariance
    left = h @ S + S @ h - lr * h @ S @ h
    right = lr / 8 * (noise + h @ S @ h + h * (h * S).sum())
    torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-10)


def test_directions_that_no_sample_sees_are_left_alone():
    x = inputs(2, 3)  # two samples in three dimensions
    found = least_squares_covariance(outer(x), 0.1, lr=0.05)
    lost = torch.linalg.svd(x).Vh[-1]
    assert float((found.covariance @ lost).norm()) < 1e-12
    wide = inputs(
        3, 6
    ).float()  # in single precision the Hessian has eigenvalues of either sign where it has none
    single = least_squares_covariance(outer(wide), 0.1, lr=0.01)
    double = least_squares_covariance(outer(wide.double()), 0.1, lr=0.01)
    torch.testing.assert_close(single.covariance.double(), double.covariance, rtol=1e-4, atol=1e-7)
    full = mean_square_limit(outer(x), batch_size=2, samples=2)
    assert full == pytest.approx(2 / float(torch.linalg.eigvalsh(outer(x).mean(0))[-1]))


def test_beyond_the_limit_nothing_is_stationary_and_the_limit_is_named():
    with pytest.raises(DivergenceError, match="only below 0.6667"):
        least_squares_covariance(ONE, 1.0, lr=0.7)
    for variance in (-1.0, float("nan")):
        with pytest.raises(ArgumentError, match="variance of residuals"):
            least_squares_covariance(ONE, variance, lr=0.1)
    number = least_squares_covariance(ONE, torch.tensor(1.0), lr=0.1).covariance
    assert torch.equal(number, least_squares_covariance(ONE, 1.0, lr=0.1).covariance)
    with pytest.raises(ArgumentError, match="no negative"):
        mean_square_limit(-ONE)
    with pytest.raises(ShapeError, match="curvature"):
        mean_square_limit(torch.ones(3, 2))
    with pytest.raises(ShapeError, match="noise"):
        least_squares_covariance(ONE, torch.eye(2), lr=0.1)
