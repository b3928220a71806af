"""Networks with Gaussian weights: their gradients, their divergence, and that they take any layer."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from bolza.bayes import MeanField, StochasticControl, gradient_moments, predict
from bolza.bayes.stochastic_control import optimal_control
from bolza.core.errors import ArgumentError, UnsupportedError
from bolza.testing import check_optimizer

F = torch.float64


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.inner(x)[0][:, -1])


NETS = {
    "convolution and batch norm": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)
        ),
        (5, 1, 4, 4),
    ),
    "attention and layer norm": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), nn.Flatten()
        ),
        (5, 2, 4),
    ),
    "recurrent": (Recurrent, (5, 6, 3)),
}


@pytest.mark.parametrize("name", NETS)
def test_any_network_is_drawn_trained_sampled_and_left_as_it_was(name):
    make, shape = NETS[name]
    torch.manual_seed(0)
    model, x = make(), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    before = copy.deepcopy(model.state_dict())
    net = MeanField(model, generator=torch.Generator().manual_seed(2))
    assert not torch.equal(net(x), net(x))
    (net(x).square().mean() + net.kl() / 100).backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in net.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    net.eval()
    assert torch.equal(net(x), net.module.eval()(x))
    found = predict(net.module, net.sample(3), x, kind="regression")
    assert found.mean.shape == net(x).shape and float(found.spread.min()) > 0


def test_the_divergence_is_that_of_torch():
    net = MeanField(nn.Linear(3, 2).double(), prior_precision=4.0, scale=0.3)
    exact = sum(
        kl_divergence(Normal(m, s), Normal(torch.zeros_like(m), 0.5)).sum()
        for m, s in zip(net.means().values(), net.scales().values(), strict=True)
    )
    torch.testing.assert_close(net.kl(), exact)
    assert all(torch.allclose(s, torch.tensor(0.3, dtype=F)) for s in net.scales().values())


def test_the_moments_are_those_of_the_closed_form_and_of_draws():
    found = gradient_moments(2.0, 0.7, 0.4, 0.3)
    numbers = (found.mean, found.mean_variance, found.scale, found.scale_variance)
    assert [float(v) for v in numbers] == pytest.approx([1.4, 1.0, 0.8, 3.6])
    e, b = torch.randn(2, 400_000, dtype=F, generator=torch.Generator().manual_seed(0))
    g = 2.0 * (0.7 + 0.4 * e - 0.3 * b)
    seen = (g.mean(), g.var(), (g * e).mean(), (g * e).var())
    assert [float(v) for v in seen] == pytest.approx([1.4, 1.0, 0.8, 3.6], rel=0.015)
    limit = gradient_moments(2.0, 0.0, 0.0, 0.3)
    assert float(limit.mean_variance) == float(limit.mean_data) == pytest.approx(0.36)
    assert float(limit.scale_variance) == float(limit.scale_data)


def test_frozen_weights_stay_numbers_and_names_choose():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].weight.requires_grad_(False)
    assert MeanField(model).names == ["0.bias", "1.weight", "1.bias"]
    net = MeanField(model, names=["1.weight"])
    groups = net.groups()
    assert [g["name"] for g in groups] == ["mean", "scale", "rest"] and len(groups[2]["params"]) == 2
    for settings, word in (
        ({"names": ["2.weight"]}, "names"),
        ({"scale": 0.0}, "scale"),
        ({"prior_precision": math.inf}, "prior_precision"),
    ):
        with pytest.raises(ArgumentError, match=word):
            MeanField(model, **settings)
    with pytest.raises(ArgumentError, match="draws"):
        net.sample(0)


def test_the_last_drawn_weights_are_known_by_their_mean():
    net = MeanField(nn.Linear(2, 1, bias=False), scale=0.5)
    assert net.drawn(net.module.weight) is None
    x = torch.eye(2)
    out = net(x)
    torch.testing.assert_close(net.drawn(net.module.weight), out.detach().mT)
    assert net.drawn(net.rho[0]) is None
    assert net.drawn(copy.deepcopy(net).module.weight) is None


def test_control_stands_where_an_optimizer_stands():
    check_optimizer(lambda p: StochasticControl(p, lr=0.1))


def test_the_control_is_the_formula_with_its_limits():
    slope, noise, a = (
        torch.tensor([2.0, 2.0, 0.0, 2.0], dtype=F),
        torch.tensor([0.0, 12.0, 1.0, 1.0], dtype=F),
        4.0,
    )
    curvature = torch.tensor([a, a, a, -a], dtype=F)
    # 1/(aη) without noise, a quarter of it with three times the slope's square, 0 at rest, 1 where the loss bends down
    torch.testing.assert_close(
        optimal_control(slope, noise, curvature, 0.5), torch.tensor([0.5, 0.125, 0.0, 1.0], dtype=F)
    )


@pytest.mark.parametrize("lr", [0.5, 1.9])
def test_control_anneals_where_sgd_keeps_its_floor(lr):
    draw = torch.Generator().manual_seed(0)
    theta = torch.full((300,), 3.0, requires_grad=True)
    optimizer = StochasticControl([theta], lr=lr)
    for _ in range(500):
        theta.grad = theta.detach() + torch.randn(300, generator=draw)
        optimizer.step()
    floor = lr / (2 * (2 - lr))  # half the variance of SGD at rest
    assert float(theta.detach().square().mean() / 2) < 0.2 * floor
    assert optimizer.log()["0"] < 0.3


def test_drawn_weights_tell_the_curvature_where_the_mean_rests():
    draw = torch.Generator().manual_seed(0)
    net = MeanField(nn.Linear(1, 200, bias=False).double(), scale=0.5, generator=draw)
    nn.init.zeros_(net.module.weight)
    optimizer = StochasticControl([net.module.weight], lr=1e-4, drawn=net.drawn)  # it hardly moves
    one = torch.ones(1, 1, dtype=F)
    for _ in range(100):
        optimizer.zero_grad()
        noise = torch.randn(1, 200, dtype=F, generator=draw)
        out = net(one)
        (3.0 * out.square() / 2 + 0.3 * noise * out).sum().backward()
        optimizer.step()
    state = optimizer.state[net.module.weight]
    assert float((state["cov"] / state["var_x"]).mean()) == pytest.approx(3.0, rel=0.01)


def test_settings_that_make_no_sense_are_named():
    w = nn.Parameter(torch.zeros(2))
    for settings, word in (
        ({"beta": (0.9, 0.5)}, "beta"),
        ({"u0": 0.0}, "u0"),
        ({"lr": -1.0}, "lr"),
        ({"z": -1}, "z"),
    ):
        with pytest.raises(ArgumentError, match=word):
            StochasticControl([w], **settings)
    table = nn.Embedding(3, 2, sparse=True)
    table(torch.tensor([0])).sum().backward()
    with pytest.raises(UnsupportedError, match="sparse"):
        StochasticControl(table.parameters()).step()
