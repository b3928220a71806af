r"""One continuous-depth block: x(T) = x(0) + ∫₀ᵀ f(s, x, u(s/T)) ds, for any trajectory of parameters."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_structure

from bolza.core.errors import ArgumentError, DivergenceError, ShapeError, UnsupportedError
from bolza.core.reference import Reference, cites
from bolza.models.continuous.solver import (
    GRADIENTS,
    Span,
    integrate,
    integrate_adjoint,
    integrate_checkpointed,
    refuse_dropout,
)
from bolza.models.continuous.trajectories import Constant, Piecewise, Trajectory
from bolza.ops.trees import Tree, float_leaves, tree_map
from bolza.systems.ode import METHODS, RungeKutta

__all__ = ["ADAPTIVE", "ContinuousBlock", "NeuralODE"]

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
"""Adaptive methods, which the package torchdiffeq provides."""

CHEN = Reference(
    "chen2018neural",
    "Chen, Ricky T. Q. and Rubanova, Yulia and Bettencourt, Jesse and Duvenaud, David",
    "Neural Ordinary Differential Equations",
    2018,
    venue="Advances in Neural Information Processing Systems",
    arxiv="1806.07366",
)


class ContinuousBlock(nn.Module):
    r"""A layer of continuous depth: the flow of ẋ = f(s, x, u(s/T)) from time 0 to T.

    Method and steps belong to one evaluation and not to the weights: both may be changed at any time, as
    attributes or for one call.

    Args:
        field: what is integrated: a network from states to velocities of the same shape, whose parameters are then
            constant in depth, or a :class:`Trajectory` such as :class:`Piecewise`.
        horizon: time T at which the flow ends; an attribute that may be changed, and is part of the ``state_dict``.
        method: ``"euler"``, ``"midpoint"``, ``"rk4"``, ``"rk38"`` or a :class:`bolza.systems.RungeKutta` of your
            own, with fixed steps; or one of ``ADAPTIVE``, for which torchdiffeq must be installed.
        steps: number of fixed steps.
        gradient: ``"autograd"`` keeps every evaluation; ``"checkpoint"`` keeps one state a step and evaluates again,
            with the same gradient; ``"adjoint"`` keeps nothing and integrates the costate backwards, with the error
            of the method in the gradient.
        rtol: relative tolerance of adaptive methods.
        atol: absolute tolerance of adaptive methods.
        timed: whether the network is called as field(s, x), with the time first.

    Attributes:
        evaluations: how often the field was evaluated in the last forward pass.

    Raises:
        ArgumentError: an argument out of range, or a method or gradient that is not known.
        ShapeError: (in use) velocities do not have the shape and the form of the state.
        UnsupportedError: (in use) an adaptive method without torchdiffeq; dropout under ``"adjoint"``; a field that
            writes into its state.
        DivergenceError: (in use) an adaptive method needs steps below the precision of the time.

    Example:
        >>> block = ContinuousBlock(Piecewise(nn.Linear(4, 4), cells=3), method="rk4", steps=6)
        >>> x = torch.ones(2, 4)
        >>> block(x).shape, block.evaluations
        (torch.Size([2, 4]), 24)
        >>> block(x, method="euler", steps=3).shape  # a residual network of three blocks with the same weights
        torch.Size([2, 4])
    """

    one_operation = True  # a tracer reads it like a layer of torch.nn

    def __init__(
        self,
        field: nn.Module,
        *,
        horizon: float = 1.0,
        method: str | RungeKutta = "rk4",
        steps: int = 10,
        gradient: str = "autograd",
        rtol: float = 1e-5,
        atol: float = 1e-6,
        timed: bool = False,
    ) -> None:
        super().__init__()
        if timed and isinstance(field, Trajectory):
            raise ArgumentError("timed=True goes to the trajectory itself: Piecewise(net, cells, timed=True)")
        _check_gradient(gradient)
        if not (rtol > 0 and atol > 0):
            raise ArgumentError(f"rtol={rtol} and atol={atol}: tolerances must be positive")
        self.trajectory = field if isinstance(field, Trajectory) else Constant(field, timed)
        _check_horizon(horizon)
        _check_steps(steps)
        self.horizon, self.steps = float(horizon), int(steps)
        _resolved(method)
        self.method = method
        self.gradient, self.rtol, self.atol = gradient, rtol, atol
        self.evaluations = 0

    def forward(self, x: Tree, method: str | RungeKutta | None = None, steps: int | None = None) -> Tree:
        """The state at time T of the flow that starts at x.

        Args:
            x: tensor, or a tree of tensors if the field takes one.
            method: instead of the block's own.
            steps: instead of the block's own.
        """
        _check_horizon(self.horizon)
        self.evaluations = 0
        state = self._solve(self.trajectory.start(x), 0.0, self.horizon, method, steps)
        return self.trajectory.finish(state)

    def path(
        self,
        x: Tree,
        times: Sequence[float] | None = None,
        method: str | RungeKutta | None = None,
        steps: int | None = None,
    ) -> Tree:
        """The states along the flow, stacked with time first.

        Args:
            x: as in the call.
            times: increasing, from 0 or later to at most T; the fixed steps are shared out over the stretches
                between them, at least one to each. By default the ``steps + 1`` edges of the steps.
            method: instead of the block's own.
            steps: instead of the block's own.

        Returns:
            Tree of tensors (times, *state).

        Raises:
            ArgumentError: the times do not increase, or leave [0, T].

        Example:
            >>> NeuralODE(nn.Linear(2, 2), steps=4).path(torch.ones(3, 2)).shape
            torch.Size([5, 3, 2])
        """
        count = self.steps if steps is None else steps
        _check_steps(count)
        if times is None:
            times = [self.horizon * t / count for t in range(count + 1)]
        if not len(times) or not (times[0] >= 0 and times[-1] <= self.horizon * (1 + 1e-12)):
            raise ArgumentError(f"times={list(times)} must lie within 0 and horizon={self.horizon}")
        if not all(a <= b for a, b in zip(times, times[1:], strict=False)):
            raise ArgumentError(f"times={list(times)} must increase")
        self.evaluations = 0
        state, now, states = self.trajectory.start(x), 0.0, []
        for time in times:
            share = max(1, math.ceil(count * (time - now) / self.horizon - 1e-9))
            state = self._solve(state, now, float(time), method, share)
            now = float(time)
            states.append(self.trajectory.finish(state))
        return tree_map(lambda *leaves: torch.stack(leaves), *states)

    def velocity(self, s: float, state: Tree) -> Tree:
        """The velocity ẋ of a state at time s: what the integrator sees.

        Args:
            s: time, from 0 to T; at a jump of the parameters the value before it is meant.
            state: as the trajectory has it; for all but flows with a state of their own, the data.
        """
        tau = s / self.horizon
        return self.trajectory(s, state, self.trajectory.locate(tau, (0.0, tau) if tau > 0 else (0.0, 1.0)))

    def refine(self, factor: int = 2, noise: float = 0.0, generator: torch.Generator | None = None) -> None:
        """Cut every cell of a :class:`Piecewise` block into several, and take as many more steps.

        At an equal number of steps the output does not change. New parameters appear: make a new optimizer.

        Args:
            factor: new cells for each old one.
            noise: relative noise on the copies.
            generator: for the noise.

        Raises:
            UnsupportedError: the parameters do not come in cells.
        """
        if not isinstance(self.trajectory, Piecewise):
            raise UnsupportedError(
                f"the parameters are a {type(self.trajectory).__name__} trajectory, which has no cells to refine: "
                "take Piecewise(net, cells)"
            )
        self.trajectory.refine(factor, noise, generator)
        self.steps *= factor

    def _solve(self, x: Tree, start: float, end: float, method: Any, steps: int | None) -> Tree:
        solver = _resolved(self.method if method is None else method)
        count = self.steps if steps is None else steps
        _check_steps(count)
        _check_gradient(self.gradient)
        if not float_leaves(x):
            raise ShapeError("the state holds no floating-point tensor: embed indices before the block")
        if start == end:
            return x
        if isinstance(solver, str):
            return self._adapt(x, start, end, solver)
        span = Span(start, end, count, self.horizon)
        self.evaluations += count * len(solver.nodes)
        # torch.func transforms take neither checkpoints nor functions of our own; the gradient is the same or better
        transformed = torch._C._functorch.peek_interpreter_stack() is not None
        checked = _Checked(self.trajectory)
        if self.gradient == "autograd" or transformed or not torch.is_grad_enabled():
            return integrate(self.trajectory, solver, span, x, checked)
        if self.gradient == "checkpoint":
            return integrate_checkpointed(self.trajectory, solver, span, x, checked)
        return integrate_adjoint(self.trajectory, solver, span, x, checked)

    def _adapt(self, x: Tree, start: float, end: float, method: str) -> Tree:
        try:
            from torchdiffeq import odeint, odeint_adjoint
        except ImportError as error:
            raise UnsupportedError(
                f"method {method!r} takes adaptive steps from torchdiffeq, which is not installed: "
                "pip install 'bolza[ode]', or take fixed steps, such as method='rk4'"
            ) from error
        if self.gradient == "checkpoint":
            raise UnsupportedError(
                f"gradient='checkpoint' needs fixed steps, but method is {method!r}: take gradient='adjoint', or 'rk4'"
            )
        single = isinstance(x, Tensor)
        if not single and not (isinstance(x, tuple) and all(isinstance(leaf, Tensor) for leaf in x)):
            raise UnsupportedError("adaptive methods take a state that is a tensor or a tuple of tensors")
        like = float_leaves(x)[0]
        adjoint = self.gradient == "adjoint" and torch.is_grad_enabled()
        if adjoint:
            refuse_dropout(self.trajectory)
        checked = _Checked(self.trajectory)
        edges = [
            start,
            *(b * self.horizon for b in self.trajectory.breaks if start < b * self.horizon < end),
            end,
        ]
        for low, high in zip(edges, edges[1:], strict=False):
            step = low / self.horizon, high / self.horizon

            def field(s: Tensor, state: Tree, step: tuple[float, float] = step) -> Tree:
                self.evaluations += 1
                time = float(s.detach())
                return checked(time, state, self.trajectory.locate(time / self.horizon, step))

            times = torch.tensor([low, high], dtype=like.dtype, device=like.device)
            options = {"rtol": self.rtol, "atol": self.atol, "method": method}
            try:
                if adjoint:
                    parameters = tuple(p for p in self.trajectory.parameters() if p.requires_grad)
                    found = odeint_adjoint(field, x, times, adjoint_params=parameters, **options)
                else:
                    found = odeint(field, x, times, **options)
            except AssertionError as error:  # what the package raises when its step underflows
                raise DivergenceError(
                    f"method {method!r} found no step that meets rtol={self.rtol:g} between times {low:g} and "
                    f"{high:g} after {self.evaluations} evaluations: the field is too stiff or not finite there "
                    f"({error}). Loosen the tolerances, compute in float64, or take fixed steps"
                ) from error
            x = found[1] if single else tuple(leaf[1] for leaf in found)
        return x

    def get_extra_state(self) -> Tensor:
        """The horizon, for the ``state_dict``."""
        return torch.tensor(self.horizon, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the horizon from a ``state_dict``."""
        self.horizon = float(state)

    def extra_repr(self) -> str:
        """What a printed network says of it."""
        method = self.method if isinstance(self.method, str) else "RungeKutta(...)"
        return f"horizon={self.horizon:g}, method={method}, steps={self.steps}, gradient={self.gradient}"


