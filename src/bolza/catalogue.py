"""What the library offers: every exported method, what it does in one line, and the papers behind it.

The list is read from the packages themselves: a method is there because its package exports it. The
commands ``bolza methods`` and ``bolza cite`` and the check of ``docs/methods.md`` all read it here.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module

import bolza
from bolza.core.errors import ArgumentError
from bolza.core.reference import Reference

__all__ = ["Method", "citations", "methods", "table"]

# Rooms that hold no methods of their own: what they export is how to reach or show the others.
_HOUSE = frozenset({"cli", "report", "testing", "studies"})
# Rooms whose exports are mostly vocabulary: only what cites a paper is listed.
_SHARED = frozenset({"core", "data", "diagnosis", "models", "ops", "training"})


@dataclass(frozen=True)
class Method:
    """One exported function or class.

    Attributes:
        name: as it is written in code, without the package.
        family: the package that exports it, below ``bolza``.
        summary: first line of its docstring.
        references: the papers it implements, most important first; often one, sometimes none.
    """

    name: str
    family: str
    summary: str
    references: tuple[Reference, ...]

    @property
    def qualified_name(self) -> str:
        """Name with its package, as in ``meanfield.fixed_point``."""
        return f"{self.family}.{self.name}"


def methods(family: str | None = None) -> list[Method]:
    """Return every exported method, sorted by family and name.

    Args:
        family: only this package, such as ``"meanfield"``; all by default.

    Returns:
        One `Method` each. Records, types and constants that a package exports are not listed.

    Raises:
        ArgumentError: no package of that name has methods.

    Example:
        >>> "fixed_point" in [method.name for method in methods("meanfield")]
        True
    """
    found = sorted(_walk(), key=lambda method: (method.family, method.name.lower()))
    if family is None:
        return found
    families = sorted({method.family for method in found})
    if family not in families:
        raise ArgumentError(f"family={family!r} has no methods: choose from {', '.join(families)}")
    return [method for method in found if method.family == family]


def citations(name: str) -> tuple[Reference, ...]:
    """Return the papers behind a name.

    Args:
        name: a method (``"fixed_point"`` or ``"meanfield.fixed_point"``), a study
            (``"liu2019_review"``) or the key of a paper; case is ignored.

    Returns:
        At least one reference, most important first.

    Raises:
        ArgumentError: nothing has that name (the text offers near ones), or it cites no paper.

    Example:
        >>> citations("meanfield.fixed_point")[0].year
        2016
    """
    wanted = name.strip().lower()
    named: dict[str, tuple[Reference, ...]] = {}
    for method in methods():
        for key in (method.name, method.qualified_name):
            named[key.lower()] = named.get(key.lower(), ()) + method.references
    for reference in [reference for references in named.values() for reference in references]:
        named.setdefault(reference.key.lower(), (reference,))
    for key, reference in _studies():
        named.setdefault(key.lower(), (reference,))
        named.setdefault(reference.key.lower(), (reference,))
    if wanted not in named:
        near = difflib.get_close_matches(wanted, named, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "'bolza methods' lists the names"
        raise ArgumentError(f"name={name!r} is no method, study or paper: {hint}")
    if not named[wanted]:
        raise ArgumentError(f"name={name!r} implements no particular paper, so there is nothing to cite")
    return tuple(dict.fromkeys(named[wanted]))


def table() -> list[str]:
    """Return the rows of ``docs/methods.md``, one Markdown table row a method.

    Example:
        >>> row = next(row for row in table() if "`meanfield.fixed_point`" in row)
        >>> row.count("|")
        4
    """
    rows = []
    for method in methods():
        papers = ", ".join(map(_short, method.references)) or "–"
        summary = re.sub(r":[\w:]+:`~?([^`]+)`", r"`\1`", method.summary).replace("``", "`")
        cells = [f"`{method.qualified_name}`", summary, papers]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows


def _short(reference: Reference) -> str:
    """Authors and year, linked where the paper can be read."""
    names = [
        name.partition(",")[0] if "," in name else name.split()[-1]
        for name in reference.authors.split(" and ")
    ]
    who = names[0] + (" et al." if len(names) > 2 else f" & {names[1]}" if len(names) == 2 else "")
    place = f"https://arxiv.org/abs/{reference.arxiv}" if reference.arxiv else ""
    place = place or (f"https://doi.org/{reference.doi}" if reference.doi else "")
    return f"[{who} ({reference.year})]({place})" if place else f"{who} ({reference.year})"


def _walk() -> Iterator[Method]:
    for room in pkgutil.iter_modules(bolza.__path__):
        if not room.ispkg or room.name in _HOUSE:
            continue
        package = import_module(f"bolza.{room.name}")
        modules = [package]
        if room.name == "ops":  # pure helpers, imported from their own files
            modules += [import_module(f"bolza.ops.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
        seen: set[int] = set()
        for module in modules:
            for name in getattr(module, "__all__", ()):
                thing = getattr(module, name)
                if id(thing) in seen or not _is_method(thing, cited_only=room.name in _SHARED):
                    continue
                seen.add(id(thing))
                summary = (inspect.getdoc(thing) or "").partition("\n")[0].strip()
                references = tuple(vars(thing).get("__references__", ()))
                yield Method(name=name, family=room.name, summary=summary, references=references)


def _is_method(thing: object, cited_only: bool) -> bool:
    if not (inspect.isfunction(thing) or inspect.isclass(thing)):
        return False
    if "__references__" in vars(thing):
        return True
    if cited_only or (inspect.isclass(thing) and issubclass(thing, BaseException)):
        return False
    return not dataclasses.is_dataclass(thing) and not getattr(thing, "_is_protocol", False)


def _studies() -> Iterator[tuple[str, Reference]]:
    package = import_module("bolza.studies")
    for module in pkgutil.iter_modules(package.__path__):
        reference = getattr(import_module(f"bolza.studies.{module.name}"), "REFERENCE", None)
        if isinstance(reference, Reference):
            yield module.name, reference
