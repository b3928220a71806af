r"""Random weight matrices and kernels of a wanted variance, and how they get into a layer.

An orthonormal matrix of r × c has mean square 1/max(r, c). *Mirrored* weights

    W = [[W₀, −W₀], [−W₀, W₀]],     φ(h) − φ(−h) = s h

make an activation with that property (ReLU, leaky ReLU, GELU, SiLU, softplus) act as a linear function of
half as many units: with W₀ orthogonal the network starts as an isometry.

Reference: Xiao et al. (2018) for delta-orthogonal kernels; Balduzzi et al. (2017) for mirrored weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bolza.core.errors import ArgumentError
from bolza.meanfield.activations import Activation

__all__ = ["Drawer", "assign", "mirror_slope"]

_TRANSPOSED = nn.modules.conv._ConvTransposeNd


def mirror_slope(act: Activation) -> float | None:
    """The s of φ(h) − φ(−h) = s h; none if the activation is not of that kind, or is itself linear.

    Args:
        act: the activation.

    Example:
        >>> from bolza.meanfield import resolve_activation
        >>> mirror_slope(resolve_activation("gelu")), mirror_slope(resolve_activation("tanh"))
        (1.0, None)
    """
    h = torch.linspace(-4, 4, 81, dtype=torch.float64)
    try:
        odd = act.phi(h) - act.phi(-h)
        even = act.phi(h) + act.phi(-h)
    except Exception:  # a function that refuses such numbers is not of that kind
        return None
    slope = float(odd[-1] / h[-1])
    if not (math.isfinite(slope) and slope > 0) or float((odd - slope * h).abs().max()) > 1e-6 * slope:
        return None
    return round(slope, 9) if float(even.abs().max()) > 1e-6 else None


class Drawer:
    """Draws weights in one scheme from one source of random numbers.

    Args:
        scheme: ``"gaussian"``, ``"orthogonal"``, ``"delta_orthogonal"`` or ``"mirrored"``.
        generator: source of the random numbers; may live on another device than the weights.
    """

    def __init__(self, scheme: str, generator: torch.Generator | None = None) -> None:
        self.scheme, self.generator = scheme, generator

    def normal(self, shape: Any, like: Tensor, variance: float) -> Tensor:
        """Independent Gaussian numbers, in the dtype and on the device of ``like``."""
        device = like.device if self.generator is None else self.generator.device
        wide = torch.promote_types(like.dtype, torch.float32)
        draw = torch.randn(tuple(shape), generator=self.generator, device=device, dtype=wide)
        return (draw * math.sqrt(variance)).to(like)

    def orthonormal(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Haar distributed, orthonormal rows or columns, whichever are fewer; float64 where it exists."""
        device = like.device if self.generator is None else self.generator.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        shape = (max(rows, columns), min(rows, columns))
        q, r = torch.linalg.qr(torch.randn(shape, generator=self.generator, device=device, dtype=dtype))
        q = q * r.diagonal().sgn()  # without the signs the law would depend on the algorithm
        return (q if rows >= columns else q.T).to(like.device)

    def matrix(self, like: Tensor, variance: float) -> Tensor:
        """A matrix of the shape of ``like`` with columns · mean(W²) = variance."""
        rows, columns = like.shape
        if self.scheme == "gaussian":
            return self.normal((rows, columns), like, variance / columns)
        scale = math.sqrt(variance * max(rows, columns) / columns)
        return (self.orthonormal(rows, columns, like) * scale).to(like)

    def kernel(
        self, layer: Any, variance: float, mirror_in: bool = False, mirror_out: bool = False
    ) -> tuple[Tensor, str]:
        """Weights for a linear or (transposed) convolutional layer with fan_in · mean(W²) = variance.

        Args:
            layer: the layer; it is not changed.
            variance: σ_w². The fan-in of a transposed convolution is what reaches one output.
            mirror_in: whether inputs come as (φ(h), φ(−h)).
            mirror_out: whether outputs are to come as (h, −h).

        Returns:
            The weights, and the scheme that was used.
        """
        weight = layer.weight.detach()
        groups = getattr(layer, "groups", 1)
        stride = math.prod(getattr(layer, "stride", (1,)))
        transposed = isinstance(layer, _TRANSPOSED)
        parts, scheme = [], self.scheme
        for part in weight.chunk(groups):
            forward = part.transpose(0, 1) if transposed else part  # (outputs, inputs, *taps)
            outputs, inputs, taps = forward.shape[0], forward.shape[1], forward.shape[2:]
            fan_in = inputs * math.prod(taps) / (stride if transposed else 1)
            if self.scheme == "gaussian":
                drawn = self.normal(forward.shape, weight, variance / fan_in)
            else:
                centre = bool(taps) and stride == 1 and self.scheme in ("delta_orthogonal", "mirrored")
                sizes = (outputs, inputs) if centre else (outputs, round(forward[0].numel()))
                if transposed and not centre:
                    sizes = (outputs * math.prod(taps), inputs)
                fan = inputs if centre else fan_in
                flat = self._mirrored(*sizes, weight, variance / fan, mirror_in, mirror_out)
                drawn = torch.zeros_like(forward)
                if centre:
                    drawn[(slice(None), slice(None), *(k // 2 for k in taps))] = flat
                elif transposed:
                    drawn = flat.reshape(outputs, *taps, inputs).movedim(-1, 1)
                else:
                    drawn = flat.reshape(forward.shape)
                scheme = "delta_orthogonal" if centre else "orthogonal"
                if mirror_in or mirror_out:
                    scheme = f"mirrored {scheme}"
            parts.append(drawn.transpose(0, 1) if transposed else drawn)
        return torch.cat(parts).contiguous(), scheme

    def _mirrored(
        self, rows: int, columns: int, like: Tensor, square: float, mirror_in: bool, mirror_out: bool
    ) -> Tensor:
        """Orthonormal up to a factor, with mean square ``square`` over what is drawn, then mirrored."""
        r = rows // 2 if mirror_out else rows
        c = columns // 2 if mirror_in else columns
        core = self.orthonormal(r, c, like) * math.sqrt(square * max(r, c))
        if mirror_in:
            core = torch.cat([core, -core, core.new_zeros(r, columns - 2 * c)], 1)
        if mirror_out:
            odd = (
                core[:1].roll(1, 1) if rows > 2 * r else core[:0]
            )  # a unit without a partner must not be dead
            core = torch.cat([core, -core, odd])
        return core.to(like)


def assign(layer: nn.Module, weight: Tensor) -> str:
    """Give a layer its weight, through whatever reparametrises it.

    Args:
        layer: the layer, possibly with a parametrisation or the older hooks of weight or spectral norm.
        weight: the wanted weight.

    Returns:
        A remark for the record, empty in the plain case.

    Raises:
        ArgumentError: its parametrisation takes no value.
    """
    with torch.no_grad():
        if parametrize.is_parametrized(layer, "weight"):
            names = ", ".join(type(p).__name__.lstrip("_") for p in layer.parametrizations["weight"])  # type: ignore[index, union-attr]
            try:
                layer.weight = weight
            except (NotImplementedError, RuntimeError, ValueError) as error:
                raise ArgumentError(
                    f"the parametrization {names} of {type(layer).__name__} takes no value for its weight "
                    f"({error}): initialise before parametrizing, or give it a right_inverse."
                ) from error
            return _difference(layer, weight, names)
        if "weight_v" in layer._parameters and "weight_g" in layer._parameters:
            layer.weight_v.copy_(weight)  # type: ignore[operator, union-attr]
            dims = [d for d, s in enumerate(layer.weight_g.shape) if s == 1 and weight.ndim > 1]  # type: ignore[arg-type, union-attr]
            layer.weight_g.copy_(weight.norm(dim=dims, keepdim=True) if dims else weight.norm())  # type: ignore[operator, union-attr]
            layer.weight = weight.clone()
            return "through its weight norm"
        if "weight_orig" in layer._parameters:
            layer.weight_orig.copy_(weight)  # type: ignore[operator, union-attr]
            return "its spectral norm or pruning mask rescales it at each call"
        layer.weight.copy_(weight)  # type: ignore[operator, union-attr]
    return ""


def _difference(layer: nn.Module, weight: Tensor, names: str) -> str:
    now = layer.weight.detach()  # type: ignore[operator, union-attr]
    off = float((now - weight).norm() / weight.norm().clamp_min(torch.finfo(weight.dtype).tiny))
    return f"through {names}" + (f", which changes it by {off:.0%}" if off > 1e-3 else "")
