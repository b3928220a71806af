r"""Predictions from kernels: Gaussian-process regression, and ensembles of wide networks trained to the end.

With K the kernel, X the training inputs, s² the noise and K̂ = K(X, X) + s²:

    mean        K(x, X) K̂⁻¹ y
    covariance  K(x, x') - K(x, X) K̂⁻¹ K(X, x')
    log p(y|X)  -½ yᵀK̂⁻¹y - ½ log det K̂ - (n/2) log 2π        (for each column of y, added up)

A network trained by gradient flow on ½Σ(f - y)² for a time t is, in the limit of infinite width and over random
initial weights, a Gaussian process too, with tangent kernel Θ and covariance K of its initial outputs:

    A_t = Θ(x, X) Θ⁻¹ (1 - e^{-Θt}),   mean = A_t y,
    covariance = K(x, x') + A_t K(X, X) A_tᵀ - A_t K(X, x') - K(x, X) A_tᵀ
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError, DataError, DivergenceError, ShapeError
from bolza.core.reference import Reference, cites
from bolza.meanfield.kernels.infinite import LEE

__all__ = ["Posterior", "gp_posterior", "ntk_posterior"]

LAZY = Reference(
    "lee2019wide",
    "Lee, Jaehoon and Xiao, Lechao and Schoenholz, Samuel S. and Bahri, Yasaman and Novak, Roman and "
    "Sohl-Dickstein, Jascha and Pennington, Jeffrey",
    "Wide Neural Networks of Any Depth Evolve as Linear Models Under Gradient Descent",
    2019,
    venue="NeurIPS",
    arxiv="1902.06720",
)


@dataclass(frozen=True)
class Posterior:
    """Predictions at test inputs.

    Args:
        mean: ``(m, …)`` as ``y`` has columns.
        variance: ``(m,)``, of the function without noise; None if no test kernel was given.
        covariance: ``(m, m)``; None if only the diagonal of the test kernel was given.
        log_marginal_likelihood: log p(y|X) in nats, summed over the columns of ``y``; ``nan`` where it has
            no meaning.
    """

    mean: Tensor
    variance: Tensor | None
    covariance: Tensor | None
    log_marginal_likelihood: float


@cites(LEE)
def gp_posterior(
    k_train: Tensor,
    y: Tensor,
    k_cross: Tensor | None = None,
    k_test: Tensor | None = None,
    *,
    noise: float = 0.0,
) -> Posterior:
    r"""Gaussian-process regression: mean K(x,X) K̂⁻¹ y and variance K(x,x) - K(x,X) K̂⁻¹ K(X,x), K̂ = K + noise.

    Args:
        k_train: K(X, X), ``(n, n)``: an NNGP, or a tangent kernel for kernel regression.
        y: targets ``(n,)`` or ``(n, outputs)``; outputs are independent and share the kernel.
        k_cross: K(x, X), ``(m, n)``; by default the training inputs themselves.
        k_test: K(x, x'), ``(m, m)``, or its diagonal ``(m,)`` where variances are enough.
        noise: variance s² of the noise in ``y``, in the units of the kernel.

    Returns:
        Mean, variance and covariance of the function at the test inputs, and log p(y|X).

    Raises:
        ShapeError: the kernels and targets do not belong together.
        ArgumentError: ``noise`` is negative or not finite.
        DataError: a kernel or ``y`` holds numbers that are not finite.
        DivergenceError: K̂ is not positive definite; give more noise.

    Reference:
        Lee et al. (2018), eq. 8-9.

    Example:
        >>> k = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
        >>> gp_posterior(k, torch.tensor([1.0, 0.5]), torch.tensor([[0.5, 1.0]]), torch.tensor([1.0])).mean
        tensor([0.5000])
    """
    _check_square("k_train", k_train, len(y))
    if not 0 <= noise < math.inf:
        raise ArgumentError(f"noise={noise} is no variance: give a finite number that is not negative")
    if k_cross is None:
        k_cross, k_test = k_train, k_train if k_test is None else k_test
    _check_cross("k_cross", k_cross, len(y))
    _check_test(k_test, len(k_cross))
    _check_numbers(k_train=k_train, y=y, k_cross=k_cross, k_test=k_test)
    k_cross, k_test = k_cross.to(k_train), None if k_test is None else k_test.to(k_train)
    n = len(y)
    factor = _cholesky(k_train + noise * torch.eye(n, dtype=k_train.dtype, device=k_train.device), noise)
    columns = y.reshape(n, -1).to(k_train)
    solved = torch.cholesky_solve(columns, factor)
    mean = (k_cross @ solved).reshape(len(k_cross), *y.shape[1:])
    variance = covariance = None
    if k_test is not None:
        half = torch.linalg.solve_triangular(factor, k_cross.T, upper=False)
        if k_test.ndim == 2:
            covariance = k_test - half.T @ half
            variance = covariance.diagonal().clamp_min(0)
        else:
            variance = (k_test - half.square().sum(0)).clamp_min(0)
    fit = float((columns * solved).sum())
    log_det = 2 * float(factor.diagonal().log().sum())
    evidence = -0.5 * (fit + columns.shape[1] * (log_det + n * math.log(2 * math.pi)))
    return Posterior(mean, variance, covariance, evidence)


@cites(LAZY)
def ntk_posterior(
    ntk_train: Tensor,
    nngp_train: Tensor,
    y: Tensor,
    ntk_cross: Tensor,
    nngp_cross: Tensor,
    nngp_test: Tensor | None = None,
    *,
    time: float = math.inf,
    ridge: float = 0.0,
) -> Posterior:
    r"""Law of the outputs of wide networks trained by gradient flow on ½Σ(f - y)², over their random beginnings.

    With A = Θ(x,X) Θ⁻¹ (1 - e^{-Θt}): mean A y, covariance K(x,x') + A K A' - A K(X,x') - K(x,X) A'. The noise of
    the beginnings does not go away: networks that all fit the training set differ elsewhere.

    Args:
        ntk_train: Θ(X, X), ``(n, n)``.
        nngp_train: K(X, X), ``(n, n)``.
        y: targets ``(n,)`` or ``(n, outputs)``.
        ntk_cross: Θ(x, X), ``(m, n)``.
        nngp_cross: K(x, X), ``(m, n)``.
        nngp_test: K(x, x'), ``(m, m)``, or its diagonal ``(m,)``.
        time: learning rate × steps; infinite: until the training set is fitted.
        ridge: added to Θ(X, X), against rounding or noise.

    Returns:
        Mean, variance and covariance; the likelihood is ``nan``.

    Raises:
        ShapeError: the kernels and targets do not belong together.
        ArgumentError: ``time`` or ``ridge`` is negative.
        DataError: a kernel or ``y`` holds numbers that are not finite.
        DivergenceError: Θ(X, X) is not positive definite; give a ridge.

    Reference:
        Lee et al. (2019), eq. 13-15. Departure: the loss is a sum, not a mean, over the samples.

    Example:
        >>> one, third = torch.eye(2), torch.tensor([[0.5, 0.5]])
        >>> y = torch.tensor([1.0, 3.0])
        >>> early = ntk_posterior(one, one, y, third, third, torch.ones(1), time=0.0)
        >>> early.mean, early.variance
        (tensor([0.]), tensor([1.]))
        >>> ntk_posterior(one, one, y, third, third, torch.ones(1)).mean
        tensor([2.])
    """
    n = len(y)
    for name, square in (("ntk_train", ntk_train), ("nngp_train", nngp_train)):
        _check_square(name, square, n)
    for name, cross in (("ntk_cross", ntk_cross), ("nngp_cross", nngp_cross)):
        _check_cross(name, cross, n)
    _check_test(nngp_test, len(nngp_cross))
    for name, value in (("time", time), ("ridge", ridge)):
        if not value >= 0:
            raise ArgumentError(f"{name}={value} is negative")
    _check_numbers(
        ntk_train=ntk_train,
        nngp_train=nngp_train,
        y=y,
        ntk_cross=ntk_cross,
        nngp_cross=nngp_cross,
        nngp_test=nngp_test,
    )
    nngp_train, ntk_cross, nngp_cross = (k.to(ntk_train) for k in (nngp_train, ntk_cross, nngp_cross))
    nngp_test = None if nngp_test is None else nngp_test.to(ntk_train)
    theta = ntk_train + ridge * torch.eye(n, dtype=ntk_train.dtype, device=ntk_train.device)
    if math.isinf(time):
        a = torch.cholesky_solve(ntk_cross.T, _cholesky(theta, ridge)).T
    else:
        values, vectors = torch.linalg.eigh(theta)
        values = values.clamp_min(0)  # rounding below zero would grow
        grown = torch.where(values * time < 1e-12, time, -torch.expm1(-values * time) / values)
        a = ((ntk_cross @ vectors) * grown) @ vectors.T
    mean = (a @ y.reshape(n, -1).to(theta)).reshape(len(a), *y.shape[1:])
    variance = covariance = None
    if nngp_test is not None:
        inner = a @ nngp_train
        if nngp_test.ndim == 2:
            mixed = a @ nngp_cross.T
            covariance = nngp_test + inner @ a.T - mixed - mixed.T
            variance = covariance.diagonal().clamp_min(0)
        else:
            variance = (nngp_test + (inner * a).sum(1) - 2 * (a * nngp_cross).sum(1)).clamp_min(0)
    return Posterior(mean, variance, covariance, math.nan)


def _cholesky(k: Tensor, noise: float) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(k)
    if int(info):
        raise DivergenceError(
            f"the kernel of {len(k)} training inputs plus {noise:g} is not positive definite (leading minor "
            f"{int(info)}): compute it in float64, leave out repeated inputs, or give more noise, such as "
            f"{1e-6 * float(k.diagonal().mean()):.1g}"
        )
    return factor


def _check_square(name: str, k: Tensor, n: int) -> None:
    if k.shape != (n, n):
        raise ShapeError(f"{name} has shape {tuple(k.shape)}, but y has {n} rows: it must be ({n}, {n})")


def _check_cross(name: str, k: Tensor, n: int) -> None:
    if k.ndim != 2 or k.shape[1] != n:
        raise ShapeError(
            f"{name} has shape {tuple(k.shape)}: it must be (test inputs, {n}), one column a training input"
        )


def _check_test(k: Tensor | None, m: int) -> None:
    if k is not None and k.shape not in ((m, m), (m,)):
        raise ShapeError(
            f"the test kernel has shape {tuple(k.shape)}: it must be ({m}, {m}), or its diagonal ({m},)"
        )


def _check_numbers(**given: Tensor | None) -> None:
    for name, t in given.items():
        if t is not None and not bool(torch.isfinite(t).all()):
            raise DataError(
                f"{name} holds {int((~torch.isfinite(t)).sum())} numbers that are not finite: mend them"
            )
