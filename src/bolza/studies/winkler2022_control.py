r"""Rates by feedback for the means and scales of a Bayesian network.

    w = μ + σε,   u* = min(1, 2m/(ηΣ)),   Σ the noise of data and of drawn weights

First the moments of the gradients and the value of the control, where both are known; then a network on handwritten
digits with a Gaussian for every weight, trained at rates over three decades with and without the control.

Reference: Winkler, Ojeda & Opper (2022).

Departures: digits and a small MLP; the estimates are ours, as the authors' program is not public.
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

from bolza.bayes import MeanField, StochasticControl, gradient_moments
from bolza.bayes.variational import WINKLER as REFERENCE
from bolza.data import digits
from bolza.report import Figure, role
from bolza.studies._study import Progress, Row, Scale, StudyResult, mean_error

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "winkler2022_control"
TITLE = "Stochastic control of Bayesian training"
CLAIM = "Controlled rates of means and scales make variational training robust to large learning rates"

D = torch.float64
BATCH = 64
GOOD = 0.85  # accuracy that counts as trained


@dataclass(frozen=True)
class Budget:
    """Size of the runs."""

    draws: int = 500_000
    rates: tuple[float, ...] = (0.3, 3.0, 10.0, 30.0)
    adam: tuple[float, ...] = (0.03,)
    steps: int = 150
    seeds: int = 2


BUDGETS = {
    "small": Budget(),
    "full": Budget(
        rates=(0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0), adam=(0.003, 0.01, 0.03, 0.1), steps=1500, seeds=5
    ),
}


@dataclass(frozen=True)
class Trained:
    """One run.

    Args:
        objective: negative evidence bound over N, from eight draws; infinite after divergence.
        accuracy: on the test set, of the means.
        controls: u of means and scales along the run, ``(records, 2)``.
    """

    objective: float
    accuracy: float
    controls: Tensor


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Compare moments and values with their closed forms, and train with and without control.

    Args:
        scale: ``"small"``: two seeds, some ten seconds on one core; ``"full"``: five seeds, more rates and steps.
        progress: called with the share done and a few words.

    Returns:
        The rows, a figure, and the numbers.

    Example:
        >>> from bolza.studies import get
        >>> get("winkler2022_control").reference.year
        2022
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    report(0.0, "moments and values")
    rows = [*moment_rows(budget.draws), *value_rows()]
    kinds = {"SGD": budget.rates, "control": budget.rates, "control without probe": budget.rates[1:2]}
    kinds["Adam"] = budget.adam
    jobs = [(kind, lr) for kind, rates in kinds.items() for lr in rates]
    found: dict[str, dict[float, list[Trained]]] = {kind: {} for kind in kinds}
    for i, (kind, lr) in enumerate(jobs):
        report(0.05 + 0.95 * i / len(jobs), f"{kind} at {lr:g}")
        found[kind][lr] = [train(kind, lr, seed, budget.steps) for seed in range(budget.seeds)]
    rows += network_rows(found)
    notes = (
        f"MLP 64-32-10 with tanh, every weight a Gaussian, prior N(0, 1), σ = 0.05 at the start; {budget.steps} steps "
        f"on batches of {BATCH}, one draw of the weights each, {budget.seeds} seeds; one rate for means and scales.",
        "Adam is not steered by anything but its rate: what a user would take instead, the best of its rates.",
        "The probe is a departure: the curvature of a mean is the slope of the gradient over the drawn weight.",
    )
    facts = {
        kind: {
            f"{lr:g}": {"objective": [t.objective for t in each], "accuracy": [t.accuracy for t in each]}
            for lr, each in by_rate.items()
        }
        for kind, by_rate in found.items()
    }
    report(1.0, "done")
    return StudyResult(KEY, TITLE, REFERENCE, CLAIM, scale, rows, (_figure(found),), notes, facts)


# ----------------------------------------------------------------------------------- closed forms


class Quadratic(nn.Module):
    """½a(w − b)² for many weights, each with a b of its own."""

    def __init__(self, size: int, mean: float, a: float) -> None:
        super().__init__()
        self.weight, self.a = nn.Parameter(torch.full((size,), mean, dtype=D)), a

    def forward(self, b: Tensor) -> Tensor:
        """Sum of the losses."""
        return self.a * (self.weight - b).square().sum() / 2


def measured_moments(a: float, mean: float, scale: float, data: float, draws: int) -> list[float]:
    """Moments of g_μ and g_σ of a mean-field network, from independent weights."""
    draw = torch.Generator().manual_seed(0)
    net = MeanField(Quadratic(draws, mean, a), scale=scale, generator=draw)
    net(data * torch.randn(draws, generator=draw, dtype=D)).backward()
    (mu,), (rho,) = net.means().values(), net.rho
    if mu.grad is None or rho.grad is None:
        raise RuntimeError("no gradient reached the mean and the scale")
    g_scale = rho.grad / torch.sigmoid(rho.detach())
    return [float(v) for v in (mu.grad.mean(), mu.grad.var(), g_scale.mean(), g_scale.var())]


def moment_rows(draws: int) -> list[Row]:
    """The four moments, and what is left of the noise as σ → 0."""
    known = gradient_moments(2.0, 0.7, 0.4, 0.3)
    exact = [known.mean, known.mean_variance, known.scale, known.scale_variance]
    seen = measured_moments(2.0, 0.7, 0.4, 0.3, draws)
    names = ("E g_μ", "Var g_μ", "E g_σ", "Var g_σ")
    rows = [
        Row(
            f"a = 2, μ = 0.7, σ = 0.4, s = 0.3: {name}",
            float(e),
            m,
            None,
            abs(m / float(e) - 1) < 0.01,
            "within 1 %",
        )
        for name, e, m in zip(names, exact, seen, strict=True)
    ]
    left = measured_moments(2.0, 0.7, 1e-6, 0.3, draws)[1] / float(known.mean_data)
    rows.append(
        Row("σ → 0: Var g_μ over the data's part", 1.0, left, None, abs(left - 1) < 0.01, "within 1 %")
    )
    return rows


def final_loss(
    u: Callable[[float, float], float], a: float = 2.0, s: float = 1.0, eta: float = 0.1, m: float = 2.0
) -> float:
    """The loss m at time 5 of dm/dt = −2aum + ½aηSu², by the midpoint rule."""
    steps = 1000
    h = 5.0 / steps

    def slope(t: float, y: float) -> float:
        v = u(t, y)
        return -2 * a * v * y + a * eta * s * v * v / 2

    for k in range(steps):
        m += h * slope((k + 0.5) * h, m + h / 2 * slope(k * h, m))
    return m


def value_rows() -> list[Row]:
    """Feedback against the best constant and the best power law."""
    from scipy.optimize import minimize, minimize_scalar

    feedback = final_loss(lambda t, m: min(1.0, 2 * m / 0.1))
    switch = math.log(1.975 / 0.025) / 4  # when m = ηS/2 is reached at full rate
    exact = 1 / (20 + 40 * (5 - switch))
    constant = float(
        minimize_scalar(lambda v: final_loss(lambda t, m: v), bounds=(0.01, 1), method="bounded").fun
    )

    def law(z: Any) -> float:
        scale, power = math.exp(z[0]), math.exp(z[1])
        return final_loss(lambda t, m: min(1.0, (scale / max(t, 1e-9)) ** power))

    options: Any = {"xatol": 1e-3, "fatol": 1e-8, "maxfev": 80}
    power = float(minimize(law, [0.0, 0.0], method="Nelder-Mead", options=options).fun)
    return [
        Row(
            "loss at t = 5 by feedback",
            exact,
            feedback,
            1e-6,
            abs(feedback / exact - 1) < 1e-3,
            "a = 2, η = 0.1",
        ),
        Row(
            "by the best constant rate",
            0.01045,
            constant,
            1e-5,
            abs(constant / 0.01045 - 1) < 5e-3,
            "to 0.5 %",
        ),
        Row(
            "by the best power law min(1, (τ/t)^p)",
            0.00586,
            power,
            1e-5,
            True if abs(power / 0.00586 - 1) < 5e-3 else None,
            "the expected number is of an earlier search of ours whose family of laws is not known; in (1 + t/τ)^−p "
            "the best is 0.00623",
        ),
        Row("feedback is best", "smallest", feedback, None, feedback < min(constant, power)),
    ]


# ------------------------------------------------------------------------------------ the network


def train(kind: str, lr: float, seed: int, steps: int) -> Trained:
    """Train a network at one rate."""
    data, draw = digits(), torch.Generator().manual_seed(seed)
    n = len(data.train_x)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inner = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    net = MeanField(inner, scale=0.05, generator=draw)
    optimizer: torch.optim.Optimizer
    if kind == "SGD":
        optimizer = torch.optim.SGD(net.groups(), lr=lr)
    elif kind == "Adam":
        optimizer = torch.optim.Adam(net.groups(), lr=lr)
    else:
        optimizer = StochasticControl(net.groups(), lr=lr, drawn=net.drawn if kind == "control" else None)
    controls = []
    for k in range(steps):
        pick = torch.randint(n, (BATCH,), generator=draw)
        loss = F.cross_entropy(net(data.train_x[pick]), data.train_y[pick]) + net.kl() / n
        if not bool(torch.isfinite(loss)):
            return Trained(math.inf, 0.1, torch.empty(0, 2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if isinstance(optimizer, StochasticControl) and (k % max(1, steps // 60) == 0 or k == steps - 1):
            log = optimizer.log()
            controls.append([log["mean"], log["scale"]])
    with torch.no_grad():
        fit = sum(float(F.cross_entropy(net(data.train_x), data.train_y)) for _ in range(8)) / 8
        objective = fit + float(net.kl()) / n
        net.eval()
        accuracy = float((net(data.test_x).argmax(1) == data.test_y).double().mean())
    return Trained(objective if math.isfinite(objective) else math.inf, accuracy, torch.tensor(controls))


def network_rows(found: dict[str, dict[float, list[Trained]]]) -> list[Row]:
    """Robustness, price, and the two regimes."""

    def largest(kind: str) -> float:
        good = [lr for lr, each in found[kind].items() if min(t.accuracy for t in each) >= GOOD]
        return max(good, default=0.0)

    sgd, control, plain, adam = (
        {lr: mean_error(t.objective for t in each) for lr, each in found[kind].items()}
        for kind in ("SGD", "control", "control without probe", "Adam")
    )
    best = min(sgd, key=lambda lr: sgd[lr][0])
    largest_sgd = max(largest("SGD"), min(sgd))
    top = max(control)
    rows = [
        Row(
            f"largest rate at which every seed is above {GOOD:g} accuracy: control over SGD",
            "≥ 3",
            largest("control") / largest_sgd,
            None,
            largest("control") / largest_sgd >= 3,
            f"control {largest('control'):g}, SGD {largest_sgd:g}, of rates up to {top:g}",
        ),
        Row(
            f"objective of control at η = {best:g}, SGD's best rate, over SGD's there",
            "≤ 1.05",
            control[best][0] / sgd[best][0],
            control[best][1] / sgd[best][0],
            control[best][0] <= 1.05 * sgd[best][0],
            "what control costs where it is not needed",
        ),
    ]
    for lr in control:
        if lr > best:
            gain = sgd[lr][0] - control[lr][0]
            rows.append(
                Row(
                    f"objective at η = {lr:g}: SGD less control",
                    "> 0",
                    "SGD diverged" if math.isinf(gain) else gain,
                    None if math.isinf(gain) else math.hypot(sgd[lr][1], control[lr][1]),
                    gain > 0 and math.isfinite(control[lr][0]),
                )
            )
    lowest = min(adam.values())
    reached = min(control.values())
    rows.append(
        Row(
            "best objective of control over that of Adam, each over its rates",
            "≤ 1.1",
            reached[0] / lowest[0],
            math.hypot(reached[1], lowest[1]) / lowest[0],
            reached[0] <= 1.1 * lowest[0],
        )
    )
    each = found["control"][best]
    if all(len(t.controls) for t in each):
        gap, error = mean_error(float(t.controls[-1, 1] - t.controls[-1, 0]) for t in each)
        rows.append(
            Row(
                f"two regimes at η = {best:g}: u of the scales less u of the means at the end",
                "≠ 0",
                gap,
                error,
                abs(gap) > 2 * error,
                "by more than two errors",
            )
        )
    probed = next(iter(plain))
    gain = plain[probed][0] - control[probed][0]
    rows.append(
        Row(
            f"objective at η = {probed:g}: without the probe less with it",
            "≥ 0",
            gain,
            math.hypot(plain[probed][1], control[probed][1]),
            None if abs(gain) < 2 * math.hypot(plain[probed][1], control[probed][1]) else gain > 0,
            "to two errors; a departure of ours, judged like the rest",
        )
    )
    return rows


def _figure(found: dict[str, dict[float, list[Trained]]]) -> Figure:
    return Figure(
        "Control keeps large rates from doing harm",
        partial(_draw, found=found),
        caption=(
            "Left: objective (negative evidence bound a sample) against the rate; a run that diverged is at the upper "
            "edge. Middle: test accuracy of the means. Right: share u of the rate for means and scales along a run."
        ),
        alt="Objective and accuracy against the learning rate; u of means and scales over steps.",
        size=(10.0, 3.2),
        key="control",
    )


def _draw(canvas: Any, found: dict[str, dict[float, list[Trained]]]) -> None:
    left, middle, right = canvas.subplots(1, 3)
    top = 30.0
    for kind, colour in (("SGD", "second"), ("control", "first")):
        rates = list(found[kind])
        objective = [[min(t.objective, top) for t in found[kind][lr]] for lr in rates]
        accuracy = [[t.accuracy for t in found[kind][lr]] for lr in rates]
        for axes, values in ((left, objective), (middle, accuracy)):
            pairs = [mean_error(v) for v in values]
            axes.errorbar(
                rates,
                [mean for mean, _ in pairs],
                [error for _, error in pairs],
                marker="o",
                markersize=4,
                color=role(colour),
                label=kind,
            )
    best = min(mean_error(t.objective for t in each)[0] for each in found["Adam"].values())
    left.axhline(best, color=role("muted"), linestyle="--", label="Adam, best rate")
    left.set(xlabel="η", ylabel="objective", xscale="log", yscale="log", ylim=(None, top * 1.15))
    left.legend(loc="upper left")
    middle.set(xlabel="η", ylabel="test accuracy", xscale="log", ylim=(0, 1.02))
    for axes in (left, middle):
        axes.set_xticks(list(found["SGD"]), [f"{lr:g}" for lr in found["SGD"]])
        axes.tick_params(axis="x", which="minor", length=0, labelbottom=False)
    chosen = list(found["control"])[1]
    controls = found["control"][chosen][0].controls
    if len(controls):
        at = torch.linspace(0, 1, len(controls))
        right.plot(at, controls[:, 0], color=role("first"), label="means")
        right.plot(at, controls[:, 1], color=role("second"), label="scales")
        right.legend(loc="center right")
    right.set(xlabel="share of the run", ylabel=f"u at η = {chosen:g}", ylim=(0, 1.02))
