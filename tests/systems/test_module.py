"""A network read as stages is the network: states, costates, controls and derivatives."""

import copy
import importlib.util
import pathlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bolza.core import CallableCost, System, TerminalCost, adjoint, linearize, rollout
from bolza.core.errors import ArgumentError, ShapeError, TraceError
from bolza.ops.replay import differentiable_kernels
from bolza.ops.trees import float_leaves, tree_map
from bolza.systems import as_system
from bolza.testing import check_system

_spec = importlib.util.spec_from_file_location("networks", pathlib.Path(__file__).with_name("networks.py"))
networks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(networks)

# float32: twice the tolerance of 1e-6 that the largest of a few hundred rounded sums needs
CLOSE = dict(rtol=1e-6, atol=1e-6)


def weighted(output, weights):
    return (output * weights).sum()


@pytest.fixture(params=networks.NETWORKS)
def case(request):
    net, x = networks.build(request.param)
    start = torch.get_rng_state()
    system = as_system(net, x)
    return net, x, system, start


def own_forward(net, x, start):
    """The network's own forward on a copy, with the random numbers of the moment ``start``."""
    twin = copy.deepcopy(net)
    torch.set_rng_state(start)
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    return twin, x, twin(x)


def test_rollout_is_the_forward_pass(case):
    net, x, system, start = case
    _, _, y = own_forward(net, x, start)
    assert isinstance(system, System)
    torch.testing.assert_close(rollout(system, x).states[-1], y, **CLOSE)


def test_costates_and_gradients_are_those_of_autograd(case):
    net, x, system, start = case
    twin, leaf, y = own_forward(net, x, start)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    with differentiable_kernels():
        weighted(y, weights).backward()
    run = adjoint(system, CallableCost(terminal=lambda o: weighted(o, weights)), rollout(system, x))
    gradients = run.gradient_by_name()
    assert set(gradients) == {name for name, _ in net.named_parameters()}
    for name, p in twin.named_parameters():
        torch.testing.assert_close(
            gradients[name], p.grad, rtol=1e-5, atol=1e-6 * float(1 + p.grad.abs().max())
        )
    if leaf.requires_grad:
        torch.testing.assert_close(run.costates[0], leaf.grad, **CLOSE)
    else:
        assert run.costates[0] is None


@pytest.mark.parametrize("name", [name for name in networks.NETWORKS if name != "dropout"])
def test_another_batch_size_than_that_of_the_example_works(name):
    net, x = networks.build(name, batch=6)
    system = as_system(net, x)
    other = networks.NETWORKS[name][1](3)
    _, _, y = own_forward(net, other, torch.get_rng_state())
    torch.testing.assert_close(rollout(system, system.initial_state(other)).states[-1], y, **CLOSE)


def test_a_random_stage_takes_other_batch_sizes_and_repeats_itself():
    net, x = networks.build("dropout")
    system = as_system(net, x)
    first, second = (rollout(system, torch.ones(9, 5)).states[-1] for _ in range(2))
    assert torch.equal(first, second)
    system.reseed(3)
    assert not torch.equal(rollout(system, torch.ones(9, 5)).states[-1], first)


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "mlp": ("0", "2", "4"),
        "resnet_train": ("conv1", "bn1", "layer1.0", "layer1.1", "layer2.0", "fc"),
        "densenet": ("stem", "block.0", "block.1", "block.2", "head"),
        "vit_built_in": ("patch", "cls", "pos", "blocks.layers.0", "blocks.layers.1", "norm", "head"),
        "glue": ("conv", "left..right", "mix", "out"),
        "gru": ("cell[0]", "cell[1]", "cell[2]", "cell[3]", "head"),
        "lstm": ("lstm", "fc"),
    }.items(),
)
def test_stages_are_the_blocks_of_the_network(name, expected):
    net, x = networks.build(name)
    assert as_system(net, x).stage_names == expected


