"""``bolza cite``: the papers behind a name, as BibTeX."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["cite"]


def _names(incomplete: str) -> list[str]:
    from bolza.catalogue import methods

    wanted = incomplete.lower()
    return sorted({m.name for m in methods() if m.references and m.name.lower().startswith(wanted)})


def cite(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A method (fixed_point), a study (liu2019_review) or a paper's key; case is ignored.",
            autocompletion=_names,
            show_default=False,
        ),
    ],
) -> None:
    """Print the BibTeX entries of the papers behind a method or a study.

    [dim]Example:[/dim]  bolza cite fixed_point >> references.bib
    """
    from bolza.catalogue import citations

    typer.echo("\n\n".join(reference.bibtex() for reference in citations(name)))
