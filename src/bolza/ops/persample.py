r"""Gradients of each sample, kept as the factors they are made of.

The gradient of a weight is a sum of outer products of what enters a layer and what comes back to it,
g_i = Σ_t p_{i,t} x_{i,t}ᵀ. From the factors follow, without the gradients themselves,

    g_i · V = Σ_t p_{i,t}ᵀ V x_{i,t},    Σ_i c_i g_i = Pᵀ (c ∘ X),
    g_i · g_j = Σ_{t,s} (x_{i,t} · x_{j,s}) (p_{i,t} · p_{j,s}).

One ordinary forward and backward pass over a batch gives the factors of all its samples.
"""

# ruff: noqa: D102  (the methods of a block are described once, in Block)
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "RULES",
    "Block",
    "Dense",
    "Lookup",
    "Outer",
    "Signals",
    "Sum",
    "gram",
    "merge",
    "outer_factors",
    "storage",
]

_ROOM = 2**24  # numbers in a temporary block of explicit gradients


class Block(Protocol):
    """Gradients of one parameter, of n samples; d is its number of elements."""

    @property
    def count(self) -> int:
        """Number of samples, n."""
        ...

    @property
    def size(self) -> int:
        """Number of elements, d."""
        ...

    def dots(self, v: Tensor) -> Tensor:
        """g_i · v for the columns of ``v`` (d, k): (n, k)."""
        ...

    def combine(self, c: Tensor) -> Tensor:
        """Σ_i c_i g_i for the columns of ``c`` (n, k): (d, k)."""
        ...

    def squares(self) -> Tensor:
        """|g_i|²: (n,)."""
        ...

    def rows(self, start: int, stop: int) -> Block:
        """The samples from start to stop."""
        ...

    def dense(self) -> Tensor:
        """The gradients themselves: (n, d)."""
        ...

    def tensors(self) -> list[Tensor]:
        """What is stored."""
        ...


@dataclass(frozen=True)
class Dense:
    """Explicit gradients ``values`` (n, d)."""

    values: Tensor

    @property
    def count(self) -> int:
        return self.values.shape[0]

    @property
    def size(self) -> int:
        return self.values.shape[1]

    def dots(self, v: Tensor) -> Tensor:
        return self.values @ v

    def combine(self, c: Tensor) -> Tensor:
        return self.values.T @ c

    def squares(self) -> Tensor:
        return self.values.square().sum(1)

    def rows(self, start: int, stop: int) -> Dense:
        return Dense(self.values[start:stop])

    def dense(self) -> Tensor:
        return self.values

    def tensors(self) -> list[Tensor]:
        return [self.values]


@dataclass(frozen=True)
class Outer:
    """g_i = Σ_t signals_{i,t} inputs_{i,t}ᵀ, from ``inputs`` (n, T, a) and ``signals`` (n, T, b)."""

    inputs: Tensor
    signals: Tensor

    @property
    def count(self) -> int:
        return self.inputs.shape[0]

    @property
    def size(self) -> int:
        return self.inputs.shape[2] * self.signals.shape[2]

    def dots(self, v: Tensor) -> Tensor:
        n, _, a = self.inputs.shape
        x, p = self.inputs.flatten(0, 1), self.signals.flatten(0, 1)
        columns = [((p @ w.reshape(-1, a)) * x).sum(1).reshape(n, -1).sum(1) for w in v.unbind(1)]
        return torch.stack(columns, 1)

    def combine(self, c: Tensor) -> Tensor:
        x, p = self.inputs.flatten(0, 1), self.signals
        return torch.stack([((p * w[:, None, None]).flatten(0, 1).T @ x).flatten() for w in c.unbind(1)], 1)

    def squares(self) -> Tensor:
        x, p = self.inputs, self.signals
        if x.shape[1] == 1:
            return x.square().sum((1, 2)) * p.square().sum((1, 2))
        return ((x @ x.mT) * (p @ p.mT)).sum((1, 2))

    def rows(self, start: int, stop: int) -> Outer:
        return Outer(self.inputs[start:stop], self.signals[start:stop])

    def dense(self) -> Tensor:
        return (self.signals.mT @ self.inputs).flatten(1)

    def tensors(self) -> list[Tensor]:
        return [self.inputs, self.signals]