def test_a_pre_norm_transformer_has_two_stages_a_block():
    net, x = networks.build("gpt")
    names = as_system(net, x).stage_names
    assert names[2:4] == (
        "transformer.h.0.ln_1..transformer.h.0.attn.c_proj",
        "transformer.h.0.ln_2..transformer.h.0.mlp.2",
    )
    assert len(names) == 2 + 2 * 2 + 2


def test_an_unrolled_cell_has_the_state_h_and_the_remaining_input():
    net, x = networks.build("gru")
    states = rollout(as_system(net, x), x).states
    assert [tuple(leaf.shape for leaf in float_leaves(s)) for s in states[:3]] == [
        ((6, 4, 3),), ((6, 6), (6, 4, 3)), ((6, 6), (6, 4, 3)),
    ]  # fmt: skip


def test_affine_split_keeps_activations_apart():
    net, x = networks.build("mlp")
    system = as_system(net, x, split="affine")
    assert system.stage_names == ("0", "1", "2", "3", "4")
    assert [len(u) for u in system.controls] == [2, 0, 2, 0, 2]
    flat = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Dropout(0.0), nn.ReLU(), nn.Linear(4, 1))
    assert as_system(flat, torch.zeros(3, 2, 2), split="affine").stage_names == ("1", "3", "4")


def test_stages_may_be_named_by_the_user():
    net, x = networks.build("resnet_eval")
    system = as_system(net, x, stages=["bn1", "layer1.0..layer1", "fc"])
    assert system.stage_names == ("conv1..bn1", "layer1", "layer2.0.conv1..fc")
    torch.testing.assert_close(rollout(system, x).states[-1], net(x), **CLOSE)


def test_a_cut_inside_a_residual_block_carries_both_branches():
    net, x = networks.build("resnet_eval")
    system = as_system(net, x, stages=["layer1.0.bn1"])
    states = rollout(system, x).states
    assert [leaf.shape for leaf in states[1]] == [(6, 4, 8, 8), (6, 4, 8, 8)]
    torch.testing.assert_close(states[-1], net(x), **CLOSE)


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        ({"stages": ["layer9"]}, "'layer9'.*'layer1'"),
        ({"stages": "fc"}, "list of names"),
        ({"split": "fine"}, "'parameters' or 'affine'"),
    ],
)
def test_bad_cuts_are_refused_by_name(keywords, text):
    net, x = networks.build("resnet_eval")
    with pytest.raises(ArgumentError, match=text):
        as_system(net, x, **keywords)


@pytest.mark.parametrize("name", ["mlp", "resnet_train", "gru", "dropout"])
def test_it_keeps_the_contract_of_a_system(name):
    net, x = networks.build(name, batch=3)
    net, x = net.double(), x.double()
    if name == "resnet_train":  # a smooth one, for finite differences
        net = nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(72, 2)
        ).double()
    if name == "dropout":
        net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    # third derivatives through the statistics of three samples are large: central differences err by 2e-6
    tolerance = 1e-5 if name == "resnet_train" else None
    check_system(as_system(net, x), x, CallableCost(terminal=lambda y: y.square().sum()), tolerance=tolerance)


def fingerprint(net):
    return {k: v.clone() for k, v in net.state_dict().items()}


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_nothing_of_the_network_changes(name):
    net, x = networks.build(name)
    before, modes = fingerprint(net), [m.training for m in net.modules()]
    attributes = [set(m.__dict__) for m in net.modules()]
    state = torch.get_rng_state()
    system = as_system(net, x)
    adjoint(system, CallableCost(terminal=lambda y: y.sum()), rollout(system, x))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert [m.training for m in net.modules()] == modes
    assert [set(m.__dict__) for m in net.modules()] == attributes
    assert all(p.grad is None for p in net.parameters())
    assert not any(getattr(m, "inplace", True) is False for m in net.modules() if isinstance(m, nn.ReLU))


def test_a_stage_does_not_overwrite_its_state():
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 3))
    system = as_system(net, torch.zeros(2, 3), split="affine")
    state = -torch.ones(2, 3)
    assert torch.equal(system.step(1, state, {}), torch.zeros(2, 3))
    assert torch.equal(state, -torch.ones(2, 3))
    assert net[1].inplace


