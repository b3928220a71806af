"""What stands between two slices of a network: the next one's input, and the price of a mismatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError, ShapeError
from bolza.ops.trees import Tree, float_leaves, tree_add, tree_map, with_float_leaves

__all__ = ["InterfaceMemory", "auxiliary_step", "boundary_costate", "multiplier_step"]


def boundary_costate(x: Tree, lam: Tree, kappa: Tree, beta: float) -> Tree:
    """Costate p = κ + β (X − λ) at the end of a slice that leaves X where the next one begins from λ.

    Example:
        >>> boundary_costate(torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([0.5]), beta=2.0)
        tensor([4.5000])
    """
    return tree_add(kappa, tree_add(x, lam, alpha=-1.0), alpha=beta)


def auxiliary_step(lam: Tree, gradient: Tree, p: Tree, lr: float) -> Tree:
    """Input of a slice after a step: λ − η_λ (∂(slice)/∂λ − p).

    Example:
        >>> auxiliary_step(torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([1.0]), lr=0.5)
        tensor([0.])
    """
    return tree_add(lam, tree_add(gradient, p, alpha=-1.0), alpha=-lr)


def multiplier_step(kappa: Tree, x: Tree, lam: Tree, beta: float, rho: float) -> Tree:
    """Multiplier after a step: κ + ρβ (X − λ).

    Example:
        >>> multiplier_step(torch.tensor([0.0]), torch.tensor([3.0]), torch.tensor([1.0]), beta=1.0, rho=0.5)
        tensor([1.])
    """
    return tree_add(kappa, tree_add(x, lam, alpha=-1.0), alpha=rho * beta)


class InterfaceMemory:
    """Inputs λ_k and multipliers κ_k of every training example, for the slices of one process.

    Args:
        samples: number of training examples; none if nothing is to be remembered.

    Example:
        >>> memory = InterfaceMemory(3)
        >>> memory.store(1, torch.tensor([2, 0]), torch.tensor([[5.0], [6.0]]), torch.zeros(2, 1))
        >>> memory.mark(torch.tensor([2, 0]))
        >>> memory.fresh(torch.tensor([0, 1])), memory.recall(1, torch.tensor([0]), torch.zeros(1, 1))[0]
        (tensor([False,  True]), tensor([[6.]]))
    """

    def __init__(self, samples: int | None) -> None:
        self.samples = samples
        self._seen = torch.zeros(samples or 0, dtype=torch.bool)
        self._held: dict[int, tuple[list[Tensor], list[Tensor]]] = {}

    def rows(self, index: Tensor | None, batch: int) -> Tensor | None:
        """Check the numbers of a batch's samples.

        Raises:
            ArgumentError: nothing is remembered, or the numbers are not those of training examples.
        """
        if index is None:
            return None
        if self.samples is None:
            raise ArgumentError(
                "index is given, but samples is None: say how many training examples there are"
            )
        rows = index.detach().cpu()
        whole = rows.shape == (batch,) and not rows.is_floating_point() and rows.dtype != torch.bool
        if not whole or not bool(((rows >= 0) & (rows < self.samples)).all()):
            raise ArgumentError(
                f"index has shape {tuple(rows.shape)}, type {rows.dtype} and the largest entry {rows.max()}: it must "
                f"hold the number, from 0 to {self.samples - 1}, of each of the {batch} samples"
            )
        return rows.long()

    def fresh(self, rows: Tensor) -> Tensor:
        """Which of these have never been stored."""
        return ~self._seen[rows]

    def mark(self, rows: Tensor) -> None:
        """Note that these have been stored; every process does, also one that has nothing to store."""
        self._seen[rows] = True

    def recall(self, k: int, rows: Tensor, form: Tree) -> tuple[Tree, Tree]:
        """Return λ_k and κ_k of these examples, in the structure of ``form``."""
        lam, kappa = ([a[rows.to(a.device)] for a in part] for part in self._held[k])
        return with_float_leaves(form, lam), with_float_leaves(form, kappa)

    def store(self, k: int, rows: Tensor, lam: Tree, kappa: Tree) -> None:
        """Keep λ_k and κ_k of these examples.

        Raises:
            ShapeError: the state does not have the samples first.
        """
        values, prices = float_leaves(lam), float_leaves(kappa)
        if k not in self._held:
            odd = next((a for a in values if a.shape[:1] != rows.shape), None)
            if odd is not None:
                raise ShapeError(
                    f"what enters slice {k} has shape {tuple(odd.shape)} for {len(rows)} samples: the first dimension "
                    "must be that of the samples, or call backward without index"
                )
            lams, kappas = ([a.new_zeros(len(self._seen), *a.shape[1:]) for a in values] for _ in range(2))
            self._held[k] = lams, kappas
        lams, kappas = self._held[k]
        for held, new in zip([*lams, *kappas], [*values, *prices], strict=True):
            held[rows.to(held.device)] = new.detach()

    def state_dict(self) -> dict[str, Any]:
        """All of it, as tensors."""
        held = {k: {"lam": list(lam), "kappa": list(kappa)} for k, (lam, kappa) in self._held.items()}
        return {"seen": self._seen, "held": held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave.

        Raises:
            ArgumentError: it is that of another number of examples.
        """
        if len(state["seen"]) != len(self._seen):
            raise ArgumentError(
                f"the state is that of {len(state['seen'])} training examples, but samples is {self.samples}"
            )
        self._seen = state["seen"].clone()
        self._held = {
            int(k): ([a.clone() for a in part["lam"]], [a.clone() for a in part["kappa"]])
            for k, part in state["held"].items()
        }


def mixed(fresh: Tensor, new: Tree, old: Tree) -> Tree:
    """Rows of ``new`` where ``fresh``, of ``old`` elsewhere."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(fresh.to(a.device).reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return tree_map(pick, new, old)


def leaf_of(tree: Tree) -> Tree:
    """The same values, as leaves of a new graph."""
    return tree_map(lambda a: a.detach().requires_grad_(), tree)


def pull_back(outputs: Tree, cotangents: Tree) -> None:
    """Add the gradients of what ``outputs`` were made from; nothing where all of it is frozen."""
    pairs = [
        (o, c)
        for o, c in zip(float_leaves(outputs), float_leaves(cotangents), strict=True)
        if o.requires_grad
    ]
    if pairs:
        torch.autograd.backward([o for o, _ in pairs], [c for _, c in pairs])


def gradient_of(outputs: Sequence[Tensor], cotangents: Sequence[Tensor | None], tree: Tree) -> Tree:
    """Cotangent of ``tree``; the graph is kept."""
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    grads = torch.autograd.grad(
        [o for o, _ in pairs],
        float_leaves(tree),
        [c for _, c in pairs],
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return with_float_leaves(tree, grads)
