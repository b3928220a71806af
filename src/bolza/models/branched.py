"""Inception networks: blocks of parallel branches whose outputs are concatenated."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bolza.models.mlp import activation_module, positive

__all__ = ["InceptionBlock", "inception"]

Activation = str | Callable[[], nn.Module]


class InceptionBlock(nn.Module):
    """Branches of 1×1, 3×3 and 5×5 convolutions and of pooling, side by side, normalised and concatenated.

    The 3×3 and the 5×5 branch (two 3×3 convolutions) begin with a 1×1 convolution that reduces the channels; the
    pooling branch ends with one.

    Args:
        channels: channels of the input.
        width: channels of each branch; the output has ``4 · width``.
        activation: name or class.

    Reference: Szegedy et al. (2015), *Going Deeper with Convolutions*, figure 2(b); batch normalisation after each
        convolution.

    Example:
        >>> InceptionBlock(4, 2)(torch.zeros(2, 4, 8, 8)).shape
        torch.Size([2, 8, 8, 8])
    """

    def __init__(self, channels: int, width: int, activation: Activation = "relu") -> None:
        super().__init__()

        def unit(inputs: int, size: int) -> list[nn.Module]:
            convolution = nn.Conv2d(inputs, width, size, padding=size // 2, bias=False)
            return [convolution, nn.BatchNorm2d(width), activation_module(activation)]

        self.one = nn.Sequential(*unit(channels, 1))
        self.three = nn.Sequential(*unit(channels, 1), *unit(width, 3))
        self.five = nn.Sequential(*unit(channels, 1), *unit(width, 3), *unit(width, 3))
        self.pool = nn.Sequential(nn.AvgPool2d(3, stride=1, padding=1), *unit(channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Image batch to image batch of the same size."""
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)


def inception(
    depth: int = 8,
    width: int = 8,
    activation: Activation = "relu",
    in_channels: int = 1,
    out_features: int = 10,
) -> nn.Sequential:
    """A stem, inception blocks with one halving of the image half way, and a linear layer.

    Args:
        depth: layers with weights along the longest path: a stem, three a block, and the linear layer; rounded down,
            at least 5.
        width: channels of each branch.
        activation: name or class.
        in_channels: channels of the image.
        out_features: length of the output.

    Returns:
        ``nn.Sequential``; inputs ``(batch, in_channels, height, width)``.

    Raises:
        ArgumentError: ``depth`` is less than 5, or a size is not positive.

    Reference: Szegedy, Liu, Jia, Sermanet, Reed, Anguelov, Erhan, Vanhoucke & Rabinovich (2015), *Going Deeper with
        Convolutions*.

    Example:
        >>> inception()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    positive(depth=depth - 4, width=width, in_channels=in_channels, out_features=out_features)
    blocks = (depth - 2) // 3
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, 2 * width, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        activation_module(activation),
    ]
    for k in range(blocks):
        if k == blocks // 2:
            layers.append(nn.MaxPool2d(2))
        layers.append(InceptionBlock(4 * width if k else 2 * width, width, activation))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, out_features))