def test_controls_are_live_and_shared_parameters_appear_in_every_stage_that_uses_them():
    net, x = networks.build("gpt")
    system = as_system(net, x)
    assert set(system.controls[0]) == set(system.controls[-1]) == {"transformer.wte.weight"}
    assert system.controls[0]["transformer.wte.weight"] is net.lm_head.weight
    before = rollout(system, x).states[-1]
    with torch.no_grad():
        net.lm_head.weight.mul_(1.5)
    after = rollout(system, x).states[-1]
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, net(x), **CLOSE)


def test_step_uses_the_control_it_is_given():
    net, x = networks.build("lstm")
    system = as_system(net, x)
    zero = [tree_map(torch.zeros_like, u) for u in system.controls]
    assert torch.equal(rollout(system, x, zero).states[-1], torch.zeros(6, 2))
    torch.testing.assert_close(rollout(system, x).states[-1], net(x), **CLOSE)


def test_frozen_parameters_are_not_controls():
    net, x = networks.build("mlp")
    net[0].weight.requires_grad_(False)
    system = as_system(net, x)
    assert [set(u) for u in system.controls] == [{"0.bias"}, {"2.weight", "2.bias"}, {"4.weight", "4.bias"}]
    run = adjoint(system, CallableCost(terminal=lambda y: y.sum()), rollout(system, x))
    net(x).sum().backward()
    gradients = run.gradient_by_name()
    assert all(torch.allclose(gradients[n], p.grad) for n, p in net.named_parameters() if p.requires_grad)


def test_the_system_follows_the_mode_of_the_network():
    net, x = networks.build("dropout")
    system = as_system(net, x)
    net.eval()
    torch.testing.assert_close(rollout(system, x).states[-1], net(x), **CLOSE)
    net.train()
    assert not torch.allclose(rollout(system, x).states[-1], net.eval()(x))


def test_batch_statistics_are_used_in_training_and_running_ones_in_evaluation():
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    x = torch.randn(8, 2) * 3 + 1
    system = as_system(net, x)
    batch = (x - x.mean(0)) / torch.sqrt(x.var(0, unbiased=False) + net[0].eps)
    torch.testing.assert_close(rollout(system, x).states[1], batch, rtol=1e-5, atol=1e-5)
    net.eval()
    torch.testing.assert_close(rollout(system, x).states[1], x / (1 + net[0].eps) ** 0.5)


@pytest.mark.parametrize("name", ["vit", "vit_built_in", "gpt"])
def test_attention_stages_have_jvp_vmap_and_second_derivatives(name):
    net, x = networks.build(name, batch=2)
    net = net.double()
    x = x.double() if x.is_floating_point() else x
    system = as_system(net, x)
    t = next(t for t, n in enumerate(system.stage_names) if "block" in n or ".h.0." in n)
    state, u = rollout(system, x).states[t].detach(), {n: p.detach() for n, p in system.controls[t].items()}
    linear = linearize(system, t, state, u)
    v, w = torch.randn_like(state), torch.randn_like(state)
    h = 1e-6  # central differences err as h² and as eps/h
    difference = (system.step(t, state + h * v, u) - system.step(t, state - h * v, u)) / (2 * h)
    torch.testing.assert_close(linear.jvp(v), difference, rtol=1e-6, atol=1e-7)

    def scalar(y):
        return (system.step(t, y, u) * w).sum()

    hessian_v = torch.func.jvp(torch.func.grad(scalar), (state,), (v,))[1]
    leaf = state.clone().requires_grad_()
    (first,) = torch.autograd.grad(scalar(leaf), leaf, create_graph=True)
    (again,) = torch.autograd.grad((first * v).sum(), leaf)
    torch.testing.assert_close(hessian_v, again)
    each = torch.func.vmap(lambda y: system.step(t, y[None], u)[0])(state)
    torch.testing.assert_close(each, system.step(t, state, u))


