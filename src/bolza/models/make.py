"""A network by name, sized for a data set."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError
from bolza.models.branched import inception
from bolza.models.convolutional import cnn, densenet, resnet
from bolza.models.mlp import mlp
from bolza.models.recurrent import gru
from bolza.models.transformers import gpt, vit

if TYPE_CHECKING:
    from bolza.data import Dataset

__all__ = ["NAMES", "make"]

NAMES = ("mlp", "cnn", "resnet", "densenet", "inception", "vit", "gpt", "gru")
"""Names that :func:`make` knows."""

_IMAGES: dict[str, Callable[..., nn.Module]] = {
    "cnn": cnn,
    "resnet": resnet,
    "densenet": densenet,
    "inception": inception,
    "vit": vit,
}


class _AsImage(nn.Module):
    """Vectors as square images of one channel."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 1, self.side, self.side)


class _OneHot(nn.Module):
    """Tokens as rows of 0 and 1, for networks that read numbers."""

    rows: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.eye(size), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.rows[tokens]


def make(
    name: str,
    dataset: Dataset,
    depth: int | None = None,
    width: int | None = None,
    activation: str | Callable[[], nn.Module] | None = None,
) -> nn.Module:
    """Build a network of the zoo with the input and output sizes of a data set.

    Args:
        name: one of :data:`NAMES`.
        dataset: the data, a :class:`bolza.data.Dataset`.
        depth: layers (blocks, for transformers; steps, for the recurrent network, must then divide the
            input); the network's own default where not given.
        width: neurons, channels or numbers per position; the network's own default where not given.
        activation: name or class; the network's own default where not given (tanh for the mlp, ReLU for
            convolutions, GELU for transformers). The recurrent network has its own and ignores it.

    Returns:
        ``nn.Module`` in PyTorch's default initialisation, on the CPU, float32.

    Raises:
        ArgumentError: the name is not known, or the network cannot read such data.

    Example:
        >>> from bolza.data import digits
        >>> len(make("mlp", digits(), depth=3))
        5
    """
    if name not in NAMES:
        raise ArgumentError(f"model {name!r} is not known: choose one of {', '.join(NAMES)}")
    options: dict[str, Any] = {"depth": depth, "width": width, "activation": activation}
    options = {key: value for key, value in options.items() if value is not None}
    shape, out = dataset.input_shape, dataset.output_size
    language = dataset.task == "language"
    if language != (name == "gpt"):
        if name == "mlp" and language:
            return nn.Sequential(_OneHot(out), mlp(**options, in_features=out, out_features=out))
        fitting = "gpt or mlp" if language else ", ".join(n for n in NAMES if n != "gpt")
        raise ArgumentError(
            f"model {name!r} cannot read {dataset.name!r}, whose task is {dataset.task}: choose {fitting}"
        )
    if name == "gpt":
        return gpt(vocabulary=out, length=shape[0], **options)
    if name == "mlp":
        net = mlp(**options, in_features=math.prod(shape), out_features=out)
        return net if len(shape) == 1 else nn.Sequential(nn.Flatten(), *net)
    if name == "gru":
        return _make_gru(shape, out, depth, width)
    return _make_image_network(name, dataset, options)


def _make_gru(shape: tuple[int, ...], out: int, depth: int | None, width: int | None) -> nn.Module:
    size = math.prod(shape)
    steps = depth or (shape[-2] if len(shape) > 1 else _side(size) or size)
    if size % steps:
        raise ArgumentError(f"depth={steps} does not divide the {size} numbers of an input: choose a divisor")
    return gru(steps, size // steps, out_features=out, **({} if width is None else {"width": width}))


def _make_image_network(name: str, dataset: Dataset, options: dict[str, Any]) -> nn.Module:
    shape, build = dataset.input_shape, _IMAGES[name]
    side = _side(shape[0]) if len(shape) == 1 else shape[-1]
    if side is None or len(shape) not in (1, 3):
        raise ArgumentError(
            f"model {name!r} reads images (channels, height, width), but an input of {dataset.name!r} has "
            f"shape {shape}: choose mlp or gru, or reshape the data"
        )
    channels = 1 if len(shape) == 1 else shape[0]
    extra = {"image_size": side, "patch": _patch(side)} if name == "vit" else {}
    net = build(**options, in_channels=channels, out_features=dataset.output_size, **extra)
    if len(shape) == 3:
        return net
    return (
        nn.Sequential(_AsImage(side), *net)
        if isinstance(net, nn.Sequential)
        else nn.Sequential(_AsImage(side), net)
    )


def _side(size: int) -> int | None:
    side = math.isqrt(size)
    return side if side * side == size else None


def _patch(side: int) -> int:
    """The divisor of the side that makes closest to six patches along it: 2 of 8 pixels, 4 of 28."""
    return min((p for p in range(1, side + 1) if side % p == 0), key=lambda p: (abs(side / p - 6), -p))
