r"""Stages inside residual and inception blocks: which layers act at the same time.

A block with a skip or with branches is one stage of :func:`~bolza.systems.as_system`, because one state cannot cross
it. With a state that holds every tensor still needed, it is several: the layers of the path, and beside each the
layers of the other branches that act with it. Where a branch is shorter than the path there is a choice,

    early   a layer acts as soon as its input is there:    the skip together with the first layer of the path
    late    a layer acts as late as its output allows:      the skip together with the last layer, at the join
    whole   the block stays one stage

and each choice is an *alignment*. The map of the network is the same; the order of the computations and the cuts are
not. Chains have one alignment only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from torch import nn
from torch.fx import Node

from bolza.core import Reference, cites
from bolza.core.errors import ArgumentError
from bolza.systems.module import ModuleSystem
from bolza.systems.roles import is_guard
from bolza.systems.stages import Stage, _Flow
from bolza.systems.trace import Traced, example_arguments, trace

__all__ = ["AlignedSystem", "Alignment", "aligned_system", "alignments"]

REFERENCE = Reference(
    "liu2021dgnopt",
    "Liu, Guan-Horng and Chen, Tianrong and Theodorou, Evangelos A.",
    "Dynamic Game Theoretic Neural Optimizer",
    2021,
    venue="International Conference on Machine Learning",
    arxiv="2105.03788",
)

Alignment = Literal["whole", "early", "late"]


class AlignedSystem(ModuleSystem):
    """A network whose blocks are cut into stages of layers that act at the same time; see :func:`aligned_system`.

    Attributes:
        alignment: which of the choices.
    """

    def __init__(self, traced: Traced, alignment: Alignment = "late") -> None:
        self.alignment: Alignment = alignment
        super().__init__(traced)

    def read_again(self, example: Any) -> AlignedSystem:
        """The same network and alignment, read along another example."""
        return AlignedSystem(trace(self.module, example), self.alignment)

    def _stages(self, traced: Traced) -> tuple[Stage, ...]:
        """The stages; the graph is brought into the order in which they act."""
        flow = _Flow(traced)
        cuts = flow.merge(flow.pieces(), self._split)
        if self.alignment == "whole":
            return flow.assemble(cuts)
        edges = [flow.start, *cuts, len(flow.nodes) - 1]
        order: list[Node] = []
        ends: list[Node] = []
        for start, end in zip(edges, edges[1:], strict=False):
            block = flow.between(start, end)
            levels = _levels(flow, block, late=self.alignment == "late")
            for level in sorted(set(levels.values())):
                order += [node for node in block if levels[node] == level]
                ends.append(order[-1])
        _reorder(traced, order)
        flow = _Flow(traced)
        return flow.assemble([flow.index[node] for node in ends[:-1]])


def _levels(flow: _Flow, block: Sequence[Node], late: bool) -> dict[Node, int]:
    """The stage inside its block at which each node acts, from 0.

    Layers with matrices count; what has none (norms, activations) acts with the layer before it.
    """
    inside = set(block)
    own = [_moves(flow, node) for node in block]
    repeated = [name for names in (flow.parameters_of(node) for node in block) for name in names]
    plain = sum(own) < 2 or any(node.meta.get("random") for node in block)
    if plain or len(set(repeated)) < len(repeated):
        return dict.fromkeys(block, 0)  # a chain, or draws and shared weights, whose order is kept
    counts = dict(zip(block, own, strict=True))
    early: dict[Node, int] = {}
    for node in block:
        before = [early[arg] for arg in node.all_input_nodes if arg in inside]
        early[node] = max(before, default=0) + counts[node]
    top = max(early.values())
    found = early
    if late:
        found = {}
        for node in reversed(block):
            after = [found[user] - counts[user] for user in node.users if user in inside]
            found[node] = min(after, default=top)
    return {node: max(level, 1) - 1 for node, level in found.items()}


def _moves(flow: _Flow, node: Node) -> bool:
    """Whether a node is a layer that counts: one with a matrix or a kernel among its own parameters."""
    if node.op == "call_module":
        layer: nn.Module = flow.traced.module.get_submodule(str(node.target))
        return any(p.ndim > 1 for p in layer.parameters())
    constants = [arg for arg in node.all_input_nodes if arg.meta["role"] == "constant"]
    return any(getattr(arg.meta["val"], "ndim", 0) > 1 and flow.parameters_of(arg) for arg in constants)


def _reorder(traced: Traced, order: Sequence[Node]) -> None:
    """Bring the data of a graph into another order; all else follows what it needs."""
    graph = traced.graph
    wanted: dict[Node, None] = {}

    def emit(node: Node) -> None:
        if node not in wanted:
            for arg in node.all_input_nodes:
                emit(arg)
            wanted[node] = None

    nodes = list(graph.nodes)
    guards = [node for node in nodes if is_guard(node)]
    for node in (*traced.placeholders, *order, *nodes):
        if node.op != "output":
            emit(node)
        for guard in [g for g in guards if all(arg in wanted for arg in g.all_input_nodes)]:
            emit(guard)
            guards.remove(guard)
    anchor = nodes[-1]
    for node in wanted:
        anchor.prepend(node)


@cites(REFERENCE)
def aligned_system(module: nn.Module, example: Any, alignment: Alignment = "late") -> AlignedSystem:
    """Read a network as stages of layers that act at the same time, also inside its blocks.

    As :func:`~bolza.systems.as_system`, but a residual or inception block is cut into as many stages as its longest
    branch has layers. States inside a block are tuples of the tensors that are still needed. Blocks that
    draw random numbers or use a weight twice stay whole.

    Args:
        module: the network; it is not changed.
        example: a batch of inputs, or the tuple of the arguments of ``forward``.
        alignment: ``'early'``, ``'late'`` or ``'whole'``, see :mod:`bolza.systems.aligned`.

    Returns:
        The system; the composition of its stages is the network's own forward.

    Raises:
        ArgumentError: the alignment is unknown.
        TraceError: the network cannot be read.

    Reference: Liu, Chen & Theodorou (2021), arXiv:2105.03788, alignment of skip connections.

    Example:
        >>> import torch
        >>> from bolza.models import ResidualBlock
        >>> block = ResidualBlock(2, 4, stride=2)
        >>> aligned_system(block, torch.zeros(2, 2, 4, 4), "early").stage_modules[0]
        ('conv1', 'norm1', 'activation', 'skip.0', 'skip.1')
        >>> aligned_system(block, torch.zeros(2, 2, 4, 4), "late").stage_modules[0]
        ('conv1', 'norm1', 'activation')
    """
    if alignment not in get_args(Alignment):
        raise ArgumentError(f"alignment is {alignment!r}: choose 'early', 'late' or 'whole'")
    return AlignedSystem(trace(module, example_arguments(example)), alignment)


@cites(REFERENCE)
def alignments(module: nn.Module, example: Any) -> dict[Alignment, AlignedSystem]:
    """The alignments of a network that differ in which parameters act together.

    Args:
        module: the network; it is not changed.
        example: a batch of inputs, or the tuple of the arguments of ``forward``.

    Returns:
        A system for each, ``'whole'`` first; that alone for a chain.

    Raises:
        TraceError: the network cannot be read.

    Example:
        >>> import torch
        >>> from bolza.models import ResidualBlock
        >>> list(alignments(ResidualBlock(2, 4), torch.zeros(2, 2, 4, 4)))
        ['whole', 'early', 'late']
        >>> list(alignments(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)), torch.zeros(4, 2)))
        ['whole']
    """
    seen: set[Any] = set()
    found: dict[Alignment, AlignedSystem] = {}
    for alignment in get_args(Alignment):
        system = aligned_system(module, example, alignment)
        acting = tuple(frozenset(names) for names in system.controls)
        if acting not in seen:
            found[alignment] = system
            seen.add(acting)
    return found
