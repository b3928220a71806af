import pytest
import torch
from torch import nn

from bolza.controllers import NAMES, PolicyScheduler, make
from bolza.core.errors import ArgumentError
from bolza.data import digits
from bolza.training import train


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


@pytest.mark.parametrize("name", NAMES)
def test_every_named_controller_runs_interrupted_and_resumed_as_at_one_go(name, tmp_path):
    def stop(step, steps, values):
        if step == 21:
            raise KeyboardInterrupt

    def control(optimizer, steps):
        return make(name, optimizer, steps)

    options = {"lr": 0.1, "steps": 40, "controller": control}
    torch.manual_seed(0)
    whole, halves = nn.Linear(64, 10), nn.Linear(64, 10)
    halves.load_state_dict(whole.state_dict())
    train(whole, digits(), **options)
    train(halves, digits(), checkpoint=tmp_path / "a", progress=stop, **options)
    train(halves, digits(), checkpoint=tmp_path / "a", resume=True, **options)
    assert torch.equal(whole.weight, halves.weight)


@pytest.mark.parametrize(
    ("name", "last"), [("constant", 0.3), ("cosine", 0.0), ("linear", 0.0), ("onecycle", 0.3 / 250_000)]
)
def test_schedules_end_where_they_should_without_touching_momentum(name, last):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.3, momentum=0.9)
    controller = make(name, optimizer, 25)
    rates = []
    for _ in range(25):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        controller.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(last, abs=1e-9)
    assert max(rates) == pytest.approx(0.3, rel=0.02) and optimizer.param_groups[0]["momentum"] == 0.9


def test_an_unknown_controller_lists_the_known_ones():
    with pytest.raises(ArgumentError, match="'pid' is not known: choose one of constant"):
        make("pid", optimizer_of(1.0), 10)
    with pytest.raises(ArgumentError, match="steps=0"):
        make("cosine", optimizer_of(1.0), 0)
