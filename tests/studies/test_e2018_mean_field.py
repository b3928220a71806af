"""Training as control of a population."""

import pytest
import torch

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.e2018_mean_field import BUDGETS, Budget, exact_sample, regulator

TINY = Budget(images=20, iterations=40, decay=1.0, draws=400, sizes=(25, 100), grid=81, times=2)


def test_the_worked_sample_has_its_mean_and_deviation_exactly():
    z = exact_sample(10)
    assert float(z.mean()) == pytest.approx(1.3) and float(z.std(correction=0)) == pytest.approx(0.7)


def test_a_finer_grid_has_a_smaller_error():
    assert regulator(81)[0] < regulator(41)[0] / 2.5


def test_a_tiny_run_gives_rows_figures_and_facts(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", TINY)
    told = []
    result = get("e2018_mean_field").run("small", lambda share, text: told.append(share))
    assert told == sorted(told) and told[-1] == 1.0
    assert [row.claim for row in result.rows if row.holds is not True] == []
    assert torch.tensor(result.facts["residuals"]).shape == (11, 3)
    for figure in result.figures:
        assert to_png(figure, dpi=40).startswith(b"\x89PNG")
