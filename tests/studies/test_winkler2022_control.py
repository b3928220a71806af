"""Stochastic control of Bayesian training: the study at a small size, and its closed forms."""

import pytest

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.winkler2022_control import BUDGETS, Budget, final_loss, train


def test_the_study_runs_and_its_closed_forms_hold_at_a_smaller_size(monkeypatch):
    tiny = Budget(draws=200_000, rates=(1.0, 30.0), adam=(0.03,), steps=25, seeds=1)
    monkeypatch.setitem(BUDGETS, "small", tiny)
    result = get("winkler2022_control").run("small")
    exact = [
        row
        for row in result.rows
        if row.claim.startswith(("a = 2", "σ → 0", "loss at", "by the", "feedback"))
    ]
    assert len(exact) == 9
    assert [
        (row.claim, row.measured) for row in exact if row.holds is not True and "power" not in row.claim
    ] == []
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_a_constant_rate_leaves_the_loss_of_the_closed_form():
    import math

    u = 0.3
    exact = u * 0.1 / 4 + (2 - u * 0.1 / 4) * math.exp(-4 * u * 5)
    assert final_loss(lambda t, m: u) == pytest.approx(exact, rel=1e-4)


def test_a_run_depends_on_its_seed_alone():
    assert train("control", 1.0, 0, 5).objective == train("control", 1.0, 0, 5).objective
