r"""Layer-parallel propagation by parareal and multigrid: exactness, convergence, and training with few iterations.

    U_{k+1} ← G(U_k^new) + F(U_k^old) − G(U_k^old)

The paper replaces the serial sweeps through a residual network by a multigrid iteration over its layers, and trains
with states and adjoints that are only approximately right. Here: 32 layers in eight slices. After as many iterations as
slices (half, with FCF relaxation) nothing is left of the error; after one or two it depends on the step h = T/L
and on how smoothly the weights change from layer to layer, which is why the paper penalises their differences. Then a
network of 32 blocks is trained on digits with one warm-started iteration a step, beside back-propagation.

Reference: Günther, Ruthotto, Schroder, Cyr & Gauger (2018), arXiv:1812.04352.

Departures: smaller networks, digits, SGD with momentum. One machine: the critical path is counted, not timed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.core import CallableCost, Trajectory, adjoint, rollout
from bolza.data import digits
from bolza.ops.trees import tree_to_vector
from bolza.optim import LayerParallel
from bolza.report import Figure, log_axis, role
from bolza.studies._study import Progress, Row, Scale, StudyResult
from bolza.systems import ODESystem, ParallelRun, mgrit, parallel_adjoint, parareal
from bolza.systems.multigrid import Relaxation
from bolza.systems.parareal import GUNTHER

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "gunther2018_layer_parallel"
TITLE = "Multigrid over the layers of a residual network"
CLAIM = "One or two parallel iterations for states and adjoints are enough to train a deep residual network"
REFERENCE = GUNTHER

F64 = torch.float64
DEPTH, SLICES, WIDTH = 32, 8, 8
BATCH = 64
CASES = {
    "smooth weights, T = 1": (1.0, True),
    "smooth weights, T = 4": (4.0, True),
    "random weights, T = 1": (1.0, False),
    "random weights, T = 4": (4.0, False),
}


@dataclass(frozen=True)
class Budget:
    """Size of the runs."""

    draws: int = 3
    epochs: int = 4
    seeds: int = 2
    iterations: tuple[int, ...] = (1,)
    width: int = 16
    smoothing: float = 1e-3


BUDGETS = {"small": Budget(), "full": Budget(draws=40, epochs=15, seeds=5, width=32, iterations=(1, 2))}


def residual_system(time: float, smooth: bool, seed: int) -> ODESystem:
    """A tanh field over 32 Euler steps; weights turn by half a circle over the depth, or are drawn for each layer."""
    draw = torch.Generator().manual_seed(seed)
    a, b, w = (torch.randn(DEPTH, WIDTH, WIDTH, generator=draw, dtype=F64) / WIDTH**0.5 for _ in range(3))
    s = torch.linspace(0, math.pi, DEPTH, dtype=F64)[:, None, None]
    weights = a[:1] * s.cos() + b[:1] * s.sin() if smooth else w
    return ODESystem(
        lambda t, x, u: torch.tanh(x @ u["w"].T), DEPTH, time / DEPTH, controls=[{"w": w} for w in weights]
    )


def state_error(run: ParallelRun, serial: Trajectory) -> float:
    """Largest relative error of a state."""
    pairs = zip(run.trajectory.states, serial.states, strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


@dataclass
class Propagated:
    """Errors of one kind of weights: a list over iterations for each draw."""

    parareal: list[list[float]]
    fcf: list[list[float]]
    cosine: list[float]


def propagate(time: float, smooth: bool, draws: int) -> Propagated:
    """Errors after each number of iterations, and the cosine of the gradient from two and two."""
    found = Propagated([], [], [])
    cost = CallableCost(terminal=lambda x: (x - 1).square().sum(-1).mean() / 2)
    for seed in range(draws):
        system = residual_system(time, smooth, seed)
        x0 = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(100 + seed), dtype=F64)
        serial = rollout(system, x0)
        plans: list[tuple[list[list[float]], Relaxation, int]] = [
            (found.parareal, "F", SLICES),
            (found.fcf, "FCF", SLICES // 2),
        ]
        for errors, relaxation, most in plans:
            course, boundary = [], None
            for k in range(most + 1):  # one iteration more from where the last one ended
                run = mgrit(system, x0, SLICES, iterations=min(k, 1), relaxation=relaxation, initial=boundary)
                course.append(state_error(run, serial))
                boundary = [run.trajectory.states[b] for b in run.boundaries]
            errors.append(course)
        exact = adjoint(system, cost, serial)
        inexact = parallel_adjoint(system, cost, parareal(system, x0, SLICES, iterations=2), iterations=2)
        a, b = (tree_to_vector(list(t.gradients or ())) for t in (inexact.trajectory, exact))
        found.cosine.append(float(a @ b / a.norm() / b.norm()))
    return found


class Block(nn.Module):
    """The residual block x + h tanh(W x + b)."""

    def __init__(self, width: int, h: float) -> None:
        super().__init__()
        self.h, self.layer = h, nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the next state."""
        return x + self.h * torch.tanh(self.layer(x))


