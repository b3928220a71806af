"""A data set as four tensors, checked once, and fast batches of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError, DataError

__all__ = ["Dataset", "Task", "batches", "hold_out"]

Task = Literal["classification", "regression", "language"]
_MANY_CLASSES = 100_000
TASKS: tuple[Task, ...] = ("classification", "regression", "language")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test samples of one task, validated when the record is made.

    Args:
        train_x: inputs, shape ``(samples, *input)``; for ``language`` tokens ``(samples, length)``.
        train_y: targets: classes ``(samples,)``, values ``(samples, *output)`` floating, or the next token
            at each position ``(samples, length)``; classes and tokens of any integer type become int64.
        test_x: inputs held out; may hold no sample.
        test_y: their targets.
        task: ``'classification'``, ``'regression'`` or ``'language'``.
        num_classes: classes or size of the vocabulary; ``None`` for regression, and counted from the
            labels where it is not given.
        name: short name, for reports.
        description: one sentence: what the data are and how they were scaled.
        vocabulary: for ``language``, the string of each token; empty otherwise.

    Raises:
        DataError: the tensors are empty, of unequal length, not finite, or the labels do not fit the
            task; the message names the tensor, the value and its place.

    Example:
        >>> data = Dataset(torch.randn(8, 3), torch.arange(8) % 2, torch.randn(2, 3), torch.tensor([0, 1]))
        >>> data.num_classes, data.input_shape, data.output_size, len(data)
        (2, (3,), 2, 8)
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    task: Task = "classification"
    num_classes: int | None = None
    name: str = "data"
    description: str = ""
    vocabulary: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ArgumentError(f"task={self.task!r} is not known: choose one of {', '.join(TASKS)}")
        for split in ("train", "test"):
            self._check_split(split)
        if self.task == "regression":
            return
        for split in ("train", "test"):  # losses take int64 only; int32 is what NumPy and files often hold
            object.__setattr__(self, f"{split}_y", getattr(self, f"{split}_y").long())
        if self.num_classes is None:
            labels = torch.cat([self.train_y.flatten(), self.test_y.flatten()])
            object.__setattr__(self, "num_classes", _count_classes(labels))
        for split in ("train", "test"):
            _check_labels(getattr(self, f"{split}_y"), self.num_classes or 0, f"{split}_y", "num_classes")
        if self.task == "classification" and int(self.train_y.min()) == int(self.train_y.max()):
            raise DataError(
                f"every label of train_y is {int(self.train_y[0])}: with one class there is nothing to tell "
                "apart; give samples of at least two classes"
            )

    def _check_split(self, split: str) -> None:
        x, y = getattr(self, f"{split}_x"), getattr(self, f"{split}_y")
        for which, tensor in (("x", x), ("y", y)):
            if not isinstance(tensor, Tensor) or tensor.ndim == 0:
                raise DataError(
                    f"{split}_{which} is {_describe(tensor)}: give a tensor, samples along its first axis"
                )
            if tensor.layout != torch.strided:
                raise DataError(f"{split}_{which} is sparse: convert it with {split}_{which}.to_dense()")
        if len(x) != len(y):
            raise DataError(
                f"{split}_x holds {len(x)} samples but {split}_y holds {len(y)}: every input needs one target"
            )
        if split == "train" and len(x) < 2:
            raise DataError(
                f"train_x holds {len(x)} sample{'' if len(x) == 1 else 's'}: statistics over a batch need at "
                "least 2; give a larger batch, or several batches as an iterable of (x, y)"
            )
        for which, tensor in (("x", x), ("y", y)):
            _check_finite(tensor, f"{split}_{which}")
        integer = not (y.dtype.is_floating_point or y.dtype.is_complex)
        if self.task != "regression" and not integer:
            raise DataError(
                f"{split}_y is {_short(y.dtype)}, but the task is {self.task}: labels are integers, so "
                f"convert them with {split}_y.long(), or say task='regression' if they are values"
            )
        if self.task == "regression" and integer:
            raise DataError(
                f"{split}_y is {_short(y.dtype)}, but the task is regression: convert the values with "
                f"{split}_y.float(), or say task='classification' if they are labels"
            )
        if self.task == "classification" and y.ndim != 1:
            raise DataError(
                f"{split}_y has shape {tuple(y.shape)}, but the task is classification: give one class "
                "index a sample, for example y.argmax(-1) of one-hot rows"
            )

    def __len__(self) -> int:
        """Number of training samples."""
        return len(self.train_x)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.train_x.shape[1:])

    @property
    def output_size(self) -> int:
        """Numbers a model must put out for one sample (for one position, if the task is language)."""
        if self.num_classes is not None:
            return self.num_classes
        return math.prod(self.train_y.shape[1:])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Dataset:
        """Return the data on another device, floating tensors in another dtype.

        Example:
            >>> from bolza.data import digits
            >>> digits().to(dtype=torch.float64).train_x.dtype
            torch.float64
        """

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

        return replace(
            self,
            train_x=move(self.train_x),
            train_y=move(self.train_y),
            test_x=move(self.test_x),
            test_y=move(self.test_y),
        )

    def check_outputs(self, outputs: object, targets: Tensor | None = None) -> None:
        """Refuse outputs of a model that cannot be compared with the targets.

        Args:
            outputs: what the model returned for a batch, scores along the last axis for labels.
            targets: targets of that batch; needed for regression only.

        Raises:
            DataError: a label of the data lies outside the outputs, or shapes differ.

        Example:
            >>> from bolza.data import digits
            >>> digits().check_outputs(torch.zeros(4, 10))
        """
        if not isinstance(outputs, Tensor):
            raise DataError(
                f"the model returned {_describe(outputs)}, not a tensor: wrap it so that forward returns its "
                "predictions alone, or pass loss= that takes what it returns"
            )
        if self.task != "regression":
            size = outputs.shape[-1] if outputs.ndim > 1 else 1
            for split in ("train", "test"):
                labels = getattr(self, f"{split}_y")
                _check_labels(labels, size, f"{split}_y", "the number of outputs of the model")
        elif targets is not None and outputs.shape != targets.shape:
            raise DataError(
                f"the model returned a tensor of shape {tuple(outputs.shape)} for targets of shape "
                f"{tuple(targets.shape)}: make them equal, for example with y.unsqueeze(-1); if the targets "
                "are class labels, convert them with y.long() and say task='classification'"
            )


def batches(
    dataset: Dataset, batch_size: int, generator: torch.Generator | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of the training samples in random order, in batches of equal size.

    Plain tensor indexing: there is no work per sample. The last ``len(dataset) % batch_size`` samples of
    the shuffled order are left out, so that every batch has the same statistics.

    Args:
        dataset: the data.
        batch_size: samples in a batch; a size beyond the data set gives one batch of everything.
        generator: source of the order; torch's global one where it is not given.

    Returns:
        Iterator over ``(x, y)``.

    Raises:
        ArgumentError: ``batch_size`` is not positive.

    Example:
        >>> from bolza.data import digits
        >>> sum(1 for x, y in batches(digits(), 64, torch.Generator().manual_seed(0)))
        22
    """
    if batch_size < 1:
        raise ArgumentError(f"batch_size={batch_size} must be at least 1")
    return _batches(dataset, min(batch_size, len(dataset)), generator)


