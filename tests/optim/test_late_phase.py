"""Versions of a few weights, and their mean."""

import copy
import pickle

import pytest
import torch
from torch import nn

from bolza.core.errors import ArgumentError
from bolza.optim import LatePhase
from bolza.optim.late_phase import late_parameters, noisy_members
from bolza.testing import check_optimizer


def test_it_is_an_optimizer_before_and_within_the_late_phase():
    check_optimizer(lambda model: LatePhase(model, lr=0.1), takes_model=True)
    # two halves of a batch are accumulated into one gradient, so one version's turn: as for the base optimizer
    check_optimizer(lambda model: LatePhase(model, lr=0.1, members=2, start=1, noise=0.1), takes_model=True)
    check_optimizer(
        lambda model: LatePhase(model, 0.01, torch.optim.Adam, members=2, start=0), takes_model=True
    )


def net_and_data(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()
    return net, torch.randn(40, 4).double(), torch.randint(0, 3, (40,))


def train(net, optimizer, x, y, steps, scheduler=None):
    for t in range(steps):
        rows = torch.arange(8) + 8 * (t % 5)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
        if scheduler:
            scheduler.step()


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("start", [0, 4])
def test_one_version_is_the_base_run(base, start):
    net, x, y = net_and_data()
    twin = copy.deepcopy(net)
    options = {"momentum": 0.9} if base is torch.optim.SGD else {}
    ours = LatePhase(net, 0.05, base, members=1, start=start, weight_decay=0.01, **options)
    theirs = base(twin.parameters(), lr=0.05, weight_decay=0.01, **options)
    for model, optimizer in ((net, ours), (twin, theirs)):
        train(model, optimizer, x, y, 12, torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5))
    ours.finish()
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_round_is_the_published_algorithm_written_out():
    net, x, y = net_and_data()
    K, lr = 3, 0.1
    late = late_parameters(net)
    shared = [p for p in net.parameters() if all(p is not q for q in late)]
    twin = copy.deepcopy(net)
    places = {id(p): i for i, p in enumerate(net.parameters())}
    other = list(twin.parameters())
    phi = [[other[places[id(p)]].detach().clone() for p in late] for _ in range(K)]
    for round_ in range(2):
        total = [torch.zeros_like(p) for p in shared]
        for k in range(K):
            with torch.no_grad():
                for p, value in zip(late, phi[k], strict=True):
                    other[places[id(p)]].copy_(value)
            rows = torch.arange(8) + 8 * ((K * round_ + k) % 5)
            twin.zero_grad()
            nn.functional.cross_entropy(twin(x[rows]), y[rows]).backward()
            for p, value in zip(late, phi[k], strict=True):
                value -= lr * other[places[id(p)]].grad
            for p, s in zip(shared, total, strict=True):
                s += other[places[id(p)]].grad
        with torch.no_grad():
            for p, s in zip(shared, total, strict=True):
                other[places[id(p)]].sub_(lr / K * s)
    optimizer = LatePhase(net, lr, members=K, start=0, momentum=0.0)
    train(net, optimizer, x, y, 2 * K)
    optimizer.finish()
    for i, p in enumerate(late):
        torch.testing.assert_close(
            p.detach(), torch.stack([phi[k][i] for k in range(K)]).mean(0), rtol=1e-12, atol=0
        )
    for p in shared:
        torch.testing.assert_close(p, other[places[id(p)]], rtol=1e-12, atol=0)


@pytest.mark.parametrize("members", [2, 5, 10])
def test_with_the_rest_frozen_the_mean_has_a_kth_of_the_variance_of_descent(members):
    """SGD on ½ h w² with unit gradient noise has the variance η / (h (2 − η h)) exactly."""
    h, lr, chains, burn, rounds = 1.0, 0.1, 4000, 30, 1
    torch.manual_seed(members)
    w = nn.Parameter(torch.zeros(chains, dtype=torch.float64))
    optimizer = LatePhase([w], lr, members=members, start=0, late=[w], momentum=0.0)
    for _ in range((burn + rounds) * members):
        w.grad = h * w.detach() + torch.randn(chains, dtype=torch.float64)
        optimizer.step()
    optimizer.finish()
    exact = lr / (h * (2 - lr * h)) / members
    assert abs(float(w.detach().var()) - exact) < 4 * exact * (2 / chains) ** 0.5


