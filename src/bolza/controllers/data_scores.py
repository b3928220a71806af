r"""From scores of a few examples to a choice among many: normalise, carry over, keep, project.

A sweep of :func:`~bolza.controllers.data_values` scores a proxy of some thousand examples. A linear head on
features of the examples carries the scores over to all others; a share of them is kept, with Gumbel noise so that
the choice keeps some variety,

    keep the largest  s_n + τ ζ_n,   ζ_n ~ Gumbel(0, 1),

which for one example is a draw from softmax(s/τ), and for more is sampling from it without replacement.

Reference: Gu, Dong, Wang, Hao, Dong, Wei & Huang (2025), arXiv:2410.07064, section 2.3.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bolza.core.errors import ArgumentError, DataError, ShapeError
from bolza.core.reference import Reference, cites

__all__ = ["LinearScorer", "keep_best", "normalise_scores", "project_simplex"]

GU = Reference(
    "gu2025selection",
    "Gu, Yuxian and Dong, Li and Wang, Hongning and Hao, Yaru and Dong, Qingxiu and Wei, Furu and Huang, Minlie",
    "Data Selection via Optimal Control for Language Models",
    2025,
    "International Conference on Learning Representations",
    "2410.07064",
)


def project_simplex(v: Tensor, total: float = 1.0) -> Tensor:
    r"""Nearest point of the simplex {γ ≥ 0, Σγ = total}: γ = max(v − τ, 0) with the τ that makes the sum right.

    Args:
        v: any vector, shape ``(n,)``.
        total: what the weights sum to; positive.

    Returns:
        γ, shape ``(n,)``.

    Raises:
        ArgumentError: ``total`` is not positive.

    Reference: Held, Wolfe & Crowder (1974), *Validation of subgradient optimization*; by sorting, O(n log n).

    Example:
        >>> project_simplex(torch.tensor([0.5, 1.5, -1.0]))
        tensor([0., 1., 0.])
    """
    if not total > 0:
        raise ArgumentError(f"total={total} must be positive: the weights have to sum to it")
    u = v.sort(descending=True).values
    excess = (u.cumsum(0) - total) / torch.arange(1, len(u) + 1, dtype=v.dtype, device=v.device)
    support = int((u > excess).sum())
    return (v - excess[support - 1]).clamp_min(0)


def normalise_scores(scores: Tensor, clip: float = 3.0) -> Tensor:
    """Scores with mean 0 and variance 1, cut at ± ``clip``: only their order and spread mean something.

    Args:
        scores: shape ``(n,)``.
        clip: in standard deviations.

    Returns:
        Shape ``(n,)``; zeros if all scores are equal.

    Reference: Gu et al. (2025), arXiv:2410.07064, with its value of ``clip``.

    Example:
        >>> normalise_scores(torch.tensor([1.0, 2.0, 3.0]))
        tensor([-1.,  0.,  1.])
    """
    spread = scores.std() if len(scores) > 1 else scores.new_zeros(())
    centred = scores - scores.mean()
    tiny = torch.finfo(scores.dtype).eps * scores.abs().max()
    return (centred / spread).clamp(-clip, clip) if bool(spread > tiny) else torch.zeros_like(scores)


@cites(GU)
def keep_best(
    scores: Tensor,
    ratio: float,
    *,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Indices of the share of examples to keep: the largest s_n + τ ζ_n, ζ_n ~ Gumbel(0, 1).

    Args:
        scores: shape ``(n,)``; normalised ones give ``temperature`` a meaning.
        ratio: share to keep, ``0 < ratio <= 1``; at least one example is kept.
        temperature: τ; 0 keeps the best, larger values keep more variety. The paper takes 0.1.
        generator: source of ζ.

    Returns:
        Sorted int64 indices, ``round(ratio · n)`` of them.

    Raises:
        ArgumentError: ``ratio`` lies outside (0, 1], or τ is negative.

    Reference: Gu et al. (2025), arXiv:2410.07064, section 2.3.

    Example:
        >>> keep_best(torch.tensor([0.1, 3.0, 2.0, -1.0]), 0.5)
        tensor([1, 2])
    """
    if not 0 < ratio <= 1:
        raise ArgumentError(f"ratio={ratio} must lie in (0, 1]: it is the share that is kept")
    if not temperature >= 0:
        raise ArgumentError(f"temperature={temperature} must not be negative")
    keys = scores
    if temperature > 0:
        drawn = torch.empty(len(scores), dtype=torch.float64).exponential_(generator=generator)
        keys = scores.double() - temperature * drawn.log().to(
            scores.device
        )  # −log of an exponential is Gumbel
    count = max(1, round(ratio * len(scores)))
    return keys.topk(count).indices.sort().values


@cites(GU)
class LinearScorer:
    r"""Carry scores of a proxy over to new examples: ridge regression on features of an example.

    s(φ) = ⟨w, φ⟩ + b fitted to normalised scores; the penalty with the least leave-one-out error is taken.

    Args:
        features: φ of the proxy, shape ``(n, d)``: what a frozen network makes of an example, say. Where a label
            can be wrong they must see it, as the products of inputs and labels do.
        scores: of :func:`~bolza.controllers.data_values`, shape ``(n,)``.
        penalties: ridge penalties to choose among; seven decades around the mean square of a feature by default.

    Attributes:
        penalty: the one that was chosen.
        weight: w, shape ``(d,)``, for features as they are given.
        bias: b.

    Raises:
        ShapeError: features are not two-dimensional, or not as many as scores.
        DataError: they are not finite.

    Reference: Gu et al. (2025), arXiv:2410.07064, section 2.3: a linear head on mean-pooled states. Departure:
        the network below it stays as it is.

    Example:
        >>> phi = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> scorer = LinearScorer(phi, phi[:, 0])
        >>> bool(scorer(torch.tensor([[2.0, 0.0, 0.0]])) > scorer(torch.tensor([[-2.0, 0.0, 0.0]])))
        True
    """

    def __init__(self, features: Tensor, scores: Tensor, penalties: Sequence[float] | None = None) -> None:
        if features.ndim != 2 or scores.shape != features.shape[:1]:
            raise ShapeError(
                f"features has shape {tuple(features.shape)} and scores {tuple(scores.shape)}: give (n, d) and (n,)"
            )
        if not bool(features.isfinite().all() and scores.isfinite().all()):
            raise DataError("features or scores are not finite: drop the examples whose score is nan or inf")
        from sklearn.linear_model import RidgeCV

        phi, s = features.detach().double().cpu(), normalise_scores(scores.detach().double().cpu())
        mean = phi.mean(0)
        size = float((phi - mean).square().sum(0).mean()) or 1.0
        chosen = np.asarray(penalties) if penalties is not None else size * np.logspace(-4, 2, 13)
        model = RidgeCV(alphas=chosen).fit((phi - mean).numpy(), s.numpy())
        self.penalty = float(model.alpha_)
        self.weight = torch.as_tensor(model.coef_).to(features)
        self.bias = float(model.intercept_) - float(mean @ torch.as_tensor(model.coef_))

    def __call__(self, features: Tensor) -> Tensor:
        """Scores of new examples, shape ``(n,)``."""
        return features @ self.weight + self.bias
