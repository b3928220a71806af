"""Files that are whole or not there: early checks, atomic writes, JSON without NaN."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bolza.ops.errors import ReportError

__all__ = ["check_writable", "jsonable", "to_json", "write_atomic"]


def check_writable(path: str | os.PathLike[str], argument: str = "path") -> Path:
    """Make sure that a report can be written, before the work for it begins.

    Args:
        path: where the report will go.
        argument: name of the option, for the message.

    Returns:
        The path.

    Raises:
        ReportError: the folder does not exist, ``path`` is a folder, or it cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     check_writable(f"{folder}/report.html").name
        'report.html'
    """
    target = Path(path).expanduser()
    folder = target.parent
    if target.is_dir():
        raise ReportError(
            f"{argument}={str(path)!r} is a folder: name a file in it, such as {str(target / 'report')!r}"
        )
    if target.exists() and not target.is_file():  # a pipe or a device: nothing to prepare
        return target
    if not folder.is_dir():
        raise ReportError(
            f"{argument}={str(path)!r} cannot be written: there is no folder {str(folder)!r}; "
            "create it first or choose another path"
        )
    probe = folder / f".{target.name}.{os.getpid()}.probe"
    try:
        probe.touch(exist_ok=True)
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(13, "the file is read-only")
    except OSError as error:
        raise ReportError(
            f"{argument}={str(path)!r} cannot be written ({error.strerror or error}): choose a path that you may write"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return target


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write a file so that a reader finds the old content or the new, never a part.

    Args:
        path: where to write; a pipe or a device is written directly.
        content: text (stored as UTF-8) or bytes.

    Returns:
        The path.

    Raises:
        ReportError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_atomic(f"{folder}/note.txt", "done").read_text()
        'done'
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    target = Path(path).expanduser()
    if target.is_dir():
        raise ReportError(f"path={str(path)!r} is a folder: name a file in it")
    temporary: Path | None = None
    try:
        if target.exists() and not target.is_file():
            target.write_bytes(data)
            return target
        final = target.resolve()
        temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(final)
    except OSError as error:
        raise ReportError(
            f"path={str(path)!r} cannot be written ({error.strerror or error}): choose a path that you may write"
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
    return target


def jsonable(value: Any) -> Any:
    """Turn records, tensors and arrays into what JSON knows.

    A number that is not finite becomes ``None``: JSON has no NaN and no infinity. Records with a
    ``to_dict`` method are asked; other data classes become objects; tensors and arrays become lists.

    Example:
        >>> jsonable({"xi": float("inf"), "q": (1, 2.5)})
        {'xi': None, 'q': [1, 2.5]}
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "to_dict") and not isinstance(value, type):
        return jsonable(value.to_dict())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(item) for item in value]
    if hasattr(value, "tolist"):
        return jsonable(value.detach().tolist() if hasattr(value, "detach") else value.tolist())
    return str(value)


def to_json(value: Any, path: str | os.PathLike[str]) -> Path:
    """Write a record as JSON, atomically; numbers that are not finite become null.

    Args:
        value: mapping or record.
        path: where to write.

    Returns:
        The path.

    Raises:
        ReportError: the file cannot be written.

    Example:
        >>> import json, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     json.loads(to_json({"loss": float("nan")}, f"{folder}/run.json").read_text())
        {'loss': None}
    """
    return write_atomic(
        path, json.dumps(jsonable(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )
