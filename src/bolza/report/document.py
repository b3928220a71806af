"""What a report is made of: text, tiles, tables and figures, in sections.

A `Document` says *what* to show. How it looks in a terminal, in a browser or in an image is the matter of
`terminal`, `html` and `figures`; none of them knows what the report is about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Cell", "Document", "Figure", "Part", "Section", "Table", "Text", "Tile", "Tiles"]

Tone = Literal["good", "warn", "bad", "info", ""]
Align = Literal["left", "right"]


@dataclass(frozen=True)
class Cell:
    """One cell of a table: a value, with an optional verdict.

    The verdict is shown as a sign and a word, never by colour alone.

    Args:
        value: text or number; ``None`` is shown as a dash.
        tone: ``"good"``, ``"warn"``, ``"bad"``, ``"info"`` or ``""`` (no verdict).
        note: a second line in smaller type, such as a remedy.
    """

    value: Any
    tone: Tone = ""
    note: str = ""


@dataclass(frozen=True)
class Text:
    """Paragraphs of plain text, separated by blank lines.

    Args:
        body: the text.
        title: an optional heading above it.
        tone: a verdict that marks the whole text, for instance ``"warn"`` for a caveat.
    """

    body: str
    title: str = ""
    tone: Tone = ""


@dataclass(frozen=True)
class Tile:
    """One number that should be seen first.

    Args:
        label: what it is.
        value: the number as text, with its unit.
        note: one short line below it.
        tone: its verdict.
    """

    label: str
    value: str
    note: str = ""
    tone: Tone = ""


@dataclass(frozen=True)
class Tiles:
    """A row of tiles."""

    items: Sequence[Tile]


@dataclass(frozen=True)
class Table:
    """A table with a heading row.

    Args:
        title: caption of the table, shown above it.
        columns: the headings.
        rows: one sequence of cells a row: text, numbers or `Cell`; numbers are shown to three figures.
        caption: a note below the table.
        align: per column ``"left"`` or ``"right"``; by default a column of numbers goes right.
        fold: show at most so many rows in a terminal, 0 for no table there; a browser shows them all,
            folded. None shows all of them in both.

    Raises:
        ValueError: a row has another length than ``columns``.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    align: Sequence[Align] | None = None
    fold: int | None = None

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"row {number} of table {self.title!r} has {len(row)} cells, but there are "
                    f"{len(self.columns)} columns: give each column a cell, None for an empty one"
                )

    def alignment(self) -> list[Align]:
        """Alignment of each column, worked out from its cells where it is not given."""
        if self.align is not None:
            return list(self.align)
        return [
            "right"
            if self.rows and all(isinstance(_bare(row[i]), (int, float, type(None))) for row in self.rows)
            else "left"
            for i in range(len(self.columns))
        ]


@dataclass(frozen=True)
class Figure:
    """A figure that is drawn when, and only when, somebody looks at it.

    Args:
        title: what is shown, in plain words.
        draw: function that draws into a fresh ``matplotlib.figure.Figure``.
        caption: what to see in it.
        alt: description for a reader who cannot see it; the caption where it is empty.
        size: width and height in inches; a page shows an inch as about 100 pixels.
        sketch: a line or two of text that stand for the figure in a terminal.
        key: short name, used for file names and anchors; made from the title where it is empty.
    """

    title: str
    draw: Callable[[Any], None]
    caption: str = ""
    alt: str = ""
    size: tuple[float, float] = (9.2, 3.5)
    sketch: str = ""
    key: str = ""

    @property
    def name(self) -> str:
        """The key, or the title in lower case with hyphens."""
        return self.key or slug(self.title)


@dataclass(frozen=True)
class Section:
    """A heading with parts below it.

    Args:
        title: the heading.
        parts: what follows.
        lead: one sentence that answers the question of the section.
    """

    title: str
    parts: Sequence[Part] = ()
    lead: str = ""


Part = Text | Tiles | Table | Figure | Section


@dataclass(frozen=True)
class Document:
    """A report.

    Args:
        title: its name.
        summary: the answer in one or two sentences.
        parts: text, tiles, tables, figures and sections, in reading order.
        footer: provenance: versions, seed, date.

    Example:
        >>> from bolza.report import Document, Table, Text
        >>> doc = Document("Widths", "Wider is slower.", [Table("", ["width", "seconds"], [[10, 0.1], [20, 0.3]])])
        >>> [type(part).__name__ for part in doc.walk()]
        ['Table']
    """

    title: str
    summary: str = ""
    parts: Sequence[Part] = field(default_factory=tuple)
    footer: str = ""

    def walk(self) -> Iterator[Part]:
        """All parts in reading order, sections before their contents."""

        def visit(parts: Sequence[Part]) -> Iterator[Part]:
            for part in parts:
                yield part
                if isinstance(part, Section):
                    yield from visit(part.parts)

        return visit(self.parts)

    def figures(self) -> list[Figure]:
        """All figures in reading order."""
        return [part for part in self.walk() if isinstance(part, Figure)]


def slug(text: str) -> str:
    """Lower case letters and digits, joined by hyphens."""
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split()) or "part"


def _bare(cell: Any) -> Any:
    return cell.value if isinstance(cell, Cell) else cell
