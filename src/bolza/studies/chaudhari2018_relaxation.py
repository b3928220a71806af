r"""Smoothing a loss by a Hamilton–Jacobi equation: what it is, what it prefers, and what it gains.

    u_t = −½ |∇u|² + ½ T Δu,   u(·, 0) = f,        −∇u is the feedback of least cost E[f(x_t) + ½ ∫ |α|²]

The paper reads Entropy-SGD as descent of u, shows that u is smoother than f with wider minima, and compares on
networks: the viscous equation (Entropy-SGD), the one without viscosity (T = 0, the proximal step), and the heat
equation (gradients averaged over Gaussian perturbations). Formulas are tested to rounding; the control problem and
the separation of time scales by simulation; the methods at equal numbers of gradients under label noise.

Reference: Chaudhari, Oberman, Osher, Soatto & Carlier (2018), arXiv:1704.04932.

Departures. Digits and a dense network for CIFAR-10. The width that smoothing prefers is measured on a loss in one
dimension with a deep narrow and a shallow wide valley, where every minimum is known.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bolza.optim import EntropySGD
from bolza.report import Figure, role
from bolza.sde import local_entropy
from bolza.sde.local_entropy import CHAUDHARI
from bolza.studies import chaudhari2017_entropy as entropy
from bolza.studies._study import Progress, Row, Scale, StudyResult, mean_error

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "chaudhari2018_relaxation"
TITLE = "Deep relaxation: losses smoothed by partial differential equations"
CLAIM = "Descent of a loss smoothed by a viscous Hamilton–Jacobi equation finds wider minima that generalise better"
REFERENCE = CHAUDHARI

F64 = torch.float64
CHAIN, SCOPE, SPREAD = (
    20,
    1.0,
    0.03,
)  # inner steps, γ, and the standard deviation of the perturbations of the heat equation


@dataclass(frozen=True)
class Budget:
    """Size of the simulations."""

    paths: int
    control_steps: int
    seeds: int
    gradients: int
    scales: tuple[float, ...]
    noises: tuple[float, ...]


BUDGETS = {
    "small": Budget(
        paths=4000, control_steps=50, seeds=3, gradients=700, scales=(0.4, 0.2, 0.1), noises=(1e-4,)
    ),
    "full": Budget(
        paths=40000,
        control_steps=400,
        seeds=16,
        gradients=2100,
        scales=(0.4, 0.2, 0.1, 0.05),
        noises=(1e-4, 1e-2),
    ),
}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Test the formulas, the control problem, the preference for width, and the methods on a network.

    Args:
        scale: ``"small"``: some ten seconds on one core; ``"full"``: more paths, seeds and gradients.
        progress: called with the share done and a few words.

    Returns:
        The rows, a figure, and the numbers.

    Example:
        >>> from bolza.studies import get
        >>> get("chaudhari2018_relaxation").reference.arxiv
        '1704.04932'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    report(0.0, "formulas")
    rows = [*formula_rows(), *control_rows(budget), *valley_rows()]
    report(0.2, "two time scales")
    averaged = two_scales(budget)
    rows.append(averaging_row(averaged))
    report(0.3, f"{budget.seeds} networks by several methods")
    courses = race(budget)
    rows += race_rows(courses)
    report(1.0, "done")
    notes = (
        "The network and the labels are those of the study chaudhari2017_entropy: 64-256-10, 30 % of the training "
        f"labels random, batches of 64, {budget.gradients} gradients for each method, {budget.seeds} seeds; chains of "
        f"{CHAIN} steps with γ = {SCOPE:g}, perturbations of standard deviation {SPREAD:g}, Nesterov momentum 0.9 in "
        "all but the heat equation, which moves by a mean of 20 gradients at the rate η/(1 − 0.9) of the others.",
        "SGD stopped early is the better baseline under label noise; the study chaudhari2017_entropy has it.",
    )
    facts = {
        "averaging": {str(k): v for k, v in averaged.items()},
        "accuracy": {name: course.accuracy[-1][0].tolist() for name, course in courses.items()},
    }
    return StudyResult(KEY, TITLE, REFERENCE, CLAIM, scale, rows, (_figure(courses),), notes, facts)


# ----------------------------------------------------------------------------------------- formulas


def double_well(y: Tensor) -> Tensor:
    """Two equal valleys at ±1."""
    return (y**4 / 4 - y**2 / 2).sum(-1)


def formula_rows() -> list[Row]:
    """The closed form of the parabola, and the equation itself on a double well."""
    x = torch.tensor([[0.7]], dtype=F64)
    value = float(local_entropy(lambda y: y.square().sum(-1), x, t=0.4, temperature=1 / 3).value)
    slope = float(local_entropy(lambda y: y.square().sum(-1), x, t=2.0, temperature=0.1).gradient / x)
    x, t, T, h = torch.linspace(-1.8, 1.8, 37, dtype=F64)[:, None], 0.4, 0.2, 1e-3

    def u(x: Tensor, t: float) -> Tensor:
        return local_entropy(double_well, x, t=t, temperature=T).value

    def slope_of(four: list[Tensor]) -> Tensor:
        return (four[0] - 8 * four[1] + 8 * four[2] - four[3]) / (12 * h)

    steps = [k * h for k in (-2, -1, 1, 2)]
    near = [u(x + s, t) for s in steps]
    laplacian = (-near[0] + 16 * near[1] - 30 * u(x, t) + 16 * near[2] - near[3]) / (12 * h**2)
    residual = slope_of([u(x, t + s) for s in steps]) + slope_of(near) ** 2 / 2 - T / 2 * laplacian
    worst = float(residual.abs().max())
    return [
        Row(
            "parabola: u by the formula of Cole and Hopf",
            0.3701867,
            value,
            None,
            abs(value - 0.3701867) < 5e-8,
        ),
        Row(
            "parabola: coefficient aγ/(a + γ) of the smoothed gradient",
            0.4,
            slope,
            None,
            abs(slope - 0.4) < 1e-9,
        ),
        Row(
            "double well: residual of the Hamilton–Jacobi equation",
            0.0,
            worst,
            None,
            worst < 1e-6,
            "largest over [−1.8, 1.8], by differences of the value; within 1e−6",
        ),
    ]


# ---------------------------------------------------------------------------------- stochastic control


def control_rows(budget: Budget) -> list[Row]:
    """Cost of the feedback −∇u by simulation, and of no control at all."""
    import numpy as np

    t, T, x0, steps = 1.0, 0.3, 0.2, budget.control_steps
    optimum = float(local_entropy(rugged, torch.tensor([[x0]], dtype=F64), t=t, temperature=T).value)
    axis = torch.linspace(-4, 4, 161, dtype=F64)[:, None]
    g = torch.Generator().manual_seed(0)
    x = torch.full((budget.paths,), x0, dtype=F64)
    cost, dt = torch.zeros_like(x), t / steps
    for k in range(steps):
        slope = local_entropy(rugged, axis, t=t - (k + 0.5) * dt, temperature=T, nodes=101).gradient[:, 0]
        alpha = -torch.as_tensor(np.interp(x.numpy(), axis[:, 0].numpy(), slope.numpy()))
        cost += alpha.square() * dt / 2
        x = x + alpha * dt + math.sqrt(T * dt) * torch.randn(len(x), generator=g, dtype=F64)
    value, error = mean_error((cost + rugged(x[:, None])).tolist())
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    spread = x0 + math.sqrt(T * t) * torch.tensor(nodes)
    free = float((rugged(spread[:, None]) * torch.tensor(weights)).sum() / weights.sum())
    return [
        Row(
            "the feedback −∇u costs u(x, t)",
            optimum,
            value,
            error,
            abs(value - optimum) < 3 * error + 0.5 * dt,
            f"{budget.paths} paths; within three errors and {0.5 * dt:.2g} for {steps} Euler steps",
        ),
        Row(
            "no control costs more",
            f"above {optimum:.4f}",
            free,
            None,
            free > optimum,
            "E f(x + √(Tt) ξ), which is the heat equation",
        ),
    ]


def rugged(y: Tensor) -> Tensor:
    """A bowl with ripples."""
    return (y**2 / 4 + 0.4 * (6 * y).cos()).sum(-1)


# --------------------------------------------------------------------------------------------- width


def valleys(y: Tensor) -> Tensor:
    """A narrow valley of depth 1.2 at −1.5 and a wide one of depth 1 at 1.5, in a shallow bowl."""
    z = y[..., 0]
    narrow = 1.2 * (-(((z + 1.5) / 0.12) ** 2) / 2).exp()
    return 0.02 * z**2 - narrow - (-(((z - 1.5) / 0.6) ** 2) / 2).exp()


def valley_rows() -> list[Row]:
    """How many minima are left after smoothing, and which valley is the lowest."""
    x = torch.linspace(-3, 3, 601, dtype=F64)[:, None]
    counts = []
    for t in (0.0, 0.03, 0.1, 0.3, 1.0):
        u = rugged(x) if t == 0 else local_entropy(rugged, x, t=t, temperature=0.2, nodes=201).value
        inside = u[1:-1]
        counts.append(int(((inside < u[:-2]) & (inside < u[2:])).sum()))
    lowest = {
        T: float(x[local_entropy(valleys, x, t=0.5, temperature=T).value.argmin()]) for T in (0.0, 1e-4, 0.2)
    }
    return [
        Row(
            "smoothing removes shallow minima: their number at t = 0, 0.03, 0.1, 0.3, 1",
            "falls",
            ", ".join(map(str, counts)),
            None,
            all(b <= a for a, b in itertools.pairwise(counts)) and counts[-1] < counts[0],
            "a bowl with ripples, T = 0.2",
        ),
        Row(
            "with viscosity the smoothed loss is lowest in the wide valley, not in the deeper narrow one",
            1.5,
            lowest[0.2],
            None,
            abs(lowest[0.2] - 1.5) < 0.2,
            "place of the minimum of u at t = 0.5, T = 0.2",
        ),
        Row(
            "the same without viscosity",
            1.5,
            lowest[0.0],
            None,
            abs(lowest[0.0] - 1.5) < 0.2,
            f"T = 0 keeps the deepest valley, however narrow; so does T = 1e−4: {lowest[1e-4]:.2f}",
        ),
    ]


# ----------------------------------------------------------------------------------- two time scales


def two_scales(budget: Budget) -> dict[float, tuple[float, float]]:
    """Mean distance at time 1 between dx = −γ(x − y)ds with a fast chain y, and dX = −∇u(X) ds; with its error."""
    import numpy as np

    gamma, T, start, end = 2.0, 0.2, 1.6, 1.0
    axis = torch.linspace(-2.5, 2.5, 401, dtype=F64)[:, None]
    slope = local_entropy(double_well, axis, t=1 / gamma, temperature=T).gradient[:, 0].numpy()
    limit, fine = start, 2000
    for _ in range(fine):
        middle = limit - 0.5 * end / fine * np.interp(limit, axis[:, 0].numpy(), slope)
        limit -= end / fine * np.interp(middle, axis[:, 0].numpy(), slope)
    found = {}
    for scale in budget.scales:
        g = torch.Generator().manual_seed(0)
        x = torch.full((budget.paths,), start, dtype=F64)
        y = x.clone()
        steps = math.ceil(end / (0.04 * scale))
        dt = end / steps

        def drift(x: Tensor, y: Tensor, scale: float = scale) -> tuple[Tensor, Tensor]:
            return -gamma * (x - y), -(y**3 - y + gamma * (y - x)) / scale

        for _ in range(steps):  # Heun's scheme, of weak order 2: Euler's error would not vanish with ε
            noise = math.sqrt(2 * T * dt / scale) * torch.randn(len(x), generator=g, dtype=F64)
            a, b = drift(x, y)
            c, d = drift(x + dt * a, y + dt * b + noise)
            x, y = x + dt / 2 * (a + c), y + dt / 2 * (b + d) + noise
        gap = x - limit
        found[scale] = (float(gap.mean()), float(gap.std()) / math.sqrt(len(x)))
    return found


def averaging_row(found: dict[float, tuple[float, float]]) -> Row:
    """Whether the distance vanishes with the ratio of the time scales."""
    first, last = min(found), max(found)
    (small, small_error), (large, large_error) = found[first], found[last]
    order = math.log(abs(large / small)) / math.log(last / first)
    error = math.hypot(small_error / small, large_error / large) / math.log(last / first)
    return Row(
        "a chain that is 1/ε times as fast gives descent of u: order in ε of the mean distance",
        1.0,
        order,
        error,
        abs(order - 1) < max(3 * error, 0.25) and abs(small) < abs(large),
        "within a quarter; " + ", ".join(f"ε = {k:g}: {v:.4f} ± {e:.4f}" for k, (v, e) in found.items()),
    )


# ----------------------------------------------------------------------------------------- networks


class HeatDescent(torch.optim.Optimizer):
    """Descent of the loss smoothed by the heat equation: gradients at w + σξ, averaged over a few draws."""

    def __init__(self, params: Any, lr: float, spread: float, draws: int) -> None:
        super().__init__(params, {"lr": lr, "spread": spread, "draws": draws})
        self.generator = torch.Generator().manual_seed(0)
        self.count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take in one gradient; move after the last of the draws, and perturb anew."""
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["center"], state["sum"] = p.clone(), torch.zeros_like(p)
                state["sum"] += p.grad
                if self.count % group["draws"] == 0:
                    state["center"].sub_(state["sum"], alpha=group["lr"])
                    state["sum"].zero_()
                noise = torch.randn(p.shape, generator=self.generator, dtype=p.dtype)
                p.copy_(state["center"]).add_(noise, alpha=group["spread"])


