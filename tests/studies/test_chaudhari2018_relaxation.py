"""Losses smoothed by partial differential equations: the study at a tiny size, and its pieces."""

from dataclasses import replace

import pytest
import torch

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.chaudhari2018_relaxation import BUDGETS, HeatDescent, averaging_row


def test_a_tiny_run_keeps_the_formulas_and_reports_what_needs_viscosity(monkeypatch):
    tiny = replace(BUDGETS["small"], paths=500, control_steps=20, seeds=2, gradients=20, scales=(0.4, 0.1))
    monkeypatch.setitem(BUDGETS, "small", tiny)
    result = get("chaudhari2018_relaxation").run("small")
    rows = [row for row in result.rows if "noisy labels" not in row.claim and "1/ε" not in row.claim]
    assert [row.claim for row in rows if row.holds is not True] == ["the same without viscosity"]
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_the_order_of_averaging_is_read_off_a_power_law():
    row = averaging_row({0.4: (0.04, 0.001), 0.1: (0.01, 0.001)})
    assert row.measured == pytest.approx(1.0) and row.holds
    assert not averaging_row({0.4: (0.04, 0.0001), 0.1: (0.038, 0.0001)}).holds


def test_descent_by_the_heat_equation_moves_by_gradients_at_perturbed_weights():
    w = torch.nn.Parameter(torch.ones(20000, dtype=torch.float64))
    optimizer = HeatDescent([w], lr=0.05, spread=0.5, draws=4)
    for _ in range(4):
        optimizer.zero_grad()
        (w**4 / 4).sum().backward()
        optimizer.step()
    # the first gradient is at the centre; E (1 + σξ)³ = 1 + 3σ² at the three others
    moved = 1 - optimizer.state[w]["center"]
    assert float(moved.mean()) == pytest.approx(0.05 * (1 + 3 * (1 + 3 * 0.25)), rel=0.02)
