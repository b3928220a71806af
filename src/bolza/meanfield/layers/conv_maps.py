r"""Moment maps of convolutions: sliding a window over kernels, and its adjoint.

Σ'_{p,p'} = Σ_k v_k Σ_{p+k, p'+k} with v_k the variance that tap k brings. On a circle the Fourier modes of Σ
do not mix, and mode α decays by χ_c λ_α a layer, λ_α the transform of v: `conv_modes`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.core.errors import ArgumentError
from bolza.core.reference import Reference, cites
from bolza.meanfield.layers.moment_maps import Call, Missing, Step, moment_map

__all__ = ["ConvModes", "conv_modes", "conv_step"]

XIAO = Reference(
    "xiao2018cnn",
    "Xiao, Lechao and Bahri, Yasaman and Sohl-Dickstein, Jascha and Schoenholz, Samuel S. and Pennington, Jeffrey",
    "Dynamical Isometry and a Mean Field Theory of CNNs: How to Train 10,000-Layer Vanilla Convolutional Neural "
    "Networks",
    2018,
    venue="International Conference on Machine Learning",
    arxiv="1806.05393",
)


@dataclass(frozen=True)
class Sliding:
    """How the window of a convolution moves.

    Args:
        stride: steps between output positions.
        dilation: steps between taps.
        pads: numbers of positions added, last dimension first, as in ``F.pad``.
        mode: what they hold, as in ``F.pad``.
        spatial: positions of the longer side, the input of a convolution.
        space: positions of the other side.
    """

    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[int, ...]
    mode: str
    spatial: tuple[int, ...]
    space: tuple[int, ...]

    def slide(self, field: Tensor, taps: Tensor) -> Tensor:
        """Weighted sums of (n, *spatial) over the window."""
        conv = (F.conv1d, F.conv2d, F.conv3d)[field.ndim - 2]
        padded = F.pad(field[:, None], self.pads, mode=self.mode)
        return conv(padded, taps[None, None], stride=self.stride, dilation=self.dilation)[:, 0]

    def forward(self, kernel: Tensor, taps: Tensor, full: bool) -> Tensor:
        """From kernels over the input's positions to kernels over the output's."""
        return self.pairs(kernel, taps) if full else self.same(kernel, taps)

    def back(self, kernel: Tensor, taps: Tensor, full: bool) -> Tensor:
        """The adjoint: every output position hands its kernel to its window."""
        return self.pairs_back(kernel, taps) if full else self.same_back(kernel, taps)

    def same(self, kernel: Tensor, taps: Tensor) -> Tensor:
        """K'_p = Σ_k v_k K_{p+k}: pairs at the same position, ``(positions, samples, samples)``."""
        s = kernel.shape[-1]
        fields = kernel.permute(1, 2, 0).reshape(s * s, *self.spatial)
        return self.slide(fields, taps).reshape(s, s, -1).permute(2, 0, 1)

    def same_back(self, g: Tensor, taps: Tensor) -> Tensor:
        """Its adjoint: every output position hands its gradient to its window."""
        s = g.shape[-1]
        with torch.enable_grad():
            probe = torch.zeros(s * s, *self.spatial, dtype=torch.float64, requires_grad=True)
            fields = g.permute(1, 2, 0).reshape(s * s, *self.space)
            (back,) = torch.autograd.grad(self.slide(probe, taps), probe, fields)
        return back.reshape(s, s, -1).permute(2, 0, 1)

    def _taps(self, taps: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Each tap's weight, the output positions at which it is inside, and the input positions it reads there."""
        cells = torch.arange(math.prod(self.spatial), dtype=torch.float64).reshape(1, 1, *self.spatial) + 1
        padded = F.pad(cells, self.pads, mode=self.mode)[0, 0].long() - 1  # -1: outside
        for tap in torch.cartesian_prod(*(torch.arange(n) for n in taps.shape)).reshape(-1, taps.ndim):
            weight = taps[tuple(tap)]
            if weight == 0:
                continue
            index = tuple(
                slice(int(t) * d, int(t) * d + (n - 1) * st + 1, st)
                for t, d, st, n in zip(tap, self.dilation, self.stride, self.space, strict=True)
            )
            at = padded[index].reshape(-1)
            inside = (at >= 0).nonzero().squeeze(1)
            yield weight, inside, at[inside]

    def pairs(self, kernel: Tensor, taps: Tensor) -> Tensor:
        """K'[(a,p),(b,p')] = Σ_k v_k K[(a,p+k),(b,p'+k)], one tap after the other."""
        p, o = math.prod(self.spatial), math.prod(self.space)
        s = kernel.shape[-1] // p
        k = kernel.reshape(s, p, s, p)
        total = torch.zeros(s, o, s, o, dtype=torch.float64)
        for weight, to, at in self._taps(taps):
            block = weight * k[:, at][:, :, :, at]
            if len(to) == o:
                total += block
            else:
                total[:, to[:, None], :, to] += block.permute(1, 3, 0, 2)
        return total.reshape(1, s * o, s * o)

    def pairs_back(self, g: Tensor, taps: Tensor) -> Tensor:
        """Its adjoint."""
        p, o = math.prod(self.spatial), math.prod(self.space)
        s = g.shape[-1] // o
        k = g.reshape(s, o, s, o)
        total = torch.zeros(s, p, s, p, dtype=torch.float64)
        for weight, to, at in self._taps(taps):
            half = torch.zeros(s, p, s, len(to), dtype=torch.float64)
            half.index_add_(1, at, weight * k[:, to][:, :, :, to])
            total.index_add_(3, at, half)
        return total.reshape(1, s * p, s * p)


def conv_step(
    call: Call,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    pads: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    mode: str = "constant",
    transposed: bool = False,
) -> Step | Missing:
    """Σ' = v ⋆ Σ + σ_b², and the adjoint for gradients; for a transposed convolution the two change places.

    Args:
        call: the evaluation.
        weight: ``(out, in/groups, *kernel)``, or ``(in, out/groups, *kernel)`` if transposed.
        bias: ``(out,)`` or none.
        stride: of each dimension.
        pads: as `torch.nn.functional.pad` takes them.
        dilation: of each dimension.
        groups: independent groups of channels.
        mode: of padding, as in `torch.nn.functional.pad`.
        transposed: whether this is a transposed convolution.
    """
    m = call.inputs[0]
    units_in = weight.shape[0] if transposed else weight.shape[1] * groups
    units_out = weight.shape[1] * groups if transposed else weight.shape[0]
    if m.unit_dim != 1 or m.units != units_in or len(m.lead) != weight.ndim - 1:
        return Missing("a convolution along other dimensions than the trailing ones")
    squares = weight.detach().to("cpu", torch.float64).square().mean((0, 1))  # per tap
    taps, back_taps = squares * (units_in // groups), squares * (units_out // groups)
    b = 0.0 if bias is None else float(bias.detach().double().square().mean())
    before, after = m.lead[1:], tuple(call.output.shape[2:])
    longer, shorter = (after, before) if transposed else (before, after)
    window = Sliding(tuple(stride), tuple(dilation), tuple(pads), mode, longer, shorter)
    there, back = (window.back, window.forward) if transposed else (window.forward, window.back)
    kernel = there(m.kernel, taps, m.full)
    out = m.with_(
        kernel=kernel + b, mean=kernel.new_zeros(kernel.shape[:2]), lead=(m.samples, *after), units=units_out,
        gaussian=True, sources=frozenset({call.name}),
    )  # fmt: skip
    kept = 1.0 if transposed else _kept(window, taps)
    return Step(out, lambda g: [back(g, back_taps, m.full)], float(taps.sum()), b, kept=kept)


@moment_map.register(nn.Conv1d)
@moment_map.register(nn.Conv2d)
@moment_map.register(nn.Conv3d)
def _(layer: Any, call: Call) -> Step | Missing:
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    pads = layer._reversed_padding_repeated_twice
    return conv_step(call, layer.weight, layer.bias, layer.stride, pads, layer.dilation, layer.groups, mode)


@moment_map.register(nn.ConvTranspose1d)
@moment_map.register(nn.ConvTranspose2d)
@moment_map.register(nn.ConvTranspose3d)
def _(layer: Any, call: Call) -> Step | Missing:
    pads: list[int] = []
    for d in reversed(range(len(layer.kernel_size))):
        left = layer.padding[d]
        reach = layer.dilation[d] * (layer.kernel_size[d] - 1) + 1
        size, start = (
            call.output.shape[2 + d],
            call.inputs[0].lead[1 + d] if call.inputs[0].unit_dim == 1 else 1,
        )
        pads += [left, (start - 1) * layer.stride[d] + reach - size - left]
    return conv_step(
        call, layer.weight, layer.bias, layer.stride, pads, layer.dilation, layer.groups, transposed=True
    )


def _kept(window: Sliding, taps: Tensor) -> float:
    """Largest eigenvalue of sliding a window of weights that add up to 1, or its mean for other sizes."""
    total = float(taps.sum())
    if total == 0:
        return 1.0
    share = taps / total
    field = torch.ones(1, *window.spatial, dtype=torch.float64)
    if window.spatial != window.space:
        return float(window.slide(field, share).mean())
    for _ in range(30):
        field = window.slide(field, share)
        size = float(field.max())
        if size <= 0:
            return 1.0
        field = field / size
    return size


# ------------------------------------------------------------------------------------ Fourier modes


@dataclass(frozen=True)
class ConvModes:
    """Decay of the Fourier modes of the covariance from layer to layer.

    Args:
        factors: λ_α, shape of the space; the first is the uniform mode, 1.
        chi: χ_c, by which every mode is multiplied besides.

    Example:
        >>> conv_modes(3, 8).factors[:5].round(decimals=4).tolist()
        [1.0, 0.8047, 0.3333, -0.1381, -0.3333]
    """

    factors: Tensor
    chi: float

    @property
    def depth_scales(self) -> Tensor:
        """ξ_α = -1/log|χ_c λ_α| in layers; infinite where |χ_c λ_α| = 1."""
        rate = -(self.chi * self.factors).abs().log()
        return torch.where(rate == 0, torch.inf, 1 / rate)


@cites(XIAO)
def conv_modes(
    layer: nn.Module | int | Sequence[int], space: int | Sequence[int], chi: float = 1.0
) -> ConvModes:
    r"""Fourier modes of a circular convolution and how fast each of them fades with depth.

        λ_α = Σ_k v_k e^{iα·k} / Σ_k v_k,      ξ_α = -1 / log|χ_c λ_α|

    The covariance between positions goes through v ⋆: a window of equal taps wipes out what varies fast over
    space within a few layers, one with all its variance in the centre (delta-orthogonal) keeps every mode.

    Args:
        layer: a convolution, whose weights give the variance of each tap, or the size of a window of equal
            taps: a number, or one a dimension.
        space: sizes of the space, a number or one a dimension.
        chi: χ_c of the correlation map at its fixed point, 1 on the critical line.

    Returns:
        λ_α, real for a symmetric window (its real part otherwise has no meaning: then the modulus is given),
        in the order of `torch.fft.fftn`, and χ_c.

    Raises:
        ArgumentError: the numbers of dimensions differ, or the layer is no convolution of stride 1.

    Reference:
        Xiao et al. (2018), Section 2.2.2. Padding is circular there and here.

    Example:
        >>> conv = nn.Conv1d(64, 64, 3, padding=1)
        >>> with torch.no_grad():
        ...     conv.weight[:, :, [0, 2]] = 0.0                  # only the centre tap
        >>> conv_modes(conv, 6).depth_scales.tolist()
        [inf, inf, inf, inf, inf, inf]
    """
    sizes = (space,) if isinstance(space, int) else tuple(space)
    if isinstance(layer, nn.Module):
        weight = getattr(layer, "weight", None)
        if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) or set(layer.stride) != {1}:
            raise ArgumentError(
                f"layer is {layer!r}; give a convolution of stride 1, or the size of its window."
            )
        assert isinstance(weight, Tensor)
        taps = weight.detach().to("cpu", torch.float64).square().mean((0, 1))
        steps: tuple[int, ...] = tuple(layer.dilation)
    else:
        window = (layer,) * len(sizes) if isinstance(layer, int) else tuple(layer)
        taps, steps = torch.ones(window, dtype=torch.float64), (1,) * len(window)
    if taps.ndim != len(sizes):
        raise ArgumentError(
            f"space has {len(sizes)} dimensions, the window {taps.ndim}: give one size for each."
        )
    field = torch.zeros(sizes, dtype=torch.float64)
    grids = torch.meshgrid(
        *((torch.arange(k) - k // 2) * d % n for k, d, n in zip(taps.shape, steps, sizes, strict=True)),
        indexing="ij",
    )
    field.index_put_(grids, taps / taps.sum(), accumulate=True)
    factors = torch.fft.fftn(field)
    real = bool(factors.imag.abs().max() < 1e-9)
    return ConvModes(factors.real if real else factors.abs(), chi)
