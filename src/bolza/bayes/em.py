r"""EM with a prior as a dynamical system: a Lyapunov function that is checked, and a rate that is predicted.

    θ_{k+1} = argmax_θ Q(θ, θ_k),   Q(θ, θ′) = E[log p(y, z, θ) | y, θ′]      V(θ) = −log p(y, θ),  V(θ_{k+1}) ≤ V(θ_k)

    near a fixed point   θ_{k+1} − θ* ≈ M (θ_k − θ*),   M = I − I_c⁻¹ I_o,   I_c = −∂₁₁Q,   I_o = ∇²V = −∂₁₁Q − ∂₁₂Q

The spectral radius of M, the largest share of information that the hidden variables z take away, is the factor by which
the error falls in a step. The prior counts in both informations.

Reference: Romero, Das, Chen & Pequito (2020), arXiv:2006.12690, for the Lyapunov function; Dempster, Laird & Rubin
(1977) for the rate; Oakes (1999) for the information by the mixed derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, hessian, jacrev

from bolza.core.errors import ArgumentError, DataError, DivergenceError
from bolza.core.reference import Reference, cites

__all__ = ["EMRate", "EMRun", "bayesian_em", "em_rate", "em_step", "hidden_labels"]

ROMERO = Reference(
    "romero2020em",
    "Romero, Orlando and Das, Subhro and Chen, Pin-Yu and Pequito, Sérgio",
    "A Dynamical Systems Approach for Convergence of the Bayesian EM Algorithm",
    2020,
    arxiv="2006.12690",
)

Expected = Callable[[Tensor, Tensor], Tensor]
LogPosterior = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class EMRate:
    """How fast EM approaches a fixed point.

    Attributes:
        rate: spectral radius of M: the error falls by this factor a step, in the end.
        complete: information I_c of complete data, with the prior, ``(d, d)``.
        observed: information I_o of the data that are seen, with the prior.
        stable: whether the fixed point attracts, rate < 1; it is then a strict maximum of the posterior.
    """

    rate: float
    complete: Tensor
    observed: Tensor
    stable: bool

    def steps(self, factor: float) -> int:
        """Steps after which the error is smaller by ``factor``, in (0, 1).

        Raises:
            ArgumentError: the factor is not in (0, 1), or the fixed point does not attract.
        """
        if not 0 < factor < 1 or not self.stable:
            raise ArgumentError(
                f"factor={factor!r} must lie in (0, 1) and the rate {self.rate:.4g} below 1: EM does not converge to a "
                "point that does not attract"
            )
        return max(1, math.ceil(math.log(factor) / math.log(max(self.rate, 1e-300))))


@dataclass(frozen=True)
class EMRun:
    """A run of EM.

    Attributes:
        theta: where it ended.
        path: all iterates, ``(steps + 1, *shape)``.
        lyapunov: V = −log p(y, θ) along it, up to a constant, ``(steps + 1,)``.
        certified: whether V never rose by more than rounding.
        converged: whether the last step was shorter than the tolerance.
        contraction: ratio of the lengths of late steps, the measured rate; nan where too few are above rounding.
    """

    theta: Tensor
    path: Tensor
    lyapunov: Tensor
    certified: bool
    converged: bool
    contraction: float


def hidden_labels(
    log_joint: Callable[[Tensor], Tensor], log_prior: LogPosterior | None = None
) -> tuple[Expected, LogPosterior]:
    r"""Q and the log posterior of a model in which every sample has a hidden label: mixtures, clusters, experts.

    Args:
        log_joint: log p(y_n, z_n = k | θ) as a function of θ, ``(n, labels)``; log-sum-exp is done here.
        log_prior: log p(θ), a scalar; flat by default.

    Returns:
        Q(θ, θ′) and log p(y, θ), for `bayesian_em`.

    Reference: Dempster, Laird & Rubin (1977).

    Example:
        >>> y = torch.tensor([-1.0, 1.0])
        >>> expected, log_posterior = hidden_labels(lambda means: -((y[:, None] - means) ** 2) / 2)
        >>> round(float(log_posterior(torch.tensor([-1.0, 1.0]))), 3)         # 2 log(1 + e⁻²)
        0.254
    """

    def prior(theta: Tensor) -> Tensor:
        return theta.new_zeros(()) if log_prior is None else log_prior(theta)

    def expected(theta: Tensor, before: Tensor) -> Tensor:
        share = log_joint(before).softmax(-1)
        return (share * log_joint(theta)).sum() + prior(theta)

    def log_posterior(theta: Tensor) -> Tensor:
        return log_joint(theta).logsumexp(-1).sum() + prior(theta)

    return expected, log_posterior


@cites(ROMERO)
def em_step(theta: Tensor, expected: Expected, *, newton: int = 20) -> Tensor:
    r"""One step of EM, θ ← argmax Q(·, θ), by Newton's method; exact in one step where Q is quadratic.

    Args:
        theta: parameters θ, of any shape; a few dozen numbers, as Hessians are formed.
        expected: Q(θ, θ′), a scalar, twice differentiable in θ.
        newton: largest number of Newton steps; each is halved until Q rises.

    Returns:
        The next θ.

    Raises:
        DataError: Q or its derivatives are not finite.

    Reference: Romero et al. (2020), §2.

    Example:
        >>> def expected(theta, before):             # y = 3 seen through z: z ~ N(θ, 1), y ~ N(z, 3)
        ...     z = before + (3.0 - before) / 4
        ...     return -((z - theta) ** 2).sum() / 2
        >>> em_step(torch.zeros(1), expected)
        tensor([0.7500])
    """
    before, here = theta.detach(), theta.detach()

    def q(flat: Tensor) -> Tensor:
        return expected(flat.reshape(before.shape), before)

    flat = here.reshape(-1)
    value = q(flat)
    tolerance = 8 * torch.finfo(flat.dtype).eps
    for _ in range(newton):
        slope, curve = grad(q)(flat), hessian(q)(flat)
        if not bool(torch.isfinite(slope).all() and torch.isfinite(curve).all()):
            raise DataError("the expected log-likelihood has derivatives that are not finite at this theta")
        move, info = _uphill(slope, curve)
        length = 1.0
        rounding = tolerance * float(value.abs() + 1)
        while length > 1e-10:
            there = flat + length * move
            new = q(there)
            if bool(new >= value - rounding):  # nan is not
                break
            length /= 2
        else:
            break
        flat, value = there, new
        if float(move.norm()) <= tolerance * float(1 + flat.norm()) or info == 0.0:
            break
    return flat.reshape(before.shape).detach()


def _uphill(slope: Tensor, curve: Tensor) -> tuple[Tensor, float]:
    """Newton's step, uphill also where Q is not concave; and the length of the slope."""
    values, vectors = torch.linalg.eigh(-(curve + curve.mT) / 2)
    floor = 1e-8 * values.abs().max().clamp_min(torch.finfo(slope.dtype).tiny)
    move = vectors @ ((vectors.mT @ slope) / values.abs().clamp_min(floor))
    return move, float(slope.norm())


