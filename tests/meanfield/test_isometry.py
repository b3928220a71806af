"""Jacobian spectra against dense Jacobians, exact finite-width moments and the mean-field limit."""

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch
from torch import nn

import bolza
from bolza.core.errors import ArgumentError, DivergenceError, ShapeError, UnsupportedError
from bolza.meanfield import critical_init_
from bolza.meanfield.isometry import isometry, isometry_theory
from networks import NETWORKS, in_double

module = import_module("bolza.meanfield.isometry")  # the package exports the function under this name


def stack(width, depth, activation=None, orthogonal=False):
    layers = []
    for _ in range(depth):
        layer = nn.Linear(width, width, bias=False).double()
        (nn.init.orthogonal_ if orthogonal else nn.init.normal_)(layer.weight)
        if not orthogonal:
            with torch.no_grad():
                layer.weight.div_(math.sqrt(width))
        layers += [layer] if activation is None else [layer, activation]
    return nn.Sequential(*layers)


def gaussian_products(width, depth):
    """Exact E (1/n) tr (JJᵀ)² of a product of Gaussian matrices: a' = (1 + 1/n) a + b, b' = b + 2a/n²."""
    a = b = 1.0
    for _ in range(depth):
        a, b = (1 + 1 / width) * a + b, b + 2 * a / width**2
    return a, b


def test_orthogonal_linear_networks_are_isometries():
    result = isometry(stack(20, 6, orthogonal=True), torch.randn(3, 20, dtype=torch.float64))
    assert result.exact and result.singular_values.shape == (3, 20)
    torch.testing.assert_close(
        result.singular_values, torch.ones(3, 20, dtype=torch.float64), rtol=0, atol=1e-12
    )
    assert result.variance.value == pytest.approx(0, abs=1e-12)
    assert result.condition.value == pytest.approx(1, abs=1e-10)


def test_gaussian_linear_networks_have_the_variance_of_theory():
    """Var[s²] = L in the limit; at finite width the second moments of the product are known exactly."""
    width, depth, draws = 60, 5, 30
    x = torch.zeros(1, width, dtype=torch.float64)
    results = [isometry(stack(width, depth), x) for _ in range(draws)]
    values = torch.tensor([r.variance.value for r in results])
    a, b = gaussian_products(width, depth)
    assert a - b == pytest.approx(depth, rel=0.2)  # the limit
    assert abs(float(values.mean()) - (a - b)) < 4 * float(values.std()) / math.sqrt(draws)
    means = torch.tensor([r.mean_square.value for r in results])
    assert abs(float(means.mean()) - 1) < 4 * float(means.std()) / math.sqrt(draws)


@pytest.mark.parametrize("depth, edge", [(5, 14.930), (10, 28.531)])
def test_gaussian_linear_networks_end_at_the_edge_of_theory(depth, edge):
    """(L+1)^(L+1) / L^L, approached from below as the width grows (14.5 and 26.2 were measured at 600)."""
    assert (depth + 1) ** (depth + 1) / depth**depth == pytest.approx(edge, abs=1e-3)
    result = isometry(stack(300, depth), torch.zeros(1, 300, dtype=torch.float64))
    assert 0.75 * edge < result.largest.value**2 < 1.1 * edge


def test_orthogonal_relu_networks_have_variance_of_their_depth():
    """μ₂/μ₁² = 2 makes Var[s²] = L: isometry is out of reach (5.4 at width 600, with the finite-width excess)."""
    depth, width = 5, 300
    net = stack(width, depth, nn.ReLU(), orthogonal=True)
    with torch.no_grad():
        for layer in net[::2]:
            layer.weight.mul_(math.sqrt(2))
    result = isometry(net, torch.randn(6, width, dtype=torch.float64))
    assert result.mean_square.value == pytest.approx(1, abs=0.15)
    assert result.relative_variance == pytest.approx(depth, rel=0.25)


