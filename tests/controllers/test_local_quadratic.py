"""A network as SGD sees it: quadrature, noise, limits."""

import pytest
import torch
from torch import nn

from bolza.controllers.local_quadratic import LocalModel, local_model, pool_of
from bolza.core.errors import ArgumentError, DivergenceError
from bolza.data import Dataset
from bolza.sde import gradient_noise, mean_square_limit

F = torch.float64


def regression(d=12, n=64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=draw, dtype=F) * torch.logspace(0, -1, d, dtype=F)
    y = torch.randn(n, 1, generator=draw, dtype=F)
    net = nn.Linear(d, 1, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(torch.randn(1, d, generator=draw, dtype=F))
    return net, (x, y), nn.functional.mse_loss


def test_a_few_products_reproduce_as_many_steps_of_descent():
    net, (x, y), loss = regression()
    seen = local_model(net, loss, (x, y), products=8)  # blocks of two: four powers of the Hessian
    lr, start, losses = 0.1, net.weight.detach().clone(), [loss(net(x), y).item()]
    for _ in range(4):
        (slope,) = torch.autograd.grad(loss(net(x), y), [net.weight])
        with torch.no_grad():
            net.weight -= lr * slope
        losses.append(loss(net(x), y).item())
    net.weight.data = start
    depth = seen.slope.square() / seen.curvature / 2
    for n in range(5):
        fallen = (depth * (1 - (1 - lr * seen.curvature) ** (2 * n))).sum()
        assert losses[0] - losses[n] == pytest.approx(float(fallen), rel=1e-9, abs=1e-12)
    assert seen.loss == pytest.approx(losses[0])


def test_noise_of_two_halves_is_that_of_single_samples_on_average():
    net, (x, y), loss = regression(d=6, n=1024)
    exact = gradient_noise(net, loss, (x, y)).trace()
    draws = [local_model(net, loss, (x[i : i + 32], y[i : i + 32]), products=6) for i in range(0, 1024, 32)]
    totals = torch.stack([seen.noise.sum() for seen in draws])
    error = totals.std() / len(totals) ** 0.5
    assert abs(float(totals.mean()) - exact.value) < 4 * float(error)


def test_the_limit_in_mean_square_of_one_direction_is_exact():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(200, 1, generator=draw, dtype=F)
    net = nn.Linear(1, 1, bias=False).double()
    for batch_size, momentum in ((1, 0.0), (4, 0.0), (4, 0.9)):
        seen = local_model(
            net, nn.functional.mse_loss, (x, x), products=1, batch_size=batch_size, momentum=momentum
        )
        exact = mean_square_limit(2 * x[:, :, None] * x[:, None, :], batch_size=batch_size, momentum=momentum)
        assert seen.limit == pytest.approx(exact, rel=1e-6)


def test_a_preconditioner_and_weight_decay_are_part_of_the_quadratic():
    net, (x, y), loss = regression(d=4)
    scale, decay = torch.tensor([1.0, 0.5, 2.0, 0.0], dtype=F), torch.full((4,), 0.3, dtype=F)
    seen = local_model(net, loss, (x, y), products=4, scale=scale, decay=decay)
    hessian = 2 * x.T @ x / len(x) + 0.3 * torch.eye(4, dtype=F)
    exact = torch.linalg.eigvalsh(scale[:, None] * hessian * scale).flip(0)
    torch.testing.assert_close(seen.curvature, exact, atol=1e-9, rtol=1e-9)
    theta = net.weight.detach()[0]
    slope = scale * (2 * x.T @ (x @ theta - y[:, 0]) / len(x) + 0.3 * theta)
    assert float(seen.slope.norm()) == pytest.approx(float(slope.norm()))


def test_a_known_spread_saves_its_gradients():
    net, data, loss = regression()
    full = local_model(net, loss, data, products=4)
    saved = local_model(net, loss, data, products=4, spread=full.spread)
    assert full.sample_gradients - saved.sample_gradients == 3 * 64 and saved.sample_gradients == 9 * 64
    assert saved.limit == full.limit


def test_a_plan_keeps_the_rate_up_where_the_gradient_is_sure_and_anneals_where_there_is_only_noise():
    one = torch.ones(1, dtype=F)
    sure = LocalModel(one, 10 * one, one, 50.0, 32, 0.0, 2.0, 0)
    lost = LocalModel(one, 0.01 * one, one, 50.0, 32, 0.0, 2.0, 0)
    settings = {"steps": 100, "batch_size": 1, "lr_max": 0.5}
    assert sure.plan(**settings).rates[0] > 0.45
    assert lost.plan(**settings).rates[0] < 0.05


def test_a_way_down_that_slows_is_one_over_time():
    one = torch.tensor([10.0, 1.0], dtype=F)  # the gradient lies along the flatter one, as deep as the loss
    seen = LocalModel(one, torch.tensor([0.0, 2.0], dtype=F), torch.zeros(2, dtype=F), 2.0, 32, 0.0, 0.2, 1)
    plan = seen.plan(200, 8, 0.01, pieces=4, slowing=True)
    assert plan.rates.tolist() == pytest.approx([0.01] * 4)
    time = 2 * 0.01 * torch.arange(0, 201, 50, dtype=F)
    torch.testing.assert_close(plan.losses / plan.losses[0], 1 / (1 + time), rtol=0.05, atol=0)


def test_data_of_every_kind_become_one_pair():
    x, y = torch.arange(6.0)[:, None], torch.arange(6)
    assert pool_of((x, y), 2)[0] is x
    dataset = Dataset(x, y, x, y, "classification", num_classes=6)
    assert torch.equal(pool_of(dataset, 2)[1], y)
    batches = [(x[:2], y[:2]), (x[2:4], y[2:4]), (x[4:], y[4:])]
    assert torch.equal(pool_of(batches, 3)[0], x[:4])
    named = pool_of([({"a": x[:2]}, y[:2])] * 2, 4)[0]
    assert named["a"].shape == (4, 1)


def test_too_few_samples_and_infinite_gradients_are_named():
    net, (x, y), loss = regression()
    with pytest.raises(ArgumentError, match="3 samples"):
        local_model(net, loss, (x[:3], y[:3]))
    with torch.no_grad():
        net.weight.fill_(torch.inf)
    with pytest.raises(DivergenceError):
        local_model(net, loss, (x, y))
