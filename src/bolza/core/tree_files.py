"""Trees of tensors and plain values in one safetensors file, written whole or not at all.

Tensors are stored as tensors; the structure around them, with its numbers and strings, is JSON in the
header of the same file, with a checksum of all of it. Nothing is pickled, so reading a file runs no code.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bolza.core.errors import CheckpointError

__all__ = ["check_writable", "discard_partial", "load_tree", "save_tree"]

_FORMAT = "bolza-tree-1"
_KINDS = ("tensor", "dict", "tuple")


def save_tree(tree: Any, path: str | os.PathLike[str]) -> None:
    """Write a tree of tensors, numbers, strings, ``None``, lists, tuples and dicts.

    The file is written beside its place, flushed to disk and renamed, so that a crash leaves either the
    old file or the new one.

    Args:
        tree: what to store; dict keys are strings, integers, floats or booleans.
        path: place of the file.

    Raises:
        CheckpointError: a leaf is of another kind, or the path cannot be written.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_tree({"w": torch.ones(2), 3: (0.1, None)}, folder + "/a.safetensors")
        ...     load_tree(folder + "/a.safetensors")
        {'w': tensor([1., 1.]), 3: (0.1, None)}
    """
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_encode(tree, "", tensors))
    header = {"format": _FORMAT, "tree": structure, "checksum": _checksum(structure, tensors)}
    payload = save(tensors, metadata=header)
    target = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint {str(target)!r} cannot be written: {error.strerror or error}; make room there or "
            "choose another folder"
        ) from error
    _sync_folder(target.parent)


def load_tree(path: str | os.PathLike[str]) -> Any:
    """Read what :func:`save_tree` wrote; tensors arrive on the CPU.

    Args:
        path: place of the file.

    Returns:
        The tree.

    Raises:
        CheckpointError: the file is missing, damaged or of another kind.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_tree([1, "a"], folder + "/a.safetensors")
        ...     load_tree(folder + "/a.safetensors")
        [1, 'a']
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"the checkpoint {str(path)!r} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint {str(path)!r} is damaged, or not safetensors ({error}): delete it to start anew"
        ) from error
    if header.get("format") != _FORMAT:
        raise CheckpointError(f"the file {str(path)!r} holds tensors, but is no checkpoint of this library")
    try:
        if header["checksum"] != _checksum(header["tree"], tensors):
            raise ValueError("its checksum does not match")
        return _decode(json.loads(header["tree"]), tensors)
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"the checkpoint {str(path)!r} is damaged ({error}): delete it to start anew"
        ) from error


def check_writable(path: str | os.PathLike[str]) -> None:
    """Find out before a long run, not after it, that a file cannot be written.

    Raises:
        CheckpointError: the folder does not exist or does not let files be made.
    """
    target = Path(path)
    if target.is_dir():
        raise CheckpointError(f"the checkpoint {str(target)!r} is a folder: name a file in it")
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint {str(target)!r} cannot be written: {error.strerror}; choose another folder"
        ) from error
    os.close(handle)
    os.unlink(temporary)


def discard_partial(path: str | os.PathLike[str]) -> None:
    """Remove what a program that was killed while it wrote this file has left beside it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, ".run.ckpt.x1.part").write_bytes(b"half")
        ...     discard_partial(folder + "/run.ckpt")
        ...     os.listdir(folder)
        []
    """
    target = Path(path)
    with contextlib.suppress(OSError):
        for entry in target.parent.iterdir():
            if entry.name.startswith(f".{target.name}.") and entry.suffix == ".part":
                entry.unlink()


def _sync_folder(folder: Path) -> None:
    """Make the renaming itself survive a power cut, where the system lets a folder be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _checksum(structure: str, tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 over the structure and the bytes of each tensor, names in order."""
    value = zlib.crc32(structure.encode())
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def _encode(tree: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, Tensor):
        key = f"{len(tensors)}:{place}"
        tensors[key] = tree.detach().to("cpu", copy=True).contiguous()
        return {"tensor": key}
    if isinstance(tree, Mapping):
        entries = []
        for key, value in tree.items():
            if not isinstance(key, str | int | float | bool):
                raise CheckpointError(
                    f"{place or 'the state'} has the key {key!r}, which is no string or number"
                )
            entries.append([key, _encode(value, f"{place}.{key}" if place else str(key), tensors)])
        return {"dict": entries}
    if isinstance(tree, list | tuple):
        items = [_encode(value, f"{place}.{i}", tensors) for i, value in enumerate(tree)]
        return {"tuple": items} if isinstance(tree, tuple) else items
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise CheckpointError(
        f"{place or 'the state'} is a {type(tree).__name__}, which cannot be stored without pickle: keep "
        "tensors, numbers, strings and containers of them in the state"
    )


def _decode(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_decode(value, tensors) for value in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_decode(value, tensors) for value in content)
    if kind == "dict":
        return {key: _decode(value, tensors) for key, value in content}
    raise ValueError(f"unknown entry {kind!r}, expected one of {', '.join(_KINDS)}")
