"""Lyapunov exponents, synchronisation, certified optimizers; Lipschitz constants, interval bounds, contraction."""

from bolza.stability.certified import CertifiedRadius, certified_radius
from bolza.stability.contraction import ContractionRate, contraction_rate
from bolza.stability.curvature import (
    CurvatureExponent,
    TwinCurvature,
    curvature_exponent,
    twin_operator,
)
from bolza.stability.interval import IntervalBounds, interval_bounds
from bolza.stability.landscape import Sharpness, SharpnessPoint, subspace_share
from bolza.stability.limits import stability_limit
from bolza.stability.lipschitz import LipschitzBound, LipschitzPart, lipschitz
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
    "CertifiedRadius",
    "ContractionRate",
    "CurvatureExponent",
    "FeedbackOptimization",
    "FirstOrderMethod",
    "IntervalBounds",
    "LipschitzBound",
    "LipschitzPart",
    "LyapunovSpectrum",
    "MultilayerExponents",
    "MutualNeighbours",
    "ProjectOut",
    "RateCertificate",
    "Sharpness",
    "SharpnessPoint",
    "Subspace",
    "TwinCurvature",
    "certified_radius",
    "certified_rate",
    "conditional_exponent",
    "contraction_rate",
    "curvature_exponent",
    "drive",
    "first_order_method",
    "ftmle",
    "gradient_descent",
    "heavy_ball",
    "interval_bounds",
    "lipschitz",
    "lyapunov_exponents",
    "mutual_false_neighbours",
    "nesterov",
    "quadratic_rate",
    "stability_limit",
    "subspace_share",
    "synchronisation_error",
    "twin_operator",
]
