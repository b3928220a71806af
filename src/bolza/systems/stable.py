r"""Will a deep residual network amplify a perturbation? Fields that do not, and a report for those that might.

A perturbation of ẋ = f(x) grows where the Jacobian has an eigenvalue with positive real part; and a
field that is stable in continuous time still needs a step dt that is short enough.

Reference: Haber & Ruthotto (2017), *Stable Architectures for Deep Neural Networks*, arXiv:1705.03341.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError
from bolza.core.system import check_step
from bolza.ops.trees import Tree, float_leaves, tree_map, tree_to_vector, with_float_leaves
from bolza.systems.ode import ODESystem, Separable

__all__ = [
    "AntisymmetricField",
    "FieldStability",
    "antisymmetric",
    "euler_step_limit",
    "field_stability",
    "hamiltonian_field",
]


def antisymmetric(K: Tensor, gamma: float | Tensor = 0.0) -> Tensor:
    r"""Return K − Kᵀ − γI, whose eigenvalues are −γ ± iω: it turns, and damps by γ.

    Args:
        K: shape ``(*batch, n, n)``.
        gamma: damping γ; positive to be stable under forward Euler.

    Example:
        >>> antisymmetric(torch.tensor([[0.0, 1.0], [0.0, 0.0]]), gamma=0.5)
        tensor([[-0.5000,  1.0000],
                [-1.0000, -0.5000]])
    """
    return K - K.mT - gamma * torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)


class AntisymmetricField(nn.Module):
    r"""The field φ((K − Kᵀ − γI) x + b), stable by construction for an increasing φ.

    Args:
        width: number of features n.
        gamma: damping γ; keep dt below ``euler_step_limit(gamma, omega)``.
        activation: φ.

    Reference: Haber & Ruthotto (2017), arXiv:1705.03341; the weights are not tied
    over the steps where there is one such module a step.

    Example:
        >>> blocks = [AntisymmetricField(4, gamma=0.5) for _ in range(10)]
        >>> ODESystem.from_module(blocks, dt=0.1).horizon
        10
    """

    def __init__(
        self, width: int, gamma: float = 0.0, activation: Callable[[Tensor], Tensor] = torch.tanh
    ) -> None:
        super().__init__()
        self.gamma, self.activation = gamma, activation
        self.K = nn.Parameter(torch.randn(width, width) / (2 * width) ** 0.5)
        self.b = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return ẋ for x of shape ``(*batch, width)``."""
        return self.activation(nn.functional.linear(x, antisymmetric(self.K, self.gamma), self.b))


def hamiltonian_field(activation: Callable[[Tensor], Tensor] = torch.tanh) -> Separable:
    r"""The layer of a Hamiltonian network, for leapfrog: reversible, and it neither damps nor amplifies.

        q̇ = K₁ᵀ φ(K₁ p + b₁),   ṗ = −K₂ᵀ φ(K₂ q + b₂)

    Its controls are dicts with ``K1``, ``b1``, ``K2`` and ``b2``; K of shape ``(width, n)``, b of
    shape ``(width,)``; the state is a pair of tensors ``(*batch, n)``.

    Args:
        activation: φ, the derivative of the energy of one unit.

    Reference: Chang, Meng, Haber, Ruthotto, Begert & Holtham (2018), *Reversible Architectures for
    Arbitrarily Deep Residual Neural Networks*, arXiv:1709.03698.

    Example:
        >>> u = {"K1": torch.eye(2), "b1": torch.zeros(2), "K2": torch.eye(2), "b2": torch.zeros(2)}
        >>> net = ODESystem(hamiltonian_field(), horizon=8, dt=0.1, method="leapfrog", controls=[u] * 8)
        >>> q, p = net.step(0, (torch.ones(2), torch.zeros(2)), u)
        >>> q.shape
        torch.Size([2])
    """

    def velocity(s: float, p: Tensor, u: dict[str, Tensor]) -> Tensor:
        return activation(p @ u["K1"].mT + u["b1"]) @ u["K1"]

    def force(s: float, q: Tensor, u: dict[str, Tensor]) -> Tensor:
        return -(activation(q @ u["K2"].mT + u["b2"]) @ u["K2"])

    return Separable(velocity, force)


