"""The rate below the limit of stability."""

import pytest
import torch
from torch import nn

from bolza.controllers.stability_limit import StabilityLimit, StabilityWarning
from bolza.core.errors import ArgumentError
from bolza.testing import check_controller


def test_the_limit_keeps_the_contract_of_controllers():
    check_controller(
        lambda optimizer, model, loss, data: StabilityLimit(
            optimizer, model, loss, (data.train_x, data.train_y), samples=16, max_products=4, warn=False
        ),
        takes_model=True,
        steps=4,
    )


def valley(lr, momentum=0.0, curvature=4.0):
    """f = ½(θ₁² + c θ₂²), whose limit is 2(1 + μ)/c."""
    net = nn.Linear(2, 1, bias=False).double()
    x = torch.diag(torch.tensor([1.0, curvature**0.5], dtype=torch.float64))
    return net, torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum), (x, x.new_zeros(2, 1))


def half_square(z, y):
    return (z - y).square().sum() / 2


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_rate_beyond_the_limit_is_lowered_to_a_share_of_it_and_a_stable_one_is_kept(momentum):
    limit = 2 * (1 + momentum) / 4
    for lr, expected in ((10.0, 0.5 * limit), (1e6, 0.5 * limit), (0.2, 0.2)):
        net, optimizer, data = valley(lr, momentum)
        StabilityLimit(optimizer, net, half_square, data, warn=False)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-6)


def test_it_warns_once_where_the_rate_is_lowered():
    net, optimizer, data = valley(10.0)
    with pytest.warns(StabilityWarning, match="20 times the limit") as seen:
        limit = StabilityLimit(optimizer, net, half_square, data, every=1)
        for _ in range(5):
            optimizer.zero_grad()
            half_square(net(data[0]), data[1]).backward()
            optimizer.step()
            limit.step()
    assert len(seen) == 1


def test_the_rate_follows_the_curvature_down_and_up_again():
    net, optimizer, data = valley(0.2)
    factor = [1.0]
    limit = StabilityLimit(
        optimizer, net, lambda z, y: factor[0] * half_square(z, y), data, every=1, warn=False
    )
    rates = []
    for factor[0] in (1.0, 9.0, 9.0, 1.0):
        with torch.no_grad():
            net.weight.mul_(0.9)
        rates.append(limit.step()["lr"][0])
    assert rates == pytest.approx([0.2, 1 / 36, 1 / 36, 0.2], rel=1e-6)


def test_descent_with_momentum_from_a_hopeless_rate_arrives():
    net, optimizer, data = valley(1e3, 0.9, curvature=100.0)
    limit = StabilityLimit(optimizer, net, half_square, data, warn=False)
    for _ in range(400):
        optimizer.zero_grad()
        half_square(net(data[0]), data[1]).backward()
        optimizer.step()
        limit.step()
    assert half_square(net(data[0]), data[1]).item() < 1e-6


def test_the_limit_of_adam_is_that_of_its_preconditioned_curvature():
    net, _, data = valley(1.0)
    optimizer = torch.optim.Adam(net.parameters(), lr=1.0)
    limit = StabilityLimit(optimizer, net, half_square, data, warn=False)
    optimizer.zero_grad()
    half_square(net(data[0]), data[1]).backward()
    optimizer.step()
    limit.step()
    root = optimizer.state[net.weight]["exp_avg_sq"].flatten().div(1 - 0.999).sqrt() + 1e-8
    steepest = float((torch.tensor([1.0, 4.0], dtype=torch.float64) / root).max())
    bound = 2 * 1.9 / (0.1 * steepest)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(min(1.0, 0.5 * bound), rel=1e-6)


@pytest.mark.parametrize("change", [{"safety": 0.0}, {"budget": 0.0}, {"every": 0}, {"samples": 0}])
def test_settings_that_make_no_sense_are_named(change):
    net, optimizer, data = valley(0.1)
    with pytest.raises(ArgumentError):
        StabilityLimit(optimizer, net, half_square, data, **change)
