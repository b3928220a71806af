"""Gradient noise against stacked gradients, closed forms and simulated mini-batches."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from bolza.core.errors import ArgumentError, DataError, ShapeError, UnsupportedError
from bolza.ops.curvature import hessian_operator
from bolza.ops.krylov import LinearOperator
from bolza.ops.noise import PerSampleGradients
from bolza.sde import gradient_noise
from networks import NETWORKS, in_double

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def centred(model, loss, data):
    """Centred gradients (N, d) and their mean, explicitly."""
    samples = PerSampleGradients(model, loss, data)
    g = samples.dots(torch.eye(samples.size, dtype=samples.dtype))
    return g - g.mean(0), g.mean(0)


def regression(n=200, d=4, seed=0, width=None):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, dtype=torch.float64, generator=generator)
    y = x.sum(1, keepdim=True) + torch.randn(n, 1, dtype=torch.float64, generator=generator)
    net = nn.Sequential(nn.Linear(d, width), nn.Tanh(), nn.Linear(width, 1)) if width else nn.Linear(d, 1)
    return net.double(), F.mse_loss, (x, y)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_operator_equals_the_dense_covariance(name):
    model, data, loss = in_double(NETWORKS[name]())
    case = (model, loss, data)
    u, mean = centred(*case)
    dense = u.T @ u / len(u)
    for memory in (2**30, 0):
        noise = gradient_noise(*case, memory=memory)
        torch.testing.assert_close(noise.covariance.dense(), dense, **CLOSE)
        torch.testing.assert_close(noise.mean, mean, **CLOSE)
        assert noise.trace().value == pytest.approx(float(dense.trace()), rel=1e-10)
        values = torch.linalg.eigvalsh(dense).flip(0)
        result = noise.eigh(3, tol=1e-12)
        torch.testing.assert_close(result.eigenvalues, values[:3], **CLOSE)
        torch.testing.assert_close(
            dense @ result.eigenvectors, result.eigenvectors * values[:3], rtol=1e-5, atol=1e-7
        )


@given(st.integers(2, 12), st.integers(1, 5), st.integers(1, 4), st.booleans())
@settings(max_examples=15, deadline=None)
def test_scale_and_trace_hold_for_any_shape(n, d, batch, replacement):
    case = regression(n, d, seed=n + 10 * d, width=3)
    u, _ = centred(*case)
    batch = min(batch, n)
    noise = gradient_noise(*case, replacement=replacement, chunk=3)
    factor = 1 / batch if replacement else (n - batch) / (batch * (n - 1))
    v = torch.ones(noise.size, dtype=torch.float64)
    torch.testing.assert_close(noise.minibatch(batch) @ v, factor * u.T @ (u @ v) / n, **CLOSE)
    assert noise.trace().value == pytest.approx(float(u.square().sum()) / n, rel=1e-9)


def test_regression_has_the_covariance_of_the_review():
    """Σ = Hδδᵀ H + H (δᵀHδ) + σ² H for Gaussian inputs, to within the error of 40,000 samples."""
    generator = torch.Generator().manual_seed(1)
    n, sigma = 40_000, 0.7
    h = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    delta = torch.tensor([0.4, -0.9], dtype=torch.float64)
    x = torch.randn(n, 2, dtype=torch.float64, generator=generator) @ torch.linalg.cholesky(h).T
    y = sigma * torch.randn(n, 1, dtype=torch.float64, generator=generator)
    net = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(delta)
    noise = gradient_noise(net, lambda z, y: F.mse_loss(z, y) / 2, (x, y), memory=0)
    bend = h @ delta
    expected = torch.outer(bend, bend) + h * (delta @ bend) + sigma**2 * h
    g = noise.gradients.dots(torch.eye(2, dtype=torch.float64)) - noise.mean
    products = g[:, :, None] * g[:, None, :]
    z = (noise.covariance.dense() - expected) / (products.std(0) / math.sqrt(n))
    assert z.abs().max() < 4
    trace = noise.trace()
    assert abs(trace.value - float(expected.trace())) < 4 * trace.error
    scale = noise.noise_scale()
    assert abs(scale.value - float(expected.trace() / (bend @ bend))) < 4 * scale.error


@pytest.mark.parametrize("replacement", [True, False])
def test_simulated_minibatches_have_the_stated_covariance(replacement):
    case = regression(n=10, d=2)
    noise = gradient_noise(*case, replacement=replacement)
    g = noise.gradients.dots(torch.eye(3, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    draws, batch = 40_000, 4
    if replacement:
        picks = torch.randint(0, 10, (draws, batch), generator=generator)
    else:
        picks = torch.rand(draws, 10, generator=generator).argsort(1)[:, :batch]
    squares = (g[picks].mean(1) - noise.mean).square().sum(1)
    exact = float(noise.minibatch(batch).dense().trace())
    assert abs(float(squares.mean()) - exact) < 4 * float(squares.std()) / math.sqrt(draws)


def test_samples_of_the_noise_have_its_covariance():
    noise = gradient_noise(*regression(n=50, d=2), replacement=False)
    draws = noise.sample(torch.Generator().manual_seed(0), batch_size=5, count=40_000)
    exact = noise.minibatch(5).dense()
    products = draws[:, None] * draws[None, :]
    z = (products.mean(-1) - exact) / (products.std(-1) / math.sqrt(draws.shape[1]))
    assert z.abs().max() < 4
    assert noise.sample(torch.Generator().manual_seed(0)).shape == (3,)


def test_three_routes_to_the_effective_rank_agree():
    case = regression(n=40, d=8, width=6)
    by_gram = gradient_noise(*case)  # N < d: inner products of samples
    u, _ = centred(*case)
    spectrum = torch.linalg.eigvalsh(u @ u.T / 40)
    exact = float(spectrum.sum() ** 2 / spectrum.square().sum())
    assert by_gram.size > by_gram.samples
    assert by_gram.effective_rank().value == pytest.approx(exact, rel=1e-10)
    estimated = gradient_noise(*case, memory=0).effective_rank(60, torch.Generator().manual_seed(0))
    assert abs(estimated.value - exact) < 4 * estimated.error
    small = regression(n=40, d=2, width=3)  # d < N: the covariance itself
    u, _ = centred(*small)
    spectrum = torch.linalg.eigvalsh(u.T @ u / 40)
    exact = float(spectrum.sum() ** 2 / spectrum.square().sum())
    assert gradient_noise(*small).effective_rank().value == pytest.approx(exact, rel=1e-10)


def test_error_bars_are_the_jackknife_computed_by_leaving_out_samples():
    for width in (None, 8):
        model, loss, (x, y) = regression(n=15, d=3, width=width)
        noise = gradient_noise(model, loss, (x, y))
        keep = [[j for j in range(15) if j != i] for i in range(15)]
        parts = [gradient_noise(model, loss, (x[rows], y[rows])) for rows in keep]
        for value in (
            lambda n: n.trace(),
            lambda n: n.effective_rank(),
            lambda n: n.snr(),
            lambda n: n.squared_gradient(),
            lambda n: n.noise_scale(),
            lambda n: next(iter(n.per_layer_snr().values())),
        ):
            left_out = torch.tensor([value(part).value for part in parts], dtype=torch.float64)
            error = math.sqrt(14 / 15 * float((left_out - left_out.mean()).square().sum()))
            assert value(noise).error == pytest.approx(error, rel=1e-6)


def test_noise_scale_and_squared_gradient_are_unbiased_over_data_sets():
    net, loss, (x, y) = regression(n=8000, d=3)
    truth = gradient_noise(net, loss, (x, y))
    estimates = []
    for i in range(200):
        rows = slice(40 * i, 40 * (i + 1))
        estimates.append(gradient_noise(net, loss, (x[rows], y[rows])).squared_gradient().value)
    estimates = torch.tensor(estimates)
    naive_bias = truth.trace().value / 40
    error = float(estimates.std()) / math.sqrt(200)
    assert abs(float(estimates.mean()) - truth.squared_gradient().value) < 4 * error < naive_bias


def test_the_trace_with_the_hessian_is_exact_with_enough_products_and_honest_with_fewer():
    case = regression(n=30, d=4, width=5)
    noise = gradient_noise(*case)
    h = hessian_operator(*case)
    exact = float((h.dense() @ noise.covariance.dense()).trace())
    assert noise.trace_with(h, products=30).value == pytest.approx(exact, rel=1e-9)
    assert noise.trace_with(h.dense(), products=30).value == pytest.approx(exact, rel=1e-9)
    few = noise.trace_with(h, products=12, generator=torch.Generator().manual_seed(0))
    assert few.error > 0 and abs(few.value - exact) < 4 * few.error
    with pytest.raises(ShapeError, match="size 3"):
        noise.trace_with(torch.eye(3, dtype=torch.float64))


def test_with_a_multiple_of_the_identity_the_two_critical_batch_sizes_are_one():
    case = regression(n=30, d=4)
    noise = gradient_noise(*case)
    identity = LinearOperator.from_matrix(3.0 * torch.eye(noise.size, dtype=torch.float64))
    simple = noise.critical_batch_size()
    assert simple == noise.noise_scale()
    assert noise.critical_batch_size(identity).value == pytest.approx(simple.value, rel=1e-9)


def test_layers_are_named_by_module_and_frozen_signals_have_large_ratios():
    model, loss, (x, y) = regression(n=60, d=3, width=4)
    noise = gradient_noise(model, loss, (x, y))
    layers = noise.per_layer_snr()
    assert list(layers) == ["0", "2"]
    u, mean = centred(model, loss, (x, y))
    trace = float(u[:, :16].square().sum()) / 59
    assert layers["0"].value == pytest.approx(
        (float(mean[:16].square().sum()) - trace / 60) / trace, rel=1e-9
    )
    shifted = gradient_noise(model, loss, (x, y + 100))
    assert shifted.per_layer_snr()["2"].value > layers["2"].value


def test_a_gradient_that_drowns_has_an_infinite_critical_batch():
    net, loss, (x, y) = regression(n=40, d=2)
    with_bias = torch.cat([x, torch.ones_like(y)], 1)
    solution = torch.linalg.lstsq(with_bias, y).solution[:, 0]  # the mean gradient vanishes there
    with torch.no_grad():
        net.weight.copy_(solution[None, :2])
        net.bias.copy_(solution[2:])
    noise = gradient_noise(net, loss, (x, y))
    assert noise.squared_gradient().value < 0 < noise.trace().value
    assert noise.noise_scale().value == noise.critical_batch_size().value == math.inf


def test_equal_samples_have_no_noise():
    net = nn.Linear(2, 1).double()
    data = (torch.ones(5, 2, dtype=torch.float64), torch.ones(5, 1, dtype=torch.float64))
    noise = gradient_noise(net, F.mse_loss, data)
    assert noise.trace().value == pytest.approx(0, abs=1e-20)
    assert noise.noise_scale().value == pytest.approx(0, abs=1e-12)


def test_the_temperature_is_half_of_lr_over_batch():
    noise = gradient_noise(*regression(n=50))
    assert noise.temperature(0.1, 5) == pytest.approx(0.01)
    assert noise.temperature(0.1, 5, momentum=0.9) == pytest.approx(0.1)
    without = gradient_noise(*regression(n=50), replacement=False)
    assert without.temperature(0.1, 5) == pytest.approx(0.01 * 45 / 49)
    assert without.temperature(0.1, 50) == 0


def test_arguments_out_of_range_are_named():
    noise = gradient_noise(*regression(n=6, d=2), replacement=False)
    with pytest.raises(ArgumentError, match="batch_size is 7"):
        noise.minibatch(7)
    with pytest.raises(ArgumentError, match="batch_size is 0"):
        noise.scale(0)
    with pytest.raises(ArgumentError, match="k is 4"):
        noise.eigh(4)
    with pytest.raises(ArgumentError, match="momentum is 1"):
        noise.temperature(0.1, 2, momentum=1)


def test_float32_in_gives_float32_out():
    model, data, loss = NETWORKS["causal attention"]()
    noise = gradient_noise(model, loss, data)
    assert noise.sample().dtype == noise.matvec(noise.mean).dtype == torch.float32
    assert 1 <= noise.effective_rank().value <= 5


def test_copies_of_one_sample_have_no_direction_of_noise():
    model, (x, y), loss = NETWORKS["MLP"]()
    copies = x[:1].expand(12, *x.shape[1:]).contiguous(), y[:1].expand(12, *y.shape[1:]).contiguous()
    noise = gradient_noise(model, loss, copies)
    assert noise.effective_rank().value == 0 and noise.trace().value < 1e-6 * float(noise.mean.square().sum())


def test_data_in_another_order_at_every_pass_are_refused_where_the_order_counts():
    model, (x, y), loss = NETWORKS["MLP"]()
    shuffled = DataLoader(TensorDataset(x.repeat(3, 1), y.repeat(3, *[1] * (y.ndim - 1))), 5, shuffle=True)
    noise = gradient_noise(model, loss, shuffled, memory=0)
    one = torch.eye(noise.size)
    with pytest.raises(DataError, match="shuffle=False"):
        noise.trace_with(one)
    stored = gradient_noise(model, loss, shuffled)
    ordered = gradient_noise(model, loss, list(shuffled), memory=0)
    for found in (stored, ordered):
        assert found.trace_with(one).value == pytest.approx(found.trace().value, rel=1e-4)


def test_a_wrapped_model_is_refused_with_the_module_to_give_instead():
    model, data, loss = NETWORKS["MLP"]()
    with pytest.raises(UnsupportedError, match="model.module"):
        gradient_noise(nn.DataParallel(model), loss, data)
