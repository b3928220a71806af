"""Depth against quantisation: the claims of Blumenfeld et al. at a small size."""

import pytest
import torch

from bolza.report import to_png
from bolza.studies import blumenfeld2019_quantised, get
from bolza.studies.blumenfeld2019_quantised import BUDGETS, Budget, slope

TINY = Budget(width=600, networks=2, levels=(2, 16), depths=(2, 16), units=60, steps=60)


def test_the_slope_of_a_power_law_is_its_exponent() -> None:
    n = torch.tensor([2.0, 4.0, 8.0, 16.0], dtype=torch.float64)
    exponent, error = slope(n, 3 * n**1.5)
    assert exponent == pytest.approx(1.5, abs=1e-12) and error < 1e-12


def test_every_claim_holds_and_figures_can_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUDGETS, "small", TINY)
    told: list[float] = []
    result = get("blumenfeld2019_quantised").run("small", lambda share, text: told.append(share))
    assert told == sorted(told) and told[-1] == 1.0
    assert len(result.rows) == 7
    assert [(r.claim, r.measured) for r in result.rows if r.holds is not True] == []
    for figure in result.figures:
        assert to_png(figure, dpi=40).startswith(b"\x89PNG")


@pytest.mark.slow
def test_every_claim_holds_at_the_small_scale() -> None:
    result = blumenfeld2019_quantised.run("small")
    assert [(row.claim, row.measured) for row in result.rows if row.holds is not True] == []
