"""A KL weight that falls slowly."""

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.shao2022_dynamicvae import BUDGETS, FLOOR, Budget, rows_of

TINY = Budget(before=20, after=110, stair=1, seeds=1, hidden=4, batch=8)


def test_a_tiny_run_gives_rows_a_figure_and_facts(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", TINY)
    told = []
    result = get("shao2022_dynamicvae").run("small", lambda share, text: told.append(share))
    assert told == sorted(told) and told[-1] == 1.0
    assert len(result.rows) == 7 and all(row.measured is not None for row in result.rows)
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_a_missed_set_point_a_large_weight_and_a_floor_that_is_left_are_seen():
    budget = Budget(before=100, after=300, stair=1, seeds=1, hidden=1, batch=1)
    good = {
        "from 1": (5, 0.5),
        "from 10": (5, 0.5),
        "ramp": (10, 0.2),
        "drop": (5, 0.5),
        "latching": (16, FLOOR),
    }
    bad = {"from 1": (6, 0.5), "from 10": (6, 1.5), "ramp": (8, 0.2), "drop": (16, 0.1), "latching": (5, 0.5)}
    for values, holds in ((good, True), (bad, False)):
        found = {name: {"kl": [float(kl)] * 400, "beta": [beta] * 400} for name, (kl, beta) in values.items()}
        assert [row.holds for row in rows_of([found], budget)] == [holds] * 7
