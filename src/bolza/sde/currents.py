r"""Probability currents of a stochastic run: why its noise makes it circle, how fast and around what.

    dθ = −∇f dt + √(2 T D(θ)) dW,      ρ^ss ∝ exp(−Φ/T),      j = −∇f + D ∇Φ − T ∇·D,      ∇·(j ρ^ss) = 0

T is η/(2B) for SGD and D the covariance Σ of the gradients of single samples. Where D is not a multiple of the
identity, the most likely places are the minima of the implicit potential Φ, which is not f, and the stationary state
carries a current j along its level lines, which :func:`~bolza.sde.area_rate` sees in a path.

Reference: Chaudhari & Soatto (2018), *Stochastic Gradient Descent Performs Variational Inference, Converges to Limit
Cycles for Deep Networks*, arXiv:1710.11029.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError, DivergenceError
from bolza.core.reference import Reference, cites
from bolza.ops.batches import Data, Loss
from bolza.ops.lyapunov import continuous_lyapunov, discrete_lyapunov
from bolza.sde.fokker_planck import FokkerPlanck
from bolza.sde.network_moments import NetworkMoments, network_moments

__all__ = [
    "GridCurrent",
    "LinearCurrent",
    "linear_current",
    "network_current",
    "stationary_current",
]

CHAUDHARI = Reference(
    "chaudhari2018variational",
    "Chaudhari, Pratik and Soatto, Stefano",
    "Stochastic Gradient Descent Performs Variational Inference, Converges to Limit Cycles for Deep Networks",
    2018,
    venue="International Conference on Learning Representations",
    arxiv="1710.11029",
)

# --------------------------------------------------------------------------- quadratic losses


@dataclass(frozen=True)
class LinearCurrent:
    r"""Stationary state of a linear equation with noise; made by :func:`linear_current`.

    Attributes:
        covariance: S.
        potential: U = T S⁻¹; the implicit potential is Φ(θ) = ½ θᵀUθ.
        Q: the antisymmetric part of the flow, Q = (AS − SAᵀ)/(2T), with A = (D + Q) U for the equation.
        current: the matrix J of the current j(θ) = J θ, J = −Q U; D U − A for the equation.
        area_rate: L = ⟨x ẋᵀ − ẋ xᵀ⟩ = 2 T Q, what :func:`~bolza.sde.area_rate` measures.
        frequencies: angular velocities of the loops, radians a unit of time, largest first.
        entropy_production: tr(J S Jᵀ (T D)⁻¹) a unit of time: zero where the run looks the same backwards, infinite
            where D has no noise along the current.
        directions: columns in the space of the parameters that the matrices refer to, for a network.
    """

    covariance: Tensor
    potential: Tensor
    Q: Tensor
    current: Tensor
    area_rate: Tensor
    frequencies: Tensor
    entropy_production: float
    directions: Tensor | None = None

    @property
    def period(self) -> float:
        """Time of the fastest loop, infinite without one."""
        fastest = float(self.frequencies[0]) if len(self.frequencies) else 0.0
        return 2 * math.pi / fastest if fastest > 0 else math.inf


@cites(CHAUDHARI)
def linear_current(
    A: Tensor, D: Tensor, *, temperature: float, lr: float | None = None, momentum: float = 0.0
) -> LinearCurrent:
    r"""Implicit potential, current and loops of a quadratic loss under constant noise, exactly.

        dθ = −A θ dt + √(2 T D) dW,      A S + S Aᵀ = 2 T D,      Φ = ½ θᵀ(T S⁻¹)θ

    The current vanishes, and Φ is the loss up to a factor, only where A and D commute.

    Args:
        A: Hessian, or any matrix of linear drift, ``(k, k)``.
        D: covariance of the noise, ``(k, k)``; Σ of single samples for SGD.
        temperature: T; η/(2B) for SGD.
        lr: learning rate η, to have the covariance and the area rate of the steps of SGD themselves and not those of
            the equation; times are still k η.
        momentum: heavy-ball μ of these steps.

    Returns:
        LinearCurrent, float64.

    Raises:
        DivergenceError: nothing is stationary: A has an eigenvalue without positive real part, or lr is too large.
        ArgumentError: the temperature is not positive, momentum comes without a learning rate, or D is no covariance
            or leaves a direction without noise.
        ShapeError: A or D is not square, or they differ in size.

    Reference: Chaudhari & Soatto (2018), §5. Departure: the steps of SGD, exactly, beside the equation.

    Example:
        >>> A, D = torch.diag(torch.tensor([1.0, 3.0])), torch.tensor([[1.0, 0.8], [0.8, 1.0]])
        >>> found = linear_current(A, D, temperature=0.05)
        >>> print(f"{found.period:.2f} {found.entropy_production:.6f}")
        6.54 1.777778
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ArgumentError(f"temperature is {temperature}: it must be positive")
    if momentum and lr is None:
        raise ArgumentError(
            f"momentum is {momentum} without a learning rate: give lr, the equation has no steps"
        )
    A, D = A.detach().double(), D.detach().double()
    if D.ndim == 2 and D.shape[0] == D.shape[1] and bool(torch.isfinite(D).all()):
        ends = torch.linalg.eigvalsh((D + D.mT) / 2)[[0, -1]]
        if not torch.allclose(D, D.mT, rtol=1e-4, atol=1e-6 * float(ends[1])) or bool(
            ends[0] < -1e-6 * ends[1]
        ):
            raise ArgumentError(
                f"D is {D.tolist()}: a covariance is symmetric and has no negative eigenvalue"
            )
        D = (D + D.mT) / 2
    if lr is None:
        S = continuous_lyapunov(A, 2 * temperature * D).S
        S = (S + S.mT) / 2
        L = A @ S - S @ A.mT
    else:
        eye, k = torch.eye(len(A), dtype=A.dtype, device=A.device), len(A)
        step = torch.cat(
            [torch.cat([eye - lr * A, momentum * eye], 1), torch.cat([-lr * A, momentum * eye], 1)]
        )
        noise = (2 * temperature * lr * D).repeat(2, 2)
        both = discrete_lyapunov(step, noise).S
        both = (both + both.mT) / 2
        S, later = both[:k, :k], (step @ both)[:k, :k]
        L = (later.mT - later) / lr
    inverse, singular = torch.linalg.inv_ex(S)
    if bool(singular):
        raise ArgumentError(
            "D is zero in a direction into which A does not carry noise either: leave that direction out, nothing moves"
        )
    J = -L @ inverse / 2
    values = torch.linalg.eigvals(J).imag
    return LinearCurrent(
        S,
        temperature * inverse,
        L / (2 * temperature),
        J,
        L,
        values[values > 0].sort(descending=True).values,
        _dissipation(J @ S @ J.mT, temperature * D),
    )


