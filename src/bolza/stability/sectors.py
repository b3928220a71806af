r"""A network as a linear map in a loop with slope-restricted functions, and bounds on its gain by matrix inequalities.

With signals w = (x, u₁, …, u_K), each u_k = φ_k(y_k) of slopes in [0, 1],

    y_k = Σ_{j<k} Y_kj u_j,      out = Σ_j C_j u_j,      (differences; biases cancel)

every Λ = diag(λ) > 0 gives λ_i u_i (y_i − u_i) ≥ 0, so that L is a Lipschitz constant from x to out if

    M(Λ) = I ⊕ 0 − Σ_i λ_i sym(e_i (y_i − e_i)ᵀ) ≻ 0,      L² = λ_max(C M(Λ)⁻¹ Cᵀ).

Eliminating the signals one layer after the other is a recursion in which each pivot is the storage matrix of a
dissipation inequality, X_k = Λ_k − ¼ Λ_k S_k Λ_k with S_k = Y_k M⁻¹ Y_kᵀ of the signals before: dynamic programming.

Three ways to λ: a closed form (λ_k = 2/σ_max(S_k), or by row sums), Newton's method on the barrier of the
semidefinite programme, and a solver. What is reported is always the bound of the λ that was found, computed anew
with a margin for rounding: a poor λ gives a poor bound, never a wrong one.

Reference: Fazlyab, Robey, Hassani, Morari & Pappas (2019), arXiv:1906.04893; Pauli, Gramlich & Allgöwer (2024),
arXiv:2405.01125. Departures: λ is half of theirs; leaks and negative slopes are absorbed in Y and C; the optimiser.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError, UnsupportedError

__all__ = ["SectorNetwork", "closed_form", "gain", "newton", "semidefinite"]

Blocks = dict[tuple[int, int], Tensor]
_MAX_TRIANGLE = 20_000  # entries of the largest matrix that the semidefinite solver is given


@dataclass(frozen=True)
class SectorNetwork:
    """Signals and the linear maps between them, in float64.

    Attributes:
        sizes: (n₀, n₁, …, n_K).
        Y: ``Y[k, j]``, shape ``(n_k, n_j)``, j < k; zero blocks are left out.
        C: ``C[j]``, shape ``(m, n_j)``; zero blocks are left out.
    """

    sizes: tuple[int, ...]
    Y: Blocks
    C: dict[int, Tensor]

    @classmethod
    def from_weights(cls, weights: Sequence[Tensor]) -> SectorNetwork:
        """A chain W_K φ(… φ(W₀ x)) with slopes in [0, 1]."""
        if not weights:
            raise ArgumentError("weights is empty: give the matrices of the layers, first layer first")
        w = [weight.detach().to(torch.float64) for weight in weights]
        sizes = (w[0].shape[1], *(m.shape[0] for m in w[:-1]))
        return cls(sizes, {(k + 1, k): m for k, m in enumerate(w[:-1])}, {len(w) - 1: w[-1]})

    @property
    def units(self) -> int:
        """Number of all signals' entries."""
        return sum(self.sizes)

    def offsets(self) -> list[int]:
        """Where each signal begins."""
        out = [0]
        for size in self.sizes:
            out.append(out[-1] + size)
        return out

    def dense_output(self) -> Tensor:
        """C as one matrix."""
        first = next(iter(self.C.values()))
        parts = [self.C.get(j, first.new_zeros(first.shape[0], n)) for j, n in enumerate(self.sizes)]
        return torch.cat(parts, 1)


def _against(net: SectorNetwork, rows: dict[int, Tensor], factor: Blocks) -> dict[int, Tensor]:
    """T with T Fᵀ = rows, for the block lower triangular F."""
    found: dict[int, Tensor] = {}
    for j in range(len(net.sizes)):
        if (j, j) not in factor and j > 0:
            break
        right = rows.get(j)
        for i, t in found.items():
            if (j, i) in factor:
                step = t @ factor[j, i].mT
                right = -step if right is None else right - step
        if right is not None:
            own = factor[j, j]
            scalar = own.ndim == 0
            found[j] = (
                right / own
                if scalar
                else torch.linalg.solve_triangular(own.mT, right, upper=True, left=False)
            )
    return found


