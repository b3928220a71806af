r"""A controlled dynamical system in discrete time, and what can be asked of one.

    x_{t+1} = f_t(x_t, u_t),   t = 0, …, T−1

States and controls are trees of tensors (a tensor, or dicts and tuples of them; see
:mod:`bolza.ops.trees`). A network (t is the layer, u the weights), a training run (t is the step,
u the learning rate) and a plant are all systems. Anything with ``horizon``, ``controls`` and
``step`` is one; no base class is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError, ShapeError
from bolza.core.trajectory import Trajectory
from bolza.ops.trees import Tree, float_leaves, tree_map, with_float_leaves

__all__ = ["LinearMap", "System", "linearize", "rollout"]


@runtime_checkable
class System(Protocol):
    """Dynamics x_{t+1} = f_t(x_t, u_t).

    ``horizon`` is the number T of steps, ``controls`` the nominal u_0 … u_{T−1}, and
    ``step(t, x, u)`` returns the next state without changing its arguments.

    Example:
        >>> class Integrator:
        ...     horizon, controls = 2, (torch.ones(1), torch.ones(1))
        ...     def step(self, t, x, u):
        ...         return x + u
        >>> isinstance(Integrator(), System)
        True
    """

    @property
    def horizon(self) -> int:
        """Number of steps."""
        ...

    @property
    def controls(self) -> Sequence[Tree]:
        """Nominal controls, one tree a step."""
        ...

    def step(self, t: int, x: Tree, u: Tree) -> Tree:
        """Return the state after step ``t``."""
        ...


def rollout(system: System, x0: Tree, controls: Sequence[Tree] | None = None) -> Trajectory:
    """Run the system from ``x0``: x_{t+1} = f_t(x_t, u_t).

    The states stay attached to the autograd graph of ``x0`` and the controls, if there is one;
    wrap the call in ``torch.no_grad()`` when only values are wanted.

    Args:
        system: the dynamics.
        x0: initial state, a tree of tensors, samples first.
        controls: one tree a step; the system's own by default.

    Returns:
        Trajectory with ``states`` (T+1 of them) and ``controls``.

    Raises:
        ArgumentError: the number of controls is not the horizon.

    Example:
        >>> from bolza.systems import LinearSystem
        >>> system = LinearSystem(torch.eye(1), torch.eye(1), horizon=3)
        >>> rollout(system, torch.zeros(1), [torch.ones(1)] * 3).states[-1]
        tensor([3.])
    """
    controls = tuple(system.controls if controls is None else controls)
    if len(controls) != system.horizon:
        raise ArgumentError(
            f"controls has {len(controls)} entries, but the horizon of the system is {system.horizon}: "
            "give one control for each step"
        )
    states = [x0]
    for t, u in enumerate(controls):
        states.append(system.step(t, states[-1], u))
    return Trajectory(states=tuple(states), controls=controls)


@dataclass(frozen=True)
class LinearMap:
    """First-order expansion of one step: δx_{t+1} = A δx_t + B δu_t, by products.

    Attributes:
        t: the step.
        x: state it was linearised at.
        u: control it was linearised at.
        next_state: f_t(x, u).
        function: (x leaves, u leaves) → leaves of the next state, differentiable leaves only.
    """

    t: int
    x: Tree
    u: Tree
    next_state: Tree
    function: Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, ...]]

    def _leaves(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return tuple(float_leaves(self.x)), tuple(float_leaves(self.u))

    def jvp(self, dx: Tree, du: Tree | None = None) -> Tree:
        """Return A δx + B δu, with the structure of the next state.

        Args:
            dx: tangent with the structure of the state; ``None`` for zero.
            du: tangent with the structure of the control; ``None`` for zero.
        """
        xs, us = self._leaves()
        dxs = tuple(torch.zeros_like(a) for a in xs) if dx is None else tuple(float_leaves(dx))
        dus = tuple(torch.zeros_like(a) for a in us) if du is None else tuple(float_leaves(du))
        _same_shapes("dx", dxs, xs)
        _same_shapes("du", dus, us)
        tangent = torch.func.jvp(self.function, (xs, us), (dxs, dus))[1]
        return with_float_leaves(self.next_state, tangent, other=None)

    def vjp(self, p: Tree) -> tuple[Tree, Tree]:
        """Return (Aᵀp, Bᵀp) for a cotangent ``p`` with the structure of the next state."""
        cotangents = tuple(float_leaves(p))
        _same_shapes("p", cotangents, tuple(float_leaves(self.next_state)))
        pullback = torch.func.vjp(self.function, *self._leaves())[1]
        to_x, to_u = pullback(cotangents)
        return with_float_leaves(self.x, to_x, other=None), with_float_leaves(self.u, to_u, other=None)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return the dense A and B over flattened leaves; for small systems only."""
        xs, us = self._leaves()

        def flat(vector_x: Tensor, vector_u: Tensor) -> Tensor:
            inputs = _split_like(vector_x, xs), _split_like(vector_u, us)
            return torch.cat([leaf.reshape(-1) for leaf in self.function(*inputs)])

        like = float_leaves(self.next_state)[0]
        flat_x, flat_u = _join(xs, like), _join(us, like)
        a, b = torch.func.jacrev(flat, argnums=(0, 1))(flat_x, flat_u)
        return a, b


