r"""Heavy-tailed SGD on least squares: how much one datum matters, and where the tails come from.

    dX = −λX dt + σ dL^α:     |E|X|^p − E|X'|^p| = C(p, α) |(αλ)^{−p/α} − (αλ')^{−p/α}|

The squared loss has no finite stability once α < 2, the loss |x|^p with p < α has; heavier tails make one datum matter
less, but only up to a threshold, and only where the data are large. SGD on linear regression with Gaussian data has
such tails of its own accord: their index solves E‖(I − η/b AᵀA)e‖^α = 1.

Reference: Raj, Barsbey, Gürbüzbalaban, Zhu & Şimşekli (2023), *Algorithmic Stability of Heavy-Tailed Stochastic
    Gradient Descent on Least Squares*; Gürbüzbalaban, Şimşekli & Zhu (2021), *The Heavy-Tail Phenomenon in SGD*.

Departures. The exact law of the chain is used beside that of the process. The networks of the full scale are small
ones on digits, with stable noise added to their gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bolza.core import simulate
from bolza.data import digits
from bolza.ops.stable_law import absolute_moment, stable_noise
from bolza.report import Figure, role
from bolza.sde import (
    hill,
    inject_stable_noise,
    least_squares_stability,
    levy_sgd,
    regression_tails,
    stablest_index,
    stationary_scale,
)
from bolza.sde.levy import RAJ
from bolza.studies._study import Progress, Row, Scale, StudyResult, mean_error

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "raj2023_stability"
TITLE = "Heavy-tailed SGD on least squares: stability, its threshold, and the tails of regression"
CLAIM = "With heavy tails one datum moves the loss |x|^p by a finite amount, and by less up to a threshold of heaviness"
REFERENCE = RAJ

F64 = torch.float64
P = 1.0
RATES = (1.0, 50.0, 100.0, 200.0, 500.0, 1000.0)


@dataclass(frozen=True)
class Budget:
    """Size of the runs."""

    draws: int
    paths: int
    repeats: int
    chains: int
    chain_steps: int
    seeds: int  # of networks; 0 leaves them out


BUDGETS = {
    "small": Budget(draws=400_000, paths=20_000, repeats=20, chains=100_000, chain_steps=80, seeds=0),
    "full": Budget(draws=2_000_000, paths=200_000, repeats=50, chains=400_000, chain_steps=80, seeds=6),
}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Check moments, stability and its threshold, and the tails of linear regression.

    Args:
        scale: ``"small"``: some seconds on one core; ``"full"``: more draws, and networks with stable noise.
        progress: called with the share done and a few words.

    Returns:
        The rows, a figure, and the numbers.
    """
    budget = BUDGETS[scale]

    def tell(share: float, words: str) -> None:
        if progress is not None:
            progress(share, words)

    tell(0.0, "moments")
    rows = [*moment_rows(budget.draws), process_row(budget.paths), *second_moment_rows(budget)]
    tell(0.3, "stability")
    rows += [*threshold_rows(), *datum_rows(budget.paths)]
    tell(0.5, "regression")
    more, points, tails = regression_rows(budget)
    rows += more
    facts: dict[str, Any] = {"hill": points}
    if budget.seeds:
        tell(0.7, "networks")
        row, gaps = network_row(budget.seeds)
        rows.append(row)
        facts["networks"] = gaps
    tell(1.0, "done")
    return StudyResult(
        KEY,
        TITLE,
        REFERENCE,
        CLAIM,
        scale,
        rows,
        figures=[_figure(points, tails)],
        notes=[
            "One dimension for the stability; the loss |x|^p with p = 1 for its threshold.",
            "The process is started from rest and run until the exact law of the chain is stationary to rounding.",
        ],
        facts=facts,
    )


# ----------------------------------------------------------------------------------------- stable law


def moment_rows(draws: int) -> list[Row]:
    """E|X|^p of draws beside the closed form."""
    rows = []
    for seed, (alpha, p, expected) in enumerate(
        ((1.2, 0.36, 1.0949), (1.5, 0.45, 1.0563), (1.8, 0.54, 1.0195))
    ):
        x = stable_noise((draws,), alpha, generator=torch.Generator().manual_seed(seed), dtype=F64)
        values = x.abs().pow(p)
        found, error = float(values.mean()), float(values.std()) / math.sqrt(draws)
        exact = absolute_moment(p, alpha)
        rows.append(
            Row(
                f"E|X|^{p:g} of stable draws, α = {alpha:g}",
                expected,
                found,
                error,
                abs(exact - expected) < 1e-4 and abs(found - exact) < 4 * error,
                f"closed form {exact:.5f}; within four errors of it",
            )
        )
    return rows


