import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bolza.core import TerminalCost, adjoint, linearize, rollout
from bolza.core.errors import ArgumentError, UnsupportedError
from bolza.optim import DDPNOpt, value_factors
from bolza.systems import as_system
from bolza.testing import check_optimizer

CURVATURES = {"identity": 0.05, "rmsprop": 0.01, "kronecker": 0.02}


def tanh_net(*sizes, dtype=torch.float64):
    torch.manual_seed(0)
    layers = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def classes(net, n, features, dtype=torch.float64):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(n, *features, generator=draw, dtype=dtype)
    with torch.no_grad():
        return x, torch.randint(0, net(x).shape[-1], (n,), generator=draw)


def one_step(net, optimizer, x, y, loss=F.cross_entropy):
    optimizer.zero_grad()
    value = loss(net(x), y)
    value.backward()
    optimizer.step()
    return value.item()


@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_it_can_stand_wherever_a_torch_optimizer_stands(curvature, feedback):
    check_optimizer(
        lambda net: DDPNOpt(net, lr=CURVATURES[curvature], curvature=curvature, feedback=feedback),
        takes_model=True,
    )


@pytest.mark.parametrize(
    ("curvature", "options", "reference"),
    [
        ("identity", {"momentum": 0.9, "weight_decay": 1e-2}, torch.optim.SGD),
        ("identity", {}, torch.optim.SGD),
        ("rmsprop", {"momentum": 0.5, "weight_decay": 1e-2}, torch.optim.RMSprop),
        ("rmsprop", {}, torch.optim.RMSprop),
    ],
)
def test_without_feedback_it_is_the_torch_optimizer_to_1e_6_over_20_steps(curvature, options, reference):
    net = tanh_net(5, 6, 4, 3, dtype=torch.float32)
    twin = copy.deepcopy(net)
    x, y = classes(net, 16, (5,), torch.float32)
    ours = DDPNOpt(net, lr=0.02, curvature=curvature, feedback=False, **options)
    theirs = reference(twin.parameters(), lr=0.02, **options)
    for _ in range(20):
        one_step(net, ours, x, y)
        one_step(twin, theirs, x, y)
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-6


def full_recursion(net, x, y, inverse_curvature):
    """V_x and V_xx of one sample by matrices, with the terminal Hessian ∇φ∇φᵀ."""
    system = as_system(net, x)
    cost = TerminalCost(F.cross_entropy, y)
    run = adjoint(system, cost, rollout(system, x))
    value = run.costates[-1].flatten()
    hessian = torch.outer(value, value)
    results = [(value, hessian)]
    for t in reversed(range(system.horizon)):
        A, B = linearize(system, t, run.states[t].detach()).matrices()
        Qx, Qu = A.T @ value, B.T @ value
        Qxx, Qux = A.T @ hessian @ A, B.T @ hessian @ A
        value = Qx - inverse_curvature * Qux.T @ Qu
        hessian = Qxx - inverse_curvature * Qux.T @ Qux
        results.append((value, hessian))
    return run, results[::-1]


def test_two_numbers_a_layer_are_the_full_matrix_recursion():
    net = tanh_net(5, 6, 4, 3)
    x, y = classes(net, 1, (5,))
    lr = 0.05
    run, full = full_recursion(net, x, y, lr)
    norms = torch.tensor(
        [[lr * sum(g.square().sum() for g in gradient.values())] for gradient in run.gradients],
        dtype=torch.float64,
    )
    factors = value_factors(norms, batch=1, scale=1.0, mode="paper")
    for t in range(len(full)):
        p = run.costates[t].flatten()
        assert (factors.beta[t] * p - full[t][0]).abs().max() < 1e-14
        assert (factors.alpha[t] ** 2 * torch.outer(p, p) - full[t][1]).abs().max() < 1e-14


def by_matrices(net, x, y, lr):
    """One step of the paper's mode on one sample, with K = −M⁻¹Q_ux as a matrix."""
    system = as_system(net, x)
    run, full = full_recursion(net, x, y, lr)
    new, moved = {}, x
    for t in range(system.horizon):
        state = run.states[t].detach()
        A, B = linearize(system, t, state).matrices()
        value, hessian = full[t + 1]
        step = -lr * (B.T @ value + B.T @ hessian @ A @ (moved - state).flatten())
        leaves = system.controls[t]
        pieces = step.split([leaf.numel() for leaf in leaves.values()])
        control = {
            name: (leaf + piece.reshape(leaf.shape)).detach()
            for (name, leaf), piece in zip(leaves.items(), pieces, strict=True)
        }
        new |= control
        moved = system.step(t, moved, control).detach()
    return new


