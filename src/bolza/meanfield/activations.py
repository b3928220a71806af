r"""Activation functions as mean-field theory sees them: Gaussian moments.

For pre-activations h ~ N(0, q), and a pair (u, v) with variances q_u, q_v and correlation c, the
theory needs only

    E φ(h),  E φ(h)²,  E φ'(h)²,  d/dq E φ(h)²,  E φ(u)φ(v),  E φ'(u)φ'(v).

Linear, (leaky) ReLU and erf have closed forms. For everything else the one-point moments are
quadratures and the two-point moments Mehler series, whose truncation error Parseval's identity
gives; where the series is too slow (large q, or kinks, with c near 1) a quadrature in the plane
takes over.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.core.errors import ArgumentError, UserCodeError
from bolza.meanfield.closed_forms import ClosedForm, ErfForm, RectifierForm
from bolza.ops.gaussian import expectation, hermite_coefficients, mehler_sum, pair_expectation

__all__ = ["Activation", "activation_names", "resolve_activation"]

Elementwise = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Activation:
    """An elementwise function with its derivative and its Gaussian moments.

    Args:
        name: what reports call it.
        phi: the function, for float64 tensors.
        derivative: its derivative; between kinks it is what autograd gives.
        kinks: places where the function or its derivatives jump.
        closed: closed forms, where they are known.

    Example:
        >>> act = resolve_activation("erf")
        >>> q = torch.tensor(0.5, dtype=torch.float64)
        >>> round(float(act.second(q)), 12)   # 2/π arcsin(1/2) = 1/3
        0.333333333333
    """

    name: str
    phi: Elementwise
    derivative: Elementwise
    kinks: tuple[float, ...] = ()
    closed: ClosedForm | None = field(default=None, repr=False)

    def second_derivative(self, h: Tensor) -> Tensor:
        """φ''(h) by differentiating ``derivative``; defined away from the kinks."""
        return _differentiate(self.derivative, h)

    def mean(self, q: Tensor) -> Tensor:
        """E φ(h), h ~ N(0, q); any shape."""
        q = _double(q)
        return self.closed.mean(q) if self.closed else expectation(self.phi, q, self.kinks)

    def second(self, q: Tensor) -> Tensor:
        """E φ(h)², h ~ N(0, q); any shape."""
        q = _double(q)
        return (
            self.closed.second(q) if self.closed else expectation(lambda h: self.phi(h) ** 2, q, self.kinks)
        )

    def slope(self, q: Tensor) -> Tensor:
        """E φ'(h)², h ~ N(0, q): the factor that the variance of a gradient gains."""
        q = _double(q)
        if self.closed:
            return self.closed.slope(q)
        return expectation(lambda h: self.derivative(h) ** 2, self._off_kink(q), self.kinks)

    def second_rate(self, q: Tensor) -> Tensor:
        """d/dq E φ(h)² = E[h φ(h) φ'(h)]/q, which holds with kinks too (no second derivative)."""
        q = _double(q)
        if self.closed:
            return self.closed.second_rate(q)
        q = q.clamp_min(1e-10)  # the limit, to 1e-10
        if self._jumps(self.phi):  # the derivative of a jump would be missing: differentiate the density
            return expectation(lambda h: (self.phi(h) * h) ** 2, q, self.kinks) / (2 * q * q) - self.second(
                q
            ) / (2 * q)
        return expectation(lambda h: h * self.phi(h) * self.derivative(h), q, self.kinks) / q

    def curvature(self, q: Tensor) -> Tensor:
        """E φ''(h)², h ~ N(0, q); infinite where the derivative jumps."""
        q = _double(q)
        if self._jumps(self.phi) or self._jumps(self.derivative):
            return torch.full_like(q, torch.inf)
        return expectation(lambda h: self.second_derivative(h) ** 2, q, self.kinks)

    def cross(self, q_u: Tensor, q_v: Tensor, c: Tensor, tol: float = 1e-13) -> Tensor:
        """E φ(u)φ(v) for correlation c; arguments broadcast. ``tol`` is relative to √(E φ(u)² E φ(v)²)."""
        q_u, q_v, c = _double(q_u), _double(q_v), _double(c).clamp(-1, 1)
        if self.closed:
            return self.closed.cross(q_u, q_v, c)
        return _two_point(self.phi, self.kinks, q_u, q_v, c, tol)

    def cross_slope(self, q_u: Tensor, q_v: Tensor, c: Tensor, tol: float = 1e-13) -> Tensor:
        """E φ'(u)φ'(v) for correlation c; arguments broadcast."""
        q_u, q_v, c = _double(q_u), _double(q_v), _double(c).clamp(-1, 1)
        if self.closed:
            return self.closed.cross_slope(q_u, q_v, c)
        return _two_point(self.derivative, self.kinks, self._off_kink(q_u), self._off_kink(q_v), c, tol)

    def half_distance(self, q: Tensor, c: Tensor) -> Tensor:
        """E[(φ(u) - φ(v))²]/2 at equal variances: E φ² - E φφ, without cancellation as c → 1."""
        q, c = _double(q), _double(c)
        if self.closed:
            # E φ² - E φφ = q ∫_c^1 E φ'φ'(t) dt; the root singularity at t = 1 goes with t = 1-(1-c)s².
            x, w = _legendre_on_unit()
            t = 1 - (1 - c)[..., None] * x**2
            return q * (1 - c) * (self.closed.cross_slope(q[..., None], q[..., None], t) * 2 * x * w).sum(-1)
        return pair_expectation(
            lambda u, v: (self.phi(u) - self.phi(v)) ** 2 / 2, q, q, c, self.kinks, self.kinks
        )

    def _off_kink(self, q: Tensor) -> Tensor:
        """With a kink at 0, q = 0 is a limit: both sides count, not the derivative that autograd gives there."""
        return q.clamp_min(1e-28) if 0.0 in self.kinks else q

    def _jumps(self, f: Elementwise) -> bool:
        at = torch.tensor(self.kinks, dtype=torch.float64)
        return bool(((f(at + 1e-7) - f(at - 1e-7)).abs() > 1e-4).any())


