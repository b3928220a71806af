r"""Three factors of SGD's noise: learning rate, batch size, gradient covariance. The ratio matters, up to a point.

    excess loss = η tr Σ/(4B),    T = η/(2B),    growing B by k ⇔ cutting η by k;    exact: a factor 1/(1 − ηλ/2) a mode

Linear regression, where the excess loss is known; schedules that cut the rate and schedules that grow the batch; and a
network on digits, whose sharpness and loss are compared at equal and at unequal η/B.

Reference: Jastrzębski et al. (2017), arXiv:1711.04623; the schedules are those of Smith, Kindermans, Ying & Le (2018),
arXiv:1711.00489.

Departures: linear regression and a small MLP on digits in place of deep networks on CIFAR-10; many seeds side by side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bolza.ops.curvature import hessian_operator
from bolza.ops.krylov import top_eigenpairs
from bolza.report import Figure, role
from bolza.sde import grow_batch, least_squares_covariance, temperature
from bolza.sde.noise_scale import JASTRZEBSKI as REFERENCE
from bolza.studies._study import Progress, Row, Scale, StudyResult, mean_error

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "jastrzebski2017_factors"
TITLE = "Learning rate over batch size"
CLAIM = "What SGD's noise does depends on learning rate and batch size through their ratio only"

F = torch.float64
SAMPLES, DIM, SIGMA = 500, 5, 1.0
PAIRS = {(0.01, 2): 0.00578, (0.02, 4): 0.00587, (0.04, 8): 0.00590, (0.04, 2): 0.0246}
STAGES = {0.02: (0.0253, 0.0251), 0.005: (0.0056, 0.0060), 0.00125: (0.0014, 0.0015)}
EQUAL = ((0.05, 8), (0.1, 16), (0.2, 32))
UNEQUAL = (0.2, 8)
READINGS = 40  # of each stage of a schedule


@dataclass(frozen=True)
class Budget:
    """Size of the runs."""

    chains: int
    steps: int
    stage: int
    seeds: int
    epochs: int


BUDGETS = {
    "small": Budget(chains=400, steps=600, stage=200, seeds=4, epochs=30),
    "full": Budget(chains=4000, steps=4000, stage=800, seeds=20, epochs=150),
}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Compare settings of equal and of unequal temperature.

    Args:
        scale: ``"small"``: some ten seconds on one core; ``"full"``: more chains, seeds and epochs.
        progress: called with the share done and a few words.

    Returns:
        The rows, a figure, and the numbers.

    Example:
        >>> from bolza.studies import get
        >>> get("jastrzebski2017_factors").reference.year
        2017
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    report(0.0, "linear regression")
    problem = regression()
    found = {pair: excess(problem, *pair, budget) for pair in PAIRS}
    rows = regression_rows(problem, found)
    report(0.3, "schedules")
    curves = schedules(problem, budget)
    rows += schedule_rows(curves)
    report(0.5, "a network on digits")
    nets = {pair: network(*pair, budget) for pair in (*EQUAL, UNEQUAL)}
    rows += network_rows(nets)
    notes = (
        f"Linear regression with {SAMPLES} samples in {DIM} dimensions, batches with replacement, {budget.chains} "
        "chains from the minimum; the numbers in brackets are those of earlier runs of ours on other data.",
        f"Schedules of three stages from a rate of 0.02 and a batch of 2, cut or grown by 4, with equal epochs: a "
        f"stage is {budget.stage} steps of the grown batch, and four and sixteen times as many of the cut rate.",
        f"Network: MLP 64-32-10 with tanh on 1,000 digits, {budget.epochs} epochs, {budget.seeds} random starts "
        "trained side by side; λ_max is that of the Hessian of the training loss at the end.",
    )
    facts = {
        "excess": {f"{lr:g}/{batch}": value for (lr, batch), value in found.items()},
        "networks": {f"{lr:g}/{batch}": value for (lr, batch), value in nets.items()},
    }
    report(1.0, "done")
    return StudyResult(
        KEY, TITLE, REFERENCE, CLAIM, scale, rows, (_figure(found, curves, nets, budget),), notes, facts
    )


# ----------------------------------------------------------------------------------- linear regression


@dataclass(frozen=True)
class Problem:
    """Linear regression at its minimum: inputs, targets, minimum, Hessian, covariance of the gradients."""

    x: Tensor
    y: Tensor
    bottom: Tensor
    hessian: Tensor
    noise: Tensor


def regression() -> Problem:
    """Random inputs and targets."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, DIM, dtype=F, generator=generator)
    y = x.sum(1) + SIGMA * torch.randn(SAMPLES, dtype=F, generator=generator)
    bottom = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    gradients = (x @ bottom - y)[:, None] * x
    return Problem(x, y, bottom, x.T @ x / SAMPLES, gradients.T @ gradients / SAMPLES)


