r"""ContinuousNet: one set of weights, many depths.

A residual network is forward Euler with one step a block, and its weights fit that step: evaluate the same weights on
sixteen times finer steps, and the features are others. Trained inside a method of higher order, the weights describe
the differential equation itself; they may then be evaluated with other steps and other methods. Cells of depth can be
doubled during training (refinement) without changing the function.

Here: digits, a field of two layers on 4 cells of [0, 16], one step a cell. With short horizons even Euler looks
invariant, because every block is close to the identity.

Reference: Queiruga, Erichson, Taylor & Mahoney (2020), arXiv:2008.02389, §5 and §6.

Departures: multi-layer perceptrons on 8×8 digits (and, at full scale, small convolutional nets on them) instead of
CIFAR; Adam.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from bolza.data import Dataset, digits, digits_images
from bolza.models.continuous.net import QUEIRUGA as REFERENCE
from bolza.models.continuous.net import ContinuousNet, continuous_cnn, continuous_mlp
from bolza.report import Figure, log_axis, role
from bolza.studies._study import Progress, Row, Scale, StudyResult, mean_error

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "queiruga2020_continuous"
TITLE = "Train at one depth, run at any"
CLAIM = (
    "Weights that were trained inside a Runge–Kutta scheme do not depend on the graph they are evaluated on; "
    "those of a residual network do"
)
CELLS = 4
METHODS = ("euler", "midpoint", "rk4")
NAMES = {"euler": "Euler (a residual network)", "midpoint": "midpoint", "rk4": "RK4"}


@dataclass(frozen=True)
class Budget:
    """Size of the experiment."""

    seeds: int = 2
    epochs: int = 12
    horizon: float = 16.0
    batch: int = 64
    finest: int = 16
    horizons: tuple[float, ...] = ()
    conv_epochs: int = 0


BUDGETS = {
    "small": Budget(),
    "full": Budget(seeds=5, epochs=25, horizons=(2.0, 4.0, 8.0, 16.0), conv_epochs=10),
}


@cache
def _digits() -> Dataset:
    return digits()


@dataclass
class Found:
    """What one training gave: accuracy and change of state by factor of refinement of the steps."""

    accuracy: dict[int, float] = field(default_factory=dict)
    change: dict[int, float] = field(default_factory=dict)
    by_euler: float = math.nan
    evaluations: int = 0
    seconds: float = 0.0


def fit(
    net: ContinuousNet, data: Dataset, epochs: int, batch: int, draw: torch.Generator, lr: float = 3e-3
) -> None:
    """Adam for some epochs."""
    optimizer = torch.optim.Adam(net.parameters(), lr)
    net.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(data), generator=draw).split(batch):
            optimizer.zero_grad()
            cross_entropy(net(data.train_x[rows]), data.train_y[rows]).backward()
            optimizer.step()
    net.eval()


@torch.no_grad()
def accuracy(net: ContinuousNet, data: Dataset, **options: Any) -> float:
    """Share of the test samples that are classified rightly."""
    return float((net(data.test_x, **options).argmax(1) == data.test_y).double().mean())


def trained(
    method: str, seed: int, budget: Budget, horizon: float, refined: bool = False
) -> tuple[ContinuousNet, Found]:
    """A network trained with one step a cell; if refined, on 1, 2 and 4 cells for a third of the epochs each."""
    data, found = _digits(), Found()
    draw = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = continuous_mlp(64, 10, cells=1 if refined else CELLS, horizon=horizon, method=method)
    start = time.process_time()
    stages = (
        [budget.epochs - 2 * (budget.epochs // 3), *[budget.epochs // 3] * 2] if refined else [budget.epochs]
    )
    for k, epochs in enumerate(stages):
        if k:
            net.refine()
        fit(net, data, epochs, budget.batch, draw)
        found.evaluations += epochs * net.blocks[0].steps
    found.seconds = time.process_time() - start
    with torch.no_grad():
        state = net[0](data.test_x)
        factors = [2**k for k in range(int(math.log2(budget.finest)) + 1)]
        ends = {f: net[1](state, steps=CELLS * f) for f in factors}
        for f, end in ends.items():
            found.change[f] = float((ends[1] - end).norm() / end.norm())
            found.accuracy[f] = float((net[2](end).argmax(1) == data.test_y).double().mean())
    found.by_euler = accuracy(net, data, method="euler", steps=4 * CELLS)
    return net, found


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Train by Euler, midpoint and RK4, and evaluate on finer and finer steps.

    Args:
        scale: ``"small"``: 2 seeds; ``"full"``: 5 seeds, longer, several horizons, and convolutional nets.
        progress: called with the share done and a few words.

    Returns:
        Rows on invariance and refinement, one figure.

    Example:
        >>> from bolza.studies import get
        >>> get("queiruga2020_continuous").title
        'Train at one depth, run at any'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    jobs = len(METHODS) + 1 + 2 * len(budget.horizons) + (3 if budget.conv_epochs else 0)
    done = 0
    found: dict[str, list[Found]] = {}
    for method in METHODS:
        report(done / jobs, f"training by {NAMES[method]}")
        found[method] = [trained(method, s, budget, budget.horizon)[1] for s in range(budget.seeds)]
        done += 1
    report(done / jobs, "refining during training")
    direct = found["rk4"]
    refined = [trained("rk4", s, budget, budget.horizon, refined=True)[1] for s in range(budget.seeds)]
    done += 1
    rows = invariance_rows(found, budget) + refinement_rows(direct, refined, budget)
    sweep: dict[str, list[tuple[float, float]]] = {"euler": [], "rk4": []}
    for horizon in budget.horizons:
        for method, points in sweep.items():
            report(done / jobs, f"horizon {horizon:g}, {method}")
            values = [trained(method, s, budget, horizon)[1] for s in range(2)]
            drops = [v.accuracy[1] - v.accuracy[budget.finest] for v in values]
            points.append((horizon, sum(drops) / len(drops)))
            done += 1
    if budget.conv_epochs:
        report(done / jobs, "convolutional nets")
        rows += convolutional_rows(budget)
    report(1.0, "done")
    return StudyResult(
        KEY,
        TITLE,
        REFERENCE,
        CLAIM,
        scale,
        rows,
        (_figure(found, budget, sweep),),
        notes=(
            f"Digits, state of 32 numbers, tanh field, {CELLS} cells over a time of {budget.horizon:g}, Adam at 3e-3, "
            f"{budget.epochs} epochs, {budget.seeds} seeds. Errors are standard errors over seeds.",
            "The horizon is long on purpose. At short ones even Euler is invariant to a point or two, because every "
            "block is close to the identity.",
            "The table of the paper is of CIFAR-10, which is not run here.",
        ),
        facts={
            "accuracy": {m: [f.accuracy for f in fs] for m, fs in found.items()},
            "change": {m: [f.change for f in fs] for m, fs in found.items()},
            "refined": [f.accuracy[1] for f in refined],
            "cpu_seconds": {"direct": [f.seconds for f in direct], "refined": [f.seconds for f in refined]},
            "drop_by_horizon": sweep,
        },
    )


def invariance_rows(found: dict[str, list[Found]], budget: Budget) -> list[Row]:
    """How much accuracy and features depend on the steps."""
    fine = budget.finest
    out = []
    for method, expected, bound, lost in (
        ("euler", "a large drop", 0.08, True),
        ("midpoint", "a smaller drop than Euler", None, True),
        ("rk4", "no drop", 0.01, False),
    ):
        drop, error = mean_error([f.accuracy[1] - f.accuracy[fine] for f in found[method]])
        change = mean_error([f.change[fine] for f in found[method]])[0]
        if bound is None:
            other = mean_error([f.accuracy[1] - f.accuracy[fine] for f in found["euler"]])[0]
            holds, note = drop < other, "compared with Euler"
        else:
            holds = drop >= bound if lost else drop <= bound
            note = f"at {'least' if lost else 'most'} {bound:g}"
        out.append(
            Row(
                f"trained by {NAMES[method]}: accuracy lost on {fine}× finer steps",
                expected,
                drop,
                error,
                holds,
                f"{note}; the state changes by {change:.3f} of its norm",
            )
        )
    gap, error = mean_error([abs(f.accuracy[1] - f.by_euler) for f in found["rk4"]])
    out.append(
        Row(
            "trained by RK4, evaluated by Euler on 4× finer steps: change of accuracy",
            "small",
            gap,
            error,
            gap <= 0.02,
            "at most 0.02; as many evaluations of the field",
        )
    )
    return out


def refinement_rows(direct: list[Found], refined: list[Found], budget: Budget) -> list[Row]:
    """Refinement: exact when it happens, as good in the end, cheaper."""
    net = trained("rk4", 0, Budget(seeds=1, epochs=1, finest=1), 4.0)[0]
    x = _digits().test_x
    with torch.no_grad():
        before = net(x, steps=16)
        net.refine()
        moved = float((net(x, steps=16) - before).abs().max())
    gain, error = mean_error([r.accuracy[1] - d.accuracy[1] for d, r in zip(direct, refined, strict=True)])
    # one standard error of the share of right answers among those that differ: a point at this size of test set
    error = max(error, (2 * 0.03 * 0.97 / (len(x) * budget.seeds)) ** 0.5)
    share = refined[0].evaluations / direct[0].evaluations
    return [
        Row(
            "refinement changes the output at equal steps by", 0.0, moved, None, moved == 0.0, "largest entry"
        ),
        Row(
            "accuracy of refined training (1 → 2 → 4 cells) over training on 4 cells from the start",
            "within a point",
            gain,
            error,
            True if gain >= -0.01 else None if gain + 2 * error >= -0.01 else False,
            "open within two standard errors",
        ),
        Row(
            "evaluations of the field that refined training takes, as a share",
            "about 2/3 of the time",
            share,
            None,
            share <= 2 / 3,
            "processor time, as a share: "
            f"{sum(r.seconds for r in refined) / sum(d.seconds for d in direct):.2f} (noisy)",
        ),
    ]


def convolutional_rows(budget: Budget) -> list[Row]:
    """A small convolutional net: fields of two convolutions with norms of their own in every cell."""
    data, scores = digits_images(), {}
    for method in ("euler", "rk4"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = continuous_cnn(widths=(8, 16), cells=2, horizon=4.0, method=method)
        fit(net, data, budget.conv_epochs, 64, torch.Generator().manual_seed(0))
        same = accuracy(net, data)
        plain = accuracy(net, data, steps=16)
        net.recalibrate(data.train_x.split(256), steps=16)
        scores[method] = same, plain, accuracy(net, data, steps=16)
    return [
        Row(
            f"convolutional, trained by {NAMES[method]}: accuracy lost on 8× finer steps, statistics taken anew",
            "large" if method == "euler" else "no drop",
            same - anew,
            None,
            (same - anew >= 0.05) if method == "euler" else (same - anew <= 0.02),
            f"at {'least 0.05' if method == 'euler' else 'most 0.02'}; with the statistics of training "
            f"{same - plain:.3f}; accuracy {same:.3f}",
        )
        for method, (same, plain, anew) in scores.items()
    ]


def _figure(
    found: dict[str, list[Found]], budget: Budget, sweep: dict[str, list[tuple[float, float]]]
) -> Figure:
    return Figure(
        "The same weights on finer steps",
        partial(_draw, found=found, sweep=sweep),
        caption="Left: test accuracy of weights that were trained with one step a cell, on finer steps of the same "
        "method; thin lines are seeds. Right: distance of the last state from that of training, relative to its norm.",
        alt="Accuracy falls for Euler and stays for RK4 as steps are refined; change of the state on a log axis.",
        size=(9.2, 3.8),
        key="invariance",
    )


def _draw(canvas: Any, found: dict[str, list[Found]], sweep: dict[str, list[tuple[float, float]]]) -> None:
    axes = canvas.subplots(1, 3 if any(sweep.values()) else 2)
    left, right = axes[:2]
    for (method, runs), colour, marker in zip(
        found.items(), ("first", "second", "third"), "osD", strict=True
    ):
        factors = list(runs[0].accuracy)
        for axis, key in ((left, "accuracy"), (right, "change")):
            values = torch.tensor([list(getattr(r, key).values()) for r in runs], dtype=torch.float64)
            at = factors if key == "accuracy" else factors[1:]
            values = values if key == "accuracy" else values[:, 1:]
            for row in values:
                axis.plot(at, row, color=role(colour), alpha=0.3, linewidth=0.8)
            axis.plot(at, values.mean(0), marker + "-", color=role(colour), label=NAMES[method], markersize=5)
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        ticks = factors if axis is left else factors[1:]
        axis.set_xticks(ticks, [str(f) for f in ticks])
        axis.set_xlabel("steps a cell")
    left.set_ylabel("test accuracy")
    left.legend(loc="lower left")
    left.set_ylim(min(0.7, left.get_ylim()[0]), 1.0)
    log_axis(right, "y")
    right.set_ylabel("relative change of the last state")
    if any(sweep.values()):
        for (method, points), colour in zip(sweep.items(), ("first", "third"), strict=True):
            axes[2].plot(*zip(*points, strict=True), "o-", color=role(colour), label=NAMES[method])
        axes[2].set(xlabel="horizon $T$", ylabel="accuracy lost on the finest steps")
        axes[2].legend()
