"""Equal cost: every rule spends the same passes, and what a step costs is what the papers say."""

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.shafahi2019_free import BUDGETS, RULES, Budget


def test_the_study_runs_and_every_rule_spends_the_same_number_of_passes(monkeypatch):
    suite = {"attack": ["apgd-ce"], "steps": 5, "restarts": 1, "suite_steps": 5}
    monkeypatch.setitem(BUDGETS, "small", Budget(seeds=1, passes=80, samples=100, suite=suite))
    result = get("shafahi2019_free").run("small")
    rows = {row.claim: row for row in result.rows}
    assert rows["full passes for each step of the weights"].holds
    assert rows["the suite is never weaker than gradient ascent"].holds
    assert {result.facts[rule][0]["passes"] for rule in RULES} <= set(range(80, 88))
    assert result.holds is not True  # so short a run cannot tell
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")
