"""``bolza methods``: what the library can do, with the paper behind each."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from bolza.cli._output import Json, Outputs

if TYPE_CHECKING:
    from bolza.report import Document

__all__ = ["methods"]


def methods(
    family: Annotated[
        str | None,
        typer.Argument(
            metavar="[FAMILY]", help="Only one part of the library, such as meanfield.", show_default=False
        ),
    ] = None,
    json: Json = None,
) -> None:
    """List every method of the library: its name, what it does, and the paper it comes from.

    [dim]Example:[/dim]  bolza methods meanfield
    """
    from bolza import catalogue

    outputs = Outputs(json=json)
    found = catalogue.methods(family)
    record = [
        {"name": m.qualified_name, "summary": m.summary, "references": [r.key for r in m.references]}
        for m in found
    ]
    outputs.deliver(_document(found), {"schema": "bolza.methods/1", "methods": record})


def _document(found: list) -> Document:  # type: ignore[type-arg]
    from itertools import groupby

    from bolza.report import Document, Section, Table

    sections = []
    for family, group in groupby(found, key=lambda m: m.family):
        rows = [(m.name, _sentence(m.summary), _short(m.references)) for m in group]
        sections.append(Section(family, [Table("", ("name", "what it does", "paper"), rows)]))
    cited = sum(bool(m.references) for m in found)
    return Document(
        "Methods",
        f"{len(found)} methods, {cited} of them from papers. 'bolza cite NAME' prints the BibTeX.",
        sections,
    )


def _sentence(text: str) -> str:
    plain = re.sub(r":[\w:]+:`~?([^`]+)`", r"\1", text)  # roles of Sphinx
    return plain.replace("`", "").rstrip(".")


def _short(references: tuple) -> str:  # type: ignore[type-arg]
    """First author and year of each paper."""
    return ", ".join(f"{r.authors.split(' and ')[0].split(',')[0]} {r.year}" for r in references) or "–"
