r"""Learning rate and momentum as controls of the modified equation, and the program that never lowers the rate.

    dm/dt = −2aum + ½aηΣu²,   u* = min(1, 2m/(ηΣ));      μ* = min{(1 − 2√(aη))₊, (1 − ηΣ/(4m))₊}

Closed forms of a controlled bowl and a direct optimisation of the rate beside them; the feedback laws on a noisy
quadratic in ten dimensions, the authors' program among them; and a network on handwritten digits.

Reference: Li, Tai & E (2017), arXiv:1511.06251, §4.

Departures: the loss estimate is free of noise; u ≤ 1/(aη); u is held where the curvature is not significant; the
network is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.controllers import CMSGD, CSGD, ControlledQuadratic, critical_momentum, stationary_loss
from bolza.controllers.moments import LI as REFERENCE
from bolza.data import digits
from bolza.report import Figure, log_axis, role
from bolza.studies._study import Progress, Row, Scale, StudyResult, mean_error

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "li2017_control"
TITLE = "Learning rate and momentum as controls"
CLAIM = "Feedback from measured curvature and noise anneals a rate that is too large, and a momentum that is too large"

BOWL = ControlledQuadratic(curvature=1.0, noise=1.0, lr=0.2, initial_loss=1.0)
CURVATURES = torch.linspace(0.2, 2.0, 10, dtype=torch.float64)
RATES = (0.05, 0.2, 0.5)
MOMENTUM_RATES = (0.01, 0.05, 0.2)
NETS = ("SGD", "released form", "denoised form")


@dataclass(frozen=True)
class Budget:
    """Size of the runs."""

    steps: int  # of the long memory on the quadratic; the short one has a third
    copies: int
    rest_steps: int
    rates: tuple[float, ...]
    seeds: int
    epochs: int


BUDGETS = {
    "small": Budget(steps=5000, copies=8, rest_steps=800, rates=(0.1, 1.0, 10.0), seeds=2, epochs=2),
    "full": Budget(
        steps=20000, copies=40, rest_steps=4000, rates=(0.1, 0.3, 0.6, 1.0, 3.0, 10.0), seeds=5, epochs=15
    ),
}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Check the closed forms, then the laws on a noisy quadratic and on digits.

    Args:
        scale: ``"small"``: some ten seconds on one core; ``"full"``: the lengths of the published figures, more seeds.
        progress: called with the share done and a few words.

    Returns:
        The rows, a figure, and the numbers.

    Example:
        >>> from bolza.studies import get
        >>> get("li2017_control").reference.arxiv
        '1511.06251'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    report(0.0, "closed forms")
    rows = form_rows()
    report(0.05, "the noisy quadratic")
    courses, floors = quadratic(budget)
    rows += quadratic_rows(courses, floors) + released_rows(budget)
    report(0.5, "momentum")
    rows += momentum_rows(budget)
    report(0.6, "digits")
    nets = network(budget)
    rows += network_rows(nets, budget)
    report(1.0, "done")
    notes = (
        f"Quadratic: curvatures 0.2 … 2 in ten directions, noise 1, from 3 in each; {budget.copies} copies, mean over "
        f"the last fifth of {budget.steps} steps (β_max = 0.999) and {budget.steps // 3} steps (0.99).",
        f"Digits: 64-32-10 with ReLU, batch 10, {budget.epochs} epochs, {budget.seeds} seeds. Both forms have the "
        "bound of the first steps, η u ‖g‖² ≤ loss, which the paper has not: it alone keeps large rates finite.",
        "The released form is the authors' program, which counts the noise of the mini-batch as loss.",
    )
    facts = {
        "digits": {f"{lr:g}": {name: nets[lr][name] for name in NETS} for lr in nets},
        "quadratic": {name: [float(v[-1]) for v in course] for name, (_, course) in courses.items()},
    }
    return StudyResult(
        KEY, TITLE, REFERENCE, CLAIM, scale, rows, (_figure(courses, nets),), notes=notes, facts=facts
    )


# -------------------------------------------------------------------------------------- closed forms


def pieces_optimum(bowl: ControlledQuadratic, time: float, pieces: int) -> float:
    """Least last loss of rates that are constant on equal pieces, by direct optimisation."""
    from scipy.optimize import minimize

    h, quarter = time / pieces, bowl.lr * bowl.noise / 4

    def last(values: Any) -> tuple[float, Any]:
        u = torch.as_tensor(values, dtype=torch.float64).requires_grad_()
        falls = 2 * bowl.curvature * h * u
        later = falls.flip(0).cumsum(0).flip(0)  # log of what is left at the end of a loss before the piece
        left, after = torch.exp(-later), torch.exp(falls - later)
        m = bowl.initial_loss * left[0] + quarter * (u * (after - left)).sum()
        m.backward()
        assert u.grad is not None
        return float(m.detach()), u.grad.numpy()

    start = [0.5] * pieces
    return float(minimize(last, start, jac=True, bounds=[(0, 1)] * pieces, tol=1e-12).fun)


def form_rows() -> list[Row]:
    """Numbers of a bowl whose best control is known."""
    other = ControlledQuadratic(2.0, 1.0, 0.1, 2.0)
    u, constant = BOWL.best_constant(5.0)
    direct = pieces_optimum(BOWL, 5.0, 50)

    def row(claim: str, expected: float, measured: float, tolerance: float, note: str) -> Row:
        return Row(claim, expected, measured, None, abs(measured - expected) <= tolerance, note)

    digits_ = "the digits printed"
    return [
        row("end of the largest rate t*", 1.4722195, BOWL.switch_time, 6e-8, digits_),
        row("last loss under the best rate", 0.0220859, float(BOWL.loss(5.0)), 6e-8, digits_),
        row("last loss, direct optimisation of 50 pieces", 0.0220890, direct, 6e-8, digits_),
        row("last loss at the best constant rate", 0.0313580, constant, 6e-8, f"u = {u:.5f}"),
        row("a = 2, η = 0.1, m₀ = 2: loss at t = 10", 0.0026574, float(other.loss(10.0)), 1e-7, digits_),
        row("the same at t = 20", 0.0012881, float(other.loss(20.0)), 1e-7, digits_),
        row(
            "critical damping at a = 1, η = 0.1", 0.367544, float(critical_momentum(1.0, 0.1)), 6e-7, digits_
        ),
    ]


# --------------------------------------------------------------------------------- the noisy quadratic


def noisy_bowls(
    rates: tuple[float, ...],
    controller: Callable[[torch.optim.Optimizer], Any] | None,
    steps: int,
    copies: int,
    *,
    curvatures: Tensor = CURVATURES,
    start: float = 3.0,
    momentum: float = 0.0,
    points: int = 60,
) -> tuple[list[int], Tensor, Tensor, Any]:
    """SGD with unit noise at several rates side by side: times, mean losses (rates, times), losses at rest, controller.

    A loss at a time is a mean over the copies and the steps since the time before.
    """
    # a step of rate η is one of rate 1 for ηf, to the controller too: all rates are entries of one parameter
    a, eta = curvatures.repeat(copies), torch.tensor(rates, dtype=curvatures.dtype)[:, None]
    theta = torch.full((len(rates), len(a)), start, dtype=a.dtype, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=1.0, momentum=momentum)
    worn = None if controller is None else controller(optimizer)
    draw = torch.Generator().manual_seed(0)
    times = sorted({round(steps ** (i / points)) for i in range(points + 1)})
    seen, since = [], torch.zeros(len(rates), dtype=a.dtype)
    rest, last, before = torch.zeros_like(since), steps // 5, 0
    with torch.no_grad():
        for k in range(1, steps + 1):
            now = theta.square() @ a / (2 * copies)
            since += now
            if k > steps - last:
                rest += now / last
            if k in times:
                seen.append(since / (k - before))
                since, before = torch.zeros_like(since), k
            theta.grad = eta * (a * theta + torch.randn(theta.shape, generator=draw, dtype=a.dtype))
            optimizer.step()
            if worn is not None:
                worn.step()
    return times, torch.stack(seen, 1), rest, worn


Courses = dict[str, tuple[list[int], Tensor]]


def quadratic(budget: Budget) -> tuple[Courses, dict[str, Tensor]]:
    """Courses and losses at rest of SGD and of CSGD with a long and a short memory."""
    courses, floors = {}, {}
    for name, controller, steps in (
        ("SGD", None, budget.steps),
        ("β ≤ 0.999", partial(CSGD, beta=(0.9, 0.999)), budget.steps),
        ("β ≤ 0.99", CSGD, budget.steps // 3),
    ):
        times, course, rest, _ = noisy_bowls(RATES, controller, steps, budget.copies)
        courses[name], floors[name] = (times, course), rest
    return courses, floors


def quadratic_rows(courses: Courses, floors: dict[str, Tensor]) -> list[Row]:
    """How far below the floor of SGD the controlled runs come."""
    exact = [float(stationary_loss(CURVATURES, 1.0, lr).sum()) for lr in RATES]
    worst = max(abs(found / floor - 1) for found, floor in zip(floors["SGD"].tolist(), exact, strict=True))
    rows = [
        Row("noise floor of SGD, largest relative deviation from the closed form", 0.0, worst, None, worst < 0.15,
            "three rates; the copies are few")
    ]  # fmt: skip
    for name, gain in (("β ≤ 0.999", 20), ("β ≤ 0.99", 10)):
        for lr, floor, found in zip(RATES, exact, floors[name].tolist(), strict=True):
            rows.append(
                Row(
                    f"η = {lr:g}, {name}: floor of SGD over the loss of CSGD",
                    f"≥ {gain}",
                    floor / found,
                    None,
                    floor / found >= gain,
                    f"{floor:.4g} over {found:.3g}",
                )
            )
    return rows


def released_rows(budget: Budget) -> list[Row]:
    """What the authors' program does below and above the limit of stability of its own law."""
    one, steps = torch.ones(40, dtype=torch.float64), budget.rest_steps
    found = {}
    for lr, form in ((0.2, "released"), (1.5, "released"), (0.2, "denoised")):
        options: Any = {"form": form, "z": 0.0 if form == "released" else 1.0}
        _, _, rest, worn = noisy_bowls(
            (lr,), partial(CSGD, **options), steps, budget.copies, curvatures=one, start=1.0
        )
        found[lr, form] = float(rest[0]) / len(one), next(iter(worn.log().values()))
    floor = float(stationary_loss(1.0, 1.0, 0.2))
    loss, u = found[0.2, "released"]
    limited = found[1.5, "released"][1]
    denoised = found[0.2, "denoised"]
    return [
        Row("released form, aη = 0.2: mean u at the end", 1.0, u, None, u > 0.99, "it never anneals while aη < 1"),
        Row("released form, aη = 0.2: loss at rest", floor, loss, None, abs(loss / floor - 1) < 0.1, "floor of SGD"),
        Row("released form, aη = 1.5: mean u at the end", 1 / 1.5, limited, None, abs(1.5 * limited - 1) < 0.1,
            "1/(aη): it limits the rate to what is stable"),
        Row("denoised form, aη = 0.2: floor of SGD over its loss", "≥ 10", floor / denoised[0], None,
            floor / denoised[0] >= 10, f"u = {denoised[1]:.3f} at the end"),
    ]  # fmt: skip


