"""Moment maps of recurrent layers: ``nn.RNN``, ``nn.GRU``, ``nn.LSTM``, and minimalRNN."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from bolza.meanfield.activations import resolve_activation
from bolza.meanfield.layers.moment_maps import Call, Missing, Step, moment_map
from bolza.meanfield.layers.moments import Moments
from bolza.meanfield.layers.recurrent_path import Gate, GatedPath, PlainPath, cell_of

__all__ = ["SAMPLED", "MinimalCell", "first_kernel", "gates_of", "once"]

_KINDS = {"RNN_TANH": "rnn", "RNN_RELU": "rnn", "GRU": "gru", "LSTM": "lstm"}
SAMPLED = "by sampling"


class MinimalCell(ABC):  # noqa: B024  (a structure, not a base)
    """Any layer with ``recurrent_kind = "minimal"`` and the attributes of `bolza.models.MinimalRNN`."""

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        return getattr(other, "recurrent_kind", None) == "minimal"


# What was last found out about a call of a layer, so that the entries of its tuple share it.
_LAST: WeakKeyDictionary[nn.Module, tuple[list[Any], Any]] = WeakKeyDictionary()


def once(layer: nn.Module, call: Call, find: Callable[[Any, Call], Any]) -> Step | Missing:
    """The entry of a call's result that is asked for; the first one if none is."""
    given = [t for t in _pytree.tree_leaves((call.args, call.kwargs)) if isinstance(t, Tensor)]
    given += [m.kernel for m in call.inputs]
    last = _LAST.get(layer)
    if (
        last is None
        or len(last[0]) != len(given)
        or any(a is not b for a, b in zip(last[0], given, strict=True))
    ):
        last = given, find(layer, call)
        _LAST[layer] = last
    result = last[1]
    for place in call.entry:
        result = result[place] if isinstance(result, tuple) else result
    while isinstance(result, tuple):
        result = result[0]
    if isinstance(result, Missing):
        return result
    return replace(result, out=result.out.with_(sources=frozenset({call.name})))  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------- weights


def _variance(weight: Tensor) -> float:
    """Fan-in times the mean square."""
    return weight.shape[1] * float(weight.detach().double().square().mean())


def _bias(*parts: Tensor | None) -> tuple[float, float]:
    """Variance over the units and mean of a sum of biases."""
    given = [p.detach().double() for p in parts if p is not None]
    if not given:
        return 0.0, 0.0
    total = torch.stack(given).sum(0)
    return float(total.var(unbiased=False)), float(total.mean())


def gates_of(
    kind: str, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> tuple[Gate, ...]:
    """Pre-activations of a cell from its tensors, in the order that `cell_of` wants."""
    count = {"rnn": 1, "gru": 3, "lstm": 4}[kind]
    parts = zip(
        w_ih.chunk(count),
        w_hh.chunk(count),
        [None] * count if b_ih is None else b_ih.chunk(count),
        [None] * count if b_hh is None else b_hh.chunk(count),
        strict=True,
    )
    out = []
    for i, (into, recurrent, b_in, b_rec) in enumerate(parts):
        if kind == "gru" and i == 2:
            out += [
                Gate(0.0, _variance(into), *_bias(b_in)),
                Gate(_variance(recurrent), 0.0, *_bias(b_rec)),
            ]
        else:
            out.append(Gate(_variance(recurrent), _variance(into), *_bias(b_in, b_rec)))
    return tuple(out)


def _path(
    kind: str, gates: tuple[Gate, ...], relu: bool, x: Tensor, h: Tensor | None, c: Tensor | None, seed: int
) -> PlainPath | GatedPath:
    if kind == "rnn":
        return PlainPath(gates[0], resolve_activation("relu" if relu else "tanh"), x, h)
    return GatedPath(cell_of(kind, gates), x.shape[1], seed=seed).start(h, c).run(x)


# -------------------------------------------------------------------------- layers over time


@dataclass
class _Stack:
    """All layers and directions of one module, run.

    Args:
        paths: of every layer, of its directions.
        widths: numbers of inputs of every layer.
        units: size of the state of one direction.
        drop: rate of dropout between the layers, 0 in evaluation.
    """

    units: int
    drop: float = 0.0
    paths: list[list[PlainPath | GatedPath]] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)

    def add(self, x: Tensor, width: int, paths: Sequence[Callable[[Tensor, int], Any]]) -> Tensor:
        """Run a layer; returns the kernel of its output."""
        if self.paths and self.drop:
            x = _diagonal(x, 1 / (1 - self.drop))
        self.widths.append(width)
        self.paths.append([make(_turned(x, d), 10 * len(self.paths) + d) for d, make in enumerate(paths)])
        kernels = [_turned(p.h if isinstance(p, PlainPath) else p.kernel, d) for d, p in self._last()]
        return torch.stack(kernels).mean(0)

    def _last(self) -> list[tuple[int, PlainPath | GatedPath]]:
        return list(enumerate(self.paths[-1]))

    @property
    def mean(self) -> Tensor:
        """Mean of the output, ``(T, B)``."""
        return torch.stack([p.mean.flip(0) if d else p.mean for d, p in self._last()]).mean(0)

    def backward(
        self, g: Tensor | None, last: list[Tensor] | None = None, memory: list[Tensor] | None = None
    ) -> Tensor:
        """Kernel of the gradient at the input.

        Args:
            g: at the output, ``(T, B, T, B)``.
            last: at the last states, one ``(B, B)`` for each layer and direction.
            memory: at the last cell states.
        """
        count = len(self.paths[0])
        for layer in range(len(self.paths) - 1, -1, -1):
            total = None
            for d, path in enumerate(self.paths[layer]):
                steps, batch = _shape(path)
                at = torch.zeros(steps, batch, steps, batch, dtype=torch.float64)
                if g is not None:
                    at += _turned(g, d)
                if last is not None:
                    at[-1, :, -1] += last[layer * count + d]
                extra = None if memory is None else memory[layer * count + d]
                part = _turned(path.backward(at, extra)[0], d) * (self.units / self.widths[layer])
                total = part if total is None else total + part
            g = _diagonal(total, 1 / (1 - self.drop)) if layer and self.drop and total is not None else total
        assert g is not None
        return g


