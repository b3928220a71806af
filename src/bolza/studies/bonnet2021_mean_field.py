r"""Training a continuous-depth net by the maximum principle, without a gradient of its loss.

    J = E|x_T − y|² + λ ∫|θ_s|² ds,   ẋ = tanh(θ_s x)
    x forward, p backward, then 2λθ_s + E[p_s ∂_θF(x_s, θ_s)] = 0 at every depth; again

Two clusters at ±1, spread normally with deviation 0.2 cut at ±0.2, are to be moved to ±2 over T = 1 in ten steps. For a
large enough λ the walk through the three lines is a contraction with one fixed point, which is the optimum; a small λ
makes it swing, and a damped update mends that. From N samples the control errs as N^{−1/2}. A second problem has two
state variables and six weights a step.

Reference: Bonnet, Cipriani, Fornasier & Huang (2023), arXiv:2107.08707.

Departures: costates are carried along the particles, which gives what the backward transport equation on a grid would
and serves in any dimension; the update is damped for small λ; clusters are drawn alternately, one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bolza.report import Figure, log_axis, role
from bolza.solve import MeanFieldSolution, mean_field_control
from bolza.solve.mean_field import BONNET as REFERENCE
from bolza.studies._study import Progress, Row, Scale, StudyResult

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "bonnet2021_mean_field"
TITLE = "Training by a mean-field maximum principle"
CLAIM = (
    "For a large enough weight cost the mean-field maximum principle has one solution, which a walk through its "
    "equations reaches without a training gradient and which N samples give to O(1/√N)"
)
F = torch.float64


@dataclass(frozen=True)
class Budget:
    """Size of the experiment."""

    samples: int = 200
    steps: int = 10
    weights: tuple[float, ...] = (0.1, 0.5, 1.0, 2.0, 4.0)
    iterations: int = 20
    sizes: tuple[int, ...] = (20, 80, 320, 1280)
    seeds: int = 16
    population: int = 1000


BUDGETS = {"small": Budget(), "full": Budget(samples=2000, iterations=40, seeds=60, population=10_000)}


def saturated(x: Tensor, u: Tensor) -> Tensor:
    """The field tanh(θ x)."""
    return torch.tanh(u * x)


def dense(x: Tensor, u: Tensor) -> Tensor:
    """The field tanh(W x + b) in the plane, θ = (W, b)."""
    return torch.tanh(x @ u[:4].reshape(2, 2).mT + u[4:])


def square(x: Tensor, y: Tensor) -> Tensor:
    """|x − y|² of each sample."""
    return (x - y).square().sum(-1)


def clusters(samples: int, seed: int | None) -> tuple[Tensor, Tensor]:
    """Points about ±1 and their targets ±2: a normal law of deviation 0.2 cut at ±0.2; its quantiles without a seed."""
    side = torch.where(torch.arange(samples) % 2 == 0, 1.0, -1.0).to(F)
    if seed is None:  # each cluster at the midpoints of equal shares: the law itself, to O(1/samples²)
        uniform = (torch.arange(samples, dtype=F) // 2 + 0.5) / (samples // 2)
    else:
        uniform = torch.rand(samples, generator=torch.Generator().manual_seed(seed), dtype=F)
    edge = math.erf(1 / 2**0.5)
    return (side + 0.2 * 2**0.5 * torch.erfinv(edge * (2 * uniform - 1)))[:, None], 2 * side[:, None]


def rings(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points of the plane to be turned by a quarter and stretched by a half."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 2, generator=draw, dtype=F)
    return x, 1.5 * torch.stack([-x[:, 1], x[:, 0]], -1)


def gradient_optimum(
    field: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, theta: Tensor, weight: float
) -> tuple[float, Tensor]:
    """J and θ of the same problem by L-BFGS on J, with gradients of the whole net."""
    theta, h = theta.clone().requires_grad_(), 1 / len(theta)
    solver = torch.optim.LBFGS([theta], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def cost() -> Tensor:
        end = x
        for u in theta:
            end = end + h * field(end, u)
        return square(end, y).mean() + weight * h * theta.square().sum()

    def closure() -> Tensor:
        solver.zero_grad()
        value = cost()
        value.backward()
        return value

    solver.step(closure)
    return float(cost().detach()), theta.detach()


def contraction(residuals: tuple[float, ...]) -> float:
    """Factor by which the residual shrinks an iteration, over the second half of those above rounding."""
    seen = [r for r in residuals if r > 1e-9]
    half = len(seen) // 2
    return (seen[-1] / seen[half]) ** (1 / max(1, len(seen) - 1 - half))


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Solve the two problems at several weights, and one from few to many samples.

    Args:
        scale: ``"small"``: 200 samples, 16 seeds; ``"full"``: 2000 and 60.
        progress: called with the share done and a few words.

    Returns:
        Rows on optimality, contraction and the rate in N, two figures.

    Example:
        >>> from bolza.studies import get
        >>> get("bonnet2021_mean_field").title
        'Training by a mean-field maximum principle'
    """
    budget, report = BUDGETS[scale], progress or (lambda share, text: None)
    x, y = clusters(budget.samples, 0)
    start = torch.ones(budget.steps, 1, dtype=F)
    report(0.0, "the fixed point at several weights")
    solve = partial(mean_field_control, saturated, square, tolerance=1e-9, iterations=budget.iterations)
    damped = solve(x, y, start, weight=0.1, damping=0.6)
    plain = {w: solve(x, y, start, weight=w) for w in budget.weights}
    best = gradient_optimum(saturated, x, y, start, 0.1)
    report(0.3, "two state variables")
    plane = rings(budget.samples, 0)
    zeros = 0.1 * torch.ones(budget.steps, 6, dtype=F)
    wide = mean_field_control(
        dense,
        square,
        *plane,
        zeros,
        weight=0.5,
        damping=0.5,
        tolerance=1e-6,
        iterations=2 * budget.iterations,
    )
    wide_best = gradient_optimum(dense, *plane, zeros, 0.5)
    report(0.5, "samples against the population")
    everyone = mean_field_control(
        saturated, square, *clusters(budget.population, None), damped.theta, weight=0.1, damping=0.6
    )
    gaps: dict[int, Tensor] = {}
    for k, n in enumerate(budget.sizes):
        report(0.55 + 0.45 * k / len(budget.sizes), f"{budget.seeds} draws of {n} samples")
        gaps[n] = torch.tensor([sample_gap(n, seed, everyone.theta) for seed in range(budget.seeds)], dtype=F)
    report(1.0, "done")
    rows = [
        *optimum_rows(damped, best, wide, wide_best),
        *contraction_rows(plain, damped),
        *rate_rows(gaps),
    ]
    return StudyResult(
        KEY,
        TITLE,
        REFERENCE,
        CLAIM,
        scale,
        rows,
        (_path_figure(damped, y), _rate_figure(plain, damped, gaps)),
        notes=(
            "Costates are carried along the particles in place of a transport equation on a grid.",
            "At λ = 0.1 the update goes 0.6 of the way: undamped it swings with a factor near −1.",
            f"The population is stood in for by {budget.population:,} quantiles of its law.",
        ),
        facts={
            "J": damped.value,
            "J_gradient": best[0],
            "theta": damped.theta[:, 0].tolist(),
            "residuals": {str(w): list(s.residuals) for w, s in plain.items()},
            "rms_gap": {n: float(g.square().mean().sqrt()) for n, g in gaps.items()},
        },
    )


