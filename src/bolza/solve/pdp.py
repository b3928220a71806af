r"""Pontryagin differentiable programming: derivatives of an optimal trajectory in whatever it depends on.

At an optimum of Σ L + Φ under x⁺ = f(x, u, θ) the maximum principle holds for every θ. Differentiating it
gives the conditions of another, linear-quadratic problem, for X = ∂x/∂θ and U = ∂u/∂θ:

    X⁺ = FX + GU + E,   F = f_x, G = f_u, E = f_θ
    cost with the second derivatives of H = L + ⟨p⁺, f⟩ in (x, u), and H_xθ, H_uθ as linear terms

so that one Bellman sweep with a column for each parameter gives all sensitivities. The gradient of one loss
needs one column only, however many parameters there are: with g = ∂loss/∂(x, u) as linear terms, the sweep
returns (w, ν), and

    dloss/dθ = Σ_t ⟨w_t, ∂_θ∇H_t⟩ + ⟨ν_{t+1}, ∂_θ f_t⟩.

Reference: Jin, Wang, Yang & Mou (2020), *Pontryagin Differentiable Programming*, arXiv:1912.12970.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bolza.core import Cost, Reference, System, Trajectory, cites
from bolza.core.errors import ArgumentError
from bolza.ops.bellman import BellmanSweep, bellman_sweep, closed_loop
from bolza.ops.trees import Tree, float_leaves, tree_map, tree_to_vector, vector_to_tree
from bolza.solve._vectors import Expansion, Vectors
from bolza.solve.ilqr import ilqr

__all__ = ["TrajectorySensitivity", "optimal_trajectory", "trajectory_sensitivity"]

PDP = Reference(
    "jin2020pontryagin",
    "Jin, Wanxin and Wang, Zhaoran and Yang, Zhuoran and Mou, Shaoshuai",
    "Pontryagin Differentiable Programming: An End-to-End Learning and Control Framework",
    2020,
    venue="Advances in Neural Information Processing Systems",
    arxiv="1912.12970",
)

Problem: TypeAlias = Callable[[Tree], tuple[System, Cost]]


@dataclass(frozen=True)
class TrajectorySensitivity:
    """Derivatives of a trajectory in a flat vector of P parameters.

    Attributes:
        states: T+1 matrices ∂x_t/∂θ, shape ``(n, P)``, with a leading dimension of starts if there were several.
        controls: T matrices ∂u_t/∂θ, shape ``(m, P)``, likewise.
    """

    states: tuple[Tensor, ...]
    controls: tuple[Tensor, ...]


@cites(PDP)
def optimal_trajectory(
    problem: Problem,
    theta: Tree,
    x0: Tree,
    controls: Sequence[Tree] | None = None,
    *,
    hessian: Literal["gauss-newton", "ddp"] = "gauss-newton",
    batched: bool = False,
    time_invariant: bool = False,
    iterations: int = 200,
    tolerance: float | None = None,
) -> Trajectory:
    r"""Optimal trajectory as a differentiable function of parameters and of the first state.

    The trajectory comes from :func:`~bolza.solve.ilqr`; its derivatives from the maximum principle
    itself, not from the iterations. A loss of states, controls or value may be differentiated by
    ``backward``: to learn costs and dynamics from demonstrations, to tune a controller, or to have an
    optimal controller as a layer. One backward pass costs one expansion and one Bellman sweep,
    whatever the number of parameters.

    The derivative is that of a strict local optimum: it knows nothing of other optima, and it is wrong
    where the solver has not arrived. Warm-start with the controls of the step before.

    Args:
        problem: θ → (system, cost), differentiable in θ.
        theta: parameters, a tree of tensors.
        x0: first state.
        controls: where the solver starts; the system's own by default.
        hessian: as for :func:`~bolza.solve.ilqr`; it changes the way to the optimum only.
        batched: x0 has a leading dimension of starts, which share θ.
        time_invariant: step and running cost do not depend on t.
        iterations: of the solver.
        tolerance: of the solver; by default the machine precision to the power 0.7, 1e-11 in float64: the
            derivative is as exact as the optimum.

    Returns:
        Trajectory whose states, controls and value are differentiable, once, in θ and x0; costates and
        gradients are there as numbers.

    Raises:
        ArgumentError: in ``backward``, the trajectory is no strict local optimum.

    Warns:
        ConvergenceWarning: the solver did not meet its tolerance.

    Reference: Jin, Wang, Yang & Mou (2020), arXiv:1912.12970, §5 (auxiliary control system). Departures: the
    sweep inverts Q_uu, which may be regular where H_uu is not, and ``backward`` solves the transposed
    problem with one column instead of one for each parameter.

    Example:
        >>> from bolza.systems import LinearSystem, QuadraticCost
        >>> one = torch.eye(1, dtype=torch.float64)
        >>> problem = lambda r: (LinearSystem(one, one, horizon=1), QuadraticCost(one, r * one))
        >>> r = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        >>> u = optimal_trajectory(problem, r, one[0]).controls[0]      # −x/(1 + r)
        >>> u.sum().backward()
        >>> u.detach(), r.grad                                           # x/(1 + r)²
        (tensor([-0.5000], dtype=torch.float64), tensor(0.2500, dtype=torch.float64))
    """
    still = tree_map(Tensor.detach, theta)
    system, cost = problem(still)
    if tolerance is None:
        tolerance = torch.finfo(tree_to_vector(x0).dtype).eps ** 0.7
    result = ilqr(
        system,
        cost,
        x0,
        controls,
        hessian=hessian,
        batched=batched,
        time_invariant=time_invariant,
        iterations=iterations,
        tolerance=tolerance,
    )
    v, found = result._vectors, result.trajectory
    assert found.costates is not None and found.value is not None
    known = _Known(
        problem,
        still,
        v,
        [v.join(x, like) for x, like in zip(found.states, v.x_like, strict=True)],
        [v.join(u, like) for u, like in zip(found.controls, v.u_like, strict=True)],
        [v.join(p, like) for p, like in zip(found.costates, v.x_like, strict=True)],
        found.value.reshape(-1),
    )
    outputs = _Optimum.apply(known, tree_to_vector(theta), v.join(x0, v.x_like[0]))
    states, controls_, value = outputs[: v.horizon + 1], outputs[v.horizon + 1 : -1], outputs[-1]
    return replace(
        found,
        states=v.trajectory(states, controls_).states,
        controls=v.trajectory(states, controls_).controls,
        value=value if batched else value[0],
    )


@cites(PDP)
def trajectory_sensitivity(
    problem: Problem,
    theta: Tree,
    trajectory: Trajectory,
    *,
    controls: Literal["optimal", "held"] | Callable[[Tree, Tree], Tree] = "optimal",
    batched: bool = False,
    time_invariant: bool = False,
) -> TrajectorySensitivity:
    r"""Derivatives of all states and controls of a trajectory in all parameters.

    What the controls do when θ changes is one of three:

    * ``"optimal"``: they stay optimal (inverse optimal control): one Bellman sweep with P columns;
    * ``"held"``: they stay (system identification): X⁺ = FX + E;
    * a policy (x, θ) → u, the same at each step (planning): U = π_x X + π_θ.

    Args:
        problem: θ → (system, cost).
        theta: parameters, a tree of P numbers in all.
        trajectory: states and controls; with costates for ``"optimal"``.
        controls: see above; a policy is written for one start.
        batched: the trajectory has a leading dimension of starts.
        time_invariant: step and running cost do not depend on t.

    Returns:
        TrajectorySensitivity.

    Raises:
        ArgumentError: the trajectory has no costates, or is no strict local optimum.

    Reference: Jin, Wang, Yang & Mou (2020), arXiv:1912.12970, §4 and §5.

    Example:
        >>> from bolza.core import rollout
        >>> from bolza.systems import LinearSystem, QuadraticCost
        >>> one = torch.eye(1)
        >>> problem = lambda a: (LinearSystem(a * one, one, horizon=2), QuadraticCost(one, one))
        >>> run = rollout(problem(torch.tensor(2.0))[0], one[0])
        >>> trajectory_sensitivity(problem, torch.tensor(2.0), run, controls="held").states[2]   # d a²/da
        tensor([[4.]])
    """
    theta = tree_map(Tensor.detach, theta)
    system, cost = problem(theta)
    x0 = trajectory.states[0]
    v = Vectors(system, cost, x0, trajectory.controls, batched=batched, time_invariant=time_invariant)
    xs = [v.join(x, like).detach() for x, like in zip(trajectory.states, v.x_like, strict=True)]
    us = [v.join(u, like).detach() for u, like in zip(trajectory.controls, v.u_like, strict=True)]
    if controls == "optimal" and trajectory.costates is None:
        raise ArgumentError(
            "the trajectory has no costates: take it from ilqr or optimal_trajectory, or from adjoint"
        )
    given = trajectory.costates or (None,) * len(xs)
    ps = [
        torch.zeros_like(x) if p is None else v.join(p, like)
        for x, p, like in zip(xs, given, v.x_like, strict=True)
    ]
    vector = tree_to_vector(theta)
    mixed = _mixed(problem, theta, vector, v, xs, us, ps)
    steps = v.expand(xs, us, exact=controls == "optimal")
    A, B, E = [s.A for s in steps], [s.B for s in steps], [m.E for m in mixed]
    start = vector.new_zeros(v.size, xs[0].shape[-1], len(vector))
    if controls == "optimal":
        last = _terminal_mixed(problem, theta, vector, v, xs[-1])
        sweep = _auxiliary(v, steps, xs, ps, [m.slopes for m in mixed], last, E)
        K: Sequence[Tensor | None] = sweep.K
        k: Sequence[Tensor] = sweep.k
    elif controls == "held":
        K, k = [None] * len(us), [vector.new_zeros(v.size, u.shape[-1], len(vector)) for u in us]
    elif callable(controls):
        K, k = zip(*(_policy(controls, theta, vector, v, t, x) for t, x in enumerate(xs[:-1])), strict=True)
    else:
        raise ArgumentError(f"controls is {controls!r}: it must be 'optimal', 'held', or a policy (x, θ) → u")
    X, U = closed_loop(A, B, K, k, start, c=E)
    return TrajectorySensitivity(
        tuple(x if batched else x[0] for x in X), tuple(u if batched else u[0] for u in U)
    )


# -------------------------------------------------------------------------------- the transposed problem


@dataclass(frozen=True)
class _Known:
    """What backward needs of the optimum, as numbers."""

    problem: Problem
    theta: Tree
    vectors: Vectors
    xs: list[Tensor]
    us: list[Tensor]
    ps: list[Tensor]
    value: Tensor


class _Optimum(torch.autograd.Function):
    """(θ, x0) → states, controls and value of the optimum."""

    @staticmethod
    def forward(ctx: Any, known: _Known, theta: Tensor, x0: Tensor) -> tuple[Tensor, ...]:
        ctx.known = known
        return (*(x.clone() for x in known.xs), *(u.clone() for u in known.us), known.value.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[None, Tensor, Tensor]:
        known: _Known = ctx.known
        v, xs, us, ps = known.vectors, known.xs, known.us, known.ps
        to_x, to_u, to_value = cotangents[: len(xs)], cotangents[len(xs) : -1], cotangents[-1]
        steps = v.expand(xs, us, exact=True)
        slopes = [torch.cat([gx, gu], -1)[..., None] for gx, gu in zip(to_x, to_u, strict=False)]
        sweep = _auxiliary(v, steps, xs, ps, slopes, to_x[-1][..., None])
        zero = torch.zeros_like(xs[0])[..., None]
        wx, wu = closed_loop([s.A for s in steps], [s.B for s in steps], sweep.K, sweep.k, zero)
        nu = [(P @ w + p)[..., 0] for P, p, w in zip(sweep.P, sweep.p, wx, strict=True)]
        gradient = _pull_to_parameters(known, [w[..., 0] for w in wx], [w[..., 0] for w in wu], nu, to_value)
        return None, gradient, nu[0] + to_value[:, None] * ps[0]


def _auxiliary(
    v: Vectors,
    steps: Sequence[Expansion],
    xs: Sequence[Tensor],
    ps: Sequence[Tensor],
    slopes: Sequence[Tensor],
    last: Tensor,
    drift: Sequence[Tensor] | None = None,
) -> BellmanSweep:
    """The linear-quadratic problem with the curvature of the Hamiltonian and the given linear terms."""
    curvature = [s.hamiltonian_curvature(p) for s, p in zip(steps, ps[1:], strict=True)]
    sizes = [s.A.shape[-1] for s in steps]
    sweep = bellman_sweep(
        [s.A for s in steps],
        [s.B for s in steps],
        [H[:, :n, :n] for H, n in zip(curvature, sizes, strict=True)],
        [H[:, n:, n:] for H, n in zip(curvature, sizes, strict=True)],
        v.expand_terminal(xs[-1])[1],
        S=[H[:, n:, :n] for H, n in zip(curvature, sizes, strict=True)],
        q=[g[:, :n] for g, n in zip(slopes, sizes, strict=True)],
        r=[g[:, n:] for g, n in zip(slopes, sizes, strict=True)],
        c=drift,
        terminal_gradient=last,
        strict=False,
    )
    if not bool(sweep.definite.all()):
        bad = torch.nonzero(~sweep.definite).flatten().tolist()
        raise ArgumentError(
            f"the trajectory is no strict local optimum (of starts {bad}): the second derivative of the cost-to-go "
            "in the control is not positive definite, so it has no derivative in the parameters; start the solver "
            "elsewhere, or make each control cost something"
        )
    return sweep


def _with_parameters(v: Vectors, problem: Problem, theta: Tree) -> Vectors:
    other = copy.copy(v)
    other.system, other.cost = problem(theta)
    return other


def _pull_to_parameters(
    known: _Known, wx: list[Tensor], wu: list[Tensor], nu: list[Tensor], to_value: Tensor
) -> Tensor:
    """∂_θ of Σ ⟨w, ∇H⟩ + ⟨ν⁺, f⟩, and of the value by the envelope theorem."""
    with torch.enable_grad():
        theta = tree_map(lambda leaf: leaf.detach().requires_grad_(), known.theta)
        v = _with_parameters(known.vectors, known.problem, theta)
        total = known.value.new_zeros(())

        def add(t: int, x: Tensor, u: Tensor, w: Tensor, p: Tensor, n: Tensor, weight: Tensor) -> None:
            nonlocal total
            z = torch.cat([x, u], -1).requires_grad_()
            size = x.shape[-1]
            x, u = z[:, :size], z[:, size:]
            following = v.mapped(lambda x, u: v.step(t, x, u), x, u)
            h = v.mapped(lambda x, u: v.running(t, x, u), x, u) + (p * following).sum(-1)
            (slope,) = torch.autograd.grad(h.sum(), z, create_graph=True)
            total = total + (slope * w).sum() + (n * following).sum() + (weight * h).sum()

        parts = (
            known.xs[:-1],
            known.us,
            [torch.cat([a, b], -1) for a, b in zip(wx[:-1], wu, strict=True)],
            known.ps[1:],
            nu[1:],
            [to_value] * v.horizon,
        )
        if v.time_invariant:
            add(0, *(torch.cat(list(part)) for part in parts))
        else:
            for t, arguments in enumerate(zip(*parts, strict=True)):
                add(t, *arguments)
        last = known.xs[-1].clone().requires_grad_()
        end = v.mapped(v.terminal, last)
        (slope,) = torch.autograd.grad(end.sum(), last, create_graph=True)
        total = total + (slope * wx[-1]).sum() + (to_value * end).sum()
        leaves = float_leaves(theta)
        if not total.requires_grad:
            return torch.cat([torch.zeros_like(leaf).reshape(-1) for leaf in leaves])
        found = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return torch.cat([g.reshape(-1) for g in found])


# -------------------------------------------------------------------------------- a column for each parameter


@dataclass(frozen=True)
class _Mixed:
    """Derivatives of one step in θ: E = f_θ ``(batch, n', P)``, and of ∇H ``(batch, n + m, P)``."""

    E: Tensor
    slopes: Tensor


def _mixed(
    problem: Problem,
    theta: Tree,
    vector: Tensor,
    v: Vectors,
    xs: Sequence[Tensor],
    us: Sequence[Tensor],
    ps: Sequence[Tensor],
) -> list[_Mixed]:
    def derivatives(t: int, x: Tensor, u: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        n = x.shape[-1]

        def f(parameters: Tensor) -> Tensor:
            return _with_parameters(v, problem, vector_to_tree(parameters, theta)).step(t, x, u)

        def slope(parameters: Tensor) -> Tensor:
            other = _with_parameters(v, problem, vector_to_tree(parameters, theta))

            def h(z: Tensor) -> Tensor:
                return other.running(t, z[:n], z[n:]) + p @ other.step(t, z[:n], z[n:])

            return torch.func.grad(h)(torch.cat([x, u]))

        return torch.func.jacrev(f)(vector), torch.func.jacrev(slope)(vector)

    if v.time_invariant:
        E, slopes = v.mapped(
            lambda x, u, p: derivatives(0, x, u, p),
            torch.cat(list(xs[:-1])),
            torch.cat(list(us)),
            torch.cat(list(ps[1:])),
        )
        return [_Mixed(e, s) for e, s in zip(E.chunk(v.horizon), slopes.chunk(v.horizon), strict=True)]
    return [
        _Mixed(*v.mapped(lambda x, u, p, t=t: derivatives(t, x, u, p), x, u, p))
        for t, (x, u, p) in enumerate(zip(xs[:-1], us, ps[1:], strict=True))
    ]


def _terminal_mixed(problem: Problem, theta: Tree, vector: Tensor, v: Vectors, last: Tensor) -> Tensor:
    def derivatives(x: Tensor) -> Tensor:
        def slope(parameters: Tensor) -> Tensor:
            return torch.func.grad(_with_parameters(v, problem, vector_to_tree(parameters, theta)).terminal)(
                x
            )

        return torch.func.jacrev(slope)(vector)

    found: Tensor = v.mapped(derivatives, last)
    return found


def _policy(
    policy: Callable[[Tree, Tree], Tree], theta: Tree, vector: Tensor, v: Vectors, t: int, x: Tensor
) -> tuple[Tensor, Tensor]:
    """π_x and π_θ at a state."""

    def control(x: Tensor, parameters: Tensor) -> Tensor:
        u = policy(vector_to_tree(x, v.x_like[t]), vector_to_tree(parameters, theta))
        return torch.cat([leaf.reshape(-1) for leaf in float_leaves(u)])

    to_x, to_theta = v.mapped(lambda x: torch.func.jacrev(control, argnums=(0, 1))(x, vector), x)
    return to_x, to_theta