def momentum_rows(budget: Budget) -> list[Row]:
    """Controlled momentum comes to rest where SGD without momentum does."""
    steps = 4 * budget.rest_steps
    _, _, held, _ = noisy_bowls(MOMENTUM_RATES, None, steps, budget.copies, momentum=0.9)
    _, _, found, _ = noisy_bowls(MOMENTUM_RATES, CMSGD, steps, budget.copies, momentum=0.9)
    rows = []
    for lr, high, low in zip(MOMENTUM_RATES, held.tolist(), found.tolist(), strict=True):
        floor = float(stationary_loss(CURVATURES, 1.0, lr).sum())
        rows.append(
            Row(
                f"η = {lr:g}: loss with controlled momentum over the floor without any",
                1.0,
                low / floor,
                None,
                0.5 < low / floor < 1.5,
                f"a momentum of 0.9 rests at {high / floor:.1f} times that floor",
            )
        )
    return rows


# ------------------------------------------------------------------------------------------- digits

Net = dict[float, dict[str, dict[str, list[float]]]]


def train_digits(lr: float, name: str, seed: int, epochs: int) -> tuple[float, float]:
    """Train loss and test accuracy of one run."""
    data = digits()
    x, y = data.train_x.flatten(1), data.train_y
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    form: Any = name.split()[0]
    controller = None if name == "SGD" else CSGD(optimizer, form=form)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=draw).split(10):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x[batch]), y[batch])
            if not bool(loss.isfinite()):
                return math.inf, 0.1
            loss.backward()
            optimizer.step()
            if controller is not None:
                controller.step(loss=loss)
    with torch.no_grad():
        right = net(data.test_x.flatten(1)).argmax(-1) == data.test_y
        return float(F.cross_entropy(net(x), y)), float(right.float().mean())


