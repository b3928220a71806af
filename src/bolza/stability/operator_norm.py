r"""Upper bounds on the spectral norm of linear layers that hold whatever the rounding and the iteration.

A matrix: the largest singular value from a full decomposition, with a margin for rounding. A convolution with zero
padding is a corner of the circular convolution on the grid enlarged by the kernel, which the Fourier transform splits
into one small matrix a frequency; a stride s is a convolution of stride 1 on the s² interleaved sub-grids. Hence

    ‖A‖ ≤ max_ω σ_max(K̂(ω)),

with equality for circular padding. Power iteration alone would bound the norm from below.

Reference: Sedghi, Gupta & Long (2019), *The Singular Values of Convolutional Layers*, for the circular case.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["adaptive_windows", "convolution_norm", "matrix_norm", "operator_gain"]

_MARGIN = 1 + 1e-9
_BLOCK = 4096  # frequencies at once


def matrix_norm(matrix: Tensor) -> float:
    """Upper bound on σ_max of a matrix, shape ``(m, n)``."""
    if matrix.numel() == 0:
        return 0.0
    a = matrix.detach().to(torch.float64)
    if not bool(a.any()):
        return 0.0
    a = a if a.shape[0] <= a.shape[1] else a.mT
    scale = a.abs().max()
    top = float(torch.linalg.eigvalsh((a / scale) @ (a / scale).mT)[-1])
    return math.sqrt(max(top, 0.0)) * float(scale) * _MARGIN


def adaptive_windows(size: int, out: int) -> Tensor:
    """Adaptive average pooling of a line as a matrix, shape ``(size, out)``: what each entry gives to each window."""
    one = torch.eye(size, dtype=torch.float64)
    return F.adaptive_avg_pool1d(one[None], out)[0]


def convolution_norm(
    kernel: Tensor, shape: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...], groups: int = 1,
    circular: bool = False,
) -> float:  # fmt: skip
    """Upper bound on the norm of a convolution of images.

    Args:
        kernel: shape ``(out, in / groups, *k)``.
        shape: spatial shape of the image without padding.
        stride: of each dimension.
        dilation: of each dimension.
        groups: number of groups of channels.
        circular: whether the image is padded periodically, stride 1; the bound is then the norm itself. The image
            must be at least as large as the dilated kernel.
    """
    k = kernel.detach().to(torch.float64)
    dims = len(shape)
    wide = k.new_zeros(*k.shape[:2], *((n - 1) * d + 1 for n, d in zip(k.shape[2:], dilation, strict=True)))
    wide[(..., *(slice(None, None, d) for d in dilation))] = k  # type: ignore[index]
    if math.prod(stride) > 1:  # interleave: the offsets of the stride become channels
        short = [(-n) % s for n, s in zip(wide.shape[2:], stride, strict=True)]
        wide = F.pad(wide, [v for n in reversed(short) for v in (0, n)])
        parts = [n // s for n, s in zip(wide.shape[2:], stride, strict=True)]
        split = wide.reshape(*wide.shape[:2], *(v for pair in zip(parts, stride, strict=True) for v in pair))
        grids, offsets = [2 + 2 * i for i in range(dims)], [3 + 2 * i for i in range(dims)]
        wide = split.permute(0, 1, *offsets, *grids).reshape(wide.shape[0], -1, *parts)
        shape = tuple(math.ceil(n / s) + 1 for n, s in zip(shape, stride, strict=True))
    grid = [max(n, m) if circular else n + m - 1 for n, m in zip(shape, wide.shape[2:], strict=True)]
    spectrum = torch.fft.fftn(wide, s=grid, dim=tuple(range(2, 2 + dims)))
    out = wide.shape[0] // groups
    mats = (
        spectrum.reshape(groups, out, wide.shape[1], -1).permute(3, 0, 1, 2).reshape(-1, out, wide.shape[1])
    )
    mats = mats if out <= wide.shape[1] else mats.mH
    top = max(float(torch.linalg.eigvalsh(part @ part.mH)[:, -1].max()) for part in mats.split(_BLOCK))
    return math.sqrt(max(top, 0.0)) * _MARGIN


def operator_gain(layer: nn.Module, shape: torch.Size) -> float | None:
    """Upper bound on the norm of a linear layer on values of a shape, without writing it as a matrix.

    Returns:
        None where no bound is known.
    """
    if isinstance(layer, nn.Linear):
        return matrix_norm(layer.weight)
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        assert layer.running_var is not None
        scale = torch.rsqrt(layer.running_var.double() + layer.eps)
        return float((scale if layer.weight is None else scale * layer.weight.double()).abs().max())
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if layer.padding_mode not in ("zeros", "circular"):
            return None
        circular = layer.padding_mode == "circular"
        dims = len(layer.kernel_size)
        reach = (d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
        wraps = any(r > n for r, n in zip(reach, shape[-dims:], strict=True))  # the kernel meets itself
        if circular and (math.prod(layer.stride) > 1 or not _same(layer) or wraps):
            return None
        return convolution_norm(
            layer.weight, tuple(shape[-dims:]), layer.stride, layer.dilation, layer.groups, circular
        )
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        dims = len(
            layer.kernel_size
        )  # the adjoint of a convolution of the image that it makes, at most this large
        large = tuple(
            (n - 1) * s + d * (k - 1) + 1 + s
            for n, s, d, k in zip(shape[-dims:], layer.stride, layer.dilation, layer.kernel_size, strict=True)
        )
        return convolution_norm(layer.weight, large, layer.stride, layer.dilation, layer.groups)
    if isinstance(layer, nn.modules.pooling._AvgPoolNd):
        return _average(layer, len(shape))
    if isinstance(
        layer,
        nn.Flatten | nn.Unflatten | nn.Identity | nn.PixelShuffle | nn.PixelUnshuffle | nn.ChannelShuffle,
    ):
        return 1.0
    if isinstance(layer, nn.modules.dropout._DropoutNd | nn.modules.padding._ConstantPadNd):
        return 1.0
    return None


def _same(layer: Any) -> bool:
    """Whether the output of a circular convolution has the size of its input."""
    if layer.padding == "same":
        return True
    return not isinstance(layer.padding, str) and all(
        2 * p == d * (k - 1) for p, d, k in zip(layer.padding, layer.dilation, layer.kernel_size, strict=True)
    )


def _average(layer: Any, rank: int) -> float | None:
    """Each window has norm k^{-1/2}; windows that share a pixel add up."""
    dims = int(type(layer).__name__[-2])
    kernel, stride = (
        (v,) * dims if isinstance(v, int) else tuple(v)
        for v in (layer.kernel_size, layer.stride or layer.kernel_size)
    )
    if layer.ceil_mode or getattr(layer, "divisor_override", None) or not layer.count_include_pad:
        return None
    share = math.prod(math.ceil(k / s) for k, s in zip(kernel, stride, strict=True))
    return math.sqrt(share / math.prod(kernel))
