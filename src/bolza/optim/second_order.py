r"""Second derivatives of the loss of an ordinary differential equation, by backward equations.

For ẋ = F(t, x, θ) with loss Φ(x(T)) and Φ_xx = Σᵢ yᵢ yᵢᵀ, to first order in the dynamics:

    qᵢ(T) = yᵢ,  q̇ᵢ = −F_xᵀ qᵢ        rᵢ(T) = 0,  ṙᵢ = −F_θᵀ qᵢ        Q_uu = Σ rᵢ rᵢᵀ,  Q_ux = Σ rᵢ qᵢᵀ

Reference: Liu, Chen & Theodorou (2021), *Second-Order Neural ODE Optimizer*, arXiv:2109.14158.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from bolza.core import Reference, cites
from bolza.ops.trees import Tree, tree_map
from bolza.optim.recorded import check_number
from bolza.systems.ode import ODESystem

__all__ = ["REFERENCE", "SecondOrder", "second_order_adjoint"]

REFERENCE = Reference(
    "liu2021snopt",
    "Liu, Guan-Horng and Chen, Tianrong and Theodorou, Evangelos A.",
    "Second-Order Neural ODE Optimizer",
    2021,
    venue="Advances in Neural Information Processing Systems",
    arxiv="2109.14158",
)


@dataclass(frozen=True)
class SecondOrder:
    """What `second_order_adjoint` returns.

    Attributes:
        x0: state at time 0, as the backward solve finds it.
        q: factors of Q_xx at time 0, shape ``(k, *state)``.
        r: factors of Q_uu, a tree like θ with k first in each shape.
    """

    x0: Tensor
    q: Tensor
    r: Tree


@cites(REFERENCE)
def second_order_adjoint(
    velocity: Callable[[float, Tensor, Tree], Tensor],
    theta: Tree,
    x_T: Tensor,
    factors: Tensor,
    T: float,
    *,
    steps: int = 100,
    method: str = "rk4",
) -> SecondOrder:
    r"""Second derivatives of the loss of an ODE in its parameters, by one backward solve.

        ẋ = F,   q̇ᵢ = −F_xᵀ qᵢ,   ṙᵢ = −F_θᵀ qᵢ       from  x(T), qᵢ(T) = yᵢ, rᵢ(T) = 0  to time 0

    With Φ_xx = Σ yᵢ yᵢᵀ the matrix Σ rᵢ rᵢᵀ is the Gauss–Newton matrix Jᵀ Φ_xx J of the loss in θ, where J is the
    derivative of x(T). With one factor y = ∂Φ/∂x, r is the gradient. Nothing is stored along the way.

    Args:
        velocity: F(t, x, θ), differentiable, for a state or a batch of states.
        theta: tree of parameters that are constant in time.
        x_T: final state.
        factors: yᵢ, shape ``(k, *x_T.shape)``.
        T: length of the time interval, from 0 to T.
        steps: number of steps of the backward solve.
        method: name of a Runge–Kutta method of :mod:`bolza.systems.ode`.

    Returns:
        ``SecondOrder(x0, q, r)``: Q_uu = Σ rᵢ rᵢᵀ, Q_ux = Σ rᵢ qᵢᵀ, Q_xx = Σ qᵢ qᵢᵀ.

    Raises:
        ArgumentError: ``T`` is zero, or ``steps`` not positive.

    Reference: Liu, Chen & Theodorou (2021), arXiv:2109.14158, §3.1 and its first-order expansion of the dynamics.

    Example:
        >>> x_T = 2.0 * torch.exp(torch.tensor([0.5]))            # ẋ = θ x, x(0) = 2, θ = 1/2, T = 1
        >>> found = second_order_adjoint(lambda t, x, u: u * x, torch.tensor(0.5), x_T, torch.ones(1, 1), 1.0)
        >>> torch.allclose(found.r, x_T)                          # ∂x(T)/∂θ = T x(T)
        True
    """

    def backwards(s: float, z: Any, _: Tree) -> Any:
        x, q, _r = z
        F_now, pull = vjp(lambda state, u: velocity(s, state, u), x, theta)[:2]
        q_dot, r_dot = vmap(pull)(q)
        return F_now, tree_map(torch.neg, q_dot), tree_map(torch.neg, r_dot)

    check_number("T", abs(T), open_low=True)
    check_number("steps", steps, low=1)
    system = ODESystem(backwards, steps, -T / steps, method, start=T)
    r = tree_map(lambda p: p.new_zeros((len(factors), *p.shape)), theta)
    z: Any = (x_T, factors, r)
    for t in range(steps):
        z = system.step(t, z, {})
    return SecondOrder(*z)