@lru_cache(maxsize=1)
def _legendre_on_unit() -> tuple[Tensor, Tensor]:
    x, w = np.polynomial.legendre.leggauss(40)
    return torch.from_numpy((x + 1) / 2), torch.from_numpy(w / 2)


def _double(q: Tensor | float) -> Tensor:
    return torch.as_tensor(q, dtype=torch.float64).detach()


def _two_point(
    f: Elementwise, kinks: tuple[float, ...], q_u: Tensor, q_v: Tensor, c: Tensor, tol: float
) -> Tensor:
    """E f(u)f(v): Mehler's series of growing degree, then quadrature for what is still not accurate."""
    shape = torch.broadcast_tensors(q_u, q_v, c)[0].shape
    power_u = expectation(lambda h: f(h) ** 2, q_u, kinks)
    same = q_u is q_v or (q_u.numel() == q_v.numel() and bool((q_u.reshape(-1) == q_v.reshape(-1)).all()))
    power_v = power_u.reshape(q_v.shape) if same else expectation(lambda h: f(h) ** 2, q_v, kinks)
    size = (power_u * power_v).sqrt().expand(shape)
    out = size.new_full(shape, torch.nan)
    todo = torch.isfinite(size + c)
    for degree in (64, 512) if kinks else (48, 128, 384):
        if not bool(todo.any()):
            return out
        a = hermite_coefficients(f, q_u, degree, kinks)
        b = a.reshape(*q_v.shape, degree + 1) if same else hermite_coefficients(f, q_v, degree, kinks)
        left_u = (power_u - a.square().sum(-1)).clamp_min(0)
        left_v = (power_v - b.square().sum(-1)).clamp_min(0)
        missing = (left_u * left_v).sqrt() * c.abs() ** (degree + 1)
        good = todo & (missing <= tol * size).expand(shape)
        if bool(good.any()):
            out = torch.where(good, mehler_sum(a, b, c).expand(shape), out)
            todo = todo & ~good
    if not bool(todo.any()):
        return out
    u, v, cc = (t.expand(shape)[todo] for t in (q_u, q_v, c))
    out[todo] = pair_expectation(lambda x, y: f(x) * f(y), u, v, cc, kinks, kinks)
    return out


def _differentiate(f: Elementwise, h: Tensor) -> Tensor:
    """df/dh elementwise, by reverse-mode differentiation."""
    with torch.enable_grad():
        x = h.detach().clone().requires_grad_(True)
        y = f(x)
        if not y.requires_grad:
            return torch.zeros_like(h)
        (slope,) = torch.autograd.grad(y.sum(), x, allow_unused=True)
    return torch.zeros_like(h) if slope is None else slope.detach()


def _autograd(f: Elementwise) -> Elementwise:
    return lambda h: _differentiate(f, h)


def _no_kinks(_: Any) -> tuple[float, ...]:
    return ()