def descend(problem: Problem, theta: Tensor, lr: float, batch: int, generator: torch.Generator) -> Tensor:
    """One step of every chain."""
    pick = torch.randint(SAMPLES, (len(theta), batch), generator=generator)
    at = problem.x[pick]
    residual = torch.einsum("cbd,cd->cb", at, theta) - problem.y[pick]
    return theta - lr * torch.einsum("cb,cbd->cd", residual, at) / batch


def lift(problem: Problem, theta: Tensor) -> Tensor:
    """How far the loss of every chain lies above the minimum."""
    off = theta - problem.bottom
    return ((off @ problem.hessian) * off).sum(1) / 2


def excess(problem: Problem, lr: float, batch: int, budget: Budget) -> dict[str, float]:
    """Excess loss at rest: simulated, by the rule, and exact."""
    generator = torch.Generator().manual_seed(1)
    theta = problem.bottom.repeat(budget.chains, 1)
    for _ in range(budget.steps):
        theta = descend(problem, theta, lr, batch, generator)
    mean, error = mean_error(lift(problem, theta).tolist())
    samples = problem.x[:, :, None] * problem.x[:, None]
    exact = least_squares_covariance(samples, problem.noise, lr=lr, batch_size=batch).excess_loss
    rule = temperature(lr, batch) * float(problem.noise.trace()) / 2
    return {"measured": mean, "error": error, "rule": rule, "exact": float(exact)}


def regression_rows(problem: Problem, found: dict[tuple[float, int], dict[str, float]]) -> list[Row]:
    """Measured beside the rule, and beside the exact moments."""
    rows = [
        Row(
            f"excess loss at η = {lr:g}, B = {batch} ({PAIRS[lr, batch]:g} on other data)",
            one["rule"],
            one["measured"],
            one["error"],
            abs(one["measured"] - one["rule"]) <= 3 * one["error"] + 0.1 * one["rule"],
            "η tr Σ/4B, within three errors and the 10 % of ηλ",
        )
        for (lr, batch), one in found.items()
    ]
    z = max(abs(one["measured"] - one["exact"]) / one["error"] for one in found.values())
    rows.append(
        Row(
            "the same beside the exact second moments: largest distance in errors",
            0.0,
            z,
            None,
            z < 4,
            "below 4",
        )
    )
    samples = problem.x[:, :, None] * problem.x[:, None]
    large = [
        float(least_squares_covariance(samples, problem.noise, lr=lr, batch_size=batch).excess_loss)
        for lr, batch in ((0.01, 1), (1.0, 100))
    ]
    rows.append(
        Row(
            "where ηλ is near 1 the ratio is not enough: excess loss at η = 1, B = 100 over that at η = 0.01, B = 1",
            "> 1.5",
            large[1] / large[0],
            None,
            large[1] / large[0] > 1.5,
            "exact moments; the modes have the factor 1/(1 − ηλ/2)",
        )
    )
    return rows


