"""Optimizers that are controllers: of a network's layers, or of the training run."""

from bolza.optim.bandits import Exp3
from bolza.optim.cooperation import KroneckerGame, damped_blocks, fork, join, joint_step
from bolza.optim.ddp import DDPNOpt
from bolza.optim.discrete import BinaryMSA, TernaryMSA
from bolza.optim.entropy import EntropySGD, langevin_step
from bolza.optim.feedback import ValueFactors, feedback_weights, value_factors
from bolza.optim.games import DGNOpt
from bolza.optim.horizon import HorizonController, horizon_step
from bolza.optim.late_phase import LatePhase, late_parameters
from bolza.optim.layer_parallel import LayerParallel
from bolza.optim.msa import EMSA, MSA
from bolza.optim.pid import PIDSGD, equivalent_lr
from bolza.optim.second_order import SecondOrder, second_order_adjoint
from bolza.optim.snopt import SNOpt

__all__ = [
    "BinaryMSA",
    "DDPNOpt",
    "DGNOpt",
    "EMSA",
    "EntropySGD",
    "Exp3",
    "HorizonController",
    "KroneckerGame",
    "LatePhase",
    "LayerParallel",
    "MSA",
    "PIDSGD",
    "SNOpt",
    "SecondOrder",
    "TernaryMSA",
    "ValueFactors",
    "damped_blocks",
    "equivalent_lr",
    "feedback_weights",
    "fork",
    "horizon_step",
    "join",
    "joint_step",
    "langevin_step",
    "late_parameters",
    "second_order_adjoint",
    "value_factors",
]
