import pytest
import torch
from torch import nn

import bolza
from bolza.diagnosis.dynamics import findings, measure_dynamics
from bolza.diagnosis.landscape import measure_landscape
from bolza.diagnosis.noise import measure_noise
from bolza.diagnosis.problem import prepare


def test_what_the_noise_will_do_to_linear_regression_is_the_known_answer():
    """One weight, f = mean of (wx − y)²/1: blur and limit follow from λ and σ² alone."""
    torch.manual_seed(0)
    x = torch.randn(64, 1, dtype=torch.float64)
    y = x + torch.randn(64, 1, dtype=torch.float64)
    problem = prepare(nn.Linear(1, 1, bias=False).double(), (x, y), test_fraction=0.0)
    hessian, noise = [], []
    measure_landscape(problem, keep=hessian)
    measure_noise(problem, k=1, keep=noise)
    curvature, variance = 2 * float(x.square().mean()), noise[0].trace().value
    lr, batch, mu = 0.05, 8, 0.5
    facts = measure_dynamics(problem, hessian[0], noise[0], lr, batch, mu)
    exact = lr * variance / batch * (1 + mu) / (curvature * (1 - mu) * (2 * (1 + mu) - lr * curvature))
    assert facts.blur == pytest.approx(exact**0.5, rel=1e-6)
    assert facts.excess_loss == pytest.approx(curvature * exact / 2, rel=1e-6)
    assert facts.temperature == pytest.approx(lr / (2 * batch * (1 - mu)))
    assert facts.stability == pytest.approx(lr / facts.lr_limit) and facts.lr_limit < 2 * (1 + mu) / curvature
    verdicts = [
        findings(measure_dynamics(problem, hessian[0], noise[0], rate, batch, mu))[0].verdict
        for rate in (0.1 * facts.lr_limit, 0.8 * facts.lr_limit, 1.1 * facts.lr_limit)
    ]
    assert verdicts == ["good", "warn", "bad"]


def test_a_diagnosis_tells_what_the_noise_will_do_at_the_prescribed_settings():
    torch.manual_seed(0)
    d = bolza.diagnose(bolza.models.mlp(depth=3, width=16), "digits", samples=64)
    facts = d.facts["dynamics"]
    assert (
        facts["lr"] == d.prescription.learning_rate.value
        and facts["batch_size"] == d.prescription.batch_size.value
    )
    assert 0 < d["dynamics.stability"].value < 1 and d["dynamics.excess_loss"].value > 0
    assert abs(d["dynamics.tail_index"].value - 2) < 5 * d["dynamics.tail_index"].error
    assert "What will the noise do?" in str(d)