def _gram(parts: dict[int, Tensor]) -> Tensor:
    return sum((t @ t.mT for t in parts.values()), start=torch.zeros((), dtype=torch.float64))  # type: ignore[return-value]


def _top(gram: Tensor) -> float:
    return max(float(torch.linalg.eigvalsh(gram)[-1]), 0.0)


def _eliminate(
    net: SectorNetwork, multipliers: Sequence[Tensor] | None, rule: str = "norm"
) -> tuple[float, list[Tensor]] | None:
    """L² and λ: of given multipliers, or of those that a rule gives on the way; None if M(Λ) is not positive."""
    eps = torch.finfo(torch.float64).eps
    margin = 1 - 8 * net.units * eps
    some = next(iter(net.C.values()))
    factor: Blocks = {(0, 0): some.new_tensor(math.sqrt(margin))}
    used: list[Tensor] = []
    for k in range(1, len(net.sizes)):
        rows = {j: net.Y[k, j] for j in range(k) if (k, j) in net.Y}
        t = _against(net, rows, factor)
        s = _gram(t) if t else some.new_zeros(net.sizes[k], net.sizes[k])
        if multipliers is not None:
            lam = multipliers[k - 1]
        elif rule == "norm":
            lam = some.new_full((net.sizes[k],), 2 / max(_top(s), 1e-30))
        else:
            lam = 2 / s.abs().sum(1).clamp_min(1e-30)
        used.append(lam)
        pivot = torch.diag(lam * margin) - lam[:, None] * s * lam / 4
        root, failed = torch.linalg.cholesky_ex((pivot + pivot.mT) / 2)
        if int(failed):
            return None
        factor[k, k] = root
        for j, part in t.items():
            factor[k, j] = -0.5 * lam[:, None] * part
    out = torch.cat(list(_against(net, net.C, factor).values()), 1)
    out = out if out.shape[0] <= out.shape[1] else out.mT
    return _top(out @ out.mT) * (1 + 1e-9), used


def gain(net: SectorNetwork, multipliers: Sequence[Tensor]) -> float | None:
    r"""The bound L = √λ_max(C M(Λ)⁻¹Cᵀ) that multipliers certify; None if they certify nothing.

    Args:
        net: the network.
        multipliers: λ_k > 0, shape ``(n_k,)``, for the layers 1 … K.
    """
    found = _eliminate(net, multipliers)
    return None if found is None else math.sqrt(found[0])


def closed_form(net: SectorNetwork, rule: str | None = None) -> tuple[float, list[Tensor]]:
    """Bound and multipliers of the recursion without optimisation.

    Args:
        net: the network.
        rule: ``"norm"``: λ_k = 2/σ_max(S_k); ``"rows"``: 2 over the row sums of |S_k|; by default the better of both.
    """
    found = [_eliminate(net, None, one) for one in ((rule,) if rule else ("norm", "rows"))]
    bounds = [(value, lam) for value, lam in (pair for pair in found if pair is not None)]
    value, lam = min(bounds, key=lambda pair: pair[0])
    return math.sqrt(value), lam