def _dissipation(moment: Tensor, D: Tensor) -> float:
    """Trace of D⁻¹ times the second moment of the current, which must lie in the range of D."""
    values, vectors = torch.linalg.eigh(D)
    along = torch.einsum("ij,ia,ja->a", moment, vectors, vectors)
    none = values <= 1e-12 * values[-1]
    if bool((along[none] > 1e-12 * along.sum()).any()):
        return math.inf
    return float((along[~none] / values[~none]).sum())


@cites(CHAUDHARI)
def network_current(
    model: nn.Module,
    loss: Loss,
    data: Data,
    *,
    lr: float,
    batch_size: int,
    momentum: float = 0.0,
    k: int = 6,
    replacement: bool = True,
    moments: NetworkMoments | None = None,
    generator: torch.Generator | None = None,
) -> LinearCurrent:
    r"""Predict the loops of SGD along the directions of largest curvature of a network.

        A = diag(λ_1 … λ_k),   D = VᵀΣV,   T = η/(2B)

    V is invariant under the Hessian, so that in the quadratic model these coordinates move by themselves. Compare with
    ``area_rate(path @ found.directions, dt=lr)`` of a run.

    Args:
        model: the network, near where training has settled; only read.
        loss: ``loss(prediction, y)``, a mean over samples.
        data: one pair ``(x, y)`` or an iterable of batches.
        lr: learning rate η.
        batch_size: B.
        momentum: heavy-ball μ.
        k: directions of largest curvature.
        replacement: whether batches are drawn with replacement.
        moments: found before by :func:`~bolza.sde.network_moments` with the same settings.
        generator: of the random start of Lanczos.

    Returns:
        LinearCurrent of the steps, in the time k η, with its ``directions``. Directions of negative curvature, or that
        the learning rate makes unstable, are left out.

    Raises:
        DivergenceError: fewer than two directions are at rest.
        ArgumentError: a setting is out of range.

    Reference: Chaudhari & Soatto (2018), §5. Departure: the steps themselves, along the top directions.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> x, net = torch.randn(64, 3), nn.Linear(3, 1)
        >>> y = x.sum(1, keepdim=True) + x[:, :1] ** 2
        >>> loops = network_current(net, nn.functional.mse_loss, (x, y), lr=0.05, batch_size=4, k=3)
        >>> loops.directions.shape, loops.period > 1
        (torch.Size([4, 3]), True)
    """
    found = moments or network_moments(
        model,
        loss,
        data,
        lr=lr,
        batch_size=batch_size,
        momentum=momentum,
        k=k,
        replacement=replacement,
        generator=generator,
    )
    kept = ~found.unstable
    if int(kept.sum()) < 2:
        raise DivergenceError(
            f"{int(kept.sum())} of {len(kept)} directions are at rest with lr={lr:g}: lower it, or train longer first"
        )
    current = linear_current(
        torch.diag(found.curvature[kept]),
        found.noise[kept][:, kept],
        temperature=found.temperature * (1 - momentum),
        lr=lr,
        momentum=momentum,
    )
    return replace(current, directions=found.directions[:, kept])


