r"""A law of weights at every depth, found by particles that diffuse in the slope of a Hamiltonian.

    da = −E_data[∂_aH(x_t, a, p_{t+1})] ds + σ dW,   H = ⟨p, f(x, a)⟩ + (c/2)|a|²
    at rest   π_t(a) ∝ exp(−(2/σ²) E_data[H(x_t, a, p_{t+1})])

Three problems: a linear one, where the law is Gaussian with mean g/(c + T) and variance σ²/2c; one whose field is
sin 2a, where the law is far from Gaussian and known up to one number that the law itself sets; and handwritten digits,
where the particles are the neurons of a residual net of infinite width.

Reference: Hu, Kazeykina & Ren (2019), arXiv:1909.07278.

Departures: the paper proves; the experiments are ours. Time is discrete, and the bias of the step is accounted for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bolza.data import digits
from bolza.report import Figure, role
from bolza.solve import LangevinSolution, mean_field_langevin, neuron_field
from bolza.solve.langevin import HU as REFERENCE
from bolza.studies._study import Progress, Row, Scale, StudyResult, mean_error

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "hu2019_langevin"
TITLE = "Weights as particles that diffuse"
CLAIM = "With an entropy cost the optimal law of the weights at every depth is where coupled Langevin dynamics rest"
F = torch.float64
GOAL, CONFINING = 2.0, 0.5
SINE_NOISE = 2.0  # σ² for the field sin 2a: warm enough to pass from peak to peak within the run


@dataclass(frozen=True)
class Budget:
    """Size of the experiment."""

    particles: int = 300
    iterations: int = 1000
    ds: float = 0.04
    seeds: int = 3
    neurons: int = 32
    digit_iterations: int = 150


BUDGETS = {
    "small": Budget(),
    "full": Budget(particles=2000, iterations=10_000, ds=0.01, seeds=8, neurons=200, digit_iterations=1500),
}


def mean_particle(x: Tensor, a: Tensor) -> Tensor:
    """f(x, a) = a, averaged."""
    return a.mean(0).expand_as(x)


def mean_sine(x: Tensor, a: Tensor) -> Tensor:
    """f(x, a) = sin 2a, averaged."""
    return torch.sin(2 * a).mean(0).expand_as(x)


def half_square(x: Tensor, y: Tensor) -> Tensor:
    """φ = ½(x − y)²."""
    return (x - y).square().mean() / 2


def at_rest(field: Any, variance: float, budget: Budget, seed: int, finer: int = 1) -> LangevinSolution:
    """Particles of four depths after the run, from zero."""
    return mean_field_langevin(
        field,
        half_square,
        torch.zeros(1, 1, dtype=F),
        torch.full((1, 1), GOAL, dtype=F),
        torch.zeros(4, budget.particles, 1, dtype=F),
        noise=variance**0.5,
        weight=CONFINING,
        ds=budget.ds / finer,
        iterations=budget.iterations * (1 + (finer > 1)),
        generator=torch.Generator().manual_seed(seed),
    )


def sine_law(variance: float) -> tuple[Tensor, Tensor, float]:
    """Grid, density at rest for the field sin 2a, and its mean of sin 2a, by bisection on the state it leads to."""
    a = torch.linspace(-8, 8, 8001, dtype=F)

    def density(reached: float) -> Tensor:
        H = (reached - GOAL) * torch.sin(2 * a) + CONFINING / 2 * a.square()
        weight = torch.exp(-2 / variance * (H - H.min()))
        return weight / (weight.sum() * float(a[1] - a[0]))

    low, high = -1.0, 1.0  # the mean of sin 2a falls as the state it makes rises: one crossing
    for _ in range(60):
        middle = (low + high) / 2
        found = float((density(middle) * torch.sin(2 * a)).sum() * float(a[1] - a[0]))
        low, high = (middle, high) if found > middle else (low, middle)
    return a, density(low), low


def digit_net(budget: Budget, noise: float, seed: int) -> tuple[float, float]:
    """(Train loss, test accuracy) of a residual net of four steps whose neurons are particles."""
    data = digits()
    features = data.train_x.flatten(1).float(), data.test_x.flatten(1).float()
    draw = torch.Generator().manual_seed(seed)
    size = features[0].shape[1]
    start = 0.5 * torch.randn(4, budget.neurons, 2 * size + 1, generator=draw)
    start[..., :size] *= 2 / size**0.5

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(4 * x[:, :10], y)

    field = neuron_field()
    law = mean_field_langevin(
        field,
        loss,
        features[0],
        data.train_y,
        start,
        noise=noise,
        weight=1e-3,
        ds=0.5,
        iterations=budget.digit_iterations,
        batch_size=128,
        generator=draw,
    )
    ends = []
    for x in features:
        for a in law.particles:
            x = x + 0.25 * field(x, a)
        ends.append(x)
    right = (ends[1][:, :10].argmax(1) == data.test_y).float().mean()
    return float(loss(ends[0], data.train_y)), float(right)


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Bring particles to rest in three problems.

    Args:
        scale: ``"small"``: 300 particles a depth, 3 seeds; ``"full"``: 2000 and 8, 200 neurons a depth for digits.
        progress: called with the share done and a few words.

    Returns:
        Rows on means, variances and densities, two figures.

    Example:
        >>> from bolza.studies import get
        >>> get("hu2019_langevin").title
        'Weights as particles that diffuse'
    """
    budget, report = BUDGETS[scale], progress or (lambda share, text: None)
    report(0.0, "the linear problem")
    linear = {s2: [at_rest(mean_particle, s2, budget, k) for k in range(budget.seeds)] for s2 in (0.2, 0.1)}
    report(0.4, "the field sin 2a")
    sine = [at_rest(mean_sine, SINE_NOISE, budget, 100 + k, finer=4) for k in range(budget.seeds)]
    report(0.6, "digits")
    noisy = [digit_net(budget, noise, 0) for noise in (0.0, 0.02)]
    report(1.0, "done")
    law = sine_law(SINE_NOISE)
    return StudyResult(
        KEY,
        TITLE,
        REFERENCE,
        CLAIM,
        scale,
        [*linear_rows(linear, budget), *sine_rows(sine, law, budget), *digit_rows(noisy)],
        (_law_figure(linear, sine, law, budget), _course_figure(linear, sine)),
        notes=(
            "The expected variance is that of the discrete chain, σ²/(2c)/(1 − c ds/2).",
            f"The field sin 2a is shown at σ² = {SINE_NOISE:g}. At σ² = 0.5 particles that start at 0 fill "
            "the nearest peak only and stay there for the whole run: the law at rest is unique, but may be far off.",
            "Digits: four steps of h = 1/4, neurons v tanh(w·x + b), cross-entropy of the first ten coordinates, "
            "batches of 128; the confining cost and the noise are small and were not tuned.",
        ),
        facts={
            "means": {s2: [float(s.mean.mean()) for s in found] for s2, found in linear.items()},
            "variances": {s2: [float(s.variance.mean()) for s in found] for s2, found in linear.items()},
            "digits": noisy,
        },
    )


