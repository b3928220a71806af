r"""Noise of equal strength and different shape, and how fast each carries SGD out of a minimum.

    θ ← θ − η (∇f + ξ),   Cov ξ = C,   tr C given;    E f(θ_t) − f(0) = ¼ η tr[(I − e^{−2Ht}) C] ≈ ½ ηt tr(HC)

Shapes of C with the trace of Σ/B: the identity, the diagonal of Σ, Σ itself, the Hessian, and its top direction.
Noise along the steep directions lifts the loss fastest: tr(HC) says how fast.

Reference: Zhu, Wu, Yu, Wu & Ma (2019), *The Anisotropic Noise in Stochastic Gradient Descent*.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError, ShapeError
from bolza.core.reference import Reference, cites
from bolza.ops.krylov import EigenResult
from bolza.sde.gradient_noise import GradientNoise

__all__ = ["NoiseShape", "equal_trace_covariance", "equal_trace_noise", "expected_rise"]

ZHU = Reference(
    key="zhu2019anisotropic",
    authors="Zhu, Zhanxing and Wu, Jingfeng and Yu, Bing and Wu, Lei and Ma, Jinwen",
    title="The Anisotropic Noise in Stochastic Gradient Descent: Its Behavior of Escaping from Sharp Minima and "
    "Regularization Effects",
    year=2019,
    arxiv="1803.00195",
)

NoiseShape: TypeAlias = Literal["isotropic", "diagonal", "covariance", "hessian", "top"]


def _check(shape: str, has_hessian: bool) -> None:
    if shape not in get_args(NoiseShape):
        raise ArgumentError(f"shape is {shape!r}: choose one of {', '.join(get_args(NoiseShape))}")
    if shape in ("hessian", "top") and not has_hessian:
        raise ArgumentError(f"shape {shape!r} needs the hessian: give it")


@cites(ZHU)
def equal_trace_covariance(shape: NoiseShape, covariance: Tensor, hessian: Tensor | None = None) -> Tensor:
    r"""Noise covariance of a given shape with the trace of another one.

        isotropic  (tr Σ/d) I      diagonal  diag Σ      covariance  Σ
        hessian    H₊ tr Σ/tr H₊   top       tr Σ u uᵀ,  u the top eigenvector of H,  H₊ its positive part

    Args:
        shape: which.
        covariance: Σ, ``(*batch, d, d)``.
        hessian: H, ``(*batch, d, d)``, for the shapes made of it.

    Returns:
        Tensor ``(*batch, d, d)`` of trace tr Σ.

    Raises:
        ArgumentError: an unknown shape, a Hessian that is missing, or one without positive curvature.
        ShapeError: the matrices are not square, or of different sizes.

    Reference: Zhu et al. (2019).

    Example:
        >>> sigma = torch.diag(torch.tensor([1.0, 0.2]))
        >>> equal_trace_covariance("isotropic", sigma).diagonal()
        tensor([0.6000, 0.6000])
    """
    _check(shape, hessian is not None)
    d = covariance.shape[-1]
    if (
        covariance.ndim < 2
        or covariance.shape[-2] != d
        or (hessian is not None and hessian.shape[-2:] != (d, d))
    ):
        raise ShapeError(
            f"covariance has shape {tuple(covariance.shape)} and hessian "
            f"{None if hessian is None else tuple(hessian.shape)}: both must be square, of one size"
        )
    if shape == "covariance":
        return covariance
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    trace = diagonal.sum(-1)[..., None, None]
    if shape == "diagonal":
        return torch.diag_embed(diagonal)
    if shape == "isotropic" or hessian is None:
        return trace / d * torch.eye(d, dtype=covariance.dtype, device=covariance.device)
    values, vectors = torch.linalg.eigh(hessian)
    if bool((values[..., -1] <= 0).any()):
        raise ArgumentError("hessian has no positive curvature: noise cannot take its shape")
    weights = values.clamp_min(0)
    if shape == "top":
        weights = torch.zeros_like(values)
        weights[..., -1] = 1
    weights = weights / weights.sum(-1, keepdim=True)
    return trace * (vectors * weights[..., None, :]) @ vectors.mT


@cites(ZHU)
def equal_trace_noise(
    noise: GradientNoise,
    shape: NoiseShape,
    *,
    batch_size: int = 1,
    hessian: EigenResult | None = None,
    count: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draw noise for the gradient of a network, as strong as that of a mini-batch and of a given shape.

    To be added to the full gradient: SGD with another shape of noise. No matrix of the network is formed; the diagonal
    shape is a draw from Σ with a random sign for each parameter, which keeps the variances and removes the rest.

    Args:
        noise: gradient noise of the network at its present parameters.
        shape: ``"isotropic"``, ``"diagonal"``, ``"covariance"``, ``"hessian"`` or ``"top"``.
        batch_size: B.
        hessian: top eigenpairs of the Hessian, for the shapes made of it; ``"hessian"`` uses those with positive
            eigenvalues.
        count: number of draws; one without it.
        generator: source of randomness.

    Returns:
        ``(d,)``, or ``(d, count)``, in the order of ``model.parameters()``; the mean square is tr Σ/B.

    Raises:
        ArgumentError: an unknown shape, or a Hessian that is missing or has no positive eigenvalue.

    Reference: Zhu et al. (2019). Departure: tr Σ is that of the samples at hand, at the present parameters.

    Example:
        >>> from bolza.sde import gradient_noise
        >>> net, x = torch.nn.Linear(3, 1), torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
        >>> noise = gradient_noise(net, torch.nn.functional.mse_loss, (x, x[:, :1]))
        >>> equal_trace_noise(noise, "diagonal", batch_size=4, count=5).shape
        torch.Size([4, 5])
    """
    _check(shape, hessian is not None)
    columns = count or 1
    device = torch.device("cpu") if generator is None else generator.device
    mean = noise.mean

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=mean.dtype, device=device, generator=generator).to(mean.device)

    if shape in ("covariance", "diagonal"):
        drawn = noise.sample(generator, batch_size, columns)
        if shape == "diagonal":
            drawn = drawn * normal(noise.size, columns).sign()
    else:
        strength = math.sqrt(noise.trace().value * noise.scale(batch_size))
        if shape == "isotropic" or hessian is None:  # the others were checked to have it
            drawn = strength / math.sqrt(noise.size) * normal(noise.size, columns)
        else:
            values = hessian.eigenvalues.to(mean)
            weights = values.clamp_min(0)
            if not bool((weights > 0).any()):
                raise ArgumentError("hessian has no positive eigenvalue: noise cannot take its shape")
            if shape == "top":
                weights = (values == values.max()).to(values)
            weights = (weights / weights.sum()).sqrt()
            drawn = (
                strength * hessian.eigenvectors.to(mean) @ (weights[:, None] * normal(len(values), columns))
            )
    return drawn if count is not None else drawn[:, 0]