class _Barrier:
    """F_t(λ, ρ) = tρ − log det(ρI ⊕ 0 + Σ λ_i sym(e_i g_iᵀ) − CᵀC), g_i = e_i − y_i, with its Newton step."""

    def __init__(self, net: SectorNetwork, scale: float) -> None:
        self.net, self.at = net, net.offsets()
        self.n0, self.n = net.sizes[0], net.units
        self.dtype = next(iter(net.C.values())).dtype
        output = net.dense_output() / scale
        self.constant = -(output.mT @ output)

    def _g_times(self, x: Tensor) -> Tensor:
        """G x for the rows g_i."""
        out = x[self.n0 :].clone()
        for (k, j), block in self.net.Y.items():
            rows = slice(self.at[k] - self.n0, self.at[k + 1] - self.n0)
            out[rows] -= block @ x[self.at[j] : self.at[j + 1]]
        return out

    def matrix(self, lam: Tensor, rho: Tensor) -> Tensor:
        """M of the barrier."""
        m = self.constant.clone()
        m.diagonal()[: self.n0] += rho
        m.diagonal()[self.n0 :] += lam
        for (k, j), block in self.net.Y.items():
            rows, columns = slice(self.at[k], self.at[k + 1]), slice(self.at[j], self.at[j + 1])
            half = 0.5 * lam[self.at[k] - self.n0 : self.at[k + 1] - self.n0, None] * block
            m[rows, columns] -= half
            m[columns, rows] -= half.mT
        return m

    def factor(self, lam: Tensor, rho: Tensor) -> Tensor | None:
        if not bool((lam > 0).all()):
            return None
        root, failed = torch.linalg.cholesky_ex(self.matrix(lam, rho))
        return None if int(failed) else root

    def value(self, t: float, rho: Tensor, root: Tensor) -> float:
        return t * float(rho) - 2 * float(root.diagonal().log().sum())

    def step(self, t: float, root: Tensor) -> tuple[Tensor, Tensor, float]:
        """Newton direction in λ and ρ, and the decrement."""
        n0 = self.n0
        p = torch.cholesky_inverse(root)
        gp = self._g_times(p)  # G P
        cross = gp[:, n0:]  # g_i P e_j
        inner = self._g_times(gp.mT.contiguous()).mT  # g_i P g_j
        hessian = p.new_empty(len(cross) + 1, len(cross) + 1)
        torch.mul(p[n0:, n0:], inner, out=inner)
        hessian[:-1, :-1] = 0.5 * (inner + cross * cross.mT)
        hessian[-1, :-1] = hessian[:-1, -1] = (gp[:, :n0] * p[n0:, :n0]).sum(1)
        hessian[-1, -1] = p[:n0, :n0].square().sum()
        gradient = torch.cat([-cross.diagonal(), (t - p.diagonal()[:n0].sum())[None]])
        units = hessian.diagonal().rsqrt()
        scaled = units[:, None] * hessian * units
        scaled.diagonal().add_(1e-13)
        step = -units * torch.cholesky_solve((units * gradient)[:, None], torch.linalg.cholesky(scaled))[:, 0]
        return step[:-1], step[-1], math.sqrt(max(-float(step @ gradient), 0.0))


