"""What a trainability map found: accuracies over seeds, points and depths, and the depths up to which they hold."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["TrainabilityMap"]


@dataclass(frozen=True)
class TrainabilityMap:
    """What :func:`bolza.training.trainability_map` found; arrays have the shape ``(seeds, points, depths)``.

    Args:
        weight_vars: σ_w² of each point, ``(points,)``.
        bias_vars: σ_b² of each point, ``(points,)``.
        depths: numbers of linear layers, as they were asked for.
        train_accuracy: share of right answers on the training set at the end; nan where it was not measured.
        train_loss: loss there; inf where training diverged.
        test_accuracy: share of right answers on the test set.
        test_loss: loss there.
        diverged: whether the parameters stopped being finite.
        status: ``"finished"`` or ``"interrupted"``; in an interrupted map depths that were not reached are nan.
        settings: width, steps, lr and the other settings.
        seconds: time of each depth, ``(depths,)``; that of an earlier call where it was read from a file.

    Example:
        >>> import torch
        >>> acc = torch.tensor([[[0.9, 0.5, 0.1]]], dtype=torch.float64)
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> TrainabilityMap(one, one, (10, 20, 30), acc, acc, acc, acc, acc > 1).largest_depth(0.3)
        tensor([[25.]], dtype=torch.float64)
    """

    weight_vars: Tensor
    bias_vars: Tensor
    depths: tuple[int, ...]
    train_accuracy: Tensor
    train_loss: Tensor
    test_accuracy: Tensor
    test_loss: Tensor
    diverged: Tensor
    status: str = "finished"
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: Tensor = field(default_factory=lambda: torch.empty(0))

    def accuracy(self) -> tuple[Tensor, Tensor]:
        """Training accuracy averaged over seeds and its standard error, each ``(points, depths)``.

        The error is nan with one seed.
        """
        seeds = len(self.train_accuracy)
        error = self.train_accuracy.std(0) if seeds > 1 else torch.full_like(self.train_accuracy[0], math.nan)
        return self.train_accuracy.mean(0), error / seeds**0.5

    def largest_depth(self, threshold: float = 0.3) -> Tensor:
        """Depth at which the training accuracy first falls to ``threshold``, linear between depths.

        Args:
            threshold: accuracy of a network that counts as trained.

        Returns:
            ``(seeds, points)``, float64; nan where it lies below the first depth or beyond the last.
        """
        order = sorted(range(len(self.depths)), key=self.depths.__getitem__)
        depths = [self.depths[i] for i in order]
        limits = [
            [_crossing(column, depths, threshold) for column in seed]
            for seed in self.train_accuracy[..., order].tolist()
        ]
        return torch.tensor(limits, dtype=torch.float64)

    def depth_over(self, scale: Tensor, threshold: float = 0.3) -> Tensor:
        """The largest trainable depth in units of a depth scale, such as ξ_c of each point.

        Args:
            scale: ``(points,)``.
            threshold: as in :meth:`largest_depth`.

        Returns:
            ``(seeds, points)``; nan where the depth is, or where the scale is infinite.
        """
        finite = torch.where(scale.isfinite(), scale.double(), math.nan)
        return self.largest_depth(threshold) / finite


def _crossing(accuracy: list[float], depths: list[int], threshold: float) -> float:
    for i in range(1, len(depths)):
        high, low = accuracy[i - 1], accuracy[i]
        if not high >= threshold:
            return math.nan
        if low < threshold:
            return depths[i - 1] + (high - threshold) / (high - low) * (depths[i] - depths[i - 1])
    return math.nan
