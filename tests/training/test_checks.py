"""What a run refuses, and what it keeps when something outside it fails."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bolza.core.errors import ArgumentError, CheckpointError, UserCodeError
from bolza.data import Dataset
from bolza.training import loop, train
from bolza.training.checkpoint import load_tree, save_tree

X, Y = torch.randn(24, 4, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3
DATA = Dataset(X, Y, X[:6], Y[:6])


def net():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


class Absolute(nn.Module):
    """A network with complex weights and real outputs."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 1, dtype=torch.complex64))

    def forward(self, x):
        return (x.to(torch.complex64) @ self.weight).abs()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": math.nan}, "lr=nan must be a finite number"),
        ({"lr": math.inf}, "lr=inf must be a finite number"),
        ({"momentum": math.nan}, "momentum=nan must be a finite number"),
        ({"steps": None, "epochs": 0}, "epochs=0 must be positive and finite"),
        ({"steps": None, "epochs": math.nan}, "epochs=nan must be positive and finite"),
        ({"steps": None, "epochs": math.inf}, "epochs=inf must be positive and finite"),
        ({"loss": lambda o, y: None}, "the loss has type NoneType"),
        ({"loss": lambda o, y: torch.tensor(1)}, "the loss has dtype torch.int64"),
        (
            {"loss": lambda o, y: F.cross_entropy(o, y).to(torch.complex64)},
            "the loss has dtype torch.complex64",
        ),
    ],
)
def test_settings_and_losses_that_cannot_work_are_named(options, message):
    with pytest.raises(ArgumentError, match=message):
        train(net(), DATA, **{"lr": 0.1, "steps": 2, **options})


@pytest.mark.parametrize(
    ("model", "data", "options", "message"),
    [
        (net, (X, Y), {}, r"data is a tuple: give bolza.data.load\(...\)"),
        (lambda: len, DATA, {}, "model is a builtin_function_or_method"),
        (net, DATA, {"batch_size": 2.5}, "batch_size=2.5 is a float: give a whole number"),
        (net, DATA, {"steps": "3"}, "steps='3' is a str"),
        (net, DATA, {"seed": 2**70}, "seed=1180591620717411303424 has more than 64 bits"),
        (net, DATA, {"device": "abacus"}, "device='abacus' cannot be used here"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(model, data, options, message):
    with pytest.raises(ArgumentError, match=message):
        train(model(), data, **{"lr": 0.1, "steps": 2, **options})


def test_a_controller_without_a_state_cannot_be_in_a_checkpoint(tmp_path):
    class Constant:
        def step(self, loss):
            """Do nothing."""

    assert train(net(), DATA, lr=0.1, steps=2, controller=Constant()).status == "finished"
    with pytest.raises(CheckpointError, match="Constant has no state_dict"):
        train(net(), DATA, lr=0.1, steps=2, controller=Constant(), checkpoint=tmp_path / "a")


def test_a_part_of_an_epoch_is_at_least_one_step():
    assert train(net(), DATA, lr=0.1, epochs=1e-9).step == 1


def test_a_model_without_values_is_refused():
    with torch.device("meta"):
        model = net()
    with pytest.raises(ArgumentError, match="'weight' is on the meta device"):
        train(model, DATA, lr=0.1, steps=1)


def test_whole_number_inputs_are_named_with_the_conversion():
    data = Dataset((X * 10).long(), Y, X[:0].long(), Y[:0])
    with pytest.raises(
        UserCodeError, match=r"on int64 inputs of shape \(2, 4\).*convert the inputs.*x.float\(\)"
    ):
        train(net(), data, lr=0.1, steps=1)


def test_complex_parameters_leave_real_data_real():
    data = Dataset(X, X[:, :1].abs(), X[:0], X[:0, :1], task="regression")
    assert train(Absolute(), data, lr=0.01, steps=3).status == "finished"


def test_gradients_switched_off_outside_are_switched_on_for_the_run():
    with torch.no_grad():
        assert train(net(), DATA, lr=0.1, steps=2).status == "finished"


def test_a_model_that_raises_late_is_named_with_its_step():
    class Late(nn.Linear):
        def forward(self, x):
            if loop_steps[0] > 3:
                raise IndexError("token 99 is\nout of range")
            return super().forward(x)

    loop_steps = [0]

    def count(step, steps, values):
        loop_steps[0] = step

    with pytest.raises(
        UserCodeError, match="the model raised IndexError at step 4 .*: token 99 is; "
    ) as caught:
        train(Late(4, 3), DATA, lr=0.1, steps=8, eval_every=8, progress=count)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"lr": 0.5}, "lr of the optimizer was 0.1, now it is 0.5"),
        ({"momentum": 0.9}, "momentum of the optimizer was 0, now it is 0.9"),
        ({"clip": 1.0}, "clip was None, now it is 1.0"),
        ({"loss": nn.MultiMarginLoss()}, "loss was cross_entropy, now it is MultiMarginLoss"),
    ],
)
def test_a_setting_that_a_resumed_run_would_ignore_is_refused(options, difference, tmp_path):
    """The optimizer's state holds the rate, so a new one would have no effect."""
    train(net(), DATA, lr=0.1, steps=2, checkpoint=tmp_path / "a")
    with pytest.raises(CheckpointError, match=f"{difference}; give the same settings"):
        train(net(), DATA, **{"lr": 0.1, **options}, steps=4, checkpoint=tmp_path / "a", resume=True)


