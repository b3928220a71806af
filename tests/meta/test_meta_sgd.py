"""Meta-SGD: the rates are controls of the training clock."""

import torch
from torch import nn

from bolza.meta import MAML, MetaSGD

D = torch.float64


def problem():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).to(D)
    return net, *((torch.randn(3, n, 2, dtype=D), torch.randn(3, n, 1, dtype=D)) for n in (4, 6))


def test_with_equal_rates_it_is_maml_and_the_rates_add_up_to_the_derivative_in_one_rate():
    net, support, query = problem()
    learner = MetaSGD(net, lr=0.2, steps=3)
    value = learner(support, query)
    value.backward()
    slopes = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    same = MAML(net, lr=0.2, steps=3)(support, query)
    same.backward()
    assert torch.allclose(value, same, rtol=1e-12)
    assert all(torch.allclose(a, p.grad, atol=1e-13) for a, p in zip(slopes, net.parameters(), strict=True))
    with torch.no_grad():
        ends = [float(MAML(net, lr=0.2 + h, steps=3)(support, query)) for h in (1e-6, -1e-6)]
    total = sum(float(rate.grad.sum()) for rate in learner.rates)
    assert abs(total - (ends[0] - ends[1]) / 2e-6) < 1e-7


def test_the_sweep_and_the_graph_give_the_rates_one_gradient():
    net, support, query = problem()
    found = []
    for checkpointed in (False, True):
        learner = MetaSGD(net, lr=0.2, steps=4, checkpointed=checkpointed)
        learner(support, query).backward()
        found.append([rate.grad for rate in learner.rates])
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-14) for a, b in zip(*found, strict=True))
    learner = MetaSGD(net, lr=0.2, steps=4, first_order=True)
    learner(support, query).backward()
    assert all(bool(rate.grad.abs().max() > 0) for rate in learner.rates)


def test_one_step_on_a_quadratic_learns_the_rate_that_solves_it():
    net = nn.Linear(1, 1, bias=False).to(D)
    learner = MetaSGD(net, lr=0.1)
    outer = torch.optim.SGD(learner.parameters(), lr=0.05)
    x, slopes = torch.ones(4, 3, 1, dtype=D), torch.tensor([-2.0, -1.0, 1.0, 2.0], dtype=D).reshape(4, 1, 1)
    tasks = x, slopes * x
    for _ in range(80):
        outer.zero_grad()
        learner(tasks, tasks).backward()
        outer.step()
    assert abs(learner.rates[0].item() - 0.5) < 1e-3  # ℓ = (w − c)²: w − α 2(w − c) = c
    assert len(learner.state_dict()) == 2
