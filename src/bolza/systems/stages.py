r"""Cutting a traced graph into stages.

A **cut** is a place in the graph where exactly one floating-point tensor that depends on the input
is alive: everything downstream passes through it. What lies between two neighbouring cuts is a
**piece**; a residual block is one piece by itself, and so is a layer of a DenseNet.

Pieces become **stages** by a rule:

* ``split="parameters"`` (the default): a stage begins at a piece with parameters and takes the
  pieces without parameters that follow (activation, dropout, pooling, reshaping). Pieces without
  parameters at the very beginning join the first stage.
* ``split="affine"``: as above, but a piece without parameters that computes something (an activation, a
  pooling) is a stage of its own. Pieces that only rearrange entries, and dropout, join the stage before.

Where one piece uses the same parameters several times (a recurrent cell unrolled in time), it is
cut once more between two uses, where the fewest tensors are alive; the state there is a tuple.

What a stage needs beside its state is computed again inside it if it does not depend on the entries
of the input (parameters, position embeddings, masks made from sizes); sizes are read off the state
where they provably are among its dimensions. Everything else that is alive (masks made from tokens,
sizes that the state has lost) is carried: the state is then a tuple, floating-point tensors first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

from bolza.core.errors import ArgumentError, TraceError
from bolza.ops.trees import is_differentiable
from bolza.systems.roles import is_guard, reads_metadata
from bolza.systems.symbols import labels, symbolic_values
from bolza.systems.trace import Traced

__all__ = ["Split", "Stage", "split_into_stages"]

Split = Literal["parameters", "affine"]
Place = tuple[int, int | str]  # which value of the state, and which of its dimensions or attributes

_REARRANGING = frozenset(
    "view reshape flatten unflatten transpose permute squeeze unsqueeze contiguous getitem getattr dropout "
    "dropout1d dropout2d dropout3d alpha_dropout feature_dropout movedim swapaxes t select slice split "
    "chunk to expand alias clone identity repeat".split()
)
_REARRANGING_LAYERS = (nn.Flatten, nn.Unflatten, nn.Identity, nn.modules.dropout._DropoutNd)


@dataclass(frozen=True, eq=False)
class Stage:
    """One step of a network.

    Attributes:
        name: the layers it consists of, as the network names them.
        inputs: nodes whose values make up its state.
        outputs: the next state as a tree of nodes; at the end, what the network returns.
        nodes: what it computes, in order; parameters and sizes that it needs included.
        sizes: what is read off the state: node → (position in the state, dimension; or 'device', 'dtype').
        own: the nodes that no other stage computes.
    """

    name: str
    inputs: tuple[Node, ...]
    outputs: Any
    nodes: tuple[Node, ...]
    sizes: dict[Node, Place]
    own: tuple[Node, ...]


def split_into_stages(
    traced: Traced, *, split: Split = "parameters", stages: Sequence[str] | None = None
) -> tuple[Stage, ...]:
    """Cut a traced network into stages.

    Args:
        traced: the graph.
        split: how pieces become stages, see the head of this page.
        stages: names of modules or nodes after which to cut, instead of the rule; ``'a..b'`` names
            the stage that ends with ``b``. The end of the network need not be named.

    Returns:
        The stages in order, at least one.

    Raises:
        ArgumentError: ``split`` is unknown, or a name in ``stages`` is not in the network.

    Example:
        >>> from bolza.systems.trace import trace
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 2))
        >>> traced = trace(net, torch.zeros(5, 2, 3))
        >>> [stage.name for stage in split_into_stages(traced)]
        ['1', '3']
        >>> [stage.name for stage in split_into_stages(traced, split="affine")]
        ['1', '2', '3']
    """
    if split not in ("parameters", "affine"):
        raise ArgumentError(f"split is {split!r}: choose 'parameters' or 'affine'")
    flow = _Flow(traced)
    if stages is not None:
        if isinstance(stages, str) or not all(isinstance(name, str) for name in stages):
            raise ArgumentError(f"stages is {stages!r}: give a list of names of modules or nodes")
        cuts = flow.cuts_after(stages)
    else:
        cuts = flow.merge(flow.pieces(), split)
    return flow.assemble(cuts)


class _Flow:
    """The data flow of a graph; a cut at ``i`` lies behind the i-th node."""

    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        self.nodes = [node for node in traced.graph.nodes if node.op != "output"]
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.data = [node for node in self.nodes if node.meta["role"] == "data" and not is_guard(node)]
        self.start = max(self.index[node] for node in traced.placeholders)
        self.parameters = {id(p): name for name, p in traced.module.named_parameters()}
        end = len(self.nodes)
        self.last_use = dict.fromkeys(self.data, -1)
        for node in self.data:
            users = [user for user in node.users if user.op == "output" or user.meta["role"] == "data"]
            self.last_use[node] = max((self.index.get(user, end) for user in users), default=-1)
        self._used: dict[Node, frozenset[str]] = {}

    # -- what is alive, and what is used

    def live(self, cut: int) -> list[Node]:
        """The data that is computed up to the cut and needed behind it."""
        return [n for n in self.data if self.index[n] <= cut < self.last_use[n]]

    def sealed(self, cut: int) -> bool:
        """Whether something is alive that has no derivative as a whole: a packed sequence."""
        return any(node.meta.get("sealed") for node in self.live(cut))

    def live_floats(self, cut: int) -> list[Node]:
        return [n for n in self.live(cut) if _is_float(n)]

    def parameters_of(self, node: Node) -> frozenset[str]:
        """Names of the parameters that a node needs, itself or through constants and sizes."""
        if node not in self._used:
            found: set[str] = set()
            if node.op == "call_module":
                layer = self.traced.module.get_submodule(str(node.target))
                found = {self.parameters[id(p)] for p in layer.parameters()}
            elif node.op == "get_attr" and id(node.meta["val"]) in self.parameters:
                found = {self.parameters[id(node.meta["val"])]}
            for arg in node.all_input_nodes:
                if arg.meta["role"] != "data":
                    found |= self.parameters_of(arg)
            self._used[node] = frozenset(found)
        return self._used[node]

    def between(self, start: int, end: int) -> list[Node]:
        """The data computed behind one cut and up to another."""
        return [node for node in self.data if start < self.index[node] <= end]

    # -- pieces

    def pieces(self) -> list[int]:
        """All natural cuts, and those between two uses of the same parameters, ascending."""
        cuts, state = [], None
        for i in range(self.start + 1, len(self.nodes)):
            floats = self.live_floats(i)
            if len(floats) == 1 and floats[0] is not state and not self.sealed(i):
                state = floats[0]
                if state.op != "placeholder":
                    cuts.append(i)
        edges = [self.start, *cuts, len(self.nodes) - 1]
        for start, end in zip(edges, edges[1:], strict=False):
            cuts += self._unrolled(start, end)
        return sorted(set(cuts))

    def _unrolled(self, start: int, end: int) -> list[int]:
        cuts: list[int] = []
        seen: dict[str, tuple[int, object]] = {}  # parameter → where it was used, and by which call
        for node in self.between(start, end):
            i, call = self.index[node], _call_of(node)
            again = [
                seen[name][0] for name in self.parameters_of(node) if name in seen and seen[name][1] != call
            ]
            if again:
                window = range(max(again), i)
                cut = min(window, key=lambda j: (len(self.live_floats(j)), j))
                cuts.append(cut)
                seen = {name: use for name, use in seen.items() if use[0] > cut}
            for name in self.parameters_of(node):
                seen[name] = (i, call)
        return cuts

    def merge(self, cuts: Sequence[int], split: Split) -> list[int]:
        """Drop the cuts before pieces that do not begin a stage."""
        edges = [self.start, *cuts, len(self.nodes) - 1]
        kept, begun = [], False
        for start, end in zip(edges, edges[1:], strict=False):
            piece = self.between(start, end)
            begins = any(self.parameters_of(node) for node in piece)
            if split == "affine" and not all(_rearranges(self.traced, node) for node in piece):
                begins = True
            if begins and begun:
                kept.append(start)
            begun = begun or begins
        return kept

    # -- cuts by name

    def cuts_after(self, names: Sequence[str]) -> list[int]:
        """Cuts behind the modules and nodes that a user names."""
        cuts: set[int] = set()
        for given in names:
            parts = given.split("..") if ".." in given else [given]
            if len(parts) > 2:
                raise ArgumentError(f"stages has the entry {given!r}: write a name, or 'first..last'")
            places = [self._find(part, given) for part in parts]
            cuts.update(places[-1])
        last = max(self.index[node] for node in self.data)
        return sorted(cut for cut in cuts if self.start < cut < last)

    def _find(self, name: str, given: str) -> list[int]:
        ends: dict[object, int] = {}
        for node in self.data:
            for key, path in _scopes(node):
                if path == name:
                    ends[key] = self.index[node]
            if node.name == name:
                ends[name] = self.index[node]
        if ends:
            return sorted(ends.values())
        known = sorted(
            {path for node in self.data for _, path in _scopes(node)} | {n.name for n in self.data}
        )
        near = get_close_matches(name, known, n=3) or known[:8]
        raise ArgumentError(
            f"stages names {given!r}, but the network computes nothing called {name!r}; "
            f"choose the name of a module or node, such as {', '.join(map(repr, near))}"
        )

    # -- stages

    def assemble(self, cuts: Sequence[int]) -> tuple[Stage, ...]:
        """Make stages between the cuts."""
        edges = [self.start, *cuts, len(self.nodes) - 1]
        states = [list(self.traced.placeholders), *(self._state(cut) for cut in cuts)]
        own = [self._own(start, end) for start, end in zip(edges, edges[1:], strict=False)]
        home = {node: t for t, nodes in enumerate(own) for node in nodes}
        needs = [_Needs(states[t], nodes, self._find_size) for t, nodes in enumerate(own)]
        result = _leaves(self.traced.result)
        for _ in range(len(self.nodes) + 1):
            complete = True
            for t, nodes in enumerate(own):
                needs[t] = _Needs(states[t], nodes, self._find_size)
                targets = result if t == len(own) - 1 else states[t + 1]
                for arg in [*(a for node in nodes for a in node.all_input_nodes), *targets]:
                    lost = needs[t].add(arg)
                    if lost is not None:  # it cannot be had here: carry it from where it is read
                        complete = False
                        first = max(home.get(source, 0) for source in _sources(lost))
                        for s in range(first + 1, t + 1):
                            states[s] += [] if lost in states[s] else [lost]
            if complete:
                break
        else:
            raise TraceError(
                f"the sizes that {type(self.traced.module).__name__} computes cannot be followed"
            )
        stages = []
        for t, name in enumerate(self._names(own)):
            final = t == len(own) - 1
            following = self.traced.result if final else tuple(states[t + 1])
            outputs = following[0] if not final and len(following) == 1 else following
            everything = tuple(sorted({*own[t], *needs[t].computed}, key=self.index.__getitem__))
            stages.append(Stage(name, tuple(states[t]), outputs, everything, needs[t].sizes, tuple(own[t])))
        return tuple(stages)

    def _state(self, cut: int) -> list[Node]:
        live = self.live(cut)
        floats = [node for node in live if _is_float(node)]
        floats.sort(key=lambda node: (node in self.steered, self.index[node]), reverse=True)
        return [*floats, *(node for node in live if node not in floats)]

    @cached_property
    def steered(self) -> set[Node]:
        """The data that depends on parameters."""
        found: set[Node] = set()
        for node in self.data:
            if self.parameters_of(node) or any(arg in found for arg in node.all_input_nodes):
                found.add(node)
        return found

    def _own(self, start: int, end: int) -> list[Node]:
        """Data and guards between two cuts."""
        inside = self.nodes[start + 1 : end + 1] if start > self.start else self.nodes[: end + 1]
        return [
            node
            for node in inside
            if node.op != "placeholder" and (node.meta["role"] == "data" or is_guard(node))
        ]

    @cached_property
    def _labels(self) -> dict[Node, tuple[Any, ...]]:
        return labels(self.traced)

    @cached_property
    def _symbols(self) -> dict[Node, Any]:
        return symbolic_values(self.traced)

    def _find_size(self, node: Node, state: Sequence[Node]) -> Place | None:
        """Where a state provably has the size, device or type that is the value of ``node``."""
        if reads_metadata(node) and node.args[1:] in (("device",), ("dtype",)):
            attribute = str(node.args[1])
            for i, holder in enumerate(state):
                if holder.meta.get(attribute) == node.meta["val"] and _is_float(holder):
                    return i, attribute
            return None
        if not isinstance(node.meta["val"], int):
            return None
        (label,) = self._labels.get(node, (None,))
        if label is not None:
            for i, holder in enumerate(state):
                if isinstance(holder.meta["val"], Tensor) and label in self._labels.get(holder, ()):
                    return i, self._labels[holder].index(label)
        symbol = _expression(self._symbols.get(node))
        if symbol is None:
            return None
        for i, holder in enumerate(state):
            value = self._symbols.get(holder)
            if isinstance(value, Tensor):
                for k, size in enumerate(value.shape):
                    if _expression(size) == symbol:
                        return i, k
        return None

    def _names(self, own: Sequence[Sequence[Node]]) -> list[str]:
        layers = [list(dict.fromkeys(p for node in nodes for p in self._layers(node))) for nodes in own]
        names = []
        for t, mine in enumerate(layers):
            others = [path for s, theirs in enumerate(layers) if s != t for path in theirs]
            calls = [str(node.target) if node.op == "call_module" else node.name for node in own[t]]
            names.append(_name(mine, others) or (calls[0] if calls else "identity"))
        total = {name: names.count(name) for name in names}
        seen: dict[str, int] = {}
        for t, name in enumerate(names):
            if total[name] > 1:
                names[t] = f"{name}[{seen.get(name, 0)}]"
                seen[name] = seen.get(name, 0) + 1
        return names

    def _layers(self, node: Node) -> list[str]:
        """Paths of what has parameters in a node: layers, or single parameters of the network itself."""
        if not self.parameters_of(node):
            return []
        if node.op == "call_module":
            return [str(node.target)]
        scope = _scopes(node)[-1][1] if _scopes(node) else ""
        if scope:
            return [scope]
        return sorted({name.rpartition(".")[0] or name for name in self.parameters_of(node)})


class _Needs:
    """What a stage must compute, or read off its state, to have the values it uses."""

    def __init__(
        self,
        state: Sequence[Node],
        own: Sequence[Node],
        find_size: Callable[[Node, Sequence[Node]], Place | None],
    ) -> None:
        self.state = list(state)
        self.present = {*state, *own}
        self.find_size = find_size
        self.computed: set[Node] = set()
        self.sizes: dict[Node, Place] = {}

    def add(self, node: Node) -> Node | None:
        """Make a value available; if that is impossible, return what would have to be carried here."""
        computed, sizes, lost = self._plan(node)
        if lost is None:
            self.computed |= computed
            self.sizes |= sizes
        return lost

    def _plan(self, node: Node) -> tuple[set[Node], dict[Node, Place], Node | None]:
        if node in self.present or node in self.computed or node in self.sizes:
            return set(), {}, None
        if node.meta["role"] == "data" or node.op == "placeholder":  # a number among the arguments
            return set(), {}, node
        computed: set[Node] = {node}
        sizes: dict[Node, Place] = {}
        for arg in node.all_input_nodes:
            more, dims, lost = self._plan(arg)
            if lost is not None:
                place = self.find_size(node, self.state)
                if place is not None:
                    return set(), {node: place}, None
                # a number is cheap to carry; a tensor is better made again from numbers
                small = not _tensors(node.meta["val"]) and len(_sources(node)) == 1
                return set(), {}, node if small or lost.meta["role"] == "data" else lost
            computed |= more
            sizes |= dims
        return computed, sizes, None


def _sources(node: Node) -> set[Node]:
    """The data whose sizes a node reads."""
    if node.meta["role"] == "data" or node.op == "placeholder":
        return {node}
    return {source for arg in node.all_input_nodes for source in _sources(arg)}


def _expression(size: Any) -> Any:
    """The symbolic expression of a size; none for a plain number, which proves nothing."""
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return None if expression.is_number else expression
    return None


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _is_float(node: Node) -> bool:
    return any(is_differentiable(leaf) for leaf in _tensors(node.meta["val"]))


def _leaves(tree: Any) -> list[Node]:
    found: list[Node] = []
    map_arg(tree, lambda node: found.append(node) or node)  # type: ignore[func-returns-value]
    return found


def _scopes(node: Node) -> list[tuple[str, str]]:
    """The calls of modules that a node belongs to, outermost first: (key of the call, path)."""
    stack = node.meta.get("nn_module_stack") or {}
    scopes = [(str(key), str(value[0])) for key, value in stack.items()]
    return [(key, path) for key, path in scopes if path]


def _call_of(node: Node) -> object:
    """The call of a module that a node belongs to; the node itself at the top level."""
    scopes = _scopes(node)
    return scopes[-1][0] if scopes else node


def _rearranges(traced: Traced, node: Node) -> bool:
    if node.op == "placeholder":
        return True
    if node.op == "call_module":
        return isinstance(traced.module.get_submodule(str(node.target)), _REARRANGING_LAYERS)
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return name.partition(".")[0].strip("_") in _REARRANGING


def _name(mine: Sequence[str], others: Sequence[str]) -> str:
    if not mine:
        return ""
    if len(mine) == 1:
        return mine[0]
    split = [path.split(".") for path in mine]
    common: list[str] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    prefix = ".".join(common)
    if prefix and not any(other == prefix or other.startswith(prefix + ".") for other in others):
        return prefix
    return f"{mine[0]}..{mine[-1]}"