def race(budget: Budget) -> dict[str, entropy.Course]:
    """Networks trained by each method on the same batches of noisy labels."""
    sizes = entropy.Budget(seeds=budget.seeds, gradients=budget.gradients)
    chain = partial(EntropySGD, lr=entropy.RATE, inner_steps=CHAIN, gamma=SCOPE)
    methods: dict[str, Any] = {
        "SGD with momentum": partial(torch.optim.SGD, lr=entropy.RATE, momentum=0.9, nesterov=True),
        **{f"Entropy-SGD, ε = {noise:g}": partial(chain, noise=noise) for noise in budget.noises},
        "Hamilton–Jacobi, ε = 0": partial(chain, noise=0.0),
        # 20 gradients · RATE/2 is the rate RATE/(1 − 0.9) of the others
        "heat equation": partial(HeatDescent, lr=entropy.RATE / 2, spread=SPREAD, draws=CHAIN),
    }
    problem = entropy.problem(sizes)
    return {name: entropy.train(make, problem, sizes, clean=False) for name, make in methods.items()}


def race_rows(courses: dict[str, entropy.Course]) -> list[Row]:
    """Test accuracy against SGD with momentum, and of viscosity against none; paired over seeds."""
    last = {name: course.accuracy[-1][0] for name, course in courses.items()}

    def row(claim: str, one: str, other: str) -> Row:
        value, error = mean_error(last[one] - last[other])
        words = f"{one}: {float(last[one].mean()):.3f} against {float(last[other].mean()):.3f}"
        sure = abs(value) >= 2 * error
        return Row(claim, "above 0", value, error, value > 0 if sure else None, words)

    sgd = "SGD with momentum"
    viscous = [name for name in last if name.startswith("Entropy")]
    return [
        *(row(f"noisy labels: gain in test accuracy of {name}", name, sgd) for name in viscous),
        row("noisy labels: the same of the equation without viscosity", "Hamilton–Jacobi, ε = 0", sgd),
        row("noisy labels: the same of the heat equation", "heat equation", sgd),
        Row(
            "noisy labels: test accuracy with the usual ε = 0.0001 less that without viscosity",
            0.0,
            *mean_error(last[viscous[0]] - last["Hamilton–Jacobi, ε = 0"]),
            abs(float((last[viscous[0]] - last["Hamilton–Jacobi, ε = 0"]).mean())) < 0.01,
            "within 0.01: the chain has the temperature ε² = 10⁻⁸, so that the method is the one without viscosity",
        ),
    ]


