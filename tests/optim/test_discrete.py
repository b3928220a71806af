"""Networks with discrete weights."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from bolza.core import binary_rule
from bolza.core.errors import ArgumentError, DivergenceError
from bolza.optim import BinaryMSA, TernaryMSA
from bolza.testing import check_optimizer

ALPHABET = {BinaryMSA: {-1.0, 1.0}, TernaryMSA: {-1.0, 0.0, 1.0}}
BOTH = pytest.mark.parametrize("kind", [BinaryMSA, TernaryMSA])


def conv_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 3),
        nn.BatchNorm1d(3),
    )


def images(n=24):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 1, 4, 4, generator=g)
    return x, x.mean((1, 2, 3)).mul(8).round().clamp(-1, 1).long() + 1


@BOTH
def test_it_is_an_optimizer(kind):
    check_optimizer(lambda model: kind(model, lr=1e-2), takes_model=True)


@BOTH
def test_weights_are_in_the_alphabet_at_every_step_and_the_loss_falls(kind):
    net, (x, y) = conv_net(), images()
    opt = kind(net, lr=1e-2, alpha=0.9)
    losses = []
    for _ in range(60):
        opt.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
        assert set(net[0].weight.unique().tolist()) <= ALPHABET[kind]
        assert set(net[4].weight.unique().tolist()) <= ALPHABET[kind]
    assert losses[-1] < 0.5 * losses[0]
    # the only float tensor of the size of a weight is the average; it is no weight, and is not added to one
    assert [sorted(opt.state[p]) for p in (net[0].weight, net[4].weight)] == [["mean", "step"]] * 2


def test_the_parameters_that_are_not_discrete_are_trained_by_adam():
    x, y = images()
    x = x.double()  # the bias before a normalisation has no gradient but rounding, which Adam magnifies
    nets = [conv_net().double(), conv_net().double()]
    names = [name for name, _ in nets[0].named_parameters() if name not in ("0.weight", "4.weight")]
    ours = BinaryMSA(nets[0], lr=3e-3, rho=1.0)  # no weight flips
    nets[1].load_state_dict(copy.deepcopy(nets[0].state_dict()))
    adam = torch.optim.Adam([p for name, p in nets[1].named_parameters() if name in names], lr=3e-3)
    for _ in range(10):
        for net, opt in zip(nets, (ours, adam), strict=True):
            net.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            opt.step()
    for name in names:
        assert_close(nets[0].get_parameter(name), nets[1].get_parameter(name), rtol=1e-9, atol=1e-9)


def test_without_memory_and_threshold_it_is_the_sign_of_the_gradient():
    net, (x, y) = conv_net(), images()
    opt = BinaryMSA(net, alpha=0.0, rho=0.0, anneal=1.0)
    for _ in range(3):
        opt.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        expected = torch.where(net[0].weight.grad <= 0, 1.0, -1.0)
        opt.step()
        assert torch.equal(net[0].weight.detach(), expected)


def test_the_average_is_exponential_and_its_weight_is_annealed_each_step():
    net, (x, y) = conv_net(), images()
    alpha, anneal, rho = 0.8, 0.5, 0.3
    opt = BinaryMSA(net, alpha=alpha, rho=rho, anneal=anneal)
    mean = torch.zeros_like(net[0].weight)
    for k in range(4):
        opt.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        share = (1 - alpha) * anneal**k
        mean = (1 - share) * mean - share * net[0].weight.grad
        expected = binary_rule(mean, net[0].weight.detach().clone(), rho)
        opt.step()
        assert torch.equal(net[0].weight.detach(), expected)


def test_a_scheduler_anneals_the_average_and_adam_together():
    net, (x, y) = conv_net(), images()
    opt = BinaryMSA(net, lr=1e-3, alpha=0.99)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.95)
    nn.functional.cross_entropy(net(x), y).backward()
    opt.step()
    scheduler.step()
    assert [group["lr"] for group in opt.param_groups] == pytest.approx([0.0095, 0.00095])


def test_eight_weights_find_the_global_minimum_that_brute_force_finds():
    """Least squares for weights ±1/√8: 256 candidates, several local minima for single flips."""
    every = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=8))) / 8**0.5
    found = 0
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(40, 8, generator=g)
        y = x @ torch.randn(8, generator=g) / 8**0.5
        layer = nn.Linear(8, 1, bias=False)
        opt = BinaryMSA(layer, alpha=0.9, anneal=0.97)
        best = torch.inf
        for _ in range(100):
            opt.zero_grad()
            loss = (layer(x)[:, 0] - y).square().mean()
            loss.backward()
            best = min(best, loss.item())
            opt.step()
        found += best <= float((x @ every.mT - y[:, None]).square().mean(0).min()) * (1 + 1e-5)
    assert found >= 8


def test_the_ternary_start_has_a_third_of_zeros_and_leaves_ternary_weights_alone():
    layer = nn.Linear(30, 40)
    TernaryMSA(layer)
    zeros = int((layer.weight == 0).sum())
    assert zeros == 400
    before = layer.weight.detach().clone()
    TernaryMSA(layer)
    assert torch.equal(layer.weight.detach(), before)


def test_a_price_on_weights_makes_them_sparse():
    x, y = images()
    shares = []
    for sparsity in (1e-7, 3e-2):
        net = conv_net()
        opt = TernaryMSA(net, lr=1e-2, alpha=0.9, sparsity=sparsity)
        for _ in range(30):
            opt.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            opt.step()
        shares.append(float((net[4].weight != 0).float().mean()))
    assert shares[1] < shares[0]


@BOTH
def test_without_normalisation_the_weights_are_the_alphabet_over_the_root_of_their_fan_in(kind):
    net, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(16, 9), nn.Tanh(), nn.Linear(9, 3)), images()
    opt = kind(net, lr=1e-2, alpha=0.9)
    losses = []
    for _ in range(20):
        opt.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    for layer, fan_in in ((net[1], 16), (net[3], 9)):
        allowed = torch.tensor(sorted(ALPHABET[kind])) / fan_in**0.5
        assert all(bool((allowed == w).any()) for w in layer.weight.unique())
    assert min(losses) < losses[0]


def test_only_the_weights_that_are_named_become_discrete():
    net = conv_net()
    before = net[0].weight.detach().clone()
    opt = BinaryMSA(net, discrete=["4.weight"])
    assert torch.equal(net[0].weight.detach(), before) and set(net[4].weight.unique().tolist()) == {-1.0, 1.0}
    assert len(opt.param_groups[0]["params"]) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": 1.0}, "alpha is 1.0"),
        ({"rho": -0.1}, "rho is -0.1"),
        ({"anneal": 1.1}, "factor of 1 − α"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"betas": (0.9, 1.0)}, "second beta"),
        ({"discrete": ["1.weight"]}, "no trainable weight"),
    ],
)
@BOTH
def test_bad_arguments_are_refused_by_name(kind, options, words):
    with pytest.raises(ArgumentError, match=words):
        kind(conv_net(), **options)


def test_a_model_without_affine_layers_is_refused():
    with pytest.raises(ArgumentError, match="nothing to make discrete"):
        BinaryMSA(nn.BatchNorm1d(3))


def test_a_gradient_that_is_not_finite_stops_the_step_before_anything_changed():
    net, (x, y) = conv_net(), images()
    opt = BinaryMSA(net)
    nn.functional.cross_entropy(net(x), y).backward()
    net[5].bias.grad[0] = torch.nan
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(DivergenceError, match="not finite"):
        opt.step()
    assert all(torch.equal(a, before[name]) for name, a in net.state_dict().items())


@pytest.mark.parametrize("kind", [BinaryMSA, TernaryMSA])
def test_a_warm_up_from_zero_decides_nothing_and_later_groups_go_to_adam(kind):
    torch.manual_seed(0)
    net, head = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), nn.Linear(8, 2)
    optimizer = kind(net)
    optimizer.add_param_group({"params": list(head.parameters()), "lr": 0.1})
    optimizer.param_groups[0]["lr"] = 0.0
    before, last = net[0].weight.clone(), head.weight.clone()
    head(net(torch.randn(6, 4))).square().mean().backward()
    optimizer.step()
    assert net[0].weight.equal(before)
    assert (head.weight - last).abs().max().item() == pytest.approx(0.1, rel=1e-3)
