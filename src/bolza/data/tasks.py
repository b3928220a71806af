"""Families of tasks to learn to learn from: batches of tasks, each with a support and a query set."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError, DataError, ShapeError
from bolza.core.reference import Reference, cites

__all__ = ["FewShot", "Sinusoids", "TaskBatch", "digit_tasks"]

FINN = Reference(
    "finn2017maml",
    "Finn, Chelsea and Abbeel, Pieter and Levine, Sergey",
    "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks",
    2017,
    venue="ICML",
    arxiv="1703.03400",
)


class TaskBatch(NamedTuple):
    """Tasks side by side: ``loss = maml(*batch)``.

    Attributes:
        support: ``(x, y)`` to learn from, each ``(tasks, samples, …)``.
        query: ``(x, y)`` to be judged by, each ``(tasks, samples, …)``.

    Example:
        >>> batch = Sinusoids(shots=5, queries=8).sample(4, generator=torch.Generator().manual_seed(0))
        >>> [tuple(x.shape) for x, y in batch]
        [(4, 5, 1), (4, 8, 1)]
    """

    support: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]

    def to(self, device: torch.device | str) -> TaskBatch:
        """The same tasks on another device."""
        return TaskBatch(*((x.to(device), y.to(device)) for x, y in self))


@cites(FINN)
class Sinusoids:
    r"""Regression tasks y = a sin(x − b): a few points of a sine wave of unknown amplitude and phase.

    a ~ U(0.1, 5), b ~ U(0, π), x ~ U(−5, 5) by default, as in the reference.

    Args:
        shots: points of the support set.
        queries: points of the query set.
        amplitude: range of a.
        phase: range of b.
        x: range of the inputs.
        noise: standard deviation of Gaussian noise on the targets of the support set.
        dtype: of the points.

    Raises:
        ArgumentError: a size is not positive, a range is empty, or the noise is negative.

    Reference: Finn, Abbeel & Levine (2017), §5.1.

    Example:
        >>> batch = Sinusoids(shots=5, queries=10).sample(25, torch.Generator().manual_seed(0))
        >>> batch.support[0].shape, batch.query[1].shape
        (torch.Size([25, 5, 1]), torch.Size([25, 10, 1]))
    """

    def __init__(
        self,
        shots: int = 5,
        queries: int = 10,
        *,
        amplitude: tuple[float, float] = (0.1, 5.0),
        phase: tuple[float, float] = (0.0, math.pi),
        x: tuple[float, float] = (-5.0, 5.0),
        noise: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        _check_sizes(shots, queries)
        for name, (low, high) in {"amplitude": amplitude, "phase": phase, "x": x}.items():
            if not low <= high:
                raise ArgumentError(f"{name}=({low}, {high}) is no range: give (lowest, highest)")
        if noise < 0:
            raise ArgumentError(f"noise={noise} must not be negative: it is a standard deviation")
        self.shots, self.queries, self.noise, self.dtype = shots, queries, noise, dtype
        self.amplitude, self.phase, self.x = amplitude, phase, x

    def sample(self, tasks: int, generator: torch.Generator | None = None) -> TaskBatch:
        """Draw tasks.

        Args:
            tasks: how many.
            generator: source of randomness; torch's own by default. The tensors are on its device.

        Returns:
            :class:`TaskBatch` of ``(tasks, points, 1)``.
        """
        _check_tasks(tasks)
        points = self.shots + self.queries

        def uniform(span: tuple[float, float], *shape: int) -> Tensor:
            device = None if generator is None else generator.device
            share = torch.rand(shape, generator=generator, dtype=self.dtype, device=device)
            return span[0] + (span[1] - span[0]) * share

        a, b = uniform(self.amplitude, tasks, 1, 1), uniform(self.phase, tasks, 1, 1)
        x = uniform(self.x, tasks, points, 1)
        y = a * torch.sin(x - b)
        seen = y[:, : self.shots]
        if self.noise:
            seen = seen + self.noise * torch.randn(
                seen.shape, generator=generator, dtype=self.dtype, device=seen.device
            )
        return TaskBatch((x[:, : self.shots], seen), (x[:, self.shots :], y[:, self.shots :]))


class FewShot:
    """Classification tasks of a labelled data set: ``ways`` of its classes in random order, ``shots`` examples of each.

    Classes and examples are drawn without replacement within a task; support and query sets share no example.

    Args:
        x: examples ``(n, …)``.
        y: their classes ``(n,)``, integers.
        ways: classes of a task; its targets are 0 … ways − 1.
        shots: examples of each class in the support set.
        queries: examples of each class in the query set.

    Raises:
        ArgumentError: a size is not positive, or fewer classes than ``ways``.
        DataError: a class has too few examples.
        ShapeError: x and y differ in length, or the classes are not integers.

    Example:
        >>> family = FewShot(torch.arange(12.0)[:, None], torch.arange(12) // 4, ways=2, shots=1, queries=2)
        >>> batch = family.sample(3, torch.Generator().manual_seed(0))
        >>> batch.support[0].shape, batch.query[1][0]
        (torch.Size([3, 2, 1]), tensor([0, 0, 1, 1]))
    """

    def __init__(self, x: Tensor, y: Tensor, ways: int = 5, shots: int = 5, queries: int = 15) -> None:
        _check_sizes(shots, queries)
        if y.ndim != 1 or len(x) != len(y) or y.is_floating_point() or y.is_complex():
            raise ShapeError(
                f"x has shape {tuple(x.shape)} and y {tuple(y.shape)} of {y.dtype}: y must be one integer an example"
            )
        known, counts = torch.unique(y, return_counts=True)
        if not 1 <= ways <= len(known):
            raise ArgumentError(
                f"ways={ways}, but the data have {len(known)} classes: choose 1 … {len(known)}"
            )
        if int(counts.min()) < shots + queries:
            raise DataError(
                f"class {int(known[counts.argmin()])} has {int(counts.min())} examples, but a task takes "
                f"shots + queries = {shots + queries} of each: lower them, or leave out the class"
            )
        self.x, self.y, self.ways, self.shots, self.queries = x, y, ways, shots, queries
        order = torch.argsort(y, stable=True)
        start = counts.cumsum(0) - counts
        place = torch.arange(int(counts.max()), device=y.device)
        self._missing = place >= counts[:, None]  # (classes, largest class)
        self._rows = order[(start[:, None] + place).clamp_max(len(y) - 1)]

    def sample(self, tasks: int, generator: torch.Generator | None = None) -> TaskBatch:
        """Draw tasks.

        Args:
            tasks: how many.
            generator: source of randomness; torch's own by default.

        Returns:
            :class:`TaskBatch` with inputs ``(tasks, ways · shots, …)`` and targets ``(tasks, ways · shots)``, class by
            class; queries likewise.
        """
        _check_tasks(tasks)
        source = self.y.device if generator is None else generator.device

        def draw(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, device=source).to(self.y.device)

        classes = draw(tasks, len(self._rows)).topk(self.ways).indices
        keys = draw(tasks, self.ways, self._rows.shape[1]).masked_fill_(self._missing[classes], -1.0)
        chosen = keys.topk(self.shots + self.queries).indices
        rows = self._rows[classes[..., None], chosen]
        parts = []
        for block in (rows[..., : self.shots], rows[..., self.shots :]):
            labels = torch.arange(self.ways, device=self.y.device).repeat_interleave(block.shape[-1])
            parts.append((self.x[block.flatten(1)], labels.expand(tasks, -1)))
        return TaskBatch(*parts)


def digit_tasks(
    ways: int = 5,
    shots: int = 5,
    queries: int = 15,
    *,
    classes: Iterable[int] | None = None,
    rotations: bool = True,
    images: bool = False,
) -> FewShot:
    """Few-shot tasks of handwritten digits: tell ``ways`` of them apart after ``shots`` examples of each.

    Meta-train on some digits, ``classes=range(6)``, and meta-test on others, ``classes=range(6, 10)``. Rotated by a
    quarter, a half and three quarters of a turn, each digit is four classes, so that six digits are 24. The examples
    are the training and the test half of :func:`digits` together: what is held out is classes, not examples.

    Args:
        ways: classes of a task.
        shots: examples of each class in the support set.
        queries: examples of each class in the query set.
        classes: digits to use; all ten by default.
        rotations: count a rotated digit as another class.
        images: inputs of shape ``(1, 8, 8)``; else vectors of 64.

    Returns:
        :class:`FewShot` family, float32.

    Raises:
        ArgumentError: a digit is not 0 … 9, or fewer classes than ``ways``.

    Example:
        >>> family = digit_tasks(ways=5, shots=1, queries=5, classes=range(6, 10))
        >>> family.sample(2).support[0].shape
        torch.Size([2, 5, 64])
    """
    from bolza.data.sets import digits

    wanted = list(range(10)) if classes is None else sorted(set(classes))
    if any(digit not in range(10) for digit in wanted) or not wanted:
        raise ArgumentError(f"classes={wanted} are no digits: choose from 0 … 9")
    data = digits()
    x, y = torch.cat([data.train_x, data.test_x]).reshape(-1, 8, 8), torch.cat([data.train_y, data.test_y])
    kept = torch.isin(y, torch.tensor(wanted))
    x, y = x[kept], y[kept]
    if rotations:
        x = torch.cat([torch.rot90(x, turn, (1, 2)) for turn in range(4)])
        y = torch.cat([y + 10 * turn for turn in range(4)])
    return FewShot(x[:, None] if images else x.flatten(1), y, ways, shots, queries)


def _check_sizes(shots: int, queries: int) -> None:
    if shots < 1 or queries < 1:
        raise ArgumentError(f"shots={shots} and queries={queries} must be at least 1")


def _check_tasks(tasks: int) -> None:
    if tasks < 1:
        raise ArgumentError(f"tasks={tasks} must be at least 1")
