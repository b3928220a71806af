r"""The information bottleneck of Gaussian variables, in closed form.

    min I(X;T) − β I(T;Y)   over p(t|x),   solved by T = A X + ξ, ξ ~ N(0, I)

With ρ_i the canonical correlations of X and Y, each direction enters by itself when β exceeds 1/ρ_i²:

    I(T;X) = ½ Σ ln (β − 1) ρ_i²/(1 − ρ_i²),     I(T;Y) = I(T;X) − ½ Σ ln β ρ_i²,     sums over β ρ_i² > 1
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError, ShapeError
from bolza.core.reference import Reference, cites

__all__ = ["GaussianBottleneck", "canonical_correlations", "gaussian_bottleneck", "gaussian_projection"]

CHECHIK = Reference(
    key="chechik2005information",
    authors="Chechik, Gal and Globerson, Amir and Tishby, Naftali and Weiss, Yair",
    title="Information Bottleneck for Gaussian Variables",
    year=2005,
    venue="Journal of Machine Learning Research",
)


@dataclass(frozen=True)
class GaussianBottleneck:
    """The best representation at a price β; information in nats.

    Args:
        input: I(T;X), the shape of β.
        output: I(T;Y).
        ceiling: I(X;Y), which ``output`` tends to as β → ∞.
        gains: α_i², squared gain of each canonical direction of unit variance, ``(*beta, directions)``; 0
            where it is left out.
        critical: β at which each direction enters, 1/ρ_i², ``(directions,)``.

    Example:
        >>> gaussian_bottleneck(0.8, 2.0).critical
        tensor([1.5625], dtype=torch.float64)
    """

    input: Tensor
    output: Tensor
    ceiling: Tensor
    gains: Tensor
    critical: Tensor


@cites(CHECHIK)
def gaussian_bottleneck(correlations: float | Tensor, beta: float | Tensor) -> GaussianBottleneck:
    r"""Information curve of jointly Gaussian X and Y: T_i = α_i X_i + ξ_i along the canonical directions.

        α_i² = max(0, (β ρ_i² − 1)/(1 − ρ_i²)),   I(T;X) = ½ Σ ln(1 + α_i²)

    Args:
        correlations: canonical correlations ρ_i, one number (scalar X and Y) or ``(directions,)``, in (−1, 1).
        beta: price β ≥ 0 of a nat about Y in nats about X; any shape.

    Returns:
        :class:`GaussianBottleneck`, float64.

    Raises:
        ArgumentError: a correlation is not inside (−1, 1), or β is negative.

    Reference: Chechik et al. (2005), theorem 3.1 and §4. Departure: directions have unit variance, so that α² is
    the signal-to-noise ratio of T.

    Example:
        >>> found = gaussian_bottleneck(0.8, 2.0)
        >>> [round(float(v), 6) for v in (found.gains, found.input, found.output)]
        [0.777778, 0.287682, 0.164252]
    """
    rho = torch.atleast_1d(torch.as_tensor(correlations, dtype=torch.float64))
    price = torch.as_tensor(beta, dtype=torch.float64)
    if rho.ndim != 1 or not bool((rho.abs() < 1).all()):
        raise ArgumentError(
            f"correlations={correlations} must be numbers inside (−1, 1): a list of them at most"
        )
    if not bool(((price >= 0) & price.isfinite()).all()):
        raise ArgumentError(f"beta={beta} must be finite and not negative; its limit is ``ceiling``")
    square = rho.square()
    lam = 1 - square
    gains = ((price[..., None] * square - 1) / lam).clamp_min(0)
    about_x = 0.5 * gains.log1p().sum(-1)
    # T_i given Y has variance 1 + α² λ
    about_y = about_x - 0.5 * (gains * lam).log1p().sum(-1)
    return GaussianBottleneck(about_x, about_y, -0.5 * lam.log().sum(), gains, 1 / square)


def canonical_correlations(cov_x: Tensor, cov_xy: Tensor, cov_y: Tensor) -> Tensor:
    """Canonical correlations of X and Y, largest first: singular values of Σ_x^{−1/2} Σ_xy Σ_y^{−1/2}.

    Args:
        cov_x: covariance of X, ``(n, n)``, positive definite.
        cov_xy: covariance between X and Y, ``(n, m)``.
        cov_y: covariance of Y, ``(m, m)``, positive definite.

    Returns:
        ``(min(n, m),)``, float64.

    Raises:
        ShapeError: the shapes do not fit.
        ArgumentError: a covariance is not positive definite, or they do not fit together.

    Example:
        >>> canonical_correlations(torch.eye(2), torch.diag(torch.tensor([0.8, 0.3])), torch.eye(2))
        tensor([0.8000, 0.3000], dtype=torch.float64)
    """
    return _canonical(cov_x, cov_xy, cov_y)[0]


@cites(CHECHIK)
def gaussian_projection(cov_x: Tensor, cov_xy: Tensor, cov_y: Tensor, beta: float) -> Tensor:
    r"""The matrix A of the best representation T = A X + ξ, ξ ~ N(0, I), of Gaussian X and Y.

    Rows are the canonical directions of X that have entered at this β, scaled by α_i.

    Args:
        cov_x: covariance of X, ``(n, n)``, positive definite.
        cov_xy: covariance between X and Y, ``(n, m)``.
        cov_y: covariance of Y, ``(m, m)``, positive definite.
        beta: price β.

    Returns:
        ``(directions that have entered, n)``, float64.

    Raises:
        ShapeError: the shapes do not fit.
        ArgumentError: a covariance is not positive definite, they do not fit together, or β is negative.

    Reference: Chechik et al. (2005), theorem 3.1.

    Example:
        >>> one = torch.eye(1)
        >>> gaussian_projection(one, 0.8 * one, one, 2.0).abs()
        tensor([[0.8819]], dtype=torch.float64)
    """
    rho, rows = _canonical(cov_x, cov_xy, cov_y)
    gains = gaussian_bottleneck(rho.clamp_max(1 - 1e-12), beta).gains
    return (gains.sqrt()[:, None] * rows)[gains > 0]


def _canonical(cov_x: Tensor, cov_xy: Tensor, cov_y: Tensor) -> tuple[Tensor, Tensor]:
    """Correlations and, as rows, the directions of X with unit variance."""
    x, xy, y = (torch.as_tensor(c, dtype=torch.float64) for c in (cov_x, cov_xy, cov_y))
    n, m = (xy.shape[0], xy.shape[1]) if xy.ndim == 2 else (-1, -1)
    if not n * m or x.shape != (n, n) or y.shape != (m, m):
        raise ShapeError(
            f"cov_x {tuple(x.shape)}, cov_xy {tuple(xy.shape)} and cov_y {tuple(y.shape)} must be (n, n), (n, m) and"
            " (m, m)"
        )
    for name, c in (("cov_x", x), ("cov_xy", xy), ("cov_y", y)):
        if not bool(c.isfinite().all()):
            raise ArgumentError(f"{name} holds numbers that are not finite")
    roots = []
    for name, c in (("cov_x", x), ("cov_y", y)):
        values, vectors = torch.linalg.eigh((c + c.T) / 2)
        if float(values[0]) <= 0:
            raise ArgumentError(
                f"{name} has the eigenvalue {float(values[0]):.3g}: it must be positive definite; drop the "
                "directions that never vary"
            )
        roots.append(vectors / values.sqrt() @ vectors.T)
    u, s, _ = torch.linalg.svd(roots[0] @ xy @ roots[1], full_matrices=False)
    if float(s[0]) > 1 + 1e-6:
        raise ArgumentError(
            f"cov_xy has the correlation {float(s[0]):.6g}, above 1: no variables have these three covariances together"
        )
    return s, u.T @ roots[0]
