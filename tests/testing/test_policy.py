"""The contract accepts a right policy and rejects each of a row of broken ones."""

import pytest
import torch

from bolza.testing import ContractError, check_policy


class Average:
    """Right: the learning rate follows a running mean of the loss."""

    def init(self):
        return {"mean": torch.zeros(()), "count": 0}

    def update(self, state, observation):
        count = state["count"] + 1
        mean = state["mean"] + (observation["loss"] - state["mean"]) / count
        return {"mean": mean, "count": count}, {"lr": 0.1 / (1 + float(mean))}


class NoUpdate:
    def init(self):
        return 0


class ReturnsActionOnly(Average):
    def update(self, state, observation):
        return super().update(state, observation)[1]


class ChangesState(Average):
    def update(self, state, observation):
        state["count"] += 1
        return state, {"lr": 0.1}


class HidesState(Average):
    def __init__(self):
        self.seen = []

    def update(self, state, observation):
        if observation["loss"] not in self.seen:
            self.seen.append(observation["loss"])
        return state, {"lr": 0.1 / len(self.seen)}


class NotFinite(Average):
    def update(self, state, observation):
        return state, {"lr": float("inf")}


class KeepsAnObject(Average):
    def init(self):
        return {"owner": Average}


class InitDiffers(Average):
    calls = 0

    def init(self):
        self.calls += 1
        return {"count": self.calls}


LOSSES = [{"loss": value} for value in (2.0, 1.5, 1.2, 1.1)]


def test_a_right_policy_passes():
    check_policy(Average, LOSSES)


@pytest.mark.parametrize(
    ("policy", "clause"),
    [
        (NoUpdate, "has_the_form"),
        (InitDiffers, "init_repeats"),
        (KeepsAnObject, "state_is_plain_data"),
        (ReturnsActionOnly, "update_returns_state_and_action"),
        (ChangesState, "update_is_pure"),
        (NotFinite, "action_is_finite"),
        (HidesState, "resumes"),
    ],
)
def test_a_broken_policy_fails_on_the_clause_it_breaks(policy, clause):
    with pytest.raises(ContractError) as caught:
        check_policy(policy, LOSSES)
    assert caught.value.clause == clause


def test_one_observation_is_too_few():
    with pytest.raises(ContractError, match="at least two"):
        check_policy(Average, LOSSES[:1])
