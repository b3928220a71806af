"""MAML: the optima, the costate, and that the parts of the study run."""

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.finn2017_maml import BUDGETS, Budget


def test_the_optima_and_the_costate_hold_and_a_tiny_run_has_every_part(monkeypatch):
    monkeypatch.setitem(
        BUDGETS, "small", Budget(seeds=1, outer=6, tasks=4, test=5, digit_outer=3, digit_test=3)
    )
    result = get("finn2017_maml").run("small")
    assert len(result.rows) == 11 and all(row.holds for row in result.rows[:5])
    curves = result.facts["sine waves"][0]
    assert {name: len(curve) for name, curve in curves.items()} == dict.fromkeys(
        ("MAML", "first order", "joint training"), 4
    )
    assert set(result.facts["digits"][0]) == {"MAML", "trained classifier", "new weights"}
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")
