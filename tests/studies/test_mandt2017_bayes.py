"""SGD as a sampler: the study at a small size, and the problem that it samples."""

import pytest
import torch

from bolza.report import to_png
from bolza.sde import posterior_divergence, posterior_rate, stationary_covariance
from bolza.studies import get
from bolza.studies.mandt2017_bayes import BATCH, BUDGETS, Budget, at_rest, digits_problem, measured_divergence

F = torch.float64


def test_the_study_runs_and_its_claims_hold_at_a_smaller_size(monkeypatch):
    tiny = Budget(chains=150, steps=150, problems=2, rates=(0.25, 1.0, 4.0), replicas=120, network_steps=120)
    monkeypatch.setitem(BUDGETS, "small", tiny)
    result = get("mandt2017_bayes").run("small")
    # two random problems need not spread their variances, few chains are noisy about small divergences, and after a few
    # steps the network is at rest along its steepest direction only
    loose = ("largest over smallest", "preconditioner beats", "the worst of")
    bad = [row for row in result.rows if row.holds is not True and not any(w in row.claim for w in loose)]
    assert [(row.claim, row.measured) for row in bad] == []
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_the_logistic_problem_is_at_its_mode_with_its_curvature():
    problem = digits_problem()

    def loss(theta):
        fit = torch.nn.functional.softplus(-problem.y * (problem.x @ theta)).mean()
        return fit + problem.prior * theta.square().sum() / 2

    gradient = torch.func.grad(loss)(problem.mode)
    assert float(gradient.norm()) < 1e-10
    torch.testing.assert_close(torch.func.hessian(loss)(problem.mode), problem.hessian)


def test_the_prediction_for_a_large_batch_is_the_one_without_growing_noise():
    problem = digits_problem()
    lr = 0.01 * posterior_rate(problem.noise, samples=problem.samples, batch_size=BATCH)
    plain = stationary_covariance(problem.hessian, problem.noise, lr=lr, batch_size=BATCH).covariance
    torch.testing.assert_close(at_rest(problem, lr * torch.eye(6, dtype=F)), plain, rtol=0.02, atol=1e-9)


def test_the_measured_divergence_is_unbiased_for_draws_of_the_posterior():
    problem = digits_problem()
    cover = torch.linalg.inv(problem.samples * problem.hessian)
    draws = torch.randn(2000, 6, dtype=F, generator=torch.Generator().manual_seed(0))
    value, error = measured_divergence(draws @ torch.linalg.cholesky(cover).T, problem)
    assert abs(value) < 4 * error and 0 < error < 0.01
    wide, _ = measured_divergence(2**0.5 * draws @ torch.linalg.cholesky(cover).T, problem)
    exact = float(posterior_divergence(2 * cover, problem.hessian, samples=problem.samples))
    assert wide == pytest.approx(exact, rel=0.1)
