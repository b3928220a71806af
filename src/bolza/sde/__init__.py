"""Training as a stochastic dynamical system: the noise of its gradients, and what the noise does."""

from bolza.sde.accelerated import (
    AcceleratedPath,
    accelerated_descent,
    accelerated_flow,
    accelerated_quadratic,
    nesterov_descent,
)
from bolza.sde.anisotropic import equal_trace_covariance, equal_trace_noise, expected_rise
from bolza.sde.approximate_inference import posterior_divergence, posterior_preconditioner, posterior_rate
from bolza.sde.block_sums import TailIndex, hill, tail_index
from bolza.sde.currents import GridCurrent, LinearCurrent, linear_current, network_current, stationary_current
from bolza.sde.drift_diffusion import DriftDiffusion, phase_transition
from bolza.sde.escape import (
    jump_escape_time,
    kramers_time,
    mean_first_passage,
    saddle_time,
    stable_flight_time,
)
from bolza.sde.exit_times import ExitTimes, exit_times
from bolza.sde.flatness import Flatness, FlatnessMeasure, flatness
from bolza.sde.fokker_planck import FokkerPlanck, fokker_planck
from bolza.sde.game_stability import GameStability, game_stability
from bolza.sde.games import (
    FluctuationDissipation,
    Game,
    LinearGame,
    game_fluctuation_dissipation,
    game_sde,
    game_step,
    linear_game,
)
from bolza.sde.gradient_noise import GradientNoise, gradient_noise
from bolza.sde.gradient_tails import GradientTails, gradient_tails
from bolza.sde.levy import (
    RegressionTails,
    inject_stable_noise,
    least_squares_stability,
    levy_sgd,
    regression_tails,
    stablest_index,
    stationary_scale,
)
from bolza.sde.linear_moments import LinearLaw, WeakErrors, iterate_law, linear_law, stale_law, weak_errors
from bolza.sde.local_entropy import (
    LocalEntropy,
    hamilton_jacobi_residual,
    local_entropy,
    sampled_local_entropy,
)
from bolza.sde.loops import AreaRate, area_rate
from bolza.sde.mean_square import least_squares_covariance, mean_square_limit
from bolza.sde.modified_equation import ModifiedEquation, modified_equation
from bolza.sde.moments import StationaryMoments, stationary_covariance
from bolza.sde.network_moments import NetworkMoments, network_moments
from bolza.sde.noise_scale import Equivalent, equivalent_settings, grow_batch, noise_scale, temperature
from bolza.sde.players import NetworkGame, network_game
from bolza.sde.tails import (
    MixtureTest,
    TailReport,
    gaussian_mixture_test,
    gaussian_surrogate,
    tail_report,
)

__all__ = [
    "AcceleratedPath",
    "AreaRate",
    "DriftDiffusion",
    "Equivalent",
    "ExitTimes",
    "Flatness",
    "FlatnessMeasure",
    "FluctuationDissipation",
    "FokkerPlanck",
    "Game",
    "GameStability",
    "GradientNoise",
    "GradientTails",
    "GridCurrent",
    "LinearCurrent",
    "LinearGame",
    "LinearLaw",
    "LocalEntropy",
    "MixtureTest",
    "ModifiedEquation",
    "NetworkGame",
    "NetworkMoments",
    "RegressionTails",
    "StationaryMoments",
    "TailIndex",
    "TailReport",
    "WeakErrors",
    "accelerated_descent",
    "accelerated_flow",
    "accelerated_quadratic",
    "area_rate",
    "equal_trace_covariance",
    "equal_trace_noise",
    "equivalent_settings",
    "exit_times",
    "expected_rise",
    "flatness",
    "fokker_planck",
    "game_fluctuation_dissipation",
    "game_sde",
    "game_stability",
    "game_step",
    "gaussian_mixture_test",
    "gaussian_surrogate",
    "gradient_noise",
    "gradient_tails",
    "grow_batch",
    "hamilton_jacobi_residual",
    "hill",
    "inject_stable_noise",
    "iterate_law",
    "jump_escape_time",
    "kramers_time",
    "least_squares_covariance",
    "least_squares_stability",
    "levy_sgd",
    "linear_current",
    "linear_game",
    "linear_law",
    "local_entropy",
    "mean_first_passage",
    "mean_square_limit",
    "modified_equation",
    "nesterov_descent",
    "network_current",
    "network_game",
    "network_moments",
    "noise_scale",
    "phase_transition",
    "posterior_divergence",
    "posterior_preconditioner",
    "posterior_rate",
    "regression_tails",
    "saddle_time",
    "sampled_local_entropy",
    "stable_flight_time",
    "stablest_index",
    "stale_law",
    "stationary_covariance",
    "stationary_current",
    "stationary_scale",
    "tail_index",
    "tail_report",
    "temperature",
    "weak_errors",
]
