r"""The law of a diffusion in one and two dimensions, on a grid of cells.

    ∂_t ρ = −∇·J,      J = b ρ − T ∇·(D ρ),      (∇·(D ρ))_i = Σ_j ∂_j (D_ij ρ)

is the law of dx = b dt + √(2 T D) dW in the sense of Itô. D is written as Σ_e w_e (he)(he)ᵀ with positive weights over
the edges e between cells (h the widths of a cell), and the flux along an edge is that of Scharfetter and Gummel in w ρ,

    F = T { B(−P) w ρ|_left − B(P) w ρ|_right },      P = he · (T D)⁻¹ b,      B(z) = z/(e^z − 1)

which is exact where P is constant: e^{P} is the ratio that makes it vanish. The result is a Markov chain on the cells,
so that mass is kept, densities stay positive in implicit Euler steps of any length, and the relative entropy to the
stationary law falls in each of them. Nothing leaves the box.

Reference: Scharfetter & Gummel (1969); Chang & Cooper (1970); Selling (1874) for the edges of an oblique D.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bolza.core.diffusion import Diffusion
from bolza.core.errors import ArgumentError, DivergenceError, ShapeError, UnsupportedError
from bolza.core.reference import Reference, cites
from bolza.sde.lattice import generator, matrices, neighbours, rates, weights

__all__ = ["FokkerPlanck", "fokker_planck"]

SCHARFETTER = Reference(
    "scharfetter1969diode",
    "Scharfetter, D. L. and Gummel, H. K.",
    "Large-Signal Analysis of a Silicon Read Diode Oscillator",
    1969,
    venue="IEEE Transactions on Electron Devices",
)
CHANG = Reference(
    "chang1970difference",
    "Chang, J. S. and Cooper, G.",
    "A Practical Difference Scheme for Fokker-Planck Equations",
    1970,
    venue="Journal of Computational Physics",
)

F64 = torch.float64
Field = Callable[[Tensor], Tensor]


@dataclass(frozen=True, repr=False)
class FokkerPlanck:
    r"""A Fokker–Planck equation on a grid; made by :func:`fokker_planck`.

    Densities are float64 tensors of shape ``cells``, per unit of length or area.

    Attributes:
        axes: centres of the cells of each coordinate.
        temperature: T.
        potential: f at the centres, if the drift is −∇f.
        operator: the sparse generator 𝓛 of ∂_t ρ = 𝓛 ρ, over the cells in row-major order.
        edges: for each direction (offset in cells, cells on the left, on the right, rate from left to right, rate
            from right to left).
        gibbs: the temperature cT of the stationary law exp(−f/cT) where the drift is −∇f and D = c I, else None.
        rise: in one dimension the increase of log ρ^ss across each face, else None.
    """

    axes: tuple[Tensor, ...]
    temperature: float
    potential: Tensor | None
    operator: Any
    edges: tuple[tuple[tuple[int, ...], Any, Any, Any, Any], ...]
    gibbs: float | None
    rise: Tensor | None = None

    def __repr__(self) -> str:
        """Size and temperature; the rest is long."""
        return f"FokkerPlanck(cells={self.cells}, temperature={self.temperature:g})"

    @property
    def cells(self) -> tuple[int, ...]:
        """Number of cells of each coordinate."""
        return tuple(len(axis) for axis in self.axes)

    @property
    def widths(self) -> tuple[float, ...]:
        """Width of a cell in each coordinate."""
        return tuple(float(axis[1] - axis[0]) for axis in self.axes)

    @property
    def volume(self) -> float:
        """Length or area of a cell."""
        return math.prod(self.widths)

    @property
    def points(self) -> Tensor:
        """Centres of the cells, ``(*cells, d)``."""
        return torch.stack(torch.meshgrid(*self.axes, indexing="ij"), -1)

    def density(self, log_density: Field) -> Tensor:
        """A density of mass one, from its logarithm up to a constant at points ``(..., d)``."""
        value = log_density(self.points).to(F64)
        if not math.isfinite(float(value.max())):
            raise ArgumentError(
                f"log_density is at most {float(value.max())} in the box: it must be finite somewhere"
            )
        return _normal(value, self.volume).exp()

    def mean(self, rho: Tensor, function: Field | Tensor) -> Tensor:
        """Mean of a function of points ``(..., d)``, or of its values at the centres, under a density."""
        values = function if isinstance(function, Tensor) else function(self.points)
        return (rho * values.to(rho)).sum() * self.volume

    def evolve(
        self, rho: Tensor, times: Sequence[float] | Tensor, *, dt: float | None = None, order: int = 1
    ) -> Tensor:
        r"""The density at later times.

        Args:
            rho: density at time 0, shape ``cells``.
            times: increasing times, the first at least 0.
            dt: longest step; a hundredth of the last time by default.
            order: 1 for implicit Euler, which keeps densities positive and lets the free energy fall at any step; 2
                for the L-stable scheme of order 2 with two stages, which does so for short steps only.

        Returns:
            Tensor ``(len(times), *cells)``.

        Raises:
            ShapeError: the density has not the shape of the grid.
            ArgumentError: times decrease, ``dt`` is not positive, or the order is unknown.
        """
        from scipy.sparse import identity

        if tuple(rho.shape) != self.cells:
            raise ShapeError(f"rho has shape {tuple(rho.shape)}, the grid {self.cells}")
        if not bool(rho.isfinite().all()):
            raise ArgumentError("rho holds values that are not finite")
        wanted = [float(t) for t in times]
        falling = any(not b >= a for a, b in zip([0.0, *wanted], wanted, strict=False))
        if not wanted or falling or math.isinf(wanted[-1]):
            raise ArgumentError(f"times={wanted} must increase from 0 or later, and be finite")
        dt = dt if dt is not None else wanted[-1] / 100
        if wanted[-1] > 0 and not dt > 0:
            raise ArgumentError(f"dt is {dt}: it must be positive")
        if order not in (1, 2):
            raise ArgumentError(f"order is {order}: choose 1 or 2")
        gamma = 1.0 if order == 1 else 1 - math.sqrt(0.5)
        state, now, made = _vector(rho), 0.0, 0.0
        inverse: Any = None
        found = []
        for end in wanted:
            if end > now:
                steps = max(1, math.ceil((end - now) / dt * (1 - 1e-12)))
                step = (end - now) / steps
                if not math.isclose(step, made, rel_tol=1e-12):
                    unit = identity(state.size, format="csc")
                    inverse, made = _factor(unit - gamma * step * self.operator), step
                for _ in range(steps):
                    stage = inverse.solve(state)
                    if order == 2:
                        stage = inverse.solve(state + (1 - gamma) / gamma * (stage - state))
                    size = abs(stage)  # what rounding lost in the solve, put where there is something
                    state = stage + size * ((state.sum() - stage.sum()) / max(size.sum(), 1e-300))
            now = end
            found.append(torch.as_tensor(state.copy()).reshape(self.cells))
        return torch.stack(found)

    def stationary(self) -> Tensor:
        """The stationary density; the exponential of :meth:`log_stationary`.

        Raises:
            DivergenceError: as there.
        """
        return self.log_stationary().exp()

    def log_stationary(self) -> Tensor:
        """The logarithm of the stationary density.

        Gibbs' law where D is a multiple of the identity, in one dimension the product of the ratios across the faces,
        both finite where the density is too small for a float; and else by inverse iteration, −∞ there.

        Raises:
            DivergenceError: inverse iteration does not come to rest; the law has parts that hardly communicate.
        """
        if self.gibbs is not None and self.potential is not None:
            return _normal(-self.potential / self.gibbs, self.volume)
        if self.rise is not None:
            return _normal(torch.cat([self.rise.new_zeros(1), self.rise.cumsum(0)]), self.volume)
        return self._null_vector().clamp_min(0).log()

    def _null_vector(self) -> Tensor:
        import numpy as np
        from scipy.sparse import identity

        size = math.prod(self.cells)
        leaving = -self.operator.diagonal()
        longest = max(n * h for n, h in zip(self.cells, self.widths, strict=True))
        slowest = self.temperature / longest**2 * float(leaving.min()) / max(float(leaving.max()), 1e-300)
        inverse = _factor(identity(size, format="csc") - self.operator / slowest)
        rho, rest = np.full(size, 1.0 / size), math.inf
        best = math.inf
        for _ in range(100):
            before, rho = rho, inverse.solve(rho)
            rho /= rho.sum()
            last, rest = rest, float(np.abs(self.operator @ rho).sum() / (leaving @ rho))
            best = min(best, rest if rest < 1e-14 or rest > last / 2 else math.inf)
            # the far tails, which hold nothing of the residual, come to rest last
            if best < 1e-11 and bool((np.abs(rho - before) <= 1e-9 * rho).all()):
                break
        if best < 1e-11:
            return torch.as_tensor(rho / self.volume).reshape(self.cells)
        raise DivergenceError(
            f"the stationary law does not come to rest (residual {rest:.0e}): raise the temperature or shrink the box"
        )

    def spectrum(self, count: int = 4) -> Tensor:
        """The smallest decay rates, minus the eigenvalues of the generator, complex ``(count,)``; the first is zero.

        Accurate to rounding times the largest rate of the grid, 1e-16 · T/h². In two dimensions they are the slowest of
        the ``2 count + 8`` that are smallest in modulus: with a drift that turns fast, ask for more.

        Args:
            count: how many, fewer than the cells less one.
        """
        import numpy as np

        if not 1 <= count < math.prod(self.cells) - 1:
            raise ArgumentError(
                f"count is {count}: it must be at least 1, and below the number of cells less one"
            )
        if len(self.axes) == 1:
            from scipy.linalg import eigh_tridiagonal

            ((_, _, _, forward, back),) = self.edges
            rates = eigh_tridiagonal(
                -self.operator.diagonal(), np.sqrt(forward * back), select="i", select_range=(0, count - 1)
            )[0]
            return torch.as_tensor(rates).to(torch.complex128)
        from scipy.sparse.linalg import eigs

        shift = self.temperature / max(n * h for n, h in zip(self.cells, self.widths, strict=True)) ** 2 / 10
        start = 1.0 + self.points.sum(-1).reshape(-1).numpy()
        near = min(2 * count + 8, len(start) - 2)
        values = eigs(self.operator.tocsc(), k=near, sigma=shift, v0=start, return_eigenvectors=False)
        slow = torch.as_tensor(-values)
        return slow[slow.real.argsort()][:count]

    @property
    def gap(self) -> float:
        """Spectral gap: the rate at which the slowest deviation from the stationary law decays."""
        return float(self.spectrum(2)[1].real)

    def free_energy(self, rho: Tensor, potential: Tensor | None = None) -> float:
        """F = E_ρ[f] − T 𝓗(ρ), which falls along the flow where D is the identity; with cT where D is c I.

        Args:
            rho: a density.
            potential: values at the centres in place of f: with Φ = −T log ρ^ss it falls for any D.

        Raises:
            ArgumentError: no potential is known.
        """
        values = self.potential if potential is None else potential
        if values is None:
            raise ArgumentError("potential is None and the equation was given by its drift: give Φ")
        entropy = -self.mean(rho, torch.where(rho > 0, rho, 1.0).log())
        heat = self.temperature if self.gibbs is None else self.gibbs
        return float(self.mean(rho, values) - heat * entropy)

    def relative_entropy(self, rho: Tensor, stationary: Tensor | None = None) -> float:
        """KL(ρ ‖ ρ^ss), which falls for any drift and D."""
        other = self.log_stationary() if stationary is None else stationary.log()
        ratio = torch.where(rho > 0, rho, 1.0).log() - torch.where(rho > 0, other, 0.0)
        return float(self.mean(rho, ratio))

    def current(self, rho: Tensor) -> Tensor:
        """The probability current J at the centres, ``(d, *cells)``."""
        mass = _vector(rho)
        widths = torch.tensor(self.widths, dtype=F64)
        total = torch.zeros(len(self.axes), mass.size, dtype=F64)
        for offset, left, right, forward, back in self.edges:
            flux = torch.as_tensor(forward * mass[left] - back * mass[right]) / 2
            across = torch.zeros(mass.size, dtype=F64)
            across.index_add_(0, torch.as_tensor(left), flux)
            across.index_add_(0, torch.as_tensor(right), flux)
            total += (widths * torch.tensor(offset, dtype=F64))[:, None] * across
        return total.reshape(-1, *self.cells)

    def entropy_production(self, rho: Tensor) -> float:
        """Σ F log(rate ρ|_left / rate ρ|_right) over the edges: ∫ J·(T D)⁻¹ J/ρ, zero only without a current."""
        import numpy as np

        mass = _vector(rho) * self.volume
        total = 0.0
        for _, left, right, forward, back in self.edges:
            there, back_again = forward * mass[left], back * mass[right]
            both = (there > 0) & (back_again > 0)
            a, b = there[both], back_again[both]
            total += float(((a - b) * np.log(a / b)).sum())
        return total


@cites(SCHARFETTER, CHANG)
def fokker_planck(
    problem: Field | Diffusion,
    bounds: Sequence[float] | Sequence[Sequence[float]],
    cells: int | Sequence[int] = 200,
    *,
    temperature: float = 1.0,
    diffusion: Tensor | float | Field | None = None,
) -> FokkerPlanck:
    r"""The law of a diffusion in one or two dimensions on a grid: evolution, stationary law, spectrum, current.

        ∂_t ρ = ∇·(∇f ρ + T ∇·(D ρ))

    Args:
        problem: a potential f, points ``(..., d)`` → ``(...)``, differentiable by autograd; or a
            :class:`~bolza.core.Diffusion`, read at time 0, for any drift and noise.
        bounds: ``(low, high)``, or one such pair for each of two coordinates. Walls: put them where the density is
            negligible.
        cells: number of cells in each coordinate.
        temperature: T, η/(2B) for SGD. With a Diffusion it only sets the unit of Φ and F.
        diffusion: D for a potential: a number, a matrix ``(d, d)``, or a function of points that gives numbers
            ``(...)``, diagonals ``(..., d)`` or matrices ``(..., d, d)``; the identity by default. It must be
            positive definite.

    Returns:
        FokkerPlanck; float64 on the CPU.

    Raises:
        ArgumentError: bounds, cells, temperature or D make no sense, or a D that varies is too oblique for the
            cells: each |D_xy| h_x/h_y must be at most D_xx, and |D_xy| h_y/h_x at most D_yy.
        ShapeError: a function gives another shape.
        UnsupportedError: three or more coordinates, or noise that is not Gaussian.

    Reference: Scharfetter & Gummel (1969); Chang & Cooper (1970), who weight the same flux differently. Departures: the
    fluxes are in D ρ, as Itô's equation asks, and run along oblique edges where D has off-diagonal entries.

    Example:
        >>> well = fokker_planck(lambda x: (x**4 / 4 - x**2 / 2).sum(-1), (-3, 3), 400, temperature=0.1)
        >>> print(f"{well.gap:.5f}")
        0.03355
        >>> start = well.density(lambda x: -50 * (x[..., 0] - 1) ** 2)
        >>> print(f"{well.free_energy(well.evolve(start, [4.0])[0]):.4f}")
        -0.2193
    """
    pairs: list[Any] = [bounds] if isinstance(bounds[0], int | float) else list(bounds)
    d = len(pairs)
    if d > 2:
        raise UnsupportedError(
            f"bounds has {d} coordinates: a grid is for one or two, simulate paths instead"
        )
    if any(len(pair) != 2 or not -math.inf < float(pair[0]) < float(pair[1]) < math.inf for pair in pairs):
        raise ArgumentError(f"bounds is {bounds}: each pair must be finite, (low, high)")
    counts = [cells] * d if isinstance(cells, int) else list(cells)
    if len(counts) != d or min(counts) < 3:
        raise ArgumentError(f"cells is {cells}: give at least 3 for each of the {d} coordinates")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ArgumentError(f"temperature is {temperature}: it must be positive")
    widths = [(float(high) - float(low)) / n for (low, high), n in zip(pairs, counts, strict=True)]
    axes = [
        float(pair[0]) + h * (torch.arange(n, dtype=F64) + 0.5)
        for pair, h, n in zip(pairs, widths, counts, strict=True)
    ]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    potential, drift, spread, constant = _fields(problem, diffusion, temperature, d)
    value = _shaped(potential(points), points.shape[:-1], "the potential") if potential else None
    edges, rise = [], None
    for offset, weight in weights(spread, constant, points, widths):
        left, right = neighbours(counts, offset)
        step = torch.tensor([o * h for o, h in zip(offset, widths, strict=True)], dtype=F64)
        middle = points.reshape(-1, d)[left] + step / 2
        local = spread(middle)
        if value is not None and bool((local == local[:, :1, :1] * torch.eye(d, dtype=F64)).all()):
            flat = value.reshape(-1)
            push = -(flat[right] - flat[left]) / (temperature * local[:, 0, 0])
        else:
            push = torch.linalg.solve(temperature * local, drift(middle)) @ step
        weight = weight.reshape(-1)
        edges.append((offset, *rates(push, weight, left, right, temperature)))
        if d == 1:
            rise = push + weight[left].log() - weight[right].log()
    gibbs = None
    if value is not None and constant is not None and bool((constant == constant[0, 0] * torch.eye(d)).all()):
        gibbs = temperature * float(constant[0, 0])
    return FokkerPlanck(
        tuple(axes), temperature, value, generator(edges, math.prod(counts)), tuple(edges), gibbs, rise
    )


def _factor(matrix: Any) -> Any:
    """Factors without exchange of rows: in an M-matrix, dominated by its diagonal, elimination adds like signs only."""
    from scipy.sparse.linalg import splu

    return splu(
        matrix.tocsc(), permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True}
    )


def _vector(rho: Tensor) -> Any:
    return rho.detach().to("cpu", F64).reshape(-1).numpy()


def _normal(log_density: Tensor, volume: float) -> Tensor:
    return log_density - log_density.flatten().logsumexp(0) - math.log(volume)


def _fields(
    problem: Field | Diffusion, diffusion: Tensor | float | Field | None, temperature: float, d: int
) -> tuple[Field | None, Field, Field, Tensor | None]:
    """Potential if there is one, drift, D at points ``(..., d)``, and D itself where it is constant."""
    if isinstance(problem, Diffusion):
        if diffusion is not None:
            raise ArgumentError(
                "diffusion is given beside a Diffusion, which has a factor of its own: leave it out"
            )
        if problem.alpha != 2.0:
            raise UnsupportedError(
                f"alpha is {problem.alpha}: a jump process has no Fokker–Planck equation of second order"
            )
        drift = problem.drift

        def spread(x: Tensor) -> Tensor:
            shape = problem.noise_shape(x)
            columns = []
            for k in range(shape[-1]):
                noise = torch.zeros(shape, dtype=F64)
                noise[..., k] = 1.0
                columns.append(problem.factor(0.0, x, noise))
            factor = torch.stack(columns, -1)
            return factor @ factor.mT / (2 * temperature)

        return None, lambda x: drift(0.0, x).detach().to(F64), lambda x: spread(x).detach().to(F64), None

    potential: Field = problem

    def force(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            height = potential(x).sum()
            if not height.requires_grad:  # flat
                return torch.zeros_like(x)
            (slope,) = torch.autograd.grad(height, x, materialize_grads=True)
        return -slope

    eye = torch.eye(d, dtype=F64)
    if callable(diffusion) and not isinstance(diffusion, Tensor):
        return potential, force, lambda x: matrices(diffusion(x).detach().to(F64), x), None
    given = torch.as_tensor(1.0 if diffusion is None else diffusion, dtype=F64)
    if given.ndim not in (0, 2) or (given.ndim == 2 and given.shape != (d, d)):
        raise ArgumentError(f"diffusion has shape {tuple(given.shape)}: give a number or a matrix ({d}, {d})")
    matrix = given * eye if given.ndim == 0 else given
    if not torch.allclose(matrix, matrix.mT) or not bool((torch.linalg.eigvalsh(matrix) > 0).all()):
        raise ArgumentError(f"diffusion is {matrix.tolist()}: it must be symmetric and positive definite")
    return potential, force, lambda x: matrix.expand(*x.shape[:-1], d, d), matrix


def _shaped(value: Tensor, shape: Sequence[int], what: str) -> Tensor:
    if tuple(value.shape) != tuple(shape):
        raise ShapeError(
            f"{what} gives {tuple(value.shape)} for points ({', '.join(map(str, shape))}, d): it must give one value "
            "a point"
        )
    return value.detach().to(F64)
