"""Moments through random layers: phase, depth scales, isometry, critical initialisation."""

from bolza.meanfield.activations import Activation, activation_names, resolve_activation
from bolza.meanfield.callables import sampled_activation
from bolza.meanfield.critical import CriticalLine, critical_line, critical_weight_var
from bolza.meanfield.fixed_point import FixedPoint, correlation_map, fixed_point, length_map
from bolza.meanfield.initialisation.initialise import Initialisation, LayerInit, critical_init_
from bolza.meanfield.isometry import IsometryResult, IsometryTheory, isometry, isometry_theory
from bolza.meanfield.kernels import (
    InfiniteKernels,
    Linearized,
    Posterior,
    empirical_ntk,
    gp_posterior,
    infinite_kernels,
    kernel_map,
    linearized,
    nngp,
    ntk,
    ntk_posterior,
    two_layer_gram,
)
from bolza.meanfield.layers.conv_maps import ConvModes, conv_modes
from bolza.meanfield.layers.moment_maps import Call, Missing, Step, moment_map
from bolza.meanfield.layers.moments import Moments
from bolza.meanfield.phase import Phase
from bolza.meanfield.propagate import LayerMoments, Propagation, propagate
from bolza.meanfield.quantised import QuantisedDepth, Staircase, quantised_depth, staircase
from bolza.meanfield.recurrent import RecurrentFixedPoint, recurrent_fixed_point
from bolza.meanfield.residual import ResidualOrbit, residual_map

__all__ = [
    "Activation",
    "Call",
    "ConvModes",
    "CriticalLine",
    "FixedPoint",
    "InfiniteKernels",
    "Initialisation",
    "IsometryResult",
    "IsometryTheory",
    "LayerInit",
    "LayerMoments",
    "Linearized",
    "Missing",
    "Moments",
    "Phase",
    "Posterior",
    "Propagation",
    "QuantisedDepth",
    "RecurrentFixedPoint",
    "ResidualOrbit",
    "Staircase",
    "Step",
    "activation_names",
    "conv_modes",
    "correlation_map",
    "critical_init_",
    "critical_line",
    "critical_weight_var",
    "empirical_ntk",
    "fixed_point",
    "gp_posterior",
    "infinite_kernels",
    "isometry",
    "isometry_theory",
    "kernel_map",
    "length_map",
    "linearized",
    "moment_map",
    "nngp",
    "ntk",
    "ntk_posterior",
    "propagate",
    "quantised_depth",
    "recurrent_fixed_point",
    "residual_map",
    "resolve_activation",
    "sampled_activation",
    "staircase",
    "two_layer_gram",
]
