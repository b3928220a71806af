"""A small vision transformer and a decoder-only language model, pre-norm, with fused attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.core.errors import ArgumentError
from bolza.models.mlp import activation_module, positive

__all__ = ["GPT", "TransformerBlock", "VisionTransformer", "gpt", "vit"]

Activation = str | Callable[[], nn.Module]


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.heads = heads
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        width: numbers per position.
        heads: attention heads; must divide ``width``.
        causal: whether a position sees only itself and those before it.
        activation: name or class, between the two layers of the mlp.

    Example:
        >>> TransformerBlock(8, 2)(torch.zeros(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(self, width: int, heads: int, causal: bool = False, activation: Activation = "gelu") -> None:
        super().__init__()
        if width % heads:
            raise ArgumentError(
                f"width={width} is not a multiple of heads={heads}: choose another of the two"
            )
        self.norm1 = nn.LayerNorm(width)
        self.attention = _Attention(width, heads, causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), activation_module(activation), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Sequence batch ``(batch, length, width)`` to the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Patches of an image through transformer blocks, averaged, to scores.

    Args:
        depth: transformer blocks.
        width: numbers per patch.
        activation: name or class.
        in_channels: channels of the image.
        image_size: height and width of the image.
        patch: height and width of a patch; must divide ``image_size``.
        heads: attention heads.
        out_features: length of the output.

    Reference: Dosovitskiy et al. (2021), *An Image is Worth 16x16 Words*. Departure: the mean over patches in
    place of a class token.

    Example:
        >>> VisionTransformer(depth=1, width=8, heads=2)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        depth: int = 4,
        width: int = 64,
        activation: Activation = "gelu",
        in_channels: int = 1,
        image_size: int = 8,
        patch: int = 2,
        heads: int = 4,
        out_features: int = 10,
    ) -> None:
        super().__init__()
        positive(depth=depth, width=width, in_channels=in_channels, patch=patch, heads=heads)
        if image_size % patch:
            raise ArgumentError(
                f"image_size={image_size} is not a multiple of patch={patch}: choose another patch"
            )
        self.patches = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.positions = nn.Parameter(torch.randn(1, (image_size // patch) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(
            *(TransformerBlock(width, heads, activation=activation) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(batch, channels, size, size)`` to scores ``(batch, out_features)``."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


class GPT(nn.Module):
    """A decoder-only transformer: tokens to scores of the next token at every position.

    Args:
        vocabulary: number of tokens.
        depth: transformer blocks.
        width: numbers per position.
        activation: name or class.
        length: longest sequence.
        heads: attention heads.
        tied: share the matrix of the token embedding with the head.

    Reference: Radford et al. (2019), *Language Models are Unsupervised Multitask Learners*.

    Example:
        >>> model = GPT(vocabulary=20, depth=1, width=8, length=6, heads=2, tied=True)
        >>> model(torch.zeros(2, 6, dtype=torch.long)).shape
        torch.Size([2, 6, 20])
        >>> model.head.weight is model.tokens.weight
        True
    """

    def __init__(
        self,
        vocabulary: int,
        depth: int = 4,
        width: int = 64,
        activation: Activation = "gelu",
        length: int = 64,
        heads: int = 4,
        tied: bool = False,
    ) -> None:
        super().__init__()
        positive(vocabulary=vocabulary, depth=depth, width=width, length=length, heads=heads)
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        self.blocks = nn.Sequential(
            *(TransformerBlock(width, heads, causal=True, activation=activation) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            # an embedding starts with variance 1, a head needs 1/width: the smaller one suits both
            nn.init.normal_(self.tokens.weight, std=width**-0.5)
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens ``(batch, length)`` to scores ``(batch, length, vocabulary)``."""
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def vit(
    depth: int = 4,
    width: int = 64,
    activation: Activation = "gelu",
    in_channels: int = 1,
    image_size: int = 8,
    out_features: int = 10,
    patch: int = 2,
    heads: int = 4,
) -> VisionTransformer:
    """A small vision transformer; see :class:`VisionTransformer` for the arguments.

    Returns:
        The network, in PyTorch's default initialisation.

    Raises:
        ArgumentError: sizes that do not divide each other.

    Example:
        >>> vit(depth=1)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    return VisionTransformer(depth, width, activation, in_channels, image_size, patch, heads, out_features)


def gpt(
    vocabulary: int,
    depth: int = 4,
    width: int = 64,
    activation: Activation = "gelu",
    length: int = 64,
    heads: int = 4,
    tied: bool = False,
) -> GPT:
    """A small decoder-only language model; see :class:`GPT` for the arguments.

    Returns:
        The network, in PyTorch's default initialisation (a tied embedding starts at variance 1/width).

    Raises:
        ArgumentError: sizes that do not divide each other.

    Example:
        >>> gpt(vocabulary=10, depth=1, length=5)(torch.zeros(2, 5, dtype=torch.long)).shape
        torch.Size([2, 5, 10])
    """
    return GPT(vocabulary, depth, width, activation, length, heads, tied)
