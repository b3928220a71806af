r"""Constant-rate SGD as a sampler of the posterior: the best rate, the best preconditioner, what a scalar cannot do.

    AS + SA = (η/B) C,    η* = 2Bd/(N tr C),    P* = (2B/ηN) C⁻¹,    exact steps: AS + SA − ηASA = (η/B) C

First on matrices, where everything is known; then with real mini-batches: linear regression, and logistic regression on
handwritten digits; then the blur of a small network along its steepest directions, predicted and measured.

Reference: Mandt, Hoffman & Blei (2017), arXiv:1704.04289.

Departures: five principal components of small digits stand for the paper's data sets; chains run side by side
in place of one long one; the network is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bolza.core.errors import DivergenceError
from bolza.ops.curvature import hessian_operator
from bolza.ops.krylov import top_eigenpairs
from bolza.report import Figure, role
from bolza.sde import (
    gradient_noise,
    network_moments,
    posterior_divergence,
    posterior_preconditioner,
    posterior_rate,
    stationary_covariance,
)
from bolza.sde.moments import MANDT as REFERENCE
from bolza.studies._digits_posterior import BATCH, Problem, at_rest, digits_problem
from bolza.studies._study import Progress, Row, Scale, StudyResult, mean_error

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "mandt2017_bayes"
TITLE = "SGD as approximate Bayesian inference"
CLAIM = "SGD's iterates come closest to the posterior at one constant rate, and closer still with a preconditioner"

F = torch.float64


@dataclass(frozen=True)
class Budget:
    """Size of the runs."""

    chains: int
    steps: int
    problems: int
    rates: tuple[float, ...]
    replicas: int
    network_steps: int


BUDGETS = {
    "small": Budget(
        chains=300, steps=600, problems=5, rates=(0.25, 1.0, 4.0), replicas=200, network_steps=400
    ),
    "full": Budget(
        chains=3000,
        steps=4000,
        problems=50,
        rates=(0.25, 0.5, 1.0, 2.0, 4.0),
        replicas=1000,
        network_steps=3000,
    ),
}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Compare SGD's stationary law with posteriors.

    Args:
        scale: ``"small"``: some ten seconds on one core; ``"full"``: longer chains and more of them.
        progress: called with the share done and a few words.

    Returns:
        The rows, a figure, and the numbers.

    Example:
        >>> from bolza.studies import get
        >>> get("mandt2017_bayes").reference.year
        2017
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    report(0.0, "matrices")
    rows = matrix_rows(budget.problems)
    report(0.1, "linear regression")
    rows.append(regression_row(budget))
    report(0.3, "logistic regression")
    problem = digits_problem()
    runs = {name: sample(problem, factor, kind, budget) for name, factor, kind in methods(budget.rates)}
    rows += posterior_rows(problem, runs)
    report(0.7, "a network")
    blur = network_blur(budget)
    rows += network_rows(blur)
    notes = (
        f"Batches of {BATCH}; logistic regression on five principal components of 1797 digits and a constant, a "
        f"Gaussian prior of variance 10; {budget.chains} chains of {budget.steps} steps, from draws of the predicted "
        "law.",
        "The divergence is from the Gaussian at the mode with the curvature there. Its estimate from finitely many "
        "chains is corrected for its bias, d(d + 1)/4 over their number.",
        "Network: 3-4-1 with tanh, 200 noisy samples of a sine, a tenth of the largest stable rate, trained to "
        "its minimum before the replicas start.",
    )
    facts = {
        "divergence": {name: run_.divergence for name, run_ in runs.items()},
        "predicted": {name: run_.predicted for name, run_ in runs.items()},
        "blur": {key: [float(v) for v in value] for key, value in blur.items()},
    }
    report(1.0, "done")
    return StudyResult(
        KEY, TITLE, REFERENCE, CLAIM, scale, rows, (_figure(problem, runs, blur),), notes, facts
    )


# ---------------------------------------------------------------------------------------- matrices


def random_matrix(generator: torch.Generator, d: int = 3) -> Tensor:
    """Random covariance."""
    g = torch.randn(d, d + 2, dtype=F, generator=generator)
    return g @ g.T / d


def best_rate(a: Tensor, c: Tensor, samples: int, batch: int) -> float:
    """The rate at which the divergence is smallest, found by search."""
    from scipy.optimize import minimize_scalar

    def divergence(log_rate: float) -> float:
        s = stationary_covariance(a, c, lr=math.exp(log_rate), batch_size=batch, exact=False).covariance
        return float(posterior_divergence(s, a, samples=samples))

    centre = math.log(batch / samples)
    return math.exp(
        minimize_scalar(
            divergence, bounds=(centre - 6, centre + 6), method="bounded", options={"xatol": 1e-7}
        ).x
    )


def matrix_rows(problems: int) -> list[Row]:
    """Search against formula, and the preconditioner that is exact."""
    generator = torch.Generator().manual_seed(0)
    known = torch.tensor([[1.0, 0.2], [0.2, 0.6]], dtype=F)
    a = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F)
    found = best_rate(a, known, 1000, 10)
    worst = exact = 0.0
    spread: list[float] = []
    for _ in range(problems):
        a, c = random_matrix(generator), random_matrix(generator)
        rate = posterior_rate(c, samples=500, batch_size=4)
        worst = max(worst, abs(best_rate(a, c, 500, 4) / rate - 1))
        p = posterior_preconditioner(c, samples=500, lr=0.01, batch_size=4)
        s = stationary_covariance(a, c, lr=0.01, batch_size=4, preconditioner=p, exact=False).covariance
        exact = max(exact, float(posterior_divergence(s, a, samples=500)))
        s = stationary_covariance(a, c, lr=rate, batch_size=4, exact=False).covariance
        ratios = 500 * s.diagonal() / torch.linalg.inv(a).diagonal()
        spread.append(float(ratios.max() / ratios.min()))
    return [
        Row("N = 1000, B = 10: rate of smallest divergence", 0.025, found, 1e-7, abs(found - 0.025) < 1e-6),
        Row(
            f"{problems} random problems: search against 2Bd/(N tr C)",
            0.0,
            worst,
            None,
            worst < 0.01,
            "largest relative difference, below 1 %",
        ),
        Row(
            "the same: divergence with P = (2B/ηN) C⁻¹",
            0.0,
            exact,
            1e-10,
            exact < 1e-10,
            "largest one",
        ),
        Row(
            "the same, at the scalar rate: largest over smallest variance, in units of the posterior's",
            "> 1",
            max(spread),
            None,
            max(spread) > 2,
            "the rate matches a trace; single variances may be off",
        ),
    ]


# ----------------------------------------------------------------------------------- linear regression


def regression_row(budget: Budget) -> Row:
    """Mean of the variances in units of the posterior's, for real steps at η*."""
    generator = torch.Generator().manual_seed(1)
    n, d = 2000, 5
    x = torch.randn(n, d, dtype=F, generator=generator)
    y = x.sum(1) + torch.randn(n, dtype=F, generator=generator)
    mode = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    a = x.T @ x / n
    gradients = (x @ mode - y)[:, None] * x
    lr = posterior_rate(gradients.T @ gradients / n, samples=n, batch_size=BATCH)
    theta = mode.repeat(budget.chains, 1)
    for _ in range(budget.steps):
        pick = torch.randint(n, (budget.chains, BATCH), generator=generator)
        at = x[pick]
        theta -= lr * torch.einsum("cb,cbd->cd", torch.einsum("cbd,cd->cb", at, theta) - y[pick], at) / BATCH
    white = (theta - mode) @ torch.linalg.cholesky(n * a)
    mean, error = mean_error(white.square().mean(1).tolist())
    return Row(
        "linear regression, N = 2000, at η*: mean variance over the posterior's",
        1.01,
        mean,
        error,
        abs(mean - 1.01) <= 3 * error + 0.02,
        "within three errors and 0.02",
    )


