r"""Deep residual networks with blocks of size 1/L: hyper-parameters and the order of blocks stop to matter.

In x_{l+1} = x_l + (a/L) U_l σ(W_l x_l) with rates multiplied by L, networks of every depth train along one course, that
of a distribution of parameters over depth. Neighbouring blocks are samples of nearby distributions, so they may be
swapped; the paper turns that into a scheme of training.

Reference: Lu, Ma, Lu, Lu & Ying (2020), arXiv:2003.05508, §2, §3 and §5.

Departures: 8×8 digits; the input and output layers are trained as well; gradient descent with momentum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from bolza.data import Dataset, digits
from bolza.models.continuous import MeanFieldResNet
from bolza.models.continuous.residual import LU as REFERENCE
from bolza.report import Figure, log_axis, role
from bolza.studies._study import Progress, Row, Scale, StudyResult, mean_error

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "lu2020_mean_field"
TITLE = "Residual networks in the mean-field limit"
CLAIM = (
    "With blocks of size 1/L a residual network trains along a course that does not depend on its depth, and its "
    "blocks are exchangeable with their neighbours"
)

EVERY = 8  # steps between two measurements of the loss


@dataclass(frozen=True)
class Budget:
    """Size of the experiment."""

    depths: tuple[int, ...] = (4, 16, 32)
    seeds: int = 3
    epochs: int = 3
    long: int = 5
    permuted: int = 16
    lr: float = 0.05
    batch: int = 64
    orders: int = 5


BUDGETS = {
    "small": Budget(),
    "full": Budget(depths=(4, 16, 64), seeds=6, epochs=6, long=12, orders=20),
}


@cache
def _digits() -> Dataset:
    return digits()


@dataclass
class Course:
    """Training of one network: losses on a part of the training set, the network, and how far block weights moved."""

    losses: list[float]
    net: MeanFieldResNet
    moved: float


def train(
    depth: int, seed: int, epochs: int, budget: Budget, *, kind: str = "mean field", swap: bool = False
) -> Course:
    """Gradient descent with momentum.

    Args:
        depth: blocks L.
        seed: of weights and order of data.
        epochs: passes through the data.
        budget: rate and batch.
        kind: ``"mean field"``: blocks of size 2/L and rates times L; ``"lazy"``: the same blocks without that factor;
            ``"plain"``: blocks of size 1, and rates times L.
        swap: swap neighbouring blocks at random before each step.
    """
    data, draw = _digits(), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scale = float(depth) if kind == "plain" else 2.0
        net = MeanFieldResNet(64, 10, width=32, hidden=16, depth=depth, scale=scale)
    groups: Any = net.parameter_groups(budget.lr) if kind != "lazy" else net.parameters()
    optimizer = torch.optim.SGD(groups, lr=budget.lr, momentum=0.9)
    losses, first = [], [p.detach().clone() for p in net.body.parameters()]
    for _ in range(epochs):
        for k, rows in enumerate(torch.randperm(len(data), generator=draw).split(budget.batch)):
            if k % EVERY == 0:
                losses.append(training_loss(net, data))
            if swap:
                net.swap_neighbours(draw)
            optimizer.zero_grad()
            cross_entropy(net(data.train_x[rows]), data.train_y[rows]).backward()
            optimizer.step()
    losses.append(training_loss(net, data))
    squares = [(p.detach() - q).square().sum() for p, q in zip(net.body.parameters(), first, strict=True)]
    moved = float(torch.stack(squares).sum() / sum(q.numel() for q in first)) ** 0.5
    return Course(losses, net, moved)


@torch.no_grad()
def training_loss(net: MeanFieldResNet, data: Dataset) -> float:
    """Loss on 512 training samples."""
    return float(cross_entropy(net(data.train_x[:512]), data.train_y[:512]))


@torch.no_grad()
def permutation_cost(net: MeanFieldResNet, orders: int) -> tuple[float, float]:
    """Test accuracy, and the mean loss of accuracy over random orders of the blocks."""
    data, draw = _digits(), torch.Generator().manual_seed(0)

    def right() -> float:
        return float((net(data.test_x).argmax(1) == data.test_y).double().mean())

    before, kept, after = right(), net.order, []
    for _ in range(orders):
        net.permute(torch.randperm(net.depth, generator=draw).tolist())
        after.append(right())
    net.permute(kept)
    return before, before - sum(after) / orders


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Train networks of several depths, and permute their blocks.

    Args:
        scale: ``"small"``: depths 4, 16, 32, 3 seeds; ``"full"``: 4, 16, 64, 6 seeds, longer.
        progress: called with the share done and a few words.

    Returns:
        Rows on depth and order, one figure.

    Example:
        >>> from bolza.studies import get
        >>> get("lu2020_mean_field").title
        'Residual networks in the mean-field limit'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    seeds = range(budget.seeds)
    deepest = budget.depths[-1]
    courses: dict[int, list[Course]] = {}
    for i, depth in enumerate(budget.depths):
        report(0.5 * i / len(budget.depths), f"depth {depth}")
        courses[depth] = [train(depth, s, budget.epochs, budget) for s in seeds]
    report(0.5, "blocks of size one")
    plain = {d: train(d, 0, budget.epochs, budget, kind="plain").losses for d in (budget.depths[0], deepest)}
    lazy = [train(deepest, s, budget.epochs, budget, kind="lazy") for s in seeds]
    costs: dict[str, list[tuple[float, float]]] = {}
    trials = {
        "mean field": (budget.permuted, "mean field", False),
        "with swaps": (budget.permuted, "mean field", True),
        "plain": (4, "plain", False),
    }
    for i, (name, (depth, kind, swap)) in enumerate(trials.items()):
        report(0.6 + 0.4 * i / len(trials), f"order of blocks, {name}")
        found = []
        for s in seeds:
            net = train(depth, s, budget.long, budget, kind=kind, swap=swap).net
            found.append(permutation_cost(net, budget.orders))
        costs[name] = found
    report(1.0, "done")
    return StudyResult(
        KEY,
        TITLE,
        REFERENCE,
        CLAIM,
        scale,
        rows(courses, lazy, plain, costs, budget),
        (_figure(courses, plain, costs),),
        notes=(
            f"Digits, state of 32 numbers, 16 neurons a block, size of all blocks a = 2, rate {budget.lr:g} × L on the "
            f"blocks, momentum 0.9, batch {budget.batch}, {budget.seeds} seeds; losses on 512 training samples.",
            "The plain residual network of the comparison of orders has four blocks of size 1 and the same rates.",
        ),
        facts={
            "losses": {str(d): [c.losses for c in cs] for d, cs in courses.items()},
            "lazy": [c.losses[-1] for c in lazy],
            "plain": {str(d): losses[-1] for d, losses in plain.items()},
            "permutation": costs,
        },
    )


def rows(
    courses: dict[int, list[Course]],
    lazy: list[Course],
    plain: dict[int, list[float]],
    costs: dict[str, list[tuple[float, float]]],
    budget: Budget,
) -> list[Row]:
    """The claims, judged."""
    last = {d: mean_error([c.losses[-1] for c in cs]) for d, cs in courses.items()}
    means = [m for m, _ in last.values()]
    spread = (max(means) - min(means)) / (sum(means) / len(means))
    error = max(e / m for m, e in last.values()) * 2**0.5
    listed = ", ".join(f"L = {d}: {m:.3f} ± {e:.3f}" for d, (m, e) in last.items())
    out = [
        Row(
            f"spread of the training loss over depths after {budget.epochs} epochs, relative to its mean",
            "below 0.1, in the limit 0",
            spread,
            error,
            True if spread <= 0.1 else None if spread - 2 * error <= 0.1 else False,
            listed,
        )
    ]
    final = plain[max(plain)][-1]
    diverges = not final < math.log(10)  # also if it is not a number
    out.append(
        Row(
            f"blocks of size 1 at L = {max(plain)} and the same rates: training loss",
            "diverges",
            final if math.isfinite(final) else "not finite",
            None,
            diverges,
            f"above that of a guess; at L = {min(plain)} it is {plain[min(plain)][-1]:.3g}",
        )
    )
    names = {
        "mean field": (f"order of L = {budget.permuted} blocks of size 2/L permuted: accuracy lost", 0.02),
        "with swaps": (f"the same after training with swaps of neighbours (L = {budget.permuted})", 0.005),
    }
    for name, (claim, bound) in names.items():
        cost, error = mean_error([c for _, c in costs[name]])
        before = mean_error([a for a, _ in costs[name]])[0]
        out.append(
            Row(
                claim,
                f"at most {bound:g}",
                cost,
                error,
                True if cost <= bound else None if cost - 2 * error <= bound else False,
                f"from {before:.3f}",
            )
        )
    cost, error = mean_error([c for _, c in costs["plain"]])
    mine, mine_error = mean_error([c for _, c in costs["mean field"]])
    gap, gap_error = cost - mine, (error**2 + mine_error**2) ** 0.5
    out.append(
        Row(
            "permutation costs a plain residual network of four blocks more",
            "more",
            gap,
            gap_error,
            True if gap > 2 * gap_error else None if gap > -2 * gap_error else False,
            f"accuracy lost {cost:.3f}; from {mean_error([a for a, _ in costs['plain']])[0]:.3f}",
        )
    )
    slow, slow_error = mean_error([c.moved for c in lazy])
    fast, fast_error = mean_error([c.moved for c in courses[list(courses)[-1]]])
    ratio = slow / fast
    loss = mean_error([c.losses[-1] for c in lazy])[0]
    out.append(
        Row(
            "distance that block weights move without the factor L on their rate, over that with it, at the largest L",
            "far below 1: blocks hardly train",
            ratio,
            ratio * ((slow_error / slow) ** 2 + (fast_error / fast) ** 2) ** 0.5,
            ratio < 0.5,
            f"at most half; the training loss is then {loss:.3f} against {means[-1]:.3f}: the outer layers learn "
            "digits by themselves",
        )
    )
    return out


def _figure(
    courses: dict[int, list[Course]],
    plain: dict[int, list[float]],
    costs: dict[str, list[tuple[float, float]]],
) -> Figure:
    return Figure(
        "One course for every depth",
        partial(_draw, courses=courses, plain=plain, costs=costs),
        caption="Left: training loss of networks of several depths with blocks of size 2/L, each seed and the mean; "
        "grey, blocks of size 1 at the same rates. Right: accuracy that is lost when the trained blocks are put "
        "in a random order, each seed.",
        alt="Loss over steps for several depths, lying on each other, and loss of accuracy by permutation.",
        size=(9.2, 3.8),
        key="depths",
    )


def _draw(canvas: Any, courses: Any, plain: Any, costs: Any) -> None:
    left, right = canvas.subplots(1, 2, gridspec_kw={"width_ratios": [1.5, 1]})
    for (depth, found), colour in zip(courses.items(), ("first", "second", "third", "fourth"), strict=False):
        values = torch.tensor([c.losses for c in found])
        steps = [EVERY * k for k in range(values.shape[1])]
        for row in values:
            left.plot(steps, row, color=role(colour), alpha=0.25, linewidth=0.8)
        left.plot(steps, values.mean(0), color=role(colour), label=f"$L$ = {depth}")
    for (depth, losses), dash in zip(plain.items(), (":", "--"), strict=True):
        shown = [min(max(v, 1e-3), 20.0) if v == v else 20.0 for v in losses]
        label = "blocks of size 1, $L$ = " + str(depth)
        left.plot([EVERY * k for k in range(len(shown))], shown, dash, color=role("muted"), label=label)
    left.set(xlabel="step", ylabel="training loss", ylim=(0.03, 20))
    log_axis(left, "y")
    left.legend()
    for at, found in enumerate(costs.values()):
        lost = [100 * cost for _, cost in found]
        right.plot([at] * len(lost), lost, "o", color=role("second"), alpha=0.6)
        right.plot([at - 0.2, at + 0.2], [sum(lost) / len(lost)] * 2, color=role("first"))
    right.axhline(0.0, color=role("muted"), linewidth=0.8)
    right.set_xticks(range(len(costs)), ["size 2/L", "size 2/L,\nswaps", "size 1,\nfour blocks"])
    right.set(ylabel="points lost by permutation", xlim=(-0.5, len(costs) - 0.5))
