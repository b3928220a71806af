r"""Expectations over one Gaussian and over two correlated ones, right for every variance.

    E f(h),       h ~ N(0, q)
    E g(u, v),    (u, v) ~ N(0, [[q_u, c √(q_u q_v)], [·, q_v]])

Gauss–Hermite nodes spread like √q while an activation keeps its own width, so that rule fails once
q is large (error 59 % for ∫ sech⁴ at q = 100, 200 nodes). Here smooth functions are summed by the
trapezoid rule, whose error falls as exp(-2π d / spacing) with d the distance to the nearest complex
pole; the spacing is chosen from q. Functions with kinks are integrated piece by piece with
Gauss–Legendre nodes. Everything runs in float64 on the CPU, in chunks of bounded memory; results go
back to the device of the variances.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import ceil, log2, pi, sqrt
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = ["expectation", "hermite_coefficients", "mehler_sum", "pair_expectation"]

# Half width of the interval in standard deviations: the mass beyond it is 1e-18 (9) and, against
# the slower decay e^{-z²/4} left over by a Hermite function, 1e-16 (12).
_REACH = 9.0
_HERMITE_REACH = 12.0
# The trapezoid rule is exact to rounding once 2π/spacing exceeds the bandwidth of the integrand:
# 9 for the Gaussian, and 24 per unit of √q for a function with poles at distance π/2 (tanh).
_GAUSSIAN_BAND = 9.0
_FUNCTION_BAND = 24.0
# Up to √q = 1024 the whole interval is resolved on the scale 1. Beyond, a function is taken to vary on
# the scale 1 near the origin and its kinks only, and on the scale |h| further out.
_WIDE = 25
_GRADED = 16  # level (√q = 64) from which a rule in the plane takes that view, to stay affordable
_CHUNK = 1 << 18  # function values held at a time (2 MB)
_GAUSS_NODES = 20


def expectation(
    f: Callable[[Tensor], Tensor], q: Tensor, kinks: Sequence[float] = (), mean: Tensor | None = None
) -> Tensor:
    r"""Mean of ``f(h)`` over h ~ N(mean, q), for every element of ``q``.

    Args:
        f: elementwise function of a float64 tensor. Between kinks it must be smooth on the scale
            1 (poles no nearer to the real axis than about 1.5, no oscillation faster than tanh's).
        q: variances, any shape, not negative.
        kinks: places where ``f`` or its first derivatives jump.
        mean: of h, broadcast to the shape of ``q``; zero by default.

    Returns:
        Float64 tensor of the shape of ``q``; infinite or undefined variances give ``nan``.

    Example:
        >>> q = torch.tensor([1.0, 1e4], dtype=torch.float64)
        >>> exact = 2 / pi * torch.asin(2 * q / (1 + 2 * q))
        >>> bool((expectation(lambda h: torch.erf(h) ** 2, q) - exact).abs().max() < 1e-12)
        True
    """
    flat = q.detach().to("cpu", torch.float64).reshape(-1)
    out = torch.full_like(flat, torch.nan)
    root = flat.clamp_min(0).sqrt()
    centre = None if mean is None else mean.detach().to("cpu", torch.float64).expand(q.shape).reshape(-1)
    level = _levels(root)
    for lev in _groups(level):
        scale = _scale(lev)
        members = (level == lev).nonzero().squeeze(1)
        nodes = 4096 if lev == _WIDE else _line_size(scale, len(kinks))
        for part in _parts(members, _CHUNK // nodes):
            off = None if centre is None else centre[part, None]
            if lev == _WIDE:
                z, w = _composite(_wide_edges(root[part], kinks, _REACH, 9, off))
            else:
                z, w = _line_rule(root[part], scale, kinks, off)
            h = root[part, None] * z
            out[part] = (f(h if off is None else h + off) * w).sum(-1)
    return out.reshape(q.shape).to(q.device)


def _levels(root: Tensor) -> Tensor:
    """Half-octave of √q, counted from 1/4, that decides the number of nodes; -1 if √q is not finite."""
    finite = torch.isfinite(root)
    level = torch.ceil(2 * torch.log2(root.where(finite, torch.ones_like(root)).clamp_min(0.25))) + 4
    return torch.where(finite, level.clamp_max(_WIDE), torch.full_like(level, -1)).long()


def _groups(key: Tensor) -> list[int]:
    """The different keys, without -1."""
    return sorted(set(key.tolist()) - {-1})


def _parts(members: Tensor, size: int) -> list[Tensor]:
    """Consecutive parts of at most ``size`` (at least one) members."""
    size = max(1, size)
    return [members[at : at + size] for at in range(0, len(members), size)]


def _scale(level: int) -> float:
    """Largest √q of a level."""
    return float(2.0 ** (level / 2 - 2))


def _line_size(scale: float, kinks: int) -> int:
    if kinks:
        return (kinks + ceil(2 * _REACH * max(1.0, scale) / 2.25)) * _GAUSS_NODES
    return 2 * ceil(_REACH * (_GAUSSIAN_BAND + _FUNCTION_BAND * scale) / (2 * pi)) + 1


def _line_rule(
    root: Tensor, scale: float, kinks: Sequence[float], mean: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Nodes and weights for N(0, 1): shape (N,) without kinks, (len(root), N) with them."""
    if not kinks:
        return _trapezoid(_line_size(scale, 0) // 2, _REACH)
    panels = _line_size(scale, len(kinks)) // _GAUSS_NODES - len(kinks)
    places = torch.tensor(kinks, dtype=torch.float64)
    at = (places if mean is None else places - mean) / root.clamp_min(1e-150)[:, None]
    even = torch.linspace(-_REACH, _REACH, panels + 1, dtype=torch.float64).expand(len(root), -1)
    return _composite(torch.cat([even, at.clamp(-_REACH, _REACH)], -1).sort(dim=-1).values)


def _wide_edges(
    root: Tensor, kinks: Sequence[float], reach: float, panels: int, mean: Tensor | None = None
) -> Tensor:
    """Edges in z for √q beyond 1024: width 2 in h near the origin, then widths that grow with |h|."""
    steps = ceil(log2(reach * float(root.max()) / 64) / log2(1.5)) + 1
    h = torch.cat([2.0 * torch.arange(1, 32), 64 * 1.5 ** torch.arange(steps)]).double()
    h = torch.cat([-h, torch.tensor([0.0, *kinks], dtype=torch.float64), h])
    h = h if mean is None else h - mean
    uniform = torch.linspace(-reach, reach, panels + 1, dtype=torch.float64).expand(len(root), -1)
    return torch.cat([(h / root[:, None]).clamp(-reach, reach), uniform], -1).sort(dim=-1).values


@lru_cache(maxsize=64)
def _trapezoid(half: int, reach: float) -> tuple[Tensor, Tensor]:
    z = torch.linspace(-reach, reach, 2 * half + 1, dtype=torch.float64)
    return z, torch.exp(-z * z / 2) * (reach / half / sqrt(2 * pi))


@lru_cache(maxsize=8)
def _legendre(n: int) -> tuple[Tensor, Tensor]:
    x, w = np.polynomial.legendre.leggauss(n)
    return torch.from_numpy((x + 1) / 2), torch.from_numpy(w / 2)


def _composite(edges: Tensor, n: int = _GAUSS_NODES) -> tuple[Tensor, Tensor]:
    """Gauss–Legendre on each panel between sorted ``edges`` (..., E), weighted by the normal density."""
    x, w = _legendre(n)
    width = edges.diff(dim=-1)[..., None]
    z = (edges[..., :-1, None] + width * x).flatten(-2)
    return z, (width * w).flatten(-2) * torch.exp(-z * z / 2) / sqrt(2 * pi)


def pair_expectation(
    g: Callable[[Tensor, Tensor], Tensor],
    q_u: Tensor,
    q_v: Tensor,
    c: Tensor,
    kinks_u: Sequence[float] = (),
    kinks_v: Sequence[float] = (),
) -> Tensor:
    r"""Mean of ``g(u, v)`` over a pair of Gaussians with variances q_u, q_v and correlation c.

    With u = √q_u z₁, v = √q_v (c z₁ + √(1-c²) z₂): a rule in z₁ times a rule in z₂. Exact to rounding
    for smooth ``g``; with kinks the panels are refined towards them on the scale √(1-c²).

    Args:
        g: elementwise function of two float64 tensors, smooth on the scale 1 between kinks.
        q_u: variances of u; broadcast with ``q_v`` and ``c``.
        q_v: variances of v.
        c: correlations in [-1, 1].
        kinks_u: values of u where ``g`` has a kink.
        kinks_v: values of v where ``g`` has a kink.

    Returns:
        Float64 tensor of the broadcast shape.

    Example:
        >>> one, c = torch.ones(()), torch.tensor(0.5)
        >>> mean = pair_expectation(lambda u, v: u.relu() * v.relu(), one, one, c, (0.0,), (0.0,))
        >>> round(float(mean), 8)   # (√(1-c²) + c (π - arccos c)) / 2π
        0.30449889
    """
    full = torch.broadcast_tensors(q_u.detach(), q_v.detach(), c.detach())  # type: ignore[no-untyped-call]
    shape = full[0].shape
    a, b, cc = (t.to("cpu", torch.float64).reshape(-1) for t in full)
    cc = cc.clamp(-1, 1)
    s = ((1 - cc) * (1 + cc)).sqrt()
    ru, rv = a.clamp_min(0).sqrt(), b.clamp_min(0).sqrt()
    out = torch.full_like(a, torch.nan)
    outer = _levels(torch.maximum(ru, cc.abs() * rv))
    inner = _levels(s * rv)
    graded = torch.full_like(outer, bool(kinks_u or kinks_v), dtype=torch.bool) | (outer > _GRADED)
    sharp = torch.ceil(
        -torch.log2(s.nan_to_num(1.0).clamp_min(1e-9)) / 2
    ).long()  # refinement goes with √(1-c²)
    key = (outer * 100 + inner) * 100 + torch.where(graded, sharp, torch.zeros_like(sharp))
    key = torch.where((outer < 0) | (inner < 0), torch.full_like(key, -1), key)
    for group in _groups(key):
        members = (key == group).nonzero().squeeze(1)
        first = int(members[0])
        if bool(graded[first]):
            # A smooth function far out of its own scale is refined towards the origin, like towards a kink.
            rule: _PairRule = _GradedRule(
                kinks_u or (0.0,), kinks_v or (0.0,), ru[members], rv[members], s[members]
            )
        else:
            rule = _TensorRule(_scale(int(outer[first])), _scale(int(inner[first])))
        for part in _parts(members, _CHUNK // rule.size):
            out[part] = _pair_part(g, rule, ru[part], rv[part], cc[part], s[part])
    return out.reshape(shape).to(q_u.device)


class _PairRule(Protocol):
    """Nodes and weights in z₁, and in z₂ for given z₁."""

    size: int
    columns: int

    def first(self, ru: Tensor, rv: Tensor, c: Tensor) -> tuple[Tensor, Tensor]: ...

    def second(self, z: Tensor, rv: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]: ...


class _TensorRule:
    """A trapezoid rule in each direction."""

    def __init__(self, outer: float, inner: float) -> None:
        self.outer = _trapezoid(_line_size(outer, 0) // 2, _REACH)
        self.inner = _trapezoid(_line_size(inner, 0) // 2, _REACH)
        self.columns = len(self.inner[0])
        self.size = len(self.outer[0]) * self.columns

    def first(self, ru: Tensor, rv: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return self.outer[0].expand(len(ru), -1), self.outer[1].expand(len(ru), -1)

    def second(self, z: Tensor, rv: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner


class _GradedRule:
    """Panels of ten Gauss–Legendre nodes that shrink towards the kinks of u and v.

    In z₁ down to √(1-c²) (the kinks of v, seen through the mean over z₂) and to the functions' own
    scale 1/√q; in z₂ the kinks of v are cut out exactly.
    """

    nodes, growth = 10, 3.0

    def __init__(
        self, kinks_u: Sequence[float], kinks_v: Sequence[float], ru: Tensor, rv: Tensor, s: Tensor
    ) -> None:
        self.kinks_u = torch.tensor(kinks_u, dtype=torch.float64)
        self.kinks_v = torch.tensor(kinks_v, dtype=torch.float64)
        self.fixed = torch.linspace(-_REACH, _REACH, 10, dtype=torch.float64)
        wide = max(1.0, float(torch.maximum(ru, rv).max()))
        self.outer = self._offsets(max(min(float(s.min()), 1 / wide), 1e-12))
        tall = float((s * rv).max())
        self.inner = self._offsets(1 / tall) if tall > 1 else torch.zeros(1, dtype=torch.float64)
        self.columns = (len(self.fixed) + len(self.kinks_v) * len(self.inner) - 1) * self.nodes
        rows = len(self.fixed) + (len(self.kinks_u) + len(self.kinks_v)) * len(self.outer) - 1
        self.size = rows * self.nodes * self.columns

    def _offsets(self, smallest: float) -> Tensor:
        count = max(1, ceil(log2(2 / smallest) / log2(self.growth)))
        steps = smallest * self.growth ** torch.arange(count, dtype=torch.float64)
        return torch.cat([-steps, steps.new_zeros(1), steps])

    def first(self, ru: Tensor, rv: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        cos = torch.where(c.abs() < 1e-12, torch.full_like(c, 1e-12), c)
        at_u = self.kinks_u / ru.clamp_min(1e-150)[:, None]
        at_v = self.kinks_v / (rv.clamp_min(1e-150) * cos)[:, None]
        return self._panels(torch.cat([at_u, at_v], -1), self.outer)

    def second(self, z: Tensor, rv: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        at = self.kinks_v / rv.clamp_min(1e-150)[:, None]
        at = (at[:, None, :] - (c[:, None] * z)[..., None]) / s.clamp_min(1e-150)[:, None, None]
        return self._panels(at, self.inner)

    def _panels(self, centres: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        cuts = (centres[..., None] + offsets).flatten(-2).clamp(-_REACH, _REACH)
        edges = torch.cat([self.fixed.expand(*cuts.shape[:-1], -1), cuts], -1).sort(dim=-1).values
        return _composite(edges, self.nodes)


def _pair_part(
    g: Callable[[Tensor, Tensor], Tensor], rule: _PairRule, ru: Tensor, rv: Tensor, c: Tensor, s: Tensor
) -> Tensor:
    """Sums for one chunk of pairs; loops over slices of z₁ where a single pair is large."""
    z1, w1 = rule.first(ru, rv, c)
    total = torch.zeros_like(ru)
    step = max(1, 2 * _CHUNK // (rule.columns * len(ru)))
    for at in range(0, z1.shape[-1], step):
        z, w = z1[:, at : at + step], w1[:, at : at + step]
        z2, w2 = rule.second(z, rv, c, s)
        u = (ru[:, None] * z)[..., None]
        v = rv[:, None, None] * ((c[:, None] * z)[..., None] + s[:, None, None] * z2)
        total += ((g(u, v) * w2).sum(-1) * w).sum(-1)
    return total


def hermite_coefficients(
    f: Callable[[Tensor], Tensor], q: Tensor, degree: int, kinks: Sequence[float] = ()
) -> Tensor:
    r"""Coefficients of ``f(√q z)`` in the normalised Hermite polynomials He_k/√k!.

        a_k(q) = E[f(√q z) He_k(z)] / √k!,     E f(u) g(v) = Σ_k a_k(q_u) b_k(q_v) c^k   (Mehler)

    All correlations of one layer then cost one polynomial. By Parseval Σ a_k² = E f², so what a
    truncation leaves out is known.

    Args:
        f: elementwise function, as in `expectation`.
        q: finite variances, any shape.
        degree: highest k.
        kinks: places where ``f`` or its first derivatives jump.

    Returns:
        Float64 tensor ``(*q.shape, degree + 1)``.

    Example:
        >>> a = hermite_coefficients(torch.tanh, torch.tensor(1.0), 128)
        >>> bool((a.square().sum() - expectation(lambda h: h.tanh() ** 2, torch.tensor(1.0))).abs() < 1e-12)
        True
    """
    flat = q.detach().to("cpu", torch.float64).reshape(-1)
    root = flat.clamp_min(0).sqrt()
    out = flat.new_empty(len(flat), degree + 1)
    level = _levels(root)
    for lev in _groups(level):
        scale = _scale(lev)
        members = (level == lev).nonzero().squeeze(1)
        wide = lev == _WIDE
        if kinks or wide:
            panels = ceil(2 * _HERMITE_REACH * max(1.0, 0 if wide else scale, sqrt(degree) / 8) / 2.25)
            size = (panels + len(kinks)) * _GAUSS_NODES
        else:
            band = _GAUSSIAN_BAND + sqrt(degree) + _FUNCTION_BAND * scale
            half = ceil(_HERMITE_REACH * band / (2 * pi))
            size = 2 * half + 1
        for part in _parts(members, _CHUNK // size):
            r = root[part]
            if wide:
                z, w = _composite(_wide_edges(r, kinks, _HERMITE_REACH, panels))
                out[part] = _project(f(r[:, None] * z) * w, z, degree)
            elif kinks:
                edges = torch.linspace(-_HERMITE_REACH, _HERMITE_REACH, panels + 1, dtype=torch.float64)
                cut = torch.tensor(kinks, dtype=torch.float64) / r.clamp_min(1e-150)[:, None]
                cut = cut.clamp(-_HERMITE_REACH, _HERMITE_REACH)
                z, w = _composite(torch.cat([edges.expand(len(r), -1), cut], -1).sort(dim=-1).values)
                out[part] = _project(f(r[:, None] * z) * w, z, degree)
            else:
                z, table = _hermite_table(half, degree)
                out[part] = f(r[:, None] * z) @ table
    return out.reshape(*q.shape, degree + 1).to(q.device)


@lru_cache(maxsize=32)
def _hermite_table(half: int, degree: int) -> tuple[Tensor, Tensor]:
    """Trapezoid nodes (N,), and weights times normalised Hermite polynomials (N, degree + 1)."""
    z, w = _trapezoid(half, _HERMITE_REACH)
    columns = [w, w * z]
    for k in range(2, degree + 1):
        columns.append((z * columns[-1] - sqrt(k - 1) * columns[-2]) / sqrt(k))
    return z, torch.stack(columns[: degree + 1], -1)


def _project(values: Tensor, z: Tensor, degree: int) -> Tensor:
    """Sums of ``values`` (Q, N) against normalised Hermite polynomials at ``z``: (Q, degree + 1)."""
    before, now = values, values * z
    sums = [before.sum(-1), now.sum(-1)]
    for k in range(2, degree + 1):
        before, now = now, (z * now - sqrt(k - 1) * before) / sqrt(k)
        sums.append(now.sum(-1))
    return torch.stack(sums[: degree + 1], -1)


def mehler_sum(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    r"""Σ_k a_k b_k c^k, by Horner's rule (or all powers at once where that is small).

    Args:
        a: coefficients ``(..., K)`` of the first function.
        b: coefficients ``(..., K)`` of the second one.
        c: correlations, broadcast with the leading shape.

    Returns:
        Tensor of the broadcast leading shape.

    Example:
        >>> float(mehler_sum(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]), torch.tensor(0.5)))
        4.0
    """
    total = torch.zeros_like(a[..., 0] * b[..., 0] * c)
    if total.numel() * a.shape[-1] <= _CHUNK:
        return (a * b * c[..., None] ** torch.arange(a.shape[-1], device=c.device)).sum(-1)
    for k in range(a.shape[-1] - 1, -1, -1):
        total = total * c + a[..., k] * b[..., k]
    return total
