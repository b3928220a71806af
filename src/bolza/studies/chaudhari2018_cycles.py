r"""SGD goes round: what its noise does where it is not aligned with the curvature.

    ρ^ss ∝ exp(−Φ/T),   Φ ≠ f,   j = −∇f + D ∇Φ − T ∇·D,   L = ⟨x ẋᵀ − ẋ xᵀ⟩ ≠ 0

The paper says that SGD minimises a free energy of an implicit potential Φ and not of the loss, and that its likeliest
trajectories are closed loops and not Brownian motion about a minimum. Three tests: quadratic losses, where
everything is known; a loss with two valleys on a grid; and a network, for which curvature and noise at the minimum
predict the area that SGD sweeps in every plane of its directions of largest curvature, to be compared with runs.

Reference: Chaudhari & Soatto (2018), arXiv:1710.11029.

Departures. The paper reads loops off the spectrum of the increments of single weights. Increments of a run without
any current are correlated too; the area is not, and is used instead. The network is small and its loss quadratic in
the outputs, so that the run comes to rest.
"""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bolza.report import Figure, role
from bolza.report.numbers import power
from bolza.sde import (
    GridCurrent,
    area_rate,
    fokker_planck,
    linear_current,
    stationary_current,
)
from bolza.sde.currents import CHAUDHARI
from bolza.studies._cycles import BATCH, HIDDEN, RATE, SAMPLES, Budget, Loops, network_loops
from bolza.studies._study import Progress, Row, Scale, StudyResult

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "chaudhari2018_cycles"
TITLE = "SGD goes round in loops"
CLAIM = (
    "SGD descends an implicit potential that is not the loss, and its likeliest trajectories are closed loops"
)
REFERENCE = CHAUDHARI

F64 = torch.float64
HEAT = 0.15
NOISE = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=F64)


BUDGETS = {
    "small": Budget(runs=16, steps=3000, settle=500, directions=24, linear_steps=5000, cells=100),
    "full": Budget(runs=64, steps=20000, settle=2000, directions=40, linear_steps=50000, cells=240),
}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Compare areas, potentials and loops with what curvature and noise predict.

    Args:
        scale: ``"small"``: some ten seconds on one core; ``"full"``: more and longer runs, a finer grid.
        progress: called with the share done and a few words.

    Returns:
        Rows on quadratics, the grid and the network; one figure; the numbers.

    Example:
        >>> from bolza.studies import get
        >>> get("chaudhari2018_cycles").reference.year
        2018
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    report(0.0, "quadratic losses")
    rows = [*linear_rows(), *simulated_rows(budget)]
    report(0.2, "two valleys on a grid")
    valleys = stationary_current(two_valleys(budget.cells))
    rows += grid_rows(budget, valleys)
    report(0.4, f"{budget.runs} runs of a network")
    loops = network_loops(budget)
    rows += network_rows(loops)
    report(1.0, "done")
    notes = (
        f"Network 64-{HIDDEN}-10 with tanh and squared loss on {SAMPLES} digits, 15 % of them with a random label, "
        f"trained to rest by L-BFGS; then {budget.runs} runs of SGD from there, batches of {BATCH}, rate {RATE:g}, "
        f"{budget.steps} steps of which the first {budget.settle} are not used.",
        "The prediction uses the Hessian and the covariance of gradients at the minimum only. Errors are those of "
        "blocks of the runs; curvature that varies over the width of the stationary law is not in it.",
        "L is twice the area a unit of time; time is steps times the rate.",
    )
    facts = {
        "predicted frequencies": loops.predicted.frequencies.tolist(),
        "measured z": loops.measured.z,
        "slope": loops.slope,
        "likeliest place": valleys.likeliest.tolist(),
        "entropy production of the valleys": valleys.entropy_production,
    }
    return StudyResult(
        KEY, TITLE, REFERENCE, CLAIM, scale, rows, (_figure(valleys, loops, budget),), notes, facts
    )


# --------------------------------------------------------------------------------------- quadratics


def linear_rows() -> list[Row]:
    """Numbers of two quadratic losses."""
    A, D = torch.diag(torch.tensor([1.0, 3.0])), torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    first = linear_current(A, D, temperature=0.05)
    H, noise = torch.diag(torch.tensor([3.0, 1.0])), torch.tensor([[1.0, 0.6], [0.6, 0.8]])
    second = linear_current(H, noise, temperature=0.25)
    sigma = float(first.entropy_production)
    area = float(second.area_rate[0, 1])
    off = float((linear_current(H, torch.eye(2), temperature=0.25).potential - H).abs().max())
    return [
        Row("quadratic loss: entropy production", 16 / 9, sigma, None, abs(sigma - 16 / 9) < 1e-6),
        Row("quadratic loss: period of the loop", 6.54, first.period, None, abs(first.period - 6.54) < 0.005),
        Row("quadratic loss: area rate L₁₂", 0.15, area, None, abs(area - 0.15) < 1e-6),
        Row("isotropic noise: Φ = f, largest difference of the Hessians", 0.0, off, None, off < 1e-6),
    ]


