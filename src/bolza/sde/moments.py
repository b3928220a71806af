r"""Where SGD comes to rest: the covariance of its iterates around a quadratic minimum.

    f = ½ θᵀHθ,  noise of the gradient C = Σ/B,  preconditioner P (the identity unless given)

    exact steps      S = (I − ηPH) S (I − ηPH)ᵀ + η² PCPᵀ                (P = I: HS + SH − ηHSH = ηC)
    diffusion        PH S + S (PH)ᵀ = η PCPᵀ
    heavy ball       the same two, for position and velocity together:  v ← μv − ηPg,  x ← x + v

The exact equation holds at every learning rate that is stable; the diffusion is its limit for η‖H‖ ≪ 1. Here the
noise does not depend on where the iterate is; :mod:`bolza.sde.mean_square` is for noise that grows with the error.

Reference: Mandt, Hoffman & Blei (2017), *Stochastic Gradient Descent as Approximate Bayesian Inference*, §3;
Li, Tai & E (2017) for the underdamped diffusion of momentum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError, DivergenceError, ShapeError
from bolza.core.reference import Reference, cites
from bolza.ops.lyapunov import LyapunovSolution, continuous_lyapunov, discrete_lyapunov

__all__ = ["StationaryMoments", "stationary_covariance"]

MANDT = Reference(
    key="mandt2017stochastic",
    authors="Mandt, Stephan and Hoffman, Matthew D. and Blei, David M.",
    title="Stochastic Gradient Descent as Approximate Bayesian Inference",
    year=2017,
    venue="Journal of Machine Learning Research 18",
    arxiv="1704.04289",
)


@dataclass(frozen=True)
class StationaryMoments:
    """Second moments of SGD at rest in a quadratic minimum.

    Attributes:
        covariance: S = E θθᵀ of the position, ``(*batch, d, d)``.
        excess_loss: ½ tr(HS), how far the mean loss lies above the minimum, ``(*batch,)``.
        velocity: covariance of the velocity a step, ``(*batch, d, d)``; None without momentum.
        margin: distance from instability, ``(*batch,)``: 1 − the modulus of the slowest mode a step (exact), or its
            rate a unit of time (diffusion; a step with momentum).
        residual: what is left of the Lyapunov equation, relative, ``(*batch,)``.
    """

    covariance: Tensor
    excess_loss: Tensor
    velocity: Tensor | None
    margin: Tensor
    residual: Tensor


def check_settings(lr: float, batch_size: int, momentum: float, samples: int | None) -> float:
    """Factor from Σ to the covariance of a mini-batch gradient, after a look at the settings of SGD.

    Raises:
        ArgumentError: a setting is out of range.
    """
    if not (lr > 0 and lr < float("inf")):
        raise ArgumentError(f"lr is {lr}: the learning rate must be positive and finite")
    if not 0 <= momentum < 1:
        raise ArgumentError(f"momentum is {momentum}: it must be at least 0 and below 1")
    if batch_size < 1 or (samples is not None and (batch_size > samples or samples < 2)):
        raise ArgumentError(
            f"batch_size is {batch_size}: it must be at least 1"
            + (
                ""
                if samples is None
                else f", and at most the samples={samples} that are drawn without replacement"
            )
        )
    return 1 / batch_size if samples is None else (samples - batch_size) / (batch_size * (samples - 1))


@cites(MANDT)
def stationary_covariance(
    hessian: Tensor,
    noise: Tensor,
    *,
    lr: float,
    batch_size: int = 1,
    momentum: float = 0.0,
    preconditioner: Tensor | None = None,
    samples: int | None = None,
    exact: bool = True,
) -> StationaryMoments:
    r"""Covariance of SGD's iterates at rest in a quadratic minimum, by Lyapunov equations.

        HS + SH − ηHSH = ηΣ/B        (exact;  with momentum: position and velocity together)
        HS + SH = ηΣ/B               (diffusion)

    One matrix of momentum costs a Schur form of size 2d. Leading dimensions of any argument are a batch.

    Args:
        hessian: H, symmetric positive definite, ``(*batch, d, d)``.
        noise: covariance Σ of the gradient of one sample, ``(*batch, d, d)``.
        lr: learning rate η.
        batch_size: B.
        momentum: μ of the heavy ball v ← μv − ηg, x ← x + v.
        preconditioner: P of θ ← θ − ηPg, ``(*batch, d, d)``, or ``(d,)`` for a diagonal one; the identity by default.
        samples: size N of the data set if batches are drawn from it without replacement: Σ/B is then multiplied by
            (N − B)/(N − 1).
        exact: whether steps are what they are, or the diffusion that they approach as η → 0.

    Returns:
        StationaryMoments, differentiable in H, Σ and P.

    Raises:
        ArgumentError: a setting is out of range.
        DivergenceError: nothing is stationary: lr is above the limit 2(1 + μ)/λ_max(PH), or H has no positive curvature
            in some direction.
        ShapeError: shapes do not belong together.

    Reference: Mandt, Hoffman & Blei (2017), §3 and §4.3 (the diffusion). Departure: the exact equations.

    Example:
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> at_rest = stationary_covariance(one, one, lr=0.1, momentum=0.9)
        >>> at_rest.covariance                        # 0.5 for the diffusion
        tensor([[0.5135]], dtype=torch.float64)
        >>> stationary_covariance(one, one, lr=0.1, batch_size=4, exact=False).excess_loss     # η tr Σ / 4B
        tensor(0.0063, dtype=torch.float64)
    """
    scale = check_settings(lr, batch_size, momentum, samples)
    if hessian.ndim < 2 or hessian.shape[-1] != hessian.shape[-2] or noise.shape[-2:] != hessian.shape[-2:]:
        raise ShapeError(
            f"hessian has shape {tuple(hessian.shape)} and noise {tuple(noise.shape)}: both must be square, of one size"
        )
    pull, push = hessian, noise * scale
    if preconditioner is not None:
        p = (torch.diag_embed(preconditioner) if preconditioner.ndim == 1 else preconditioner).to(hessian)
        if p.shape[-2:] != hessian.shape[-2:]:
            raise ShapeError(
                f"preconditioner has shape {tuple(preconditioner.shape)}: give a matrix of the size of the hessian "
                f"{tuple(hessian.shape)}, or its diagonal"
            )
        pull, push = p @ pull, p @ push @ p.mT
    try:
        solution = _solve(pull, push, lr, momentum, exact)
    except DivergenceError as error:
        raise DivergenceError(_why(pull, lr, momentum, exact)) from error
    d = hessian.shape[-1]
    S = solution.S[..., :d, :d]
    velocity = solution.S[..., d:, d:] if momentum else None
    excess = (hessian.to(S) * S).sum((-2, -1)) / 2
    return StationaryMoments(S, excess, velocity, solution.margin, solution.residual)


def _solve(pull: Tensor, push: Tensor, lr: float, momentum: float, exact: bool) -> LyapunovSolution:
    pull, push = torch.broadcast_tensors(pull, push)
    one = torch.eye(pull.shape[-1], dtype=pull.dtype, device=pull.device)
    if not momentum:
        return (
            discrete_lyapunov(one - lr * pull, lr**2 * push)
            if exact
            else continuous_lyapunov(pull, lr * push)
        )
    one = one.expand_as(pull)
    none, force = torch.zeros_like(push), lr**2 * push
    if exact:
        return discrete_lyapunov(
            _blocks(one - lr * pull, momentum * one, -lr * pull, momentum * one),
            _blocks(force, force, force, force),
        )
    # time in steps: dx = v dk,  dv = −((1 − μ) v + η PH x) dk + η (PCPᵀ)^{1/2} dW
    return continuous_lyapunov(
        _blocks(none, -one, lr * pull, (1 - momentum) * one), _blocks(none, none, none, force)
    )


def _blocks(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return torch.cat([torch.cat([a, b], -1), torch.cat([c, d], -1)], -2)


def _why(pull: Tensor, lr: float, momentum: float, exact: bool) -> str:
    curvatures = torch.linalg.eigvals(pull.detach().double()).real
    low, high = float(curvatures.min()), float(curvatures.max())
    if low <= 0:
        return (
            f"hessian has curvature {low:.3g} in some direction, where nothing holds the iterate: restrict it to "
            "directions of positive curvature"
        )
    limit = 2 * (1 + momentum) / high
    if exact:
        return (
            f"lr is {lr:g}, but SGD with momentum {momentum:g} is stable below 2(1 + μ)/λ_max = {limit:.4g}"
        )
    return f"the diffusion with lr={lr:g} and momentum={momentum:g} has no stationary law: is P positive?"