def train(budget: Budget, seed: int, iterations: int | None) -> tuple[list[float], float, float]:
    """Train 32 blocks; no iterations: serially. Test accuracy after each epoch, critical path, last mismatch."""
    data = digits()
    low, high = data.train_x.amin(), data.train_x.amax()
    x, x_test = ((part - low) / (high - low) for part in (data.train_x, data.test_x))
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        blocks = [Block(budget.width, 4.0 / DEPTH) for _ in range(DEPTH)]
        net = nn.Sequential(nn.Linear(64, budget.width), *blocks, nn.Linear(budget.width, 10))
    for block in blocks[1:]:  # weights that are smooth in depth from the start
        block.load_state_dict(blocks[0].state_dict())
    slices = 1 if iterations is None else SLICES
    parallel = LayerParallel(
        net, F.cross_entropy, slices, method="parareal", iterations=iterations or 0, samples=len(x)
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    draw = torch.Generator().manual_seed(seed)
    accuracy, waited, steps = [], 0.0, 0
    for _ in range(budget.epochs):
        for rows in torch.randperm(len(x), generator=draw).split(BATCH):
            optimizer.zero_grad()
            parallel.backward(x[rows], data.train_y[rows], rows)
            smoothness = sum(
                (a.layer.weight - b.layer.weight).square().sum()
                for a, b in zip(blocks, blocks[1:], strict=False)
            )
            (budget.smoothing * DEPTH / 2 * smoothness).backward()  # type: ignore[union-attr]
            optimizer.step()
            waited, steps = waited + parallel.critical_path / parallel.serial_path, steps + 1
        with torch.no_grad():
            accuracy.append(float((net(x_test).argmax(1) == data.test_y).float().mean()))
    return accuracy, waited / steps, parallel.violation


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Propagate and train.

    Args:
        scale: ``"small"``: three draws, four epochs, two seeds, one iteration a step; ``"full"``: forty draws, fifteen
            epochs, five seeds, one and two iterations.
        progress: called with the share done and a few words.

    Returns:
        Rows on errors, gradients, critical path and accuracy, one figure.

    Example:
        >>> from bolza.studies import get
        >>> get("1812.04352").key
        'gunther2018_layer_parallel'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    errors = {}
    for i, (name, (time, smooth)) in enumerate(CASES.items()):
        report(0.1 * i, name)
        errors[name] = propagate(time, smooth, budget.draws)
    courses: dict[str, list[tuple[list[float], float, float]]] = {}
    ways: dict[str, int | None] = {"serial": None} | {f"iterations: {k}": k for k in budget.iterations}
    for i, (name, iterations) in enumerate(ways.items()):
        report(0.4 + 0.6 * i / len(ways), f"training, {name}")
        courses[name] = [train(budget, seed, iterations) for seed in range(budget.seeds)]
    report(1.0, "done")
    return StudyResult(
        KEY,
        TITLE,
        REFERENCE,
        CLAIM,
        scale,
        [*error_rows(errors), *path_rows(), *training_rows(courses)],
        (_figure(errors, courses),),
        notes=(
            f"{DEPTH} layers in {SLICES} slices; errors are the largest relative error of a state, over {budget.draws} "
            "draws of weights and inputs.",
            f"Training: the loss and {budget.smoothing:g}·L/2 Σ|W_(t+1) − W_t|², the same weights in all layers at the "
            "start, states and costates of a sample kept from epoch to epoch. The critical path gives each slice its "
            "own processor and counts two units for a backward stage.",
        ),
        facts={
            "errors": {name: vars(value) for name, value in errors.items()},
            "training": {name: [list(c) for c in value] for name, value in courses.items()},
        },
    )


def error_rows(errors: dict[str, Propagated]) -> list[Row]:
    """Exactness, errors of few iterations, and gradients."""
    worst = max(max(e[-1] for e in found.parareal) for found in errors.values())
    half = max(max(e[-1] for e in found.fcf) for found in errors.values())
    rows = [
        Row(
            f"error after {SLICES} iterations of parareal, all cases",
            0.0,
            worst,
            None,
            worst < 1e-12,
            "judged to 1e-12",
        ),
        Row(
            f"error after {SLICES // 2} iterations with FCF relaxation",
            0.0,
            half,
            None,
            half < 1e-12,
            "judged to 1e-12",
        ),
    ]
    for name, found in errors.items():
        means = [float(torch.tensor(found.parareal).log()[:, k].mean().exp()) for k in range(3)]
        cosine = min(found.cosine)
        note = "geometric mean; after 0, 1 and 2 iterations " + ", ".join(f"{m:.2g}" for m in means)
        enough = name != "random weights, T = 4"  # why the paper asks for small steps and smooth weights
        rows.append(
            Row(
                f"error after two iterations: {name}",
                "below 0.02" if enough else "not below 0.02",
                means[2],
                None,
                (means[2] < 0.02) == enough,
                note,
            )
        )
        rows.append(
            Row(
                f"gradient from two and two iterations, cosine with the exact one: {name}",
                "≥ 0.999" if enough else "below 0.999",
                cosine,
                None,
                (cosine >= 0.999) == enough,
                "smallest over the draws",
            )
        )
    return rows


def path_rows() -> list[Row]:
    """The critical path against its model."""
    system = residual_system(1.0, True, 0)
    x0 = torch.ones(1, WIDTH, dtype=F64)
    one, two = (parareal(system, x0, SLICES, iterations=k).critical_path for k in (1, 2))
    model = SLICES + DEPTH // SLICES
    return [
        Row(
            "steps on the critical path of one more iteration",
            float(model),
            float(two - one),
            None,
            two - one == model,
            f"a slice and {SLICES} jumps; the serial run has {DEPTH}, so an iteration gains at most "
            f"{DEPTH / model:.2f}",
        )
    ]


def training_rows(courses: dict[str, list[tuple[list[float], float, float]]]) -> list[Row]:
    """Accuracy beside serial training at equal epochs, and the critical path."""
    rows = []
    serial = [accuracy[-1] for accuracy, _, _ in courses["serial"]]
    for name in [name for name in courses if name != "serial"]:
        final = [accuracy[-1] for accuracy, _, _ in courses[name]]
        gaps = torch.tensor(final, dtype=F64) - torch.tensor(serial, dtype=F64)
        mean, error = float(gaps.mean()), float(gaps.std() / len(gaps) ** 0.5) if len(gaps) > 1 else 0.0
        share = courses[name][0][1]
        rows.append(
            Row(
                f"test accuracy minus serial, {name} a step",
                0.0,
                mean,
                error,
                mean >= -0.05,
                f"{_mean(final):.3f} against {_mean(serial):.3f}, critical path {share:.2f} of serial; judged to 0.05",
            )
        )
    return rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _figure(
    errors: dict[str, Propagated], courses: dict[str, list[tuple[list[float], float, float]]]
) -> Figure:
    return Figure(
        "Few iterations are enough where weights are smooth",
        partial(_draw, errors=errors, courses=courses),
        caption="Left: relative error of the states over iterations of parareal (geometric mean and range over draws). "
        "Right: test accuracy on digits with iterations in place of both sweeps, mean over seeds.",
        alt="Error over iterations for four kinds of weights; accuracy over epochs for three ways of training.",
        size=(9.4, 3.6),
        key="parareal",
    )


def _draw(
    canvas: Any, errors: dict[str, Propagated], courses: dict[str, list[tuple[list[float], float, float]]]
) -> None:
    left, right = canvas.subplots(1, 2)
    looks = [("second", "o-"), ("second", "s--"), ("first", "o-"), ("first", "s--")]
    for (name, found), (colour, style) in zip(errors.items(), looks, strict=True):
        logs = torch.tensor(found.parareal).clamp_min(1e-17).log10()
        steps = range(logs.shape[1])
        left.plot(steps, 10 ** logs.mean(0), style, color=role(colour), label=name)
        left.fill_between(
            steps, 10 ** logs.amin(0), 10 ** logs.amax(0), color=role(colour), alpha=0.08, linewidth=0
        )
    log_axis(left, "y")
    left.set(xlabel="iterations of parareal", ylabel="relative error of the states")
    left.legend(fontsize=8)
    for name, (colour, dash) in zip(courses, [("ink", "-"), ("first", "--"), ("second", ":")], strict=False):
        mean = torch.tensor([accuracy for accuracy, _, _ in courses[name]]).mean(0)
        label = f"{name}, critical path {courses[name][0][1]:.2f}"
        right.plot(range(1, len(mean) + 1), mean, dash, color=role(colour), label=label, linewidth=2)
    right.set(xlabel="epoch", ylabel="test accuracy")
    right.legend(loc="lower right")
