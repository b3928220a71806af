"""Adam as an update rule."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from bolza.core import CallableCost, adjoint, rollout
from bolza.systems import Adam, TrainingSystem, UpdateRule

F64 = torch.float64


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def batches(count):
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 3, dtype=F64, generator=g), torch.randint(2, (8,), generator=g)) for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("decoupled", "amsgrad", "weight_decay", "maximize"),
    list(product((False, True), (False, True), (0.0, 0.1), (False, True))),
)
def test_twenty_steps_are_those_of_torch_under_all_options(decoupled, amsgrad, weight_decay, maximize):
    net, data = network(), batches(20)
    options = {
        "lr": 0.05,
        "betas": (0.8, 0.95),
        "weight_decay": weight_decay,
        "amsgrad": amsgrad,
        "maximize": maximize,
    }
    system = TrainingSystem.from_module(net, cross_entropy, data, Adam(decoupled=decoupled, **options))
    with torch.no_grad():
        run = rollout(system, system.initial_state(dict(net.named_parameters())))
    optimizer = (torch.optim.AdamW if decoupled else torch.optim.Adam)(net.parameters(), **options)
    for x, y in data:
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        optimizer.step()
    assert_close(run.states[-1]["params"], dict(net.named_parameters()), rtol=0, atol=1e-12)


def test_a_parameter_without_gradient_moves_by_nothing_and_has_finite_derivatives():
    system = TrainingSystem(lambda w, _: w[0].square(), [None] * 3, Adam(lr=0.1))
    cost = CallableCost(terminal=lambda x: x["params"].square().sum())
    run = adjoint(system, cost, rollout(system, system.initial_state(torch.ones(2, dtype=F64))))
    assert run.states[-1]["params"][1] == 1
    assert all(torch.isfinite(u["lr"]) and torch.isfinite(u["beta2"]) for u in run.gradients)
    assert torch.isfinite(run.costates[0]["params"]).all()


def test_controls_may_be_trees_and_are_taken_step_by_step():
    net, data = network(), batches(3)
    names = dict(net.named_parameters())
    plain = TrainingSystem.from_module(net, cross_entropy, data, Adam(lr=0.05))
    tree = TrainingSystem.from_module(
        net, cross_entropy, data, Adam(lr=dict.fromkeys(names, torch.tensor(0.05, dtype=F64)))
    )
    start = plain.initial_state(names)
    assert_close(rollout(tree, start).states[-1], rollout(plain, start).states[-1], rtol=0, atol=1e-15)
    still = rollout(plain, start, [{"lr": torch.zeros(())}] * 3)
    assert_close(still.states[-1]["params"], start["params"], rtol=0, atol=0)


def test_single_precision_stays_single_and_it_is_a_rule():
    net = network().float()
    data = [(x.float(), y) for x, y in batches(1)]
    system = TrainingSystem.from_module(net, cross_entropy, data, Adam())
    state = rollout(system, system.initial_state(dict(net.named_parameters()))).states[-1]
    assert {leaf.dtype for leaf in state["exp_avg_sq"].values()} == {torch.float32}
    assert isinstance(Adam(), UpdateRule)
