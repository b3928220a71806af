import math

import pytest
import torch
from torch import nn

from bolza.core.errors import ArgumentError, UnsupportedError
from bolza.stability.limits import optimizer_limit

SETTINGS = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.7}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.7, "dampening": 0.3}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.7, "nesterov": True}),
]


def size_after(optimizer_class, settings, curvature, steps=1000):
    """|w| after gradient steps on ½ curvature w²."""
    w = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = optimizer_class([w], **settings)
    for _ in range(steps):
        w.grad = curvature * w.detach()
        optimizer.step()
        if not 1e-30 < float(w.detach().abs()) < 1e30:
            break
    return float(w.detach().abs())


@pytest.mark.parametrize(("optimizer_class", "settings"), SETTINGS)
def test_just_below_the_limit_an_optimizer_converges_and_just_above_it_diverges(optimizer_class, settings):
    w = nn.Parameter(torch.ones(1))
    bound = optimizer_limit(optimizer_class([w], **settings), [w]).bound
    assert size_after(optimizer_class, settings, 0.98 * bound) < 1e-3
    assert size_after(optimizer_class, settings, 1.02 * bound) > 1e3


def radius(momentum, pull):
    """Of v ← μv + pull·x, x ← x − v."""
    matrix = torch.tensor([[momentum, pull], [-momentum, 1 - pull]], dtype=torch.float64)
    return float(torch.linalg.eigvals(matrix).abs().max())


@pytest.mark.parametrize(
    "make",
    [
        lambda w: torch.optim.Adam(w, lr=0.02, betas=(0.8, 0.99), eps=1e-3),
        lambda w: torch.optim.AdamW(w, lr=0.02, amsgrad=True, weight_decay=0.0),
        lambda w: torch.optim.RMSprop(w, lr=0.02, centered=True),
    ],
)
def test_the_step_of_an_adaptive_method_is_the_one_it_makes_and_its_limit_that_of_the_linear_update(make):
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(3, dtype=torch.float64))
    optimizer = make([w])
    for _ in range(300):
        w.grad = torch.randn(3, dtype=torch.float64)
        optimizer.step()
    before = w.detach().clone()
    w.grad = torch.randn(3, dtype=torch.float64)
    optimizer.step()
    limit = optimizer_limit(optimizer, [w])
    step = limit.steps
    mu = limit.momentum
    direction = optimizer.state[w]["exp_avg"] / (1 - mu) if "exp_avg" in optimizer.state[w] else w.grad
    assert torch.allclose(before - w.detach(), step * direction, rtol=1e-9)
    assert not limit.plain and radius(mu, 0.999 * limit.limit) < 1 < radius(mu, 1.001 * limit.limit)
    assert limit.bound * limit.unit == limit.limit


def test_groups_with_rates_of_their_own_are_scaled():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))
    groups = [{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.4, "weight_decay": 0.5}]
    limit = optimizer_limit(torch.optim.SGD(groups, lr=1.0), [a, b])
    assert limit.limit == 2 and not limit.plain and limit.decay.tolist() == [0, 0, 0.5]
    assert torch.allclose(limit.steps, torch.tensor([0.1, 0.1, 0.4]))
    assert limit.bound == pytest.approx(5) and limit.lr == 0.4
    assert torch.allclose(limit.scale() ** 2, torch.tensor([0.25, 0.25, 1.0]))


def test_a_group_at_rest_does_not_hide_the_one_that_moves():
    a, b, c = (nn.Parameter(torch.ones(1)) for _ in range(3))
    groups = [{"params": [a], "lr": 0.0}, {"params": [b], "lr": 0.4}]
    limit = optimizer_limit(torch.optim.SGD(groups, lr=1.0), [a, b, c])
    assert limit.bound == pytest.approx(5) and torch.allclose(limit.scale(), torch.tensor([0.0, 1.0, 0.0]))


def test_dampening_without_momentum_is_not_used_as_in_the_optimizer():
    w = nn.Parameter(torch.ones(1))
    assert optimizer_limit(torch.optim.SGD([w], lr=0.1, dampening=0.5), [w]).bound == pytest.approx(20)


def test_updates_without_a_known_limit_are_refused_by_name():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))
    with pytest.raises(UnsupportedError, match="Adagrad is not known"):
        optimizer_limit(torch.optim.Adagrad([a]), [a])
    with pytest.raises(UnsupportedError, match="maximizes"):
        optimizer_limit(torch.optim.SGD([a], lr=0.1, maximize=True), [a])
    groups = [{"params": [a]}, {"params": [b], "momentum": 0.9}]
    with pytest.raises(UnsupportedError, match="different momenta"):
        optimizer_limit(torch.optim.SGD(groups, lr=0.1), [a, b])
    with pytest.raises(ArgumentError, match="no state yet"):
        optimizer_limit(torch.optim.Adam([a]), [a])
    assert optimizer_limit(torch.optim.SGD([a], lr=0.0), [a]).bound == math.inf
