"""Momentum with a derivative."""

import copy

import pytest
import torch
from torch import nn

from bolza.core.errors import ArgumentError, UnsupportedError
from bolza.optim import PIDSGD
from bolza.optim.pid import equivalent_lr
from bolza.testing import check_optimizer


def test_it_is_an_optimizer():
    check_optimizer(lambda params: PIDSGD(params, lr=0.01))
    check_optimizer(lambda params: PIDSGD(params, lr=0.01, derivative=0.0, weight_decay=1e-3))


@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_without_derivative_it_is_nesterov_s_momentum_and_without_both_plain_descent(momentum, decay):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    twin = copy.deepcopy(net)
    ours = PIDSGD(net.parameters(), 0.1, momentum, integral=momentum, derivative=0.0, weight_decay=decay)
    options = {"momentum": momentum, "nesterov": True} if momentum else {}
    theirs = torch.optim.SGD(twin.parameters(), 0.1, weight_decay=decay, **options)
    x, y = torch.randn(16, 4).double(), torch.randn(16, 2).double()
    for _ in range(30):
        for model, optimizer in ((net, ours), (twin, theirs)):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def course(derivative, steps=200, lr=0.01, integral=3.0):
    w = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = PIDSGD([w], lr, integral=integral, derivative=derivative)
    found = []
    for _ in range(steps):
        w.grad = w.detach().clone()
        optimizer.step()
        found.append(w.item())
    return found


def test_the_derivative_takes_the_overshoot_of_a_quadratic_away():
    overshoot = [-min(course(k)) for k in (0.0, 50.0, 100.0, 150.0)]
    assert overshoot == pytest.approx([0.351, 0.189, 0.080, 0.018], abs=2e-3)
    settled = [max(t for t, w in enumerate(course(k)) if abs(w) > 0.05) + 1 for k in (0.0, 150.0)]
    assert settled[0] > 2 * settled[1]


def test_the_course_is_that_of_its_own_recursion():
    """The three recursions written out, from a first step without derivative."""
    w, V, D, before, found = 1.0, 0.0, 0.0, None, []
    for _ in range(50):
        g = w
        V = 0.9 * V + g
        D = 0.9 * D + 0.1 * (g - (g if before is None else before))
        before = g
        w -= 0.01 * (g + 3 * V + 100 * D)
        found.append(w)
    assert course(100.0, 50) == pytest.approx(found, rel=1e-12)


def test_the_first_step_has_no_derivative():
    assert course(0.0, 1) == course(1000.0, 1)
    assert course(0.0, 2) != course(1000.0, 2)


def test_the_equivalent_rate_is_that_of_equal_steps_under_a_constant_gradient():
    moved = []
    for make in (
        lambda p: PIDSGD(p, 0.01, integral=3.0, derivative=100.0),
        lambda p: torch.optim.SGD(p, equivalent_lr(0.01, 0.9, 3.0), momentum=0.9),
    ):
        w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = make([w])
        for _ in range(300):
            before = w.item()
            w.grad = torch.ones(1, dtype=torch.float64)
            optimizer.step()
        moved.append(w.item() - before)
    assert moved[0] == pytest.approx(moved[1], rel=1e-10)


def test_bad_hyper_parameters_and_sparse_gradients_are_refused():
    w = [nn.Parameter(torch.zeros(1))]
    for bad in ({"lr": -1.0}, {"momentum": 1.0}, {"integral": float("inf")}, {"derivative": float("nan")}):
        with pytest.raises(ArgumentError, match=next(iter(bad))):
            PIDSGD(w, **bad)
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(UnsupportedError, match="sparse"):
        PIDSGD(table.parameters()).step()


def test_a_derivative_switched_on_late_sees_the_last_change_only():
    w = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = PIDSGD([w], lr=0.1, momentum=0.5, integral=0.0, derivative=0.0)
    for g in (5.0, 3.0):
        w.grad = torch.full_like(w, g)
        optimizer.step()
    optimizer.param_groups[0]["derivative"] = 2.0
    before = w.item()
    w.grad = torch.full_like(w, 2.0)
    optimizer.step()
    assert w.item() - before == pytest.approx(-0.1 * (2.0 + 2.0 * 0.5 * (2.0 - 3.0)))
