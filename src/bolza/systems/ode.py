r"""Differential equations ẋ = f(s, x, u(s)) as systems: residual and continuous-depth networks.

One step of a one-step method over dt is one step of the system, x_{t+1} = x_t + dt Φ(t·dt, x_t, u_t).
Forward Euler is a residual network. The methods are tables of numbers, so that another one is one
line; what a library's integrator does not give is the step by itself, with its own control.

Reference: E (2017), *A Proposal on Machine Learning via Dynamical Systems*; Haber & Ruthotto (2017),
*Stable Architectures for Deep Neural Networks*, arXiv:1705.03341; Chen, Rubanova, Bettencourt &
Duvenaud (2018), *Neural Ordinary Differential Equations*, arXiv:1806.07366.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, TypeAlias

import torch
from torch import nn
from torch.func import functional_call

from bolza.core.errors import ArgumentError, ShapeError, UnsupportedError
from bolza.ops.replay import frozen_statistics, same_randomness
from bolza.ops.trees import Tree, float_leaves, tree_map

__all__ = [
    "EULER",
    "LEAPFROG",
    "METHODS",
    "MIDPOINT",
    "RK38",
    "RK4",
    "ODESystem",
    "RungeKutta",
    "Separable",
    "Splitting",
    "module_field",
    "sample_controls",
]

Field: TypeAlias = Callable[[float, Tree, Tree], Tree]


@dataclass(frozen=True)
class Separable:
    r"""A field of pairs (q, p) in which each half moves by the other: q̇ = velocity(p), ṗ = force(q).

    Args:
        velocity: (s, p, u) → q̇.
        force: (s, q, u) → ṗ.

    Example:
        >>> pendulum = Separable(velocity=lambda s, p, u: p, force=lambda s, q, u: -q.sin())
        >>> ODESystem(pendulum, horizon=1, dt=0.1, method="leapfrog").horizon
        1
    """

    velocity: Field
    force: Field

    def __call__(self, s: float, x: tuple[Tree, Tree], u: Tree) -> tuple[Tree, Tree]:
        """Return (q̇, ṗ)."""
        q, p = x
        return self.velocity(s, p, u), self.force(s, q, u)


@dataclass(frozen=True)
class RungeKutta:
    r"""An explicit Runge–Kutta method, by its Butcher tableau.

        kᵢ = f(s + cᵢ h, x + h Σ_j aᵢⱼ kⱼ),   x ← x + h Σᵢ bᵢ kᵢ,   cᵢ = Σ_j aᵢⱼ

    Args:
        a: rows of the strictly lower triangle, the first one empty.
        b: weights of the slopes, with sum 1.
        order: order of the error in h.

    Raises:
        ArgumentError: the tableau is not explicit or not consistent.

    Reference: Hairer, Nørsett & Wanner (1993), *Solving Ordinary Differential Equations I*, §II.1.

    Example:
        >>> heun = RungeKutta(a=((), (1.0,)), b=(0.5, 0.5), order=2)
        >>> heun.nodes
        (0.0, 1.0)
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    order: int

    def __post_init__(self) -> None:
        rows = [len(row) for row in self.a]
        if rows != list(range(len(self.b))) or not math.isclose(sum(self.b), 1.0):
            raise ArgumentError(
                f"the tableau has rows of lengths {rows} and weights {self.b}: row i of an explicit method has "
                "i entries (from 0), and the weights, one a row, have the sum 1"
            )

    @property
    def nodes(self) -> tuple[float, ...]:
        """Where within the step the field is evaluated, in order."""
        return tuple(float(sum(row)) for row in self.a)

    def advance(self, field: Field, s: float, h: float, x: Tree, controls: Sequence[Tree]) -> Tree:
        """Return the state at s + h, with one control for each of ``nodes``."""
        slopes: list[Tree] = []
        for row, c, u in zip(self.a, self.nodes, controls, strict=True):
            slopes.append(field(s + c * h, _moved(x, h, row, slopes), u))
        return _moved(x, h, self.b, slopes)


