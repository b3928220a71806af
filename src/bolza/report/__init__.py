"""Reports: one document of text, tables and figures → terminal, HTML, PNG; records → JSON.

This room knows nothing about what a report says. `bolza.diagnosis` and `bolza.studies` build a `Document`;
here it is shown.
"""

from __future__ import annotations

from bolza.report.document import Cell, Document, Figure, Part, Section, Table, Text, Tile, Tiles
from bolza.report.figures import log_axis, to_png, to_svg
from bolza.report.files import check_writable, jsonable, to_json, write_atomic
from bolza.report.html import page, to_html
from bolza.report.numbers import number, percent, plus_minus, sparkline
from bolza.report.style import PALETTE, role
from bolza.report.terminal import renderable, to_terminal, to_text

__all__ = [
    "PALETTE",
    "Cell",
    "Document",
    "Figure",
    "Part",
    "Section",
    "Table",
    "Text",
    "Tile",
    "Tiles",
    "check_writable",
    "jsonable",
    "log_axis",
    "number",
    "page",
    "percent",
    "plus_minus",
    "renderable",
    "role",
    "sparkline",
    "to_html",
    "to_json",
    "to_png",
    "to_svg",
    "to_terminal",
    "to_text",
    "write_atomic",
]
