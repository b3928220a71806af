"""Multigrid over layers."""

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.gunther2018_layer_parallel import BUDGETS, Budget, training_rows

TINY = Budget(draws=1, epochs=1, seeds=1, width=4)


def test_a_tiny_run_gives_rows_that_hold_a_figure_and_facts(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", TINY)
    monkeypatch.setattr("bolza.studies.gunther2018_layer_parallel.BATCH", 1438)
    told = []
    result = get("gunther2018_layer_parallel").run("small", lambda share, text: told.append(share))
    assert told == sorted(told) and told[-1] == 1.0
    failed = [row.claim for row in result.rows if not row.holds and "accuracy" not in row.claim]
    assert len(result.rows) == 12 and failed == []
    assert set(result.facts["training"]) == {"serial", "iterations: 1"}
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_an_accuracy_six_points_short_does_not_hold():
    courses = {"serial": [([0.9], 1.0, 0.0)], "iterations: 1": [([0.84], 0.6, 0.1)]}
    (row,) = training_rows(courses)
    assert row.holds is False