def network(budget: Budget) -> Net:
    """Train losses and accuracies of every rate, form and seed."""
    found: Net = {}
    for lr in budget.rates:
        found[lr] = {}
        for name in NETS:
            runs = [train_digits(lr, name, seed, budget.epochs) for seed in range(budget.seeds)]
            found[lr][name] = {"loss": [r[0] for r in runs], "accuracy": [r[1] for r in runs]}
    return found


def network_rows(nets: Net, budget: Budget) -> list[Row]:
    """Accuracy beside that of SGD, at rates it tolerates and at one that it does not."""
    rows = []
    for lr in nets:
        pairs = zip(nets[lr]["denoised form"]["accuracy"], nets[lr]["SGD"]["accuracy"], strict=True)
        gap, error = mean_error(b - a for b, a in pairs)
        tolerated = lr < 1
        bar = -0.005 if tolerated else 0.1
        rows.append(
            Row(
                f"digits, η = {lr:g}: accuracy of CSGD less that of SGD",
                "≥ −0.005" if tolerated else "≥ 0.1",
                gap,
                error,
                True if gap >= bar else None if gap + 2 * error >= bar else False,
                f"{budget.seeds} seeds; open within two errors of the bar",
            )
        )
    return rows


# ------------------------------------------------------------------------------------------- figure


