"""A set-point for the KL divergence."""

import math

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.shao2020_controlvae import BUDGETS, SPECTRA, Budget, digit_rows, linear_rows

TINY = Budget(30, before=20, after=10, wound=10, seeds=2, hidden=8, batch=16)


def test_a_tiny_run_gives_rows_a_figure_and_facts(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", TINY)
    told = []
    result = get("shao2020_controlvae").run("small", lambda share, text: told.append(share))
    assert told == sorted(told) and told[-1] == 1.0
    assert len(result.rows) == 12 and all(row.measured is not None for row in result.rows)
    assert all(math.isfinite(beta) for betas in result.facts["final_beta"].values() for beta in betas)
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_rests_beside_the_theory_are_seen():
    rest = [{"beta": 0.5, "kl": 1.5}] * len(SPECTRA) + [{"beta": 0.5, "kl": 1.38629}]
    assert [row.holds for row in linear_rows(rest)] == [False, False, False, True]


def course(kl, swing=0.1):
    return {"kl": [kl + swing, kl - swing] * 200, "beta": [0.5] * 400}


def test_a_collapse_that_does_not_come_and_a_set_point_that_is_missed_are_seen():
    budget = Budget(1, before=300, after=100, wound=10, seeds=1, hidden=1, batch=1)
    good = {
        "β = 1": 3.0,
        "β = 4": 0.0,
        "C = 5": 5.0,
        "C = 10": 10.0,
        "drop": 5.0,
        "wound": 5.0,
        "windup": 100.0,
    }
    bad = {"β = 1": 0.0, "β = 4": 1.0, "C = 5": 5.2, "C = 10": 9.8, "drop": 6.0, "wound": 4.5, "windup": 5.0}
    for values, holds in ((good, True), (bad, False)):
        found = {name: course(kl, 0.04) for name, kl in values.items()}
        found["log drop"] = course(25.0, 0.01 if holds else 0.1)
        assert [row.holds for row in digit_rows([found], budget)] == [holds] * 8
