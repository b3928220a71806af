"""The Hamiltonians of all stages of a network as functions of one vector of its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bolza.core import CallableCost, Trajectory, extended_hamiltonian
from bolza.core.errors import UnsupportedError
from bolza.ops.trees import is_differentiable, tree_detach, tree_map
from bolza.optim.recorded import loss_scale
from bolza.systems.module import ModuleSystem

__all__ = ["Hamiltonians"]

_NO_COST = CallableCost()
_HALF = (torch.float16, torch.bfloat16)


class _Block:
    """Stages that share parameters, and the parameters themselves."""

    def __init__(self, names: Sequence[str], stages: Sequence[int]) -> None:
        self.names, self.stages = tuple(names), tuple(stages)


def _blocks(controls: Sequence[dict[str, Tensor]], wanted: dict[str, Tensor]) -> list[_Block]:
    """Stages grouped so that no parameter is in two groups; parameters of no stage come last, each alone."""
    groups: list[tuple[set[str], list[int]]] = []
    for t, u in enumerate(controls):
        names, stages = {name for name in u if name in wanted}, [t]
        if not names:
            continue
        for group in [g for g in groups if g[0] & names]:
            groups.remove(group)
            names, stages = names | group[0], group[1] + stages
        groups.append((names, sorted(stages)))
    order = {name: i for i, name in enumerate(wanted)}
    blocks = [_Block(sorted(names, key=order.__getitem__), stages) for names, stages in groups]
    blocks.sort(key=lambda block: block.stages)
    seen = {name for block in blocks for name in block.names}
    return [*blocks, *(_Block([name], []) for name in wanted if name not in seen)]


class Hamiltonians:
    """The extended Hamiltonians of all blocks as functions of one flat vector of parameters.

    Args:
        passes: each pass of the batch with the system that it ran through.
        wanted: the parameters by name that have a gradient.
        weights: by name, the weights λ and κ of ‖v‖²/2 and ‖v − θ‖²/2.
        rho: weight of the feasibility terms.
        group: processes that hold the other parts of the batch.
    """

    def __init__(
        self,
        passes: Sequence[tuple[ModuleSystem, Trajectory]],
        wanted: dict[str, Tensor],
        weights: dict[str, tuple[float, float]],
        rho: float,
        group: Any,
    ) -> None:
        self.rho, self.group = rho, group
        controls = passes[-1][0].controls
        self.blocks = _blocks(controls, wanted)
        self.names = [[name for name in u if name in wanted] for u in controls]  # by stage
        leaves = [leaf for _, run in passes for x in run.states for leaf in _leaves(tree_detach(x))]
        self.coarse = any(isinstance(leaf, Tensor) and leaf.dtype in _HALF for leaf in leaves)
        # under autocast states come in half precision, and the Hamiltonians are minimised in that of the parameters
        wide = next(iter(wanted.values())).dtype
        self.passes = [(system, [_as(wide, tree_detach(x)) for x in run.states]) for system, run in passes]
        names = [name for block in self.blocks for name in block.names]
        self.shapes = {name: wanted[name].shape for name in names}
        self.sizes = [sum(self.shapes[name].numel() for name in block.names) for block in self.blocks]
        self.start = torch.cat([wanted[name].detach().reshape(-1) for name in names])
        self.gradient = torch.cat([wanted[name].grad.reshape(-1) for name in names])  # type: ignore[union-attr]
        counts = [self.shapes[name].numel() for name in names]
        self.decay, self.pull = (
            torch.repeat_interleave(
                torch.tensor(
                    [weights[name][k] for name in names], dtype=self.start.dtype, device=self.start.device
                ),
                torch.tensor(counts, device=self.start.device),
            )
            for k in (0, 1)
        )
        self.tilt: Tensor | None = None  # what the gradient has beside that of the recorded passes
        share = 1.0
        samples = float(sum(_samples(run) for _, run in passes))
        if group is not None:
            share = 1 / torch.distributed.get_world_size(group)
            total = torch.tensor([samples], dtype=torch.float64, device=self.start.device)
            torch.distributed.all_reduce(total, group=group)
            samples = float(total)
        self.samples = max(int(samples), 1)
        # the cost is a mean over processes: its costates are those of this one's, over their number
        self.costates = [
            [
                _as(wide, tree_map(lambda leaf: share * leaf, p) if share != 1 else p)
                for p in run.costates or ()
            ]
            for _, run in passes
        ]

    def split(self, flat: Tensor) -> list[dict[str, Tensor]]:
        """The parameters of each block by name."""
        pieces = torch.split(flat, [shape.numel() for shape in self.shapes.values()])
        values = {
            name: piece.view(shape) for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }
        return [{name: values[name] for name in block.names} for block in self.blocks]

    def of_block(self, b: int, values: dict[str, Tensor]) -> Tensor:
        """Hamiltonian of one block, without the terms that know nothing of the network."""
        total = self.start.new_zeros(())
        for (system, states), costates in zip(self.passes, self.costates, strict=True):
            for t in self.blocks[b].stages:
                total = total + extended_hamiltonian(
                    system,
                    _NO_COST,
                    t,
                    states[t],
                    costates[t + 1],
                    {name: values[name] for name in self.names[t]},
                    following=states[t + 1],
                    costate=costates[t] if t else None,
                    rho=self.rho,
                    samples=self.samples,
                )
        return total

    def together(self, parts: Sequence[dict[str, Tensor]]) -> Tensor:
        """What :meth:`of_block` gives for each block, with one derivative in the states for all stages."""
        values: list[Tensor] = []
        leaves: list[Tensor] = []
        terms: list[tuple[int, Tensor, Tensor]] = []  # block, leaf of a state, its costate
        totals = [self.start.new_zeros(()) for _ in parts]
        for (system, states), costates in zip(self.passes, self.costates, strict=True):
            for b, block in enumerate(self.blocks):
                for t in block.stages:
                    x = states[t]
                    if self.rho and t and costates[t] is not None:
                        x = tree_map(lambda leaf: leaf.detach().requires_grad_(), x)
                        for leaf, p in zip(_leaves(x), _leaves(costates[t]), strict=True):
                            if p is not None and is_differentiable(leaf):
                                terms.append((b, leaf, p))
                                leaves.append(leaf)
                    u = {name: parts[b][name] for name in self.names[t]}
                    reached = _leaves(system.step(t, tree_map(Tensor.clone, x), u))
                    following, after = _leaves(states[t + 1]), _leaves(costates[t + 1])
                    for new, old, p in zip(reached, following, after, strict=True):
                        if p is not None:
                            values.append((new * p).sum())
                            totals[b] = totals[b] + values[-1]
                        if self.rho and is_differentiable(new):
                            totals[b] = totals[b] + self.rho / (2 * self.samples) * (new - old).square().sum()
        if leaves:
            slopes = torch.autograd.grad(
                torch.stack(values).sum(),
                leaves,
                create_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            for (b, _, p), slope in zip(terms, slopes, strict=True):
                totals[b] = totals[b] + self.rho * self.samples / 2 * (slope - p).square().sum()
        return torch.stack(totals)

    def regular(self, flat: Tensor) -> Tensor:
        """Entries of λ/2 v² + κ/2 (v − θ)² and of the tilt."""
        moved = flat - self.start
        terms = self.decay / 2 * flat.square() + self.pull / 2 * moved.square()
        return terms if self.tilt is None else terms + self.tilt * moved

    def evaluate(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Values by block and their gradient, over all processes."""
        v = flat.detach().requires_grad_()
        with torch.enable_grad():
            values = self.together(self.split(v))
            if values.requires_grad:
                (gradient,) = torch.autograd.grad(values.sum(), v, allow_unused=True, materialize_grads=True)
            else:
                gradient = torch.zeros_like(v)
        values = values.detach()
        if self.group is not None:
            both = torch.cat([values, gradient])
            torch.distributed.all_reduce(both, group=self.group)
            values, gradient = both[: len(values)], both[len(values) :]
        moved = flat - self.start
        gradient = gradient + self.decay * flat + self.pull * moved
        if self.tilt is not None:
            gradient = gradient + self.tilt
        values = values + torch.stack([part.sum() for part in torch.split(self.regular(flat), self.sizes)])
        return values, gradient

    def reconcile(self) -> tuple[Tensor, Tensor]:
        """Add what the gradients hold beside those of the Hamiltonians: penalties, clipping, other random numbers.

        Returns:
            What :meth:`evaluate` returns at the start.

        Raises:
            UnsupportedError: there is such a part, and nothing that keeps a Hamiltonian bounded along it.
        """
        values, gradient = self.evaluate(self.start)
        own = gradient - self.decay * self.start
        scale = loss_scale(float(own.dot(self.gradient) / own.square().sum().clamp_min(1e-300)))
        if scale != 1:
            self.costates = [
                [tree_map(lambda leaf: leaf / scale, p) for p in costates] for costates in self.costates
            ]
            values, gradient = self.evaluate(self.start)
        rest = self.gradient - (gradient - self.decay * self.start)
        eps = torch.finfo(self.start.dtype).eps
        noise = (5e-2 if self.coarse else 1e-2) * float(self.gradient.norm()) + eps ** (2 / 3) * float(
            self.start.norm()
        )
        bounded = bool((self.pull > 0).all())
        if float(rest.norm()) > noise and not bounded:
            raise UnsupportedError(
                f"the gradients (norm {float(self.gradient.norm()):.4g}) are not those of the recorded passes: they "
                f"differ by {float(rest.norm()):.4g}. A penalty in the loss, gradient clipping and dropout do that: "
                "give the penalty as weight_decay=, or make the Hamiltonians bounded with proximal=1.0"
            )
        if bounded:
            self.tilt = rest
            gradient = gradient + rest
        return values, gradient


def _as(dtype: torch.dtype, tree: Any) -> Any:
    """A tree whose leaves in half precision are brought to that of the parameters."""
    return tree_map(lambda leaf: leaf.to(dtype) if leaf.dtype in _HALF else leaf, tree)


def _leaves(tree: Any) -> list[Any]:
    return [tree] if isinstance(tree, Tensor) or tree is None else torch.utils._pytree.tree_leaves(tree)


def _samples(run: Trajectory) -> int:
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(run.states[0]) if isinstance(leaf, Tensor)]
    return len(leaves[0]) if leaves and leaves[0].ndim else 1
