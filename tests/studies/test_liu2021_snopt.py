"""Second-order training of a continuous-depth network, at a tiny budget."""

import pytest

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.liu2021_snopt import BUDGETS, Budget, Course, _ratio, curvature_row

TINY = Budget(epochs=1, seeds=1, second=(0.02,), adam=(1e-2,), momentum=(0.1,), solve=10)


def test_the_time_to_a_loss_is_interpolated():
    course = Course(seconds=[1.0, 2.0, 3.0], losses=[1.0, 0.5, 0.1])
    assert course.time_to(0.75) == pytest.approx(1.5)
    assert course.time_to(2.0) == 1.0
    assert course.time_to(0.05) == float("inf")


def test_a_ratio_of_paired_runs_has_the_error_of_its_logarithm():
    value, error = _ratio([1.0, 2.0], [2.0, 4.0])
    assert value == pytest.approx(0.5) and error == pytest.approx(0.0, abs=1e-12)
    assert _ratio([1.0, 4.0], [2.0, 4.0])[1] > 0.1


def test_the_backward_equations_of_the_study_have_the_order_of_their_method():
    errors = [curvature_row(steps).measured for steps in (4, 8)]
    assert errors[1] < errors[0] / 8


def test_a_tiny_run_gives_rows_figures_and_facts(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", TINY)
    told = []
    result = get("liu2021_snopt").run("small", lambda share, text: told.append(share))
    assert told == sorted(told) and told[-1] == 1.0
    rows = {row.claim: row for row in result.rows}
    assert len(rows) == 11
    for words in ("block alone", "adjoint gradient", "memory of a refresh"):
        (row,) = (row for claim, row in rows.items() if words in claim)
        assert row.holds, row
    assert set(result.facts["SNOpt"]) == {"0.02"}
    (row,) = (row for claim, row in rows.items() if "descent, both" in claim)
    assert row.measured < 0.8  # already after one epoch
    for figure in result.figures:
        assert to_png(figure, dpi=40).startswith(b"\x89PNG")