def _search(
    barrier: _Barrier,
    t: float,
    lam: Tensor,
    rho: Tensor,
    dlam: Tensor,
    drho: Tensor,
    decrement: float,
    now: float,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The best of the steps 2ᵏ/(1 + decrement): the first is safe for a self-concordant barrier.

    The longest feasible step would end next to the boundary, from where Newton's method comes away slowly.
    """
    size, best = (1.0 if decrement < 0.7 else 1 / (1 + decrement)), None
    while True:
        there = lam + size * dlam, rho + size * drho
        root = barrier.factor(*there)
        value = math.inf if root is None else barrier.value(t, there[1], root)
        if root is None or not value < now:
            return best
        best, now = (*there, root), value
        if size >= 1:
            return best
        size *= 2


def newton(net: SectorNetwork, tol: float = 1e-3, max_steps: int = 100) -> tuple[float, list[Tensor], float]:
    """Bound and multipliers by Newton's method on the barrier of the semidefinite programme.

    Every iterate is a certificate; the duality gap of the barrier says how much the best one could still gain.

    Args:
        net: the network.
        tol: stop when no multipliers can give a bound that is smaller by more than this share.
        max_steps: Newton steps at most.

    Returns:
        The bound, the multipliers, and a number that the bound of no multipliers is below.
    """
    best, multipliers = closed_form(net)
    if best == 0 or len(net.sizes) == 1:
        return best, multipliers, best
    barrier, scale = _Barrier(net, best), best
    rho = torch.tensor(1.1, dtype=torch.float64, device=multipliers[0].device)
    lam = 1.1 * torch.cat(multipliers)
    t, floor = barrier.n / 0.3, 0.0
    root = barrier.factor(lam, rho)
    for _ in range(max_steps):
        if root is None:
            break
        dlam, drho, decrement = barrier.step(t, root)
        if decrement < 0.5:  # close to the central path: here the gap is known
            gap = (barrier.n + decrement * math.sqrt(barrier.n)) / t
            floor = max(floor, float(rho) - gap)
            if gap <= 2 * tol * max(floor, 1e-12):
                break
            t *= 5
            dlam, drho, decrement = barrier.step(t, root)
        moved = _search(barrier, t, lam, rho, dlam, drho, decrement, barrier.value(t, rho, root))
        if moved is None:
            break  # rounding is all that is left
        lam, rho, root = moved
    found = list(torch.split(lam / rho, list(net.sizes[1:])))
    value = gain(net, found)
    if value is not None and value < best:
        best, multipliers = value, found
    return best, multipliers, math.sqrt(max(floor, 0.0)) * scale


def semidefinite(net: SectorNetwork) -> tuple[float, list[Tensor], float]:
    """Bound and multipliers by a solver for semidefinite programmes; it needs the extra ``certify``.

    Returns:
        The bound, which is computed from the multipliers and not taken from the solver, the multipliers, and the
        solver's own value of the optimum, which proves nothing.

    Raises:
        UnsupportedError: the solver is not installed, or the matrix is too large for it.
    """
    n = net.units
    if n * (n + 1) // 2 > _MAX_TRIANGLE:
        raise UnsupportedError(
            f"the matrix inequality has {n} rows, too many for the solver: take method='recursive', which reaches "
            "the same optimum"
        )
    try:
        import clarabel
    except ImportError as error:
        raise UnsupportedError(
            "method='sdp' needs the solver clarabel: pip install 'bolza[certify]', or take method='recursive'"
        ) from error
    import numpy as np
    from scipy import sparse

    best, closed = closed_form(net)
    if best == 0 or len(net.sizes) == 1:
        return best, closed, best
    barrier = _Barrier(net, best)
    zero = torch.zeros(n - net.sizes[0], dtype=torch.float64)
    rows, columns = np.triu_indices(n)
    order = np.lexsort((rows, columns))  # upper triangle, column by column
    rows, columns = rows[order], columns[order]
    weight = np.where(rows == columns, 1.0, math.sqrt(2))

    def vector(matrix: Any) -> Any:
        return matrix[rows, columns] * weight

    base = barrier.matrix(zero, zero.new_zeros(())).cpu().numpy()
    g = torch.eye(n, dtype=torch.float64)[net.sizes[0] :]
    for (k, j), block in net.Y.items():
        at = barrier.at
        g[at[k] - at[1] : at[k + 1] - at[1], at[j] : at[j + 1]] -= block.cpu()
    entries, places, which = [], [], []
    index = np.zeros((n, n), dtype=np.int64)
    index[rows, columns] = index[columns, rows] = np.arange(len(rows))
    for i, row in enumerate(g.numpy()):
        here = np.flatnonzero(row)
        own = net.sizes[0] + i
        entries.append(np.where(here == own, row[here], row[here] / math.sqrt(2)))
        places.append(index[own, here])
        which.append(np.full(len(here), i))
    first = np.arange(net.sizes[0])
    entries.append(np.ones(len(first)))
    places.append(index[first, first])
    which.append(np.full(len(first), len(g)))
    a = sparse.csc_matrix(
        (-np.concatenate(entries), (np.concatenate(places), np.concatenate(which))),
        shape=(len(rows), len(g) + 1),
    )
    q = np.zeros(len(g) + 1)
    q[-1] = 1.0
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.max_threads = 1
    solver = clarabel.DefaultSolver(
        sparse.csc_matrix((len(q), len(q))), q, a, vector(base), [clarabel.PSDTriangleConeT(n)], settings
    )
    solution = np.asarray(solver.solve().x)
    value, multipliers = _nearest(net, solution, closed, best)
    return value, multipliers, math.sqrt(max(float(solution[-1]), 0.0)) * best


def _nearest(
    net: SectorNetwork, solution: Any, closed: Sequence[Tensor], best: float
) -> tuple[float, list[Tensor]]:
    """What the solver's multipliers certify; mixed with known ones where they fail by a little."""
    device = closed[0].device
    lam = torch.as_tensor(solution[:-1], dtype=torch.float64, device=device) / float(solution[-1])
    found = torch.split(lam.clamp_min(1e-14), list(net.sizes[1:]))
    for share in (0.0, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2):
        mixed = [(1 - share) * a + share * b for a, b in zip(found, closed, strict=True)]
        value = gain(net, mixed)
        if value is not None and value <= best:
            return value, mixed
    return best, list(closed)
