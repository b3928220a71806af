"""``bolza reproduce``: run the study of a paper and say what holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from bolza.cli._errors import INTERRUPTED, UNEXPECTED, say
from bolza.cli._output import Html, Json, Outputs, Png

if TYPE_CHECKING:
    from bolza.report import Document
    from bolza.studies import StudyFailure, StudyResult

__all__ = ["reproduce"]


def _keys(incomplete: str) -> list[str]:
    from bolza.studies import studies

    return [key for key in studies() if key.startswith(incomplete)]


def reproduce(
    key: Annotated[
        str | None,
        typer.Argument(
            metavar="[KEY]",
            help="A study, or the arXiv number of its paper; without it, the studies are listed.",
            autocompletion=_keys,
            show_default=False,
        ),
    ] = None,
    all_: Annotated[
        bool, typer.Option("--all", help="Run every study and show the table of what holds.")
    ] = False,
    scale: Annotated[
        str, typer.Option(metavar="small|full", help="A minute on one core, or the size of the paper.")
    ] = "small",
    jobs: Annotated[
        int, typer.Option(help="With --all: studies that run at the same time; -1 for all cores.")
    ] = 1,
    html: Html = None,
    json: Json = None,
    png: Png = None,
) -> None:
    r"""Run a paper's claim on real data: what was expected, what was measured, and whether it holds.

    A claim that does not hold is said to not hold, and is no error: the exit code is 0 unless a study
    could not be run.

    \b
    bolza reproduce
    bolza reproduce liu2019_review --html review.html
    bolza reproduce --all --json results.json
    """
    from bolza.ops.errors import ArgumentError
    from bolza.report import to_terminal

    if key and all_:
        raise ArgumentError(f"'{key}' and --all were both given: name one study, or ask for all of them.")
    outputs = Outputs(html=html, json=json, png=png)
    if not (key or all_):
        if html or json or png:
            raise ArgumentError("a report was asked for, but no study: name one, or give --all.")
        to_terminal(_listing())
        return
    from bolza.studies import StudyResult, get, studies

    found, interrupted = _run(get(key).key if key else list(studies()), scale, jobs)
    done = [result for result in found if isinstance(result, StudyResult)]
    failures = [result for result in found if not isinstance(result, StudyResult)]
    if done:
        document = done[0].document() if key else _overview(done)
        record = {"schema": "bolza.studies/1", "studies": [result.to_dict() for result in done]}
        outputs.deliver(document, record)
    for failure in failures:
        say(
            f"study {failure.key} could not be run: {failure.message} (see 'bolza reproduce {failure.key} --debug')"
        )
    if interrupted:
        say("the studies that were finished are above.", label="stopped")
        raise typer.Exit(INTERRUPTED)
    if failures:
        raise typer.Exit(UNEXPECTED)


def _run(keys: str | list[str], scale: str, jobs: int) -> tuple[list[StudyResult | StudyFailure], bool]:
    """Run one study, or several of which one that fails does not stop the others; with a progress bar.

    On Ctrl-C the studies that are done are kept, and the second value is true.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from bolza.studies import get, run_all

    done: list[Any] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("preparing", total=1.0)

        def tell(share: float, text: str) -> None:
            bar.update(task, completed=share, description=text)

        if isinstance(keys, str):
            return [get(keys).run(scale, tell)], False  # type: ignore[arg-type]
        try:
            for result in run_all(keys, scale, jobs, tell):  # type: ignore[arg-type]
                done.append(result)
                bar.update(task, completed=len(done) / len(keys))
        except KeyboardInterrupt:
            if not done:
                raise
            return done, True
    return done, False


def _listing() -> Document:
    from bolza.report import Document, Table
    from bolza.studies import studies

    rows = [
        (s.key, s.claim, str(s.reference.arxiv or s.reference.doi or s.reference.year))
        for s in studies().values()
    ]
    return Document(
        "Studies",
        "'bolza reproduce KEY' runs one of them, 'bolza reproduce --all' every one.",
        [Table("", ("key", "claim", "paper"), rows)],
    )


def _overview(results: list[StudyResult]) -> Document:
    from bolza.report import Cell, Document, Section, Table

    ordered = sorted(results, key=lambda r: r.key)
    holding = sum(r.holds is True for r in ordered)
    rows = []
    for r in ordered:
        verdicts = [row.holds for row in r.rows]
        failed, open_ = verdicts.count(False), verdicts.count(None)
        rows.append(
            (
                Cell(r.key, note=r.title),
                str(verdicts.count(True)),
                Cell(str(open_), "info" if open_ else ""),
                Cell(str(failed), "bad" if failed else ""),
                f"{r.seconds:.0f} s",
            )
        )
    align: Any = ("left", *("right",) * 4)
    parts: list[Any] = [Table("", ("study", "claims that hold", "open", "do not", "time"), rows, align=align)]
    parts += [Section(f"{r.key}: {r.title}", [*r.document().parts], lead=r.claim) for r in ordered]
    return Document("What holds", f"{holding} of {len(ordered)} studies hold in full.", parts)
