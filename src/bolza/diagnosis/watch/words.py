"""What a finding on a run means, and what to do about it."""

from __future__ import annotations

import math

from bolza.diagnosis.watch.probes import Sharpness
from bolza.diagnosis.watch.record import Event
from bolza.diagnosis.watch.significance import Balance
from bolza.report import number, plus_minus
from bolza.sde.tails import TailReport

__all__ = ["above_limit", "at_edge", "both_sides", "growing", "heavy", "loops", "plateau", "stationary"]


def growing(step: int, window: int, before: float, after: float, what: str = "loss") -> Event:
    """The loss grows from step to step."""
    if not math.isfinite(after):
        text, value = f"The {what} is not finite.", None
    else:
        value = after / before if before > 0 else None
        text = f"The {what} rose from {number(before)} to {number(after)} within {window} steps, almost without a fall."
    remedy = "Lower the learning rate (halve it first), clip the gradient, or go back to an earlier state."
    return Event("unstable", step, value, None, "bad", text, remedy)


def above_limit(step: int, s: Sharpness, lr: float, formula: str) -> Event:
    """The sharpness is above the limit and the loss rises, or it is far above."""
    assert s.fraction is not None
    text = (
        f"The sharpness is {plus_minus(s.value, s.error)}, above the stability limit {formula} = {number(s.bound)}, "
        "so that each step overshoots along the steepest direction by more than it gains: the loss rises, or will."
    )
    remedy = f"Lower the learning rate below {number(lr / s.fraction, 2)}."
    return Event("unstable", step, s.fraction, s.fraction_error, "bad", text, remedy)


def at_edge(step: int, s: Sharpness, lr: float, formula: str) -> Event:
    """The sharpness is at or above the limit, but the loss does not rise."""
    assert s.fraction is not None
    text = (
        f"The sharpness is {plus_minus(s.value, s.error)}, at the stability limit {formula} = {number(s.bound)}, "
        "and the loss does not rise: the run is at the edge of stability, where the rate itself bounds the sharpness."
    )
    remedy = (
        "Nothing has to be done while the loss falls. For a steady descent, or before averaging weights, stay below "
        f"a rate of {number(lr / s.fraction, 2)}."
    )
    return Event("edge", step, s.fraction, s.fraction_error, "warn", text, remedy)


def plateau(step: int, since: int, change: float, error: float, mean: float, z: float, limit: float) -> Event:
    """The loss has stopped to change, the weights have not."""
    seen = _seen(limit * error, mean)
    text = (
        f"From step {since} to {step} the loss is level: it changed by {plus_minus(change, error)} "
        f"(z = {number(z, 2)}, limit {number(limit, 2)}); a change of {seen} would have been seen. The weights still "
        "drift: their norm changes."
    )
    remedy = (
        "Lower the learning rate, or take a larger batch: at this rate the loss has given what it gives soon."
    )
    return Event("plateau", step, change, error, "info", text, remedy)


def stationary(
    step: int,
    since: int,
    z_norm: float,
    z_loss: float | None,
    limit: float,
    level: float,
    seen: float | None,
    sides: Balance | None = None,
) -> Event:
    """Neither loss nor weights drift any more."""
    of_loss = "" if z_loss is None else f" and of the loss {number(z_loss, 2)}"
    sharp = "" if seen is None else f" A change of the loss by {number(seen, 2)} would have been seen."
    told = "" if sides is None else f" ({both_sides(sides)})"
    text = (
        f"From step {since} to {step} the run is stationary: the identity 2θ·v = lr·‖v‖² holds in the mean{told}. "
        f"The drift of ‖θ‖² is {number(z_norm, 2)} standard errors{of_loss}, and a stationary run stays within "
        f"±{number(limit, 2)} in {100 * (1 - level):.0f} % of looks.{sharp}"
    )
    remedy = (
        "The noise now undoes what the gradient gains: lower the learning rate (by 2 to 10) or raise the batch to go "
        "further down, average the weights, or stop."
    )
    return Event("stationary", step, z_norm, 1.0, "good", text, remedy)


def both_sides(sides: Balance) -> str:
    """The identity with its numbers."""
    gain, noise = plus_minus(sides.gain, sides.gain_error), plus_minus(sides.noise, sides.noise_error)
    return f"θ·∇f = {gain} against (lr/2)(1+μ)‖v‖² = {noise}"


def _seen(change: float, mean: float) -> str:
    share = abs(change / mean) if mean else math.inf
    return f"{100 * share:.2g} %" if share < 1 else number(change, 2)


def loops(step: int, z: float, p_value: float, omega: float, error: float) -> Event:
    """The weights go round in loops."""
    period = 2 * math.pi / omega if omega > 0 else math.inf
    text = (
        f"The weights go round in loops, about once in {number(period, 2)} steps in the plane where they turn fastest: "
        f"the area they sweep is {number(z)} standard errors from none (p = {number(p_value, 2)}). The noise is not "
        "aligned with the curvature, so that the run keeps moving at rest."
    )
    remedy = (
        "A small gradient is no sign of the end here. Average the weights over some periods, or lower the rate; a "
        "fixed order of the batches also makes loops: shuffle anew in every epoch."
    )
    return Event("loops", step, omega, error, "info", text, remedy)


def heavy(step: int, report: TailReport) -> Event:
    """The noise of the gradient has no finite variance on the scale of the run."""
    m = report.mixture
    text = (
        f"The noise of the gradient is heavy-tailed: its sums over {m.fine} to {m.block} steps grow with tail index "
        f"{plus_minus(m.index, m.error)}, where a law of finite variance has at least {number(m.reference)} "
        f"(p = {number(m.p_value, 2)}). Rare steps dominate: the run leaves a valley by jumps."
    )
    remedy = (
        "Clip the gradient (clip=), look at the samples with the largest losses, or take larger batches; a lower rate "
        "alone helps little against jumps."
    )
    return Event("heavy-tailed", step, m.index, m.error, "warn", text, remedy)
