"""Gaussian-process regression against its formulas, and against networks that were trained."""

import math

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF
from sklearn.model_selection import train_test_split
from torch import nn

from bolza.core.errors import ArgumentError, DataError, DivergenceError, ShapeError
from bolza.meanfield.kernels import gp_posterior, infinite_kernels, ntk_posterior


@pytest.fixture(scope="module")
def toy():
    g = torch.Generator().manual_seed(0)
    x, t = (torch.randn(n, 2, generator=g, dtype=torch.float64) for n in (12, 5))
    return x, t, torch.stack([x.sum(1).sin(), x.prod(1)], 1)


def rbf(a, b):
    return torch.exp(-torch.cdist(a, b).square() / 2)


def test_posterior_is_that_of_scikit_learn(toy):
    x, t, y = toy
    theirs = GaussianProcessRegressor(RBF(1.0, "fixed"), alpha=0.01).fit(x.numpy(), y[:, 0].numpy())
    mean, cov = theirs.predict(t.numpy(), return_cov=True)
    ours = gp_posterior(rbf(x, x), y[:, 0], rbf(t, x), rbf(t, t), noise=0.01)
    assert torch.allclose(ours.mean, torch.from_numpy(mean), rtol=1e-9)
    assert torch.allclose(ours.covariance, torch.from_numpy(cov), atol=1e-10)
    assert torch.equal(ours.variance, ours.covariance.diagonal())
    assert ours.log_marginal_likelihood == pytest.approx(theirs.log_marginal_likelihood_value_, rel=1e-10)


def test_outputs_are_independent_and_the_diagonal_is_enough(toy):
    x, t, y = toy
    both = gp_posterior(rbf(x, x), y, rbf(t, x), torch.ones(5, dtype=torch.float64), noise=0.01)
    one, two = (gp_posterior(rbf(x, x), y[:, i], rbf(t, x), rbf(t, t), noise=0.01) for i in range(2))
    assert torch.allclose(both.mean, torch.stack([one.mean, two.mean], 1)) and both.covariance is None
    assert torch.allclose(both.variance, one.variance)
    evidence = one.log_marginal_likelihood + two.log_marginal_likelihood
    assert both.log_marginal_likelihood == pytest.approx(evidence)


def test_without_test_inputs_the_noiseless_posterior_is_the_data(toy):
    x, _, y = toy
    fit = gp_posterior(rbf(x, x), y, noise=1e-10)
    assert torch.allclose(fit.mean, y, atol=1e-6) and float(fit.variance.max()) < 1e-6


@pytest.mark.parametrize("time", [0.0, 0.7, 30.0, math.inf])
def test_ensemble_is_the_law_of_linear_models_under_gradient_flow(toy, time):
    """f_t(x) = f_0(x) - A (f_0(X) - y) is linear in f_0: mean and covariance by hand."""
    x, t, y = toy
    theta, k = rbf(x, x) + torch.eye(12, dtype=torch.float64), rbf(x, x)
    cross, full = rbf(t, x), torch.cat([torch.cat([rbf(t, t), rbf(t, x)], 1), torch.cat([rbf(x, t), k], 1)])
    decay = torch.linalg.matrix_exp(-theta * time) if time < math.inf else torch.zeros_like(theta)
    a = cross @ torch.linalg.inv(theta) @ (torch.eye(12, dtype=torch.float64) - decay)
    flow = torch.cat([torch.eye(5, dtype=torch.float64), -a], 1)
    ours = ntk_posterior(theta, k, y, cross, rbf(t, x), rbf(t, t), time=time)
    assert torch.allclose(ours.mean, a @ y, atol=1e-11)
    assert torch.allclose(ours.covariance, flow @ full @ flow.T, atol=1e-11)
    diagonal = ntk_posterior(theta, k, y, cross, rbf(t, x), torch.ones(5, dtype=torch.float64), time=time)
    assert torch.allclose(diagonal.variance, ours.covariance.diagonal(), atol=1e-11)