def test_recurrent_and_normalised_stages_have_second_derivatives():
    for name in ("lstm", "gru", "resnet_train"):
        net, x = networks.build(name, batch=3)
        net, x = net.double(), x.double()
        system = as_system(net, x)
        state = tree_map(torch.Tensor.detach, rollout(system, x).states[0])
        u = {n: p.detach() for n, p in system.controls[0].items()}

        def scalar(y, system=system, u=u):
            return sum(leaf.square().sum() for leaf in float_leaves(system.step(0, y, u)))

        v = torch.randn_like(state)
        forward = torch.func.jvp(torch.func.grad(scalar), (state,), (v,))[1]
        leaf = state.clone().requires_grad_()
        (first,) = torch.autograd.grad(scalar(leaf), leaf, create_graph=True)
        torch.testing.assert_close(forward, torch.autograd.grad((first * v).sum(), leaf)[0])


class Masked(nn.Module):
    """A mask made from tokens, and sizes that a flattened state has lost."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, tokens):
        B, T = tokens.shape
        mask = (tokens != 0).unsqueeze(-1)
        causal = torch.tril(torch.ones(T, T, device=tokens.device)) / T
        x = self.embed(tokens).view(B * T, -1)
        x = torch.tanh(self.a(x))
        x = x + self.b(x)
        x = causal @ (x.view(B, T, -1) * mask)
        return self.out(x).sum(1)


def test_what_the_state_has_lost_is_carried():
    net, tokens = Masked(), torch.randint(0, 7, (3, 5))
    system = as_system(net, tokens)
    assert len(float_leaves(rollout(system, tokens).states[2])) == 1
    for batch, length in ((3, 5), (2, 4), (1, 1), (4, 9)):
        other = torch.randint(0, 7, (batch, length))
        torch.testing.assert_close(rollout(system, other).states[-1], net(other), **CLOSE)
    run = adjoint(system, CallableCost(terminal=lambda y: y.sum()), rollout(system, tokens))
    net(tokens).sum().backward()
    for name, gradient in run.gradient_by_name().items():
        torch.testing.assert_close(gradient, net.get_parameter(name).grad, rtol=1e-5, atol=1e-6)


def test_several_arguments_make_a_tuple_state():
    net, idx = networks.build("gpt")
    targets = torch.randint(0, 11, idx.shape)
    system = as_system(net, (idx, targets))
    run = rollout(system, system.initial_state(idx, targets))
    torch.testing.assert_close(run.states[-1], net(idx, targets), **CLOSE)
    with pytest.raises(ArgumentError, match="1 arguments"):
        system.initial_state(idx)


def test_a_size_that_steers_the_control_flow_is_guarded():
    net, x = networks.build("gru")
    system = as_system(net, x)
    with pytest.raises(ShapeError, match="control flow"):
        system.initial_state(torch.randn(6, 5, 3))
    with pytest.raises(ShapeError, match="range"):
        rollout(system, torch.randn(6, 5, 3))
    net, idx = networks.build("gpt")
    system = as_system(net, idx)
    assert system.initial_state(torch.zeros(2, 7, dtype=torch.long)).shape == (2, 7)
    with pytest.raises(ShapeError, match="block_size"):
        rollout(system, torch.zeros(2, 8, dtype=torch.long))


def test_wrong_steps_and_controls_are_refused_by_name():
    net, x = networks.build("mlp")
    system = as_system(net, x)
    with pytest.raises(ArgumentError, match="0 to 2"):
        system.step(3, x, {})
    with pytest.raises(ArgumentError, match=r"'4.weight'.*'0.weight'"):
        system.step(0, x, {"4.weight": torch.zeros(3, 8)})
    with pytest.raises(RuntimeError) as caught:
        system.step(1, torch.zeros(2, 9), system.controls[1])
    assert "stage 1 ('2')" in caught.value.__notes__[0]
    gru = as_system(*networks.build("gru"))
    with pytest.raises(ShapeError, match="2 values are needed"):
        gru.step(1, torch.zeros(6, 6), {})


def test_a_network_without_a_graph_says_why():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(TraceError, match=r"Branching .* entries of a tensor .*torch.where"):
        as_system(Branching(), torch.ones(2, 3))


def test_the_stages_can_be_looked_at():
    net, x = networks.build("resnet_eval")
    system = as_system(net, x)
    assert system.stage_of("layer1.1.conv2") == 3
    assert system.stage_of("fc.bias") == 5
    assert "conv2" in system.stage_modules[3][3]
    assert repr(system).splitlines()[3].split() == ["1", "bn1", "8", "6×4×8×8"]
    with pytest.raises(ArgumentError, match="'nothing'"):
        system.stage_of("nothing")


def test_one_step_on_every_hamiltonian_is_one_step_of_sgd():
    net, x = networks.build("densenet")
    net, x, y = net.double(), x.double(), torch.randint(0, 3, (6,))
    system = as_system(net, x)
    run = adjoint(system, TerminalCost(F.cross_entropy, y), rollout(system, x))
    F.cross_entropy(net(x), y).backward()
    for name, gradient in run.gradient_by_name().items():
        torch.testing.assert_close(gradient, net.get_parameter(name).grad, rtol=1e-12, atol=1e-13)


class Options(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x, mask=None, scale=1.0, wide=True):
        h = self.a(x)
        h = h if mask is None else h * mask
        return self.b(torch.tanh(h) if wide else h) * scale


def test_numbers_among_the_arguments_reach_every_stage():
    net, x = Options(), torch.randn(3, 4)
    system = as_system(net, (x, torch.ones(3, 4), 3.0, False))
    assert system.horizon == 2
    for scale in (3.0, 0.5):
        states = rollout(system, system.initial_state(x, torch.ones(3, 4), scale, False)).states
        torch.testing.assert_close(states[-1], net(x, None, scale, False), **CLOSE)
    with pytest.raises(ShapeError, match="like this"):
        system.initial_state(x, torch.ones(3, 4), 3.0, True)


def test_an_argument_that_the_example_left_out_is_not_ignored():
    net, x = Options(), torch.randn(3, 4)
    system = as_system(net, (x, None))
    for refused in (
        lambda: system.initial_state(x, torch.zeros(3, 4)),
        lambda: rollout(system, (x, torch.zeros(3, 4))),
    ):
        with pytest.raises(ShapeError, match="such an example|like this"):
            refused()


def test_an_exported_stage_does_not_overwrite_its_state():
    class Halved(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            h = self.a(x)
            h.view(-1).mul_(2.0)
            return self.b(torch.tanh(h))

    net, x = Halved(), torch.randn(3, 4)
    system = as_system(net, x)
    run = adjoint(system, CallableCost(terminal=lambda y: y.square().sum()), rollout(system, x))
    net(x).square().sum().backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(run.gradient_by_name()[name], p.grad, **CLOSE)


def test_packed_sequences_stay_inside_a_stage():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.g, self.o = nn.Linear(3, 4), nn.GRU(4, 5, batch_first=True), nn.Linear(5, 2)

        def forward(self, x, lengths):
            packed = nn.utils.rnn.pack_padded_sequence(
                self.e(x), lengths, batch_first=True, enforce_sorted=False
            )
            return self.o(self.g(packed)[1][-1])

    net, x = Packed(), torch.randn(3, 5, 3)
    system = as_system(net, (x, torch.tensor([5, 2, 3])))
    lengths = torch.tensor([1, 4, 2])
    run = rollout(system, system.initial_state(x, lengths))
    torch.testing.assert_close(run.states[-1], net(x, lengths), **CLOSE)
    cost = CallableCost(terminal=lambda y: y.sum())
    gradients = adjoint(system, cost, run).gradient_by_name()
    net(x, lengths).sum().backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-5, atol=1e-6)


def test_a_network_whose_layers_were_replaced_is_not_evaluated_as_it_was():
    net, x = networks.build("mlp")
    system = as_system(net, x)
    net[1] = nn.ReLU()
    with pytest.raises(TraceError, match="make the system again"):
        rollout(system, x)