class _Checked:
    """A trajectory whose first velocity is compared with its state."""

    def __init__(self, trajectory: Trajectory) -> None:
        self.trajectory, self.done = trajectory, False

    def __call__(self, s: float, x: Tree, u: Any) -> Tree:
        if self.done:
            return self.trajectory(s, x, u)
        self.done = True
        leaves = float_leaves(x)
        versions = [0 if leaf.is_inference() else leaf._version for leaf in leaves]
        out = self.trajectory(s, x, u)
        if versions != [0 if leaf.is_inference() else leaf._version for leaf in leaves]:
            raise UnsupportedError(
                "the field writes into the state, from which the step goes on: set inplace=False in its first layer"
            )
        if isinstance(x, Tensor) and isinstance(out, Tensor) and x.shape == out.shape:
            return out
        shapes = [[tuple(leaf.shape) for leaf in float_leaves(tree)] for tree in (x, out)]
        if shapes[0] != shapes[1]:
            raise ShapeError(
                f"the field maps states of shape {shapes[0]} to velocities of shape {shapes[1]}: they must be alike"
            )
        forms = [tree_structure(tree) for tree in (x, out)]
        if forms[0] != forms[1]:
            raise ShapeError(
                f"the field maps states of the form {forms[0]} to velocities of the form {forms[1]}: they must be "
                "alike, the keys of a dict in the same order"
            )
        return out


