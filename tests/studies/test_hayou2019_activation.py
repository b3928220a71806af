"""How correlations close on the critical line."""

import torch

from bolza.report import to_png
from bolza.studies import get, hayou2019_activation
from bolza.studies.hayou2019_activation import BUDGETS, RELU, Budget


def test_every_claim_holds_at_the_small_scale() -> None:
    result = get("hayou2019_activation").run("small")
    assert [(row.claim, row.measured) for row in result.rows if row.holds is not True] == []
    assert len(result.rows) == 12
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_a_law_with_another_power_is_told_apart() -> None:
    layers = torch.arange(401, dtype=torch.float64) + 1
    smooth, rectified = 6.1711 / layers, RELU / layers**2
    assert hayou2019_activation._rate_row(smooth, 6.1711, 0.05).holds
    assert not hayou2019_activation._rate_row(rectified, 6.1711, 0.05).holds
    assert hayou2019_activation._relu_rows(rectified)[2].holds
    assert not hayou2019_activation._relu_rows(smooth)[2].holds


def test_runs_repeat_and_tell_their_progress(monkeypatch) -> None:
    monkeypatch.setitem(BUDGETS, "small", Budget(120, 200, 30, 12, 4))
    told: list[float] = []
    first = hayou2019_activation.run("small", lambda share, text: told.append(share))
    assert told == sorted(told) and told[-1] == 1.0
    again = hayou2019_activation.run("small")
    assert [r.measured for r in first.rows if isinstance(r.measured, float)] == [
        r.measured for r in again.rows if isinstance(r.measured, float)
    ]
