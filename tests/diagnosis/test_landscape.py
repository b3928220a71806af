"""The stability limit is where gradient descent starts to diverge."""

import pytest
import torch
from torch import nn

from bolza.diagnosis.landscape import findings, measure_landscape
from bolza.diagnosis.problem import prepare


@pytest.fixture
def regression():
    x = torch.randn(40, 5, dtype=torch.float64)
    return nn.Linear(5, 1, bias=False).double(), (x, x @ torch.randn(5, 1, dtype=torch.float64))


def test_for_linear_regression_the_limit_is_that_of_the_design_matrix(regression):
    model, (x, y) = regression
    facts = measure_landscape(prepare(model, (x, y), test_fraction=0.0))
    exact = 2 * torch.linalg.eigvalsh(x.T @ x / 40)[-1].item()  # f = mean (xθ − y)²
    assert facts.hessian["eigenvalues"][0] == pytest.approx(exact, rel=1e-6)
    assert facts.ggn["eigenvalues"][0] == pytest.approx(exact, rel=1e-6)
    assert facts.lr_limit == pytest.approx(2 / exact, rel=1e-6)


@pytest.mark.parametrize(("factor", "stable"), [(0.97, True), (1.03, False)])
def test_descent_is_stable_below_the_limit_and_not_above(regression, factor, stable):
    model, (x, y) = regression
    lr = factor * measure_landscape(prepare(model, (x, y), test_fraction=0.0)).lr_limit
    start = nn.functional.mse_loss(model(x), y).item()
    for _ in range(400):
        (g,) = torch.autograd.grad(nn.functional.mse_loss(model(x), y), model.weight)
        model.weight.data -= lr * g
    assert (nn.functional.mse_loss(model(x), y).item() < start) is stable


def test_the_findings_carry_value_and_error(regression):
    model, data = regression
    found = {f.key: f for f in findings(measure_landscape(prepare(model, data, test_fraction=0.0)))}
    assert set(found) == {"landscape.hessian_max", "landscape.ggn_max", "landscape.lr_limit"}
    assert all(f.error is not None and f.error <= 1e-2 * f.value for f in found.values())
