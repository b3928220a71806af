"""Noise of equal trace: closed forms of the rise, and the covariance of what is drawn for a network."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bolza.core.errors import ArgumentError, ShapeError
from bolza.ops.curvature import hessian_operator
from bolza.ops.krylov import top_eigenpairs
from bolza.sde import (
    equal_trace_covariance,
    equal_trace_noise,
    expected_rise,
    gradient_noise,
    stationary_covariance,
)

F = torch.float64
H, SIGMA = torch.diag(torch.tensor([2.0, 0.5], dtype=F)), torch.diag(torch.tensor([1.0, 0.2], dtype=F))
TILTED = torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=F)
SHAPES = ("isotropic", "diagonal", "covariance", "hessian", "top")


@pytest.mark.parametrize(("time", "rise"), [(0.1, 0.00435891), (1.0, 0.0138514), (10.0, 0.0149999)])
def test_the_rise_of_the_review(time, rise):
    assert float(expected_rise(H, SIGMA, lr=0.05, time=time)) == pytest.approx(rise, rel=5e-6)


def test_the_rise_of_matrices_that_do_not_commute_is_that_of_the_moment_equation():
    """dS/dt = −HS − SH + ηΣ by small steps, and its end by the Lyapunov equation."""
    h, lr, time, steps = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F), 0.1, 0.7, 2000
    s = torch.zeros(2, 2, dtype=F)
    dt = time / steps
    for _ in range(steps):  # midpoint
        half = s + dt / 2 * (lr * TILTED - h @ s - s @ h)
        s = s + dt * (lr * TILTED - h @ half - half @ h)
    assert float(expected_rise(h, TILTED, lr=lr, time=time)) == pytest.approx(
        float((h * s).sum()) / 2, rel=1e-6
    )
    end = stationary_covariance(h, TILTED, lr=lr, batch_size=3, exact=False).excess_loss
    assert float(expected_rise(h, TILTED, lr=lr, time=1e3, batch_size=3)) == pytest.approx(
        float(end), rel=1e-10
    )


def test_short_times_rise_by_the_trace_of_curvature_and_noise_and_steep_noise_rises_first():
    time = 1e-6
    rises = {}
    for shape in SHAPES:
        c = equal_trace_covariance(shape, SIGMA, H)
        rises[shape] = float(expected_rise(H, c, lr=0.1, time=time))
        assert rises[shape] == pytest.approx(0.1 * time / 2 * float((H @ c).trace()), rel=1e-4)
    assert rises["top"] > rises["covariance"] > rises["isotropic"]
    assert rises["hessian"] > rises["isotropic"] and rises["diagonal"] == rises["covariance"]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_has_the_trace_of_the_covariance_and_none_points_down(shape):
    hessian = torch.stack([TILTED, torch.diag(torch.tensor([1.0, -2.0], dtype=F))])
    found = equal_trace_covariance(shape, TILTED.expand(2, 2, 2), hessian)
    torch.testing.assert_close(found.diagonal(dim1=-2, dim2=-1).sum(-1), torch.full((2,), 1.5, dtype=F))
    assert float(torch.linalg.eigvalsh(found).min()) > -1e-12
    if shape in ("hessian", "top"):
        assert float(found[1, 1, 1].abs()) < 1e-12  # nothing along negative curvature
    if shape == "diagonal":
        torch.testing.assert_close(found[0], torch.diag(TILTED.diagonal()))


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_drawn_for_a_network_has_the_dense_covariance(shape):
    """Each entry of the sample covariance within five of its standard errors."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 3, dtype=F, generator=generator)
    net = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        net.weight.fill_(0.3)
    data = (x, x.sum(1, keepdim=True) + torch.randn(30, 1, dtype=F, generator=generator))
    noise = gradient_noise(net, nn.functional.mse_loss, data)
    operator = hessian_operator(net, nn.functional.mse_loss, data)
    eigen = top_eigenpairs(operator, 3, tol=1e-12, which="largest algebraic", generator=generator)
    count = 4000
    drawn = equal_trace_noise(noise, shape, batch_size=2, hessian=eigen, count=count, generator=generator)
    wanted = equal_trace_covariance(shape, noise.covariance.dense() / 2, operator.dense())
    variance = wanted.diagonal()
    # fourth moments of a Gaussian; a diagonal draw with signs has the kurtosis of a Gaussian too, entry by entry
    error = ((variance[:, None] * variance + wanted.square()) / count).sqrt() * math.sqrt(3)
    off = ((drawn @ drawn.T / count - wanted).abs() / error.clamp_min(1e-9)).max()
    assert float(off) < 5
    assert equal_trace_noise(noise, shape, hessian=eigen, generator=generator).shape == (3,)


def test_what_is_missing_or_unknown_is_named():
    with pytest.raises(ArgumentError, match="shape is 'round'"):
        equal_trace_covariance("round", SIGMA)
    with pytest.raises(ArgumentError, match="needs the hessian"):
        equal_trace_covariance("top", SIGMA)
    with pytest.raises(ArgumentError, match="no positive curvature"):
        equal_trace_covariance("hessian", SIGMA, -H)
    with pytest.raises(ShapeError, match="covariance has shape"):
        equal_trace_covariance("hessian", SIGMA, torch.eye(3))
    with pytest.raises(ArgumentError, match="time -1"):
        expected_rise(H, SIGMA, lr=0.1, time=-1)
