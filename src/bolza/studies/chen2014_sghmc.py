r"""Momentum for samplers of noisy gradients: friction has to pay for the noise.

    m ← (1 − hγ) m − h ∇Ũ(θ) + √(2hγ − h²V̂) ξ,    θ ← θ + h m

Without friction the noise of the gradients heats the chain without end. First closed forms of its variance at a finite
step, in the two orders of the updates; then the double well U = θ⁴ − 2θ² with gradients of variance 4; then logistic
regression against SGLD at an equal number of gradients.

Reference: Chen, Fox & Guestrin (2014), arXiv:1402.4102.

Departures: θ moves by the new momentum, which costs nothing; other data for the regression; both samplers take the best
of their rates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bolza.bayes import BAOAB, SGHMC, SGLD, stationary_variance
from bolza.bayes.sghmc import REFERENCE, sghmc_step
from bolza.report import Figure, role
from bolza.studies._posterior import Moments, Reference, breast_cancer, chains_on, quadratic, reference
from bolza.studies._study import Progress, Row, Scale, StudyResult

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "chen2014_sghmc"
TITLE = "Stochastic gradient Hamiltonian Monte Carlo"
CLAIM = "With friction against the noise of the batches, momentum samples the posterior, and faster than SGLD"

PRECISION, NOISE = 3.0, 4.0
FAR = 3.5  # standard errors between a measurement and a closed form
SGLD_RATES = (0.1, 0.3, 1.0)  # h times the largest curvature
SGHMC_RATES = (0.1, 0.3, 0.8)  # h times its root
FRICTION = 0.1


@dataclass(frozen=True)
class Budget:
    """Size of the runs."""

    quadratic: int = 100_000
    well: int = 20_000
    reference: tuple[int, int] = (64, 200)
    chains: int = 32
    steps: int = 1000


BUDGETS = {
    "small": Budget(),
    "full": Budget(1_000_000, 200_000, (100, 1000), 200, 8000),
}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Compare chains with closed forms and quadrature, and race SGLD.

    Args:
        scale: ``"small"``: some ten seconds on one core; ``"full"``: more and longer chains.
        progress: called with the share done and a few words.

    Returns:
        The rows, a figure, and the numbers.

    Example:
        >>> from bolza.studies import get
        >>> get("chen2014_sghmc").reference.arxiv
        '1402.4102'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    report(0.0, "variances at finite steps")
    rows, points = quadratic_rows(budget.quadratic)
    rows += energy_rows(budget.quadratic)
    rows.append(cold_row())
    report(0.2, "double well")
    wells = {name: well(name, budget.well) for name in ("friction", "no friction", "friction, not corrected")}
    rows += well_rows(wells)
    report(0.3, "reference of the regression")
    known = reference(*budget.reference)
    found = {}
    for i, batch in enumerate((None, 43)):
        report(0.5 + 0.25 * i, f"regression, batch {batch or 'of all'}")
        found[batch] = race(known, batch, budget)
        rows += race_rows(batch, found[batch])
    notes = (
        f"Closed forms: {budget.quadratic} chains on a quadratic of precision {PRECISION:g}, friction γ = 1; "
        f"agreement is to {FAR} standard errors.",
        f"Double well: {budget.well} chains from 0, h = 0.1, γ = 3, gradients of variance {NOISE:g}, 500 steps.",
        f"Regression: {len(breast_cancer().x)} samples, 31 weights, prior N(0, 1); {budget.steps} gradients a "
        f"chain after half as many that are left out, from draws of the prior, {budget.chains} chains; the error is "
        "that of the mean of one chain, in standard deviations, root mean square over directions and chains. Noise of "
        "batches is corrected as it is estimated along the run, for both.",
        f"Rates of the regression: hλ of {SGLD_RATES} for SGLD, h√λ of {SGHMC_RATES} for SGHMC with hγ = {FRICTION}, λ "
        f"the largest curvature; each takes its best. R̂ of the reference is at most {known.rhat:.3f}.",
    )
    facts = {
        f"batch {batch or 'of all'}": {
            name: {f"{rate:g}": m.single.tolist() for rate, m in each.items()} for name, each in by.items()
        }
        for batch, by in found.items()
    }
    report(1.0, "done")
    return StudyResult(
        KEY, TITLE, REFERENCE, CLAIM, scale, rows, (_figure(points, wells, found),), notes, facts
    )


# ----------------------------------------------------------------------------------- closed forms


def explicit_variance(h: float, chains: int) -> tuple[float, float]:
    """Variance of chains that move θ by the old momentum."""
    draw = torch.Generator().manual_seed(0)
    theta = torch.randn(chains, generator=draw) / math.sqrt(PRECISION)
    m = torch.randn(chains, generator=draw)
    for _ in range(math.ceil(12 / h)):
        noise = torch.randn(chains, generator=draw)
        theta, m = sghmc_step(theta, m, PRECISION * theta, h, noise, 1.0, explicit=True)
    value = float(theta.double().var())
    return value, value * math.sqrt(2 / (chains - 1))


def quadratic_rows(chains: int) -> tuple[list[Row], dict[str, list[tuple[float, float]]]]:
    """Variances of the two orders of the updates and of exact parts, against the discrete Lyapunov equation."""
    rows: list[Row] = []
    points: dict[str, list[tuple[float, float]]] = {}
    for method in ("sghmc-explicit", "sghmc", "baoab"):
        for h in (0.05, 0.1, 0.2):
            if method == "sghmc-explicit":
                value, error = explicit_variance(h, chains)
            else:
                build = partial(
                    SGHMC if method == "sghmc" else BAOAB,
                    lr=h * h,
                    num_data=1,
                    prior_precision=0.0,
                    friction=h if method == "sghmc" else -math.expm1(-h),
                    seed=1,
                )
                value, error = quadratic(build, PRECISION, chains=chains, steps=math.ceil(6 / h))
            exact = stationary_variance(method, PRECISION, h=h)
            name = {"sghmc-explicit": "old momentum", "sghmc": "new momentum", "baoab": "BAOAB"}[method]
            near = abs(value - exact) < FAR * error
            rows.append(
                Row(f"h = {h:g}, {name}: variance at rest", exact, value, error, near, "posterior: 0.3333")
            )
            points.setdefault(method, []).append((h, value))
    return rows, points


def energy_rows(chains: int, h: float = 0.02, time: float = 5.0) -> list[Row]:
    """Energy on θ²/2 with noisy gradients, without friction and with it."""
    rows = []
    for friction, expected in ((0.0, 1 + h * NOISE * time / 2), (1.0, 1.0)):
        draw = torch.Generator().manual_seed(0)
        theta, m = torch.randn(2, chains, generator=draw)
        for _ in range(round(time / h)):
            heat = max(2 * h * friction - h * h * NOISE, 0.0) + h * h * NOISE
            m = (1 - h * friction) * m - h * theta + math.sqrt(heat) * torch.randn(chains, generator=draw)
            theta = theta + h * m
        energy = (theta.double().square() + m.double().square()) / 2
        value, error = float(energy.mean()), float(energy.std()) / math.sqrt(chains)
        what = "1 + hVt/2, without friction" if not friction else "with friction and the noise taken off"
        rows.append(
            Row(
                f"energy at t = {time:g}, V = 4, h = {h:g}: {what}",
                expected,
                value,
                error,
                abs(value - expected) < 3 * error + 0.02,
                "to three errors and the bias of the step, 0.02",
            )
        )
    return rows


def cold_row() -> Row:
    """Temperature 0 against SGD with momentum, step by step."""
    draw, size = torch.Generator().manual_seed(0), 100
    start = torch.randn(5, generator=draw, dtype=torch.float64)
    curvature = torch.linspace(0.1, 2, 5, dtype=torch.float64)
    one, two = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    ours = SGHMC([one], lr=0.1, num_data=size, prior_precision=3.0, temperature=0.0, friction=0.1, seed=0)
    sgd = torch.optim.SGD([two], lr=0.1, momentum=0.9, weight_decay=3.0 / size)
    for _ in range(50):
        for w, optimizer in ((one, ours), (two, sgd)):
            w.grad = curvature * w.detach()
            optimizer.step()
    error = float((one - two).detach().abs().max())
    return Row(
        "temperature 0 against SGD with momentum 0.9: largest difference", 0.0, error, 1e-12, error < 1e-12
    )


# ------------------------------------------------------------------------------------ double well


def well(kind: str, chains: int, steps: int = 500, h: float = 0.1) -> Tensor:
    """Samples of exp(2θ² − θ⁴), one a chain, from gradients of variance 4."""
    draw = torch.Generator().manual_seed(0)
    theta, m = torch.zeros(chains), torch.randn(chains, generator=draw)
    friction = 0.0 if kind == "no friction" else 3.0
    injected = 2 * h * friction - (h * h * NOISE if kind == "friction" else 0.0)
    scale = math.sqrt(injected + h * h * NOISE)  # the two noises are independent
    for _ in range(steps):
        slope = 4 * theta**3 - 4 * theta
        m = (1 - h * friction) * m - h * slope + scale * torch.randn(chains, generator=draw)
        theta = (theta + h * m).clamp(-4, 4)  # beyond, an explicit step of a quartic may leave the numbers
    return theta


def well_density(theta: Tensor, temperature: float = 1.0) -> Tensor:
    """The density, by quadrature."""
    fine = torch.linspace(-4, 4, 4001, dtype=torch.float64)
    total = torch.trapezoid(((2 * fine**2 - fine**4) / temperature).exp(), fine)
    return ((2 * theta.double() ** 2 - theta.double() ** 4) / temperature).exp() / total


def well_rows(wells: dict[str, Tensor]) -> list[Row]:
    """E θ² against quadrature."""
    fine = torch.linspace(-4, 4, 4001, dtype=torch.float64)

    def expected(temperature: float) -> float:
        return float(torch.trapezoid(fine**2 * well_density(fine, temperature), fine))

    rows = []
    for name, theta in wells.items():
        exact = expected(1 + 0.1 * NOISE / 6 if name == "friction, not corrected" else 1.0)
        square = theta.double().square()
        value, error = float(square.mean()), float(square.std()) / math.sqrt(len(theta))
        if name == "no friction":
            holds, note = value > 1.5 * exact, "wider by half or more"
        else:
            holds, note = (
                abs(value / exact - 1) < 0.05 + 3 * error / exact,
                "within 5 %, the bias of the step",
            )
        if name == "friction, not corrected":
            note += "; expected at the temperature 1 + hV/(2γ), which this mean hardly feels"
        rows.append(Row(f"double well, {name}: mean of θ²", exact, value, error, holds, note))
    return rows


# ------------------------------------------------------------------------------------- regression


def race(known: Reference, batch: int | None, budget: Budget) -> dict[str, dict[float, Moments]]:
    """Both samplers at each of their rates."""
    size, softest = len(breast_cancer().x), float(known.variance[0])
    noise = None if batch is None else "running"
    found: dict[str, dict[float, Moments]] = {"SGLD": {}, "SGHMC": {}}
    for name, rates in (("SGLD", SGLD_RATES), ("SGHMC", SGHMC_RATES)):
        for rate in rates:
            if name == "SGLD":
                build: Any = partial(SGLD, lr=rate * softest * size)
            else:
                build = partial(SGHMC, lr=rate**2 * softest * size, friction=FRICTION)
            build = partial(build, num_data=size, noise_estimate=noise, seed=2)
            found[name][rate] = chains_on(
                build, known, chains=budget.chains, steps=budget.steps, batch=batch, warmup=budget.steps // 2
            )
    return found


def best_rate(found: dict[float, Moments]) -> float:
    """The rate with the smallest error at the end."""
    errors = {rate: float(m.single[-1]) for rate, m in found.items() if math.isfinite(float(m.single[-1]))}
    return min(errors, key=lambda rate: errors[rate])


def race_rows(batch: int | None, found: dict[str, dict[float, Moments]]) -> list[Row]:
    """Errors of one chain at an equal number of gradients, each sampler at its best rate."""
    rates = {name: best_rate(each) for name, each in found.items()}
    errors = {name: float(each[rates[name]].single[-1]) for name, each in found.items()}
    where = "gradients of all data" if batch is None else f"batches of {batch}"
    ratio = errors["SGHMC"] / errors["SGLD"]
    return [
        Row(
            f"regression, {where}: error of one chain, SGHMC over SGLD",
            "< 1",
            ratio,
            None,
            ratio < 0.95 if abs(ratio - 1) > 0.05 else None,
            f"{errors['SGHMC']:.3f} at h√λ = {rates['SGHMC']:g}, {errors['SGLD']:.3f} at hλ = {rates['SGLD']:g}; "
            "open within 5 %",
        )
    ]


# ----------------------------------------------------------------------------------------- figure


def _figure(
    points: dict[str, list[tuple[float, float]]],
    wells: dict[str, Tensor],
    found: dict[int | None, dict[str, dict[float, Moments]]],
) -> Figure:
    return Figure(
        "Friction pays for noise",
        partial(_draw, points=points, wells=wells, found=found),
        caption=(
            "Left: the double well with noisy gradients, with friction and without; the law itself as a line. "
            "Middle: variance at rest on a quadratic, closed forms as lines, measurements as points. Right: error of "
            "the mean of one chain on logistic regression against gradients, each sampler at its best rate; dashed: "
            "batches of 43."
        ),
        alt="Histograms of a double well; variance against the step; falling errors.",
        size=(10.2, 3.3),
        key="sghmc",
    )


def _draw(
    canvas: Any,
    points: dict[str, list[tuple[float, float]]],
    wells: dict[str, Tensor],
    found: dict[int | None, dict[str, dict[float, Moments]]],
) -> None:
    left, middle, right = canvas.subplots(1, 3)
    edges = torch.linspace(-3, 3, 61).numpy()
    for name, colour in (("no friction", "second"), ("friction", "first")):
        left.hist(wells[name].numpy(), edges, density=True, color=role(colour), alpha=0.5, label=name)
    at = torch.linspace(-3, 3, 300)
    left.plot(at, well_density(at), color=role("ink"), label="exp(2θ² − θ⁴)")
    left.set(xlabel="θ", ylabel="density", ylim=(0, 0.95))
    left.legend(loc="upper center", ncols=1)
    steps = torch.linspace(0.005, 0.24, 50).tolist()
    names = {"sghmc-explicit": "old momentum", "sghmc": "new momentum", "baoab": "BAOAB"}
    for (method, name), colour in zip(names.items(), ("second", "first", "third"), strict=True):
        curve = [stationary_variance(method, PRECISION, h=h) for h in steps]  # type: ignore[arg-type]
        middle.plot(steps, curve, color=role(colour), label=name)
        middle.plot(*zip(*points[method], strict=True), "o", color=role(colour), markersize=5)
    middle.set(xlabel="h", ylabel="variance", ylim=(0.28, 1.0))
    middle.legend(loc="upper left")
    for batch, style in ((None, "-"), (43, "--")):
        for name, colour in (("SGLD", "second"), ("SGHMC", "first")):
            m = found[batch][name][best_rate(found[batch][name])]
            label = name if batch is None else None
            right.plot(m.marks, m.single, style, marker="o", markersize=4, color=role(colour), label=label)
    right.set(xlabel="gradients", ylabel="error of the mean of one chain", xscale="log", yscale="log")
    right.legend(loc="lower left")
