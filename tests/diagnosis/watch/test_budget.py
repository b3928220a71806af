import pytest
import torch

from bolza.core.errors import ArgumentError
from bolza.diagnosis.watch.budget import Budget
from bolza.diagnosis.watch.series import Series


def test_work_of_known_cost_never_takes_more_than_its_share():
    budget, worst = Budget(0.1), 0.0
    for step in range(5000):
        budget.train(0.001)
        budget.notes += 2e-5
        for name, cost in (("a", 0.004), ("b", 0.03)):
            if budget.allows(name, guess=cost):
                budget.charge(name, cost)
        if step > 1:
            worst = max(worst, budget.total / budget.trained)
    assert worst <= 0.1 + 1e-12
    assert budget.share_spent > 0.09 and budget.runs["a"] > 10  # and it is used


def test_a_first_run_that_costs_more_than_was_guessed_is_paid_back():
    budget = Budget(0.1)
    while not budget.allows("a", guess=0.01):
        budget.train(0.001)
    budget.charge("a", 0.5)
    waited = 0
    while not budget.allows("a", guess=0.01):
        budget.train(0.001)
        waited += 1
    assert budget.total + 0.5 <= 0.1 * budget.trained + 1e-3 and waited > 4000


def test_a_pause_is_not_taken_for_training_and_a_share_must_be_positive():
    budget = Budget(0.1)
    for _ in range(100):
        budget.train(0.01)
    budget.train(3600.0)
    assert budget.trained < 2
    with pytest.raises(ArgumentError, match="budget=0 must be positive"):
        Budget(0)


def test_a_budget_goes_on_where_it_was_saved():
    budget, other = Budget(0.1), Budget(0.1)
    budget.train(1.0)
    budget.charge("a", 0.05)
    other.load_state_dict(budget.state_dict())
    assert other.state_dict() == budget.state_dict() and other.share_spent == 0.05


def test_a_series_stays_evenly_spaced_and_bounded_and_survives_saving():
    series = Series(["loss", "a"], capacity=50)
    for step in range(1, 1001):
        if step % series.stride == 0:
            series.add(step, (step / 2,), torch.tensor([float(step)]))
    gaps = {b - a for a, b in zip(series.steps, series.steps[1:], strict=False)}
    assert gaps == {series.stride} and len(series) <= 50
    assert series["a"].tolist() == [float(s) for s in series.steps]
    assert series["loss"].tolist() == [s / 2 for s in series.steps]
    other = Series(["loss", "a"], capacity=50)
    other.load_state_dict(series.state_dict())
    other.add(1024, (0.0,), torch.tensor([1.0]))
    assert other.rows(after=1000).tolist() == [[0.0, 1.0]] and other.steps_after(1000) == [1024]
