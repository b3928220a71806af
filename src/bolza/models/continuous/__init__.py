"""Networks of continuous depth: one block, and what its parameters may be along it."""

from bolza.models.continuous.block import ADAPTIVE, ContinuousBlock, NeuralODE
from bolza.models.continuous.net import ContinuousNet, continuous_cnn, continuous_mlp
from bolza.models.continuous.residual import MeanFieldResNet
from bolza.models.continuous.shooting import ParticleFlow, ShootingNet
from bolza.models.continuous.trajectories import Basis, Constant, Piecewise, Trajectory

__all__ = [
    "ADAPTIVE",
    "Basis",
    "Constant",
    "ContinuousBlock",
    "ContinuousNet",
    "MeanFieldResNet",
    "NeuralODE",
    "ParticleFlow",
    "Piecewise",
    "ShootingNet",
    "Trajectory",
    "continuous_cnn",
    "continuous_mlp",
]
