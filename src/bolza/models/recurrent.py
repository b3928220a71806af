"""A gated recurrent network whose steps are visible, one cell call each."""

from __future__ import annotations

from torch import Tensor, nn

from bolza.models.mlp import positive

__all__ = ["GRU", "gru"]


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
