r"""Dynamic programming on a grid: value and feedback of any system with up to three state variables.

    V_T(x) = Φ(x),   V_t(x) = min_u { L_t(x, u) + E V_{t+1}(f_t(x, u) + σ ξ) }

V_{t+1} between grid points is interpolated multilinearly, which makes the scheme monotone: no oscillation, and
convergence to the viscosity solution where V has kinks. Where f is an integrator of ẋ = F(x, u) with step Δt this is
the semi-Lagrangian scheme of the Hamilton–Jacobi–Bellman equation ∂_t V + min_u {ℓ + ∇V·F} = 0, with an error of
order Δt + Δx²/Δt for smooth V.

Reference: Falcone & Ferretti (2013), *Semi-Lagrangian Approximation Schemes for Linear and Hamilton–Jacobi Equations*.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bolza.core.cost import Cost
from bolza.core.errors import ArgumentError, ShapeError
from bolza.core.reference import Reference, cites
from bolza.core.system import System

__all__ = ["GridValue", "grid_hjb"]

FALCONE = Reference(
    "falcone2013semi",
    "Falcone, Maurizio and Ferretti, Roberto",
    "Semi-Lagrangian Approximation Schemes for Linear and Hamilton-Jacobi Equations",
    2013,
    venue="SIAM",
    doi="10.1137/1.9781611973051",
)


def interpolate(V: Tensor, axes: Sequence[Tensor], x: Tensor) -> Tensor:
    """Multilinear interpolation of V on a grid, constant beyond its edge; infinite in a cell with an infinite corner.

    Args:
        V: shape ``(n_1, …, n_d)``.
        axes: ascending grid lines of each dimension.
        x: points, shape ``(*batch, d)``.
    """
    corner, share = [], []
    for i, axis in enumerate(axes):
        at = x[..., i].clamp(axis[0], axis[-1]).contiguous()
        left = (torch.searchsorted(axis, at, right=True) - 1).clamp(0, len(axis) - 2)
        corner.append(left)
        share.append((at - axis[left]) / (axis[left + 1] - axis[left]))
    flat, strides = V.reshape(-1), [int(s) for s in V.contiguous().stride()]
    base = sum((c * s for c, s in zip(corner, strides, strict=True)), torch.zeros_like(corner[0]))
    total = torch.zeros_like(share[0])
    for sides in itertools.product((0, 1), repeat=len(axes)):
        weight = torch.ones_like(share[0])
        for side, part in zip(sides, share, strict=True):
            weight = weight * (part if side else 1 - part)
        value = flat[base + sum(side * s for side, s in zip(sides, strides, strict=True))]
        total = total + torch.where(weight > 0, weight * value, 0.0)  # an infinite value beside x is not at x
    return total


@dataclass(frozen=True)
class GridValue:
    """Value function on a grid, and the feedback law it gives.

    Attributes:
        axes: grid lines of each state variable.
        V: value at the grid points, shape ``(T+1, n_1, …, n_d)``.
        u: control that attains the minimum there, shape ``(T, n_1, …, n_d, m)``.
        outside: share of the grid points of each step from which the best control leaves the grid, shape ``(T,)``;
            beyond the edge V is continued as a constant, so that values near it are too low where it grows outward.
    """

    axes: tuple[Tensor, ...]
    V: Tensor
    u: Tensor
    outside: Tensor
    lookahead: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]

    def value(self, t: int, x: Tensor) -> Tensor:
        """V_t(x), interpolated, for x of shape ``(*batch, d)``; shape ``(*batch,)``."""
        return interpolate(self.V[t], self.axes, x)

    def policy(self, t: int, x: Tensor) -> Tensor:
        """The control that minimises L_t(x, u) + V_{t+1}(f_t(x, u)) at x itself, shape ``(*batch, m)``.

        One step of look-ahead from V_{t+1}: sharper than the controls of the grid points interpolated.

        Raises:
            ArgumentError: t is not one of the steps 0 … T−1.
        """
        if not 0 <= t < len(self.u):
            raise ArgumentError(f"t is {t}: the policy is known at steps 0 to {len(self.u) - 1}")
        found = self.lookahead(t, self.V[t + 1], x.reshape(-1, x.shape[-1]))[1]
        return found.reshape(*x.shape[:-1], -1)


@cites(FALCONE)
def grid_hjb(
    system: System,
    cost: Cost,
    axes: Sequence[Tensor],
    controls: Tensor,
    *,
    refine: int = 0,
    noise: Tensor | None = None,
    horizon: int | None = None,
    chunk: int = 2**20,
) -> GridValue:
    r"""Value function and feedback of a system with up to three state variables, by dynamic programming on a grid.

        V_t(x) = min_u { L_t(x, u) + (1/2q) Σ_{j, ±} V_{t+1}(f_t(x, u) ± √q σ_j) }

    without the sum where there is no noise. All grid points and controls are evaluated at once.

    Args:
        system: dynamics of one state ``(d,)`` and one control ``(m,)``; ``step`` must be one that
            ``torch.func.vmap`` can map.
        cost: Φ(x) and L_t(x, u) of one state and control; infinite where a state or control is forbidden.
        axes: d ≤ 3 ascending vectors of grid lines, at least two each; they set dtype and device.
        controls: candidates, shape ``(K, m)``; the minimum is over these. A box of controls is best given as a
            regular grid of it.
        refine: rounds in which the grid of candidates is halved about the best one, separately at each point, within
            the box of the candidates: the minimum over the box, to 2^{−refine} of their spacing, where there is one.
            Few candidates (3 to 5 a dimension) and many rounds are cheapest.
        noise: columns σ_j of a factor of the covariance of one step, shape ``(d, q)``; none by default.
        horizon: steps T, if fewer than the system has.
        chunk: pairs of point and control evaluated at once, a bound on memory.

    Returns:
        GridValue.

    Raises:
        ArgumentError: a bad grid, no candidates, a negative number of rounds, or a cost that is not a number.
        ShapeError: more than three state variables, or shapes that do not belong together.

    Reference: Falcone & Ferretti (2013), ch. 8; noise: Camilli & Falcone (1995).

    Example:
        >>> from bolza.core import CallableCost
        >>> from bolza.systems import ODESystem
        >>> eikonal = ODESystem(lambda s, x, u: u, horizon=10, dt=0.05)     # run to the origin at speed ≤ 1
        >>> x = torch.linspace(-1, 1, 41, dtype=torch.float64)
        >>> found = grid_hjb(eikonal, CallableCost(terminal=lambda x: x.abs().sum()), [x],
        ...                  torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.float64))
        >>> round(float(found.value(0, torch.tensor([0.8], dtype=torch.float64))), 6)
        0.3
    """
    lines = tuple(axes)
    _check(lines, controls, refine, noise)
    horizon = system.horizon if horizon is None else horizon
    if not 1 <= horizon <= system.horizon:
        raise ArgumentError(f"horizon is {horizon}: it must be between 1 and {system.horizon}")
    mesh = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1)  # type: ignore[no-untyped-call]
    points, candidates = mesh.reshape(-1, len(lines)), controls.to(mesh)

    def q_values(t: int, V: Tensor, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """L + E V(next) and the next states, for x (points, d) and u (points, K, m)."""
        one = partial(_step, system, cost, t)
        running, following = torch.func.vmap(torch.func.vmap(one, (None, 0)))(x, u)
        if noise is None:
            return running + interpolate(V, lines, following), following
        jumps = noise.to(mesh).mT * noise.shape[1] ** 0.5  # (q, d)
        spread = torch.cat([jumps, -jumps])[:, None, None]
        return running + interpolate(V, lines, following + spread).mean(0), following

    def lookahead(t: int, V: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = [best(t, V, part) for part in x.split(max(1, chunk // len(candidates)))]
        value, u, left = (torch.cat(list(column)) for column in zip(*parts, strict=True))
        return value, u, left

    def best(t: int, V: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u = candidates.expand(len(x), -1, -1)
        low, high = candidates.amin(0), candidates.amax(0)
        offsets = candidates - (low + high) / 2
        for level in range(refine + 1):
            q, following = q_values(t, V, x, u)
            value, index = q.min(1)
            pick = index[:, None, None]
            chosen = u.gather(1, pick.expand(-1, 1, u.shape[-1]))  # (points, 1, m)
            there = following.gather(1, pick.expand(-1, 1, x.shape[-1]))[:, 0]
            if level < refine:
                around = (chosen + offsets / 2 ** (level + 1)).clamp(low, high)
                u = torch.cat([chosen, around], 1)  # the best so far stays: refining never raises the value
        inside = torch.stack(
            [(a[0] <= c) & (c <= a[-1]) for a, c in zip(lines, there.unbind(-1), strict=True)]
        )
        return value, chosen[:, 0], ~inside.all(0)

    with torch.no_grad():
        V = torch.func.vmap(lambda x: _number(cost.terminal(x), x, "terminal"))(points).reshape(
            mesh.shape[:-1]
        )
        _check_value(V, horizon)
        values, policies, left = [V], [], []
        for t in reversed(range(horizon)):
            flat, u, out = lookahead(t, V, points)
            V = flat.reshape(mesh.shape[:-1])
            _check_value(V, t)
            values.append(V)
            policies.append(u.reshape(*mesh.shape[:-1], -1))
            left.append(out.double().mean())

    def at(t: int, V: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return lookahead(t, V, x)[:2]

    return GridValue(
        lines, torch.stack(values[::-1]), torch.stack(policies[::-1]), torch.stack(left[::-1]), at
    )


def _step(system: System, cost: Cost, t: int, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    running = _number(cost.running(t, x, u), x, "running")
    following = system.step(t, x, u)
    if following.shape != x.shape:
        raise ShapeError(
            f"step {t} made a state of shape {tuple(following.shape)} from one of {tuple(x.shape)}: the grid is for "
            "systems whose state keeps its size"
        )
    return running, following


def _number(value: object, like: Tensor, name: str) -> Tensor:
    found = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if found.numel() != 1:
        raise ShapeError(
            f"the {name} cost has shape {tuple(found.shape)}, but one number is needed for each state and control"
        )
    return found.reshape(())


def _check_value(V: Tensor, t: int) -> None:
    bad = int(V.isnan().sum())
    if bad:
        raise ArgumentError(
            f"the value at step {t} is not a number at {bad} of {V.numel()} grid points: the cost or the system is not "
            "defined there; give what is forbidden the cost inf, or move the grid"
        )


def _check(axes: tuple[Tensor, ...], controls: Tensor, refine: int, noise: Tensor | None) -> None:
    if not 1 <= len(axes) <= 3:
        raise ShapeError(
            f"there are {len(axes)} axes: a grid serves 1 to 3 state variables; for more take fbsde or path integrals"
        )
    for i, axis in enumerate(axes):
        if axis.ndim != 1 or len(axis) < 2 or not bool((axis.diff() > 0).all()):
            raise ArgumentError(f"axis {i} must be a vector of at least two ascending grid lines")
    if controls.ndim != 2 or len(controls) < 1:
        raise ArgumentError(f"controls has shape {tuple(controls.shape)}: give candidates of shape (K, m)")
    if refine < 0:
        raise ArgumentError(f"refine is {refine}: it must be 0 or more rounds")
    if noise is not None and (noise.ndim != 2 or noise.shape[0] != len(axes)):
        raise ShapeError(f"noise has shape {tuple(noise.shape)}, but ({len(axes)}, q) is needed")
