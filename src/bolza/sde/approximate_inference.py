r"""SGD as a sampler: the learning rate and the preconditioner that bring its iterates closest to a posterior.

    iterates  N(θ*, S),  AS + SA = (η/B) C          posterior  N(θ*, (NA)⁻¹)          f the mean loss, A = ∇²f

    KL = ½ [N tr(AS) − d − log det(NAS)],   smallest at  η* = 2Bd / (N tr C)                 whatever A is
                                            zero for     θ ← θ − ηPg,  P = (2B/ηN) C⁻¹;  diagonal:  (2B/ηN) / diag C

The scalar rate matches one number, the trace of AS: single variances can be off by large factors where C ≁ A.

Reference: Mandt, Hoffman & Blei (2017), §4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError, DivergenceError, ShapeError
from bolza.core.reference import cites
from bolza.sde.gradient_noise import GradientNoise
from bolza.sde.moments import MANDT, check_settings

__all__ = ["posterior_divergence", "posterior_preconditioner", "posterior_rate"]


@cites(MANDT)
def posterior_rate(
    noise: Tensor | GradientNoise, *, samples: int, batch_size: int = 1, momentum: float = 0.0
) -> float:
    r"""Constant learning rate at which SGD's iterates are closest to the posterior: η* = 2Bd(1 − μ)/(N tr C).

    Args:
        noise: covariance C of the gradient of one sample, ``(d, d)``; or the gradient noise of a network.
        samples: N, by which the posterior exp(−N f) counts the mean loss f.
        batch_size: B.
        momentum: heavy-ball μ.

    Returns:
        η*; take it for an upper bound where it comes near the stability limit 2/λ_max.

    Raises:
        ArgumentError: a setting is out of range, or there is no noise.

    Reference: Mandt, Hoffman & Blei (2017), §4.1 and §4.3 (momentum, to first order in η).

    Example:
        >>> c = torch.tensor([[1.0, 0.2], [0.2, 0.6]])
        >>> round(posterior_rate(c, samples=1000, batch_size=10), 6)
        0.025
    """
    check_settings(1.0, batch_size, momentum, None)
    if samples < 1:
        raise ArgumentError(f"samples is {samples}: the posterior needs at least one")
    if isinstance(noise, GradientNoise):
        size, trace = noise.size, noise.trace().value
    else:
        size, trace = noise.shape[-1], float(noise.trace())
    if not 0 < trace < float("inf"):
        raise ArgumentError(
            f"noise has trace {trace:.3g}: SGD samples with noise that is positive and finite"
        )
    return 2 * batch_size * size * (1 - momentum) / (samples * trace)


@cites(MANDT)
def posterior_preconditioner(
    noise: Tensor, *, samples: int, lr: float, batch_size: int = 1, diagonal: bool = False
) -> Tensor:
    r"""Preconditioner with which SGD's iterates are closest to the posterior: P = (2B/ηN) C⁻¹, or by its diagonal.

    The step ηP does not depend on η: it is (2B/N) C⁻¹.

    Args:
        noise: covariance C of the gradient of one sample, ``(d, d)``.
        samples: N of the posterior exp(−N f).
        lr: learning rate η that it goes with.
        batch_size: B.
        diagonal: whether P is to be diagonal, as in adaptive methods.

    Returns:
        Tensor ``(d, d)``.

    Raises:
        ArgumentError: a setting is out of range, or C is singular: some direction has no noise to sample with.
        ShapeError: C is not a matrix.

    Reference: Mandt, Hoffman & Blei (2017), §4.2.

    Example:
        >>> c = torch.tensor([[1.0, 0.2], [0.2, 0.6]])
        >>> posterior_preconditioner(c, samples=1000, lr=0.02, batch_size=10, diagonal=True).diagonal()
        tensor([1.0000, 1.6667])
    """
    check_settings(lr, batch_size, 0.0, None)
    if samples < 1:
        raise ArgumentError(f"samples is {samples}: the posterior needs at least one")
    if noise.ndim != 2 or noise.shape[0] != noise.shape[1]:
        raise ShapeError(f"noise has shape {tuple(noise.shape)}: give the covariance of one sample, (d, d)")
    factor = 2 * batch_size / (lr * samples)
    variances = noise.diagonal()
    lowest = float(variances.min() if diagonal else torch.linalg.eigvalsh(noise)[0])
    if not lowest > torch.finfo(noise.dtype).eps * float(variances.max()):
        raise ArgumentError(
            f"noise has an eigenvalue or variance of {lowest:.3g}: a direction without noise cannot be sampled, so "
            "leave it out or add noise there"
        )
    return factor * (torch.diag(1 / variances) if diagonal else torch.linalg.inv(noise))


@cites(MANDT)
def posterior_divergence(covariance: Tensor, hessian: Tensor, *, samples: int) -> Tensor:
    r"""Kullback–Leibler divergence of N(θ*, S) from the posterior N(θ*, (NA)⁻¹): ½ [N tr(AS) − d − log det(NAS)].

    Args:
        covariance: S of the iterates, ``(*batch, d, d)``.
        hessian: A of the mean loss, ``(*batch, d, d)``.
        samples: N.

    Returns:
        Tensor ``(*batch,)``, in nats; 0 where the two are equal.

    Raises:
        ArgumentError: no samples.
        DivergenceError: S or A is not positive definite, so that the divergence is infinite.
        ShapeError: the matrices differ in size.

    Reference: Mandt, Hoffman & Blei (2017), §4, with the constants that make it zero at the posterior.

    Example:
        >>> a = torch.diag(torch.tensor([1.0, 2.0]))
        >>> posterior_divergence(2 * torch.linalg.inv(100 * a), a, samples=100)      # twice too wide
        tensor(0.3069)
    """
    if samples < 1:
        raise ArgumentError(f"samples is {samples}: the posterior needs at least one")
    if covariance.shape[-2:] != hessian.shape[-2:]:
        raise ShapeError(f"covariance is {tuple(covariance.shape)}, but hessian {tuple(hessian.shape)}")
    factors = [torch.linalg.cholesky_ex(m) for m in (covariance, hessian)]
    if any(bool((info != 0).any()) for _, info in factors):
        raise DivergenceError(
            "covariance or hessian is not positive definite: their Gaussians are flat somewhere, and the divergence "
            "infinite; restrict both to directions of positive curvature"
        )
    # NAS has the eigenvalues of (√N LₐᵀLₛ)(…)ᵀ: log det and trace from one product, accurate near the identity
    product = samples**0.5 * factors[1][0].mT @ factors[0][0]
    singular = torch.linalg.svdvals(product).square()
    return (singular - 1 - singular.log()).sum(-1) / 2
