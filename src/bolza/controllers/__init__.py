"""Hyper-parameters as controls: policies, and the scheduler that wears them."""

from bolza.controllers.batch_laws import (
    csgd_batch_size,
    held_excess,
    least_excess,
    priced_batch_size,
    switch_time,
)
from bolza.controllers.batch_size import BatchSizeController
from bolza.controllers.cmsgd import CMSGD
from bolza.controllers.control_vae import ControlVAE, DynamicVAE, resting_beta, water_filling_kl
from bolza.controllers.controller import Controller
from bolza.controllers.csgd import CSGD
from bolza.controllers.data_scores import LinearScorer, keep_best, normalise_scores, project_simplex
from bolza.controllers.data_selection import (
    DataValues,
    Selection,
    data_values,
    example_losses,
    gradient_similarity,
    select_data,
)
from bolza.controllers.hypergradient import HyperGradients, hypergradients
from bolza.controllers.local_quadratic import LocalModel, local_model
from bolza.controllers.log_prior import LogPrior
from bolza.controllers.make import NAMES, make
from bolza.controllers.moments import (
    ControlledQuadratic,
    critical_momentum,
    learning_rate_law,
    momentum_law,
    stationary_loss,
)
from bolza.controllers.noise_tracker import NoiseTracker
from bolza.controllers.online_hypergradient import HyperGradient, shortened
from bolza.controllers.optimal_schedule import OptimalSchedule
from bolza.controllers.participation import (
    Participation,
    ParticipationPlan,
    active_share,
    exponential_retention,
    group_risks,
    minimax_plan,
    myopic_plan,
    plan_participation,
)
from bolza.controllers.pid_lagrangian import Damping, PIDLagrangian, critical_gain, damping
from bolza.controllers.policy_scheduler import MEASUREMENTS, PolicyScheduler
from bolza.controllers.population import (
    PopDescent,
    PopulationRun,
    selection_probabilities,
    validation_fitness,
)
from bolza.controllers.rate_plan import RatePlan, plan_rates
from bolza.controllers.schedules import (
    PowerDecay,
    SignalDecay,
    best_exponent,
    predicted_exponent,
    quadratic_mean_square,
    two_spin_energy,
    two_spin_run,
)
from bolza.controllers.set_point import SetPoint
from bolza.controllers.stability_limit import StabilityLimit, StabilityWarning
from bolza.controllers.stationarity_annealing import (
    StationarityAnnealing,
    fluctuation_dissipation_gap,
    stationarity_z,
)
from bolza.ops.pid import PID, ramp

__all__ = [
    "two_spin_run",
    "two_spin_energy",
    "quadratic_mean_square",
    "predicted_exponent",
    "best_exponent",
    "SignalDecay",
    "PowerDecay",
    "plan_rates",
    "local_model",
    "StabilityWarning",
    "StabilityLimit",
    "RatePlan",
    "OptimalSchedule",
    "LocalModel",
    "MEASUREMENTS",
    "NAMES",
    "PID",
    "BatchSizeController",
    "ControlVAE",
    "Controller",
    "Damping",
    "DataValues",
    "DynamicVAE",
    "HyperGradient",
    "HyperGradients",
    "LinearScorer",
    "LogPrior",
    "NoiseTracker",
    "PIDLagrangian",
    "Participation",
    "ParticipationPlan",
    "PolicyScheduler",
    "PopDescent",
    "PopulationRun",
    "Selection",
    "SetPoint",
    "StationarityAnnealing",
    "active_share",
    "critical_gain",
    "csgd_batch_size",
    "damping",
    "data_values",
    "example_losses",
    "exponential_retention",
    "fluctuation_dissipation_gap",
    "gradient_similarity",
    "group_risks",
    "held_excess",
    "hypergradients",
    "keep_best",
    "least_excess",
    "make",
    "minimax_plan",
    "myopic_plan",
    "normalise_scores",
    "plan_participation",
    "priced_batch_size",
    "project_simplex",
    "ramp",
    "resting_beta",
    "select_data",
    "selection_probabilities",
    "shortened",
    "stationarity_z",
    "switch_time",
    "validation_fitness",
    "water_filling_kl",
    "CSGD",
    "ControlledQuadratic",
    "critical_momentum",
    "learning_rate_law",
    "momentum_law",
    "stationary_loss",
    "CMSGD",
]