@cites(ZHU)
def expected_rise(hessian: Tensor, noise: Tensor, *, lr: float, time: float, batch_size: int = 1) -> Tensor:
    r"""Mean loss above a quadratic minimum, a time after SGD has started there.

        E f(θ_t) − f(0) = (η/4B) tr[(I − e^{−2Ht}) Σ],     ½ (ηt/B) tr(HΣ) for short times

    Exact for the diffusion, for every pair of symmetric H and Σ: in the eigenbasis of H only the diagonal of Σ enters.

    Args:
        hessian: H, symmetric, ``(*batch, d, d)``; negative curvature is allowed, and grows.
        noise: covariance Σ of the gradient of one sample, ``(*batch, d, d)``.
        lr: learning rate η.
        time: t = kη.
        batch_size: B.

    Returns:
        Tensor ``(*batch,)``.

    Raises:
        ArgumentError: a setting is out of range.

    Reference: Zhu et al. (2019). Departure: without the assumption that H and Σ commute.

    Example:
        >>> h, sigma = torch.diag(torch.tensor([2.0, 0.5])), torch.diag(torch.tensor([1.0, 0.2]))
        >>> expected_rise(h, sigma, lr=0.05, time=1.0)
        tensor(0.0139)
    """
    if not lr > 0 or batch_size < 1 or not 0 <= time < math.inf:
        raise ArgumentError(
            f"lr is {lr}, time {time} and batch_size {batch_size}: lr must be positive, time finite and not negative, "
            "and a batch holds at least one sample"
        )
    values, vectors = torch.linalg.eigh(hessian)
    along = (vectors * (noise @ vectors)).sum(-2)
    return lr / (4 * batch_size) * (-torch.expm1(-2 * values * time) * along).sum(-1)
