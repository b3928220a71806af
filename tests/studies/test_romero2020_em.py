"""EM with a prior: the study at a small size."""

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.romero2020_em import BUDGETS, Budget


def test_the_study_runs_and_its_claims_hold_at_a_smaller_size(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", Budget(samples=600, seeds=1, separations=(2.0, 4.0)))
    result = get("romero2020_em").run("small")
    assert [(row.claim, row.measured) for row in result.rows if row.holds is not True] == []
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")
