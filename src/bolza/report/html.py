"""A document as one self-contained HTML page."""

from __future__ import annotations

import os
import re
from html import escape
from pathlib import Path
from typing import Any

from bolza.report.document import Cell, Document, Figure, slug
from bolza.report.figures import to_svg
from bolza.report.files import write_atomic
from bolza.report.numbers import number
from bolza.report.style import PALETTE

__all__ = ["SIGNS", "page", "shown", "to_html"]

SIGNS = {"good": ("✓", "good"), "warn": ("!", "attention"), "bad": ("✗", "problem"), "info": ("·", "note")}


def shown(cell: Any) -> str:
    """What a cell says: text as it is, numbers to three figures, a dash for nothing."""
    value = cell.value if isinstance(cell, Cell) else cell
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or isinstance(value, (int, float)):
        return number(value)
    return str(value)


def page(doc: Document) -> str:
    """The page as text: style, figures and tables inside, nothing to load from elsewhere.

    Figures are inline SVG with an alternative text and follow the reader's light or dark mode; printing
    uses light colours.

    Args:
        doc: what to show.

    Returns:
        The HTML.

    Example:
        >>> page(Document("Widths", "Wider is slower.")).count("<h1")
        1
    """
    import jinja2

    from bolza import __version__

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    anchors: dict[int, str] = {}

    def anchor(part: Any) -> str:
        """Identifier of a part: its name, with a number where that is taken by another one."""
        if id(part) not in anchors:
            name = part.name if isinstance(part, Figure) else slug(part.title)
            taken = [a for a in anchors.values() if a == name or a.rpartition("-")[0] == name]
            anchors[id(part)] = f"{name}-{len(taken) + 1}" if taken else name
        return anchors[id(part)]

    def svg(figure: Figure) -> Any:
        return jinja2.utils.markupsafe.Markup(to_svg(figure, prefix=f"in-{anchor(figure)}"))

    environment.filters["subscripts"] = lambda text: jinja2.utils.markupsafe.Markup(
        re.sub(r"([χξσ])_(\w)", r"\1<sub>\2</sub>", str(escape(text)))
    )
    return environment.get_template("page.html.j2").render(
        doc=doc,
        palette=PALETTE,
        signs=SIGNS,
        version=__version__,
        svg=svg,
        anchor=anchor,
        bare=shown,
        tone_of=lambda cell: cell.tone if isinstance(cell, Cell) else "",
        note_of=lambda cell: cell.note if isinstance(cell, Cell) else "",
        kind_of=lambda part: type(part).__name__,
    )


def to_html(doc: Document, path: str | os.PathLike[str]) -> Path:
    """Write a document as one HTML file, atomically.

    Args:
        doc: what to show.
        path: where to write.

    Returns:
        The path.

    Raises:
        ReportError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     to_html(Document("Widths"), f"{folder}/report.html").name
        'report.html'
    """
    return write_atomic(path, page(doc))
