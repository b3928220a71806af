"""The two rates of MAML: the table, and that the parts of the study run."""

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.takagi2019_rates import BUDGETS, Budget, largest_stable


def test_the_table_holds_and_a_tiny_race_has_every_pair_of_rates(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", Budget(seeds=1, steps=12, tasks=3))
    result = get("takagi2019_rates").run("small")
    assert all(row.holds for row in result.rows[:6])
    final = result.facts["final losses"][0]
    assert len(final) == 4 and len(final[0]) == 13 and 0 < final[0][0] < 1
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_the_largest_stable_rate_is_the_last_before_the_first_that_fails():
    assert largest_stable([0.5] * 13) == 0.05 * 2**6
    assert largest_stable([0.5, 0.5, float("inf"), *[0.4] * 10]) == 0.05 * 2**0.5
    assert largest_stable([1.0] * 13) == 0.0
