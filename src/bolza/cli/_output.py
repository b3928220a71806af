"""Where the answer of a verb goes: the terminal, and the files that were asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from bolza.report import Document

__all__ = ["Html", "Json", "Outputs", "Png"]

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

    Raises:
        ReportError: one of them cannot be written.
    """

    html: Path | None = None
    json: Path | None = None
    png: Path | None = None

    def __post_init__(self) -> None:
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

        to_terminal(document)
        failed: list[ReportError] = []
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
            except ReportError as error:
                failed.append(error)
        if failed:
            raise failed[0]
