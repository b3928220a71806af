r"""Activation functions as mean-field theory sees them: Gaussian moments.

For pre-activations h ~ N(0, q), and a pair (u, v) with variances q_u, q_v and correlation c, the
theory needs only

    E φ(h),  E φ(h)²,  E φ'(h)²,  d/dq E φ(h)²,  E φ(u)φ(v),  E φ'(u)φ'(v).

Linear, (leaky) ReLU and erf have closed forms. For every other function the one-point moments are
quadratures and the two-point moments Mehler series, whose truncation error Parseval's identity
gives; where the series is too slow (large q, or kinks, with c near 1) a quadrature in the plane
takes over. What draws random numbers, or is too rough for quadrature, is sampled, with an error bar.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.core.errors import ArgumentError, UserCodeError
from bolza.meanfield.closed_forms import ClosedForm, ErfForm, RandomRectifierForm, RectifierForm
from bolza.meanfield.probing import autograd, scaled_expectation
from bolza.meanfield.sampled import SampledForm, differentiate
from bolza.ops.gaussian import hermite_coefficients, mehler_sum, pair_expectation

__all__ = ["Activation", "activation_names", "resolve_activation"]

Elementwise = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Activation:
    """An elementwise function with its derivative and its Gaussian moments.

    Args:
        name: what reports call it.
        phi: the function, for float64 tensors.
        derivative: its derivative; between kinks it is what autograd gives, and what a gradient meets.
        kinks: places where the function or its derivatives jump.
        closed: closed forms, where they are known, or the sampled moments of a noisy or rough function.
        width: scale on which the function varies between its kinks, for quadrature.
        noisy: whether it draws random numbers, independent between units and inputs, as dropout does.
        true_derivative: the derivative of ``phi``, where autograd gives another one (a surrogate).
        replicas: the same function sampled independently; their spread is the error of its moments.

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
    width: float = 1.0
    noisy: bool = False
    true_derivative: Elementwise | None = field(default=None, repr=False)
    replicas: tuple[Activation, ...] = field(default=(), repr=False)

    @property
    def scale_free(self) -> bool:
        """Whether φ(ah) = aφ(h) for a > 0: the identity, and ReLU with any slope below zero."""
        return isinstance(self.closed, (RectifierForm, RandomRectifierForm))

    @property
    def analytic(self) -> bool:
        """Whether φ is smooth, so that its Mehler series converges fast."""
        return not self.kinks and (self.closed is None or isinstance(self.closed, ErfForm))

    @cached_property
    def jumps(self) -> bool:
        """Whether φ itself jumps: inputs however close then separate, whatever the variances."""
        if isinstance(self.closed, SampledForm):
            return not self.noisy and not self.closed.smooth
        return self.closed is None and self._jumps(self.phi)

    def second_derivative(self, h: Tensor) -> Tensor:
        """φ''(h) by differentiating ``derivative``; defined away from the kinks."""
        return differentiate(self.derivative, h)

    def mean(self, q: Tensor) -> Tensor:
        """E φ(h), h ~ N(0, q); any shape."""
        q = _double(q)
        return self.closed.mean(q) if self.closed else self._expect(self.phi, q)

    def second(self, q: Tensor) -> Tensor:
        """E φ(h)², h ~ N(0, q); any shape."""
        q = _double(q)
        return self.closed.second(q) if self.closed else self._expect(lambda h: self.phi(h) ** 2, q)

    def slope(self, q: Tensor) -> Tensor:
        """E φ'(h)², h ~ N(0, q): the factor that the variance of a gradient gains."""
        q = _double(q)
        if self.closed:
            return self.closed.slope(q)
        return self._expect(lambda h: self.derivative(h) ** 2, self._off_kink(q))

    def second_rate(self, q: Tensor) -> Tensor:
        """d/dq E φ(h)² = E[h φ(h) φ'(h)]/q, which holds with kinks too (no second derivative)."""
        q = _double(q)
        if self.closed:
            return self.closed.second_rate(q)
        if self.jumps or self.true_derivative:  # a jump is missing in φ': differentiate the density
            q = q.clamp_min(1e-6)
            moment = self._expect(lambda h: (self.phi(h) * h) ** 2, q)
            return moment / (2 * q * q) - self.second(q) / (2 * q)

        def rate(q: Tensor) -> Tensor:
            return self._expect(lambda h: h * self.phi(h) * self.derivative(h), q) / q

        if float(self.phi(torch.zeros(1, dtype=torch.float64))) == 0:
            return rate(q.clamp_min(1e-28))
        near = 1e-6  # φ(0) ≠ 0 cancels less and less exactly as q falls: a line through two points takes over
        out = rate(q.clamp_min(near))
        if self.kinks or not bool((q < near).any()):
            return out
        first, second = rate(torch.tensor([near, 2 * near], dtype=torch.float64))
        return torch.where(q < near, first + (q / near - 1) * (second - first), out)

    def curvature(self, q: Tensor) -> Tensor:
        """E φ''(h)², h ~ N(0, q); infinite where the derivative jumps."""
        q = _double(q)
        if isinstance(self.closed, SampledForm):
            return self.closed.curvature(q) if self.closed.smooth else torch.full_like(q, torch.inf)
        if self._jumps(self.phi) or self._jumps(self.derivative):
            return torch.full_like(q, torch.inf)
        return self._expect(lambda h: self.second_derivative(h) ** 2, q)

    def cross(self, q_u: Tensor, q_v: Tensor, c: Tensor, tol: float = 1e-13) -> Tensor:
        """E φ(u)φ(v) for correlation c; arguments broadcast. ``tol`` is relative to √(E φ(u)² E φ(v)²)."""
        q_u, q_v, c = _double(q_u), _double(q_v), _double(c).clamp(-1, 1)
        if self.closed:
            return self.closed.cross(q_u, q_v, c)
        return self._two_point(self.phi, q_u, q_v, c, tol)

    def cross_slope(self, q_u: Tensor, q_v: Tensor, c: Tensor, tol: float = 1e-13) -> Tensor:
        """E φ'(u)φ'(v) for correlation c, with the φ' that a gradient meets; arguments broadcast."""
        q_u, q_v, c = _double(q_u), _double(q_v), _double(c).clamp(-1, 1)
        if self.closed:
            return self.closed.cross_slope(q_u, q_v, c)
        return self._two_point(self.derivative, self._off_kink(q_u), self._off_kink(q_v), c, tol)

    def correlation_slope(self, q: Tensor, c: Tensor) -> Tensor:
        """DE φ(u)φ(v)/d(qc) at equal variances q: E φ'φ', and with jumps what they add.

        A jump of height J at k contributes J φ'-terms and J² times the density of u = v = k, which is
        infinite at c = 1.
        """
        q, c = torch.broadcast_tensors(_double(q), _double(c).clamp(-1, 1))  # type: ignore[no-untyped-call]
        if isinstance(self.closed, SampledForm):
            return self.closed.correlation_slope(q, c)
        if self.true_derivative is None and not self.jumps:
            return self.cross_slope(q, q, c)
        slope = self.true_derivative or self.derivative
        smooth = self._two_point(slope, self._off_kink(q), self._off_kink(q), c, 1e-13)
        if not self.jumps:
            return smooth
        return torch.where((c < 1) & (q > 0), smooth + self._from_jumps(slope, q, c), torch.inf)

    def _from_jumps(self, slope: Elementwise, q: Tensor, c: Tensor) -> Tensor:
        at, tiny = torch.tensor(self.kinks, dtype=torch.float64), 1e-8
        height = self.phi(at + tiny) - self.phi(at - tiny)
        at, height = at[height.abs() > 1e-4], height[height.abs() > 1e-4]
        q, rest = q[..., None], ((1 - c) * (1 + c)).clamp_min(1e-30)[..., None]
        form = (at[:, None] ** 2 + at**2).flatten() - 2 * c[..., None] * (at[:, None] * at).flatten()
        pairs = torch.exp(-form / (2 * q * rest)) / (2 * math.pi * q * rest.sqrt())
        total = (pairs * (height[:, None] * height).flatten()).sum(-1)
        alone = height * torch.exp(-at * at / (2 * q)) / (2 * math.pi * q).sqrt()  # J times density of u = k
        q = q[..., 0] * (1 - c) * (1 + c)  # of v, when u is known
        for k, weight in zip(at, alone.unbind(-1), strict=True):
            total += 2 * weight * scaled_expectation(slope, q, self.kinks, self.width, c * k)
        return total

    def half_distance(self, q: Tensor, c: Tensor) -> Tensor:
        """E[(φ(u) - φ(v))²]/2 at equal variances: E φ² - E φφ, without cancellation as c → 1."""
        q, c = _double(q), _double(c)
        if isinstance(self.closed, SampledForm):
            return self.closed.half_distance(q, c)
        if self.closed:
            # E φ² - E φφ = q ∫_c^1 E φ'φ'(t) dt; the root singularity at t = 1 goes with t = 1-(1-c)s².
            x, w = _legendre_on_unit()
            t = 1 - (1 - c)[..., None] * x**2
            return q * (1 - c) * (self.closed.cross_slope(q[..., None], q[..., None], t) * 2 * x * w).sum(-1)
        unit, kinks = self.width, tuple(k / self.width for k in self.kinks)
        q = q / unit**2
        return pair_expectation(
            lambda u, v: (self.phi(unit * u) - self.phi(unit * v)) ** 2 / 2, q, q, c, kinks, kinks
        )

    def coefficients(self, q: Tensor, degree: int, f: Elementwise | None = None) -> Tensor:
        """Hermite coefficients of φ(√q z), or of another ``f`` with the same kinks, up to a degree."""
        f, w = f or self.phi, self.width
        kinks = tuple(k / w for k in self.kinks)
        return hermite_coefficients(lambda h: f(w * h), _double(q) / w**2, degree, kinks)

    def _expect(self, f: Elementwise, q: Tensor) -> Tensor:
        return scaled_expectation(f, q, self.kinks, self.width)

    def _two_point(self, f: Elementwise, q_u: Tensor, q_v: Tensor, c: Tensor, tol: float) -> Tensor:
        """E f(u)f(v): Mehler's series of growing degree, then quadrature for what is still not accurate."""
        shape = torch.broadcast_tensors(q_u, q_v, c)[0].shape  # type: ignore[no-untyped-call]
        power_u = self._expect(lambda h: f(h) ** 2, q_u)
        same = q_u is q_v or (q_u.numel() == q_v.numel() and bool((q_u.reshape(-1) == q_v.reshape(-1)).all()))
        power_v = power_u.reshape(q_v.shape) if same else self._expect(lambda h: f(h) ** 2, q_v)
        size = (power_u * power_v).sqrt().expand(shape)
        out = size.new_full(shape, torch.nan)
        alike = (q_u == q_v) & (c == 1)  # u = v
        out = torch.where(alike, power_u, out) if bool(alike.any()) else out
        todo = torch.isfinite(size + c) & ~alike
        for degree in (64, 512) if self.kinks else (48, 128, 384):
            if not bool(todo.any()):
                return out
            a = self.coefficients(q_u, degree, f)
            b = a.reshape(*q_v.shape, degree + 1) if same else self.coefficients(q_v, degree, f)
            left_u = (power_u - a.square().sum(-1)).clamp_min(0)
            left_v = (power_v - b.square().sum(-1)).clamp_min(0)
            missing = (left_u * left_v).sqrt() * c.abs() ** (degree + 1)
            good = todo & (missing <= tol * size).expand(shape)
            if bool(good.any()):
                out = torch.where(good, mehler_sum(a, b, c).expand(shape), out)
                todo = todo & ~good
        if not bool(todo.any()):
            return out
        w, kinks = self.width, tuple(k / self.width for k in self.kinks)
        u, v, cc = (t.expand(shape)[todo] for t in (q_u / w**2, q_v / w**2, c))
        out[todo] = pair_expectation(lambda x, y: f(w * x) * f(w * y), u, v, cc, kinks, kinks)
        return out

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
            module or class, or any elementwise function of a tensor. Kinks of an unknown function
            are found by bisection; one that draws random numbers, or is too rough for quadrature,
            becomes a `sampled_activation`. A module counts in the mode it is in (``RReLU`` in
            training is random); a name or a class counts in evaluation.

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
    from bolza.meanfield.callables import read_callable

    if isinstance(activation, Activation):
        return activation
    if isinstance(activation, str):
        return _by_name(activation)
    if isinstance(activation, type) and issubclass(activation, nn.Module):
        return _of_module(activation().eval())
    if isinstance(activation, nn.Module):
        return _of_module(activation)
    name = str(getattr(activation, "__name__", "")).lower()
    if activation in (torch.erf, torch.special.erf):
        return _erf()
    if name in FUNCTIONS and activation in (getattr(F, name, None), getattr(torch, name, None)):
        return _of_module(FUNCTIONS[name]().eval())
    if callable(activation):
        return read_callable(activation, getattr(activation, "__name__", type(activation).__name__))
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
    return _of_module(_NAMES[key]().eval())


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


