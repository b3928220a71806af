"""The contract of a system: its steps are pure, and three routes to its derivatives agree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bolza.core import Cost, System, adjoint, linearize, rollout
from bolza.ops.trees import Tree, float_leaves, tree_add, tree_dot, tree_map, tree_norm
from bolza.testing.clauses import identical, require

__all__ = ["check_system"]


def check_system(
    system: System,
    x0: Tree,
    cost: Cost,
    controls: Sequence[Tree] | None = None,
    *,
    tolerance: float | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Check that a system is one: pure steps, and costates that equal autograd and finite differences.

    Args:
        system: the system under test, in float64 for a sharp test.
        x0: initial state, a tree of tensors.
        cost: a smooth cost of its trajectories.
        controls: one tree a step; the system's own by default.
        tolerance: relative error allowed between the routes; by default the square root of the
            machine precision ε between autograd and the adjoint, and 1000 ε^(2/3) for central differences.
        generator: source of the random directions; a fixed seed by default.

    Raises:
        ContractError: names the first clause that does not hold.

    Example:
        >>> from bolza.core import CallableCost
        >>> from bolza.systems import LinearSystem
        >>> system = LinearSystem(torch.eye(2).double(), torch.ones(2, 1).double(), horizon=3)
        >>> cost = CallableCost(terminal=lambda x: (x**2).sum(), running=lambda t, x, u: (u**2).sum())
        >>> check_system(system, torch.ones(2).double(), cost, [torch.ones(1).double()] * 3)
    """
    draw = generator or torch.Generator(device=_device(x0)).manual_seed(0)
    controls = tuple(system.controls if controls is None else controls)
    x0 = tree_map(lambda leaf: leaf.detach().clone(), x0)
    controls = tuple(tree_map(lambda leaf: leaf.detach().clone(), u) for u in controls)
    precision = max((torch.finfo(leaf.dtype).eps for leaf in float_leaves(x0)), default=1e-16)

    _has_the_form(system, controls)
    _steps_are_pure(system, x0, controls)
    _adjoint_equals_autograd(system, x0, cost, controls, tolerance or precision**0.5)
    _gradient_equals_differences(system, x0, cost, controls, tolerance or 1e3 * precision ** (2 / 3), draw)
    _products_are_adjoint(system, x0, controls, tolerance or precision**0.5, draw)


def _device(tree: Tree) -> torch.device:
    leaves = float_leaves(tree)
    return leaves[0].device if leaves else torch.device("cpu")


def _has_the_form(system: System, controls: Sequence[Tree]) -> None:
    require(
        isinstance(system, System),
        "has_the_form",
        f"{type(system).__name__} has not all of horizon, controls and step(t, x, u)",
    )
    require(
        isinstance(system.horizon, int) and system.horizon == len(controls),
        "has_the_form",
        f"horizon is {system.horizon!r}, but there are {len(controls)} controls: they must be equal",
    )


def _steps_are_pure(system: System, x0: Tree, controls: Sequence[Tree]) -> None:
    x = x0
    for t, u in enumerate(controls):
        x_before, u_before = tree_map(Tensor.clone, x), tree_map(Tensor.clone, u)
        with torch.no_grad():
            given = tree_map(Tensor.clone, x)
            first, second = system.step(t, given, u), system.step(t, tree_map(Tensor.clone, x), u)
        require(
            identical(float_leaves(first), float_leaves(second)),
            "steps_are_pure",
            f"step {t} returned two different states for the same arguments: "
            "fix the random draws when the system is built",
        )
        require(
            identical(float_leaves(u), float_leaves(u_before)),
            "steps_are_pure",
            f"step {t} changed its control: work on a copy",
        )
        require(
            identical(float_leaves(given), float_leaves(x_before)),
            "steps_are_pure",
            f"step {t} changed the state it was given: work on a copy",
        )
        x = first


def _leaf(leaf: Tensor) -> Tensor:
    return leaf.detach().clone().requires_grad_()


def _total(system: System, x0: Tree, cost: Cost, controls: Sequence[Tree]) -> Tensor:
    """J by a plain loop, independent of rollout and adjoint."""
    x, value = x0, torch.zeros(())
    for t, u in enumerate(controls):
        value = value + cost.running(t, x, u)
        x = system.step(t, tree_map(Tensor.clone, x), u)
    return value + cost.terminal(x)


