"""Optimizers as feedback systems."""

import torch

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.dorfler2024_systems import BUDGETS, Budget, piecewise_slope


def test_no_claim_fails_at_a_smaller_size(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", Budget(kappas=4, runs=40, steps=60))
    result = get("dorfler2024_systems").run("small")
    assert [(row.claim, row.measured) for row in result.rows if row.holds is not True] == []
    for figure in result.figures:
        assert to_png(figure, dpi=40).startswith(b"\x89PNG")


def test_the_cycling_function_is_continuous_and_in_its_sector():
    x = torch.linspace(-3, 5, 1001, dtype=torch.float64)
    slopes = piecewise_slope(x).diff() / x.diff()
    assert slopes.min() > 1 - 1e-9 and slopes.max() < 25 + 1e-9