def tanh_network(q, scheme, depth=30, width=200):
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())]
    net = nn.Sequential(*layers).double()
    critical_init_(net, scheme=scheme, q=q, generator=torch.Generator().manual_seed(0))
    x = torch.randn(4, width, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    return net, x


@pytest.mark.parametrize("q, variance, largest", [(0.05, 0.39, 1.60), (0.01, 0.023, 1.12)])
def test_orthogonal_tanh_networks_have_the_spectrum_of_theory_by_products_alone(
    monkeypatch, q, variance, largest
):
    """Depth 30; 0.40 and 0.022 in the limit, 0.39 and 0.023 measured at width 400 with exact spectra."""
    monkeypatch.setattr(module, "_EXACT", 5)
    net, x = tanh_network(q, "orthogonal")
    theory = isometry_theory("tanh", q=q, depth=30)
    result = isometry(net, x, probes=16)
    scale = math.sqrt(result.mean_square.value)
    assert not result.exact
    assert result.relative_variance == pytest.approx(theory.variance, rel=0.2)
    assert result.relative_variance == pytest.approx(variance, rel=0.2)
    assert result.largest.value / scale == pytest.approx(largest, rel=0.05)
    assert result.largest.value / scale == pytest.approx(theory.largest, rel=0.05)


def test_gaussian_tanh_networks_are_far_from_isometry():
    net, x = tanh_network(0.01, "gaussian")
    theory = isometry_theory("tanh", q=0.01, depth=30, orthogonal=False)
    assert theory.variance == pytest.approx(30.02, abs=0.02)
    result = isometry(net, x)
    assert 12 < result.relative_variance < 36  # 22.8 at width 400; a thousand times the orthogonal one
    assert result.condition.value > 1e3


def test_gaussian_products_have_their_moments_and_edge_by_products_alone(monkeypatch):
    monkeypatch.setattr(module, "_EXACT", 5)
    width, depth = 150, 5
    x = torch.zeros(8, width, dtype=torch.float64)  # a linear network: eight times as many probes
    result = isometry(stack(width, depth), x, probes=32)
    a, b = gaussian_products(width, depth)
    assert result.variance.value == pytest.approx(a - b, rel=0.3)
    assert 0.75 * 14.930 < result.largest.value**2 < 1.1 * 14.930


@pytest.mark.parametrize("depth, edge", [(1, 4.0), (2, 6.75), (5, 14.93), (10, 28.531)])
def test_theory_has_the_edge_of_gaussian_products(depth, edge):
    theory = isometry_theory("linear", q=1.0, depth=depth, orthogonal=False)
    assert theory.largest**2 == pytest.approx(edge, abs=2e-3)
    assert theory.variance == pytest.approx(depth) and theory.mean_square == pytest.approx(1)


def test_theory_of_orthogonal_relu_has_variance_of_its_depth_and_the_edge_of_bernoulli_factors():
    """d is 0 or 2 with equal chance: x(M) = 2 (M + ½)/M, so s² = (1 + M)/M · ((2 M + 1)/(1 + M))^L."""
    theory = isometry_theory("relu", q=3.0, depth=8)
    m = torch.logspace(-4, 2, 20001, dtype=torch.float64)
    edge = ((1 + m) / m * ((2 * m + 1) / (1 + m)) ** 8).min()
    assert theory.variance == pytest.approx(8)
    assert theory.largest**2 == pytest.approx(float(edge), rel=1e-4)
    assert isometry_theory("tanh", q=0.3, depth=4, weight_var=1.0).mean_square < 0.5
    with pytest.raises(ArgumentError, match="q is 0"):
        isometry_theory("tanh", q=0.0, depth=4)


@pytest.mark.parametrize("name", NETWORKS)
def test_singular_values_equal_those_of_the_dense_jacobian(name):
    model, (x, _), _ = in_double(NETWORKS[name]())
    if not x.is_floating_point():
        result = isometry(model, x)
        assert result.singular_values.shape == (len(x), min(result.input_size, result.output_size))
        assert result.mean_square.value > 0
        return
    if name == "CNN with batch norm, training":
        model.eval()  # the reference below is of samples taken alone
    result = isometry(model, x, max_samples=2)
    for i in range(2):
        model.eval()
        j = torch.autograd.functional.jacobian(model, x[i : i + 1])
        j = j.reshape(-1, x[0].numel())
        torch.testing.assert_close(result.singular_values[i], torch.linalg.svdvals(j), rtol=1e-9, atol=1e-12)
    assert result.exact and (result.input_size, result.output_size) == (j.shape[1], j.shape[0])


def test_more_outputs_than_inputs_are_taken_from_the_smaller_side(monkeypatch):
    net = nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 40)).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    monkeypatch.setattr(module, "_ROWS", 5)
    j = torch.stack([torch.autograd.functional.jacobian(net, row) for row in x])
    torch.testing.assert_close(
        isometry(net, x).singular_values, torch.linalg.svdvals(j), rtol=1e-10, atol=1e-12
    )


def test_random_probes_agree_with_the_exact_spectrum(monkeypatch):
    net = stack(30, 3, nn.Tanh())
    x = torch.randn(16, 30, dtype=torch.float64)
    exact = isometry(net, x)
    monkeypatch.setattr(module, "_EXACT", 5)
    probed = isometry(net, x, probes=16)
    assert not probed.exact and math.isnan(probed.condition.value)
    assert abs(probed.mean_square.value - exact.mean_square.value) < 4 * probed.mean_square.error
    assert abs(probed.variance.value - exact.variance.value) < 4 * probed.variance.error
    torch.testing.assert_close(probed.singular_values[:, 0], exact.singular_values[:, 0], rtol=1e-6, atol=0)


def test_batch_norm_in_training_mode_uses_the_statistics_of_the_data():
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    x = 3 * torch.randn(50, 4, dtype=torch.float64) + 1
    variance = net[0](x).detach().var(0, unbiased=False)
    j = net[2].weight @ ((variance + 1e-5) ** -0.5 * torch.eye(5, dtype=torch.float64)) @ net[0].weight
    result = isometry(net, x, max_samples=2)
    torch.testing.assert_close(
        result.singular_values[0], torch.linalg.svdvals(j.detach()), rtol=1e-9, atol=1e-12
    )
    assert net.training and int(net[1].num_batches_tracked) == 0


def test_a_range_of_stages_is_the_jacobian_between_its_states():
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    system = bolza.as_system(net, x)
    states = bolza.rollout(system, x).states
    result = isometry(system, x, stages=(1, system.horizon))
    assert result.input_size == states[1][0].numel() and result.output_size == 3
    whole = isometry(net, x, stages=(0, system.horizon))
    torch.testing.assert_close(
        whole.singular_values, isometry(net, x).singular_values, rtol=1e-10, atol=1e-12
    )


def test_bad_input_is_named():
    net, x = nn.Linear(2, 2), torch.randn(3, 2)
    with pytest.raises(ArgumentError, match="max_samples is 0"):
        isometry(net, x, max_samples=0)
    with pytest.raises(ArgumentError, match="stages"):
        isometry(net, x, stages=(1, 9))
    with pytest.raises(DivergenceError, match="finite"):
        isometry(nn.Sequential(net, nn.Tanh()), x / 0)

    class Total(nn.Module):
        def forward(self, x):
            return x.sum()

    with pytest.raises(ShapeError, match="samples first"):
        isometry(Total(), x)
    embedding = nn.Embedding(5, 2)
    with pytest.raises(UnsupportedError, match="embedding"):
        isometry(embedding, torch.tensor([[1, 2]]), stages=(0, 1))
