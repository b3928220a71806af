"""Deep learning as optimal control.

A network, a training run and a plant are the same thing here, a controlled system
x_{t+1} = f_t(x_t, u_t) with a cost, and the same functions answer for all of them.

Importing this package is cheap: it loads a room (and torch) when one of its names is first used.

Example:
    >>> import torch, bolza
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    >>> x, y = torch.zeros(5, 3), torch.zeros(5, dtype=torch.long)
    >>> system = bolza.as_system(net, x)
    >>> cost = bolza.TerminalCost(torch.nn.functional.cross_entropy, y)
    >>> run = bolza.adjoint(system, cost, bolza.rollout(system, x))
    >>> run.costates[-1].shape                       # the gradient of the loss in the logits
    torch.Size([5, 2])
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bolza import (
        bayes,
        catalogue,
        controllers,
        core,
        data,
        diagnosis,
        information,
        meanfield,
        meta,
        models,
        ops,
        optim,
        report,
        robust,
        sde,
        solve,
        stability,
        studies,
        systems,
        testing,
        training,
    )
    from bolza.core import (
        CallableCost,
        Cost,
        System,
        TerminalCost,
        Trajectory,
        adjoint,
        hamiltonian,
        hamiltonian_gap,
        linearize,
        rollout,
    )
    from bolza.diagnosis import Watch, diagnose
    from bolza.systems import as_system

__version__ = "0.1.0"

# Where each top-level name lives; the other names in __all__ are the rooms themselves.
_HOMES = {
    "CallableCost": "core",
    "Cost": "core",
    "System": "core",
    "TerminalCost": "core",
    "Trajectory": "core",
    "Watch": "diagnosis",
    "adjoint": "core",
    "as_system": "systems",
    "diagnose": "diagnosis",
    "hamiltonian": "core",
    "hamiltonian_gap": "core",
    "linearize": "core",
    "rollout": "core",
}

__all__ = [
    "CallableCost",
    "Cost",
    "System",
    "TerminalCost",
    "Trajectory",
    "Watch",
    "__version__",
    "adjoint",
    "as_system",
    "bayes",
    "catalogue",
    "controllers",
    "core",
    "data",
    "diagnose",
    "diagnosis",
    "hamiltonian",
    "hamiltonian_gap",
    "information",
    "linearize",
    "meanfield",
    "meta",
    "models",
    "ops",
    "optim",
    "report",
    "rollout",
    "robust",
    "sde",
    "solve",
    "stability",
    "studies",
    "systems",
    "testing",
    "training",
]


def __getattr__(name: str) -> Any:
    """Import a room, or a name from its room, the first time it is asked for (PEP 562)."""
    if name in _HOMES:
        value = getattr(import_module(f"bolza.{_HOMES[name]}"), name)
    elif name in __all__:
        value = import_module(f"bolza.{name}")
    else:
        raise AttributeError(f"module 'bolza' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