def _batches(
    dataset: Dataset, size: int, generator: torch.Generator | None
) -> Iterator[tuple[Tensor, Tensor]]:
    x, y = dataset.train_x, dataset.train_y
    order = torch.randperm(len(x), generator=generator).to(x.device)
    for i in range(len(x) // size):
        chosen = order[i * size : (i + 1) * size]
        yield x.index_select(0, chosen), y.index_select(0, chosen)


def hold_out(labels: Tensor, fraction: float, seed: int = 0, stratify: bool = True) -> tuple[Tensor, Tensor]:
    """Indices of a fixed split into training and test samples.

    Args:
        labels: targets, shape ``(samples, ...)``.
        fraction: share of test samples, ``0 <= fraction < 1``; rounded within each class if stratified.
        seed: seed of the split; the same seed gives the same split everywhere.
        stratify: keep the share of every class (labels must then be integers, one a sample).

    Returns:
        ``(train, test)``: two sorted int64 tensors of indices.

    Raises:
        ArgumentError: ``fraction`` lies outside [0, 1).

    Example:
        >>> train, test = hold_out(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), 0.25)
        >>> len(train), len(test)
        (6, 2)
    """
    if not 0 <= fraction < 1:
        raise ArgumentError(f"fraction={fraction} must lie in [0, 1): it is the share of samples held out")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    groups = [order]
    if stratify:
        shuffled = labels.cpu()[order]
        groups = [order[shuffled == label] for label in shuffled.unique()]
    counts = [round(fraction * len(group)) for group in groups]
    test = torch.cat([group[:n] for group, n in zip(groups, counts, strict=True)])
    train = torch.cat([group[n:] for group, n in zip(groups, counts, strict=True)])
    return train.sort().values, test.sort().values


def _check_finite(tensor: Tensor, name: str) -> None:
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() == 0:
        return
    # a sum is finite only if every term is, and needs no mask of the size of the data
    if torch.isfinite(tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))):
        return
    bad = (~torch.isfinite(tensor)).nonzero()
    if len(bad):
        first = tuple(bad[0].tolist())
        raise DataError(
            f"{name} holds {len(bad)} value(s) not finite, the first {tensor[first].item()} "
            f"at index {first}: remove those samples ({name}.isfinite().flatten(1).all(1) keeps the others) "
            "or fill them in"
        )


def _check_labels(labels: Tensor, size: int, name: str, limit: str) -> None:
    if labels.numel() == 0:
        return
    low, high = (int(v) for v in labels.aminmax())
    if low >= 0 and high < size:
        return
    value = low if low < 0 else high
    place = tuple((labels == value).nonzero()[0].tolist())
    first = place if len(place) > 1 else place[0]
    wider = f", or give the model {high + 1} outputs" if low >= 0 else ""
    raise DataError(
        f"{name} holds the label {value} at index {first}, outside 0 … {size - 1} "
        f"({limit} is {size}): number the classes from 0{wider}"
    )


def _count_classes(labels: Tensor) -> int:
    """One more than the largest label, unless labels are plainly identifiers: no network has that many outputs."""
    count = int(labels.max()) + 1
    if count > _MANY_CLASSES and count > 100 * (distinct := len(labels.unique())):
        raise DataError(
            f"the largest label is {count - 1}, but only {distinct} different ones occur: number the classes "
            "from 0 with y = torch.unique(y, return_inverse=True)[1], or say num_classes"
        )
    return count


def _describe(thing: object) -> str:
    if isinstance(thing, Tensor):
        return f"a tensor of shape {tuple(thing.shape)}"
    return f"a {type(thing).__name__}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
