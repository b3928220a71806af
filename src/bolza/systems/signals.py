"""What enters each layer in a forward pass, and the gradient that comes back to its output.

A gradient of the weights of a layer is made of these two, sample by sample (:mod:`bolza.ops.persample`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bolza.core.errors import UnsupportedError
from bolza.ops.persample import RULES, Block, Outer, outer_factors

__all__ = ["LayerSignal"]


@dataclass(eq=False)
class LayerSignal:
    """One call of a layer: what entered, and what came back.

    Attributes:
        path: name of the layer in the network.
        layer: the layer.
        entered: its input, detached.
        returned: ∂J/∂output, once a backward pass has reached it; the sum, if several did.
    """

    path: str
    layer: nn.Module
    entered: Tensor
    returned: Tensor | None = None
    version: int = field(init=False)

    def __post_init__(self) -> None:
        self.version = self.entered._version

    def receive(self, gradient: Tensor) -> None:
        """Note a gradient at the output."""
        gradient = gradient.detach()
        self.returned = gradient if self.returned is None else self.returned + gradient

    def blocks(self) -> dict[str, Block]:
        """The gradients of the samples, by the layer's own name of the parameter; none where no rule applies.

        Raises:
            UnsupportedError: a later layer overwrote what entered.
        """
        if self.returned is None:
            return {}
        x, p = self._checked(self.returned)
        with torch.no_grad():
            signals = RULES[type(self.layer)](self.layer, x)
            return {} if signals is None else signals(p)

    def rows(self) -> Outer | None:
        """Factors of the weight's gradient of a dense or convolutional layer; ``None`` for others.

        Raises:
            UnsupportedError: a later layer overwrote what entered.
        """
        if self.returned is None:
            return None
        with torch.no_grad():
            return outer_factors(self.layer, *self._checked(self.returned))

    def knows(self, names: Iterable[str], samples: int) -> bool:
        """Whether the gradients of so many samples, samples first, are known for these parameters."""
        x, p = self.entered, self.returned
        if p is None or x.ndim < 2 or x.shape[0] != samples or p.shape[:1] != (samples,):
            return False
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return True
        if isinstance(layer, nn.Conv1d | nn.Conv2d) and x.ndim == 2 + len(layer.kernel_size):
            return True
        return set(names) <= self.blocks().keys()

    def _checked(self, returned: Tensor) -> tuple[Tensor, Tensor]:
        """What entered and what came back, in the dtype of the parameters."""
        if self.entered._version != self.version:
            raise UnsupportedError(
                f"the input of the layer {self.path!r} was overwritten by an in-place operation after it was "
                "recorded: set inplace=False in the layer that follows"
            )
        own = next(self.layer.parameters())
        x = self.entered.to(own.dtype) if self.entered.is_floating_point() else self.entered
        return x, returned.to(own.dtype)


def has_rule(layer: nn.Module) -> bool:
    """Whether the gradients of single samples are known for a layer, in its mode."""
    if isinstance(layer, nn.modules.batchnorm._BatchNorm) and (
        layer.training or not layer.track_running_stats
    ):
        return False  # it mixes samples
    return type(layer) in RULES
