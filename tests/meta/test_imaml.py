"""Implicit MAML: the gradient at the minimum of the pulled loss."""

import pytest
import torch
from torch import nn

from bolza.core.errors import ArgumentError, ConvergenceWarning
from bolza.meta import iMAML
from bolza.meta.imaml import conjugate_gradients

D = torch.float64


def regression():
    torch.manual_seed(0)
    net = nn.Linear(3, 1).to(D)
    return net, *((torch.randn(4, n, 3, dtype=D), torch.randn(4, n, 1, dtype=D)) for n in (5, 7))


def test_linear_regression_has_the_gradient_of_its_closed_form():
    net, support, query = regression()
    lam = 1.5
    iMAML(net, lr=0.15, steps=80, regularization=lam, tol=1e-12)(support, query).backward()
    theta = torch.cat([net.weight[0], net.bias]).detach().requires_grad_()
    total = 0.0
    for i in range(4):
        a, b = (torch.cat([s[0][i], torch.ones_like(s[1][i])], 1) for s in (support, query))
        h = 2 * a.T @ a / len(a)
        phi = torch.linalg.solve(
            h + lam * torch.eye(4, dtype=D), lam * theta + 2 * a.T @ support[1][i][:, 0] / len(a)
        )
        total = total + (b @ phi - query[1][i][:, 0]).square().mean() / 4
    (expected,) = torch.autograd.grad(total, theta)
    assert torch.allclose(torch.cat([net.weight.grad[0], net.bias.grad]), expected, rtol=1e-6, atol=1e-8)


def test_what_is_not_adapted_has_its_direct_gradient_and_a_strong_pull_gives_the_plain_one():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(D)
    _, support, query = regression()
    learner = iMAML(net, lr=1e-6, steps=1, regularization=1e6, params=["2"])
    learner(support, query).backward()
    slopes = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    nn.functional.mse_loss(net(query[0]), query[1]).backward()
    assert all(torch.allclose(a, p.grad, atol=1e-4) for a, p in zip(slopes, net.parameters(), strict=True))
    with torch.no_grad():
        assert not learner(support, query).requires_grad


def test_every_task_has_step_sizes_of_its_own():
    torch.manual_seed(0)
    factor = torch.randn(3, 5, 5, dtype=D)
    a = factor @ factor.mT + torch.eye(5, dtype=D) * torch.tensor([0.1, 1.0, 100.0], dtype=D).reshape(3, 1, 1)
    b = torch.randn(3, 5, dtype=D)
    (x,), residuals, indefinite = conjugate_gradients(
        lambda v: [(a @ v[0][..., None])[..., 0]], [b], iterations=20, tol=1e-12
    )
    assert torch.allclose(x, torch.linalg.solve(a, b), rtol=1e-9)
    assert float(residuals.max()) < 1e-11 and not bool(indefinite.any())


def test_a_run_that_ends_at_no_minimum_is_warned_of():
    net = nn.Linear(1, 1, bias=False).to(D)
    points = torch.ones(1, 3, 1, dtype=D), torch.zeros(1, 3, 1, dtype=D)
    with pytest.warns(ConvergenceWarning, match="regularization"):
        iMAML(
            net,
            lr=1e-3,
            steps=1,
            regularization=0.1,
            loss=lambda out, y: out.sin().mean() - out.square().mean(),
        )(points, points)
    with pytest.raises(ArgumentError, match="regularization=0"):
        iMAML(net, regularization=0)
