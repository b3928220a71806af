"""The recorder notes the states and costates of an ordinary training loop, and nothing else."""

import copy
import gc
import importlib.util
import pathlib
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bolza.core import CallableCost, adjoint, rollout
from bolza.core.errors import ArgumentError, UnsupportedError
from bolza.systems import Recorder, as_system

_spec = importlib.util.spec_from_file_location("networks", pathlib.Path(__file__).with_name("networks.py"))
networks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(networks)


def leaves(trees):
    return [
        leaf for tree in trees for leaf in torch.utils._pytree.tree_leaves(tree, is_leaf=lambda x: x is None)
    ]


def assert_same(trees, others):
    for a, b in zip(leaves(trees), leaves(others), strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        else:
            assert a == b


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_it_notes_what_the_adjoint_computes(name):
    net, x = networks.build(name)
    recorder = Recorder(net, x, input_costate=True)
    start = torch.get_rng_state()
    weights = None

    def cost(y):
        return (y * weights).sum()

    y = net(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    cost(y).backward()
    seen = recorder.trajectory
    torch.set_rng_state(start)
    recorder.close()
    system = as_system(net, x)
    exact = adjoint(system, CallableCost(terminal=cost), rollout(system, x))
    assert seen.horizon == system.horizon
    assert_same(seen.states, exact.states)
    assert_same(seen.costates, exact.costates)


def test_the_two_mechanisms_are_chosen_by_the_network():
    for name, routed in (("mlp", False), ("resnet_train", False), ("gpt", False), ("gru", True)):
        net, x = networks.build(name)
        recorder = Recorder(net, x)
        assert next(iter(recorder._layouts.values())).routed is routed


@pytest.mark.parametrize("name", ["resnet_train", "vit", "gru", "dropout"])
def test_training_with_it_is_training_without_it(name):
    net, x = networks.build(name)
    twin = copy.deepcopy(net)
    recorder = Recorder(net, x)
    for model in (net, twin):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    assert recorder.trajectory.horizon == recorder.system.horizon
    for (key, a), b in zip(net.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=key)


def small(keep="last", **keywords):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return net, Recorder(net, torch.zeros(2, 3), keep=keep, **keywords)


def test_zero_grad_clears_it():
    net, recorder = small()
    net(torch.ones(2, 3)).sum().backward()
    assert recorder.trajectory.costates is not None
    net.zero_grad()
    with pytest.raises(ArgumentError, match="no backward pass"):
        _ = recorder.trajectory
    assert all(p.grad is None for p in net.parameters())
    net, recorder = small()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with Recorder(net, torch.zeros(2, 3), optimizer=optimizer) as second:
        net(torch.ones(2, 3)).sum().backward()
        assert second.trajectory
        optimizer.zero_grad()
        assert second.trajectories == () and recorder.trajectories != ()
    optimizer.zero_grad()


def test_accumulated_passes_are_kept_on_request():
    net, recorder = small(keep="all")
    batches = [torch.randn(2, 3) for _ in range(3)]
    for x in batches:
        net(x).sum().backward()
    assert [torch.equal(run.states[0], x) for run, x in zip(recorder.trajectories, batches, strict=True)] == [
        True
    ] * 3
    net, recorder = small()
    for x in batches:
        net(x).sum().backward()
    assert len(recorder.trajectories) == 1
    assert torch.equal(recorder.trajectory.states[0], batches[-1])


def test_several_forward_passes_before_a_backward_are_told_apart():
    net, recorder = small(keep="all")
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    first, second = net(a).sum(), net(b).square().sum()
    second.backward()
    assert torch.equal(recorder.trajectory.states[0], b)
    first.backward()
    assert torch.equal(recorder.trajectory.states[0], a)
    torch.testing.assert_close(recorder.trajectory.costates[-1], torch.ones(2, 2))
    both = net(a).sum() + 3 * net(b).sum()
    recorder.clear()
    both.backward()
    assert sorted(float(run.costates[-1].mean()) for run in recorder.trajectories) == [1.0, 3.0]


def test_evaluation_in_between_is_ignored_and_modes_are_followed():
    net, x = networks.build("dropout")
    recorder = Recorder(net, x)
    loss = net(x).sum()
    with torch.no_grad():
        net(torch.randn(6, 5))
    loss.backward()
    assert torch.equal(recorder.trajectory.states[0], x)
    net.eval()
    other = torch.randn(9, 5)
    net(other).sum().backward()
    run = recorder.trajectory
    torch.testing.assert_close(run.states[-1], net(other))
    torch.testing.assert_close(run.states[2], F.relu(net.fc2(F.relu(net.fc1(other)))))
    net.train()
    net(x).sum().backward()
    assert torch.equal(recorder.trajectory.states[0], x)


def test_replays_and_adjoints_are_not_noted():
    net, x = networks.build("resnet_eval")
    recorder = Recorder(net, x)
    system = recorder.system
    adjoint(system, CallableCost(terminal=lambda y: y.sum()), rollout(system, x))
    as_system(net, x)
    with recorder.paused():
        net(x).sum().backward()
    assert recorder.trajectories == ()


def test_an_overwritten_state_is_an_error_that_names_the_layer():
    net = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2)))
    x = torch.randn(5, 3)
    recorder = Recorder(net, x, split="affine")
    net(x).sum().backward()
    with pytest.raises(UnsupportedError, match=r"after stage 0 \('0'\).*inplace=False.*copy=True"):
        _ = recorder.trajectory
    recorder.close()
    copying = Recorder(net, x, split="affine", copy=True)
    net(x).sum().backward()
    torch.testing.assert_close(copying.trajectory.states[1], net[0](x))
    torch.testing.assert_close(copying.trajectory.states[2], net[0](x).relu())


