"""Lyapunov exponents of networks over layers, time and training steps; synchronisation; curvature by twins."""

from bolza.stability.curvature import (
    CurvatureExponent,
    TwinCurvature,
    curvature_exponent,
    twin_operator,
)
from bolza.stability.lyapunov import LyapunovSpectrum, lyapunov_exponents
from bolza.stability.multilayer import MultilayerExponents, ftmle
from bolza.stability.synchronize import (
    MutualNeighbours,
    conditional_exponent,
    drive,
    mutual_false_neighbours,
    synchronisation_error,
)

__all__ = [
    "CurvatureExponent",
    "LyapunovSpectrum",
    "MultilayerExponents",
    "MutualNeighbours",
    "TwinCurvature",
    "conditional_exponent",
    "curvature_exponent",
    "drive",
    "ftmle",
    "lyapunov_exponents",
    "mutual_false_neighbours",
    "synchronisation_error",
    "twin_operator",
]
