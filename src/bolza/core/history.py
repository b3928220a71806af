"""Readings over the steps of a run, kept in bounded room."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["History"]

_POINTS = 1000


@dataclass
class History:
    """Readings over the steps of a run, at most a thousand of each: when full, every second one is dropped.

    Attributes:
        steps: steps at which the readings were taken.
        values: one list a reading, as long as ``steps``; nan where a reading was not there yet.
        stride: steps between two readings now; doubled whenever the room is full.

    Example:
        >>> history = History()
        >>> for step in range(1, 2500):
        ...     if history.wants(step):
        ...         history.add(step, {"lr": 1 / step})
        >>> len(history.steps), history.steps[:3], history.stride
        (624, [4, 8, 12], 4)
    """

    steps: list[int] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)
    stride: int = 1

    def wants(self, step: int) -> bool:
        """Whether a reading at this step would be kept: ask before computing one that costs something."""
        return step % self.stride == 0

    def add(self, step: int, readings: Mapping[str, float]) -> None:
        """Keep the readings of a step."""
        if len(self.steps) >= _POINTS:
            self.stride *= 2
            kept = [i for i, s in enumerate(self.steps) if s % self.stride == 0]
            self.steps = [self.steps[i] for i in kept]
            self.values = {name: [values[i] for i in kept] for name, values in self.values.items()}
            if not self.wants(step):
                return
        for name in readings:
            if name not in self.values:
                self.values[name] = [math.nan] * len(self.steps)
        self.steps.append(step)
        for name, values in self.values.items():
            values.append(float(readings.get(name, math.nan)))

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "steps": list(self.steps),
            "values": {k: list(v) for k, v in self.values.items()},
            "stride": self.stride,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.steps, self.stride = list(state["steps"]), state["stride"]
        self.values = {name: list(values) for name, values in state["values"].items()}
