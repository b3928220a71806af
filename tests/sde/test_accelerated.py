"""Accelerated flows and methods: Bessel functions, certificates, rates."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bolza.core.errors import ArgumentError, DivergenceError, UnsupportedError
from bolza.sde import accelerated_descent, accelerated_flow, accelerated_quadratic, nesterov_descent

D = torch.float64
ORIGIN = torch.zeros(2, dtype=D)
START = torch.tensor([1.0, -2.0], dtype=D)


def quartic(x):
    return x.pow(4).sum(-1) / 4


def smooth(x):
    """Convex, with all derivatives bounded; the minimum is 0 at the origin."""
    return (torch.logaddexp(x, -x) - 0.6931471805599453).sum(-1) + 0.1 * (x[..., 0] - x[..., 1]).square()


@pytest.mark.parametrize(
    ("curvature", "values"),
    [
        (4.0, {1.0: 0.5767248, 2.0: -0.0330217, 5.0: 0.0086945}),
        (2.0, {1.0: 0.7699866, 5.0: 0.0046887, 20.0: 0.0073271}),
    ],
)
def test_nesterov_s_flow_on_a_quadratic_is_a_bessel_function(curvature, values):
    closed = accelerated_quadratic(list(values), curvature)
    assert closed.tolist() == pytest.approx(list(values.values()), abs=6e-8)
    path = accelerated_flow(
        lambda x: curvature / 2 * x.square().sum(-1), torch.ones(1, dtype=D), times=list(values)
    )
    assert path.positions[:, 0].tolist() == pytest.approx(closed.tolist(), abs=1e-7)


def test_the_closed_form_starts_at_one_and_solves_the_equation():
    t = torch.linspace(0, 2, 2001, dtype=D)
    for p in (2, 3, 4):
        x = accelerated_quadratic(t, 4.0, p=p, C=0.2)
        assert x[0] == 1
        h = float(t[1])
        middle = (x[2:] - 2 * x[1:-1] + x[:-2]) / h**2 + (p + 1) / t[1:-1] * (x[2:] - x[:-2]) / (2 * h)
        force = 0.2 * p**2 * t[1:-1] ** (p - 2) * 4 * x[1:-1]
        assert (middle + force)[200:].abs().max() < 1e-3


@pytest.mark.parametrize("p", [2, 3, 4])
def test_the_energy_of_the_flow_never_rises_and_bounds_the_loss(p):
    times = torch.linspace(0, 3, 40)
    for f in (smooth, quartic) if p == 3 else (smooth,):
        path = accelerated_flow(f, START, times=times, p=p)
        assert path.rise(ORIGIN) <= 1e-7
        assert bool((path.values <= path.bound(ORIGIN) + 1e-12).all())
        assert float(path.energy(ORIGIN)[0]) == pytest.approx(2.5)
    exact = accelerated_quadratic(times, 1.0, p=p)
    found = accelerated_flow(lambda x: x.square().sum(-1) / 2, START, times=times, p=p).positions
    assert (found - exact[:, None] * START).abs().max() < 1e-6


@pytest.mark.parametrize("p", [2, 3])
def test_the_flow_solves_the_equation_of_second_order(p):
    """X″ + ((p+1)/t) X′ + C p² t^{p−2} ∇f = 0, by differences of the course in t."""
    h, t = 1e-3, 2.0
    path = accelerated_flow(smooth, START, times=[t - h, t, t + h], p=p, C=0.2, rtol=1e-12)
    x = path.positions.clone().requires_grad_()
    (g,) = torch.autograd.grad(smooth(x[1]), x)
    x = x.detach()
    speed = (x[2] - x[0]) / (2 * h)
    residual = (x[2] - 2 * x[1] + x[0]) / h**2 + (p + 1) / t * speed + 0.2 * p**2 * t ** (p - 2) * g[1]
    assert residual.abs().max() < 1e-4
    # and the anchor is X + (t/p) X′
    assert (path.anchors[1] - x[1] - t / p * speed).abs().max() < 1e-5


def test_the_energy_is_a_test_that_can_fail():
    # not convex: between the wells of a double well the certificate does not hold
    well = accelerated_flow(lambda x: ((x.square() - 1).square() / 4).sum(-1), 0.1 * START, times=range(8))
    assert well.rise(torch.ones(2, dtype=D)) > 0.1


def test_nesterov_s_method_follows_its_flow_at_the_square_root_of_the_step():
    def f(x):
        return x.square().sum(-1)

    path = nesterov_descent(f, torch.ones(1, dtype=D), lr=1e-4, steps=500)
    assert round(path.positions[-1].item(), 6) == 0.005038
    errors = []
    for n in (100, 200):
        found = nesterov_descent(f, torch.ones(1, dtype=D), lr=1 / n**2, steps=2 * n).positions[-1]
        errors.append(abs(float(found) - float(accelerated_quadratic(2.0, 2.0))))
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.1)


def test_the_certificates_of_the_methods_hold_up_to_their_largest_step():
    lipschitz = 1 + 0.4  # of the gradient of `smooth`
    for path in (
        nesterov_descent(smooth, START, lr=1 / lipschitz, steps=40),
        accelerated_descent(smooth, START, lr=1 / lipschitz, steps=40),
        accelerated_descent(smooth, START, lr=1.0, steps=40, p=3),
        accelerated_descent(quartic, START, lr=0.05, steps=40, p=3),
    ):
        assert path.rise(ORIGIN) <= 1e-12
        assert bool((path.values[1:] <= path.bound(ORIGIN)[1:]).all())


def test_the_cubic_step_is_the_minimum_of_its_model():
    # one step from z = y = x₀ is the cubic-regularised Newton step itself
    path = accelerated_descent(smooth, START, lr=0.5, steps=1, p=3, N=2.0)
    d = (path.positions[1] - START).requires_grad_()
    at = START.clone().requires_grad_()
    (g,) = torch.autograd.grad(smooth(at), at)
    H = torch.autograd.functional.hessian(smooth, START)
    model = g @ d + 0.5 * d @ H @ d + 2 / (3 * 0.5) * d.norm() ** 3
    (slope,) = torch.autograd.grad(model, d)
    assert slope.norm() < 1e-9


def test_rates_are_two_and_three():
    def flat(x):
        return x.pow(6).sum(-1)  # nothing but the rate of the method helps here

    for p, lr in ((2, 0.03), (3, 0.01)):
        values = accelerated_descent(flat, torch.ones(1, dtype=D), lr=lr, steps=80, p=p).values
        assert float((values[20] / values[80]).log2()) / 2 >= p


def test_a_network_and_several_starts_are_followed_in_their_own_dtype():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    data = torch.randn(20, 3), torch.randn(20, 1)
    kept = [p.clone() for p in net.parameters()]
    flow = accelerated_flow(net, times=[0.0, 1.0], loss=F.mse_loss, data=data)
    method = nesterov_descent(net, lr=1e-4, steps=100, loss=F.mse_loss, data=data)
    assert flow.positions.dtype == torch.float32 and flow.positions.shape == (2, 21)
    assert torch.allclose(method.positions[-1], flow.positions[-1], atol=0.02)
    assert flow.values[1] < flow.values[0]
    assert all(torch.equal(a, b) for a, b in zip(kept, net.parameters(), strict=True))
    many = accelerated_descent(smooth, torch.randn(5, 2), lr=0.5, steps=3, p=3)
    assert many.values.shape == (4, 5) and many.energy(torch.zeros(2)).shape == (4, 5)


def test_bad_arguments_are_named():
    for times in ([], [2.0, 1.0], [-1.0]):
        with pytest.raises(ArgumentError, match="rising times"):
            accelerated_flow(smooth, START, times=times)
    with pytest.raises(ArgumentError, match="p is 0"):
        accelerated_flow(smooth, START, times=[1.0], p=0)
    with pytest.raises(ArgumentError, match="C is -1"):
        accelerated_quadratic(1.0, 1.0, C=-1.0)
    with pytest.raises(ArgumentError, match="curvature is 0"):
        accelerated_quadratic(1.0, 0.0)
    with pytest.raises(ArgumentError, match="x0 is None"):
        nesterov_descent(smooth, lr=0.1, steps=1)
    with pytest.raises(ArgumentError, match="lr is 0"):
        nesterov_descent(smooth, START, lr=0.0, steps=1)
    with pytest.raises(ArgumentError, match="N is 1"):
        accelerated_descent(smooth, START, lr=0.1, steps=1, N=1.0)
    with pytest.raises(UnsupportedError, match="choose 2 or 3"):
        accelerated_descent(smooth, START, lr=0.1, steps=1, p=4)
    with pytest.raises(UnsupportedError, match="take p=2"):
        accelerated_descent(quartic, torch.ones(600), lr=0.1, steps=1, p=3)
    with pytest.raises(DivergenceError, match="take a smaller lr"):
        nesterov_descent(lambda x: x.pow(4).sum(-1), START, lr=10.0, steps=50)
    with pytest.raises(DivergenceError, match="not finite at t"):
        accelerated_flow(lambda x: x.sqrt().sum(-1), START, times=[1.0])


@pytest.mark.parametrize("times", [[0.0, float("nan")], [float("nan")], [0.0, float("inf")]])
def test_times_that_never_come_are_refused(times):
    with pytest.raises(ArgumentError, match="all finite"):
        accelerated_flow(smooth, START, times=times)
