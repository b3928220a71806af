"""Leaving valleys and saddles."""

import math

import pytest
import torch

from bolza.report import to_png
from bolza.sde import ExitTimes, mean_first_passage, saddle_time
from bolza.studies import get, hu2019_diffusion
from bolza.studies.hu2019_diffusion import (
    BUDGETS,
    Budget,
    double_well,
    leave_saddle,
    leave_valley,
    saddle_rows,
    slope,
    valley_rows,
)


def test_the_rows_hold_at_a_smaller_size_and_the_figure_is_drawn(monkeypatch):
    monkeypatch.setattr(hu2019_diffusion, "TEMPERATURE", 0.3)  # the passages are ten times as short as at 0.1
    monkeypatch.setitem(BUDGETS, "small", Budget(150, 0.15, (0.16, 0.13, 0.11), 120, (3e-2, 1e-2), 300))
    result = get("hu2019_diffusion").run("small")
    assert [(row.claim, row.measured) for row in result.rows if row.holds is not True] == []
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_a_step_of_the_chain_is_a_step_of_descent_on_a_batch_of_two():
    """From −1 the gradient is 0 and the batch adds −η σ, 0 or η σ with probabilities ¼, ½, ¼."""
    found = leave_valley(1.0, 2, 4000, seed=0)  # σ = 2: a step to +1 (not below it: out) has probability ¼
    first = float((found.times == 1.0).double().mean())
    assert abs(first - 0.25) < 4 * math.sqrt(0.1875 / 4000)


def test_the_saddle_is_left_along_the_direction_that_falls():
    found = leave_saddle(2e-2, 400, seed=0)
    error = float(found.times.std()) / math.sqrt(400)
    assert abs(found.mean - saddle_time(1.0, 1e-2)) < 4 * error + 0.2


def test_weighted_slopes_and_their_errors():
    assert slope([0.0, 1.0, 2.0], [1.0, 3.0, 5.0], [1.0, 2.0, 1.0])[0] == pytest.approx(2.0)
    assert slope([0.0, 1.0], [0.0, 1.0], [0.3, 0.4])[1] == pytest.approx(0.5)  # √(0.3² + 0.4²)


def exits(mean: float) -> ExitTimes:
    """Times with that mean and a standard error of a hundredth of it."""
    spread = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(200) * mean * 0.2
    return ExitTimes(mean + spread, torch.ones(400, dtype=torch.bool), 1e9)


def test_a_valley_left_by_a_power_law_and_a_saddle_left_exponentially_are_told():
    rates = (0.12, 0.09, 0.07, 0.05)
    exact = [mean_first_passage(double_well, -1.0, (-math.inf, 1.0), 2 * rate) for rate in rates]
    assert all(row.holds for row in valley_rows(rates, [exits(t) for t in exact]))
    power = [exits(exact[0] * rates[0] / rate) for rate in rates]
    assert [row.holds for row in valley_rows(rates, power)] == [False, False]
    slow = (1e-2, 1e-3, 1e-4)
    assert all(row.holds for row in saddle_rows(slow, [exits(saddle_time(1.0, r / 2)) for r in slow]))
    assert [row.holds for row in saddle_rows(slow, [exits(0.5 / r**0.5) for r in slow])] == [False, False]
