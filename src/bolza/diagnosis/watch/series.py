"""What is noted at every few steps, in bounded memory and at even spacing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Series"]


class Series:
    """Rows of numbers, one every ``stride`` steps; when there are too many, every second one goes.

    Rows that arrive on a device wait there and come over together.

    Args:
        columns: names of the numbers of a row; the first ones are known to the host, the others come as a tensor.
        capacity: rows kept at most.

    Attributes:
        stride: steps from row to row.
        steps: the step of each row.

    Example:
        >>> series = Series(["loss", "a"], capacity=4)
        >>> for step in range(1, 9):
        ...     if step % series.stride == 0:
        ...         series.add(step, [0.5], torch.tensor([float(step)]))
        >>> series.steps, series.stride, series["a"].tolist()
        ([2, 4, 6, 8], 2, [2.0, 4.0, 6.0, 8.0])
    """

    def __init__(self, columns: Sequence[str], capacity: int = 4096) -> None:
        self.columns = list(columns)
        self.capacity = capacity
        self.stride = 1
        self.steps: list[int] = []
        self._rows = torch.empty(64, len(self.columns), dtype=torch.float64)
        self._filled = 0
        self._waiting: list[tuple[Sequence[float | Tensor], Tensor]] = []

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def waiting(self) -> int:
        """Rows that have not come over yet."""
        return len(self._waiting)

    def add(self, step: int, host: Sequence[float | Tensor], row: Tensor) -> None:
        """Add the row of a step."""
        self._waiting.append((host, row))
        self.steps.append(step)
        if len(self.steps) > self.capacity:
            self.thin()

    def rows(self, after: int = 0) -> Tensor:
        """All rows of steps beyond ``after``: float64 ``(rows, columns)``."""
        if self._waiting:
            start, self._filled = self._filled, self._filled + len(self._waiting)
            while len(self._rows) < self._filled:
                self._rows = torch.cat([self._rows, torch.empty_like(self._rows)])
            place = self._rows[start : self._filled]
            host = [[float(value) for value in known] for known, _ in self._waiting]
            place[:, : len(host[0])] = torch.tensor(host, dtype=torch.float64)
            place[:, len(host[0]) :] = torch.stack([row for _, row in self._waiting]).cpu()
            self._waiting = []
        return self._rows[self._first(after) : self._filled]

    def steps_after(self, after: int) -> list[int]:
        """The steps of :meth:`rows`."""
        return self.steps[self._first(after) :]

    def __getitem__(self, column: str) -> Tensor:
        return self.rows()[:, self.columns.index(column)]

    def curves(self, points: int = 500) -> dict[str, list[float]]:
        """At most so many rows of loss, rate and norms, each as a list, with their steps."""
        rows = self.rows()
        every = max(1, math.ceil(len(rows) / points))
        rows, at = rows[::every], self.columns.index
        return {
            "step": [float(s) for s in self.steps[::every]],
            "loss": rows[:, at("loss")].tolist(),
            "lr": rows[:, at("lr")].tolist(),
            "gradient_norm": rows[:, at("gradient_norm2")].sqrt().tolist(),
            "parameter_norm": rows[:, at("parameter_norm2")].sqrt().tolist(),
        }

    def thin(self) -> None:
        """Keep every second row, and add half as many from now on."""
        self.stride *= 2
        kept = [i for i, step in enumerate(self.steps) if step % self.stride == 0]
        self._rows[: len(kept)] = self.rows()[kept]
        self._filled = len(kept)
        self.steps = [self.steps[i] for i in kept]

    def _first(self, after: int) -> int:
        low, high = 0, len(self.steps)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.steps[middle] <= after else (low, middle)
        return low

    def state_dict(self) -> dict[str, Any]:
        """Everything noted so far."""
        return {"stride": self.stride, "steps": list(self.steps), "rows": self.rows().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.stride, self.steps = state["stride"], list(state["steps"])
        rows = state["rows"].double().cpu()
        self._filled, self._waiting = len(rows), []
        self._rows = torch.cat([rows, rows.new_empty(64, len(self.columns))])
