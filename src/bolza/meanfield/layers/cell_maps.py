"""Moment maps of recurrent cells that a network calls step by step.

Such a network is recognised: as long as a cell is given the state that it has just returned, its weights count
as the same at all those steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from bolza.meanfield.activations import resolve_activation
from bolza.meanfield.layers.moment_maps import Call, Missing, Step, moment_map
from bolza.meanfield.layers.moments import Moments
from bolza.meanfield.layers.recurrent_maps import SAMPLED, first_kernel, gates_of, once
from bolza.meanfield.layers.recurrent_path import BackwardPath, GatedPath, cell_of

__all__: list[str] = []

MEMORY = "by sampling; no theory of its gradient, which torch counts together with the way through h"


@dataclass(frozen=True)
class _Held(Moments):
    """A state that remembers the path which led to it.

    Args:
        run: the steps so far.
        index: how many.
        mark: the kernel that it had when the cell returned it.
    """

    run: Any = None
    index: int = 0
    mark: Tensor | None = None

    @property
    def intact(self) -> bool:
        """Whether nothing has been done to the state since."""
        return (
            self.mark is not None
            and self.kernel.shape == self.mark.shape
            and torch.equal(self.kernel, self.mark)
        )


class _Run:
    """Steps of one cell, called again and again with its own state."""

    def __init__(self, layer: nn.Module, path: GatedPath) -> None:
        self.layer, self.path = ref(layer), path
        self.x: list[Tensor] = []  # actual inputs, (B, n), and their theoretical scale
        self.back: BackwardPath | None = None
        self.next = -1  # step that the way back expects
        self.waiting: Tensor | None = None  # gradient at the memory of an LSTM

    def forward(self, m: Moments, value: Tensor) -> None:
        """One step on, with the correlations between steps of the actual inputs."""
        x = value.detach().to("cpu", torch.float64)
        size = x.norm(dim=-1, keepdim=True)
        x = (
            torch.where(size > 0, x / size.clamp_min(1e-300), 0.0)
            * m.variances[0].clamp_min(0).sqrt()[:, None]
        )
        before = torch.cat([x @ old.T for old in self.x], -1) if self.x else x.new_zeros(len(x), 0)
        self.path.step(m.kernel[0], before)
        self.x.append(x)

    def backward(self, t: int, g: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient kernels at the input (per unit of the cell), at the state and at the memory before step t."""
        known = torch.zeros(self.path.batch, self.path.batch, dtype=torch.float64)
        if self.back is not None and self.next == t:
            known = self.back.at_state()
        else:
            self.back = BackwardPath(self.path)
            if self.waiting is not None:
                self.back.s = _root(self.waiting) @ self.back.noise.take(self.path.batch)
        self.waiting = None
        rest = -known if g is None else g - known
        self.back.step(t, _root(rest) @ self.back.noise.take(self.path.batch))
        self.next = t - 1
        delta = self.back.deltas[-1]
        n = self.path.units
        into = [
            gate.into * d @ d.T / n for gate, d in zip(self.path.cell.gates, delta, strict=True) if gate.into
        ]
        return torch.stack(into).sum(0), self.back.at_state(), self.back.s @ self.back.s.T / n


def _root(kernel: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((kernel + kernel.T) / 2)
    return torch.as_tensor(vectors * values.clamp_min(0).sqrt())


@moment_map.register
def _(layer: nn.RNNCellBase, call: Call) -> Step | Missing:
    return once(layer, call, _one_step)


def _one_step(layer: Any, call: Call) -> Any:
    kind = {nn.RNNCell: "rnn", nn.GRUCell: "gru", nn.LSTMCell: "lstm"}.get(type(layer))  # type: ignore[call-overload]
    if kind is None or not call.inputs:
        return Missing(f"no moment map for {type(layer).__name__}")
    m = call.inputs[0]
    if len(m.lead) != 1 or m.units != layer.input_size or m.unit_dim != 1:
        return Missing("a cell along other dimensions")
    given = call.args[1] if len(call.args) > 1 else call.kwargs.get("hx")
    states = [t for t in (given if isinstance(given, tuple) else (given,)) if t is not None]
    moments = list(call.inputs[1:])
    if moments and not _are_states(moments, states):
        # The state depends on this layer's weights in a way that is not known: independent numbers would not do.
        return Missing("a cell whose state came in as one tuple; unpack it: h, c = cell(x, (h, c))")
    held = moments[0] if moments else None
    chained = (
        isinstance(held, _Held)
        and held.intact
        and held.run.layer() is layer
        and held.index == len(held.run.x)
    )
    if chained:
        run: _Run = held.run  # type: ignore[union-attr]
    else:
        act = resolve_activation(str(getattr(layer, "nonlinearity", "tanh")))
        gates = gates_of(kind, layer.weight_ih, layer.weight_hh, layer.bias_ih, layer.bias_hh)
        path = GatedPath(cell_of(kind, gates, act), m.samples)
        firsts = [k.kernel[0] if bool(k.kernel.any()) else None for k in moments]
        if not moments and states:
            firsts = [first_kernel(s[None], 0) for s in states]
        run = _Run(layer, path.start(*firsts[:2]) if firsts else path)
    t = len(run.x)
    run.forward(m, call.args[0])
    scale = layer.hidden_size / layer.input_size
    h = run.path.h[-1]
    out = _held(m, layer.hidden_size, h, run, t + 1)
    count = len(moments)

    def backward(g: Tensor) -> list[Tensor]:
        into, state, memory = run.backward(t, g[0])
        return [scale * into[None], state[None], memory[None]][: 1 + count]

    step = Step(out, backward, note=SAMPLED)
    if kind != "lstm":
        return step
    cell = _held(m, layer.hidden_size, run.path.s[-1], None, 0)

    def wait(g: Tensor) -> list[Tensor]:
        # Theory goes through the cell once, when the gradient at h is there; here it only arrives.
        run.waiting = g[0]
        zero = torch.zeros_like(g)
        return [zero] * (1 + count)

    return step, Step(cell, wait, note=MEMORY, shared=True)


def _are_states(moments: list[Moments], states: list[Tensor]) -> bool:
    """Whether these moments are plausibly those of these values, one by one."""
    if len(moments) != len(states):
        return False
    for m, s in zip(moments, states, strict=True):
        square = float(s.detach().double().square().mean())
        if s.ndim != 2 or s.shape != (m.samples, m.units) or abs(m.q - square) > 0.5 * square:
            return False
    return True


def _held(m: Moments, units: int, rows: Tensor, run: _Run | None, index: int) -> Moments:
    kernel = (rows @ rows.T / rows.shape[-1])[None]
    return _Held(
        kernel, rows.mean(-1)[None], m.lead, units, 1, True, run=run, index=index,
        mark=kernel if run is not None else None,
    )  # fmt: skip
