"""Late-phase weights."""

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.oswald2021_late_phase import BUDGETS, Budget, error_rows

TINY = Budget(epochs=2, start=1, members=2, seeds=1, channels=2, train=64, chains=4000, rounds=15)


def test_a_tiny_run_gives_rows_a_figure_and_facts(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", TINY)
    told = []
    result = get("oswald2021_late_phase").run("small", lambda share, text: told.append(share))
    assert told == sorted(told) and told[-1] == 1.0
    assert len(result.rows) == 7
    assert all(row.holds for row in result.rows if "variance" in row.claim or "the same" in row.claim)
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_an_error_that_does_not_fall_is_no_gain():
    errors = {"base": [[0.1], [0.1]], "late": [[0.1], [0.1]], "from the start": [[0.2], [0.21]]}
    assert [row.holds for row in error_rows(errors)] == [False, True]
