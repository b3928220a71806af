"""Hyper-parameters as controls: policies, and the scheduler that wears them."""

from bolza.controllers.controller import Controller
from bolza.controllers.history import History
from bolza.controllers.make import NAMES, make
from bolza.controllers.policy_scheduler import MEASUREMENTS, PolicyScheduler
from bolza.controllers.stationarity_annealing import (
    StationarityAnnealing,
    fluctuation_dissipation_gap,
    stationarity_z,
)

__all__ = [
    "Controller",
    "History",
    "MEASUREMENTS",
    "NAMES",
    "PolicyScheduler",
    "StationarityAnnealing",
    "fluctuation_dissipation_gap",
    "make",
    "stationarity_z",
]