def simulated_rows(budget: Budget) -> list[Row]:
    """Areas of runs of SGD with Gaussian noise on the second of these losses."""
    H, T, lr = torch.diag(torch.tensor([3.0, 1.0], dtype=F64)), 0.25, 0.02
    found = {}
    for name, D in (
        ("oblique", torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=F64)),
        ("isotropic", 0.9 * torch.eye(2, dtype=F64)),
    ):
        g = torch.Generator().manual_seed(0)
        theory = linear_current(H, D, temperature=T, lr=lr)
        x = torch.randn(32, 2, generator=g, dtype=F64) @ torch.linalg.cholesky(theory.covariance).mT
        root, step = torch.linalg.cholesky(2 * T * lr * D).mT, (torch.eye(2, dtype=F64) - lr * H).mT
        saved = [x]
        for _ in range(budget.linear_steps):
            x = x @ step + torch.randn(32, 2, generator=g, dtype=F64) @ root
            saved.append(x)
        path = torch.stack(saved)
        found[name] = (area_rate(path, dt=lr, blocks=32), float(theory.area_rate[0, 1]))
    (loop, expected), (none, _) = found["oblique"], found["isotropic"]
    moves = path[1:, :, 0] - path[:-1, :, 0]  # of the last, isotropic, along the direction of curvature 3
    lags = (moves[:-1] * moves[1:]).mean(0) / moves.square().mean()
    lag, spread = float(lags.mean()), float(lags.std()) / len(lags) ** 0.5
    value, error = float(loop.matrix[0, 1]), float(loop.error[0, 1])
    return [
        Row(
            "runs of SGD on it: area rate L₁₂",
            expected,
            value,
            error,
            abs(value - expected) < 3 * error and loop.z > 3.3,
            f"expected for steps of {lr:g}, within three errors; z = {loop.z:.1f}",
        ),
        Row(
            "the same with isotropic noise of equal trace: z",
            "below 3.3",
            none.z,
            None,
            none.z < 3.3,
            f"L₁₂ = {float(none.matrix[0, 1]):.4f} ± {float(none.error[0, 1]):.4f}",
        ),
        Row(
            "increments without correlation in time tell a run without loops from one with loops",
            0.0,
            lag,
            spread,
            abs(lag) < 3 * spread,
            "correlation of successive increments in the isotropic run, which has no loops; −ηλ/2 in theory",
        ),
    ]


# --------------------------------------------------------------------------------------- two valleys


def valleys_loss(x: Tensor) -> Tensor:
    """A curved trough with two valleys, the minima at (±1, ±½ sin 2)."""
    return (x[..., 0] ** 2 - 1) ** 2 / 4 + (x[..., 1] - 0.5 * (2 * x[..., 0]).sin()) ** 2


def two_valleys(cells: int, noise: Tensor = NOISE) -> Any:
    """The Fokker–Planck equation of SGD on it."""
    return fokker_planck(valleys_loss, ((-2.4, 2.4), (-2.4, 2.4)), cells, temperature=HEAT, diffusion=noise)