def test_ensemble_is_a_gaussian_process_when_only_the_last_layer_learns(toy):
    """Then Θ = K, and the trained ensemble is the noiseless posterior."""
    x, t, y = toy
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)).requires_grad_(False)
    net[-1].requires_grad_(True)
    train, cross, test = (
        infinite_kernels(net, *pair, weight_var=2.0, bias_var=0.5) for pair in ((x,), (t, x), (t,))
    )
    assert torch.equal(train.ntk, train.nngp)
    trained = ntk_posterior(train.ntk, train.nngp, y, cross.ntk, cross.nngp, test.nngp)
    bayes = gp_posterior(train.nngp, y, cross.nngp, test.nngp)
    assert torch.allclose(trained.mean, bayes.mean, rtol=1e-6)
    assert torch.allclose(trained.covariance, bayes.covariance, atol=1e-8)


@pytest.mark.parametrize("depth", [1, 3, 10])
def test_digits_are_classified_with_99_26_percent(depth):
    data = load_digits()
    split = train_test_split(data.data, data.target, test_size=0.3, random_state=0, stratify=data.target)
    a, b, ya, yb = map(torch.from_numpy, split)
    a, b = (v / v.norm(dim=1, keepdim=True) for v in (a, b))
    net = nn.Sequential(nn.Linear(64, 4), *[m for _ in range(depth) for m in (nn.ReLU(), nn.Linear(4, 4))])
    train, cross = (infinite_kernels(net, *pair, weight_var=2.0, bias_var=0.0) for pair in ((a,), (b, a)))
    targets = nn.functional.one_hot(ya).double()
    for k, k_cross in ((train.nngp, cross.nngp), (train.ntk, cross.ntk)):
        guess = gp_posterior(k, targets, k_cross, noise=1e-4).mean.argmax(1)
        assert int((guess == yb).sum()) == 536  # of 540


def test_errors_say_what_is_wrong(toy):
    x, t, y = toy
    k = rbf(x, x)
    with pytest.raises(DivergenceError, match="more noise"):
        gp_posterior(torch.ones(12, 12), y)
    for call, error, message in (
        (lambda: gp_posterior(k[:5], y), ShapeError, r"k_train has shape \(5, 12\)"),
        (lambda: gp_posterior(k, y, k[:, :3]), ShapeError, "k_cross"),
        (lambda: gp_posterior(k, y, k, k[:3]), ShapeError, "test kernel"),
        (lambda: gp_posterior(k, y, noise=-1.0), ArgumentError, "noise=-1"),
        (lambda: ntk_posterior(k, k, y, k, k, time=-1.0), ArgumentError, "time=-1"),
        (lambda: ntk_posterior(k, k, y, k[:, 1:], k), ShapeError, "ntk_cross"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_numbers_that_are_not_finite_are_named(toy):
    x, t, y = toy
    k, cross = rbf(x, x), rbf(t, x)
    with pytest.raises(DataError, match="y holds 1 numbers that are not finite"):
        gp_posterior(k, torch.cat([y[:-1, 0], torch.tensor([math.nan], dtype=y.dtype)]), cross, noise=0.1)
    with pytest.raises(DataError, match="nngp_cross holds"):
        ntk_posterior(k, k, y, cross, cross * math.inf, ridge=0.1)
    with pytest.raises(ArgumentError, match="noise=inf"):
        gp_posterior(k, y, cross, noise=math.inf)


def test_kernels_of_two_precisions_meet_in_that_of_the_training_set(toy):
    x, t, y = toy
    k, cross, test = rbf(x, x), rbf(t, x), rbf(t, t)
    mixed, plain = (
        gp_posterior(k, y, c, s, noise=0.1) for c, s in ((cross.float(), test.float()), (cross, test))
    )
    assert mixed.mean.dtype == mixed.covariance.dtype == torch.float64
    assert torch.allclose(mixed.mean, plain.mean, atol=1e-5)


def test_a_singular_kernel_at_a_late_time_predicts_finite_numbers(toy):
    x, t, y = toy
    x, y = torch.cat([x, x]), torch.cat([y, y])
    k, cross = rbf(x, x), rbf(t, x)
    late = ntk_posterior(k, k, y, cross, cross, rbf(t, t), time=1e20)
    assert torch.isfinite(late.mean).all()
