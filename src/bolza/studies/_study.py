"""What a study is: a paper's claim, run on data we ship, expected beside measured.

A study is a module of this package that defines

* ``KEY``: its name, the same as the module's;
* ``TITLE``: a few words; ``CLAIM``: what the paper says, in one sentence;
* ``REFERENCE``: a `bolza.core.Reference`;
* ``run(scale="small", progress=None) -> StudyResult``.

Nothing registers it: being in the package is enough. A claim that does not hold is reported as it is.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from bolza.core.reference import Reference
from bolza.ops.errors import ArgumentError, BolzaError

if TYPE_CHECKING:
    from bolza.report import Cell, Document, Figure, Table

__all__ = ["Progress", "Row", "Scale", "Study", "StudyFailure", "StudyResult", "get", "run_all", "studies"]

Scale = Literal["small", "full"]
Progress = Callable[[float, str], None]
"""Called with the share that is done, from 0 to 1, and a few words on what is being done."""

_SCALES = ("small", "full")


@dataclass(frozen=True)
class Row:
    """One claim with what the paper says and what was measured here.

    Args:
        claim: the claim, as a phrase that is true or false.
        expected: number or words of the paper.
        measured: number or words found here; None if nothing could be measured.
        error: one standard error of ``measured`` (or its numerical tolerance), if it has one.
        holds: whether the claim holds here; None if this run cannot tell.
        note: how it was judged, or why it could not be.
    """

    claim: str
    expected: float | str
    measured: float | str | None
    error: float | None = None
    holds: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class StudyResult:
    """What a study found.

    Args:
        key: name of the study.
        title: its title.
        reference: the paper.
        claim: the paper's claim.
        scale: ``"small"`` or ``"full"``.
        rows: the claims, judged one by one.
        figures: what to draw, `bolza.report.Figure`.
        notes: departures from the paper and limits of the run, one sentence each.
        facts: raw numbers behind the rows and figures, for the JSON record.
        seconds: time it took.
    """

    key: str
    title: str
    reference: Reference
    claim: str
    scale: Scale
    rows: Sequence[Row]
    figures: Sequence[Figure] = ()
    notes: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def holds(self) -> bool | None:
        """False if any claim fails, else None if any is open, else True."""
        verdicts = [row.holds for row in self.rows]
        return False if False in verdicts else None if None in verdicts or not verdicts else True

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data: what goes into a JSON file."""
        return {
            "key": self.key,
            "title": self.title,
            "claim": self.claim,
            "reference": {
                "key": self.reference.key,
                "title": self.reference.title,
                "arxiv": self.reference.arxiv,
            },
            "scale": self.scale,
            "holds": self.holds,
            "rows": [vars(row) for row in self.rows],
            "notes": list(self.notes),
            "facts": dict(self.facts),
            "seconds": self.seconds,
        }

    def table(self) -> Table:
        """The rows as a table *(claim, expected, measured ± error, holds)*."""
        from bolza.report import Cell, Table

        rows = [
            (Cell(row.claim, note=row.note), _words(row.expected), _measured(row), _verdict(row.holds))
            for row in self.rows
        ]
        return Table("", ("claim", "expected", "measured", "holds"), rows, align=("left",) * 4)

    def document(self) -> Document:
        """The result as a report."""
        from bolza.report import Document, Text

        held = sum(row.holds is True for row in self.rows)
        open_ = sum(row.holds is None for row in self.rows)
        counted = f"{held} of {len(self.rows)} claims hold" + (
            f", {open_} could not be judged" if open_ else ""
        )
        notes = [Text("\n\n".join(self.notes), "What differs from the paper")] if self.notes else []
        return Document(
            self.title,
            f"{self.claim} — {counted} at scale '{self.scale}'.",
            [self.table(), *self.figures, *notes],
            footer=f"{self.reference} · {self.seconds:.0f} s",
        )


@dataclass(frozen=True)
class StudyFailure:
    """A study that stopped with an error.

    Args:
        key: name of the study.
        message: the error in one sentence.
        trace: its traceback.
    """

    key: str
    message: str
    trace: str = ""


def mean_error(values: Iterable[float]) -> tuple[float, float]:
    """Mean over seeds and its standard error; the error of a single value is 0.

    Example:
        >>> mean_error([1.0, 3.0])
        (2.0, 1.0)
    """
    numbers = [float(value) for value in values]
    mean = sum(numbers) / len(numbers)
    spread = sum((number - mean) ** 2 for number in numbers)
    return mean, (spread / (len(numbers) - 1) / len(numbers)) ** 0.5 if len(numbers) > 1 else 0.0


