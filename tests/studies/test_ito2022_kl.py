"""Control by reweighing random paths."""

import pytest
import torch

from bolza.core import rollout
from bolza.report import to_png
from bolza.studies import get
from bolza.studies.ito2022_kl import BUDGETS, Budget, closed_loop, pendulum

TINY = Budget(
    samples=(200, 1000), repeats=(60, 30), walks=4000, pendulum_steps=4, pendulum_samples=40, pendulum_runs=2
)


def test_walks_under_the_optimal_law_cost_the_value():
    mean, error = closed_loop(20_000, seed=1)
    assert abs(mean - 3.183514) < 4 * error < 0.1


def test_without_input_the_pendulum_hangs_and_falls_from_the_top():
    system, _ = pendulum()
    still = [torch.zeros(1, dtype=torch.float64)] * 20
    hanging = rollout(system, torch.tensor([torch.pi, 0.0], dtype=torch.float64), still).states[-1]
    assert float(hanging[0]) == pytest.approx(torch.pi, abs=1e-6)
    falling = rollout(system, torch.tensor([0.1, 0.0], dtype=torch.float64), still).states[-1]
    assert abs(float(falling[0])) > 1


def test_a_tiny_run_gives_rows_figures_and_facts(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", TINY)
    told = []
    result = get("2203.12864").run("small", lambda share, text: told.append(share))
    assert told == sorted(told) and told[-1] == 1.0
    assert len(result.rows) == 10 and result.rows[0].holds
    assert result.facts["exact_value"] == pytest.approx(3.18351, abs=5e-6)
    for figure in result.figures:
        assert to_png(figure, dpi=40).startswith(b"\x89PNG")
