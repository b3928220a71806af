r"""Moment maps of attention: ``nn.MultiheadAttention`` and the transformer layers of ``torch.nn``.

With random projections queries, keys and values are Gaussians over the units, of kernels σ_q² K, σ_k² K and
σ_v² K. For many heads the attention weights A = softmax(QKᵀ/√d) of the heads are independent draws, the same law
for each, and

    K' = σ_o² E[A (σ_v² K) Aᵀ] + σ_b².

For large d the logits are Gaussian with covariance σ_q² σ_k² K ⊗ K; here heads of the actual d are drawn, so
that their finite size counts too. Gradients go back through the same heads: by way of the values, the queries
and the keys. What is left is sampling error, about 1/√units, and the spread between few heads.

Attention that a network writes itself with `F.scaled_dot_product_attention` is sampled in
`bolza.meanfield.layers.virtual`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bolza.meanfield.activations import resolve_activation
from bolza.meanfield.layers.moment_maps import Call, Missing, Step, activation_step, dropout_step, moment_map
from bolza.meanfield.layers.moments import Moments
from bolza.ops.draws import white_draws

__all__ = ["attention_step"]

UNITS = 4096
_LEAST_HEADS = 32
_FEW_ITEMS = 64  # so few cost little: more heads then


@dataclass(frozen=True)
class _Projection:
    """σ² = fan_in · mean(W²), its transpose's fan_out · mean(W²), and mean(b²)."""

    forward: float
    back: float
    bias: float

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> _Projection:
        square = float(weight.detach().double().square().mean())
        b = 0.0 if bias is None else float(bias.detach().double().square().mean())
        return cls(weight.shape[1] * square, weight.shape[0] * square, b)


def _projections(layer: nn.MultiheadAttention) -> list[_Projection]:
    if layer.in_proj_weight is not None:
        weights: list[Any] = list(layer.in_proj_weight.chunk(3))
    else:
        weights = [layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight]
    biases = [None] * 3 if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
    return [_Projection.of(w, b) for w, b in zip(weights, biases, strict=True)]


# -------------------------------------------------------------------------------------- layout


@dataclass(frozen=True)
class _Order:
    """How (batch, position) items lie in a value of one side: lead (B, T), (T, B) or (T,)."""

    lead: tuple[int, ...]
    batch_first: bool

    @property
    def sizes(self) -> tuple[int, int]:
        """(B, T)."""
        if len(self.lead) == 1:
            return 1, self.lead[0]
        return (self.lead[0], self.lead[1]) if self.batch_first else (self.lead[1], self.lead[0])

    @property
    def places(self) -> Tensor:
        """For each (batch, position) in order, its item."""
        b, t = self.sizes
        at = torch.arange(b * t)
        if len(self.lead) == 1 or self.batch_first:
            return at
        return at.reshape(t, b).T.reshape(-1)

    def inward(self, kernel: Tensor) -> Tensor:
        """(1, items, items) to (B·T, B·T)."""
        at = self.places
        return kernel[0][at][:, at]

    def outward(self, kernel: Tensor) -> Tensor:
        """The way back."""
        back = self.places.argsort()
        return kernel[back][:, back][None]


# ---------------------------------------------------------------------------------------- heads


