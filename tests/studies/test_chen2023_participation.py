"""Participation: the known numbers, the floor, and a network, at a small size."""

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.chen2023_participation import BUDGETS, Budget


def test_the_study_runs_and_its_known_numbers_come_out(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", Budget(seeds=1, rounds=2, samples=20, iterations=5, searches=14))
    result = get("chen2023_participation").run("small")
    known = [row for row in result.rows if not row.claim.startswith("digits")]
    assert len(known) == 15
    assert [(row.claim, row.measured) for row in known if row.holds is not True] == []
    assert len(result.rows) == 18
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")
