import pytest
import torch
from torch import nn

from bolza.core.errors import ArgumentError, UserCodeError
from bolza.training import make_optimizer, optimizer_names

MODEL = nn.Linear(3, 2)


@pytest.mark.parametrize("name", sorted(set(optimizer_names()) - {"sparseadam", "muon"}))
def test_every_optimizer_that_is_listed_can_be_made(name):
    assert type(make_optimizer(name, nn.Linear(3, 2))).__name__.lower() == name


def test_frozen_parameters_are_left_out():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    assert make_optimizer("sgd", model).param_groups[0]["params"] == [model.weight]


def test_an_optimizer_that_asks_for_the_module_is_given_it():
    class OfModules(torch.optim.SGD):
        def __init__(self, model, lr=0.1):
            self.module = model
            super().__init__(model.parameters(), lr=lr)

    assert make_optimizer(OfModules, MODEL, lr=0.2).module is MODEL


def test_an_instance_is_used_as_it_is():
    optimizer = torch.optim.SGD(MODEL.parameters(), lr=0.3)
    assert make_optimizer(optimizer, MODEL, lr=None) is optimizer
    with pytest.raises(ArgumentError, match="lr and an optimizer instance were both given"):
        make_optimizer(optimizer, MODEL, lr=0.1)


@pytest.mark.parametrize(
    ("spec", "options", "error", "message"),
    [
        ("sdg", {}, ArgumentError, "optimizer='sdg' is not known: choose one of .*sgd"),
        ("adam", {"momentum": 0.9}, ArgumentError, "Adam takes no momentum"),
        ("sgd", {"lr": -1.0}, ArgumentError, "SGD does not accept its options: .*-1.0"),
        (3, {}, ArgumentError, "optimizer=3 is not a name"),
        (lambda p: 3, {}, ArgumentError, "made a int"),
        (lambda p: 1 / 0, {}, UserCodeError, "raised ZeroDivisionError"),
    ],
)
def test_an_impossible_optimizer_is_refused(spec, options, error, message):
    with pytest.raises(error, match=message):
        make_optimizer(spec, MODEL, **options)
