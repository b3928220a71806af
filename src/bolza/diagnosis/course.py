"""What happens along a training run: both clocks read at a few of its steps.

At each reading, on one fixed batch,

* the maximum principle: ‖∇_u H‖ over all stages, zero where no stage can lower its Hamiltonian, and how much of
  the last costate reaches the first stage, ‖p_1‖/‖p_T‖;
* signal to noise of a batch of B, B |g|²/tr Σ: above 1 the run drifts, below 1 it diffuses;
* the noise temperature lr/(2B(1 − β)) of the step;
* the condition number of the Gram matrix ⟨∂ v·f(x_i), ∂ v·f(x_j)⟩, centred, for one random direction v of the
  outputs: the spread of the rates at which the network can fit the samples.

Reference: Liu & Theodorou (2019), arXiv:1908.10920, §II and §III.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bolza.core import TerminalCost, adjoint, rollout
from bolza.diagnosis.problem import Problem, measuring_mode_
from bolza.ops.noise import PerSampleGradients
from bolza.ops.trees import float_leaves, tree_norm
from bolza.sde import gradient_noise, temperature
from bolza.systems import ModuleSystem, as_system

__all__ = ["QUANTITIES", "Course"]

QUANTITIES = (
    "loss",
    "stationarity",
    "costate_ratio",
    "signal_to_noise",
    "temperature",
    "gram_condition",
)

_SAMPLES = 64  # of the fixed batch
_GRAM = 32  # samples of the Gram matrix


class Course:
    """Readings of one run.

    Args:
        problem: whose batch and loss are used.
        model: the network that is being trained; it is only read.
        batch_size: B of the run.
        momentum: β of the run.
        readings: how many are spread over the run, its start and end among them.

    Attributes:
        curves: ``step`` and, for each of :data:`QUANTITIES`, a list of the same length; None where a quantity
            could not be measured.
    """

    def __init__(
        self, problem: Problem, model: nn.Module, *, batch_size: int, momentum: float, readings: int = 5
    ) -> None:
        self._problem, self._live = problem, model
        self._x, self._y = problem.batch(_SAMPLES)
        self._probe = measuring_mode_(copy.deepcopy(model)).to(self._x.device)
        self._batch, self._momentum, self._readings = batch_size, momentum, readings
        self._system: ModuleSystem | None = None
        try:
            self._system = as_system(self._probe, self._x)
        except Exception:  # the user's code runs in here, and may raise anything
            pass  # a network that cannot be read in stages has no costates to report
        self.curves: dict[str, list[Any]] = {name: [] for name in ("step", *QUANTITIES)}

    def note(self, step: int, steps: int, lr: float) -> None:
        """Take a reading if one is due.

        Args:
            step: steps that have been made.
            steps: of the whole run.
            lr: learning rate of the next step.
        """
        due = {round(steps * i / (self._readings - 1)) for i in range(self._readings)}
        if step not in due or step in self.curves["step"]:
            return
        self._probe.load_state_dict(self._live.state_dict())
        self.curves["step"].append(step)
        values = {
            **self._principle(),
            "signal_to_noise": _measured(self._signal_to_noise),
            "temperature": temperature(lr, self._batch, self._momentum) if lr else 0.0,
            "gram_condition": _measured(self._gram_condition),
        }
        for name in QUANTITIES:
            self.curves[name].append(values.get(name))

    def _principle(self) -> dict[str, float | None]:
        if self._system is None:
            return {}
        cost = TerminalCost(self._problem.loss, self._y)
        try:
            with torch.no_grad():
                run = rollout(self._system, self._x)
            run = adjoint(self._system, cost, run)
        except Exception:  # a reading that fails must not end the run that it reads
            return {}
        assert run.costates is not None and run.value is not None
        gradients = run.gradient_by_name()
        first = next((p for p in run.costates[1:] if float_leaves(p)), None)
        last = run.costates[-1]
        ratio = float(tree_norm(first) / tree_norm(last)) if first is not None else None
        return {
            "loss": _finite(float(run.value)),
            "stationarity": _finite(float(tree_norm(gradients))) if gradients else None,
            "costate_ratio": _finite(ratio),
        }

    def _signal_to_noise(self) -> float:
        names = self._problem.parameter_names
        noise = gradient_noise(self._probe, self._problem.loss, (self._x, self._y), names)
        return self._batch * noise.squared_gradient().value / noise.trace().value

    def _gram_condition(self) -> float:
        x, y = self._x[:_GRAM], self._y[:_GRAM]
        generator = torch.Generator().manual_seed(self._problem.seed)

        def along(out: Tensor, _: Tensor) -> Tensor:
            direction = torch.randn(out.shape[-1], generator=generator.manual_seed(self._problem.seed))
            return (out * direction.to(out)).sum(-1).mean()

        gram = PerSampleGradients(self._probe, along, (x, y), self._problem.parameter_names).gram()
        values = torch.linalg.eigvalsh(gram)[1:]  # centring costs one dimension
        return float(values[-1] / values[0]) if float(values[0]) > 0 else math.inf


def _measured(quantity: Callable[[], float]) -> float | None:
    try:
        return _finite(quantity())
    except Exception:  # a reading that fails must not end the run that it reads
        return None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
