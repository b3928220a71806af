r"""Control with the Kullback–Leibler cost of the inputs: a log-mean-exp over random paths solves it.

    minimise over π   E[Φ(x_T) + Σ_t L_t(x_t)] + λ Σ_t KL(π_t(·|x_t) ‖ ρ),   x_{t+1} = f_t(x_t, u_t)
    e^{−V_t(x)/λ} = e^{−L_t(x)/λ} E_ρ[e^{−V_{t+1}(f_t(x, u))/λ}]
    π*_t(u|x) ∝ ρ(u) e^{−V_{t+1}(f_t(x, u))/λ}

With S the cost of a path whose inputs were drawn from ρ, V_0(x) = −λ log E e^{−S/λ}, and an expectation under the
optimal law is one under ρ with weights ∝ e^{−S/λ}. Drawing around a better guess than ρ and weighing by the
likelihood ratio leaves this exact and makes the weights even: model predictive path-integral control.

References: Ito & Kashima (2022), arXiv:2203.12864; Kappen (2005), arXiv:physics/0505066; Williams, Aldrich & Theodorou
(2017).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bolza.core.cost import Cost
from bolza.core.errors import ArgumentError, DivergenceError, ShapeError
from bolza.core.reference import Reference, cites
from bolza.core.system import System
from bolza.ops.riccati import riccati_recursion

__all__ = ["LinearKLControl", "PathIntegral", "linear_kl_control", "path_integral_policy"]

ITO = Reference(
    "ito2022kl",
    "Ito, Kaito and Kashima, Kenji",
    "Kullback-Leibler Control for Discrete-Time Nonlinear Systems on Continuous Spaces",
    2022,
    venue="SICE Journal of Control, Measurement, and System Integration",
    arxiv="2203.12864",
)
KAPPEN = Reference(
    "kappen2005path",
    "Kappen, Hilbert J.",
    "Path integrals and symmetry breaking for optimal control theory",
    2005,
    venue="Journal of Statistical Mechanics: Theory and Experiment",
    arxiv="physics/0505066",
)
WILLIAMS = Reference(
    "williams2017mppi",
    "Williams, Grady and Aldrich, Andrew and Theodorou, Evangelos A.",
    "Model Predictive Path Integral Control: From Theory to Parallel Computation",
    2017,
    venue="Journal of Guidance, Control, and Dynamics",
)


@dataclass(frozen=True)
class PathIntegral:
    """What the sampled paths say about the optimal law of the inputs.

    Attributes:
        value: V_0(x), estimated; biased upward where few paths carry the weight. Shape ``(*batch,)``.
        error: its standard error to first order, same shape.
        mean: mean of each input under the optimal law, shape ``(*batch, T, m)``; ``mean[..., 0, :]`` is the policy.
        covariance: covariance of the first input under it, shape ``(*batch, m, m)``.
        effective_samples: (Σw)²/Σw², shape ``(*batch,)``: paths that count. Below a hundred or so trust nothing.
        costs: mean of S over the drawn paths, a row a pass, shape ``(passes, *batch)``.
    """

    value: Tensor
    error: Tensor
    mean: Tensor
    covariance: Tensor
    effective_samples: Tensor
    costs: Tensor


@cites(ITO, KAPPEN, WILLIAMS)
def path_integral_policy(
    system: System,
    cost: Cost,
    x0: Tensor,
    covariance: Tensor,
    *,
    samples: int = 1000,
    temperature: float = 1.0,
    nominal: Tensor | None = None,
    iterations: int = 1,
    start: int = 0,
    generator: torch.Generator | None = None,
) -> PathIntegral:
    r"""Value and optimal inputs of a control problem with Kullback–Leibler input cost, from random paths.

    The inputs are drawn from N(ū_t, Σ) around a nominal ū and weighed by
    w ∝ exp(−S/λ) ρ(u)/q(u), log ρ/q = Σ_t (−ū_tᵀΣ⁻¹u_t + ½ū_tᵀΣ⁻¹ū_t), with ρ = N(0, Σ).
    Every further pass draws around the mean that the last one found.

    A quadratic input cost ½uᵀRu is the Kullback–Leibler cost with λΣ⁻¹ = R, apart from what the spread of the law
    costs; ``cost.running`` should not count it again.

    Args:
        system: dynamics; ``step(t, x, u)`` must be one that ``torch.func.vmap`` can map.
        cost: Φ and L_t(x, u), of one state and input.
        x0: state, shape ``(n,)``, or several, ``(*batch, n)``.
        covariance: Σ of the reference inputs, shape ``(m, m)``.
        samples: M, paths a state and pass.
        temperature: λ, in units of the cost.
        nominal: ū, shape ``(T, m)`` or ``(*batch, T, m)``, for instance the plan of the step before; zeros by default.
        iterations: passes.
        start: first step, for planning along a run: T is then ``system.horizon − start``.
        generator: source of randomness on the device of x0.

    Returns:
        PathIntegral.

    Raises:
        ArgumentError: a number is out of range, or Σ is not positive definite.
        DivergenceError: no path has a finite cost.
        ShapeError: shapes do not belong together.

    Reference: Ito & Kashima (2022), arXiv:2203.12864; sampling around a nominal: Williams, Aldrich & Theodorou (2017).

    Example:
        >>> from bolza.systems import LinearSystem
        >>> from bolza.core import CallableCost
        >>> system = LinearSystem(torch.eye(1), torch.eye(1), horizon=1)
        >>> cost = CallableCost(terminal=lambda x: x.square().sum() / 2)
        >>> found = path_integral_policy(system, cost, torch.ones(1), torch.eye(1), samples=20_000,
        ...                              generator=torch.Generator().manual_seed(0))
        >>> abs(float(found.mean[0, 0]) + 0.5) < 0.03  # exactly −½
        True
    """
    steps = system.horizon - start
    if samples < 2 or iterations < 1 or not 0 < temperature < math.inf or not 0 <= start < system.horizon:
        raise ArgumentError(
            f"samples={samples}, iterations={iterations}, temperature={temperature}, start={start}: there must be "
            f"two samples, a pass, a positive finite temperature and a start below the horizon {system.horizon}"
        )
    factor, info = torch.linalg.cholesky_ex(covariance)
    if covariance.ndim != 2 or bool(info.any()):
        raise ArgumentError("covariance is not a positive definite matrix: every input must vary under ρ")
    batch, m = x0.shape[:-1], covariance.shape[-1]
    x = x0.detach().reshape(-1, x0.shape[-1])
    shape = (*batch, steps, m)
    if nominal is not None and nominal.shape[-2:] != (steps, m):
        raise ShapeError(
            f"nominal has shape {tuple(nominal.shape)}, but (T, m) = ({steps}, {m}) or {shape} is needed"
        )
    mean = x0.new_zeros(shape) if nominal is None else nominal.detach().to(x0).expand(shape)
    mean = mean.reshape(-1, steps, m)
    walk = torch.func.vmap(torch.func.vmap(lambda state, u: _path_cost(system, cost, start, state, u)))
    averages = []
    with torch.no_grad():
        for _ in range(iterations):
            noise = torch.randn(
                len(x), samples, steps, m, dtype=x.dtype, device=x.device, generator=generator
            )
            u = mean[:, None] + noise @ factor.mT
            S = walk(x[:, None].expand(-1, samples, -1), u)
            tilt = torch.cholesky_solve(mean.mT, factor).mT[:, None]  # Σ⁻¹ū, (batch, 1, T, m)
            log_ratio = (tilt * (0.5 * mean[:, None] - u)).sum((-2, -1))
            log_w = torch.where(S.isnan(), -math.inf, -S / temperature) + log_ratio
            total = torch.logsumexp(log_w, 1)
            if not bool(torch.isfinite(total).all()):
                raise DivergenceError("no path has a finite cost: draw smaller inputs, or take a lower start")
            w = torch.exp(log_w - total[:, None])
            mean = torch.einsum("bs,bstm->btm", w, u)
            averages.append(S.mean(1).reshape(batch))
        centred = u[:, :, 0] - mean[:, None, 0]
        spread = torch.einsum("bs,bsi,bsj->bij", w, centred, centred)
        square = w.square().sum(1)
        value = -temperature * (total - math.log(samples))
        error = temperature * (square - 1 / samples).clamp_min(0).sqrt()
    return PathIntegral(
        value.reshape(batch),
        error.reshape(batch),
        mean.reshape(shape),
        spread.reshape(*batch, m, m),
        (1 / square).reshape(batch),
        torch.stack(averages),
    )


def _path_cost(system: System, cost: Cost, start: int, x: Tensor, inputs: Tensor) -> Tensor:
    total = x.new_zeros(())
    for t, u in enumerate(inputs.unbind(0), start):
        total = total + cost.running(t, x, u)
        x = system.step(t, x, u)
    return total + cost.terminal(x)


@dataclass(frozen=True)
class LinearKLControl:
    """The exact answer for linear dynamics and quadratic state cost: V_t(x) = ½xᵀP_t x + c_t, u ~ N(−K_t x, Σ_t).

    Attributes:
        P: shape ``(T+1, n, n)``.
        c: shape ``(T+1,)``, with c_T = 0.
        K: shape ``(T, m, n)``.
        covariance: Σ_t of the optimal inputs, shape ``(T, m, m)``.
    """

    P: Tensor
    c: Tensor
    K: Tensor
    covariance: Tensor

    def value(self, t: int, x: Tensor) -> Tensor:
        """V_t(x) for x of shape ``(*batch, n)``."""
        return torch.einsum("...i,ij,...j->...", x, self.P[t], x) / 2 + self.c[t]


@cites(ITO)
def linear_kl_control(
    A: Tensor,
    B: Tensor,
    Q: Tensor,
    Q_T: Tensor,
    covariance: Tensor,
    horizon: int,
    *,
    temperature: float = 1.0,
) -> LinearKLControl:
    r"""Exact optimal law of the inputs where dynamics are linear and the state cost is quadratic.

        P_t = Q + Aᵀ(P − PB(λΣ⁻¹ + BᵀPB)⁻¹BᵀP)A,   P = P_{t+1}
        π*_t = N(−K_t x, λ(λΣ⁻¹ + BᵀPB)⁻¹),   c_t = c_{t+1} + (λ/2) log det(I + ΣBᵀPB/λ)

    Args:
        A: dynamics, ``(n, n)``.
        B: input matrix, ``(n, m)``.
        Q: weight of the state, L = ½xᵀQx, ``(n, n)``.
        Q_T: weight of the last state, ``(n, n)``.
        covariance: Σ of the reference inputs N(0, Σ), ``(m, m)``.
        horizon: number of steps T.
        temperature: λ.

    Returns:
        LinearKLControl.

    Raises:
        ArgumentError: Σ is not positive definite, or the temperature is not positive.

    Reference: Ito & Kashima (2022), arXiv:2203.12864, the linear-quadratic case.

    Example:
        >>> one = torch.eye(1)
        >>> exact = linear_kl_control(one, one, 0 * one, one, one, horizon=1)
        >>> exact.K.item(), exact.covariance.item(), round(exact.c[0].item(), 4)       # ½ log 2
        (0.5, 0.5, 0.3466)
    """
    if not temperature > 0:
        raise ArgumentError(f"temperature={temperature} must be positive")
    if bool(torch.linalg.cholesky_ex(covariance)[1].any()):
        raise ArgumentError("covariance is not positive definite: every input must vary under the reference")
    R = temperature * torch.linalg.inv(covariance.double())
    found = riccati_recursion(A, B, Q, R.to(Q_T), Q_T, horizon)
    hessians = R + B.double().mT @ found.P[1:].double() @ B.double()
    gains = temperature / 2 * torch.logdet(hessians @ torch.linalg.inv(R))
    c = torch.cat([gains.flip(0).cumsum(0).flip(0), gains.new_zeros(1)])
    return LinearKLControl(found.P, c.to(Q_T), found.K, (temperature * torch.linalg.inv(hessians)).to(Q_T))
