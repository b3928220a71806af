"""Batch size in place of learning rate, at a tiny size."""

import pytest
import torch

from bolza.report import to_png
from bolza.studies import get, smith2018_batch
from bolza.studies.smith2018_batch import (
    BUDGETS,
    NOISE,
    A,
    Budget,
    Curve,
    by_batch,
    by_rate,
    network_rows,
    quadratic_rows,
    schedules,
)

TINY = Budget(chains=500, samples=300, seeds=2, epochs=1, controlled=1, feedback_epochs=1)


def test_the_study_runs_and_its_updates_are_those_of_the_schedules(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", TINY)
    monkeypatch.setattr(smith2018_batch, "BATCH", 48)
    monkeypatch.setattr(smith2018_batch, "FEEDBACK_BATCH", 32)
    result = get("smith2018_batch").run("small")
    assert len(result.rows) == 13
    assert result.facts["schedules"]["decay"]["updates"] == 3 * (1438 // 48)
    assert result.facts["schedules"]["grow"]["updates"] == 1438 // 48 + 1438 // 144 + 1438 // 432
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_schedules_agree_in_the_ratio_of_rate_to_batch():
    ratios = {name: [lr / size for lr, size in stages] for name, stages in schedules().items()}
    assert ratios["grow"] == pytest.approx(ratios["decay"]) and ratios["hybrid"] == pytest.approx(
        ratios["decay"]
    )
    assert ratios["constant"] != pytest.approx(ratios["decay"])


def test_the_quadratic_is_at_its_least_loss_and_a_wrong_curve_is_told():
    budget = Budget(chains=2000, samples=1000, seeds=1, epochs=1, controlled=1, feedback_epochs=1)
    found = {"batch": by_batch(budget), "rate": by_rate(budget)}
    assert [row.claim for row in quadratic_rows(found, budget) if not row.holds] == []
    assert found["rate"][2][-1] == pytest.approx(NOISE / (2 * A * 1000), rel=0.2)
    found["rate"] = tuple([2 * v for v in column] for column in found["rate"])
    assert not quadratic_rows(found, budget)[1].holds


def test_curves_that_differ_do_not_pass_as_equal():
    def curve(factor, updates):
        return Curve(factor * torch.ones(6, 3), [updates], [0.9, 0.9, 0.9])

    same = {
        "decay": curve(1.0, 9),
        "grow": curve(1.02, 3),
        "hybrid": curve(1.0, 5),
        "constant": curve(0.5, 9),
    }
    assert all(row.holds for row in network_rows(same))
    rows = network_rows(same | {"grow": curve(1.5, 3), "constant": curve(1.0, 9)})
    assert [row.holds for row in rows[:3]] == [False, True, False]
