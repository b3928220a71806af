"""Moments through random layers: phase, depth scales, isometry, critical initialisation."""

from bolza.meanfield.activations import Activation, activation_names, resolve_activation
from bolza.meanfield.critical import CriticalLine, critical_line, critical_weight_var
from bolza.meanfield.fixed_point import FixedPoint, correlation_map, fixed_point, length_map
from bolza.meanfield.initialise import Initialisation, LayerInit, critical_init_
from bolza.meanfield.isometry import IsometryResult, isometry
from bolza.meanfield.moment_maps import Call, Missing, Step, moment_map
from bolza.meanfield.moments import Moments
from bolza.meanfield.phase import Phase
from bolza.meanfield.propagate import LayerMoments, Propagation, propagate

__all__ = [
    "Activation",
    "Call",
    "CriticalLine",
    "FixedPoint",
    "Initialisation",
    "IsometryResult",
    "LayerInit",
    "LayerMoments",
    "Missing",
    "Moments",
    "Phase",
    "Propagation",
    "Step",
    "activation_names",
    "correlation_map",
    "critical_init_",
    "critical_line",
    "critical_weight_var",
    "fixed_point",
    "isometry",
    "length_map",
    "moment_map",
    "propagate",
    "resolve_activation",
]
