r"""Training as a dynamic game: what players see, with whom they cooperate, and which layers act together.

Every layer is a player. Blind players make the standard optimizers, players that see the state those with feedback,
and players that bargain jointly take the curvature between them into account. In networks with skips and branches it
is a choice which layers act at the same time; a bandit makes it during training.

Measured: that a chain is differential dynamic programming exactly, that cooperation with Kronecker factors is Newton's
step for linear branches, and that the naming of players does not matter; then, on digits, a residual network at one,
three and ten times the best learning rate of stochastic gradient descent, and the alignments against each other. At
full scale an inception network too.

Reference: Liu, Chen & Theodorou (2021), arXiv:2105.03788.

Departures: digits of 8 × 8 pixels and small networks; the damped recursion; EXP3 over three alignments, with the drop
of the loss on the batch itself as reward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bolza.models import inception
from bolza.optim.cooperation import KroneckerGame, damped_blocks
from bolza.optim.ddp import DDPNOpt
from bolza.optim.games import REFERENCE, DGNOpt
from bolza.report import Figure, log_axis, role
from bolza.studies._games import Arm, Make, inception_data, residual_data, residual_net, tune
from bolza.studies._study import Progress, Row, Scale, StudyResult, mean_error

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "liu2021_dgnopt"
TITLE = "Training as a dynamic game"
CLAIM = (
    "What the layers of a network see and with whom they cooperate decides the optimizer; feedback and cooperation "
    "make it more robust, and a bandit finds the alignment of skips"
)
FACTORS = (1, 3, 10)
ALIGNMENTS: tuple[Literal["whole", "early", "late", "bandit"], ...] = ("whole", "early", "late", "bandit")


def _sgd(net: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr)


@dataclass(frozen=True)
class Budget:
    """Size of the experiment."""

    rates: tuple[float, ...] = (0.1, 0.2, 0.4, 0.8)
    game_rate: float = 0.12  # of the alignments
    seeds: int = 3
    steps: int = 63
    batch: int = 32
    inception_steps: int = 0
    inception_seeds: int = 3
    inception_rates: tuple[float, ...] = ()


BUDGETS = {
    "small": Budget(),
    "full": Budget(
        (0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8),
        seeds=6,
        steps=220,
        inception_steps=80,
        inception_rates=(0.01, 0.03, 0.1, 0.3, 1.0),
    ),
}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Check the special cases, and train networks with skips and branches.

    Args:
        scale: ``"small"``: a residual network, three seeds, 63 steps; ``"full"``: six seeds, 220 steps,
            and an inception network.
        progress: called with the share done and a few words.

    Returns:
        Rows on special cases, robustness and alignments; two figures.

    Example:
        >>> from bolza.studies import get
        >>> get("liu2021_dgnopt").title
        'Training as a dynamic game'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)

    def part(start: float, end: float) -> Callable[[float, str], None]:
        return lambda share, text: report(start + share * (end - start), text)

    def trained(arms: dict[str, Make], rates: Any, span: tuple[float, float]) -> dict[str, Arm]:
        return tune(
            arms,
            residual_net,
            residual_data(),
            rates=rates,
            seeds=budget.seeds,
            steps=budget.steps,
            batch=budget.batch,
            report=part(*span),
        )

    best = trained({"SGD": _sgd}, budget.rates, (0.0, 0.15))["SGD"].best_rate()
    multiples = [factor * best for factor in FACTORS]
    robust = trained({"SGD": _sgd, "feedback": DGNOpt}, multiples, (0.15, 0.4))
    chosen: dict[str, Make] = {
        name: partial(DGNOpt, information="cooperative", alignment=name) for name in ALIGNMENTS
    }
    aligned = trained(chosen, [budget.game_rate], (0.4, 0.75))
    branched = inception_arms(budget, part(0.75, 1.0)) if budget.inception_steps else {}
    report(1.0, "done")
    rows = [*exact_rows(), *robustness_rows(robust, multiples), *alignment_rows(aligned, budget)]
    if branched:
        rows += inception_rows(branched, budget)
    return StudyResult(
        KEY,
        TITLE,
        REFERENCE,
        CLAIM,
        scale,
        rows,
        (_rates_figure(robust, best), _alignment_figure(aligned, budget)),
        notes=(
            "Digits of 8 × 8 pixels; three residual blocks of width 32 with linear skips, tanh, batches of "
            f"{budget.batch}, {budget.steps} steps, {budget.seeds} seeds. The rate of stochastic gradient descent is "
            f"the best of {', '.join(f'{lr:g}' for lr in budget.rates)}; players are given its multiples, untuned.",
            "The paper's accuracies on larger image sets are not compared.",
        ),
        facts={
            name: {f"{lr:g}": [(c.train_loss, c.accuracy) for c in runs] for lr, runs in arm.runs.items()}
            for name, arm in {
                **robust,
                **aligned,
                **{f"inception {k}": v for k, v in branched.items()},
            }.items()
        },
    )


# ----------------------------------------------------------------------------------- special cases


def _normal(*shape: int, draw: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def chain(steps: int = 20) -> float:
    """Largest difference from differential dynamic programming on a chain."""
    x, _, y, _ = residual_data()
    nets = []
    make: Callable[..., torch.optim.Optimizer]
    for make in (DGNOpt, DDPNOpt):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 10))
        optimizer = make(net, lr=0.3)
        for k in range(steps):
            part = slice(16 * k, 16 * k + 16)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[part]), y[part]).backward()
            optimizer.step()
        nets.append(net)
    return max(
        float((a - b).detach().abs().max()) for a, b in zip(*(n.parameters() for n in nets), strict=True)
    )


def newton() -> float:
    """Distance of the cooperative step from Newton's on the concatenated weights: ½ mean |M₁W₁x + M₂W₂x − y|²."""
    draw = torch.Generator().manual_seed(0)
    x, y = _normal(40, 3, draw=draw), _normal(40, 6, draw=draw)
    mixing = [_normal(6, 2, draw=draw), _normal(6, 3, draw=draw)]

    def loss(w: Tensor) -> Tensor:
        first, second = w[:6].reshape(2, 3), w[6:].reshape(3, 3)
        return 0.5 * (x @ first.T @ mixing[0].T + x @ second.T @ mixing[1].T - y).square().sum(1).mean()

    start = _normal(15, draw=draw)
    gradient = torch.func.grad(loss)(start)
    game = KroneckerGame([[x.T @ x / 40] * 2] * 2, [[a.T @ b for b in mixing] for a in mixing])
    steps = game.solve([gradient[:6].reshape(2, 3), gradient[6:].reshape(3, 3)])
    exact = torch.linalg.solve(torch.func.hessian(loss)(start), gradient)
    return float((torch.cat([s.flatten() for s in steps]) - exact).abs().max())


