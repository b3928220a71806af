r"""The costate sweep in the memory of √T states instead of T.

    forward:   keep x_0, x_k, x_2k, …
    backward:  for each segment, last first: run it once more and keep its states, then
               p_t = ∇_x H_t(x_t, p_{t+1}, u_t) and ∂J/∂u_t = ∇_u H_t, step by step

T/k + k states are alive at a time, 2√T for k = √T, for one evaluation of each step more.

Reference: Griewank (1992), *Achieving logarithmic growth of temporal and spatial complexity in reverse automatic
differentiation*; one level, with equal distances, as in Chen, Xu, Zhang & Guestrin (2016), *Training Deep Nets with
Sublinear Memory Cost*, arXiv:1604.06174.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bolza.core.cost import Cost
from bolza.core.costate_step import attach, check_scalar, pull_back, step_back
from bolza.core.errors import ArgumentError
from bolza.core.reference import Reference, cites
from bolza.core.system import System
from bolza.ops.trees import Tree, tree_detach, tree_map

__all__ = ["Sweep", "checkpointed_adjoint"]

CHEN = Reference(
    "chen2016sublinear",
    "Chen, Tianqi and Xu, Bing and Zhang, Chiyuan and Guestrin, Carlos",
    "Training Deep Nets with Sublinear Memory Cost",
    2016,
    arxiv="1604.06174",
)


@dataclass(frozen=True)
class Sweep:
    """What a costate sweep leaves behind when the states in between are not kept.

    Attributes:
        final: state x_T.
        costate: p_0, the gradient of J in the initial state; leaves without a derivative hold ``None``.
        gradients: ∂J/∂u_t, one tree a step; empty where they were not wanted.
        value: the cost J, a scalar.
        most_states: largest number of states that were held at once.
    """

    final: Tree
    costate: Tree
    gradients: tuple[Tree, ...]
    value: Tensor
    most_states: int


@cites(CHEN)
def checkpointed_adjoint(
    system: System,
    cost: Cost,
    x0: Tree,
    controls: Sequence[Tree] | None = None,
    *,
    every: int | None = None,
    gradients: bool = True,
    visit: Callable[[int, Tree, Tree, Tree], None] | None = None,
) -> Sweep:
    r"""Roll out and run the costate equation back, keeping only every k-th state.

    The numbers are those of :func:`~bolza.core.adjoint` after :func:`~bolza.core.rollout`, to the bit where a
    step gives the same result twice.

    Args:
        system: the dynamics; a step must give the same state whenever it is evaluated (seed its randomness).
        cost: terminal and running cost.
        x0: initial state, a tree of tensors.
        controls: one tree a step; the system's own by default.
        every: k, distance of the states that are kept; ⌈√T⌉ by default, 1 keeps all, T only the first.
        gradients: keep ∂J/∂u_t of every step; ``False`` where ``visit`` reads what is wanted.
        visit: called as ``visit(t, x_t, p_{t+1}, ∂J/∂u_t)`` on the way back, t = T−1 … 0.

    Returns:
        :class:`Sweep`.

    Raises:
        ArgumentError: ``every`` is below 1, or the number of controls is not the horizon.
        ShapeError: a cost is not a scalar.

    Reference: Chen, Xu, Zhang & Guestrin (2016), arXiv:1604.06174, §4.

    Example:
        >>> from bolza.core import CallableCost
        >>> from bolza.systems import LinearSystem
        >>> system = LinearSystem(2 * torch.eye(1), torch.eye(1), horizon=100)
        >>> controls = [torch.zeros(1)] * 100
        >>> sweep = checkpointed_adjoint(system, CallableCost(terminal=lambda x: x.sum()), torch.ones(1), controls)
        >>> float(sweep.costate) == 2.0**100, len(sweep.gradients), sweep.most_states
        (True, 100, 19)
    """
    controls = tuple(system.controls if controls is None else controls)
    steps = len(controls)
    if steps != system.horizon:
        raise ArgumentError(
            f"controls has {steps} entries, but the horizon of the system is {system.horizon}: "
            "give one control for each step"
        )
    k = max(1, math.isqrt(max(steps - 1, 0)) + 1) if every is None else every
    if k < 1:
        raise ArgumentError(
            f"every={every} must be at least 1: it is the distance of the states that are kept"
        )
    controls = tuple(tree_detach(u) for u in controls)
    kept: dict[int, Tree] = {}
    most = 1
    x = tree_detach(x0)
    with torch.no_grad():
        for t, u in enumerate(controls):
            if t % k == 0:
                kept[t] = x
            x = system.step(t, x, u)
    final = x
    found: list[Tree] = []
    with torch.enable_grad():
        last = tree_map(lambda leaf: attach(leaf, False), final)
        value = cost.terminal(last)
        check_scalar("terminal", value)
        (p,) = pull_back([value], [None], [last], False)
        value = value.detach()
        for first in reversed(range(0, steps, k)):
            states = [kept.pop(first)]
            with torch.no_grad():
                for t in range(first, min(first + k, steps) - 1):
                    states.append(system.step(t, states[-1], controls[t]))
            most = max(most, len(kept) + len(states))
            for t in reversed(range(first, first + len(states))):
                before = states.pop()
                following, after = p, controls[t]
                p, gradient, running = step_back(system, cost, t, before, after, following)
                value = value + (running.detach() if isinstance(running, Tensor) else running)
                if gradients:
                    found.append(gradient)
                if visit is not None:
                    visit(t, before, following, gradient)
    return Sweep(final, p, tuple(reversed(found)), value, most)
