"""What the theory says about this network: predictions by layer, its phase, its Jacobian."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from bolza.diagnosis.problem import Problem
from bolza.meanfield import propagate
from bolza.meanfield.isometry import isometry
from bolza.ops.errors import BolzaError

__all__ = ["jacobian_spectrum", "theory_of"]

_THEORY_SAMPLES = 32
_JACOBIAN_SAMPLES = 8


def theory_of(problem: Problem) -> tuple[dict[str, Mapping[str, Any]], dict[str, Any] | None, list[str]]:
    """Predictions by the name of the layer, the phase, and what could not be predicted.

    Args:
        problem: network, batch and loss.

    Returns:
        Rows ``q_theory c_theory gradient_variance_theory sigma_w2 sigma_b2 chi_1 note``; the phase, or None; notes.
    """
    x, y = problem.batch(_THEORY_SAMPLES)
    try:
        result = propagate(problem.model, x, y, problem.loss, max_samples=_THEORY_SAMPLES, seed=problem.seed)
    except (BolzaError, RuntimeError) as error:
        return {}, None, [f"No theory for this network, measured instead: {_first_line(error)}"]
    rows: dict[str, Mapping[str, Any]] = {}
    for layer in result.layers:
        covered = layer.source == "theory"
        rows[layer.name] = {
            "q_theory": _number(layer.q_theory) if covered else None,
            "c_theory": _number(layer.c_samples) if covered else None,
            "gradient_variance_theory": _number(layer.grad_theory) if covered else None,
            "sigma_w2": _number(layer.sigma_w2),
            "sigma_b2": _number(layer.sigma_b2),
            "chi_1": _number(layer.chi_1),
            "note": layer.note,
        }
    phase = result.phase
    record = asdict(phase) | {"regime": phase.phase, "plain": phase.plain}
    del record["phase"]
    return rows, record if math.isfinite(phase.chi_1) else None, list(result.notes)


def jacobian_spectrum(problem: Problem) -> tuple[dict[str, Any] | None, str]:
    """Singular values of ∂output/∂input, or why there are none.

    Args:
        problem: network and batch.

    Returns:
        ``singular_values`` by rank (mean over the samples), ``mean_square``, ``condition`` and their errors; and an
        empty string. Or None and the reason.
    """
    try:
        result = isometry(problem.model, problem.x, max_samples=_JACOBIAN_SAMPLES, seed=problem.seed)
    except (BolzaError, RuntimeError) as error:
        return None, f"The input–output Jacobian could not be taken: {_first_line(error)}"
    record = {
        "singular_values": result.singular_values.mean(0).tolist(),
        "mean_square": result.mean_square.value,
        "mean_square_error": _number(result.mean_square.error),
        "condition": _number(result.condition.value),
        "condition_error": _number(result.condition.error),
        "of_embedding": not problem.x.is_floating_point(),
    }
    return record, ""


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