def relabelled() -> tuple[float, float]:
    """Difference of the steps when two players change names, and how far the factored form exceeds the exact one.

    The second is the length of its step over that of the exact one, where both players read the same input and the
    damping is a thousandth.
    """
    draw = torch.Generator().manual_seed(0)
    x, g = _normal(60, 4, draw=draw), _normal(60, 5, draw=draw)
    inputs = [[x.T @ x / 60] * 2] * 2
    signals = [list(row.split([2, 3], 1)) for row in (g.T @ g / 60).split([2, 3])]
    right = [_normal(2, 4, draw=draw), _normal(3, 4, draw=draw)]
    a, b = damped_blocks(inputs, signals, 1e-3)
    one = KroneckerGame(a, b).solve(right)
    turned = [[[side[i][j] for j in (1, 0)] for i in (1, 0)] for side in (a, b)]
    two = KroneckerGame(*turned).solve(right[::-1])
    distance = max(float((p - q).abs().max()) for p, q in zip(one, reversed(two), strict=True))
    factored = KroneckerGame(a, b, schur="factored").solve(right)
    size = [math.sqrt(sum(float(s.square().sum()) for s in steps)) for steps in (factored, one)]
    return distance, size[0] / size[1]


def exact_rows() -> list[Row]:
    """What must hold to rounding."""
    distance, excess = relabelled()
    return [
        Row(
            "largest difference from differential dynamic programming on a chain, after 20 steps",
            0.0,
            (same := chain()),
            1e-6,
            same <= 1e-6,
        ),
        Row(
            "distance of the cooperative step of two linear branches from Newton's on all their weights",
            0.0,
            (far := newton()),
            1e-10,
            far < 1e-10,
            "squared loss, Kronecker factors, both branches read the same input",
        ),
        Row("change of the steps when players change names", 0.0, distance, 1e-10, distance < 1e-10),
        Row(
            "length of the step with the factored Schur complement (A − S_A) ⊗ (B − S_B), over the exact one",
            "above 1: an approximation to be damped",
            excess,
            None,
            excess > 1,
            "players with the same input, where A − S_A vanishes up to the damping, 0.001",
        ),
    ]