@cites(ROMERO)
def em_rate(theta: Tensor, expected: Expected) -> EMRate:
    r"""The rate at a fixed point, from information: spectral radius of I − I_c⁻¹ I_o.

    Args:
        theta: the fixed point θ*.
        expected: Q(θ, θ′).

    Returns:
        EMRate.

    Raises:
        DivergenceError: I_c is not positive definite: Q has no strict maximum at θ.

    Reference: Dempster, Laird & Rubin (1977), §4; Oakes (1999), for I_o = −∂₁₁Q − ∂₁₂Q.

    Example:
        >>> def expected(theta, before):             # y = 3 seen through z: z ~ N(θ, 1), y ~ N(z, 3)
        ...     z = before + (3.0 - before) / 4
        ...     return -((z - theta) ** 2).sum() / 2
        >>> found = em_rate(torch.tensor([3.0]), expected)
        >>> round(found.rate, 6), found.steps(1e-3)
        (0.75, 25)
    """
    flat, shape = theta.detach().reshape(-1), theta.shape

    def q(a: Tensor, b: Tensor) -> Tensor:
        return expected(a.reshape(shape), b.reshape(shape))

    complete = -hessian(q, 0)(flat, flat)
    mixed = jacrev(grad(q, 0), 1)(flat, flat)
    complete = (complete + complete.mT) / 2
    factor, info = torch.linalg.cholesky_ex(complete)
    if int(info) or not bool(torch.isfinite(complete).all()):
        raise DivergenceError(
            "the information of complete data is not positive definite: theta is no strict maximum of Q; a prior, or "
            "fixing what the model cannot tell apart, makes it one"
        )
    # M = I_c⁻¹ ∂₁₂Q is similar to a symmetric matrix at a fixed point
    inner = torch.linalg.solve_triangular(factor, mixed, upper=False)
    inner = torch.linalg.solve_triangular(factor, inner.mT, upper=False)
    rate = float(torch.linalg.eigvals(inner).abs().max())
    return EMRate(rate, complete, complete - (mixed + mixed.mT) / 2, rate < 1)


