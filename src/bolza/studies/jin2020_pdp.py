r"""Costs and dynamics learned from demonstrations: differentiating the maximum principle.

A demonstrator steers a plant optimally; which plant and which cost is to be found from the trajectories alone. The
loss is the distance of the learner's optimal trajectory from the demonstrated one, so that its gradient needs the
derivative of an optimal control problem in its parameters. Pontryagin differentiable programming takes it from the
maximum principle: one linear-quadratic problem for each gradient.

    θ ← θ − η ∂/∂θ Σ ‖(x, u)*(θ) − (x, u)‖²

Plants: a pendulum with θ = (length, mass, friction, weights of angle and speed), swung up from five angles; at full
scale also a cart-pole with seven parameters. Beside the descent of the paper stands a Levenberg–Marquardt step,
(JᵀJ + μD) δθ = −Jᵀ residual with J = ∂(x, u)*/∂θ, which the same sweep gives with one column for each parameter.

Reference: Jin, Wang, Yang & Mou (2020), arXiv:1912.12970.

Departures: squared distances with their factor 2; the solver is warm-started by the feedback law of the iteration
before; the runs are shorter than the 10 000 iterations of the paper.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bolza.core import Trajectory, rollout
from bolza.report import Figure, log_axis, role
from bolza.solve import ILQRResult, optimal_trajectory, trajectory_sensitivity
from bolza.solve.pdp import PDP as REFERENCE
from bolza.studies._demonstrations import (
    CART_POLE,
    COSTS,
    F64,
    MANY,
    PENDULUM,
    Learned,
    Task,
    descend,
    distance,
    fit,
    flat,
    guess,
    solve,
)
from bolza.studies._study import Progress, Row, Scale, StudyResult

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "jin2020_pdp"
TITLE = "Costs and dynamics from demonstrations"
CLAIM = (
    "The derivative of an optimal trajectory is a linear-quadratic problem, exact and cheap enough to learn cost and "
    "dynamics by gradient descent"
)


@dataclass(frozen=True)
class Budget:
    """Size of the experiment."""

    descents: int = 1
    steps: int = 12
    fits: int = 2
    cart_steps: int = 0  # of descent for the cart-pole; 0 leaves it out
    differences: bool = True
    spread: float = 0.45  # of the parameters at the start


BUDGETS = {"small": Budget(), "full": Budget(descents=2, steps=150, fits=10, cart_steps=60)}


# ------------------------------------------------------------------------------------------- the study


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Check the derivatives and learn from demonstrations.

    Args:
        scale: ``"small"``: the pendulum, 12 steps of descent and two fits; ``"full"``: 150 steps, 10 fits, and the
            cart-pole.
        progress: called with the share done and a few words.

    Returns:
        Rows on the derivatives and on what was learned, two figures.

    Example:
        >>> from bolza.studies import get
        >>> get("jin2020_pdp").reference.year
        2020
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    report(0.0, "demonstrations")
    target = solve(PENDULUM, PENDULUM.theta)
    rows = derivative_rows(target, budget, partial(report, 0.05))
    descents, fits = [], []
    for seed in range(budget.descents):
        descents.append(
            descend(
                PENDULUM,
                target,
                guess(PENDULUM, seed, budget.spread),
                budget.steps,
                lambda share, seed=seed: report(0.2 + 0.3 * (seed + share) / budget.descents, "descent"),  # type: ignore[misc]
            )
        )
    for seed in range(budget.fits):
        report(0.5 + 0.2 * seed / budget.fits, "Levenberg–Marquardt")
        fits.append(fit(PENDULUM, target, guess(PENDULUM, seed, budget.spread)))
    rows += learning_rows(PENDULUM, descents, fits)
    courses = {"pendulum": (descents, fits)}
    if budget.cart_steps:
        report(0.7, "demonstrations of the cart-pole")
        cart_target = solve(CART_POLE, CART_POLE.theta, polish=True)
        cart = [guess(CART_POLE, 0, budget.spread)]
        slow = [
            descend(
                CART_POLE,
                cart_target,
                start,
                budget.cart_steps,
                lambda share: report(0.75 + 0.2 * share, "descent, cart-pole"),
            )
            for start in cart
        ]
        quick = [fit(CART_POLE, cart_target, start) for start in cart]
        rows += learning_rows(CART_POLE, slow, quick)
        courses["cart-pole"] = (slow, quick)
    report(1.0, "done")
    return StudyResult(
        KEY,
        TITLE,
        REFERENCE,
        CLAIM,
        scale,
        rows,
        (_learning_figure(courses), _swing_figure(target, fits[0])),
        notes=(
            "Five demonstrations each; parameters start within ±0.45 of the true ones, as in the paper, but not "
            "below 0.02.",
            "The paper descends for 10 000 iterations; its stored cart-pole runs end at losses of 0.008 to 0.022. "
            "Here the descent is followed for as long as the scale allows, and its row asks only that it goes down.",
            "Swing-ups have several local optima: the derivative is that of the one that the solver is in.",
        ),
        facts={
            name: {
                "descent": [r.losses for r in pair[0]],
                "fit": [r.losses for r in pair[1]],
                "parameters": [r.theta.tolist() for r in pair[1]],
            }
            for name, pair in courses.items()
        },
    )


def derivative_rows(target: ILQRResult, budget: Budget, report: Callable[[str], None]) -> list[Row]:
    """The known costs, and derivatives by independent routes."""
    report("derivatives")
    task, found = PENDULUM, target.trajectory
    rows = [
        Row(
            "distance of the costs of five swing-ups from 465.03276, 807.76416, 624.58537, 329.06029, 216.57206",
            0.0,
            float((target.value - torch.tensor(COSTS, dtype=F64)).abs().max()),
            None,
            bool((target.value - torch.tensor(COSTS, dtype=F64)).abs().max() < 1e-4),
            "judged to 1e-4",
        )
    ]
    start = task.theta + torch.tensor([0.05, -0.05, 0.02, 0.3, -0.1], dtype=F64)
    theta = start.clone().requires_grad_()

    near = solve(task, start, target)

    def imitated(theta: Tensor) -> Trajectory:
        return optimal_trajectory(
            task.problem, theta, task.starts, near.trajectory.controls, tolerance=1e-12, **MANY
        )

    clock = time.process_time()
    now = imitated(theta)
    forward = time.process_time() - clock
    clock = time.process_time()
    (gradient,) = torch.autograd.grad(distance(now, found), theta)
    backward = time.process_time() - clock
    if budget.differences:
        steps = 1e-5 * torch.eye(5, dtype=F64)
        numeric = torch.stack(
            [
                (distance(imitated(start + e), found) - distance(imitated(start - e), found)) / 2e-5
                for e in steps
            ]
        )
        error = float((gradient - numeric).norm() / numeric.norm())
        rows.append(
            Row(
                "relative error of the gradient of imitation against central differences",
                0.0,
                error,
                None,
                error < 1e-5,
                f"judged to 1e-5; the gradient is ({', '.join(f'{g:.2f}' for g in gradient.tolist())})",
            )
        )
    sensitivity = trajectory_sensitivity(task.problem, start, now, **MANY)
    residual = flat(now.states, now.controls).detach() - flat(found.states, found.controls)
    J = torch.cat([*sensitivity.states[1:], *sensitivity.controls], dim=1)
    columns = 2 * torch.einsum("bn,bnp->p", residual, J) / len(residual)
    gap = float((columns - gradient).norm() / gradient.norm())
    rows.append(
        Row(
            "one transposed column against one column for each parameter, relative distance of the gradients",
            0.0,
            gap,
            None,
            gap < 1e-8,
            f"judged to 1e-8; the backward pass took {backward / max(forward, 1e-9):.2f} of the time of a warm solve",
        )
    )
    rows += [_identification_row(task, start, target), _planning_row(task)]
    return rows


def _identification_row(task: Task, theta: Tensor, target: ILQRResult) -> Row:
    controls = target.trajectory.controls

    def last(theta: Tensor) -> Tensor:
        return rollout(task.problem(theta)[0], task.starts, controls).states[-1]

    held = rollout(task.problem(theta)[0], task.starts, controls)
    found = trajectory_sensitivity(task.problem, theta, held, controls="held", **MANY)
    exact = torch.func.jacrev(last)(theta)
    gap = float((found.states[-1] - exact).norm() / exact.norm())
    return Row(
        "identification (controls held): sensitivity of the last state against autograd, relative distance",
        0.0,
        gap,
        None,
        gap < 1e-10,
        "judged to 1e-10",
    )


def _planning_row(task: Task) -> Row:
    theta, x0 = torch.tensor([-0.8, -0.3], dtype=F64), task.starts[1]
    system, cost = task.problem(task.theta)

    def policy(x: Tensor, theta: Tensor) -> Tensor:
        return (theta * x).sum(-1, keepdim=True)

    def closed(theta: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, us = x0, []
        for t in range(system.horizon):
            us.append(policy(x, theta))
            x = system.step(t, x, us[-1])
        return x, us

    run_ = rollout(system, x0, closed(theta)[1])
    found = trajectory_sensitivity(
        lambda _: (system, cost), theta, run_, controls=policy, time_invariant=True
    )
    exact = torch.func.jacrev(lambda th: closed(th)[0])(theta)
    gap = float((found.states[-1] - exact).norm() / exact.norm())
    return Row(
        "planning (a policy's parameters): sensitivity of the last state against autograd, relative distance",
        0.0,
        gap,
        None,
        gap < 1e-10,
        "judged to 1e-10",
    )


def learning_rows(task: Task, descents: list[Learned], fits: list[Learned]) -> list[Row]:
    """What was learned of one plant."""
    rows = []
    if descents:
        ratios = [r.losses[-1] / r.losses[0] for r in descents]
        ends = ", ".join(f"{r.losses[0]:.3g} → {r.losses[-1]:.3g}" for r in descents)
        rows.append(
            Row(
                f"{task.name}: loss after {len(descents[0].losses) - 1} steps of descent at rate {task.lr:g}, over the "
                "loss at the start, the worst run",
                "below 1",
                max(ratios),
                None,
                max(ratios) < 1,
                ends,
            )
        )
    if fits:
        errors = [r.error(task) for r in fits]
        good = sum(e < 1e-4 for e in errors)
        rows.append(
            Row(
                f"{task.name}: starts from which all {len(task.theta)} parameters are found to 1e-4 by "
                "Levenberg–Marquardt",
                f"{len(fits)} of {len(fits)}",
                f"{good} of {len(fits)}",
                None,
                good == len(fits),
                f"in {sorted(len(r.losses) - 1 for r in fits)} steps; median error "
                f"{sorted(errors)[len(errors) // 2]:.1e}",
            )
        )
    return rows


# ------------------------------------------------------------------------------------------- figures


def _learning_figure(courses: dict[str, tuple[list[Learned], list[Learned]]]) -> Figure:
    return Figure(
        "Learning a plant and its cost from five demonstrations",
        partial(_draw_learning, courses=courses),
        caption="Squared distance from the demonstrations: gradient descent at the learning rate of the paper, and "
        "Levenberg–Marquardt from the same starts.",
        alt="Loss against iterations for descent and for Levenberg–Marquardt.",
        size=(9.2, 3.6) if len(courses) > 1 else (6.4, 3.8),
        key="learning",
    )


def _draw_learning(canvas: Any, courses: dict[str, tuple[list[Learned], list[Learned]]]) -> None:
    panels = canvas.subplots(1, len(courses), squeeze=False)[0]
    for axes, (name, (descents, fits)) in zip(panels, courses.items(), strict=True):
        for runs, colour, marker, label in (
            (descents, "second", "o", "gradient descent"),
            (fits, "first", "D", "Levenberg–Marquardt"),
        ):
            for k, learned in enumerate(runs):
                values = [max(v, 1e-16) for v in learned.losses]
                axes.plot(
                    range(len(values)),
                    values,
                    marker=marker if len(values) < 60 else "",
                    color=role(colour),
                    alpha=0.8,
                    label=label if k == 0 else None,
                )
        log_axis(axes, "y")
        axes.set_title(name)
        axes.set_xlabel("iteration")
        axes.legend(loc="lower left")
    panels[0].set_ylabel("distance from the demonstrations")


def _swing_figure(target: ILQRResult, fitted: Learned) -> Figure:
    near = solve(PENDULUM, fitted.start)
    return Figure(
        "Five swing-ups: before and after",
        partial(_draw_swings, target=target, before=near),
        caption="Angle and torque of the pendulum as demonstrated (lines; upright is π) and as the parameters at the "
        "start would have it (dashes); after the fit the two cannot be told apart.",
        alt="Angles and torques over time of five demonstrations and of the learner before learning.",
        size=(9.2, 3.6),
        key="swings",
    )


def _draw_swings(canvas: Any, target: ILQRResult, before: ILQRResult) -> None:
    panels = canvas.subplots(1, 2)
    for result, colour, style, label in (
        (target, "second", "-", "demonstrated"),
        (before, "first", "--", "learner at the start"),
    ):
        angles = torch.stack([x[:, 0] for x in result.trajectory.states], dim=1)
        torques = torch.stack([u[:, 0] for u in result.trajectory.controls], dim=1)
        for axes, lines in zip(panels, (angles, torques), strict=True):
            times = [0.1 * t for t in range(lines.shape[1])]
            for k, line in enumerate(lines):
                axes.plot(times, line, style, color=role(colour), alpha=0.85, label=label if k == 0 else None)
    panels[0].axhline(math.pi, color=role("muted"), linewidth=0.8)
    for axes, name in zip(panels, ("angle", "torque"), strict=True):
        axes.set_xlabel("time")
        axes.set_ylabel(name)
    panels[0].legend(loc="lower right")
