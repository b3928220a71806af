"""Stages inside blocks: which layers act at the same time."""

import importlib.util
import pathlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bolza.core import rollout
from bolza.core.errors import ArgumentError
from bolza.models import InceptionBlock, ResidualBlock, inception
from bolza.systems import Recorder, as_system
from bolza.systems.aligned import aligned_system, alignments

_spec = importlib.util.spec_from_file_location("networks", pathlib.Path(__file__).with_name("networks.py"))
networks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(networks)

IMAGE = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
CASES = {
    "residual": (networks.ResNet, IMAGE),
    "inception": (lambda: inception(width=2), IMAGE),
    "dense": (networks.DenseNet, IMAGE),
    "attention": (lambda: networks.PreNormBlock(8, 2), torch.randn(3, 5, 8)),
}


class Shortcut(nn.Module):
    """Two layers beside a linear skip."""

    def __init__(self, drop=0.0):
        super().__init__()
        self.one, self.two, self.skip = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(3, 5)
        self.drop = drop

    def forward(self, x):
        h = torch.tanh(self.one(x))
        if self.drop:
            h = F.dropout(h, self.drop, self.training)
        return torch.tanh(self.two(h) + self.skip(x))


def layers_of(system):
    """Layers with matrices, by stage."""
    return [
        [p for p in paths if hasattr(system.module.get_submodule(p), "weight")]
        for paths in system.stage_modules
    ]


@pytest.mark.parametrize("name", CASES)
def test_in_every_alignment_the_stages_compose_to_the_network_and_costates_are_gradients(name):
    make, x = CASES[name]
    torch.manual_seed(0)
    net = make()
    for alignment, system in alignments(net, x).items():
        assert torch.allclose(rollout(system, x).states[-1], net(x), atol=1e-5), alignment
        with Recorder(system) as recorder:
            net.zero_grad()
            out = net(x)
            direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
            out.backward(direction)
            run = recorder.trajectory
        for t in range(1, system.horizon):
            leaves = run.states[t] if isinstance(run.states[t], tuple) else (run.states[t],)
            known = run.costates[t] if isinstance(run.costates[t], tuple) else (run.costates[t],)
            state = tuple(leaf.clone().requires_grad_() for leaf in leaves)
            y = state if len(state) > 1 else state[0]
            for s in range(t, system.horizon):
                y = system.step(s, y, {})
            for a, b in zip(torch.autograd.grad(y, state, direction), known, strict=True):
                if b is not None:  # the input itself, carried along, asks for no gradient
                    assert torch.allclose(a, b, rtol=1e-4, atol=1e-4), (alignment, t)


def test_a_skip_acts_with_the_first_or_with_the_last_layer_of_its_block():
    net, x = Shortcut(), torch.randn(2, 3)
    acting = {name: layers_of(system) for name, system in alignments(net, x).items()}
    assert [sorted(stage) for stage in acting["whole"]] == [["one", "skip", "two"]]
    assert [sorted(stage) for stage in acting["early"]] == [["one", "skip"], ["two"]]
    assert [sorted(stage) for stage in acting["late"]] == [["one"], ["skip", "two"]]


def test_the_state_inside_a_block_holds_what_is_still_needed():
    net, x = Shortcut(), torch.randn(2, 3)
    late, early = (rollout(aligned_system(net, x, a), x).states[1] for a in ("late", "early"))
    assert {tuple(leaf.shape) for leaf in late} == {(2, 4), (2, 3)}  # the path, and the input for the skip
    assert {tuple(leaf.shape) for leaf in early} == {(2, 4), (2, 5)}  # the path, and what the skip gave


def test_branches_of_an_inception_block_act_in_as_many_stages_as_the_longest_has_layers():
    net, x = InceptionBlock(4, 2), torch.randn(2, 4, 8, 8)

    def convolutions(alignment):
        stages = aligned_system(net, x, alignment).stage_modules
        return [sum(isinstance(net.get_submodule(p), nn.Conv2d) for p in paths) for paths in stages]

    assert convolutions("early") == [4, 2, 1]
    assert convolutions("late") == [1, 2, 4]


def test_a_chain_has_one_alignment_the_stages_of_as_system():
    net, x = networks.mlp(), torch.randn(2, 5)
    (system,) = alignments(net, x).values()
    assert system.stage_modules == as_system(net, x).stage_modules
    assert aligned_system(net, x, "late").stage_modules == system.stage_modules


def test_blocks_that_draw_random_numbers_or_use_a_weight_twice_stay_whole():
    net, x = Shortcut(drop=0.5), torch.randn(2, 3)
    assert list(alignments(net, x)) == ["whole"]

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(3, 3)

        def forward(self, x):
            return x + self.one(torch.tanh(self.one(x)))

    assert list(alignments(Twice(), x)) == ["whole"]


def test_it_follows_the_mode_of_the_network_and_other_examples():
    net = ResidualBlock(2, 3)
    x = torch.randn(4, 2, 6, 6)
    system = aligned_system(net, x, "early")
    other = torch.randn(7, 2, 4, 4)
    net.eval()
    assert torch.allclose(rollout(system, other).states[-1], net(other), atol=1e-6)
    assert system.read_again((other,)).alignment == "early"


def test_running_statistics_move_once_in_a_recorded_pass():
    torch.manual_seed(0)
    net, twin = ResidualBlock(2, 3), ResidualBlock(2, 3)
    twin.load_state_dict(net.state_dict())
    x = torch.randn(4, 2, 6, 6)
    with Recorder(aligned_system(net, x, "early")):
        assert torch.allclose(net(x), twin(x), atol=1e-6)
    for a, b in zip(net.buffers(), twin.buffers(), strict=True):
        assert torch.allclose(a.float(), b.float())


def test_an_unknown_alignment_is_refused():
    with pytest.raises(ArgumentError, match="alignment is 'middle'"):
        aligned_system(networks.mlp(), torch.randn(2, 5), "middle")
