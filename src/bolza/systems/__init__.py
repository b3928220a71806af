"""Things that are systems: networks read as stages, differential equations, training runs, linear plants."""

from bolza.systems.linear import LinearSystem, QuadraticCost
from bolza.systems.module import ModuleSystem, as_system
from bolza.systems.ode import (
    ODESystem,
    RungeKutta,
    Separable,
    Splitting,
    module_field,
    sample_controls,
)
from bolza.systems.recorder import Recorder
from bolza.systems.stable import (
    AntisymmetricField,
    FieldStability,
    antisymmetric,
    euler_step_limit,
    field_stability,
    hamiltonian_field,
)
from bolza.systems.trace import Traced
from bolza.systems.training import SGD, TrainingSystem, UpdateRule, module_loss

__all__ = [
    "AntisymmetricField",
    "FieldStability",
    "LinearSystem",
    "ModuleSystem",
    "ODESystem",
    "QuadraticCost",
    "Recorder",
    "RungeKutta",
    "SGD",
    "Separable",
    "Splitting",
    "Traced",
    "TrainingSystem",
    "UpdateRule",
    "antisymmetric",
    "as_system",
    "euler_step_limit",
    "field_stability",
    "hamiltonian_field",
    "module_field",
    "module_loss",
    "sample_controls",
]
