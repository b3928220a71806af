"""Whatever a user has, as a `Dataset`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bolza.core.errors import ArgumentError, BolzaError, DataError, UserCodeError
from bolza.data.dataset import Dataset, Task, hold_out
from bolza.data.sets import diabetes, digits, digits_images, mnist5k, text

__all__ = ["NAMES", "load", "validate"]

_BUILT_IN: dict[str, Callable[[], Dataset]] = {
    "digits": digits,
    "digits_images": digits_images,
    "mnist5k": mnist5k,
    "diabetes": diabetes,
    "text": text,
}
NAMES = tuple(_BUILT_IN)
"""Names that :func:`load` knows by itself."""


def load(
    source: Any,
    *,
    task: Task | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
    max_batches: int = 100_000,
    name: str | None = None,
) -> Dataset:
    """Read a data set from a name or from whatever a user's loader returned.

    Args:
        source: one of

            * a name of :data:`NAMES`, or ``'package.module:object'``;
            * a :class:`Dataset`;
            * a pair ``(x, y)`` of tensors, arrays or nested lists of numbers;
            * a tuple ``(train, test)`` of two such pairs, or of two iterables of batches;
            * a ``DataLoader``, or any other iterable of ``(x, y)`` batches;
            * a ``torch.utils.data.Dataset`` of samples ``(x, y)``;
            * a function without arguments that returns one of these.
        task: ``'classification'``, ``'regression'`` or ``'language'``. Where it is not given: floating
            targets are regression, integers of the shape of two-dimensional inputs are language, other
            integers are classes.
        test_fraction: share held out, class by class, where the source has no test part.
        seed: seed of that split.
        max_batches: batches read from an iterable before it is taken for an endless one.
        name: name in reports.

    Returns:
        A validated :class:`Dataset`, in the dtype and on the device of the source.

    Raises:
        ArgumentError: the name is not known.
        DataError: the source is empty, has no ``(x, y)`` batches, or its values cannot be used.
        UserCodeError: code named by the user raised.

    Example:
        >>> load((torch.randn(10, 3), torch.arange(10) % 2)).test_y.sort().values
        tensor([0, 1])
        >>> load("digits").name
        'digits'
    """
    title = name
    if isinstance(source, str):
        title = title or source
        source = _named(source)
    if callable(source) and not isinstance(source, Dataset | Iterable):
        title = title or getattr(source, "__name__", None)
        source = _call(source)
    if isinstance(source, Dataset):
        return source
    if isinstance(source, tuple) and len(source) == 2 and all(_is_numbers(part) for part in source):
        source = (_tensor(source[0]), _tensor(source[1]))
    if isinstance(source, tuple) and len(source) == 2 and not _is_array(source[0]):
        train, test = _pair(source[0], max_batches, "train part"), _pair(source[1], max_batches, "test part")
        kind = task or _guess(*train)
        return Dataset(*train, *test, kind, name=title or "data")
    x, y = _pair(source, max_batches, "data")
    kind = task or _guess(x, y)
    if not _splits(x, y):  # the record explains what is wrong
        return Dataset(x, y, x, y, kind, name=title or "data")
    stratify = kind == "classification" and y.ndim == 1 and not y.is_floating_point()
    kept, held = (index.to(x.device) for index in hold_out(y, test_fraction, seed, stratify))
    return Dataset(x[kept], y[kept], x[held], y[held], kind, name=title or "data")


def validate(dataset: Dataset, outputs: Tensor | None = None) -> Dataset:
    """Check data once more, and against the outputs of a model.

    A :class:`Dataset` is checked when it is made; tensors may have been written to since.

    Args:
        dataset: the data.
        outputs: outputs of a model for a few samples; their last axis must cover the labels.

    Returns:
        The same data set.

    Raises:
        DataError: what is wrong, where, and what to do.

    Example:
        >>> validate(digits(), torch.zeros(2, 10)).name
        'digits'
    """
    dataset.__post_init__()
    if outputs is not None:
        dataset.check_outputs(outputs)
    return dataset


def _named(name: str) -> Any:
    if name in _BUILT_IN:
        return _BUILT_IN[name]()
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ArgumentError(
            f"data {name!r} is not known: choose one of {', '.join(NAMES)}, or name a loader of your own as "
            "'package.module:function'"
        )
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ArgumentError(f"data {name!r} cannot be imported: {error}") from error
    return found


def _call(loader: Callable[[], Any]) -> Any:
    try:
        return loader()
    except BolzaError:
        raise
    except Exception as error:
        label = getattr(loader, "__qualname__", repr(loader))
        raise UserCodeError(
            f"the data loader {label} raised {type(error).__name__}: {error}; call it by itself to see where"
        ) from error


def _is_array(thing: object) -> bool:
    return isinstance(thing, Tensor | np.ndarray) or (hasattr(thing, "__array__") and hasattr(thing, "shape"))


def _is_numbers(thing: object) -> bool:
    """Whether it is an array, or lists within lists that hold numbers in the end."""
    inner = thing
    while isinstance(inner, list) and inner:
        inner = inner[0]
    return _is_array(thing) or (isinstance(thing, list) and isinstance(inner, int | float))


def _splits(x: Tensor, y: Tensor) -> bool:
    """Whether samples can be held out: two of them or more, as many targets, and plain tensors."""
    plain = all(t.ndim and t.layout == torch.strided for t in (x, y))
    return plain and len(x) == len(y) and len(x) > 1


def _tensor(thing: Any) -> Tensor:
    if isinstance(thing, Tensor):
        return thing.detach()
    try:
        if _is_array(thing):
            array = np.ascontiguousarray(thing)
            return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
        return torch.as_tensor(thing)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = f"an array of {thing.dtype}" if isinstance(thing, np.ndarray) else f"a {type(thing).__name__}"
        raise DataError(
            f"{kind} does not convert to a tensor ({str(error).splitlines()[0]}): give numbers in a regular "
            "array, for example with numpy.asarray(values, dtype=float)"
        ) from error


def _is_pair(thing: object) -> bool:
    return isinstance(thing, tuple | list) and len(thing) == 2 and all(_is_array(part) for part in thing)


def _pair(source: Any, max_batches: int, where: str) -> tuple[Tensor, Tensor]:
    """One pair of tensors from a pair or from an iterable of pairs."""
    if _is_pair(source):
        return _tensor(source[0]), _tensor(source[1])
    if hasattr(source, "__getitem__") and hasattr(source, "__len__") and not isinstance(source, Iterable):
        source = _one_by_one(source, where)  # a torch Dataset
    if isinstance(source, Mapping) or _is_array(source) or not isinstance(source, Iterable):
        raise DataError(
            f"the {where} is a {type(source).__name__}: give a pair (x, y) of tensors, or an iterable of "
            "such pairs"
        )
    xs, ys = [], []
    for i, batch in enumerate(islice(_guarded(source, where), max_batches + 1)):
        if i == max_batches:
            raise DataError(
                f"the {where} gave more than {max_batches} batches: if it is endless, cut it with "
                "itertools.islice"
            )
        if not (isinstance(batch, tuple | list) and len(batch) == 2):
            raise DataError(
                f"batch {i} of the {where} is a {type(batch).__name__}"
                + (f" of {len(batch)} entries" if isinstance(batch, tuple | list) else "")
                + ", not a pair (x, y)"
            )
        x, y = (_tensor(part) for part in batch)
        if y.ndim == 0:  # a list of single samples
            x, y = x.unsqueeze(0), y.unsqueeze(0)
        if x.ndim == 0 or len(x) != len(y):
            raise DataError(
                f"batch {i} of the {where} holds {len(x) if x.ndim else 1} inputs and {len(y)} targets: every "
                "input needs one target"
            )
        xs.append(x)
        ys.append(y)
    if not xs:
        raise DataError(
            f"the {where} gave no batch: the loader is empty, or a generator that has been used already"
        )
    for tensors, which in ((xs, "inputs"), (ys, "targets")):
        odd = next((i for i, t in enumerate(tensors) if t.shape[1:] != tensors[0].shape[1:]), None)
        if odd is not None:
            raise DataError(
                f"batch {odd} of the {where} has {which} of shape {tuple(tensors[odd].shape[1:])} a sample, "
                f"batch 0 of shape {tuple(tensors[0].shape[1:])}: pad or crop them to one shape"
            )
    return torch.cat(xs), torch.cat(ys)


def _one_by_one(samples: Any, where: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The samples of a torch Dataset as batches of one."""
    for i in range(len(samples)):
        sample = samples[i]
        if not (isinstance(sample, tuple | list) and len(sample) == 2):
            raise DataError(f"sample {i} of the {where} is a {type(sample).__name__}, not a pair (x, y)")
        yield _tensor(sample[0]).unsqueeze(0), _tensor(sample[1]).unsqueeze(0)


def _guarded(source: Iterable[Any], where: str) -> Iterable[Any]:
    """Iterate over user code and name what it raises."""
    try:
        yield from source
    except BolzaError:
        raise
    except Exception as error:
        raise UserCodeError(f"reading the {where} raised {type(error).__name__}: {error}") from error


def _guess(x: Tensor, y: Tensor) -> Task:
    if y.is_floating_point():
        return "regression"
    if not x.is_floating_point() and x.ndim == 2 and x.shape == y.shape:
        return "language"
    return "classification"
