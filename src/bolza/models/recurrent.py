"""Gated recurrent networks: one whose steps are visible, one cell call each, and the minimal gated layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bolza.models.mlp import positive

__all__ = ["GRU", "MinimalRNN", "gru"]


class GRU(nn.Module):
    """One ``nn.GRUCell`` unrolled over ``steps`` positions; the last state gives the scores.

    Args:
        steps: length of the sequence.
        in_features: numbers per position.
        width: size of the hidden state.
        out_features: length of the output.

    Reference: Cho et al. (2014), *Learning Phrase Representations using RNN Encoder–Decoder*.

    Example:
        >>> import torch
        >>> GRU(steps=8, in_features=8)(torch.zeros(2, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(self, steps: int = 8, in_features: int = 8, width: int = 64, out_features: int = 10) -> None:
        super().__init__()
        positive(steps=steps, in_features=in_features, width=width, out_features=out_features)
        self.steps = steps
        self.in_features = in_features
        self.cell = nn.GRUCell(in_features, width)
        self.head = nn.Linear(width, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Sequences ``(batch, steps, in_features)``, or flattened, to scores."""
        x = x.reshape(-1, self.steps, self.in_features)
        h = x.new_zeros(x.shape[0], self.cell.hidden_size)
        for t in range(self.steps):
            h = self.cell(x[:, t], h)
        return self.head(h)


def gru(steps: int = 8, in_features: int = 8, width: int = 64, out_features: int = 10) -> GRU:
    """An unrolled gated recurrent network; see :class:`GRU` for the arguments.

    Returns:
        The network, in PyTorch's default initialisation.

    Raises:
        ArgumentError: a size is not positive.

    Example:
        >>> sum(p.numel() for p in gru(width=4).parameters())
        218
    """
    return GRU(steps, in_features, width, out_features)


class MinimalRNN(nn.Module):
    r"""The smallest gated recurrent layer, with the arguments and results of ``nn.GRU``.

        z_t = V x_t + b_v,    u_t = sigm(W h_{t-1} + V_z z_t + b),    h_t = u_t h_{t-1} + (1 - u_t) z_t

    A bias of the gate towards memory (``gate_bias`` of 2 to 6) lets gradients pass over many steps for a
    whole region of weight variances.

    Args:
        input_size: numbers per position.
        hidden_size: size of the state.
        bias: whether the layer has biases.
        batch_first: inputs are ``(batch, time, input_size)`` instead of ``(time, batch, input_size)``.
        gate_bias: initial value of ``b``.

    Reference: Chen, Pennington & Schoenholz (2018), *Dynamical Isometry and a Mean Field Theory of RNNs*.
    Departure: the embedding of the input is linear.

    Example:
        >>> output, last = MinimalRNN(8, 16, batch_first=True)(torch.zeros(2, 5, 8))
        >>> output.shape, last.shape
        (torch.Size([2, 5, 16]), torch.Size([2, 16]))
    """

    one_operation = True  # a tracer reads it like a layer of torch.nn
    recurrent_kind = "minimal"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        batch_first: bool = False,
        gate_bias: float = 0.0,
    ) -> None:
        super().__init__()
        positive(input_size=input_size, hidden_size=hidden_size)
        self.input_size, self.hidden_size, self.batch_first = input_size, hidden_size, batch_first
        self.gate_bias = gate_bias
        self.weight_ih = nn.Parameter(torch.empty(hidden_size, input_size))
        self.weight_zh = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.weight_hh = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.bias_ih = nn.Parameter(torch.empty(hidden_size)) if bias else None
        self.bias_hh = nn.Parameter(torch.empty(hidden_size)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gaussian weights that keep the variance of their input; the gate's bias at ``gate_bias``."""
        for weight in (self.weight_ih, self.weight_zh, self.weight_hh):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        if self.bias_ih is not None and self.bias_hh is not None:
            nn.init.zeros_(self.bias_ih)
            nn.init.constant_(self.bias_hh, self.gate_bias)

    def forward(self, x: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Sequences, and a first state ``(batch, hidden_size)``, to all states and the last one."""
        z = nn.functional.linear(x, self.weight_ih, self.bias_ih)
        gate = nn.functional.linear(z, self.weight_zh, self.bias_hh)
        time = 1 if self.batch_first and x.ndim == 3 else 0
        h = torch.zeros_like(z.select(time, 0)) if hx is None else hx
        states = []
        for z_t, gate_t in zip(z.unbind(time), gate.unbind(time), strict=True):
            u = torch.sigmoid(nn.functional.linear(h, self.weight_hh) + gate_t)
            h = u * h + (1 - u) * z_t
            states.append(h)
        return torch.stack(states, time), h
