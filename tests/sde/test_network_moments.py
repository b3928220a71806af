"""Moments of a network along its top directions, against the dense equations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bolza.core.errors import ArgumentError
from bolza.ops.curvature import hessian_operator
from bolza.ops.krylov import top_eigenpairs
from bolza.sde import (
    gradient_noise,
    least_squares_covariance,
    mean_square_limit,
    network_moments,
    stationary_covariance,
)
from networks import NETWORKS

D = torch.float64


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def regression():
    """A linear net at its minimum: quadratic, so that everything is known."""
    x = torch.randn(60, 4, dtype=D, generator=draw()) * torch.tensor([2.0, 1.0, 0.5, 0.3], dtype=D)
    y = x.sum(1, keepdim=True) + torch.randn(60, 1, dtype=D, generator=draw(1))
    net = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(torch.linalg.lstsq(x, y).solution.T)

    def loss(z, y):
        return (z - y).square().mean() / 2

    residual = (x @ net.weight.detach().T - y)[:, 0]
    gradients = residual[:, None] * x
    return net, loss, (x, y), x.T @ x / 60, gradients.T @ gradients / 60


@pytest.mark.parametrize(("momentum", "replacement"), [(0.0, True), (0.8, False)])
def test_with_all_directions_a_linear_net_has_the_dense_covariance(regression, momentum, replacement):
    net, loss, data, h, sigma = regression
    settings = {"lr": 0.05, "batch_size": 3, "momentum": momentum}
    found = network_moments(
        net, loss, data, **settings, k=4, replacement=replacement, tol=1e-12, generator=draw()
    )
    dense = stationary_covariance(h, sigma, **settings, samples=None if replacement else 60)
    v = found.directions
    torch.testing.assert_close(v @ found.covariance @ v.T, dense.covariance, rtol=1e-7, atol=1e-10)
    assert found.excess_top == pytest.approx(float(dense.excess_loss), rel=1e-7)
    assert found.excess_rest.value == pytest.approx(0, abs=1e-12)
    assert float(found.offset.abs().max()) < 1e-6 and not bool(found.unstable.any()) and found.converged
    samples = data[0][:, :, None] * data[0][:, None]
    limit = mean_square_limit(samples, batch_size=3, momentum=momentum, samples=None if replacement else 60)
    assert found.mean_square_limit == pytest.approx(limit, rel=1e-8)
    assert found.stability == pytest.approx(0.05 / limit, rel=1e-8)


def test_few_directions_give_the_corner_of_the_dense_covariance_and_bound_the_limit(regression):
    net, loss, data, h, sigma = regression
    found = network_moments(net, loss, data, lr=0.05, batch_size=3, k=2, tol=1e-12, generator=draw())
    dense = stationary_covariance(h, sigma, lr=0.05, batch_size=3)
    v = found.directions
    torch.testing.assert_close(found.covariance, v.T @ dense.covariance @ v, rtol=1e-6, atol=1e-10)
    # the rest is flat: its share comes without its curvatures, to first order in ηλ
    assert found.excess_loss.value == pytest.approx(float(dense.excess_loss), rel=0.02)
    whole = mean_square_limit(data[0][:, :, None] * data[0][:, None], batch_size=3)
    assert whole <= found.mean_square_limit < found.limit


def test_real_steps_of_sgd_come_to_rest_where_the_moments_say(regression):
    """Thousands of runs side by side: the variance of a mode has a relative error of about √(2/runs)."""
    _, _, (x, y), h, sigma = regression
    samples, batch, runs = x[:, :, None] * x[:, None], 3, 3000
    lr = 0.3 * mean_square_limit(samples, batch_size=batch)
    bottom = torch.linalg.lstsq(x, y).solution[:, 0]
    theta, generator = bottom.repeat(runs, 1), draw(3)
    for _ in range(60):
        pick = torch.randint(60, (runs, batch), generator=generator)
        a, b = x[pick], y[pick, 0]
        theta -= lr * torch.einsum("rb,rbd->rd", torch.einsum("rbd,rd->rb", a, theta) - b, a) / batch
    top = torch.linalg.eigh(h).eigenvectors[:, -2:]  # the others are still on their way
    measured = ((theta - bottom) @ top).square().mean(0)
    exact = least_squares_covariance(samples, sigma, lr=lr, batch_size=batch).covariance
    z = (measured / (top.T @ exact @ top).diagonal() - 1) / math.sqrt(2 / runs)
    assert float(z.abs().max()) < 5
    # the same noise everywhere would be wrong by far more than that
    constant = stationary_covariance(h, sigma, lr=lr, batch_size=batch).covariance
    off = (measured / (top.T @ constant @ top).diagonal() - 1) / math.sqrt(2 / runs)
    assert float(off.max()) > 8


@pytest.mark.parametrize("name", NETWORKS)
def test_the_networks_people_have_are_accepted_and_only_read(name):
    model, data, loss = NETWORKS[name]()
    training = model.training
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = network_moments(
        model, loss, data, lr=1e-3, batch_size=2, momentum=0.5, k=2, tol=1e-2, generator=draw()
    )
    assert (
        all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        and model.training == training
    )
    assert bool((found.blur > 0).all()) and found.blur.shape == (2,)
    assert 0 < found.stability < 1 and found.excess_loss.value > 0
    assert found.temperature == pytest.approx(1e-3 / (2 * 2 * 0.5))


def test_what_was_measured_before_is_used_and_gives_the_same(regression):
    net, loss, data, _, _ = regression
    settings = {"lr": 0.05, "batch_size": 3}
    eigen = top_eigenpairs(hessian_operator(net, loss, data), 2, tol=1e-12, generator=draw())
    again = network_moments(net, loss, data, **settings, hessian=eigen, noise=gradient_noise(net, loss, data))
    first = network_moments(net, loss, data, **settings, k=2, tol=1e-12, generator=draw())
    torch.testing.assert_close(again.blur, first.blur)


def test_a_rate_above_the_limit_is_reported_not_raised(regression):
    net, loss, data, h, _ = regression
    top = float(torch.linalg.eigvalsh(h)[-1])
    found = network_moments(net, loss, data, lr=2.5 / top, batch_size=3, k=2, tol=1e-12, generator=draw())
    assert found.unstable.tolist() == [True, False]
    assert math.isinf(float(found.blur[0])) and math.isfinite(float(found.blur[1]))
    assert math.isinf(found.excess_loss.value) and found.stability > 1
    assert found.limit == pytest.approx(2 / top) and math.isinf(float(found.relaxation[0]))


def test_a_direction_of_negative_curvature_is_not_confined():
    net = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(0.1)  # near the saddle at zero
    x = torch.randn(40, 2, dtype=D, generator=draw())
    found = network_moments(
        net, F.mse_loss, (x, x.sum(1, keepdim=True)), lr=0.01, batch_size=2, k=3, tol=1e-10, generator=draw()
    )
    assert found.unstable.tolist() == [False, False, True] and math.isnan(float(found.offset[2]))
    assert math.isfinite(found.excess_top)


def test_relaxation_is_the_time_in_which_the_start_is_forgotten(regression):
    net, loss, data, h, _ = regression
    values = torch.linalg.eigvalsh(h).flip(0)
    plain = network_moments(net, loss, data, lr=0.05, batch_size=3, k=4, tol=1e-12, generator=draw())
    torch.testing.assert_close(plain.relaxation, -1 / (1 - 0.05 * values).log(), rtol=1e-8, atol=0)
    heavy = network_moments(
        net, loss, data, lr=0.05, batch_size=3, momentum=0.9, k=1, tol=1e-12, generator=draw()
    )
    # a swinging mode forgets at the rate of √μ
    assert float(heavy.relaxation) == pytest.approx(-2 / math.log(0.9), rel=1e-8)


def test_settings_that_make_no_sense_are_named(regression):
    net, loss, data, _, _ = regression
    with pytest.raises(ArgumentError, match="k is 0"):
        network_moments(net, loss, data, lr=0.1, batch_size=2, k=0)
    with pytest.raises(ArgumentError, match="batch_size is 61"):
        network_moments(net, loss, data, lr=0.1, batch_size=61, replacement=False)
