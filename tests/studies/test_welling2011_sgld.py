"""Langevin dynamics on batches: the study at a small size, and the moments it is compared with."""

import pytest
import torch

from bolza.report import to_png
from bolza.studies import get
from bolza.studies._posterior import Reference, breast_cancer
from bolza.studies.welling2011_sgld import BUDGETS, KEY, Budget, grid, mixture


def test_the_study_runs_and_its_closed_forms_hold_at_a_smaller_size(monkeypatch):
    tiny = Budget(20_000, mixture=60, mixture_steps=200, reference=(24, 24), chains=8, steps=60)
    monkeypatch.setitem(BUDGETS, "small", tiny)
    known = Reference(
        torch.zeros(31).double(),
        torch.full((31,), 0.1).double(),
        torch.eye(31).double(),
        1.0,
        torch.zeros(9, 31),
    )
    monkeypatch.setattr(f"bolza.studies.{KEY}.reference", lambda *size: known)
    result = get("welling2011_sgld").run("small")
    exact = [row for row in result.rows if row.claim.startswith(("λ = 3", "order"))]
    assert len(exact) == 7
    assert [(row.claim, row.measured) for row in exact if row.holds is not True] == []
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_the_moments_of_the_mixture_do_not_depend_on_the_grid():
    assert grid(120).moments == pytest.approx(grid(180).moments, rel=1e-4)


def test_a_run_depends_on_its_seed_alone():
    small = Budget(mixture=5, mixture_steps=10)
    assert mixture(small, 5e-3, 5e-4).mean.equal(mixture(small, 5e-3, 5e-4).mean)


def test_held_out_samples_are_not_trained_on():
    problem = breast_cancer()
    assert len(problem.x) + len(problem.test_x) == 569
    assert float(problem.x[:, :-1].mean(0).abs().max()) < 1e-5
