"""Staircases: closed forms against quantiser tables, quadrature and wide networks."""

import math

import pytest
import torch
from torch import nn

from bolza.core.errors import ArgumentError
from bolza.meanfield import (
    Activation,
    Staircase,
    correlation_map,
    fixed_point,
    propagate,
    quantised_depth,
    staircase,
)


def test_one_minus_chi_is_the_distortion_of_the_best_uniform_quantiser_of_a_gaussian() -> None:
    """Distortions of the best uniform quantiser of a unit Gaussian, as tabulated in textbooks."""
    table = {2: 0.3634, 3: 0.1902, 4: 0.1188, 8: 0.03744, 16: 0.01154, 32: 0.00349}
    found = 1 - quantised_depth(torch.tensor(list(table))).chi
    for got, want in zip(found.tolist(), table.values(), strict=True):
        assert got == pytest.approx(want, rel=2e-3)
    assert float(quantised_depth(2).xi) == pytest.approx(1 / math.log(math.pi / 2), rel=1e-12)


def test_the_best_spacing_is_best() -> None:
    best = quantised_depth(5)
    near = quantised_depth(5, best.spacing * torch.tensor([0.99, 1.0, 1.01], dtype=torch.float64))
    assert near.chi.argmax() == 1
    assert near.chi[1] == pytest.approx(float(best.chi), rel=1e-9)


def test_the_depth_scale_is_that_of_the_general_fixed_point_which_biases_only_shorten() -> None:
    depth = quantised_depth(4)
    act = staircase(4, float(depth.spacing))
    point = fixed_point(act, float(depth.weight_var), torch.tensor([0.0, 0.01, 0.1]))
    assert float(point.q[0]) == pytest.approx(1.0, abs=1e-9)
    assert float(point.c[0]) == pytest.approx(0.0, abs=1e-9)
    assert float(point.chi_c[0]) == pytest.approx(float(depth.chi), rel=1e-9)
    assert float(point.xi_grad[0]) == pytest.approx(1 / abs(math.log(depth.chi_grad)), rel=1e-6)
    assert (point.xi_c.diff() < 0).all() and torch.isinf(point.chi_1).all()


def test_chi_is_the_finite_difference_of_the_correlation_map() -> None:
    depth, step = quantised_depth(3), 1e-4
    act = staircase(3, float(depth.spacing))
    w = float(depth.weight_var)
    ends = [float(correlation_map(act, w, 0.0, 1.0, 1.0, c, 1)[2][1]) for c in (-step, step)]
    assert (ends[1] - ends[0]) / (2 * step) == pytest.approx(float(depth.chi), rel=1e-6)


def test_the_module_rounds_forward_and_is_a_line_backward() -> None:
    layer = Staircase(5, spacing=0.5)
    h = torch.linspace(-2, 2, 401, requires_grad=True)
    y = layer(h)
    assert torch.unique(y.detach()).tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0]
    assert (y[1:] >= y[:-1]).all()
    y.sum().backward()
    assert h.grad is not None
    assert torch.equal(h.grad, torch.where(h.detach().abs() <= 1.25, 1.0, 0.0))
    assert layer(h.double()).dtype == torch.float64
    assert "levels=5" in repr(layer)


def test_a_wide_quantised_network_does_what_theory_says() -> None:
    depth = quantised_depth(4)
    g = torch.Generator().manual_seed(0)
    layers: list[nn.Module] = []
    for n in (64, 512, 512, 512):
        linear = nn.Linear(n, 512, bias=False)
        nn.init.normal_(linear.weight, std=math.sqrt(float(depth.weight_var) / n), generator=g)
        layers += [linear, Staircase(4, float(depth.spacing))]
    x = torch.randn(6, 64, generator=g) + torch.randn(1, 64, generator=g)
    rows = propagate(nn.Sequential(*layers), x).layers
    assert {r.source for r in rows} == {"theory"}
    for row in rows:
        assert abs(row.q_theory - row.q_measured) < 3 * row.q_error + 4 / 512 * row.q_measured, row
        assert abs(row.c_theory - row.c_measured) < 3 * row.c_error + 4 / 512, row
        gap = abs(math.log(row.grad_theory / row.grad_measured))
        assert gap < 3 * row.grad_error / row.grad_measured + 3 * math.sqrt(4 / 512), row


def test_two_point_moments_by_angle_are_those_by_quadrature_in_the_plane() -> None:
    act = staircase(4, 0.9)
    plain = Activation(act.name, act.phi, act.derivative, act.kinks, true_derivative=act.true_derivative)
    q_u, q_v = torch.tensor([0.5, 1.0, 4.0]), torch.tensor([0.7, 1.0, 0.3])
    c = torch.tensor([-0.8, 0.3, 0.95])
    assert torch.allclose(act.cross(q_u, q_v, c), plain.cross(q_u, q_v, c), atol=1e-9)
    assert torch.allclose(act.cross_slope(q_u, q_v, c), plain.cross_slope(q_u, q_v, c), atol=1e-9)
    one = torch.ones(1)
    assert torch.allclose(act.cross(one, one, one), act.second(one), atol=1e-6)
    assert torch.allclose(act.cross_slope(one, one, one), act.slope(one), atol=1e-6)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ArgumentError, match="levels=1"):
        quantised_depth(1)
    with pytest.raises(ArgumentError, match="spacing=0"):
        staircase(4, 0)
    with pytest.raises(ArgumentError, match="spacing=-1"):
        quantised_depth(4, -1.0)