def stationary_chain(
    rate: float, alpha: float, *, lr: float, paths: int, steps: int, seed: int, scale: float = 1.0
) -> Tensor:
    """Chains of SGD with stable noise along one curvature, from zero."""
    equation = levy_sgd(lambda x: rate * x, lr=lr, alpha=alpha, scale=scale)
    generator = torch.Generator().manual_seed(seed)
    start = torch.zeros(paths, 1, dtype=F64)
    return simulate(equation, start, dt=lr, steps=steps, generator=generator)[-1, :, 0]


def memory(rate: float, lr: float) -> int:
    """Steps after which a chain has lost its start to 1e−6."""
    return math.ceil(math.log(1e-6) / math.log(abs(1 - lr * rate)))


def process_row(paths: int) -> Row:
    """E|X|^0.7 of the process."""
    alpha, rate, lr, p = 1.5, 2.0, 0.05, 0.7
    # σ of the chain such that its limit is the process with σ = 1
    sigma = lr ** ((1 - alpha) / alpha)
    x = stationary_chain(rate, alpha, lr=lr, paths=paths, steps=memory(rate, lr), seed=3, scale=sigma)
    values = x.abs().pow(p)
    found, error = float(values.mean()), float(values.std()) / math.sqrt(paths)
    exact = absolute_moment(p, alpha, scale=stationary_scale(rate, alpha, lr=lr, scale=sigma))
    limit = absolute_moment(p, alpha, scale=stationary_scale(rate, alpha))
    return Row(
        "E|X|^0.7 of dX = −2X dt + dL, α = 1.5",
        0.7340,
        found,
        error,
        abs(limit - 0.7340) < 1e-4 and abs(found - exact) < 4 * error,
        f"closed form {limit:.5f}; the chain with dt = {lr:g} has {exact:.5f}, and this within four errors",
    )