# -------------------------------------------------------------------------------- logistic regression


@dataclass(frozen=True)
class Sampled:
    """Where the chains of one method are in the end."""

    rate: float  # in units of η*; nan with a preconditioner
    theta: Tensor
    divergence: float
    error: float
    predicted: float


def methods(rates: tuple[float, ...]) -> list[tuple[str, float, str]]:
    """Name, rate in units of η*, and preconditioner."""
    plain = [(f"{factor:g} η*", factor, "scalar") for factor in rates]
    return [*plain, ("diagonal", 1.0, "diagonal"), ("full", 1.0, "full")]


def sample(problem: Problem, factor: float, kind: str, budget: Budget) -> Sampled:
    """Run the chains; their covariance beside that of the exact equations with constant noise."""
    n, d = problem.x.shape
    lr = factor * posterior_rate(problem.noise, samples=n, batch_size=BATCH)
    p = None
    if kind != "scalar":
        p = posterior_preconditioner(
            problem.noise, samples=n, lr=lr, batch_size=BATCH, diagonal=kind == "diagonal"
        )
    move = lr * (torch.eye(d, dtype=F) if p is None else p)
    resting = at_rest(problem, move)
    generator = torch.Generator().manual_seed(2)
    # from the predicted law: flat directions would take many more steps to get there
    spread = torch.linalg.cholesky(resting)
    theta = problem.mode + torch.randn(budget.chains, d, dtype=F, generator=generator) @ spread.T
    for _ in range(budget.steps):
        pick = torch.randint(n, (budget.chains, BATCH), generator=generator)
        at, label = problem.x[pick], problem.y[pick]
        weight = -label * torch.sigmoid(-label * torch.einsum("cbd,cd->cb", at, theta))
        g = torch.einsum("cb,cbd->cd", weight, at) / BATCH + problem.prior * theta
        theta = theta - g @ move.T
    divergence, error = measured_divergence(theta - problem.mode, problem)
    predicted = float(posterior_divergence(resting, problem.hessian, samples=n))
    return Sampled(factor if p is None else math.nan, theta, divergence, error, predicted)


