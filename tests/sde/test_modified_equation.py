"""Modified equations: their terms against dense ones, on potentials and on eight networks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bolza.core import simulate
from bolza.core.errors import ArgumentError, DivergenceError, ShapeError, UnsupportedError
from bolza.ops.curvature import gradient, hessian_operator
from bolza.ops.noise import PerSampleGradients
from bolza.sde import gradient_noise, modified_equation
from networks import NETWORKS, in_double

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def bowl(x):
    return 0.5 * x.square().sum(-1)


def quartic(x):
    return x.pow(4).sum(-1) / 4 + x[..., 0] * x[..., 1]


def product_with_hessian(x, v):
    return 3 * x.square() * v + v.flip(-1)


def columns(sde, state):
    """The factor of one state, as a matrix (d, noise)."""
    shape = sde.noise_shape(state[None])[1:]
    n = math.prod(shape)
    eye = torch.eye(n, dtype=state.dtype).reshape(n, *shape)
    return sde.factor(0.0, state.expand(n, *state.shape), eye).reshape(n, -1).mT


@pytest.mark.parametrize("name", NETWORKS)
def test_drift_and_noise_of_a_network_are_the_dense_ones_for_one_path_and_for_several(name):
    model, data, loss = in_double(NETWORKS[name]())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sde = modified_equation(model, loss, data, lr=0.1, order=2, batch_size=2, replacement=False)
    theta = sde.initial()
    _, g = gradient(model, loss, data)
    expected = -g - 0.05 * (hessian_operator(model, loss, data) @ g)
    torch.testing.assert_close(sde.drift(0.0, theta), expected, **CLOSE)
    if (
        "training" in name
    ):  # there a sample moves the statistics of the others: not a covariance of single gradients
        assert columns(sde, theta).isfinite().all()
    else:
        samples = PerSampleGradients(model, loss, data)
        each = samples.dots(torch.eye(samples.size, dtype=samples.dtype))
        dense = torch.cov(each.mT, correction=0) * 0.1 * (6 - 2) / (2 * 5)
        draws = torch.stack([sde.factor(0.0, theta, xi) for xi in torch.eye(6, dtype=torch.float64)])
        torch.testing.assert_close(draws.mT @ draws, dense, **CLOSE)
        variance = sde.field.variance(theta) * 0.1 * (6 - 2) / (2 * 5)
        torch.testing.assert_close(variance, dense.diagonal(), **CLOSE)
    near = torch.stack([theta, theta + 0.01, theta - 0.02])
    together = sde.drift(0.0, near)
    torch.testing.assert_close(together[0], expected, **CLOSE)
    torch.testing.assert_close(together[1], sde.drift(0.0, near[1]), **CLOSE)
    xi = torch.randn(sde.noise_shape(near), dtype=torch.float64)
    torch.testing.assert_close(sde.factor(0.0, near, xi)[2], sde.factor(0.0, near[2], xi[2]), **CLOSE)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items()) and model.training == (
        "evaluation" not in name
    )


def regression():
    x = torch.randn(40, 3, dtype=torch.float64)
    y = x.sum(1, keepdim=True) + torch.randn(40, 1, dtype=torch.float64)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double(), F.mse_loss, (x, y)


def test_frozen_noise_is_that_of_the_parameters_at_the_start_and_local_noise_is_not():
    model, loss, data = regression()
    frozen = modified_equation(model, loss, data, lr=0.2, batch_size=4, noise="frozen")
    local = modified_equation(model, loss, data, lr=0.2, batch_size=4)
    sigma = gradient_noise(model, loss, data).minibatch(4).dense() * 0.2
    start, away = frozen.initial(), frozen.initial() + 0.3
    for sde, where in ((frozen, start), (frozen, away), (local, start)):
        root = columns(sde, where)
        torch.testing.assert_close(root @ root.mT, sigma, **CLOSE)
    other = columns(local, away)
    assert not torch.allclose(other @ other.mT, sigma, rtol=0.01)


def test_batches_of_data_and_frozen_parameters_count_as_they_should():
    model, loss, (x, y) = regression()
    model[0].bias.requires_grad_(False)
    whole = modified_equation(model, loss, (x, y), lr=0.1)
    parts = modified_equation(model, loss, [(x[:25], y[:25]), (x[25:], y[25:])], lr=0.1)
    state, xi = whole.initial(paths=2), torch.randn(2, 40, dtype=torch.float64)
    assert state.shape == (2, 3 * 4 + 4 + 1)
    torch.testing.assert_close(parts.drift(0.0, state), whole.drift(0.0, state), **CLOSE)
    torch.testing.assert_close(parts.factor(0.0, state, xi), whole.factor(0.0, state, xi), **CLOSE)
    torch.testing.assert_close(whole.loss(state)[0], loss(model(x), y).detach(), **CLOSE)


def test_the_second_order_drift_is_the_gradient_of_the_corrected_loss():
    x = torch.randn(5, 2, dtype=torch.float64)
    sde = modified_equation(quartic, lr=0.3, order=2)
    g = x**3 + x.flip(-1)
    torch.testing.assert_close(sde.drift(0.0, x), -g - 0.15 * product_with_hessian(x, g), **CLOSE)


def test_noise_of_a_potential_may_be_a_number_a_diagonal_a_matrix_or_a_function():
    matrix = torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=torch.float64)
    root = torch.linalg.cholesky(matrix)
    x = torch.zeros(2, dtype=torch.float64)
    for noise, sigma in (
        (2.0, 2 * torch.eye(2, dtype=torch.float64)),
        (torch.tensor([1.0, 4.0]), torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64))),
        (matrix, matrix),
        (lambda x, xi: xi @ root.mT, matrix),
    ):
        sde = modified_equation(bowl, lr=0.1, batch_size=5, noise=noise)
        found = columns(sde, x)
        torch.testing.assert_close(found @ found.mT, sigma * 0.1 / 5, **CLOSE)
        assert sde.diagonal == (sigma is not matrix)
        torch.testing.assert_close(sde.field.variance(x[None])[0], sigma.diagonal(), **CLOSE)


@pytest.mark.parametrize("method", ["momentum", "nesterov"])
def test_momentum_relaxes_to_the_force_and_its_noise_is_on_the_velocity(method):
    lr, mu = 0.04, 0.9
    sde = modified_equation(bowl, lr=lr, momentum=mu, method=method, noise=1.0)
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -1.0])
    drift = sde.drift(0.0, torch.stack([x, y]))
    torch.testing.assert_close(drift, torch.stack([y, -(1 - mu) / lr * y - x / lr]))
    noise = sde.factor(0.0, torch.stack([x, y]), torch.ones(2))
    torch.testing.assert_close(noise, torch.tensor([[0.0, 0.0], [lr**-0.5, lr**-0.5]]))
    assert sde.time_step == lr and sde.parts == 2


def test_the_scheduled_friction_of_nesterov_is_three_over_t():
    sde = modified_equation(bowl, lr=0.01, momentum=None, method="nesterov")
    z = torch.stack([torch.zeros(1), torch.ones(1)])
    assert float(sde.drift(9.8, z)[1]) == pytest.approx(-0.3) and sde.time_step == pytest.approx(0.1)
    # the noiseless path is that of the method: x_k at t = k √s
    x = v = torch.ones(1, dtype=torch.float64)
    x, v = x, 0 * v
    for k in range(40):
        v = (k - 1) / (k + 2) * v - 0.01 * (x + (k - 1) / (k + 2) * v)
        x = x + v
    path = simulate(
        sde, sde.initial(torch.ones(1, 1, dtype=torch.float64)), dt=0.02, steps=200, scheme="heun"
    )
    assert float(sde.position(path[-1])) == pytest.approx(float(x), abs=0.05)


def adam_step(x, m, v, g, k, lr, betas, eps):
    m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
    return x - lr * m / (1 - betas[0] ** k) / ((v / (1 - betas[1] ** k)).sqrt() + eps), m, v


def test_an_euler_step_of_adam_s_equation_is_adam_itself_without_noise():
    lr, betas, eps = 0.1, (0.9, 0.99), 1e-3
    sde = modified_equation(quartic, lr=lr, method="adam", betas=betas, eps=eps)
    z = sde.initial(torch.tensor([[1.0, -0.5]], dtype=torch.float64))
    x, m, v = z[0]
    for k in range(1, 6):
        z = z + lr * sde.drift((k - 1) * lr, z)
        x, m, v = adam_step(x, m, v, x**3 + x.flip(-1), k, lr, betas, eps)
        torch.testing.assert_close(z[0], torch.stack([x, m, v]), **CLOSE)


def test_the_second_moment_counts_the_variance_of_the_batch():
    model, loss, data = regression()
    sde = modified_equation(model, loss, data, lr=0.1, method="rmsprop", batch_size=4, betas=(0.0, 0.9))
    state = sde.initial(paths=2)
    sigma = gradient_noise(model, loss, data).covariance.dense().diagonal()
    _, g = gradient(model, loss, data)
    rise = sde.drift(0.0, state)
    torch.testing.assert_close(rise[0, 1], (1 - 0.9) / 0.1 * (g * g + sigma / 4), **CLOSE)
    torch.testing.assert_close(rise[0, 0], -g / ((0.1 * (g * g + sigma / 4)).sqrt() + 1e-8), **CLOSE)


def test_adam_without_first_moment_is_rmsprop():
    common = {"lr": 0.1, "noise": 0.5, "eps": 0.01}
    adam = modified_equation(quartic, method="adam", betas=(0.0, 0.9), bias_correction=False, **common)
    rms = modified_equation(quartic, method="rmsprop", betas=(0.0, 0.9), **common)
    x, v, xi = torch.randn(3, 2), torch.rand(3, 2), torch.randn(3, 2)
    full, short = torch.stack([x, 0 * x, v], 1), torch.stack([x, v], 1)
    torch.testing.assert_close(adam.drift(1.0, full)[:, ::2], rms.drift(1.0, short))
    torch.testing.assert_close(adam.factor(1.0, full, xi)[:, ::2], rms.factor(1.0, short, xi))


def test_the_mean_loss_of_many_runs_of_rmsprop_is_that_of_its_equation():
    lr, beta, steps, paths = 0.02, 0.95, 100, 4000
    generator = torch.Generator().manual_seed(1)
    x = torch.full((paths, 2), 1.0)
    v = torch.zeros_like(x)
    sde = modified_equation(bowl, lr=lr, noise=4.0, method="rmsprop", betas=(0.0, beta), eps=0.1)
    z = simulate(sde, sde.initial(x), dt=lr, steps=steps, generator=generator)[-1]
    for _ in range(steps):
        g = x + 2 * torch.randn(x.shape, generator=generator)
        v = beta * v + (1 - beta) * g * g
        x = x - lr * g / (v.sqrt() + 0.1)
    run, law = bowl(x), sde.loss(z)
    error = ((run.var() + law.var()) / paths).sqrt()
    # one standard error is 1 %; the fluctuation of v, which the equation leaves out, is worth (1 − β)/2 = 2.5 %
    assert abs(float(run.mean() - law.mean())) < 4 * float(error) + 0.05 * float(run.mean())
    assert float(run.mean()) < 0.8 * float(bowl(torch.ones(2)))


def test_dtype_and_shape_are_those_of_the_positions():
    model, data, loss = NETWORKS["MLP"]()
    for method, parts in (("sgd", 1), ("momentum", 2), ("asynchronous", 2), ("adam", 3)):
        momentum = 0.5 if parts == 2 else 0.0
        sde = modified_equation(model, loss, data, lr=0.05, method=method, momentum=momentum, batch_size=3)
        state = sde.initial(paths=2)
        out = simulate(sde, state, dt=0.02, steps=2, generator=torch.Generator().manual_seed(0))[-1]
        assert out.dtype == torch.float32 and out.shape == state.shape
        assert state.shape[1:-1] == (() if parts == 1 else (parts,))
        again = simulate(sde, state, dt=0.02, steps=2, generator=torch.Generator().manual_seed(0))[-1]
        assert torch.equal(out, again) and sde.loss(out).shape == (2,)


def test_no_paths_of_a_network_are_no_paths():
    model, data, loss = NETWORKS["MLP"]()
    for method, order, noise in (("sgd", 2, "local"), ("sgd", 1, "frozen"), ("adam", 1, "local")):
        sde = modified_equation(model, loss, data, lr=0.1, method=method, order=order, noise=noise)
        none = sde.initial(paths=0)
        assert simulate(sde, none, dt=0.1, steps=2)[-1].shape == none.shape
        assert sde.loss(none).shape == (0,)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"lr": 0.0}, "lr is 0"),
        ({"lr": float("inf")}, "finite"),
        ({"order": 3}, "order is 3"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"method": "adagrad"}, "choose from sgd"),
        ({"momentum": 1.0}, "momentum is 1"),
        ({"momentum": None}, "schedule of its own"),
        ({"method": "adam", "momentum": 0.9}, "takes betas"),
        ({"betas": (0.9, 1.0)}, "betas are"),
        ({"replacement": False}, "give samples="),
        ({"replacement": False, "samples": 4, "batch_size": 5}, "at most the 4"),
        ({"noise": -1.0}, "not negative"),
        ({"noise": torch.ones(2, 3)}, "symmetric"),
        ({"noise": -torch.eye(2)}, "eigenvalue"),
        ({"noise": "local"}, "covariance"),
        ({"loss": F.mse_loss}, "leave them out"),
    ],
)
def test_bad_arguments_are_named(change, match):
    with pytest.raises(ArgumentError, match=match):
        modified_equation(bowl, **({"lr": 0.1} | change))


def test_what_is_not_known_is_refused():
    with pytest.raises(UnsupportedError, match="only order 1"):
        modified_equation(bowl, lr=0.1, order=2, method="adam")
    with pytest.raises(UnsupportedError, match="only order 1"):
        modified_equation(bowl, lr=0.1, order=2, method="nesterov", momentum=None)
    with pytest.raises(ShapeError, match="one number a point"):
        modified_equation(lambda x: x, lr=0.1).drift(0.0, torch.ones(3, 2))
    with pytest.raises(ShapeError, match="needs \\(..., 2, d\\)"):
        modified_equation(bowl, lr=0.1, momentum=0.5).noise_shape(torch.ones(3, 5))
    with pytest.raises(ArgumentError, match="positions to start"):
        modified_equation(bowl, lr=0.1).initial()
    model, data, loss = NETWORKS["CNN with batch norm, training"]()
    with pytest.raises(UnsupportedError, match="batch norm"):
        adam = modified_equation(model, loss, data, lr=0.1, method="adam")
        adam.drift(0.0, adam.initial())
    live = nn.Sequential(
        nn.Linear(2, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 1)
    ).eval()
    pair = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), torch.ones(4, 1)
    with pytest.raises(UnsupportedError, match="running averages"):
        rmsprop = modified_equation(live, F.mse_loss, pair, lr=0.1, method="rmsprop")
        rmsprop.drift(0.0, rmsprop.initial())
    mlp, data, _ = NETWORKS["MLP"]()
    with pytest.raises(ArgumentError, match="mean over samples"):
        modified_equation(mlp, lambda a, b: F.cross_entropy(a, b, reduction="sum"), data, lr=0.1)
    with pytest.raises(ShapeError, match="scalar"):
        modified_equation(mlp, lambda a, b: F.cross_entropy(a, b, reduction="none"), data, lr=0.1)
    with pytest.raises(ArgumentError, match="objective has no gradient"):
        modified_equation(lambda x: torch.zeros(x.shape[:-1]), lr=0.1).drift(0.0, torch.ones(3))
    broken = nn.Linear(2, 1)
    with torch.no_grad():
        broken.weight[0, 0] = float("nan")
    with pytest.raises(DivergenceError, match="loss is nan"):
        modified_equation(broken, F.mse_loss, (torch.ones(3, 2), torch.ones(3, 1)), lr=0.1)
    with pytest.raises(ArgumentError, match="loss or data is missing"):
        modified_equation(mlp, lr=0.1)
    with pytest.raises(ArgumentError, match="'local' or 'frozen'"):
        modified_equation(mlp, F.cross_entropy, data, lr=0.1, noise=1.0)
    with pytest.raises(ShapeError, match="parameters"):
        modified_equation(mlp, F.cross_entropy, data, lr=0.1).drift(0.0, torch.ones(3))
