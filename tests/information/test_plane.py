"""The information plane of networks."""

from functools import partial

import pytest
import torch
from torch import nn

from bolza.core.errors import ArgumentError
from bolza.data import Dataset
from bolza.information import (
    InformationPlane,
    binned_information,
    layer_information,
    layer_states,
    pairwise_information,
)
from bolza.training import train

BITS = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 8)
LABEL = (BITS[:, 0] * BITS[:, 1] > 0).long()
BINS = partial(binned_information, width=1 / 15)


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)
    )


def test_states_are_those_of_a_forward_pass_in_evaluation_mode_and_the_model_is_left_alone():
    model = net().train()
    found = layer_states(model, BITS, chunk=100)
    assert list(found) == ["1", "4", "5"]
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks for m in model.modules())
    model.eval()
    torch.testing.assert_close(found["5"], model(BITS).detach())
    torch.testing.assert_close(found["1"], model[:2](BITS).detach())


def test_no_layer_holds_more_than_the_input_and_binned_information_does_not_grow_with_depth():
    found = layer_information(net(), BITS, LABEL, BINS)
    values = [e.input for e in found.values()]
    assert max(values) <= 8 + 1e-9
    assert all(e.output <= 1 + 1e-9 for e in found.values())


def test_layers_can_be_named_and_a_wrong_name_is_refused():
    assert list(layer_states(net(), BITS, ["3", "0"])) == ["0", "3"]
    with pytest.raises(ArgumentError, match="'7'"):
        layer_states(net(), BITS, ["7"])


def test_convolutions_recurrent_layers_and_attention_have_states():
    conv = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 36, 3))
    found = layer_states(conv, torch.randn(5, 1, 8, 8))
    assert {name: tuple(t.shape) for name, t in found.items()} == {"1": (5, 72), "3": (5, 3)}
    recurrent = nn.GRU(4, 3, batch_first=True)
    assert layer_states(recurrent, torch.randn(5, 6, 4))[""].shape == (5, 18)
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    found = layer_states(block, torch.randn(5, 3, 8), ["linear1", "norm2"])
    assert found["norm2"].shape == (5, 24)


def test_the_plane_is_read_along_a_run_at_the_steps_that_were_asked_for():
    model = net()
    plane = InformationPlane(model, BITS, LABEL, BINS, at=[0, 10, 30])
    plane.note(0)
    data = Dataset(BITS, LABEL, BITS[:0], LABEL[:0])
    run = train(model, data, lr=0.2, momentum=0.9, steps=30, progress=plane)
    assert run.status == "finished"
    assert plane.steps == [0, 10, 30] and plane.layers == ["1", "4", "5"]
    about_x, about_y = plane.curve("5")
    assert about_x.shape == (3,) and float(about_y[-1]) > float(about_y[0])
    with pytest.raises(ArgumentError, match="choose one of 1, 4, 5"):
        plane.curve("2")


def test_saturating_units_lose_information_to_bins_but_not_to_little_noise():
    # the point of the criticism: the same states, two estimators, two stories
    t = torch.linspace(-3, 3, 256).reshape(-1, 1)
    soft, hard = torch.tanh(t), torch.tanh(20 * t)
    assert binned_information(hard, width=1 / 15).input < binned_information(soft, width=1 / 15).input - 1
    assert pairwise_information(soft, noise_var=1e-12).input_lower > 7.99