def test_the_papers_step_is_the_one_with_gain_matrices():
    net = tanh_net(5, 6, 4, 3)
    x, y = classes(net, 1, (5,))
    expected = by_matrices(net, x, y, 0.2)
    one_step(net, DDPNOpt(net, lr=0.2, mode="paper"), x, y)
    plain = tanh_net(5, 6, 4, 3)
    one_step(plain, torch.optim.SGD(plain.parameters(), lr=0.2), x, y)
    for (name, ours), sgd in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert (ours - expected[name]).abs().max() < 1e-12
        assert (sgd - expected[name]).abs().max() > 1e-6


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.a, self.norm, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        x = x + self.b(torch.relu(self.norm(self.a(x))))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.qkv, self.out, self.norm = nn.Linear(8, 24), nn.Linear(8, 8), nn.LayerNorm(8)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens):
        x = self.embed(tokens)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.drop(self.out(F.scaled_dot_product_attention(q, k, v)))
        return self.head(x.mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRUCell(3, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = x.new_zeros(x.shape[0], 5)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return self.head(h)


def batch_norm_net():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 3)
    )


NETS = {
    "residual": (Residual, lambda: torch.randn(12, 1, 8, 8)),
    "attention": (Attention, lambda: torch.randint(0, 7, (12, 5))),
    "recurrent": (Recurrent, lambda: torch.randn(12, 4, 3)),
    "batch norm": (batch_norm_net, lambda: torch.randn(12, 1, 8, 8)),
}


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("name", NETS)
def test_it_trains_the_networks_people_have(name, curvature):
    make, data = NETS[name]
    torch.manual_seed(0)
    net, x = make(), data()
    y = torch.randint(0, 3, (12,))
    optimizer = DDPNOpt(net, lr=CURVATURES[curvature], curvature=curvature)
    losses = [one_step(net, optimizer, x, y) for _ in range(15)]
    assert losses[-1] < 0.98 * losses[0]


def test_with_small_steps_the_feedback_is_a_correction_of_second_order():
    net = tanh_net(5, 6, 4, 3)
    x, y = classes(net, 8, (5,))
    gaps = []
    for lr in (1e-2, 5e-3):
        ours, plain = copy.deepcopy(net), copy.deepcopy(net)
        one_step(ours, DDPNOpt(ours, lr=lr), x, y)
        one_step(plain, torch.optim.SGD(plain.parameters(), lr=lr), x, y)
        gaps.append(
            max(
                (a - b).abs().max().item() for a, b in zip(ours.parameters(), plain.parameters(), strict=True)
            )
        )
    assert 3.5 < gaps[0] / gaps[1] < 4.5


def test_parameters_without_feedback_are_named_with_the_reason():
    net = batch_norm_net()
    optimizer = DDPNOpt(net)
    with pytest.raises(ArgumentError, match="run it once"):
        optimizer.coverage()
    net(torch.randn(2, 1, 8, 8))
    words = optimizer.coverage()
    assert "couples the samples" in words["0.weight"]
    assert "not known" in words["1.weight"]
    assert words["4.weight"] == "feedback in stage 2"
    net.eval()
    assert optimizer.coverage()["0.weight"] == "feedback in stage 0"


def test_before_a_batch_norm_the_step_is_the_plain_one():
    torch.manual_seed(0)
    net, x, y = batch_norm_net(), torch.randn(12, 1, 8, 8), torch.randint(0, 3, (12,))
    plain = copy.deepcopy(net)
    one_step(net, DDPNOpt(net, lr=0.3), x, y)
    one_step(plain, torch.optim.SGD(plain.parameters(), lr=0.3), x, y)
    assert torch.allclose(net[0].weight, plain[0].weight, atol=1e-7)
    assert not torch.allclose(net[4].weight, plain[4].weight, atol=1e-7)