class _Heads:
    """Virtual heads: draws of queries, keys and values, and their attention weights.

    Args:
        kernels: of queries, keys and values over their (batch, position) items.
        sizes: batch, positions of queries, positions of keys.
        dim: units of one head.
        mask: added to the logits, ``(B or 1, T, S)``, or none.
        dropout: rate at which weights are dropped.
    """

    def __init__(
        self,
        kernels: list[Tensor],
        sizes: tuple[int, int, int],
        dim: int,
        mask: Tensor | None,
        dropout: float,
    ) -> None:
        self.sizes, self.dim, self.mask = sizes, dim, mask
        rows = max(len(k) for k in kernels)
        units = UNITS if rows > _FEW_ITEMS else 4 * UNITS
        self.heads = max(_LEAST_HEADS, math.ceil(max(units, 2 * rows) / dim / 2) * 2)
        self.generator = torch.Generator().manual_seed(0)
        self.q, self.k, self.v = (self._draw(kernel) for kernel in kernels)
        batch, t, s = sizes
        keep = torch.rand(self.heads, batch, t, s, generator=self.generator, dtype=torch.float64) >= dropout
        self.keep = keep / (1 - dropout) if dropout else None

    def _draw(self, kernel: Tensor) -> Tensor:
        """Rows over units of a kernel, (heads, B, T, d)."""
        items, units = len(kernel), self.heads * self.dim
        values, vectors = torch.linalg.eigh((kernel + kernel.T) / 2)
        rows = (vectors * values.clamp_min(0).sqrt()) @ white_draws(items, units, self.generator)
        # The mirrored halves of queries and keys must not meet in one head.
        order = torch.randperm(self.heads, generator=self.generator)
        batch = self.sizes[0]
        return rows.reshape(batch, items // batch, self.heads, self.dim)[:, :, order].permute(2, 0, 1, 3)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(QKᵀ/√d + mask) V, head by head."""
        logits = q @ k.transpose(-1, -2) / math.sqrt(self.dim)
        if self.mask is not None:
            logits = logits + self.mask
        weights = torch.softmax(logits, -1)
        return (weights if self.keep is None else weights * self.keep) @ v

    @staticmethod
    def kernel(rows: Tensor) -> Tensor:
        """Mean product over all units of all heads, (items, items)."""
        heads, batch, t, dim = rows.shape
        flat = rows.permute(1, 2, 0, 3).reshape(batch * t, heads * dim)
        return flat @ flat.T / (heads * dim)

    def out(self) -> tuple[Tensor, Tensor]:
        """Kernel and mean of the heads' output."""
        rows = self.attend(self.q, self.k, self.v)
        return self.kernel(rows), rows.mean((0, 3)).reshape(-1)

    def back(self, g: Tensor) -> list[Tensor]:
        """Kernels of the gradient at queries, keys and values."""
        seeds = self._draw(g)
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_(True) for t in (self.q, self.k, self.v)]
            grads = torch.autograd.grad(self.attend(*leaves), leaves, seeds)
        return [self.kernel(part) for part in grads]


def _mask(
    attn_mask: Tensor | None, padding: Tensor | None, heads: int, sizes: tuple[int, int, int]
) -> Tensor | None:
    """One additive mask (B or 1, T, S) from the two that the layer takes."""

    def additive(m: Tensor) -> Tensor:
        m = m.detach().cpu()
        if m.dtype == torch.bool:
            return torch.zeros(m.shape, dtype=torch.float64).masked_fill(m, -torch.inf)
        return m.double()

    batch, t, s = sizes
    total = None
    if attn_mask is not None:
        m = additive(attn_mask)
        total = m[None] if m.ndim == 2 else m.reshape(batch, heads, t, s)[:, 0]
    if padding is not None:
        m = additive(padding).reshape(batch, 1, s)
        total = m if total is None else total + m
    return total


