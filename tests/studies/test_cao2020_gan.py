"""Two players in training as a stochastic equation."""

import math
from dataclasses import replace

import pytest
import torch

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.cao2020_gan import BUDGETS, growth


def test_every_claim_holds_at_a_smaller_size(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", replace(BUDGETS["small"], paths=500, steps=120, points=24))
    result = get("cao2020_gan").run("small")
    assert [(row.claim, row.measured) for row in result.rows if row.holds is not True] == []
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_growth_is_read_where_deviations_are_small():
    time = torch.arange(300, dtype=torch.float64)
    curve = 1e-8 * 1.1**time
    bent = torch.where(curve > 1e-4, torch.full_like(curve, 1e-2), curve)
    assert growth(bent) == pytest.approx(1.1, abs=1e-9)
    assert growth(1e-8 * torch.exp(-time / 50)) == pytest.approx(math.exp(-1 / 50), abs=1e-9)
