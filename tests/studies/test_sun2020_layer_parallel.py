"""Slices tied by multipliers."""

import pytest

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.sun2020_layer_parallel import BUDGETS, COURSES, Budget, Course, rows

TINY = Budget(epochs=2, seeds=1, blocks=4, width=8, batch=480)


def test_a_tiny_run_gives_rows_a_figure_and_facts(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", TINY)
    told = []
    result = get("sun2020_layer_parallel").run("small", lambda share, text: told.append(share))
    assert told == sorted(told) and told[-1] == 1.0
    judged = {row.claim: row for row in result.rows}
    assert len(judged) == 6
    assert judged["one slice: largest difference from back-propagation"].holds
    assert judged["critical path of an epoch after the first, over that of a serial one"].holds
    assert result.facts["serial"]["violation"] == [[0.0, 0.0]]
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_an_accuracy_six_points_short_does_not_hold():
    found = {key: Course([[0.9]], [[1.0]], [[0.0]]) for key in COURSES}
    found["lagrangian"] = Course([[0.84]], [[1 / 3]], [[0.1]])
    judged = [row for row in rows(found, TINY) if row.claim.startswith("test accuracy minus serial")]
    assert [row.holds for row in judged] == [False, True, True]
    assert judged[0].measured == pytest.approx(-0.06)
