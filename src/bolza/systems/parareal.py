r"""Running a system by a parallel multigrid iteration over its steps, instead of one step after another.

The T steps are cut into K slices. F_k carries a state through slice k step by step, G_k through the same
slice in one coarse jump. Parareal corrects a serial sweep of jumps by slices that all run at once:

    U_{k+1} ← G_k(U_k^new) + F_k(U_k^old) − G_k(U_k^old)

MGRIT is the same correction as a full approximation scheme on any number of levels, with relaxation: F
carries the state at a slice boundary through its slice, C takes the end of a slice as the next boundary.
Two levels with F alone are parareal. After K iterations of parareal, or K/2 with FCF relaxation, the states
are those of the serial run; what makes it useful is that a few iterations are enough where the steps are
small and the controls smooth in t.

Costates obey a linear recursion with the states frozen, and are found in the same way.

Reference: Lions, Maday & Turinici (2001), *Résolution d'EDP par un schéma en temps « pararéel »*; Falgout,
Friedhoff, Kolev, MacLachlan & Schroder (2014), *Parallel time integration with multigrid*; Günther, Ruthotto,
Schroder, Cyr & Gauger (2018), arXiv:1812.04352, §3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx.node import map_arg

from bolza.core.cost import Cost
from bolza.core.errors import ArgumentError, ShapeError, UnsupportedError
from bolza.core.reference import Reference, cites
from bolza.core.system import System
from bolza.core.trajectory import Trajectory
from bolza.ops.trees import Tree, float_leaves, tree_add, tree_detach, tree_map, with_float_leaves
from bolza.systems.module import ModuleSystem
from bolza.systems.multigrid import Jump, Relaxation, iterate, nested_grids
from bolza.systems.ode import ODESystem

__all__ = ["ParallelRun", "coarse_jump", "mgrit", "parallel_adjoint", "parareal", "slice_boundaries"]

GUNTHER = Reference(
    "gunther2018layer",
    "Günther, Stefanie and Ruthotto, Lars and Schroder, Jacob B. and Cyr, Eric C. and Gauger, Nicolas R.",
    "Layer-Parallel Training of Deep Residual Neural Networks",
    2018,
    arxiv="1812.04352",
)


@dataclass(frozen=True)
class ParallelRun:
    """States (and costates) that a parallel iteration found.

    Attributes:
        trajectory: all T+1 states; after :func:`parallel_adjoint` also costates, gradients and the cost.
        boundaries: the stages at which slices begin and end.
        residuals: largest relative jump of the state at a slice boundary, before each iteration.
        critical_path: steps that wait for one another, if every slice has a processor: the serial run has T.
    """

    trajectory: Trajectory
    boundaries: tuple[int, ...]
    residuals: tuple[float, ...]
    critical_path: int

    @property
    def speedup_bound(self) -> float:
        """Steps of the serial run over those on the critical path; what no machine can exceed."""
        return self.trajectory.horizon / self.critical_path


def slice_boundaries(horizon: int, slices: int | Sequence[int]) -> tuple[int, ...]:
    """Stages at which slices begin and end: 0, …, T.

    Args:
        horizon: number T of steps.
        slices: number of slices, made as equal as possible; or the boundaries themselves.

    Returns:
        Ascending stages, the first 0 and the last T.

    Raises:
        ArgumentError: more slices than steps, or boundaries that do not ascend from 0 to T.

    Example:
        >>> slice_boundaries(8, 3)
        (0, 3, 6, 8)
        >>> slice_boundaries(8, (0, 1, 8))
        (0, 1, 8)
    """
    if isinstance(slices, int):
        if not 1 <= slices <= horizon:
            raise ArgumentError(
                f"slices is {slices}, but the system has {horizon} steps: choose 1 to {horizon}"
            )
        size, longer = divmod(horizon, slices)
        return tuple(k * size + min(k, longer) for k in range(slices + 1))
    bounds = tuple(int(b) for b in slices)
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != horizon or sorted(set(bounds)) != list(bounds):
        raise ArgumentError(f"slices is {bounds}: boundaries must ascend from 0 to the horizon, {horizon}")
    return bounds


def coarse_jump(system: System, controls: Sequence[Tree] | None = None) -> Jump:
    r"""The coarse propagator of a system: n steps as one step n times as large.

    For an :class:`~bolza.systems.ODESystem` it is its own method with the step n·dt, with the controls that
    stand at the nodes of the large step. For any other system it is x + n (f_start(x) − x), which is the same for a
    residual block x + h F(x); a jump over one step is that step. Stages of a network that change the shape of
    the state (stem, pooling, head) are not jumped over, but run.

    Args:
        system: the dynamics.
        controls: one tree a step; the system's own by default.

    Returns:
        A function (start, stop, x) → x, differentiable in x.

    Raises:
        ShapeError: (when called) a slice of several steps begins with one that changes the shape of the state.

    Example:
        >>> system = ODESystem(lambda s, x, u: -x, horizon=4, dt=0.1)
        >>> coarse_jump(system)(0, 4, torch.ones(1))
        tensor([0.6000])
    """
    held = tuple(system.controls if controls is None else controls)

    if isinstance(system, ODESystem):
        ode = system

        def large_step(start: int, stop: int, x: Tree) -> Tree:
            n = stop - start
            if n == 1:
                return ode.step(start, x, held[start])
            at = [min(start + int(c * n), stop - 1) for c in ode.method.nodes]
            if ode.hold == "constant":
                chosen = [held[t] for t in at]
            else:  # the first node of a step stands at its beginning, the last one at its end
                chosen = [held[t][-1 if c >= 1 else 0] for t, c in zip(at, ode.method.nodes, strict=True)]
            return ode.method.advance(ode.fields[start], ode.start + start * ode.dt, n * ode.dt, x, chosen)

        return large_step

    reshaping = _reshaping_stages(system)

    def extrapolated(start: int, stop: int, x: Tree) -> Tree:
        first = start
        while first < stop:  # what changes the shape is a step of its own
            last = first + 1
            while last < stop and not reshaping & {first, last}:
                last += 1
            x, first = over(first, last, x), last
        return x

    def over(start: int, stop: int, x: Tree) -> Tree:
        following = system.step(start, tree_map(Tensor.clone, x), held[start])
        if stop == start + 1:
            return following
        before, after = ([leaf.shape for leaf in float_leaves(tree)] for tree in (x, following))
        if before != after:
            raise ShapeError(
                f"step {start} takes a state of shape {[tuple(s) for s in before]} to "
                f"{[tuple(s) for s in after]}, so {stop - start} steps are no larger step of the same kind: "
                f"make step {start} a slice of its own (slices=(0, …, {start}, {start + 1}, …)), or give coarse="
            )
        return tree_map(lambda a, b: a + (stop - start) * (b - a), x, following)

    return extrapolated


def _reshaping_stages(system: System) -> set[int]:
    """Stages of a network that change the shape of the state; none for other systems, which do not say."""
    if not isinstance(system, ModuleSystem):
        return set()

    def shapes(nodes: Tree) -> list[torch.Size]:
        return [leaf.shape for leaf in float_leaves(map_arg(nodes, lambda node: node.meta["val"]))]

    return {t for t, stage in enumerate(system.stages) if shapes(stage.inputs) != shapes(stage.outputs)}


@cites(GUNTHER)
def mgrit(
    system: System,
    x0: Tree,
    slices: int | Sequence[int],
    *,
    iterations: int = 2,
    levels: int = 2,
    factor: int = 2,
    relaxation: Relaxation = "FCF",
    controls: Sequence[Tree] | None = None,
    coarse: Jump | None = None,
    initial: Sequence[Tree] | None = None,
    tolerance: float = 0.0,
) -> ParallelRun:
    r"""States of a system by multigrid reduction in time: all slices at once, corrected on coarser levels.

        relax (F or FCF);   g_k = F_{k−1}(U_{k−1}) − G_{k−1}(U_{k−1});   V_k = G_{k−1}(V_{k−1}) + g_k;   U ← V;   F

    This process computes what processors side by side would: the values are theirs, the time is not.
    ``critical_path`` says how many steps would wait for one another.

    Args:
        system: the dynamics; any system whose slices can be jumped over, see :func:`coarse_jump`.
        x0: initial state, a tree of tensors, samples first.
        slices: number K of slices, or their boundaries.
        iterations: cycles; ⌈K/2⌉ with FCF relaxation, or K with F, give the serial states to rounding.
        levels: levels of grids, 2 or more; on the last one the sweep is serial.
        factor: how many slices (and coarser intervals) one interval of the next level holds.
        relaxation: ``"F"`` or ``"FCF"``.
        controls: one tree a step; the system's own by default.
        coarse: (start, stop, x) → x, the jump over some steps; :func:`coarse_jump` by default.
        initial: states at the K+1 boundaries to start from (those of the last optimizer step, say).
        tolerance: stop once ``residuals`` falls to this.

    Returns:
        ParallelRun.

    Raises:
        ArgumentError: a number that makes no sense.
        ShapeError: a slice cannot be jumped over, or ``initial`` has the wrong length.

    Reference: Günther et al. (2018), arXiv:1812.04352, §3.1, Algorithm 1.

    Example:
        >>> system = ODESystem(lambda s, x, u: -x, horizon=16, dt=0.1)
        >>> run = mgrit(system, torch.ones(1, dtype=torch.float64), slices=4, iterations=2)
        >>> abs(float(run.trajectory.states[-1]) - 0.9**16) < 1e-12, run.critical_path
        (True, 31)
    """
    used = tuple(system.controls if controls is None else controls)
    if len(used) != system.horizon:
        raise ArgumentError(
            f"controls has {len(used)} entries, but the horizon of the system is {system.horizon}"
        )
    boundaries = slice_boundaries(system.horizon, slices)
    jump = coarse or coarse_jump(system, used)
    with torch.no_grad():
        grids = nested_grids(
            boundaries, levels, factor, lambda t, x: system.step(t, tree_map(Tensor.clone, x), used[t]), jump
        )
        u, solver = iterate(grids, relaxation, x0, initial, iterations, tolerance)
    return ParallelRun(
        Trajectory(states=tuple(u), controls=used), boundaries, tuple(solver.residuals), solver.path
    )


@cites(GUNTHER)
def parareal(
    system: System,
    x0: Tree,
    slices: int | Sequence[int],
    *,
    iterations: int = 2,
    controls: Sequence[Tree] | None = None,
    coarse: Jump | None = None,
    initial: Sequence[Tree] | None = None,
    tolerance: float = 0.0,
) -> ParallelRun:
    r"""States of a system by parareal: U_{k+1} ← G(U_k^new) + F(U_k^old) − G(U_k^old).

    Two-level :func:`mgrit` with F-relaxation; the arguments mean the same.

    Args:
        system: the dynamics.
        x0: initial state.
        slices: number K of slices, or their boundaries.
        iterations: corrections after the first serial sweep of jumps; K of them are exact.
        controls: one tree a step; the system's own by default.
        coarse: the jump over some steps; :func:`coarse_jump` by default.
        initial: states at the K+1 boundaries to start from.
        tolerance: stop once ``residuals`` falls to this.

    Returns:
        ParallelRun.

    Reference: Günther et al. (2018), arXiv:1812.04352, §3; Lions, Maday & Turinici (2001).

    Example:
        >>> system = ODESystem(lambda s, x, u: -x, horizon=16, dt=0.1)
        >>> run = parareal(system, torch.ones(1, dtype=torch.float64), slices=4, iterations=2)
        >>> error = abs(float(run.trajectory.states[-1]) - 0.9**16)
        >>> error < 1e-3, run.critical_path
        (True, 23)
    """
    return mgrit(
        system,
        x0,
        slices,
        iterations=iterations,
        relaxation="F",
        controls=controls,
        coarse=coarse,
        initial=initial,
        tolerance=tolerance,
    )


@cites(GUNTHER)
def parallel_adjoint(
    system: System,
    cost: Cost,
    run: ParallelRun | Trajectory,
    slices: int | Sequence[int] | None = None,
    *,
    iterations: int = 2,
    levels: int = 2,
    factor: int = 2,
    relaxation: Relaxation = "F",
    coarse: Jump | None = None,
    initial: Sequence[Tree] | None = None,
    tolerance: float = 0.0,
) -> ParallelRun:
    r"""Costates and gradients by the same iteration, run backward with the states frozen.

        p_t = f_xᵀ p_{t+1} + ∇_x L_t,   coarse: Gᵀ_x at the state where the slice begins

    The gradient is ∂J/∂u_t = f_uᵀ p_{t+1} + ∇_u L_t at the states as they are: those of few iterations are
    inexact, and so is it.

    Args:
        system: the dynamics.
        cost: terminal and running cost.
        run: what :func:`parareal` or :func:`mgrit` returned; or a trajectory with states, with ``slices``.
        slices: number of slices or boundaries; those of the run by default.
        iterations: corrections; with as many as slices (F) the costates are exact for these states.
        levels: levels of grids.
        factor: coarsening from level to level.
        relaxation: ``"F"`` or ``"FCF"``.
        coarse: the jump whose transpose is used; :func:`coarse_jump` by default.
        initial: costates at the boundaries to start from, in the order of t.
        tolerance: stop once ``residuals`` falls to this.

    Returns:
        ParallelRun whose trajectory has costates, gradients and the cost; its critical path and residuals
        are those of the backward pass.

    Raises:
        ArgumentError: no slices, or a number that makes no sense.
        UnsupportedError: a state has leaves without a derivative, which have no costate.

    Reference: Günther et al. (2018), arXiv:1812.04352, §3.2.

    Example:
        >>> from bolza.core import CallableCost
        >>> system = ODESystem(lambda s, x, u: u - x, horizon=16, dt=0.1, controls=[torch.zeros(1)] * 16)
        >>> run = parareal(system, torch.ones(1), slices=4, iterations=4)
        >>> back = parallel_adjoint(system, CallableCost(terminal=lambda x: x.sum()), run, iterations=4)
        >>> round(float(back.trajectory.costates[0]), 6), round(0.9**16, 6)
        (0.185302, 0.185302)
    """
    trajectory = run.trajectory if isinstance(run, ParallelRun) else run
    if slices is None:
        if not isinstance(run, ParallelRun):
            raise ArgumentError(
                "slices is None, but a trajectory does not know its slices: give their number"
            )
        slices = run.boundaries
    T = trajectory.horizon
    boundaries = slice_boundaries(T, slices)
    for t, state in enumerate(trajectory.states):
        if len(float_leaves(state)) != len(torch.utils._pytree.tree_leaves(state)):
            raise UnsupportedError(
                f"the state at stage {t} holds values without a derivative (integers, masks): take "
                "bolza.core.adjoint, which is serial"
            )
    linear = _Pullbacks(system, cost, trajectory, coarse or coarse_jump(system, trajectory.controls))
    terminal, p_T = linear.terminal()
    mirrored = tuple(T - b for b in reversed(boundaries))
    grids = nested_grids(mirrored, levels, factor, lambda s, p: linear.step(T - 1 - s, p), linear.jump)
    guess = None if initial is None else list(reversed(initial))
    with torch.no_grad():
        p, solver = iterate(grids, relaxation, p_T, guess, iterations, tolerance)
    costates = tuple(reversed(p))
    gradients = tuple(linear.gradient(t, costates[t + 1]) for t in range(T))
    found = replace(trajectory, costates=costates, gradients=gradients, value=terminal + linear.running())
    return ParallelRun(found, boundaries, tuple(solver.residuals), solver.path)


class _Pullbacks:
    """Transposed linearisations of fine steps and coarse jumps at frozen states; each graph is made once."""

    def __init__(self, system: System, cost: Cost, trajectory: Trajectory, jump: Jump) -> None:
        self.system, self.cost, self.trajectory, self.coarse = system, cost, trajectory, jump
        self._steps: dict[int, tuple[Tree, Tree, Tree, Tensor | float]] = {}
        self._jumps: dict[tuple[int, int], tuple[Tree, Tree]] = {}

    def terminal(self) -> tuple[Tensor, Tree]:
        with torch.enable_grad():
            x = _attached(self.trajectory.states[-1])
            value = self.cost.terminal(x)
            return value.detach(), _pulled([value], [None], x)

    def running(self) -> Tensor | float:
        values = [self._step(t)[3] for t in range(self.trajectory.horizon)]
        return sum((v.detach() if isinstance(v, Tensor) else v for v in values), 0.0)

    def _step(self, t: int) -> tuple[Tree, Tree, Tree, Tensor | float]:
        if t not in self._steps:
            with torch.enable_grad():
                x, u = _attached(self.trajectory.states[t]), _attached(self.trajectory.controls[t])
                following = self.system.step(t, tree_map(Tensor.clone, x), u)
                self._steps[t] = x, u, following, self.cost.running(t, x, u)
        return self._steps[t]

    def step(self, t: int, p: Tree) -> Tree:
        x, _, following, running = self._step(t)
        return _pulled(*_outputs(following, p, running), x)

    def gradient(self, t: int, p: Tree) -> Tree:
        _, u, following, running = self._step(t)
        return _pulled(*_outputs(following, p, running), u) if float_leaves(u) else tree_detach(u)

    def jump(self, start: int, stop: int, p: Tree) -> Tree:
        """Back over the stages T − stop … T − start, with the weights of the first of them."""
        first, last = self.trajectory.horizon - stop, self.trajectory.horizon - start
        if (first, last) not in self._jumps:
            with torch.enable_grad():
                x = _attached(self.trajectory.states[first])
                self._jumps[first, last] = x, self.coarse(first, last, tree_map(Tensor.clone, x))
        x, following = self._jumps[first, last]
        back = _pulled(*_outputs(following, p, 0.0), x)
        own, _, _, running = self._step(first)
        if not (isinstance(running, Tensor) and running.requires_grad):
            return back
        return tree_add(back, _pulled([running], [None], own), alpha=float(last - first))


def _attached(tree: Tree) -> Tree:
    return tree_map(lambda leaf: leaf.detach().requires_grad_(), tree)


def _outputs(following: Tree, p: Tree, running: Tensor | float) -> tuple[list[Tensor], list[Tensor | None]]:
    outputs, cotangents = [*float_leaves(following)], [*float_leaves(p)]
    found: list[Tensor | None] = [*cotangents]
    if isinstance(running, Tensor):
        return [*outputs, running], [*found, None]
    return outputs, found


def _pulled(outputs: Sequence[Tensor], cotangents: Sequence[Tensor | None], tree: Tree) -> Tree:
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    leaves = float_leaves(tree)
    if not pairs:
        return tree_map(torch.zeros_like, tree_detach(tree))
    grads = torch.autograd.grad(
        [o for o, _ in pairs],
        leaves,
        [c for _, c in pairs],
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return with_float_leaves(tree, grads)
