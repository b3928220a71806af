import math
import os
import signal

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bolza.core.errors import ArgumentError, CheckpointError, DataError, DivergenceError, UserCodeError
from bolza.data import Dataset, diabetes, digits, text
from bolza.models import make, mlp
from bolza.training import BatchOrder, train

DATA = digits()


def net(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 10)
    )


def same(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def interrupt_at(step):
    def progress(now, steps, values):
        if now == step:
            raise KeyboardInterrupt

    return progress


# ------------------------------------------------------------------------------------ what it computes


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"momentum": 0.9, "weight_decay": 0.1, "clip": 0.5}])
def test_training_equals_a_loop_written_by_hand(options):
    model, reference = mlp(3, 12).double(), mlp(3, 12).double()
    reference.load_state_dict(model.state_dict())
    train(model, DATA, lr=0.1, steps=30, batch_size=50, seed=3, **options)

    clip = options.pop("clip", None)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, foreach=False, **options)
    order = BatchOrder(DATA.train_x.double(), DATA.train_y, 50, seed=3)
    for _ in range(30):
        x, y = order.next()
        optimizer.zero_grad()
        F.cross_entropy(reference(x), y).backward()
        if clip:
            nn.utils.clip_grad_norm_(reference.parameters(), clip)
        optimizer.step()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_curves_hold_the_losses_that_were_seen():
    seen = []
    run = train(net(), DATA, lr=0.1, steps=20, eval_every=10, progress=lambda i, n, v: seen.append(v["loss"]))
    assert run.steps == [0, 10, 20] and run.gradients == 20
    assert run.train_loss[1] == pytest.approx(sum(seen[:10]) / 10)
    assert run.train_loss[2] == pytest.approx(sum(seen[10:]) / 10)


def test_the_last_record_is_the_accuracy_of_the_network_that_is_left():
    model = net()
    run = train(model, DATA, lr=0.1, momentum=0.9, epochs=5)
    model.eval()
    accuracy = (model(DATA.test_x).argmax(1) == DATA.test_y).double().mean().item()
    assert run.final_test_accuracy == accuracy > 0.9


