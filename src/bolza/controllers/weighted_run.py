r"""A training run whose control is the weight of every example, and the products that its adjoint needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from bolza.core.errors import ArgumentError, DataError, DivergenceError
from bolza.data import AdjustableBatchSampler
from bolza.data.weighted import WeightedBatchSampler
from bolza.ops.batches import Data, Loss, batches_of, count_samples, read
from bolza.ops.replay import same_randomness
from bolza.ops.sample_losses import sample_losses, without_reduction
from bolza.ops.trees import Tree, float_leaves, tree_map, with_float_leaves
from bolza.systems.training import UpdateRule

__all__ = [
    "Objective",
    "State",
    "WeightedRun",
    "batches_of_steps",
    "joined",
    "one_number_each",
    "outputs_of",
    "refuse_shuffled",
    "slopes_of",
]

Objective: TypeAlias = Literal["area", "final"]
State: TypeAlias = dict[str, Tree]


@dataclass(frozen=True)
class WeightedRun:
    """The run whose costate is wanted."""

    model: nn.Module
    loss: Loss
    x: Any
    y: Any
    target: tuple[Any, Any]
    rule: UpdateRule
    batches: tuple[Tensor, ...]  # indices into the pool, one tensor a step
    whole: bool  # whether every one of them is the pool as it stands
    cost: Objective
    chunk: int
    seed: int
    device: torch.device

    @property
    def count(self) -> int:
        """Examples of the pool."""
        return count_samples(self.x)

    def losses(self, params: dict[str, Tensor], x: Any, y: Any, seed: int) -> Tensor:
        """Loss of each example, (n,)."""
        with same_randomness(seed, self.device):
            out = outputs_of(self.model, params, x)
            return sample_losses(self.loss, out, y, count_samples(x))

    def pieces(self, index: Tensor) -> Iterable[tuple[slice, Any, Any]]:
        """Micro-batches of a batch: where they are in it, inputs, targets."""
        whole = self.whole and index is self.batches[0]
        for start in range(0, index.shape[0], self.chunk):
            where = slice(start, start + self.chunk)
            if whole:
                x, y = _pytree.tree_map(lambda leaf, where=where: leaf[where], (self.x, self.y))
            else:
                x, y = _pytree.tree_map(
                    lambda leaf, rows=index[where]: leaf.index_select(0, rows), (self.x, self.y)
                )
            yield where, x, y

    def target_loss(self, params: dict[str, Tensor]) -> Tensor:
        """L(θ)."""
        return self.losses(params, *self.target, self.seed).mean()

    def target_gradient(self, params: dict[str, Tensor]) -> list[Tensor]:
        """∇L(θ)."""
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        with torch.enable_grad():
            return slopes_of(self.target_loss(leaves), list(leaves.values()))

    def gradient(self, t: int, params: dict[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
        """Σ γ_n ∇ℓ_n over the batch of step t, scaled up to the pool."""
        index = self.batches[t]
        w = weights[index] * (self.count / index.shape[0])
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        total = [torch.zeros_like(p) for p in params.values()]
        for where, x, y in self.pieces(index):
            with torch.enable_grad():
                objective = (w[where] * self.losses(leaves, x, y, self.seed + t)).sum()
                parts = slopes_of(objective, list(leaves.values()))
            torch._foreach_add_(total, parts)
        return dict(zip(params, total, strict=True))

    def products(
        self,
        t: int,
        params: dict[str, Tensor],
        weights: Tensor,
        q: Sequence[Tensor],
        index: Tensor,
        hessian: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        """⟨q, ∇ℓ_n⟩ for the examples of ``index``, and H_γ q over them."""
        scale = self.count / index.shape[0] if hessian else 1.0
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        along = [torch.zeros_like(p) for p in params.values()]
        dots = weights.new_empty(index.shape[0])
        for where, x, y in self.pieces(index):
            w = (weights[index[where]] * scale).requires_grad_()
            with torch.enable_grad():
                objective = (w * self.losses(leaves, x, y, self.seed + t)).sum()
                g = torch.autograd.grad(
                    objective, list(leaves.values()), create_graph=True, materialize_grads=True
                )
                inner = torch.stack([(a * b).sum() for a, b in zip(g, q, strict=True)]).sum()
                wanted = [w, *leaves.values()] if hessian else [w]
                slopes = slopes_of(inner, wanted)
            dots[where] = slopes[0] * scale
            if hessian:
                torch._foreach_add_(along, slopes[1:])
        return dots, along

    def step(self, t: int, state: State, weights: Tensor) -> State:
        """State after step t."""
        memory = {name: value for name, value in state.items() if name != "params"}
        with torch.no_grad():
            gradient = self.gradient(t, state["params"], weights)
            params, memory = self.rule.update(t, state["params"], memory, gradient, self.rule.controls())
        return {"params": params, **memory}

    def pull_back(
        self, t: int, state: State, gradient: dict[str, Tensor], costate: State
    ) -> tuple[State, list[Tensor]]:
        """Adjoint of the update rule alone: the costate of the state before it, and that of the gradient."""
        before = tree_map(lambda leaf: leaf.detach().requires_grad_(), {**state, "gradient": gradient})
        memory = {name: value for name, value in before.items() if name not in ("params", "gradient")}
        with torch.enable_grad():
            params, memory = self.rule.update(
                t, before["params"], memory, before["gradient"], self.rule.controls()
            )
            after = {"params": params, **memory}
            pairs = [
                (a, p)
                for a, p in zip(float_leaves(after), float_leaves(costate), strict=True)
                if a.requires_grad
            ]
            slopes = torch.autograd.grad(
                [a for a, _ in pairs],
                float_leaves(before),
                [p for _, p in pairs],
                materialize_grads=True,
            )
        found = with_float_leaves(before, slopes)
        q = list(found.pop("gradient").values())
        return found, q

    def run(self, state: State, weights: Tensor, visit: Callable[[int, State], None]) -> list[float]:
        """Run forward; the losses on the target, every state shown once."""
        losses = []
        for t in range(len(self.batches) + 1):
            visit(t, state)
            with torch.no_grad():
                losses.append(float(self.target_loss(state["params"])))
            if not math.isfinite(losses[-1]):
                raise DivergenceError(
                    f"the loss on the target is {losses[-1]} at step {t}: lower the learning rate", step=t
                )
            if t < len(self.batches):
                state = self.step(t, state, weights)
        return losses


def slopes_of(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Gradient of a scalar in some leaves; zero where it does not depend on one."""
    return list(torch.autograd.grad(value, leaves, materialize_grads=True))


