"""Closed-loop control by the maximum principle: exact rows, and the claims that a tiny budget can bear."""

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.chen2021_closed_loop import BUDGETS, Budget


def test_the_study_runs_and_the_search_agrees_with_the_closed_form(monkeypatch):
    monkeypatch.setitem(
        BUDGETS, "small", Budget(seeds=1, epochs=4, autoencoder_steps=3, iterations=2, samples=60)
    )
    result = get("chen2021_closed_loop").run("small")
    assert all(row.holds for row in result.rows[:3])
    rows = {row.claim: row for row in result.rows}
    assert rows["samples whose cost the search raised"].measured == 0
    assert rows["cost after the search over that of the feedback law"].measured <= 1
    assert rows["subspaces: gain of accuracy under an attack on the bare network"].measured > 0
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")