def measured_divergence(off: Tensor, problem: Problem) -> tuple[float, float]:
    """Divergence of the chains' covariance, less the bias of their number, with a jackknife error of ten parts."""
    chains, d = off.shape

    def of(part: Tensor) -> float:
        s = part.T @ part / len(part)
        raw = float(posterior_divergence(s, problem.hessian, samples=problem.samples))
        return raw - d * (d + 1) / (4 * len(part))

    parts = off.chunk(10)
    without = [of(torch.cat([*parts[:i], *parts[i + 1 :]])) for i in range(10)]
    mean = sum(without) / 10
    return of(off), math.sqrt(0.9 * sum((value - mean) ** 2 for value in without))


def posterior_rows(problem: Problem, runs: dict[str, Sampled]) -> list[Row]:
    """The divergences of all methods."""
    scalar = {name: found for name, found in runs.items() if not math.isnan(found.rate)}
    best = scalar["1 η*"]
    others = min(found.divergence - best.divergence for name, found in scalar.items() if name != "1 η*")
    rows = [
        Row(
            f"logistic regression, {name}: divergence from the posterior, in nats",
            found.predicted,
            found.divergence,
            found.error,
            abs(found.divergence - found.predicted) <= 3 * found.error + 0.1 * found.predicted,
            "expected: exact second moments, the samples' Hessians frozen at the mode; within three errors and 10 %",
        )
        for name, found in runs.items()
    ]
    rows.append(
        Row(
            "the rate η* beats the other rates: smallest gap in the divergence",
            "> 0",
            others,
            best.error,
            others > 0,
        )
    )
    full, diagonal = runs["full"], runs["diagonal"]
    rows.append(
        Row(
            "the full preconditioner beats the scalar rate and the diagonal: smallest gap",
            "> 0",
            min(best.divergence, diagonal.divergence) - full.divergence,
            math.hypot(full.error, max(best.error, diagonal.error)),
            full.divergence < min(best.divergence, diagonal.divergence),
        )
    )
    return rows


# ------------------------------------------------------------------------------------- the network