def test_shared_weights_at_full_step_undo_the_gain():
    """Members θ + φ_k: with γ = 1/K the mean is quieter than descent, with γ = 1 it is not."""
    lr, chains, K = 0.1, 4000, 10
    descent = lr / (2 - lr)

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = nn.Parameter(torch.zeros(chains, dtype=torch.float64))
            self.phi = nn.Parameter(torch.zeros(chains, dtype=torch.float64))

    ratio = {}
    for gamma in (1 / K, 1.0):
        torch.manual_seed(0)
        net = Sum()
        optimizer = LatePhase(net, lr, members=K, start=0, late=[net.phi], gamma=gamma, momentum=0.0)
        for _ in range(40 * K):
            g = (net.theta + net.phi).detach() + torch.randn(chains, dtype=torch.float64)
            net.theta.grad, net.phi.grad = g, g
            optimizer.step()
        optimizer.finish()
        ratio[gamma] = float((net.theta + net.phi).detach().var()) / descent
    assert ratio[1 / K] == pytest.approx(0.198, abs=0.03)
    assert ratio[1.0] > 1.2


def test_versions_begin_together_or_with_noise_in_units_of_their_weights():
    draw = torch.Generator().manual_seed(0)
    phi = torch.full((20000,), 3.0)
    members = noisy_members(phi, 2, 0.1, draw)
    assert float(members.std()) == pytest.approx(0.3, rel=0.03)
    net, x, y = net_and_data()
    optimizer = LatePhase(net, 0.1, members=3)
    before = copy.deepcopy(net.state_dict())
    optimizer.begin()
    assert optimizer.late_phase
    optimizer.finish()
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


def test_arguments_that_make_no_sense_are_refused_by_name():
    net, _, _ = net_and_data()
    for bad, words in (
        ({"members": 0}, "members is 0"),
        ({"start": -1}, "start is -1"),
        ({"gamma": float("nan")}, "gamma is nan"),
        ({"late": [nn.Parameter(torch.zeros(1))]}, "late holds a parameter"),
    ):
        with pytest.raises(ArgumentError, match=words):
            LatePhase(net, **bad)
    with pytest.raises(ArgumentError, match="late is None"):
        LatePhase(net.parameters())
    with pytest.raises(ArgumentError, match="neither|no trainable"):
        LatePhase(nn.Sequential(nn.Conv1d(1, 1, 1)))
    with pytest.raises(ArgumentError, match="cannot be added"):
        LatePhase(net).add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_copy_of_network_and_optimizer_goes_on_as_they_do(copied, steps):
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    optimizer = LatePhase(net, base=torch.optim.Adam, lr=0.01, members=2, start=2)

    def step(net, optimizer):
        optimizer.zero_grad()
        (net(torch.eye(3)) - torch.arange(3.0)[:, None]).square().mean().backward()
        optimizer.step()

    for _ in range(steps):
        step(net, optimizer)
    twins = copied((net, optimizer))
    for _ in range(4):
        step(net, optimizer)
        step(*twins)
    optimizer.finish()
    twins[1].finish()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twins[0].parameters(), strict=True))


def test_versions_have_what_the_base_optimizer_has():
    class Own(torch.optim.SGD):
        def __init__(self, params, lr):
            super().__init__(params, lr=lr)
            self.factor = 0.5

        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad.mul_(self.factor)
            return super().step(closure)

    net = nn.Linear(2, 1)
    optimizer = LatePhase(net, base=Own, members=2, start=0)
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.ones(1, 2)).sum().backward()
        optimizer.step()
