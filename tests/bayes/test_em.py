"""EM: known steps and rates, the certificate, and what it refuses."""

import math

import pytest
import torch

from bolza.bayes import bayesian_em, em_rate, em_step, hidden_labels
from bolza.core.errors import ArgumentError, DataError, DivergenceError

F = torch.float64


def gaussian(a=1.0, b=3.0):
    """y ~ N(z, b) seen of z ~ N(θ, a)."""
    y = torch.tensor([1.0, 4.0, -2.0], dtype=F)

    def expected(theta, before):
        z = before + (y - before) * a / (a + b)
        return -((z - theta) ** 2).sum() / (2 * a)

    return expected, lambda theta: -((y - theta) ** 2).sum() / (2 * (a + b))


def mixture(n=300, prior=100.0):
    draw = torch.Generator().manual_seed(0)
    y = torch.randn(n, dtype=F, generator=draw) + torch.tensor([-1.0, 1.0], dtype=F).repeat(n // 2)

    def log_joint(means):
        return -((y[:, None] - means) ** 2) / 2

    def step(means):
        share = log_joint(means).softmax(1)
        return (share * y[:, None]).sum(0) / (share.sum(0) + 1 / prior)

    return hidden_labels(log_joint, lambda means: -means.square().sum() / (2 * prior)), step


START = torch.tensor([-0.5, 0.5], dtype=F)


def test_a_gaussian_behind_a_gaussian_contracts_by_b_over_a_plus_b():
    expected, log_posterior = gaussian()
    found = bayesian_em(torch.zeros(1, dtype=F), expected, log_posterior, tol=1e-12)
    assert found.certified and found.converged
    assert float(found.theta) == pytest.approx(1.0)
    assert found.contraction == pytest.approx(0.75, abs=1e-6)
    rate = em_rate(found.theta, expected)
    assert rate.rate == pytest.approx(0.75, abs=1e-12)
    # information 3/a of the hidden data, 3/(a + b) of what is seen
    assert float(rate.complete) == pytest.approx(3.0) and float(rate.observed) == pytest.approx(0.75)
    assert rate.steps(1e-3) == math.ceil(math.log(1e-3) / math.log(0.75)) == 25


def test_the_step_by_newton_is_the_step_in_closed_form():
    (expected, _), step = mixture()
    torch.testing.assert_close(em_step(START, expected), step(START), rtol=1e-12, atol=1e-12)


def test_newton_finds_the_maximum_of_a_q_that_is_not_quadratic_and_not_concave_everywhere():
    def expected(theta, before):
        return (theta - before.square() - theta.exp()).sum() - torch.cos(3 * theta).sum() / 20

    found = em_step(torch.full((2, 2), 3.0, dtype=F), expected)
    slope = torch.func.grad(lambda t: expected(t, found))(found)
    assert found.shape == (2, 2) and float(slope.abs().max()) < 1e-10


def test_information_predicts_the_jacobian_and_the_contraction_of_a_mixture():
    (expected, log_posterior), step = mixture()
    found = bayesian_em(START, expected, log_posterior, maximise=step, tol=1e-13)
    rate = em_rate(found.theta, expected)
    jacobian = torch.func.jacrev(step)(found.theta)
    assert rate.rate == pytest.approx(float(torch.linalg.eigvals(jacobian).abs().max()), rel=1e-6)
    assert found.contraction == pytest.approx(rate.rate, abs=0.02)
    torch.testing.assert_close(rate.observed, -torch.func.hessian(log_posterior)(found.theta))
    rises = found.lyapunov.diff() / found.lyapunov[:-1].abs()
    assert found.certified and float(rises.max()) <= 1e-9
    assert len(found.path) == len(found.lyapunov)


def test_a_step_that_raises_v_is_not_certified():
    (expected, log_posterior), step = mixture()
    far = bayesian_em(START, expected, log_posterior, maximise=lambda t: t + 12 * (step(t) - t), max_steps=15)
    assert not far.certified


def test_float32_runs_and_is_certified_to_its_own_rounding():
    y = torch.tensor([-2.1, -1.9, 1.8, 2.2])
    expected, log_posterior = hidden_labels(lambda means: -((y[:, None] - means) ** 2) / 2)
    found = bayesian_em(START.float(), expected, log_posterior, tol=1e-6)
    assert found.theta.dtype == torch.float32 and found.certified and found.converged


def test_a_saddle_does_not_attract():
    (expected, _), _ = mixture()
    middle = bayesian_em(torch.zeros(2, dtype=F), expected, mixture()[0][1], max_steps=200)  # stays symmetric
    rate = em_rate(middle.theta, expected)
    assert rate.rate > 1 and not rate.stable
    with pytest.raises(ArgumentError, match="does not converge"):
        rate.steps(0.1)


def test_what_cannot_be_done_is_said():
    expected, log_posterior = gaussian()
    theta = torch.zeros(1, dtype=F)
    with pytest.raises(ArgumentError, match="max_steps"):
        bayesian_em(theta, expected, log_posterior, max_steps=0)
    with pytest.raises(DivergenceError, match="proper prior"):
        bayesian_em(theta, expected, lambda t: (t / 0).sum())
    with pytest.raises(DataError, match="not finite"):
        em_step(theta, lambda t, before: (t.log() - t).sum())
    with pytest.raises(DivergenceError, match="positive definite"):
        em_rate(theta, lambda t, before: (t - before).square().sum())
