r"""Gradient descent on batches, with the right noise, samples a posterior.

    θ ← θ − (ε/2) ∇Ũ(θ) + √ε ξ,   ε = 2h falling          weighted means  Σ ε_t f(θ_t) / Σ ε_t

First the variance of the chain at a constant step, where it is known; then the mixture of two Gaussians with tied
means, whose posterior has two dimensions, so that a grid gives its moments; then logistic regression against
Hamiltonian Monte Carlo with acceptance.

Reference: Welling & Teh (2011).

Departures: many chains side by side in place of a long one; other data for the regression; the
mixture's data are drawn anew, and its posterior is a ridge rather than two hills.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bolza.bayes import SGLD, stationary_variance
from bolza.bayes.sgld import REFERENCE
from bolza.report import Figure, role
from bolza.studies._posterior import Moments, Reference, breast_cancer, chains_on, quadratic, reference
from bolza.studies._study import Progress, Row, Scale, StudyResult, mean_error

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "welling2011_sgld"
TITLE = "Stochastic gradient Langevin dynamics"
CLAIM = "As the step falls, descent on batches with injected noise goes over into sampling the posterior"

PRECISION, NOISE = 3.0, 4.0
FAR = 3.5  # standard errors between a measurement and a closed form


@dataclass(frozen=True)
class Budget:
    """Size of the runs."""

    quadratic: int = 100_000
    mixture: int = 300
    mixture_steps: int = 3000
    reference: tuple[int, int] = (64, 200)
    chains: int = 64
    steps: int = 1500


BUDGETS = {
    "small": Budget(),
    "full": Budget(1_000_000, 1000, 20_000, (100, 1000), 200, 10_000),
}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Compare chains with closed forms, with a grid, and with a long run that refuses proposals.

    Args:
        scale: ``"small"``: some ten seconds on one core; ``"full"``: more and longer chains.
        progress: called with the share done and a few words.

    Returns:
        The rows, a figure, and the numbers.

    Example:
        >>> from bolza.studies import get
        >>> get("welling2011_sgld").reference.year
        2011
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    report(0.0, "variances at a constant step")
    rows, points = quadratic_rows(budget.quadratic)
    report(0.1, "mixture")
    exact = grid()
    found = {
        "constant": mixture(budget, 5e-3, 5e-3),
        "falling": mixture(budget, 5e-3, 5e-4),
        "falling, corrected": mixture(budget, 5e-3, 5e-4, "running"),
    }
    rows += mixture_rows(exact, found)
    report(0.5, "reference of the regression")
    known = reference(*budget.reference)
    runs = {}
    for i, (name, share, correct) in enumerate(
        (("large", 0.4, None), ("small", 0.1, None), ("small, corrected", 0.1, "running"))
    ):
        report(0.65 + 0.11 * i, f"regression, {name} step")
        runs[name] = regression(known, share, correct, budget)
    rows += regression_rows(known, runs)
    notes = (
        f"Closed forms: {budget.quadratic} chains on a quadratic of precision {PRECISION:g}; agreement is to {FAR} "
        "standard errors. V is the variance of the gradient.",
        "Mixture: 100 data of ½N(0, 2) + ½N(1, 2), priors N(0, 10) and N(0, 1), batches of 10; moments are means "
        f"over {budget.mixture} chains weighted by the step over the second half of {budget.mixture_steps} steps, "
        "errors are over chains. The step falls from 0.005 to 0.0005 with the power 0.55.",
        f"Regression: {len(breast_cancer().x)} samples, 31 weights, prior N(0, 1), batches of 43; steps are 0.4 and "
        "0.1 over the largest curvature. Variances are along the axes of the reference, "
        f"R̂ at most {known.rhat:.3f}.",
        "The correction takes the noise of the batches, as estimated along the run, off the injected noise by "
        "coordinate: the noise is correlated between coordinates, which this cannot mend.",
    )
    facts = {
        "mixture": {"grid": exact.moments, **{name: m.mean.mean(0).tolist() for name, m in found.items()}},
        "variance ratios": {name: m.ratio.tolist() for name, m in runs.items()},
    }
    report(1.0, "done")
    figure = _figure(points, exact, found["falling"].draws, known, runs)
    return StudyResult(KEY, TITLE, REFERENCE, CLAIM, scale, rows, (figure,), notes, facts)


# ----------------------------------------------------------------------------------- closed forms


def quadratic_rows(chains: int) -> tuple[list[Row], list[tuple[float, float, float]]]:
    """Variances against 1/(λ(1 − hλ/2)), with and without noise of the batches; and points (h, V, variance)."""
    rows, points = [], []
    for h, noise, corrected in (
        (0.05, 0.0, False),
        (0.1, 0.0, False),
        (0.2, 0.0, False),
        (0.1, NOISE, False),
        (0.2, NOISE, False),
        (0.2, NOISE, True),
    ):
        estimate = NOISE if corrected else None
        value, error = quadratic(
            lambda p, h=h, estimate=estimate: SGLD(  # type: ignore[misc]
                p, lr=h, num_data=1, prior_precision=0.0, noise_estimate=estimate, seed=1
            ),
            PRECISION,
            chains=chains,
            steps=math.ceil(4 / (h * PRECISION)) + 4,
            noise=noise,
        )
        exact = stationary_variance("sgld", PRECISION, h=h, gradient_noise=noise, corrected=corrected)
        what = f"λ = 3, h = {h:g}, V = {noise:g}{', V taken off' if corrected else ''}: variance at rest"
        rows.append(Row(what, exact, value, error, abs(value - exact) < FAR * error, "posterior: 0.3333"))
        if not corrected:
            points.append((h, noise, value))
    biases = [stationary_variance("sgld", PRECISION, h=h) - 1 / PRECISION for h in (1e-3, 5e-4)]
    order = math.log2(biases[0] / biases[1])
    rows.append(Row("order of the bias in the step", 1.0, order, 1e-2, abs(order - 1) < 0.01, "closed form"))
    return rows, points


# ---------------------------------------------------------------------------------------- mixture


def data() -> Tensor:
    """A hundred numbers from the mixture with θ = (0, 1)."""
    draw = torch.Generator().manual_seed(0)
    return math.sqrt(2) * torch.randn(100, generator=draw) + (torch.rand(100, generator=draw) < 0.5)


@dataclass(frozen=True)
class Grid:
    """The posterior on a grid.

    Args:
        first: values of θ₁.
        second: values of θ₂.
        density: probabilities, one a point.
        moments: mean of θ₁, variance of θ₁, variance of θ₂, probability of θ₂ > 0.
    """

    first: Tensor
    second: Tensor
    density: Tensor
    moments: tuple[float, float, float, float]


def grid(points: int = 400) -> Grid:
    """Moments of the posterior of the mixture by summing over a grid; an even number of points."""
    first = torch.linspace(-2.5, 3.5, points, dtype=torch.float64)
    second = torch.linspace(-4, 4, points, dtype=torch.float64)
    a, b = torch.meshgrid(first, second, indexing="ij")
    log = -a.square() / 20 - b.square() / 2
    for x in data().double():
        log += torch.logaddexp(-(x - a).square() / 4, -(x - a - b).square() / 4)
    p = torch.softmax(log.flatten(), 0).view(points, points)
    mean_a, mean_b = (p * a).sum(), (p * b).sum()
    half = p[:, second > 0].sum()
    moments = (mean_a, (p * a * a).sum() - mean_a**2, (p * b * b).sum() - mean_b**2, half)
    m = [float(v) for v in moments]
    return Grid(first, second, p, (m[0], m[1], m[2], m[3]))


@dataclass(frozen=True)
class Mixture:
    """What chains found.

    Args:
        mean: weighted means of θ₁, θ₂, θ₁², θ₂² and [θ₂ > 0] of each chain.
        draws: the last θ of each chain.
    """

    mean: Tensor
    draws: Tensor

    def variance(self, i: int) -> tuple[float, float]:
        """Variance of θ_i and its error over chains."""
        centre = self.mean[:, i].mean()
        return mean_error((self.mean[:, 2 + i] - 2 * centre * self.mean[:, i] + centre**2).tolist())


def mixture(
    budget: Budget,
    start: float,
    end: float,
    noise_estimate: str | None = None,
    batch: int = 10,
    seed: int = 0,
) -> Mixture:
    """Chains on the mixture; h falls from ``start`` to ``end``."""
    x, draw, chains, steps = data(), torch.Generator().manual_seed(seed), budget.mixture, budget.mixture_steps
    one = torch.nn.Parameter(math.sqrt(10) * torch.randn(chains, generator=draw))
    two = torch.nn.Parameter(torch.randn(chains, generator=draw))
    groups = [{"params": [one], "prior_precision": 0.1}, {"params": [two], "prior_precision": 1.0}]
    sampler = SGLD(groups, lr=start * len(x), num_data=len(x), noise_estimate=noise_estimate, seed=seed)
    growth = (start / end) ** (1 / 0.55) - 1
    rates = torch.optim.lr_scheduler.LambdaLR(sampler, lambda k: (1 + growth * k / steps) ** -0.55)
    total, weight = torch.zeros(chains, 5), 0.0
    with torch.no_grad():
        for k in range(steps):
            u = x[torch.randint(len(x), (chains, batch), generator=draw)] - one[:, None]
            v = u - two[:, None]
            second = torch.sigmoid((u * u - v * v) / 4)  # how probable the second part is for each datum
            pull = second * v
            one.grad, two.grad = -((1 - second) * u + pull).mean(1) / 2, -pull.mean(1) / 2
            h = sampler.param_groups[0]["lr"]
            sampler.step()
            rates.step()
            if k >= steps // 2:
                weight += h
                values = (one, two, one.square(), two.square(), (two > 0).to(two))
                total += h * torch.stack(values, 1)
    return Mixture((total / weight).double(), torch.stack([one, two], 1).detach())


def mixture_rows(exact: Grid, found: dict[str, Mixture]) -> list[Row]:
    """Moments against the grid."""
    rows = []
    falling = found["falling"]
    for name, estimate, expected in (
        ("mean of θ₁", mean_error(falling.mean[:, 0].tolist()), exact.moments[0]),
        ("probability of θ₂ > 0", mean_error(falling.mean[:, 4].tolist()), exact.moments[3]),
    ):
        far = abs(estimate[0] - expected) / max(estimate[1], 1e-12)
        rows.append(
            Row(f"mixture, falling step: {name}", expected, *estimate, far < 3, "grid; to three errors")
        )
    for name, m in found.items():
        value, error = m.variance(0)
        far = abs(value - exact.moments[1]) / max(error, 1e-12)
        rows.append(
            Row(
                f"mixture, {name} step: variance of θ₁",
                exact.moments[1],
                value,
                error,
                far > 3 and value > exact.moments[1] if name == "constant" else far < 3,
                "too wide, by more than three errors" if name == "constant" else "grid; to three errors",
            )
        )
    return rows


# ------------------------------------------------------------------------------------- regression


def regression(known: Reference, share: float, correct: str | None, budget: Budget) -> Moments:
    """Chains on the logistic regression with the step ``share`` over the largest curvature."""
    size = len(breast_cancer().x)
    lr = share * float(known.variance[0]) * size
    return chains_on(
        lambda p: SGLD(p, lr=lr, num_data=size, noise_estimate=correct, seed=2),
        known,
        chains=budget.chains,
        steps=budget.steps,
        batch=43,
        warmup=budget.steps // 2,
    )


def regression_rows(known: Reference, runs: dict[str, Moments]) -> list[Row]:
    """Errors of means and variances, and what the samples say of new data."""
    rows = []
    least = range(5)  # the stiffest directions, where the step and the noise of the batches tell
    excess = {
        name: (
            float(m.ratio[least].mean()) - 1,
            float(m.ratio_error[least].square().sum().sqrt()) / len(least),
        )
        for name, m in runs.items()
    }
    for name in runs:
        rows.append(
            Row(
                f"regression, {name} step: excess of the variance, mean of the five stiffest directions",
                "→ 0 with the step",
                *excess[name],
                None if name == "large" else excess[name][0] < excess["large"][0] / 2,
                "the measure for the next" if name == "large" else "less than half of that of the large step",
            )
        )
    error = float(runs["small"].mean.square().mean().sqrt())
    rows.append(
        Row(
            "regression, small step: error of the mean, in standard deviations, root mean square over directions",
            "≤ 0.15",
            error,
            None,
            error <= 0.15,
        )
    )
    problem = breast_cancer()
    w = torch.zeros(problem.x.shape[1], requires_grad=True)
    best = torch.optim.LBFGS([w], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        best.zero_grad()
        loss = problem.potential(w[None])[0]
        loss.backward()
        return loss

    best.step(closure)
    scores = problem.score(runs["small"].draws)
    for name, other, goal in (
        ("the most probable weights", problem.score(w.detach()[None]), "> 0"),
        ("the reference", problem.score(known.draws), "0"),
    ):
        gain, spread = mean_error((scores - other).tolist())
        clear = abs(gain) > 2 * spread
        holds = (None if not clear else gain > 0) if goal == "> 0" else not clear or abs(gain) < 0.01
        rows.append(
            Row(
                f"regression: log score on new data, samples over {name}, nats a sample",
                goal,
                gain,
                spread,
                holds,
                "to two errors, sample by sample" + ("" if goal == "> 0" else ", or within 0.01"),
            )
        )
    return rows


# ----------------------------------------------------------------------------------------- figure


def _figure(
    points: list[tuple[float, float, float]],
    exact: Grid,
    draws: Tensor,
    known: Reference,
    runs: dict[str, Moments],
) -> Figure:
    return Figure(
        "From descent to sampling",
        partial(_draw, points=points, exact=exact, draws=draws, known=known, runs=runs),
        caption=(
            "Left: the posterior of the mixture on a grid, and the last draw of every chain. Middle: variance of the "
            "chain on a quadratic: closed forms as lines, measurements as points, the posterior's own dashed. Right: "
            "variance along each axis of the regression's posterior over that of the reference."
        ),
        alt="A ridge covered by draws; variance rising with the step; ratios of variances by axis.",
        size=(10.2, 3.3),
        key="sgld",
    )


def _draw(
    canvas: Any,
    points: list[tuple[float, float, float]],
    exact: Grid,
    draws: Tensor,
    known: Reference,
    runs: dict[str, Moments],
) -> None:
    left, middle, right = canvas.subplots(1, 3)
    levels = [float(exact.density.max()) * v for v in (0.05, 0.2, 0.4, 0.6, 0.8)]
    left.contour(exact.first, exact.second, exact.density.T, levels, colors=[role("first")], linewidths=0.9)
    left.scatter(*draws[:500].T, s=5, color=role("second"), alpha=0.6, linewidths=0)
    left.set(xlabel="θ₁", ylabel="θ₂", xlim=(-1.2, 2.4), ylim=(-2.6, 2.6))
    steps = torch.linspace(0.002, 0.25, 60).tolist()
    for noise, colour in ((0.0, "first"), (NOISE, "second")):
        curve = [stationary_variance("sgld", PRECISION, h=h, gradient_noise=noise) for h in steps]
        middle.plot(steps, curve, color=role(colour), label=f"V = {noise:g}")
        chosen = [(h, value) for h, v, value in points if v == noise]
        middle.plot(*zip(*chosen, strict=True), "o", color=role(colour), markersize=5)
    middle.axhline(1 / PRECISION, color=role("muted"), linestyle="--")
    middle.set(xlabel="h", ylabel="variance", ylim=(0.3, 0.85))
    middle.legend(loc="upper left")
    for (name, m), colour in zip(runs.items(), ("second", "first", "third"), strict=True):
        right.plot(known.variance.sqrt(), m.ratio, "o", markersize=4, color=role(colour), label=name)
    right.axhline(1.0, color=role("muted"), linestyle="--")
    right.set(
        xlabel="standard deviation of the axis", ylabel="variance over reference", xlim=(0, 1.1), yscale="log"
    )
    right.set_yticks([0.7, 1, 2, 4], ["0.7", "1", "2", "4"])
    right.minorticks_off()
    right.legend(loc="upper right", title="step")
