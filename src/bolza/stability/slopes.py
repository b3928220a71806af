r"""Slopes of activation functions: between which bounds they lie, everywhere or on an interval.

    a ≤ (φ(s) − φ(t)) / (s − t) ≤ b

A function is described by pieces on which its derivative is monotone; the slopes on an interval then follow from the
ends of the pieces that it meets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Slopes", "function_slopes", "layer_slopes"]

Derivative = Callable[[Tensor], Tensor]
_INF = math.inf
_ROUNDING = 1e-9  # smooth derivatives are widened by this much: float64 tails, linear branches of kernels


@dataclass(frozen=True)
class Slopes:
    """An elementwise function as certificates see it.

    Args:
        function: the function itself.
        pieces: ``(start, end, derivative)``; the derivative is a number, a tensor, or a function, monotone there.
        stationary: places of its interior extrema; empty for a monotone function.
        periodic: values stay within −1 and 1 and slopes are taken as global (sine and cosine).
    """

    function: Callable[[Tensor], Tensor]
    pieces: tuple[tuple[float, float, float | Tensor | Derivative], ...]
    stationary: tuple[float, ...] = ()
    periodic: bool = False

    def between(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Least and largest slope on ``[lower, upper]``, entry by entry; infinite ends give the global ones."""
        least, largest = torch.full_like(lower, _INF), torch.full_like(lower, -_INF)
        for start, end, derivative in self.pieces:
            meets = (upper > start) & (lower < end)
            for place in (lower.clamp(start, end), upper.clamp(start, end)):
                if callable(derivative):
                    value = derivative(place.clamp(-1e8, 1e8))
                    low = torch.where(value >= 0, (value - _ROUNDING).clamp_min(0), value - _ROUNDING)
                    high = value + _ROUNDING
                else:
                    low = high = torch.zeros_like(lower) + derivative
                least = torch.where(meets, torch.minimum(least, low), least)
                largest = torch.where(meets, torch.maximum(largest, high), largest)
        point = ~torch.isfinite(
            least
        )  # an interval of one point, at the border of two pieces: any slope will do
        return least.masked_fill(point, 0.0), largest.masked_fill(point, 0.0)

    def everywhere(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Least and largest slope on the whole line, in the shape of ``like``."""
        ends = torch.full_like(like, _INF)
        return self.between(-ends, ends)

    def values(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Least and largest value on ``[lower, upper]``, entry by entry."""
        if self.periodic:
            centre, radius = (lower + upper) / 2, (upper - lower) / 2
            middle = self.function(centre)
            return (middle - radius).clamp(-1, 1), (middle + radius).clamp(-1, 1)
        ends = self.function(lower), self.function(upper)
        least, largest = torch.minimum(*ends), torch.maximum(*ends)
        for place in self.stationary:
            value = self.function(torch.full_like(lower, place))
            inside = (lower < place) & (upper > place)
            least = torch.where(inside, torch.minimum(least, value), least)
            largest = torch.where(inside, torch.maximum(largest, value), largest)
        return least, largest


def _smooth(
    function: Callable[[Tensor], Tensor], *breaks: float, stationary: tuple[float, ...] = ()
) -> Slopes:
    """A smooth function whose derivative has its extrema at ``breaks``."""

    def derivative(x: Tensor) -> Tensor:
        with torch.enable_grad():
            place = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(function(place).sum(), place)
        return slope

    ends = (-_INF, *breaks, _INF)
    return Slopes(
        function, tuple((s, e, derivative) for s, e in zip(ends, ends[1:], strict=False)), stationary
    )


def _broken(
    function: Callable[[Tensor], Tensor],
    breaks: tuple[float, ...],
    slopes: tuple[Any, ...],
    *stationary: float,
) -> Slopes:
    """A piecewise linear function."""
    ends = (-_INF, *breaks, _INF)
    return Slopes(function, tuple(zip(ends, ends[1:], slopes, strict=False)), stationary)


def _leaky(slope: float) -> Slopes:
    turns = (0.0,) if slope < 0 else ()
    return _broken(lambda x: F.leaky_relu(x, slope), (0.0,), (slope, 1.0), *turns)


def _elu(alpha: float, scale: float = 1.0, width: float = 1.0) -> Slopes:
    def below(x: Tensor) -> Tensor:
        return scale * alpha / width * torch.exp(x / width)

    def function(x: Tensor) -> Tensor:
        return scale * torch.where(x > 0, x, alpha * torch.expm1(x.clamp(max=0) / width))

    return Slopes(function, ((-_INF, 0.0, below), (0.0, _INF, scale)), (0.0,) if alpha < 0 else ())


def _gelu(approximate: str) -> Slopes:
    if approximate == "tanh":
        place, least = 1.4185040087908283, -0.7524614220710162
    else:
        place, least = math.sqrt(2), -0.7517915246935645
    return _smooth(lambda x: F.gelu(x, approximate=approximate), -place, place, stationary=(least,))


def _clamp(low: float, high: float) -> Slopes:
    return _broken(lambda x: x.clamp(low, high), (low, high), (0.0, 1.0, 0.0))


def _one_sided(end: Any, *, lower: bool) -> Slopes | None:
    if not isinstance(end, int | float):
        return None
    return _clamp(float(end), _INF) if lower else _clamp(-_INF, float(end))


_SILU = 2.399357280515468


def _plain(name: str) -> Slopes | None:
    """Slopes of a function without parameters."""
    if name in ("tanh", "sigmoid", "softsign", "erf", "arctan", "atan"):
        return _smooth(getattr(torch, name, None) or getattr(F, name), 0.0)
    if name in ("sin", "cos"):
        return Slopes(getattr(torch, name), ((-_INF, _INF, -1.0), (-_INF, _INF, 1.0)), (), True)
    table: dict[str, Callable[[], Slopes]] = {
        "relu": lambda: _broken(F.relu, (0.0,), (0.0, 1.0)),
        "relu6": lambda: _clamp(0.0, 6.0),
        "silu": lambda: _smooth(F.silu, -_SILU, _SILU, stationary=(-1.278464542761074,)),
        "mish": lambda: _smooth(
            F.mish, -2.256376396360793, 1.4905711794854284, stationary=(-1.1924312145154952,)
        ),
        "logsigmoid": lambda: _smooth(F.logsigmoid),
        "tanhshrink": lambda: _smooth(F.tanhshrink, 0.0),
        "selu": lambda: _elu(1.6732632423543772, 1.0507009873554805),
        "hardsigmoid": lambda: _broken(F.hardsigmoid, (-3.0, 3.0), (0.0, 1 / 6, 0.0)),
        "abs": lambda: _broken(torch.abs, (0.0,), (-1.0, 1.0), 0.0),
        "hardswish": lambda: Slopes(
            F.hardswish, ((-_INF, -3.0, 0.0), (-3.0, 3.0, lambda x: x / 3 + 0.5), (3.0, _INF, 1.0)), (-1.5,)
        ),
    }
    return table[name]() if name in table else None


def _per_channel(weight: Tensor, like: Tensor) -> Slopes:
    """PReLU: one slope, or one for each channel of ``like``."""
    w = weight.detach().to(like)
    w = w.reshape(-1, *(1,) * (like.ndim - 2)) if w.numel() > 1 else w.reshape(())
    turns = (0.0,) if bool((w < 0).any()) else ()
    return _broken(lambda x: torch.where(x > 0, x, w * x), (0.0,), (w, 1.0), *turns)


def function_slopes(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Slopes | None:
    """Slopes of a function of ``torch``, its functional module or a tensor's methods; ``args`` follow the tensor.

    Returns:
        None for what is not known to be an activation.
    """
    name = {"absolute": "abs", "hardtanh_": "hardtanh", "clip": "clamp", "special_erf": "erf"}.get(name, name)
    plain = _plain(name)
    if plain is not None:
        return plain

    def value(position: int, key: str, default: Any) -> Any:
        return args[position] if len(args) > position else kwargs.get(key, default)

    match name:
        case "leaky_relu":
            return _leaky(float(value(0, "negative_slope", 0.01)))
        case "gelu":
            return _gelu(value(0, "approximate", "none"))
        case "elu":
            return _elu(float(value(0, "alpha", 1.0)))
        case "celu":
            alpha = float(value(0, "alpha", 1.0))
            return _elu(alpha, 1.0, alpha)
        case "softplus":
            beta, threshold = float(value(0, "beta", 1.0)), float(value(1, "threshold", 20.0))
            if threshold < 20 or beta <= 0:  # it jumps at the threshold, by log(1 + exp(−threshold))/β
                return None
            return _smooth(lambda x: F.softplus(x, beta, threshold))
        case "hardtanh":
            return _clamp(float(value(0, "min_val", -1.0)), float(value(1, "max_val", 1.0)))
        case "clamp":
            low, high = value(0, "min", None), value(1, "max", None)
            if not all(isinstance(end, int | float | None) for end in (low, high)):
                return None
            return _clamp(-_INF if low is None else float(low), _INF if high is None else float(high))
        case "clamp_min":
            return _one_sided(value(0, "min", None), lower=True)
        case "clamp_max":
            return _one_sided(value(0, "max", None), lower=False)
    return None


_LAYERS: dict[type, tuple[str, tuple[str, ...]]] = {
    nn.ReLU: ("relu", ()),
    nn.ReLU6: ("relu6", ()),
    nn.LeakyReLU: ("leaky_relu", ("negative_slope",)),
    nn.Tanh: ("tanh", ()),
    nn.Sigmoid: ("sigmoid", ()),
    nn.GELU: ("gelu", ("approximate",)),
    nn.SiLU: ("silu", ()),
    nn.Mish: ("mish", ()),
    nn.Softplus: ("softplus", ("beta", "threshold")),
    nn.ELU: ("elu", ("alpha",)),
    nn.CELU: ("celu", ("alpha",)),
    nn.SELU: ("selu", ()),
    nn.Hardtanh: ("hardtanh", ("min_val", "max_val")),
    nn.Hardswish: ("hardswish", ()),
    nn.Hardsigmoid: ("hardsigmoid", ()),
    nn.Softsign: ("softsign", ()),
    nn.LogSigmoid: ("logsigmoid", ()),
    nn.Tanhshrink: ("tanhshrink", ()),
}


def layer_slopes(layer: nn.Module, like: Tensor) -> Slopes | None:
    """Slopes of an activation layer of ``torch.nn``; None for other layers.

    Args:
        layer: the layer.
        like: an input of it, for slopes that differ between channels.
    """
    if isinstance(layer, nn.PReLU):
        return _per_channel(layer.weight, like)
    if type(layer) not in _LAYERS:
        return None
    name, attributes = _LAYERS[type(layer)]
    return function_slopes(name, tuple(getattr(layer, attribute) for attribute in attributes), {})