# ---------------------------------------------------------------------------------------- training


def robustness_rows(arms: dict[str, Arm], rates: list[float]) -> list[Row]:
    """Accuracy of players with feedback, and of stochastic gradient descent, at multiples of its best rate."""
    rows = []
    for factor, lr in zip(FACTORS, rates, strict=True):
        ours, theirs = arms["feedback"].runs[lr], arms["SGD"].runs[lr]
        mean, error = mean_error([a.accuracy - b.accuracy for a, b in zip(ours, theirs, strict=True)])
        lost = sum(run.diverged for run in theirs)
        rows.append(
            Row(
                f"test accuracy with feedback at {factor}× the best rate of SGD, less that of SGD",
                "above −0.01" if factor == 1 else "positive where SGD diverges, else above −0.01",
                mean,
                error,
                mean > 2 * error if lost else mean > -0.01,
                f"{arms['feedback'].accuracy(lr)[0]:.3f} against {arms['SGD'].accuracy(lr)[0]:.3f} at {lr:g}; SGD "
                f"diverged in {lost} of {len(theirs)} runs, feedback in {sum(r.diverged for r in ours)}",
            )
        )
    return rows


def alignment_rows(arms: dict[str, Arm], budget: Budget) -> list[Row]:
    """Loss along each alignment, and along those that the bandit draws."""
    logs = {
        name: [math.log(run.train_loss) for run in arm.runs[budget.game_rate]] for name, arm in arms.items()
    }
    fixed = [name for name in logs if name != "bandit"]
    each = ", ".join(f"{name} {math.exp(sum(v) / len(v)):.4f}" for name, v in logs.items())
    usual = [sum(logs[name][k] for name in fixed) / len(fixed) for k in range(budget.seeds)]
    mean, error = mean_error([a - b for a, b in zip(logs["bandit"], usual, strict=True)])
    worst, best = (pick(fixed, key=lambda name: sum(logs[name])) for pick in (max, min))
    apart, spread = mean_error([a - b for a, b in zip(logs[worst], logs[best], strict=True)])
    return [
        Row(
            f"training loss of the worst alignment ({worst}) over that of the best ({best})",
            "above 1: the alignment matters",
            math.exp(apart),
            math.exp(apart) * spread,
            True if apart > 2 * spread else None,
            f"{each}; cooperating players at rate {budget.game_rate:g}; judged to two standard errors",
        ),
        Row(
            "training loss with the bandit over the mean of fixed alignments",
            "at most 1",
            math.exp(mean),
            math.exp(mean) * error,
            True if mean < -2 * error else False if mean > 2 * error else None,
            "geometric means; judged to two standard errors",
        ),
    ]


def inception_arms(budget: Budget, report: Callable[[float, str], None]) -> dict[str, Arm]:
    """An inception network, each method at each rate."""
    arms: dict[str, Make] = {
        "SGD": _sgd,
        "no feedback": partial(DGNOpt, information="open", curvature="kronecker"),
        "cooperating": partial(DGNOpt, information="cooperative"),
    }
    return tune(
        arms,
        partial(inception, width=4),
        inception_data(1024),
        rates=budget.inception_rates,
        seeds=budget.inception_seeds,
        steps=budget.inception_steps,
        batch=64,
        report=report,
    )


