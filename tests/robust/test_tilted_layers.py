"""Tilted layers: the posterior of templates, what they do not depend on, and whom the reward reaches."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bolza.core.errors import ArgumentError, UnsupportedError
from bolza.robust import (
    TiltedConv1d,
    TiltedConv2d,
    TiltedLinear,
    competition,
    tilted_mean,
    with_tilted_reward,
)

D = torch.float64


def normal(*shape, seed=0, dtype=D):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_templates_in_white_noise_get_their_posterior():
    templates = F.normalize(normal(5, 9), dim=1)
    amplitude, sigma = 1.3, 0.6
    x = amplitude * templates[torch.arange(12) % 5] + sigma * normal(12, 9, seed=1)
    layer = TiltedLinear(9, 5, tilt=amplitude / sigma**2, dtype=D)
    with torch.no_grad():
        layer.weight.copy_(1e3 * templates)
    likelihood = -(x[:, None] - amplitude * templates).square().sum(-1) / (2 * sigma**2)
    assert torch.allclose(layer(x), torch.softmax(likelihood, 1), atol=1e-7)


def test_the_limits_of_the_tilt_are_equal_shares_and_one_winner():
    a = normal(3, 4, 5)
    assert torch.allclose(competition(a, 0.0, None), torch.full_like(a, 0.25))
    winners = competition(a, 1e5, None)
    assert torch.equal(winners.argmax(1), a.argmax(1)) and torch.allclose(
        winners.amax(1), torch.ones(3, 5, dtype=D)
    )
    assert bool(competition(1e30 * a.float(), 1.0).isfinite().all())


def test_the_threshold_is_that_of_one_sample_and_filter_over_its_places():
    a = normal(2, 3, 4, 4)
    p, y = competition(a, 2.0, None), competition(a, 2.0, 0.5)
    for i in range(2):
        for k in range(3):
            kept = p[i, k] > p[i, k].mean() + 0.5 * p[i, k].std()
            assert torch.equal(y[i, k], p[i, k] * kept)
    last = competition(a.flatten(2).mT, 2.0, 0.5, dim=-1)
    assert torch.allclose(last.mT.reshape(2, 3, 4, 4), y)
    one = a[..., :1, :1]
    assert torch.equal(competition(one, 2.0, 0.5), competition(one, 2.0, None))


@pytest.mark.parametrize(
    "layer, x",
    [
        (TiltedConv2d(2, 5, 3, padding=1, stride=2, dtype=D), normal(3, 2, 8, 8)),
        (TiltedConv1d(2, 5, 3, dtype=D), normal(3, 2, 9)),
        (TiltedLinear(4, 5, dtype=D), normal(3, 7, 4)),
    ],
)
def test_layers_ignore_the_length_of_filters_and_the_rest_of_the_batch(layer, x):
    y = layer(x)
    assert torch.allclose(layer(x[1:2]), y[1:2], atol=1e-12)
    with torch.no_grad():
        layer.weight *= 1 + 5 * torch.rand(5, *[1] * (layer.weight.ndim - 1), dtype=D)
    assert torch.allclose(layer(x), y, atol=1e-4)
    assert layer.bias is None and set(layer.state_dict()) == {"weight"}
    assert "tilt=" in repr(layer)
    copy.deepcopy(layer)


def test_the_reward_is_the_tilted_mean_over_filters_and_balancing_takes_the_mean_away():
    layer, x = TiltedConv2d(1, 4, 3, dtype=D), normal(2, 1, 6, 6)
    a = F.conv2d(x, layer.weight) / (layer.weight.flatten(1).norm(dim=1) + 1e-6)[:, None, None]
    assert torch.allclose(layer.reward(x), tilted_mean(a, 10 / 3, 1).mean())
    layer.balanced = True
    assert torch.allclose(layer.reward(x), tilted_mean(a - a.mean(1, keepdim=True), 10 / 3, 1).mean())
    assert torch.allclose(layer(x), competition(a, 1 / 3))


def test_the_reward_of_a_layer_reaches_its_own_weights_only():
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), TiltedConv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2), TiltedLinear(2, 3)
    )
    x = normal(5, 1, 8, 8, dtype=torch.float32)
    output, reward = with_tilted_reward(net, x)
    assert torch.equal(output, net(x))
    reward.backward()
    assert net[0].weight.grad is None and net[3].weight.grad is None
    assert net[1].weight.grad.norm() > 0 and net[4].weight.grad.norm() > 0
    assert not any(layer._forward_pre_hooks for layer in net.modules())


def test_descent_of_the_loss_less_the_reward_raises_the_reward():
    net, x = nn.Sequential(TiltedLinear(4, 6), nn.Linear(6, 3)), normal(40, 4, dtype=torch.float32)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    rewards = []
    for _ in range(30):
        optimizer.zero_grad()
        output, reward = with_tilted_reward(net, x)
        (F.cross_entropy(output, torch.arange(40) % 3) - reward).backward()
        optimizer.step()
        rewards.append(float(reward.detach()))
    assert rewards[-1] > rewards[0]


def test_mistakes_are_named():
    with pytest.raises(UnsupportedError, match="no tilted layer"):
        with_tilted_reward(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(ArgumentError, match="bias=True"):
        TiltedConv2d(1, 2, 3, bias=True)
    with pytest.raises(ArgumentError, match="tilt=-1"):
        TiltedLinear(2, 2, tilt=-1.0)
    with pytest.raises(ArgumentError, match="dim=2"):
        competition(torch.zeros(2, 2, 2), 1.0, dim=2)
