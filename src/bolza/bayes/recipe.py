r"""The complete recipe: every diffusion that leaves a given law at rest, from two matrices.

    dz = [−(D + Q)∇E + Γ] dt + √(2D) dW,     Γ_i = Σ_j ∂_j(D_ij + Q_ij),     D ⪰ 0,  Q = −Qᵀ      ⇒   ρ ∝ exp(−E)

    SGLD          z = θ         D = I
    Riemannian    z = θ         D = G(θ)                                   with Γ = div G
    HMC           z = (θ, m)    D = 0                   Q = [[0, −I], [I, 0]]
    SGHMC, BAOAB  z = (θ, m)    D = diag(0, γI)         Q as for HMC
    SGNHT         z = (θ, m, ξ) D = diag(0, AI, 0)      Q as for HMC, and ±m/n between m and ξ

How well a sampler does it with finite steps is another question, which a Gaussian law answers in closed form:
:func:`stationary_variance`.

Reference: Ma, Chen & Fox (2015), arXiv:1506.04696.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import grad, jacfwd, vmap

from bolza.core.diffusion import Diffusion
from bolza.core.errors import ArgumentError, ShapeError
from bolza.core.reference import Reference, cites

__all__ = [
    "REFERENCE",
    "Recipe",
    "complete_recipe",
    "named_recipe",
    "stationarity_residual",
    "stationary_variance",
]

REFERENCE = Reference(
    "ma2015recipe",
    "Ma, Yi-An and Chen, Tianqi and Fox, Emily B.",
    "A Complete Recipe for Stochastic Gradient MCMC",
    2015,
    venue="Advances in Neural Information Processing Systems",
    arxiv="1506.04696",
)

Field = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Recipe:
    """A diffusion with a law at rest, one point z ``(n,)`` at a time.

    Attributes:
        energy: E, z → scalar.
        D: z → symmetric positive semi-definite matrix ``(n, n)``.
        Q: z → antisymmetric matrix ``(n, n)``.
    """

    energy: Field
    D: Field
    Q: Field

    def correction(self, z: Tensor) -> Tensor:
        """Γ_i = Σ_j ∂_j(D_ij + Q_ij), at one point."""
        return torch.einsum("ijj->i", jacfwd(lambda at: self.D(at) + self.Q(at))(z))

    def drift(self, z: Tensor) -> Tensor:
        """−(D + Q)∇E + Γ, at one point."""
        return self.correction(z) - (self.D(z) + self.Q(z)) @ grad(self.energy)(z)

    def diffusion(self) -> Diffusion:
        """The equation for :func:`bolza.core.simulate`, on states ``(paths, n)``."""

        def factor(t: float, x: Tensor, noise: Tensor) -> Tensor:
            values, vectors = torch.linalg.eigh(2 * vmap(self.D)(x))
            root = vectors * values.clamp_min(0).sqrt()[..., None, :]  # R Rᵀ = 2D
            return (root @ noise[..., None])[..., 0]

        return Diffusion(lambda t, x: vmap(self.drift)(x), factor)


def _constant(matrix: Field | Tensor, name: str) -> Field:
    if not isinstance(matrix, Tensor):
        return matrix
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ShapeError(f"{name} has shape {tuple(matrix.shape)}: it must be a square matrix")
    return lambda z: matrix.to(z)


@cites(REFERENCE)
def complete_recipe(energy: Field, D: Field | Tensor, Q: Field | Tensor | None = None) -> Recipe:
    r"""A diffusion whose law at rest is exp(−E): dz = [−(D + Q)∇E + Γ]dt + √(2D)dW, with Γ by differentiation.

    Meant for few dimensions: matrices are formed, and Γ costs n derivatives. The samplers of this package are instances
    of it that never form one.

    Args:
        energy: E, one point z ``(n,)`` → scalar, of functions that ``torch.func`` can transform.
        D: diffusion matrix, positive semi-definite: constant, or a function of z.
        Q: curl matrix, antisymmetric: constant, a function of z, or ``None`` for zero.

    Returns:
        Recipe; ``.diffusion()`` goes into :func:`bolza.core.simulate`.

    Raises:
        ArgumentError: a constant D is not symmetric positive semi-definite, or a constant Q not antisymmetric.
        ShapeError: a constant is not square.

    Reference: Ma, Chen & Fox (2015), Theorem 1.

    Example:
        >>> turn = torch.tensor([[0.0, 2.0], [-2.0, 0.0]])
        >>> r = complete_recipe(lambda z: z.square().sum() / 2, torch.eye(2), turn)
        >>> r.drift(torch.tensor([1.0, 0.0]))
        tensor([-1.,  2.])
    """
    if isinstance(D, Tensor) and D.dim() == 2 and D.shape[0] == D.shape[1]:
        scale = float(D.abs().max()) or 1.0
        if (
            not torch.allclose(D, D.T, atol=1e-6 * scale)
            or float(torch.linalg.eigvalsh(D).min()) < -1e-6 * scale
        ):
            raise ArgumentError("D is not symmetric and positive semi-definite: there is no such noise")
    if (
        isinstance(Q, Tensor)
        and Q.dim() == 2
        and not torch.allclose(Q, -Q.T, atol=1e-6 * float(Q.abs().max()))
    ):
        raise ArgumentError("Q is not antisymmetric: what is symmetric in it belongs to D")
    still: Field = lambda z: z.new_zeros(z.shape[0], z.shape[0])  # noqa: E731
    return Recipe(energy, _constant(D, "D"), still if Q is None else _constant(Q, "Q"))


@cites(REFERENCE)
def named_recipe(
    name: Literal["sgld", "riemannian", "hmc", "sghmc", "sgnht"],
    potential: Field,
    dim: int,
    *,
    friction: float = 1.0,
    metric: Field | None = None,
) -> Recipe:
    """The recipe of a known sampler, in continuous time: what it leaves at rest when gradients have no noise.

    Args:
        name: ``"sgld"``; ``"riemannian"``, with a metric; ``"hmc"``; ``"sghmc"`` (and BAOAB); ``"sgnht"``.
        potential: U, θ ``(dim,)`` → scalar.
        dim: number of coordinates of θ; z has as many, twice as many, or one more than that.
        friction: γ, the A of the thermostat.
        metric: G, θ → matrix ``(dim, dim)``, for ``"riemannian"``.

    Returns:
        Recipe on z = θ, (θ, m) or (θ, m, ξ).

    Raises:
        ArgumentError: the name is unknown, or the metric is missing.

    Reference: Ma, Chen & Fox (2015), §3; the thermostat of Ding et al. (2014).

    Example:
        >>> r = named_recipe("sghmc", lambda x: x.square().sum() / 2, 1, friction=0.5)
        >>> r.drift(torch.tensor([1.0, 2.0]))             # θ′ = m, m′ = −∇U − γm
        tensor([ 2., -2.])
    """
    eye, none = torch.eye(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64)
    if name == "sgld":
        return complete_recipe(potential, eye)
    if name == "riemannian":
        if metric is None:
            raise ArgumentError("metric is None: the Riemannian sampler needs the matrix G(θ)")
        return complete_recipe(potential, metric)
    if name not in ("hmc", "sghmc", "sgnht"):
        raise ArgumentError(
            f"name is {name!r}: choose 'sgld', 'riemannian', 'hmc', 'sghmc' (BAOAB is one) or 'sgnht'"
        )
    D = torch.block_diag(none, 0 * eye if name == "hmc" else friction * eye)
    Q = torch.cat([torch.cat([none, -eye], 1), torch.cat([eye, none], 1)])

    def energy(z: Tensor) -> Tensor:
        return potential(z[:dim]) + z[dim : 2 * dim].square().sum() / 2

    if name != "sgnht":
        return complete_recipe(energy, D, Q)

    def thermal(z: Tensor) -> Tensor:  # the thermostat rests at N(A, 1/n)
        return energy(z) + dim * (z[-1] - friction).square() / 2

    def curl(z: Tensor) -> Tensor:
        column = torch.cat([z.new_zeros(dim), z[dim : 2 * dim] / dim])[:, None]
        top = torch.cat([Q.to(z), column], 1)
        return torch.cat([top, torch.cat([-column.T, z.new_zeros(1, 1)], 1)])

    wide = torch.block_diag(D, torch.zeros(1, 1, dtype=torch.float64))
    return complete_recipe(thermal, wide, curl)


@cites(REFERENCE)
def stationarity_residual(drift: Field, D: Field | Tensor, energy: Field, z: Tensor) -> Tensor:
    r"""How far exp(−E) is from being at rest under dz = f dt + √(2D) dW, point by point: (∂_t ρ)/ρ.

    With a = f − div D + D∇E, the current over the density, it is a·∇E − div a: zero everywhere if and only if the law
    rests. a itself is zero if and only if the dynamics is reversible.

    Args:
        drift: f, one point → ``(n,)``.
        D: diffusion matrix, constant or a function of one point.
        energy: E, one point → scalar.
        z: points, shape ``(points, n)``.

    Returns:
        Shape ``(points,)``, in inverse units of time.

    Example:
        >>> well = lambda z: z.square().sum() / 2
        >>> z = torch.tensor([[0.0], [1.0]])
        >>> stationarity_residual(lambda at: -at, torch.eye(1), well, z)
        tensor([0., 0.])
        >>> stationarity_residual(lambda at: -2 * at, torch.eye(1), well, z)       # too cold
        tensor([1., 0.])
    """
    matrix = _constant(D, "D")

    def current(at: Tensor) -> Tensor:
        spreading = torch.einsum("ijj->i", jacfwd(matrix)(at))
        return drift(at) - spreading + matrix(at) @ grad(energy)(at)

    def one(at: Tensor) -> Tensor:
        return current(at) @ grad(energy)(at) - jacfwd(current)(at).diagonal().sum()

    if z.dim() != 2:
        raise ShapeError(f"z has shape {tuple(z.shape)}: give (points, n)")
    return vmap(one)(z)


Chain = Literal["sgld", "sghmc", "sghmc-explicit", "baoab"]


def stationary_variance(
    method: Chain,
    precision: float,
    *,
    h: float,
    friction: float = 1.0,
    temperature: float = 1.0,
    gradient_noise: float = 0.0,
    corrected: bool = False,
) -> float:
    r"""Variance that a chain of finite steps has at rest where the posterior is a Gaussian of this precision.

    The posterior's own is T/λ: the rest is the bias of the step and the heat of noisy gradients. Exact, from the
    discrete Lyapunov equation S = MSMᵀ + Σ of the chain.

    Args:
        method: ``"sgld"``, ``"sghmc"``, ``"sghmc-explicit"`` (θ moves by the old momentum) or ``"baoab"``.
        precision: λ, curvature of U: N times that of the mean loss, plus the prior's.
        h: step on U: lr/N for SGLD, √(lr/N) for the others.
        friction: γ in inverse units of time, α = hγ; for BAOAB 1 − α = e^{−hγ}.
        temperature: T.
        gradient_noise: V, variance of the gradient of U: N² times that of the mean loss.
        corrected: the injected noise is reduced by what the gradients bring.

    Returns:
        The variance of θ; infinite where the chain is not stable.

    Raises:
        ArgumentError: the method is unknown, or a number is out of its range.

    Reference: Welling & Teh (2011); Chen et al. (2014); Leimkuhler & Matthews (2013). For a thermostat there is no
    closed form.

    Example:
        >>> round(stationary_variance("sgld", 3.0, h=0.2, gradient_noise=4.0), 4)    # (1 + hV/2)/(λ(1 − hλ/2))
        0.6667
        >>> [round(stationary_variance(m, 3.0, h=0.2), 4) for m in ("sghmc-explicit", "sghmc", "baoab")]
        [0.8602, 0.3448, 0.3333]
    """
    if not precision > 0 or not h > 0 or friction < 0 or temperature < 0 or gradient_noise < 0:
        raise ArgumentError(
            f"precision={precision} and h={h} must be positive, friction={friction}, temperature={temperature} and "
            f"gradient_noise={gradient_noise} at least 0"
        )
    from scipy.linalg import solve_discrete_lyapunov

    kick = h * h * gradient_noise
    if method == "sgld":
        rate = 1 - h * precision
        noise = max(2 * h * temperature - (kick if corrected else 0.0), 0.0) + kick
        return noise / (1 - rate * rate) if abs(rate) < 1 else math.inf
    if method in ("sghmc", "sghmc-explicit"):
        move = torch.tensor([[1.0, 0.0], [-h * precision, 1 - h * friction]], dtype=torch.float64)
        heat = max(2 * h * friction * temperature - (kick if corrected else 0.0), 0.0) + kick
        direction = torch.tensor([0.0, 1.0], dtype=torch.float64)
        if method == "sghmc":
            drift = torch.tensor([[1.0, h], [0.0, 1.0]], dtype=torch.float64)
            move, direction = drift @ move, drift @ direction
        else:
            move[0, 1] = h
        noise_matrix = heat * torch.outer(direction, direction)
    elif method == "baoab":
        c = math.exp(-friction * h)
        into = torch.tensor([[1.0, h / 2 * (1 + c)], [0.0, c]], dtype=torch.float64)
        move = into @ torch.tensor([[1.0, 0.0], [-h * precision, 1.0]], dtype=torch.float64)
        first, second = into[:, 1], torch.tensor([h / 2, 1.0], dtype=torch.float64)
        heat = max((1 - c * c) * temperature - ((1 + c) ** 2 / 4 * kick if corrected else 0.0), 0.0)
        noise_matrix = kick * torch.outer(first, first) + heat * torch.outer(second, second)
    else:
        raise ArgumentError(f"method is {method!r}: choose 'sgld', 'sghmc', 'sghmc-explicit' or 'baoab'")
    if float(torch.linalg.eigvals(move).abs().max()) >= 1:
        return math.inf
    return float(solve_discrete_lyapunov(move.numpy(), noise_matrix.numpy())[0, 0])
