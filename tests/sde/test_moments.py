"""Stationary moments of SGD against closed forms, and against moments propagated step by step."""

from __future__ import annotations

import pytest
import torch

from bolza.core.errors import ArgumentError, DivergenceError, ShapeError
from bolza.sde import stationary_covariance

F = torch.float64
A = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F)
SIGMA = torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=F)
ONE = torch.ones(1, 1, dtype=F)


def propagate(hessian, noise, lr, momentum, p, steps):
    """Second moments of position and velocity after many steps from the minimum, one after the other."""
    d = len(hessian)
    x, v = torch.eye(2 * d, dtype=F)[:d], torch.eye(2 * d, dtype=F)[d:]
    after_v = momentum * v - lr * p @ hessian @ x
    m = torch.cat([x + after_v, after_v])
    push = torch.cat([p, p])
    force = lr**2 * push @ noise @ push.T
    s = torch.zeros(2 * d, 2 * d, dtype=F)
    for _ in range(steps):
        s = m @ s @ m.T + force
    return s[:d, :d], s[d:, d:]


def test_both_matrices_of_the_review_and_their_excess_losses():
    exact = stationary_covariance(A, SIGMA, lr=0.1)
    flow = stationary_covariance(A, SIGMA, lr=0.1, exact=False)
    torch.testing.assert_close(
        exact.covariance,
        torch.tensor([[0.0273416, 0.0027556], [0.0027556, 0.0253703]], dtype=F),
        atol=1e-7,
        rtol=0,
    )
    torch.testing.assert_close(
        flow.covariance,
        torch.tensor([[0.0245238, 0.0019048], [0.0019048, 0.0240476]], dtype=F),
        atol=1e-7,
        rtol=0,
    )
    assert float(exact.excess_loss) == pytest.approx(0.0414045, abs=1e-7)
    assert float(flow.excess_loss) == pytest.approx(0.1 / 4 * 1.5, rel=1e-12)  # η tr Σ / 4B, whatever A is


@pytest.mark.parametrize(("momentum", "variance"), [(0.0, 0.0526316), (0.5, 0.1034483), (0.9, 0.5135135)])
def test_momentum_in_one_dimension(momentum, variance):
    exact = stationary_covariance(ONE, ONE, lr=0.1, momentum=momentum)
    assert float(exact.covariance) == pytest.approx(variance, abs=1e-7)
    flow = stationary_covariance(ONE, ONE, lr=0.1, momentum=momentum, exact=False)
    assert float(flow.covariance) == pytest.approx(0.05 / (1 - momentum), rel=1e-12)


@pytest.mark.parametrize(
    ("lr", "a", "s", "momentum", "exact", "variance"),
    [
        (0.2, 2.0, 1.5, 0.0, True, 0.09375),
        (0.2, 2.0, 1.5, 0.0, False, 0.075),
        (0.1, 2.0, 1.5, 0.5, True, 0.0803571),
        (0.1, 2.0, 1.5, 0.9, True, 0.3958333),
    ],
)
def test_curvature_and_noise_other_than_one(lr, a, s, momentum, exact, variance):
    found = stationary_covariance(a * ONE, s * ONE, lr=lr, momentum=momentum, exact=exact)
    assert float(found.covariance) == pytest.approx(variance, abs=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_the_exact_moments_are_those_that_steps_lead_to(momentum):
    p = torch.tensor([[1.5, 0.2], [0.2, 0.4]], dtype=F)
    position, velocity = propagate(A, SIGMA / 3, 0.2, momentum, p, 600)
    found = stationary_covariance(A, SIGMA, lr=0.2, batch_size=3, momentum=momentum, preconditioner=p)
    torch.testing.assert_close(found.covariance, position, rtol=1e-10, atol=1e-14)
    if momentum:
        torch.testing.assert_close(found.velocity, velocity, rtol=1e-10, atol=1e-14)
    assert float(found.residual) < 1e-12


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_the_diffusion_is_the_limit_of_small_steps_at_first_order(momentum):
    rates = (0.02, 0.01)
    errors = []
    for lr in rates:
        exact = stationary_covariance(A, SIGMA, lr=lr, momentum=momentum).covariance / lr
        flow = stationary_covariance(A, SIGMA, lr=lr, momentum=momentum, exact=False).covariance / lr
        errors.append(float((exact - flow).norm()))
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.1)


def test_fluctuation_and_dissipation_balance():
    """E θ·∇f = (η/2) E|g|² for every stationary SGD."""
    lr = 0.3
    S = stationary_covariance(A, SIGMA, lr=lr, batch_size=2).covariance
    dissipated = (A * S).sum()
    fed = lr / 2 * ((A @ A * S).sum() + SIGMA.trace() / 2)
    assert float(dissipated) == pytest.approx(float(fed), rel=1e-12)


def test_sampling_without_replacement_ends_the_noise_at_the_full_batch():
    some = stationary_covariance(A, SIGMA, lr=0.1, batch_size=4, samples=10)
    full = stationary_covariance(A, SIGMA, lr=0.1, batch_size=4)
    torch.testing.assert_close(some.covariance, full.covariance * (6 / 9))
    assert float(stationary_covariance(A, SIGMA, lr=0.1, batch_size=10, samples=10).excess_loss) == 0


def test_a_stack_of_problems_and_a_diagonal_preconditioner():
    stack = torch.stack([A, 2 * A])
    found = stationary_covariance(stack, SIGMA, lr=0.1, momentum=0.5)
    for i in range(2):
        alone = stationary_covariance(stack[i], SIGMA, lr=0.1, momentum=0.5)
        torch.testing.assert_close(found.covariance[i], alone.covariance)
    scale = torch.tensor([0.5, 2.0], dtype=F)
    torch.testing.assert_close(
        stationary_covariance(A, SIGMA, lr=0.1, preconditioner=scale).covariance,
        stationary_covariance(A, SIGMA, lr=0.1, preconditioner=torch.diag(scale)).covariance,
    )
    single = stationary_covariance(A.float(), SIGMA.float(), lr=0.1, preconditioner=scale).covariance
    assert single.dtype == torch.float32


def test_settings_that_make_no_sense_are_named():
    with pytest.raises(DivergenceError, match=r"lr is 1, .*2\(1 \+ μ\)/λ_max = 0.9062"):
        stationary_covariance(A, SIGMA, lr=1.0)
    with pytest.raises(DivergenceError, match="curvature -1"):
        stationary_covariance(torch.diag(torch.tensor([1.0, -1.0])), torch.eye(2), lr=0.1, exact=False)
    with pytest.raises(ArgumentError, match="lr is -1"):
        stationary_covariance(A, SIGMA, lr=-1)
    with pytest.raises(ArgumentError, match="momentum is 1"):
        stationary_covariance(A, SIGMA, lr=0.1, momentum=1)
    with pytest.raises(ArgumentError, match="at most the samples=3"):
        stationary_covariance(A, SIGMA, lr=0.1, batch_size=4, samples=3)
    with pytest.raises(ShapeError, match="preconditioner"):
        stationary_covariance(A, SIGMA, lr=0.1, preconditioner=torch.ones(3))
    with pytest.raises(ShapeError, match="noise"):
        stationary_covariance(A, torch.eye(3), lr=0.1)
