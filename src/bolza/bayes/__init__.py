"""Samplers of a posterior over the weights, and what a network knows of what it does not know."""

from bolza.bayes.baoab import BAOAB
from bolza.bayes.calibration import Calibration, Estimate, calibration
from bolza.bayes.chains import Chains, sample
from bolza.bayes.constant_rate import ConstantSGD
from bolza.bayes.cyclical import CyclicalSchedule
from bolza.bayes.diagnostics import effective_sample_size, monte_carlo_error, rhat
from bolza.bayes.em import EMRate, EMRun, bayesian_em, em_rate, em_step, hidden_labels
from bolza.bayes.predictive import Prediction, predict
from bolza.bayes.psgld import PSGLD
from bolza.bayes.recipe import (
    Recipe,
    complete_recipe,
    named_recipe,
    stationarity_residual,
    stationary_variance,
)
from bolza.bayes.sghmc import SGHMC
from bolza.bayes.sgld import SGLD
from bolza.bayes.sgnht import SGNHT
from bolza.bayes.stochastic_control import StochasticControl
from bolza.bayes.trace import Trace
from bolza.bayes.variational import GradientMoments, MeanField, gradient_moments

__all__ = [
    "hidden_labels",
    "em_step",
    "em_rate",
    "bayesian_em",
    "EMRun",
    "EMRate",
    "StochasticControl",
    "gradient_moments",
    "MeanField",
    "GradientMoments",
    "ConstantSGD",
    "BAOAB",
    "PSGLD",
    "SGHMC",
    "SGLD",
    "SGNHT",
    "Calibration",
    "Chains",
    "CyclicalSchedule",
    "Estimate",
    "Prediction",
    "Recipe",
    "Trace",
    "calibration",
    "complete_recipe",
    "effective_sample_size",
    "monte_carlo_error",
    "named_recipe",
    "predict",
    "rhat",
    "sample",
    "stationarity_residual",
    "stationary_variance",
]