def inception_rows(arms: dict[str, Arm], budget: Budget) -> list[Row]:
    """Accuracy and loss on the inception network, each method at its best rate."""
    rows = []
    ours = arms["cooperating"]
    for name in ("SGD", "no feedback"):
        pairs = zip(ours.best(), arms[name].best(), strict=True)
        mean, error = mean_error([math.log(a.train_loss / b.train_loss) for a, b in pairs])
        rows.append(
            Row(
                f"inception network: training loss of cooperating players over that of {name}",
                "below 1",
                math.exp(mean),
                math.exp(mean) * error,
                True if mean < -2 * error else False if mean > 2 * error else None,
                f"after {budget.inception_steps} steps, {budget.inception_seeds} seeds; rates {ours.best_rate():g} and "
                f"{arms[name].best_rate():g}; accuracy {ours.accuracy(ours.best_rate())[0]:.3f} and "
                f"{arms[name].accuracy(arms[name].best_rate())[0]:.3f}",
            )
        )
    return rows


# ----------------------------------------------------------------------------------------- figures


def _rates_figure(arms: dict[str, Arm], best: float) -> Figure:
    return Figure(
        "Beyond the best learning rate",
        partial(_draw_rates, arms=arms, best=best),
        caption="Test accuracy and smoothed training loss of stochastic gradient descent and of players with feedback, "
        "at multiples of the best rate of the former; every seed.",
        alt="Test accuracy against learning rate, and training loss against steps at three times the best rate.",
        size=(9.2, 3.6),
        key="rates",
    )


def _draw_rates(canvas: Any, arms: dict[str, Arm], best: float) -> None:
    left, right = canvas.subplots(1, 2)
    for arm, colour in zip(arms.values(), ("muted", "first"), strict=True):
        rates = list(arm.runs)
        for lr in rates:
            each = [run.accuracy for run in arm.runs[lr]]
            left.plot([lr / best] * len(each), each, "o", color=role(colour), alpha=0.35, markersize=4)
        means = [arm.accuracy(lr)[0] for lr in rates]
        left.plot([lr / best for lr in rates], means, "D-", color=role(colour), markersize=5, label=arm.name)
        for k, curve in enumerate(arm.runs[rates[1]]):
            label = f"{arm.name}, {FACTORS[1]}×" if k == 0 else None
            losses = [min(v, 1e3) for v in curve.losses]
            right.plot(losses, color=role(colour), alpha=0.75, linewidth=1.3, label=label)
    log_axis(left, "x")
    left.set_xticks([], minor=True)
    left.set_xticks(FACTORS, [f"{factor}×" for factor in FACTORS])
    left.set(xlabel=f"learning rate over {best:g}", ylabel="test accuracy", ylim=(0, 1))
    left.legend(loc="lower left")
    log_axis(right, "y")
    right.set(xlabel="step", ylabel="training loss, smoothed")
    right.legend(loc="upper left")


def _alignment_figure(arms: dict[str, Arm], budget: Budget) -> Figure:
    return Figure(
        "Which layers act together",
        partial(_draw_alignments, arms=arms, budget=budget),
        caption="Training loss of cooperating players along each alignment of the skips: each block at once, the skip "
        "with the first layer, the skip with the last, and as a bandit draws them. Mean over seeds, and every seed.",
        alt="Training loss against steps for four alignments.",
        size=(6.4, 3.6),
        key="alignments",
    )


def _draw_alignments(canvas: Any, arms: dict[str, Arm], budget: Budget) -> None:
    axes = canvas.subplots()
    for (name, arm), colour in zip(arms.items(), ("muted", "second", "third", "first"), strict=True):
        curves = [run.losses for run in arm.runs[budget.game_rate]]
        for curve in curves:
            axes.plot(curve, color=role(colour), alpha=0.25, linewidth=1.0)
        mean = [math.exp(sum(math.log(c[k]) for c in curves) / len(curves)) for k in range(len(curves[0]))]
        axes.plot(mean, color=role(colour), linewidth=1.8, label=name)
    log_axis(axes, "y")
    axes.set(xlabel="step", ylabel="training loss, smoothed")
    axes.legend(loc="lower left")