def _join(leaves: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in leaves]) if leaves else like.new_zeros(0)


def _split_like(vector: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    pieces = torch.split(vector, [leaf.numel() for leaf in like]) if like else ()
    return tuple(piece.reshape(leaf.shape) for piece, leaf in zip(pieces, like, strict=True))


def _same_shapes(name: str, given: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    if [a.shape for a in given] != [b.shape for b in wanted]:
        raise ShapeError(
            f"{name} has leaves of shapes {[tuple(a.shape) for a in given]}, "
            f"but {[tuple(b.shape) for b in wanted]} are needed: it must have the structure of what it varies"
        )


def linearize(system: System, t: int, x: Tree, u: Tree | None = None) -> LinearMap:
    """Expand one step to first order: f_t(x + δx, u + δu) ≈ f_t(x, u) + A δx + B δu.

    Args:
        system: the dynamics; its step must be a function that ``torch.func`` can transform.
        t: step, ``0 <= t < system.horizon``.
        x: state to linearise at.
        u: control to linearise at; the system's own by default.

    Returns:
        LinearMap with products ``jvp``, ``vjp`` and, for small systems, ``matrices``.

    Raises:
        ArgumentError: ``t`` is not a step of the system.

    Example:
        >>> from bolza.systems import LinearSystem
        >>> system = LinearSystem(2 * torch.eye(1), torch.eye(1), horizon=1)
        >>> a, b = linearize(system, 0, torch.zeros(1), torch.zeros(1)).matrices()
        >>> a, b
        (tensor([[2.]]), tensor([[1.]]))
    """
    check_step(system, t)
    u = system.controls[t] if u is None else u
    x, u = tree_map(Tensor.detach, x), tree_map(Tensor.detach, u)

    def function(xs: Sequence[Tensor], us: Sequence[Tensor]) -> tuple[Tensor, ...]:
        # in-place layers may overwrite their input, which belongs to the caller
        inputs = with_float_leaves(x, [leaf.clone() for leaf in xs])
        return tuple(float_leaves(system.step(t, inputs, with_float_leaves(u, us))))

    with torch.no_grad():
        next_state = system.step(t, tree_map(Tensor.clone, x), u)
    return LinearMap(t=t, x=x, u=u, next_state=next_state, function=function)


def check_step(system: System, t: int) -> None:
    """Raise an ArgumentError unless ``0 <= t < system.horizon``."""
    if not 0 <= t < system.horizon:
        raise ArgumentError(f"t is {t}, but the steps of this system are 0 to {system.horizon - 1}")
