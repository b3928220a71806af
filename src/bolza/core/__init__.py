"""The five nouns: system, cost, trajectory, diffusion, policy; and what is asked of them."""

from bolza.core.checkpointed import Sweep, checkpointed_adjoint
from bolza.core.cost import (
    CallableCost,
    Cost,
    MaximumPrincipleResiduals,
    TerminalCost,
    adjoint,
    extended_hamiltonian,
    hamiltonian,
    hamiltonian_gap,
    maximum_principle_residuals,
)
from bolza.core.diffusion import Diffusion, Isotropic, Splitting
from bolza.core.history import History
from bolza.core.langevin import langevin
from bolza.core.minimizers import (
    Minimizer,
    binary_rule,
    gibbs_minimizer,
    gradient_minimizer,
    lbfgs_minimizer,
    proximal_minimizer,
    quadratic_minimizer,
    sign_minimizer,
    ternary_rule,
)
from bolza.core.policy import Policy
from bolza.core.reference import Reference, cites
from bolza.core.simulate import draw_noise, simulate, stepper
from bolza.core.system import LinearMap, System, linearize, rollout
from bolza.core.trajectory import Trajectory

__all__ = [
    "CallableCost",
    "Cost",
    "Diffusion",
    "History",
    "Isotropic",
    "LinearMap",
    "MaximumPrincipleResiduals",
    "Minimizer",
    "Policy",
    "Reference",
    "Splitting",
    "Sweep",
    "System",
    "TerminalCost",
    "Trajectory",
    "adjoint",
    "binary_rule",
    "checkpointed_adjoint",
    "cites",
    "draw_noise",
    "extended_hamiltonian",
    "gibbs_minimizer",
    "gradient_minimizer",
    "hamiltonian",
    "hamiltonian_gap",
    "langevin",
    "lbfgs_minimizer",
    "linearize",
    "maximum_principle_residuals",
    "proximal_minimizer",
    "quadratic_minimizer",
    "rollout",
    "sign_minimizer",
    "simulate",
    "stepper",
    "ternary_rule",
]
