"""Synchronisation of a reservoir with its driver."""

import pytest
import torch

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.verzelli2020_synchronize import BUDGETS, Budget, lorenz, read_out


@pytest.mark.slow
def test_no_claim_fails_at_a_smaller_size(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", Budget(steps=900, units=100, draws=3, neighbours=60))
    result = get("verzelli2020_synchronize").run("small")
    assert [(row.claim, row.measured) for row in result.rows if row.holds is False] == []
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_the_driver_stays_on_its_attractor():
    x = lorenz(400)
    assert x.shape == (400, 3)
    assert x[:, 2].min() > 0 and x.abs().max() < 50


def test_a_read_out_of_what_is_in_the_state_has_no_error():
    states = torch.randn(200, 3, dtype=torch.float64)
    assert read_out(states, states @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + 3) < 1e-6
    assert read_out(states, torch.randn(200, dtype=torch.float64)) == pytest.approx(1.0, abs=0.2)
