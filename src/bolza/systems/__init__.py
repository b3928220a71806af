"""Things that are systems: networks read as stages, differential equations, training runs, linear plants."""

from bolza.systems.aligned import aligned_system, alignments
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
from bolza.systems.parareal import (
    ParallelRun,
    coarse_jump,
    mgrit,
    parallel_adjoint,
    parareal,
    slice_boundaries,
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
from bolza.systems.training import SGD, Adam, TrainingSystem, UpdateRule, module_loss

__all__ = [
    "SGD",
    "Adam",
    "AntisymmetricField",
    "FieldStability",
    "LinearSystem",
    "ModuleSystem",
    "ODESystem",
    "ParallelRun",
    "QuadraticCost",
    "Recorder",
    "RungeKutta",
    "Separable",
    "Splitting",
    "Traced",
    "TrainingSystem",
    "UpdateRule",
    "aligned_system",
    "alignments",
    "antisymmetric",
    "as_system",
    "coarse_jump",
    "euler_step_limit",
    "field_stability",
    "hamiltonian_field",
    "mgrit",
    "module_field",
    "module_loss",
    "parallel_adjoint",
    "parareal",
    "sample_controls",
    "slice_boundaries",
]
