"""Windows of convolutions on kernels: sums over equal shifts of one or of both position indices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Window", "sided_padding", "slide_window"]


@dataclass(frozen=True)
class Window:
    """The window of a convolution: sizes, and padding before and after each dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    mode: str = "zeros"


def sided_padding(
    padding: Any, kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Padding before and after each dimension, from PyTorch's ways of giving it."""
    if padding == "valid":
        return tuple((0, 0) for _ in kernel)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple((t // 2, t - t // 2) for t in totals)
    each = (
        [padding] * len(kernel) if isinstance(padding, int) else list(padding) * (len(kernel) // len(padding))
    )
    return tuple((p, p) for p in each)


def slide_window(
    t: Tensor, *, space: tuple[int, ...], out: tuple[int, ...], window: Window, taps: Tensor, twice: bool
) -> Tensor:
    """Sums over the window of ``(P, …)``, or along the diagonal of windows of ``(P, P, …)``."""
    dims, rest = len(space), t.shape[1 + twice :]
    t = t.reshape(*space, *(space if twice else ()), *rest)
    padding = [before for before, _ in window.padding]
    if window.mode != "zeros":  # repeat the borders, then nothing needs padding
        mode = {"circular": "circular", "reflect": "reflect", "replicate": "replicate"}[window.mode]
        for d, sides in enumerate(window.padding):
            at = (
                F.pad(torch.arange(space[d], dtype=torch.float64)[None], sides, mode=mode)[0]
                .long()
                .to(t.device)
            )
            for axis in (d, d + dims) if twice else (d,):
                t = t.index_select(axis, at)
        padding = [0] * dims
    first = float(taps.flatten()[0])
    axes: tuple[int, ...]
    if bool((taps == first).all()):  # equal weights: one dimension after the other
        for d in range(dims):
            axes = (d, d + dims) if twice else (d,)
            shifts = [i * window.dilation[d] - padding[d] for i in range(window.kernel[d])]
            t = _gather(t, axes, (out[d],), [((s,), 1.0) for s in shifts], (window.stride[d],))
        t = t * first if first != 1 else t
    else:
        terms = []
        for tap in product(*(range(n) for n in window.kernel)):
            value = float(taps[tap])
            if value:
                terms.append((tuple(i * window.dilation[d] - padding[d] for d, i in enumerate(tap)), value))
        axes = tuple(range(2 * dims)) if twice else tuple(range(dims))
        t = _gather(t, axes, out, terms, window.stride)
    p = math.prod(out)
    return t.reshape(p, p, *rest) if twice else t.reshape(p, *rest)


def _gather(
    t: Tensor, axes: tuple[int, ...], out: tuple[int, ...], terms: list[tuple[tuple[int, ...], float]],
    stride: tuple[int, ...],
) -> Tensor:  # fmt: skip
    """Σ over terms (shift, weight) of t[o·stride + shift], 0 outside; ``axes`` go round ``out`` in turn."""
    shape = list(t.shape)
    for place, axis in enumerate(axes):
        shape[axis] = out[place % len(out)]
    total = t.new_zeros(shape)
    for shift, weight in terms:
        source, target = [slice(None)] * t.ndim, [slice(None)] * t.ndim
        for place, axis in enumerate(axes):
            d = place % len(out)
            low = max(0, -(shift[d] // stride[d]))  # first o with o·stride + shift ≥ 0
            high = min(out[d], (t.shape[axis] - 1 - shift[d]) // stride[d] + 1)
            high = max(low, high)
            start = low * stride[d] + shift[d]
            source[axis] = slice(
                start, start + max(0, (high - low - 1) * stride[d] + 1) * (high > low), stride[d]
            )
            target[axis] = slice(low, high)
        total[tuple(target)].add_(t[tuple(source)], alpha=weight)
    return total
