"""The base of the controllers: what an action writes, and what it refuses."""

import pytest
import torch

from bolza.controllers.controller import Controller
from bolza.core.errors import ArgumentError


class Says(Controller):
    """Does what it is told."""

    def decide(self, observation):
        return observation["action"]


def worn(**options):
    weights = [torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)]
    groups = [{"params": [weights[0]], "lr": 0.1}, {"params": [weights[1]], "lr": 0.2}]
    optimizer = torch.optim.SGD(groups, momentum=0.5)
    for w in weights:
        w.grad = torch.ones_like(w)
    return Says(optimizer, **options), optimizer, weights


def test_a_number_keeps_the_ratios_of_rates_only_and_a_list_is_one_a_group():
    controller, optimizer, _ = worn()
    controller.step(action={"lr": 0.3, "momentum": 0.9})
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.3, 0.6])
    assert [g["momentum"] for g in optimizer.param_groups] == [0.9, 0.9]
    controller.step(action={"lr": [0.5, 0.1]})
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.1]
    for action, words in (
        ({"betas": 0.9}, "'betas'"),
        ({"lr": [1.0]}, "1 values"),
        ({"batch_size": 4}, "attach"),
    ):
        with pytest.raises(ArgumentError, match=words):
            controller.step(action=action)


def test_an_update_is_scaled_alike_by_a_number_numbers_and_tensors():
    found = []
    for u in (0.25, [0.25, 0.25], [torch.full((2,), 0.25), torch.full((3,), 0.25)]):
        controller, optimizer, weights = worn(keep_update=True)
        optimizer.step()
        controller.scale_update_(weights, u)
        found.append([w.detach().clone() for w in weights])
    for one in found:
        torch.testing.assert_close(one, [torch.full((2,), 1 - 0.025), torch.full((3,), 1 - 0.05)])
