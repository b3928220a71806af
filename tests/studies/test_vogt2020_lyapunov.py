"""Lyapunov spectra of recurrent networks."""

from dataclasses import replace

import pytest

from bolza.report import to_png
from bolza.studies import get, vogt2020_lyapunov
from bolza.studies.vogt2020_lyapunov import BUDGETS


@pytest.mark.slow
def test_every_claim_holds_at_a_smaller_size(monkeypatch):
    tiny = replace(BUDGETS["small"], width=150, steps=150, lstm_steps=120, lorenz_samples=256)
    monkeypatch.setitem(BUDGETS, "small", tiny)
    told = []
    result = get("vogt2020_lyapunov").run("small", lambda share, text: told.append(share))
    assert told == sorted(told) and told[-1] == 1.0
    # just above the edge the exponent is smaller than what a finite width moves it by
    assert [row.claim for row in result.rows if row.holds is None] == [
        "random tanh network, g = 1.2: λ₁ = ½ log χ₁"
    ]
    assert [(row.claim, row.measured) for row in result.rows if row.holds is False] == []
    assert len(result.rows) == 21
    for figure in result.figures:
        assert to_png(figure, dpi=40).startswith(b"\x89PNG")


def test_the_theory_is_zero_at_the_edge_and_the_log_of_the_gain_below():
    assert abs(vogt2020_lyapunov.theory(1.0)) < 1e-6
    assert abs(vogt2020_lyapunov.theory(0.5) - -0.6931471805599453) < 1e-9
