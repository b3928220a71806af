r"""Gradients of all outputs of some samples in one parameter, and their inner products.

Beside :mod:`bolza.ops.persample` there is one more index, that of the output: what enters a layer is the same for all
outputs, what comes back is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from bolza.ops.persample import Block, Lookup, Outer

__all__ = ["Explicit", "Factors", "Outputs", "Stack", "add_products", "explicit_of", "mirror", "stacked"]

Outputs: TypeAlias = Literal["mean", "trace", "each", "full"]
_ROOM = 2**24  # numbers in one temporary


@dataclass(frozen=True)
class Factors:
    """Gradients Σ_t signals_{i,t,a} inputs_{i,t}ᵀ, or rows ``inputs_{i,t}`` of a table of ``entries``."""

    inputs: Tensor  # (n, T, features), or (n, T) indices
    signals: Tensor  # (n, T, outputs, width)
    entries: int

    def rows(self, start: int, stop: int) -> Factors:
        """The samples from start to stop."""
        return Factors(self.inputs[start:stop], self.signals[start:stop], self.entries)


@dataclass(frozen=True)
class Explicit:
    """Gradients (n, outputs, d), formed for the samples from one to another when they are asked for."""

    form: Callable[[int, int], Tensor]
    count: int
    size: int  # numbers a sample
    values: Tensor | None = None  # where they exist already

    def rows(self, start: int, stop: int) -> Explicit:
        """The samples from start to stop."""
        if self.values is not None:
            return explicit_of(self.values[start:stop])
        return Explicit(lambda i, j: self.form(start + i, start + j), stop - start, self.size)

    @property
    def pointer(self) -> int:
        """Where the values are; 0 if they do not exist yet."""
        return 0 if self.values is None else self.values.data_ptr()


Stack: TypeAlias = Factors | Explicit


def stacked(blocks: Sequence[Block], memo: dict[tuple[int, ...], Tensor]) -> Stack:
    """One stack from a block for each output; ``memo`` holds tensors that several parameters share."""

    def together(tensors: list[Tensor], dim: int) -> Tensor:
        if len(tensors) == 1:
            return tensors[0].unsqueeze(dim)
        key = (*(t.data_ptr() for t in tensors), tensors[0].numel())
        if key not in memo:  # weight and bias of a layer share their signals
            memo[key] = torch.stack([t.flatten(0, dim - 1) for t in tensors], 1)
        return memo[key].reshape(*tensors[0].shape[:dim], len(tensors), -1)

    first = blocks[0]
    outer = [b for b in blocks if isinstance(b, Outer)]
    lookups = [b for b in blocks if isinstance(b, Lookup)]
    if isinstance(first, Outer) and len(outer) == len(blocks):
        return Factors(first.inputs, together([b.signals for b in outer], 2), 0)
    if isinstance(first, Lookup) and len(lookups) == len(blocks):
        return Factors(first.index, together([b.signals for b in lookups], 2), first.entries)
    made = [t for b in blocks for t in b.tensors()]
    if len(made) == len(blocks) and all(
        t.shape == (b.count, b.size) for t, b in zip(made, blocks, strict=True)
    ):
        return explicit_of(together(made, 1))

    def form(start: int, stop: int) -> Tensor:
        return torch.stack([b.rows(start, stop).dense() for b in blocks], 1)

    return Explicit(form, first.count, len(blocks) * first.size)


def explicit_of(values: Tensor) -> Explicit:
    """A stack of gradients that exist, (n, outputs, d)."""
    return Explicit(lambda i, j: values[i:j], values.shape[0], values[0].numel(), values)


def _form(factors: Factors) -> Explicit:
    """The same gradients, explicit."""
    n, _, outputs, width = factors.signals.shape

    def form(start: int, stop: int) -> Tensor:
        x, p = factors.inputs[start:stop], factors.signals[start:stop]
        if not factors.entries:
            return (p.flatten(2).mT @ x).reshape(stop - start, outputs, -1)
        table = p.new_zeros(stop - start, factors.entries, outputs, width)
        table.scatter_add_(1, x[:, :, None, None].expand_as(p), p)
        return table.transpose(1, 2).flatten(2)

    features = factors.entries or factors.inputs.shape[2]
    return Explicit(form, n, outputs * width * features)


def _weave(left: Tensor, right: Tensor, mode: Outputs) -> Tensor:
    """Inner products of (r, outputs, d) and (s, outputs, d): (r, s), with outputs and pairs of outputs behind."""
    if mode == "full":
        out = left.flatten(0, 1) @ right.flatten(0, 1).T
        return out.reshape(*left.shape[:2], *right.shape[:2]).transpose(1, 2)
    if mode == "each":
        return (left.transpose(0, 1) @ right.permute(1, 2, 0)).permute(1, 2, 0)
    return left.flatten(1) @ right.flatten(1).T


def _meeting(a: Factors, b: Factors) -> Tensor:
    """Inner products of what entered, (n T, m T'); for a table, whether the rows are the same."""
    if a.entries:
        return (a.inputs.reshape(-1, 1) == b.inputs.reshape(1, -1)).to(a.signals.dtype)
    return a.inputs.flatten(0, 1) @ b.inputs.flatten(0, 1).T


def _behind(x: Tensor, like: Tensor) -> Tensor:
    return x.reshape(*x.shape, *[1] * (like.ndim - x.ndim))


def _cheaper_factored(a: Factors, b: Factors, mode: Outputs) -> bool:
    _, s, outputs, width = a.signals.shape
    t = b.signals.shape[1]
    pairs = outputs**2 if mode == "full" else outputs
    features = a.entries or a.inputs.shape[2]
    return s * t * ((1 if a.entries else features) + pairs * width) <= pairs * features * width


def _add_factored(total: Tensor, a: Factors, b: Factors, mode: Outputs, scale: float) -> None:
    (n, s), (m, t) = a.signals.shape[:2], b.signals.shape[:2]
    step = max(1, _ROOM * n // (s * t * total.numel()))
    for at in range(0, n, step):
        rows = a.rows(at, at + step)
        woven = _weave(rows.signals.flatten(0, 1), b.signals.flatten(0, 1), mode)
        woven = woven * _behind(_meeting(rows, b), woven)
        woven = woven.reshape(-1, s, m, t, *woven.shape[2:]).sum((1, 3))
        total[at : at + step].add_(woven, alpha=scale)


def _add_explicit(total: Tensor, a: Explicit, b: Explicit, mode: Outputs, scale: float) -> None:
    rows, columns = (max(1, _ROOM // max(1, e.size)) for e in (a, b))
    for i in range(0, a.count, rows):
        left = a.form(i, min(i + rows, a.count))
        for j in range(0, b.count, columns):
            right = left if a is b and i == j and rows == columns else b.form(j, min(j + columns, b.count))
            total[i : i + rows, j : j + columns].add_(_weave(left, right, mode), alpha=scale)


def _add_symmetric(total: Tensor, a: Mapping[str, Stack], mode: Outputs, scales: Mapping[str, float]) -> None:
    """The same with b = a: the blocks above the diagonal are copied below it."""
    n = len(total)
    parts = 2 if n < 1024 else 4
    bounds = [(n * k // parts, n * (k + 1) // parts) for k in range(parts)]
    rows = [{name: stack.rows(*bound) for name, stack in a.items()} for bound in bounds]
    for k, (i, j) in enumerate(bounds):
        for (start, stop), other in zip(bounds[k:], rows[k:], strict=True):
            block = total[i:j, start:stop]
            _add(block, rows[k], other, mode, scales)
            if start > i:
                mirror(total, block, i, start, mode)


def mirror(total: Tensor, block: Tensor, i: int, j: int, mode: Outputs) -> None:
    """Copy the block that begins at (i, j) of a symmetric kernel to (j, i)."""
    turned = block.transpose(0, 1)
    place = total[j : j + block.shape[1], i : i + block.shape[0]]
    place.copy_(turned.transpose(2, 3) if mode == "full" else turned)


def _exists(stack: Stack) -> bool:
    """Whether rows can be taken without forming gradients again."""
    return stack.signals.shape[1] == 1 if isinstance(stack, Factors) else stack.values is not None


def add_products(
    total: Tensor, a: Mapping[str, Stack], b: Mapping[str, Stack], mode: Outputs, scales: Mapping[str, float]
) -> None:
    """Add the inner products of the gradients of two sets of samples, over all parameters, to ``total``.

    With ``a is b`` a symmetric ``total`` that was zero is filled.
    """
    # below this size small products lose more than the symmetry saves
    if a is b and len(total) >= 384 and all(_exists(stack) for stack in a.values()):
        _add_symmetric(total, a, mode, scales)
    else:
        _add(total, a, b, mode, scales)


def _add(
    total: Tensor, a: Mapping[str, Stack], b: Mapping[str, Stack], mode: Outputs, scales: Mapping[str, float]
) -> None:
    # layers that see one vector a sample: signals shared by weight and bias are multiplied once
    met: dict[tuple[int, int], list[tuple[Factors, Factors, float]]] = {}
    late: list[tuple[tuple[int, int], Explicit, Explicit, float]] = []
    for name, left in a.items():
        right, scale = b[name], scales.get(name, 1.0)
        if isinstance(left, Factors) and isinstance(right, Factors):
            if left.signals.shape[1] == right.signals.shape[1] == 1:
                key = (left.signals.data_ptr(), right.signals.data_ptr())
                met.setdefault(key, []).append((left, right, scale))
            elif _cheaper_factored(left, right, mode):
                _add_factored(total, left, right, mode, scale)
            else:
                formed = _form(left)
                _add_explicit(total, formed, formed if right is left else _form(right), mode, scale)
            continue
        first, second = (_form(s) if isinstance(s, Factors) else s for s in (left, right))
        late.append(((first.pointer, second.pointer), first, second, scale))
    constants = dict.fromkeys(met, 0.0)
    for key, first, second, scale in late:
        if all(key) and key in met:
            constants[key] += scale
        else:
            _add_explicit(total, first, second, mode, scale)
    for key, pairs in met.items():
        inner: Tensor | None = None
        for left, right, scale in pairs:
            more = _meeting(left, right)
            more = more if scale == 1.0 else more.mul_(scale)
            inner = more if inner is None else inner.add_(more)
        assert inner is not None
        if constants[key]:
            inner.add_(constants[key])
        woven = _weave(pairs[0][0].signals[:, 0], pairs[0][1].signals[:, 0], mode)
        total.addcmul_(woven, _behind(inner, woven))