def _shape(path: PlainPath | GatedPath) -> tuple[int, int]:
    return (path.steps if isinstance(path, PlainPath) else len(path.e)), path.batch


def _turned(kernel: Tensor, direction: int) -> Tensor:
    """Reversed in time for the backward direction."""
    return kernel.flip((0, 2)) if direction else kernel


def _diagonal(kernel: Tensor, factor: float) -> Tensor:
    """With the variances multiplied by a factor."""
    t, b = kernel.shape[:2]
    out = kernel.reshape(t * b, t * b).clone()
    out.diagonal().mul_(factor)
    return out.reshape_as(kernel)


@dataclass(frozen=True)
class _Layout:
    """How (time, sample) items lie in a value: ``lead`` is (batch, time), (time, batch) or (time,)."""

    lead: tuple[int, ...]
    batch_first: bool

    @property
    def sizes(self) -> tuple[int, int]:
        """(T, B)."""
        if len(self.lead) == 1:
            return self.lead[0], 1
        return (self.lead[1], self.lead[0]) if self.batch_first else (self.lead[0], self.lead[1])

    @property
    def _swapped(self) -> bool:
        return self.batch_first and len(self.lead) == 2

    def inward(self, kernel: Tensor) -> Tensor:
        """(1, items, items) to (T, B, T, B)."""
        t, b = self.sizes
        if self._swapped:
            return kernel.reshape(b, t, b, t).permute(1, 0, 3, 2)
        return kernel.reshape(t, b, t, b)

    def outward(self, kernel: Tensor) -> Tensor:
        """The way back; also of means (T, B)."""
        if kernel.ndim == 2:
            return (kernel.T if self._swapped else kernel).reshape(1, -1)
        t, b = self.sizes
        flat = kernel.permute(1, 0, 3, 2) if self._swapped else kernel
        return flat.reshape(1, t * b, t * b)


def _refuse(m: Moments, units: int) -> Missing | None:
    if not m.full:
        return Missing("a recurrent layer over more than 512 samples × positions")
    if m.unit_dim != len(m.lead) or m.units != units or len(m.lead) > 2:
        return Missing("a recurrent layer along other dimensions")
    return None


@moment_map.register
def _(layer: nn.RNNBase, call: Call) -> Step | Missing:
    return once(layer, call, _over_time)


