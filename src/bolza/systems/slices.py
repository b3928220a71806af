"""A network cut in depth into slices that can run apart from one another."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.fx.node import map_arg
from torch.utils import _pytree

from bolza.core.errors import UnsupportedError
from bolza.ops.trees import Tree, is_differentiable, tree_map
from bolza.systems.module import ModuleSystem, bind
from bolza.systems.parareal import coarse_jump, slice_boundaries

__all__ = ["SlicedNetwork"]


class SlicedNetwork:
    """Slices of consecutive stages of a network, each a function of the state at its beginning.

    Args:
        system: the network read as stages.
        slices: number of slices, as equal in stages as possible; or their boundaries.

    Raises:
        ArgumentError: more slices than stages, or boundaries that do not ascend.
        UnsupportedError: something without a derivative (a mask, indices) is alive between two slices.

    Example:
        >>> import torch
        >>> from bolza.systems import as_system
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> sliced = SlicedNetwork(as_system(net, torch.zeros(4, 2)), 2)
        >>> sliced.boundaries, [p.shape[0] for p in sliced.parameters(1)]
        ((0, 2, 3), [1, 1])
    """

    def __init__(self, system: ModuleSystem, slices: int | Sequence[int]) -> None:
        self.system = system
        self.boundaries = slice_boundaries(system.horizon, slices)
        for bound in self.boundaries[1:-1]:
            leaves = _pytree.tree_leaves([node.meta["val"] for node in system.stages[bound].inputs])
            if not all(is_differentiable(leaf) for leaf in leaves):
                raise UnsupportedError(
                    f"between stages {bound - 1} and {bound} ({system.stage_names[bound]!r}) the network carries "
                    "values without a derivative (a mask, indices, sizes), which have no costate: cut it elsewhere, "
                    f"slices=(0, …, {system.horizon})"
                )
        self._jump = coarse_jump(system)

    def __len__(self) -> int:
        return len(self.boundaries) - 1

    @property
    def lengths(self) -> tuple[int, ...]:
        """Stages in each slice."""
        return tuple(b - a for a, b in zip(self.boundaries, self.boundaries[1:], strict=False))

    def form(self, k: int) -> Tree:
        """A state of the structure that enters slice ``k``: that of the example."""
        values = tuple(node.meta["val"] for node in self.system.stages[self.boundaries[k]].inputs)
        return values[0] if len(values) == 1 else values

    def run(self, k: int, x: Tree) -> Tree:
        """Run slice ``k`` as the network itself does: running statistics move, dropout draws."""
        program = self.system._program()
        for t in range(self.boundaries[k], self.boundaries[k + 1]):
            stage = program.stages[t]
            x = map_arg(stage.outputs, program.replays[t].in_place(bind(stage, x)).__getitem__)
        return x

    def replay(self, k: int, x: Tree) -> Tree:
        """Run slice ``k`` without leaving a trace."""
        for t in range(self.boundaries[k], self.boundaries[k + 1]):
            x = self.system.step(t, tree_map(Tensor.clone, x), {})
        return x

    def jump(self, k: int, x: Tree) -> Tree:
        """Jump over slice ``k``, see :func:`~bolza.systems.coarse_jump`."""
        return self._jump(self.boundaries[k], self.boundaries[k + 1], x)

    def parameters(self, k: int) -> list[nn.Parameter]:
        """The trainable parameters that slice ``k`` uses."""
        named = dict(self.system.module.named_parameters())
        used: dict[str, nn.Parameter] = {}
        for control in self.system.controls[self.boundaries[k] : self.boundaries[k + 1]]:
            used |= {name: named[name] for name in control}
        return list(used.values())

    def shared(self) -> dict[str, list[int]]:
        """Parameters that more than one slice uses, with those slices."""
        homes: dict[str, list[int]] = {}
        names = {id(p): name for name, p in self.system.module.named_parameters()}
        for k in range(len(self)):
            for p in self.parameters(k):
                homes.setdefault(names[id(p)], []).append(k)
        return {name: where for name, where in homes.items() if len(where) > 1}

    def buffers(self, k: int) -> list[Tensor]:
        """Running statistics and other buffers of the layers of slice ``k``."""
        module, found = self.system.module, {}
        for paths in self.system.stage_modules[self.boundaries[k] : self.boundaries[k + 1]]:
            for path in paths:
                for buffer in module.get_submodule(path).buffers():
                    found[id(buffer)] = buffer
        return list(found.values())

    def memoryless(self) -> bool:
        """Whether running twice is the same as once: no dropout, no running statistics in use."""
        if any(replay.random for replay in self.system._program().replays):
            return False
        return not any(
            layer.training and getattr(layer, "track_running_stats", False)
            for layer in self.system.module.modules()
        )
