"""Curvature from twin trajectories."""

import math

import pytest
import torch
from torch import nn

from bolza.core.errors import ArgumentError, DivergenceError, ShapeError
from bolza.data import digits
from bolza.ops.curvature import hessian_operator
from bolza.ops.krylov import top_eigenpairs
from bolza.ops.operators import LinearOperator
from bolza.stability import TwinCurvature, curvature_exponent, twin_operator

F64 = torch.float64


def quadratic(*eigenvalues):
    q = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=F64))[0]
    return q @ torch.diag(torch.tensor(eigenvalues, dtype=F64)) @ q.T


def test_the_exponents_of_a_quadratic_are_those_of_its_extreme_eigenvalues():
    hessian = LinearOperator.from_matrix(quadratic(4.0, 1.0, 0.5, -0.8))
    up = curvature_exponent(hessian, lr=0.1, steps=300)
    down = curvature_exponent(hessian, lr=0.1, steps=600, direction="descent")
    assert up.exponent == pytest.approx(math.log(1 + 0.1 * 4.0) / 0.1, abs=1e-9)
    assert down.exponent == pytest.approx(math.log(1 + 0.1 * 0.8) / 0.1, abs=1e-9)
    assert (up.curvature, down.curvature) == pytest.approx((4.0, -0.8), abs=1e-8)
    assert up.residual < 1e-8 and up.products == 300


def test_the_residual_bounds_the_distance_to_an_eigenvalue_before_convergence():
    hessian = LinearOperator.from_matrix(quadratic(4.0, 3.9, 1.0, -0.8))
    early = curvature_exponent(hessian, lr=0.05, steps=12)
    distance = min(abs(early.rayleigh - value) for value in (4.0, 3.9, 1.0, -0.8))
    assert 1e-4 < distance <= early.residual


def trained_digits():
    """An MLP on 500 digits after sixty steps of gradient descent at 0.02."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()
    data = digits()
    x, y = data.train_x[:500].double(), nn.functional.one_hot(data.train_y[:500], 10).double()

    def loss(prediction, target):
        return (prediction - target).square().sum(1).mean() / 2

    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss(net(x), y).backward()
        optimizer.step()
    return net, loss, x, y


def test_on_a_network_ascent_finds_the_sharpness_that_lanczos_finds():
    net, loss, x, y = trained_digits()
    hessian = hessian_operator(net, loss, (x, y))
    top = float(top_eigenpairs(hessian, 1, which="largest algebraic", tol=1e-9).eigenvalues)
    found = curvature_exponent(hessian, lr=0.02, steps=200)
    assert found.exponent == pytest.approx(math.log(1 + 0.02 * top) / 0.02, abs=1e-4)
    assert found.curvature == pytest.approx(top, rel=1e-4)

    params = dict(net.named_parameters())
    flat = torch.nn.utils.parameters_to_vector(params.values()).detach()

    def value(theta):
        pieces = theta.split([p.numel() for p in params.values()])
        named = {n: v.reshape(p.shape) for (n, p), v in zip(params.items(), pieces, strict=True)}
        return loss(torch.func.functional_call(net, named, x), y)

    twin = twin_operator(torch.func.grad(value), flat)
    assert curvature_exponent(twin, lr=0.02, steps=100).curvature == pytest.approx(top, rel=0.05)
    v = torch.randn(flat.numel(), dtype=F64)
    assert torch.allclose(twin @ (v / v.norm()), hessian @ (v / v.norm()), atol=1e-5)


def test_the_error_of_a_twin_falls_with_its_distance():
    theta = torch.tensor([0.7, -0.3], dtype=F64)
    v = torch.tensor([0.6, 0.8], dtype=F64)
    errors = [
        float((twin_operator(lambda w: w**3, theta, e) @ v - 3 * theta**2 * v).norm()) for e in (1e-2, 5e-3)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1.0, abs=0.05)


def test_a_twin_beside_a_run_follows_the_sharpness_and_leaves_the_parameters_alone():
    net, loss, x, y = trained_digits()
    twin = TwinCurvature(net.parameters())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    before = [p.detach().clone() for p in net.parameters()]
    first = twin.update(lambda: loss(net(x), y))
    assert all(torch.equal(a, p) for a, p in zip(before, net.parameters(), strict=True))
    for _ in range(25):
        optimizer.zero_grad()
        loss(net(x), y).backward()
        twin.update(lambda: loss(net(x), y), [p.grad for p in net.parameters()])
        optimizer.param_groups[0]["lr"] = twin.rate(1.0)
        optimizer.step()
    optimizer.zero_grad()
    now = twin.update(lambda: loss(net(x), y))
    hessian = hessian_operator(net, loss, (x, y))
    assert now == pytest.approx(
        float(top_eigenpairs(hessian, 1, which="largest algebraic", tol=1e-9).eigenvalues), rel=0.02
    )
    assert first == pytest.approx(now, rel=0.5)


def test_bad_input_is_named():
    hessian = LinearOperator.from_matrix(torch.eye(2))
    with pytest.raises(ArgumentError, match="lr is 0"):
        curvature_exponent(hessian, lr=0, steps=10)
    with pytest.raises(ArgumentError, match="sideways"):
        curvature_exponent(hessian, lr=0.1, steps=10, direction="sideways")
    with pytest.raises(DivergenceError, match="length 0"):
        curvature_exponent(hessian, lr=1.0, steps=10, direction="descent")
    with pytest.raises(ArgumentError, match="no tensor"):
        TwinCurvature([torch.ones(2)])
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(ArgumentError, match="call update first"):
        TwinCurvature([w]).rate()
    with pytest.raises(DivergenceError, match="beside the trajectory"):
        TwinCurvature([w]).update(lambda: (w * math.inf).sum())
    with pytest.raises(ShapeError, match="0 tensors for 1"):
        TwinCurvature([w]).update(lambda: w.sum(), [])
    with pytest.raises(ArgumentError, match="c is 2"):
        TwinCurvature([w]).rate(2)