def second_moment_rows(budget: Budget) -> list[Row]:
    """The mean square of n draws grows as n^{2/α − 1}."""
    alpha, sizes = 1.5, [10**k for k in range(3, 6 if budget.draws < 10**6 else 7)]
    generator = torch.Generator().manual_seed(4)
    logs = []
    for n in sizes:
        x = stable_noise((budget.repeats * max(1, 10**5 // n), n), alpha, generator=generator, dtype=F64)
        logs.append(x.square().mean(1).log())
    u = torch.tensor(sizes, dtype=F64).log()
    means = torch.stack([v.mean() for v in logs])
    variances = torch.stack([v.var() / len(v) for v in logs])
    weights = (u - u.mean()) / (u - u.mean()).square().sum()
    slope, error = float((weights * means).sum()), float((weights.square() * variances).sum().sqrt())
    return [
        Row(
            f"α = 1.5: the mean square of {sizes[0]:,} to {sizes[-1]:,} draws grows without bound, log-slope",
            2 / alpha - 1,
            slope,
            error,
            abs(slope - (2 / alpha - 1)) < 4 * error and slope > 3 * error,
            "2/α − 1, within four errors; 0 for a finite variance",
        )
    ]


# ------------------------------------------------------------------------------------------ stability


def threshold_rows() -> list[Row]:
    """The index at which one datum matters least."""
    expected = {1.0: 2.0, 50.0: 2.0, 100.0: 1.709, 200.0: 1.478, 500.0: 1.337, 1000.0: 1.275}
    rows = []
    for rate in RATES:
        found = stablest_index(rate, 1.05 * rate, p=P)
        rows.append(
            Row(
                f"most stable α at λ = {rate:g}, λ' = 1.05 λ",
                expected[rate],
                found,
                None,
                abs(found - expected[rate]) < 1e-3,
                "2 is Gaussian noise: heavier tails do not help",
            )
        )
    return rows


def datum_rows(paths: int) -> list[Row]:
    """One datum of twenty replaced: the gap of two trained chains, and that of the formula."""
    generator = torch.Generator().manual_seed(5)
    data = torch.randn(20, dtype=F64, generator=generator)
    other = data.clone()
    other[0] = 4.0
    rates = [float(d.square().mean()) for d in (data, other)]
    rows, lr, p = [], 0.1, 0.5
    for alpha in (1.3, 2.0):
        sigma = lr ** ((1 - alpha) / alpha)
        steps = max(memory(rate, lr) for rate in rates)
        # the same noise for both, as in the definition of stability
        both = [
            stationary_chain(rate, alpha, lr=lr, paths=paths, steps=steps, seed=6, scale=sigma)
            for rate in rates
        ]
        differences = both[0].abs().pow(p) - both[1].abs().pow(p)
        found, error = abs(float(differences.mean())), float(differences.std()) / math.sqrt(paths)
        moments = [
            absolute_moment(p, alpha, scale=stationary_scale(rate, alpha, lr=lr, scale=sigma))
            for rate in rates
        ]
        formula = least_squares_stability(rates[0], rates[1], alpha, p=p)
        rows.append(
            Row(
                f"one datum of 20 replaced, α = {alpha:g}: change of E|X|^0.5",
                formula,
                found,
                error,
                abs(found - abs(moments[0] - moments[1])) < 4 * error,
                f"λ from {rates[0]:.3f} to {rates[1]:.3f}; the chain's own law gives "
                f"{abs(moments[0] - moments[1]):.4f}, and this within four errors",
            )
        )
    rows.append(
        Row(
            "the same for the squared loss, α = 1.3",
            "infinite",
            "infinite" if math.isinf(least_squares_stability(rates[0], rates[1], 1.3, p=2.0)) else "finite",
            None,
            math.isinf(least_squares_stability(rates[0], rates[1], 1.3, p=2.0)),
        )
    )
    return rows


# ----------------------------------------------------------------------------------------- regression


def regression_chain(lr: float, b: int, d: int, chains: int, steps: int, seed: int) -> Tensor:
    """SGD on y = noise with fresh Gaussian inputs: the first coordinate of many chains."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for start in range(0, chains, 10_000):
        n = min(10_000, chains - start)
        theta = torch.zeros(n, d)
        for _ in range(steps):
            a = torch.randn(n, b, d, generator=generator)
            miss = (a @ theta[:, :, None])[:, :, 0] - torch.randn(n, b, generator=generator)
            theta = theta - lr / b * (miss[:, None] @ a)[:, 0]
        out.append(theta[:, 0])
    return torch.cat(out).double()


CASES: Sequence[tuple[float, int, int]] = ((1.0, 1, 1), (0.8, 1, 1), (1.3, 1, 1), (0.55, 1, 2), (1.2, 3, 2))


def regression_rows(
    budget: Budget,
) -> tuple[list[Row], list[tuple[float, int, int, float, float, float]], Tensor]:
    """Closed equation beside the estimate of Hill on chains."""
    rows = []
    for lr, expected in ((0.5, 2.904), (2 / 3, 2.0), (0.8, 1.546), (1.0, 1.091), (1.3, 0.667)):
        found = regression_tails(lr).index
        rows.append(
            Row(
                f"tail index of regression, d = b = 1, η = {lr:.3g}",
                expected,
                found,
                None,
                abs(found - expected) < 1e-3,
            )
        )
    limit = regression_tails(0.5).stationary_limit
    rows.append(Row("no stationary law above η, d = b = 1", 2.4212, limit, None, abs(limit - 2.4212) < 1e-4))
    edges = [
        abs(regression_tails(2 * b / (d + b + 1), batch_size=b, dim=d).index - 2)
        for b, d in ((1, 1), (5, 10), (50, 200))
    ]
    rows.append(
        Row(
            "the variance is infinite above η = 2b/(d + b + 1): error of α = 2 there",
            0.0,
            max(edges),
            1e-6,
            max(edges) < 1e-6,
            "three pairs of batch and dimension",
        )
    )
    points, kept = [], torch.zeros(1)
    for i, (lr, b, d) in enumerate(CASES):
        x = regression_chain(lr, b, d, budget.chains, budget.chain_steps, 30 + i)
        (alpha, error) = (float(value) for value in hill(x, k=max(50, budget.chains // 200), centre="none"))
        exact = regression_tails(lr, batch_size=b, dim=d).index
        points.append((lr, b, d, exact, alpha, error))
        kept = x if i == 0 else kept
        rows.append(
            Row(
                f"Hill's estimate from {budget.chains:,} chains, η = {lr:g}, b = {b}, d = {d}",
                exact,
                alpha,
                error,
                abs(alpha - exact) < 0.03 * exact + 3 * error,
                "within 3 % (the tail is a power far out only) and three errors",
            )
        )
    return rows, points, kept


# ------------------------------------------------------------------------------------------- networks


def network_row(seeds: int) -> tuple[Row, dict[str, list[float]]]:
    """Generalisation gap of a network with stable noise in its gradients, over α at equal median noise."""
    data = digits()
    gaps: dict[str, list[float]] = {}
    for alpha in (1.4, 1.6, 1.8, 2.0):
        # the medians of |ξ| differ by a few per cent only; scale them away
        reference = stable_noise((100_000,), alpha, generator=torch.Generator().manual_seed(0))
        sigma = 0.01 / float(reference.abs().median())
        gaps[f"{alpha:g}"] = [_gap(data, alpha, sigma, seed) for seed in range(seeds)]
    means = {alpha: mean_error(values) for alpha, values in gaps.items()}
    best = min(means, key=lambda alpha: means[alpha][0])
    gain = [a - b for a, b in zip(gaps["2"], gaps[best], strict=True)]
    difference, error = mean_error(gain)
    words = ", ".join(f"{m:.4f} ± {e:.4f} at {alpha}" for alpha, (m, e) in means.items())
    verdict = None if best != "2" and difference < 2 * error else best != "2"
    return (
        Row(
            "a network on digits: the gap of test and training loss is smaller with heavier tails than with α = 2",
            "> 0",
            difference,
            error,
            verdict,
            f"{words}; the best α is chosen afterwards; open within two errors",
        ),
        gaps,
    )


def _gap(data: Any, alpha: float, sigma: float, seed: int, steps: int = 1500) -> float:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    x, y = data.train_x[:500], data.train_y[:500]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        part = torch.randint(len(x), (32,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[part]), y[part]).backward()
        inject_stable_noise(model.parameters(), alpha, scale=sigma, generator=generator)
        optimizer.step()
    with torch.no_grad():
        losses = [
            float(nn.functional.cross_entropy(model(a), b)) for a, b in ((x, y), (data.test_x, data.test_y))
        ]
    return losses[1] - losses[0]


# --------------------------------------------------------------------------------------------- figure


def _figure(points: list[tuple[float, int, int, float, float, float]], tails: Tensor) -> Figure:
    return Figure(
        "When heavy tails help, and where they come from",
        partial(_draw, points=points, tails=tails),
        caption=(
            "Left: how much one datum moves the mean loss, against the tail index of the noise, for three sizes of "
            "the data; dots: least. Middle: tail index of SGD on linear regression over the learning rate, "
            "from its equation, and Hill's estimate from chains. Right: the tail of chains at η = 1 and its "
            "power law."
        ),
        alt="Stability gap over tail index; tail index over learning rate; tail probability, both logarithmic.",
        size=(9.2, 3.2),
        key="stability",
    )


def _draw(canvas: Any, points: list[tuple[float, int, int, float, float, float]], tails: Tensor) -> None:
    left, middle, right = canvas.subplots(1, 3)
    for rate, colour in ((1.0, "first"), (100.0, "second"), (1000.0, "third")):
        alphas = [1.05 + 0.95 * i / 100 for i in range(101)]
        base = least_squares_stability(rate, 1.05 * rate, 2.0)
        left.plot(
            alphas,
            [least_squares_stability(rate, 1.05 * rate, a) / base for a in alphas],
            color=role(colour),
            label=f"λ = {rate:g}",
        )
        best = stablest_index(rate, 1.05 * rate)
        left.plot(best, least_squares_stability(rate, 1.05 * rate, best) / base, "o", color=role(colour))
    left.set(xlabel="tail index α of the noise", ylabel="gap / Gaussian gap", ylim=(0, 3))
    left.legend(loc="upper right")
    curves = {
        (b, d): colour
        for (b, d), colour in zip(((1, 1), (1, 2), (3, 2)), ("first", "second", "third"), strict=True)
    }
    for (b, d), colour in curves.items():
        limit = regression_tails(0.1, batch_size=b, dim=d).variance_limit
        rates = [limit * (0.7 + 1.5 * i / 11) for i in range(12)]
        values = [regression_tails(lr, batch_size=b, dim=d).index for lr in rates]
        seen = [(lr, v) for lr, v in zip(rates, values, strict=True) if v > 0]
        middle.plot(*zip(*seen, strict=True), color=role(colour), label=f"b = {b}, d = {d}")
    for lr, b, d, _, found, error in points:
        middle.errorbar(lr, found, 2 * error, marker="o", markersize=4, color=role(curves[b, d]))
    middle.axhline(2, color=role("muted"), linestyle="--", linewidth=0.8, zorder=0)
    middle.set(xlabel="learning rate η", ylabel="tail index α", ylim=(0, 4.8))
    middle.legend(loc="upper right")
    sizes = tails.abs().sort(descending=True).values
    shown = torch.unique(torch.logspace(0, math.log10(len(sizes)), 200).long().clamp(1, len(sizes)))
    exact = points[0][3]
    anchor = len(sizes) // 200
    right.plot(
        sizes[shown - 1], shown.double() / len(sizes), ".", color=role("first"), markersize=3, label="chains"
    )
    edge = sizes[[0, len(sizes) // 10]]
    right.plot(
        edge,
        (edge / sizes[anchor]).pow(-exact) * anchor / len(sizes),
        color=role("ink"),
        linewidth=1.0,
        label=f"power law, α = {exact:.2f}",
    )
    right.set(xlabel="|θ|", ylabel="P(|θ| > x)", xscale="log", yscale="log", xlim=(0.05, None))
    right.legend(loc="lower left")
