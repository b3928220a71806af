"""Learning the initial condition of the training system, so that a new task needs little."""

from bolza.meta.imaml import iMAML
from bolza.meta.maml import MAML
from bolza.meta.meta_gradient import MetaGradient, meta_gradient
from bolza.meta.meta_sgd import MetaSGD
from bolza.meta.rates import RateReport, check_rates, meta_rate_bound
from bolza.meta.reptile import Reptile

__all__ = [
    "MAML",
    "MetaGradient",
    "MetaSGD",
    "RateReport",
    "Reptile",
    "check_rates",
    "iMAML",
    "meta_gradient",
    "meta_rate_bound",
]