def _over_time(layer: Any, call: Call) -> Any:
    if not call.inputs or not isinstance(call.args[0], Tensor):
        return Missing("a packed sequence")
    m, kind = call.inputs[0], _KINDS[layer.mode]
    if getattr(layer, "proj_size", 0):
        return Missing("an LSTM with a projection")
    if (refusal := _refuse(m, layer.input_size)) is not None:
        return refusal
    layout = _Layout(m.lead, bool(layer.batch_first))
    given = call.args[1] if len(call.args) > 1 else call.kwargs.get("hx")
    h0, c0 = given if isinstance(given, tuple) else (given, None)
    stack = _Stack(layer.hidden_size, layer.dropout if layer.training else 0.0)
    x, count = layout.inward(m.kernel), 2 if layer.bidirectional else 1
    for i in range(layer.num_layers):
        makers = []
        for d in range(count):
            end = f"_l{i}" + ("_reverse" if d else "")
            names = [f"{n}{end}" for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            tensors = [getattr(layer, n, None) for n in names]
            gates = gates_of(kind, *tensors)  # type: ignore[arg-type]
            first = first_kernel(h0, i * count + d), first_kernel(c0, i * count + d)
            makers.append(_maker(kind, gates, layer.mode == "RNN_RELU", *first))
        width = layer.input_size if i == 0 else count * layer.hidden_size
        x = stack.add(x, width, makers)
    return _steps(m, layout, stack, x, kind)


def _maker(
    kind: str, gates: tuple[Gate, ...], relu: bool, h: Tensor | None, c: Tensor | None
) -> Callable[[Tensor, int], Any]:
    return lambda x, seed: _path(kind, gates, relu, x, h, c, seed)


def first_kernel(state: Tensor | None, index: int) -> Tensor | None:
    """Kernel of a first state that is given; none if it is zero."""
    if state is None or not bool(state.any()):
        return None
    h = state[index].detach().to("cpu", torch.float64)
    h = h if h.ndim == 2 else h[None]
    return h @ h.T / h.shape[-1]


def _steps(m: Moments, layout: _Layout, stack: _Stack, kernel: Tensor, kind: str) -> Any:
    """The output and the last states as steps, in the form that the layer returns them."""
    directions = len(stack.paths[0])
    note = "" if kind == "rnn" else SAMPLED
    out = m.with_(
        kernel=layout.outward(kernel),
        mean=layout.outward(stack.mean),
        units=directions * stack.units,
        gaussian=False,
    )
    whole = Step(out, lambda g: [layout.outward(stack.backward(layout.inward(g)))], note=note)
    blocks = [(p.h[-1, :, -1], p.mean[-1]) if isinstance(p, PlainPath) else (p.kernel[-1, :, -1], p.mean[-1])
              for paths in stack.paths for p in paths]  # fmt: skip
    last = _at_end(m, layout, stack, blocks, "last", note)
    if kind != "lstm":
        return whole, last
    cells = [p.memory for paths in stack.paths for p in paths if isinstance(p, GatedPath)]
    return whole, (last, _at_end(m, layout, stack, cells, "memory", note))


def _at_end(
    m: Moments, layout: _Layout, stack: _Stack, blocks: list[tuple[Tensor, Tensor]], which: str, note: str
) -> Step:
    """The last state of every layer and direction, ``(layers, batch, units)``."""
    batch = layout.sizes[1]
    lead = (len(blocks), batch) if len(layout.lead) == 2 else (len(blocks),)
    out = Moments(
        torch.block_diag(*(k for k, _ in blocks))[None], torch.cat([e for _, e in blocks])[None], lead,
        stack.units, len(lead), True,
    )  # fmt: skip

    def backward(g: Tensor) -> list[Tensor]:
        n = len(blocks)
        each = [g[0].reshape(n, batch, n, batch)[i, :, i] for i in range(n)]
        return [layout.outward(stack.backward(None, **{which: each}))]

    return Step(out, backward, note=note)


def _of_minimal(layer: nn.Module, call: Call) -> Step | Missing:
    return once(layer, call, _minimal)


def _minimal(layer: Any, call: Call) -> Any:
    m: Moments = call.inputs[0]
    if (refusal := _refuse(m, layer.input_size)) is not None:
        return refusal
    layout = _Layout(m.lead, bool(layer.batch_first))
    given = call.args[1] if len(call.args) > 1 else call.kwargs.get("hx")
    w_in, w_z, w_h = layer.weight_ih, layer.weight_zh, layer.weight_hh
    embed = Gate(0.0, _variance(w_in), *_bias(layer.bias_ih))
    # The gate reads the embedded input z = V x + b, whose kernel is σ_v² K + b².
    through, (spread, mean) = _variance(w_z), _bias(layer.bias_hh)
    shift = embed.bias + embed.mean**2
    gate = Gate(_variance(w_h), through * embed.into, spread + through * shift, mean)
    stack = _Stack(layer.hidden_size)
    first = first_kernel(None if given is None else given[None], 0)
    maker = _maker("minimal", (gate, embed), False, first, None)
    kernel = stack.add(layout.inward(m.kernel), layer.input_size, [maker])
    whole, last = _steps(m, layout, stack, kernel, "minimal")
    out = last.out.with_(lead=last.out.lead[1:], unit_dim=last.out.unit_dim - 1) if len(m.lead) == 2 else None
    return whole, (
        Missing("a state without a batch") if out is None else Step(out, last.backward, note=SAMPLED)
    )


moment_map.register(MinimalCell, _of_minimal)  # type: ignore[type-var, misc, call-overload, arg-type]
