import torch
from torch import nn

from bolza.training import first_nonfinite_gradient, first_nonfinite_layer, first_nonfinite_state


class Log(nn.Module):
    def forward(self, x):
        return x.log()


def network():
    return nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(nn.ReLU(), Log()), nn.Linear(3, 2))


def test_the_innermost_layer_is_named_not_its_container_or_its_victims():
    assert first_nonfinite_layer(network(), torch.randn(8, 3)) == "1.1"


def test_looking_for_the_layer_leaves_no_trace():
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first_nonfinite_layer(model, torch.randn(8, 3))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_a_sound_network_has_nothing_to_name():
    model = nn.Linear(3, 2)
    model(torch.randn(4, 3)).sum().backward()
    assert first_nonfinite_layer(model, torch.randn(4, 3)) is None
    assert first_nonfinite_gradient(model) is first_nonfinite_state(model) is None


def test_buffers_count_only_where_they_are_asked_for():
    model = nn.BatchNorm1d(3)
    model.running_var[1] = float("nan")
    assert (
        first_nonfinite_state(model) == "running_var" and first_nonfinite_state(model, buffers=False) is None
    )