def grid_rows(budget: Budget, found: GridCurrent) -> list[Row]:
    """Where the density is largest, which free energy falls, and whether the current follows level lines of Φ."""
    grid = two_valleys(budget.cells)
    minimum = torch.tensor([1.0, 0.5 * math.sin(2.0)], dtype=F64) * found.likeliest[0].sign()
    away = float((bottom(found.potential, grid.axes) - minimum).norm())
    plain = two_valleys(budget.cells, torch.eye(2, dtype=F64))
    same = bottom(valleys_loss(plain.points), plain.axes)
    resolution = float((same - torch.tensor([1.0, 0.5 * math.sin(2.0)], dtype=F64) * same[0].sign()).norm())
    gibbs = grid.density(lambda x: -valleys_loss(x) / HEAT)
    course = grid.evolve(gibbs, torch.linspace(0, 4, 21, dtype=F64), dt=0.1)
    implicit = [grid.free_energy(rho, found.potential) for rho in course]
    loss = [grid.free_energy(rho) for rho in course]
    falls = all(b <= a + 1e-12 for a, b in itertools.pairwise(implicit))
    bowl = fokker_planck(
        lambda x: (x[..., 0] ** 2 + 3 * x[..., 1] ** 2) / 2,
        ((-2.4, 2.4), (-2.4, 2.4)),
        budget.cells,
        temperature=HEAT,
        diffusion=NOISE,
    )
    mean, known = across(found, grid.axes), across(stationary_current(bowl), bowl.axes)
    return [
        Row(
            "two valleys: distance of the likeliest place from the minimum of the loss",
            "above 0",
            away,
            resolution,
            away > 5 * resolution,
            "the error is the distance that the grid shows with isotropic noise, where it is 0; holds above five of it",
        ),
        Row(
            "the free energy of Φ falls along the flow from Gibbs' law of the loss",
            "falls",
            "falls" if falls else "rises",
            None,
            falls,
            f"from {implicit[0]:.4f} to {implicit[-1]:.4f}",
        ),
        Row(
            "the free energy of the loss itself does not",
            "rises",
            "rises" if loss[-1] > loss[0] + 1e-9 else "falls",
            None,
            loss[-1] > loss[0] + 1e-9,
            f"from {loss[0]:.4f}, its minimum, to {loss[-1]:.4f}",
        ),
        Row(
            "the current runs along level lines of Φ: mean |cos| between j and ∇Φ",
            0.0,
            mean,
            None,
            mean < 0.1,
            "within 0.1; an assumption of the paper, ∇·j = 0, exact for quadratic losses, where the same grid gives "
            f"{known:.3f}",
        ),
    ]


def bottom(potential: Tensor, axes: tuple[Tensor, ...]) -> Tensor:
    """Lowest point of values on a grid, between its centres by the parabola through the lowest and its neighbours."""
    i, j = divmod(int(potential.argmin()), potential.shape[1])
    v = potential[i - 1 : i + 2, j - 1 : j + 2]
    slope = torch.stack([v[2, 1] - v[0, 1], v[1, 2] - v[1, 0]]) / 2
    mixed = (v[2, 2] - v[2, 0] - v[0, 2] + v[0, 0]) / 4
    along = torch.stack([v[2, 1] - 2 * v[1, 1] + v[0, 1], v[1, 2] - 2 * v[1, 1] + v[1, 0]])
    curvature = torch.stack([torch.stack([along[0], mixed]), torch.stack([mixed, along[1]])])
    widths = torch.stack([axis[1] - axis[0] for axis in axes])
    return torch.stack([axes[0][i], axes[1][j]]) - widths * torch.linalg.solve(curvature, slope)


def across(found: GridCurrent, axes: tuple[Tensor, ...]) -> float:
    """Mean |cos| between the current and the slope of Φ, weighted by the density."""
    slope = torch.stack(torch.gradient(found.potential, spacing=[axis for axis in axes]))
    weight = found.density * (found.density > 0.01 * found.density.max())
    length = found.velocity.norm(dim=0) * slope.norm(dim=0)
    cosine = (found.velocity * slope).sum(0).abs() / length.clamp(min=1e-300)
    return float((weight * cosine).sum() / weight.sum())


# ------------------------------------------------------------------------------------------- network


def network_rows(loops: Loops) -> list[Row]:
    """Loops of the network."""
    resting, moving = loops.gradients
    turn, error = float(loops.in_plane.matrix[0, 1]), float(loops.in_plane.error[0, 1])
    share = loops.rank / loops.size
    near = abs(turn - loops.expected_turn) < max(3 * error, 0.1 * abs(loops.expected_turn))
    return [
        Row(
            "network: effective rank of the gradient noise over its dimension",
            "of the order of 1 %",
            share,
            None,
            share < 0.05,
            f"(tr Σ)²/tr Σ² = {loops.rank:.0f} of {loops.size}; holds below 5 %",
        ),
        Row(
            "SGD goes on where the gradient of the loss is not small: its norm along the runs over that at the minimum",
            "large",
            moving / resting,
            None,
            moving > 3 * resting,
            f"{moving:.2g} against {resting:.1g}; holds above 3",
        ),
        Row(
            "SGD on the network circles: z of the areas in all planes",
            "above 3.3",
            loops.measured.z,
            None,
            loops.measured.z > 3.3 and loops.measured.settled,
            f"fastest plane: {loops.measured.frequency} a unit of time, predicted "
            f"{float(loops.predicted.frequencies[0]):.3f}",
        ),
        Row(
            "measured over predicted area rates, all planes of the top directions",
            1.0,
            loops.slope,
            loops.slope_error,
            abs(loops.slope - 1) < 0.1 and loops.correlation > 0.9,
            f"weighted slope, within 0.1; correlation {loops.correlation:.3f} over {_planes(loops)} planes",
        ),
        Row(
            "area rate in the plane that theory names",
            loops.expected_turn,
            turn,
            error,
            near,
            "within three errors or a tenth",
        ),
        Row(
            "a trajectory closes a loop before it forgets where it was: turns in the time of relaxation",
            "above 1",
            loops.turns,
            None,
            loops.turns > 1,
            "predicted, in the fastest plane: the loops are there in the mean, but a single run shows noise",
        ),
    ]


