"""The two universal laws, and networks of both classes."""

import math

import pytest
import torch

from bolza.report import to_png
from bolza.studies import pennington2018_emergence as study
from bolza.studies.pennington2018_emergence import Budget, density, distance, limit_edge, variance_for


@pytest.mark.parametrize("kind, mass", [("smooth", 1.0), ("Bernoulli", 0.25)])
def test_the_laws_have_their_mass_and_mean(kind, mass):
    """Mean 1; of the Bernoulli law at σ₀² = 1/4 three quarters sit in the atom at exp(1/4)."""
    top = 1.001 * limit_edge("smooth", 0.25)
    if kind == "smooth":
        grid = torch.linspace(1e-3, top, 6001, dtype=torch.float64)
    else:  # 1/(λ log² λ) near 0
        grid = torch.cat(
            [torch.logspace(-200, -3, 4000, dtype=torch.float64), torch.linspace(1.001e-3, top, 9000)]
        )
    rho = density(kind, 0.25, grid)
    atom = 1 - mass
    assert float(torch.trapezoid(rho, grid)) == pytest.approx(mass, abs=0.01)
    mean = float(torch.trapezoid(rho * grid, grid)) + atom * math.exp(0.25)
    assert mean == pytest.approx(1, abs=0.01)
    second = float(torch.trapezoid(rho * grid**2, grid)) + atom * math.exp(0.5)
    assert second - mean**2 == pytest.approx(0.25, abs=0.01)


def test_the_variance_of_the_slope_is_eight_q_squared_for_tanh():
    assert 8 * variance_for("tanh", 1e-6) ** 2 == pytest.approx(1e-6, rel=0.02)


def test_the_distance_of_a_sample_to_itself_is_zero_and_to_a_shifted_one_is_not():
    a = torch.linspace(0, 1, 101)
    assert distance(a, a) == 0 and distance(a, a + 2) == 1


def test_the_study_runs_and_the_classes_are_told_apart(monkeypatch):
    monkeypatch.setitem(study.BUDGETS, "small", Budget(80, 30, 1))
    result = study.run()
    classes = [r for r in result.rows if "nearer of the two" in r.claim or "another" in r.claim]
    assert len(classes) == 4 and all(r.holds for r in classes)
    assert to_png(result.figures[0], dpi=40)[1:4] == b"PNG"
