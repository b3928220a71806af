"""Where the layers with weights sit: what feeds each of them, and where its output goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from bolza.core.errors import BolzaError
from bolza.meanfield.activations import ELEMENTWISE_MODULES, FUNCTIONS, Activation, resolve_activation
from bolza.meanfield.layers.function_maps import MOVES, function_name
from bolza.systems.trace import trace

__all__ = ["Site", "find_sites"]

WEIGHTED: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.Embedding,
    nn.EmbeddingBag,
)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
_THROUGH_MODULES = (
    nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd,
)  # fmt: skip
_THROUGH = MOVES | frozenset(
    "dropout mean avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "max_pool1d max_pool2d max_pool3d pad".split()
)


@dataclass(frozen=True)
class Site:
    """A layer with weights in its surroundings.

    Args:
        name: path of the module.
        layer: the module.
        source: what it reads: ``input``, ``activation``, ``norm``, ``sum``, ``weights`` or ``other``.
        sink: what reads it: ``sum`` or ``normed sum`` (a norm, then a sum) if it ends a residual branch, else
            ``activation``, ``norm``, ``output``, ``weights``, ``cat`` or ``other``.
        feeding: the activation it reads.
        feeding_norm: whether that activation itself reads a norm.
        reading: the activation that reads it.
        sink_norm: path of the norm between it and the sum.
        space: positions of its input, for a convolution; empty if unknown.
        feeder: path of the layer with weights that the feeding activation reads, at most through a norm;
            empty if it reads anything else.
    """

    name: str
    layer: nn.Module
    source: str
    sink: str
    feeding: Activation | None = None
    feeding_norm: bool = False
    reading: Activation | None = None
    sink_norm: str = ""
    space: tuple[int, ...] = ()
    feeder: str = ""


def find_sites(model: nn.Module, example: Any) -> tuple[list[Site], int, str]:
    """Layers with weights in the order of computation, the number of residual sums, and how they were found.

    Args:
        model: the network.
        example: arguments to trace it with, or none: then the order of its modules counts.
    """
    if example is not None:
        try:
            traced = trace(model, example, check=False)
            if traced.kind == "fx":
                return (*_from_graph(model, traced), "the data-flow graph")
        except BolzaError:
            pass
    return _from_order(model), 0, "the order of its modules"


def _from_order(model: nn.Module) -> list[Site]:
    known: tuple[Any, ...] = (*WEIGHTED, *NORMS, *ELEMENTWISE_MODULES)
    leaves: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if isinstance(module, known) and not isinstance(module, nn.Identity):
            leaves.append((name, module))
    # An attention's own out-projection is part of it.
    inside = {id(c) for _, m in leaves if isinstance(m, nn.MultiheadAttention) for c in m.children()}
    leaves = [(n, m) for n, m in leaves if id(m) not in inside]
    sites = []
    for i, (name, layer) in enumerate(leaves):
        if not isinstance(layer, WEIGHTED):
            continue
        before = leaves[i - 1][1] if i else None
        after = leaves[i + 1][1] if i + 1 < len(leaves) else None
        source, sink = _kind(before, "input"), _kind(after, "output")
        behind = i - 2
        if source == "activation" and i > 2 and isinstance(leaves[behind][1], NORMS):
            behind -= 1
        fed = source == "activation" and behind >= 0 and isinstance(leaves[behind][1], WEIGHTED)
        sites.append(Site(
            name, layer, source, sink,
            feeding=resolve_activation(before) if source == "activation" else None,  # type: ignore[arg-type]
            feeding_norm=source == "activation" and i > 1 and isinstance(leaves[i - 2][1], NORMS),
            reading=resolve_activation(after) if sink == "activation" else None,  # type: ignore[arg-type]
            feeder=leaves[behind][0] if fed else "",
        ))  # fmt: skip
    return sites


def _kind(layer: nn.Module | None, otherwise: str) -> str:
    if layer is None:
        return otherwise
    if isinstance(layer, NORMS):
        return "norm"
    if isinstance(layer, ELEMENTWISE_MODULES):
        return "activation"
    return "weights" if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd | nn.Embedding) else "other"


class _Graph:
    """Kinds of nodes, and what lies behind or beyond those that only move or average numbers."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def layer(self, node: fx.Node) -> nn.Module | None:
        return self.model.get_submodule(str(node.target)) if node.op == "call_module" else None

    def kind(self, node: fx.Node) -> str:
        layer = self.layer(node)
        if layer is not None:
            if isinstance(layer, (*_THROUGH_MODULES, nn.Identity)):
                return "through"
            kind = _kind(layer, "other")
            return "weights" if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd) else kind
        if node.op == "placeholder":
            return "input"
        if node.op == "output":
            return "output"
        name = function_name(node.target)
        data = [n for n in node.all_input_nodes if n.meta.get("role") == "data"]
        if name in ("add", "sub"):
            return "sum" if len(data) > 1 else "through"
        if name in _THROUGH or (name in ("mul", "div") and len(data) == 1):
            return "through"
        if name == "cat":
            return "cat"
        if name in FUNCTIONS or name == "erf":
            return "activation"
        return "norm" if name in ("layer_norm", "rms_norm", "batch_norm", "group_norm") else "other"

    def activation(self, node: fx.Node) -> Activation | None:
        layer = self.layer(node)
        try:
            return resolve_activation(layer if layer is not None else function_name(node.target))
        except BolzaError:
            return None

    def behind(self, node: fx.Node) -> fx.Node | None:
        """The node whose values ``node`` reads."""
        while True:
            data = [n for n in node.all_input_nodes if n.meta.get("role") == "data"]
            if not data:
                return None
            node = data[0]
            if self.kind(node) != "through":
                return node

    def beyond(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that read the values of ``node``."""
        found: list[fx.Node] = []
        for user in node.users:
            if user.op != "output" and user.meta.get("role") != "data":
                continue
            found += self.beyond(user) if user.op != "output" and self.kind(user) == "through" else [user]
        return found

    def ends_of_branches(self, nodes: tuple[fx.Node, ...]) -> dict[str, str]:
        """Last layers with weights of residual branches, with the norm between each and its sum.

        Of the summands the one with more weights behind it is the branch, the other the trunk.
        """
        depth: dict[fx.Node, int] = {}
        ends: dict[str, str] = {}
        for node in nodes:
            before = [depth.get(n, 0) for n in node.all_input_nodes]
            layer = self.layer(node)
            depth[node] = max(before, default=0) + (layer is not None and isinstance(layer, WEIGHTED))
            if self.kind(node) != "sum":
                continue
            summands = [n for n in node.all_input_nodes if n.meta.get("role") == "data"]
            branch = max(summands, key=depth.__getitem__)
            if depth[branch] == min(depth[n] for n in summands):
                continue
            norm, at = "", branch
            while not isinstance(self.layer(at), WEIGHTED):
                if self.kind(at) == "norm" and at.op == "call_module":
                    norm = str(at.target)
                behind = self.behind(at) if self.kind(at) != "other" else self._deepest(at, depth)
                if behind is None or self.kind(behind) in ("sum", "cat", "input"):
                    break
                at = behind
            else:
                ends[str(at.target)] = norm
        return ends

    def _deepest(self, node: fx.Node, depth: dict[fx.Node, int]) -> fx.Node | None:
        data = [n for n in node.all_input_nodes if n.meta.get("role") == "data"]
        return max(data, key=depth.__getitem__) if data else None


def _from_graph(model: nn.Module, traced: Any) -> tuple[list[Site], int]:
    graph, sites, seen = _Graph(model), [], set()
    ends = graph.ends_of_branches(traced.nodes)
    sums = sum(graph.kind(n) == "sum" for n in traced.nodes) if ends else 0
    for node in traced.nodes:
        layer = graph.layer(node)
        if layer is None or not isinstance(layer, WEIGHTED) or id(layer) in seen:
            continue
        seen.add(id(layer))
        name = str(node.target)
        back, ahead = graph.behind(node), graph.beyond(node)
        source = "input" if back is None else graph.kind(back)
        kinds = [graph.kind(n) for n in ahead]
        sink = next(
            (k for k in ("activation", "norm", "weights", "output", "cat", "other") if k in kinds), "weights"
        )
        first = next((n for n in ahead if graph.kind(n) == sink), None)
        reading = graph.activation(first) if sink == "activation" and first is not None else None
        if name in ends:
            sink = "normed sum" if ends[name] else "sum"
        feeding_norm, feeder = False, ""
        if source == "activation" and back is not None:
            before = graph.behind(back)
            feeding_norm = before is not None and graph.kind(before) == "norm"
            before = graph.behind(before) if feeding_norm and before is not None else before
            if before is not None and isinstance(graph.layer(before), WEIGHTED):
                feeder = str(before.target)
        space: tuple[int, ...] = ()
        if isinstance(layer, nn.modules.conv._ConvNd):
            value = node.all_input_nodes[0].meta.get("val")
            space = tuple(value.shape[2:]) if isinstance(value, Tensor) else ()
        sites.append(Site(
            name, layer, "sum" if source == "cat" else source, sink,
            feeding=graph.activation(back) if source == "activation" and back is not None else None,
            feeding_norm=feeding_norm, reading=reading, sink_norm=ends.get(name, ""), space=space,
            feeder=feeder,
        ))  # fmt: skip
    return sites, sums


def padding_loss(layer: Any, space: tuple[int, ...]) -> float:
    """Share of the variance that a zero-padded convolution with equal taps keeps from layer to layer.

    The largest eigenvalue of sliding the window, one dimension at a time; 1 for other paddings.
    """
    if (
        not space
        or layer.padding_mode != "zeros"
        or isinstance(layer.padding, str)
        and layer.padding == "valid"
    ):
        return 1.0
    share = 1.0
    pads = layer._reversed_padding_repeated_twice
    for d, (n, k, s, dil) in enumerate(
        zip(space, layer.kernel_size, layer.stride, layer.dilation, strict=True)
    ):
        left = pads[2 * (len(space) - 1 - d)]
        right = pads[2 * (len(space) - 1 - d) + 1]
        outputs = (n + left + right - dil * (k - 1) - 1) // s + 1
        at = torch.arange(outputs)[:, None] * s + torch.arange(k) * dil - left
        inside = (at >= 0) & (at < n)
        if s == 1 and outputs == n:
            window = torch.zeros(n, n, dtype=torch.float64)
            rows = torch.arange(n)[:, None].expand_as(at)
            window[rows[inside], at[inside]] = 1 / k
            share *= float(torch.linalg.eigvals(window).abs().max())
        else:
            share *= float(inside.double().mean())
    return share
