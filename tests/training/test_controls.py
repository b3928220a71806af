"""What a run notes of its hyper-parameters, and runs whose batches change size."""

import math

import pytest
import torch
from torch import nn

from bolza.controllers import Controller, PolicyScheduler, StationarityAnnealing
from bolza.core.errors import ArgumentError, CheckpointError, UserCodeError
from bolza.data import digits
from bolza.training import BatchOrder, Run, load_tree, save_tree, train
from bolza.training.controls import ControlRecord, hyper_parameters

DATA = digits()
COSINE = torch.optim.lr_scheduler.CosineAnnealingLR


def net():
    torch.manual_seed(0)
    return nn.Linear(64, 10)


class Grow(Controller):
    """Doubles the batch every few steps."""

    def __init__(self, optimizer, every=5):
        super().__init__(optimizer)
        self.every = every

    def decide(self, observation):
        grow = (self.count + 1) % self.every == 0
        return {"batch_size": 2 * self.batches.batch_size} if grow else {}

    def log(self):
        return {"doublings": float(self.count // self.every)}


def test_the_rate_of_each_step_is_noted_as_it_was_in_that_step():
    run = train(net(), DATA, lr=0.1, momentum=0.9, steps=40, controller=lambda o, n: COSINE(o, n))
    expected = [0.05 * (1 + math.cos(math.pi * k / 40)) for k in range(40)]
    assert run.control_steps == list(range(1, 41))
    assert run.controls["lr"] == pytest.approx(expected, abs=1e-12)
    assert run.controls["momentum"] == [0.9] * 40 and run.controls["batch_size"] == [64.0] * 40
    assert run.samples == 40 * 64 and run.to_dict()["controls"]["lr"] == run.controls["lr"]


def test_the_settings_of_adam_and_of_each_group_are_told():
    weights = [torch.ones(1, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.Adam([{"params": [weights[0]]}, {"params": [weights[1]], "lr": 0.5}], lr=0.1)
    assert hyper_parameters(optimizer) == {"lr": 0.1, "lr_1": 0.5, "momentum": 0.9, "weight_decay": 0.0}


def test_a_long_run_notes_a_thousand_points_at_most_and_the_same_after_a_resume():
    optimizer, order = (
        torch.optim.SGD(net().parameters(), lr=1.0),
        BatchOrder(DATA.train_x, DATA.train_y, 8, 0),
    )

    def note(steps, run, record):
        for step in steps:
            optimizer.param_groups[0]["lr"] = 1 / step
            record.before(step)
            record.after(step, run)
        return run

    whole = note(range(1, 2300), Run(), ControlRecord(optimizer, order, None))
    half = note(range(1, 1100), Run(), ControlRecord(optimizer, order, None))
    rest = ControlRecord(optimizer, order, None)
    rest.resume(half)
    note(range(1100, 2300), half, rest)
    assert len(whole.control_steps) == 574 and whole.control_steps[:2] == [4, 8]
    assert whole.controls["lr"] == [1 / step for step in whole.control_steps]
    assert half == whole


def test_a_controller_sets_the_size_of_the_batches_and_what_it_logs_is_noted():
    run = train(net(), DATA, lr=0.1, batch_size=16, steps=12, controller=lambda o, n: Grow(o))
    assert run.controls["batch_size"] == [16] * 5 + [32] * 5 + [64] * 2
    assert run.controls["doublings"] == [0] * 4 + [1] * 5 + [2] * 3
    assert run.samples == 5 * 16 + 5 * 32 + 2 * 64 and run.batch_size == 16 and run.total_steps == 12


def test_a_length_in_epochs_is_a_number_of_samples_whatever_the_batches():
    plain = train(net(), DATA, lr=0.1, batch_size=16, epochs=2)
    grown = train(net(), DATA, lr=0.1, batch_size=16, epochs=2, controller=lambda o, n: Grow(o, every=40))
    last = grown.controls["batch_size"][-1]
    assert grown.step == grown.total_steps < plain.step and grown.status == "finished"
    assert plain.samples <= grown.samples < plain.samples + last
    assert grown.steps[-1] == grown.step


@pytest.mark.parametrize("length", [{"steps": 40}, {"epochs": 3}])
def test_a_run_whose_batches_grow_goes_on_bit_for_bit(tmp_path, length):
    options = {"lr": 0.1, "batch_size": 8, "controller": lambda o, n: Grow(o, every=9), "eval_every": 10}

    def stop(now, steps, values):
        if now == 23:
            raise KeyboardInterrupt

    whole, halves = net(), net()
    expected = train(whole, DATA, **length, **options)
    train(halves, DATA, checkpoint=tmp_path / "a", progress=stop, **length, **options)
    second = train(halves, DATA, checkpoint=tmp_path / "a", resume=True, **length, **options)
    assert torch.equal(whole.weight, halves.weight)
    assert {**expected.to_dict(), "seconds": 0} == {**second.to_dict(), "seconds": 0}


def test_a_checkpoint_from_before_batches_could_change_size_is_read(tmp_path):
    options = {"lr": 0.1, "batch_size": 100, "eval_every": 5}
    whole, halves = net(), net()
    expected = train(whole, DATA, steps=30, **options)
    train(halves, DATA, steps=20, checkpoint=tmp_path / "a", **options)
    state = load_tree(tmp_path / "a")
    for name in ("samples", "controls", "control_steps"):
        del state["run"][name]
    state["order"]["position"] //= 100
    del state["order"]["batch_size"], state["order"]["drawn"]
    save_tree(state, tmp_path / "a")
    again = train(halves, DATA, steps=30, checkpoint=tmp_path / "a", resume=True, **options)
    assert torch.equal(whole.weight, halves.weight)
    assert again.samples == expected.samples and again.control_steps == list(range(21, 31))


def test_a_checkpoint_that_lacks_something_is_refused_and_says_what(tmp_path):
    train(net(), DATA, lr=0.1, steps=2, checkpoint=tmp_path / "a")
    state = load_tree(tmp_path / "a")
    del state["sums"]
    save_tree(state, tmp_path / "a")
    with pytest.raises(CheckpointError, match="lacks 'sums'"):
        train(net(), DATA, lr=0.1, steps=3, checkpoint=tmp_path / "a", resume=True)


def test_a_checkpoint_of_another_policy_is_refused(tmp_path):
    class Other(StationarityAnnealing):
        pass

    def wearing(policy):
        return lambda optimizer, steps: PolicyScheduler(optimizer, policy())

    train(net(), DATA, lr=0.1, steps=2, controller=wearing(Other), checkpoint=tmp_path / "a")
    with pytest.raises(
        CheckpointError, match="controller was PolicyScheduler of Other, now it is PolicyScheduler of S"
    ):
        train(
            net(), DATA, lr=0.1, steps=3, checkpoint=tmp_path / "a", resume=True,
            controller=wearing(StationarityAnnealing),
        )  # fmt: skip


def test_batches_of_changing_size_go_through_each_permutation_in_turn():
    order = BatchOrder(torch.arange(10), torch.arange(10), 4, seed=0)
    seen = []
    for size in (4, 2, 3):  # one sample is left over, as after whole batches
        order.batch_size = size
        seen += order.next()[0].tolist()
    assert len(set(seen)) == 9 and order.drawn == 9
    order.batch_size = 100
    assert order.batch_size == 10 and torch.equal(order.next()[0], order.x)
    with pytest.raises(ArgumentError, match="batch_size=0"):
        order.batch_size = 0


class Says(Controller):
    """Decides and logs what it was given."""

    def __init__(self, optimizer, action, log=0.0):
        super().__init__(optimizer)
        self.action, self.logged = action, log

    def decide(self, observation):
        return self.action

    def log(self):
        return {"value": self.logged}


@pytest.mark.parametrize(
    ("action", "told"),
    [
        ({"lr": math.nan}, "sets lr=nan, which must be finite"),
        ({"lr": -1.0}, "sets lr=-1.0, which must not be negative"),
        ({"lr": "fast"}, "sets lr='fast', which is no number"),
        ({"momentum": [math.inf]}, "sets momentum=inf"),
        ({"batch_size": None}, "sets batch_size=None"),
    ],
)
def test_a_value_that_no_run_survives_is_refused_by_name_before_it_is_written(action, told):
    with pytest.raises(ArgumentError, match=told):
        train(net(), DATA, lr=0.1, steps=2, controller=lambda o, n: Says(o, action))


def test_a_controller_that_fails_is_named_with_the_step_and_one_that_changes_nothing_may_return_nothing():
    class Forgetful(Controller):
        def __init__(self, optimizer):
            self.optimizer = optimizer

    with pytest.raises(UserCodeError, match="controller Forgetful raised AttributeError at step 1"):
        train(net(), DATA, steps=2, controller=lambda o, n: Forgetful(o))
    with pytest.raises(UserCodeError, match="controller Says raised TypeError at step 1.*must be numbers"):
        train(net(), DATA, steps=2, controller=lambda o, n: Says(o, {}, log=None))
    assert train(net(), DATA, steps=2, controller=lambda o, n: Says(o, None)).status == "finished"
