r"""Layers beside a skip as cooperating players: exactness, and training of a residual network.

A skip connection makes a chain of layers non-Markov. Carrying the skipped activation as part of the state restores
it, and the last layer of a block and its skip become two players on that state. They decide together, by block
elimination of the joint second-order problem,

    [δu; δv] = −[[Q_uu, Q_uv], [Q_vu, Q_vv]]⁻¹ ([Q_u; Q_v] + [Q_uχ; Q_vχ] δχ).

Measured: the exactness of the elimination, of the rules at forks and joins, and of one sweep over a linear-quadratic
residual block; then a residual network on digits, trained by players that see nothing (Kronecker-factored curvature
alone), players with feedback that decide alone, and players with feedback that cooperate.

Reference: Liu, Chen & Theodorou (2020), arXiv:2007.08880.

Departures: digits of 8 × 8 pixels and three small blocks with linear skips instead of convolutional networks; the
damped recursion; Kronecker factors for the joint second derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bolza.optim.cooperation import fork, join, joint_step
from bolza.optim.ddp import DDPNOpt
from bolza.optim.games import GAME_THEORETIC as REFERENCE
from bolza.optim.games import DGNOpt
from bolza.report import Figure, log_axis, role
from bolza.studies._games import Arm, Make, residual_data, residual_net, tune
from bolza.studies._study import Progress, Row, Scale, StudyResult, mean_error

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "liu2020_game"
TITLE = "The layers of a residual block as cooperating players"
CLAIM = (
    "On residual networks, players that cooperate on the augmented state train faster and with less variation than "
    "the same curvature without them"
)
ARMS: dict[str, Make] = {
    "no feedback": lambda net, lr: DGNOpt(net, lr, information="open", curvature="kronecker"),
    "feedback, alone": lambda net, lr: DGNOpt(net, lr, information="feedback", curvature="kronecker"),
    "feedback, cooperating": lambda net, lr: DGNOpt(net, lr, information="cooperative"),
}


@dataclass(frozen=True)
class Budget:
    """Size of the experiment."""

    rates: tuple[float, ...] = (0.03, 0.06, 0.12, 0.3)
    seeds: int = 3
    steps: int = 63
    batch: int = 32


BUDGETS = {"small": Budget(), "full": Budget((0.01, 0.03, 0.06, 0.12, 0.3, 0.6), seeds=6, steps=220)}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Check the elimination, and train residual networks by players of three kinds.

    Args:
        scale: ``"small"``: four rates, three seeds, 63 steps; ``"full"``: six rates, six seeds, 220 steps.
        progress: called with the share done and a few words.

    Returns:
        Rows on exactness, on the loss reached and on its variation; a figure.

    Example:
        >>> from bolza.studies import get
        >>> get("liu2020_game").title
        'The layers of a residual block as cooperating players'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    arms = tune(
        ARMS,
        residual_net,
        residual_data(),
        rates=budget.rates,
        seeds=budget.seeds,
        steps=budget.steps,
        batch=budget.batch,
        report=report,
    )
    report(1.0, "done")
    return StudyResult(
        KEY,
        TITLE,
        REFERENCE,
        CLAIM,
        scale,
        [*exact_rows(), *training_rows(arms, budget)],
        (_figure(arms),),
        notes=(
            "Digits of 8 × 8 pixels, three residual blocks of width 32 with linear skips, tanh, batches of "
            f"{budget.batch}; every method at the same learning rates "
            f"{', '.join(f'{lr:g}' for lr in budget.rates)}, judged at its own best.",
            "The paper trains convolutional networks; its accuracies are not compared.",
        ),
        facts={
            name: {
                f"{lr:g}": [vars(c) | {"losses": c.losses[-1]} for c in runs] for lr, runs in arm.runs.items()
            }
            for name, arm in arms.items()
        },
    )


# ------------------------------------------------------------------------------------- exactness


def _normal(*shape: int, draw: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def elimination(draws: int = 100) -> tuple[float, float]:
    """Largest distance of block elimination from the joint solve, and its smallest gain over players alone."""
    draw = torch.Generator().manual_seed(0)
    distance, gains = 0.0, []
    for _ in range(draws):
        root = _normal(6, 9, draw=draw)
        matrix, right = root @ root.T / 6, _normal(6, draw=draw)
        blocks = [list(row.split(3, 1)) for row in matrix.split(3)]
        joint = torch.cat(joint_step(blocks, right.split(3)))
        exact = -torch.linalg.solve(matrix, right)
        distance = max(distance, float((joint - exact).abs().max() / exact.abs().max()))
        alone = -torch.cat([torch.linalg.solve(blocks[i][i], right.split(3)[i]) for i in (0, 1)])
        models = [float(right @ s + 0.5 * s @ matrix @ s) for s in (joint, alone)]
        gains.append(models[1] - models[0])
    return distance, min(gains)


def first_order() -> float:
    """Distance of the values through forks and joins of three residual blocks from the gradient of autograd."""
    draw = torch.Generator().manual_seed(0)
    maps = [(_normal(4, 4, draw=draw), _normal(4, 4, draw=draw)) for _ in range(3)]
    x = _normal(4, draw=draw).requires_grad_()
    states = [x]
    for f, g in maps:
        states.append(torch.tanh(f @ states[-1]) + g @ states[-1])
    (expected,) = torch.autograd.grad(0.5 * states[-1].square().sum(), x)
    value = states[-1].detach()
    for (f, g), state in zip(reversed(maps), reversed(states[:-1]), strict=True):
        slope = torch.diag(1 - torch.tanh(f @ state.detach()) ** 2)
        value = fork(join(value, None, [slope @ f, g])[0])[0]
    return float((value - expected).abs().max())


def linear_quadratic() -> tuple[float, float]:
    """How far one sweep over a linear-quadratic residual block is from its minimum.

    And the cost that players reach who neither see the state nor cooperate, over the minimum.
    """
    draw = torch.Generator().manual_seed(0)
    n, m = 3, 2
    a0, a1 = _normal(n, n, draw=draw), _normal(n, n, draw=draw)
    b0, b1, c = (_normal(n, m, draw=draw) for _ in range(3))
    x0, target = _normal(n, draw=draw), _normal(n, draw=draw)

    def output(u: Tensor) -> Tensor:
        return a1 @ (a0 @ x0 + b0 @ u[:m]) + b1 @ u[m : 2 * m] + x0 + c @ u[2 * m :]

    def cost(u: Tensor) -> Tensor:
        return 0.5 * (output(u) - target).square().sum() + 0.05 * u.square().sum()

    start = torch.zeros(3 * m, dtype=torch.float64)
    best = -torch.linalg.solve(torch.func.hessian(cost)(start), torch.func.grad(cost)(start))
    eye, small = torch.eye(n, dtype=torch.float64), 0.1 * torch.eye(m, dtype=torch.float64)
    q, qq = join(output(start) - target, eye, [a1, eye, b1, c])
    assert qq is not None
    blocks = [[qq[2 + i][2 + j] + (small if i == j else 0) for j in (0, 1)] for i in (0, 1)]
    gains = joint_step(blocks, [torch.cat([q[2 + i][:, None], qq[2 + i][0]], 1) for i in (0, 1)])
    k, feedback = torch.cat([g[:, 0] for g in gains]), torch.cat([g[:, 1:] for g in gains])
    cross = torch.cat([qq[2][0], qq[3][0]])
    value, hessian = q[0] + cross.T @ k, qq[0][0] + cross.T @ feedback
    first = -torch.linalg.solve(b0.T @ hessian @ b0 + small, b0.T @ value)
    second = k + feedback @ (b0 @ first)
    alone = [-torch.linalg.solve(j.T @ j + small, j.T @ (output(start) - target)) for j in (a1 @ b0, b1, c)]
    ratio = float(cost(torch.cat(alone)) / cost(best))
    return float((torch.cat([first, second]) - best).abs().max()), ratio


class _Path(nn.Module):
    """A block whose skip is zero, with or without calling it."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.one, self.two = (nn.Linear(64, 64, dtype=torch.float64) for _ in range(2))
        self.skip = nn.Linear(64, 64, bias=False, dtype=torch.float64).requires_grad_(False)
        nn.init.zeros_(self.skip.weight)
        self.called = skip

    def forward(self, x: Tensor) -> Tensor:
        path = self.two(torch.tanh(self.one(x)))
        return path + self.skip(x) if self.called else path


