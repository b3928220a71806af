"""Where the answer of a verb goes: the terminal, and the files that were asked for."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from bolza.report import Document

__all__ = ["PATIENCE", "Html", "Json", "Outputs", "Png"]

PATIENCE = 3
"""How many times Ctrl-C is only noted while a report is written; the next one gives the report up."""

_PANEL = "Reports"
Html = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write a self-contained page with figures.", rich_help_panel=_PANEL),
]
Json = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write the numbers for other programs.", rich_help_panel=_PANEL),
]
Png = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write the figure as an image.", rich_help_panel=_PANEL)
]


@dataclass(frozen=True)
class Outputs:
    """Files to write, checked before any work begins.

    Args:
        html: page with figures, or None.
        json: numbers, or None.
        png: the first figure, or None.
        checkpoint: a file that the verb itself writes, which no report may overwrite; or None.

    Raises:
        ReportError: one of them cannot be written, or two are one file.
    """

    html: Path | None = None
    json: Path | None = None
    png: Path | None = None
    checkpoint: Path | None = None

    def __post_init__(self) -> None:
        self._check_distinct()
        if self.html or self.json or self.png:
            from bolza.report import check_writable

            for name in ("html", "json", "png"):
                if path := getattr(self, name):
                    check_writable(path, f"--{name}")

    def deliver(self, document: Document, record: Mapping[str, Any]) -> None:
        """Show the document, then write every file; one that fails does not keep the others from it.

        Args:
            document: for the terminal, the page and the image.
            record: for the JSON file.

        Raises:
            ReportError: a file could not be written; the rest was.
        """
        from bolza.ops.errors import ReportError
        from bolza.report import to_html, to_json, to_png, to_terminal, write_atomic

        failed: list[Exception] = []
        try:
            to_terminal(document)
        except OSError as error:  # a full disk behind a redirection, or a reader that has left
            failed.append(error)
        for path, write in (
            (self.html, lambda p: to_html(document, p)),
            (self.json, lambda p: to_json(record, p)),
            (self.png, lambda p: write_atomic(p, to_png(document.figures()[0]))),
        ):
            if path is None:
                continue
            try:
                write(path)
                typer.echo(f" wrote {path}")
            except Exception as error:  # whatever it is, the other files are still written
                failed.append(error)
        if failed:
            first = next((error for error in failed if isinstance(error, ReportError)), failed[0])
            if isinstance(first, ReportError) or not isinstance(first, OSError):
                raise first
            if first.errno != errno.EPIPE:
                raise ReportError(
                    f"the standard output cannot be written ({first.strerror}); redirect it to another place."
                ) from first
            raise first

    def _check_distinct(self) -> None:
        seen: dict[Path, str] = {}
        for name in ("html", "json", "png", "checkpoint"):
            path: Path | None = getattr(self, name)
            if path is None or (path.exists() and not path.is_file()):  # a device or a pipe takes several
                continue
            if other := seen.get(path.resolve()):
                from bolza.ops.errors import ReportError

                raise ReportError(
                    f"--{other} and --{name} are both {str(path)!r}: give each a file of its own."
                )
            seen[path.resolve()] = name
