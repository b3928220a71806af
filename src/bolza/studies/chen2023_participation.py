r"""Who stays under a model that is fitted again every round, and under one that is planned.

    λ_{t+1,k} = M(λ_{t,k}, ℓ_k(θ_t)),      J = Σ_t Σ_k (1 − λ_{t,k})²

Two groups that want different models. The learner that fits whoever is there drives the smaller one out; the minimax
model holds both; the plan of the maximum principle starts between the two and goes over to it. Where risks are steep
the cheapest plan gives a group up, unless a floor says otherwise. Then two groups of digits and a network.

Reference: Chen, Li & Zhang (2023), arXiv:2311.10223.

Departures: the surrogate for retention is ours, the paper's simulator is not at hand; digits in place of its data.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.controllers.participation import CHEN as REFERENCE
from bolza.controllers.participation import (
    Participation,
    ParticipationPlan,
    active_share,
    exponential_retention,
    group_risks,
    minimax_plan,
    myopic_plan,
    plan_participation,
)
from bolza.core import CallableCost, adjoint, rollout
from bolza.data import digits
from bolza.report import Figure, role
from bolza.studies._study import Progress, Row, Scale, StudyResult, mean_error

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "chen2023_participation"
TITLE = "Participation under planned models"
CLAIM = "A sequence of models planned by the maximum principle keeps groups that a myopic learner drives out"

D = torch.float64
CENTRES = torch.tensor([0.0, 1.0], dtype=D)
SHARES = torch.tensor([0.9, 0.5], dtype=D)
GUESS = torch.tensor(0.3, dtype=D)
ROUNDS = 40


@dataclass(frozen=True)
class Budget:
    """Size of the part with networks, and of the searches."""

    seeds: int = 3
    rounds: int = 8
    samples: int = 120
    iterations: int = 25
    searches: int = 60


BUDGETS = {"small": Budget(), "full": Budget(seeds=8, rounds=12, samples=200, iterations=40, searches=120)}


def risks(theta: Tensor) -> Tensor:
    """Two groups with the best models 0 and 1."""
    return (theta - CENTRES) ** 2 + 0.05


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Compare myopic, minimax and planned models on two quadratic groups and on two groups of digits.

    Args:
        scale: ``"small"``: some ten seconds on one core; ``"full"``: longer horizons and more seeds.
        progress: called with the share done and a few words.

    Returns:
        The rows, a figure, and the numbers.

    Example:
        >>> from bolza.studies import get
        >>> get("chen2023_participation").reference.year
        2023
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    report(0.0, "two quadratic groups")
    gentle = courses(1.0, budget)
    rows = exact_rows() + gentle_rows(gentle)
    report(0.3, "steep risks")
    steep = courses(3.0, budget)
    held = plan_participation(
        risks,
        SHARES,
        GUESS,
        ROUNDS,
        retention=exponential_retention(3.0),
        floor=0.15,
        floor_weight=300.0,
        iterations=budget.searches,
        starts=[steep["minimax"].controls],
    )
    rows += steep_rows(steep, held)
    trials = []
    for seed in range(budget.seeds):
        report(0.6 + 0.4 * seed / budget.seeds, f"digits, seed {seed}")
        trials.append(trial(seed, budget))
    rows += digit_rows(trials)
    notes = (
        "Quadratic groups: risks (θ − m)² + 0.05 with m = 0 and 1, shares 0.9 and 0.5 at first, b = 0.3, 40 rounds; "
        "gentle: a = 1, steep: a = 3. Expected numbers are of earlier runs of ours.",
        "Digits: one group sees them upright, the other turned by a quarter; a softmax layer serves both; "
        f"{budget.rounds} rounds, a = 0.5. Errors are over seeds.",
    )
    facts = {
        "gentle": {name: plan.cost for name, plan in gentle.items()},
        "steep": {name: plan.cost for name, plan in steep.items()},
        "digits": [{name: plan.cost for name, plan in t.items()} for t in trials],
    }
    report(1.0, "done")
    figure = _figure(gentle, steep, held, trials)
    return StudyResult(KEY, TITLE, REFERENCE, CLAIM, scale, rows, (figure,), notes, facts)


def courses(rate: float, budget: Budget) -> dict[str, ParticipationPlan]:
    """The myopic, the minimax and the planned course of the quadratic groups."""
    move = exponential_retention(rate)
    myopic = myopic_plan(risks, SHARES, GUESS, ROUNDS, retention=move)
    minimax = minimax_plan(risks, SHARES, GUESS, ROUNDS, retention=move)
    starts = [minimax.controls] if rate == 1.0 else [minimax.controls, myopic.controls]
    planned = plan_participation(
        risks, SHARES, GUESS, ROUNDS, retention=move, iterations=budget.searches, starts=starts
    )
    return {"myopic": myopic, "minimax": minimax, "planned": planned}


def exact_rows() -> list[Row]:
    """Costate against autograd, and the resting share."""
    plan = torch.linspace(0.1, 0.8, 12, dtype=D).requires_grad_()

    def stage(x: Tensor) -> Tensor:
        return (1 - x).square().sum()

    cost = CallableCost(terminal=stage, running=lambda t, x, u: stage(x) if t else 0.0)
    system = Participation(risks, [u.detach() for u in plan])
    swept = adjoint(system, cost, rollout(system, SHARES))
    assert swept.gradients is not None
    states = rollout(Participation(risks, list(plan)), SHARES).states
    (exact,) = torch.autograd.grad(torch.stack([stage(x) for x in states[1:]]).sum(), plan)
    error = float((torch.stack(list(swept.gradients)) - exact).norm() / exact.norm())
    rest = float(active_share(torch.tensor(0.3, dtype=D)))
    return [
        Row("slopes from the costate against autograd, relative error", 0.0, error, 1e-6, error < 1e-6),
        Row("resting share at the minimax model", 0.46164, rest, 1e-5, abs(rest - 0.46164) < 1e-5),
    ]


def near(claim: str, expected: float, measured: float) -> Row:
    """A number to one percent."""
    return Row(claim, expected, measured, None, abs(measured - expected) <= 0.01 * expected, "to 1 %")


def gentle_rows(found: dict[str, ParticipationPlan]) -> list[Row]:
    """Costs and ends of the three courses."""
    myopic, minimax, planned = (found[name] for name in ("myopic", "minimax", "planned"))
    return [
        near("myopic: cost", 23.423, myopic.cost),
        near("myopic: last model", 0.352, float(myopic.controls[-1])),
        near("myopic: last share of the first group", 0.613, float(myopic.shares[-1, 0])),
        near("myopic: last share of the second group", 0.333, float(myopic.shares[-1, 1])),
        Row(
            "minimax: cost",
            22.7050,
            minimax.cost,
            1e-4,
            abs(minimax.cost - 22.7050) < 2e-4,
            "to the last digit",
        ),
        Row(
            "planned: cost",
            22.7028,
            planned.cost,
            1e-4,
            abs(planned.cost - 22.7028) < 2e-4,
            "to the last digit",
        ),
        near("planned: first model", 0.481, float(planned.controls[0])),
        near("planned: model after 30 rounds", 0.5, float(planned.controls[30])),
        Row(
            "planned costs at most as much as myopic and minimax",
            "≤ 0",
            planned.cost - min(myopic.cost, minimax.cost),
            None,
            planned.cost <= min(myopic.cost, minimax.cost),
        ),
    ]


def steep_rows(found: dict[str, ParticipationPlan], held: ParticipationPlan) -> list[Row]:
    """The plan that gives a group up, and the floor."""
    planned, low = found["planned"], float(held.shares[20:].min())
    return [
        near("steep risks, planned: last share of the first group", 0.632, float(planned.shares[-1, 0])),
        Row(
            "steep risks, planned: last share of the second group, which is given up",
            0.022,
            float(planned.shares[-1, 1]),
            5e-4,
            abs(float(planned.shares[-1, 1]) - 0.022) < 5e-4,
            "to the digits of the earlier number",
        ),
        Row(
            "steep risks: the cheapest plan costs less than minimax",
            "< 1",
            planned.cost / found["minimax"].cost,
            None,
            planned.cost < found["minimax"].cost,
            "total cost alone does not protect a group",
        ),
        Row(
            "steep risks, a floor of 0.15: least share after 20 rounds",
            "≥ 0.14",
            low,
            None,
            low >= 0.14,
            "the floor is a cost, not a wall",
        ),
    ]


def groups(seed: int, samples: int) -> list[tuple[Tensor, Tensor]]:
    """Two groups of digits: upright, and turned by a quarter."""
    data = digits().to(dtype=D)
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[: 2 * samples]
    x, y = data.train_x[rows].reshape(-1, 8, 8), data.train_y[rows]
    turned = torch.rot90(x[samples:], 1, (1, 2))
    return [(x[:samples].flatten(1), y[:samples]), (turned.flatten(1), y[samples:])]


def trial(seed: int, budget: Budget) -> dict[str, ParticipationPlan]:
    """The three courses for a softmax layer that serves two groups of digits."""
    net = nn.Linear(64, 10).to(D)
    each = group_risks(net, F.cross_entropy, groups(seed, budget.samples))

    def regularised(theta: dict[str, Tensor]) -> Tensor:
        size = torch.stack([value.square().sum() for value in theta.values()]).sum()
        return each(theta) + 0.01 * size

    options: dict[str, Any] = {
        "retention": exponential_retention(0.5, 0.3),
        "iterations": budget.iterations,
    }
    theta = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    shares = torch.tensor([0.9, 0.3], dtype=D)
    myopic = myopic_plan(regularised, shares, theta, budget.rounds, **options)
    minimax = minimax_plan(regularised, shares, theta, budget.rounds, **options)
    starts = [myopic.controls, minimax.controls]
    planned = plan_participation(regularised, shares, theta, budget.rounds, starts=starts, **options)
    return {"myopic": myopic, "minimax": minimax, "planned": planned}


def digit_rows(trials: list[dict[str, ParticipationPlan]]) -> list[Row]:
    """What a plan gains with networks, seed by seed."""
    gains = {
        f"digits: cost of {name} above the plan": [t[name].cost - t["planned"].cost for t in trials]
        for name in ("myopic", "minimax")
    }
    gains["digits: share of the smaller group at the end, planned less myopic"] = [
        float(t["planned"].shares[-1].min() - t["myopic"].shares[-1].min()) for t in trials
    ]
    rows = []
    for claim, values in gains.items():
        mean, error = mean_error(values)
        clear = abs(mean) > 2 * error
        rows.append(
            Row(claim, "> 0", mean, error, mean > 0 if clear else None, "to two errors, seed by seed")
        )
    return rows


def _figure(
    gentle: dict[str, ParticipationPlan],
    steep: dict[str, ParticipationPlan],
    held: ParticipationPlan,
    trials: list[dict[str, ParticipationPlan]],
) -> Figure:
    return Figure(
        "Shares of two groups under three ways to choose a model",
        partial(_draw, gentle=gentle, steep=steep, held=held, trials=trials),
        caption=(
            "Solid: first group, dashed: second. Left: gentle risks; the myopic learner drives the second group down. "
            "Middle: steep risks; the cheapest plan gives the second group up, a floor (thin) holds it. Right: two "
            "groups of digits, one turned by a quarter."
        ),
        alt="Three panels of active shares over rounds.",
        size=(10.0, 3.3),
        key="participation",
    )


def _draw(
    canvas: Any,
    gentle: dict[str, ParticipationPlan],
    steep: dict[str, ParticipationPlan],
    held: ParticipationPlan,
    trials: list[dict[str, ParticipationPlan]],
) -> None:
    left, middle, right = canvas.subplots(1, 3)
    colours = {"myopic": "second", "minimax": "third", "planned": "first", "with a floor": "fourth"}

    def draw(axes: Any, found: dict[str, ParticipationPlan]) -> None:
        for name, plan in found.items():
            axes.plot(plan.shares[:, 0], color=role(colours[name]), label=name)
            axes.plot(plan.shares[:, 1], color=role(colours[name]), linestyle="--")
        axes.set(xlabel="round", ylim=(0, 1))

    draw(left, gentle)
    left.set(ylabel="active share", title="gentle risks")
    left.legend(loc="upper right")
    draw(middle, {"planned": steep["planned"], "minimax": steep["minimax"], "with a floor": held})
    middle.axhline(0.15, color=role("muted"), linewidth=0.7)
    middle.set(title="steep risks")
    middle.legend(loc="upper right")
    draw(right, trials[0])
    right.set(title="digits")