def linear_rows(linear: dict[float, list[LangevinSolution]], budget: Budget) -> list[Row]:
    """Mean and variance of the Gaussian law, at two temperatures."""
    rows = []
    for s2, found in linear.items():
        mean, error = mean_error([float(s.mean.mean()) for s in found])
        goal = GOAL / (CONFINING + 1)
        # what independent runs scatter by in theory: 4·M particles, a mean that is new after 1/(c + T)
        floor = (
            s2
            / (2 * (CONFINING + 1))
            / (4 * budget.particles)
            / (budget.iterations * budget.ds / 2 * (CONFINING + 1) / 2)
        ) ** 0.5 / len(found) ** 0.5
        error = max(error, floor)
        rows.append(
            Row(f"mean of the law, σ² = {s2:g}", goal, mean, error, abs(mean - goal) < 3 * error, "g/(c + T)")
        )
        variance, error = mean_error([float(s.variance.mean()) for s in found])
        exact = s2 / (2 * CONFINING) / (1 - CONFINING * budget.ds / 2)
        floor = exact * (4 / (4 * budget.particles * budget.iterations * budget.ds * CONFINING)) ** 0.5
        error = max(error, floor / len(found) ** 0.5)
        rows.append(
            Row(
                f"variance of the law, σ² = {s2:g}",
                exact,
                variance,
                error,
                abs(variance - exact) < 3 * error,
                f"σ²/(2c) = {s2 / (2 * CONFINING):.4f} without the bias of the step",
            )
        )
    return rows


