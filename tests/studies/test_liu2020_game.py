import pytest

from bolza.studies import get, liu2020_game
from bolza.studies._games import Arm, Curve


@pytest.fixture(scope="module")
def result():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            liu2020_game.BUDGETS, "small", liu2020_game.Budget((0.03, 0.3), seeds=2, steps=3, batch=16)
        )
        yield get("liu2020_game").run()


def test_the_elimination_the_rules_and_the_sweep_are_exact_at_any_budget(result):
    assert [row.holds for row in result.rows[:5]] == [True] * 5


def test_every_row_is_measured_and_the_record_is_complete(result):
    assert all(row.measured is not None for row in result.rows)
    assert set(result.facts) == set(liu2020_game.ARMS)
    assert len(result.figures) == 1


def test_rows_are_judged_only_beyond_two_standard_errors():
    def arm(name, losses):
        return Arm(name, {0.1: [Curve([1.0], loss, 0.5) for loss in losses]})

    arms = {
        "no feedback": arm("no feedback", [1.0, 1.1, 0.9]),
        "feedback, alone": arm("feedback, alone", [0.1, 0.3, 0.05]),
        "feedback, cooperating": arm("feedback, cooperating", [0.1, 0.11, 0.09]),
    }
    rows = liu2020_game.training_rows(arms, liu2020_game.Budget((0.1,), seeds=3, steps=1))
    assert [row.holds for row in rows[:2]] == [True, None]
    worse = liu2020_game.training_rows(
        {**arms, "feedback, cooperating": arm("feedback, cooperating", [2.0, 2.2, 1.8])},
        liu2020_game.Budget((0.1,), seeds=3, steps=1),
    )
    assert worse[0].holds is False