def attention_step(
    layer: nn.MultiheadAttention,
    moments: list[Moments],
    attn_mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Step | Missing:
    """Map moments through multi-head attention.

    Args:
        layer: the attention.
        moments: of query, key and value; may be one and the same.
        attn_mask: as the layer takes it.
        padding: its ``key_padding_mask``.

    Returns:
        A step whose ``backward`` gives one kernel for each of the three moments.

    Reference: Hron, Bahri, Sohl-Dickstein & Novak (2020), *Infinite attention: NNGP and NTK for deep attention
    networks*. Departure: heads of finite size.

    Example:
        >>> from bolza.meanfield.layers.moments import measure
        >>> layer = nn.MultiheadAttention(64, 8, batch_first=True)
        >>> step = attention_step(layer, [measure(torch.randn(2, 5, 64), 2)] * 3)
        >>> step.out.kernel.shape
        torch.Size([1, 10, 10])
    """
    if layer.bias_k is not None or layer.add_zero_attn:
        return Missing("attention with extra keys")
    first_of = bool(layer.batch_first)
    for m, units in zip(moments, (layer.embed_dim, layer.kdim, layer.vdim), strict=True):
        if not m.full:
            return Missing("attention over more than 512 samples × positions")
        if m.unit_dim != len(m.lead) or m.units != units:
            return Missing("attention along other dimensions")
    orders = [_Order(m.lead, first_of) for m in moments]
    (batch, t), (_, s) = orders[0].sizes, orders[1].sizes
    given = _projections(layer)
    kernels = [
        p.forward * o.inward(m.kernel) + p.bias for p, o, m in zip(given, orders, moments, strict=True)
    ]
    mask = _mask(attn_mask, padding, layer.num_heads, (batch, t, s))
    dropout = layer.dropout if layer.training else 0.0
    heads = _Heads(kernels, (batch, t, s), layer.head_dim, mask, dropout)
    last = _Projection.of(layer.out_proj.weight, layer.out_proj.bias)
    kernel, _ = heads.out()
    if not bool(torch.isfinite(kernel).all()):
        return Missing("attention of a position that sees nothing")
    m = moments[0]
    out = m.with_(
        kernel=orders[0].outward(last.forward * kernel + last.bias), mean=torch.zeros_like(m.mean),
        units=layer.embed_dim, gaussian=True,
    )  # fmt: skip

    def backward(g: Tensor) -> list[Tensor]:
        parts = heads.back(last.back * orders[0].inward(g))
        return [o.outward(p.back * part) for o, p, part in zip(orders, given, parts, strict=True)]

    return Step(out, backward, note="by sampling heads")


@moment_map.register
def _(layer: nn.MultiheadAttention, call: Call) -> Step | Missing:
    if call.entry not in ((), (0,)):
        return Missing("attention weights", layer=False)
    names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask")
    given = dict(zip(names, call.args, strict=False)) | call.kwargs
    tensors = [given[n] for n in names[:3]]
    distinct: list[Tensor] = []
    for x in tensors:
        if not any(x is y for y in distinct):
            distinct.append(x)
    if len(distinct) != len(call.inputs):
        return Missing("attention to something that is not a signal")
    place = [next(i for i, y in enumerate(distinct) if x is y) for x in tensors]
    step = attention_step(
        layer, [call.inputs[i] for i in place], given.get("attn_mask"), given.get("key_padding_mask")
    )
    if isinstance(step, Missing):
        return step

    def backward(g: Tensor) -> list[Tensor]:
        total = [torch.zeros_like(m.kernel) for m in call.inputs]
        for i, part in zip(place, step.backward(g), strict=True):
            total[i] = total[i] + part  # type: ignore[operator]
        return total

    return Step(step.out.with_(sources=frozenset({call.name})), backward, note=step.note)


# ---------------------------------------------------------------------------- transformer layers

Branch = Callable[[Moments], Step | Missing]


class _Refused(Exception):
    """A part of a transformer layer that has no map."""

    def __init__(self, missing: Missing) -> None:
        super().__init__(missing.reason)
        self.missing = missing


class _Chain:
    """Steps one after the other, with residual sums; remembers the way back.

    Args:
        m: moments of the input.
        name: of the node, as the source of what comes out.
        training: passed on to the parts.
    """

    def __init__(self, m: Moments, name: str, training: bool) -> None:
        self.m, self.name, self.training = m, name, training
        self.backs: list[Callable[[Tensor], Tensor]] = []

    def through(self, step: Step | Missing) -> None:
        """Go on with a step from the present moments."""
        if isinstance(step, Missing):
            raise _Refused(step)
        self.m = step.out
        self.backs.append(lambda g: step.backward(g)[0])  # type: ignore[arg-type, return-value]

    def layer(self, layer: nn.Module) -> None:
        """Through a module."""
        call = Call(self.name, (self.m,), (), {}, torch.empty(0), self.training)
        self.through(moment_map(layer, call))

    def branch(self, build: Callable[[_Chain], None]) -> None:
        """Add a branch, whose last layer is random: K = K₁ + K₂, and gradients pass both."""
        start = self.m
        inner = _Chain(start, self.name, self.training)
        build(inner)
        self.m = start.with_(
            kernel=start.kernel + inner.m.kernel, gaussian=start.gaussian and inner.m.gaussian
        )
        self.backs.append(lambda g: g + inner.back(g))

    def back(self, g: Tensor) -> Tensor:
        """Kernel of the gradient at the input."""
        for step in reversed(self.backs):
            g = step(g)
        return g


def _feed_forward(layer: Any) -> Callable[[_Chain], None]:
    def build(chain: _Chain) -> None:
        chain.layer(layer.linear1)
        call = Call(chain.name, (chain.m,), (), {}, torch.empty(0), chain.training)
        chain.through(activation_step(call, resolve_activation(layer.activation)))
        chain.layer(layer.dropout)
        chain.layer(layer.linear2)
        chain.layer(layer.dropout3 if hasattr(layer, "dropout3") else layer.dropout2)

    return build


def _attend(
    layer: nn.MultiheadAttention, drop: nn.Dropout, mask: Tensor | None, padding: Tensor | None,
    other: Moments | None = None, others: list[Callable[[], Tensor]] | None = None,
) -> Callable[[_Chain], None]:  # fmt: skip
    """A branch of attention, to itself or to ``other``, whose gradient is then collected in ``others``."""

    def build(chain: _Chain) -> None:
        side = chain.m if other is None else other
        step = attention_step(layer, [chain.m, side, side], mask, padding)
        if isinstance(step, Missing):
            raise _Refused(step)

        def backward(g: Tensor) -> Tensor:
            q, k, v = step.backward(g)
            assert q is not None and k is not None and v is not None
            if other is None:
                return q + k + v
            assert others is not None
            others.append(lambda: k + v)
            return q

        chain.m = step.out
        chain.backs.append(backward)
        call = Call(chain.name, (chain.m,), (), {}, torch.empty(0), chain.training)
        chain.through(dropout_step(call, drop.p, drop.training))

    return build


def _blocks(chain: _Chain, first: bool, parts: list[tuple[nn.Module, Callable[[_Chain], None]]]) -> None:
    for norm, build in parts:
        if first:

            def normed(
                inner: _Chain, norm: nn.Module = norm, build: Callable[[_Chain], None] = build
            ) -> None:
                inner.layer(norm)
                build(inner)

            chain.branch(normed)
        else:
            chain.branch(build)
            chain.layer(norm)


def _given(call: Call, names: tuple[str, ...], causal: str, length: int) -> dict[str, Any]:
    given = dict(zip(names, call.args, strict=False)) | call.kwargs
    if given.get(names[1]) is None and given.get(causal):
        given[names[1]] = torch.ones(length, length, dtype=torch.bool).triu(1)
    return given


@moment_map.register
def _(layer: nn.TransformerEncoderLayer, call: Call) -> Step | Missing:
    m = call.inputs[0]
    names = ("src", "src_mask", "src_key_padding_mask", "is_causal")
    given = _given(call, names, "is_causal", _Order(m.lead, bool(layer.self_attn.batch_first)).sizes[1])
    chain = _Chain(m, call.name, call.training)
    attention = _attend(layer.self_attn, layer.dropout1, given.get("src_mask"), given.get(names[2]))
    try:
        _blocks(chain, layer.norm_first, [(layer.norm1, attention), (layer.norm2, _feed_forward(layer))])
    except _Refused as refused:
        return refused.missing
    out = chain.m.with_(sources=frozenset({call.name}), gaussian=False)
    return Step(out, lambda g: [chain.back(g)], note="by sampling heads")


@moment_map.register
def _(layer: nn.TransformerDecoderLayer, call: Call) -> Step | Missing:
    names = ("tgt", "memory", "tgt_mask", "memory_mask", "tgt_key_padding_mask", "memory_key_padding_mask")
    given = dict(zip(names, call.args, strict=False)) | call.kwargs
    if len(call.inputs) != 2 or given["tgt"] is given["memory"]:
        return Missing("a decoder whose memory is its own input")
    m, memory = call.inputs
    length = _Order(m.lead, bool(layer.self_attn.batch_first)).sizes[1]
    if given.get("tgt_mask") is None and given.get("tgt_is_causal"):
        given["tgt_mask"] = torch.ones(length, length, dtype=torch.bool).triu(1)
    chain = _Chain(m, call.name, call.training)
    others: list[Callable[[], Tensor]] = []
    own = _attend(layer.self_attn, layer.dropout1, given.get("tgt_mask"), given.get(names[4]))
    cross = _attend(
        layer.multihead_attn, layer.dropout2, given.get("memory_mask"), given.get(names[5]), memory, others
    )
    try:
        _blocks(
            chain,
            layer.norm_first,
            [(layer.norm1, own), (layer.norm2, cross), (layer.norm3, _feed_forward(layer))],
        )
    except _Refused as refused:
        return refused.missing

    def backward(g: Tensor) -> list[Tensor]:
        others.clear()
        back = chain.back(g)
        return [back, others.pop()()]

    out = chain.m.with_(sources=frozenset({call.name}), gaussian=False)
    return Step(out, backward, note="by sampling heads")
