"""What goes in is checked once, by name, and never changed."""

import copy
import math
import threading

import pytest
import torch
from torch import nn

from bolza.core.errors import ArgumentError, DataError, ShapeError, UnsupportedError, UserCodeError
from bolza.diagnosis.problem import prepare


def net(out=3):
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, out))


def batch(n=8, classes=3):
    return torch.randn(n, 4), torch.arange(n) % classes


def raising():
    raise RuntimeError("no such file")


def test_the_model_stays_as_it_is_with_its_gradients_buffers_mode_and_randomness():
    model = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Linear(5, 3)
    )
    model.eval()
    x, y = batch()
    nn.functional.cross_entropy(model(x), y).backward()
    state, gradients = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()]
    random = torch.get_rng_state()
    prepare(model, (x, y))
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert all(torch.equal(g, p.grad) for g, p in zip(gradients, model.parameters(), strict=True))
    assert not any(layer.training for layer in model.modules())


def test_the_batch_is_a_part_of_the_data_that_the_seed_fixes():
    x, y = batch(100)
    a, b, c = (prepare(net(), (x, y), samples=10, seed=s, test_fraction=0.0) for s in (1, 1, 2))
    assert torch.equal(a.x, b.x) and not torch.equal(a.x, c.x)
    assert len(a.x) == 10


def test_integer_targets_are_classes_and_real_ones_are_values():
    x = torch.randn(6, 4)
    assert prepare(net(), (x, torch.arange(6) % 3)).task == "classification"
    problem = prepare(net(1), (x, torch.randn(6, 1)), test_fraction=0.0)
    assert problem.task == "regression"
    expected = nn.functional.mse_loss(problem.model(problem.x), problem.y).item()
    assert problem.initial_loss == pytest.approx(expected)


def test_a_parameter_that_the_loss_does_not_reach_is_named():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(4, 3), nn.Linear(4, 3)
            self.used.bias.requires_grad_(False)

        def forward(self, x):
            return self.used(x)

    problem = prepare(Idle(), batch())
    assert problem.without_gradient == ("spare.weight", "spare.bias")
    assert problem.frozen == ("used.bias",)
    assert problem.parameter_names == ["used.weight"]


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_real_data_takes_the_precision_of_the_model(kind):
    """NumPy's numbers are float64, and no one who names a loader on the command line can convert them there."""
    problem = prepare(net().to(kind), (torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 3))
    assert problem.x.dtype == kind and problem.y.dtype == torch.int64


class Locked(nn.Linear):
    def __init__(self):
        super().__init__(4, 3)
        self.lock = threading.Lock()


NAN = torch.full((8, 4), math.nan)


@pytest.mark.parametrize(
    ("model", "data", "loss", "error", "words"),
    [
        (raising, batch(), None, UserCodeError, "raising raised RuntimeError: no such file"),
        (lambda: 3, batch(), None, UserCodeError, "returned a int"),
        (3, batch(), None, ArgumentError, "model is a int"),
        (nn.Tanh(), batch(), None, ArgumentError, "no parameters"),
        (net(), batch(1), None, DataError, "1 sample"),
        (net(), (torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)), None, DataError, "0 samples"),
        (net(), [], None, DataError, "empty"),
        (net(), (NAN, torch.arange(8) % 3), None, DataError, "not finite"),
        (net(), batch(classes=5), None, DataError, "label 4"),
        (net(), (torch.randn(8, 4), torch.full((8,), -1)), None, DataError, "-1"),
        (net(), (torch.randn(8, 9), torch.arange(8) % 3), None, UserCodeError, "shape (8, 9)"),
        (net(1), (torch.randn(8, 4), torch.randn(8)), None, DataError, "unsqueeze"),
        (
            net(),
            batch(),
            lambda o, y: nn.functional.cross_entropy(o, y, reduction="none"),
            ShapeError,
            "scalar",
        ),
        (net(), batch(), lambda o, y: 1.0, ShapeError, "a float"),
        (net(), batch(), lambda o, y: o.nope, UserCodeError, "loss raised AttributeError"),
        (net(), batch(), lambda o, y: o.detach().sum(), ArgumentError, "no parameter"),
        (net(), batch(), lambda o, y: o.sum() * math.inf, DataError, "untrained network is"),
        (net().half(), batch(), None, UnsupportedError, "float16 on a CPU"),
        (Locked(), batch(), None, UnsupportedError, "cannot be copied (cannot pickle '_thread.lock' object)"),
        (
            net(),
            batch(),
            lambda o, y: torch.ones((), requires_grad=True),
            ArgumentError,
            "not even on '0.weight'",
        ),
        (net(), batch(), lambda o, y: o.sum() + 1j, ShapeError, "a complex64 tensor"),
        (net().to("meta"), batch(), None, UnsupportedError, "meta device"),
        (net(), (torch.ones(8, 4).int(), torch.arange(8) % 3), None, UserCodeError, "x.float()"),
        (net().requires_grad_(False), batch(), None, ArgumentError, "requires_grad"),
    ],
)
def test_bad_input_is_named_with_its_remedy(model, data, loss, error, words):
    with pytest.raises(error) as caught:
        prepare(model, data, loss, test_fraction=0.0)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
