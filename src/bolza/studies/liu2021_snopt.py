r"""Second-order training of a continuous-depth network, against first-order methods with tuned rates.

The Kronecker factors of the curvature of a Neural ODE come from its ordinary backward solve. Measured on digits: a
dense layer 64 → 32, the flow of a field with one hidden layer of 48 tanh units by ten Euler steps, a dense layer to
ten classes; batches of 64, factors anew every 20 steps. Every method has the same number of candidate learning rates,
of which the one with the least training loss at the end counts, over the same batches from the same starts. Times are
CPU seconds of training alone, methods in turn.

Further checks belong to the same theory: the backward equations of the second derivatives against automatic
differentiation; gradients of refresh iterations, which must be the ordinary ones; memory, which must not grow with the
number of steps of the solver under the adjoint; and the horizon, trained from both sides.

Reference: Liu, Chen & Theodorou (2021), arXiv:2109.14158.

Departures: handwritten digits of 8 × 8 pixels in place of large images; a solver with fixed steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.data import digits
from bolza.models.continuous import NeuralODE
from bolza.optim import HorizonController, SNOpt, second_order_adjoint
from bolza.optim.second_order import REFERENCE
from bolza.report import Figure, log_axis, role
from bolza.studies._study import Progress, Row, Scale, StudyResult, mean_error
from bolza.systems.ode import RK4

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "liu2021_snopt"
TITLE = "Second-order training of continuous depth"
CLAIM = (
    "Kronecker factors from the backward solve of a Neural ODE train it faster than first-order methods, "
    "at constant memory"
)
SAME_RATE = 0.02  # of the comparison with descent at equal learning rate


@dataclass(frozen=True)
class Budget:
    """Size of the experiment."""

    epochs: int = 6
    seeds: int = 3
    second: tuple[float, ...] = (0.02, 0.05, 0.1)
    adam: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    momentum: tuple[float, ...] = (0.03, 0.1, 0.3)
    solve: int = 60  # steps of the backward equations


BUDGETS = {
    "small": Budget(),
    "full": Budget(
        seeds=8,
        second=(0.01, 0.02, 0.035, 0.05, 0.1),
        adam=(1e-3, 3e-3, 1e-2, 2e-2, 3e-2),
        momentum=(0.01, 0.03, 0.1, 0.2, 0.3),
        solve=400,
    ),
}


@dataclass
class Course:
    """One training run, noted every half epoch."""

    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    accuracy: float = 0.0
    horizons: list[float] = field(default_factory=list)

    def time_to(self, loss: float) -> float:
        """CPU seconds until the training loss is at most this, interpolated; infinite if it is not."""
        for k, value in enumerate(self.losses):
            if value <= loss:
                if k == 0:
                    return self.seconds[0]
                share = (self.losses[k - 1] - loss) / (self.losses[k - 1] - value)
                return self.seconds[k - 1] + share * (self.seconds[k] - self.seconds[k - 1])
        return float("inf")


Make = Callable[[nn.Module], torch.optim.Optimizer]


def network(seed: int, gradient: str = "autograd", steps: int = 10, horizon: float = 1.0) -> nn.Sequential:
    """A Neural ODE between two dense layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inner = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32))
        block = NeuralODE(inner, method="euler", steps=steps, gradient=gradient, horizon=horizon)
        return nn.Sequential(nn.Linear(64, 32), block, nn.Linear(32, 10))


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Digits with pixels from 0 to 1."""
    data = digits()
    low, high = data.train_x.amin(), data.train_x.amax()
    return (data.train_x - low) / (high - low), data.train_y, (data.test_x - low) / (high - low), data.test_y


def block_only(net: nn.Module, lr: float) -> SNOpt:
    """Preconditioning for the block alone, the outer layers by ordinary descent."""
    outer = [*net[0].parameters(), *net[2].parameters()]  # type: ignore[index]
    groups = [{"params": list(net[1].parameters())}, {"params": outer, "refresh": None}]  # type: ignore[index]
    return SNOpt(net, lr=lr, refresh=20, params=groups)


def methods(budget: Budget) -> dict[str, dict[float, Make]]:
    """Every method with its candidate rates."""
    adam, sgd = torch.optim.Adam, torch.optim.SGD
    return {
        "SNOpt": {lr: partial(SNOpt, lr=lr, refresh=20) for lr in budget.second},
        "Adam": {lr: _of_parameters(adam, lr=lr) for lr in budget.adam},
        "SGD with momentum": {lr: _of_parameters(sgd, lr=lr, momentum=0.9) for lr in budget.momentum},
        "SGD": {SAME_RATE: _of_parameters(sgd, lr=SAME_RATE)},
        "SNOpt, block only": {SAME_RATE: partial(block_only, lr=SAME_RATE)},
    }


def _of_parameters(kind: Any, **options: float) -> Make:
    return lambda net: kind(net.parameters(), **options)


def batches(count: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Indices of batches of 64; what is left over of an epoch is dropped."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(count, generator=draw)[: count // 64 * 64].split(64)


def train(
    make: Make, data: tuple[Tensor, ...], seed: int, epochs: int, horizon: float | None = None
) -> Course:
    """Train one network; with a start of the horizon, the horizon too."""
    x, y, x_test, y_test = data
    net = network(seed, horizon=1.0 if horizon is None else horizon)
    optimizer = make(net)
    control = None
    if horizon is not None:
        control = HorizonController(net[1], optimizer, lr=0.05, c=0.01, every=10)
    course, spent = Course(), 0.0
    every = max(1, len(x) // 64 // 2)
    for step, rows in enumerate(batches(len(x), epochs, seed), 1):
        clock = time.process_time()
        optimizer.zero_grad()
        F.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
        if control is not None:
            control.step()
        spent += time.process_time() - clock
        if step % every == 0:
            with torch.no_grad():
                course.losses.append(float(F.cross_entropy(net(x), y)))
            course.steps.append(step)
            course.seconds.append(spent)
    with torch.no_grad():
        course.accuracy = float((net(x_test).argmax(1) == y_test).double().mean())
    course.horizons = [] if control is None else control.history
    return course


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Train the network with every method and rate.

    Args:
        scale: ``"small"``: three seeds, three rates a method; ``"full"``: eight seeds, five rates.
        progress: called with the share done and a few words.

    Returns:
        Rows on loss, time, curvature, gradients, memory and horizon, two figures.

    Example:
        >>> from bolza.studies import get
        >>> get("liu2021_snopt").title
        'Second-order training of continuous depth'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    data, made = problem(), methods(budget)
    runs: dict[str, dict[float, list[Course]]] = {
        name: {lr: [] for lr in rates} for name, rates in made.items()
    }
    for seed in range(budget.seeds):  # methods in turn: the machine's other work falls on all alike
        report(seed / (budget.seeds + 1), f"training networks of seed {seed}")
        for name, rates in made.items():
            for lr, make in rates.items():
                runs[name][lr].append(train(make, data, seed, budget.epochs))
    report(budget.seeds / (budget.seeds + 1), "training the horizon from both sides")
    rate = _best(runs["SNOpt"])
    horizons = [train(partial(SNOpt, lr=rate, refresh=20), data, 0, budget.epochs, T) for T in (1.0, 3.0)]
    rows = [
        *loss_rows(runs),
        time_row(runs, "Adam"),
        time_row(runs, "SGD with momentum"),
        curvature_row(budget.solve),
        gradient_row(data),
        memory_row(data),
        horizon_row(horizons),
    ]
    report(1.0, "done")
    best = {name: _best(rates) for name, rates in runs.items()}
    return StudyResult(
        KEY,
        TITLE,
        REFERENCE,
        CLAIM,
        scale,
        rows,
        (
            _course_figure({name: runs[name][lr] for name, lr in best.items()}, best),
            _horizon_figure(horizons),
        ),
        notes=(
            "Digits of 8 × 8 pixels, 64-32-flow-32-10, field 32-48-32 with tanh, ten Euler steps, batch 64, "
            f"{budget.epochs} epochs, {budget.seeds} seeds; factors every 20 steps.",
            "Best rates: " + "; ".join(f"{name} {lr:g}" for name, lr in best.items()) + ".",
            "Times are CPU seconds and change from run to run by some per cent.",
        ),
        facts={
            name: {
                f"{lr:g}": {
                    "loss": [c.losses[-1] for c in courses],
                    "accuracy": [c.accuracy for c in courses],
                    "seconds": [c.seconds[-1] for c in courses],
                }
                for lr, courses in rates.items()
            }
            for name, rates in runs.items()
        },
    )


def _best(rates: dict[float, list[Course]]) -> float:
    return min(rates, key=lambda lr: sum(_final(rates[lr])))


def _final(courses: Sequence[Course]) -> list[float]:
    return [course.losses[-1] for course in courses]


def _ratio(above: Sequence[float], below: Sequence[float]) -> tuple[float, float]:
    """Ratio of the means of paired runs, and its standard error from the spread of the logarithms."""
    logs = [
        float(torch.tensor(a, dtype=torch.float64).log() - torch.tensor(b, dtype=torch.float64).log())
        for a, b in zip(above, below, strict=True)
    ]
    value = mean_error(above)[0] / mean_error(below)[0]
    return value, value * mean_error(logs)[1]


# ------------------------------------------------------------------------------------------- rows


def loss_rows(runs: dict[str, dict[float, list[Course]]]) -> list[Row]:
    """Training loss at equal epochs, accuracy, and what the layers outside the block contribute."""
    second, adam = runs["SNOpt"], runs["Adam"]
    first = min(second, key=lambda lr: abs(lr - SAME_RATE))
    same, same_error = _ratio(_final(second[first]), _final(runs["SGD"][SAME_RATE]))
    ours, theirs = second[_best(second)], adam[_best(adam)]
    rows = [
        Row(
            f"training loss over that of descent, both at learning rate {first:g}",
            "below 0.2",
            same,
            same_error,
            same < 0.2,
        )
    ]
    for name in ("Adam", "SGD with momentum"):
        other = runs[name][_best(runs[name])]
        value, error = _ratio(_final(ours), _final(other))
        rows.append(
            Row(
                f"training loss over that of {name}, each at its best of {len(second)} rates",
                "at most 1",
                value,
                error,
                value <= 1,
                "{:.3f} ± {:.3f} against {:.3f} ± {:.3f}".format(
                    *mean_error(_final(ours)), *mean_error(_final(other))
                ),
            )
        )
    gain, error = mean_error([a.accuracy - b.accuracy for a, b in zip(ours, theirs, strict=True)])
    rows.append(
        Row(
            "test accuracy minus that of Adam, at the same rates",
            "above 0",
            gain,
            error,
            True if gain > 2 * error else False if gain < -2 * error else None,
            "judged to two standard errors",
        )
    )
    alone = runs["SNOpt, block only"]
    lr = next(iter(alone))
    value, error = _ratio(_final(alone[lr]), _final(second[lr]))
    rows.append(
        Row(
            f"training loss where the block alone is preconditioned, over full preconditioning, at rate {lr:g}",
            "above 1",
            value,
            error,
            value > 1,
            "the layers outside the block matter as much",
        )
    )
    return rows


def time_row(runs: dict[str, dict[float, list[Course]]], name: str) -> Row:
    """CPU time to a loss that every run of another method at its best rate reaches."""
    ours, theirs = (rates[_best(rates)] for rates in (runs["SNOpt"], runs[name]))
    target = max(_final(theirs))
    times = [[course.time_to(target) for course in courses] for courses in (ours, theirs)]
    finite = all(t < float("inf") for t in times[0])
    value, error = _ratio(*times) if finite else (float("inf"), 0.0)
    cost = mean_error([c.seconds[-1] for c in ours])[0] / mean_error([c.seconds[-1] for c in theirs])[0]
    return Row(
        f"CPU time to training loss {target:.3f} over that of {name}, each at its best rate",
        "below 1",
        value if finite else "not reached",
        error,
        value < 1,
        f"a step costs {cost:.2f} times one of {name}, factors included",
    )


def curvature_row(steps: int) -> Row:
    """The backward equations against automatic differentiation, for a field of three tanh units."""
    draw = torch.Generator().manual_seed(0)
    W, x0, phi = (torch.randn(s, generator=draw, dtype=torch.float64) for s in ((3, 3), (3,), (3, 3)))

    def velocity(t: float, x: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(u @ x)

    def final(u: Tensor) -> Tensor:
        x: Any = x0
        for k in range(steps):
            x = RK4.advance(velocity, k / steps, 1 / steps, x, (u,) * 4)
        return x

    J = torch.func.jacrev(final)(W).flatten(1)
    exact = J.T @ phi.T @ phi @ J
    r = second_order_adjoint(velocity, W, final(W), phi, 1.0, steps=steps).r.flatten(1)
    error = float((r.T @ r - exact).norm() / exact.norm())
    return Row(
        f"relative error of the curvature from the backward equations, {steps} steps of order 4",
        "below 1e-6",
        error,
        None,
        error < 1e-6,
        "against the Jacobian of the solution by automatic differentiation",
    )


def gradient_row(data: tuple[Tensor, ...]) -> Row:
    """Gradients with and without factors being computed, under the adjoint."""
    x, y = data[0][:64], data[1][:64]
    grads = []
    for watched in (False, True):
        net = network(0, "adjoint")
        optimizer = SNOpt(net, refresh=1) if watched else None
        F.cross_entropy(net(x), y).backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
        if optimizer is not None:
            optimizer.close()
    gap = float((grads[0] - grads[1]).norm() / grads[0].norm())
    return Row(
        "relative change of the adjoint gradient in an iteration that computes factors",
        0.0,
        gap,
        None,
        gap < 1e-6,
        "judged to 1e-6",
    )


def memory_row(data: tuple[Tensor, ...]) -> Row:
    """What a refresh iteration keeps for the backward pass, at 40 steps over at 10 steps."""
    x, y = data[0][:64], data[1][:64]
    held = {}
    for gradient in ("autograd", "adjoint"):
        for steps in (10, 40):
            net = network(0, gradient, steps)
            optimizer = SNOpt(net, refresh=1)
            kept: dict[int, int] = {}

            def keep(t: Tensor, kept: dict[int, int] = kept) -> Tensor:
                kept[t.data_ptr()] = t.numel() * t.element_size()
                return t

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                loss = F.cross_entropy(net(x), y)
            held[gradient, steps] = sum(kept.values())
            loss.backward()
            optimizer.close()
    value = held["adjoint", 40] / held["adjoint", 10]
    direct = held["autograd", 40] / held["autograd", 10]
    return Row(
        "memory of a refresh iteration under the adjoint, 40 steps of the solver over 10",
        1.0,
        value,
        None,
        abs(value - 1) < 0.01,
        f"{direct:.2f} where every evaluation is kept; at ten steps {held['autograd', 10] / 1024:.0f} kB against "
        f"{held['adjoint', 10] / 1024:.0f} kB",
    )


def horizon_row(courses: Sequence[Course]) -> Row:
    """Horizons that start on both sides of the optimum."""
    start = courses[1].horizons[0] - courses[0].horizons[0]
    end = courses[1].horizons[-1] - courses[0].horizons[-1]
    return Row(
        "distance of two trained horizons at the end, over that at the start",
        "below 0.5",
        end / start,
        None,
        0 <= end < 0.5 * start,
        "; ".join(f"{c.horizons[0]:.2f} → {c.horizons[-1]:.2f}" for c in courses)
        + f"; training loss {courses[0].losses[-1]:.3f} and {courses[1].losses[-1]:.3f}",
    )


# ---------------------------------------------------------------------------------------- figures

_LOOK = {
    "SNOpt": ("first", "-"),
    "Adam": ("second", "-"),
    "SGD with momentum": ("third", "-"),
    "SGD": ("muted", "-"),
    "SNOpt, block only": ("first", ":"),
}


def _course_figure(best: dict[str, list[Course]], rates: dict[str, float]) -> Figure:
    return Figure(
        "Loss over steps and over time",
        partial(_draw_courses, best=best, rates=rates),
        caption="Training loss of each method at its best rate (plain descent, and the block alone, at 0.02), each "
        "seed and the geometric mean: by steps, and by CPU seconds of training.",
        alt="Training loss against steps and against seconds for five optimizers, logarithmic.",
        size=(9.2, 3.6),
        key="courses",
    )


def _draw_courses(canvas: Any, best: dict[str, list[Course]], rates: dict[str, float]) -> None:
    panels = canvas.subplots(1, 2, sharey=True)
    for name, courses in best.items():
        colour, dash = _LOOK[name]
        for axes, key in zip(panels, ("steps", "seconds"), strict=True):
            values = torch.tensor([c.losses for c in courses])
            places = torch.tensor([getattr(c, key) for c in courses], dtype=torch.float64)
            for place, value in zip(places, values, strict=True):
                axes.plot(place, value, dash, color=role(colour), alpha=0.25, linewidth=0.9)
            mean, label = values.log().mean(0).exp(), f"{name}, {rates[name]:g}"
            axes.plot(places.mean(0), mean, dash, color=role(colour), label=label)
    for axes, label in zip(panels, ("step", "CPU seconds"), strict=True):
        log_axis(axes, "y")
        axes.set_xlabel(label)
    panels[0].set_ylabel("training loss")
    panels[0].legend(loc="lower left")


def _horizon_figure(courses: Sequence[Course]) -> Figure:
    return Figure(
        "The horizon as a control",
        partial(_draw_horizons, courses=courses),
        caption="Horizon of the flow, trained beside the weights from 1 and from 3, with cost 0.005 T².",
        alt="Two horizons over training that approach one another.",
        size=(5.4, 3.2),
        key="horizons",
    )


def _draw_horizons(canvas: Any, courses: Sequence[Course]) -> None:
    axes = canvas.subplots()
    for course, colour in zip(courses, ("first", "second"), strict=True):
        axes.plot(range(len(course.horizons)), course.horizons, "o-", color=role(colour))
        place, away = (len(course.horizons) - 1, course.horizons[-1]), 16 if colour == "second" else -16
        style = {"textcoords": "offset points", "ha": "right", "color": role(colour)}
        axes.annotate(f"loss {course.losses[-1]:.3f}", place, xytext=(0, away), **style)
    axes.set(xlabel="updates of the horizon (every 10 steps)", ylabel="horizon T", ylim=(0, None))
