"""Memory of recurrent networks: the claims of Chen et al. at a small size."""

import pytest
import torch

from bolza.meanfield import recurrent_fixed_point
from bolza.report import to_png
from bolza.studies import chen2018_recurrent, get
from bolza.studies.chen2018_recurrent import BUDGETS, Budget, simulate

TINY = Budget(width=200, networks=2, biases=(0.0, 4.0), gaps=(0, 32), units=32, steps=40, grid=60)


def test_wide_networks_have_the_rate_of_the_theory() -> None:
    point = (1.0, 1.0, 2.0, 1.0)
    rates = [simulate(point, 300, seed, steps=40) for seed in range(2)]
    theory = float(recurrent_fixed_point("minimal", 1.0, 1.0, gate_bias=2.0).chi)
    assert sum(rates) / 2 == pytest.approx(theory, rel=0.05)


def test_every_claim_of_theory_holds_and_figures_can_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUDGETS, "small", TINY)
    told: list[float] = []
    result = get("chen2018_recurrent").run("small", lambda share, text: told.append(share))
    assert told == sorted(told) and told[-1] == 1.0
    theory = [row for row in result.rows if "accuracy" not in row.claim]
    assert len(theory) == 7 and [row.claim for row in theory if row.holds is not True] == []
    accuracy = torch.tensor(result.facts["accuracy"])
    assert accuracy.shape == (2, 2) and accuracy[0, 1] < 0.25  # one step of memory, a gap of 32
    for figure in result.figures:
        assert to_png(figure, dpi=40).startswith(b"\x89PNG")


@pytest.mark.slow
def test_every_claim_holds_at_the_small_scale() -> None:
    result = chen2018_recurrent.run("small")
    assert [(row.claim, row.measured) for row in result.rows if row.holds is not True] == []
