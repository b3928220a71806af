"""A document in a terminal: readable at 80 columns and at 120, with and without colour."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from bolza.report.document import Cell, Document, Figure, Part, Section, Table, Text, Tiles
from bolza.report.html import SIGNS, shown

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

__all__ = ["renderable", "to_terminal", "to_text"]

_ROOM = 100  # columns from which a table with sentences stands side by side
_STYLE = {"good": "green", "warn": "yellow", "bad": "red", "info": "dim", "": ""}


def to_terminal(doc: Document, console: Console | None = None) -> None:
    """Show a document.

    Args:
        doc: what to show.
        console: a ``rich.console.Console``; one on standard output where it is None.

    Example:
        >>> from bolza.report import Document
        >>> to_terminal(Document("Widths", "Wider is slower."))
        <BLANKLINE>
         Widths
         Wider is slower.
        <BLANKLINE>
    """
    from rich.console import Console

    (console or Console()).print(renderable(doc))


def to_text(doc: Document, width: int = 100) -> str:
    """The document as plain text.

    Args:
        doc: what to show.
        width: columns.

    Returns:
        Text without control characters.

    Example:
        >>> from bolza.report import Document
        >>> to_text(Document("Widths", "Wider is slower.")).split()
        ['Widths', 'Wider', 'is', 'slower.']
    """
    import io

    from rich.console import Console

    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None, force_terminal=False, legacy_windows=False).print(
        renderable(doc)
    )
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def renderable(doc: Document) -> RenderableType:
    """The document as something that rich can print.

    Args:
        doc: what to show.

    Returns:
        A rich renderable.

    Example:
        >>> from bolza.report import Document
        >>> type(renderable(Document("Widths"))).__name__
        'Padding'
    """
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text as Line

    parts: list[Any] = [Line(doc.title, style="bold")]
    if doc.summary:
        parts.append(Line(doc.summary))
    parts += _parts(doc.parts)
    if doc.footer:
        parts += ["", Line(doc.footer, style="dim")]
    return Padding(Group(*parts), (1, 1, 1, 1))


def _parts(parts: Sequence[Part]) -> list[Any]:
    out: list[Any] = []
    for part in parts:
        out += _part(part)
    return out


def _part(part: Part) -> list[Any]:
    from rich.rule import Rule
    from rich.text import Text as Line

    if isinstance(part, Section):
        head: list[Any] = ["", Rule(Line(f" {part.title} ", style="bold"), align="left", style="dim")]
        if part.lead:
            head.append(Line(part.lead))
        return head + _parts(part.parts)
    if isinstance(part, Text):
        sign = f"{SIGNS[part.tone][0]} " if part.tone else ""
        title = [Line(part.title, style="bold")] if part.title else []
        return ["", *title, Line(sign + part.body, style=_STYLE[part.tone])]
    if isinstance(part, Tiles):
        return ["", _tiles(part)]
    if isinstance(part, Table):
        return [] if part.fold == 0 else ["", _Grid(part)]
    return ["", *_sketch(part)] if part.sketch else []


def _tiles(part: Tiles) -> Any:
    from rich.table import Table as Grid
    from rich.text import Text as Line

    grid = Grid.grid(padding=(0, 2, 0, 0))
    for _ in range(3):
        grid.add_column()
    for tile in part.items:
        sign = f"{SIGNS[tile.tone][0]} " if tile.tone else ""
        grid.add_row(
            Line(tile.label, style="dim"),
            Line(sign + tile.value, style=f"bold {_STYLE[tile.tone]}".strip()),
            Line(tile.note),
        )
    return grid


class _Grid:
    """A table that fits: sentences go below their row and cells wrap where the screen is narrow."""

    def __init__(self, part: Table) -> None:
        self.part = part

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if _is_prose(self.part) and options.max_width < _ROOM:
            yield from _stacked(self.part)
        else:
            yield from _table(self.part, options.max_width)


def _stacked(part: Table) -> Iterator[Any]:
    from rich.padding import Padding
    from rich.table import Table as Grid
    from rich.text import Text as Line

    if part.title:
        yield Line(part.title, style="bold")
    signed = not part.columns[0]
    for row in part.rows:
        head = Grid.grid(padding=(0, 2, 0, 0))
        for _ in row[:-1]:
            head.add_column()
        head.columns[1 if signed else 0].min_width = 31
        cells = [_cell(cell) for cell in row[:-1]]
        cells[1 if signed else 0].stylize("bold")
        head.add_row(*cells)
        yield head
        yield Padding(_cell(row[-1]), (0, 0, 1, 3))
    if part.caption:
        yield Line(part.caption, style="dim")


def _is_prose(part: Table) -> bool:
    """Whether the last cells are sentences, and too long for a narrow column."""
    lengths = [len(shown(row[-1])) for row in part.rows]
    return len(part.columns) > 2 and bool(lengths) and sum(lengths) / len(lengths) > 40


def _table(part: Table, width: int) -> list[Any]:
    from rich import box
    from rich.table import Table as Grid
    from rich.text import Text as Line

    grid = Grid(
        title=Line(part.title, style="bold") if part.title else None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="dim",
        show_edge=False,
    )
    notes = [
        any(isinstance(row[i], Cell) and row[i].note for row in part.rows) for i in range(len(part.columns))
    ]
    longest = [
        max([len(name), *(len(shown(row[i])) for row in part.rows)]) for i, name in enumerate(part.columns)
    ]
    whole = [size <= 32 and not noted for size, noted in zip(longest, notes, strict=True)]
    fits = sum(size + 2 for size, keep in zip(longest, whole, strict=True) if keep) <= width
    for name, align, keep in zip(part.columns, part.alignment(), whole, strict=True):
        grid.add_column(name, justify=align, no_wrap=keep and fits, overflow="fold")
    rows = list(part.rows)
    left_out = 0
    if part.fold is not None and len(rows) > part.fold:
        kept = sorted({round(i * (len(rows) - 1) / max(part.fold - 1, 1)) for i in range(part.fold)})
        left_out = len(rows) - len(kept)
        rows = [rows[i] for i in kept]
    for row in rows:
        grid.add_row(*[_cell(cell) for cell in row])
    out: list[Any] = [grid]
    caption = part.caption
    if left_out:
        caption = f"{left_out} of {len(part.rows)} rows not shown. {caption}".strip()
    if caption:
        out.append(Line(caption, style="dim"))
    return out


def _cell(cell: Any) -> Any:
    from rich.text import Text as Line

    text = shown(cell)
    if not isinstance(cell, Cell):
        return Line(text)
    line = Line()
    if cell.tone:
        sign = SIGNS[cell.tone][0]
        line.append(f"{sign} {text}".rstrip(), style=_STYLE[cell.tone])
    else:
        line.append(text)
    if cell.note:
        line.append(f"\n{cell.note}", style="dim")
    return line


def _sketch(part: Figure) -> list[Any]:
    from rich.text import Text as Line

    return [Line(part.title, style="bold"), Line(part.sketch)]