@dataclass(frozen=True)
class Lookup:
    """Gradient of a table: row ``index_{i,t}`` (n, T) gets ``signals_{i,t}`` (n, T, b)."""

    index: Tensor
    signals: Tensor
    entries: int

    @property
    def count(self) -> int:
        return self.index.shape[0]

    @property
    def size(self) -> int:
        return self.entries * self.signals.shape[2]

    def dots(self, v: Tensor) -> Tensor:
        width = self.signals.shape[2]
        return torch.stack(
            [(w.reshape(-1, width)[self.index] * self.signals).sum((1, 2)) for w in v.unbind(1)], 1
        )

    def combine(self, c: Tensor) -> Tensor:
        table = self.signals.new_zeros(c.shape[1], self.entries, self.signals.shape[2])
        for k, w in enumerate(c.unbind(1)):
            table[k].index_add_(0, self.index.flatten(), (self.signals * w[:, None, None]).flatten(0, 1))
        return table.flatten(1).T

    def squares(self) -> Tensor:
        same = self.index[:, :, None] == self.index[:, None, :]
        return ((self.signals @ self.signals.mT) * same).sum((1, 2))

    def rows(self, start: int, stop: int) -> Lookup:
        return Lookup(self.index[start:stop], self.signals[start:stop], self.entries)

    def dense(self) -> Tensor:
        n, _, width = self.signals.shape
        table = self.signals.new_zeros(n, self.entries, width)
        table.scatter_add_(1, self.index[:, :, None].expand_as(self.signals), self.signals)
        return table.flatten(1)

    def tensors(self) -> list[Tensor]:
        return [self.index, self.signals]


@dataclass(frozen=True)
class Sum:
    """Several uses of one parameter."""

    parts: tuple[Block, ...]

    @property
    def count(self) -> int:
        return self.parts[0].count

    @property
    def size(self) -> int:
        return self.parts[0].size

    def dots(self, v: Tensor) -> Tensor:
        return torch.stack([part.dots(v) for part in self.parts]).sum(0)

    def combine(self, c: Tensor) -> Tensor:
        return torch.stack([part.combine(c) for part in self.parts]).sum(0)

    def squares(self) -> Tensor:
        return torch.cat([piece.dense().square().sum(1) for piece in _pieces(self)])

    def rows(self, start: int, stop: int) -> Sum:
        return Sum(tuple(part.rows(start, stop) for part in self.parts))

    def dense(self) -> Tensor:
        return torch.stack([part.dense() for part in self.parts]).sum(0)

    def tensors(self) -> list[Tensor]:
        return [tensor for part in self.parts for tensor in part.tensors()]


