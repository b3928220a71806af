r"""One proportional–integral–derivative law, in its positional and its incremental form.

    p ← s_p p + (1 − s_p) φ(e)                                       the error, smoothed
    I ← ℓ I + K_i e                                                  its integral, with a leak
    d ← S_t − S_{t−n},   S ← s_d S + (1 − s_d) y                     filtered change over n steps
    u = clip(u_0 + K_p p + I + K_d d, low, high)                     positional
    u ← clip(u + K_p Δp + K_i e + K_d Δd, low, high)                 incremental

Here e is positive where the output has to rise, y is the error itself or the measurement behind it, and φ the
identity or the logistic function. The law is pure: its state is a dictionary of numbers, tensors and lists. Errors,
gains and limits may be numbers or tensors, one entry a loop, and the loops do not know each other.

Reference: Åström & Hägglund (2006), *Advanced PID Control*, chapters 2 and 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bolza.ops.errors import ArgumentError

__all__ = ["PID", "AntiWindup", "ramp"]

AntiWindup = Literal["both", "conditional", "clamp", "none", "latching"]
_WINDUP = ("both", "conditional", "clamp", "none", "latching")
_FORMS = ("positional", "incremental")
Number = float | Tensor
State = dict[str, Any]


@dataclass(frozen=True, eq=False)
class PID:
    r"""Proportional, integral and derivative action on an error, with limits and without windup.

    Positional: u = clip(u_0 + K_p p + I + K_d d). Incremental: the same changes added to the last output, which is all
    the memory there is. Without limits, leak and smoothing the two are the same law.

    Args:
        kp: K_p, output per unit of error.
        ki: K_i, output per unit of error and step.
        kd: K_d, output per change of one unit.
        form: ``"positional"`` or ``"incremental"``.
        low: least output.
        high: greatest output.
        bias: u_0, output of the untouched controller.
        leak: ℓ in (0, 1], what stays of the integral from one step to the next; positional form only.
        smooth_p: memory s_p in [0, 1) of the moving average of the proportional term; starts at the first error.
        smooth_d: memory s_d in [0, 1) of the moving average whose change is the derivative.
        delay: n, steps over which the change is taken; it is not divided by n.
        one_sided: the derivative acts only where the signal rises.
        squash: φ is the logistic function, so that the proportional term is bounded by K_p; it cannot overflow.
        scale: the error is divided by it: gains found for one unit serve for another.
        anti_windup: what happens to the integral at a limit. ``"conditional"``: its step ends where the output meets
            the limit; ``"clamp"``: the integral itself (incremental: the remembered output) does not leave the limits;
            ``"both"``; ``"none"``; ``"latching"``: below ``low`` nothing is integrated, not even upwards, a flaw of
            a published controller that is here to be shown.

    Raises:
        ArgumentError: a setting is out of its range.

    Reference: Åström & Hägglund (2006), *Advanced PID Control*, §3.5 on windup. Departures: no derivative on the first
    step, where nothing has changed yet; the time step is 1, so that K_i and K_d are per step.

    Example:
        >>> pid = PID(kp=1.0, ki=0.5, low=0.0, high=2.0)
        >>> state = pid.init()
        >>> for error in (1.0, 1.0, 1.0):
        ...     state, output = pid.update(state, error)
        >>> output
        2.0
        >>> pid.update(state, -1.0)[1]  # leaves the limit at once
        0.0
    """

    kp: Number = 0.0
    ki: Number = 0.0
    kd: Number = 0.0
    form: Literal["positional", "incremental"] = "positional"
    low: Number = -math.inf
    high: Number = math.inf
    bias: Number = 0.0
    leak: float = 1.0
    smooth_p: float = 0.0
    smooth_d: float = 0.0
    delay: int = 1
    one_sided: bool = False
    squash: bool = False
    scale: Number = 1.0
    anti_windup: AntiWindup = "both"

    def __post_init__(self) -> None:
        for name in ("kp", "ki", "kd", "bias", "scale"):
            if not _all(torch.isfinite, getattr(self, name)):
                raise ArgumentError(f"{name}={getattr(self, name)!r} must be finite")
        if not _all(lambda scale: scale > 0, self.scale):
            raise ArgumentError(f"scale={self.scale!r} must be positive: the error is divided by it")
        if self.form not in _FORMS:
            raise ArgumentError(f"form={self.form!r} is unknown: choose 'positional' or 'incremental'")
        if self.anti_windup not in _WINDUP:
            raise ArgumentError(
                f"anti_windup={self.anti_windup!r} is unknown: choose one of {', '.join(_WINDUP)}"
            )
        if self.anti_windup == "latching" and self.form == "positional":
            raise ArgumentError("anti_windup='latching' belongs to form='incremental': choose 'both'")
        if not bool(torch.all(torch.as_tensor(self.low) <= torch.as_tensor(self.high))):
            raise ArgumentError(f"low={self.low!r} lies above high={self.high!r}: swap them")
        if not 0 < self.leak <= 1:
            raise ArgumentError(f"leak={self.leak!r} must lie in (0, 1]; 1 keeps the whole integral")
        if self.leak != 1 and self.form == "incremental":
            raise ArgumentError(f"leak={self.leak!r} needs form='positional': increments keep no integral")
        for name in ("smooth_p", "smooth_d"):
            if not 0 <= getattr(self, name) < 1:
                raise ArgumentError(f"{name}={getattr(self, name)!r} must lie in [0, 1); 0 does not smooth")
        if not isinstance(self.delay, int) or self.delay < 1:
            raise ArgumentError(f"delay={self.delay!r} must be a whole number of steps, at least 1")

    def init(self, output: Number | None = None) -> State:
        """State before the first step.

        Args:
            output: output to start from at zero error, brought between the limits; ``bias`` by default.

        Returns:
            A dictionary of plain data.

        Example:
            >>> PID(ki=0.1, bias=1.0).init(3.0)["integral"]
            2.0
        """
        start = _clip(self.bias if output is None else _plain(output), self.low, self.high)
        memory = start if self.form == "incremental" else start - self.bias
        return {"step": 0, "integral": memory, "p": None, "d": 0.0, "past": [], "output": start}

    def update(self, state: State, error: Number, signal: Number | None = None) -> tuple[State, Number]:
        """New state and output after one error.

        Args:
            state: of :meth:`init` or of the last call; it is left as it is.
            error: e, positive where the output has to rise; number or tensor, detached; finite, as the integral
                remembers what is not (:class:`bolza.controllers.SetPoint` leaves it out).
            signal: what the derivative is taken of, e by default. The measurement itself spares the derivative the
                jumps of the set-point.

        Returns:
            The new state, and the output: a number if everything is one, else a tensor.

        Example:
            >>> state, output = PID(kp=2.0).update(PID(kp=2.0).init(), torch.tensor([1.0, -1.0]))
            >>> output
            tensor([ 2., -2.])
        """
        e = _plain(error) / self.scale
        p = _smoothed(state["p"], self._shaped(e), self.smooth_p)
        past = state["past"]
        y = e if signal is None else _plain(signal) / self.scale
        s = _smoothed(past[-1] if past else None, y, self.smooth_d)
        d = s - past[0] if past else 0.0 * s
        if self.one_sided:
            d = _clip(d, 0.0, math.inf)
        moved = self._positional if self.form == "positional" else self._incremental
        integral, output = moved(state, e, p, d)
        return {
            "step": state["step"] + 1,
            "integral": integral,
            "p": p,
            "d": d,
            "past": [*past, s][-self.delay :],
            "output": output,
        }, output

    def resume(self, state: State, output: Number, error: Number, signal: Number | None = None) -> State:
        """State from which the law goes on without a jump, after other gains or a time by hand.

        Args:
            state: the state so far.
            output: output in force now, brought between the limits: what lies beyond would have to be unwound.
            error: the present error.
            signal: as in :meth:`update`.

        Returns:
            A state whose next output, at the same error, is ``output`` plus one step K_i e of the integral.

        Example:
            >>> stronger = PID(kp=5.0, ki=0.1)
            >>> state = stronger.resume(stronger.init(), output=1.0, error=2.0)
            >>> round(stronger.update(state, 2.0)[1], 12)
            1.2
        """
        e, u = _plain(error) / self.scale, _clip(_plain(output), self.low, self.high)
        p = self._shaped(e)
        y = e if signal is None else _plain(signal) / self.scale
        memory = u if self.form == "incremental" else u - self.bias - self.kp * p
        return {"step": state["step"], "integral": memory, "p": p, "d": 0.0 * e, "past": [y], "output": u}

    @property
    def _unlimited(self) -> bool:
        if isinstance(self.low, Tensor) or isinstance(self.high, Tensor):
            return False
        return self.low == -math.inf and self.high == math.inf

    def _shaped(self, e: Number) -> Number:
        return 0.5 * (1 + _tanh(e / 2)) if self.squash else e

    def _positional(self, state: State, e: Number, p: Number, d: Number) -> tuple[Number, Number]:
        kept, push = self.leak * state["integral"], self.ki * e
        rest = self.bias + self.kp * p + self.kd * d
        if self.anti_windup in ("both", "conditional"):
            push = self._up_to_the_limit(rest + kept, push)
        integral = kept + push
        if self.anti_windup in ("both", "clamp") and not self._unlimited:
            # no step leads out of the limits; an integral resumed from outside may come back slowly
            least, most = self.low - self.bias, self.high - self.bias
            integral = _clip(integral, _least(least, kept), _most(most, kept))
        return integral, _clip(rest + integral, self.low, self.high)

    def _incremental(self, state: State, e: Number, p: Number, d: Number) -> tuple[Number, Number]:
        u, push = state["integral"], self.ki * e
        change = self.kd * (d - state["d"])
        if state["p"] is not None:
            change = change + self.kp * (p - state["p"])
        if self.anti_windup == "latching":
            push = _zero_where(u < self.low, push)
        elif self.anti_windup in ("both", "conditional"):
            push = self._up_to_the_limit(u + change, push)
        u = u + change + push
        output = _clip(u, self.low, self.high)
        return (output if self.anti_windup in ("both", "clamp") else u), output

    def _up_to_the_limit(self, u: Number, push: Number) -> Number:
        """The step of the integral, no further than where the output, u without it, meets its limit."""
        if self._unlimited:
            return push
        return _clip(push, _least(self.low - u, 0.0), _most(self.high - u, 0.0))


def ramp(step: int, start: float, stop: float, rise: float, every: int = 1) -> float:
    """Set-point that climbs (or falls) from ``start`` to ``stop`` by ``rise`` every so many steps.

    Args:
        step: steps so far, from 0.
        start: first set-point.
        stop: last set-point.
        rise: size of a stair, positive.
        every: steps on a stair.

    Returns:
        The set-point.

    Raises:
        ArgumentError: ``rise`` is not positive, or ``every`` less than 1.

    Reference: Shao et al. (2020), §5.2: from 0.5 by 0.15 every 5000 steps.

    Example:
        >>> [round(ramp(step, 0.5, 1.0, 0.2, every=10), 2) for step in (0, 9, 10, 20, 30, 99)]
        [0.5, 0.5, 0.7, 0.9, 1.0, 1.0]
    """
    if not rise > 0 or every < 1:
        raise ArgumentError(f"rise={rise!r} must be positive and every={every!r} at least 1")
    climbed = rise * (step // every)
    return min(stop, start + climbed) if stop >= start else max(stop, start - climbed)


def _plain(value: Number) -> Number:
    return value.detach() if isinstance(value, Tensor) else float(value)


def _all(test: Any, value: Number) -> bool:
    return bool(torch.all(test(torch.as_tensor(value, dtype=torch.float64))))


def _tanh(value: Number) -> Number:
    return torch.tanh(value) if isinstance(value, Tensor) else math.tanh(value)


def _smoothed(before: Number | None, now: Number, memory: float) -> Number:
    return now if before is None or not memory else memory * before + (1 - memory) * now


def _least(a: Number, b: Number) -> Number:
    if isinstance(a, Tensor):
        return torch.minimum(a, b) if isinstance(b, Tensor) else a.clamp(max=b)
    return b.clamp(max=a) if isinstance(b, Tensor) else min(a, b)


def _most(a: Number, b: Number) -> Number:
    if isinstance(a, Tensor):
        return torch.maximum(a, b) if isinstance(b, Tensor) else a.clamp(min=b)
    return b.clamp(min=a) if isinstance(b, Tensor) else max(a, b)


def _clip(value: Number, low: Number, high: Number) -> Number:
    if isinstance(value, Tensor) and not isinstance(low, Tensor) and not isinstance(high, Tensor):
        return value if low == -math.inf and high == math.inf else value.clamp(low, high)
    return _most(_least(value, high), low)


def _zero_where(condition: Any, value: Number) -> Number:
    if isinstance(condition, Tensor):
        return torch.where(condition, 0.0, value)
    return 0.0 * value if condition else value
