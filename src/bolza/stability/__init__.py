"""Lyapunov exponents of networks over layers, time and training steps; synchronisation; certified optimizers."""

from bolza.stability.curvature import (
    CurvatureExponent,
    TwinCurvature,
    curvature_exponent,
    twin_operator,
)
from bolza.stability.landscape import Sharpness, SharpnessPoint, subspace_share
from bolza.stability.limits import stability_limit
from bolza.stability.lure import (
    FeedbackOptimization,
    FirstOrderMethod,
    RateCertificate,
    certified_rate,
    first_order_method,
    gradient_descent,
    heavy_ball,
    nesterov,
    quadratic_rate,
)
from bolza.stability.lyapunov import LyapunovSpectrum, lyapunov_exponents
from bolza.stability.multilayer import MultilayerExponents, ftmle
from bolza.stability.project_out import ProjectOut, Subspace
from bolza.stability.synchronize import (
    MutualNeighbours,
    conditional_exponent,
    drive,
    mutual_false_neighbours,
    synchronisation_error,
)

__all__ = [
    "CurvatureExponent",
    "FeedbackOptimization",
    "FirstOrderMethod",
    "LyapunovSpectrum",
    "MultilayerExponents",
    "MutualNeighbours",
    "ProjectOut",
    "RateCertificate",
    "Sharpness",
    "SharpnessPoint",
    "Subspace",
    "TwinCurvature",
    "certified_rate",
    "conditional_exponent",
    "curvature_exponent",
    "drive",
    "first_order_method",
    "ftmle",
    "gradient_descent",
    "heavy_ball",
    "lyapunov_exponents",
    "mutual_false_neighbours",
    "nesterov",
    "quadratic_rate",
    "stability_limit",
    "subspace_share",
    "synchronisation_error",
    "twin_operator",
]
