"""The decay of learning rates at a small size."""

import torch

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.dascoli2022_schedules import BUDGETS, Budget, erf_loss, slopes


def test_the_study_runs_at_a_smaller_size_and_its_closed_forms_hold(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", Budget(500, 400, 20_000, 50, 2, (1.0,)))
    result = get("dascoli2022_schedules").run("small")
    exact = [row for row in result.rows if "closed form" in row.claim or "exponent" in row.claim]
    assert len(exact) == 3 and all(row.holds for row in exact)
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_a_power_has_its_exponent_as_slope():
    times = torch.arange(1.0, 101)
    torch.testing.assert_close(slopes(times, times[:, None] ** -0.7, 5.0), torch.tensor([-0.7]))


def test_the_loss_of_erf_units_is_its_mean_over_inputs():
    draw = torch.Generator().manual_seed(0)
    weights, teacher = torch.randn(2, 1, 2, 6, generator=draw)
    x = torch.randn(50_000, 6, generator=draw)
    gap = torch.erf(x @ weights[0].T / 12**0.5).sum(1) - torch.erf(x @ teacher[0].T / 12**0.5).sum(1)
    squares = gap.square() / 2
    error = float(squares.std()) / len(x) ** 0.5
    assert abs(float(squares.mean()) - float(erf_loss(weights, teacher))) < 4 * error