# Kinks of the modules that have some; every other elementwise module of torch.nn is smooth.
_KINKS: dict[type[nn.Module], Callable[[Any], tuple[float, ...]]] = {
    nn.ELU: lambda m: (0.0,),
    nn.CELU: lambda m: (0.0,),
    nn.SELU: lambda m: (0.0,),
    nn.Softsign: lambda m: (0.0,),
    nn.ReLU6: lambda m: (0.0, 6.0),
    nn.Hardtanh: lambda m: (float(m.min_val), float(m.max_val)),
    nn.Hardsigmoid: lambda m: (-3.0, 3.0),
    nn.Hardswish: lambda m: (-3.0, 3.0),
    nn.Hardshrink: lambda m: (-float(m.lambd), float(m.lambd)),
    nn.Softshrink: lambda m: (-float(m.lambd), float(m.lambd)),
    nn.Threshold: lambda m: (float(m.threshold),),
    nn.GELU: _no_kinks,
    nn.LogSigmoid: _no_kinks,
    nn.Mish: _no_kinks,
    nn.SiLU: _no_kinks,
    nn.Sigmoid: _no_kinks,
    nn.Softplus: _no_kinks,
    nn.Tanh: _no_kinks,
    nn.Tanhshrink: _no_kinks,
}
_CLOSED = (nn.Identity, nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU)
ELEMENTWISE_MODULES: tuple[type[nn.Module], ...] = (*_KINKS, *_CLOSED)

_NAMES: dict[str, type[nn.Module]] = {
    **{cls.__name__.lower(): cls for cls in ELEMENTWISE_MODULES if cls is not nn.Threshold},
    "linear": nn.Identity, "swish": nn.SiLU, "hard_tanh": nn.Hardtanh, "leaky_relu": nn.LeakyReLU,
    "log_sigmoid": nn.LogSigmoid, "hard_sigmoid": nn.Hardsigmoid, "hard_swish": nn.Hardswish,
}  # fmt: skip
FUNCTIONS: dict[str, type[nn.Module]] = {
    name: cls for name, cls in _NAMES.items() if hasattr(F, name) or hasattr(torch, name)
}


def activation_names() -> list[str]:
    """Names that `resolve_activation` knows, in alphabetical order.

    Example:
        >>> {"tanh", "relu", "erf", "gelu"} <= set(activation_names())
        True
    """
    return sorted({*_NAMES, "erf"})


def resolve_activation(activation: Any) -> Activation:
    """Read an activation in any form a user may give it.

    Args:
        activation: a name (``"tanh"``), ``"pkg.module:callable"``, an elementwise ``torch.nn``
            module or class, or any elementwise function of a tensor that autograd can
            differentiate. Kinks of an unknown function are found by bisection on its derivative.

    Returns:
        The record the theory works with.

    Raises:
        ArgumentError: the name is unknown, or the thing is not elementwise.
        UserCodeError: importing ``pkg.module:callable``, or calling the function, raised.

    Example:
        >>> resolve_activation(nn.Hardtanh()).kinks
        (-1.0, 1.0)
        >>> resolve_activation(lambda h: h.clamp(-2, 2)).kinks
        (-2.0, 2.0)
    """
    if isinstance(activation, Activation):
        return activation
    if isinstance(activation, str):
        return _by_name(activation)
    if isinstance(activation, type) and issubclass(activation, nn.Module):
        return _of_module(activation())
    if isinstance(activation, nn.Module):
        return _of_module(activation)
    name = str(getattr(activation, "__name__", "")).lower()
    if activation in (torch.erf, torch.special.erf):
        return _erf()
    if name in FUNCTIONS and activation in (getattr(F, name, None), getattr(torch, name, None)):
        return _of_module(FUNCTIONS[name]())
    if callable(activation):
        return _of_callable(activation, getattr(activation, "__name__", type(activation).__name__))
    raise ArgumentError(
        f"activation is {activation!r}; give a name ({', '.join(activation_names())}), "
        "an elementwise module, or a function of a tensor."
    )


def _by_name(name: str) -> Activation:
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            found = import_module(module)
            for part in attribute.split("."):
                found = getattr(found, part)
        except Exception as error:
            raise UserCodeError(f"activation {name!r} cannot be imported: {error}.") from error
        return resolve_activation(found)
    key = name.strip().lower()
    if key == "erf":
        return _erf()
    if key not in _NAMES:
        raise ArgumentError(
            f"activation {name!r} is unknown; known are {', '.join(activation_names())}, "
            "or give 'pkg.module:callable'."
        )
    return _of_module(_NAMES[key]())


def _erf() -> Activation:
    return Activation("erf", torch.erf, lambda h: 2 / math.sqrt(math.pi) * torch.exp(-h * h), (), ErfForm())


