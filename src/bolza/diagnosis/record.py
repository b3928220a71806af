"""What a diagnosis says: findings, the facts below them, a prescription and its trial."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from bolza.ops.errors import ArgumentError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from bolza.report import Document

__all__ = ["SCHEMA_VERSION", "Diagnosis", "Finding", "Prescription", "Remedy", "Trial"]

SCHEMA_VERSION = "1.2"
Verdict = Literal["good", "warn", "bad", "info"]


@dataclass(frozen=True)
class Finding:
    """One number about one network, with what it means and what to do.

    Args:
        key: stable name ``question.quantity``, such as ``propagation.chi_1``.
        name: the same in plain words.
        value: the number (or a word, where the answer is a word); None if there is none.
        error: its uncertainty: one standard error for an estimate, the residual for an eigenvalue,
            None for a value that is exact or whose error is not known.
        verdict: ``good``, ``warn``, ``bad``, or ``info`` for a number that is neither.
        text: one sentence that says what the number means here.
        remedy: what to do about it; empty where nothing is wrong.
        unit: unit of the value, empty for a pure number.

    Example:
        >>> f = Finding("propagation.chi_1", "gradient factor per layer", 0.33, None, "bad", "It shrinks.")
        >>> f.question
        'propagation'
    """

    key: str
    name: str
    value: float | int | str | None
    error: float | None
    verdict: Verdict
    text: str
    remedy: str = ""
    unit: str = ""

    @property
    def question(self) -> str:
        """The part of the key before the point."""
        return self.key.split(".", 1)[0]

    @property
    def display(self) -> str:
        """Value, error and unit as text: ``0.333 ± 0.004 per layer``, ``∞ layers``."""
        from bolza.report import plus_minus

        if self.value is None or isinstance(self.value, str):
            return self.value or ""
        return plus_minus(self.value, self.error, self.unit)

    def to_dict(self) -> dict[str, Any]:
        """As a mapping, with ``display``."""
        return {**asdict(self), "display": self.display}


@dataclass(frozen=True)
class Remedy:
    """One prescribed setting.

    Args:
        value: the setting.
        reason: why, in one sentence with the numbers it rests on.
        code: a line of Python that applies it.
    """

    value: Any
    reason: str
    code: str = ""


@dataclass(frozen=True)
class Prescription:
    """What to change: the initialisation, the learning rate, the batch.

    Args:
        initialisation: value is a dict ``scheme, sigma_w2, sigma_b2``; or None: leave it as it is.
        learning_rate: of SGD with ``momentum``.
        batch_size: samples a step.
        momentum: the momentum that the learning rate was worked out for.
    """

    initialisation: Remedy
    learning_rate: Remedy
    batch_size: Remedy
    momentum: float = 0.0


@dataclass(frozen=True)
class Trial:
    """One training run of the trial.

    Args:
        label: what was run, in words.
        lr: learning rate.
        batch_size: samples a step.
        steps: steps that were run.
        status: ``finished``, ``interrupted`` or ``diverged``.
        seconds: wall time.
        curves: ``step``, ``train_loss``, ``test_loss``, ``test_accuracy`` … lists of equal length.
        metrics: the last value of each test metric: ``test_loss`` and ``test_accuracy`` or ``test_r2``.
        treated: whether the prescribed initialisation was used.
        course: what was read along the way, see `bolza.diagnosis.course`: ``step``, ``stationarity``,
            ``signal_to_noise`` … lists of equal length.
    """

    label: str
    lr: float
    batch_size: int
    steps: int
    status: str
    seconds: float
    curves: Mapping[str, list[Any]]
    metrics: Mapping[str, float | None]
    treated: bool = False
    course: Mapping[str, list[Any]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As a mapping, with the metrics on the first level."""
        record = asdict(self)
        metrics = record.pop("metrics")
        return {**metrics, **record}


@dataclass(frozen=True)
class Diagnosis:
    """The answer of `diagnose`.

    ``print(d)`` shows it, ``d["propagation.chi_1"]`` is one finding, ``d.to_html(path)`` and
    ``d.to_json(path)`` write it, ``d.treat_(model)`` applies the prescribed initialisation.

    Args:
        subject: what was examined: model, data, sizes, seed, versions.
        findings: in the order of the questions.
        facts: per question, the measurements the findings rest on.
        treated: the same facts for a copy of the network with the prescribed initialisation.
        prescription: what to change; None if it could not be worked out.
        training: the trial: ``before``, ``after`` and ``before_with_prescribed_lr``; None without one.
    """

    subject: Mapping[str, Any]
    findings: tuple[Finding, ...]
    facts: Mapping[str, Any]
    treated: Mapping[str, Any] = field(default_factory=dict)
    prescription: Prescription | None = None
    training: Mapping[str, Trial] | None = None
    schema_version: str = SCHEMA_VERSION

    def __getitem__(self, key: str) -> Finding:
        for finding in self.findings:
            if finding.key == key:
                return finding
        known = ", ".join(finding.key for finding in self.findings)
        raise ArgumentError(f"key={key!r} is not among the findings: choose one of {known}")

    def __contains__(self, key: object) -> bool:
        return any(finding.key == key for finding in self.findings)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    def treat_(self, model: nn.Module, example: Any = None) -> nn.Module:
        """Give a network the prescribed initialisation, in place.

        Args:
            model: the network that was examined, or one of the same architecture.
            example: a batch of inputs, for architectures that must be traced.

        Returns:
            ``model``.
        """
        from bolza.diagnosis.prescription import treat_

        if self.prescription is not None and self.prescription.initialisation.value is not None:
            treat_(model, self.prescription.initialisation.value, example=example)
        return model

    def document(self) -> Document:
        """The diagnosis as a `bolza.report.Document`."""
        from bolza.diagnosis.document import document

        return document(self)

    def to_dict(self) -> dict[str, Any]:
        """As a mapping that follows ``schema.json``."""
        from bolza.report import jsonable

        return {
            "schema_version": self.schema_version,
            "subject": jsonable(self.subject),
            "findings": [jsonable(finding) for finding in self.findings],
            "prescription": jsonable(self.prescription),
            "training": jsonable(self.training),
            "facts": jsonable(self.facts),
            "treated": jsonable(self.treated),
        }

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write it as JSON (see ``schema.json``); numbers that are not finite become null.

        Args:
            path: where to write.

        Returns:
            The path.

        Raises:
            ReportError: the file cannot be written.
        """
        from bolza.report import to_json

        return to_json(self.to_dict(), path)

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write it as one self-contained page with figures.

        Args:
            path: where to write.

        Returns:
            The path.

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
