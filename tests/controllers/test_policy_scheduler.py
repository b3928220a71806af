import copy
import pickle

import pytest
import torch
from torch import nn

from bolza.controllers import CMSGD, CSGD, HyperGradient, PolicyScheduler
from bolza.core.errors import ArgumentError


class Recorder:
    """Halves lr, sets momentum, and remembers what it saw."""

    observes = ("parameter_square_norm", "gradient_square_norm")

    def init(self):
        return {"seen": 0}

    def update(self, state, observation):
        self.last = dict(observation)
        return {"seen": state["seen"] + 1}, {"lr": observation["lr"] / 2, "momentum": 0.5}


def optimizer_of(*rates):
    parameters = [nn.Parameter(torch.full((2,), 3.0)) for _ in rates]
    return torch.optim.SGD([{"params": [p], "lr": r} for p, r in zip(parameters, rates, strict=True)], lr=1.0)


def test_an_action_reaches_every_group_and_learning_rates_keep_their_ratio():
    optimizer = optimizer_of(1.0, 0.1)
    assert PolicyScheduler(optimizer, Recorder()).step() == {"lr": 0.5, "momentum": 0.5}
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.05]
    assert [g["momentum"] for g in optimizer.param_groups] == [0.5, 0.5]


def test_a_learning_rate_held_in_a_tensor_is_changed_in_place():
    rate = torch.tensor(1.0)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=rate)
    PolicyScheduler(optimizer, Recorder()).step()
    assert optimizer.param_groups[0]["lr"] is rate and rate.item() == 0.5


def test_a_policy_sees_the_loop_the_group_and_its_measurements():
    optimizer, policy = optimizer_of(1.0), Recorder()
    optimizer.param_groups[0]["params"][0].grad = torch.tensor([1.0, 2.0])
    PolicyScheduler(optimizer, policy).step(loss=0.25)
    seen = policy.last
    assert (seen["loss"], seen["lr"], seen["weight_decay"]) == (0.25, 1.0, 0)
    assert seen["parameter_square_norm"] == pytest.approx(18) and seen[
        "gradient_square_norm"
    ] == pytest.approx(5)


def test_state_goes_through_a_state_dict():
    scheduler = PolicyScheduler(optimizer_of(1.0), Recorder())
    scheduler.step()
    other = PolicyScheduler(optimizer_of(1.0), Recorder())
    other.load_state_dict(scheduler.state_dict())
    assert other.state == {"seen": 1}


def test_a_policy_that_cannot_be_worn_is_refused():
    with pytest.raises(ArgumentError, match="no init"):
        PolicyScheduler(optimizer_of(1.0), object())
    policy = Recorder()
    policy.observes = ("temperature",)
    with pytest.raises(ArgumentError, match="'temperature', which is not measured"):
        PolicyScheduler(optimizer_of(1.0), policy)
    adam = torch.optim.Adam([nn.Parameter(torch.ones(2))])
    with pytest.raises(ArgumentError, match="sets 'momentum', which Adam does not have"):
        PolicyScheduler(adam, Recorder()).step()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize(
    "make",
    [CSGD, CMSGD, lambda o: CSGD(o, granularity="layer", every=2), lambda o: HyperGradient(o, window=3)],
)
def test_a_copy_of_optimizer_and_controller_goes_on_like_the_original(make, copied):
    theta = torch.full((4,), 3.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=0.3)
    pair = optimizer, make(optimizer)

    def run(pair):
        draw = torch.Generator().manual_seed(0)
        (p,) = pair[0].param_groups[0]["params"]
        for _ in range(12):
            p.grad = p.detach() + torch.randn(4, generator=draw, dtype=torch.float64)
            pair[0].step()
            pair[1].step(loss=1.0)
        return p.detach()

    run(pair)
    twin = copied(pair)
    assert torch.equal(run(twin), run(pair)) and twin[1].count == 24


def test_a_policy_follows_the_first_group_that_moves():
    class Halve:
        def init(self):
            return {}

        def update(self, state, observation):
            return state, {"lr": observation["lr"] / 2}

    still, one, two = (torch.ones(1, requires_grad=True) for _ in range(3))
    groups = [{"params": [still], "lr": 0.0}, {"params": [one], "lr": 0.4}, {"params": [two], "lr": 0.1}]
    optimizer = torch.optim.SGD(groups)
    scheduler = PolicyScheduler(optimizer, Halve())
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.2, 0.05]
