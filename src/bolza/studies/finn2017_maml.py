r"""Learning the initial condition of the training system.

    min_θ (1/M) Σ_τ Φ_τ(θ^τ_K),   θ^τ_{k+1} = θ^τ_k − α ∇ℓ_τ(θ^τ_k),   θ^τ_0 = θ

Where two quadratic tasks meet; the meta-gradient as the costate of the training clock; sine waves from five points; and
digits of classes that were never seen. Rivals have at least as many gradients, and their rates and numbers of steps are
the best of a grid, judged on the very tasks of the test.

Reference: Finn, Abbeel & Levine (2017), arXiv:1703.03400; read as a control problem by Liu & Theodorou (2019),
arXiv:1908.10920, §7.

Departures: Adam at 0.01 for a few hundred steps (full: 0.003, thousands) where the paper takes tens of thousands;
digits in place of Omniglot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from bolza.data import FewShot, Sinusoids, TaskBatch, digit_tasks
from bolza.meta import MAML, meta_gradient
from bolza.meta.meta_gradient import FINN as REFERENCE
from bolza.report import Figure, role
from bolza.studies._study import Progress, Row, Scale, StudyResult, mean_error

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "finn2017_maml"
TITLE = "An initial point from which a few steps go far"
CLAIM = "Trained through its own inner steps, an initial point learns a new task from a few examples in a few steps"

D = torch.float64
OPTIMA = {"MAML": (0.355263, 0.521300), "first order": (0.3, 0.457831), "joint training": (0.25, 0.4)}
RATES = (0.003, 0.01, 0.02)
DIGIT_RATES = {"trained classifier": (0.005, 0.01, 0.03, 0.1), "new weights": (0.1, 0.3, 0.6)}
STEPS = (0, 1, 3, 10)
DIGIT_STEPS = (1, 2, 10, 30)
HELD_OUT = (3, 4, 7)  # none of which turns into another


@dataclass(frozen=True)
class Budget:
    """Size of the runs."""

    seeds: int = 3
    outer: int = 160
    rate: float = 1e-2
    tasks: int = 16
    test: int = 100
    digit_outer: int = 40
    digit_test: int = 25


BUDGETS = {"small": Budget(), "full": Budget(5, 1500, 3e-3, 25, 200, 400, 100)}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Find the optima, compare the sweeps, and meta-train on sine waves and on digits.

    Args:
        scale: ``"small"``: three seeds, some ten seconds on one core; ``"full"``: five seeds, longer training.
        progress: called with the share done and a few words.

    Returns:
        The rows, a figure, and the numbers.

    Example:
        >>> from bolza.studies import get
        >>> get("finn2017_maml").reference.arxiv
        '1703.03400'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    rows = optimum_rows() + sweep_rows()
    waves, digits = [], []
    for seed in range(budget.seeds):
        report((2 * seed + 0.2) / (2 * budget.seeds), f"sine waves, seed {seed}")
        waves.append(sine_trial(seed, budget))
        report((2 * seed + 1) / (2 * budget.seeds), f"digits, seed {seed}")
        digits.append(digit_trial(seed, budget))
    rows += sine_rows(waves) + digit_rows(digits)
    notes = (
        f"Sine waves: 1-40-40-1 ReLU, 5 points, one inner step at 0.01, {budget.outer} outer steps of {budget.tasks} "
        "tasks; twice as many for the first-order form and four times as many for joint training, so that all have "
        "the same number of gradients (a product with the Hessian counts as two).",
        f"Digits: five of the classes that {HELD_OUT} give in four orientations, five examples each; trained on the "
        f"other seven digits, 64-64-64-5 ReLU, two inner steps at 0.3, {budget.digit_outer} outer steps of 8 "
        "tasks. Rivals: new weights, and weights trained to tell the 28 training classes apart, with a new head.",
        "Rates and numbers of steps of the rivals are chosen on the tasks of the test, which favours them. Errors are "
        "over seeds of weights and tasks.",
    )
    report(1.0, "done")
    facts = {"sine waves": [w["curves"] for w in waves], "digits": digits}
    return StudyResult(KEY, TITLE, REFERENCE, CLAIM, scale, rows, (_figure(waves, digits),), notes, facts)


def optimum_rows() -> list[Row]:
    """Where the three gradients of two quadratic tasks vanish."""
    curvature = torch.tensor([[1.0, 2.0], [3.0, 0.5]], dtype=D)
    tasks = curvature, torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=D)

    def task(w: Tensor, data: tuple[Tensor, Tensor]) -> Tensor:
        return (data[0] * (w - data[1]).square()).sum() / 2

    rows = []
    for name, (mode, steps) in {
        "MAML": ("checkpointed", 1),
        "first order": ("first_order", 1),
        "joint training": ("reverse", 0),
    }.items():

        def g(w: Tensor, mode: Any = mode, steps: int = steps) -> Tensor:
            found: Tensor = meta_gradient(task, w, tasks, tasks, 0.1, steps, mode=mode).gradient
            return found

        zero = g(torch.zeros(2, dtype=D))
        slope = torch.stack([g(e) - zero for e in torch.eye(2, dtype=D)], 1)
        end = torch.linalg.solve(slope, -zero)
        expected = OPTIMA[name]
        error = float((end - torch.tensor(expected, dtype=D)).abs().max())
        rows.append(
            Row(
                f"two quadratic tasks: where {name} comes to rest",
                f"({expected[0]:.6f}, {expected[1]:.6f})",
                f"({float(end[0]):.6f}, {float(end[1]):.6f})",
                None,
                error < 1e-6,
                "closed form",
            )
        )
    return rows


def sweep_rows() -> list[Row]:
    """The costate sweep against autograd through the loop, task by task."""
    net = sine_network(0).to(D)
    params = dict(net.named_parameters())
    (x, y), (qx, qy) = Sinusoids(5, 5, dtype=D).sample(4, torch.Generator().manual_seed(0))

    def loss(p: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(functional_call(net, p, batch[0]), batch[1])

    total = torch.zeros((), dtype=D)
    for i in range(4):
        w: dict[str, Tensor] = dict(params)
        for _ in range(25):
            slopes = torch.autograd.grad(loss(w, (x[i], y[i])), list(w.values()), create_graph=True)
            w = {name: p - 0.01 * g for (name, p), g in zip(w.items(), slopes, strict=True)}
        total = total + loss(w, (qx[i], qy[i])) / 4
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(params.values()))])
    swept = meta_gradient(loss, params, (x, y), (qx, qy), 0.01, 25, mode="checkpointed")
    found = torch.cat([g.flatten() for g in swept.gradient.values()])
    error = float((found - exact).norm() / exact.norm())
    return [
        Row(
            "costate at time 0 against autograd through 25 inner steps, relative error",
            0.0,
            error,
            1e-10,
            error < 1e-10,
        ),
        Row(
            "states held by that sweep", "2√25 = 10", float(swept.states_held), None, swept.states_held <= 10
        ),
    ]


def sine_network(seed: int) -> nn.Sequential:
    """The network of the sine waves, started from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