def full_from(step):
    """A disk with room for the checkpoints before that step."""

    def save(state, path):
        if state["run"]["step"] >= step:
            raise CheckpointError("the checkpoint cannot be written: No space left on device")
        save_tree(state, path)

    return save


def test_a_disk_that_fills_up_does_not_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "save_tree", full_from(step=2))
    with pytest.warns(RuntimeWarning, match="No space left on device; the run goes on"):
        run = train(net(), DATA, lr=0.1, steps=3, checkpoint=tmp_path / "a", eval_every=1)
    assert run.status == "finished" and run.steps == [0, 1, 2, 3] and "No space left" in run.unsaved
    assert load_tree(tmp_path / "a")["run"]["step"] == 1  # the last that had room


def test_a_disk_that_is_full_already_is_noticed_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "save_tree", full_from(step=0))
    with pytest.raises(CheckpointError, match="No space left"):
        train(net(), DATA, lr=0.1, steps=3, checkpoint=tmp_path / "a")


@pytest.mark.parametrize(
    ("name", "value"),
    [("optimizer", None), ("order", torch.zeros(2)), ("run", {}), ("model", 3), ("fingerprint", [])],
)
def test_a_forged_checkpoint_is_called_unusable(name, value, tmp_path):
    train(net(), DATA, lr=0.1, steps=1, checkpoint=tmp_path / "a")
    save_tree({**load_tree(tmp_path / "a"), name: value}, tmp_path / "a")
    with pytest.raises(CheckpointError, match="cannot be used"):
        train(net(), DATA, lr=0.1, steps=2, checkpoint=tmp_path / "a", resume=True)


def test_curves_of_the_wrong_type_are_called_unusable(tmp_path):
    train(net(), DATA, lr=0.1, steps=1, checkpoint=tmp_path / "a")
    state = load_tree(tmp_path / "a")
    state["run"]["train_loss"] = "low"
    save_tree(state, tmp_path / "a")
    with pytest.raises(CheckpointError, match="cannot be used: its train_loss is a str"):
        train(net(), DATA, lr=0.1, steps=2, checkpoint=tmp_path / "a", resume=True)


def test_resuming_clears_what_a_killed_writer_left(tmp_path):
    train(net(), DATA, lr=0.1, steps=1, checkpoint=tmp_path / "a")
    (tmp_path / ".a.x1.part").write_bytes(b"half a checkpoint")
    train(net(), DATA, lr=0.1, steps=2, checkpoint=tmp_path / "a", resume=True)
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
