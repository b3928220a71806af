"""The bandit that chooses alignments."""

import math

import pytest
import torch

from bolza.core.errors import ArgumentError
from bolza.optim.bandits import Exp3


def test_one_reward_moves_the_probabilities_by_the_formula():
    bandit = Exp3(3, exploration=0.3)
    bandit.update(2, 0.5)
    w = math.exp(0.3 * 0.5 / (3 * (1 / 3)))
    expected = [0.7 * a / (2 + w) + 0.1 for a in (1, 1, w)]
    assert bandit.probabilities() == pytest.approx(expected, abs=1e-12)


def test_it_stays_within_its_regret_bound_when_the_best_arm_changes():
    arms, steps = 4, 2000
    gamma = min(1.0, math.sqrt(arms * math.log(arms) / ((math.e - 1) * steps)))
    bandit, draw = Exp3(arms, gamma), torch.Generator().manual_seed(0)
    gain, each = 0.0, [0.0] * arms
    for step in range(steps):
        rewards = [0.2, 0.8 if step < 1500 else 0.0, 0.4, 0.3]
        arm = bandit.draw(draw)
        bandit.update(arm, rewards[arm])
        gain += rewards[arm]
        each = [a + r for a, r in zip(each, rewards, strict=True)]
    regret = max(each) - gain
    assert 0 < regret < 2.63 * math.sqrt(steps * arms * math.log(arms))
    assert regret < 0.5 * (max(each) - sum(each) / arms)  # and well below that of drawing at random


def test_it_follows_the_better_arm_and_never_stops_exploring():
    bandit, draw = Exp3(2, 0.1), torch.Generator().manual_seed(0)
    for _ in range(400):
        arm = bandit.draw(draw)
        bandit.update(arm, 1.0 if arm == 1 else 0.0)
    p = bandit.probabilities()
    assert p[0] == pytest.approx(0.05, abs=1e-3)
    assert sum(p) == pytest.approx(1)


def test_it_goes_on_from_its_weights():
    one, two = Exp3(2), Exp3(2)
    for k in range(5):
        one.update(k % 2, 0.3)
    two = Exp3(2, log_weights=one.log_weights)
    assert two.probabilities() == one.probabilities()
    assert two.draw(torch.Generator().manual_seed(3)) == one.draw(torch.Generator().manual_seed(3))


def test_bad_numbers_are_refused():
    for make in (
        lambda: Exp3(0),
        lambda: Exp3(2, 0.0),
        lambda: Exp3(2, log_weights=[0.0]),
        lambda: Exp3(2).update(0, 1.5),
        lambda: Exp3(2).update(0, math.nan),
    ):
        with pytest.raises(ArgumentError):
            make()