def _resolved(method: str | RungeKutta) -> str | RungeKutta:
    if isinstance(method, RungeKutta):
        return method
    found = METHODS.get(method) if isinstance(method, str) else None
    if isinstance(found, RungeKutta):
        return found
    if method in ADAPTIVE:
        return method
    names = ", ".join([name for name, table in METHODS.items() if isinstance(table, RungeKutta)])
    raise ArgumentError(
        f"method={method!r} is not known: choose {names} (fixed steps), {', '.join(ADAPTIVE)} (adaptive), or give "
        "a RungeKutta tableau"
    )


def _check_horizon(horizon: float) -> None:
    try:
        good = math.isfinite(horizon) and horizon > 0
    except TypeError:
        good = False
    if not good:
        raise ArgumentError(f"horizon={horizon}: the time at which the flow ends must be positive and finite")


def _check_steps(steps: int) -> None:
    try:
        whole = operator.index(steps)
    except TypeError:
        raise ArgumentError(f"steps={steps!r}: give a whole number of steps") from None
    if whole < 1:
        raise ArgumentError(f"steps={steps}: there must be at least one step")


def _check_gradient(gradient: str) -> None:
    if gradient not in GRADIENTS:
        raise ArgumentError(f"gradient={gradient!r} is not known: choose {', '.join(GRADIENTS)}")