@dataclass(frozen=True)
class Study:
    """One study of this package, not yet run.

    Args:
        key: its name.
        title: its title.
        claim: the paper's claim in one sentence.
        reference: the paper.
        runner: the module's ``run``.
    """

    key: str
    title: str
    claim: str
    reference: Reference
    runner: Callable[..., StudyResult]

    def run(self, scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
        """Run it.

        Args:
            scale: ``"small"`` takes a minute or so on one core, ``"full"`` follows the paper's own size.
            progress: called with the share done and a few words.

        Returns:
            The result, with the time it took.

        Raises:
            ArgumentError: the scale is unknown.
        """
        if scale not in _SCALES:
            raise ArgumentError(f"scale={scale!r} is unknown: choose 'small' or 'full'")
        start = time.perf_counter()
        result = self.runner(scale=scale, progress=progress)
        return replace(result, seconds=time.perf_counter() - start)


def studies() -> dict[str, Study]:
    """Every study of this package by its key, sorted.

    Example:
        >>> "liu2019_review" in studies()
        True
    """
    package = importlib.import_module("bolza.studies")
    found = {}
    for module in pkgutil.iter_modules(package.__path__):
        if module.name.startswith("_"):
            continue
        m = importlib.import_module(f"bolza.studies.{module.name}")
        found[m.KEY] = Study(m.KEY, m.TITLE, m.CLAIM, m.REFERENCE, m.run)
    return dict(sorted(found.items()))


def get(key: str) -> Study:
    """The study of that key, or of the paper with that citation key or arXiv number.

    Args:
        key: ``"liu2019_review"``, ``"liu2019review"`` or ``"1908.10920"``; case is ignored.

    Raises:
        ArgumentError: there is no such study; the message offers near ones.

    Example:
        >>> get("1908.10920").key
        'liu2019_review'
    """
    known = studies()
    wanted = key.strip().lower().removeprefix("arxiv:")
    for study in known.values():
        if wanted in (study.key.lower(), study.reference.key.lower(), study.reference.arxiv):
            return study
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
    raise ArgumentError(f"study {key!r} does not exist; {hint}")


def run_all(
    keys: Sequence[str], scale: Scale = "small", jobs: int = 1, progress: Progress | None = None
) -> Iterator[StudyResult | StudyFailure]:
    """Run several studies, each result as soon as it is there; one that fails does not stop the others.

    Args:
        keys: names of studies.
        scale: as in `Study.run`.
        jobs: processes, through joblib; -1 uses every core.
        progress: for ``jobs=1`` only, called as in `Study.run`, the text naming the study.

    Yields:
        A result or a failure for each key, in the order in which they finish.

    Raises:
        ArgumentError: a key or the scale is unknown, before anything runs.

    Example:
        >>> list(run_all([]))
        []
    """
    if scale not in _SCALES:
        raise ArgumentError(f"scale={scale!r} is unknown: choose 'small' or 'full'")
    chosen = [get(key).key for key in keys]
    if jobs == 1 or len(chosen) == 1:
        for i, key in enumerate(chosen):
            yield _attempt(key, scale, _part(progress, key, i, len(chosen)))
        return
    from joblib import Parallel, delayed

    yield from Parallel(n_jobs=jobs, return_as="generator_unordered")(
        delayed(_attempt)(k, scale) for k in chosen
    )


def _attempt(key: str, scale: Scale, progress: Progress | None = None) -> StudyResult | StudyFailure:
    try:
        return get(key).run(scale, progress)
    except Exception as error:
        message = str(error) if isinstance(error, BolzaError) else f"{type(error).__name__}: {error}"
        return StudyFailure(key, message, traceback.format_exc())


def _part(progress: Progress | None, key: str, i: int, n: int) -> Progress | None:
    if progress is None:
        return None
    return lambda share, text: progress((i + share) / n, f"{key}: {text}" if n > 1 else text)


def _words(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.7g}".replace("-", "−")


def _measured(row: Row) -> str:
    from bolza.report import plus_minus

    if isinstance(row.measured, str) or row.measured is None:
        return row.measured or "–"
    return plus_minus(row.measured, row.error) if row.error else _words(row.measured)


def _verdict(holds: bool | None) -> Cell:
    from bolza.report import Cell

    return {True: Cell("yes", "good"), False: Cell("no", "bad"), None: Cell("open", "info")}[holds]