def _rectifier(name: str, negative: float) -> Activation:
    if negative == 1:
        return Activation(name, lambda h: h.clone(), torch.ones_like, (), RectifierForm(1.0))
    return Activation(
        name,
        lambda h: torch.where(h > 0, h, negative * h),
        lambda h: torch.where(h > 0, 1.0, negative).to(h.dtype),
        (0.0,),
        RectifierForm(negative),
    )


def _of_module(module: nn.Module) -> Activation:
    kind = next((cls for cls in type(module).__mro__ if cls in ELEMENTWISE_MODULES), None)
    name = type(module).__name__.lower()
    if kind is nn.Identity:
        return _rectifier("linear", 1.0)
    if kind is nn.ReLU:
        return _rectifier("relu", 0.0)
    if kind is nn.LeakyReLU:
        return _rectifier(name, float(module.negative_slope))  # type: ignore[arg-type]
    if kind is nn.RReLU:  # in evaluation the slope is the mean one; in training its square matters
        return _rectifier(name, (float(module.lower) + float(module.upper)) / 2)  # type: ignore[arg-type]
    if kind is nn.PReLU:
        return _rectifier(name, float(module.weight.detach().double().mean()))  # type: ignore[operator, union-attr]
    frozen = copy.deepcopy(module).to("cpu").double().eval()
    for part in frozen.modules():
        if hasattr(part, "inplace"):
            part.inplace = False  # type: ignore[assignment]
    if kind is None:
        return _of_callable(frozen, name)
    phi: Elementwise = frozen
    derivative = _autograd(frozen)
    if kind is nn.Tanh:
        phi, derivative = torch.tanh, lambda h: 1 - torch.tanh(h) ** 2
    elif kind is nn.Sigmoid:
        phi, derivative = torch.sigmoid, lambda h: torch.sigmoid(h) * torch.sigmoid(-h)
    elif kind is nn.Softplus:  # without the jump of 2e-9 where torch turns linear
        beta = float(module.beta)  # type: ignore[arg-type]
        phi = lambda h: torch.logaddexp(beta * h, torch.zeros_like(h)) / beta  # noqa: E731
        derivative = lambda h: torch.sigmoid(beta * h)  # noqa: E731
    return Activation(name, phi, derivative, tuple(sorted(_KINKS[kind](module))))


def _of_callable(f: Elementwise, name: str) -> Activation:
    probe = torch.linspace(-3, 3, 7, dtype=torch.float64)
    try:
        whole, halves = f(probe.clone()), torch.cat([f(probe[:3].clone()), f(probe[3:].clone())])
        alike = torch.allclose(whole, halves, equal_nan=True)
    except Exception as error:
        raise UserCodeError(f"activation {name!r} raised on a tensor of 7 numbers: {error}.") from error
    if not isinstance(whole, Tensor) or whole.shape != probe.shape or not alike:
        raise ArgumentError(
            f"activation {name!r} is not elementwise: it must map a tensor to one of the same shape, "
            "each number by itself."
        )
    if not bool(torch.isfinite(whole).all()):
        raise ArgumentError(f"activation {name!r} is not finite on [-3, 3]: {whole.tolist()}.")

    def phi(h: Tensor) -> Tensor:
        with torch.no_grad():
            return f(h.clone()).double()

    derivative = _autograd(f)
    return Activation(name, phi, derivative, _find_kinks(phi, derivative))


def _find_kinks(phi: Elementwise, derivative: Elementwise, reach: float = 8.0) -> tuple[float, ...]:
    """Jumps of the function or of its derivative on [-reach, reach], located by bisection.

    A smooth function changes less and less as an interval shrinks; a jump stays.
    """
    found: list[float] = []
    for f in (phi, derivative):
        grid = torch.linspace(-reach, reach, 1602, dtype=torch.float64)  # 0 is not on the grid
        low, high = grid[:-1], grid[1:]
        step = (f(high) - f(low)).abs()
        keep = step.argsort(descending=True)[:32]
        low, high = low[keep], high[keep]
        for _ in range(45):
            middle = (low + high) / 2
            left = (f(middle) - f(low)).abs() >= (f(high) - f(middle)).abs()
            low, high = torch.where(left, low, middle), torch.where(left, middle, high)
        jump = (f(high) - f(low)).abs() > 1e-7
        found += ((low + high) / 2)[jump].tolist()
    merged: list[float] = []
    for kink in sorted(found):
        if not merged or kink - merged[-1] > 1e-6:
            merged.append(round(kink, 12) + 0.0)
    return tuple(merged)
