"""Training against an adversary: whose perturbations, which gradients, how many passes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bolza.core.errors import ArgumentError, DivergenceError, ShapeError, UnsupportedError
from bolza.robust import fast, free, pgd, pgd_training, trades, yopo
from bolza.systems import as_system

D = torch.float64
CE = F.cross_entropy


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def mlp(dtype=D):
    return seeded(
        lambda: nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)).to(
            dtype
        )
    )


def batch(n=10, shape=(6,), dtype=D):
    g = torch.Generator().manual_seed(1)
    return torch.rand(n, *shape, generator=g, dtype=dtype), torch.arange(n) % 3


def generator(seed=7):
    return torch.Generator().manual_seed(seed)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_one_inner_step_behind_an_identity_is_projected_gradient_ascent_bit_for_bit(norm):
    net, (x, y) = mlp(torch.float32), batch(dtype=torch.float32)
    first = nn.Linear(6, 6)
    nn.init.eye_(first.weight)
    nn.init.zeros_(first.bias)
    whole = nn.Sequential(first, *net)
    about = {"norm": norm, "step_size": 0.02}
    ascended = pgd(whole, CE, x, y, 0.1, 4, best=False, generator=generator(), **about)
    played = yopo(whole, CE, x, y, 0.1, outer=4, inner=1, generator=generator(), **about)
    if norm == "linf":
        assert torch.equal(played.inputs, ascended)
    else:
        torch.testing.assert_close(played.inputs, ascended, rtol=0, atol=1e-6)
    assert (played.full_passes, played.first_stage_passes) == (4, 4)


def test_with_one_inner_step_any_first_stage_gives_the_points_of_gradient_ascent():
    net, (x, y) = mlp(), batch()
    ascended = pgd(net, CE, x, y, 0.1, 5, step_size=0.03, best=False, generator=generator())
    played = yopo(net, CE, x, y, 0.1, outer=5, inner=1, step_size=0.03, generator=generator())
    assert torch.equal(played.inputs, ascended)


def test_behind_a_linear_first_stage_small_steps_add_up_to_a_large_one():
    net, (x, y) = mlp(), batch()
    few = yopo(net, CE, x, y, 0.1, outer=3, inner=1, step_size=0.04, clip=None, generator=generator())
    many = yopo(net, CE, x, y, 0.1, outer=3, inner=4, step_size=0.01, clip=None, generator=generator())
    torch.testing.assert_close(many.inputs, few.inputs, rtol=0, atol=1e-15)


def test_gradients_of_the_first_stage_come_from_the_hamiltonian_and_those_behind_it_from_back_propagation():
    net, (x, y) = mlp(), batch()
    other = copy.deepcopy(net)
    step = yopo(net, CE, x, y, 0.1, outer=1, inner=2, random_start=False)
    CE(other(x), y).backward()  # behind the first stage: at the start
    exact = gradients(other)
    z = other[0](x).detach().requires_grad_()
    (p,) = torch.autograd.grad(CE(other[1:](z), y), z)
    other.zero_grad()
    (other[0](step.inputs) * p).sum().backward()  # the first stage: ⟨p, f_0⟩ where the perturbation ended
    first = gradients(other)
    for name, found in gradients(net).items():
        torch.testing.assert_close(
            found, (first if name.startswith("0.") else exact)[name], rtol=0, atol=1e-15
        )
    net.zero_grad()
    yopo(net, CE, x, y, 0.0, outer=3, inner=2)  # without a perturbation it is plain back-propagation
    for name, found in gradients(net).items():
        torch.testing.assert_close(found, exact[name], rtol=0, atol=1e-15)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.body = (
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 3, padding=1),
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = torch.relu(self.norm(self.stem(x)))
        return self.head((h + torch.relu(self.body(h))).mean((2, 3)))


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Linear(4, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.scale, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.embed(x)
        h = h + self.mix(h, h, h, need_weights=False)[0]
        return self.head(self.scale(h).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRUCell(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = x.new_zeros(len(x), 8)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return self.head(h)


@pytest.mark.parametrize(
    ("make", "shape", "first"),
    [(Residual, (1, 5, 5), "stem"), (Reader, (3, 4), "embed"), (Recurrent, (3, 4), "cell")],
)
def test_networks_are_split_and_without_a_perturbation_give_their_own_gradients(make, shape, first):
    net, (x, y) = seeded(make).double(), batch(6, shape)
    other = copy.deepcopy(net)
    system = as_system(net, x)
    yopo(system, CE, x, y, 0.0, outer=2, inner=2)
    for _ in range(2):
        loss = CE(other(x), y)
    loss.backward()
    exact = gradients(other)
    assert gradients(net).keys() == exact.keys()
    for name, found in gradients(net).items():
        torch.testing.assert_close(found, exact[name], rtol=1e-9, atol=1e-12)
    for name, value in net.state_dict().items():  # running statistics saw each full pass once
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-9, atol=1e-12)
    step = yopo(system, CE, x, y, 0.1, outer=2, inner=3)
    with torch.no_grad():
        assert float(CE(net.eval()(step.inputs), y)) != pytest.approx(float(CE(net(x), y)), abs=1e-9)
    from bolza.robust.yopo import _halves

    names = [
        name
        for name, p in net.named_parameters()
        if any(p is q for q in _halves(system, None).head_parameters)
    ]
    assert all(name.startswith(first) for name in names)


def test_tied_weights_get_both_parts_of_their_gradient():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x):
            return self.a(torch.tanh(self.a(x)))

    net, (x, y) = seeded(Tied).double(), batch()
    other = copy.deepcopy(net)
    yopo(net, CE, x, y, 0.0, outer=2, inner=1)
    CE(other(x), y).backward()
    for name, found in gradients(net).items():
        torch.testing.assert_close(found, gradients(other)[name], rtol=0, atol=1e-14)


def test_a_first_stage_with_dropout_keeps_its_mask_and_new_parameters_are_found():
    net = nn.Sequential(
        nn.Dropout(0.5), nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)
    ).double()
    other, (x, y) = copy.deepcopy(net), batch()
    system = as_system(net, x)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        yopo(system, CE, x, y, 0.0, outer=1, inner=2, random_start=False)
        torch.manual_seed(3)
        CE(other(x), y).backward()
    for name, found in gradients(net).items():
        torch.testing.assert_close(found, gradients(other)[name], rtol=0, atol=1e-14)
    net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()}, assign=True)
    yopo(system, CE, x, y, 0.1)
    assert gradients(net).keys() == gradients(other).keys()


def test_batch_statistics_in_the_first_stage_are_refused_and_a_name_moves_the_cut():
    (x, y) = batch(8, (1, 4, 4), torch.float32)
    net = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    with pytest.raises(UnsupportedError, match="statistics of the batch"):
        yopo(net, CE, x, y, 0.1)
    net[0].eval()
    assert yopo(net, CE, x, y, 0.1).full_passes == 5
    later = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    step = yopo(later, CE, x, y, 0.0, outer=1, inner=1, first="1")
    assert step.full_passes == 1 and later[0].weight.grad is not None
    with pytest.raises(ArgumentError, match="nothing to train"):
        yopo(nn.Sequential(nn.Flatten(), nn.ReLU()), CE, x, y, 0.1)


def test_passes_are_counted_by_what_the_network_saw():
    (x, y), net = batch(), mlp()
    seen = []
    net[2].register_forward_hook(lambda *_: seen.append(1))
    system = as_system(net, x)

    def count(call):
        seen.clear()
        step = call()
        return len(seen), step.full_passes

    assert count(lambda: pgd_training(net, CE, x, y, 0.1, 6)) == (7, 7)
    assert count(lambda: fast(net, CE, x, y, 0.1)) == (2, 2)
    assert count(lambda: free(net, CE, x, y, 0.1)[0]) == (1, 1)
    assert count(lambda: yopo(system, CE, x, y, 0.1, outer=4, inner=3)) == (4, 4)
    assert count(lambda: trades(net, CE, x, y, 0.1, 5)) == (8, 7)  # one of them forward only


def test_gradients_of_the_other_rules_are_those_at_their_points_and_are_added():
    (x, y), net = batch(), mlp()
    delta = 0.05 * torch.ones_like(x)
    calls = {
        "pgd": lambda: pgd_training(net, CE, x, y, 0.1, 3, generator=generator()),
        "fast": lambda: fast(net, CE, x, y, 0.1, generator=generator()),
        "free": lambda: free(net, CE, x, y, 0.1, delta)[0],
    }
    for call in calls.values():
        net.zero_grad()
        step = call()
        found = gradients(net)
        net.zero_grad()
        CE(net(step.inputs), y).backward()
        for name, exact in gradients(net).items():
            torch.testing.assert_close(found[name], exact, rtol=0, atol=1e-15)
        call()
        for name, twice in gradients(net).items():
            torch.testing.assert_close(twice, 2 * found[name], rtol=0, atol=1e-14)


def test_passes_of_the_attack_are_not_taken_for_passes_of_training():
    from bolza.systems import Recorder

    net, (x, y) = mlp(), batch()
    recorder = Recorder(net, x, keep="all")
    for call in (pgd_training, fast):
        recorder.clear()
        step = call(net, CE, x, y, 0.1)
        assert len(recorder.trajectories) == 1
        torch.testing.assert_close(recorder.trajectory.states[0], step.inputs, rtol=0, atol=0)
    recorder.close()


def test_free_carries_its_perturbation_to_the_next_and_to_a_smaller_batch():
    (x, y), net = batch(), mlp()
    step, delta = free(net, CE, x, y, 0.1)
    assert torch.equal(step.inputs, x)
    (slope,) = torch.autograd.grad(CE(net(z := x.clone().requires_grad_()), y), z)
    torch.testing.assert_close(x + delta, (x + 0.1 * slope.sign()).clamp(0, 1), rtol=0, atol=1e-15)
    step, following = free(net, CE, x[:4], y[:4], 0.1, delta)
    torch.testing.assert_close(step.inputs, x[:4] + delta[:4], rtol=0, atol=1e-15)
    assert following.shape == delta.shape and torch.equal(following[4:], delta[4:])
    with pytest.raises(ShapeError, match="perturbation"):
        free(net, CE, x, y, 0.1, delta[:3])


def test_trades_with_no_weight_is_plain_training_and_its_divergence_is_that_of_torch():
    from bolza.robust.trades import divergence

    (x, y), net = batch(), mlp()
    trades(net, CE, x, y, 0.1, 2, beta=0.0)
    found = gradients(net)
    net.zero_grad()
    CE(net(x), y).backward()
    for name, exact in gradients(net).items():
        torch.testing.assert_close(found[name], exact, rtol=0, atol=1e-15)
    a, b = torch.randn(2, 5, 3, dtype=D)
    exact = F.kl_div(a.log_softmax(1), b.softmax(1), reduction="batchmean")
    torch.testing.assert_close(divergence(a, b), exact)
    with pytest.raises(ArgumentError, match="beta"):
        trades(net, CE, x, y, 0.1, beta=-1.0)
    with pytest.raises(ShapeError, match="two classes"):  # the divergence of one output is zero
        trades(nn.Linear(6, 1).to(D), F.mse_loss, x, x[:, :1], 0.1)


def test_a_loss_that_is_not_finite_adds_nothing_and_says_so():
    (x, y), net = batch(), mlp()
    with pytest.raises(DivergenceError, match="not finite"):
        pgd_training(net, lambda out, y: CE(out, y) * torch.nan, x, y, 0.1)
    with pytest.raises(DivergenceError, match="learning rate"):
        yopo(net, lambda out, y: CE(out, y) * torch.inf, x, y, 0.1)
    assert not gradients(net)
    with pytest.raises(ArgumentError, match="outer"):
        yopo(net, CE, x, y, 0.1, outer=0)
