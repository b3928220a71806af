"""The theory of a traced network: moments forward, kernels of gradients backward, node by node.

Each node is mapped in closed form where there is one, else by sampling (`bolza.meanfield.layers.virtual`), else it
is measured and theory goes on from the measurement.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from bolza.meanfield.layers.function_maps import FUNCTION_MAPS, MOVES, activation_map, function_name, relabel
from bolza.meanfield.layers.moment_maps import Call, Missing, Step, moment_map
from bolza.meanfield.layers.moments import MAX_FULL_ITEMS, Moments, measure
from bolza.meanfield.layers.virtual import CONTRACTIONS, OWN_WEIGHTS, VirtualUnits, is_signal, unit_dim_of
from bolza.meanfield.layers.walk import Visit, evaluate

__all__ = ["REPORTED", "theory_pass"]

# Functions that a reader knows as layers: reported with theory or without.
REPORTED = frozenset(
    "scaled_dot_product_attention matmul bmm einsum mul softmax max_pool1d max_pool2d max_pool3d batch_norm "
    "group_norm instance_norm conv1d conv2d conv3d convolution add sub cat addmm rnn_tanh lstm gru glu maximum "
    "minimum".split()
)
TIED = "its weights are used by another layer too: the two depend on each other"
ENTANGLED = "it joins several results of one layer, which depend on each other"
_RELABELLED = (nn.Flatten, nn.Unflatten, nn.Identity)


def theory_pass(visits: dict[fx.Node, Visit], training: bool, seed: int = 0) -> None:
    """Fill in moments forward and kernels of gradients backward; measure where theory stops.

    Args:
        visits: nodes with their real values and gradients, from `bolza.meanfield.layers.walk.real_pass`.
        training: whether dropout and batch statistics are on.
        seed: of the virtual units.
    """
    virtual, tied = VirtualUnits(visits, seed), tied_calls(visits)
    for visit in visits.values():
        if visit.node.meta["role"] != "data" or not is_signal(visit.value):
            continue
        if visit.node.op == "placeholder":
            visit.moments = _measured(visit, visits)
            continue
        called = visit.node if visit.owner is None else visit.owner.node
        if called in tied and visit.inputs:
            visit.missing = Missing(TIED)
            visit.moments = _measured(visit, visits).with_(sources=frozenset({tied[called]}))
            continue
        result = _theory(visit, visits, training)
        if _entangled(visit, visits) and not (isinstance(result, Step) and visit.kind == "cat"):
            visit.missing = Missing(ENTANGLED, layer=function_name(visit.node.target) in REPORTED)
            visit.moments = _measured(visit, visits)
            continue
        if isinstance(result, Step) and not _consistent(result.out, visit.value):
            result = Missing("the map gave another shape")
        if isinstance(result, Missing):
            sampled = None if result.final else virtual.step(visit)
            visit.missing = result
            if sampled is None:
                visit.moments = _measured(visit, visits)
                continue
            result, visit.sampled = sampled, True
        visit.step, visit.moments = result, result.out
    _backward(visits, virtual, _above(visits, set(tied)))


def _complete(visits: dict[fx.Node, Visit]) -> None:
    """Where only c of a cell is used: theory goes through the cell at h, with a zero gradient there.

    Where h is not even in the graph, the gradient before the cell is measured.
    """
    for v in list(visits.values()):
        if v.step is None or not v.step.shared or v.gradient is None:
            continue
        beside = [w for w in visits.values() if w.owner is v.owner and w is not v and w.step is not None]
        if not beside:
            v.step = replace(v.step, backward=lambda g: [])
        for w in beside:
            if w.gradient is None:
                w.gradient = torch.zeros_like(w.value)


def tied_calls(visits: dict[fx.Node, Visit]) -> dict[fx.Node, str]:
    """Calls of weight matrices that other calls use too, with a name for what they share.

    A recurrent cell that is called step by step is not among them: its theory is that of tied weights.
    """
    users: dict[int, list[fx.Node]] = {}
    names: dict[fx.Node, str] = {}
    for node, visit in visits.items():
        for weight in _matrices(visit, visits):
            users.setdefault(id(weight), []).append(node)
    for key, nodes in users.items():
        if len(nodes) > 1:
            names.update(dict.fromkeys(nodes, f"weights {key}"))
    return names


def _matrices(visit: Visit, visits: dict[fx.Node, Visit]) -> list[Tensor]:
    layer = visit.layer
    if layer is not None:
        if isinstance(layer, (nn.RNNCellBase, *OWN_WEIGHTS)):
            return []
        return [p for p in layer.parameters() if p.ndim > 1]
    if function_name(visit.node.target) not in CONTRACTIONS:
        return []
    given = [visits[n].value for n in visit.node.all_input_nodes if n.op == "get_attr"]
    return [v for v in given if isinstance(v, nn.Parameter) and v.ndim > 1]


def _above(visits: dict[fx.Node, Visit], tied: set[fx.Node]) -> set[fx.Node]:
    """Values that tied calls are computed from."""
    found: set[fx.Node] = set()
    for node in reversed(visits):
        if node in tied or node in found:
            found.update(n for n in visits[node].inputs)
    return found


def _entangled(visit: Visit, visits: dict[fx.Node, Visit]) -> bool:
    """Whether several results of one layer (h and c of an LSTM) come together: how they depend is not known."""
    names = {
        s.partition("[")[0] for n in visit.inputs if (m := visits[n].moments) is not None for s in m.sources
    }
    by_name = {n.name: v for n, v in visits.items() if v.owner is not None} if len(names) > 1 else {}
    owners = [by_name[s].owner for s in names if s in by_name]
    return visit.owner is None and visit.layer is None and len(owners) > len({id(o) for o in owners})


def _consistent(m: Moments, value: Tensor) -> bool:
    shape = [*m.lead[: m.unit_dim], m.units, *m.lead[m.unit_dim :]]
    return shape == list(value.shape)


def _theory(visit: Visit, visits: dict[fx.Node, Visit], training: bool) -> Step | Missing:
    """The closed form of a node."""
    node, layer = visit.node, visit.calls
    called = node if visit.owner is None else visit.owner.node
    known = tuple(m for n in visit.inputs if (m := visits[n].moments) is not None)
    args, kwargs = map_arg((called.args, called.kwargs), lambda n: visits[n].value)
    call = Call(node.name, known, args, kwargs, visit.value, training, visit.entry)
    if layer is not None:
        if isinstance(layer, _RELABELLED) and known:
            return relabel(call, layer)
        if known or isinstance(layer, nn.Embedding):
            return moment_map(layer, call)
        return moment_map.dispatch(object)(layer, call)
    name = function_name(node.target)

    def again(x: Tensor) -> Any:
        """The function with its (first) data argument replaced."""
        first = next(n for n in visit.inputs if visits[n].node.meta["role"] == "data")
        with torch.no_grad():
            return evaluate(visits, node, {first: x})

    missing = Missing(f"no moment map for {name}", layer=name in REPORTED)
    if not known and name != "embedding":
        return missing
    if name in MOVES and len(known) == 1:
        return relabel(call, again)
    handler = FUNCTION_MAPS.get(name) or (activation_map(name) if len(known) == 1 else None)
    return missing if handler is None else handler(call, again)


def _measured(visit: Visit, visits: dict[fx.Node, Visit]) -> Moments:
    """Actual moments of a value; theory goes on from them."""
    value = visit.value
    inputs = [m for n in visit.inputs if (m := visits[n].moments) is not None]
    unit_dim = unit_dim_of(visit, visits, inputs)
    lead = [s for d, s in enumerate(value.shape) if d != unit_dim % value.ndim]
    moments = measure(value, unit_dim, full=math.prod(lead) <= MAX_FULL_ITEMS)
    own = visit.node.op == "placeholder" or visit.has_weights
    sources = {visit.node.name} if own or not inputs else set().union(*(m.sources for m in inputs))
    return moments.with_(sources=frozenset(sources))


def _backward(visits: dict[fx.Node, Visit], virtual: VirtualUnits, meets: set[fx.Node]) -> None:
    """Recursion of gradient kernels from the output, with the measured one as its start.

    Where a value in ``meets`` is used more than once, the gradients that come back to it depend on each other,
    by weights that they share; their sum is measured.

    Gradients that come back from sampled nodes stay as draws, tied to the units they belong to, until they
    reach a layer of random weights: there their kernel is all that matters.
    """
    _complete(visits)
    uses = Counter(n for v in visits.values() if v.gradient is not None for n in v.inputs)
    arrived: Counter[fx.Node] = Counter()
    kernels: dict[fx.Node, Tensor] = {}
    draws: dict[fx.Node, list[Tensor]] = {}
    for node in reversed(visits):
        visit = visits[node]
        m = visit.moments
        if m is None:
            continue
        kernel, drawn = kernels.pop(node, None), draws.pop(node, None)
        if arrived[node] and arrived[node] == uses[node] and not (node in meets and uses[node] > 1):
            total = torch.zeros_like(m.kernel) if kernel is None else kernel
            visit.theory_gradient = total if drawn is None else total + virtual.kernel(visit, drawn)
        elif visit.gradient is not None and (uses[node] or visit.step is None or not visit.step.shared):
            kernel = visit.theory_gradient = measure(visit.gradient, m.unit_dim, full=m.full).kernel
            visit.resumed, drawn = True, None
        if visit.step is None or visit.theory_gradient is None:
            continue
        data = [n for n in visit.inputs if visits[n].moments is not None]
        if visit.sampled or (drawn is not None and not virtual.is_source(visit)):
            if kernel is not None:
                fresh = virtual.draw(kernel, m, visit.value)
                drawn = fresh if drawn is None else [a + b for a, b in zip(drawn, fresh, strict=True)]
            assert drawn is not None
            for n, part in zip(visit.inputs, virtual.back(visit, drawn), strict=True):
                if n in data:
                    arrived[n] += 1
                    draws[n] = [a + b for a, b in zip(draws[n], part, strict=True)] if n in draws else part
            continue
        for n, back in zip(data, visit.step.backward(visit.theory_gradient), strict=False):
            if back is not None:
                arrived[n] += 1
                kernels[n] = kernels[n] + back if n in kernels else back
