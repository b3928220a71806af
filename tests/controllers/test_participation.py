"""Participation: the surrogate, the costate, the baselines and the plan, to known numbers."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bolza.controllers import (
    Participation,
    active_share,
    exponential_retention,
    group_risks,
    minimax_plan,
    myopic_plan,
    plan_participation,
)
from bolza.core import CallableCost, System, adjoint, rollout
from bolza.core.errors import ArgumentError, DivergenceError, ShapeError

D = torch.float64
CENTRES = torch.tensor([0.0, 1.0], dtype=D)
SHARES = torch.tensor([0.9, 0.5], dtype=D)
GUESS = torch.tensor(0.3, dtype=D)


def risks(theta):
    return (theta - CENTRES) ** 2 + 0.05


def test_the_surrogate_comes_to_rest_at_its_closed_form():
    share, risk = torch.tensor([0.9, 0.1], dtype=D), torch.tensor([0.3, 1.2], dtype=D)
    move = exponential_retention(1.0, 0.3)
    for _ in range(400):
        share = move(share, risk)
    torch.testing.assert_close(share, active_share(risk))
    assert float(active_share(torch.tensor(0.3, dtype=D))) == pytest.approx(0.46164, abs=5e-6)


def test_costates_and_slopes_of_a_plan_are_those_of_autograd_through_all_rounds():
    plan = torch.linspace(0.1, 0.8, 6, dtype=D).requires_grad_()
    system = Participation(risks, [u.detach() for u in plan])
    assert isinstance(system, System)
    cost = CallableCost(
        terminal=lambda x: (1 - x).square().sum(),
        running=lambda t, x, u: (1 - x).square().sum() if t else 0.0,
    )
    swept = adjoint(system, cost, rollout(system, SHARES))
    start = SHARES.clone().requires_grad_()
    states = rollout(Participation(risks, list(plan)), start).states
    total = sum((1 - x).square().sum() for x in states[1:])
    slopes = torch.autograd.grad(total, [plan, start])
    torch.testing.assert_close(torch.stack(list(swept.gradients)), slopes[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(swept.costates[0], slopes[1], rtol=1e-12, atol=0)


def test_small_and_large_models_are_swept_to_the_same_plan(monkeypatch):
    plans = []
    for size in (0, 10**6):
        monkeypatch.setattr("bolza.controllers.participation._ONE_GRAPH", size)
        plans.append(
            plan_participation(risks, SHARES, GUESS, 5, starts=[[GUESS] * 5], iterations=4, discount=0.9)
        )
    assert plans[0].cost == pytest.approx(plans[1].cost, rel=1e-12)
    torch.testing.assert_close(torch.stack(plans[0].controls), torch.stack(plans[1].controls))


def test_known_costs_of_the_myopic_the_minimax_and_the_planned_course():
    myopic = myopic_plan(risks, SHARES, GUESS, 40)
    assert myopic.cost == pytest.approx(23.423, abs=5e-4)
    assert float(myopic.controls[-1]) == pytest.approx(0.352, abs=5e-4)
    assert myopic.shares[-1].tolist() == pytest.approx([0.613, 0.333], abs=5e-4)
    minimax = minimax_plan(risks, SHARES, GUESS, 40)
    assert minimax.cost == pytest.approx(22.7050, abs=1e-4)
    assert minimax.shares[-1].tolist() == pytest.approx([0.4616] * 2, abs=1e-4)
    plan = plan_participation(risks, SHARES, GUESS, 40, starts=[minimax.controls])
    assert plan.cost == pytest.approx(22.7028, abs=1e-4)
    assert float(plan.controls[0]) == pytest.approx(0.481, abs=5e-4)
    assert float(plan.controls[25]) == pytest.approx(0.5, abs=1e-3)
    assert plan.gradient_norm < 1e-5
    assert plan.risks.shape == (40, 2) and plan.shares.shape == (41, 2)


def test_where_risks_are_steep_the_best_plan_gives_a_group_up_and_a_floor_holds_it():
    steep = exponential_retention(3.0, 0.3)
    options = {"retention": steep, "iterations": 30}
    free = plan_participation(risks, SHARES, GUESS, 16, **options)
    assert free.cost <= min(free.compared.values())
    assert set(free.compared) == {"minimax", "myopic", "group 0", "group 1"}
    assert float(free.shares[-1].min()) < 0.03
    held = plan_participation(
        risks, SHARES, GUESS, 16, floor=0.15, floor_weight=300.0, starts=[[GUESS] * 16], **options
    )
    assert float(held.shares[8:].min()) > 0.13


def test_a_discount_weighs_the_first_rounds_and_one_round_is_planned_in_closed_form():
    share = torch.tensor([0.6, 0.6], dtype=D)
    plan = plan_participation(risks, share, GUESS, 1, starts=[[GUESS]])
    assert float(plan.controls[0]) == pytest.approx(0.5, abs=1e-5)
    twice = plan_participation(risks, share, GUESS, 2, starts=[[GUESS] * 2], discount=0.5)
    value = sum(0.5**t * float((1 - x).square().sum()) for t, x in enumerate(twice.shares[1:]))
    assert twice.cost == pytest.approx(value)


def test_networks_are_planned_without_being_changed_and_beat_the_myopic_course():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(40, 2, generator=draw, dtype=D)
    groups = [(x, (x[:, 0] > 0).long()), (x + 0.5, (x[:, 1] > 0).long())]
    net = nn.Sequential(nn.Linear(2, 2)).double()
    before = [p.detach().clone() for p in net.parameters()]
    each = group_risks(net, F.cross_entropy, groups)
    theta = dict(net.named_parameters())
    options = {"retention": exponential_retention(1.0, 0.3), "iterations": 12}
    myopic = myopic_plan(each, SHARES, theta, 4, **options)
    plan = plan_participation(each, SHARES, theta, 4, starts=[myopic.controls], **options)
    assert plan.cost < myopic.cost
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert set(plan.controls[0]) == set(theta)
    seen = []
    plan_participation(each, SHARES, theta, 1, starts=[[theta]], iterations=1, progress=seen.append)
    assert seen == [1.0]


def test_what_cannot_work_is_refused_by_name():
    for wrong, match in (
        ({"horizon": 0}, "horizon=0"),
        ({"discount": 0.0}, "discount=0"),
        ({"shares": torch.tensor([0.5, 1.5])}, "shares="),
        ({"theta": 3}, "no floating tensor"),
        ({"starts": [[GUESS]]}, "starts holds plans"),
    ):
        given = {"shares": SHARES, "theta": GUESS, "horizon": 3} | wrong
        with pytest.raises(ArgumentError, match=match):
            plan_participation(risks, given.pop("shares"), given.pop("theta"), given.pop("horizon"), **given)
    with pytest.raises(ArgumentError, match="arrival=2"):
        exponential_retention(1.0, 2.0)
    with pytest.raises(ArgumentError, match="controls is empty"):
        Participation(risks, [])
    with pytest.raises(ShapeError, match="one risk a group"):
        rollout(Participation(lambda theta: theta, [GUESS]), SHARES)
    with pytest.raises(DivergenceError, match="round 0"):
        rollout(Participation(lambda theta: risks(theta) * torch.nan, [GUESS]), SHARES)


@pytest.mark.parametrize("wrong", [{"floor": torch.ones(3)}, {"floor": float("nan")}, {"floor_weight": -1.0}])
def test_a_floor_that_makes_no_sense_is_refused_and_whole_shares_are_taken(wrong):
    def risks(theta):
        return (theta - torch.tensor([0.0, 1.0])) ** 2

    with pytest.raises(ArgumentError, match="floor"):
        plan_participation(risks, torch.tensor([1, 0]), torch.tensor(0.5), 1, **({"floor": 0.5} | wrong))
    whole, real = (
        myopic_plan(risks, shares, torch.tensor(0.5), 1, iterations=2)
        for shares in (torch.tensor([1, 0]), torch.tensor([1.0, 0.0]))
    )
    assert whole.cost == real.cost