def _adjoint_equals_autograd(
    system: System, x0: Tree, cost: Cost, controls: Sequence[Tree], tolerance: float
) -> None:
    run = adjoint(system, cost, rollout(system, x0, controls))
    assert run.costates is not None and run.gradients is not None and run.value is not None
    x, us = tree_map(_leaf, x0), [tree_map(_leaf, u) for u in controls]
    total = _total(system, x, cost, us)
    require(
        abs(float(total.detach()) - float(run.value)) <= tolerance * (1 + abs(float(run.value))),
        "adjoint_equals_autograd",
        f"the cost along rollout is {float(run.value):.9g}, by a plain loop {float(total.detach()):.9g}",
    )
    named = [("the initial state", x, run.costates[0])]
    named += [(f"the control of step {t}", u, run.gradients[t]) for t, u in enumerate(us)]
    for name, tree, found in named:
        leaves = float_leaves(tree)
        if not leaves:
            continue
        exact = torch.autograd.grad(
            total, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        error = max(
            float((a - b).norm() / (1 + a.norm())) for a, b in zip(exact, float_leaves(found), strict=True)
        )
        require(
            error <= tolerance,
            "adjoint_equals_autograd",
            f"the gradient in {name} differs from autograd through the whole run by {error:.2g} "
            f"(allowed {tolerance:.2g}): does a step detach, or use something other than its arguments?",
        )


def _gradient_equals_differences(
    system: System,
    x0: Tree,
    cost: Cost,
    controls: Sequence[Tree],
    tolerance: float,
    draw: torch.Generator,
) -> None:
    run = adjoint(system, cost, rollout(system, x0, controls))
    assert run.costates is not None and run.gradients is not None
    direction_x, direction_u = _random(x0, draw), [_random(u, draw) for u in controls]
    pairs = [(run.costates[0], direction_x), *zip(run.gradients, direction_u, strict=True)]
    slope = sum(float(tree_dot(a, b)) for a, b in pairs if float_leaves(b))
    largest = max((float(tree_norm(u)) for u in [x0, *controls] if float_leaves(u)), default=1.0)
    eps = max(torch.finfo(leaf.dtype).eps for leaf in float_leaves(x0))
    h = eps ** (1 / 3) * max(largest, 1e-3)

    def at(s: float) -> float:
        us = [tree_add(u, v, alpha=s) for u, v in zip(controls, direction_u, strict=True)]
        with torch.no_grad():
            return float(_total(system, tree_add(x0, direction_x, alpha=s), cost, us))

    measured = (at(h) - at(-h)) / (2 * h)
    size = sum(float(tree_norm(a)) * float(tree_norm(b)) for a, b in pairs if float_leaves(b))
    require(
        abs(measured - slope) <= tolerance * (abs(slope) + abs(measured)) + tolerance * size,
        "gradient_equals_differences",
        f"along a random direction the cost has the slope {measured:.9g} by central differences, "
        f"but the adjoint gives {slope:.9g}: is a step's derivative overridden, or not smooth here?",
    )


def _products_are_adjoint(
    system: System, x0: Tree, controls: Sequence[Tree], tolerance: float, draw: torch.Generator
) -> None:
    x = x0
    for t, u in enumerate(controls):
        linear = linearize(system, t, x, u)
        dx, du, p = _random(x, draw), _random(u, draw), _random(linear.next_state, draw)
        to_x, to_u = linear.vjp(p)
        forward = float(tree_dot(linear.jvp(dx, du), p))
        backward = sum(float(tree_dot(a, b)) for a, b in ((to_x, dx), (to_u, du)) if float_leaves(b))
        scale = 1 + abs(forward) + float(tree_norm(p))
        require(
            abs(forward - backward) <= tolerance * scale,
            "products_are_adjoint",
            f"at step {t} ⟨p, A δx + B δu⟩ is {forward:.9g} forward and {backward:.9g} backward",
        )
        x = linear.next_state


def _random(tree: Tree, draw: torch.Generator) -> Tree:
    """A random direction with the structure of ``tree``."""

    def normal(leaf: Tensor) -> Tensor:
        return torch.randn(leaf.shape, generator=draw, dtype=leaf.dtype, device=leaf.device)

    return tree_map(normal, tree)