def sine_rows(sine: list[LangevinSolution], law: tuple[Tensor, Tensor, float], budget: Budget) -> list[Row]:
    """A law that is not Gaussian, by its own fixed point."""
    a, density, reached = law
    width = float(a[1] - a[0])
    truth_mean = float((density * a).sum() * width)
    truth_variance = float((density * (a - truth_mean).square()).sum() * width)
    state = [float(torch.sin(2 * s.particles).mean()) for s in sine]
    slack = (4 * (GOAL - reached) + CONFINING) * budget.ds / 4 / 2  # H″ds/2 at its largest
    rows = []
    for name, truth, values in (
        ("state that the law leads to, field sin 2a", reached, state),
        ("mean of the law", truth_mean, [float(s.mean.mean()) for s in sine]),
        ("variance of the law", truth_variance, [float(s.variance.mean()) for s in sine]),
    ):
        mean, error = mean_error(values)
        rows.append(
            Row(
                name,
                truth,
                mean,
                error,
                abs(mean - truth) < 3 * error + slack * abs(truth),
                f"by quadrature and bisection; three standard errors and H″ds/2 = {100 * slack:.1f} % for the step",
            )
        )
    return rows


def digit_rows(noisy: list[tuple[float, float]]) -> list[Row]:
    """The ensemble learns."""
    (still, _), (loss, accuracy) = noisy
    return [
        Row(
            "digits, test accuracy of the diffusing neurons",
            "≥ 0.9",
            accuracy,
            (accuracy * (1 - accuracy) / 359) ** 0.5,
            accuracy >= 0.9,
            f"train loss {loss:.3f} with noise, {still:.3f} without; the threshold is ours",
        )
    ]


# ---------------------------------------------------------------------------------------- figures


def _law_figure(
    linear: dict[float, list[LangevinSolution]],
    sine: list[LangevinSolution],
    law: tuple[Tensor, Tensor, float],
    budget: Budget,
) -> Figure:
    return Figure(
        "Laws of weights at rest",
        partial(_draw_laws, linear=linear, sine=sine, law=law, budget=budget),
        caption="Particles of all depths and seeds at the end (areas), and the densities of theory (lines): a "
        "Gaussian for the linear field, several peaks for sin 2a.",
        alt="Two histograms under curves that fit them.",
        size=(9.2, 3.4),
        key="laws",
    )


def _draw_laws(
    canvas: Any, linear: Any, sine: Any, law: tuple[Tensor, Tensor, float], budget: Budget
) -> None:
    left, right = canvas.subplots(1, 2)
    for (s2, found), colour in zip(linear.items(), ("first", "second"), strict=True):
        values = torch.cat([s.particles.flatten() for s in found])
        left.hist(values, bins=80, density=True, color=role(colour), alpha=0.35)
        variance = s2 / (2 * CONFINING) / (1 - CONFINING * budget.ds / 2)
        a = torch.linspace(-0.6, 3.2, 300)
        goal = GOAL / (CONFINING + 1)
        density = torch.exp(-(a - goal).square() / (2 * variance)) / math.sqrt(2 * math.pi * variance)
        left.plot(a, density, color=role(colour), label=f"σ² = {s2:g}")
    left.set(xlabel="$a$", ylabel="density", title="$f = a$")
    left.legend()
    a, density, _ = law
    values = torch.cat([s.particles.flatten() for s in sine])
    right.hist(values, bins=120, density=True, color=role("third"), alpha=0.35)
    right.plot(a, density, color=role("third"))
    right.set(xlabel="$a$", xlim=(-5, 5), title="$f = \\sin 2a$")


def _course_figure(linear: dict[float, list[LangevinSolution]], sine: list[LangevinSolution]) -> Figure:
    return Figure(
        "On the way to rest",
        partial(_draw_courses, linear=linear, sine=sine),
        caption="Cost without the entropy along the run, first seed. With sin 2a it falls, then rises as "
        "particles cross to the others, which the entropy pays for.",
        alt="Curves that fall and level off; the third rises again.",
        size=(9.2, 2.8),
        key="course",
    )


def _draw_courses(canvas: Any, linear: Any, sine: Any) -> None:
    axes = canvas.subplots()
    for (s2, found), colour in zip(linear.items(), ("first", "second"), strict=True):
        axes.plot(found[0].values, color=role(colour), label=f"$f = a$, σ² = {s2:g}", linewidth=1)
    axes.plot(sine[0].values, color=role("third"), label=f"$f = \\sin 2a$, σ² = {SINE_NOISE:g}", linewidth=1)
    axes.set(xlabel="iteration", ylabel="cost", ylim=(0, None))
    axes.legend()
