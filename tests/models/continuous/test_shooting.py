"""Weights shot from particles."""

import pytest
import torch
from torch import nn

from bolza.core.errors import ArgumentError, ShapeError
from bolza.models import ContinuousBlock, ParticleFlow, ShootingNet
from bolza.models.continuous.shooting import data_velocity, weights_of

F64 = torch.float64


def energy(theta):
    return float(sum(part.square().sum() for part in theta)) / 2


def test_energy_is_conserved_to_the_order_of_the_method():
    net = ShootingNet(2, 2, inflation=8, particles=10).to(F64)
    drifts = []
    with torch.no_grad():
        for steps in (10, 20):
            along = [energy(theta) for theta in net.weights_along(steps)]
            drifts.append(max(abs(e - along[0]) for e in along) / along[0])
        start = float(net.energy())
    assert drifts[0] < 1e-6
    assert drifts[0] / drifts[1] > 10  # about 2⁴
    assert along[0] == pytest.approx(start, rel=1e-12)


def test_without_momentum_nothing_moves():
    net = ShootingNet(2, 2, inflation=4).to(F64)
    nn.init.zeros_(net.flow.p)
    x = torch.randn(5, 2, dtype=F64)
    assert torch.equal(net(x), x)


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "relu"])
def test_flow_of_the_particles_is_hamiltons_by_autograd(activation):
    flow = ParticleFlow(width=3, inflation=2, particles=5, activation=activation, weight=1.7).to(F64)
    q1, q2, p1, p2 = (part.detach().requires_grad_() for part in flow._parts(flow.q) + flow._parts(flow.p))
    theta = weights_of(q1, q2, p1, p2, flow.sigma, flow.weight)
    v1, v2 = data_velocity(theta, q1, q2, flow.sigma)
    price = sum(part.square().sum() for part in theta) / 2
    # P times the mean over particles, at the weights that maximise it; envelope theorem: they may vary or not
    hamiltonian = (p1 * v1).sum() + (p2 * v2).sum() - 5 * flow.weight * price
    slopes = torch.autograd.grad(hamiltonian, (q1, q2, p1, p2))
    d_q, d_p = flow(0.0, (flow.q, flow.p))
    (d_q1, d_q2), (d_p1, d_p2) = flow._parts(d_q), flow._parts(d_p)
    for found, expected in zip((d_p1, d_p2, d_q1, d_q2), (-slopes[0], -slopes[1], *slopes[2:]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_weights_of_the_particles_maximise_the_hamiltonian():
    flow = ParticleFlow(width=2, inflation=3, particles=4, weight=0.6).to(F64)
    q1, q2, p1, p2 = (part.detach() for part in flow._parts(flow.q) + flow._parts(flow.p))
    theta = [part.detach().requires_grad_() for part in flow.weights()]
    v1, v2 = data_velocity(type(flow.weights())(*theta), q1, q2, flow.sigma)
    price = flow.weight * sum(part.square().sum() for part in theta) / 2
    value = ((p1 * v1).sum() + (p2 * v2).sum()) / 4 - price
    for slope in torch.autograd.grad(value, theta):
        assert float(slope.abs().max()) < 1e-12


@pytest.mark.parametrize("gradient", ["checkpoint", "adjoint"])
def test_every_gradient_reaches_the_particles(gradient):
    net = ShootingNet(2, 3, width=2, inflation=3, particles=4, steps=20).to(F64)
    x = torch.randn(6, 2, dtype=F64)
    expected = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    net.body.gradient = gradient
    found = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_bad_arguments_are_refused():
    with pytest.raises(ArgumentError, match="weight"):
        ShootingNet(1, 1, weight=0.0)
    with pytest.raises(ArgumentError, match="particles"):
        ParticleFlow(1, particles=0)
    with pytest.raises(ShapeError, match="reads"):
        ShootingNet(2, 1)(torch.zeros(4, 3))
    flow = ParticleFlow(1, inflation=4)
    q = torch.zeros(3, 1), torch.zeros(3, 4)
    assert ContinuousBlock(flow, steps=2)(q)[1].shape == (3, 4)
