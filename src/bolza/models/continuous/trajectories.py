r"""Parameter trajectories u(τ), 0 ≤ τ ≤ 1: what the parameters of a continuous-depth block are at each depth.

A trajectory is a module that is evaluated as velocity of the state, ẋ = f(s, x, u(τ)), with the time s and the
relative depth τ = s / horizon. Constant parameters give a Neural ODE, one set a cell gives a residual network and
its refinements, a basis in time gives weights that vary smoothly with depth.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bolza.core.errors import ArgumentError, UnsupportedError
from bolza.ops.trees import Tree

__all__ = ["Basis", "Constant", "Piecewise", "Trajectory"]

_INSIDE = 1e-6  # a node at the edge of a step is read this far inside it, as a share of the step


class Trajectory(nn.Module, ABC):
    r"""What a :class:`ContinuousBlock` integrates: the velocity of its state, with parameters that vary with depth.

    A subclass defines ``forward(s, x, u)``, the velocity at time s with the control u; where parameters vary with
    depth it also defines ``locate``, and where something flows beside the data ``start`` and ``finish``.

    Example:
        >>> class Ramp(Trajectory):
        ...     def locate(self, tau, step):
        ...         return tau
        ...     def forward(self, s, x, u):
        ...         return u * x
        >>> Ramp()(0.0, torch.ones(1), 0.5)
        tensor([0.5000])
    """

    breaks: Sequence[float] = ()
    """Relative depths, within (0, 1), at which the parameters jump; an adaptive solver restarts there."""

    def locate(self, tau: float, step: tuple[float, float]) -> Any:
        """The control at relative depth ``tau``, as it is seen from within a step between two depths.

        Args:
            tau: relative depth, from 0 to 1.
            step: relative depths at which the step starts and ends; where parameters jump at an end of it, the
                value inside the step is meant.
        """
        return None

    def start(self, x: Tree) -> Tree:
        """The state at time 0 for data ``x``: the data themselves, unless something flows beside them."""
        return x

    def finish(self, state: Tree) -> Tree:
        """The data of a state."""
        return state

    @abstractmethod
    def forward(self, s: float, x: Tree, u: Any) -> Tree:
        """The velocity ẋ at time s of the state x with the control u."""


def _called(field: nn.Module, timed: bool, s: float, x: Tree) -> Tree:
    return field(s, x) if timed else field(x)


class Constant(Trajectory):
    """The same parameters at every depth: ẋ = f(x), or f(s, x).

    Args:
        field: network from states to velocities of the same shape.
        timed: whether it is called as field(s, x).

    Example:
        >>> Constant(nn.Linear(2, 2))(0.0, torch.ones(2), None).shape
        torch.Size([2])
    """

    def __init__(self, field: nn.Module, timed: bool = False) -> None:
        super().__init__()
        self.field, self.timed = field, timed

    def forward(self, s: float, x: Tree, u: Any = None) -> Tree:
        """The velocity at time s."""
        return _called(self.field, self.timed, s, x)


class Piecewise(Trajectory):
    r"""One network a cell of depth: u(τ) = u_k for τ in [k/K, (k+1)/K).

    With forward Euler and one step a cell this is a residual network. A step is evaluated with the parameters of
    the cell in which its nodes lie; a node at an edge belongs to the cell inside the step, so that a Runge–Kutta
    step of one cell never reads the next. Normalisation layers have statistics of their own in every cell.

    Args:
        field: a network, copied for each cell with its parameters drawn anew (``reset_parameters`` of each of
            its layers); or a function without arguments that makes the network of one cell; or a sequence of
            networks, one a cell.
        cells: number of cells K; not needed for a sequence.
        timed: whether the network is called as field(s, x).

    Raises:
        ArgumentError: no cell, or a number of cells that is not that of the sequence.

    Reference: Queiruga, Erichson, Taylor & Mahoney (2020), arXiv:2008.02389, §3.

    Example:
        >>> two = Piecewise(nn.Linear(3, 3), cells=2)
        >>> two.locate(0.5, step=(0.0, 0.5)), two.locate(0.5, step=(0.5, 1.0))
        (0, 1)
    """

    def __init__(
        self,
        field: nn.Module | Callable[[], nn.Module] | Sequence[nn.Module],
        cells: int | None = None,
        timed: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(field, nn.ModuleList) or not (isinstance(field, nn.Module) or callable(field)):
            made = list(field)
            if not made or cells not in (None, len(made)):
                raise ArgumentError(
                    f"cells={cells} does not fit {len(made)} networks: give one network a cell"
                )
        elif cells is None or cells < 1:
            raise ArgumentError(f"cells={cells}: give the number of cells, at least 1")
        else:
            made = [_redrawn(field) if isinstance(field, nn.Module) else field() for _ in range(cells)]
        self.cells, self.timed = nn.ModuleList(made), timed

    @property
    def breaks(self) -> Sequence[float]:  # type: ignore[override]
        """The edges between cells."""
        return [k / len(self.cells) for k in range(1, len(self.cells))]

    def locate(self, tau: float, step: tuple[float, float]) -> int:
        """The number of the cell."""
        tau = min(max(tau, min(step)), max(step))  # adaptive methods look beyond the end
        inside = tau + _INSIDE * ((step[0] + step[1]) / 2 - tau)
        return min(max(int(inside * len(self.cells)), 0), len(self.cells) - 1)

    def forward(self, s: float, x: Tree, u: int) -> Tree:
        """The velocity at time s in cell u."""
        return _called(self.cells[u], self.timed, s, x)

    def refine(self, factor: int = 2, noise: float = 0.0, generator: torch.Generator | None = None) -> None:
        """Cut each cell into several with the same parameters: the function of depth does not change.

        Args:
            factor: new cells for each old one.
            noise: standard deviation that is added to the copies, relative to the root mean square of each
                parameter; it breaks the symmetry between them, and changes the function.
            generator: for the noise.

        Raises:
            ArgumentError: the factor is below 1 or the noise negative.
        """
        if factor < 1 or noise < 0:
            raise ArgumentError(f"factor={factor} and noise={noise}: give factor >= 1 and noise >= 0")
        cells = [copy.deepcopy(cell) if part else cell for cell in self.cells for part in range(factor)]
        if noise:
            with torch.no_grad():
                for cell in cells:
                    for p in cell.parameters():
                        draw = torch.randn(p.shape, generator=generator, dtype=p.dtype, device=p.device)
                        p.add_(draw, alpha=float(noise * p.square().mean().sqrt()))
        self.cells = nn.ModuleList(cells)


def _redrawn(field: nn.Module) -> nn.Module:
    made = copy.deepcopy(field)
    left = {id(p) for p in made.parameters()}
    for layer in made.modules():
        own = list(layer.parameters(recurse=False))
        reset = getattr(layer, "reset_parameters", None)
        if own and callable(reset):
            reset()
            left -= {id(p) for p in own}
    if left:
        raise UnsupportedError(
            f"a layer of {type(field).__name__} has parameters but no reset_parameters(), so its copies would all "
            "start alike: give a function that makes the network of one cell, or a list of networks"
        )
    return made


def _cosines(tau: float, terms: int) -> list[float]:
    return [math.cos(math.pi * k * tau) for k in range(1, terms)]


def _legendre(tau: float, terms: int) -> list[float]:
    z, values = 2 * tau - 1, [1.0, 2 * tau - 1]
    for k in range(1, terms - 1):
        values.append(((2 * k + 1) * z * values[k] - k * values[k - 1]) / (k + 1))
    return values[1:terms]


_BASES: dict[str, Callable[[float, int], list[float]]] = {"cosine": _cosines, "legendre": _legendre}


class Basis(Trajectory):
    r"""Parameters that vary smoothly with depth: u(τ) = u₀ + Σ_{k=1}^{K-1} c_k φ_k(τ).

    u₀ are the parameters of the network itself, and the coefficients c_k start at zero, so that the block starts as,
    and with one term is, a :class:`Constant` one.

    Args:
        field: network from states to velocities.
        terms: number of terms K, the constant one included.
        basis: ``"cosine"``: φ_k = cos πkτ; ``"legendre"``: shifted Legendre polynomials; or a function
            (τ, K) → values of φ_1 … φ_{K-1}.
        timed: whether the network is called as field(s, x).

    Raises:
        ArgumentError: no term, or a basis that is not known.

    Reference: Massaroli, Poli, Park, Yamashita & Asama (2020), *Dissecting Neural ODEs*, arXiv:2002.08071, §3.

    Example:
        >>> smooth = Basis(nn.Linear(2, 2), terms=3)
        >>> len(list(smooth.parameters()))
        4
    """

    def __init__(
        self,
        field: nn.Module,
        terms: int = 3,
        basis: str | Callable[[float, int], Sequence[float]] = "cosine",
        timed: bool = False,
    ) -> None:
        super().__init__()
        if terms < 1:
            raise ArgumentError(f"terms={terms}: there must be at least the constant one")
        if isinstance(basis, str) and basis not in _BASES:
            raise ArgumentError(
                f"basis={basis!r} is not known: choose {', '.join(_BASES)}, or give a function"
            )
        self.field, self.terms, self.timed = field, terms, timed
        self.basis = _BASES[basis] if isinstance(basis, str) else basis
        self._names = [name for name, _ in field.named_parameters()]
        self.coefficients = nn.ParameterList(
            nn.Parameter(p.new_zeros(terms - 1, *p.shape)) for p in field.parameters() if terms > 1
        )

    def locate(self, tau: float, step: tuple[float, float]) -> float:
        """The relative depth itself."""
        return tau

    def parameters_at(self, tau: float) -> dict[str, Tensor]:
        """The parameters of the network at a relative depth, by name; differentiable."""
        own: dict[str, Tensor] = dict(self.field.named_parameters())
        if self.terms == 1:
            return own
        values = [float(v) for v in self.basis(tau, self.terms)]
        if len(values) != self.terms - 1:
            raise ArgumentError(
                f"basis gave {len(values)} values: for terms={self.terms} it must give one less"
            )
        found = {}
        for name, c in zip(self._names, self.coefficients, strict=True):
            phi = torch.tensor(values, dtype=c.dtype, device=c.device)
            found[name] = own[name] + (phi @ c.flatten(1)).view_as(own[name])
        return found

    def forward(self, s: float, x: Tree, u: float) -> Tree:
        """The velocity at time s with the parameters at relative depth u."""
        return functional_call(self.field, self.parameters_at(u), (s, x) if self.timed else (x,))
