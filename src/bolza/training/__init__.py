"""The run loop: training that can be interrupted, resumed and believed; and many networks at once."""

from bolza.training.checkpoint import load_tree, save_tree
from bolza.training.divergence import (
    first_nonfinite_gradient,
    first_nonfinite_layer,
    first_nonfinite_state,
)
from bolza.training.ensemble import EnsembleRun, ensemble_parameters, train_ensemble
from bolza.training.interrupt import InterruptGuard
from bolza.training.loop import train
from bolza.training.optimizers import default_loss, make_optimizer, optimizer_names
from bolza.training.order import BatchOrder
from bolza.training.run import Run
from bolza.training.trainability import trainability_map
from bolza.training.trained_map import TrainabilityMap

__all__ = [
    "BatchOrder",
    "EnsembleRun",
    "InterruptGuard",
    "Run",
    "TrainabilityMap",
    "default_loss",
    "ensemble_parameters",
    "first_nonfinite_gradient",
    "first_nonfinite_layer",
    "first_nonfinite_state",
    "load_tree",
    "make_optimizer",
    "optimizer_names",
    "save_tree",
    "train",
    "train_ensemble",
    "trainability_map",
]
