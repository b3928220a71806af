"""What to change, and why: initialisation, learning rate, batch.

* Initialisation: on the critical line, where the findings say that signal or gradient does not get through.
* Batch: the smallest power of two above the critical batch size B* = tr Σ/|g|², within 16 … 256 and a quarter of
  the data.
* Learning rate: lr = (1 − β)/λ · 1/(1 + B*/B) for SGD with momentum β, falling linearly to zero. λ is the largest
  curvature of the *treated* network; lr/(1 − β) = 1/λ is half the stability limit 2/λ of gradient descent, which
  leaves room for the growth of curvature in the first steps, and the last factor is the one by which the best step
  shrinks when the gradient is that noisy.

Reference: McCandlish, Kaplan, Amodei et al. (2018), *An empirical model of large-batch training*, eq. 2.6, for the
factor of the noise.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from bolza.diagnosis.landscape import Landscape
from bolza.diagnosis.noise import Noise
from bolza.diagnosis.problem import Problem, measuring_mode_
from bolza.diagnosis.propagation import Propagation
from bolza.diagnosis.record import Finding, Prescription, Remedy
from bolza.meanfield import critical_init_
from bolza.ops.errors import BolzaError
from bolza.report import number

__all__ = [
    "EXAMPLE",
    "MOMENTUM",
    "SETTING",
    "prescribe",
    "prescription_findings",
    "treat_",
    "treated_problem",
    "wants_treatment",
]

MOMENTUM = 0.9
EXAMPLE = 64  # samples that show the initialiser the scale of the inputs
SETTING: dict[str, Any] = {"scheme": "orthogonal"}
_SMALLEST, _LARGEST = 16, 256
_FALLBACK_BATCH = 64


def wants_treatment(findings: Sequence[Finding]) -> bool:
    """Whether the findings on propagation ask for another initialisation."""
    keys = ("gradient_ratio", "correlation", "signal_ratio", "trainable_depth")
    return any(f.verdict == "bad" and f.key in {f"propagation.{k}" for k in keys} for f in findings)


def treat_(model: nn.Module, setting: Mapping[str, Any], *, example: Any = None, seed: int = 0) -> nn.Module:
    """Apply a prescribed initialisation in place.

    Args:
        model: the network.
        setting: the value of `Prescription.initialisation`.
        example: a batch of inputs.
        seed: of the random weights.

    Returns:
        ``model``.
    """
    generator = torch.Generator().manual_seed(seed)
    critical_init_(model, example, scheme=setting["scheme"], generator=generator)
    return model


def treated_problem(problem: Problem) -> tuple[Problem | None, str]:
    """The same problem with a critically initialised copy of the network.

    Args:
        problem: the network as it is.

    Returns:
        The problem and an empty string; or None and the reason why there is none.
    """
    pristine = copy.deepcopy(problem.pristine)
    try:
        treat_(pristine, SETTING, example=problem.x[:EXAMPLE], seed=problem.seed)
    except (BolzaError, RuntimeError) as error:
        return None, str(error).strip().splitlines()[0]
    return problem.with_model(measuring_mode_(copy.deepcopy(pristine)), pristine), ""


def prescribe(
    problem: Problem,
    findings: Sequence[Finding],
    before: Propagation | None,
    after: Propagation | None,
    landscape: Landscape | None,
    noise: Noise | None,
    obstacle: str = "",
    batch_size: int | None = None,
) -> Prescription:
    """Work out the prescription.

    Args:
        problem: the network.
        findings: of the network as it is.
        before: its propagation.
        after: that of the treated network; None where it is left as it is.
        landscape: of the network that is to be trained.
        noise: of the network that is to be trained.
        obstacle: why it could not be treated though it should.
        batch_size: what the user wants; the noise decides where it is None.

    Returns:
        The prescription; every part has a value and a reason.
    """
    batch = _batch(problem, noise) if batch_size is None else _asked(batch_size, len(problem.dataset), noise)
    rate = _learning_rate(landscape, noise, int(batch.value), after is not None)
    return Prescription(_initialisation(findings, before, after, obstacle), rate, batch, MOMENTUM)


def _initialisation(
    findings: Sequence[Finding], before: Propagation | None, after: Propagation | None, obstacle: str
) -> Remedy:
    if obstacle:
        return Remedy(
            None, f"The signal does not get through, but the initialisation stays as it is: {obstacle}"
        )
    if after is None or before is None:
        return Remedy(None, "Signal and gradient get through as it is: leave the initialisation alone.")
    phase = after.phase or {}
    value = {**SETTING, "sigma_w2": phase.get("sigma_w2"), "sigma_b2": phase.get("sigma_b2")}
    where = ""
    if phase and before.phase:
        where = (
            f"σ_w² = {number(phase['sigma_w2'])}, σ_b² = {number(phase['sigma_b2'])} moves χ₁ from "
            f"{number(before.phase['chi_1'])} to {number(phase['chi_1'])}; "
        )
    ratio = (
        f"the gradient norm at the first layer goes from {number(before.gradient_ratio)} to "
        f"{number(after.gradient_ratio)} "
        "of that at the last"
    )
    return Remedy(
        value,
        f"Orthogonal weights on the critical line: {where}{ratio}.",
        "bolza.meanfield.critical_init_(model, x)",
    )


def _learning_rate(landscape: Landscape | None, noise: Noise | None, batch: int, treated: bool) -> Remedy:
    if landscape is None or not math.isfinite(landscape.lr_limit):
        return Remedy(None, "No curvature was measured, so the learning rate stays as it is.")
    critical = _critical(noise)
    factor = 1 / (1 + critical / batch) if critical is not None else 0.5
    rate = _two_figures((1 - MOMENTUM) / landscape.sharpness * factor)
    which = "treated network" if treated else "network"
    why = f"times {number(factor, 2)} because gradients of {batch} samples are that noisy"
    if critical is None:
        why = f"times {number(factor, 2)} for noise that could not be told from this batch"
    return Remedy(
        rate,
        f"For SGD with momentum {MOMENTUM}. The largest curvature of the {which} is "
        f"{number(landscape.sharpness)}, so plain descent is stable below "
        f"{number(landscape.lr_limit)}: half of that, {why}, times {number(1 - MOMENTUM, 1)} for the momentum; "
        "let it fall "
        "linearly to zero.",
        f"torch.optim.SGD(model.parameters(), lr={rate:g}, momentum={MOMENTUM})",
    )


def _critical(noise: Noise | None) -> float | None:
    """The critical batch size, if it is known better than to its own size."""
    if noise is None or not (math.isfinite(noise.critical_batch) and noise.critical_batch > 0):
        return None
    error = noise.critical_batch_error
    return noise.critical_batch if error is not None and error < noise.critical_batch else None


def _batch(problem: Problem, noise: Noise | None) -> Remedy:
    count = len(problem.dataset)
    most = max(min(_LARGEST, 2 ** int(math.log2(max(count / 4, 1)))), 1)
    critical = _critical(noise)
    if critical is None:
        size = min(_FALLBACK_BATCH, most)
        return Remedy(size, f"The gradient noise could not be measured: {size} is a usual choice.")
    wanted = 2 ** math.ceil(math.log2(max(critical, 1.0)))
    size = max(min(max(wanted, _SMALLEST), most), 1)
    reason = f"Noise and signal of the gradient are equal at a batch of {number(critical)}"
    if size == wanted:
        reason += f"; {size} is the next power of two."
    elif size > wanted:
        reason += f", which wastes the processor: {size} costs a step little more."
    else:
        reason += f"; {size} is the most that leaves enough steps in {count} samples."
    return Remedy(size, reason)


def _asked(batch_size: int, count: int, noise: Noise | None) -> Remedy:
    critical = _critical(noise)
    known = "" if critical is None else f" Noise and signal of the gradient are equal at {number(critical)}."
    return Remedy(min(batch_size, count), f"As asked for.{known}")


def _two_figures(value: float) -> float:
    return float(f"{value:.1e}")


def prescription_findings(prescription: Prescription) -> list[Finding]:
    """The prescription as findings, so that one list holds everything.

    Args:
        prescription: of `prescribe`.
    """
    parts = (
        ("initialisation", "initialisation", prescription.initialisation),
        ("learning_rate", "learning rate", prescription.learning_rate),
        ("batch_size", "batch size", prescription.batch_size),
    )
    out = []
    for key, name, remedy in parts:
        value = remedy.value
        if isinstance(value, Mapping):
            value = f"{value['scheme']}, critical"
        elif value is None:
            value = "as it is"
        out.append(Finding(f"prescription.{key}", name, value, None, "info", remedy.reason, remedy.code))
    return out