@dataclass(frozen=True)
class Splitting:
    r"""A symplectic method for separable fields: kicks p ← p + bᵢh·force(q), drifts q ← q + aᵢh·velocity(p).

    Each kick comes before the drift of the same index.

    Args:
        kicks: bᵢ, with sum 1.
        drifts: aᵢ, with sum 1; as many.
        order: order of the error in h.

    Raises:
        ArgumentError: the sums are not 1, or the lengths differ.

    Reference: Hairer, Lubich & Wanner (2006), *Geometric Numerical Integration*, §VI.3.

    Example:
        >>> symplectic_euler = Splitting(kicks=(1.0,), drifts=(1.0,), order=1)
        >>> symplectic_euler.nodes
        (0.0, 1.0)
    """

    kicks: tuple[float, ...]
    drifts: tuple[float, ...]
    order: int

    def __post_init__(self) -> None:
        sums = sum(self.kicks), sum(self.drifts)
        if len(self.kicks) != len(self.drifts) or not all(math.isclose(total, 1.0) for total in sums):
            raise ArgumentError(
                f"kicks is {self.kicks} and drifts is {self.drifts}: they must be as many, and each have the sum 1"
            )

    @property
    def nodes(self) -> tuple[float, ...]:
        """Where within the step each half is evaluated, in order, kicks and drifts in turn."""
        kicked, drifted = accumulate(self.kicks), accumulate(self.drifts, initial=0.0)
        return tuple(c for pair in zip(drifted, kicked, strict=False) for c in pair)

    def advance(
        self, field: Field, s: float, h: float, x: tuple[Tree, Tree], controls: Sequence[Tree]
    ) -> tuple[Tree, Tree]:
        """Return the pair at s + h, with one control for each of ``nodes``."""
        assert isinstance(field, Separable)
        q, p = x
        at = iter(zip(self.nodes, controls, strict=True))
        for kick, drift in zip(self.kicks, self.drifts, strict=True):
            c, u = next(at)
            if kick:
                p = _moved(p, h, [kick], [field.force(s + c * h, q, u)])
            c, u = next(at)
            if drift:
                q = _moved(q, h, [drift], [field.velocity(s + c * h, p, u)])
        return q, p


def _moved(x: Tree, h: float, weights: Sequence[float], slopes: Sequence[Tree]) -> Tree:
    """Return x + h Σ wᵢ kᵢ."""
    for w, slope in zip(weights, slopes, strict=True):
        if w and isinstance(x, torch.Tensor):
            x = torch.add(x, slope, alpha=h * w)
        elif w:
            x = tree_map(lambda a, k, w=w: torch.add(a, k, alpha=h * w), x, slope)
    return x


