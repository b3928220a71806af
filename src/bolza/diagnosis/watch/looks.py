"""The tests on what was noted: at growing intervals, each on the later half of the run at its present rate."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from bolza.diagnosis.watch import words
from bolza.diagnosis.watch.record import Event, Kind
from bolza.diagnosis.watch.series import Series
from bolza.diagnosis.watch.significance import Balance, balance, drift, drift_limit, level_of_look
from bolza.ops.errors import DataError
from bolza.sde import area_rate
from bolza.sde.tails import tail_report

__all__ = ["Found", "Looks"]

_FIRST = 400  # steps at one rate before the first look
_GROWTH = 1.3  # from one look to the next
_ROWS = 40  # rows that a window needs: 20 blocks of 2
_DRAWS = 128  # differences of gradients that the tests of tails need
_STATIONARY = 0.05  # a stationary run is not called so at this share of the looks
_MOVED = 0.001  # and once called so, no longer at this one


@dataclass
class Found:
    """What a look found.

    Attributes:
        readings: numbers by test.
        events: an event by kind where the test says so, None where it says no; kinds that were not tested are absent.
    """

    readings: dict[str, dict[str, Any]] = field(default_factory=dict)
    events: dict[Kind, Event | None] = field(default_factory=dict)


class Looks:
    """When to look, and what is seen.

    Args:
        level: probability of a false alarm of loops, and of heavy tails, over all looks of a run.

    Example:
        >>> looks = Looks(level=0.01)
        >>> looks.note_rate(1, 0.1), looks.due(399, 0), looks.due(400, 0)
        (0, False, True)
    """

    def __init__(self, level: float) -> None:
        self.level = level
        self.taken = 0
        self.rate: float | None = None
        self.since = 0
        self.next = _FIRST
        self.alarms = 0
        self.next_alarm = _FIRST

    def note_rate(self, step: int, lr: float) -> int:
        """Take note of the learning rate; return the step of its last change."""
        if self.rate is not None and lr != self.rate:
            self.since, self.next, self.next_alarm = step, _FIRST, _FIRST
        self.rate = lr
        return self.since

    def due(self, step: int, since: int) -> bool:
        """Whether it is time for a look."""
        return step - since >= self.next

    def take(
        self,
        series: Series,
        step: int,
        since: int,
        lasting: Collection[str] = (),
        momentum: float | None = None,
    ) -> Found:
        """Look at the later half of what was noted after ``since``.

        Args:
            series: what was noted.
            step: of the run.
            since: step of the last change of its settings.
            lasting: kinds of events that hold. It takes clear evidence to end one: a drift that chance makes once in a
                thousand looks, noise that finite variance explains with p > 0.05.
            momentum: μ, where the optimizer is SGD or heavy ball: both sides of the identity are told.
        """
        self.next = max(self.next, math.ceil(_GROWTH * (step - since)))
        start = since + (step - since) // 2
        rows, found = series.rows(after=start), Found()
        if len(rows) < _ROWS:
            return found
        self.taken += 1
        at = {name: i for i, name in enumerate(series.columns)}
        at_rest = "stationary" in lasting
        sides = None
        if momentum is not None and "theta_gradient" in at:
            rate, pull, turn, square = (
                rows[:, at[name]] for name in ("lr", "theta_gradient", "velocity_gradient", "velocity_norm2")
            )
            sides = balance(rate, pull, turn, square, momentum)
        self._drift(rows[:, at["parameter_norm2"]], rows[:, at["loss"]], start, step, at_rest, sides, found)
        if step - since < self.next_alarm:  # alarms are tested when there is twice as much to go by
            return found
        self.next_alarm = 2 * (step - since)
        self.alarms += 1
        level = level_of_look(self.level, self.alarms)
        places = [i for name, i in at.items() if name.startswith("x")]
        if len(places) > 1:
            self._loops(rows[:, places], series.stride, level, step, found)
        # tails need no stationary window, but many draws
        coordinates = [i for name, i in at.items() if name.startswith("g") and name[1:].isdigit()]
        self._tails(series.rows(after=since)[:, coordinates], level, step, "heavy-tailed" in lasting, found)
        return found

    def _drift(
        self,
        norm: Tensor,
        loss: Tensor,
        start: int,
        step: int,
        at_rest: bool,
        sides: Balance | None,
        found: Found,
    ) -> None:
        known = bool(loss.isfinite().all())
        quantities = torch.stack([norm, loss]) if known else norm[None]
        if not bool(quantities.isfinite().all()):
            return
        moved = drift(quantities)
        limit = drift_limit(_STATIONARY, len(quantities))
        z = moved.z.tolist()
        found.readings["drift"] = {
            "since": start,
            "z_norm": z[0],
            "z_loss": z[1] if known else None,
            "limit": limit,
            "loss_change": float(moved.change[1]) if known else None,
            "loss_change_error": float(moved.error[1]) if known else None,
            "balance": None if sides is None else asdict(sides),
        }
        bound = drift_limit(_MOVED, len(quantities)) if at_rest else limit
        still = all(abs(value) < bound for value in z)
        seen = limit * float(moved.error[1]) if known else None
        level_loss = known and abs(z[1]) < limit
        found.events["stationary"] = (
            words.stationary(step, start, z[0], z[1] if known else None, limit, _STATIONARY, seen, sides)
            if still
            else None
        )
        found.events["plateau"] = (
            words.plateau(
                step,
                start,
                float(moved.change[1]),
                float(moved.error[1]),
                float(moved.mean[1]),
                z[1],
                limit,
            )
            if level_loss and not still
            else None
        )

    def _loops(self, path: Tensor, stride: int, level: float, step: int, found: Found) -> None:
        moving = path[:, path.std(0) > 0]
        if moving.shape[1] < 2 or not bool(moving.isfinite().all()):
            return
        area = area_rate(moving, dt=float(stride))
        omega = area.frequency
        loops = area.p_value < level and area.settled
        found.readings["loops"] = {
            "z": area.z,
            "p_value": area.p_value,
            "level": level,
            "frequency": omega.value,
            "frequency_error": omega.error,
            "settled": area.settled,
        }
        found.events["loops"] = (
            words.loops(step, area.z, area.p_value, omega.value, omega.error) if loops else None
        )

    def _tails(self, gradients: Tensor, level: float, step: int, lasts: bool, found: Found) -> None:
        """Differences of successive gradients: symmetric, of the same tail index, and without the mean gradient."""
        pairs = gradients[: len(gradients) // 2 * 2].unflatten(0, (-1, 2))
        deviations = pairs[:, 1] - pairs[:, 0]
        if len(deviations) < _DRAWS or not bool(deviations.isfinite().all()):
            return
        try:
            report = tail_report(deviations, 0, centre="none", level=level)
        except DataError:  # no coordinate varies: nothing is trained, or every unit is dead
            return
        found.readings["tails"] = {
            "verdict": report.verdict,
            "index": report.index,
            "error": report.error,
            "surrogate": report.surrogate,
            "of_sums": report.mixture.index,
            "of_sums_error": report.mixture.error,
            "p_value": report.mixture.p_value,
            "level": level,
            "draws": len(deviations),
            "coordinates": report.mixture.coordinates,
        }
        if report.heavy or (not lasts or report.mixture.p_value > 0.05):
            found.events["heavy-tailed"] = words.heavy(step, report) if report.heavy else None

    def state_dict(self) -> dict[str, Any]:
        """When the next look is due."""
        return {
            "taken": self.taken,
            "rate": self.rate,
            "since": self.since,
            "next": self.next,
            "alarms": self.alarms,
            "next_alarm": self.next_alarm,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for name, value in state.items():
            setattr(self, name, value)