def test_tied_weights_take_the_plain_step():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mix = nn.Embedding(5, 4), nn.Linear(4, 4)

        def forward(self, tokens):
            return F.linear(torch.tanh(self.mix(self.embed(tokens).mean(1))), self.embed.weight)

    torch.manual_seed(0)
    net, tokens, y = Tied(), torch.randint(0, 5, (6, 3)), torch.randint(0, 5, (6,))
    plain = copy.deepcopy(net)
    one_step(net, DDPNOpt(net, lr=0.3), tokens, y)
    one_step(plain, torch.optim.SGD(plain.parameters(), lr=0.3), tokens, y)
    assert torch.allclose(net.embed.weight, plain.embed.weight, atol=1e-7)
    assert not torch.allclose(net.mix.weight, plain.mix.weight, atol=1e-7)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_clipping_by_the_norm_scales_the_whole_step(curvature):
    net = tanh_net(5, 6, 3)
    x, y = classes(net, 8, (5,))
    clipped, half = copy.deepcopy(net), copy.deepcopy(net)
    optimizer = DDPNOpt(clipped, lr=0.1, curvature=curvature)
    F.cross_entropy(clipped(x), y).backward()
    total = torch.nn.utils.clip_grad_norm_(clipped.parameters(), 0.05)
    factor = (0.05 / (total + 1e-6)).item()
    if curvature != "identity":
        optimizer.step()
        assert all(p.isfinite().all() for p in clipped.parameters())
        return
    # the sweep is that of the unclipped gradients, the step is multiplied: compare the first stage
    optimizer.step()
    one_step(half, DDPNOpt(half, lr=0.1), x, y)
    ours, whole = clipped[0].weight - net[0].weight, half[0].weight - net[0].weight
    assert torch.allclose(ours, factor * whole, rtol=1e-6)


def test_gradients_changed_element_by_element_are_refused():
    net = tanh_net(5, 6, 3)
    x, y = classes(net, 8, (5,))
    optimizer = DDPNOpt(net, lr=0.1)
    F.cross_entropy(net(x), y).backward()
    torch.nn.utils.clip_grad_value_(net.parameters(), 1e-3)
    with pytest.raises(UnsupportedError, match="common factors only"):
        optimizer.step()


def test_a_pass_outside_of_the_step_is_refused_and_zero_grad_heals_it():
    net = tanh_net(5, 6, 3)
    x, y = classes(net, 8, (5,))
    optimizer = DDPNOpt(net, lr=0.1)
    start = (2 * x).requires_grad_()
    torch.autograd.grad(F.cross_entropy(net(start), y), start)
    F.cross_entropy(net(x), y).backward()
    with pytest.raises(UnsupportedError, match="zero_grad"):
        optimizer.step()
    one_step(net, optimizer, x, y)


def test_gradients_without_a_recorded_pass_are_refused():
    net = tanh_net(5, 6, 3)
    x, y = classes(net, 8, (5,))
    optimizer = DDPNOpt(net, lr=0.1)
    F.cross_entropy(torch.func.functional_call(net[0:], dict(net.named_parameters()), (x,)), y).backward()
    with pytest.raises(UnsupportedError, match="call the"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"momentum": 1.0}, "momentum"),
        ({"curvature": "hessian"}, "curvature"),
        ({"mode": "fast"}, "mode"),
        ({"refresh": 0}, "refresh"),
        ({"damping": 0.0}, "damping"),
    ],
)
def test_bad_settings_are_named(options, word):
    with pytest.raises(ArgumentError, match=word):
        DDPNOpt(nn.Linear(2, 2), **options)


def test_parameters_in_place_of_the_network_are_refused():
    with pytest.raises(ArgumentError, match=r"pass the nn\.Module"):
        DDPNOpt(nn.Linear(2, 2).parameters())


def test_a_forward_pass_without_gradients_in_between_changes_nothing():
    net = tanh_net(5, 6, 3)
    x, y = classes(net, 8, (5,))
    twin = copy.deepcopy(net)
    ours, same = DDPNOpt(net, lr=0.1), DDPNOpt(twin, lr=0.1)
    for _ in range(3):
        with torch.no_grad():
            net(x[:2])
        one_step(net, ours, x, y)
        one_step(twin, same, x, y)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))