def without_skip(steps: int = 5) -> float:
    """Largest difference, after some steps, between a block with a zero skip and the chain, each by its method."""
    x, _, y, _ = residual_data()
    nets = []
    make: Callable[..., torch.optim.Optimizer]
    for skip, make in ((True, DGNOpt), (False, DDPNOpt)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = _Path(skip)
        optimizer = make(net, lr=0.3)
        for k in range(steps):
            optimizer.zero_grad()
            part = slice(16 * k, 16 * k + 16)
            nn.functional.cross_entropy(net(x[part].double()), y[part]).backward()
            optimizer.step()
        nets.append(net)
    pairs = zip(*(net.parameters() for net in nets), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def exact_rows() -> list[Row]:
    """What must hold to rounding."""
    distance, gain = elimination()
    sweep, blind = linear_quadratic()
    return [
        Row(
            "distance of block elimination from the joint solve, relative",
            0.0,
            distance,
            1e-12,
            distance < 1e-12,
        ),
        Row(
            "smallest gain in model decrease by cooperating, over 100 random convex problems",
            "not negative",
            gain,
            None,
            gain > -1e-12,
            "against each player with its own second derivatives",
        ),
        Row(
            "distance of values through forks and joins of three blocks from autograd",
            0.0,
            (value := first_order()),
            1e-12,
            value < 1e-12,
        ),
        Row(
            "distance of one sweep over a linear-quadratic block from its minimum",
            0.0,
            sweep,
            1e-12,
            sweep < 1e-12,
            f"players that neither see the state nor cooperate reach {blind:.3g} times the smallest cost",
        ),
        Row(
            "largest difference from differential dynamic programming when the skip is zero, after 5 steps",
            0.0,
            (same := without_skip()),
            None,
            same == 0.0,
            "bit for bit",
        ),
    ]


# -------------------------------------------------------------------------------------- training


def training_rows(arms: dict[str, Arm], budget: Budget) -> list[Row]:
    """Loss reached and its variation, each method at its best rate."""
    rows = []
    ours = arms["feedback, cooperating"]
    log = {name: [math.log(run.train_loss) for run in arm.best()] for name, arm in arms.items()}
    rates = ", ".join(f"{name} {arm.best_rate():g}" for name, arm in arms.items())
    for name in ("no feedback", "feedback, alone"):
        pairs = zip(log[ours.name], log[name], strict=True)
        mean, error = mean_error([a - b for a, b in pairs])
        rows.append(
            Row(
                f"training loss after {budget.steps} steps, over that of {name}",
                "below 1",
                math.exp(mean),
                math.exp(mean) * error,
                _judged(mean, error),
                f"geometric mean over {budget.seeds} seeds, each at its best rate ({rates}); judged to two standard "
                "errors",
            )
        )
    spread = [torch.tensor(log[name]).std().log().item() for name in (ours.name, "no feedback")]
    error = 1 / max(1, budget.seeds - 1) ** 0.5  # of the logarithm of a ratio of standard deviations
    mean = spread[0] - spread[1]
    rows.append(
        Row(
            "variation over seeds of the logarithm of the loss, over that of no feedback",
            "below 1",
            math.exp(mean),
            math.exp(mean) * error,
            _judged(mean, error),
            "ratio of standard deviations; judged to two standard errors",
        )
    )
    largest = max(budget.rates)
    ours_there, theirs = ours.runs[largest], arms["no feedback"].runs[largest]
    rows.append(
        Row(
            f"test accuracy at learning rate {largest:g}, less that of no feedback",
            "positive",
            (pair := mean_error([a.accuracy - b.accuracy for a, b in zip(ours_there, theirs, strict=True)]))[
                0
            ],
            pair[1],
            _judged(-pair[0], pair[1]),
            f"no feedback: {mean_error([r.accuracy for r in theirs])[0]:.3f}, players alone "
            f"{arms['feedback, alone'].accuracy(largest)[0]:.3f}, cooperating {ours.accuracy(largest)[0]:.3f}",
        )
    )
    return rows


def _judged(mean: float, error: float) -> bool | None:
    """Whether a number is negative: known only where it is two standard errors from 0."""
    if not (math.isfinite(mean) and math.isfinite(error)):
        return None
    return True if mean < -2 * error else False if mean > 2 * error else None


# ---------------------------------------------------------------------------------------- figure


def _figure(arms: dict[str, Arm]) -> Figure:
    return Figure(
        "Players that see, and players that cooperate",
        partial(_draw, arms=arms),
        caption="Left: training loss of each method at its best learning rate, every seed. Right: test accuracy at "
        "each rate, mean and standard error.",
        alt="Training loss against steps, and test accuracy against learning rate, for three kinds of players.",
        size=(9.2, 3.6),
        key="players",
    )


def _draw(canvas: Any, arms: dict[str, Arm]) -> None:
    left, right = canvas.subplots(1, 2)
    for arm, colour in zip(arms.values(), ("muted", "second", "first"), strict=True):
        for k, curve in enumerate(arm.best()):
            label = f"{arm.name}, rate {arm.best_rate():g}" if k == 0 else None
            left.plot(curve.losses, color=role(colour), alpha=0.75, linewidth=1.3, label=label)
        rates = list(arm.runs)
        values = [arm.accuracy(lr) for lr in rates]
        right.errorbar(
            rates,
            [v[0] for v in values],
            [v[1] for v in values],
            fmt="o-",
            color=role(colour),
            capsize=3,
            markersize=4,
        )
    log_axis(left, "y")
    left.set(xlabel="step", ylabel="training loss, smoothed")
    left.legend(loc="lower left")
    log_axis(right, "x")
    right.set_xticks([], minor=True)
    right.set_xticks(rates, [f"{lr:g}" for lr in rates])
    right.set(xlabel="learning rate", ylabel="test accuracy", ylim=(0, 1))
