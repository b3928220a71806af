r"""Learning many tasks at once as one system: the clock is the inner step, the state the parameters of every task.

    θ^τ_{k+1} = θ^τ_k − α ∇ℓ_τ(θ^τ_k),   θ^τ_0 = θ,   τ = 1 … M

The tasks share the initial condition and nothing else, so the gradient of Σ_τ ℓ_τ in the stacked parameters
``(tasks, …)`` is each task's own gradient: one batched evaluation serves them all. What is not adapted rides along as
a state that does not move; so its gradient is found by the same sweep.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree

from bolza.core.errors import ArgumentError, DataError, ShapeError, UnsupportedError
from bolza.ops.replay import same_randomness
from bolza.ops.trees import Tree, float_leaves, tree_detach, tree_map, with_float_leaves
from bolza.systems.training import SGD, UpdateRule

__all__ = ["Adaptation", "TaskLoss", "batched", "count_tasks", "draw_seed"]

TaskLoss: TypeAlias = Callable[..., Tensor]
"""(parameters of one task, what is shared, data of one task, …) → scalar."""


class Adaptation:
    """Inner descent on M tasks at once.

    A state is a dict of ``"params"``, stacked ``(tasks, …)``, ``"shared"`` and what the rule remembers.

    Args:
        losses: (stacked parameters, shared, support) → ``(tasks,)``.
        support: data of the inner steps, tasks first.
        rule: the inner optimizer.
        steps: K.
        first_order: count the gradients of the inner steps as constants: no Hessian in the costate.
        seed: draw the random numbers of step k with this seed + k, whenever it is evaluated.
    """

    def __init__(
        self,
        losses: TaskLoss,
        support: Any,
        rule: UpdateRule,
        steps: int,
        first_order: bool = False,
        seed: int | None = None,
    ) -> None:
        if steps < 0:
            raise ArgumentError(f"steps={steps} must not be negative: it is the number of inner steps")
        self.losses, self.support, self.rule = losses, support, rule
        self.horizon, self.first_order, self.seed = steps, first_order, seed
        self.tasks = count_tasks(support, "support")
        self.controls: tuple[dict[str, Tree], ...] = (rule.controls(),) * steps
        self._plain = (
            isinstance(rule, SGD)
            and not rule.maximize
            and all(
                isinstance(number, int | float) and number == 0
                for number in (rule.momentum, rule.weight_decay)
            )
        )

    def initial_state(self, params: Tree, shared: Tree = None) -> dict[str, Tree]:
        """Every task starts from the same parameters."""
        stacked = tree_map(lambda p: p.expand(self.tasks, *p.shape), params)
        return {"params": stacked, "shared": {} if shared is None else shared, **self.rule.init(stacked)}

    def step(self, t: int, x: Mapping[str, Tree], u: Mapping[str, Tree]) -> dict[str, Tree]:
        """State of every task after one inner step."""
        params, shared = x["params"], x["shared"]
        second = torch.is_grad_enabled() and not self.first_order
        with torch.enable_grad(), self._randomness(t, params):
            point = params if second else tree_map(lambda p: p.detach().requires_grad_(), params)
            value = self.losses(point, shared if second else tree_detach(shared), self.support).sum()
            if not value.requires_grad and torch.is_inference_mode_enabled():
                raise UnsupportedError(
                    "torch.inference_mode forbids the gradients by which a task is learned: use torch.no_grad"
                )
            if not value.requires_grad:
                raise ArgumentError(
                    "the inner loss does not depend on any of the parameters that are adapted: is the model detached?"
                )
            slopes = torch.autograd.grad(
                value, float_leaves(point), create_graph=second, allow_unused=True, materialize_grads=True
            )
        slope = with_float_leaves(params, slopes)
        if self._plain:  # the same, without the terms that are zero
            lr = u["lr"]
            rates = tree_map(lambda p: lr, params) if isinstance(lr, int | float | Tensor) else lr
            return {"params": tree_map(_descend, params, slope, rates), "shared": shared}
        memory = {name: value for name, value in x.items() if name not in ("params", "shared")}
        params, memory = self.rule.update(t, params, memory, slope, u)
        return {"params": params, "shared": shared, **memory}

    def run(self, x: Mapping[str, Tree], u: Mapping[str, Tree] | None = None) -> dict[str, Tree]:
        """State after all steps; differentiable in the state and in ``u`` where gradients are enabled."""
        state = dict(x)
        for t in range(self.horizon):
            state = self.step(t, state, self.controls[t] if u is None else u)
        return state

    def _randomness(self, t: int, params: Tree) -> Any:
        if self.seed is None:
            return nullcontext()
        return same_randomness(self.seed + t, next(iter(float_leaves(params))).device)


def _descend(p: Tensor, g: Tensor, lr: Tensor | float) -> Tensor:
    if isinstance(lr, int | float):
        return torch.sub(p, g, alpha=lr)
    return p - (lr.to(p.dtype) if lr.ndim else lr) * g


def count_tasks(data: Any, name: str) -> int:
    """Length of the first dimension, the same in every tensor of a batch of tasks.

    Raises:
        DataError: there are no tensors or no tasks, or the tensors differ.
    """
    leaves = [leaf for leaf in _pytree.tree_leaves(data) if isinstance(leaf, Tensor)]
    sizes = sorted({leaf.shape[0] if leaf.ndim else 0 for leaf in leaves})
    if len(sizes) != 1 or sizes[0] == 0:
        raise DataError(
            f"{name} holds tensors whose first dimension is {sizes or 'missing'}: every one must begin with the same "
            "number of tasks, as in x of shape (tasks, shots, …) and y of shape (tasks, shots)"
        )
    return int(sizes[0])


def batched(one: TaskLoss, vectorized: bool = True) -> TaskLoss:
    """From the loss of one task to those of all: (stacked params, shared, data, …) → ``(tasks,)``.

    Args:
        one: (params, shared, data, …) → scalar of one task.
        vectorized: with ``torch.func.vmap``; else in a loop, for networks that it cannot batch.
    """

    def scalar(*arguments: Any) -> Tensor:
        value = one(*arguments)
        if not isinstance(value, Tensor) or value.ndim > 1:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ShapeError(
                f"the loss of a task has shape {got}: it must be a scalar, or one number a sample"
            )
        return value.mean() if value.ndim else value

    def losses(params: Tree, shared: Tree, *data: Any) -> Tensor:
        if not vectorized:
            tasks = count_tasks(data[0], "support")
            parts = (_task((params, data), i) for i in range(tasks))
            return torch.stack([scalar(p, shared, *d) for p, d in parts])
        axes = tuple(
            _pytree.tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, d) for d in (params, *data)
        )
        try:
            return vmap(scalar, (axes[0], None, *axes[1:]), randomness="different")(params, shared, *data)
        except RuntimeError as error:
            if "vmap" not in str(error) and "batching rule" not in str(error).lower():
                raise
            raise UnsupportedError(
                f"torch.func.vmap cannot batch this network over tasks ({str(error).splitlines()[0]}): "
                "give vectorized=False to go through the tasks one by one"
            ) from error

    return losses


def _task(tree: Any, i: int) -> Any:
    return _pytree.tree_map(lambda leaf: leaf[i] if isinstance(leaf, Tensor) else leaf, tree)


def draw_seed(device: torch.device) -> int:
    """A seed that follows from the state of torch's generator and leaves it as it is."""
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return zlib.crc32(state.numpy().tobytes())
