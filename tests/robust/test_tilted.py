"""Tilted averages and losses: closed forms, identities, the stochastic and the hierarchical form."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bolza.core.errors import ArgumentError, DataError, DivergenceError, ShapeError
from bolza.robust import TiltedLoss, tilted_loss, tilted_mean

D = torch.float64


def draws(n, seed=0, scale=3.0):
    return scale * torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=D)


def test_two_losses_have_the_tilted_mean_of_the_formula_at_every_size_of_tilt():
    losses = torch.tensor([0.0, 1.0], dtype=D)
    for t in (-30.0, -1.0, -1e-3, 1e-3, 1.0, 30.0):
        assert math.isclose(float(tilted_mean(losses, t)), math.log((1 + math.exp(t)) / 2) / t, rel_tol=1e-10)


def test_small_tilts_give_mean_and_half_the_variance_without_losing_digits():
    losses = 1e3 + draws(1000)
    mean, variance = losses.mean(), losses.var(correction=0)
    for t in (1e-12, 1e-6, -1e-6):
        assert abs(float(tilted_mean(losses, t) - mean - 0.5 * t * variance)) < 1e-11 * 1e3
    single = losses.float()
    assert abs(float(tilted_mean(single, 1e-6)) - float(single.mean())) < 1e-3


def test_quadratic_losses_of_a_gaussian_have_the_closed_form_and_gaussian_losses_m_plus_t_v_over_2():
    nodes = torch.special.ndtri((torch.arange(200_000, dtype=D) + 0.5) / 200_000)
    assert abs(float(tilted_mean(2 + 0.7 * nodes, 0.9)) - (2 + 0.9 * 0.49 / 2)) < 1e-4
    t, s2, gap = 0.4, 0.5, 0.8
    found = float(tilted_mean(0.5 * (gap + s2**0.5 * nodes) ** 2, t))
    assert abs(found - (-math.log(1 - t * s2) / (2 * t) + gap**2 / (2 * (1 - t * s2)))) < 1e-4


def test_the_gradient_is_the_softmax_and_it_can_be_differentiated_again():
    losses = draws(6).requires_grad_()
    for t in (-40.0, -0.1, 1e-9, 0.1, 40.0):
        (slope,) = torch.autograd.grad(tilted_loss(losses, t), losses)
        assert torch.allclose(slope, torch.softmax(t * losses, 0), atol=1e-12)
    assert torch.autograd.gradgradcheck(lambda a: tilted_mean(a, 0.4), losses)


def test_weights_count_as_repeated_values_and_weight_zero_hides_even_infinite_ones():
    values = draws(3)
    repeated = values[torch.tensor([0, 1, 1, 1])]
    hidden = torch.cat([values, torch.tensor([math.inf], dtype=D)])
    for t in (-20.0, 0.0, 0.3, 20.0):
        weighted = tilted_mean(values[:2], t, weights=torch.tensor([1.0, 3.0]))
        assert torch.allclose(weighted, tilted_mean(repeated, t))
        seen = tilted_mean(hidden, t, weights=torch.tensor([1.0, 1, 1, 0]))
        assert torch.allclose(seen, tilted_mean(values, t))
    assert float(tilted_mean(hidden, math.inf, weights=torch.tensor([1.0, 1, 1, 0]))) == float(values.max())


def test_large_losses_and_tilts_stay_finite_in_float32_and_half_precision_is_computed_in_float32():
    losses = torch.tensor([1e4, 1e-3, 5e3])
    assert math.isclose(float(tilted_loss(losses, 100.0)), 1e4, rel_tol=1e-5)
    assert abs(float(tilted_loss(losses, -100.0)) - 1e-3 - math.log(3) / 100) < 1e-4
    assert tilted_mean(losses[1:].bfloat16(), 1.0).dtype == torch.float32


def test_groups_are_tilted_inside_and_between_as_two_nested_averages():
    losses, groups = draws(7), torch.tensor([4, 0, 4, 2, 2, 0, 4])
    inside = torch.stack([tilted_mean(losses[groups == g], -2.0) for g in (0, 2, 4)])
    by_size = tilted_loss(losses, 1.5, groups, within=-2.0)
    assert torch.allclose(by_size, tilted_mean(inside, 1.5, weights=torch.tensor([2.0, 2.0, 3.0])))
    equal = tilted_loss(losses, 1.5, groups, within=-2.0, group_weights="equal")
    assert torch.allclose(equal, tilted_mean(inside, 1.5))
    assert torch.allclose(tilted_loss(losses, 1.5, groups, within=1.5), tilted_loss(losses, 1.5))


def network():
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        return net, torch.randn(20, 4, dtype=D), torch.arange(20) % 3


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), lambda out, y: F.cross_entropy(out, y)])
def test_a_mean_loss_is_taken_apart_into_its_samples_whichever_way_it_is_written(loss):
    net, x, y = network()
    expected = tilted_loss(F.cross_entropy(net(x), y, reduction="none"), -1.5)
    assert torch.allclose(TiltedLoss(loss, -1.5)(net(x), y), expected)


def test_the_running_normaliser_weighs_the_batch_by_exp_of_its_excess_over_the_running_loss():
    net, x, y = network()
    t, lam = 2.0, 0.3
    criterion = TiltedLoss(F.cross_entropy, t, running=lam).double()
    criterion(net(x[:8]), y[:8])
    level = float(tilted_loss(F.cross_entropy(net(x[:8]), y[:8], reduction="none"), t).detach())
    losses = F.cross_entropy(net(x[8:]), y[8:], reduction="none")
    batch = float(tilted_loss(losses, t).detach())
    level = math.log((1 - lam) * math.exp(t * level) + lam * math.exp(t * batch)) / t
    value = criterion(net(x[8:]), y[8:])
    assert math.isclose(float(value.detach()), level, rel_tol=1e-9)
    found = torch.autograd.grad(value, list(net.parameters()))
    surrogate = (torch.exp(t * (losses.detach() - level)) * losses).mean()
    for a, b in zip(found, torch.autograd.grad(surrogate, list(net.parameters())), strict=True):
        assert torch.allclose(a, b)


def test_running_with_weight_one_is_the_batch_alone_with_groups_and_without():
    net, x, y = network()
    for groups in (0, 3):
        plain = TiltedLoss(F.cross_entropy, 1.2, groups=groups, within=0.5 if groups else 0.0)
        running = TiltedLoss(F.cross_entropy, 1.2, groups=groups, within=plain.within, running=1.0).double()
        for rows in (slice(0, 9), slice(9, 20)):
            args = (net(x[rows]), y[rows]) + ((y[rows],) if groups else ())
            a, b = plain(*args), running(*args)
            assert torch.allclose(a, b)
            ga, gb = (torch.autograd.grad(v, net[0].weight, retain_graph=True)[0] for v in (a, b))
            assert torch.allclose(ga, gb)


def test_a_group_that_is_missing_keeps_its_share_of_the_weight():
    out = torch.zeros(4, 1, dtype=D)
    criterion = TiltedLoss(lambda o, y: (o[:, 0] - y).abs(), 1.0, groups=3, running=0.5).double()
    criterion(out, torch.tensor([1.0, 2.0, 3.0, 3.0], dtype=D), torch.tensor([0, 1, 2, 2]))
    shifted = out[:2].clone().requires_grad_()
    criterion(shifted, torch.tensor([1.0, 1.0], dtype=D), torch.tensor([0, 0])).backward()
    share = torch.softmax(torch.tensor([1.0, 2.0, 3.0]), 0)[0]
    assert math.isclose(-float(shifted.grad.sum()), float(share), rel_tol=1e-6)


def test_the_state_saves_the_normaliser_and_the_annealing_and_evaluation_leaves_them_alone():
    net, x, y = network()
    one = TiltedLoss(F.cross_entropy, -2.0, running=0.5, anneal=4)
    assert one.tilt == 0
    for _ in range(3):
        one(net(x), y)
    assert one.tilt == -1.5
    two = TiltedLoss(F.cross_entropy, -2.0, running=0.5, anneal=4)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    assert torch.equal(one(net(x), y), two(net(x), y))
    one.eval()
    assert one.tilt == -2.0
    before = copy.deepcopy(one.state_dict())
    expected = tilted_loss(F.cross_entropy(net(x), y, reduction="none"), -2.0)
    assert torch.allclose(one(net(x), y), expected)
    assert all(torch.equal(before[k], v) for k, v in one.state_dict().items())


def test_a_tilt_that_leaves_the_weight_to_a_few_samples_warns_once():
    losses = torch.cat([torch.zeros(1), torch.full((63,), 5.0)])
    criterion = TiltedLoss(lambda out, y: out, -3.0)
    with pytest.warns(UserWarning, match="anneal="):
        criterion(losses, losses)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(losses, losses)
    with pytest.warns(UserWarning, match="larger batches"):
        TiltedLoss(lambda out, y: out, 3.0)(-losses, losses)


def test_mistakes_are_named():
    for make, words in (
        (lambda: TiltedLoss(F.mse_loss, math.nan), "t=nan"),
        (lambda: TiltedLoss(F.mse_loss, 1.0, running=2.0), "running=2.0"),
        (lambda: TiltedLoss(F.mse_loss, math.inf, anneal=5), "anneal=5"),
        (lambda: TiltedLoss(F.mse_loss, 1.0, within=1.0), "groups=0"),
        (lambda: TiltedLoss(None, 1.0), "loss is a NoneType"),
        (lambda: tilted_loss(draws(3), 1.0, within=2.0), "within=2.0"),
        (lambda: TiltedLoss(F.mse_loss, 1.0)(draws(3), draws(3), torch.zeros(3)), "without group"),
    ):
        with pytest.raises(ArgumentError, match=words):
            make()
    with pytest.raises(DivergenceError, match="sample 1 is inf"):
        tilted_loss(torch.tensor([0.0, math.inf]), 1.0)
    with pytest.raises(ShapeError, match="one number a sample"):
        tilted_loss(torch.zeros(2, 2), 1.0)
    with pytest.raises(DataError, match="between 0 and 1"):
        TiltedLoss(lambda o, y: o, 1.0, groups=2, running=0.5)(draws(2), draws(2), torch.tensor([0, 5]))
