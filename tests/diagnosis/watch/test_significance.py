import math

import pytest
import torch

from bolza.core.errors import ArgumentError
from bolza.diagnosis.watch.significance import drift, drift_limit, kendall_z, level_of_look

CHAINS, STEPS = 2000, 1000


def autoregressive(memory, chains=CHAINS, steps=STEPS, seed=0):
    """Stationary Gaussian chains of which exp(−1/memory) is left after a step: ‖θ‖² of SGD on a quadratic is one."""
    generator = torch.Generator().manual_seed(seed)
    keep = math.exp(-1 / memory)
    noise = torch.randn(steps, chains, generator=generator) * math.sqrt(1 - keep**2)
    x = torch.randn(chains, generator=generator)
    rows = torch.empty(steps, chains)
    for t in range(steps):
        x = keep * x + noise[t]
        rows[t] = x
    return rows.T


def test_a_stationary_run_is_called_so_as_often_as_stated():
    x = autoregressive(memory=2)
    for level in (0.05, 0.2):
        limit = drift_limit(level)
        rate = float((drift(x).z.abs() < limit).double().mean())
        # blocks of 50 steps over a memory of 2 are nearly independent: 4 % of a block is shared with its neighbour
        assert abs(rate - (1 - level)) < 4 * math.sqrt(level * (1 - level) / CHAINS) + 0.01
    pair = torch.stack([x[: CHAINS // 2], x[CHAINS // 2 :]])
    both = (drift(pair).z.abs() < drift_limit(0.05, quantities=2)).all(0)
    assert abs(float(both.double().mean()) - 0.95) < 4 * math.sqrt(0.05 * 0.95 / (CHAINS // 2)) + 0.01


def test_a_run_that_moves_by_more_than_can_be_missed_is_not_called_stationary():
    x = autoregressive(memory=2, chains=400)
    found = drift(x)
    slope = 6 * float(found.error.mean())  # between the halves
    moved = drift(x + 2 * slope * torch.arange(STEPS) / STEPS)
    assert float((moved.z.abs() < drift_limit(0.05)).double().mean()) < 0.02


def test_a_memory_as_long_as_the_window_delays_the_verdict_instead_of_bringing_it_early():
    x = autoregressive(memory=STEPS, chains=400)
    assert float((drift(x).z.abs() < drift_limit(0.05)).double().mean()) < 0.5


def test_the_change_and_its_error_are_those_of_the_two_halves():
    x = torch.arange(40.0)
    found = drift(x, blocks=4)
    assert float(found.change) == pytest.approx(20)
    assert float(found.error) == pytest.approx(
        math.sqrt((50 + 50) / 2)
    )  # blocks of 10: means 4.5, 14.5 and 24.5, 34.5
    assert float(found.z) == pytest.approx(-float(found.change) / float(found.error))
    with pytest.raises(ArgumentError, match="3 entries for 20 blocks"):
        drift(torch.zeros(3))


def test_the_levels_of_all_looks_sum_to_the_level_asked_for():
    assert sum(level_of_look(0.01, i) for i in range(1, 100_001)) == pytest.approx(0.01, rel=1e-4)


def test_kendall_s_statistic_has_unit_variance_without_trend_and_agrees_with_scipy():
    from scipy.stats import kendalltau

    generator = torch.Generator().manual_seed(1)
    scores = torch.tensor([kendall_z(torch.randn(24, generator=generator)) for _ in range(400)])
    assert abs(float(scores.mean())) < 4 / math.sqrt(400)
    assert abs(float(scores.var()) - 1) < 4 * math.sqrt(2 / 400)
    x = torch.randn(24, generator=generator)
    spread = math.sqrt(2 * (2 * 24 + 5) / (9 * 24 * 23))
    assert kendall_z(x) == pytest.approx(kendalltau(range(24), x.tolist()).statistic / spread, rel=1e-6)
    assert kendall_z(torch.tensor([1.0, 2.0, 3.0, math.nan])) == kendall_z(torch.arange(4.0))
