"""Readings of a network in training, each taken on a copy and on one fixed batch."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from bolza.core.errors import ArgumentError, DataError, UnsupportedError
from bolza.diagnosis.problem import measuring_mode_
from bolza.ops.batches import apply, batches_of, count_samples, to_device
from bolza.ops.curvature import hessian_operator
from bolza.ops.errors import ConvergenceWarning
from bolza.ops.krylov import top_eigenpairs
from bolza.ops.operators import LinearOperator
from bolza.sde import gradient_noise
from bolza.stability.limits import StabilityLimit

__all__ = ["Probe", "bare", "probe_batch"]

_FIRST, _BRIEF, _WARM = 12, 6, 3  # products with the Hessian, from a random and from the last direction
_SMALL = 4  # samples, at least, on which costs are tried out
_PARTS = 4  # of the batch, whose spread gives the error of the sharpness


def bare(model: nn.Module) -> nn.Module:
    """The network below what torch wraps around it: compilation, data parallelism."""
    while isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        model = model.module
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def probe_batch(data: Any, samples: int, seed: int) -> tuple[Any, Any]:
    """A few samples of the data, always the same for one seed.

    Args:
        data: a `bolza.data.Dataset`, a pair (x, y), or an iterable of pairs, of which the first are taken.
        samples: how many, at most.
        seed: chooses them.

    Raises:
        DataError: there are fewer than two.
    """
    if hasattr(data, "train_x"):
        data = (data.train_x, data.train_y)
    with torch.random.fork_rng(devices=[]):  # a shuffling loader draws from the global generator
        torch.manual_seed(seed)
        parts, count = [], 0
        for x, y in batches_of(data):
            parts.append((x, y))
            count += count_samples(x)
            if count >= samples:
                break
    if count < 2:
        raise DataError("data has fewer than two samples: covariances need at least 2, error bars 32 or more")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(count, generator=generator)[:samples].sort().values

    def joined(*leaves: Any) -> Any:
        if not isinstance(leaves[0], Tensor):
            return leaves[0]
        whole = leaves[0] if len(leaves) == 1 else torch.cat(leaves)
        return whole[chosen.to(whole.device)]

    return _pytree.tree_map(joined, parts[0], *parts[1:])


@dataclass(frozen=True)
class Sharpness:
    """The largest curvature, beside the limit of the optimizer.

    Attributes:
        value: λ, of the Hessian or, for an adaptive method, of the preconditioned one; a lower bound up to its error.
        error: standard error over parts of the batch and error of the iteration, together.
        fraction: κ/c: above 1 the update is unstable along the steepest direction; None without a known limit.
        fraction_error: its error.
        bound: the limit for ``value``.
    """

    value: float
    error: float
    fraction: float | None
    fraction_error: float | None
    bound: float | None


@dataclass(frozen=True)
class Noise:
    """The noise of the gradient, from the samples of the batch.

    Attributes:
        trace: tr Σ.
        trace_error: its standard error.
        snr: |∇f|²/tr Σ of one sample; of a batch of B, B times this.
        snr_error: its standard error.
        scale: tr Σ/|∇f|², in samples.
        scale_error: its standard error.
    """

    trace: float
    trace_error: float
    snr: float
    snr_error: float
    scale: float
    scale_error: float


class Probe:
    """A private copy of a network that follows it, and the readings that are taken on it.

    Args:
        model: the network in training; it is only read.
        names: of the parameters that are trained.
        loss: loss(outputs, targets), a mean over samples.
        batch: inputs and targets.
        seed: of random directions, and of what the network draws.

    Raises:
        UnsupportedError: the network cannot be copied.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        loss: Callable[[Any, Any], Tensor],
        batch: tuple[Any, Any],
        seed: int,
    ) -> None:
        try:
            self.model = copy.deepcopy(model)
        except Exception as error:  # whatever the attributes of the user's module raise
            raise UnsupportedError(
                f"model {type(model).__name__} cannot be copied ({str(error).splitlines()[0]}), and it is probed on a "
                "copy so that it stays as it is: do not keep locks, files or computed tensors in its attributes"
            ) from error
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in self.model.parameters()):
            self.model.float()  # curvature is lost to rounding in half precision
            batch = _pytree.tree_map(_single, batch)
        measuring_mode_(self.model)
        self.model.zero_grad(set_to_none=True)
        self._watched = model
        named = dict(self.model.named_parameters())
        self.params = [named[name] for name in names]
        self.names, self.loss, self.seed = list(names), loss, seed
        self.batch = to_device(batch, self.params[0].device)
        self.top: Tensor | None = None
        self._mean: bool | None = None

    @property
    def samples(self) -> int:
        """Samples in the batch."""
        return count_samples(self.batch[0])

    @torch.no_grad()
    def follow(self) -> None:
        """Take over the present values of the network."""
        live = [*self._watched.parameters(), *self._watched.buffers()]
        for own, value in zip([*self.model.parameters(), *self.model.buffers()], live, strict=True):
            own.copy_(value)

    def hessian(self, limit: StabilityLimit | None, batch: tuple[Any, Any] | None = None) -> LinearOperator:
        """P^{−1/2} (H + W) P^{−1/2}, W the weight decay."""
        op = hessian_operator(self.model, self.loss, batch or self.batch, self.names, seed=self.seed)
        if limit is None:
            return op
        scale = None if limit.plain else limit.scale().to(op.dtype)
        decay = limit.decay.to(op.dtype) if bool(limit.decay.any()) else None

        def product(v: Tensor) -> Tensor:
            u = v if scale is None else scale * v
            h = op @ u
            if decay is not None:
                h = h + decay * u
            return h if scale is None else scale * h

        return LinearOperator(product, op.size, op.dtype, op.device)

    def try_out(self, clock: Callable[[], float], allowance: float) -> dict[str, float]:
        """Guess what readings will cost, from a product and a covariance on growing parts of the batch.

        Args:
            clock: seconds.
            allowance: seconds for each of the two, beyond which no larger part is tried.
        """

        def product(part: tuple[Any, Any]) -> None:
            op = self.hessian(None, part)
            float((op @ torch.ones(op.size, dtype=op.dtype, device=op.device))[0])

        def covariance(part: tuple[Any, Any]) -> None:
            gradient_noise(self.model, self.loss, part, self.names, seed=self.seed).trace()

        out, whole = {}, self.samples
        for name, work, times in (("sharpness", product, _BRIEF + 2), ("noise", covariance, 1)):
            size, begun = min(whole, max(_SMALL, whole // 8)), clock()
            try:
                work(cut(self.batch, 0, size))  # the first time pays for what later ones find prepared
                while True:
                    start = clock()
                    work(cut(self.batch, 0, size))
                    seconds = clock() - start
                    out[name] = times * seconds * whole / size
                    if size == whole or clock() - begun + 2 * seconds > allowance:
                        break
                    size = min(whole, 2 * size)
            except Exception:  # the reading itself will say why
                continue
        return out

    def _is_mean(self) -> bool:
        """Whether the loss is anything but the sum over samples, which would depend on the size of the batch."""
        place = self.params[0].device
        with torch.random.fork_rng(devices=[] if place.type == "cpu" else [place]), torch.no_grad():
            half = min(2, self.samples // 2)
            x, y = cut(self.batch, 0, 2 * half)
            whole = apply(self.model, x), y
            parts = [whole, cut(whole, 0, half), cut(whole, half, 2 * half)]
            both, one, other = (float(self.loss(*part)) for part in parts)
        total, tol = one + other, 1e-3 * max(abs(one), abs(other))
        return not (abs(both - total) <= tol < abs(both - total / 2))

    def sharpness(self, limit: StabilityLimit | None, brief: bool = False) -> Sharpness:
        """The largest eigenvalue by a few steps of Lanczos from the last direction.

        Its error has two parts: that of the iteration, and the spread of vᵀHv over parts of the batch.

        Args:
            limit: of the optimizer, if there is one.
            brief: take fewer steps where there is no last direction.
        """
        if self._mean is None:
            self._mean = self._is_mean()
        if not self._mean:
            raise ArgumentError(
                "loss is the sum over samples, whose curvature grows with the batch: give the mean, as with "
                "reduction='mean', to the watch and to the run"
            )
        op, first = self.hessian(limit), _BRIEF if brief else _FIRST
        generator = torch.Generator().manual_seed(self.seed)
        with warnings.catch_warnings():  # the error is told beside the value
            warnings.simplefilter("ignore", ConvergenceWarning)
            found = top_eigenpairs(
                op,
                1,
                tol=1e-2,
                max_products=min(first if self.top is None else _WARM, op.size),
                which="largest algebraic",
                start=self.top,
                generator=generator,
            )
        v = found.eigenvectors[:, 0]
        self.top = v.detach()
        kappa, error = float(found.eigenvalues[0]), float(found.errors[0])
        n = self.samples
        parts = min(_PARTS, n // 4)
        if parts > 1:
            values = []
            for i in range(parts):
                part = cut(self.batch, n * i // parts, n * (i + 1) // parts)
                values.append(float(v @ (self.hessian(limit, part) @ v)))
            spread = torch.tensor(values, dtype=torch.float64).std().item() / math.sqrt(parts)
            error = math.hypot(error, spread)
        if limit is None:
            return Sharpness(kappa, error, None, None, None)
        bound = limit.bound
        known = bound if math.isfinite(bound) else None
        return Sharpness(kappa, error, kappa / bound, error / bound, known)

    def noise(self) -> Noise:
        """The covariance of the gradients of single samples."""
        found = gradient_noise(self.model, self.loss, self.batch, self.names, seed=self.seed)
        trace, snr, scale = found.trace(), found.snr(), found.noise_scale()
        return Noise(trace.value, trace.error, snr.value, snr.error, scale.value, scale.error)


def _single(leaf: Any) -> Any:
    return leaf.float() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def cut(batch: tuple[Any, Any], start: int, stop: int) -> tuple[Any, Any]:
    """Samples ``start`` to ``stop`` of a batch."""
    part: tuple[Any, Any] = _pytree.tree_map(
        lambda leaf: leaf[start:stop] if isinstance(leaf, Tensor) and leaf.ndim else leaf, batch
    )
    return part