@cites(ROMERO)
def bayesian_em(
    theta: Tensor,
    expected: Expected,
    log_posterior: LogPosterior,
    *,
    maximise: Callable[[Tensor], Tensor] | None = None,
    max_steps: int = 1000,
    tol: float = 1e-10,
) -> EMRun:
    r"""EM to the mode of a posterior, with V(θ) = −log p(y, θ) checked in every step.

    Args:
        theta: start, float64 for a sharp certificate.
        expected: Q(θ, θ′).
        log_posterior: log p(y, θ) up to a constant, a scalar.
        maximise: θ′ ↦ argmax_θ Q(θ, θ′) in closed form, if you have it; `em_step` by default.
        max_steps: largest number of steps.
        tol: stop when a step is shorter than this, relative to 1 + |θ|.

    Returns:
        EMRun; ``em_rate(run.theta, expected)`` predicts its contraction.

    Raises:
        ArgumentError: max_steps is not positive.
        DivergenceError: V is not finite.

    Reference: Romero et al. (2020), §3. Departure: the fall of V is measured, not assumed: a wrong ``maximise`` or Q
    shows as ``certified=False``.

    Example:
        >>> y = torch.tensor([-2.1, -1.9, 1.8, 2.2], dtype=torch.float64)
        >>> expected, log_posterior = hidden_labels(
        ...     lambda means: -((y[:, None] - means) ** 2) / 2, lambda means: -(means**2).sum() / 200
        ... )
        >>> run = bayesian_em(torch.tensor([-0.5, 0.5], dtype=torch.float64), expected, log_posterior)
        >>> run.certified, run.converged, [round(m, 2) for m in run.theta.tolist()]
        (True, True, [-1.99, 1.99])
    """
    if max_steps < 1:
        raise ArgumentError(f"max_steps is {max_steps}: it must be at least 1")
    step = maximise or (lambda before: em_step(before, expected))
    with torch.no_grad():
        path, values = [theta.detach()], [_lyapunov(theta, log_posterior)]
        lengths: list[float] = []
        converged = False
        while len(lengths) < max_steps and not converged:
            here = step(path[-1]).detach()
            lengths.append(float((here - path[-1]).norm()))
            path.append(here)
            values.append(_lyapunov(here, log_posterior))
            converged = lengths[-1] <= tol * (1 + float(here.norm()))
    lyapunov = torch.stack(values)
    rises = lyapunov.diff() / lyapunov[:-1].abs().clamp_min(1)
    slack = max(1e-9, 100 * torch.finfo(lyapunov.dtype).eps)
    return EMRun(
        path[-1],
        torch.stack(path),
        lyapunov,
        bool((rises <= slack).all()),
        converged,
        _contraction(lengths, 1e4 * torch.finfo(lyapunov.dtype).eps * (1 + float(path[-1].norm()))),
    )


def _lyapunov(theta: Tensor, log_posterior: LogPosterior) -> Tensor:
    value = -log_posterior(theta)
    if not bool(torch.isfinite(value)):
        raise DivergenceError(
            f"the log posterior is {-float(value)} at theta of norm {float(theta.norm()):.3g}: start elsewhere, or "
            "give a proper prior"
        )
    return value.detach()


def _contraction(lengths: list[float], floor: float) -> float:
    """Geometric mean of the ratios of the last quarter of the steps that are well above rounding."""
    good = [length for length in lengths if length > floor]
    tail = good[-max(3, len(good) // 4) :]
    return (tail[-1] / tail[0]) ** (1 / (len(tail) - 1)) if len(tail) > 1 else math.nan
