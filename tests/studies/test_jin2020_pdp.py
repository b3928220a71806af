"""Learning from demonstrations."""

import torch

from bolza.report import to_png
from bolza.studies import get
from bolza.studies._demonstrations import CART_POLE, guess
from bolza.studies.jin2020_pdp import BUDGETS, Budget


def test_no_claim_fails_with_a_few_steps(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", Budget(steps=1, fits=1, differences=False, spread=0.05))
    result = get("jin2020_pdp").run("small")
    assert [(row.claim, row.measured) for row in result.rows if row.holds is not True] == []
    for figure in result.figures:
        assert to_png(figure, dpi=40).startswith(b"\x89PNG")


def test_the_cart_pole_is_in_equilibrium_upright_and_falls_when_it_leans():
    system, cost = CART_POLE.problem(CART_POLE.theta)
    upright = torch.tensor([0.0, torch.pi, 0.0, 0.0], dtype=torch.float64)
    still = system.step(0, upright, torch.zeros(1, dtype=torch.float64))
    assert torch.allclose(still, upright, atol=1e-14) and float(cost.terminal(upright)) < 1e-25
    leaning = upright + torch.tensor([0.0, 0.1, 0.0, 0.0], dtype=torch.float64)
    assert system.step(0, leaning, torch.zeros(1, dtype=torch.float64))[3] > 0
    assert (guess(CART_POLE, 0) > 0).all()