def outputs_of(model: nn.Module, params: dict[str, Tensor], x: Any) -> Any:
    """What the model makes of x with other parameters; a tuple as positional, a dict as keyword arguments."""
    args, kwargs = (x, None) if isinstance(x, tuple) else ((), x) if isinstance(x, dict) else ((x,), None)
    return functional_call(model, params, args, kwargs)


def one_number_each(loss: Loss, out: Any, y: Any, n: int) -> Loss:
    """The loss as one number an example; refused where its value for a batch is not the mean of theirs."""
    each = without_reduction(loss, out, y, n)
    value = loss(out, y)
    if isinstance(value, Tensor) and not value.ndim:
        mean = sample_losses(each, out, y, n).mean()
        tol = {torch.float64: 1e-8, torch.float32: 1e-3}.get(value.dtype, 3e-2)
        if bool(value.isfinite()) and not torch.allclose(value, mean, rtol=tol, atol=tol):
            raise ArgumentError(
                f"the loss of {n} examples is {float(value):g}, but the mean of their losses {float(mean):g}: a sum, "
                "or a mean with class weights, has no share for each; give one number an example, for example "
                "CrossEntropyLoss(weight=..., reduction='none')"
            )
    return each


def refuse_shuffled(data: Data, name: str) -> None:
    """Examples that come in another order every time cannot be told apart by their place."""
    if not isinstance(data, DataLoader):
        return
    drawn = RandomSampler, SubsetRandomSampler, WeightedRandomSampler, WeightedBatchSampler
    own = data.batch_sampler
    shuffles = isinstance(own, AdjustableBatchSampler) and own.shuffle
    if shuffles or isinstance(own, drawn) or isinstance(data.sampler, drawn):
        raise DataError(
            f"{name} is a loader that shuffles, so that no score could be given to its example: use "
            "DataLoader(..., shuffle=False), or a pair (x, y)"
        )


def joined(data: Data, device: torch.device, name: str) -> tuple[Any, Any]:
    """All batches of a source as one pair on the device."""
    parts = list(read(batches_of(data), device))
    for x, y in parts:
        n = count_samples(x)
        odd = [leaf for leaf in _pytree.tree_leaves((x, y)) if isinstance(leaf, Tensor) and len(leaf) != n]
        if odd:
            raise DataError(
                f"{name} has {n} examples and a tensor of shape {tuple(odd[0].shape)}: every tensor in x and y needs "
                "one entry an example, examples first"
            )
    if len(parts) == 1:
        return parts[0]
    flat = [_pytree.tree_flatten(part) for part in parts]
    joined = [torch.cat(leaves) for leaves in zip(*(leaves for leaves, _ in flat), strict=True)]
    x, y = _pytree.tree_unflatten(joined, flat[0][1])
    return x, y


def batches_of_steps(
    n: int,
    steps: int,
    batches: Sequence[Tensor] | None,
    batch_size: int | None,
    seed: int,
    device: torch.device,
) -> tuple[Tensor, ...]:
    """Indices into a pool of n examples, one tensor a step: given, drawn without replacement, or all of it."""
    if batches is not None:
        if batch_size is not None or len(batches) != steps:
            raise ArgumentError(
                f"batches has {len(batches)} entries and batch_size={batch_size}: give one tensor of indices for each "
                f"of the {steps} steps, and no batch_size"
            )
        chosen = tuple(torch.as_tensor(index, device=device) for index in batches)
        for t, index in enumerate(chosen):
            whole_numbers = index.dtype in (torch.int32, torch.int64) and index.ndim == 1 and len(index)
            if not whole_numbers or int(index.min()) < 0 or int(index.max()) >= n:
                raise ArgumentError(
                    f"batches[{t}] must hold places in the pool, whole numbers from 0 to {n - 1}, at least one; it is "
                    f"{index.dtype} of shape {tuple(index.shape)}"
                )
        return chosen
    if batch_size is None:
        return (torch.arange(n, device=device),) * steps
    if not 1 <= batch_size <= n:
        raise ArgumentError(f"batch_size={batch_size} must lie between 1 and the {n} examples of the pool")
    draw, order, found = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long), []
    for _ in range(steps):
        if len(order) < batch_size:
            order = torch.randperm(n, generator=draw)
        found.append(order[:batch_size].to(device))
        order = order[batch_size:]
    return tuple(found)
