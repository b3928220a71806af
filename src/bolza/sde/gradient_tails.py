r"""Are the gradients of mini-batches heavy-tailed? Layer by layer, from the gradients of single samples.

    noise of a draw = (1/B) Σ_{i in the batch} ∇ℓ_i − ∇f,      the batch drawn anew each time, θ fixed

The gradients of the samples are computed once, for some coordinates of each layer; batches of any size are then
sums of rows, so that thousands of draws cost less than one pass over the data. The draws are independent and
centred at the exact full gradient, which is what the estimators need, and what gradients recorded along a run
do not give.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.core.errors import ArgumentError, DataError
from bolza.core.reference import cites
from bolza.ops.batches import Data, Loss
from bolza.ops.noise import PerSampleGradients
from bolza.ops.persample import Block, Dense, Lookup, Outer, Sum
from bolza.sde.block_sums import SIMSEKLI
from bolza.sde.tails import TailReport, tail_report

__all__ = ["GradientTails", "batch_noise", "gradient_tails"]

_ROOM = 2**24  # numbers in a temporary


def _entries(block: Block, index: Tensor) -> Tensor:
    """Some elements of the gradients of a parameter, of every sample: (n, k)."""
    if isinstance(block, Dense):
        return block.values[:, index]
    if isinstance(block, Sum):
        return torch.stack([_entries(part, index) for part in block.parts]).sum(0)
    if isinstance(block, Outer):
        width = block.inputs.shape[2]
        x, p = block.inputs[:, :, index % width], block.signals[:, :, index // width]
        return (x * p).sum(1)
    if isinstance(block, Lookup):
        width = block.signals.shape[2]
        here = block.index[:, :, None] == index // width
        return (here * block.signals[:, :, index % width]).sum(1)
    return block.dense()[:, index]


def _rows(block: Block, index: Tensor) -> Tensor:
    """The same a few samples at a time, where what is summed over would be large."""
    each = max(1, max(t.numel() for t in block.tensors()) // block.count) + index.numel()
    if isinstance(block, Outer | Lookup):
        each += block.signals.shape[1] * index.numel()
    step = max(1, _ROOM // each)
    parts = [_entries(block.rows(at, at + step), index) for at in range(0, block.count, step)]
    return torch.cat(parts)


@dataclass(frozen=True)
class GradientTails:
    """Tails of mini-batch gradient noise. Made by :func:`gradient_tails`.

    Attributes:
        whole: reading over the chosen coordinates of all layers.
        batch_size: samples in a batch.
        draws: number of batches.
    """

    whole: TailReport
    batch_size: int
    draws: int
    _samples: Tensor = field(repr=False)  # gradients, (N, coordinates)
    _noise: Tensor = field(repr=False)  # (draws, coordinates)
    _columns: dict[str, slice] = field(repr=False)
    _replacement: bool = field(repr=False)
    _freedom: float = field(repr=False)

    @cached_property
    def layers(self) -> dict[str, TailReport]:
        """Reading of each layer, by module name; their levels add up to that of ``whole``."""
        found = {}
        for name, where in self._columns.items():
            try:
                found[name] = tail_report(
                    self._noise[:, where],
                    0,
                    centre="none",
                    freedom=self._freedom,
                    level=self.whole.level / len(self._columns),
                )
            except DataError:  # nothing varies there
                continue
        return found

    @property
    def left_out(self) -> tuple[str, ...]:
        """Layers without a coordinate to read: no noise, or the same value in most draws."""
        return tuple(name for name in self._columns if name not in self.layers)

    @property
    def heavy(self) -> tuple[str, ...]:
        """Names of the layers that are called heavy-tailed."""
        return tuple(name for name, report in self.layers.items() if report.heavy)

    def at(
        self, batch_size: int, draws: int | None = None, *, generator: torch.Generator | None = None
    ) -> GradientTails:
        """The same for another batch size, without another pass over the data.

        Args:
            batch_size: samples in a batch.
            draws: number of batches; as many as before without it.
            generator: of the batches.
        """
        return _read(
            self._samples,
            self._columns,
            batch_size,
            self.draws if draws is None else draws,
            self._replacement,
            self._freedom,
            self.whole.level,
            generator,
        )

    def __str__(self) -> str:
        """The verdict in one line, and one line a layer."""
        lines = [f"batches of {self.batch_size}, {self.draws} draws: {self.whole}"]
        lines += [
            f"  {name or 'model'}: {report} ({report.mixture.coordinates} of "
            f"{report.coordinates.index.numel()} coordinates)"
            for name, report in self.layers.items()
        ]
        lines += [f"  {name or 'model'}: no noise that varies from draw to draw" for name in self.left_out]
        return "\n".join(lines)


def batch_noise(
    samples: Tensor,
    batch_size: int,
    draws: int,
    *,
    replacement: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Deviations of batch means from the mean of all samples.

    Args:
        samples: one row a sample, ``(N, k)``.
        batch_size: rows in a batch.
        draws: number of batches.
        replacement: whether a batch is drawn with replacement.
        generator: of the batches.

    Returns:
        ``(draws, k)``.

    Raises:
        ArgumentError: the batch size or the number of draws is out of range.

    Example:
        >>> batch_noise(torch.eye(4), 4, 2, replacement=False)      # all samples: no noise
        tensor([[0., 0., 0., 0.],
                [0., 0., 0., 0.]])
    """
    n = samples.shape[0]
    if batch_size < 1 or (not replacement and batch_size > n):
        raise ArgumentError(f"batch_size is {batch_size}: it must be between 1 and the {n} samples")
    if draws < 1:
        raise ArgumentError(f"draws is {draws}: at least one batch must be drawn")
    device = samples.device if generator is None else generator.device
    centred = samples - samples.mean(0)
    step = max(1, _ROOM // (batch_size if replacement else n))
    out = []
    for at in range(0, draws, step):
        count = min(step, draws - at)
        if replacement:
            index = torch.randint(n, (count, batch_size), device=device, generator=generator)
        else:
            index = torch.rand(count, n, device=device, generator=generator).topk(batch_size).indices
        out.append(F.embedding_bag(index.to(samples.device), centred, mode="mean"))
    return torch.cat(out)


def _read(
    samples: Tensor,
    columns: dict[str, slice],
    batch_size: int,
    draws: int,
    replacement: bool,
    freedom: float,
    level: float,
    generator: torch.Generator | None,
) -> GradientTails:
    if generator is None:
        generator = torch.Generator(samples.device).manual_seed(0)
    if not replacement and batch_size == samples.shape[0]:
        raise ArgumentError(f"batch_size is {batch_size}: a batch of all samples has no noise")
    noise = batch_noise(samples, batch_size, draws, replacement=replacement, generator=generator)
    whole = tail_report(noise, 0, centre="none", freedom=freedom, level=level, generator=generator)
    return GradientTails(whole, batch_size, draws, samples, noise, columns, replacement, freedom)


@cites(SIMSEKLI)
def gradient_tails(
    model: nn.Module,
    loss: Loss,
    data: Data,
    batch_size: int = 32,
    draws: int = 2500,
    *,
    params: Iterable[str] | None = None,
    coordinates: int = 64,
    replacement: bool = True,
    freedom: float = 3.0,
    level: float = 0.01,
    chunk: int = 256,
    memory: int = 2**30,
    generator: torch.Generator | None = None,
) -> GradientTails:
    r"""Tail index of the noise of mini-batch gradients, of the whole network and of each layer, with controls.

    Costs one forward and backward pass over ``data``; then batches are drawn from the per-sample gradients of
    ``coordinates`` randomly chosen parameters of each layer. The readings and their controls are those of
    :func:`bolza.sde.tail_report`; the model is evaluated as in :func:`bolza.sde.gradient_noise`.

    The N samples are a finite population, so the sum of very many batches is Gaussian whatever the data: what is
    read is whether it is so already for sums of up to √draws batches.

    Args:
        model: the network.
        loss: ``loss(prediction, y)``, a mean over samples.
        data: one pair ``(x, y)``, or an iterable of batches that repeats.
        batch_size: B.
        draws: number of batches; a few hundred at least.
        params: names of parameters or modules; all that have ``requires_grad`` by default.
        coordinates: parameters looked at in each layer, at most.
        replacement: whether batches are drawn with replacement.
        freedom: degrees of freedom of the Student law that bounds "finite variance".
        level: probability of a false "heavy-tailed", for the whole and for all layers together.
        chunk: samples in one pass.
        memory: bytes that layer inputs and costates may take; beyond it there is a second pass.
        generator: of coordinates and batches; a fixed seed by default.

    Returns:
        GradientTails; its ``at`` reads other batch sizes without another pass.

    Raises:
        ArgumentError: a number is out of range, or the loss is not a mean over samples.
        DataError: fewer than two samples, or no gradient varies.
        UnsupportedError: the gradients of single samples cannot be had.

    Reference: Şimşekli, Sagun & Gürbüzbalaban (2019), §4. Departures: coordinates are not pooled; independent
    batches at fixed parameters; controls.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net, x = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(200, 5)
        >>> found = gradient_tails(net, nn.functional.mse_loss, (x, x.sum(1, keepdim=True)), 64, draws=900)
        >>> found.whole.verdict, list(found.layers)
        ('Gaussian', ['0', '2'])
    """
    if coordinates < 1:
        raise ArgumentError(f"coordinates is {coordinates}: look at one parameter of each layer at least")
    gradients = PerSampleGradients(model, loss, data, params, chunk=chunk, memory=memory)
    if generator is None:
        generator = torch.Generator(gradients.device).manual_seed(0)
    layers: dict[str, list[int]] = {}
    for i, name in enumerate(gradients.names):
        layers.setdefault(name.rpartition(".")[0], []).append(i)
    chosen: dict[str, Tensor] = {}  # by parameter, the elements looked at
    columns: dict[str, slice] = {}
    ordered, at = [], 0
    for layer, members in layers.items():
        sizes = torch.tensor([gradients.sizes[i] for i in members])
        total = int(sizes.sum())
        picked = torch.randperm(total, generator=generator, device=generator.device)[:coordinates].cpu()
        starts = sizes.cumsum(0) - sizes
        for i, start, size in zip(members, starts.tolist(), sizes.tolist(), strict=True):
            inside = picked[(picked >= start) & (picked < start + size)].sort().values - start
            if len(inside):
                chosen[gradients.names[i]] = inside.to(gradients.device)
                ordered.append(gradients.names[i])
        columns[layer] = slice(at, at + len(picked))
        at += len(picked)
    rows = [
        torch.cat([_rows(part.blocks[name], chosen[name]) for name in ordered], 1)
        for part in gradients.chunks()
    ]
    samples = torch.cat(rows)
    return _read(samples, columns, batch_size, draws, replacement, freedom, level, generator)
