r"""What the noise of SGD does to a network at rest: its blur along the directions of largest curvature.

    H v_j = λ_j v_j  (Lanczos),   Σ_V = VᵀΣV,   VᵀSV solves the stationary equation of k modes (exactly, given H and Σ)
    blur of v_j = (VᵀSV)_jj^{1/2},   excess loss = ½ Σ_j λ_j S_jj  +  η (tr Σ − tr Σ_V) / (4B(1 − μ))

V spans an invariant subspace of H, so that the top modes do not feel the others and k numbers are enough for what
happens in them; the other modes have ηλ ≪ 1, where the excess loss does not depend on λ. No d × d matrix is formed.

Reference: Mandt, Hoffman & Blei (2017), §3, for the linear model of SGD near a minimum; Wu, Ma & E (2018) for the
limit in mean square.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError
from bolza.core.reference import cites
from bolza.ops.batches import Data, Loss, batches_of
from bolza.ops.curvature import hessian_operator
from bolza.ops.krylov import EigenResult, Estimate, top_eigenpairs
from bolza.ops.projected import projected_curvature
from bolza.sde.gradient_noise import GradientNoise, gradient_noise
from bolza.sde.mean_square import WU, Modes, sampled_spread
from bolza.sde.moments import MANDT, check_settings, stationary_covariance

__all__ = ["NetworkMoments", "network_moments"]


@dataclass(frozen=True)
class NetworkMoments:
    """SGD at rest near the present parameters of a network.

    Everything is a prediction from the curvature and the noise at these parameters: of where SGD would come to rest
    if the loss were quadratic and the noise the same all around. Noise that grows with the error widens it, in
    variance by up to about 1/(1 − ``stability``): by nothing far below ``mean_square_limit``, without end close to it.

    Attributes:
        curvature: the k largest eigenvalues λ_j of the Hessian, ``(k,)``, float64.
        directions: their eigenvectors, ``(d, k)``.
        residuals: ‖H v_j − λ_j v_j‖, ``(k,)``.
        noise: VᵀΣV of one sample, ``(k, k)``, float64.
        covariance: VᵀSV at rest, ``(k, k)``; infinite on the diagonal where nothing is at rest (see ``unstable``).
        blur: standard deviation of the iterate along each direction, ``(k,)``.
        offset: distance from here to the bottom along each direction, −g·v_j/λ_j, ``(k,)``. The prediction is about the
            run as it is now where this is of the size of ``blur``; far larger, the run has not arrived.
        relaxation: steps in which SGD forgets where it was along each direction, ``(k,)``.
        unstable: directions with λ_j ≤ 0 or lr above the limit, ``(k,)``, bool.
        temperature: η/(2B(1 − μ)), times (N − B)/(N − 1) without replacement.
        noise_trace: tr Σ, with its error over samples.
        excess_top: ½ Σ λ_j S_jj, what the top directions add to the loss.
        excess_rest: what the other directions add once all of them have come to rest, which takes 1/(ηλ) steps each:
            for flat ones far longer than a run, so that it is an upper bound.
        limit: largest stable learning rate on the full batch, 2(1 + μ)/λ_1.
        mean_square_limit: largest learning rate with the noise of batches of B, from the Gauss–Newton matrices of the
            samples along the top directions. More directions can only lower it: it is an upper bound.
        lr: learning rate that this is about.
        converged: whether the eigenvalues met their tolerance.
    """

    curvature: Tensor
    directions: Tensor
    residuals: Tensor
    noise: Tensor
    covariance: Tensor
    blur: Tensor
    offset: Tensor
    relaxation: Tensor
    unstable: Tensor
    temperature: float
    noise_trace: Estimate
    excess_top: float
    excess_rest: Estimate
    limit: float
    mean_square_limit: float
    lr: float
    converged: bool

    @property
    def excess_loss(self) -> Estimate:
        """How far the mean loss would lie above the bottom: top and other directions together."""
        return Estimate(self.excess_top + self.excess_rest.value, self.excess_rest.error)

    @property
    def stability(self) -> float:
        """Learning rate over its limit in mean square; SGD is unstable from 1 on."""
        return self.lr / self.mean_square_limit if self.mean_square_limit else math.inf


@cites(MANDT, WU)
def network_moments(
    model: nn.Module,
    loss: Loss,
    data: Data,
    *,
    lr: float,
    batch_size: int,
    momentum: float = 0.0,
    k: int = 10,
    replacement: bool = True,
    hessian: EigenResult | None = None,
    noise: GradientNoise | None = None,
    tol: float = 1e-4,
    max_products: int = 200,
    generator: torch.Generator | None = None,
) -> NetworkMoments:
    r"""Predict what the noise of SGD does to a network: blur, excess loss, temperature, distance from instability.

    Costs the Hessian products of Lanczos (some tens), one pass of per-sample gradients, and k directional derivatives.
    The model is only read.

    Args:
        model: the network, near where training has settled.
        loss: ``loss(prediction, y)``, a mean over samples.
        data: one pair ``(x, y)`` or an iterable of batches; a few hundred samples are enough for directions that many
            samples share.
        lr: learning rate η.
        batch_size: B.
        momentum: heavy-ball μ.
        k: directions of largest curvature.
        replacement: whether batches are drawn with replacement, or from the N samples of ``data`` without.
        hessian: top eigenpairs found before, to save the Lanczos run; all of their columns are used, and ``k``, ``tol``
            and ``max_products`` are not.
        noise: gradient noise found before at the same parameters.
        tol: relative accuracy of the eigenvalues; vectors are accurate to about its square root.
        max_products: Hessian products at most.
        generator: of the random start of Lanczos.

    Returns:
        NetworkMoments; nothing is raised where lr is unstable, the record says so.

    Raises:
        ArgumentError: a setting is out of range.
        UnsupportedError: the model has no per-sample gradients or second derivatives.
        ConvergenceWarning: (as a warning) Lanczos stopped early.

    Reference: Mandt, Hoffman & Blei (2017), §3. Departure: exact steps instead of the diffusion, along the top
    directions only.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> x = torch.randn(200, 3, generator=draw, dtype=torch.float64)
        >>> y = x.sum(1, keepdim=True) + torch.randn(200, 1, generator=draw, dtype=torch.float64)
        >>> net = nn.Linear(3, 1, bias=False).double()
        >>> _ = net.weight.data.copy_(torch.linalg.lstsq(x, y).solution.T)
        >>> at_rest = network_moments(net, nn.functional.mse_loss, (x, y), lr=0.01, batch_size=4, k=3, generator=draw)
        >>> at_rest.blur.shape, at_rest.stability < 1, bool((at_rest.offset.abs() < 1e-6).all())
        (torch.Size([3]), True, True)
    """
    batches = batches_of(data)
    if noise is None:
        noise = gradient_noise(model, loss, batches, replacement=replacement)
    samples = None if replacement else noise.samples
    scale = check_settings(lr, batch_size, momentum, samples)
    if hessian is None:
        if k < 1:
            raise ArgumentError(f"k is {k}: at least one direction is needed")
        operator = hessian_operator(model, loss, batches)
        hessian = top_eigenpairs(
            operator,
            min(k, operator.size),
            tol=tol,
            max_products=max_products,
            which="largest algebraic",
            generator=generator,
        )
    directions = hessian.eigenvectors.to(noise.mean)
    values = hessian.eigenvalues.double().cpu()
    along = noise.gradients.dots(directions).double().cpu()
    mean = along.mean(0)
    projected = (along - mean).T @ (along - mean) / len(along)

    limit = 2 * (1 + momentum) / float(values.max()) if float(values.max()) > 0 else math.inf
    confined = values > 1e-7 * values.abs().max()
    stable = confined & (lr * values < 2 * (1 + momentum))
    covariance = torch.diag(torch.where(stable, 0.0, math.inf).double())
    if bool(stable.any()):
        inside = stable[:, None] & stable
        covariance[inside] = stationary_covariance(
            torch.diag(values[stable]),
            projected[inside].reshape(int(stable.sum()), -1),
            lr=lr,
            batch_size=batch_size,
            momentum=momentum,
            samples=samples,
        ).covariance.flatten()
    variance = covariance.diagonal()
    trace = noise.trace()
    rest = max(0.0, trace.value - float(projected.trace()))
    rate = lr * scale / (4 * (1 - momentum))
    return NetworkMoments(
        curvature=values,
        directions=directions,
        residuals=hessian.residuals,
        noise=projected,
        covariance=covariance,
        blur=variance.sqrt(),
        offset=torch.where(confined, -mean / values, math.nan),
        relaxation=_relaxation(values, lr, momentum, stable),
        unstable=~stable,
        temperature=lr * scale / (2 * (1 - momentum)),
        noise_trace=trace,
        excess_top=math.inf if limit <= lr else float((values * variance)[stable].sum()) / 2,
        excess_rest=Estimate(rate * rest, rate * trace.error),
        limit=limit,
        mean_square_limit=_limit(model, loss, batches, directions, values, confined, momentum, scale),
        lr=lr,
        converged=hessian.converged,
    )


def _relaxation(values: Tensor, lr: float, momentum: float, stable: Tensor) -> Tensor:
    """Steps in which the slower root of r² − (1 + μ − ηλ) r + μ falls by e."""
    half = (1 + momentum - lr * values) / 2
    root = torch.sqrt((half.square() - momentum).to(torch.complex128))
    modulus = torch.maximum((half + root).abs(), (half - root).abs())
    return torch.where(stable, -1 / modulus.log().clamp(max=-1e-300), math.inf)


def _limit(
    model: nn.Module,
    loss: Loss,
    data: Data,
    directions: Tensor,
    values: Tensor,
    confined: Tensor,
    momentum: float,
    scale: float,
) -> float:
    if not bool(confined.any()):
        return math.inf
    samples = projected_curvature(model, loss, data, directions[:, confined.to(directions.device)])
    modes = Modes(values[confined], directions, sampled_spread(samples.cpu()))
    return modes.limit(momentum, scale)