def _random_rectifier(name: str, mean: float, square: float, noisy: bool) -> Activation:
    """Slopes below zero that differ: by unit, or drawn anew; ``phi`` and ``derivative`` take their mean."""
    plain = _rectifier(name, mean)
    form = RandomRectifierForm(mean, square, shared=not noisy)
    return Activation(name, plain.phi, plain.derivative, (0.0,), form, noisy=noisy)


def _of_module(module: nn.Module) -> Activation:
    kind = next((cls for cls in type(module).__mro__ if cls in ELEMENTWISE_MODULES), None)
    name = type(module).__name__.lower()
    if kind is nn.Identity:
        return _rectifier("linear", 1.0)
    if kind is nn.ReLU:
        return _rectifier("relu", 0.0)
    if kind is nn.LeakyReLU:
        return _rectifier(name, float(module.negative_slope))  # type: ignore[arg-type]
    if kind is nn.RReLU:
        low, high = float(module.lower), float(module.upper)  # type: ignore[arg-type]
        if module.training and high > low:
            square = (low * low + low * high + high * high) / 3
            return _random_rectifier(name, (low + high) / 2, square, noisy=True)
        return _rectifier(name, (low + high) / 2)
    if kind is nn.PReLU:
        slopes = module.weight.detach().double()  # type: ignore[operator, union-attr]
        if slopes.numel() > 1 and bool((slopes != slopes.reshape(-1)[0]).any()):
            return _random_rectifier(name, float(slopes.mean()), float(slopes.square().mean()), noisy=False)
        return _rectifier(name, float(slopes.mean()))
    frozen = copy.deepcopy(module).to("cpu").double().train(module.training)
    for part in frozen.modules():
        if hasattr(part, "inplace"):
            part.inplace = False  # type: ignore[assignment]
    if kind is None:
        from bolza.meanfield.callables import read_callable

        return read_callable(frozen, name)
    phi: Elementwise = frozen
    derivative = autograd(frozen)
    if kind is nn.Tanh:
        phi, derivative = torch.tanh, lambda h: 1 - torch.tanh(h) ** 2
    elif kind is nn.Sigmoid:
        phi, derivative = torch.sigmoid, lambda h: torch.sigmoid(h) * torch.sigmoid(-h)
    elif kind is nn.Softplus:  # without the jump of 2e-9 where torch turns linear
        beta = float(module.beta)  # type: ignore[arg-type]
        phi = lambda h: torch.logaddexp(beta * h, torch.zeros_like(h)) / beta  # noqa: E731
        derivative = lambda h: torch.sigmoid(beta * h)  # noqa: E731
    return Activation(name, phi, derivative, tuple(sorted(_KINKS[kind](module))))
