r"""Control of hidden states input by input, by the maximum principle.

    min_u Σ_t ½‖x_t + u_t − E_t(x_t + u_t)‖² + c/2 ‖u_t‖²,      x_{t+1} = f_t(x_t + u_t)

Nobody knows the label when the network is used; what is known is where states of clean inputs live. The gradient in all
u_t is the sweep of costates along the network, with the cost of one back-propagation. No sample sees another.

Reference: Chen, Li & Zhang (2021), arXiv:2102.01862.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError, DivergenceError
from bolza.core.reference import Reference, cites
from bolza.core.system import System
from bolza.ops.trees import float_leaves, tree_detach, with_float_leaves

__all__ = ["CHEN_CLOSED", "ClosedLoopControls", "closed_loop_controls", "shifted"]

CHEN_CLOSED = Reference(
    "chen2021towards",
    "Chen, Zhuotong and Li, Qianxiao and Zhang, Zheng",
    "Towards Robust Neural Networks via Close-loop Control",
    2021,
    venue="International Conference on Learning Representations",
    arxiv="2102.01862",
)

Residual = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ClosedLoopControls:
    """Controls of hidden states that were found for a batch of inputs.

    Attributes:
        output: what the network returns under them.
        controls: u_t for every stage; None where there is none.
        cost: cost of each sample, shape ``(n,)``; never above ``start``.
        start: its cost under the controls that the search began with.
    """

    output: Any
    controls: tuple[Tensor | None, ...]
    cost: Tensor
    start: Tensor


def shifted(x: Any, u: Tensor | None) -> Any:
    """The state with u added to its first floating tensor."""
    if u is None:
        return x
    first, *others = float_leaves(x)
    return with_float_leaves(x, [first + u, *others])


@cites(CHEN_CLOSED)
def closed_loop_controls(
    system: System,
    x: Any,
    residuals: Sequence[Residual | None],
    c: float,
    *,
    start: Sequence[Tensor | None] | None = None,
    iterations: int = 20,
    lr: float = 0.01,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
) -> ClosedLoopControls:
    r"""Controls that bring the states of given inputs back to where they belong, by descent along costates.

        J = Σ_t ½‖r_t(x_t + u_t)‖² + c/2 ‖u_t‖²,      u ← u − step · ∂J/∂u

    Each sample keeps the controls of its own lowest cost. Costs one forward and one backward pass an iteration, and
    one more forward pass.

    Args:
        system: stages f_t; its controls keep their nominal values, u_t is added to the state.
        x: initial states, samples first.
        residuals: r_t(x) = x − E_t(x) of the shape of x, for each stage; None where no control acts.
        c: price of control, positive.
        start: controls to begin with; zero by default.
        iterations: steps of descent.
        lr: rate of Adam, in the units of the states.
        optimizer: makes another optimizer of the list of controls; one that works entry by entry keeps samples apart.

    Returns:
        ClosedLoopControls, without a graph.

    Raises:
        ArgumentError: a price that is not positive, a number of residuals that is not the horizon, or no control.
        DivergenceError: the cost is not finite.

    Reference: Chen, Li & Zhang (2021), algorithm 1. Departures: the best controls are kept sample by sample, not batch
    by batch; costates have the sign of gradients.

    Example:
        >>> from bolza.systems import LinearSystem
        >>> system = LinearSystem(torch.eye(2), torch.zeros(2, 1), horizon=1)
        >>> off = lambda x: x * torch.tensor([0.0, 1.0])          # clean states have a second entry of zero
        >>> descent = lambda us: torch.optim.SGD(us, lr=0.5)
        >>> found = closed_loop_controls(system, torch.ones(1, 2), [off], c=1.0, iterations=2, optimizer=descent)
        >>> found.output                                          # α = c/(1 + c) of what is off remains
        tensor([[1.0000, 0.5000]])
    """
    if not 0 < c < float("inf"):
        raise ArgumentError(f"c={c} must be positive: it is the price of control")
    if len(residuals) != system.horizon:
        raise ArgumentError(
            f"{len(residuals)} residuals are given for {system.horizon} stages: one each, or None"
        )
    if iterations < 0:
        raise ArgumentError(f"iterations={iterations} must not be negative")
    places = [t for t, residual in enumerate(residuals) if residual is not None]
    if not places:
        raise ArgumentError("every residual is None: there is nothing to control")
    x = tree_detach(x)
    if start is None:
        controls = _zero(system, x, residuals)
    else:
        controls = [u if u is None else u.detach().clone() for u in start]
    leaves = [u for t in places if (u := controls[t]) is not None]
    if len(leaves) != len(places):
        raise ArgumentError("start has None where a residual is given: start with zeros there")
    made = optimizer or (lambda us: torch.optim.Adam(us, lr))
    descent = made(leaves)
    best = [u.clone() for u in leaves]
    lowest: Tensor | None = None
    first: Tensor | None = None
    for k in range(iterations + 1):
        going_on = k < iterations
        with torch.set_grad_enabled(going_on):
            for u in leaves:
                u.requires_grad_(going_on)
            cost = _cost(system, x, residuals, controls, c)
        now = cost.detach()
        if lowest is None:
            first = lowest = now
        else:
            better = now < lowest
            lowest = torch.where(better, now, lowest)
            for kept, u in zip(best, leaves, strict=True):
                kept.copy_(torch.where(better.reshape(-1, *[1] * (kept.ndim - 1)), u.detach(), kept))
        if not bool(torch.isfinite(now).all()):
            raise DivergenceError(
                "the cost of control is not finite: lower lr, or check the inputs for nan and inf"
            )
        if going_on:
            slopes = torch.autograd.grad(cost.sum(), leaves)
            for u, slope in zip(leaves, slopes, strict=True):
                u.grad = slope
            descent.step()
    found: list[Tensor | None] = [None] * system.horizon
    for t, u in zip(places, best, strict=True):
        found[t] = u
    with torch.no_grad():
        for t, u in enumerate(found):
            x = system.step(t, shifted(x, u), system.controls[t])
    assert lowest is not None and first is not None
    return ClosedLoopControls(x, tuple(found), lowest, first)


def _zero(system: System, x: Any, residuals: Sequence[Residual | None]) -> list[Tensor | None]:
    found: list[Tensor | None] = []
    with torch.no_grad():
        for t, residual in enumerate(residuals):
            found.append(None if residual is None else torch.zeros_like(float_leaves(x)[0]))
            if any(later is not None for later in residuals[t + 1 :]):
                x = system.step(t, x, system.controls[t])
    return found


def _cost(
    system: System, x: Any, residuals: Sequence[Residual | None], controls: Sequence[Tensor | None], c: float
) -> Tensor:
    """J of each sample."""
    total: Tensor | None = None
    last = max(t for t, residual in enumerate(residuals) if residual is not None)
    for t in range(last + 1):
        u, residual = controls[t], residuals[t]
        x = shifted(x, u)
        if u is not None and residual is not None:
            off = residual(float_leaves(x)[0])
            running = 0.5 * off.flatten(1).square().sum(1) + 0.5 * c * u.flatten(1).square().sum(1)
            total = running if total is None else total + running
        if t < last:
            x = system.step(t, x, system.controls[t])
    assert total is not None
    return total
