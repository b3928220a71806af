"""The five nouns: system, cost, trajectory, diffusion, policy; and what is asked of them."""

from bolza.core.cost import (
    CallableCost,
    Cost,
    MaximumPrincipleResiduals,
    TerminalCost,
    adjoint,
    hamiltonian,
    hamiltonian_gap,
    maximum_principle_residuals,
    proximal_minimizer,
)
from bolza.core.diffusion import Diffusion, simulate
from bolza.core.policy import Policy
from bolza.core.reference import Reference, cites
from bolza.core.system import LinearMap, System, linearize, rollout
from bolza.core.trajectory import Trajectory

__all__ = [
    "CallableCost",
    "Cost",
    "Diffusion",
    "LinearMap",
    "MaximumPrincipleResiduals",
    "Policy",
    "Reference",
    "System",
    "TerminalCost",
    "Trajectory",
    "adjoint",
    "cites",
    "hamiltonian",
    "hamiltonian_gap",
    "linearize",
    "maximum_principle_residuals",
    "proximal_minimizer",
    "rollout",
    "simulate",
]
