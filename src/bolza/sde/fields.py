r"""What a modified equation asks of an objective: its gradient, curvature and gradient noise at many points at once.

    ∇f(x),    ∇²f(x) v,    Σ(x)^{1/2} ξ,    diag Σ(x),     x: (..., d), the leading dimensions are paths

Of a network f is the mean loss over the data, and Σ^{1/2} ξ = N^{−1/2} Σ_i (ξ_i − ξ̄) ∇ℓ_i is the gradient of a weighted
loss: a draw of the noise costs one backward pass, whatever the number of samples, and no gradient of a single sample
is formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils import _pytree

from bolza.core.errors import ArgumentError, ShapeError, UnsupportedError
from bolza.ops.batches import (
    Data,
    Loss,
    batches_of,
    checked_loss,
    count_samples,
    read,
    select_parameters,
    unflatten,
)
from bolza.ops.factors import call_with, cut
from bolza.ops.noise import PerSampleGradients
from bolza.ops.replay import differentiable_kernels, frozen_statistics, same_randomness

__all__ = ["Field", "Network", "Potential", "PotentialNoise", "field_of"]

PotentialNoise: TypeAlias = float | Tensor | Callable[[Tensor, Tensor], Tensor]
"""Covariance Σ of the gradient noise: σ², its diagonal (d,), a matrix (d, d), or (x, ξ) → Σ(x)^{1/2} ξ."""

_ROOM = 2**17  # samples times paths in one pass through a network
_BATCH_NORM = nn.modules.batchnorm._BatchNorm


class Field(Protocol):
    """An objective at many points: x has shape (..., d)."""

    @property
    def samples(self) -> int | None:
        """Size N of the data set, if there is one."""
        ...

    def value(self, x: Tensor) -> Tensor:
        """f, shape (...)."""
        ...

    def gradient(self, x: Tensor) -> Tensor:
        """∇f, shape of x."""
        ...

    def products(self, x: Tensor, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """∇f and ∇²f v; v = ∇f by default."""
        ...

    def noise(self, x: Tensor, xi: Tensor) -> Tensor:
        """Σ(x)^{1/2} ξ, shape of x."""
        ...

    def noise_shape(self, x: Tensor) -> tuple[int, ...]:
        """Shape of ξ for positions x."""
        ...

    def variance(self, x: Tensor) -> Tensor:
        """Diag Σ(x), shape of x."""
        ...


class Potential:
    """An objective given as a function, with the covariance of its gradient noise.

    Args:
        function: x (..., d) → f (...), each point by itself.
        noise: see :data:`PotentialNoise`.
        samples: size N of the data set behind it, if there is one.

    Raises:
        ArgumentError: the noise is negative, or not symmetric.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], noise: PotentialNoise, samples: int | None = None
    ) -> None:
        self.function, self.samples = function, samples
        self._root: Tensor | Callable[[Tensor, Tensor], Tensor]
        self.elementwise = False
        if not isinstance(noise, Tensor) and callable(noise):
            self._root = noise
            return
        covariance = torch.as_tensor(noise, dtype=torch.float64)
        if covariance.ndim < 2:
            if bool((covariance < 0).any()) or not bool(covariance.isfinite().all()):
                raise ArgumentError(f"noise is {noise}: a variance must be finite and not negative")
            self._root, self.elementwise = covariance.sqrt(), True
            return
        square = covariance.ndim == 2 and covariance.shape[0] == covariance.shape[1]
        if not square or not torch.allclose(covariance, covariance.mT, atol=1e-10):
            raise ArgumentError(f"noise has shape {tuple(covariance.shape)}: give a symmetric matrix (d, d)")
        values, vectors = torch.linalg.eigh(covariance)
        if float(values[0]) < -1e-10 * float(values.abs().max()):
            raise ArgumentError(
                f"noise has the eigenvalue {float(values[0]):.3g}: a covariance has none below 0"
            )
        self._root = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT

    def value(self, x: Tensor) -> Tensor:
        """See :class:`Field`."""
        f = self.function(x)
        if not isinstance(f, Tensor) or f.shape != x.shape[:-1]:
            found = f"shape {tuple(f.shape)}" if isinstance(f, Tensor) else f"a {type(f).__name__}"
            raise ShapeError(
                f"objective returned {found} for points of shape {tuple(x.shape)}: it must return one number a "
                f"point, {tuple(x.shape[:-1])}"
            )
        return f

    def gradient(self, x: Tensor) -> Tensor:
        """See :class:`Field`."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (g,) = torch.autograd.grad(self._total(x), x)
        return g

    def products(self, x: Tensor, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :class:`Field`."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (g,) = torch.autograd.grad(self._total(x), x, create_graph=True)
            return g.detach(), _bent(g, x, v)

    def _total(self, x: Tensor) -> Tensor:
        total = self.value(x).sum()
        if not total.requires_grad:
            raise ArgumentError(
                "objective has no gradient: its value does not depend on x, or was computed outside torch"
            )
        return total

    def noise(self, x: Tensor, xi: Tensor) -> Tensor:
        """See :class:`Field`."""
        if not isinstance(self._root, Tensor):
            return self._root(x, xi)
        root = self._root.to(x)
        return root * xi if self.elementwise else xi @ root

    def noise_shape(self, x: Tensor) -> tuple[int, ...]:
        """See :class:`Field`."""
        return tuple(x.shape)

    def variance(self, x: Tensor) -> Tensor:
        """See :class:`Field`."""
        if isinstance(self._root, Tensor):
            root = self._root.to(x)
            return (root.square() if self.elementwise else root.square().sum(0)).expand_as(x)
        d = x.shape[-1]
        axes = torch.eye(d, dtype=x.dtype, device=x.device).reshape(d, *[1] * (x.ndim - 1), d)
        return self._root(x.expand(d, *x.shape), axes.expand(d, *x.shape)).square().sum(0)


def _bent(g: Tensor, x: Tensor, v: Tensor | None) -> Tensor:
    """∇²f v from a gradient that still has its graph."""
    if not g.requires_grad:
        return torch.zeros_like(x)
    (bent,) = torch.autograd.grad(g, x, g.detach() if v is None else v.detach(), allow_unused=True)
    return torch.zeros_like(x) if bent is None else bent


class Network:
    """The mean loss of a network over data, as a function of its flat parameters.

    Args:
        model: the network; it is never changed. Dropout is off; batch norm in training mode normalises each batch of
            ``data`` by its own statistics, which move with the parameters.
        loss: ``loss(prediction, y)``, the mean over samples of a loss of each.
        data: one pair ``(x, y)`` or an iterable of batches that repeats.
        frozen: take the noise at the present parameters of the model for good.

    Raises:
        ArgumentError: the loss is not a mean over samples.
        DivergenceError: it is not finite.
        ShapeError: it is not a scalar.
    """

    def __init__(self, model: nn.Module, loss: Loss, data: Data, *, frozen: bool = False) -> None:
        self._model, self._loss, self._batches = model, loss, batches_of(data)
        self._params = select_parameters(model)
        self._like = [p.detach() for p in self._params.values()]
        self.device, self.dtype = self._like[0].device, self._like[0].dtype
        self.start = torch.cat([p.reshape(-1) for p in self._like])
        self.samples: int = sum(count_samples(x) for x, _ in read(self._batches, self.device))
        self._batched = True
        self._fixed: PerSampleGradients | None = None
        if frozen:
            self._fixed = PerSampleGradients(model, loss, self._batches)
        with torch.no_grad(), self._quiet():
            for x, y in read(self._batches, self.device):
                self._check_mean(x, y)
                break

    def _check_mean(self, x: Any, y: Any) -> None:
        together = float(checked_loss(self._loss(self._output(self.start, x), y)))
        apart = self._losses(self.start, x, y)
        mean, tol = float(apart.mean()), 1e-3 if self.dtype == torch.float32 else 1e-8
        if not abs(together - mean) <= tol * max(float(apart.abs().max()), 1e-12):
            raise ArgumentError(
                f"loss of a batch is {together:.6g}, but the mean of the losses of its samples is {mean:.6g}: the "
                "equation needs a loss that is the mean over samples, as with reduction='mean'"
            )

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Evaluate without dropout, and without a trace in the model."""
        switched = [m for m in self._model.modules() if m.training and not isinstance(m, _BATCH_NORM)]
        # the fused encoder layer of evaluation mode cannot be batched over parameters
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            for layer in switched:
                layer.training = False
            with (
                frozen_statistics(self._model),
                differentiable_kernels(self._model),
                same_randomness(0, self.device),
            ):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            for layer in switched:
                layer.training = True

    def _output(self, theta: Tensor, x: Any) -> Any:
        values = dict(zip(self._params, unflatten(theta, self._like), strict=True))
        return call_with(self._model, values, x)

    def _losses(self, theta: Tensor, x: Any, y: Any) -> Tensor:
        """Losses (n,) of the samples of a batch at one point (d,)."""
        out = self._output(theta, x)

        def one(prediction: Any, target: Any) -> Tensor:
            return self._loss(_lone(prediction), _lone(target)).reshape(())

        losses: Tensor = vmap(one, in_dims=(_axes(out), _axes(y)))(out, y)
        return losses

    def _all_losses(self, theta: Tensor, x: Any, y: Any) -> Tensor:
        """The same at several points (p, d): (p, n); one by one where the network has an operation without a batch."""
        if len(theta) > 1 and self._batched:
            try:
                together: Tensor = vmap(lambda point: self._losses(point, x, y), randomness="different")(
                    theta
                )
                return together
            except (RuntimeError, NotImplementedError) as error:
                if "vmap" not in str(error) and "atching rule" not in str(error):
                    raise
                self._batched = False
        return torch.stack([self._losses(point, x, y) for point in theta])

    def _in_chunks(self, flat: Tensor, work: Callable[[slice], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        step = max(1, _ROOM // self.samples)
        if not len(flat):  # no paths: nothing to send through the network, and results of any shape are empty
            return flat, flat
        parts = [work(slice(at, at + step)) for at in range(0, len(flat), step)]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def _weighted(self, theta: Tensor, weights: Tensor | None) -> Tensor:
        """Σ_i w_i ℓ_i, (p,), with weights (p, N); the mean without."""
        total, at = theta.new_zeros(len(theta)), 0
        for x, y in read(self._batches, self.device):
            losses = self._all_losses(theta, x, y)
            n = losses.shape[1]
            w = 1 / self.samples if weights is None else weights[:, at : at + n]
            total, at = total + (losses * w).sum(1), at + n
        return total

    def _rows(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.start.numel():
            raise ShapeError(
                f"points have {x.shape[-1]} coordinates, but the network has {self.start.numel()} parameters"
            )
        return x.detach().reshape(-1, x.shape[-1])

    def value(self, x: Tensor) -> Tensor:
        """See :class:`Field`."""
        flat = self._rows(x)
        with torch.no_grad(), self._quiet():
            f = self._in_chunks(flat, lambda part: (self._weighted(flat[part], None),))[0]
        return f.reshape(x.shape[:-1])

    def _slope(self, x: Tensor, weights: Tensor | None) -> Tensor:
        flat = self._rows(x)

        def work(part: slice) -> tuple[Tensor, ...]:
            theta = flat[part].detach().requires_grad_()
            f = self._weighted(theta, None if weights is None else weights[part])
            return torch.autograd.grad(f.sum(), theta)

        with torch.enable_grad(), self._quiet():
            return self._in_chunks(flat, work)[0].reshape(x.shape)

    def gradient(self, x: Tensor) -> Tensor:
        """See :class:`Field`."""
        return self._slope(x, None)

    def products(self, x: Tensor, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :class:`Field`."""
        flat, directions = self._rows(x), None if v is None else self._rows(v)

        def work(part: slice) -> tuple[Tensor, ...]:
            theta = flat[part].detach().requires_grad_()
            (g,) = torch.autograd.grad(self._weighted(theta, None).sum(), theta, create_graph=True)
            return g.detach(), _bent(g, theta, None if directions is None else directions[part])

        with torch.enable_grad(), self._quiet():
            g, bent = self._in_chunks(flat, work)
        return g.reshape(x.shape), bent.reshape(x.shape)

    def noise(self, x: Tensor, xi: Tensor) -> Tensor:
        """See :class:`Field`."""
        weights = ((xi - xi.mean(-1, keepdim=True)) / math.sqrt(self.samples)).reshape(-1, self.samples)
        if self._fixed is not None and len(weights):
            return self._fixed.combine(weights.mT).mT.reshape(x.shape)
        return self._slope(x, weights)

    def noise_shape(self, x: Tensor) -> tuple[int, ...]:
        """See :class:`Field`."""
        return (*x.shape[:-1], self.samples)

    def variance(self, x: Tensor) -> Tensor:
        """See :class:`Field`."""
        flat = self._rows(x) if self._fixed is None else self.start[None]
        norms = [m for m in self._model.modules() if isinstance(m, _BATCH_NORM)]
        if any(m.training or m.running_mean is None for m in norms):
            raise UnsupportedError(
                "the variance of single gradients needs samples that do not meet, but the model has a batch norm in "
                "training mode, or without running averages: call model.eval() first, or track them"
            )

        def one(theta: Tensor, x: Any, y: Any) -> Tensor:
            return self._loss(self._output(theta, _lone(x)), _lone(y)).reshape(())

        def work(part: slice) -> tuple[Tensor, ...]:
            theta = flat[part]
            total, squares = torch.zeros_like(theta), torch.zeros_like(theta)
            step = max(1, 2**24 // theta.numel())
            for x, y in read(self._batches, self.device):
                for at in range(0, count_samples(x), step):
                    xs, ys = cut(x, at, at + step), cut(y, at, at + step)
                    each = vmap(vmap(grad(one), in_dims=(0, _axes(xs), _axes(ys))), in_dims=(0, None, None))
                    # a copy of the parameters for each sample: nn.LSTM writes into what it makes of them
                    g = each(theta[:, None].expand(-1, count_samples(xs), -1), xs, ys)
                    total, squares = total + g.sum(1), squares + g.square().sum(1)
            return ((squares / self.samples - (total / self.samples).square()).clamp_min(0),)

        with self._quiet():
            out = self._in_chunks(flat, work)[0]
        return out.expand(x.shape) if self._fixed is not None else out.reshape(x.shape)


def _lone(tree: Any) -> Any:
    """One sample as a batch."""
    return _pytree.tree_map(lambda leaf: leaf[None] if isinstance(leaf, Tensor) else leaf, tree)


def _axes(tree: Any) -> Any:
    return _pytree.tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, tree)


def field_of(
    objective: nn.Module | Callable[[Tensor], Tensor],
    loss: Loss | None = None,
    data: Data | None = None,
    noise: str | PotentialNoise | None = None,
    samples: int | None = None,
) -> Network | Potential:
    """The field of a network with loss and data, or of a potential x (..., d) → f (...).

    Raises:
        ArgumentError: an argument is missing, or does not belong to this kind of objective.
    """
    if isinstance(objective, nn.Module):
        if loss is None or data is None:
            raise ArgumentError("objective is a network, but loss or data is missing: give both")
        if not (noise is None or (isinstance(noise, str) and noise in ("local", "frozen"))):
            raise ArgumentError(f"noise is {noise!r}: for a network choose 'local' or 'frozen'")
        return Network(objective, loss, data, frozen=noise == "frozen")
    if loss is not None or data is not None:
        raise ArgumentError("objective is a potential, but loss or data is given: leave them out")
    if isinstance(noise, str):
        raise ArgumentError(f"noise is {noise!r}: for a potential give its covariance")
    return Potential(objective, 0.0 if noise is None else noise, samples)