def test_in_place_layers_inside_a_stage_do_no_harm():
    net, x = networks.build("resnet_train")
    recorder = Recorder(net, x)
    net(x).sum().backward()
    assert recorder.trajectory.costates is not None


class Saved:
    """What autograd keeps for a backward pass; it lives as long as the graph does."""

    def __init__(self, tensor):
        self.tensor = tensor.detach()  # the tensor itself would close a circle through its graph


def test_nothing_keeps_the_graph_alive():
    net, recorder = small()
    kept = []

    def pack(tensor):
        saved = Saved(tensor)
        kept.append(weakref.ref(saved))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        y = net(torch.ones(2, 3))
    y.sum().backward(retain_graph=True)
    assert any(ref() is not None for ref in kept)
    del y
    gc.collect()
    assert all(ref() is None for ref in kept)
    run = recorder.trajectory
    assert not any(t.requires_grad for t in leaves(run.states) + leaves(run.costates) if t is not None)


def test_a_pass_without_backward_is_forgotten():
    net, recorder = small()
    y = net(torch.ones(2, 3))
    state = weakref.ref(y)
    del y
    gc.collect()
    assert state() is None and recorder.trajectories == ()


def test_closing_takes_everything_off():
    for name in ("mlp", "gru"):
        net, x = networks.build(name)
        attributes = set(net.__dict__)
        with Recorder(net, x):
            assert set(net.__dict__) > attributes
        assert set(net.__dict__) == attributes
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_deep_copy_of_the_network_does_not_record_and_works():
    for name in ("mlp", "gru"):
        net, x = networks.build(name)
        recorder = Recorder(net, x)
        twin = copy.deepcopy(net)
        with torch.no_grad():
            for p in twin.parameters():
                p.zero_()
        assert torch.equal(twin(x), torch.zeros_like(twin(x)))
        twin(x).sum().backward()
        assert recorder.trajectories == ()
        net(x).sum().backward()
        twin.zero_grad()
        assert len(recorder.trajectories) == 1
        assert all(p.grad is None for p in twin.parameters())
        assert all(p.grad is not None for p in net.parameters())


def test_another_sequence_length_is_read_anew():
    net, x = networks.build("gru")
    recorder = Recorder(net, x)
    net(torch.randn(2, 7, 3)).sum().backward()
    assert recorder.trajectory.horizon == 8
    net(x).sum().backward()
    assert recorder.trajectory.horizon == 5


