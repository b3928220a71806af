r"""Certified radius: how far an input may be moved before the predicted class can change.

    ‖δ‖₂ < (f_y − max_{k≠y} f_k) / (√2 L)   ⇒   the class of x + δ is y,

for L the Lipschitz constant of the logits; for ‖δ‖_∞ the largest box on which interval bounds keep f_y on top.

Reference: Tsuzuku, Sato & Sugiyama (2018), *Lipschitz-Margin Training*, arXiv:1802.04034, for the margin;
Gowal et al. (2018), arXiv:1810.12715, for intervals.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bolza.core import Reference, cites
from bolza.core.errors import ArgumentError, ShapeError
from bolza.stability.interval import GOWAL, propagate
from bolza.stability.layers import Reading, read_network
from bolza.stability.lipschitz import LipschitzBound, Method, lipschitz

__all__ = ["CertifiedRadius", "certified_radius"]

TSUZUKU = Reference(
    "tsuzuku2018lipschitz",
    "Tsuzuku, Yusuke and Sato, Issei and Sugiyama, Masashi",
    "Lipschitz-Margin Training: Scalable Certification of Perturbation Invariance for Deep Neural Networks",
    2018,
    venue="NeurIPS",
    arxiv="1802.04034",
)

_HALVINGS = 24


@dataclass(frozen=True)
class CertifiedRadius:
    """Radii within which no perturbation changes the class.

    Attributes:
        radius: of each sample, shape ``(batch,)``, float64; 0 where the class is not ``y`` to begin with.
        margin: logit of the class less the largest other one.
        norm: ``"l2"`` or ``"linf"``.
        bound: Lipschitz constant that was used; None for ``"linf"``.
    """

    radius: Tensor
    margin: Tensor
    norm: str
    bound: LipschitzBound | None = None

    def accuracy(self, eps: float) -> float:
        """Share of samples that are classified right whatever perturbation of size ``eps`` is added."""
        safe = self.radius > eps if eps > 0 else self.margin > 0
        return float(safe.double().mean())


@cites(TSUZUKU, GOWAL)
def certified_radius(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    *,
    norm: Literal["l2", "linf"] = "l2",
    method: Method = "recursive",
    bound: LipschitzBound | float | None = None,
) -> CertifiedRadius:
    r"""Radius around each input within which the class provably stays.

    The radius is a guarantee, not an estimate of the distance to the decision border, which may be much larger. It
    holds for the network in evaluation mode and real arithmetic, and for the inputs as the network takes them: scale
    it by the standard deviation if the data are standardised.

    Args:
        model: a classifier that returns logits, shape ``(batch, classes)``; not changed.
        x: inputs, samples first.
        y: classes that are to stay, shape ``(batch,)``; the predicted ones by default.
        norm: ``"l2"``: margin over √2 L. ``"linf"``: interval bounds, by bisection for all samples at once.
        method: of :func:`bolza.stability.lipschitz`.
        bound: a Lipschitz constant that is known already.

    Returns:
        The radii.

    Raises:
        ArgumentError: an unknown norm, or a bound that is not positive.
        ShapeError: the outputs are not ``(batch, classes)`` with at least two classes, or ``y`` does not fit.
        UnsupportedError: an operation that is not covered; the message names it.

    Example:
        >>> net = nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = net.weight.copy_(torch.eye(2))
        >>> found = certified_radius(net, torch.tensor([[1.0, 0.0]]))
        >>> round(float(found.radius), 6)     # the distance to the border x₁ = x₂
        0.707107
    """
    if norm not in ("l2", "linf"):
        raise ArgumentError(f"norm={norm!r} is unknown: choose 'l2' or 'linf'")
    reading = read_network(model, x)
    with torch.no_grad():
        logits = reading.module(reading.example.clone())
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ShapeError(
            f"the model returns shape {tuple(logits.shape)}: it must be (batch, classes), two classes or more"
        )
    if y is None:
        y = logits.argmax(1)
    y = torch.as_tensor(y).to(logits.device)
    if y.shape != logits.shape[:1] or y.is_floating_point():
        raise ShapeError(f"y has shape {tuple(y.shape)} and dtype {y.dtype}: give one class number a sample")
    y = y.long()
    if not bool(((y >= 0) & (y < logits.shape[1])).all()):
        raise ArgumentError(
            f"y runs from {int(y.min())} to {int(y.max())}: classes are 0 to {logits.shape[1] - 1}"
        )
    margin = _margin(logits, logits, y)
    if norm == "linf":
        with torch.no_grad():
            return CertifiedRadius(_largest_box(reading, y, margin), margin, norm)
    if bound is None:
        bound = lipschitz(model, x, method)
    constant = float(bound)
    if not constant >= 0 or not math.isfinite(constant):
        raise ArgumentError(f"bound is {constant}: give a finite Lipschitz constant")
    found = bound if isinstance(bound, LipschitzBound) else None
    radius = margin.clamp_min(0) / (math.sqrt(2) * max(constant, 1e-300))
    return CertifiedRadius(radius, margin, norm, found)


def _margin(low: Tensor, high: Tensor, y: Tensor) -> Tensor:
    """Least value of the logit of y less the largest value of another one."""
    others = high.scatter(1, y[:, None], -torch.inf).amax(1)
    return low.gather(1, y[:, None])[:, 0] - others


def _largest_box(reading: Reading, y: Tensor, margin: Tensor) -> Tensor:
    x = reading.example
    ones = (1,) * (x.ndim - 1)

    def holds(eps: Tensor) -> Tensor:
        wide = eps.reshape(-1, *ones)
        low, high = propagate(reading, x - wide, x + wide)[reading.end]
        return (_margin(low, high, y) > 0) & (margin > 0)

    safe = torch.zeros_like(margin)
    eps = torch.full_like(margin, 1e-6)
    for _ in range(40):  # grow until every box fails
        good = holds(eps)
        safe = torch.where(good, eps, safe)
        if not bool(good.any()):
            break
        eps = torch.where(good, 4 * eps, eps)
    unsafe = torch.where(safe > 0, 4 * safe, eps)
    for _ in range(_HALVINGS):
        middle = (safe + unsafe) / 2
        good = holds(middle)
        safe, unsafe = torch.where(good, middle, safe), torch.where(good, unsafe, middle)
    return safe
