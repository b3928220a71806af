import pytest
import torch

from bolza.report import to_png
from bolza.studies import baydin2018_hypergradient as study

F = torch.float64


@pytest.fixture
def tiny(monkeypatch):
    budget = study.Budget(run_steps=3, horizons=(1, 4), chains=40, network_steps=12, seeds=2, windowed=True)
    monkeypatch.setitem(study.BUDGETS, "small", budget)
    monkeypatch.setattr(study, "TIME", 20)
    monkeypatch.setattr(study, "DECADES", (1e-3, 1.0))


def test_it_runs_and_the_exact_rows_hold(tiny):
    result = study.run()
    assert [row.holds for row in result.rows[:2]] == [True, True] and len(result.rows) == 12
    assert set(result.facts["digits"]) == {"sgd", "cosine", "adam", "hyper", "window"}
    assert to_png(result.figures[0], dpi=40)[1:4] == b"PNG"


def test_the_greedy_rate_is_best_for_the_next_step():
    m = torch.rand(study.MODES, dtype=F, generator=torch.Generator().manual_seed(0))
    rate = study.greedy_rate(m)
    there = study.expected_loss(study.moment_step(m, rate))
    for factor in (0.99, 1.01):
        assert study.expected_loss(study.moment_step(m, factor * rate)) > there


def test_a_plan_of_one_step_is_the_greedy_rate_and_longer_plans_are_no_worse():
    m = torch.ones(study.MODES, dtype=F)
    plan = study.planned(m, torch.zeros(1, dtype=F), 100)
    assert float(plan.exp()) == pytest.approx(float(study.greedy_rate(m)), rel=1e-5)
    flat = torch.full((6,), float(study.greedy_rate(m)), dtype=F)
    assert study.follow(study.planned(m, flat.log(), 100).exp())[1][-1] < study.follow(flat)[1][-1]


def test_the_moments_are_those_of_simulated_steps():
    g = torch.Generator().manual_seed(0)
    theta = torch.randn(100_000, 3, dtype=F, generator=g)
    noise = torch.randn(100_000, 3, dtype=F, generator=g)
    a = study.CURVATURES[:3]
    after = (theta - 0.7 * a * (theta - study.NOISE * noise)).square()
    expected = study.moment_step(torch.ones(study.MODES, dtype=F), 0.7)[:3]
    z = (after.mean(0) - expected) / after.std(0) * 100_000**0.5
    assert z.abs().max() < 4