def _pieces(block: Block) -> list[Block]:
    """The block in runs of samples whose explicit gradients fit in the room for temporaries."""
    step = max(1, _ROOM // max(1, block.size))
    return [block.rows(at, min(at + step, block.count)) for at in range(0, block.count, step)]


def gram(a: Block, b: Block) -> Tensor:
    """Inner products g_i · g_j of the samples of two blocks of one parameter: (n, m)."""
    if isinstance(a, Outer) and isinstance(b, Outer) and a.inputs.shape[1] == b.inputs.shape[1] == 1:
        return (a.inputs[:, 0] @ b.inputs[:, 0].T) * (a.signals[:, 0] @ b.signals[:, 0].T)
    out = []
    for piece in _pieces(a):
        left = piece.dense()
        out.append(torch.cat([left @ other.dense().T for other in _pieces(b)], 1))
    return torch.cat(out)


def merge(uses: Sequence[Block]) -> Block:
    """One block for a parameter that is used several times; steps of a recurrence become one sum over t."""
    if len(uses) == 1:
        return uses[0]
    outer = [use for use in uses if isinstance(use, Outer)]
    rest: list[Block] = [use for use in uses if not isinstance(use, Outer | Dense)]
    explicit = [use.values for use in uses if isinstance(use, Dense)]
    if outer:
        x, p = (
            torch.cat(parts, 1) for parts in zip(*((use.inputs, use.signals) for use in outer), strict=True)
        )
        rest.append(_outer(x, p))
    if explicit:
        rest.append(Dense(explicit[0] if len(explicit) == 1 else torch.stack(explicit).sum(0)))
    return rest[0] if len(rest) == 1 else Sum(tuple(rest))


def storage(blocks: Sequence[Block]) -> int:
    """Bytes that the blocks hold; tensors that they share count once."""
    held: dict[int, int] = {}
    for tensor in (t for block in blocks for t in block.tensors()):
        held[tensor.data_ptr()] = max(held.get(tensor.data_ptr(), 0), tensor.numel() * tensor.element_size())
    return sum(held.values())


def _outer(x: Tensor, p: Tensor) -> Block:
    """Factors, or the gradients where those are smaller."""
    factors = Outer(x, p)
    smaller = x.shape[1] > 1 and x.shape[1] * (x.shape[2] + p.shape[2]) > factors.size
    return Dense(factors.dense()) if smaller else factors


# A rule takes a layer and what entered it, and gives what turns the signal that comes back into blocks, by the
# name of the parameter. It is None, or a block is missing, where the layer mixes samples or does more than the
# rule knows.

Signals = Callable[[Tensor], dict[str, Block]]
Rule = Callable[[nn.Module, Tensor], Signals | None]


def outer_factors(layer: nn.Module, x: Tensor, p: Tensor) -> Outer | None:
    """Factors of the weight's gradient in a dense or convolutional layer, always as rows.

    Args:
        layer: the layer.
        x: what entered it, samples first.
        p: what came back to its output.

    Returns:
        ``Outer`` with one row a place (a pixel of the output); ``None`` for other layers, and for groups.

    Example:
        >>> rows = outer_factors(nn.Conv1d(2, 4, 3), torch.ones(5, 2, 8), torch.ones(5, 4, 6))
        >>> rows.inputs.shape, rows.signals.shape
        (torch.Size([5, 6, 6]), torch.Size([5, 6, 4]))
    """
    n = x.shape[0]
    if isinstance(layer, nn.Linear) and x.ndim > 1:
        return Outer(x.reshape(n, -1, x.shape[-1]), p.reshape(n, -1, p.shape[-1]))
    if (
        isinstance(layer, nn.Conv1d | nn.Conv2d)
        and layer.groups == 1
        and x.ndim == 2 + len(layer.kernel_size)
    ):
        return Outer(_columns(layer, x, p.shape[2:]).mT, p.flatten(2).mT)
    return None


def _linear(layer: nn.Module, x: Tensor) -> Signals | None:
    n = x.shape[0]
    if x.ndim < 2:
        return None
    x = x.reshape(n, -1, x.shape[-1])

    def blocks(p: Tensor) -> dict[str, Block]:
        p = p.reshape(n, -1, p.shape[-1])
        return {"weight": _outer(x, p), "bias": Dense(p[:, 0] if p.shape[1] == 1 else p.sum(1))}

    return blocks


def _padded(layer: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    if not any(layer._reversed_padding_repeated_twice):
        return x
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)


def _windows(
    layer: nn.Conv1d | nn.Conv2d, x: Tensor, sizes: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """For each entry of the kernel, the pixels that it meets: a view (n, channels, *sizes) of the padded input."""
    for offset in product(*map(range, layer.kernel_size)):
        at = [
            slice(o * d, o * d + s * (size - 1) + 1, s)
            for o, d, s, size in zip(offset, layer.dilation, layer.stride, sizes, strict=True)
        ]
        yield offset, x[(slice(None), slice(None), *at)]


def _columns(layer: nn.Conv1d | nn.Conv2d, x: Tensor, sizes: Sequence[int]) -> Tensor:
    """The patches that a convolution sees, (n, channels · kernel, places), for an output of ``sizes``."""
    pieces = [window for _, window in _windows(layer, _padded(layer, x), sizes)]
    return torch.stack(pieces, 2).flatten(3).flatten(1, 2)


def _conv_gradients(layer: nn.Conv1d | nn.Conv2d, x: Tensor, p: Tensor) -> Tensor:
    """Gradients of the samples in the kernel, (n, out · in/groups · kernel), without the patches."""
    n, groups = x.shape[0], layer.groups
    signals = p.reshape(n, groups, -1, p[0, 0].numel())
    out = p.new_empty(n, *layer.weight.shape)
    for offset, window in _windows(layer, _padded(layer, x), p.shape[2:]):
        pixels = window.reshape(n, groups, -1, signals.shape[-1])
        out.movedim((0, 1, 2), (-3, -2, -1))[offset] = (signals @ pixels.mT).flatten(1, 2)
    return out.flatten(1)


def _conv(layer: nn.Module, x: Tensor) -> Signals | None:
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)
    if x.ndim != 2 + len(layer.kernel_size):
        return None

    def blocks(p: Tensor) -> dict[str, Block]:
        width, places = layer.weight[0].numel(), p[0, 0].numel()
        weight: Block
        if layer.groups > 1 or places * (width + p.shape[1]) > width * p.shape[1]:
            weight = Dense(_conv_gradients(layer, x, p))
        else:
            weight = Outer(_columns(layer, x, p.shape[2:]).mT, p.flatten(2).mT)
        return {"weight": weight, "bias": Dense(p.flatten(2).sum(-1))}

    return blocks


def _affine(normalise: Callable[[nn.Module, Tensor], Tensor], channels: bool) -> Rule:
    """Scale and shift after a normalisation: over channels (dimension 1), or over the last dimensions."""

    def rule(layer: nn.Module, x: Tensor) -> Signals | None:
        weight = layer.weight
        if not isinstance(weight, Tensor) or (channels and x.ndim < 2):
            return None
        over = tuple(range(2, x.ndim)) if channels else tuple(range(1, x.ndim - weight.ndim))
        normal = normalise(layer, x)

        def blocks(p: Tensor) -> dict[str, Block]:
            summed = ((p * normal).sum(over), p.sum(over)) if over else (p * normal, p)
            return {"weight": Dense(summed[0].flatten(1)), "bias": Dense(summed[1].flatten(1))}

        return blocks

    return rule


def _embedding(layer: nn.Module, x: Tensor) -> Signals | None:
    assert isinstance(layer, nn.Embedding)
    if layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse:
        return None
    n, entries, padding = x.shape[0], layer.num_embeddings, layer.padding_idx
    index = x.reshape(n, -1)

    def blocks(p: Tensor) -> dict[str, Block]:
        p = p.reshape(n, -1, p.shape[-1])
        if padding is not None:
            p = p * (index != padding)[:, :, None]
        table = Lookup(index, p, entries)
        return {"weight": Dense(table.dense()) if entries <= index.shape[1] else table}

    return blocks


def _batch_norm(layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    return F.batch_norm(x, layer.running_mean, layer.running_var, None, None, False, 0.0, layer.eps)


def _layer_norm(layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, nn.LayerNorm)
    return F.layer_norm(x, layer.normalized_shape, None, None, layer.eps)


def _rms_norm(layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, nn.RMSNorm)
    return F.rms_norm(x, layer.normalized_shape, None, layer.eps)


def _group_norm(layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, nn.GroupNorm)
    return F.group_norm(x, layer.num_groups, None, None, layer.eps)


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    nn.BatchNorm1d: _affine(_batch_norm, channels=True),
    nn.BatchNorm2d: _affine(_batch_norm, channels=True),
    nn.BatchNorm3d: _affine(_batch_norm, channels=True),
    nn.LayerNorm: _affine(_layer_norm, channels=False),
    nn.RMSNorm: _affine(_rms_norm, channels=False),
    nn.GroupNorm: _affine(_group_norm, channels=True),
    nn.Embedding: _embedding,
}