def network_blur(budget: Budget, share: float = 0.1, batch: int = 10, k: int = 5) -> dict[str, Tensor]:
    """Predicted standard deviations along the steepest directions, and those of replicas after real steps."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200, 3, dtype=F, generator=generator)
    y = torch.sin(x.sum(1, keepdim=True)) + 0.3 * torch.randn(200, 1, dtype=F, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.mse_loss(net(x), y)
        value.backward()
        return value

    optimizer.step(closure)
    loss, data = nn.functional.mse_loss, (x, y)
    operator = hessian_operator(net, loss, data)
    eigen = top_eigenpairs(operator, k, tol=1e-8, which="largest algebraic", generator=generator)
    noise = gradient_noise(net, loss, data)
    limit = network_moments(net, loss, data, lr=1e-3, batch_size=batch, hessian=eigen, noise=noise)
    lr = share * limit.mean_square_limit
    predicted = network_moments(net, loss, data, lr=lr, batch_size=batch, hessian=eigen, noise=noise)
    start = [p.detach() for p in net.parameters()]
    w, b, u, c = (p.repeat(budget.replicas, *[1] * p.ndim) for p in start)
    for _ in range(budget.network_steps):
        pick = torch.randint(200, (budget.replicas, batch), generator=generator)
        at = x[pick]
        hidden = torch.tanh(at @ w.mT + b[:, None])
        slope = 2 * (hidden @ u.mT + c[:, None] - y[pick]) / batch  # of the mean squared error
        back = slope * u * (1 - hidden.square())
        w, b = w - lr * back.mT @ at, b - lr * back.sum(1)
        u, c = u - lr * slope.mT @ hidden, c - lr * slope.sum(1)
    moved = torch.cat([p.reshape(budget.replicas, -1) for p in (w, b, u, c)], 1)
    off = (moved - torch.cat([p.reshape(-1) for p in start])) @ predicted.directions
    measured = off.std(0)
    return {
        "curvature": predicted.curvature,
        "relaxation": predicted.relaxation,
        "predicted": predicted.blur,
        "measured": measured,
        "error": measured / math.sqrt(2 * budget.replicas),
    }


def network_rows(blur: dict[str, Tensor]) -> list[Row]:
    """The steepest direction, and all of them."""
    ratio = blur["measured"] / blur["predicted"]
    error = blur["error"] / blur["predicted"]
    worst = int((ratio - 1).abs().argmax())
    return [
        Row(
            f"a network: blur along {name}, measured over predicted",
            1.0,
            float(ratio[at]),
            float(error[at]),
            abs(float(ratio[at]) - 1) <= 0.25,
            "within 25 %: noise and curvature are those of the minimum, a linear theory",
        )
        for name, at in (("the steepest direction", 0), (f"the worst of {len(ratio)} directions", worst))
    ]


# ------------------------------------------------------------------------------------- the figure


def _figure(problem: Problem, runs: dict[str, Sampled], blur: dict[str, Tensor]) -> Figure:
    return Figure(
        "How close SGD's iterates come to the posterior",
        partial(_draw, problem=problem, runs=runs, blur=blur),
        caption=(
            "Left: iterates of logistic regression at η* and with the full preconditioner, in two directions, in units "
            "of the posterior; its circle of two standard deviations. Middle: divergence against the rate, simulated "
            "(points) and predicted (line), and with preconditioners. Right: blur of a network along its "
            "steepest directions."
        ),
        alt="Scatter of iterates; divergence against rate; predicted and measured blur.",
        size=(9.6, 3.2),
        key="posterior",
    )


def _draw(canvas: Any, problem: Problem, runs: dict[str, Sampled], blur: dict[str, Tensor]) -> None:
    left, middle, right = canvas.subplots(1, 3)
    values, vectors = torch.linalg.eigh(problem.samples * problem.hessian)
    white = vectors[:, [0, -1]] * values[[0, -1]].sqrt()
    for name, colour in (("1 η*", "second"), ("full", "first")):
        off = (runs[name].theta - problem.mode) @ white
        left.plot(off[:, 0], off[:, 1], ".", markersize=2.5, color=role(colour), label=name)
    turn = torch.linspace(0, 2 * math.pi, 100, dtype=F)
    left.plot(2 * turn.cos(), 2 * turn.sin(), color=role("muted"), linewidth=1.2)
    left.set(xlabel="flattest direction", ylabel="steepest direction")
    left.legend(loc="upper right", markerscale=3)
    scalar = [found for found in runs.values() if not math.isnan(found.rate)]
    star = posterior_rate(problem.noise, samples=problem.samples, batch_size=BATCH)
    fine = torch.logspace(math.log10(scalar[0].rate) - 0.15, math.log10(scalar[-1].rate) + 0.15, 60, dtype=F)
    one = star * torch.eye(problem.x.shape[1], dtype=F)
    curve = []
    for f in fine:
        try:
            resting = at_rest(problem, f * one)
        except DivergenceError:
            break
        curve.append(float(posterior_divergence(resting, problem.hessian, samples=problem.samples)))
    middle.plot(fine[: len(curve)], curve, color=role("second"))
    middle.errorbar(
        [found.rate for found in scalar],
        [found.divergence for found in scalar],
        [2 * found.error for found in scalar],
        fmt="o",
        markersize=4,
        color=role("second"),
        label="scalar rate",
    )
    for name, style in (("diagonal", "--"), ("full", "-")):
        middle.axhline(
            runs[name].divergence, color=role("first"), linestyle=style, label=f"{name} preconditioner"
        )
    middle.set(xlabel="η/η*", ylabel="divergence (nats)", xscale="log", yscale="log")
    ticks = [found.rate for found in scalar]
    middle.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    middle.tick_params(axis="x", which="minor", length=0, labelbottom=False)
    middle.set_ylim(bottom=3e-4)
    middle.legend(loc="lower center")
    at = torch.arange(1, len(blur["predicted"]) + 1)
    right.plot(at, blur["predicted"], "_", markersize=16, color=role("muted"), label="predicted")
    right.errorbar(
        at, blur["measured"], 2 * blur["error"], fmt="o", markersize=4, color=role("first"), label="measured"
    )
    right.set(
        xlabel="direction, steepest first",
        ylabel="standard deviation",
        ylim=(0, None),
        xlim=(0.5, len(at) + 0.5),
    )
    right.set_xticks(at.tolist())
    right.legend(loc="lower right")
