"""The wedge of networks that train."""

import math

import pytest
import torch

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.schoenholz2017_propagation import BUDGETS, Budget, scale_rows, side_ratio, task

TINY = Budget((1.0, 1.761, 4.0), (5, 12, 40), 2, 40, 40, 32)


def test_every_depth_scale_holds():
    rows = scale_rows()
    assert len(rows) == 12 and all(row.holds for row in rows)


def test_pixels_are_those_of_the_paper():
    data = task()
    assert float(data.train_x.amin()) == -0.5 and float(data.train_x.amax()) == 0.5 and not len(data.test_x)


def test_a_side_leaves_out_columns_without_a_limit():
    ratios = torch.tensor([[5.0, math.nan, 4.0], [6.0, 5.0, 4.0]], dtype=torch.float64)
    mean, error, columns = side_ratio(ratios, torch.tensor([True, True, False]))
    assert mean == pytest.approx(5.5) and error == pytest.approx(0.5) and columns == [0]
    assert side_ratio(ratios, torch.tensor([False, True, False]))[2] == []


@pytest.mark.parametrize("scale", ["small", "full"])
def test_the_budget_has_both_sides_and_the_same_time(scale):
    budget = BUDGETS[scale]
    assert budget.lr * budget.width * budget.steps == pytest.approx(60.0)
    assert budget.weight_vars[0] < 1.7 and 1.761 in budget.weight_vars and budget.weight_vars[-1] > 1.9
    if scale == "full":
        assert (len(budget.weight_vars), len(budget.depths), budget.width) == (20, 10, 100)


def test_a_tiny_map_has_a_wedge_rows_and_figures(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", TINY)
    told = []
    result = get("schoenholz2017_propagation").run("small", lambda share, text: told.append(share))
    assert told == sorted(told) and told[-1] == 1.0
    accuracy = torch.tensor(result.facts["train_accuracy"]).mean(0)
    assert accuracy.shape == (3, 3)
    assert (accuracy[:, 0] > 0.3).all()  # shallow networks train everywhere
    assert (accuracy[[0, 2], 2] < 0.2).all()  # forty layers are eleven and six ξ_c
    assert accuracy[1, 2] > accuracy[[0, 2], 2].max()
    for figure in result.figures:
        assert to_png(figure, dpi=40).startswith(b"\x89PNG")
