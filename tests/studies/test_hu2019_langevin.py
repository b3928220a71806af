"""Weights as particles that diffuse."""

import pytest
import torch

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.hu2019_langevin import BUDGETS, Budget, sine_law

TINY = Budget(particles=40, iterations=100, ds=0.16, seeds=2, neurons=4, digit_iterations=5)


def test_the_law_of_the_sine_field_is_a_density_that_reproduces_the_state_it_is_made_of():
    a, density, reached = sine_law(2.0)
    width = float(a[1] - a[0])
    assert float(density.sum() * width) == pytest.approx(1)
    assert float((density * torch.sin(2 * a)).sum() * width) == pytest.approx(reached, abs=1e-9)


def test_a_cold_law_sits_at_the_minimum_of_the_hamiltonian():
    a, density, reached = sine_law(1e-3)
    best = a[density.argmax()]
    H = (reached - 2) * torch.sin(2 * a) + 0.25 * a.square()
    assert float(best) == pytest.approx(float(a[H.argmin()]), abs=1e-3)


def test_a_tiny_run_gives_rows_figures_and_facts(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", TINY)
    told = []
    result = get("1909.07278").run("small", lambda share, text: told.append(share))
    assert told == sorted(told) and told[-1] == 1.0
    assert len(result.rows) == 8 and len(result.facts["digits"]) == 2
    assert all(row.holds for row in result.rows if row.claim.startswith("mean of the law, σ²"))
    for figure in result.figures:
        assert to_png(figure, dpi=40).startswith(b"\x89PNG")