def digit_network(seed: int, outputs: int = 5) -> nn.Sequential:
    """The network of the digits, started from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outputs)
        )


def descend(net: nn.Module, losses: Callable[[], Tensor], steps: int, rate: float = 5e-3) -> None:
    """Adam on whatever is drawn next."""
    outer = torch.optim.Adam(net.parameters(), lr=rate)
    for _ in range(steps):
        outer.zero_grad()
        losses().backward()
        outer.step()


def measure(net: nn.Module, test: TaskBatch, rate: float, steps: int) -> float:
    """Mean square error or accuracy on the query sets after so many inner steps."""
    out = MAML(net, lr=rate).predict(test.support, test.query[0], steps=steps)
    if out.shape[-1] == 1:
        return float((out - test.query[1]).square().mean())
    return float((out.argmax(-1) == test.query[1]).double().mean())


def sine_trial(seed: int, budget: Budget) -> dict[str, Any]:
    """Error after each number of steps, for the three ways to find an initial point."""
    test = Sinusoids(5, 50).sample(budget.test, torch.Generator().manual_seed(1000 + seed))
    family, curves, nets = Sinusoids(5, 10), {}, {}
    for name, first_order, factor in (("MAML", False, 1), ("first order", True, 2)):
        net, draw = sine_network(seed), torch.Generator().manual_seed(seed)
        maml = MAML(net, lr=0.01, steps=1, first_order=first_order)

        def through(maml: MAML = maml, draw: torch.Generator = draw) -> Tensor:
            found: Tensor = maml(*family.sample(budget.tasks, draw))
            return found

        descend(net, through, factor * budget.outer, budget.rate)
        curves[name] = [measure(net, test, 0.01, k) for k in STEPS]
        nets[name] = net
    net, draw = sine_network(seed), torch.Generator().manual_seed(seed)

    def joint() -> Tensor:
        (x, y), (qx, qy) = family.sample(budget.tasks, draw)
        return F.mse_loss(net(torch.cat([x, qx], 1)), torch.cat([y, qy], 1))

    descend(net, joint, 4 * budget.outer, budget.rate)
    grid = {rate: [measure(net, test, rate, k) for k in STEPS] for rate in RATES}
    curves["joint training"] = min(grid.values(), key=min)
    nets["joint training"] = net
    best = min(grid, key=lambda rate: min(grid[rate]))
    return {"curves": curves, "nets": nets, "rates": {"joint training": best}, "test": test}


def digit_trial(seed: int, budget: Budget) -> dict[str, list[float]]:
    """Accuracy on new classes after each number of steps, for three initial points."""
    train: FewShot = digit_tasks(5, 5, 10, classes=set(range(10)) - set(HELD_OUT))
    test = digit_tasks(5, 5, 10, classes=HELD_OUT).sample(
        budget.digit_test, torch.Generator().manual_seed(1000 + seed)
    )
    draw, net = torch.Generator().manual_seed(seed), digit_network(seed)
    maml = MAML(net, lr=0.3, steps=2)
    descend(net, lambda: maml(*train.sample(8, draw)), budget.digit_outer)
    classes = torch.unique(train.y, return_inverse=True)[1]
    told = digit_network(seed, int(classes.max()) + 1)

    def apart() -> Tensor:
        rows = torch.randint(len(classes), (8 * 75,), generator=draw)
        return F.cross_entropy(told(train.x[rows]), classes[rows])

    descend(told, apart, 7 * budget.digit_outer)  # two inner gradients, two Hessians, one at the end
    head = nn.Linear(64, 5)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    found = {"MAML": [measure(net, test, 0.3, k) for k in DIGIT_STEPS]}
    for name, start in (
        ("trained classifier", nn.Sequential(*list(told)[:4], head)),
        ("new weights", digit_network(seed)),
    ):
        grid = [[measure(start, test, rate, k) for k in DIGIT_STEPS] for rate in DIGIT_RATES[name]]
        # the best rate for each number of steps
        found[name] = [max(values[i] for values in grid) for i in range(len(DIGIT_STEPS))]
    return found


def below(mean: float, error: float, limit: float) -> bool | None:
    """Whether a mean is below a limit by two errors; None where that is open."""
    return True if mean + 2 * error < limit else False if mean - 2 * error > limit else None


def sine_rows(trials: list[dict[str, Any]]) -> list[Row]:
    """What five points of a sine wave are good for."""
    one, ten = STEPS.index(1), STEPS.index(10)

    def ratio(over: Callable[[dict[str, list[float]]], float]) -> tuple[float, float]:
        return mean_error(over(trial["curves"]) for trial in trials)

    gain, error = ratio(lambda c: c["MAML"][one] / c["MAML"][0])
    rows = [
        Row(
            "sine waves: error after one step over that before", "< 0.7", gain, error, below(gain, error, 0.7)
        )
    ]
    gain, error = ratio(lambda c: c["MAML"][ten] / c["MAML"][one])
    rows.append(
        Row(
            "sine waves: it goes on learning: error after ten steps over that after the one it was trained for",
            "< 1",
            gain,
            error,
            below(gain, error, 1),
        )
    )
    gain, error = ratio(lambda c: c["MAML"][ten] / min(c["joint training"]))
    rows.append(
        Row(
            "sine waves: error after ten steps over the best of joint training with fine-tuning",
            "< 1",
            gain,
            error,
            below(gain, error, 1),
            "rate and number of steps of the rival from a grid; as many gradients",
        )
    )
    gain, error = ratio(lambda c: c["first order"][ten] / c["MAML"][ten])
    rows.append(
        Row(
            "sine waves: first-order form over MAML, error after ten steps",
            "about 1",
            gain,
            error,
            below(gain, error, 1.15),
            "at most 15 % more; as many gradients, so twice the outer steps",
        )
    )
    return rows


def digit_rows(trials: list[dict[str, list[float]]]) -> list[Row]:
    """What five examples of five unseen classes are good for."""
    two = DIGIT_STEPS.index(2)
    few = mean_error(
        t["MAML"][two] - max(t["trained classifier"][two], t["new weights"][two]) for t in trials
    )
    many = mean_error(max(t["MAML"]) - max(*t["trained classifier"], *t["new weights"]) for t in trials)
    return [
        Row(
            "digits: accuracy after two steps on new classes, gain over the better rival after two",
            "> 0",
            *few,
            below(-few[0], few[1], 0),
            "to two errors",
        ),
        Row(
            "digits: accuracy after up to thirty steps, gain over the best rival",
            "> 0",
            *many,
            below(-many[0], many[1], 0),
            "to two errors; with so many steps the initial point matters less",
        ),
    ]


def _figure(waves: list[dict[str, Any]], digits: list[dict[str, list[float]]]) -> Figure:
    return Figure(
        "A few steps from an initial point",
        partial(_draw, waves=waves, digits=digits),
        caption=(
            "Left: a sine wave from five points, after ten steps from each initial point. Middle: error on new sine "
            "waves against the number of steps. Right: accuracy on five unseen classes of digits, best rate of the "
            "rivals for each number of steps. Bars are one standard error over seeds."
        ),
        alt="Fitted sine waves; error falling with inner steps; accuracy rising with inner steps.",
        size=(10.4, 3.3),
        key="maml",
    )


def _draw(canvas: Any, waves: list[dict[str, Any]], digits: list[dict[str, list[float]]]) -> None:
    left, middle, right = canvas.subplots(1, 3, width_ratios=[1.2, 1, 1])
    colours = {"MAML": "first", "first order": "third", "joint training": "second"}
    trial = waves[0]
    x, y = (part[:1] for part in trial["test"].support)
    order = trial["test"].query[0][0, :, 0].argsort()
    left.plot(
        trial["test"].query[0][0, order, 0],
        trial["test"].query[1][0, order, 0],
        color=role("ink"),
        lw=1,
        ls=":",
    )
    grid = torch.linspace(-5, 5, 101)[None, :, None]
    for name in ("MAML", "joint training"):
        rate = trial["rates"].get(name, 0.01)
        out = MAML(trial["nets"][name], lr=rate).predict((x, y), grid, steps=10)
        left.plot(grid[0, :, 0], out[0, :, 0], color=role(colours[name]), label=name)
    left.plot(x[0, :, 0], y[0, :, 0], "o", color=role("ink"), ms=5, label="five points")
    left.set(xlabel="x", ylabel="y")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, 1.17), ncols=3)
    for name, colour in colours.items():
        pairs = [mean_error(values) for values in zip(*(w["curves"][name] for w in waves), strict=True)]
        middle.errorbar(
            STEPS,
            [m for m, _ in pairs],
            [e for _, e in pairs],
            color=role(colour),
            marker="o",
            ms=4,
            label=name,
        )
    middle.set(xlabel="inner steps", ylabel="mean square error", ylim=(0, None))
    middle.legend(
        loc="upper center", bbox_to_anchor=(0.5, 1.17), ncols=3, columnspacing=0.8, handlelength=1.2
    )
    names = {"MAML": "first", "trained classifier": "second", "new weights": "third"}
    for name, colour in names.items():
        pairs = [mean_error(values) for values in zip(*(d[name] for d in digits), strict=True)]
        right.errorbar(
            DIGIT_STEPS,
            [m for m, _ in pairs],
            [e for _, e in pairs],
            color=role(colour),
            marker="o",
            ms=4,
            label=name,
        )
    right.set(xlabel="inner steps", ylabel="accuracy", xscale="log", ylim=(0.2, 1))
    right.set_xticks(DIGIT_STEPS, [str(k) for k in DIGIT_STEPS])
    right.legend(loc="lower right")
