"""Which paper a public object implements.

A method's file declares its `Reference` and marks the exported object with `cites`; the listing of
methods, the citation command and the check of the documentation all read that mark.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from bolza.ops.errors import ArgumentError

__all__ = ["Reference", "cites"]

T = TypeVar("T", bound=Any)


@dataclass(frozen=True)
class Reference:
    """A paper.

    Args:
        key: citation key, ``<first author><year><word>`` in lower case.
        authors: names joined by ``" and "``, as BibTeX wants them.
        title: title of the paper.
        year: year of the version that is meant.
        venue: journal or conference; empty for a preprint.
        arxiv: arXiv number without a prefix, if there is one.
        doi: digital object identifier, if there is one.

    Example:
        >>> ref = Reference("doe2020control", "Doe, Jane", "On control", 2020, arxiv="2001.00001")
        >>> print(ref.bibtex())
        @misc{doe2020control,
          author = {Doe, Jane},
          title = {On control},
          year = {2020},
          eprint = {2001.00001},
          archivePrefix = {arXiv},
        }
    """

    key: str
    authors: str
    title: str
    year: int
    venue: str = ""
    arxiv: str = ""
    doi: str = ""

    def __post_init__(self) -> None:
        """Check the form of the names.

        Raises:
            ArgumentError: an author is not written as "Last, First" or as a group in braces.
        """
        for name in self.authors.split(" and "):
            if "," not in name and not name.startswith("{"):
                raise ArgumentError(
                    f"author {name!r} of {self.key}: write 'Last, First', or a group in braces"
                )

    def bibtex(self) -> str:
        """Return the reference as one BibTeX entry."""
        fields = {"author": self.authors, "title": self.title, "year": str(self.year)}
        if self.venue:
            fields["journal"] = self.venue
        if self.arxiv:
            fields |= {"eprint": self.arxiv, "archivePrefix": "arXiv"}
        if self.doi:
            fields["doi"] = self.doi
        kind = "article" if self.venue else "misc"
        body = "".join(f"  {name} = {{{value}}},\n" for name, value in fields.items())
        return f"@{kind}{{{self.key},\n{body}}}"

    def __str__(self) -> str:
        """Authors, year, title and where to find it, on one line."""
        first, *rest = self.authors.split(" and ")
        names = first.split(",")[0] + (
            " et al." if len(rest) > 1 else f" & {rest[0].split(',')[0]}" if rest else ""
        )
        where = self.venue or (f"arXiv:{self.arxiv}" if self.arxiv else self.doi)
        return f"{names} ({self.year}), {self.title}" + (f", {where}" if where else "")


def cites(*references: Reference) -> Callable[[T], T]:
    """Mark a function or class as an implementation of the given papers.

    Args:
        references: the papers, most important first.

    Returns:
        A decorator that sets ``__references__`` and returns the object itself.

    Example:
        >>> ref = Reference("doe2020control", "Doe, Jane", "On control", 2020)
        >>> @cites(ref)
        ... def method(): ...
        >>> method.__references__[0].year
        2020
    """

    def mark(thing: T) -> T:
        thing.__references__ = references
        return thing

    return mark
