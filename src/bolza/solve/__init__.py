"""Optimal control of any system: Riccati and Bellman sweeps, successive approximation, sampled and grid solvers."""

from bolza.solve.fbsde import FBSDE, FBSDESolution, cole_hopf_value, solve_fbsde
from bolza.solve.hjb import GridValue, grid_hjb
from bolza.solve.ilqr import ILQRResult, ilqr
from bolza.solve.langevin import LangevinSolution, mean_field_langevin, neuron_field
from bolza.solve.mean_field import LinearMeanField, MeanFieldSolution, linear_mean_field, mean_field_control
from bolza.solve.path_integral import LinearKLControl, PathIntegral, linear_kl_control, path_integral_policy
from bolza.solve.pdp import TrajectorySensitivity, optimal_trajectory, trajectory_sensitivity
from bolza.solve.successive_approximation import (
    SuccessiveApproximation,
    Sweep,
    hamiltonian_sweep,
    infeasibility,
    successive_approximation,
)

__all__ = [
    "FBSDE",
    "FBSDESolution",
    "GridValue",
    "ILQRResult",
    "LangevinSolution",
    "LinearKLControl",
    "LinearMeanField",
    "MeanFieldSolution",
    "PathIntegral",
    "SuccessiveApproximation",
    "Sweep",
    "TrajectorySensitivity",
    "cole_hopf_value",
    "grid_hjb",
    "hamiltonian_sweep",
    "ilqr",
    "infeasibility",
    "linear_kl_control",
    "linear_mean_field",
    "mean_field_control",
    "mean_field_langevin",
    "neuron_field",
    "optimal_trajectory",
    "path_integral_policy",
    "solve_fbsde",
    "successive_approximation",
    "trajectory_sensitivity",
]
