"""Neural ordinary differential equations."""

import torch

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.chen2018_neural_ode import BUDGETS, Budget, adjoint_errors, kept, reflection


def test_a_tiny_run_gives_rows_and_a_figure(monkeypatch):
    monkeypatch.setitem(
        BUDGETS,
        "small",
        Budget(tolerances=(1e-2, 1e-4), seeds=1, epochs=1, line_steps=20, width=16, blocks=2),
    )
    told = []
    result = get("1806.07366").run("small", lambda share, text: told.append(share))
    assert told == sorted(told) and told[-1] == 1.0
    verdicts = {row.claim: row.holds for row in result.rows}
    assert all(verdicts[f"order of {m}"] for m in ("euler", "midpoint", "rk4"))
    assert [holds for claim, holds in verdicts.items() if claim.startswith("memory")] == [True]
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_error_of_the_adjoint_falls_with_the_tolerance():
    loose, tight = adjoint_errors((1e-1, 1e-5))
    assert tight < 1e-4 and tight < 0.1 * loose


def test_memory_counts_each_tensor_once():
    assert kept("autograd", 8) < 2.2 * kept("autograd", 4)
    state = 64 * 32 * 4
    assert kept("checkpoint", 8) - kept("checkpoint", 4) == 4 * state


def test_a_line_is_not_reflected_by_a_flow():
    torch.manual_seed(1)
    assert reflection(15, augmented=False) > 0.99
