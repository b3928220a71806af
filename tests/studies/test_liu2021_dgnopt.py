import pytest

from bolza.studies import get, liu2021_dgnopt
from bolza.studies._games import Arm, Curve


@pytest.fixture(scope="module")
def result():
    tiny = liu2021_dgnopt.Budget((0.1, 0.3), seeds=2, steps=3, batch=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(liu2021_dgnopt.BUDGETS, "small", tiny)
        yield get("liu2021_dgnopt").run()


def test_the_special_cases_are_exact_at_any_budget(result):
    assert [row.holds for row in result.rows[:4]] == [True] * 4


def test_every_row_is_measured_and_there_are_two_figures(result):
    assert all(row.measured is not None for row in result.rows)
    assert len(result.figures) == 2


def test_where_descent_diverges_feedback_must_do_better_not_as_badly():
    def arm(name, accuracy, loss):
        return Arm(name, {0.1: [Curve([1.0], loss, accuracy + k / 1000) for k in range(3)]})

    lost = {"SGD": arm("SGD", 0.1, 50.0), "feedback": arm("feedback", 0.1, 50.0)}
    saved = {"SGD": arm("SGD", 0.1, 50.0), "feedback": arm("feedback", 0.9, 0.2)}
    equal = {"SGD": arm("SGD", 0.9, 0.2), "feedback": arm("feedback", 0.895, 0.2)}
    verdicts = [
        liu2021_dgnopt.robustness_rows(arms, [0.1, 0.1, 0.1])[1].holds for arms in (lost, saved, equal)
    ]
    assert verdicts == [False, True, True]


def test_the_inception_network_trains_in_its_part_of_the_full_run(monkeypatch):
    x, x_test, y, y_test = liu2021_dgnopt.inception_data(32)
    monkeypatch.setattr(liu2021_dgnopt, "inception_data", lambda points: (x, x_test[:8], y, y_test[:8]))
    budget = liu2021_dgnopt.Budget(inception_seeds=1, inception_steps=1, inception_rates=(0.1,))
    rows = liu2021_dgnopt.inception_rows(
        liu2021_dgnopt.inception_arms(budget, lambda share, text: None), budget
    )
    assert len(rows) == 2 and all(row.measured > 0 for row in rows)