def test_a_run_repeats_from_its_seed_and_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    a, b, c = net(dropout=0.5), net(dropout=0.5), net(dropout=0.5)
    torch.set_rng_state(before)
    train(a, DATA, lr=0.1, steps=15, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    train(b, DATA, lr=0.1, steps=15, seed=1)
    train(c, DATA, lr=0.1, steps=15, seed=2)
    assert same(a, b) and not same(a, c)


def test_regression_has_losses_and_no_accuracies():
    run = train(make("mlp", diabetes(), depth=2, width=16), diabetes(), lr=0.05, epochs=20)
    assert run.test_accuracy == run.train_accuracy == []
    assert run.final_test_loss < 0.75 < run.test_loss[0] and math.isnan(run.final_test_accuracy)


def test_a_language_model_learns_letters():
    data = text(length=32)
    run = train(make("gpt", data, depth=1, width=32), data, optimizer="adam", lr=3e-3, steps=60)
    assert run.final_test_loss < 2.9 < run.test_loss[0] and run.final_test_accuracy > 0.2


@pytest.mark.parametrize(
    "optimizer", ["adamw", "LBFGS", torch.optim.RMSprop, lambda p: torch.optim.SGD(p, lr=0.1)]
)
def test_any_optimizer_lowers_the_loss(optimizer):
    run = train(nn.Linear(64, 10), DATA, optimizer=optimizer, steps=15, batch_size=2000)
    assert run.status == "finished" and run.test_loss[-1] < run.test_loss[0]


def test_the_mode_of_the_network_is_given_back():
    model = net().eval()
    train(model, DATA, lr=0.1, steps=2)
    assert not model.training


def test_a_batch_size_beyond_the_data_is_the_whole_data():
    run = train(nn.Linear(64, 10), DATA, lr=0.1, steps=2, batch_size=10**6)
    assert run.batch_size == len(DATA)


# ------------------------------------------------------------------------------- interrupt and resume


CASES = {
    "momentum": {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9},
    "adam": {"optimizer": "adam", "lr": 0.01},
    "schedule": {
        "optimizer": "sgd",
        "lr": 0.1,
        "momentum": 0.9,
        "controller": lambda o, n: torch.optim.lr_scheduler.CosineAnnealingLR(o, n),
    },
    "warm-up": {
        "optimizer": "adamw",
        "lr": 0.01,
        "controller": lambda o, n: torch.optim.lr_scheduler.SequentialLR(
            o,
            [
                torch.optim.lr_scheduler.LinearLR(o, total_iters=10),
                torch.optim.lr_scheduler.CosineAnnealingLR(o, n),
            ],
            [10],
        ),
    },
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stop", [1, 31])
def test_an_interrupted_run_goes_on_bit_for_bit(case, stop, tmp_path):
    options = {**CASES[case], "steps": 50, "eval_every": 10, "seed": 5}
    whole, halves = net(dropout=0.3), net(dropout=0.3)
    expected = train(whole, DATA, **options)
    file = tmp_path / "run.safetensors"
    first = train(halves, DATA, checkpoint=file, progress=interrupt_at(stop), **options)
    assert first.status == "interrupted" and first.step == stop

    fresh = net(seed=9, dropout=0.3)  # other weights: everything must come from the file
    second = train(fresh, DATA, checkpoint=file, resume=True, **options)
    assert same(fresh, whole)
    a, b = expected.to_dict(), second.to_dict()
    assert {**a, "seconds": 0} == {**b, "seconds": 0}


def test_ctrl_c_lets_the_step_end_and_gives_the_handler_back(tmp_path):
    class Impatient(torch.optim.SGD):
        def step(self, closure=None):
            os.kill(os.getpid(), signal.SIGINT)
            super().step()

    model, one_step = net(), net()
    file = tmp_path / "run"
    run = train(model, DATA, optimizer=Impatient(model.parameters(), lr=0.1), steps=20, checkpoint=file)
    train(one_step, DATA, lr=0.1, steps=1)
    assert run.status == "interrupted" and run.step == 1 and "after 1 of 20 steps" in run.reason
    assert all(torch.allclose(a, b) for a, b in zip(model.parameters(), one_step.parameters(), strict=True))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert file.exists()


def test_a_finished_run_can_be_lengthened(tmp_path):
    long, short = net(), net()
    train(long, DATA, lr=0.1, steps=40)
    train(short, DATA, lr=0.1, steps=20, checkpoint=tmp_path / "a")
    run = train(short, DATA, lr=0.1, steps=40, checkpoint=tmp_path / "a", resume=True)
    assert same(long, short) and run.step == run.total_steps == 40


def test_a_checkpoint_is_not_overwritten_by_a_new_run(tmp_path):
    train(net(), DATA, lr=0.1, steps=1, checkpoint=tmp_path / "a")
    with pytest.raises(CheckpointError, match="exists: pass resume=True"):
        train(net(), DATA, lr=0.1, steps=1, checkpoint=tmp_path / "a")


def test_a_checkpoint_of_another_run_is_refused_with_the_difference(tmp_path):
    train(net(), DATA, lr=0.1, steps=1, checkpoint=tmp_path / "a")
    with pytest.raises(CheckpointError, match="belongs to another run: optimizer was SGD, now it is Adam"):
        train(net(), DATA, optimizer="adam", steps=2, checkpoint=tmp_path / "a", resume=True)
    with pytest.raises(CheckpointError, match="tensor 0.weight was"):
        train(mlp(2, 7), DATA, lr=0.1, steps=2, checkpoint=tmp_path / "a", resume=True)


def test_a_missing_or_impossible_checkpoint_is_noticed_before_the_run(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        train(net(), DATA, lr=0.1, steps=1, checkpoint=tmp_path / "a", resume=True)
    with pytest.raises(CheckpointError, match="cannot be written"):
        train(net(), DATA, lr=0.1, steps=1, checkpoint=tmp_path / "nowhere" / "a")
    with pytest.raises(ArgumentError, match="resume=True needs the file"):
        train(net(), DATA, lr=0.1, steps=1, resume=True)


# ----------------------------------------------------------------------------------------- divergence


class Explode(nn.Module):
    """Identity whose output, or gradient, becomes infinite at one call."""

    def __init__(self, at, backward=False):
        super().__init__()
        self.at, self.calls, self.backward = at, 0, backward

    def forward(self, x):
        self.calls += self.training and torch.is_grad_enabled()
        if self.calls <= self.at or not self.training:
            return x
        if self.backward:
            y = x.clone()
            y.register_hook(lambda g: g * math.inf)
            return y
        return x * math.inf


def test_a_loss_not_finite_stops_the_run_at_its_step_and_layer_with_the_last_good_state():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 10), Explode(at=7), nn.BatchNorm1d(10), nn.Linear(10, 10))
    run = train(model, DATA, lr=0.1, steps=20, eval_every=2)
    assert run.status == "diverged" and run.failed_step == 7 and run.failed_layer == "1"
    assert "at step 7 at '1'" in run.reason
    assert all(t.isfinite().all() for t in model.state_dict().values())
    with pytest.raises(DivergenceError) as info:
        run.raise_if_diverged()
    assert info.value.step == 7 and info.value.layer == "1"


def test_a_gradient_not_finite_is_caught_before_the_update():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 10), nn.Linear(10, 10), Explode(at=4, backward=True), nn.Linear(10, 10)
    )
    reference = nn.Sequential(nn.Linear(64, 10), nn.Linear(10, 10), nn.Linear(10, 10))
    reference.load_state_dict({k.replace("3.", "2."): v for k, v in model.state_dict().items()})
    run = train(model, DATA, lr=0.1, steps=20)
    train(reference, DATA, lr=0.1, steps=4)
    assert run.status == "diverged" and run.failed_step == 4 and run.failed_layer == "1.bias"
    values = zip(model.parameters(), reference.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in values)


