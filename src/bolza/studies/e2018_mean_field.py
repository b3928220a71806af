r"""Training as control of a population: one control for all samples, and a value function of their law.

    minimise over θ   J = E[Φ(x_T, y) + ∫ L(x, θ_s) ds],   ẋ = f(x, θ_s)
    maximum principle   θ_s minimises E H(x_s, p_s, θ)
    Hamilton–Jacobi–Bellman   ∂_t v + inf_θ E[∂_μv · f(x, θ) + L] = 0,   v(T, μ) = E Φ

What can be checked to the last digit is: that the residual of the maximum principle is the gradient of the loss, layer
by layer; the problem ẋ = θ, L = ½λθ², Φ = ½(x − y)², where v(t, μ) and θ* are known; that the control from N samples
scatters as s/(√N(λ + T)); and that without the mean field the equation gives the Riccati solution.

Reference: E, Han & Li (2019), arXiv:1807.01083.

Departures: the paper proves; the experiments are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bolza.core import TerminalCost, adjoint, maximum_principle_residuals, rollout
from bolza.data import digits
from bolza.models import mlp
from bolza.ops.riccati import riccati_recursion
from bolza.report import Figure, log_axis, role
from bolza.solve import GridValue, grid_hjb, linear_mean_field, mean_field_control
from bolza.solve.mean_field import E_HAN_LI as REFERENCE
from bolza.studies._study import Progress, Row, Scale, StudyResult
from bolza.systems import LinearSystem, QuadraticCost, as_system

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "e2018_mean_field"
TITLE = "Training as control of a population"
CLAIM = (
    "Training is mean-field optimal control: its maximum principle is stationarity layer by layer, its value is a "
    "function of the law of the data, and N samples find its control to O(1/√N)"
)
F = torch.float64
LAMBDA, MEAN, DEVIATION = 0.5, 1.3, 0.7


@dataclass(frozen=True)
class Budget:
    """Size of the experiment."""

    images: int = 200
    decay: float = 0.02
    iterations: int = 300
    sizes: tuple[int, ...] = (25, 100, 400, 1600)
    draws: int = 2000
    grid: int = 161
    times: int = 10


BUDGETS = {"small": Budget(), "full": Budget(images=1000, iterations=2000, draws=20_000, grid=641)}


@dataclass(frozen=True)
class Descent:
    """The maximum principle along the training of a network.

    Args:
        identity: largest relative distance of a layer's residual from its gradient by autograd, before training.
        residuals: ‖E∂_θH‖ of each layer that has weights, a row each time it was looked at.
        looked: iterations at which it was.
    """

    identity: float
    residuals: Tensor
    looked: tuple[int, ...]


class Decayed:
    """Cross-entropy and a weight cost, as terminal and running cost of the layers."""

    def __init__(self, y: Tensor, decay: float) -> None:
        self.end, self.decay = TerminalCost(nn.functional.cross_entropy, y), decay

    def terminal(self, x: Tensor) -> Tensor:
        """Return the loss."""
        return self.end.terminal(x)

    def running(self, t: int, x: Tensor, u: dict[str, Tensor]) -> Tensor:
        """Return ½λ|u|²."""
        return sum((p.square().sum() for p in u.values()), torch.zeros((), dtype=F)) * self.decay / 2


def descend(budget: Budget) -> Descent:
    """Train a small network with a weight cost to its optimum, and read the maximum principle on the way."""
    data = digits()
    x, y = data.train_x[: budget.images].to(F), data.train_y[: budget.images]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = mlp(depth=3, width=16, activation="tanh").to(F)
    cost = Decayed(y, budget.decay)

    def loss() -> Tensor:
        squares = sum((p.square().sum() for p in model.parameters()), torch.zeros((), dtype=F))
        return nn.functional.cross_entropy(model(x), y) + budget.decay / 2 * squares

    def residuals() -> dict[int, float]:
        system = as_system(model, x)
        run = adjoint(system, cost, rollout(system, x))
        found = maximum_principle_residuals(system, cost, run).stationarity
        return {t: r for t, r in enumerate(found) if run.controls[t]}

    loss().backward()
    layers = [m for m in model if isinstance(m, nn.Linear)]
    gradients = [
        float(torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]).norm())
        for m in layers
    ]
    first = list(residuals().values())
    identity = max(abs(r / g - 1) for r, g in zip(first, gradients, strict=True))
    seen, looked = [first], [0]
    part = max(1, budget.iterations // 10)
    solver = torch.optim.LBFGS(
        model.parameters(),
        max_iter=part,
        max_eval=2 * part,
        history_size=50,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        value = loss()
        value.backward()
        return value

    for k in range(10):
        solver.step(closure)
        seen.append(list(residuals().values()))
        looked.append((k + 1) * part)
    return Descent(identity, torch.tensor(seen, dtype=F), tuple(looked))


def exact_sample(samples: int) -> Tensor:
    """Distances with the mean and deviation of the worked example, exactly."""
    return (MEAN + DEVIATION * torch.where(torch.arange(samples) % 2 == 0, 1.0, -1.0)).to(F)


def scatter(budget: Budget) -> dict[int, Tensor]:
    """θ from many independent samples of each size."""
    draw = torch.Generator().manual_seed(0)
    return {
        n: (MEAN + DEVIATION * torch.randn(budget.draws, n, generator=draw, dtype=F)).mean(1) / (LAMBDA + 1)
        for n in budget.sizes
    }


def along_the_optimum(parts: int) -> list[tuple[float, float]]:
    """v(t, μ_t) in closed form beside the cost still to come on the optimal path, from several times t."""
    z, out = exact_sample(50), []
    theta = float(linear_mean_field(z, LAMBDA / 2).theta)
    for k in range(parts):
        t = k / parts
        at = z - t * theta
        solved = mean_field_control(
            lambda x, u: u.expand_as(x),
            lambda x, y: (x - y).square().sum(-1) / 2,
            torch.zeros_like(at)[:, None],
            at[:, None],
            torch.zeros(5, 1, dtype=F),
            weight=LAMBDA / 2,
            time=1 - t,
            damping=0.3,
            tolerance=1e-10,
            iterations=60,
        )
        out.append((float(linear_mean_field(at, LAMBDA / 2, time=1 - t).value), solved.value))
    return out


def regulator(grid: int) -> tuple[float, float, GridValue]:
    """Largest errors of value and feedback on [−2, 2] against Riccati, x⁺ = x + u over five steps."""
    one = torch.eye(1, dtype=F)
    P = riccati_recursion(one, one, one, one, one, 5)
    found = grid_hjb(
        LinearSystem(one, one, horizon=5),
        QuadraticCost(one, one),
        [torch.linspace(-4, 4, grid, dtype=F)],
        torch.linspace(-4, 4, 5, dtype=F)[:, None],
        refine=16,
    )
    x = torch.linspace(-2, 2, 81, dtype=F)[:, None]
    value = (found.value(0, x) - float(P.P[0]) / 2 * x[:, 0] ** 2).abs().max()
    policy = (found.policy(0, x) + float(P.K[0]) * x).abs().max()
    return float(value), float(policy), found


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Check the maximum principle on a network, and the closed forms of the scalar problem.

    Args:
        scale: ``"small"``: 200 images, 2000 draws; ``"full"``: 1000 and 20,000, a finer grid.
        progress: called with the share done and a few words.

    Returns:
        Rows on the residual, the value and the rate, two figures.

    Example:
        >>> from bolza.studies import get
        >>> get("e2018_mean_field").title
        'Training as control of a population'
    """
    budget, report = BUDGETS[scale], progress or (lambda share, text: None)
    report(0.0, "training a network to its optimum")
    descent = descend(budget)
    report(0.5, "the scalar problem")
    found, path = scatter(budget), along_the_optimum(budget.times)
    report(0.8, "the equation on a grid")
    coarse, fine = regulator((budget.grid + 1) // 2), regulator(budget.grid)
    report(1.0, "done")
    return StudyResult(
        KEY,
        TITLE,
        REFERENCE,
        CLAIM,
        scale,
        [*descent_rows(descent), *scalar_rows(found, path), *grid_rows(coarse, fine, budget)],
        (_descent_figure(descent), _value_figure(found, fine[2])),
        notes=(
            "The network has three layers of 16 neurons and a weight cost; without one its optimum is at infinity.",
            "Two-point and normal laws stand for the population of the scalar problem.",
        ),
        facts={
            "residuals": descent.residuals.tolist(),
            "deviation": {n: float(v.std()) for n, v in found.items()},
            "values": path,
        },
    )


def descent_rows(descent: Descent) -> list[Row]:
    """The residual is the gradient, and vanishes at the optimum."""
    fall = float(descent.residuals[-1].max() / descent.residuals[0].max())
    return [
        Row(
            "residual ‖E∂_θH‖ of each layer over its gradient by autograd, less 1: the largest",
            0.0,
            descent.identity,
            None,
            descent.identity < 1e-10,
            "float64, digits, before training",
        ),
        Row(
            "largest residual at the trained optimum over that at the start",
            0.0,
            fall,
            None,
            fall < 1e-4,
            f"{float(descent.residuals[0].max()):.3g} to {float(descent.residuals[-1].max()):.3g}; judged to 10⁻⁴",
        ),
    ]


def scalar_rows(found: dict[int, Tensor], path: list[tuple[float, float]]) -> list[Row]:
    """Control, value and scatter of the problem with a closed form."""
    z = exact_sample(100)
    exact = linear_mean_field(z, LAMBDA / 2)
    rows = [
        Row(
            "θ* at λ = ½, T = 1, mean 1.3",
            0.866667,
            float(exact.theta),
            None,
            abs(float(exact.theta) - 0.866667) < 1e-6,
        ),
        Row("v(0, μ)", 0.526667, float(exact.value), None, abs(float(exact.value) - 0.526667) < 1e-6),
        Row(
            "v(t, μ_t) along the optimum is the cost still to come: largest distance",
            0.0,
            max(abs(a - b) for a, b in path),
            None,
            max(abs(a - b) for a, b in path) < 1e-8,
            f"at {len(path)} times; the cost by the fixed point of the maximum principle",
        ),
    ]
    draws = len(next(iter(found.values())))
    for n, theta in found.items():
        want, got = DEVIATION / (n**0.5 * (LAMBDA + 1)), float(theta.std())
        error = got / (2 * (draws - 1)) ** 0.5
        rows.append(
            Row(
                f"deviation of θ from {n} samples",
                want,
                got,
                error,
                abs(got - want) < 3 * error,
                f"{draws} draws; three standard errors",
            )
        )
    return rows


def grid_rows(coarse: tuple[float, float, Any], fine: tuple[float, float, Any], budget: Budget) -> list[Row]:
    """Without the mean field: the Riccati solution."""
    return [
        Row(
            f"value of the scalar regulator on a grid of {budget.grid}: largest error against Riccati",
            0.0,
            fine[0],
            None,
            fine[0] < 0.01 and fine[0] < coarse[0] / 2.5,
            f"{coarse[0]:.2g} on half the grid: order 2 would be a quarter of it; feedback off by {fine[1]:.2g}",
        )
    ]


# ---------------------------------------------------------------------------------------- figures


def _descent_figure(descent: Descent) -> Figure:
    return Figure(
        "The maximum principle comes true as a network is trained",
        partial(_draw_descent, descent=descent),
        caption="Residual ‖E∂_θH‖ of each layer along training with a weight cost, by L-BFGS.",
        alt="Falling curves, one a layer, on a logarithmic axis.",
        size=(9.2, 3.2),
        key="descent",
    )


def _draw_descent(canvas: Any, descent: Descent) -> None:
    axes = canvas.subplots()
    for k, series in enumerate(descent.residuals.T):
        axes.plot(
            descent.looked,
            series.clamp_min(1e-14),
            "o-",
            color=role(("first", "second", "third")[k % 3]),
            label=f"layer {k + 1}",
            markersize=4,
        )
    log_axis(axes, "y")
    axes.set(xlabel="iteration", ylabel="$\\|E\\,\\partial_\\theta H\\|$")
    axes.legend()


def _value_figure(found: dict[int, Tensor], grid: GridValue) -> Figure:
    return Figure(
        "A control from few samples, and a value function",
        partial(_draw_values, found=found, grid=grid),
        caption="Left: θ from N samples of the scalar problem, against θ* (dashes). Right: value of the regulator on "
        "the grid at every time (lines) and from Riccati (dots).",
        alt="Histograms that narrow; parabolas with dots on them.",
        size=(9.2, 3.4),
        key="values",
    )


def _draw_values(canvas: Any, found: dict[int, Tensor], grid: GridValue) -> None:
    left, right = canvas.subplots(1, 2)
    for k, (n, theta) in enumerate(found.items()):
        left.hist(
            theta,
            bins=60,
            density=True,
            histtype="stepfilled",
            color=role("first"),
            alpha=0.2 + 0.15 * k,
            label=f"N = {n}",
        )
    left.axvline(MEAN / (LAMBDA + 1), linestyle="--", color=role("muted"), linewidth=1)
    left.set(xlabel="$\\theta$", ylabel="density", xlim=(0.5, 1.25))
    left.legend()
    one = torch.eye(1, dtype=F)
    P = riccati_recursion(one, one, one, one, one, 5).P.flatten()
    x = torch.linspace(-2, 2, 81, dtype=F)[:, None]
    for t in (0, 4, 5):
        shade = 0.4 + 0.12 * t
        right.plot(x[:, 0], grid.value(t, x), color=role("second"), alpha=shade, label=f"t = {t}")
        right.plot(x[::8, 0], P[t] / 2 * x[::8, 0] ** 2, ".", color=role("ink"), markersize=4)
    right.set(xlabel="$x$", ylabel="$V_t(x)$")
    right.legend()
