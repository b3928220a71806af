"""Descent of the local entropy."""

import math

import pytest
import torch
from torch import nn

from bolza.core.errors import ArgumentError, UnsupportedError
from bolza.optim import EntropySGD, langevin_step
from bolza.testing import check_optimizer

D = torch.float64


def descend(w, optimizer, steps, a=1.0):
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * a * w**2).sum().backward()
        optimizer.step()


def test_it_is_an_optimizer():
    check_optimizer(lambda params: EntropySGD(params))
    check_optimizer(
        lambda params: EntropySGD(params, lr=0.05, inner_steps=2, outer_momentum=0.9, weight_decay=1e-3)
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_without_a_chain_it_is_ordinary_descent(momentum):
    nets = []
    for ours in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(D)
        options = {"lr": 0.1, "momentum": momentum, "weight_decay": 1e-3}
        optimizer = (
            EntropySGD(net.parameters(), inner_steps=0, **options)
            if ours
            else torch.optim.SGD(net.parameters(), nesterov=momentum > 0, **options)
        )
        for _ in range(20):
            optimizer.zero_grad()
            net(torch.ones(2, 3, dtype=D)).square().mean().backward()
            optimizer.step()
        nets.append(net)
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-15)


def test_on_a_parabola_the_outer_step_is_the_gradient_of_the_local_entropy_over_gamma():
    """∇F = γ a/(γ + a) w for f = a w²/2, so that a long chain takes w to w γ/(γ + a)."""
    a, gamma, w0 = 2.0, 0.5, 3.0
    w = nn.Parameter(torch.tensor([w0], dtype=D))
    optimizer = EntropySGD([w], lr=0.1, inner_steps=200, gamma=gamma, momentum=0.0, noise=0.0)
    descend(w, optimizer, 200, a)
    assert w.item() == pytest.approx(w0 * gamma / (gamma + a), rel=1e-10)
    descend(w, optimizer, 200, a)  # the scope has grown by 1 + γ₁
    grown = gamma * 1.001
    assert w.item() == pytest.approx(w0 * gamma / (gamma + a) * grown / (grown + a), rel=1e-10)


def test_a_short_chain_is_the_recursion():
    a, gamma, lr, alpha = 1.5, 0.3, 0.1, 0.6
    w = nn.Parameter(torch.tensor([2.0], dtype=D))
    optimizer = EntropySGD(
        [w], lr=lr, inner_steps=3, gamma=gamma, momentum=0.9, noise=0.0, average=alpha, outer=0.5
    )
    descend(w, optimizer, 3, a)
    inner = mean = 2.0
    buffer = None
    for _ in range(3):
        g = a * inner
        buffer = g if buffer is None else 0.9 * buffer + g
        inner -= lr * (g + 0.9 * buffer + gamma * (inner - 2.0))
        mean = alpha * mean + (1 - alpha) * inner
    assert w.item() == pytest.approx(2.0 - 0.5 * (2.0 - mean), rel=1e-12)


def test_the_noise_of_the_chain_has_the_variance_of_its_own_law():
    """w′ ← (1 − η(a + γ)) w′ + ε √(2η) ξ about zero: variance 2ηε² (1 − ρ^2k)/(1 − ρ²) after k steps."""
    a, gamma, lr, noise, k, n = 1.0, 0.5, 0.2, 0.7, 12, 40_000
    w = nn.Parameter(torch.zeros(n, dtype=D))
    optimizer = EntropySGD([w], lr=lr, inner_steps=100, gamma=gamma, momentum=0.0, noise=noise)
    descend(w, optimizer, k, a)
    rho = 1 - lr * (a + gamma)
    exact = 2 * lr * noise**2 * (1 - rho ** (2 * k)) / (1 - rho**2)
    z = (float(w.detach().square().mean()) - exact) / (exact * math.sqrt(2 / n))
    assert abs(z) < 4
    neighbours = float((w.detach()[1:] * w.detach()[:-1]).mean()) / exact * math.sqrt(n)
    assert abs(neighbours) < 4


def test_the_noise_follows_the_seed_and_parameters_have_their_own():
    def run(seed, count=1):
        ws = [nn.Parameter(torch.zeros(50, dtype=D)) for _ in range(count)]
        optimizer = EntropySGD(ws, noise=1.0, seed=seed)
        sum((w**2).sum() for w in ws).backward()
        optimizer.step()
        return [w.detach() for w in ws]

    assert torch.equal(run(1)[0], run(1)[0]) and not torch.equal(run(1)[0], run(2)[0])
    first, second = run(1, 2)
    assert not torch.equal(first, second)


def test_at_center_shows_the_outer_iteration_and_puts_the_chain_back():
    w = nn.Parameter(torch.tensor([4.0], dtype=D))
    optimizer = EntropySGD([w], inner_steps=3)
    descend(w, optimizer, 2)
    inside = w.item()
    with optimizer.at_center():
        assert w.item() == 4.0
    assert w.item() == inside
    descend(w, optimizer, 1)
    after = w.item()
    with optimizer.at_center():  # the chain is complete: nothing to exchange
        assert w.item() == after


def test_outer_momentum_goes_further():
    ends = []
    for outer_momentum in (0.0, 0.9):
        w = nn.Parameter(torch.tensor([4.0], dtype=D))
        optimizer = EntropySGD(
            [w], inner_steps=2, outer=0.1, outer_momentum=outer_momentum, momentum=0.0, noise=0.0
        )
        descend(w, optimizer, 8)
        ends.append(w.item())
    assert 0 < ends[1] < ends[0] < 4


@pytest.mark.parametrize(
    "options", [{"lr": -1.0}, {"inner_steps": -1}, {"gamma": math.inf}, {"average": 1.0}, {"noise": -1.0}]
)
def test_arguments_that_make_no_sense_are_refused(options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        EntropySGD([nn.Parameter(torch.zeros(1))], **options)


def test_the_inner_step_is_a_gradient_step_on_the_loss_with_a_spring():
    w, inner = torch.randn(5, dtype=D), torch.randn(5, dtype=D, requires_grad=True)
    energy = inner.sin().sum() + 0.5 * 0.7 * (inner - w).square().sum()
    (slope,) = torch.autograd.grad(energy, inner)
    found = langevin_step(inner.detach(), inner.detach().cos(), w, 0.1, 0.7)
    torch.testing.assert_close(found, inner.detach() - 0.1 * slope)


def test_a_sparse_gradient_is_refused_by_name():
    table = nn.Embedding(4, 3, sparse=True)
    optimizer = EntropySGD(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(UnsupportedError, match="sparse=False"):
        optimizer.step()
