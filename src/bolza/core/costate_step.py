"""One step of the costate equation, as the sweeps that keep all states and those that keep few share it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bolza.core.errors import ShapeError
from bolza.core.system import System
from bolza.ops.trees import Tree, float_leaves, tree_map, with_float_leaves

if TYPE_CHECKING:
    from bolza.core.cost import Cost

__all__ = ["attach", "check_costate", "check_scalar", "pull_back", "step_back"]


def check_costate(t: int, p: Tree, following: Tree) -> None:
    """Raise a ShapeError unless a costate has the shape of the state it belongs to."""
    given, wanted = [a.shape for a in float_leaves(p)], [a.shape for a in float_leaves(following)]
    if given != wanted:
        raise ShapeError(
            f"step {t} returned a state of shape {[tuple(s) for s in wanted]}, but the costate after it "
            f"has shape {[tuple(s) for s in given]}: they must belong to the same batch and mode of the model"
        )


def attach(leaf: Tensor, create_graph: bool) -> Tensor:
    """A fresh node each time: derivatives are partial, even where two steps share a control."""
    leaf = leaf.clone() if leaf.is_inference() else leaf
    if create_graph:
        return leaf.view_as(leaf) if leaf.requires_grad else leaf.detach().requires_grad_()
    return leaf.detach().requires_grad_()


def step_back(
    system: System, cost: Cost, t: int, x: Tree, u: Tree, p: Tree, create_graph: bool = False
) -> tuple[Tree, Tree, Tensor | float]:
    """Costate p_t, gradient ∇_u H_t and running cost of one step, from the costate p_{t+1} after it."""
    fresh = partial(attach, create_graph=create_graph)
    x, u = tree_map(fresh, x), tree_map(fresh, u)
    following = system.step(t, tree_map(Tensor.clone, x), u)  # an in-place layer overwrites the clone
    check_costate(t, p, following)
    running = cost.running(t, x, u)
    outputs = [*float_leaves(following)]
    cotangents: list[Tensor | None] = [*float_leaves(p)]
    if isinstance(running, Tensor):
        check_scalar("running", running)
        outputs.append(running)
        cotangents.append(None)
    costate, gradient = pull_back(outputs, cotangents, [x, u], create_graph)
    return costate, gradient, running


def check_scalar(name: str, value: object) -> None:
    """Raise a ShapeError unless a cost is one number."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ShapeError(
            f"the {name} cost has shape {shape}, but a cost is one number: take the mean over samples, "
            "for example with reduction='mean'"
        )


def pull_back(
    outputs: list[Tensor], cotangents: list[Tensor | None], trees: list[Tree], create_graph: bool
) -> list[Tree]:
    """Cotangents of several trees; zero where the outputs do not depend on a leaf."""
    inputs = [leaf for tree in trees for leaf in float_leaves(tree)]
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if inputs and pairs:
        grads = torch.autograd.grad(
            [o for o, _ in pairs],
            inputs,
            [c for _, c in pairs],
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
    else:
        grads = tuple(torch.zeros_like(leaf) for leaf in inputs)
    found = iter(grads)
    return [with_float_leaves(tree, [next(found) for _ in float_leaves(tree)], other=None) for tree in trees]
