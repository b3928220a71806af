r"""Gradient noise that grows with the distance from the minimum, and the learning rates that survive it.

Each sample has a quadratic loss of its own, with curvature H_i, so that the noise is

    Cov g = (c/B) [ Σ + E(H_i S H_i) − H S H ],    c = 1, or (N − B)/(N − 1) without replacement

at an error of covariance S. In the eigenbasis of H a pair of modes turns noise into error at its own gain g_jk(η, μ),
for plain SGD η/(λ_j + λ_k − ηλ_jλ_k), and

    S = g ∘ (c/B)[Σ + E(H_i S H_i) − H S H],      stable in mean square  ⇔  ρ(S ↦ g ∘ (c/B)[E(H_i S H_i) − H S H]) < 1

which is one symmetric eigenvalue problem. Linear regression with Gaussian inputs has E(H_i S H_i) = 2HSH + H tr(HS);
in one dimension Var = ησ²/(B[2 − ηh(1 + 2/B)]), stable for ηh < 2/(1 + 2/B).

Reference: Wu, Ma & E (2018), *How SGD Selects the Global Minima in Over-parameterized Learning*. Departure: the
exact second moments for any batch size and momentum, instead of sufficient conditions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError, DivergenceError, ShapeError
from bolza.core.reference import Reference, cites
from bolza.sde.moments import StationaryMoments, check_settings

__all__ = ["least_squares_covariance", "mean_square_limit"]

WU = Reference(
    key="wu2018how",
    authors="Wu, Lei and Ma, Chao and E, Weinan",
    title="How SGD Selects the Global Minima in Over-parameterized Learning: A Dynamical Stability Perspective",
    year=2018,
    venue="Advances in Neural Information Processing Systems 31",
)

_FLAT = (
    1e-10  # curvature below this share of the largest counts as none; in single precision, below its rounding
)


@dataclass(frozen=True)
class Modes:
    """Confined directions of a quadratic problem, and how its noise depends on the error along them.

    Attributes:
        values: curvatures λ > 0, ``(k,)``, float64.
        vectors: the directions, ``(d, k)``.
        spread: S ↦ E(H_i S H_i) − H S H on symmetric matrices of the eigenbasis, ``(m, m)``, m = k(k + 1)/2.
        gaussian: whether inputs are Gaussian: ``spread`` is then on diagonals alone, ``(k, k)``, since they stay among
            themselves, and a pair j ≠ k is multiplied by λ_jλ_k.
    """

    values: Tensor
    vectors: Tensor
    spread: Tensor
    gaussian: bool = False

    @property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """Indices (j, k) of the coordinates of a symmetric matrix that ``spread`` acts on."""
        if self.gaussian:
            along = torch.arange(len(self.values), device=self.values.device)
            return along, along
        rows, columns = torch.triu_indices(len(self.values), len(self.values)).unbind()
        return rows.to(self.values.device), columns.to(self.values.device)

    def radius(self, lr: float, momentum: float, scale: float) -> float:
        """Factor by which noise and error feed one another; below 1 they settle.

        The map is positive, so that its radius belongs to a covariance, which has a diagonal: that of Gaussian inputs
        is the radius on diagonals.
        """
        gain = pair_gain(self.values, lr, momentum)[self.pairs]
        if not bool((gain > 0).all() and torch.isfinite(gain).all()):
            return float("inf")
        root = gain.sqrt()
        return scale * float(torch.linalg.eigvalsh(root[:, None] * self.spread * root)[-1])

    def limit(self, momentum: float, scale: float) -> float:
        """Largest learning rate that is stable in mean square."""
        from scipy.optimize import brentq

        top = 2 * (1 + momentum) / float(self.values.max())
        if scale == 0 or not bool(self.spread.any()):
            return top

        def balance(lr: float) -> float:
            radius = self.radius(lr, momentum, scale)
            return -1.0 if radius == float("inf") else (1 - radius) / (1 + radius)

        high = top * (1 - 1e-12)
        return (
            top
            if balance(high) > 0
            else float(brentq(balance, 1e-12 * top, high, xtol=1e-12 * top, rtol=1e-12))
        )


def pair_gain(values: Tensor, lr: float, momentum: float) -> Tensor:
    """Error E x_j x_k at rest for unit noise covariance of the gradients of two modes, ``(k, k)``."""
    a, b = values[:, None], values[None, :]
    if not momentum:
        return lr / (a + b - lr * a * b)
    k = len(values)
    step = values.new_empty(k, 2, 2)  # (x, v) ← (x + v', v' = μv − ηλx)
    step[:, 0, 0], step[:, 1, 0] = 1 - lr * values, -lr * values
    step[:, :, 1] = momentum
    twice = torch.einsum("jab,kcd->jkacbd", step, step).reshape(k, k, 4, 4)
    force = values.new_full((k, k, 4, 1), lr**2)
    return torch.linalg.solve(torch.eye(4).to(values) - twice, force)[..., 0, 0]


def symmetric_basis(k: int) -> Tensor:
    """Orthonormal basis of the symmetric matrices of size k, ``(k², k(k + 1)/2)``, in the order of triu_indices."""
    rows, columns = torch.triu_indices(k, k).unbind()
    at = torch.arange(len(rows))
    basis = torch.zeros(k, k, len(rows), dtype=torch.float64)
    weight = torch.where(rows == columns, 0.5, 0.5**0.5).double()
    basis[rows, columns, at] += weight
    basis[columns, rows, at] += weight
    return basis.reshape(k * k, -1)


def sampled_spread(samples: Tensor) -> Tensor:
    """Matrix of S ↦ mean(A_i S A_i) − Ā S Ā on symmetric matrices, for ``samples`` A_i of shape ``(N, k, k)``."""
    n, k, _ = samples.shape
    centred = (samples - samples.mean(0)).double().reshape(n, k * k)
    full = (centred.T @ centred / n).reshape(k, k, k, k).permute(0, 2, 1, 3).reshape(k * k, k * k)
    basis = symmetric_basis(k).to(full)
    return basis.T @ full @ basis


def gaussian_spread(values: Tensor) -> Tensor:
    """Diagonals of the same for samples x xᵀ with Gaussian x of covariance diag(values): S ↦ HSH + H tr(HS)."""
    return torch.diag(values.square()) + values[:, None] * values


def _modes(curvature: Tensor) -> Modes:
    if curvature.ndim not in (2, 3) or curvature.shape[-1] != curvature.shape[-2]:
        raise ShapeError(
            f"curvature has shape {tuple(curvature.shape)}: give the Hessian (d, d) for Gaussian inputs, or "
            "one Hessian a sample (N, d, d), for linear regression x[:, :, None] * x[:, None, :]"
        )
    mean = (curvature.mean(0) if curvature.ndim == 3 else curvature).double()
    values, vectors = torch.linalg.eigh((mean + mean.mT) / 2)
    rounding = 4 * len(values) * torch.finfo(curvature.dtype).eps if curvature.is_floating_point() else 0.0
    keep = values > max(_FLAT, rounding) * values[-1].clamp_min(0)
    if not bool(keep.any()) or float(values[0]) < -max(1e-8, rounding) * float(values[-1]):
        raise ArgumentError(
            f"curvature has a mean Hessian with eigenvalues from {float(values[0]):.3g} to {float(values[-1]):.3g}: "
            "there must be positive ones, and no negative ones"
        )
    values, vectors = values[keep], vectors[:, keep]
    if curvature.ndim == 2:
        return Modes(values, vectors, gaussian_spread(values), gaussian=True)
    return Modes(values, vectors, sampled_spread(vectors.T @ curvature.double() @ vectors))


@cites(WU)
def mean_square_limit(
    curvature: Tensor, *, batch_size: int = 1, momentum: float = 0.0, samples: int | None = None
) -> float:
    r"""Largest learning rate at which SGD on quadratic samples is stable in mean square.

    Below 2(1 + μ)/λ_max, where descent on the full batch is stable, noise that grows with the error may still
    let the second moment diverge: in one dimension with Gaussian inputs from ηh = 2/(1 + 2/B) on. Above the limit
    the loss has spikes of every size, even where most paths seem to settle.

    Args:
        curvature: Hessian H, ``(d, d)``, of linear regression with Gaussian inputs; or the Hessians H_i of the
            samples, ``(N, d, d)``, at 8d⁴ bytes and an eigenvalue problem of size d²/2. Directions without curvature
            are left out.
        batch_size: B.
        momentum: heavy-ball μ.
        samples: size of the data set if batches are drawn without replacement.

    Returns:
        The learning rate.

    Raises:
        ArgumentError: a setting is out of range, or the mean curvature is not positive.
        ShapeError: curvature is of another shape.

    Reference: Wu, Ma & E (2018), who bound it; here it is exact.

    Example:
        >>> h = torch.ones(1, 1)
        >>> [round(mean_square_limit(h, batch_size=b), 6) for b in (1, 4, 1000)]      # 2 / (1 + 2/B)
        [0.666667, 1.333333, 1.996008]
    """
    scale = check_settings(1.0, batch_size, momentum, samples)
    return _modes(curvature).limit(momentum, scale)


@cites(WU)
def least_squares_covariance(
    curvature: Tensor,
    noise: Tensor | float,
    *,
    lr: float,
    batch_size: int = 1,
    momentum: float = 0.0,
    samples: int | None = None,
) -> StationaryMoments:
    r"""Covariance of SGD at rest when the noise grows with the error, as in linear regression.

        HS + SH − ηHSH = (η c/B) [Σ + E(H_i S H_i) − H S H]          (μ = 0)

    Args:
        curvature: Hessian H, ``(d, d)``, of linear regression with Gaussian inputs; or the Hessians H_i of the
            samples, ``(N, d, d)``. Directions without curvature stay at zero.
        noise: covariance Σ of the gradient of one sample at the minimum, ``(d, d)``; or the variance σ² of the
            residuals, for Σ = σ²H.
        lr: learning rate η.
        batch_size: B.
        momentum: heavy-ball μ.
        samples: size of the data set if batches are drawn without replacement.

    Returns:
        StationaryMoments, without ``velocity``; ``margin`` is 1 − ρ, how far noise and error are from feeding one
        another without end.

    Raises:
        ArgumentError: a setting is out of range.
        DivergenceError: lr is above `mean_square_limit`.
        ShapeError: shapes do not belong together.

    Reference: Wu, Ma & E (2018) for the linear model of the noise.

    Example:
        >>> h = torch.ones(1, 1, dtype=torch.float64)
        >>> least_squares_covariance(h, 1.0, lr=0.1).covariance       # 0.05 without the growth of the noise
        tensor([[0.0588]], dtype=torch.float64)
    """
    scale = check_settings(lr, batch_size, momentum, samples)
    modes = _modes(curvature)
    radius = modes.radius(lr, momentum, scale)
    if not radius < 1:
        limit = modes.limit(momentum, scale)
        raise DivergenceError(
            f"lr is {lr:g}, but with batch_size={batch_size} and momentum={momentum:g} the second moment is finite "
            f"only below {limit:.4g}: lower lr, or enlarge the batch"
        )
    v = modes.vectors
    if not isinstance(noise, Tensor) or noise.ndim == 0:
        if not 0 <= float(noise) < float("inf"):
            raise ArgumentError(
                f"noise is {float(noise)}: the variance of residuals is finite and not negative"
            )
        at_rest = torch.diag(float(noise) * modes.values)
    elif noise.shape == curvature.shape[-2:]:
        at_rest = v.T @ noise.double() @ v
    else:
        raise ShapeError(
            f"noise has shape {tuple(noise.shape)}, but the Hessian is {tuple(curvature.shape[-2:])}"
        )
    k, (rows, columns) = len(modes.values), modes.pairs
    weight = torch.where(rows == columns, 1.0, 2**0.5).to(at_rest)
    gains = scale * pair_gain(modes.values, lr, momentum)
    gain = gains[rows, columns]
    system = torch.eye(len(rows)).to(modes.spread) - gain[:, None] * modes.spread
    force = gain * at_rest[rows, columns] * weight
    found = torch.linalg.solve(system, force)
    residual = (system @ found - force).norm() / force.norm().clamp_min(torch.finfo(torch.float64).tiny)
    S = torch.zeros(k, k).to(at_rest)
    if modes.gaussian:
        S = gains * at_rest / (1 - gains * modes.values[:, None] * modes.values)
    S[rows, columns] = S[columns, rows] = found / weight
    like = curvature.dtype if curvature.is_floating_point() else torch.get_default_dtype()
    excess = (modes.values * S.diagonal()).sum() / 2
    margin = torch.tensor(1 - radius, dtype=torch.float64)
    return StationaryMoments((v @ S @ v.T).to(like), excess.to(like), None, margin, residual)