def euler_step_limit(gamma: float | Tensor, omega: float | Tensor) -> Tensor:
    r"""Longest step for which forward Euler contracts the eigenvalue −γ ± iω: h < 2γ / (γ² + ω²).

    Args:
        gamma: damping γ, any shape.
        omega: frequency ω, broadcast with γ.

    Returns:
        The limit, in the unit of 1/γ; zero where γ ≤ 0: without damping Euler amplifies at every step.

    Reference: Haber & Ruthotto (2017), arXiv:1705.03341, §2.

    Example:
        >>> euler_step_limit(0.5, 1.0)
        tensor(0.8000)
    """
    gamma, omega = torch.as_tensor(gamma), torch.as_tensor(omega)
    damped = gamma > 0
    size = torch.where(damped, gamma**2 + omega**2, torch.ones((), dtype=gamma.dtype, device=gamma.device))
    return torch.where(damped, 2 * gamma / size, torch.zeros_like(size))


@dataclass(frozen=True)
class FieldStability:
    """What the Jacobians of one step say about perturbations, one entry a sample.

    Attributes:
        eigenvalues: of the field's Jacobian ∂f/∂x, shape ``(batch, n)``, complex.
        max_real: the largest real part, shape ``(batch,)``; at most 0 for a stable field.
        step_limit: below this dt forward Euler contracts every mode; 0 if there is no such dt.
        growth: spectral radius of the Jacobian of the step itself, with its own dt and method.
    """

    eigenvalues: Tensor
    max_real: Tensor
    step_limit: Tensor
    growth: Tensor


def field_stability(system: ODESystem, t: int, x: Tree, u: Tree | None = None) -> FieldStability:
    r"""Eigenvalues of one step's field at given states, and how long a step they bear.

    The Jacobians are dense, n² numbers a sample: for states of up to a few thousand features.

    Args:
        system: the network as a differential equation.
        t: step, ``0 <= t < system.horizon``.
        x: states, samples first; each sample is taken by itself.
        u: control; the system's own by default.

    Returns:
        FieldStability.

    Raises:
        ArgumentError: ``t`` is not a step of the system, or a state has more than 4096 features.

    Reference: Haber & Ruthotto (2017), arXiv:1705.03341, §2.

    Example:
        >>> blocks = [AntisymmetricField(3, gamma=0.5)]
        >>> report = field_stability(ODESystem.from_module(blocks, dt=0.1), 0, torch.zeros(2, 3))
        >>> report.max_real
        tensor([-0.5000, -0.5000])
    """
    check_step(system, t)
    u = system.controls[t] if u is None else u
    x, u = tree_map(Tensor.detach, x), tree_map(Tensor.detach, u)
    dim = sum(leaf[0].numel() for leaf in float_leaves(x))
    if dim > 4096:
        raise ArgumentError(
            f"x has {dim} features: dense eigenvalues need at most 4096, so pool or crop the state"
        )
    first = u if system.hold == "constant" else u[0]
    of_field = _jacobians(lambda y: system.fields[t](system.start + t * system.dt, y, first), x)
    of_step = _jacobians(lambda y: system.step(t, y, u), x)
    eigenvalues = torch.linalg.eigvals(of_field)
    return FieldStability(
        eigenvalues=eigenvalues,
        max_real=eigenvalues.real.amax(-1),
        step_limit=euler_step_limit(-eigenvalues.real, eigenvalues.imag).amin(-1),
        growth=torch.linalg.eigvals(of_step).abs().amax(-1),
    )


def _jacobians(function: Callable[[Tree], Tree], x: Tree) -> Tensor:
    """Jacobian of each sample by itself, shape ``(batch, n, n)``."""

    def of_one(*sample: Tensor) -> Tensor:
        sizes = [leaf.numel() for leaf in sample]

        def flat(vector: Tensor) -> Tensor:
            parts = zip(torch.split(vector, sizes), sample, strict=True)
            return tree_to_vector(
                function(with_float_leaves(x, [v.reshape(1, *leaf.shape) for v, leaf in parts]))
            )

        jacobian: Tensor = torch.func.jacrev(flat)(torch.cat([leaf.reshape(-1) for leaf in sample]))
        return jacobian

    return torch.func.vmap(of_one)(*float_leaves(x))