EULER = RungeKutta(((),), (1.0,), order=1)
MIDPOINT = RungeKutta(((), (1 / 2,)), (0.0, 1.0), order=2)
RK4 = RungeKutta(((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), order=4)
RK38 = RungeKutta(((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8), order=4)
LEAPFROG = Splitting(kicks=(1 / 2, 1 / 2), drifts=(1.0, 0.0), order=2)

METHODS: dict[str, RungeKutta | Splitting] = {
    "euler": EULER,
    "midpoint": MIDPOINT,
    "rk4": RK4,
    "rk38": RK38,
    "leapfrog": LEAPFROG,
}


class ODESystem:
    r"""One step of a numerical integrator as the step of a system.

        x_{t+1} = x_t + dt Φ(start + t·dt, x_t, u_t)

    Args:
        field: (s, x, u) → ẋ, with the time s a float; or a sequence of fields, one a step. Leapfrog
            needs :class:`Separable` fields and states (q, p).
        horizon: number of steps.
        dt: step in time; negative to run backwards.
        method: a name in ``METHODS``, or a :class:`RungeKutta` or :class:`Splitting` of your own.
        controls: nominal controls, one tree a step; by default each is ``{}``.
        hold: what a control is. ``"constant"``: one tree, held for the step, as the weights of a
            residual block. ``"nodes"``: a tuple of trees, one for each of ``method.nodes``, as
            :func:`sample_controls` takes them from a path of parameters; a held control has only
            order 1 for such a path, the nodes keep the order of the method.
        start: time of the first state.

    Raises:
        ArgumentError: an unknown method or hold, a horizon or dt that makes no sense.
        ShapeError: fields or controls are not as many as the steps.
        UnsupportedError: a splitting method for a field that is not separable.

    Reference: Haber & Ruthotto (2017), arXiv:1705.03341, §2.

    Example:
        >>> import torch
        >>> from bolza.core import rollout
        >>> decay = ODESystem(lambda s, x, u: -u * x, horizon=2, dt=0.5, controls=[torch.ones(())] * 2)
        >>> rollout(decay, torch.ones(1)).states[-1]
        tensor([0.2500])
    """

    def __init__(
        self,
        field: Field | Sequence[Field],
        horizon: int,
        dt: float,
        method: str | RungeKutta | Splitting = "euler",
        controls: Sequence[Tree] | None = None,
        *,
        hold: Literal["constant", "nodes"] = "constant",
        start: float = 0.0,
    ) -> None:
        if horizon < 1:
            raise ArgumentError(f"horizon is {horizon}: there must be at least one step")
        if dt == 0 or not math.isfinite(dt):
            raise ArgumentError(f"dt is {dt}: the step in time must be finite and not zero")
        if hold not in ("constant", "nodes"):
            raise ArgumentError(f"hold is {hold!r}: it must be 'constant' or 'nodes'")
        self.horizon, self.dt, self.start, self.hold = horizon, dt, start, hold
        self.method = _method(method)
        self.fields = tuple(field) if isinstance(field, Sequence) else (field,) * horizon
        self.controls = ({},) * horizon if controls is None else tuple(controls)
        for name, given in (("fields", self.fields), ("controls", self.controls)):
            if len(given) != horizon:
                raise ShapeError(
                    f"there are {len(given)} {name}, but {horizon} steps: give one for each step"
                )
        if isinstance(self.method, Splitting) and not all(isinstance(f, Separable) for f in self.fields):
            raise UnsupportedError(
                "this method moves one half of the state by the other, but the field is not separable: "
                "give Separable(velocity, force), or take a Runge–Kutta method such as 'rk4'"
            )

    @classmethod
    def from_module(
        cls,
        module: nn.Module | Sequence[nn.Module],
        horizon: int | None = None,
        *,
        dt: float,
        method: str | RungeKutta = "euler",
        timed: bool = False,
        seed: int | None = None,
    ) -> ODESystem:
        """Take the field from a network: x + dt · module(x) is the residual block that it makes.

        The controls are the parameters themselves, by the names that they have in ``module`` (in
        ``nn.ModuleList(module)`` for a sequence).

        Args:
            module: one network, whose parameters all steps share; or a list, tuple or
                ``nn.ModuleList`` of networks, one a step, that need not be alike.
            horizon: number of steps; needed for one shared network.
            dt: step in time; 1 for a residual network as it is usually written.
            method: a Runge–Kutta method.
            timed: whether the network is called as module(s, x) rather than module(x).
            seed: for networks with dropout: step t draws with seed + t each time it is evaluated.

        Returns:
            ODESystem.

        Raises:
            ArgumentError: no horizon for one shared network.

        Example:
            >>> import torch
            >>> blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))
            >>> system = ODESystem.from_module(blocks, dt=0.25)
            >>> sorted(system.controls[1])
            ['1.bias', '1.weight']
        """
        owner: nn.Module
        if isinstance(module, nn.Module) and not isinstance(module, nn.ModuleList):
            if horizon is None:
                raise ArgumentError(
                    "horizon is None, but one module makes all steps: give the number of steps"
                )
            owner, modules = module, [module] * horizon
        else:
            modules = list(module)
            owner = nn.ModuleList(modules)
        names = {id(value): name for name, value in owner.named_parameters()}
        fields, controls = [], []
        for t, block in enumerate(modules):
            own = {local: names[id(value)] for local, value in block.named_parameters(remove_duplicate=False)}
            fields.append(
                module_field(block, names=own, timed=timed, seed=None if seed is None else seed + t)
            )
            controls.append({names[id(value)]: value for value in block.parameters()})
        return cls(fields, len(modules) if horizon is None else horizon, dt, method, controls)

    def step(self, t: int, x: Tree, u: Tree) -> Tree:
        """Return the state at time start + (t+1)·dt."""
        nodes = self.method.nodes
        controls = (u,) * len(nodes) if self.hold == "constant" else u
        if len(controls) != len(nodes):
            raise ShapeError(
                f"the control of step {t} has {len(controls)} entries, but the method evaluates the field at "
                f"{len(nodes)} nodes: take the controls from sample_controls"
            )
        return self.method.advance(self.fields[t], self.start + t * self.dt, self.dt, x, controls)


def module_field(
    module: nn.Module,
    *,
    names: dict[str, str] | None = None,
    timed: bool = False,
    seed: int | None = None,
) -> Field:
    """Make a field of a network: (s, x, u) → module(x) with the parameters u.

    Running statistics of the network do not move.

    Args:
        module: called as module(x), or module(s, x) if ``timed``.
        names: name in u of each parameter, by its name in the module; the same by default.
        timed: whether the network takes the time.
        seed: draw random numbers (dropout) with this seed at every evaluation.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> module_field(layer)(0.0, torch.ones(2), {"weight": torch.eye(2)})
        tensor([1., 1.])
    """

    def field(s: float, x: Tree, u: Tree) -> Tree:
        parameters = u if names is None else {local: u[name] for local, name in names.items()}
        arguments = (s, x) if timed else (x,)
        with frozen_statistics(module), nullcontext() if seed is None else same_randomness(seed, _device(x)):
            return functional_call(module, parameters, arguments)

    return field


def sample_controls(
    path: Callable[[float], Tree],
    horizon: int,
    dt: float,
    method: str | RungeKutta | Splitting = "euler",
    *,
    start: float = 0.0,
) -> tuple[tuple[Tree, ...], ...]:
    """Sample a trajectory of parameters u(s) where a method evaluates its field.

    Args:
        path: s → tree of parameters; differentiable if the gradient is to flow into what it is made of.
        horizon: number of steps.
        dt: step in time.
        method: as for :class:`ODESystem`.
        start: time of the first state.

    Returns:
        Controls for ``ODESystem(..., hold="nodes")``.

    Example:
        >>> sample_controls(lambda s: s, horizon=2, dt=1.0, method="midpoint")
        ((0.0, 0.5), (1.0, 1.5))
    """
    nodes = _method(method).nodes
    return tuple(tuple(path(start + (t + c) * dt) for c in nodes) for t in range(horizon))


def _method(method: str | RungeKutta | Splitting) -> RungeKutta | Splitting:
    if not isinstance(method, str):
        return method
    if method not in METHODS:
        raise ArgumentError(f"method is {method!r}: it must be one of {', '.join(METHODS)}, or a tableau")
    return METHODS[method]


def _device(x: Tree) -> torch.device | None:
    return next((leaf.device for leaf in float_leaves(x)), None)
