"""Accuracy over a grid of learning rates as a few numbers: area, best, and the width of the plateau."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

POINTS = 0.02  # of accuracy: what counts as no loss


def area(curve: Sequence[float]) -> float:
    """Mean of a curve over its range: trapezia between points at equal distances.

    >>> area([0.0, 1.0, 1.0])
    0.75
    """
    return (sum(curve) - (curve[0] + curve[-1]) / 2) / (len(curve) - 1)


def width(curve: Sequence[float], level: float, spacing: float = 0.5) -> tuple[float, bool]:
    """Longest stretch on which a curve, linear between its points, is not below ``level``; whether it meets an end.

    >>> width([0.0, 1.0, 1.0, 0.0], 0.5)
    (1.0, False)
    >>> width([1.0, 1.0, 0.0], 0.5)
    (0.75, True)
    """
    best, edge, start = 0.0, False, None
    for k, value in enumerate(curve):
        if value >= level and start is None:
            before = curve[k - 1] if k else value
            start = k - (value - level) / (value - before) if value > before else float(k)
        if start is not None and (value < level or k == len(curve) - 1):
            before = curve[k - 1]
            stop = float(k) if value >= level else k - 1 + (before - level) / (before - value)
            if stop - start > best:
                best, edge = stop - start, start == 0 or value >= level
            start = None if value < level else start
    return best * spacing, edge


@dataclass(frozen=True)
class Summary:
    """Accuracy over the rates of one method on one task.

    Attributes:
        mean: mean over the seeds at each rate.
        deviation: standard deviation over the seeds at each rate.
        best: largest mean.
        best_rate: its rate.
        middle: mean at the middle of the grid; for the peers, at their default.
        area: mean accuracy over the five decades.
        area_error: standard error of it, over the seeds.
        own: decades within two points of the method's own best.
        own_open: whether they reach an end of the grid.
        of_all: decades within two points of the best of all methods on the task.
        of_all_open: whether they reach an end of the grid.
        extra: largest share of gradients spent beside the steps.
        failed: what a run raised, if one did.
        versions: versions of the controller's program that made the cells.
    """

    mean: list[float]
    deviation: list[float]
    best: float
    best_rate: float
    middle: float
    area: float
    area_error: float
    own: float
    own_open: bool
    of_all: float
    of_all_open: bool
    extra: float
    failed: str = ""
    versions: int = 1

    def row(self) -> dict[str, Any]:
        """Rounded, for a record."""
        return {
            k: [round(v, 4) for v in value]
            if isinstance(value, list)
            else round(value, 5)
            if isinstance(value, float)
            else value
            for k, value in asdict(self).items()
        }


def summarise(cells: Sequence[Sequence[dict[str, Any]]], best_of_all: float) -> Summary:
    """Cells by rate and seed → the figures of a method on a task.

    Args:
        cells: one row a rate, ascending; one cell a seed.
        best_of_all: best mean accuracy of any method on the task.
    """
    accuracy = [[cell["accuracy"] for cell in row] for row in cells]
    mean = [statistics.mean(row) for row in accuracy]
    areas = [area(curve) for curve in zip(*accuracy, strict=True)]
    top = max(range(len(mean)), key=mean.__getitem__)
    own, own_open = width(mean, mean[top] - POINTS)
    of_all, of_all_open = width(mean, best_of_all - POINTS)
    every = [cell for row in cells for cell in row]
    several = len(areas) > 1
    return Summary(
        mean,
        [statistics.stdev(row) if several else 0.0 for row in accuracy],
        mean[top],
        cells[top][0]["key"]["rate"],
        mean[len(mean) // 2],
        statistics.mean(areas),
        statistics.stdev(areas) / len(areas) ** 0.5 if several else 0.0,
        own,
        own_open,
        of_all,
        of_all_open,
        max(cell["extra_gradients"] / cell["budget"] for cell in every),
        next((cell["end"] for cell in every if cell["end"].startswith("failed")), ""),
        len({cell.get("source", "") for cell in every}),
    )
