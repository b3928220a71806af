"""The states of a network as rows of numbers, and its stages one by one: what control of hidden states works on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import map_arg
from torch.utils import _pytree

from bolza.core.errors import ArgumentError, DataError, ShapeError
from bolza.ops.trees import float_leaves
from bolza.robust.manifolds import Manifold
from bolza.systems.module import ModuleSystem, bind
from bolza.systems.replay import Replay

__all__ = [
    "Form",
    "Residual",
    "StageStep",
    "StageSystem",
    "first_tensor",
    "followed",
    "gather",
    "read_forms",
    "stage_steps",
    "taken",
]

_LARGE = 4096  # numbers in the state of one sample, above which images are read pixel by pixel


@dataclass(frozen=True)
class Form:
    """How the states of one stage are read as rows of numbers."""

    stage: int
    axis: int | None  # which axis holds the numbers of a row; None for the whole state of a sample

    def rows(self, x: Tensor) -> Tensor:
        """A state with its rows along the last dimension."""
        return x.flatten(1) if self.axis is None else x.movedim(self.axis, -1)

    def back(self, rows: Tensor, like: Tensor) -> Tensor:
        """Rows as a state again."""
        return rows.reshape(like.shape) if self.axis is None else rows.movedim(-1, self.axis)


class StageStep:
    """One stage, run as the network itself runs it."""

    def __init__(self, stage: Any, replay: Replay) -> None:
        self.stage, self.replay = stage, replay

    def __call__(self, x: Any) -> Any:
        """The next state."""
        env = self.replay.in_place(bind(self.stage, x))
        return map_arg(self.stage.outputs, env.__getitem__)


def stage_steps(system: ModuleSystem) -> tuple[StageStep, ...]:
    """The stages of a network, in its present mode."""
    constants = system.traced.constants
    return tuple(StageStep(stage, Replay(system.module, stage.nodes, constants)) for stage in system.stages)


class StageSystem:
    """The stages as a system without controls of its own."""

    def __init__(self, steps: Sequence[StageStep]) -> None:
        self._steps = steps
        self.horizon = len(steps)
        self.controls: tuple[dict[str, Tensor], ...] = tuple({} for _ in steps)

    def step(self, t: int, x: Any, u: Any) -> Any:
        """The next state; ``u`` is not used."""
        return self._steps[t](x)


class Residual:
    """x − E(x) for the states of a stage."""

    def __init__(self, form: Form, manifold: Manifold) -> None:
        self.form, self.manifold = form, manifold

    def __call__(self, x: Tensor) -> Tensor:
        """What control may take away.

        Raises:
            ShapeError: the state has another size than those that were learned from.
        """
        rows = self.form.rows(x)
        mean = self.manifold.mean
        if rows.shape[-1] != len(mean):
            raise ShapeError(
                f"the state of stage {self.form.stage} has {rows.shape[-1]} numbers, the manifold was learned from "
                f"{len(mean)}: fit with inputs of this size, or choose form='embedding'"
            )
        return self.form.back(rows - self.manifold(rows), x)


def read_forms(states: Sequence[Any], layers: str | Sequence[int], form: str) -> tuple[Form, ...]:
    """Which of the states that enter the stages are controlled, and how they are read.

    Raises:
        ArgumentError: a layer that is asked for does not exist, or none is left.
    """
    floating = [t for t, x in enumerate(states) if float_leaves(x)]
    if layers == "all":
        chosen = floating
    elif isinstance(layers, str):
        chosen = floating[:1] if layers == "input" else floating[1:]
    else:
        horizon = len(states)
        wrong = [t for t in layers if not -horizon <= t < horizon or t % horizon not in floating]
        if wrong:
            raise ArgumentError(
                f"layers has {wrong[0]}, but the states that can be controlled are {floating}"
            )
        chosen = sorted({t % horizon for t in layers})
    if not chosen:
        raise ArgumentError(
            f"layers={layers!r} leaves nothing to control: the floating states are {floating}"
        )
    return tuple(Form(t, _axis(float_leaves(states[t])[0], form)) for t in chosen)


def _axis(x: Tensor, form: str) -> int | None:
    if x.ndim < 3 or form == "flat" or (form == "auto" and x.ndim > 3 and x[0].numel() <= _LARGE):
        return None
    return -1 if x.ndim == 3 else 1


def gather(
    states: Sequence[Any],
    right: Tensor | None,
    forms: Sequence[Form],
    terms: str,
    limit: int,
    into: dict[tuple[int, str], list[Tensor]],
) -> int:
    """Put the rows of the states of what is right ``into`` lists; returns the number of samples taken.

    Args:
        states: those that enter the stages.
        right: what the network gets right, one flag a sample or a position; None for all.
        forms: which states to take.
        terms: P, and I for running means, D for differences.
        limit: samples to take at most.
        into: rows by stage and term.
    """
    n = len(first_tensor(states[0]))
    kept = torch.arange(n) if right is None else right.reshape(n, -1).any(1).nonzero().flatten().cpu()
    kept = kept[: max(0, limit)]
    by_stage = {form.stage: form for form in forms}
    for (stage, term), x in followed(states, set(by_stage), terms):
        here, axis = kept.to(x.device), by_stage[stage].axis
        rows = by_stage[stage].rows(x[here])
        if axis is not None:
            spots = right[here] if right is not None and axis == -1 and right.shape == x.shape[:-1] else None
            rows = rows.flatten(0, -2) if spots is None else rows[spots]
        into.setdefault((stage, term), []).append(rows.clone())
    return len(kept)


def followed(states: Sequence[Any], wanted: set[int], terms: str) -> Iterator[tuple[tuple[int, str], Tensor]]:
    """States, their running means and their differences; the last two begin anew where the shape changes."""
    total: Tensor | None = None
    before: Tensor | None = None
    length = 0
    for t, state in enumerate(states):
        leaves = float_leaves(state)
        if not leaves:
            total = before = None
            continue
        x = leaves[0]
        if total is None or total.shape != x.shape:
            total, before, length = torch.zeros_like(x), None, 0
        total, length = total + x, length + 1
        if t in wanted:
            yield (t, "P"), x
            if "I" in terms and length > 1:
                yield (t, "I"), total / length
            if "D" in terms and before is not None:
                yield (t, "D"), x - before
        before = x


def first_tensor(args: Any) -> Tensor:
    """The first tensor among arguments: it says how many samples there are.

    Raises:
        DataError: there is none.
    """
    for leaf in _pytree.tree_leaves(args):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return leaf
    raise DataError("x holds no tensor with samples first")


def taken(args: Any, rows: Any) -> tuple[Any, ...]:
    """Some samples of all arguments."""
    n = len(first_tensor(args))

    def part(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.ndim or len(leaf) != n:
            return leaf
        return leaf[rows.to(leaf.device) if isinstance(rows, Tensor) else rows]

    found: tuple[Any, ...] = _pytree.tree_map(part, args)
    return found
