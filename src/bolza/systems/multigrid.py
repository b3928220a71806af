"""Multigrid over the steps of a system: the iteration behind :mod:`bolza.systems.parareal`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from bolza.core.errors import ArgumentError, ShapeError
from bolza.ops.trees import Tree, tree_add, tree_norm

__all__ = ["Grid", "Jump", "Multigrid", "Relaxation", "iterate", "nested_grids"]

Jump = Callable[[int, int, Tree], Tree]
"""(start, stop, x_start) → approximate x_stop, at about the cost of one step."""
Relaxation = Literal["F", "FCF"]


@dataclass
class Grid:
    """One level: the times it has, and how a state gets from one to the next."""

    times: tuple[int, ...]
    advance: Callable[[int, Tree], Tree]  # (i, u_i) → u_{i+1} without the right-hand side
    coarse: tuple[int, ...] = ()  # which of the times are also those of the next level


class Multigrid:
    """Full approximation scheme for u_{i+1} = Φ_i(u_i) + g_{i+1} on nested grids."""

    def __init__(self, grids: Sequence[Grid], relaxation: Relaxation) -> None:
        self.grids, self.relaxation = list(grids), relaxation
        self.path = 0
        self.residuals: list[float] = []

    def start(self, u0: Tree, guess: Sequence[Tree] | None) -> list[Tree]:
        """Points of the finest level: from a guess at its C-points, or from the coarsest level upwards."""
        if guess is not None:
            u: list[Tree] = [u0, *guess[1:]]
        else:
            last = self.grids[-1]
            u = self._serial(last, u0, None)
            for level in range(len(self.grids) - 2, 0, -1):
                u = self._filled(level, u, None)
        return self._filled(0, u, None)

    def cycle(self, level: int, u: list[Tree], g: list[Tree | None] | None) -> list[Tree]:
        """One iteration: relaxation, correction by the next level, F-relaxation."""
        grid, coarser = self.grids[level], self.grids[level + 1]
        if self.relaxation == "FCF":
            at = self._ends(level, u, g)
            self.path += 1
            u = self._filled(level, [u[0], *at], g)
        ends = self._ends(level, u, g)
        self.path += 1
        old = [u[c] for c in grid.coarse]
        if level == 0:
            self.residuals.append(_largest(ends, old[1:]))
        # Φ^c(u_{k−1}) − u_k + r_k with r_k = ends_k − u_k: what the coarse level must reproduce
        rhs: list[Tree | None] = [None]
        for k in range(1, len(old)):
            rhs.append(tree_add(ends[k - 1], coarser.advance(k - 1, old[k - 1]), alpha=-1.0))
        if level + 2 == len(self.grids):
            new = self._serial(coarser, u[0], rhs)
        else:
            begun = self._filled(level + 1, [old[c] for c in coarser.coarse], rhs)
            new = self.cycle(level + 1, begun, rhs)
        return self._filled(level, new, g)

    def _apply(self, grid: Grid, i: int, u: Tree, g: list[Tree | None] | None) -> Tree:
        value = grid.advance(i, u)
        return value if g is None or g[i + 1] is None else tree_add(value, g[i + 1])

    def _serial(self, grid: Grid, u0: Tree, g: list[Tree | None] | None) -> list[Tree]:
        u = [u0]
        for i in range(len(grid.times) - 1):
            u.append(self._apply(grid, i, u[i], g))
        self.path += len(grid.times) - 1
        return u

    def _filled(self, level: int, at: Sequence[Tree], g: list[Tree | None] | None) -> list[Tree]:
        """F-relaxation: all points from those at the C-points, every interval by itself."""
        grid = self.grids[level]
        stops = [*grid.coarse[1:], len(grid.times)]
        u: list[Tree] = []
        for first, stop, value in zip(grid.coarse, stops, at, strict=True):
            u.append(value)
            for i in range(first, stop - 1):
                u.append(self._apply(grid, i, u[i], g))
        gaps = [stop - first - 1 for first, stop in zip(grid.coarse, stops, strict=True)]
        self.path += max(gaps)
        return u

    def _ends(self, level: int, u: list[Tree], g: list[Tree | None] | None) -> list[Tree]:
        """What the intervals bring to the C-points behind them."""
        grid = self.grids[level]
        return [self._apply(grid, c - 1, u[c - 1], g) for c in grid.coarse[1:]]


def _largest(found: Sequence[Tree], wanted: Sequence[Tree]) -> float:
    jumps = [
        float(tree_norm(tree_add(a, b, alpha=-1.0)) / tree_norm(a).clamp_min(torch.finfo(torch.float32).tiny))
        for a, b in zip(found, wanted, strict=True)
    ]
    return max(jumps, default=0.0)


def nested_grids(
    boundaries: tuple[int, ...], levels: int, factor: int, fine: Callable[[int, Tree], Tree], jump: Jump
) -> list[Grid]:
    """Levels of an iteration: all steps, the boundaries of slices, and every ``factor``-th of the level above.

    Raises:
        ArgumentError: fewer than two levels, or more than there is to coarsen.
    """
    if levels < 2 or factor < 2:
        raise ArgumentError(f"levels is {levels} and factor is {factor}: both must be at least 2")
    grids = [Grid(tuple(range(boundaries[-1] + 1)), fine, boundaries)]
    times = boundaries
    while True:
        own = times
        grids.append(Grid(own, partial(_jump_between, own, jump)))
        if len(grids) == levels:
            return grids
        kept = tuple(range(0, len(own), factor))
        if len(kept) < 3:
            raise ArgumentError(
                f"levels is {levels}, but with {len(boundaries) - 1} slices and factor {factor} there is nothing "
                f"to coarsen after level {len(grids)}: choose levels={len(grids)} or more slices"
            )
        grids[-1].coarse = kept
        times = tuple(own[k] for k in kept)


def _jump_between(times: tuple[int, ...], jump: Jump, i: int, x: Tree) -> Tree:
    return jump(times[i], times[i + 1], x)


def iterate(
    grids: list[Grid],
    relaxation: Relaxation,
    u0: Tree,
    guess: Sequence[Tree] | None,
    iterations: int,
    tolerance: float,
) -> tuple[list[Tree], Multigrid]:
    """Run the iteration until it has done its share or the residual is small: states, and the solver's record.

    Raises:
        ArgumentError: the relaxation is unknown, or the number of iterations negative.
        ShapeError: the guess has another number of states than there are boundaries.
    """
    if relaxation not in ("F", "FCF"):
        raise ArgumentError(f"relaxation is {relaxation!r}: choose 'F' or 'FCF'")
    if iterations < 0:
        raise ArgumentError(f"iterations is {iterations}: it must not be negative")
    if guess is not None and len(guess) != len(grids[0].coarse):
        raise ShapeError(
            f"initial has {len(guess)} states, but the slices have {len(grids[0].coarse)} boundaries: give one "
            "state for each, the first and the last included"
        )
    solver = Multigrid(grids, relaxation)
    u = solver.start(u0, guess)
    for _ in range(iterations):
        u = solver.cycle(0, u, None)
        if solver.residuals[-1] <= tolerance:
            break
    return u, solver