def test_frozen_early_layers_leave_their_costates_empty():
    net, recorder = small()
    net[0].requires_grad_(False)
    net(torch.ones(2, 3)).sum().backward()
    first, second, last = recorder.trajectory.costates
    assert first is None and second is None and last.shape == (2, 2)


def test_costates_of_a_double_backward_are_plain_values():
    net, recorder = small()
    x = torch.ones(2, 3, requires_grad=True)
    (g,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
    torch.testing.assert_close(recorder.trajectory.costates[0], g)
    assert not recorder.trajectory.costates[0].requires_grad
    g.square().sum().backward()


def test_arguments_by_keyword_are_understood_and_unknown_ones_reported():
    net, idx = networks.build("gpt")
    recorder = Recorder(net, idx)
    net(idx=idx).sum().backward()
    assert recorder.trajectory.states[0] is not None
    recorder.clear()
    net(idx, targets=idx).backward()
    with pytest.raises(ArgumentError, match="2 arguments.*read with 1"):
        _ = recorder.trajectory


def test_bad_arguments_are_refused():
    with pytest.raises(ArgumentError, match="keep is 'some'"):
        small(keep="some")
    with pytest.raises(ArgumentError, match="example is missing"):
        Recorder(nn.Linear(2, 2))


def test_a_state_that_is_also_an_output_has_the_costate_of_each_place():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, x):
            h = torch.tanh(self.a(x))
            return {"logits": self.b(h), "hidden": h, "again": h}

    net, x = Both(), torch.randn(3, 4)
    recorder = Recorder(net, x)

    def cost(y):
        return y["logits"].square().sum() + 3 * y["hidden"].sum() + y["again"].square().sum()

    cost(net(x)).backward()
    system = recorder.system
    run = adjoint(system, CallableCost(terminal=cost), rollout(system, x))
    assert_same(recorder.trajectory.costates[1:], run.costates[1:])


def test_a_layer_with_several_outputs_has_a_costate_for_each():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.g, self.o = nn.GRU(3, 4, num_layers=2, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            y, h = self.g(x)
            return self.o(y.mean(1)), h

    net, x = Recurrent(), torch.randn(2, 5, 3)
    recorder = Recorder(net, x)
    net(x)[0].sum().backward()  # h does not matter: its costate is zero, as adjoint says
    system = recorder.system
    run = adjoint(system, CallableCost(terminal=lambda y: y[0].sum()), rollout(system, x))
    assert_same(recorder.trajectory.costates[1:], run.costates[1:])


def test_states_inside_a_reentrant_checkpoint_are_missed_with_a_word():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.block = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.block, self.a(x), use_reentrant=True)

    net, x = Checkpointed(), torch.randn(3, 4)
    recorder = Recorder(net, x)
    net(x).sum().backward()
    with pytest.raises(ArgumentError, match="use_reentrant=False"):
        _ = recorder.trajectory


def test_recording_never_stops_running_statistics():
    class Exported(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

        def forward(self, x):
            h = self.norm(self.a(x))
            h[:, :2].mul_(2.0)
            return self.b(h)

    net, x = Exported(), torch.randn(6, 4)
    with pytest.raises(UnsupportedError, match="running statistics"):
        Recorder(net, x)
    net.eval()
    with Recorder(net, x) as recorder:
        net(x).sum().backward()
        assert recorder.trajectory.costates[-1] is not None


def test_an_exported_network_is_read_again_when_its_mode_changes():
    class Exported(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.drop, self.b = nn.Linear(4, 4), nn.Dropout(0.1), nn.Linear(4, 2)

        def forward(self, x):
            h = self.a(x)
            h[:, :2].mul_(2.0)
            return self.b(self.drop(h))

    net, x = Exported().eval(), torch.randn(6, 4)
    with Recorder(net, x, keep="all") as recorder:
        net(x).sum().backward()
        net.train()(x).sum().backward()
        assert len(recorder.trajectories) == 2
