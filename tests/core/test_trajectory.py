import dataclasses

import pytest
import torch

from bolza.core import Trajectory
from bolza.core.errors import ArgumentError


def test_the_horizon_is_the_number_of_controls():
    assert Trajectory(states=(0, 1, 2), controls=({}, {})).horizon == 2


def test_a_trajectory_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Trajectory(states=(0,), controls=()).value = 1


def test_a_parameter_that_two_steps_share_gets_the_sum_of_its_gradients():
    w, b = torch.tensor([1.0, 2.0]), torch.tensor([5.0])
    run = Trajectory(states=(0,) * 3, controls=({}, {}), gradients=({"w": w}, {"w": 10 * w, "b": b}))
    total = run.gradient_by_name()
    assert torch.equal(total["w"], 11 * w) and torch.equal(total["b"], b)
    assert torch.equal(w, torch.tensor([1.0, 2.0]))


def test_gradients_by_name_need_a_backward_pass_and_controls_with_names():
    with pytest.raises(ArgumentError, match="call adjoint"):
        Trajectory(states=(0, 1), controls=({},)).gradient_by_name()
    with pytest.raises(ArgumentError, match="Tensor, not dicts"):
        Trajectory(states=(0, 1), controls=({},), gradients=(torch.ones(1),)).gradient_by_name()
