"""Learning rate and momentum as controls: closed forms, and the laws at a small size."""

import torch

from bolza.controllers import CSGD, ControlledQuadratic, stationary_loss
from bolza.report import to_png
from bolza.studies import get
from bolza.studies.li2017_control import BUDGETS, NETS, RATES, Budget, form_rows, noisy_bowls, pieces_optimum


def test_the_study_runs_and_tells_what_a_short_run_can_tell(monkeypatch):
    tiny = Budget(steps=300, copies=2, rest_steps=60, rates=(1.0,), seeds=1, epochs=1)
    monkeypatch.setitem(BUDGETS, "small", tiny)
    result = get("li2017_control").run("small")
    assert [row.claim for row in form_rows() if not row.holds] == []
    assert len(result.rows) == 7 + 7 + 4 + 3 + 1
    assert set(result.facts["digits"]["1"]) == set(NETS)
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_free_pieces_approach_the_best_control_from_above():
    bowl = ControlledQuadratic(1.3, 0.7, 0.3, 2.0)
    best = float(bowl.loss(4.0))
    coarse, fine = (pieces_optimum(bowl, 4.0, n) for n in (5, 20))
    assert best < fine < coarse
    assert coarse - best > 8 * (fine - best)  # second order in the length of a piece


def test_rates_run_side_by_side_and_sgd_rests_at_its_floor():
    curvatures = torch.ones(300, dtype=torch.float64)
    times, course, rest, controller = noisy_bowls(
        RATES, None, 200, 1, curvatures=curvatures, start=0.0, points=5
    )
    assert controller is None
    assert course.shape == (3, len(times))
    floors = torch.tensor([float(stationary_loss(1.0, 1.0, lr)) for lr in RATES], dtype=torch.float64)
    # 300 chains over 40 steps: at least 300 independent squares, each with a relative error of √2
    torch.testing.assert_close(rest / 300, floors, rtol=4 * (2 / 300) ** 0.5, atol=0)
    *_, worn = noisy_bowls(RATES, CSGD, 10, 1)
    assert worn.log()["u"] <= 1
