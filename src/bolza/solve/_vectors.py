"""A control problem in vectors: trees flattened, one problem or a batch of them, expanded step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from bolza.core import Cost, System, Trajectory
from bolza.core.errors import ArgumentError, ShapeError, UnsupportedError
from bolza.ops.trees import Tree, float_leaves, tree_map, vector_to_tree

__all__ = ["Expansion", "Vectors"]


@dataclass(frozen=True)
class Expansion:
    """Derivatives of one step (of all entries of the batch) at a nominal trajectory, z = (x, u).

    Attributes:
        A: ∂f/∂x, shape ``(batch, n', n)``.
        B: ∂f/∂u, shape ``(batch, n', m)``.
        slope: ∂L/∂z, shape ``(batch, n + m)``.
        curvature: ∂²L/∂z², shape ``(batch, n + m, n + m)``.
        bend: ∂²f/∂z², shape ``(batch, n', n + m, n + m)``; None where it was not asked for.
    """

    A: Tensor
    B: Tensor
    slope: Tensor
    curvature: Tensor
    bend: Tensor | None

    def hamiltonian_curvature(self, p: Tensor) -> Tensor:
        """∂²/∂z² of L + ⟨p, f⟩, for p of shape ``(batch, n')``; that of L alone if f was not expanded."""
        if self.bend is None:
            return self.curvature
        return self.curvature + torch.einsum("bi,bijk->bjk", p.to(self.bend), self.bend)


class Vectors:
    """Dynamics and cost as functions of flat vectors with one leading batch dimension.

    Args:
        system: the dynamics.
        cost: the cost.
        x0: first state; with a leading dimension of starts if ``batched``.
        controls: one tree a step, of one start or of all; the system's own by default.
        batched: whether x0 holds several starts, each a problem of its own.
        time_invariant: whether step and running cost are the same for all steps.
    """

    def __init__(
        self,
        system: System,
        cost: Cost,
        x0: Tree,
        controls: Sequence[Tree] | None,
        *,
        batched: bool,
        time_invariant: bool,
    ) -> None:
        self.system, self.cost, self.batched, self.time_invariant = system, cost, batched, time_invariant
        self.horizon = system.horizon
        x0 = tree_map(lambda leaf: leaf.detach(), x0)
        self.size = _batch_size(x0) if batched else 1
        given = tuple(system.controls if controls is None else controls)
        if len(given) != self.horizon:
            raise ArgumentError(
                f"controls has {len(given)} entries, but the horizon of the system is {self.horizon}: "
                "give one control for each step"
            )
        given = tuple(tree_map(lambda leaf: leaf.detach(), u) for u in given)
        self.x_like: list[Tree] = [tree_map(lambda leaf: leaf[0], x0) if batched else x0]
        self.u_like: list[Tree] = [
            _one_control(t, u, own, self.size) if batched else u
            for t, (u, own) in enumerate(zip(given, system.controls, strict=True))
        ]
        self.x0 = self.join(x0, self.x_like[0])
        self.u0 = [self.join(u, like) for u, like in zip(given, self.u_like, strict=True)]
        if time_invariant and len({u.shape[-1] for u in self.u0}) > 1:
            raise ArgumentError(
                f"time_invariant is True, but the controls have {[u.shape[-1] for u in self.u0]} entries: steps that "
                "are alike have controls of one size, so leave it out"
            )
        if not self.x0.shape[-1] or not all(u.shape[-1] for u in self.u0):
            raise ArgumentError("a state or control has no floating-point entries: there is nothing to steer")
        with torch.no_grad():
            for t in range(self.horizon):
                x = tree_map(Tensor.clone, self.x_like[t])
                self.x_like.append(system.step(t, x, self.u_like[t]))

    # ---------------------------------------------------------------- trees and vectors

    def join(self, tree: Tree, like: Tree) -> Tensor:
        """Flatten a tree to vectors with a batch dimension; a tree of one start serves all."""
        leaves, one = float_leaves(tree), float_leaves(like)
        if not leaves:
            return torch.zeros(self.size, 0)
        own = not self.batched or [a.shape for a in leaves] == [b.shape for b in one]
        if own:
            vector = torch.cat([leaf.reshape(-1) for leaf in leaves])
            return vector.expand(self.size, -1)
        return torch.cat([leaf.reshape(self.size, -1) for leaf in leaves], dim=1)

    def split(self, vectors: Tensor, like: Tree) -> Tree:
        """Undo the flattening: a tree like that of one start, with the batch dimension if there is one."""
        if not self.batched:
            return vector_to_tree(vectors[0], like)
        pieces = torch.split(vectors, [leaf.numel() for leaf in float_leaves(like)], dim=1)
        found = iter(pieces)
        return tree_map(lambda leaf: next(found).reshape(len(vectors), *leaf.shape), like)

    def trajectory(self, xs: Sequence[Tensor], us: Sequence[Tensor]) -> Trajectory:
        """States and controls as trees."""
        return Trajectory(
            states=tuple(self.split(x, like) for x, like in zip(xs, self.x_like, strict=True)),
            controls=tuple(self.split(u, like) for u, like in zip(us, self.u_like, strict=True)),
        )

    # ---------------------------------------------------------------- functions of one start

    def step(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        """f_t of one start."""
        state = vector_to_tree(x.clone(), self.x_like[t])
        following = self.system.step(t, state, vector_to_tree(u, self.u_like[t]))
        return torch.cat([leaf.reshape(-1) for leaf in float_leaves(following)])

    def running(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        """L_t of one start."""
        value = self.cost.running(t, vector_to_tree(x, self.x_like[t]), vector_to_tree(u, self.u_like[t]))
        return _scalar(value, x, "running")

    def terminal(self, x: Tensor) -> Tensor:
        """Φ of one start."""
        return _scalar(self.cost.terminal(vector_to_tree(x, self.x_like[-1])), x, "terminal")

    def mapped(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Apply a function of one start to each; a batch of one is not mapped, so that any code will do.

        Inputs are tensors, or trees of them, with the batch dimension first.
        """
        if self.batched or len(inputs[0]) > 1:
            return torch.func.vmap(function)(*inputs)
        one = _pytree.tree_map(lambda leaf: leaf[0], inputs)
        return _pytree.tree_map(lambda leaf: leaf[None], function(*one))

    # ---------------------------------------------------------------- rollouts and expansions

    @torch.no_grad()
    def rollout(
        self, x0: Tensor, law: Callable[..., Tensor], given: Sequence[Any]
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Run all starts under a feedback law; states, controls and the cost of each.

        Args:
            x0: first states.
            law: (x, given_t) → u, of one start.
            given: what the law reads at each step, a tree of tensors with the batch dimension first.
        """

        def run(x: Tensor, given: Sequence[Any]) -> tuple[list[Tensor], list[Tensor], Tensor]:
            xs, us, value = [x], [], x.new_zeros(())
            for t, known in enumerate(given):
                us.append(law(xs[-1], known))
                if not self.time_invariant:
                    value = value + self.running(t, xs[-1], us[-1])
                xs.append(self.step(t, xs[-1], us[-1]))
            return xs, us, value + self.terminal(xs[-1])

        value: Tensor
        xs, us, value = self.mapped(run, x0, list(given))
        if self.time_invariant:
            stacked = torch.cat(xs[:-1]), torch.cat(us)
            costs = self.mapped(lambda x, u: self.running(0, x, u), *stacked)
            value = value + costs.reshape(self.horizon, -1).sum(0)
        return xs, us, value

    def expand(self, xs: Sequence[Tensor], us: Sequence[Tensor], *, exact: bool) -> list[Expansion]:
        """Derivatives of every step along a trajectory; those of f of second order if ``exact``."""
        if self.time_invariant:
            joint = self._expand(0, torch.cat(list(xs[:-1])), torch.cat(list(us)), exact)
            pieces = [None if part is None else part.chunk(self.horizon) for part in joint]
            return [
                Expansion(*(None if piece is None else piece[t] for piece in pieces))  # type: ignore[arg-type]
                for t in range(self.horizon)
            ]
        return [
            Expansion(*self._expand(t, x, u, exact)) for t, (x, u) in enumerate(zip(xs[:-1], us, strict=True))
        ]

    def _expand(
        self, t: int, x: Tensor, u: Tensor, exact: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        n = x.shape[-1]

        def derivatives(x: Tensor, u: Tensor) -> tuple[Tensor, ...]:
            z = torch.cat([x, u])

            def f(z: Tensor) -> Tensor:
                return self.step(t, z[:n], z[n:])

            def running(z: Tensor) -> Tensor:
                return self.running(t, z[:n], z[n:])

            first = torch.func.jacrev(f)(z)
            slope, curvature = torch.func.grad(running)(z), torch.func.jacrev(torch.func.grad(running))(z)
            if not exact:
                return first, slope, curvature
            return first, slope, curvature, torch.func.jacrev(torch.func.jacrev(f))(z)

        first, slope, curvature, *rest = self.mapped(derivatives, x, u)
        return first[..., :n], first[..., n:], slope, curvature, rest[0] if rest else None

    def expand_terminal(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """First and second derivative of Φ, shapes ``(batch, n)`` and ``(batch, n, n)``."""

        def derivatives(x: Tensor) -> tuple[Tensor, Tensor]:
            gradient = torch.func.grad(self.terminal)
            return gradient(x), torch.func.jacrev(gradient)(x)

        slope, curvature = self.mapped(derivatives, x)
        return slope, curvature

    def costates(self, steps: Sequence[Expansion], last: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """p_0 … p_T from p_T = ∇Φ, and ∂J/∂u_t."""
        ps, gradients = [last], []
        for step in reversed(steps):
            n = step.A.shape[-1]
            gradients.append(step.slope[:, n:] + (step.B.mT @ ps[-1][..., None])[..., 0])
            ps.append(step.slope[:, :n] + (step.A.mT @ ps[-1][..., None])[..., 0])
        return ps[::-1], gradients[::-1]


def _scalar(value: object, like: Tensor, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        return 0.0 * like.sum() + float(value)  # type: ignore[arg-type]
    if value.numel() != 1:
        raise ShapeError(
            f"the {name} cost has shape {tuple(value.shape)}, but a cost is one number for each start: "
            "sum or average over all entries of the state"
        )
    # a constant has no graph, and derivatives of it are zero
    return value.reshape(()) + 0.0 * like.sum()


def _batch_size(x0: Tree) -> int:
    leaves = float_leaves(x0)
    if len(leaves) != len([leaf for leaf in _pytree.tree_leaves(x0) if isinstance(leaf, Tensor)]):
        raise UnsupportedError(
            "x0 has tensors that are not floating-point, which a batch of starts cannot share: "
            "solve the starts one by one, with batched=False"
        )
    sizes = {leaf.shape[0] if leaf.ndim else 0 for leaf in leaves}
    if len(sizes) != 1 or 0 in sizes:
        raise ShapeError(
            f"x0 has leaves of shapes {[tuple(a.shape) for a in leaves]}: with batched=True their first size "
            "is the number of starts, and must be the same in all"
        )
    return int(sizes.pop())


def _one_control(t: int, u: Tree, own: Tree, size: int) -> Tree:
    """The control of one start."""
    given, nominal = [a.shape for a in float_leaves(u)], [a.shape for a in float_leaves(own)]
    if given == nominal:
        return u
    if given == [(size, *shape) for shape in nominal]:
        return tree_map(lambda leaf: leaf[0], u)
    raise ShapeError(
        f"the control of step {t} has leaves of shapes {[tuple(s) for s in given]}: one control for all starts has "
        f"{[tuple(s) for s in nominal]}, one for each has {size} of them along its first dimension"
    )
