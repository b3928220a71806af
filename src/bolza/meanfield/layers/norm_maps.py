r"""Moment maps of normalisation and of pooling.

Layer, group and RMS norm divide by a standard deviation that is the same for all wide networks. Batch norm
divides each unit by its own spread over the batch: its kernels are one-dimensional integrals, exact for
every batch size, and make the gradients of different samples depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bolza.meanfield.layers.moment_maps import Call, Missing, Step, moment_map
from bolza.meanfield.layers.moments import MAX_FULL_ITEMS, Moments

__all__ = ["BatchStatistics", "averaged", "pool_step", "unit_norm_step"]

_MANY = 64  # independent numbers from which a standard deviation counts as that of infinitely many
_FEW = 8  # units of a group below which the positions alone cannot make up for them

# ------------------------------------------------------------------------------ normalisation


def _affine(layer: Any) -> tuple[float, float]:
    """Mean squares of the scale and the shift."""
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    g2 = 1.0 if weight is None else float(weight.detach().double().square().mean())
    b2 = 0.0 if bias is None else float(bias.detach().double().square().mean())
    return g2, b2


def unit_norm_step(call: Call, g2: float, b2: float, eps: float, centre: bool) -> Step | Missing:
    r"""Layer norm (centred) and RMS norm over the units: K'_ab = γ² K_ab/√(K_aa K_bb) + β².

    A gradient loses the directions of the constants and of the value itself: of n units,
    tr(P_a P_b)/n = 1 - (3 - c_ab²)/n remain (without centring 1 - (2 - c_ab²)/n).
    """
    m = call.inputs[0]
    kernel = m.kernel - m.mean[..., :, None] * m.mean[..., None, :] if centre else m.kernel
    var = kernel.diagonal(dim1=-2, dim2=-1) + eps
    scale = (var[..., :, None] * var[..., None, :]).sqrt()
    out = m.with_(
        kernel=g2 * kernel / scale + b2, mean=torch.zeros_like(m.mean) if centre else m.mean / var.sqrt()
    )
    kept = (1 - ((3 if centre else 2) - (kernel / scale).square()) / m.units).clamp_min(0)
    return Step(out, lambda g: [g * (g2 * kept) / scale])


@moment_map.register
def _(layer: nn.LayerNorm, call: Call) -> Step | Missing:
    m = call.inputs[0]
    if len(layer.normalized_shape) != 1 or m.unit_dim != len(m.lead):
        return _group_norm(layer, call, layer.eps)
    return unit_norm_step(call, *_affine(layer), layer.eps, True)


@moment_map.register
def _(layer: nn.RMSNorm, call: Call) -> Step | Missing:
    m = call.inputs[0]
    if len(layer.normalized_shape) != 1 or m.unit_dim != len(m.lead):
        return Missing("an RMS norm over positions")
    eps = layer.eps if layer.eps is not None else torch.finfo(call.output.dtype).eps
    return unit_norm_step(call, *_affine(layer), eps, False)


@moment_map.register
def _(layer: nn.GroupNorm, call: Call) -> Step | Missing:
    return _group_norm(layer, call, layer.eps)


def _group_norm(layer: Any, call: Call, eps: float) -> Step | Missing:
    """Normalisation of each sample over units and positions together."""
    m = call.inputs[0]
    if m.unit_dim != 1:
        return Missing("a group norm along other dimensions")
    g2, b2 = _affine(layer)
    if (
        m.units // getattr(layer, "num_groups", 1) * m.positions < _MANY
        or m.units // getattr(layer, "num_groups", 1) < 8
    ):
        return Missing("a norm over few units")

    def per_sample(t: Tensor) -> Tensor:
        """Mean over positions, spread over the items again."""
        if m.full:
            each = t.reshape(m.samples, -1).mean(-1, keepdim=True)
            return each.expand(-1, m.positions).reshape(1, -1)
        return t.mean(0, keepdim=True).expand_as(t)

    centre = per_sample(m.mean)
    kernel = (
        m.kernel - centre[..., :, None] * m.mean[..., None, :] - m.mean[..., :, None] * centre[..., None, :]
    )
    kernel = kernel + centre[..., :, None] * centre[..., None, :]
    var = per_sample(kernel.diagonal(dim1=-2, dim2=-1)) + eps
    scale = (var[..., :, None] * var[..., None, :]).sqrt()
    out = m.with_(kernel=g2 * kernel / scale + b2, mean=(m.mean - centre) / var.sqrt())
    return Step(out, lambda g: [g * g2 / scale])


@moment_map.register(nn.BatchNorm1d)
@moment_map.register(nn.BatchNorm2d)
@moment_map.register(nn.BatchNorm3d)
def _(layer: Any, call: Call) -> Step | Missing:
    batch = layer.training or layer.running_var is None
    return batch_norm_step(
        call, layer.weight, layer.bias, layer.running_mean, layer.running_var, batch, layer.eps
    )


def batch_norm_step(
    call: Call,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batch: bool,
    eps: float,
) -> Step | Missing:
    """Batch norm, with the statistics of the batch or with running ones."""
    m = call.inputs[0]
    if m.unit_dim != 1:
        return Missing("a batch norm along other dimensions")
    one = torch.ones(m.units, dtype=torch.float64)
    scale = one if weight is None else weight.detach().to("cpu", torch.float64)
    shift = 0 * one if bias is None else bias.detach().to("cpu", torch.float64)
    if not batch:
        assert running_mean is not None and running_var is not None
        centre, var = (t.detach().to("cpu", torch.float64) for t in (running_mean, running_var))
        if _gathered(call.args[0], centre, var):
            return Missing(
                "its running statistics come from these very weights and depend on them", final=True
            )
        return _affine_units(m, scale / (var + eps).sqrt(), shift - scale * centre / (var + eps).sqrt())
    g2, b2 = float(scale.square().mean()), float(shift.square().mean())
    if not m.full:
        return _large_batch(call, g2, b2, eps)
    if not m.gaussian:
        return Missing("a batch norm whose input is not Gaussian")
    norm = BatchStatistics(m.kernel[0], eps)
    items = m.kernel.shape[-1]
    out = m.with_(
        kernel=g2 * norm.forward()[None] + b2,
        mean=torch.full_like(m.mean, float(shift.mean())),
        gaussian=norm.freedom >= _MANY and b2 == 0 and bool((scale == scale[0]).all()),
    )
    return Step(out, lambda g: [g2 * norm.backward(g[0])[None]], note=f"statistics of {items} items")


def _gathered(x: Tensor, mean: Tensor, var: Tensor) -> bool:
    """Whether running statistics go with those of the values here, unit by unit: then they stem from data."""
    values = x.detach().to("cpu", torch.float64).transpose(0, 1).flatten(1)
    own = values.mean(1), values.var(1, unbiased=False)
    pairs = (own[0], mean), (own[1] - own[1].mean(), var - var.mean())
    limit = 4 / math.sqrt(len(mean))
    return any(float(a @ b) > limit * float(a.norm() * b.norm()) > 0 for a, b in pairs)


def _affine_units(m: Moments, factor: Tensor, offset: Tensor) -> Step:
    """Each unit times its factor plus its offset."""
    square, drift, mixed = (
        float(factor.square().mean()),
        float(offset.mean()),
        float((factor * offset).mean()),
    )
    cross = mixed * (m.mean[..., :, None] + m.mean[..., None, :])
    kernel = square * m.kernel + cross + float(offset.square().mean())
    even = bool((factor == factor[0]).all()) and not bool(offset.any())
    out = m.with_(kernel=kernel, mean=float(factor.mean()) * m.mean + drift, gaussian=m.gaussian and even)
    return Step(out, lambda g: [g * square])


def _large_batch(call: Call, g2: float, b2: float, eps: float) -> Step | Missing:
    """Over very many items, of which only pairs at the same position are known, the statistics are measured.

    They are ratios of the real values: cov(h, h̄)/E h² of each item, and how E[1/σ²] exceeds 1/E[σ²].
    """
    m, x = call.inputs[0], call.args[0].detach().to("cpu", torch.float64)
    values = x.movedim(1, -1).reshape(m.samples, -1, m.units).transpose(0, 1)  # (positions, samples, units)
    centre = values.mean((0, 1))
    var = values.var((0, 1), unbiased=False)
    total = float(values.square().mean())
    if total == 0:
        return Missing("a batch norm of nothing but zeros")
    power = float(m.variances.mean())
    # The share goes with what two samples have in common, if they have, else with the variance.
    common = float(values.sum(1).square().mean() - values.square().sum(1).mean())
    theory = float(m.kernel.sum((1, 2)).mean() - m.variances.sum(1).mean())
    pairs = m.samples * (m.samples - 1)
    alike = common > 0.1 * pairs * total and theory > 0.1 * pairs * power
    shared = (values * centre).mean(-1) * (theory / common if alike else power / total)
    kernel = m.kernel - shared[..., :, None] - shared[..., None, :] + shared.mean()
    spread = power - float(shared.mean())
    uneven = float((1 / (var + eps)).mean()) * (float(var.mean()) + eps)
    scale = g2 / (spread + eps)
    out = m.with_(
        kernel=scale * kernel + b2,
        mean=torch.zeros_like(m.mean),
        gaussian=True,
        sources=frozenset({call.name}),
    )
    if m.samples * m.positions <= MAX_FULL_ITEMS:  # what batch statistics take from a gradient then counts
        return Step(
            out, lambda g: [None], note="share of the batch mean, and the gradient before it, measured"
        )
    return Step(out, lambda g: [g * scale * uneven], note="share of the batch mean measured")


class BatchStatistics:
    r"""Batch norm of a Gaussian: y = Ph/√(σ² + ε), h ~ N(0, K), σ² = |Ph|²/N, P the projection off the mean.

    The gradient is (P - yyᵀ/N) g/√(σ² + ε). In the eigenbasis of PKP, where Ph has independent entries w_i of
    variances λ_i, everything needed is a moment of the form E[Π w² / (|w|² + Nε)^k], an integral over
    e^{-s(|w|² + Nε)} with Π_j (1 + 2λ_j s)^{-1/2} for the Gaussian: exact for every batch size.

    Args:
        kernel: ``(N, N)``.
        eps: added to the variance.

    ``freedom`` is the number of independent items that the variance is taken over: y is a Gaussian only if
    it is large, and for few it lies on a sphere.
    """

    def __init__(self, kernel: Tensor, eps: float) -> None:
        n = len(kernel)
        centre = torch.eye(n, dtype=torch.float64) - 1 / n
        values, self.vectors = torch.linalg.eigh(centre @ kernel @ centre)
        self.values = values.clamp_min(0)
        self.eps, self.n, total = eps, n, float(self.values.sum())
        self.empty = total == 0
        self.freedom = 0.0 if self.empty else total**2 / float(self.values.square().sum())
        if self.empty:
            return
        x = torch.linspace(math.log(1e-9), math.log(1e12), 600, dtype=torch.float64)
        self.s = torch.exp(x) / total
        log_weight = x - math.log(total) - n * eps * self.s
        log_weight = log_weight - 0.5 * torch.log1p(2 * self.values * self.s[:, None]).sum(-1)
        self.weight = torch.exp(log_weight) * (x[1] - x[0])
        self.r = self.values / (1 + 2 * self.values * self.s[:, None])  # (nodes, N)

    def forward(self) -> Tensor:
        """E[y yᵀ]."""
        if self.empty:
            return torch.zeros_like(self.vectors)
        shares = (self.weight[:, None] * self.r).sum(0) * self.n
        return torch.as_tensor((self.vectors * shares) @ self.vectors.T)

    def inverse(self) -> float:
        """E[1/(σ² + ε)]."""
        return 1 / self.eps if self.empty else float(self.weight.sum()) * self.n

    def backward(self, g: Tensor) -> Tensor:
        """E[(P - yyᵀ/N) G (P - yyᵀ/N)/(σ² + ε)]."""
        g = g - g.mean(0)
        g = g - g.mean(1, keepdim=True)
        if self.empty:
            return g / self.eps
        v, n, weight = self.vectors, self.n, self.weight
        g = v.T @ g @ v
        first = (weight[:, None] * self.s[:, None] * self.r).sum(0)  # E[w_i²/(|w|² + Nε)²]
        second = self.r.T @ ((weight * self.s.square() / 2)[:, None] * self.r)  # of w_i² w_j², but for i = j
        out = g * (weight.sum() - first[:, None] - first + 2 * second)
        out.diagonal().add_(second @ g.diagonal())
        return torch.as_tensor(n * (v @ out @ v.T))


# ------------------------------------------------------------------------------------ pooling


def pool_step(call: Call, pool: Callable[[Tensor], Tensor]) -> Step | Missing:
    """A linear average over positions, found by pooling the indicator of each position."""
    m = call.inputs[0]
    if m.unit_dim != 1:
        return Missing("a pooling along other dimensions")
    if not m.full:
        return Missing("an average over more than 512 samples × positions")
    p = m.positions
    basis = torch.eye(p, dtype=torch.float64).reshape(p, 1, *m.lead[1:])
    a = pool(basis).reshape(p, -1).T  # (positions out, positions in)
    return averaged(m, a, tuple(call.output.shape[2:]), 1)


def averaged(m: Moments, a: Tensor, space: tuple[int, ...], unit_dim: int) -> Step:
    """Moments after the positions are mixed by ``a`` (out, in)."""
    s, p = m.samples, m.positions
    k = torch.einsum("op,apbq,rq->aobr", a, m.kernel.reshape(s, p, s, p), a)
    items = s * len(a)
    out = m.with_(
        kernel=k.reshape(1, items, items), mean=(m.mean.reshape(s, p) @ a.T).reshape(1, -1), lead=(s, *space),
        unit_dim=unit_dim,
    )  # fmt: skip

    def backward(g: Tensor) -> list[Tensor]:
        back = torch.einsum("op,aobr,rq->apbq", a, g.reshape(s, len(a), s, len(a)), a)
        return [back.reshape(1, s * p, s * p)]

    return Step(out, backward)


@moment_map.register(nn.AvgPool1d)
@moment_map.register(nn.AvgPool2d)
@moment_map.register(nn.AvgPool3d)
@moment_map.register(nn.AdaptiveAvgPool1d)
@moment_map.register(nn.AdaptiveAvgPool2d)
@moment_map.register(nn.AdaptiveAvgPool3d)
def _(layer: nn.Module, call: Call) -> Step | Missing:
    return pool_step(call, layer)
