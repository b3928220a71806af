"""Multipliers with a proportional term."""

import pytest
import torch

from bolza.controllers import critical_gain
from bolza.report import to_png
from bolza.studies import get
from bolza.studies import stooke2020_lagrangian as study
from bolza.studies.stooke2020_lagrangian import (
    BUDGETS,
    KI,
    LIMIT,
    RATE,
    Budget,
    fitted_modulus,
    network_gain,
    network_rows,
)

TINY = Budget(quadratic_steps=600, steps=10, seeds=2, width=4, batch=16)


def test_a_tiny_run_gives_rows_a_figure_and_facts(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", TINY)
    for name in ("GAINS", "MODULI", "OVERSHOOTS", "VIOLATIONS"):  # the gain 0 takes long to fit
        monkeypatch.setattr(study, name, getattr(study, name)[1:])
    told = []
    result = get("stooke2020_lagrangian").run("small", lambda share, text: told.append(share))
    assert told == sorted(told) and told[-1] == 1.0
    assert len(result.rows) == 14
    assert all(row.holds for row in result.rows if not row.claim.startswith("digits"))
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_the_modulus_is_read_off_an_oscillation():
    t = torch.arange(80, dtype=torch.float64)
    assert fitted_modulus(0.97**t * torch.cos(0.3 * t)) == pytest.approx(0.97, abs=1e-9)


def test_the_gain_of_the_network_is_critical_for_the_rate_at_which_its_cost_moves():
    count = 64 * 4 + 4 * 10
    slope = torch.full(
        (count,), 1 / (count * LIMIT), dtype=torch.float64
    )  # of the mean of |w| over its bound
    assert network_gain(4) == pytest.approx(critical_gain(0.0, KI, RATE * float(slope.square().sum())))


def test_a_missed_constraint_and_no_gain_over_the_integral_are_seen():
    def found(cost, accuracy):
        return {"cost": cost, "multiplier": [0.0] * 200, "accuracy": accuracy}

    oscillating, damped, missed = [1.2, 0.8] * 100, [1.001] * 200, [1.3, 0.7, 1.3, 1.3] * 50
    good = network_rows([{"I": found(oscillating, 0.9), "PI": found(damped, 0.9)}] * 2)
    bad = network_rows([{"I": found(oscillating, 0.9), "PI": found(missed, 0.8)}] * 2)
    assert [row.holds for row in good] == [True] * 4 and [row.holds for row in bad] == [False] * 4