@cites(CHEN)
class NeuralODE(ContinuousBlock):
    r"""A layer whose output is the solution of ẋ = f(x) at time T, with the same parameters at every depth.

    A :class:`ContinuousBlock` with constant parameters; arguments, attributes and errors are those of the block.

    Args:
        field: network from states to velocities of the same shape, called as field(x), or field(s, x) if ``timed``.
        horizon: time T.
        method: integrator.
        steps: number of fixed steps.
        gradient: ``"autograd"``, ``"checkpoint"`` or ``"adjoint"``.
        rtol: relative tolerance of adaptive methods.
        atol: absolute tolerance of adaptive methods.
        timed: whether the network takes the time.

    Raises:
        ArgumentError: as the block; or the field is a trajectory already.

    Reference: Chen, Rubanova, Bettencourt & Duvenaud (2018), *Neural Ordinary Differential Equations*,
    arXiv:1806.07366. Departures: fixed steps of our own, RK4 by default, with the gradient of the scheme itself;
    the paper's adaptive steps and adjoint are options.

    Example:
        >>> layer = NeuralODE(nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)), steps=8)
        >>> layer(torch.zeros(5, 2)).shape
        torch.Size([5, 2])
    """

    def __init__(self, field: nn.Module, **options: Any) -> None:
        if isinstance(field, Trajectory):
            raise ArgumentError("a NeuralODE has constant parameters: for a trajectory take ContinuousBlock")
        super().__init__(field, **options)