def sample_gap(samples: int, seed: int, theta: Tensor) -> float:
    """Root mean square distance in depth between the control of a sample and that of the population."""
    x, y = clusters(samples, 1000 * samples + seed)
    found = mean_field_control(
        saturated, square, x, y, theta, weight=0.1, damping=0.6, tolerance=2e-4, iterations=15
    )
    return float((found.theta - theta).square().mean().sqrt())


def optimum_rows(
    damped: MeanFieldSolution,
    best: tuple[float, Tensor],
    wide: MeanFieldSolution,
    wide_best: tuple[float, Tensor],
) -> list[Row]:
    """The fixed point is the optimum."""
    twelve = damped.values[min(12, len(damped.values) - 1)]
    rise = float(damped.theta.diff(dim=0).max())
    return [
        Row(
            "J after 12 iterations, λ = 0.1",
            best[0],
            twelve,
            None,
            twelve <= 1.005 * best[0],
            "expected: the optimum by L-BFGS with gradients of the net; judged to 0.5 %",
        ),
        Row(
            "largest distance of the control from that optimum",
            0.0,
            float((damped.theta - best[1]).abs().max()),
            None,
            float((damped.theta - best[1]).abs().max()) < 1e-4,
            "judged to 10⁻⁴",
        ),
        Row(
            "the control falls with depth: largest rise from one step to the next",
            "< 0",
            rise,
            None,
            rise < 0,
            f"from {float(damped.theta[0]):.3f} to {float(damped.theta[-1]):.3f}",
        ),
        Row(
            "two state variables, six weights a step: J",
            wide_best[0],
            wide.value,
            None,
            abs(wide.value / wide_best[0] - 1) < 1e-4,
            f"expected: L-BFGS; {len(wide.residuals)} iterations; judged to 10⁻⁴",
        ),
    ]


