r"""Integrating a trajectory over depth with fixed steps, and three ways to differentiate through it.

* ``"autograd"``: back-propagation through every operation of the solver. Memory grows with the number of evaluations.
* ``"checkpoint"``: the states between steps are kept, and each step is evaluated again in the backward pass. The same
  gradient, memory of one step and one state a step.
* ``"adjoint"``: the costate a = ∂J/∂x is integrated backwards beside the state, nothing is kept:

      ȧ = −f_xᵀ a,     ∂J/∂u = ∫₀ᵀ f_uᵀ a ds,     a(T) = ∂J/∂x(T)

  Constant memory. It is the gradient of the differential equation and not of the scheme, so the two differ by the
  error of the scheme, and it is lost where the equation cannot be run backwards (a contracting field).

Reference: Chen, Rubanova, Bettencourt & Duvenaud (2018), *Neural Ordinary Differential Equations*, arXiv:1806.07366,
§2 and appendix B; Gholami, Keutzer & Biros (2019), *ANODE*, arXiv:1902.10298, for what the adjoint loses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from bolza.core.errors import UnsupportedError
from bolza.models.continuous.trajectories import Trajectory
from bolza.ops.replay import frozen_statistics, same_randomness
from bolza.ops.trees import Tree, float_leaves, with_float_leaves
from bolza.systems.ode import RungeKutta

__all__ = ["GRADIENTS", "Span", "integrate", "integrate_adjoint", "integrate_checkpointed"]

GRADIENTS = ("autograd", "checkpoint", "adjoint")

Velocity = Callable[[float, Tree, Any], Tree]


@dataclass(frozen=True)
class Span:
    """A stretch of time and how it is cut into steps.

    Args:
        start: its first time.
        end: its last time.
        steps: number of steps, all alike.
        horizon: time of relative depth 1.
    """

    start: float
    end: float
    steps: int
    horizon: float

    @property
    def h(self) -> float:
        """Length of a step."""
        return (self.end - self.start) / self.steps

    def controls(self, trajectory: Trajectory, method: RungeKutta, t: int) -> list[Any]:
        """Control at each node of step t."""
        a, b = self._depth(t), self._depth(t + 1)
        return [trajectory.locate(self._depth(t + c), (a, b)) for c in method.nodes]

    def _depth(self, t: float) -> float:
        # (t/n) first: for a whole block the depth is then the same number for every horizon
        if self.start == 0 and self.end == self.horizon:
            return t / self.steps
        return (self.start + (self.end - self.start) * (t / self.steps)) / self.horizon


def _step(
    trajectory: Trajectory, velocity: Velocity, method: RungeKutta, span: Span, t: int, x: Tree
) -> Tree:
    s = span.start + t * span.h
    return method.advance(velocity, s, span.h, x, span.controls(trajectory, method, t))


def integrate(
    trajectory: Trajectory,
    method: RungeKutta,
    span: Span,
    x: Tree,
    velocity: Velocity | None = None,
    each: Callable[[Tree], None] | None = None,
) -> Tree:
    """The state at the end of a span; autograd sees every operation.

    Args:
        trajectory: what is integrated.
        method: Runge–Kutta method.
        span: times and steps.
        x: state at the start.
        velocity: evaluated instead of the trajectory, if given.
        each: called with the state after each step.
    """
    for t in range(span.steps):
        x = _step(trajectory, velocity or trajectory, method, span, t, x)
        if each is not None:
            each(x)
    return x


def integrate_checkpointed(
    trajectory: Trajectory, method: RungeKutta, span: Span, x: Tree, velocity: Velocity | None = None
) -> Tree:
    """The state at the end; each step is evaluated again when its gradient is needed.

    Running statistics move in the first evaluation only, and random layers repeat their draws. ``velocity`` takes the
    place of the trajectory in the forward pass, as in `integrate`.
    """
    return _apply(_Checkpointed, trajectory, method, span, x, velocity)


def integrate_adjoint(
    trajectory: Trajectory, method: RungeKutta, span: Span, x: Tree, velocity: Velocity | None = None
) -> Tree:
    """The state at the end; its gradient comes from the adjoint equation, and nothing is kept in between.

    Raises:
        UnsupportedError: the trajectory has dropout or other noise at work, which the backward pass could not repeat.
    """
    refuse_dropout(trajectory)
    return _apply(_Adjoint, trajectory, method, span, x, velocity)


def refuse_dropout(trajectory: nn.Module) -> None:
    """Refuse a field whose noise the adjoint equation could not see again.

    Raises:
        UnsupportedError: some dropout layer is in training mode.
    """
    for name, layer in trajectory.named_modules():
        if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.training and layer.p > 0:
            raise UnsupportedError(
                f"gradient='adjoint' evaluates the field at other times going back, so the dropout of {name!r} would "
                "draw other masks: take gradient='checkpoint', or set its p to 0"
            )


def _apply(
    function: type[torch.autograd.Function],
    trajectory: Trajectory,
    method: RungeKutta,
    span: Span,
    x: Tree,
    velocity: Velocity | None,
) -> Tree:
    named, leaves = dict(trajectory.named_parameters()), float_leaves(x)
    structure = with_float_leaves(x, [torch.empty(0)] * len(leaves))  # what is not floating point rides along
    kind = leaves[0].device.type
    problem = _Problem(
        trajectory,
        velocity or trajectory,
        method,
        span,
        structure,
        list(named),
        tuple(named.values()),
        leaves[0].device,
        torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)),
    )
    ends = function.apply(problem, *leaves, *named.values())
    return with_float_leaves(x, list(ends))


@dataclass(frozen=True)
class _Problem:
    """What both passes need to know."""

    trajectory: Trajectory
    velocity: Velocity  # in the forward pass
    method: RungeKutta
    span: Span
    structure: Tree
    names: list[str]
    parameters: tuple[Tensor, ...]
    device: torch.device
    autocast: torch.autocast

    def tree(self, leaves: Sequence[Tensor]) -> Tree:
        return with_float_leaves(self.structure, leaves)

    def bound(self) -> tuple[Velocity, list[Tensor]]:
        """The trajectory with the parameters of the forward pass, and those of them that need a gradient."""
        now = [value for _, value in self.trajectory.named_parameters()]
        values: Sequence[Tensor] = self.parameters
        if len(now) == len(values) and all(a is b for a, b in zip(now, values, strict=True)):
            return self.trajectory, [value for value in values if value.requires_grad]
        # they had been put in for that call alone (functional_call): differentiate in copies
        values = [value.detach().requires_grad_(value.requires_grad) for value in values]
        parameters = dict(zip(self.names, values, strict=True))
        return (
            lambda s, x, u: functional_call(self.trajectory, parameters, (s, x, u)),
            [value for value in values if value.requires_grad],
        )

    @contextmanager
    def again(self) -> Iterator[None]:
        """Evaluate as in the forward pass, and leave no trace in running statistics."""
        has_buffers = next(self.trajectory.buffers(), None) is not None
        with self.autocast, frozen_statistics(self.trajectory) if has_buffers else nullcontext():
            yield

    def spread(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """One gradient for each parameter, from those of the parameters that need one."""
        rest = iter(gradients)
        return [next(rest) if value.requires_grad else None for value in self.parameters]


class _Checkpointed(torch.autograd.Function):
    """Forward: the states between steps are kept. Backward: one step after the other again, with its graph."""

    @staticmethod
    def forward(ctx: Any, problem: _Problem, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(float_leaves(problem.structure))
        kept, states = [], [_random_state(problem.device)]
        x, noisy = list(tensors[:count]), False
        for t in range(problem.span.steps):
            kept.extend(x)
            if noisy and t:
                states.append(_random_state(problem.device))
            tree = _step(
                problem.trajectory, problem.velocity, problem.method, problem.span, t, problem.tree(x)
            )
            x = float_leaves(tree)
            if t == 0:
                noisy = not torch.equal(states[0], _random_state(problem.device))
        ctx.problem, ctx.random_states = problem, states if noisy else []
        ctx.save_for_backward(
            *kept, *problem.parameters
        )  # the parameters, so that autograd sees if they change
        return tuple(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *costates: Tensor) -> tuple[Any, ...]:
        problem: _Problem = ctx.problem
        velocity, wanted = problem.bound()
        gradients: list[Tensor | None] = [None] * len(wanted)
        saved, count, p = ctx.saved_tensors, len(costates), list(costates)
        with problem.again():
            for t in reversed(range(problem.span.steps)):
                random = ctx.random_states[t] if ctx.random_states else None
                with (
                    torch.enable_grad(),
                    nullcontext() if random is None else same_randomness(random, problem.device),
                ):
                    x = [leaf.detach().requires_grad_() for leaf in saved[t * count : (t + 1) * count]]
                    tree = _step(
                        problem.trajectory, velocity, problem.method, problem.span, t, problem.tree(x)
                    )
                found = _pulled(float_leaves(tree), p, [*x, *wanted])
                p = [torch.zeros_like(a) if g is None else g for a, g in zip(x, found, strict=False)]
                gradients = [_sum(a, b) for a, b in zip(gradients, found[count:], strict=True)]
        return None, *p, *problem.spread(gradients)


class _Adjoint(torch.autograd.Function):
    """Forward: the last state alone is kept. Backward: state, costate and gradient from T to 0."""

    @staticmethod
    def forward(ctx: Any, problem: _Problem, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(float_leaves(problem.structure))
        start, random = problem.tree(tensors[:count]), _random_state(problem.device)
        end = integrate(problem.trajectory, problem.method, problem.span, start, problem.velocity)
        if not torch.equal(random, _random_state(problem.device)):
            raise UnsupportedError(
                "gradient='adjoint' evaluates the field at other times going back, but the field draws random numbers, "
                "which would be others then: take gradient='checkpoint'"
            )
        ends = tuple(float_leaves(end))
        ctx.problem = problem
        ctx.save_for_backward(*ends, *problem.parameters)
        return ends

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *costates: Tensor) -> tuple[Any, ...]:
        problem: _Problem = ctx.problem
        method, span, count = problem.method, problem.span, len(costates)
        velocity, wanted = problem.bound()
        gradients: list[Tensor | None] = [None] * len(wanted)
        slopes: list[Sequence[Tensor | None]] = []

        def augmented(s: float, state: list[Tensor], u: Any) -> list[Tensor]:
            with torch.enable_grad():
                x = [leaf.detach().requires_grad_() for leaf in state[:count]]
                out = float_leaves(velocity(s, problem.tree(x), u))
            found = _pulled(out, state[count:], [*x, *wanted])
            slopes.append(found[count:])
            costate = [torch.zeros_like(a) if g is None else -g for a, g in zip(x, found, strict=False)]
            return [*(leaf.detach() for leaf in out), *costate]

        back = Span(span.end, span.start, span.steps, span.horizon)
        state = [*ctx.saved_tensors[:count], *costates]
        with problem.again():
            for t in range(span.steps):
                slopes.clear()
                state = _step(problem.trajectory, augmented, method, back, t, state)
                for b, slope in zip(method.b, slopes, strict=True):
                    if b:
                        gradients = [_sum(a, g, b * span.h) for a, g in zip(gradients, slope, strict=True)]
        return None, *state[count:], *problem.spread(gradients)


def _pulled(
    outputs: Sequence[Tensor], costates: Sequence[Tensor], inputs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """⟨p, ∂outputs/∂inputs⟩, None where nothing depends on an input."""
    pairs = [(out, p) for out, p in zip(outputs, costates, strict=True) if out.requires_grad]
    if not pairs:
        return [None] * len(inputs)
    return torch.autograd.grad([o for o, _ in pairs], inputs, [p for _, p in pairs], allow_unused=True)


def _sum(total: Tensor | None, g: Tensor | None, weight: float = 1.0) -> Tensor | None:
    if g is None:
        return total
    if total is None:
        return g * weight
    return total.add_(g, alpha=weight)


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
