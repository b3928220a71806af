"""YOPO: the identities, the passes, and that it defends."""

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.zhang2019_yopo import BUDGETS, RULES, Budget


def test_the_study_runs_its_identities_are_exact_and_yopo_defends_for_half_the_passes(monkeypatch):
    suite = {"attack": ["apgd-ce"], "steps": 10, "restarts": 1, "suite_steps": 5}
    monkeypatch.setitem(BUDGETS, "small", Budget(seeds=1, epochs={"digits": 2}, samples=100, suite=suite))
    result = get("zhang2019_yopo").run("small")
    rows = {row.claim: row for row in result.rows}
    assert all(row.holds for row in result.rows[:3])
    assert rows["digits: full passes of YOPO-5-3 over those of PGD-10"].measured < 0.5
    own = rows["digits: robust accuracy of YOPO-5-3"].measured
    assert own > rows["digits: robust accuracy without adversarial training"].measured + 0.05
    assert set(result.facts["digits"]) == set(RULES)
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")