def contraction_rows(plain: dict[float, MeanFieldSolution], damped: MeanFieldSolution) -> list[Row]:
    """The walk is a contraction, the stronger the larger λ."""
    factors = {w: contraction(s.residuals) for w, s in plain.items()}
    words = ", ".join(f"{f:.3f} at λ = {w:g}" for w, f in factors.items())
    values = list(factors.values())
    rows = [
        Row(
            "factor of the residual an iteration falls as λ grows (undamped)",
            "falling, < 1",
            words,
            None,
            all(a > b for a, b in zip(values, values[1:], strict=False)) and values[0] < 1,
            "geometric mean over the second half of the run",
        )
    ]
    if 1.0 in plain and len(plain[1.0].residuals) >= 10:
        at_ten = plain[1.0].residuals[9]
        rows.append(Row("residual at iteration 10, λ = 1", "≤ 0.01", at_ten, None, at_ten <= 0.01))
    damped_factor = contraction(damped.residuals)
    first = min(factors)
    rows.append(
        Row(
            f"damping mends the swing at λ = {first:g}: factor damped",
            f"< {factors[first]:.3f}",
            damped_factor,
            None,
            damped_factor < factors[first],
            "0.6 of the way each time",
        )
    )
    return rows


def rate_rows(gaps: dict[int, Tensor]) -> list[Row]:
    """The control from N samples approaches that of the population."""
    sizes = torch.tensor([math.log(n) for n in gaps], dtype=F)
    squares = [g.square() for g in gaps.values()]
    rms = [float(s.mean().sqrt()) for s in squares]
    errors = torch.tensor(
        [float(s.std() / len(s) ** 0.5 / (2 * s.mean())) for s in squares], dtype=F
    )  # of log rms
    weights = (sizes - sizes.mean()) / (sizes - sizes.mean()).square().sum()
    slope, error = float(weights @ torch.tensor(rms, dtype=F).log()), float((weights * errors).norm())
    words = ", ".join(f"{r:.2g} at {n}" for n, r in zip(gaps, rms, strict=True))
    return [
        Row(
            "exponent of the control's error in the number of samples",
            -0.5,
            slope,
            error,
            abs(slope + 0.5) < max(0.1, 3 * error),
            f"root mean square {words}; judged to 0.1 or three standard errors",
        )
    ]


# ---------------------------------------------------------------------------------------- figures


def _path_figure(damped: MeanFieldSolution, y: Tensor) -> Figure:
    return Figure(
        "A population moved by one control",
        partial(_draw_paths, damped=damped, y=y),
        caption="Left: paths of the samples; dots: their targets. Right: the control that drives all of them.",
        alt="Two bundles of curves that part towards ±2; a falling staircase of weights.",
        size=(9.2, 3.4),
        key="paths",
    )


def _draw_paths(canvas: Any, damped: MeanFieldSolution, y: Tensor) -> None:
    left, right = canvas.subplots(1, 2, gridspec_kw={"width_ratios": [1.5, 1]})
    steps = len(damped.theta)
    depth = [k / steps for k in range(steps + 1)]
    for k in range(min(80, len(y))):
        colour = role("first" if float(y[k]) > 0 else "second")
        left.plot(depth, damped.states[:, k, 0], color=colour, alpha=0.25, linewidth=0.8)
    left.plot([1.02, 1.02], [-2, 2], "o", color=role("muted"), clip_on=False)
    left.set(xlabel="depth", ylabel="$x$")
    right.step(
        depth, [*damped.theta[:, 0].tolist(), float(damped.theta[-1])], where="post", color=role("third")
    )
    right.set(xlabel="depth", ylabel="$\\theta$")


def _rate_figure(plain: dict[float, MeanFieldSolution], damped: MeanFieldSolution, gaps: Any) -> Figure:
    return Figure(
        "Contraction, and the price of few samples",
        partial(_draw_rates, plain=plain, damped=damped, gaps=gaps),
        caption="Left: what the maximum principle misses after each iteration, by weight λ. Right: distance of the "
        "control from that of the population, each draw and root mean square.",
        alt="Straight falling lines, steeper for larger weights; dots falling with the slope −1/2.",
        size=(9.2, 3.4),
        key="rates",
    )


def _draw_rates(
    canvas: Any, plain: dict[float, MeanFieldSolution], damped: MeanFieldSolution, gaps: dict[int, Tensor]
) -> None:
    left, right = canvas.subplots(1, 2)
    for k, (w, s) in enumerate(plain.items()):
        shade = 0.35 + 0.65 * k / max(1, len(plain) - 1)
        left.plot(s.residuals, color=role("first"), alpha=shade, label=f"λ = {w:g}")
    left.plot(damped.residuals, "--", color=role("second"), label=f"λ = {min(plain):g}, damped")
    log_axis(left, "y")
    left.set(xlabel="iteration", ylabel="residual", ylim=(1e-7, 3))
    left.legend(fontsize=8)
    for n, g in gaps.items():
        right.plot([n] * len(g), g, "o", color=role("third"), alpha=0.3, markersize=3)
    rms = [float(g.square().mean().sqrt()) for g in gaps.values()]
    right.plot(list(gaps), rms, "D-", color=role("third"), markersize=5)
    right.plot(
        list(gaps),
        [rms[0] * (min(gaps) / n) ** 0.5 for n in gaps],
        "--",
        color=role("muted"),
        label="$N^{-1/2}$",
    )
    log_axis(right, "x")
    log_axis(right, "y")
    right.set(xlabel="samples $N$", ylabel="distance from the population's control")
    right.legend()
