"""Objects that a user names on the command line: ``pkg.module:name`` or ``path/to/file.py:name``."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from bolza.cli._errors import user_code
from bolza.ops.errors import ArgumentError

__all__ = ["call", "is_path", "load", "near"]


def is_path(spec: str) -> bool:
    """Whether ``spec`` names an object in a module, rather than one of the library's own names."""
    return ":" in spec


def load(spec: str, role: str) -> Any:
    """Import the object that ``spec`` names, with the current folder importable.

    Args:
        spec: ``"pkg.module:name"`` or ``"path/to/file.py:name"``; the name may be dotted.
        role: what the object is for, used in messages: ``"model"``, ``"data"``, ``"activation"``.

    Returns:
        The object.

    Raises:
        ArgumentError: the spec is malformed, or the module or the name does not exist.
        UserCodeError: importing the module raised.

    Example:
        >>> load("math:tau", "activation")
        6.283...
    """
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise ArgumentError(
            f"{role} {spec!r} is not of the form 'pkg.module:name': write the module, a colon and the name "
            "of the object in it, such as my_net:make."
        )
    found: Any = _module(module_name, spec, role)
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            here = getattr(found, "__name__", module_name)
            public = [n for n in dir(found) if not n.startswith("_")]
            raise ArgumentError(
                f"{role} {spec!r}: {here!r} has no name {part!r}{near(part, public) or _some(public)}"
            ) from None
    return found


def call(spec: str, role: str) -> Any:
    """Load the object that ``spec`` names and, if it is a function or class, call it without arguments.

    Args:
        spec: as in `load`.
        role: as in `load`.

    Returns:
        What the call returned, or the object itself where it is no function or class.

    Raises:
        ArgumentError: as in `load`, or the function needs arguments.
        UserCodeError: importing or calling raised.

    Example:
        >>> call("collections:OrderedDict", "data")
        OrderedDict()
    """
    found = load(spec, role)
    function = hasattr(found, "__code__") or hasattr(found, "__wrapped__") or isinstance(found, partial)
    if isinstance(found, type) or (callable(found) and function):
        made: Callable[[], Any] = found
        if missing := _required(made):
            raise ArgumentError(
                f"the {role} {spec} needs the argument {missing!r}, but is called without any: name a function that "
                "supplies it, or give it a default."
            )
        with user_code(f"the {role} {spec}"):
            return made()
    return found


def _required(function: Callable[..., Any]) -> str:
    """Name of the first argument that a call must supply, or an empty text."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C, or a class of metaclasses
        return ""
    fixed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return next((p.name for p in parameters if p.default is p.empty and p.kind not in fixed), "")


def near(name: str, known: Iterable[str]) -> str:
    """End of a message about an unknown name: the known names most like it, or an empty string.

    Example:
        >>> near("tanhh", ["relu", "tanh"])
        '; did you mean tanh?'
    """
    by_lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(by_lower[k] for k in close)}?" if close else ""


def _module(module_name: str, spec: str, role: str) -> ModuleType:
    if module_name.endswith(".py") or "/" in module_name:
        return _file(Path(module_name), spec, role)
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        with user_code(f"importing the {role} module {module_name}"):
            try:
                return importlib.import_module(module_name)
            except ModuleNotFoundError as error:
                if error.name is None or not (module_name + ".").startswith(error.name + "."):
                    raise  # the module exists; something that it imports does not
                missing = error.name
    except ValueError as error:  # an empty part, as in "pkg..mod:name"
        raise ArgumentError(f"{role} {spec!r}: {module_name!r} is no module name ({error}).") from None
    files = [p.stem for p in Path.cwd().glob("*.py")]
    raise ArgumentError(
        f"{role} {spec!r}: there is no module {missing!r} in {here} or among the installed packages"
        + (near(missing, files) or "; run from the folder that holds it, or install it.")
    )


def _file(path: Path, spec: str, role: str) -> ModuleType:
    if not path.is_file():
        raise ArgumentError(f"{role} {spec!r}: there is no file {str(path)!r}; check the path.")
    name = path.stem
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise ArgumentError(f"{role} {spec!r}: {str(path)!r} is no Python file; its name must end in .py.")
    module = importlib.util.module_from_spec(found)
    sys.modules.setdefault(name, module)
    with user_code(f"importing the {role} file {path}"):
        found.loader.exec_module(module)
    return module


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return f"; it has {shown}{' …' if len(names) > 8 else ''}." if shown else "; it has no public names."
