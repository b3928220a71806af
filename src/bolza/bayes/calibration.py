r"""Does a classifier that says 80 % have it right in eight of ten cases?

    log score   −mean log p(y)            Brier   mean Σ_c (p_c − 1[y = c])²
    ECE         Σ_b (n_b/n) |accuracy_b − confidence_b|,   bins b of the confidence max_c p_c

The expected calibration error of a finite test set is never zero, not even for a classifier that is calibrated: what
it would be for this one, if its own probabilities were true, stands beside it.

Reference: Guo, Pleiss, Sun & Weinberger (2017), arXiv:1706.04599; Gneiting & Raftery (2007) for the scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError, DataError, ShapeError
from bolza.core.reference import Reference, cites

__all__ = ["Calibration", "Estimate", "calibration"]

GUO = Reference(
    "guo2017calibration",
    "Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.",
    "On Calibration of Modern Neural Networks",
    2017,
    venue="International Conference on Machine Learning",
    arxiv="1706.04599",
)

_DRAWS = 400  # bootstrap samples, and label sets of the reference


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error.

    Attributes:
        value: the number.
        error: one standard error over test sets of this size.
    """

    value: float
    error: float


@dataclass(frozen=True)
class Calibration:
    """Scores of predicted probabilities against labels.

    Attributes:
        accuracy: share of labels that the largest probability names.
        log_score: mean of −log p(y), in nats; smaller is better. Infinite where a label was given no chance.
        brier: mean squared distance of the probabilities from the label, in [0, 2].
        ece: expected calibration error; its error is by bootstrap.
        reference: the ece that this classifier would have on a test set of this size if its own probabilities were
            true, and how far that scatters.
        calibrated: whether the ece is within what the reference explains, at the 5 % level.
        confidence: mean confidence of each bin, nan where it is empty, shape ``(bins,)``.
        frequency: share of right answers of each bin.
        count: samples of each bin.
    """

    accuracy: Estimate
    log_score: Estimate
    brier: Estimate
    ece: Estimate
    reference: Estimate
    calibrated: bool
    confidence: Tensor
    frequency: Tensor
    count: Tensor


def _mean(values: Tensor) -> Estimate:
    n = len(values)
    return Estimate(float(values.mean()), float(values.std() / n**0.5) if n > 1 else float("nan"))


def _errors(confidence: Tensor, right: Tensor, weight: Tensor, place: Tensor, bins: int) -> Tensor:
    """ECE of each row: ``right`` and ``weight`` are ``(rows, n)``, the rest ``(n,)``."""
    gap = weight * (right - confidence)
    sums = gap.new_zeros(len(gap), bins).index_add_(1, place, gap)
    return sums.abs().sum(1) / weight.sum(1)


@cites(GUO)
def calibration(
    probabilities: Tensor,
    y: Tensor,
    *,
    bins: int = 15,
    binning: Literal["width", "mass"] = "width",
    seed: int = 0,
) -> Calibration:
    r"""Log score, Brier score and expected calibration error, with error bars.

    Args:
        probabilities: of the classes, ``(n, classes)``, rows that sum to 1: ``predict(…).mean``, or a softmax.
        y: labels, ``(n,)``.
        bins: number of bins of the confidence.
        binning: ``"width"``: of equal width; ``"mass"``: with as many samples each.
        seed: of the bootstrap and of the reference.

    Returns:
        Calibration.

    Raises:
        ArgumentError: bins is not positive, or the binning is unknown.
        DataError: rows are no probabilities (logits?), or labels are out of range.
        ShapeError: shapes do not fit.

    Reference: Guo et al. (2017), eq. (3). Departure: the reference, without which a small test set looks uncalibrated.

    Example:
        >>> p = torch.full((1000, 2), 0.5)
        >>> p[:, 0], p[:, 1] = 0.9, 0.1
        >>> y = (torch.arange(1000) % 4 == 0).long()                     # right three times in four
        >>> found = calibration(p, y)
        >>> round(found.ece.value, 3), found.calibrated, found.reference.value < 0.02
        (0.15, False, True)
    """
    if probabilities.dim() != 2 or y.shape != probabilities.shape[:1] or not len(y):
        raise ShapeError(
            f"probabilities has shape {tuple(probabilities.shape)} and y {tuple(y.shape)}: give (n, classes) and (n,)"
        )
    if bins < 1 or binning not in ("width", "mass"):
        raise ArgumentError(f"bins={bins} must be positive, and binning={binning!r} 'width' or 'mass'")
    p = probabilities.detach().to(torch.float64)
    low, off = float(p.min()), float((p.sum(1) - 1).abs().max())
    rounding = torch.finfo(probabilities.dtype).eps if probabilities.is_floating_point() else 0.0
    if not (low >= -1e-6 and off < max(1e-3, 2 * rounding)):
        raise DataError(
            f"rows are no probabilities (smallest entry {low:.3g}, sums off by {off:.3g}): apply softmax to logits"
        )
    if y.is_floating_point() or int(y.min()) < 0 or int(y.max()) >= p.shape[1]:
        raise DataError(f"labels are not whole numbers in [0, {p.shape[1]})")
    y = y.long()
    confidence, guess = p.max(1)
    right = (guess == y).to(p)
    chosen = p.gather(1, y[:, None])[:, 0]
    brier = (p.square().sum(1) - 2 * chosen + 1).clamp_min(0)
    if binning == "width":
        place = (confidence * bins).long().clamp(0, bins - 1)
    else:
        place = torch.empty_like(y)
        place[confidence.argsort()] = torch.arange(len(y), device=y.device) * bins // len(y)
    generator = torch.Generator().manual_seed(seed)
    n = len(y)
    picks = torch.randint(n, (_DRAWS, n), generator=generator).to(p.device)
    weight = p.new_zeros(_DRAWS, n).scatter_add_(1, picks, torch.ones_like(picks, dtype=p.dtype))
    again = _errors(confidence, right.expand(_DRAWS, n), weight, place, bins)
    draws = torch.rand(_DRAWS, n, generator=generator, dtype=torch.float64).to(p.device)
    ones = torch.ones_like(weight)
    ideal = _errors(confidence, (draws < confidence).to(p), ones, place, bins)
    ece = float(_errors(confidence, right[None], ones[:1], place, bins))
    count = torch.bincount(place, minlength=bins)
    total = p.new_zeros(bins)
    return Calibration(
        accuracy=_mean(right),
        log_score=_mean(-chosen.log()),
        brier=_mean(brier),
        ece=Estimate(ece, float(again.std())),
        reference=Estimate(float(ideal.mean()), float(ideal.std())),
        calibrated=ece <= float(ideal.quantile(0.95)),
        confidence=total.index_add(0, place, confidence) / count,
        frequency=total.index_add(0, place, right) / count,
        count=count,
    )
