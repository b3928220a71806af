"""Lyapunov equations against closed forms, each other, and automatic differences."""

from __future__ import annotations

import pytest
import torch

from bolza.core.errors import ArgumentError, DivergenceError, ShapeError
from bolza.ops.lyapunov import continuous_lyapunov, discrete_lyapunov

F = torch.float64
A = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F)
C = torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=F)


def draws(*shape, seed=0):
    return torch.randn(*shape, dtype=F, generator=torch.Generator().manual_seed(seed))


def covariance(*shape, seed=0):
    g = draws(*shape, seed=seed)
    return g @ g.mT


def test_the_stationary_covariances_of_the_review_to_six_digits():
    lr = 0.1
    flow = continuous_lyapunov(A, lr * C)
    expected = torch.tensor([[0.0245238, 0.0019048], [0.0019048, 0.0240476]], dtype=F)
    torch.testing.assert_close(flow.S, expected, atol=1e-7, rtol=0)
    steps = discrete_lyapunov(torch.eye(2, dtype=F) - lr * A, lr**2 * C)
    expected = torch.tensor([[0.0273416, 0.0027556], [0.0027556, 0.0253703]], dtype=F)
    torch.testing.assert_close(steps.S, expected, atol=1e-7, rtol=0)
    assert max(float(flow.residual), float(steps.residual)) < 1e-14


def test_one_dimension_is_a_fraction():
    a = torch.tensor([[3.0]], dtype=F)
    assert float(continuous_lyapunov(a, torch.ones(1, 1, dtype=F)).S) == pytest.approx(1 / 6, rel=1e-14)
    assert float(discrete_lyapunov(a / 4, torch.ones(1, 1, dtype=F)).S) == pytest.approx(16 / 7, rel=1e-14)


@pytest.mark.parametrize("n", [1, 3, 12, 20])
def test_a_batch_is_solved_as_its_members_are_and_the_equation_holds(n):
    a = 3 * torch.eye(n, dtype=F) + draws(2, 3, n, n) / n**0.5  # not symmetric
    c = covariance(3, n, n)
    flow = continuous_lyapunov(a, c)
    torch.testing.assert_close(a @ flow.S + flow.S @ a.mT, c.expand(2, 3, n, n), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(flow.S[1, 2], continuous_lyapunov(a[1, 2], c[2]).S, rtol=1e-10, atol=1e-12)
    m = 0.3 * draws(2, 3, n, n) / n**0.5
    steps = discrete_lyapunov(m, c)
    torch.testing.assert_close(steps.S - m @ steps.S @ m.mT, c.expand(2, 3, n, n), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(steps.S[1, 2], discrete_lyapunov(m[1, 2], c[2]).S, rtol=1e-10, atol=1e-12)
    assert flow.S.shape == steps.S.shape == (2, 3, n, n) and steps.residual.shape == (2, 3)
    assert float(steps.residual.max()) < 1e-12 and float(flow.residual.max()) < 1e-12


def test_the_discrete_covariance_is_the_sum_of_what_each_step_leaves():
    m, c = 0.2 * draws(4, 4), covariance(4, 4)
    total, power = torch.zeros(4, 4, dtype=F), torch.eye(4, dtype=F)
    for _ in range(400):
        total, power = total + power @ c @ power.T, m @ power
    torch.testing.assert_close(discrete_lyapunov(m, c).S, total, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("solve", [continuous_lyapunov, discrete_lyapunov])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_gradients_are_those_of_differences(solve, batch):
    a = (0.7 * torch.eye(3, dtype=F) + 0.1 * draws(*batch, 3, 3)).requires_grad_()
    c = draws(*batch, 3, 3, seed=1).requires_grad_()  # not symmetric: nothing may rely on it
    assert torch.autograd.gradcheck(lambda a, c: solve(a, c).S, (a, c))
    assert torch.autograd.gradgradcheck(lambda a, c: solve(a, c).S, (a, c))


def test_what_is_not_stationary_is_refused_with_its_eigenvalue():
    with pytest.raises(DivergenceError, match="real part -0.5.*positive curvature"):
        continuous_lyapunov(torch.diag(torch.tensor([1.0, -0.5])), torch.eye(2))
    with pytest.raises(DivergenceError, match="modulus 1.2.*lower the step size"):
        discrete_lyapunov(torch.diag(torch.tensor([0.3, -1.2])), torch.eye(2))
    stack = torch.stack([torch.eye(2), -torch.eye(2)])
    with pytest.raises(DivergenceError, match="real part -1"):
        continuous_lyapunov(stack, torch.eye(2))
    with pytest.raises(ShapeError, match=r"M has shape \(2, 3\)"):
        discrete_lyapunov(torch.zeros(2, 3), torch.eye(2))
    with pytest.raises(ArgumentError, match="not finite"):
        continuous_lyapunov(torch.full((2, 2), torch.nan), torch.eye(2))
    with pytest.raises(ArgumentError, match="complex"):
        discrete_lyapunov(torch.zeros(2, 2, dtype=torch.complex64), torch.eye(2))


def test_the_margin_is_the_distance_to_the_limit_and_the_dtype_stays():
    found = discrete_lyapunov(torch.diag(torch.tensor([0.5, -0.9])), torch.eye(2))
    assert float(found.margin) == pytest.approx(0.1, rel=1e-6) and found.S.dtype == torch.float32
    assert float(continuous_lyapunov(A, C).margin) == pytest.approx(float(torch.linalg.eigvalsh(A)[0]))
