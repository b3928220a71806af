"""Linear algebra on nested containers of tensors.

A *tree* is a tensor, or a dict, list or tuple of trees. Leaves that are not floating-point
tensors (token indices, masks, sizes) ride along: arithmetic leaves them as they are, inner
products skip them, and their tangents and cotangents are ``None``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree

Tree: TypeAlias = Any

__all__ = [
    "Tree",
    "float_leaves",
    "is_differentiable",
    "tree_add",
    "tree_detach",
    "tree_dot",
    "tree_map",
    "tree_norm",
    "tree_scale",
    "tree_to_vector",
    "tree_zeros_like",
    "vector_to_tree",
    "with_float_leaves",
]


def is_differentiable(leaf: object) -> bool:
    """Whether a leaf is a tensor that derivatives can be taken of."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def tree_map(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Apply ``function`` to the differentiable leaves of ``tree`` (and those at the same place in ``rest``).

    Other leaves of ``tree`` are returned unchanged.

    Example:
        >>> tree_map(lambda a: 2 * a, {"x": torch.ones(2), "size": 3})
        {'x': tensor([2., 2.]), 'size': 3}
    """
    leaves, spec = _pytree.tree_flatten(tree)
    others = [_leaves_like(spec, other) for other in rest]
    places = zip(leaves, *others, strict=True)
    mapped = [function(leaf, *same) if is_differentiable(leaf) else leaf for leaf, *same in places]
    return _pytree.tree_unflatten(mapped, spec)


def _leaves_like(spec: _pytree.TreeSpec, tree: Tree) -> list[Any]:
    leaves, other = _pytree.tree_flatten(tree)
    if other.num_leaves != spec.num_leaves:
        raise ValueError(
            f"the trees have {spec.num_leaves} and {other.num_leaves} leaves: they must have one structure"
        )
    return leaves


def float_leaves(tree: Tree) -> list[Tensor]:
    """The differentiable leaves of a tree, in order."""
    return [leaf for leaf in _pytree.tree_leaves(tree) if is_differentiable(leaf)]


def with_float_leaves(tree: Tree, values: Sequence[Any], other: Any = ...) -> Tree:
    """Put ``values`` in the places of the differentiable leaves.

    Args:
        tree: the structure.
        values: one value a differentiable leaf, in order.
        other: what stands in the remaining places; by default what stood there.
    """
    leaves, spec = _pytree.tree_flatten(tree)
    rest = iter(values)
    filled = [next(rest) if is_differentiable(leaf) else leaf if other is ... else other for leaf in leaves]
    return _pytree.tree_unflatten(filled, spec)


def tree_detach(tree: Tree) -> Tree:
    """The same values, cut from the autograd graph."""
    return tree_map(lambda leaf: leaf.detach(), tree)


def tree_zeros_like(tree: Tree) -> Tree:
    """Zeros of the same shapes."""
    return tree_map(torch.zeros_like, tree)


def tree_scale(alpha: float | Tensor, tree: Tree) -> Tree:
    """Return alpha · x."""
    return tree_map(lambda leaf: alpha * leaf, tree)


def tree_add(x: Tree, y: Tree, alpha: float | Tensor = 1.0) -> Tree:
    """Return x + alpha · y; a ``None`` in ``y`` counts as zero.

    Example:
        >>> tree_add((torch.ones(1), 3), (torch.ones(1), 3), alpha=0.5)
        (tensor([1.5000]), 3)
    """
    return tree_map(lambda a, b: a if b is None else a + alpha * b, x, y)


def tree_dot(x: Tree, y: Tree) -> Tensor:
    """Inner product ⟨x, y⟩ = Re Σ x̄ᵢ yᵢ over all differentiable leaves; a ``None`` counts as zero.

    Raises:
        ValueError: the trees have different numbers of leaves, or nothing to multiply.

    Example:
        >>> tree_dot({"a": torch.ones(2), "n": 1}, {"a": torch.full((2,), 3.0), "n": None})
        tensor(6.)
    """
    xs, spec = _pytree.tree_flatten(x)
    ys = _leaves_like(spec, y)
    pairs = zip(xs, ys, strict=True)
    products = [(a.conj() * b).real.sum() for a, b in pairs if is_differentiable(a) and is_differentiable(b)]
    if not products:
        raise ValueError("the trees share no differentiable leaf: there is nothing to multiply")
    return torch.stack(products).sum()


def tree_norm(x: Tree) -> Tensor:
    """Euclidean norm over all differentiable leaves."""
    return tree_dot(x, x).sqrt()


def tree_to_vector(tree: Tree) -> Tensor:
    """All differentiable leaves as one flat vector.

    Example:
        >>> tree_to_vector({"a": torch.zeros(2), "b": torch.ones(1, 1)})
        tensor([0., 0., 1.])
    """
    return torch.cat([leaf.reshape(-1) for leaf in float_leaves(tree)])


def vector_to_tree(vector: Tensor, like: Tree) -> Tree:
    """Inverse of :func:`tree_to_vector`.

    Raises:
        ValueError: the vector does not have the length of the tree.
    """
    leaves = float_leaves(like)
    size = sum(leaf.numel() for leaf in leaves)
    if vector.numel() != size:
        raise ValueError(f"the vector has {vector.numel()} entries, the tree {size}")
    pieces = torch.split(vector, [leaf.numel() for leaf in leaves])
    return with_float_leaves(like, [p.reshape(leaf.shape) for p, leaf in zip(pieces, leaves, strict=True)])
