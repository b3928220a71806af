"""Momentum and noisy gradients: the study at a small size, and its parts."""

import pytest
import torch

from bolza.report import to_png
from bolza.studies import get
from bolza.studies._posterior import Reference, breast_cancer
from bolza.studies.chen2014_sghmc import BUDGETS, KEY, Budget, well, well_density


def test_the_study_runs_and_its_closed_forms_hold_at_a_smaller_size(monkeypatch):
    tiny = Budget(20_000, well=4000, reference=(24, 24), chains=4, steps=40)
    monkeypatch.setitem(BUDGETS, "small", tiny)
    known = Reference(
        torch.zeros(31).double(),
        torch.full((31,), 0.1).double(),
        torch.eye(31).double(),
        1.0,
        torch.zeros(9, 31),
    )
    monkeypatch.setattr(f"bolza.studies.{KEY}.reference", lambda *size: known)
    result = get("chen2014_sghmc").run("small")
    exact = [row for row in result.rows if row.claim.startswith(("h = ", "energy", "temperature", "double"))]
    assert len(exact) == 15
    assert [(row.claim, row.measured) for row in exact if row.holds is not True] == []
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_without_friction_the_well_is_left_and_with_it_the_density_is_met():
    fine = torch.linspace(-4, 4, 2001, dtype=torch.float64)
    assert float(torch.trapezoid(well_density(fine), fine)) == pytest.approx(1.0, abs=1e-9)
    outside = float(torch.trapezoid(well_density(fine[fine > 2]), fine[fine > 2])) * 2
    assert float((well("no friction", 500).abs() > 2).double().mean()) > 0.1
    assert float((well("friction", 500).abs() > 2).double().mean()) < outside + 0.02


def test_the_slope_of_the_regression_is_that_of_its_potential():
    problem = breast_cancer()
    w = torch.randn(2, problem.x.shape[1], generator=torch.Generator().manual_seed(0)).requires_grad_()
    (slope,) = torch.autograd.grad(problem.potential(w).sum(), w)
    each = torch.arange(len(problem.x)).expand(2, -1)
    for rows in (None, each):
        assert torch.allclose(len(problem.x) * problem.slope(w, rows) + w, slope, rtol=1e-4, atol=1e-2)
