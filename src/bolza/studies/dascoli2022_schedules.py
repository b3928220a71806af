r"""Which power of time should a learning rate decay with?

    η_k = η₀ (k + 1)^{−β},     loss ∝ t^{−min(β, a(1−β))},     a = 1 for the spherical two-spin model:  β = 1/2

Langevin descent of the two-spin model in the eigenbasis of its couplings, seven decays side by side; the closed form of
its energy; a convex basin, where β = 1 is best unless the rate is too small for it; and a student that has to find its
teacher, with the rate kept until the loss falls, against decays that start at once.

Reference: d'Ascoli, Refinetti & Biroli (2022), arXiv:2202.04509.

Departures: quantiles of the semicircle in place of a drawn matrix; the exponents of p ≥ 3 spins only as predictions; a
small student with online samples, and the time of crossing seen in its loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bolza.controllers.schedules import ASCOLI as REFERENCE
from bolza.controllers.schedules import (
    SignalDecay,
    best_exponent,
    predicted_exponent,
    quadratic_mean_square,
    two_spin_energy,
    two_spin_run,
)
from bolza.report import Figure, log_axis, role
from bolza.studies._study import Progress, Row, Scale, StudyResult, mean_error

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "dascoli2022_schedules"
TITLE = "How fast a learning rate should decay"
CLAIM = "In rough landscapes the rate is best decayed slower than 1/t, as t^(-1/2) for two spins"

BETAS = (0.0, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0)


@dataclass(frozen=True)
class Budget:
    """Size of the runs."""

    spins: int
    steps: int
    convex_steps: int
    student_steps: int
    seeds: int
    temperatures: tuple[float, ...]


BUDGETS = {
    "small": Budget(8000, 20_000, 100_000, 3000, 6, (1.0,)),
    "full": Budget(8000, 20_000, 100_000, 12_000, 16, (1.0, 3.0)),
}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Run the two-spin model, the convex basin and the student.

    Args:
        scale: ``"small"``: some ten seconds on one core; ``"full"``: a second temperature, a longer student.
        progress: called with the share done and a few words.

    Returns:
        The rows, a figure, and the numbers.

    Example:
        >>> from bolza.studies import get
        >>> get("dascoli2022_schedules").reference.year
        2022
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    rows = energy_rows()
    curves = {}
    for i, temperature in enumerate(budget.temperatures):
        report(0.5 * i / len(budget.temperatures), f"two spins at temperature {temperature:g}")
        generator = torch.Generator().manual_seed(0)
        curves[temperature] = two_spin_run(
            torch.tensor(BETAS),
            budget.steps,
            temperature=temperature,
            spins=budget.spins,
            generator=generator,
        )
        rows += two_spin_rows(*curves[temperature], temperature, budget.steps)
    report(0.5, "a convex basin")
    rows += convex_rows(budget.convex_steps)
    report(0.6, "a student")
    students = student_losses(budget.student_steps, budget.seeds)
    rows += student_rows(students)
    facts = {
        "energies": {f"T={t:g}": e[-1].tolist() for t, (_, e) in curves.items()},
        "betas": list(BETAS),
        "student": {name: path[-1].tolist() for name, path in students.items()},
    }
    notes = (
        f"Two spins: N = {budget.spins}, η₀ = 0.5, {budget.steps} steps; the rate multiplies the noise as well.",
        f"Student: two erf units learn two from {budget.student_steps} single samples in {STUDENT_INPUT} dimensions, "
        "labels with noise; losses are those on the teacher's function.",
    )
    report(1.0, "done")
    figure = _figure(curves[budget.temperatures[0]], students)
    return StudyResult(KEY, TITLE, REFERENCE, CLAIM, scale, rows, (figure,), notes, facts)


# ------------------------------------------------------------------------------------- two spins


def energy_rows() -> list[Row]:
    """The closed form beside its digits."""
    known = {5.0: 0.074012, 20.0: 0.018691, 100.0: 0.0037476}
    found = two_spin_energy(torch.tensor(list(known)))
    worst = max(abs(float(e) / k - 1) for e, k in zip(found, known.values(), strict=True))
    exponents = {"two spins": (1.0, 0.5), "three spins": (2 / 3, 0.4)}
    return [
        Row(
            "energy of two spins at ∫η = 5, 20, 100 in closed form",
            0.0,
            worst,
            2e-5,
            worst < 2e-5,
            "largest error",
        ),
        *(
            Row(f"best exponent, {name}", best, best_exponent(a), None, abs(best_exponent(a) - best) < 1e-12)
            for name, (a, best) in exponents.items()
        ),
    ]


def slopes(times: Tensor, energies: Tensor, first: float) -> Tensor:
    """Exponent of each decay between a step and the end."""
    start = int((times - first).abs().argmin())
    return (energies[-1] / energies[start]).log() / (times[-1] / times[start]).log()


def two_spin_rows(times: Tensor, energies: Tensor, temperature: float, steps: int) -> list[Row]:
    """Which decay ends lowest, and how the energies fall."""
    final = energies[-1]
    found = slopes(times, energies, steps / 20)
    at = f"at temperature {temperature:g}"
    rows = [
        Row(
            f"decay with the lowest energy {at}",
            0.5,
            BETAS[int(final.argmin())],
            None,
            BETAS[int(final.argmin())] == 0.5,
            "of " + ", ".join(f"{b:g}" for b in BETAS),
        )
    ]
    if temperature != 1.0:
        return rows
    for beta, slope in zip(BETAS, found.tolist(), strict=True):
        expected = -predicted_exponent(beta, 1.0)
        rows.append(
            Row(
                f"slope of the energy for β = {beta:g}",
                expected,
                slope,
                None,
                abs(slope - expected) <= 0.15,
                "within 0.15, over the last factor of 20 in time",
            )
        )
    return rows


# ---------------------------------------------------------------------------------------- convex


def convex_rows(steps: int) -> list[Row]:
    """Mean squares in a convex basin at a sufficient and at too small a rate."""
    beta = torch.tensor([0.5, 0.75, 0.9, 1.0])
    enough, little = (quadratic_mean_square(beta, steps, lr=lr) for lr in (1.0, 0.2))
    known = {0.5: 3.2e-3, 0.75: 1.8e-4, 0.9: 3.7e-5, 1.0: 2.0e-5}
    rows = [
        Row(
            f"convex basin, η₀ = 1: mean square for β = {b:g}",
            known[b],
            float(v),
            None,
            abs(float(v) / known[b] - 1) < 0.03,
            "within 3 %, the digits printed",
        )
        for b, v in zip(known, enough, strict=True)
    ]
    best = float(beta[int(little.argmin())])
    rows.append(
        Row(
            "convex basin, η₀λ = 0.2 < ½: best decay",
            0.75,
            best,
            None,
            best == 0.75,
            f"β = 1 is left at {float(little[-1]):.2g}",
        )
    )
    return rows


# --------------------------------------------------------------------------------------- student

STUDENT_INPUT = 100
STUDENT_RATE = 0.5
NOISE = 0.3
LAWS = ("constant", "1/t at once", "t^(−1/2) at once", "1/t once found")


def student_losses(steps: int, seeds: int) -> dict[str, Tensor]:
    """Loss of two erf units that learn two others from single samples, ``(records, seeds)`` for each law.

    All seeds run side by side; each law decays η = η₀/√d as it says, 1/t with a width of a twentieth of the run.
    """
    d, k = STUDENT_INPUT, 2
    found = {}
    for name in LAWS:
        draw = torch.Generator().manual_seed(0)
        teacher = torch.randn(seeds, k, d, generator=draw)
        weights = 0.1 * torch.randn(seeds, k, d, generator=draw)
        laws = [SignalDecay(drop=0.5, width=steps / 20, smoothing=0.99) for _ in range(seeds)]
        states = [law.init() for law in laws]
        rates = torch.full((seeds,), STUDENT_RATE)
        path = []
        for step in range(steps):
            x = torch.randn(seeds, d, 1, generator=draw)
            field = (weights @ x)[..., 0] / d**0.5
            aim = torch.erf((teacher @ x)[..., 0] / (2 * d) ** 0.5).sum(1)
            label = aim + NOISE * torch.randn(seeds, generator=draw)
            error = torch.erf(field / 2**0.5).sum(1) - label
            push = error[:, None] * (2 / math.pi) ** 0.5 * torch.exp(-field.square() / 2)
            weights = weights - rates[:, None, None] * push[..., None] * x.mT / d**0.5
            if name == "1/t once found":
                for i, law in enumerate(laws):
                    seen = {"lr": STUDENT_RATE, "loss": max(float(error[i]) ** 2 / 2 - NOISE**2 / 2, 0.0)}
                    states[i], action = law.update(states[i], seen)
                    rates[i] = action["lr"]
            elif name != "constant":
                power = 1.0 if name == "1/t at once" else 0.5
                rates = torch.full((seeds,), STUDENT_RATE * (1 + (step + 1) / (steps / 20)) ** -power)
            if (step + 1) % (steps // 50) == 0:
                path.append(erf_loss(weights, teacher))
        found[name] = torch.stack(path)
    return found


def erf_loss(weights: Tensor, teacher: Tensor) -> Tensor:
    """Mean square error over Gaussian inputs, half of it, in closed form, ``(seeds,)``."""
    both = torch.cat([weights, teacher], 1).double()
    overlap = both @ both.mT / both.shape[-1]
    size = 1 + overlap.diagonal(dim1=-2, dim2=-1)
    mean = 2 / math.pi * torch.asin(overlap / (size[:, :, None] * size[:, None, :]).sqrt())
    sign = torch.tensor([1.0] * weights.shape[1] + [-1.0] * teacher.shape[1], dtype=torch.float64)
    return torch.einsum("i,sij,j->s", sign, mean, sign).clamp_min(1e-12) / 2


def student_rows(students: dict[str, Tensor]) -> list[Row]:
    """The law that waits against those that do not, in logarithms of the last loss, seed by seed."""
    last = {name: path[-1].log10() for name, path in students.items()}
    rows = []
    for name in LAWS[:-1]:
        gain, error = mean_error((last[name] - last[LAWS[-1]]).tolist())
        rows.append(
            Row(
                f"student: decades of loss gained by waiting, against {name}",
                "> 0",
                gain,
                error,
                True if gain > 2 * error else False if gain < -2 * error else None,
                "by more than two standard errors over seeds",
            )
        )
    return rows


# ---------------------------------------------------------------------------------------- figure


def _figure(curves: tuple[Tensor, Tensor], students: dict[str, Tensor]) -> Figure:
    return Figure(
        "How fast to decay",
        partial(_draw, curves=curves, students=students),
        caption="Left: energy above the ground state of two spins under η ∝ t^(−β). Right: loss of a student, median "
        "over seeds.",
        alt="Energies fall fastest for β = 1/2; a student's loss falls furthest if its rate "
        "decays once the signal is found.",
        key="schedules",
        size=(9.0, 3.6),
    )


def _draw(canvas: Any, curves: tuple[Tensor, Tensor], students: dict[str, Tensor]) -> None:
    left, right = canvas.subplots(1, 2)
    times, energies = curves
    colours = [role(name) for name in ("first", "second", "third", "fourth")]
    for i, beta in enumerate(BETAS):
        best = beta == 0.5
        left.plot(
            times,
            energies[:, i],
            color=colours[0] if best else role("muted"),
            lw=2 if best else 0.9,
        )
        left.annotate(
            f"β = {beta:g}",
            (float(times[-1]), float(energies[-1, i])),
            (4, {0.35: 3, 0.65: -2}.get(beta, 0)),
            textcoords="offset points",
            va="center",
            fontsize=7,
            color=colours[0] if best else role("muted"),
        )
    left.set_xlim(1, float(times[-1]) * 6)
    log_axis(left, "x")
    log_axis(left, "y")
    left.set_xlabel("step")
    left.set_ylabel("energy above the ground state")
    share = torch.linspace(0.02, 1, len(next(iter(students.values()))))
    for i, (name, path) in enumerate(students.items()):
        right.plot(share, path.median(1).values, color=colours[i], label=name)
    log_axis(right, "y")
    right.set_xlabel("share of the run")
    right.set_ylabel("loss of the student")
    right.legend(fontsize=7)
