"""The derivative in momentum."""

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.an2018_pid import BUDGETS, COURSES, Budget, training_rows

TINY = Budget(epochs=2, seeds=2, width=8, batch=480)


def test_a_tiny_run_gives_rows_a_figure_and_facts(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", TINY)
    told = []
    result = get("an2018_pid").run("small", lambda share, text: told.append(share))
    assert told == sorted(told) and told[-1] == 1.0
    assert len(result.rows) == 9
    assert all(row.holds for row in result.rows if "quadratic" in row.claim or "steps until" in row.claim)
    assert set(result.facts["losses"]) == set(COURSES)
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_a_difference_within_its_error_is_no_gain():
    losses = {key: [[1.0, 0.5], [1.0, 0.6]] for key in COURSES} | {"pid": [[1.0, 0.49], [1.0, 0.61]]}
    accuracy = {key: [0.9, 0.9] for key in COURSES}
    assert [row.holds for row in training_rows(losses, accuracy)] == [False] * 4
