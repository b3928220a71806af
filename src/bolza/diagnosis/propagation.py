"""Can signal and gradient get through?

Measured on the real batch (`measure`), beside what mean-field theory predicts for a random network with the
same weight and bias variances (`bolza.meanfield.propagate`). Where the theory does not cover a layer, the
measurement stands alone and a finding says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bolza.diagnosis.measure import Layer, measure
from bolza.diagnosis.problem import Problem
from bolza.diagnosis.record import Finding, Verdict
from bolza.diagnosis.theory import jacobian_spectrum, theory_of
from bolza.meanfield import fixed_point
from bolza.report import number, plus_minus

__all__ = ["Propagation", "findings", "measure_propagation", "phase_diagram"]

# A gradient norm that changes by more than this between the first and the last layer hinders, or stops, training.
_WARN, _BAD = 30.0, 1e3
_MERGED = 0.999  # correlation from which float32 training no longer tells inputs apart within a usual budget


@dataclass(frozen=True)
class Propagation:
    """Signals and gradients by layer, measured and predicted.

    Args:
        layers: one mapping a layer: ``name kind units q q_error q_theory c c_error c_theory gradient
            gradient_error gradient_theory sigma_w2 sigma_b2 chi_1 source note``.
        phase: ``regime chi_1 chi_1_error chi_1_measured xi_q xi_c trainable_depth sigma_w2 sigma_b2 activation plain``;
            ``plain`` says whether it is a point of a phase diagram. None where nothing could be said.
        jacobian: ``singular_values mean_square …`` of ∂output/∂input; None where it could not be taken.
        gradient_ratio: gradient norm at the first layer over that at the last.
        gradient_ratio_error: its standard error.
        notes: what could not be done, in words.
        over_time: of each recurrent module, the norm of the gradient at its input, step by step.
    """

    layers: Sequence[Mapping[str, Any]]
    phase: Mapping[str, Any] | None
    jacobian: Mapping[str, Any] | None
    gradient_ratio: float | None
    gradient_ratio_error: float | None
    notes: tuple[str, ...] = field(default=())
    over_time: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def uncovered(self) -> list[str]:
        """Names of the layers without a theory."""
        return [row["name"] for row in self.layers if row["source"] == "measured"]


def measure_propagation(problem: Problem) -> Propagation:
    """Measure all layers, and predict those that the theory covers.

    Args:
        problem: network, batch and loss.

    Returns:
        The facts.
    """
    measured = measure(problem)
    theory, phase, remarks = theory_of(problem)
    rows = [_row(layer, theory.get(layer.name, {})) for layer in measured]
    _anchor_gradient_theory(rows)
    jacobian, trouble = jacobian_spectrum(problem)
    notes = (*remarks, trouble) if trouble else tuple(remarks)
    ratio, error = _ratio(measured)
    over_time = {layer.name: layer.steps for layer in measured if layer.steps and len(layer.steps) > 1}
    return Propagation(rows, phase, jacobian, ratio, error, notes, over_time)


def _row(layer: Layer, theory: Mapping[str, Any]) -> dict[str, Any]:
    fields = ("name", "kind", "units", "q", "q_error", "c", "c_error", "gradient", "gradient_error")
    row = {name: getattr(layer, name) for name in fields}
    row |= {name: theory.get(name) for name in ("q_theory", "c_theory", "sigma_w2", "sigma_b2", "chi_1")}
    if layer.of_state:  # the theory's pairs of samples are those of the whole sequence
        row["c_theory"] = None
    variance = theory.get("gradient_variance_theory")
    row["gradient_theory"] = None if variance is None else math.sqrt(variance * layer.numbers)
    row["source"] = "theory" if row["q_theory"] is not None else "measured"
    row["note"] = theory.get("note") or ""
    return row


def _anchor_gradient_theory(rows: list[dict[str, Any]]) -> None:
    """Theory gives ratios of gradients: set its level to the measured one at the last layer it covers."""
    for row in reversed(rows):
        if row["gradient_theory"] and row["gradient"]:
            scale = row["gradient"] / row["gradient_theory"]
            for other in rows:
                if other["gradient_theory"] is not None:
                    other["gradient_theory"] *= scale
            return


def _ratio(layers: Sequence[Layer]) -> tuple[float | None, float | None]:
    known = [layer for layer in layers if layer.gradient is not None]
    if len(known) < 2 or not known[-1].gradient:
        return None, None
    first, last = known[0], known[-1]
    ratio = float(first.gradient or 0.0) / float(last.gradient or 1.0)
    if not first.gradient or first.gradient_error is None or last.gradient_error is None:
        return ratio, None
    relative = math.hypot(
        first.gradient_error / first.gradient, last.gradient_error / float(last.gradient or 1.0)
    )
    return ratio, ratio * relative


def phase_diagram(
    points: Sequence[Mapping[str, Any] | None], size: tuple[int, int] = (48, 20)
) -> dict[str, Any] | None:
    """Rates over (σ_w², σ_b²), on a grid wide enough for the given networks.

    Args:
        points: the ``phase`` of each network to be placed in it; the first gives the activation, by name.
        size: points along σ_w² and σ_b².

    Returns:
        ``sigma_w2``, ``sigma_b2``, ``chi_1`` and ``xi_c``; None without a first point.
    """
    here = points[0] if points else None
    if not here or not here["plain"]:
        return None
    known = [p for p in points if p and p["plain"]]
    widest = max(4.0, 1.2 * max(p["sigma_w2"] for p in known))
    highest = max(0.3, 1.2 * max(p["sigma_b2"] for p in known))
    w = torch.linspace(0.02, widest, size[0], dtype=torch.float64)
    b = highest * torch.linspace(0.0, 1.0, size[1], dtype=torch.float64) ** 2  # finer where the line is steep
    grid = fixed_point(here["activation"], w[None, :], b[:, None])
    return {
        "sigma_w2": w.tolist(),
        "sigma_b2": b.tolist(),
        "chi_1": grid.chi_1.tolist(),
        "xi_c": grid.xi_c.tolist(),
    }


def findings(facts: Propagation) -> list[Finding]:
    """What the propagation says.

    Args:
        facts: of `measure_propagation`.
    """
    out = _phase_findings(facts)
    out += _measured_findings(facts)
    if facts.jacobian:
        out += _jacobian_findings(facts.jacobian)
    uncovered = facts.uncovered
    if uncovered:
        names = ", ".join(uncovered[:6]) + (f" and {len(uncovered) - 6} more" if len(uncovered) > 6 else "")
        out.append(
            Finding(
                "propagation.not_covered",
                "layers without theory",
                len(uncovered),
                None,
                "info",
                f"Mean-field theory does not cover {names}: measured instead.",
                unit="layers",
            )
        )
    for number_, note in enumerate(facts.notes, 1):
        out.append(Finding(f"propagation.note_{number_}", "note", None, None, "info", note))
    return out


def _phase_findings(facts: Propagation) -> list[Finding]:
    phase = facts.phase
    if not phase:
        return _rate_findings(facts)
    depth, chi, regime, reach = phase["depth"], phase["chi_1"], phase["regime"], phase["trainable_depth"]
    enough = regime == "critical" or reach >= depth
    verdict: Verdict = "good" if enough else "bad" if reach < depth / 2 else "warn"
    if not phase["plain"]:
        return _rate_findings(facts)
    change = {
        "ordered": f"each layer shrinks the squared gradient by {number(1 / chi)} and pulls all inputs together",
        "chaotic": f"each layer enlarges the squared gradient by {number(chi)} and tears similar inputs apart",
        "critical": "gradients keep their size from layer to layer",
    }[regime]
    told = f"about {reach:.0f} layers" if math.isfinite(reach) else "any depth"
    fades = math.isfinite(phase["xi_c"])
    return [
        Finding(
            "propagation.phase",
            "phase",
            regime,
            None,
            verdict,
            f"With σ_w² = {number(phase['sigma_w2'])} and σ_b² = {number(phase['sigma_b2'])}, {change}.",
            "" if enough else "Start on the critical line: bolza.meanfield.critical_init_(model).",
        ),
        Finding(
            "propagation.chi_1",
            "gradient factor χ₁",
            chi,
            _finite(phase["chi_1_error"]),
            verdict,
            "1 is critical. Measured on these weights: "
            f"{plus_minus(phase['chi_1_measured'], phase['chi_1_measured_error'])}; over "
            f"{depth} layers χ₁ makes {_to_the(chi, depth - 1)} of the squared gradient.",
            unit="per layer",
        ),
        Finding(
            "propagation.xi_q",
            "depth scale ξ_q",
            phase["xi_q"],
            None,
            "info",
            "A deviation of the variance from its fixed point falls by a factor e every "
            f"{number(phase['xi_q'])} layers.",
            unit="layers",
        ),
        Finding(
            "propagation.xi_c",
            "depth scale ξ_c",
            phase["xi_c"],
            None,
            verdict,
            f"What tells two inputs apart fades by a factor e every {number(phase['xi_c'])} layers."
            if fades
            else "What tells two inputs apart does not fade with depth.",
            unit="layers",
        ),
        Finding(
            "propagation.trainable_depth",
            "trainable depth, 6 ξ_c",
            reach,
            None,
            verdict,
            f"At this point of the phase diagram {told} can be trained; this network has {depth}.",
            "" if enough else "Start on the critical line, or make the network shallower.",
            unit="layers",
        ),
    ]


def _rate_findings(facts: Propagation) -> list[Finding]:
    """For networks that are no point of a phase diagram: what a layer does on average, measured."""
    steps = len(facts.layers) - 1
    if not facts.gradient_ratio or steps < 1:
        return []
    chi = facts.gradient_ratio ** (2 / steps)
    error = (
        None
        if facts.gradient_ratio_error is None
        else chi * 2 / steps * facts.gradient_ratio_error / facts.gradient_ratio
    )
    return [
        Finding(
            "propagation.chi_1",
            "gradient factor, measured",
            chi,
            error,
            "info",
            f"Mean factor of the squared gradient over {steps + 1} layers; a network that is no chain of one "
            "kind of layer is no "
            "point of a phase diagram, so this is measured and not χ₁ of a theory.",
            unit="per layer",
        )
    ]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _measured_findings(facts: Propagation) -> list[Finding]:
    if not facts.layers:
        return [
            Finding(
                "propagation.not_measured",
                "layers",
                0,
                None,
                "warn",
                "No layer could be measured: the model calls none of its modules.",
                "Build the model from torch.nn modules, or call them instead of their weights.",
            )
        ]
    out = []
    if (finding := _gradient_finding(facts)) is not None:
        out.append(finding)
    first, last = facts.layers[0], facts.layers[-2 if len(facts.layers) > 1 else -1]
    out += _time_findings(facts)
    if first["q"] > 0 and last is not first:
        ratio = last["q"] / first["q"]
        tone: Verdict = "good" if 1e-2 < ratio < 1e2 else "warn" if 1e-4 < ratio < 1e4 else "bad"
        out.append(
            Finding(
                "propagation.signal_ratio",
                "signal variance, last / first",
                ratio,
                _relative(last["q"], last["q_error"], first["q"], first["q_error"]),
                tone,
                f"The variance goes from {plus_minus(first['q'], first['q_error'])} in layer {first['name']} to "
                f"{plus_minus(last['q'], last['q_error'])} in layer {last['name']}.",
            )
        )
    if last["c"] is not None:
        c, before = last["c"], first["c"] if first["c"] is not None else 0.0
        merged = c > _MERGED and before < 0.99
        out.append(
            Finding(
                "propagation.correlation",
                "correlation of two inputs",
                c,
                last["c_error"],
                "bad" if merged else "warn" if c > 0.98 and before < 0.95 else "good",
                f"Two inputs that are {number(before)} alike in the first layer are "
                + (
                    f"the same to {_digits(1 - c)} in layer {last['name']}."
                    if merged
                    else f"{number(c)} alike in layer {last['name']}."
                ),
                "Later layers cannot tell inputs apart: start on the critical line." if merged else "",
            )
        )
    return out


def _gradient_finding(facts: Propagation) -> Finding | None:
    ratio = facts.gradient_ratio
    if ratio is None:
        return None
    size = math.inf if ratio == 0 or not math.isfinite(ratio) else max(ratio, 1 / ratio)
    verdict: Verdict = "good" if size <= _WARN else "warn" if size <= _BAD else "bad"
    if ratio == 0:
        text = "No gradient arrives at the first layer."
    elif verdict == "good":
        text = f"The first layer gets {number(ratio)} times the gradient of the last: both learn."
    elif ratio < 1:
        effect = "it stays as it was drawn" if verdict == "bad" else "it learns slowly"
        text = f"The first layer gets {number(ratio)} of the gradient of the last: {effect}."
    else:
        text = f"The first layer gets {number(ratio)} times the gradient of the last: no step suits both."
    calls = len({row["name"].split("#")[0] for row in facts.layers})
    looped = 2 * calls <= len(facts.layers)  # a cell that is called again and again: layers are steps
    remedy = "Start on the critical line, or add skip connections and normalisation."
    if looped and ratio < 1:
        remedy = "Layers are steps here: bias the gate that keeps the state towards memory, or draw orthogonal weights."
    return Finding(
        "propagation.gradient_ratio",
        "gradient norm, first / last",
        ratio,
        facts.gradient_ratio_error,
        verdict,
        text,
        "" if verdict == "good" else remedy,
    )


def _time_findings(facts: Propagation) -> list[Finding]:
    """Of the recurrent modules, the one that loses or gains most over its steps."""

    def size(steps: Sequence[float]) -> float:
        low, high = sorted((steps[0], steps[-1]))
        return math.inf if low == 0 or not math.isfinite(high) else high / low

    known = {name: steps for name, steps in facts.over_time.items() if any(steps)}
    if not known:
        return []
    name, steps = max(known.items(), key=lambda item: size(item[1]))
    worst, count = size(steps), len(steps)
    verdict: Verdict = "good" if worst <= _WARN else "warn" if worst <= _BAD else "bad"
    ratio = steps[0] / steps[-1] if steps[-1] else math.inf
    fades = ratio < 1
    text = f"Of {count} steps of {name}, the first gets {number(ratio)} times the gradient of the last"
    if verdict != "good":
        text += ": what was read early is not learnt" if fades else ": gradients explode over time"
    remedy = (
        "Bias the gate that keeps the state towards memory, one over the number of steps to be remembered: "
        "see bolza.meanfield.recurrent_fixed_point."
        if fades
        else "Draw the recurrent weights smaller, or orthogonal, and clip the norm of the gradient."
    )
    return [
        Finding(
            "propagation.time_ratio",
            "gradient, first / last step",
            ratio if math.isfinite(ratio) else None,
            None,
            verdict,
            text + ".",
            "" if verdict == "good" else remedy,
        )
    ]


def _jacobian_findings(jacobian: Mapping[str, Any]) -> list[Finding]:
    values = [v for v in jacobian["singular_values"] if v is not None]
    if not values:
        return []
    mean_square, top, bottom, condition = (
        jacobian["mean_square"],
        max(values),
        min(values),
        jacobian["condition"],
    )
    lost = mean_square < 1e-6
    tone: Verdict = (
        "bad"
        if lost or mean_square > 1e6
        else "warn"
        if condition is not None and condition > 1e4
        else "good"
    )
    what = "∂output/∂embedding" if jacobian["of_embedding"] else "∂output/∂input"
    spread = (
        f"run from {number(bottom)} to {number(top)}" if condition is not None else f"reach {number(top)}"
    )
    out = [
        Finding(
            "propagation.jacobian_mean_square",
            "Jacobian, mean square σ²",
            mean_square,
            jacobian["mean_square_error"],
            tone,
            f"Singular values of {what} {spread}"
            + (": the output does not depend on the input in any useful degree." if lost else "."),
            "Start on the critical line, or add skip connections and normalisation." if tone == "bad" else "",
        )
    ]
    if condition is not None:
        out.append(
            Finding(
                "propagation.jacobian_condition",
                "Jacobian, largest / smallest σ",
                condition,
                jacobian["condition_error"],
                "info" if lost else tone,
                "1 would be dynamical isometry: all directions of the input get through alike.",
            )
        )
    return out


def _to_the(chi: float, power: int) -> str:
    if chi <= 0:
        return "nothing"
    exponent = power * math.log10(chi)
    return number(10**exponent) if abs(exponent) < 300 else f"10^{exponent:.0f}"


def _digits(gap: float) -> str:
    return f"one part in {number(1 / gap)}" if gap > 0 else "the last digit"


def _relative(a: float, ea: float | None, b: float, eb: float | None) -> float | None:
    if ea is None or eb is None or a <= 0:
        return None
    return a / b * math.hypot(ea / a, eb / b)
