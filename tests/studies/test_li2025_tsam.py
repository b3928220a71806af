"""Tilted sharpness-aware minimisation: the quadratic, and the claims that a small budget can bear."""

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.li2025_tsam import BUDGETS, RULES, Budget


def test_the_study_runs_the_quadratic_holds_and_sharpness_falls(monkeypatch):
    small = Budget(seeds=1, epochs=2, clean=tuple(RULES), wrong=tuple(RULES), draws=40_000, chains=20)
    monkeypatch.setitem(BUDGETS, "small", small)
    result = get("li2025_tsam").run("small")
    assert all(row.holds for row in result.rows[:5])
    rows = {row.claim: row for row in result.rows}
    assert rows["sharpness of SAM over that of descent"].measured < 1
    assert set(result.facts["wrong"]) == set(RULES)
    assert (
        rows["30 % wrong labels: what the tilt adds, accuracy of t = 20 less that of t = 0"].expected == "> 0"
    )
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")