# ------------------------------------------------------------------------------------------ grids


@dataclass(frozen=True)
class GridCurrent:
    """Stationary state of an equation on a grid; made by :func:`stationary_current`.

    Attributes:
        density: ρ^ss, shape ``cells``.
        potential: Φ = −T log ρ^ss, its minimum at zero.
        flux: J = j ρ^ss, ``(d, *cells)``; free of divergence.
        velocity: j, ``(d, *cells)``; zero where the density has no weight.
        entropy_production: ∫ J·(T D)⁻¹ J/ρ a unit of time.
        likeliest: centre of the cell in which Φ is lowest, ``(d,)``.
    """

    density: Tensor
    potential: Tensor
    flux: Tensor
    velocity: Tensor
    entropy_production: float
    likeliest: Tensor


@cites(CHAUDHARI)
def stationary_current(equation: FokkerPlanck) -> GridCurrent:
    r"""Implicit potential, current and entropy production of any equation on a grid.

        Φ = −T log ρ^ss,      j = J/ρ^ss = −∇f + D ∇Φ − T ∇·D

    Args:
        equation: made by :func:`~bolza.sde.fokker_planck`.

    Returns:
        GridCurrent.

    Raises:
        DivergenceError: the stationary law cannot be had.

    Reference: Chaudhari & Soatto (2018), §3 and §5.

    Example:
        >>> from bolza.sde import fokker_planck
        >>> box = ((-1.3, 1.3), (-0.8, 0.8))
        >>> bowl = lambda x: x[..., 0] ** 2 / 2 + 3 * x[..., 1] ** 2 / 2
        >>> D = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
        >>> found = stationary_current(fokker_planck(bowl, box, 80, temperature=0.05, diffusion=D))
        >>> print(f"{found.entropy_production:.2f}")
        1.77
    """
    log_rho = equation.log_stationary()
    rho = log_rho.exp()
    flux = equation.current(rho)
    floor = 1e-12 * rho.max()
    lowest = int(rho.argmax())
    return GridCurrent(
        rho,
        -equation.temperature * (log_rho - log_rho.max()),
        flux,
        torch.where(rho > floor, flux / rho.clamp(min=floor), 0.0),
        equation.entropy_production(rho),
        equation.points.reshape(-1, len(equation.axes))[lowest],
    )
