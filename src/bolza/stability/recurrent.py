r"""Recurrent modules of PyTorch as maps of their whole state: hidden states of all layers, and cell states.

    state_{t+1} = F(state_t, input_t)

For an LSTM the state is (h, c): the derivative ∂h'/∂h alone is not a factor of any product of Jacobians. Dropout
between layers is off. The cells are written out, because the fused kernels of recurrent layers have no
forward-mode derivative on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from bolza.core.errors import ArgumentError, ShapeError, UnsupportedError
from bolza.ops.trees import Tree

__all__ = ["RECURRENT", "as_driven_map"]

RECURRENT = (nn.RNNBase, nn.RNNCellBase)

_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")

Cell: TypeAlias = Callable[[tuple[Tensor, ...], Tensor], tuple[Tensor, ...]]


def _cell(mode: str, w: dict[str, Tensor | None]) -> Cell:
    """(state, input) → next state of one layer; the first entry of the state is what the layer puts out."""

    def pre(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        assert w["weight_ih"] is not None and w["weight_hh"] is not None
        return linear(x, w["weight_ih"], w["bias_ih"]), linear(h, w["weight_hh"], w["bias_hh"])

    if mode == "LSTM":

        def lstm(state: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
            h, c = state
            a, b = pre(x, h)
            i, f, g, o = (a + b).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            return (h if w["weight_hr"] is None else linear(h, w["weight_hr"])), c

        return lstm
    if mode == "GRU":

        def gru(state: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
            (h,) = state
            a, b = pre(x, h)
            (ra, za, na), (rb, zb, nb) = a.chunk(3, -1), b.chunk(3, -1)
            n = (na + (ra + rb).sigmoid() * nb).tanh()
            return (n + (za + zb).sigmoid() * (h - n),)

        return gru
    function = torch.relu if mode == "RNN_RELU" else torch.tanh

    def simple(state: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
        a, b = pre(x, state[0])
        return (function(a + b),)

    return simple


def _cells(module: nn.Module) -> tuple[list[Cell], tuple[int, ...], int]:
    """Cells of the layers, widths of (h,) or (h, c), and the size of an input."""
    if isinstance(module, nn.RNNBase):
        if module.bidirectional:
            raise UnsupportedError(
                f"{type(module).__name__} is bidirectional: a state that also runs backwards in time is not one "
                "dynamical system; take the two directions as two modules"
            )
        cells = []
        for i in range(module.num_layers):
            w = {name: getattr(module, f"{name}_l{i}", None) for name in _WEIGHTS}
            cells.append(
                _cell(module.mode, {name: None if p is None else p.detach() for name, p in w.items()})
            )
        width = module.proj_size or module.hidden_size
        return cells, (width, module.hidden_size)[: 1 + (module.mode == "LSTM")], module.input_size
    assert isinstance(module, nn.RNNCellBase)
    if isinstance(module, nn.LSTMCell):
        mode = "LSTM"
    elif isinstance(module, nn.GRUCell):
        mode = "GRU"
    else:
        mode = "RNN_RELU" if getattr(module, "nonlinearity", "tanh") == "relu" else "RNN_TANH"
    own: dict[str, Any] = {name: getattr(module, name, None) for name in _WEIGHTS}
    cell = _cell(mode, {name: None if p is None else p.detach() for name, p in own.items()})
    return [cell], (module.hidden_size,) * (1 + (mode == "LSTM")), module.input_size


class DrivenModule:
    """A recurrent module as x_{t+1} = F(x_t, u_t), samples first in the state.

    Args:
        module: ``nn.RNN``, ``nn.GRU``, ``nn.LSTM``, or one of the cells.
        x0: first state in the module's own form, or ``None`` for zeros.
        inputs: sequence in the module's own form (cells: time first), or ``None`` for zero input.
    """

    def __init__(self, module: nn.Module, x0: Tree, inputs: Tensor | None) -> None:
        self.cells, widths, size = _cells(module)
        self.layered = isinstance(module, nn.RNNBase)
        weight = next(module.parameters())
        self.inputs = self._time_first(module, inputs, size)
        for name, given in (("inputs", inputs), ("x0", x0)):
            for part in given if isinstance(given, (tuple, list)) else (given,):
                if isinstance(part, Tensor) and part.dtype != weight.dtype:
                    raise ArgumentError(
                        f"{name} is {part.dtype}, but {type(module).__name__} has weights of {weight.dtype}: "
                        f"give {name}.to({weight.dtype})"
                    )
        if x0 is None:
            batch = 1 if self.inputs is None else self.inputs.shape[1]
            state = tuple(weight.new_zeros(batch, len(self.cells), width) for width in widths)
        else:
            state = self._state(module, x0, widths)
        self.state = tuple(part.detach() for part in state)
        self._zero = weight.new_zeros(1, size)

    def _time_first(self, module: nn.Module, inputs: Tensor | None, size: int) -> Tensor | None:
        if inputs is None:
            return None
        if not isinstance(inputs, Tensor) or inputs.ndim not in (2, 3) or inputs.shape[-1] != size:
            what = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
            raise ShapeError(
                f"inputs is {what}, but {type(module).__name__} reads sequences of {size} numbers: give a tensor "
                f"(steps, {size}) or (steps, batch, {size}), batch first if the module is"
            )
        inputs = inputs.detach()
        if inputs.ndim == 2:
            return inputs[:, None]
        return inputs.transpose(0, 1) if getattr(module, "batch_first", False) else inputs

    def _state(self, module: nn.Module, x0: Tree, widths: tuple[int, ...]) -> tuple[Tensor, ...]:
        parts = tuple(x0) if isinstance(x0, (tuple, list)) else (x0,)
        wanted = ("h", "c")[: len(widths)]
        if len(parts) != len(widths) or not all(isinstance(part, Tensor) for part in parts):
            raise ShapeError(
                f"x0 has {len(parts)} parts, but the state of {type(module).__name__} is ({', '.join(wanted)})"
            )
        rows = []
        for name, part, width in zip(wanted, parts, widths, strict=True):
            ranks = (2, 3) if self.layered else (1, 2)
            layers = part.shape[0] if self.layered and part.ndim in ranks else 1
            if part.ndim not in ranks or part.shape[-1] != width or layers != len(self.cells):
                lead = f"{len(self.cells)}, " if self.layered else ""
                raise ShapeError(
                    f"{name} of x0 has shape {tuple(part.shape)}: it must be ({lead}batch, {width}) or ({lead}{width})"
                )
            part = part if part.ndim == ranks[1] else part.unsqueeze(-2)
            rows.append(part.transpose(0, 1) if self.layered else part[:, None])
        batch = max(row.shape[0] for row in rows)
        if self.inputs is not None:
            batch = max(batch, self.inputs.shape[1])
        return tuple(row.expand(batch, *row.shape[1:]) for row in rows)

    def module_form(self, state: tuple[Tensor, ...]) -> Tree:
        """The state as the module takes it."""
        parts = tuple(p.transpose(0, 1) if self.layered else p[:, 0] for p in state)
        return parts if len(parts) > 1 else parts[0]

    def input(self, t: int) -> Tensor:
        """What drives step t."""
        return self._zero if self.inputs is None else self.inputs[t]

    def step(self, t: int, state: tuple[Tensor, ...], u: Tensor) -> tuple[Tensor, ...]:
        """The state of all layers after one more input."""
        rows, x = [part.unbind(1) for part in state], u
        moved: list[tuple[Tensor, ...]] = []
        for layer, cell in enumerate(self.cells):
            moved.append(cell(tuple(part[layer] for part in rows), x))
            x = moved[-1][0]
        return tuple(torch.stack(parts, 1) for parts in zip(*moved, strict=True))


def as_driven_map(module: nn.Module, x0: Tree, inputs: Tensor | None) -> DrivenModule:
    """Read a recurrent module as a map of its whole state.

    Raises:
        ArgumentError: the module is not recurrent.
        ShapeError: state or inputs do not fit the module.
        UnsupportedError: the module is bidirectional.
    """
    if not isinstance(module, RECURRENT):
        raise ArgumentError(f"{type(module).__name__} is not a recurrent module of torch.nn")
    return DrivenModule(module, x0, inputs)
