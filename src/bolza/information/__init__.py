"""Information plane with its estimators and noise in the open, and the Gaussian bottleneck."""

from bolza.information.bottleneck import (
    GaussianBottleneck,
    canonical_correlations,
    gaussian_bottleneck,
    gaussian_projection,
)
from bolza.information.estimators import InformationEstimate, binned_information, pairwise_information
from bolza.information.plane import InformationPlane, layer_information, layer_states

__all__ = [
    "GaussianBottleneck",
    "InformationEstimate",
    "InformationPlane",
    "binned_information",
    "canonical_correlations",
    "gaussian_bottleneck",
    "gaussian_projection",
    "layer_information",
    "layer_states",
    "pairwise_information",
]