def schedules(problem: Problem, budget: Budget) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean excess loss along both schedules, with errors."""
    rates = list(STAGES)
    plans = {"cut the rate": [(rate, 2) for rate in rates], "grow the batch": grow_batch(rates, 2)}
    curves = {}
    for name, plan in plans.items():
        generator = torch.Generator().manual_seed(2)
        theta, means, errors = problem.bottom.repeat(budget.chains, 1), [], []
        for lr, batch in plan:
            # equal epochs, which is equal time kη: a rate cut by k takes k times the steps of a grown batch
            more = round(rates[0] / lr)
            for k in range(budget.stage * more):
                theta = descend(problem, theta, lr, batch, generator)
                if (k + 1) % (budget.stage // READINGS * more) == 0:
                    mean, error = mean_error(lift(problem, theta).tolist())
                    means.append(mean)
                    errors.append(error)
        curves[name] = torch.tensor(means), torch.tensor(errors)
    return curves


def schedule_rows(curves: dict[str, tuple[Tensor, Tensor]]) -> list[Row]:
    """Both schedules at the end of each stage."""
    rows = []
    readings, late = READINGS, READINGS // 4
    for i, (rate, (cut, grown)) in enumerate(STAGES.items()):
        part = slice((i + 1) * readings - late, (i + 1) * readings)
        ends = [
            (float(mean[part].mean()), float(error[part].mean()) / math.sqrt(late / 3))
            for mean, error in curves.values()
        ]
        ratio = ends[1][0] / ends[0][0]
        error = ratio * math.hypot(ends[0][1] / ends[0][0], ends[1][1] / ends[1][0])
        rows.append(
            Row(
                f"stage of η/B = {rate / 2:g}: excess loss with a grown batch over that with a cut rate",
                grown / cut,
                ratio,
                error,
                abs(ratio - 1) <= 0.1 + 2 * error,
                "within 10 % and two errors of 1",
            )
        )
    return rows


# ------------------------------------------------------------------------------------- the network


def network(lr: float, batch: int, budget: Budget) -> dict[str, float]:
    """Training loss and largest curvature after SGD, mean and error over starts that are trained side by side."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels[:1000] / 16, dtype=torch.float32)
    y = torch.tensor(labels[:1000], dtype=torch.long)
    generator = torch.Generator().manual_seed(3)

    def start(out: int, inside: int) -> Tensor:
        return torch.randn(budget.seeds, out, inside, generator=generator) / inside**0.5

    w, u = start(32, 64), start(10, 32)
    b, c = torch.zeros(budget.seeds, 1, 32), torch.zeros(budget.seeds, 1, 10)
    for _ in range(budget.epochs * 1000 // batch):
        pick = torch.randint(1000, (budget.seeds, batch), generator=generator)
        at = x[pick]
        hidden = torch.tanh(at @ w.mT + b)
        slope = torch.softmax(hidden @ u.mT + c, -1)
        slope.scatter_add_(2, y[pick][..., None], torch.full((budget.seeds, batch, 1), -1.0))
        slope /= batch
        back = slope @ u * (1 - hidden.square())
        u, c = u - lr * slope.mT @ hidden, c - lr * slope.sum(1, keepdim=True)
        w, b = w - lr * back.mT @ at, b - lr * back.sum(1, keepdim=True)
    losses, sharpness = [], []
    net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    for i in range(budget.seeds):
        with torch.no_grad():
            for p, value in zip(net.parameters(), (w[i], b[i, 0], u[i], c[i, 0]), strict=True):
                p.copy_(value)
            losses.append(float(nn.functional.cross_entropy(net(x), y)))
        operator = hessian_operator(net, nn.functional.cross_entropy, (x, y))
        top = top_eigenpairs(operator, 1, tol=1e-2, which="largest algebraic", generator=generator)
        sharpness.append(float(top.eigenvalues))
    (loss, loss_error), (sharp, sharp_error) = mean_error(losses), mean_error(sharpness)
    return {"loss": loss, "loss_error": loss_error, "sharpness": sharp, "sharpness_error": sharp_error}


def network_rows(nets: dict[tuple[float, int], dict[str, float]]) -> list[Row]:
    """At equal η/B and equal epochs, and at four times the ratio."""
    first, last, other = (nets[pair] for pair in (EQUAL[0], EQUAL[-1], UNEQUAL))
    rows = []
    for key, words in (("sharpness", "λ_max"), ("loss", "training loss")):
        ratio = last[key] / first[key]
        error = ratio * math.hypot(last[f"{key}_error"] / last[key], first[f"{key}_error"] / first[key])
        away = other[key] / first[key]
        away_error = away * math.hypot(other[f"{key}_error"] / other[key], first[f"{key}_error"] / first[key])
        rows.append(
            Row(
                f"a network, equal η/B (0.05/8 and 0.2/32), equal epochs: ratio of {words}",
                1.0,
                ratio,
                error,
                abs(ratio - 1) <= 0.15 + 2 * error,
                "within 15 % and two errors",
            )
        )
        rows.append(
            Row(
                f"four times the ratio (0.2/8): {words} over that at 0.05/8",
                "< 1",
                away,
                away_error,
                away + 2 * away_error < min(1.0, ratio),
                "below the other by two errors: more noise, more progress and a flatter place",
            )
        )
    return rows


# ------------------------------------------------------------------------------------- the figure


def _figure(found: Any, curves: Any, nets: Any, budget: Budget) -> Figure:
    return Figure(
        "One number for rate and batch",
        partial(_draw, found=found, curves=curves, nets=nets, budget=budget),
        caption=(
            "Left: excess loss of linear regression against η/B, simulated, beside η tr Σ/4B. Middle: a schedule that "
            "cuts the rate and one that grows the batch. Right: sharpness of a network after training, at equal η/B "
            "(filled) and at four times the ratio (open)."
        ),
        alt="Excess loss against ratio; excess loss over steps; sharpness against ratio.",
        size=(9.6, 3.2),
        key="ratio",
    )


def _draw(canvas: Any, found: Any, curves: Any, nets: Any, budget: Budget) -> None:
    left, middle, right = canvas.subplots(1, 3)
    ratios = [lr / batch for lr, batch in found]
    left.plot(ratios, [one["rule"] for one in found.values()], color=role("muted"), label="η tr Σ/4B")
    for i, ((lr, batch), one) in enumerate(found.items()):
        left.errorbar(
            lr / batch * (0.94, 1.0, 1.06, 1.0)[i],
            one["measured"],
            2 * one["error"],
            fmt="os^D"[i],
            markersize=4,
            color=role(("first", "second", "third", "first")[i]),
            label=f"η = {lr:g}, B = {batch}",
        )
    left.set(xlabel="η/B", ylabel="excess loss", xscale="log", yscale="log")
    left.set_xticks([0.005, 0.01, 0.02], ["0.005", "0.01", "0.02"])
    left.set_yticks([0.007, 0.01, 0.02, 0.03], ["0.007", "0.01", "0.02", "0.03"])
    for which in ("x", "y"):
        left.tick_params(axis=which, which="minor", length=0, labelbottom=False, labelleft=False)
    left.legend(loc="upper left")
    for (name, (mean, _)), colour in zip(curves.items(), ("second", "first"), strict=True):
        time = 0.02 * budget.stage / READINGS * torch.arange(1, len(mean) + 1)
        middle.plot(time, mean, color=role(colour), linewidth=1.2, label=name)
    middle.set(xlabel="time kη", ylabel="excess loss", yscale="log")
    middle.legend(loc="upper right")
    for (lr, batch), one in nets.items():
        right.errorbar(
            batch,
            one["sharpness"],
            2 * one["sharpness_error"],
            fmt="o",
            markersize=6,
            markerfacecolor="none" if (lr, batch) == UNEQUAL else None,
            color=role("second" if (lr, batch) == UNEQUAL else "first"),
            label=f"η/B = {lr / batch:g}" if (lr, batch) in (EQUAL[0], UNEQUAL) else None,
        )
    right.set(xlabel="batch size", ylabel="sharpness λ_max", xscale="log", ylim=(0, None))
    right.set_xticks([8, 16, 32], ["8", "16", "32"])
    right.tick_params(axis="x", which="minor", length=0, labelbottom=False)
    right.legend(loc="lower right")
