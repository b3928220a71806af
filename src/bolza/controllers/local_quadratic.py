r"""What a network looks like to SGD here: a quadratic with noise along a few Ritz directions, and the plan it asks for.

With g the gradient and z a sample of the gradient noise, both from two halves of a few samples, block Lanczos on the
Hessian from (g, z) gives Ritz values θ_j with vectors v_j, and

    curvature λ_j = |θ_j|,   offset x_j² = (g·v_j)²/λ_j²,   noise c_j = (z·v_j)²/B

which is Gauss quadrature: gradient descent and its noise on the full quadratic are reproduced for as many steps as
there were products, and for more where the spectrum is spread.

Reference: Golub & Meurant (1994), *Matrices, moments and quadrature*, for Lanczos as quadrature; Li, Tai & E (2017),
§4.1, for the controlled moments.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from bolza.controllers.moments import LI
from bolza.controllers.rate_plan import RatePlan, plan_rates
from bolza.core.errors import ArgumentError, ConvergenceWarning, UnsupportedError
from bolza.core.reference import cites
from bolza.ops.batches import Data, Loss, batches_of, count_samples, select_parameters, unflatten
from bolza.ops.curvature import gradient, hessian_operator
from bolza.ops.krylov import top_eigenpairs
from bolza.ops.operators import LinearOperator

__all__ = ["LocalModel", "local_model"]

_FLAT = 1e-6  # curvature below this share of the largest counts as this share
_QUIET = 0.03  # least share of the present noise that a plan counts on
_FLATTER = 0.3  # least curvature of the way down, as a share of that of now
_CERTAIN = 0.1  # share of the measured gradient that is kept where its noise would explain all of it
_NODES, _SHARE = 6, 1e-3  # of the mixture that slows a mode down, and the least share of one that is kept
SPREAD_COST = 3  # gradients of a directional curvature


@dataclass(frozen=True)
class LocalModel:
    """Curvature, gradient and gradient noise of a network along a few Ritz directions.

    Attributes:
        curvature: Ritz values θ of the Hessian, ``(k,)``, float64, the largest first.
        slope: gradient along each direction, ``(k,)``.
        noise: square of the sampled noise of one sample along each, ``(k,)``; their sum estimates tr Σ.
        loss: loss of the samples.
        samples: how many there were.
        spread: variance of the curvature of single samples along the steepest direction, over its squared mean.
        limit: largest rate that is stable in mean square with batches of the given size, along the steepest direction.
        sample_gradients: gradients of single samples that this took; a Hessian product counts as two.
    """

    curvature: Tensor
    slope: Tensor
    noise: Tensor
    loss: float
    samples: int
    spread: float
    limit: float
    sample_gradients: int

    def plan(
        self,
        steps: int,
        batch_size: int,
        lr_max: float,
        momentum: float = 0.0,
        pieces: int = 20,
        *,
        slowing: bool = False,
    ) -> RatePlan:
        """Rates of the remaining steps.

        Two things that a quadratic of now would get wrong are put right. The gradient is taken to last until the loss
        is zero: where the quadratic has its bottom higher, the way down is flatter by that ratio, but by three at most,
        for where labels are noisy the bottom is not at zero. And noise falls along with the loss: a first plan has the
        noise of now, the second one scales it, piece by piece, by the loss that the first one leaves.

        A quadratic of a few modes comes down exponentially, a network does not. With ``slowing`` each mode comes down
        like 1/(1 + 2λ Σ η), at first as fast as it would anyway: for optimizers that soon go farther than there were
        products, by momentum or a preconditioner.
        """
        curved = self.curvature.abs()
        curved = curved.clamp_min(_FLAT * float(curved.max()))
        sure = self.slope.square() - self.noise / self.samples
        sure = sure.maximum(_CERTAIN * self.slope.square())
        depth = float((sure / curved).sum()) / 2
        way = curved * min(1.0, max(_FLATTER, depth / self.loss) if self.loss > 0 else 1.0)
        offset = sure.sqrt() / way
        if slowing:
            way, offset = _slowed(way, offset, float(curved.max()))
        # the mean goes its own way, noise has the curvature of now: second moments add up
        modes = torch.cat([way, curved])
        offset = torch.cat([offset, torch.zeros_like(curved)])
        noise = torch.cat([torch.zeros_like(way), self.noise / batch_size])
        settings: dict[str, Any] = {"steps": steps, "lr_max": lr_max, "momentum": momentum}
        first = plan_rates(modes, noise, offset, pieces=pieces, iterations=15, **settings)
        if not self.loss > 0:
            return first
        left = (1 - (first.losses[0] - first.losses) / self.loss).clamp(_QUIET, 1.0)
        share = (left[:-1] + left[1:]) / 2
        lengths = first.lengths.tolist()
        falling = share[:, None] * noise
        return plan_rates(
            modes, falling, offset, pieces=lengths, start=first.rates, iterations=30, **settings
        )


def _slowed(curvature: Tensor, offset: Tensor, top: float) -> tuple[Tensor, Tensor]:
    """Modes whose loss falls like 1/(1 + 2λt): of the curvatures sλ, with the shares e^{-s} ds, where e^{-2λt} was."""
    import numpy as np

    nodes, shares = (torch.from_numpy(part) for part in np.polynomial.laguerre.laggauss(_NODES))
    nodes, shares = nodes[shares > _SHARE], shares[shares > _SHARE] / shares[shares > _SHARE].sum()
    spread = (nodes[:, None] * curvature).clamp_max(top)
    found = (shares[:, None] * curvature / spread).sqrt() * offset
    return spread.flatten(), found.flatten()


@cites(LI)
def local_model(
    model: nn.Module,
    loss: Loss,
    batch: tuple[Any, Any],
    *,
    products: int = 6,
    batch_size: int = 1,
    momentum: float = 0.0,
    scale: Tensor | None = None,
    decay: Tensor | None = None,
    params: Iterable[str] | None = None,
    spread: float | None = None,
    seed: int = 0,
) -> LocalModel:
    r"""Measure what a network looks like to SGD here: Ritz values from its gradient and from a sample of its noise.

    Costs one gradient, ``products`` Hessian products and, without ``spread``, one directional curvature of the samples.

    Args:
        model: the network, in the mode in which it trains.
        loss: ``loss(prediction, y)``, a mean over samples.
        batch: the samples, one pair ``(x, y)``; at least 4.
        products: Hessian products, the number of directions.
        batch_size: B, for the limit in mean square.
        momentum: μ, for the limit.
        scale: P^{−1/2} of the optimizer, a flat vector; 1 without it.
        decay: weight decay, a flat vector, added to gradient and curvature.
        params: names of parameters or modules that move; all that are trained by default.
        spread: variance of the curvature of single samples along the steepest direction over its squared mean, if it
            is known from before.
        seed: of random layers.

    Returns:
        LocalModel.

    Raises:
        ArgumentError: fewer than 4 samples.
        DivergenceError: the gradient is not finite.
        UnsupportedError: the network has no second derivatives.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> x = torch.randn(64, 3, generator=draw, dtype=torch.float64)
        >>> net = nn.Linear(3, 1, bias=False).double()
        >>> seen = local_model(net, nn.functional.mse_loss, (x, x.sum(1, keepdim=True)), products=3)
        >>> exact = torch.linalg.eigvalsh(2 * x.T @ x / 64).flip(0)
        >>> bool(torch.allclose(seen.curvature, exact))
        True
    """
    params = None if params is None else list(params)
    n = count_samples(batch[0])
    if n < 4:
        raise ArgumentError(f"the batch has {n} samples: measuring noise needs at least 4")
    half = n // 2
    parts = [cut(batch, slice(0, half)), cut(batch, slice(half, n))]
    (first, g1), (second, g2) = (gradient(model, loss, part, params, seed=seed) for part in parts)
    share = half / n
    g = (share * g1 + (1 - share) * g2).double()
    z = (g1 - g2).double() * math.sqrt(n * share * (1 - share))
    operator = hessian_operator(model, loss, batch, params, seed=seed)
    if decay is not None:
        theta = torch.cat([p.detach().reshape(-1) for p in select_parameters(model, params).values()])
        g = g + decay * theta.double()
    if scale is not None:
        g, z = g * scale, z * scale
    if scale is not None or decay is not None:
        operator = _seen_by(operator, scale, decay)
    start = torch.stack([v / v.norm().clamp_min(1e-300) for v in (g, z)], 1).to(operator.dtype)
    with warnings.catch_warnings():  # as many as there are products, converged or not
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = top_eigenpairs(
            operator,
            min(products, operator.size),
            tol=1e-12,
            max_products=products,
            which="largest algebraic",
            start=start[:, : min(products, 2)],
            generator=torch.Generator().manual_seed(seed),
        )
    v = found.eigenvectors.double()
    spent = n * (1 + 2 * found.products)
    steepest, extra = found.eigenvectors[:, 0], 0.0 if spread is None else spread
    if spread is None and float(found.eigenvalues[0]) > 0:
        direction = _spread_out(model, params, steepest if scale is None else steepest * scale)
        extra, cost = _growth(model, loss, batch, direction, seed)
        spent += n * cost
    return LocalModel(
        curvature=found.eigenvalues,
        slope=(v.T @ g).cpu(),
        noise=(v.T @ z).square().cpu(),
        loss=share * first + (1 - share) * second,
        samples=n,
        spread=extra,
        limit=_limit(float(found.eigenvalues.abs().max()), extra, batch_size, momentum),
        sample_gradients=spent,
    )


def _spread_out(model: nn.Module, params: list[str] | None, v: Tensor) -> Tensor:
    """A vector of some parameters as one of all, zero elsewhere."""
    if params is None:
        return v
    whole = select_parameters(model)
    some = dict(zip(chosen := select_parameters(model, params), unflatten(v, chosen.values()), strict=True))
    return torch.cat(
        [some[n].reshape(-1) if n in some else p.new_zeros(p.numel()) for n, p in whole.items()]
    ).to(v)


def _growth(model: nn.Module, loss: Loss, batch: Any, direction: Tensor, seed: int) -> tuple[float, int]:
    """Variance over samples of their curvature along a direction, over its squared mean; and the gradients it took."""
    from bolza.ops.projected import projected_curvature

    try:
        each = projected_curvature(model, loss, batch, direction[:, None], seed=seed).flatten().double()
    except UnsupportedError:  # samples meet in the outputs
        return 0.0, 0
    mean = float(each.mean())
    return (float(each.var(unbiased=False)) / mean**2 if mean > 0 else 0.0), SPREAD_COST


def _limit(curvature: float, spread: float, batch_size: int, momentum: float) -> float:
    """Largest stable rate of one mode whose curvature varies from batch to batch by a relative variance spread / B."""
    from bolza.sde.mean_square import Modes

    if not curvature > 0:
        return math.inf
    one = torch.tensor([curvature], dtype=torch.float64)
    modes = Modes(one, torch.ones(1, 1), torch.tensor([[spread * curvature**2]], dtype=torch.float64))
    return modes.limit(momentum, 1 / batch_size)


def _seen_by(op: LinearOperator, scale: Tensor | None, decay: Tensor | None) -> LinearOperator:
    """P^{−1/2} (H + W) P^{−1/2}."""

    def product(v: Tensor) -> Tensor:
        u = v if scale is None else scale.to(v) * v
        w = op @ u
        if decay is not None:
            w = w + decay.to(v) * u
        return w if scale is None else scale.to(v) * w

    return LinearOperator(product, op.size, op.dtype, op.device)


def cut(batch: tuple[Any, Any], at: slice | Tensor, device: torch.device | None = None) -> tuple[Any, Any]:
    """Some samples of a batch, on a device."""

    def some(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf[at.to(leaf.device) if isinstance(at, Tensor) else at].to(device or leaf.device)

    x, y = (_pytree.tree_map(some, part) for part in batch)
    return x, y


def pool_of(data: Data, samples: int) -> tuple[Any, Any]:
    """One pair ``(x, y)``: the given one, or the first batches, as many as hold so many samples."""
    if isinstance(data, tuple):
        batches_of(data)
        return data
    if hasattr(data, "train_x"):  # a bolza.data.Dataset
        return data.train_x, data.train_y  # type: ignore[attr-defined, unused-ignore]
    taken, count = [], 0
    for batch in batches_of(data):
        taken.append((batch[0], batch[1]))
        count += count_samples(batch[0])
        if count >= samples:
            break
    if not taken:
        raise ArgumentError("data has no batches: give a pair (x, y), or batches")
    leaves = [_pytree.tree_flatten(batch) for batch in taken]
    joined = [torch.cat(parts) for parts in zip(*(found for found, _ in leaves), strict=True)]
    x, y = _pytree.tree_unflatten(joined, leaves[0][1])
    return x, y
