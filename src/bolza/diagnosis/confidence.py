"""Can the probabilities be trusted, and which temperature would mend them?

    p = softmax(z / T),    T minimises −mean log p(y)

The gain of T is measured on samples that it was not fitted to: two halves, each judged with the T of the other.

Reference: Guo, Pleiss, Sun & Weinberger (2017), *On calibration of modern neural networks*, arXiv:1706.04599.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bolza.bayes import calibration
from bolza.diagnosis.record import Finding, Verdict
from bolza.report import number, percent, plus_minus

__all__ = ["Confidence", "at_chance", "confidence_findings", "measure_confidence"]

_BINS = 10
_LOWEST, _HIGHEST = 0.05, 20.0


@dataclass(frozen=True)
class Confidence:
    """Calibration of a classifier.

    Args:
        ece: expected calibration error, over ten bins of equal width.
        ece_error: its standard error.
        reference: the ece that it would have on so few samples if its probabilities were true.
        calibrated: whether the ece is within what the reference explains, at the 5 % level.
        mean_confidence: mean of the largest probability.
        accuracy: share of right answers.
        log_score: mean of −log p(y), in nats.
        log_score_error: its standard error.
        temperature: T that is best on all samples.
        gain: how much T lowers the log score on samples that it was not fitted to.
        gain_error: standard error of the gain.
        ece_after: expected calibration error with T, on samples that it was not fitted to.
        bins_confidence: mean confidence of each bin that holds samples.
        bins_accuracy: share of right answers there.
        bins_error: its standard error.
        bins_count: samples there.
    """

    ece: float
    ece_error: float
    reference: float
    calibrated: bool
    mean_confidence: float
    accuracy: float
    log_score: float
    log_score_error: float
    temperature: float
    gain: float
    gain_error: float
    ece_after: float
    bins_confidence: Sequence[float]
    bins_accuracy: Sequence[float]
    bins_error: Sequence[float]
    bins_count: Sequence[int]


def at_chance(accuracy: float, error: float, chance: float) -> bool:
    """Whether accuracy cannot be told from that of a constant answer."""
    return accuracy < chance + 3 * error + 0.05 * (1 - chance)


def measure_confidence(logits: Tensor, y: Tensor, seed: int) -> Confidence:
    """Weigh probabilities against labels, and find the temperature that mends them.

    Args:
        logits: ``(n, classes)``; rows that are probabilities already are taken as such.
        y: labels ``(n,)``.
        seed: of the two halves and the error bars.

    Returns:
        The calibration.
    """
    z = _as_logits(logits.detach().to("cpu", torch.float64))
    y = y.cpu()
    found = calibration(z.softmax(1), y, bins=_BINS, seed=seed)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    mended = z.clone()
    for fit, judge in (order.chunk(2), order.chunk(2)[::-1]) if len(y) > 3 else ():
        mended[judge] = z[judge] / _temperature(z[fit], y[fit])
    gain = F.cross_entropy(z, y, reduction="none") - F.cross_entropy(mended, y, reduction="none")
    after = calibration(mended.softmax(1), y, bins=_BINS, seed=seed)
    held = found.count > 0
    share, count = found.frequency[held], found.count[held]
    return Confidence(
        ece=found.ece.value,
        ece_error=found.ece.error,
        reference=found.reference.value,
        calibrated=found.calibrated,
        mean_confidence=float(z.softmax(1).amax(1).mean()),
        accuracy=found.accuracy.value,
        log_score=found.log_score.value,
        log_score_error=found.log_score.error,
        temperature=_temperature(z, y),
        gain=float(gain.mean()),
        gain_error=float(gain.std() / math.sqrt(len(gain))),
        ece_after=after.ece.value,
        bins_confidence=found.confidence[held].tolist(),
        bins_accuracy=share.tolist(),
        bins_error=((share * (1 - share)).clamp_min(0.25 / count) / count).sqrt().tolist(),
        bins_count=count.tolist(),
    )


def _as_logits(z: Tensor) -> Tensor:
    if bool((z >= 0).all()) and bool(((z.sum(1) - 1).abs() < 1e-4).all()):
        return z.clamp_min(1e-12).log()
    return z


def _temperature(z: Tensor, y: Tensor) -> float:
    from scipy.optimize import minimize_scalar

    def score(log_t: float) -> float:
        return float(F.cross_entropy(z / math.exp(log_t), y))

    best = minimize_scalar(score, bounds=(math.log(_LOWEST), math.log(_HIGHEST)), method="bounded")
    return math.exp(float(best.x))


def confidence_findings(c: Confidence) -> list[Finding]:
    """What the confidence is worth.

    Args:
        c: of `measure_confidence`.
    """
    way = "too sure of itself" if c.mean_confidence > c.accuracy else "less sure than it could be"
    verdict: Verdict = "good" if c.calibrated else "bad" if c.ece > 0.1 else "warn"
    helps = c.gain > 2 * c.gain_error and c.gain > 0
    text = f"Confidence {percent(c.mean_confidence)}, accuracy {percent(c.accuracy)}: "
    text += "the gap is no larger than" if c.calibrated else f"it is {way}, beyond"
    text += f" what so few samples explain ({number(c.reference)} if its probabilities were true)."
    gain = plus_minus(c.gain, c.gain_error)
    if helps:
        said = f"Divided by it, logits have a log score that is better by {gain} nats on samples it was not fitted to"
        said += f"; the calibration error goes from {number(c.ece)} to {number(c.ece_after)}."
    else:
        said = f"Dividing logits by it gains {gain} nats on samples it was not fitted to: nothing to mend."
    mend = f"Use (logits / {c.temperature:.3g}).softmax(1); the classes stay the same." if helps else ""
    if not c.calibrated and not helps:
        mend = "One temperature does not mend it: average over a posterior, bolza.bayes.predict(model, samples, x)."
    return [
        Finding("hold.calibration", "calibration error (ECE)", c.ece, c.ece_error, verdict, text,
                "" if c.calibrated and not helps else mend if not helps else "See the temperature below."),
        Finding("hold.temperature", "best temperature", c.temperature, None, "info", said, mend if helps else ""),
    ]  # fmt: skip
