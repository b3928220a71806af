"""CMSGD: a slow reference, the noise floor, and the contract."""

import pytest
import torch

from bolza.controllers import CMSGD, momentum_law, stationary_loss
from bolza.core.errors import ArgumentError
from bolza.testing import check_controller

F = torch.float64
SGD = torch.optim.SGD


def noisy_bowl(controller, optimizer, theta, curvature, steps):
    draw = torch.Generator().manual_seed(0)
    total, last = 0.0, steps // 5
    for k in range(steps):
        theta.grad = curvature * theta.detach() + torch.randn(theta.shape, generator=draw, dtype=theta.dtype)
        optimizer.step()
        controller.step()
        if k >= steps - last:
            total += float((curvature * theta.detach().square()).mean()) / 2 / last
    return total


def test_steps_are_those_of_the_law_written_down_entry_by_entry():
    theta = torch.full((30,), 3.0, dtype=F, requires_grad=True)
    optimizer = SGD([theta], lr=0.1, momentum=0.8)
    controller = CMSGD(optimizer, z=0.0)
    assert optimizer.param_groups[0]["momentum"] == 0
    x = theta.detach().clone()
    v, mu = torch.zeros_like(x), torch.full_like(x, 0.8)
    mg, mx, vg, vx, c = (torch.zeros_like(x) for _ in range(5))
    draw = torch.Generator().manual_seed(0)
    for k in range(1, 60):
        noise = torch.randn(30, generator=draw, dtype=F)
        theta.grad = 1.1 * theta.detach() + noise
        optimizer.step()
        controller.step()
        g, at = 1.1 * x + noise, x
        v = mu * v - 0.1 * g
        x = x + v
        w = (0.01 + 0.09 * torch.nan_to_num(mg**2 / (mg**2 + vg), nan=0.0)).clamp_min(1 / k)
        dg, dx = g - mg, at - mx
        mg, mx = mg + w * dg, mx + w * dx
        vg, vx, c = ((1 - w) * (s + w * d) for s, d in ((vg, dg * dg), (vx, dx * dx), (c, dg * dx)))
        if k > 2:
            a = c / vx
            mu = mu + w * (momentum_law(mg**2 / (2 * a), vg, 0.1, a).clamp(max=0.99) - mu)
    torch.testing.assert_close(theta.detach(), x, rtol=1e-9, atol=1e-11)
    assert controller.log()["mu"] == pytest.approx(float(mu.mean()), rel=1e-9)


@pytest.mark.parametrize("granularity", ["coordinate", "layer", "global"])
def test_the_noise_floor_is_that_without_momentum(granularity):
    curvature = torch.linspace(0.2, 2, 10, dtype=F).repeat(20)
    theta = torch.full((200,), 3.0, dtype=F, requires_grad=True)
    optimizer = SGD([theta], lr=0.05, momentum=0.9)
    found = noisy_bowl(CMSGD(optimizer, granularity=granularity), optimizer, theta, curvature, 700)
    floor, with_momentum = (
        float(stationary_loss(curvature, 1.0, 0.05, momentum=mu).mean()) for mu in (0, 0.9)
    )
    assert with_momentum > 8 * floor
    assert found < 1.6 * floor


def test_the_released_form_keeps_the_momentum_of_critical_damping():
    theta = torch.full((500,), 3.0, dtype=F, requires_grad=True)
    optimizer = SGD([theta], lr=0.01)
    controller = CMSGD(optimizer, form="released", z=0.0)
    noisy_bowl(controller, optimizer, theta, 0.25, 400)
    told = controller.log()["mu (damping only)"]
    assert 0.5 < told < 0.9  # 1 − 2√(aη) = 0.9 less what an estimate that is too steep takes


def test_it_keeps_the_contract_of_a_controller():
    check_controller(lambda optimizer: CMSGD(optimizer, granularity="layer", every=4))


def test_what_makes_no_sense_is_refused():
    theta = torch.ones(3, requires_grad=True)
    for options, words in (({"cap": 1.0}, "cap=1.0"), ({"momentum": -0.1}, "momentum=-0.1")):
        with pytest.raises(ArgumentError, match=words):
            CMSGD(SGD([theta], lr=0.1), **options)
    with pytest.raises(ArgumentError, match="nesterov"):
        CMSGD(SGD([theta], lr=0.1, momentum=0.9, nesterov=True))