def test_an_update_that_overflows_sets_the_network_back_to_its_last_record():
    model = nn.Linear(64, 10)
    run = train(model, DATA, lr=1e38, momentum=0.9, steps=20, eval_every=1)
    assert run.status == "diverged" and all(p.isfinite().all() for p in model.parameters())


def test_a_checkpoint_survives_divergence(tmp_path):
    model = nn.Sequential(nn.Linear(64, 10), Explode(at=7))
    train(model, DATA, lr=0.1, steps=20, eval_every=5, checkpoint=tmp_path / "a")
    again = nn.Sequential(nn.Linear(64, 10), Explode(at=100))
    run = train(again, DATA, lr=0.1, steps=20, eval_every=5, checkpoint=tmp_path / "a", resume=True)
    assert run.status == "finished" and run.steps == [0, 5, 10, 15, 20]


# ------------------------------------------------------------------------------------------ bad input


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(64, 10), nn.Linear(3, 3)

    def forward(self, x):
        return self.used(x)


def frozen():
    return nn.Linear(64, 10).requires_grad_(False)


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (
            net,
            {"loss": lambda o, y: F.cross_entropy(o, y, reduction="none")},
            ArgumentError,
            r"loss has shape \(64,\)",
        ),
        (net, {"loss": lambda o, y: 1.0}, (ArgumentError, UserCodeError), "loss"),
        (
            net,
            {"loss": lambda o, y: F.cross_entropy(o.detach(), y)},
            ArgumentError,
            "does not depend on any parameter",
        ),
        (Unused, {}, ArgumentError, r"'spare.weight' \(and 1 more\) receives no gradient"),
        (frozen, {}, ArgumentError, "no parameter that requires a gradient"),
        (lambda: net().half(), {}, ArgumentError, "'0.weight' is float16 on the CPU"),
        (lambda: nn.Linear(64, 9), {}, DataError, "train_y holds the label 9"),
        (
            lambda: nn.Linear(63, 10),
            {},
            UserCodeError,
            r"the model raised RuntimeError on float32 inputs of shape \(2, 64\): .*; give data",
        ),
        (net, {"steps": 3, "epochs": 1}, ArgumentError, "steps=3 and epochs=1"),
        (net, {"steps": 0}, ArgumentError, "steps=0"),
        (net, {"batch_size": 0}, ArgumentError, "batch_size=0"),
        (net, {"clip": -1.0}, ArgumentError, "clip=-1.0"),
        (net, {"controller": 3}, ArgumentError, "controller=3"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(model, options, error, message):
    with pytest.raises(error, match=message):
        train(model(), DATA, **{"lr": 0.1, **options})


def test_class_labels_given_as_floats_are_explained():
    y = DATA.train_y.float()
    data = Dataset(DATA.train_x, y, DATA.test_x, DATA.test_y.float(), "regression")
    with pytest.raises(DataError, match=r"convert them with y.long\(\)"):
        train(nn.Linear(64, 10), data, loss=F.cross_entropy, lr=0.1, steps=1)
