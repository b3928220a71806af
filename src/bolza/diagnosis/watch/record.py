"""What was seen along a run: events in words, readings with errors, curves, and what the watching cost."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import RenderableType

    from bolza.report import Document

__all__ = ["SCHEMA", "Event", "Kind", "WatchRecord"]

SCHEMA = "bolza.watch/1"
Kind = Literal["unstable", "edge", "plateau", "stationary", "heavy-tailed", "loops"]
Verdict = Literal["good", "warn", "bad", "info"]


@dataclass(frozen=True)
class Event:
    """Something that began at a step of the run.

    Attributes:
        kind: ``unstable``, ``edge`` (of stability), ``plateau`` (of the loss), ``stationary``, ``heavy-tailed`` or
            ``loops``.
        step: at which it was found.
        value: the number it rests on.
        error: its standard error; None where it has none.
        verdict: ``good``, ``warn``, ``bad`` or ``info``.
        text: what was found, in one or two sentences with the numbers.
        remedy: what to do.
        until: the step at which it was no longer so; None while it lasts.

    Example:
        >>> Event("unstable", 40, 1.7, 0.1, "bad", "Above the limit.", "Lower the rate.").lasts
        True
    """

    kind: Kind
    step: int
    value: float | None
    error: float | None
    verdict: Verdict
    text: str
    remedy: str = ""
    until: int | None = None

    @property
    def lasts(self) -> bool:
        """Whether it was still so at the end."""
        return self.until is None


@dataclass(frozen=True)
class WatchRecord:
    """Everything a `Watch` has found; ``print`` shows it, ``to_html`` and ``to_json`` write it.

    Attributes:
        steps: optimizer steps watched.
        settings: optimizer, rate, momentum, batch, samples of the probes, seed.
        events: in order of their steps.
        readings: ``sharpness``, ``noise``, ``drift``, ``tails``, ``loops``: lists of mappings with ``step``.
        curves: ``step``, ``loss``, ``lr``, ``gradient_norm``, ``parameter_norm``: lists of equal length, thinned.
        costs: seconds by name, with ``training`` (seconds), ``budget`` and ``share`` (of the training time).
        unavailable: why a reading could not be had, by its name.

    Example:
        >>> WatchRecord(10, {}, (), {}, {}, {"training": 1.0, "share": 0.05, "budget": 0.1}).summary
        'In 10 steps nothing called for action.'
    """

    steps: int
    settings: Mapping[str, Any]
    events: tuple[Event, ...]
    readings: Mapping[str, list[dict[str, Any]]]
    curves: Mapping[str, list[float]]
    costs: Mapping[str, Any]
    unavailable: Mapping[str, str] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """The run in a few sentences."""
        from bolza.diagnosis.watch.page import summary

        return summary(self)

    def lasting(self, kind: Kind) -> Event | None:
        """The event of this kind that still held at the end, if there is one."""
        return next((e for e in reversed(self.events) if e.kind == kind and e.lasts), None)

    def to_dict(self) -> dict[str, Any]:
        """As a mapping of plain values, for JSON."""
        from bolza.report import jsonable

        record: dict[str, Any] = jsonable({"schema": SCHEMA, **asdict(self), "summary": self.summary})
        return record

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write it as JSON, whole or not at all; numbers that are not finite become null.

        Args:
            path: where to write.

        Raises:
            ReportError: the file cannot be written.
        """
        from bolza.report import to_json

        return to_json(self.to_dict(), path)

    def document(self) -> Document:
        """The record as a `bolza.report.Document`."""
        from bolza.diagnosis.watch.page import document

        return document(self)

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write it as one self-contained page with figures.

        Args:
            path: where to write.

        Raises:
            ReportError: the file cannot be written.
        """
        from bolza.report import to_html

        return to_html(self.document(), path)

    def __str__(self) -> str:
        from bolza.report import to_text

        return to_text(self.document())

    def __rich__(self) -> RenderableType:
        from bolza.report import renderable

        return renderable(self.document())