def _planes(loops: Loops) -> int:
    k = loops.path.shape[-1]
    return k * (k - 1) // 2


# -------------------------------------------------------------------------------------------- figure


def _figure(valleys: GridCurrent, loops: Loops, budget: Budget) -> Figure:
    return Figure(
        "Currents of SGD",
        partial(_draw, valleys=valleys, loops=loops, cells=budget.cells),
        caption="Left: density of SGD with oblique noise in two valleys (shade), the current (arrows), level "
        "lines of the loss, its minima (crosses), likeliest places (dots). Middle: area that the runs of the network "
        "have swept, mean and one standard error over runs, in the plane that theory names, and predicted (dashed). "
        "Right: area rates of all planes, measured against predicted, two standard errors.",
        alt="Stationary density with its current; swept area growing linearly with time; measured against "
        "predicted area rates along the diagonal.",
        size=(12.0, 3.9),
        key="cycles",
    )


def _draw(canvas: Any, valleys: GridCurrent, loops: Loops, cells: int) -> None:
    left, middle, right = canvas.subplots(1, 3)
    grid = two_valleys(cells)
    x, y = (axis.numpy() for axis in grid.axes)
    left.contourf(x, y, valleys.density.T.numpy(), levels=12, cmap="Blues")
    levels = [0.05, 0.15, 0.25, 0.5, 1.0, 2.0]
    left.contour(x, y, grid.potential.T.numpy(), levels=levels, colors=role("muted"), linewidths=0.7)
    strength = valleys.flux.norm(dim=0) / valleys.flux.norm(dim=0).max()
    flux = [torch.where(strength > 0.02, f, math.nan).T.numpy() for f in valleys.flux]
    left.streamplot(
        x, y, *flux, color=role("second"), linewidth=2 * strength.sqrt().T.numpy(), density=1.1, arrowsize=0.8
    )
    depth = 0.5 * math.sin(2.0)
    left.plot([1, -1], [depth, -depth], "x", color=role("ink"), markersize=7)
    likely = bottom(valleys.potential, grid.axes).tolist()
    left.plot([likely[0], -likely[0]], [likely[1], -likely[1]], "o", color=role("accent"), markersize=5)
    left.set(xlabel="x₁", ylabel="x₂", xlim=(-1.9, 1.9), ylim=(-1.6, 1.6))

    path = loops.plane_path
    wedge = path[:-1, :, 0] * path[1:, :, 1] - path[1:, :, 0] * path[:-1, :, 1]
    swept = wedge.cumsum(0) / 2
    time = RATE * torch.arange(1, len(path))
    mean, error = swept.mean(1), swept.std(1) / swept.shape[1] ** 0.5
    middle.fill_between(time, mean - error, mean + error, color=role("first"), alpha=0.25, linewidth=0)
    middle.plot(time, mean, color=role("first"), label="network")
    middle.plot(time, loops.expected_turn / 2 * time, "--", color=role("ink"), label="predicted")
    middle.axhline(0, color=role("muted"), linewidth=0.8)
    middle.set(xlabel="time (steps × rate)", ylabel="area swept, in units of the variance")
    middle.legend()

    k = loops.path.shape[-1]
    above = torch.triu_indices(k, k, 1)
    p, m, e = (
        a[above[0], above[1]]
        for a in (loops.predicted.area_rate, loops.measured.matrix, loops.measured.error)
    )
    unit = 10.0 ** math.floor(math.log10(float(p.abs().max())))
    high = 1.1 * float(torch.maximum(p.abs(), m.abs()).max()) / unit
    right.plot([-high, high], [-high, high], color=role("muted"), linewidth=0.8)
    right.errorbar(
        p / unit, m / unit, 2 * e / unit, fmt="o", color=role("first"), markersize=3, linewidth=0.7
    )
    name = f" × {power(round(math.log10(unit)))}"
    right.set(xlabel=f"predicted area rate{name}", ylabel=f"measured area rate{name}")
