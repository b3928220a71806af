"""Learning rate over batch size: the study at a small size."""

import pytest
import torch

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.jastrzebski2017_factors import (
    BUDGETS,
    Budget,
    lift,
    network_rows,
    regression,
    schedule_rows,
)


def test_the_study_runs_and_its_claims_hold_at_a_smaller_size(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", Budget(chains=250, steps=250, stage=80, seeds=2, epochs=4))
    result = get("jastrzebski2017_factors").run("small")
    assert [(row.claim, row.measured) for row in result.rows if row.holds is not True] == []
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_the_excess_loss_is_the_loss_above_its_minimum():
    problem = regression()
    theta = problem.bottom + torch.tensor([0.3, -0.2, 0.0, 0.1, 0.5], dtype=torch.float64)

    def loss(t):
        return (problem.x @ t - problem.y).square().mean() / 2

    assert float(lift(problem, theta[None])) == pytest.approx(
        float(loss(theta) - loss(problem.bottom)), rel=1e-9
    )


def test_a_schedule_or_a_network_that_differs_does_not_hold():
    ones = torch.ones(120), torch.full((120,), 0.02)
    assert all(row.holds for row in schedule_rows({"cut": ones, "grow": ones}))
    assert not any(row.holds for row in schedule_rows({"cut": ones, "grow": (2 * ones[0], ones[1])}))
    same = {"loss": 1.0, "loss_error": 0.01, "sharpness": 2.0, "sharpness_error": 0.02}
    half = {key: value / 2 for key, value in same.items()}
    pairs = ((0.05, 8), (0.1, 16), (0.2, 32))
    assert all(row.holds for row in network_rows({**dict.fromkeys(pairs, same), (0.2, 8): half}))
    rows = network_rows({(0.05, 8): same, (0.1, 16): same, (0.2, 32): half, (0.2, 8): same})
    assert not any(row.holds for row in rows)
