r"""Per-sample gradients of a network, streamed over a data set in bounded memory.

With g_i = ∇ℓ_i(θ) for the N samples, everything about gradient noise follows from two products,

    (g_i · v)_i     and     Σ_i c_i g_i,

which are computed chunk by chunk. In layers that act on each sample alone (Linear, convolutions, normalisation,
Embedding) g_i stays factored into layer input and costate (:mod:`bolza.ops.persample`), found by one ordinary
backward pass; the parameters of all other layers go through ``torch.func.vmap``. Which is which is decided by
comparison: a layer whose factored gradients differ from those of samples taken alone is not trusted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree

from bolza.ops.batches import (
    Batch,
    Data,
    Loss,
    apply,
    batches_of,
    checked_loss,
    count_samples,
    read,
    select_parameters,
)
from bolza.ops.errors import ArgumentError, DataError, DivergenceError
from bolza.ops.factors import blocks_of, call_with, cut, vmapped, watching
from bolza.ops.persample import Block, Dense, gram, storage
from bolza.ops.replay import differentiable_kernels, frozen_statistics, same_randomness

__all__ = ["Chunk", "PerSampleGradients", "each_sample_alone"]

_BatchNorm = nn.modules.batchnorm._BatchNorm
Statistics = dict[nn.Module, tuple[Tensor, Tensor]]


def batch_statistics(model: nn.Module, batches: Iterable[Batch], device: torch.device) -> Statistics:
    """Mean and variance by which each batch norm is to normalise.

    For a layer in training mode, or without running averages, those of its input, averaged over the
    batches; otherwise its running averages.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    live = [layer for layer in layers if layer.training or layer.running_mean is None]
    found: Statistics = {}
    for norm in layers:
        if norm not in live and norm.running_mean is not None and norm.running_var is not None:
            found[norm] = (norm.running_mean.clone(), norm.running_var.clone())
    if not live:
        return found
    sums: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def note(layer: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach()
        over = [0, *range(2, x.ndim)]
        both = x.mean(over) * weight, x.var(over, unbiased=False) * weight
        old = sums.get(layer)
        sums[layer] = both if old is None else (old[0] + both[0], old[1] + both[1])

    modes = [(layer, layer.training) for layer in model.modules()]
    hooks = [layer.register_forward_pre_hook(note) for layer in live]
    total = weight = 0
    try:
        for layer, _ in modes:
            layer.training = any(layer is norm for norm in live)
        with torch.no_grad(), frozen_statistics(model):
            for x, _ in read(batches, device):
                weight = count_samples(x)
                apply(model, x)
                total += weight
    finally:
        for hook in hooks:
            hook.remove()
        for layer, mode in modes:
            layer.training = mode
    return found | {layer: (mean / total, var / total) for layer, (mean, var) in sums.items()}


@contextmanager
def each_sample_alone(model: nn.Module, statistics: Statistics) -> Iterator[None]:
    """Evaluate ``model`` so that no sample sees another: evaluation mode, the given batch statistics."""
    modes = [(layer, layer.training) for layer in model.modules()]
    kept = [(layer, dict(layer._buffers)) for layer in statistics]
    try:
        for layer, training in modes:
            if training:
                layer.training = False
        for layer, (mean, var) in statistics.items():
            layer._buffers["running_mean"], layer._buffers["running_var"] = mean, var
        yield
    finally:
        for layer, buffers in kept:
            layer._buffers.update(buffers)
        for layer, mode in modes:
            if layer.training is not mode:
                layer.training = mode


def _mark(x: Any, y: Any) -> tuple[complex, ...]:
    """What tells a batch from the same samples in another order: its first sample."""
    leaves = [leaf for leaf in _pytree.tree_leaves((x, y)) if isinstance(leaf, Tensor) and leaf.ndim]
    return tuple(complex(leaf[0].to(torch.complex128).sum()) for leaf in leaves)


@dataclass(frozen=True)
class Chunk:
    """Gradients of a few samples, a block a parameter."""

    blocks: dict[str, Block]

    @property
    def count(self) -> int:
        """Number of samples."""
        return next(iter(self.blocks.values())).count

    def dots(self, v: Tensor) -> Tensor:
        """g_i · v for the columns of ``v`` (d, k): (n, k)."""
        sizes = [block.size for block in self.blocks.values()]
        parts = [b.dots(part) for b, part in zip(self.blocks.values(), torch.split(v, sizes), strict=True)]
        return torch.stack(parts).sum(0)

    def combine(self, c: Tensor) -> Tensor:
        """Σ_i c_i g_i for the columns of ``c`` (n, k): (d, k)."""
        return torch.cat([block.combine(c) for block in self.blocks.values()])

    def squares(self) -> Tensor:
        """|g_i|² by parameter: (n, parameters)."""
        return torch.stack([block.squares() for block in self.blocks.values()], 1)

    def overlaps(self, v: Tensor) -> Tensor:
        """g_i · v by parameter, for a vector (d,): (n, parameters)."""
        sizes = [block.size for block in self.blocks.values()]
        parts = [
            b.dots(part[:, None]) for b, part in zip(self.blocks.values(), torch.split(v, sizes), strict=True)
        ]
        return torch.cat(parts, 1)


class PerSampleGradients:
    """Gradients g_i of the loss of each sample, at the parameters the model has now.

    Args:
        model: the network. It is evaluated in evaluation mode, so that samples do not meet and dropout
            adds nothing; a batch norm in training mode normalises by the statistics of ``data``, held fixed.
        loss: ``loss(prediction, y)``, the mean over samples of a loss of each.
        data: one pair ``(x, y)`` or an iterable of batches that repeats; every tensor in x and y has samples
            first.
        params: names of parameters or modules; all that have ``requires_grad`` by default.
        chunk: samples in one pass.
        memory: bytes for stored factors; beyond it they are computed again at every product.
        seed: of the random numbers a model draws even in evaluation mode.

    Attributes:
        names: of the parameters, in the order of ``model.parameters()``.
        factored: names of those whose gradients are kept as factors; the others are vmapped.
        samples: N.
        size: d, the length of flat vectors.
        mean: ḡ = Σ g_i / N, flat.
        stored: whether the factors are kept.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        data: Data,
        params: Iterable[str] | None = None,
        *,
        chunk: int = 256,
        memory: int = 2**30,
        seed: int = 0,
    ) -> None:
        if chunk < 1:
            raise ArgumentError(f"chunk is {chunk}: it must be at least 1 sample")
        selected = select_parameters(model, params)
        self._model, self._loss, self._batches = model, loss, batches_of(data)
        self._chunk, self._seed = chunk, seed
        self._values = {name: p.detach().clone().requires_grad_() for name, p in selected.items()}
        first = next(iter(selected.values()))
        self.device, self.dtype = first.device, first.dtype
        self.names = tuple(self._values)
        self.sizes = tuple(p.numel() for p in self._values.values())
        self.size = sum(self.sizes)
        with differentiable_kernels(model), same_randomness(seed, self.device):
            self._statistics = batch_statistics(model, self._batches, self.device)
        self._untrusted: set[str] | None = None
        self._kept: list[Chunk] | None = []
        self._marks: list[tuple[complex, ...]] = []
        total, count, bytes_held = torch.zeros(self.size, dtype=self.dtype, device=self.device), 0, 0
        for part in self._stream(self._marks):
            total += part.combine(torch.ones(part.count, 1, dtype=self.dtype, device=self.device))[:, 0]
            count += part.count
            if self._kept is not None:
                bytes_held += storage(list(part.blocks.values()))
                self._kept = [*self._kept, part] if bytes_held <= memory else None
        self.samples, self.mean = count, total / count
        self.stored = self._kept is not None
        if count < 2:
            raise DataError("data has one sample: the covariance of its gradient needs at least two")
        if not bool(torch.isfinite(self.mean).all()):
            bad = next(
                n
                for n, g in zip(self.names, torch.split(self.mean, list(self.sizes)), strict=True)
                if not g.isfinite().all()
            )
            raise DivergenceError(f"the gradient of parameter {bad!r} is not finite", layer=bad)

    @property
    def factored(self) -> tuple[str, ...]:
        """Names of the parameters whose gradients are kept as factors."""
        return tuple(name for name in self.names if name not in (self._untrusted or ()))

    def chunks(self) -> Iterator[Chunk]:
        """All samples, a chunk at a time, in the order of the data."""
        return iter(self._kept) if self._kept is not None and self.stored else self._stream()

    def dots(self, v: Tensor) -> Tensor:
        """g_i · v for a vector (d,) or the columns of (d, k): (N,) or (N, k)."""
        out = torch.cat([part.dots(v.reshape(self.size, -1)) for part in self.chunks()])
        return out.reshape(self.samples, *v.shape[1:])

    def combine(self, c: Tensor) -> Tensor:
        """Σ_i c_i g_i for ``c`` (N,) or the columns of (N, k): (d,) or (d, k)."""
        columns = c.reshape(self.samples, -1)
        total, at = self.mean.new_zeros(self.size, columns.shape[1]), 0
        for part in self.chunks():
            total += part.combine(columns[at : at + part.count])
            at += part.count
        return total.reshape(self.size, *c.shape[1:])

    def covariance_product(self, v: Tensor) -> Tensor:
        """Σ v = (1/N) Σ_i (g_i − ḡ) ((g_i − ḡ) · v), in one pass; (d,) or (d, k)."""
        columns = v.reshape(self.size, -1)
        offset = self.mean @ columns
        total, drift = torch.zeros_like(columns), torch.zeros_like(offset)
        for part in self.chunks():
            c = part.dots(columns) - offset
            total += part.combine(c)
            drift += c.sum(0)
        return ((total - self.mean[:, None] * drift) / self.samples).reshape(v.shape)

    def squares_and_overlaps(self) -> tuple[Tensor, Tensor]:
        """|g_i|² and g_i · ḡ by parameter, float64: (N, parameters) each."""
        pairs = [(part.squares().double(), part.overlaps(self.mean).double()) for part in self.chunks()]
        return torch.cat([s for s, _ in pairs]), torch.cat([a for _, a in pairs])

    def gram(self) -> Tensor:
        """Inner products of the centred gradients, (g_i − ḡ)·(g_j − ḡ): (N, N), float64."""
        parts = list(self.chunks())
        starts = [0]
        for part in parts:
            starts.append(starts[-1] + part.count)
        k = torch.zeros(self.samples, self.samples, dtype=torch.float64, device=self.device)
        for i, a in enumerate(parts):
            for j in range(i, len(parts)):
                b = parts[j]
                inner = torch.stack(
                    [gram(a.blocks[name], b.blocks[name]).double() for name in self.names]
                ).sum(0)
                k[starts[i] : starts[i + 1], starts[j] : starts[j + 1]] = inner
                k[starts[j] : starts[j + 1], starts[i] : starts[i + 1]] = inner.T
        row = k.mean(1)
        return k - row[:, None] - row[None, :] + row.mean()

    def check_order(self) -> None:
        """Make sure that weights found in one pass belong to the samples of the next one.

        Raises:
            DataError: the data come in another order, or changed, every time they are read.
        """
        if not self.stored and [_mark(x, y) for x, y in read(self._batches, self.device)] != self._marks:
            raise DataError(
                "data gives other batches every time it is read: take a loader with shuffle=False and without random "
                "augmentation, or raise memory= so that one pass is enough"
            )

    def _stream(self, marks: list[tuple[complex, ...]] | None = None) -> Iterator[Chunk]:
        for x, y in read(self._batches, self.device):
            n = count_samples(x)
            for leaf in _pytree.tree_leaves((x, y)):
                if isinstance(leaf, Tensor) and (leaf.ndim == 0 or leaf.shape[0] != n):
                    raise DataError(
                        f"a batch has {n} samples and a tensor of shape {tuple(leaf.shape)}: every tensor in x and y "
                        "needs one entry a sample, samples first"
                    )
            if marks is not None:
                marks.append(_mark(x, y))
            for at in range(0, n, self._chunk):
                with (
                    each_sample_alone(self._model, self._statistics),
                    differentiable_kernels(self._model),
                    same_randomness(self._seed + at, self.device),
                ):
                    part = self._chunk_of(cut(x, at, at + self._chunk), cut(y, at, at + self._chunk))
                yield part  # outside, so that who reads it finds the model and the generator as they were

    def _chunk_of(self, x: Any, y: Any) -> Chunk:
        if self._untrusted is None:
            self._untrusted = self._compare(x, y)
        blocks = self._factor(x, y, self.factored)[0] if self.factored else {}
        rest = [name for name in self.names if name not in blocks]
        blocks |= vmapped(self._model, self._values, self._loss, x, y, rest) if rest else {}
        return Chunk({name: blocks[name] for name in self.names})

    def _factor(self, x: Any, y: Any, names: Iterable[str]) -> tuple[dict[str, Block], dict[str, Tensor]]:
        """Factors from one forward and backward pass, and the mean gradient from the same pass."""
        wanted = {name: self._values[name] for name in names}
        n = count_samples(x)
        with watching(self._model, wanted, n) as uses, torch.enable_grad():
            value = checked_loss(self._loss(call_with(self._model, self._values, x), y))
            if not value.requires_grad:
                raise ArgumentError(
                    "the loss does not depend on any of the parameters: is the model detached?"
                )
            places = [*map(get_gradient_edge, wanted.values()), *(use.edge for use in uses)]
            slopes = torch.autograd.grad(value, places, allow_unused=True)
        means = {
            name: torch.zeros_like(p) if slope is None else slope
            for (name, p), slope in zip(wanted.items(), slopes[: len(wanted)], strict=True)
        }
        with torch.no_grad():
            signals = [None if slope is None else slope * n for slope in slopes[len(wanted) :]]
            blocks = blocks_of(uses, [signals])[0]
        for name, slope in zip(wanted, slopes, strict=False):
            if slope is None:  # the loss does not see it
                blocks[name] = Dense(means[name].new_zeros(n, 1).expand(n, means[name].numel()))
        return blocks, means

    def _compare(self, x: Any, y: Any) -> set[str]:
        """Names whose factored gradients are missing, or wrong for the first or the last sample of a chunk."""
        n = count_samples(x)
        blocks, means = self._factor(x, y, self.names)
        alone = [self._factor(cut(x, i, i + 1), cut(y, i, i + 1), self.names)[1] for i in (0, n - 1)]
        self._check_mean(x, y)
        tol = 1e-3 if self.dtype == torch.float32 else 1e-8
        one = torch.eye(n, dtype=self.dtype, device=self.device)
        checks = [(means, one.mean(1)), (alone[0], one[0]), (alone[1], one[-1])]
        untrusted = {name for name in self.names if name not in blocks}
        for truth, weights in checks:
            scale = 1e-4 * float(torch.stack([g.norm() for g in truth.values()]).norm())
            for name in set(self.names) - untrusted:
                size = float(truth[name].norm())
                error = float((blocks[name].combine(weights[:, None])[:, 0] - truth[name].flatten()).norm())
                if not error <= tol * (size + scale):
                    untrusted.add(name)
        return untrusted

    def _check_mean(self, x: Any, y: Any) -> None:
        """The loss of a few samples must be the mean of their losses."""
        few = min(3, count_samples(x))
        with torch.no_grad():
            together = float(checked_loss(self._loss(apply(self._model, cut(x, 0, few)), cut(y, 0, few))))
            one_by_one = [
                float(checked_loss(self._loss(apply(self._model, cut(x, i, i + 1)), cut(y, i, i + 1))))
                for i in range(few)
            ]
        mean, total = sum(one_by_one) / few, sum(one_by_one)
        size = max(abs(value) for value in one_by_one)
        tol = (1e-3 if self.dtype == torch.float32 else 1e-8) * max(size, 1e-12)
        if abs(together - mean) > tol:
            reason = (
                "it is their sum" if abs(together - total) <= tol * few else "samples meet, or are weighted"
            )
            raise ArgumentError(
                f"loss of {few} samples is {together:.6g}, but the mean of their losses is {mean:.6g} ({reason}): "
                "gradient noise needs a loss that is the mean over samples, as with reduction='mean'"
            )