def _figure(courses: Courses, nets: Net) -> Figure:
    return Figure(
        "The best learning rate of a bowl, by plan and by feedback",
        partial(_draw, courses=courses, nets=nets),
        caption="Left: loss of a bowl under the best rate, the best constant rate and the largest rate (thin: the best "
        "rate itself). Middle: noisy quadratic in ten dimensions, SGD (grey) and CSGD at three rates, and the loss of "
        "the best control (dotted). Right: test accuracy on digits over the initial rate, mean and range over seeds.",
        alt="Loss curves of controlled quadratics and accuracies over the learning rate.",
        size=(10.5, 3.5),
        key="control",
    )


def _draw(canvas: Any, courses: Courses, nets: Net) -> None:
    left, middle, right = canvas.subplots(1, 3)
    t = torch.linspace(0, 5, 200, dtype=torch.float64)
    u, _ = BOWL.best_constant(5.0)
    left.semilogy(t, BOWL.loss(t), color=role("first"), label="best rate")
    left.semilogy(t, BOWL.constant_loss(u, t), color=role("second"), label=f"constant {u:.2f}")
    left.semilogy(t, BOWL.constant_loss(1.0, t), color=role("muted"), label="largest rate")
    left.semilogy(t, BOWL.rate(t), color=role("first"), linewidth=0.7)
    left.axvline(BOWL.switch_time, color=role("muted"), linewidth=0.7, linestyle=":")
    left.set(xlabel="t = kη", ylabel="loss; u (thin)", title="a bowl, η = 0.2")
    colours = ("first", "second", "third")
    for i, (lr, colour) in enumerate(zip(RATES, colours, strict=True)):
        middle.loglog(courses["SGD"][0], courses["SGD"][1][i], color=role("muted"), linewidth=0.8)
        times, course = courses["β ≤ 0.999"]
        middle.loglog(times, course[i], color=role(colour), label=f"η = {lr:g}")
    times = courses["β ≤ 0.999"][0]
    best = sum(
        ControlledQuadratic(float(a), 1.0, 0.5, 4.5 * float(a)).loss(0.5 * torch.tensor(times))
        for a in CURVATURES
    )
    middle.loglog(times, best, color=role("ink"), linestyle=":", label="best control")
    middle.set(xlabel="step", ylabel="mean loss", title="noisy quadratic, CSGD")
    rates = list(nets)
    for name, colour in zip(NETS, ("muted", "second", "first"), strict=True):
        values = [nets[lr][name]["accuracy"] for lr in rates]
        mean = [sum(v) / len(v) for v in values]
        right.plot(rates, mean, "o-", color=role(colour), label=name, ms=4)
        right.fill_between(
            rates, [min(v) for v in values], [max(v) for v in values], color=role(colour), alpha=0.15
        )
    right.set_xscale("log")
    log_axis(right, "x")
    right.set(xlabel="η", ylabel="accuracy", title="digits")
    for axes in (left, middle, right):
        axes.legend(fontsize="small")