# -------------------------------------------------------------------------------------------- figure


def _figure(courses: dict[str, entropy.Course]) -> Figure:
    return Figure(
        "Smoothed losses",
        partial(_draw, courses=courses),
        caption="Left: a loss with a deep narrow and a wide valley, smoothed with viscosity (solid, T = 0.2) and "
        "without (dashed) for t = 0.1 and 0.5. Right: test accuracy over gradients spent with 30 % random labels, mean "
        "of the seeds with one standard error.",
        alt="The viscous solution is lowest in the wide valley, the other in the narrow one; accuracy of the methods.",
        size=(10.0, 3.9),
        key="relaxation",
    )


def _draw(canvas: Any, courses: dict[str, entropy.Course]) -> None:
    left, right = canvas.subplots(1, 2)
    x = torch.linspace(-3, 3.4, 257, dtype=F64)[:, None]
    left.plot(x[:, 0], valleys(x), color=role("muted"), label="loss")
    for t, colour in ((0.1, "first"), (0.5, "second")):
        for T, dash in ((0.2, "-"), (0.0, "--")):
            u = local_entropy(valleys, x, t=t, temperature=T, nodes=201).value
            low = int(u.argmin())
            left.plot(x[:, 0], u, dash, color=role(colour), label=f"t = {t:g}" if T else None)
            left.plot(x[low, 0], u[low], "o", color=role(colour), markersize=5)
    left.set(xlabel="x", ylabel="u(x, t)")
    left.legend()
    colours = ("muted", "second", "first", "third", "fourth")
    for (name, course), colour in zip(courses.items(), colours, strict=False):
        accuracy = torch.stack([a[0] for a in course.accuracy])
        mean, error = accuracy.mean(1), accuracy.std(1) / accuracy.shape[1] ** 0.5
        dash = "--" if name.endswith("= 0") else "-"
        right.plot(course.gradients, mean, dash, color=role(colour), label=name)
        right.fill_between(
            course.gradients, mean - error, mean + error, color=role(colour), alpha=0.15, linewidth=0
        )
    right.set(xlabel="gradients", ylabel="test accuracy", ylim=(0.6, 1.0))
    right.legend(fontsize=8.5)
