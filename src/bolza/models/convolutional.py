"""Convolutional networks for small images: plain, residual, densely connected."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bolza.models.mlp import activation_module, positive

__all__ = ["DenseBlock", "ResidualBlock", "cnn", "densenet", "resnet"]

Activation = str | Callable[[], nn.Module]


def cnn(
    depth: int = 4,
    width: int = 16,
    activation: Activation = "relu",
    in_channels: int = 1,
    out_features: int = 10,
) -> nn.Sequential:
    """3×3 convolutions that keep the size of the image, then an average over it and a linear layer.

    Args:
        depth: layers with weights, the last linear one included; at least 2.
        width: channels.
        activation: name or class.
        in_channels: channels of the image.
        out_features: length of the output.

    Returns:
        ``nn.Sequential``; inputs ``(batch, in_channels, height, width)`` of any size.

    Raises:
        ArgumentError: a size is not positive.

    Example:
        >>> cnn()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    positive(depth=depth - 1, width=width, in_channels=in_channels, out_features=out_features)
    layers: list[nn.Module] = []
    for i in range(depth - 1):
        layers += [nn.Conv2d(width if i else in_channels, width, 3, padding=1), activation_module(activation)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, out_features))


class ResidualBlock(nn.Module):
    """x + F(x), F = conv, norm, activation, conv, norm; a 1×1 convolution on the skip where sizes change.

    Args:
        channels: channels of the input.
        width: channels of the output.
        stride: 2 halves the image.
        activation: name or class.

    Example:
        >>> ResidualBlock(4, 8, stride=2)(torch.zeros(2, 4, 8, 8)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(self, channels: int, width: int, stride: int = 1, activation: Activation = "relu") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.activation = activation_module(activation)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            self.skip = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Image batch to image batch."""
        h = self.activation(self.norm1(self.conv1(x)))
        return self.activation(self.skip(x) + self.norm2(self.conv2(h)))


def resnet(
    depth: int = 8,
    width: int = 16,
    activation: Activation = "relu",
    in_channels: int = 1,
    out_features: int = 10,
) -> nn.Sequential:
    """A residual network with batch normalisation, sized for 8×8 images.

    A stem, ``(depth − 2) / 2`` blocks of two convolutions, and a linear layer; the image is halved and
    the channels doubled once, half way.

    Args:
        depth: layers with weights along the longest path; rounded down to an even number, at least 4.
        width: channels of the first half.
        activation: name or class.
        in_channels: channels of the image.
        out_features: length of the output.

    Returns:
        ``nn.Sequential``; inputs ``(batch, in_channels, height, width)``.

    Raises:
        ArgumentError: ``depth`` is less than 4, or a size is not positive.

    Reference: He, Zhang, Ren & Sun (2016), *Deep Residual Learning for Image Recognition*.

    Example:
        >>> resnet()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    positive(depth=depth - 3, width=width, in_channels=in_channels, out_features=out_features)
    blocks = (depth - 2) // 2
    half = blocks // 2
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        activation_module(activation),
    ]
    layers += [ResidualBlock(width, width, 1, activation) for _ in range(half)]
    layers += [ResidualBlock(width, 2 * width, 2, activation)]
    layers += [ResidualBlock(2 * width, 2 * width, 1, activation) for _ in range(blocks - half - 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, out_features))


class DenseBlock(nn.Module):
    """Layers that each read the outputs of all layers before them.

    Args:
        channels: channels of the input.
        growth: channels that each layer adds.
        layers: number of layers; the output has ``channels + layers · growth`` channels.
        activation: name or class.

    Example:
        >>> DenseBlock(4, 2, 3)(torch.zeros(2, 4, 8, 8)).shape
        torch.Size([2, 10, 8, 8])
    """

    def __init__(self, channels: int, growth: int, layers: int, activation: Activation = "relu") -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(channels + i * growth),
                activation_module(activation),
                nn.Conv2d(channels + i * growth, growth, 3, padding=1, bias=False),
            )
            for i in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Image batch to image batch with more channels."""
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


def densenet(
    depth: int = 8,
    width: int = 8,
    activation: Activation = "relu",
    in_channels: int = 1,
    out_features: int = 10,
) -> nn.Sequential:
    """Two dense blocks with a transition between them, sized for 8×8 images.

    Args:
        depth: layers with weights: a stem, two blocks, a transition and a linear layer; at least 5.
        width: channels each layer of a block adds.
        activation: name or class.
        in_channels: channels of the image.
        out_features: length of the output.

    Returns:
        ``nn.Sequential``; inputs ``(batch, in_channels, height, width)``.

    Raises:
        ArgumentError: ``depth`` is less than 5, or a size is not positive.

    Reference: Huang, Liu, van der Maaten & Weinberger (2017), *Densely Connected Convolutional Networks*.

    Example:
        >>> densenet()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    positive(depth=depth - 4, width=width, in_channels=in_channels, out_features=out_features)
    first, channels = (depth - 3) // 2, 2 * width
    second = depth - 3 - first
    wide = channels + first * width
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
        DenseBlock(channels, width, first, activation),
        nn.Sequential(nn.BatchNorm2d(wide), nn.Conv2d(wide, channels, 1, bias=False), nn.AvgPool2d(2)),
        DenseBlock(channels, width, second, activation),
        nn.BatchNorm2d(channels + second * width),
        activation_module(activation),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels + second * width, out_features),
    )
