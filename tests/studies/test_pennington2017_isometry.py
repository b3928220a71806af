"""Isometry of orthogonal tanh networks, and what it does for learning."""

import torch

from bolza.report import to_png
from bolza.studies import pennington2017_isometry as study
from bolza.studies.pennington2017_isometry import Budget, learning_row

TINY = Budget(80, 20, 2, 6, 16, 10, 2, (1e-2, 1e-1))


def test_the_study_runs_and_the_claims_on_spectra_hold(monkeypatch):
    monkeypatch.setitem(study.BUDGETS, "small", TINY)
    result = study.run()
    orthogonal = [r for r in result.rows if "orthogonal tanh" in r.claim or "beyond the paper" in r.claim]
    assert len(orthogonal) == 3 and all(r.holds for r in orthogonal)
    assert len(result.rows) == 10
    assert all(to_png(figure, dpi=40)[1:4] == b"PNG" for figure in result.figures)


def test_a_lead_within_two_errors_is_left_open():
    near = {
        "orthogonal": torch.tensor([[0.5, 0.8], [0.6, 0.9]]),
        "gaussian": torch.tensor([[0.8, 0.4], [0.9, 0.2]]),
    }
    assert learning_row(near, TINY).holds is None
    ahead = near | {"gaussian": torch.tensor([[0.30, 0.2], [0.31, 0.2]])}
    assert learning_row(ahead, TINY).holds is True
    behind = {"orthogonal": ahead["gaussian"], "gaussian": ahead["orthogonal"]}
    assert learning_row(behind, TINY).holds is False
