r"""A weight of the loss, steered so that something measured keeps its set-point.

    e = y − r        where a larger weight lowers the measurement y (of a penalised quantity)
    e = r − y        where it raises it (the entropy of a policy over its temperature)
    w = PID(e)       or w = exp(PID(e)), so that it stays positive and moves by factors

The equilibrium does not depend on the gains: wherever it settles between its limits, y = r. So the weight found is the
multiplier of the constraint y = r.

Reference: Åström & Hägglund (2006), *Advanced PID Control*; the uses are those of Shao et al. (2020), Stooke et al.
(2020), and Haarnoja et al. (2018), *Soft Actor-Critic Algorithms and Applications*, arXiv:1812.05905, §5 (the entropy
temperature).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError, ShapeError
from bolza.core.history import History
from bolza.core.reference import Reference, cites
from bolza.ops.pid import PID

__all__ = ["SetPoint"]

ASTROM = Reference(
    "astrom2006pid",
    "Åström, Karl Johan and Hägglund, Tore",
    "Advanced PID Control",
    2006,
    venue="ISA",
)
_LARGEST_LOGARITHM = 50.0
Number = float | Tensor
Target = Number | Callable[[int], Number]


@cites(ASTROM)
class SetPoint:
    r"""Weight that keeps a measured quantity at its set-point.

    Call ``step`` with the measurement, once an update, and use the weight it returns in the loss. It carries no
    gradient. A measurement that is not finite counts as the last one that was.

    Args:
        target: the set-point r, in the units of the measurement: a number, one number a loop, or a function of the
            steps so far (see :func:`bolza.controllers.ramp`). It may be changed at any time.
        pid: the law; positive gains. Its ``low`` and ``high`` are the limits of the weight.
        raises: whether a larger weight raises the measurement.
        relative: divide the error by |r|, so that the gains do not depend on the units of the measurement.
        exponential: the law moves the logarithm of the weight; its limits are then those of the logarithm, ±50 where
            ``pid`` has none.
        average: mean of so many last measurements is what is controlled.
        initial: weight before the first step; that of ``pid.bias`` by default.

    Attributes:
        value: the weight in force.
        history: weight, measurement, set-point and parts of the law over the run.

    Raises:
        ArgumentError: a setting makes no sense.

    Reference: Åström & Hägglund (2006), *Advanced PID Control*.

    Example:
        >>> import math
        >>> temperature = SetPoint(0.5, PID(ki=0.2), raises=True, exponential=True, initial=1.0)
        >>> for _ in range(200):  # two states, one unit of energy apart
        ...     p = 1 / (1 + math.exp(1 / temperature.value))
        ...     entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
        ...     _ = temperature.step(entropy)
        >>> round(entropy, 6), round(temperature.value, 4)
        (0.5, 0.7204)
    """

    def __init__(
        self,
        target: Target,
        pid: PID,
        *,
        raises: bool = False,
        relative: bool = False,
        exponential: bool = False,
        average: int = 1,
        initial: Number | None = None,
    ) -> None:
        if not isinstance(pid, PID):
            raise ArgumentError(
                f"pid={pid!r} is no law: give a bolza.controllers.PID, for example PID(ki=0.01)"
            )
        if not isinstance(average, int) or average < 1:
            raise ArgumentError(f"average={average!r} must be a whole number of measurements, at least 1")
        if initial is not None and not bool(torch.isfinite(torch.as_tensor(initial)).all()):
            raise ArgumentError(f"initial={initial!r} must be finite: the weight starts from it")
        if exponential and initial is not None and not bool((torch.as_tensor(initial) > 0).all()):
            raise ArgumentError(f"initial={initial!r} must be positive: the law moves its logarithm")
        if not callable(target) and not bool(torch.isfinite(torch.as_tensor(target)).all()):
            raise ArgumentError(f"target={target!r} must be finite: it is what the measurement is held at")
        self.target = target
        self.pid = _bounded(pid) if exponential else pid
        self.raises, self.relative, self.exponential, self.average = raises, relative, exponential, average
        start = _log(initial) if exponential and initial is not None else initial
        self.state = self.pid.init(start)
        self.count = 0
        self.history = History()
        self._recent: list[Number] = []
        self._seen: tuple[Number, Number] = (math.nan, math.nan)  # measurement and set-point

    @property
    def value(self) -> Number:
        """The weight in force."""
        output = self.state["output"]
        return _exp(output) if self.exponential else output

    @property
    def set_point(self) -> Number:
        """The set-point of the next step."""
        return self.target(self.count) if callable(self.target) else self.target

    def step(self, measurement: Number) -> Number:
        """Measure, decide, and return the weight for the next loss.

        Args:
            measurement: y, a number or a scalar tensor, or a tensor with one entry a loop; detached.

        Returns:
            The weight: a number for a number or a scalar tensor, else a tensor on the measurement's device and of its
            dtype, float32 for half precision.

        Raises:
            ShapeError: the measurement does not have the shape of the loops before it.
            ArgumentError: the set-point is not finite, or it is zero and the error relative to it.
        """
        reading = self._finite(measurement)
        self.count += 1
        if reading is None:
            return self.value
        if isinstance(reading, Tensor):  # a state loaded from elsewhere follows the measurement
            self.state = _on(self.state, reading.device)
            self._recent = _on(self._recent, reading.device)
        y, error = self._error(reading)
        self.state, _ = self.pid.update(self.state, error, self._signal(y))
        if self.history.wants(self.count):
            self.history.add(self.count, self.log())
        return self.value

    def retune(self, **settings: Any) -> None:
        """Change settings of the law without a jump of the weight.

        Args:
            settings: fields of :class:`bolza.controllers.PID`, such as ``ki=0.1``.

        Example:
            >>> weight = SetPoint(1.0, PID(kp=1.0, ki=0.1))
            >>> before = [weight.step(3.0) for _ in range(4)][-1]
            >>> weight.retune(kp=5.0)
            >>> round(weight.step(3.0) - before, 12)  # the integral's own step, and no more
            0.2
        """
        pid = replace(self.pid, **settings)
        self.pid = _bounded(pid) if self.exponential else pid
        self._go_on_from(self.state["output"])

    def resume(self, value: Number) -> None:
        """Go on from a weight that was set by hand.

        Args:
            value: the weight that was in force meanwhile.
        """
        self._go_on_from(_log(value) if self.exponential else value)

    def log(self) -> dict[str, float]:
        """Weight, last measurement, set-point and integral; ``name[i]`` where there are several loops."""
        measured, wanted = self._seen
        parts = {
            "value": self.value,
            "measurement": measured,
            "target": wanted,
            "integral": self.state["integral"],
        }
        return {key: number for name, value in parts.items() for key, number in _entries(name, value)}

    def state_dict(self) -> dict[str, Any]:
        """Memory of the law, history, and the set-point unless it is a function; the gains are settings."""
        return {
            "count": self.count,
            "state": copy.deepcopy(self.state),
            "recent": copy.deepcopy(self._recent),
            "seen": list(copy.deepcopy(self._seen)),
            "target": None if callable(self.target) else copy.deepcopy(self.target),
            "history": self.history.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        kept = copy.deepcopy(dict(state_dict))
        self.count, self.state, self._recent = kept["count"], kept["state"], kept["recent"]
        self._seen = tuple(kept["seen"])
        if kept["target"] is not None:
            self.target = kept["target"]
        self.history.load_state_dict(kept["history"])

    def _go_on_from(self, output: Number) -> None:
        if not self._recent:
            self.state = self.pid.init(output)
            return
        y, error = self._error(None)
        self.state = self.pid.resume(self.state, output, error, self._signal(y))

    def _finite(self, measurement: Number) -> Number | None:
        """The measurement with its holes filled by the last one; None if there is nothing to fill them with."""
        last = self._recent[-1] if self._recent else None
        shape, before = (tuple(v.shape) if isinstance(v, Tensor) else () for v in (measurement, last))
        if last is not None and shape != before:
            raise ShapeError(
                f"measurement has shape {shape}, but the loops so far have {before}: give one entry a loop, always "
                "the same loops"
            )
        if not isinstance(measurement, Tensor) or measurement.ndim == 0:
            y = float(measurement.detach() if isinstance(measurement, Tensor) else measurement)
            return y if math.isfinite(y) else last
        y_t = measurement.detach()
        if y_t.dtype in (torch.float16, torch.bfloat16):
            y_t = y_t.float()  # an integral of small steps does not fit into half precision
        last = last.to(y_t.device) if isinstance(last, Tensor) else last
        good = y_t.isfinite()
        if bool(good.all()):
            return y_t.clone()
        return None if last is None else torch.where(good, y_t, last)

    def _error(self, reading: Number | None) -> tuple[Number, Number]:
        """What is controlled (a mean of the last readings), and its error."""
        if reading is not None:
            self._recent = [*self._recent, reading][-self.average :]
        y = sum(self._recent[1:], start=self._recent[0]) / len(self._recent)
        r = self.target
        if callable(r):
            r = r(self.count if reading is None else self.count - 1)
        if not bool(torch.isfinite(torch.as_tensor(r)).all()):
            raise ArgumentError(
                f"target={r!r} at step {self.count} must be finite: the integral would remember it"
            )
        if isinstance(r, Tensor) and isinstance(y, Tensor):
            r = r.to(y)
        self._seen = (self._recent[-1], r)
        if self.relative and not bool(torch.as_tensor(r != 0).all()):
            raise ArgumentError(
                f"target={r!r}: an error relative to a set-point of zero has no size; relative=False"
            )
        error = r - y if self.raises else y - r
        return y, error / _size(r) if self.relative else error

    def _signal(self, y: Number) -> Number:
        """What the derivative is taken of: the measurement, so that a jump of the set-point is none of it."""
        signed = -y if self.raises else y
        return signed / _size(self._seen[1]) if self.relative else signed


def _on(value: Any, device: torch.device) -> Any:
    """Plain data with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _on(part, device) for key, part in value.items()}
    return [_on(part, device) for part in value] if isinstance(value, list) else value


def _bounded(pid: PID) -> PID:
    """The law of a logarithm, with limits that its exponential fits between."""
    low = pid.low if isinstance(pid.low, Tensor) else max(pid.low, -_LARGEST_LOGARITHM)
    high = pid.high if isinstance(pid.high, Tensor) else min(pid.high, _LARGEST_LOGARITHM)
    return replace(pid, low=low, high=high)


def _size(value: Number) -> Number:
    return value.abs() if isinstance(value, Tensor) else abs(value)


def _log(value: Number) -> Number:
    return value.log() if isinstance(value, Tensor) else math.log(value)


def _exp(value: Number) -> Number:
    return value.exp() if isinstance(value, Tensor) else math.exp(value)


def _entries(name: str, value: Number) -> list[tuple[str, float]]:
    if not isinstance(value, Tensor):
        return [(name, float(value))]
    if value.numel() == 1:
        return [(name, float(value))]
    return [(f"{name}[{i}]", float(v)) for i, v in enumerate(value.flatten().tolist())]
