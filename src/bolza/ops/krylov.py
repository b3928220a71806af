r"""Eigenvalues, spectral density and trace of a symmetric matrix known only through its products.

    A V_m = V_m H_m + R E_mᵀ        (block Lanczos, V_m orthonormal, kept so by full reorthogonalisation)

Every answer says how far it can be trusted: eigenpairs carry their residuals and an estimate of the
error of the eigenvalue, stochastic estimates carry a standard error. The number of products with the
matrix, which is what costs time, is always in the result.

Reference: Stathopoulos and Saad (1998), thick restarts; Ubaru, Chen and Saad (2017), stochastic
Lanczos quadrature; Meyer, Musco, Musco and Woodruff (2021), *Hutch++*, algorithm 1.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bolza.ops.errors import ArgumentError, ConvergenceWarning
from bolza.ops.operators import Estimate, LinearOperator

__all__ = [
    "EigenResult",
    "Estimate",
    "LinearOperator",
    "SpectralDensity",
    "spectral_density",
    "top_eigenpairs",
    "trace",
]

Which = Literal["largest magnitude", "largest algebraic", "smallest algebraic"]


@dataclass(frozen=True)
class EigenResult:
    """Eigenpairs A uᵢ ≈ λᵢ uᵢ, the wanted ones first.

    Attributes:
        eigenvalues: float64 tensor ``(k,)``.
        eigenvectors: orthonormal columns ``(n, k)``.
        residuals: ‖A uᵢ − λᵢ uᵢ‖; some eigenvalue lies this close to λᵢ, always.
        errors: estimated error of λᵢ: min(rᵢ, rᵢ² / gap to the other Ritz values), and rounding. Eigenvalues
            closer to each other than rᵢ may not have been told apart yet; rᵢ holds for them too.
        products: number of products with A.
        iterations: number of times a block was multiplied.
        converged: whether every error is at most the tolerance times |λᵢ|, or λᵢ is zero to rounding.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    residuals: Tensor
    errors: Tensor
    products: int
    iterations: int
    converged: bool


def _random(size: int, count: int, op: LinearOperator, generator: torch.Generator | None) -> Tensor:
    """Gaussian columns ``(size, count)``, drawn where the generator lives."""
    device = torch.device("cpu") if generator is None else generator.device
    return torch.randn(size, count, dtype=op.dtype, device=device, generator=generator).to(op.device)


def _orthogonalise(w: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Remove from ``w`` its part in the span of the rows of ``basis``; twice is enough."""
    h = basis @ w
    w = w - basis.T @ h
    again = basis @ w
    return w - basis.T @ again, h + again


def _orthonormal_block(
    w: Tensor, basis: Tensor, floor: float, op: LinearOperator, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Orthonormal rows Q that span ``w`` (n, b), and R with w = Qᵀ R.

    Directions of ``w`` below ``floor`` carry nothing new: a random direction takes their place, with a
    zero row in R, so that the iteration goes on where the Krylov space is exhausted.
    """
    rows: list[Tensor] = []
    r = torch.zeros(w.shape[1], w.shape[1], dtype=torch.float64)
    for j in range(w.shape[1]):
        column = w[:, j]
        for _ in range(2):
            for i, row in enumerate(rows):
                c = row @ column
                r[i, j] += float(c)
                column = column - c * row
        norm = float(_norm(column))
        if norm > floor:
            r[j, j] = norm
            unit = column / norm
            if rows:  # what cancelled within the block may have brought back a part in the basis
                unit, _ = _orthogonalise(unit, basis)
                unit = unit / unit.norm()
            rows.append(unit)
            continue
        used = torch.cat([basis, *(row[None] for row in rows)]) if rows else basis
        if used.shape[0] >= op.size:
            break
        fresh = _random(op.size, 1, op, generator)
        fresh, _ = _orthogonalise(fresh / fresh.norm(), used)
        fresh, _ = _orthogonalise(fresh / fresh.norm(), used)
        rows.append(fresh[:, 0] / fresh.norm())
    return (torch.stack(rows) if rows else w.new_zeros(0, op.size)), r[: len(rows)]


def _norm(w: Tensor, **keywords: int) -> Tensor:
    """Euclidean norm; in float64, because squares of float32 leave its range early."""
    norm: Tensor = torch.linalg.vector_norm(w, dtype=torch.float64, **keywords)
    return norm


def _errors(theta: Tensor, residuals: Tensor) -> Tensor:
    """Kato–Temple: |λ − θᵢ| ≤ rᵢ² / gapᵢ; the gap is taken to the other Ritz values, less their residual."""
    gaps = (theta[:, None] - theta[None, :]).abs() - residuals[None, :]
    gaps.fill_diagonal_(math.inf)
    gap = gaps.min(1).values.clamp_min(0.0)
    # a copy of a converged eigenvalue is no neighbour: then the residual itself is the bound
    return torch.where(gap > residuals, residuals**2 / gap, residuals)


def top_eigenpairs(
    op: LinearOperator,
    k: int = 1,
    *,
    tol: float = 1e-3,
    max_products: int = 200,
    which: Which = "largest magnitude",
    block: int = 1,
    max_basis: int | None = None,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> EigenResult:
    r"""Extreme eigenpairs of a symmetric operator, by thick-restart block Lanczos.

    Stops as soon as the estimated error of each wanted eigenvalue is at most ``tol`` · |λ|. That error is
    of second order in the residual, so eigenvalues come earlier than eigenvectors: for vectors to
    accuracy ε ask for ``tol`` ≈ ε².

    Args:
        op: the operator.
        k: number of eigenpairs.
        tol: relative accuracy of the eigenvalues.
        max_products: stop after this many products, converged or not.
        which: ``"largest magnitude"``, ``"largest algebraic"`` or ``"smallest algebraic"``.
        block: vectors multiplied at a time; eigenvalues that occur m times are found m times only with
            a block of at least m, and operators with ``blocks`` run faster with more.
        max_basis: vectors kept before a restart; by default as many as fit in 1 GiB, at least 2k + 10.
        start: first vector ``(n,)`` or block ``(n, block)``, for example that of a nearby operator;
            random by default.
        generator: of the random start.

    Returns:
        EigenResult, ordered as ``which`` says.

    Raises:
        ArgumentError: k, block or tol out of range.
        ConvergenceWarning: (as a warning) the tolerance was not met after ``max_products`` products.

    Reference: Stathopoulos and Saad (1998). Departure: the projected matrix is computed in full from the
    products of the reorthogonalisation, which makes the restart one line.

    Example:
        >>> op = LinearOperator.from_matrix(torch.diag(torch.arange(100.0)))
        >>> result = top_eigenpairs(op, k=2, generator=torch.Generator().manual_seed(0))
        >>> result.converged, [round(float(value), 1) for value in result.eigenvalues]
        (True, [99.0, 98.0])
    """
    n = op.size
    if not 1 <= k <= n:
        raise ArgumentError(f"k is {k}, but the operator has size {n}: choose k between 1 and {n}")
    if block < 1 or tol <= 0 or max_products < 1:
        raise ArgumentError(
            f"block is {block}, tol {tol} and max_products {max_products}: all must be positive"
        )
    if which not in ("largest magnitude", "largest algebraic", "smallest algebraic"):
        raise ArgumentError(
            f"which is {which!r}: choose 'largest magnitude', 'largest algebraic' or 'smallest algebraic'"
        )
    block = min(block, n)
    room = 2**30 // max(1, n * torch.empty(0, dtype=op.dtype).element_size())
    limit = min(n, max(2 * k + 10, 3 * block + k, min(room, 400) if max_basis is None else max_basis))
    eps = torch.finfo(op.dtype).eps

    block = min(block, max_products)
    first = (
        _random(n, block, op, generator) if start is None else start.to(op.device, op.dtype).reshape(n, -1)
    )
    rows = first.new_empty(min(limit, 32) + first.shape[1], n)
    pending, _ = _orthonormal_block(first, rows[:0], 0.0, op, generator)
    projected = torch.zeros(0, 0, dtype=torch.float64)
    products = iterations = m = 0
    scale = 0.0
    while True:
        width, old, m = pending.shape[0], m, m + pending.shape[0]
        w = (op @ (pending[0] if width == 1 else pending.T)).reshape(n, width)
        products, iterations = products + width, iterations + 1
        if m > rows.shape[0]:
            rows = torch.cat([rows, torch.empty_like(rows)])
        rows[old:m] = pending
        basis = rows[:m]
        scale = max(scale, float(_norm(w, dim=0).max()))
        w, h = _orthogonalise(w, basis)
        h = h.double().cpu()
        projected = torch.cat([torch.cat([projected, h[:old].T]), h], 1)
        projected[old:, old:] = (h[old:] + h[old:].T) / 2
        pending, r = _orthonormal_block(w, basis, 10 * eps * scale, op, generator)

        theta, s = torch.linalg.eigh(projected)
        key = {"largest magnitude": theta.abs(), "largest algebraic": theta, "smallest algebraic": -theta}[
            which
        ]
        order = key.argsort(descending=True)
        theta, s = theta[order], s[:, order]
        # A (V s) − θ (V s) = Qᵀ R (last rows of s): its norm is the residual, at no further product
        residuals = (r @ s[-width:]).norm(dim=0) + eps * scale
        errors = _errors(theta, residuals) + eps * scale
        rounding = 30 * eps * scale
        allowed = torch.where(theta.abs() <= rounding, rounding, tol * theta.abs())
        # one more Ritz value than wanted, so that there is a gap to judge by
        converged = m >= min(n, k + 1) and bool((errors[:k] <= allowed[:k]).all())
        if converged or pending.shape[0] == 0 or products + pending.shape[0] > max_products:
            break
        if m + pending.shape[0] > limit:
            m = min(m, max((k + limit) // 2, k + block))
            rows[:m] = s[:, :m].T.to(basis) @ basis
            projected = torch.diag(theta[:m])
    found = min(k, theta.shape[0])
    vectors = basis.T @ s[:, :found].to(basis)
    if not converged:
        worst = float((errors[:found] / theta[:found].abs().clamp_min(1e-300)).max())
        remedy = f"raise max_products={max_products}"
        if pending.shape[0] == 0:  # the whole space was searched
            remedy = f"the rest is rounding in {op.dtype}, so ask for fewer of them, or use float64"
        warnings.warn(
            f"{found} of {k} eigenvalues after {products} products have a relative error up to {worst:.1g}, "
            f"more than tol={tol:g}: {remedy}",
            ConvergenceWarning,
            stacklevel=2,
        )
    return EigenResult(
        theta[:found].clone(),
        vectors,
        residuals[:found].clone(),
        errors[:found].clone(),
        products,
        iterations,
        converged,
    )


@dataclass(frozen=True)
class SpectralDensity:
    """Spectral measures μ_v = Σᵢ wᵢ δ(λ − θᵢ) of random unit vectors v; their mean is the density of A.

    Attributes:
        nodes: Ritz values ``(probes, steps)``, float64.
        weights: their weights, each row adds up to 1.
        size: n, the number of eigenvalues.
        products: number of products with A.

    Example:
        >>> op = LinearOperator.from_matrix(torch.diag(torch.arange(1.0, 11.0)))
        >>> density = spectral_density(op, steps=10, probes=20, generator=torch.Generator().manual_seed(0))
        >>> abs(density.moment(1).value - 5.5) < 4 * density.moment(1).error
        True
    """

    nodes: Tensor
    weights: Tensor
    size: int
    products: int

    def mean_of(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """Estimate tr f(A) / n."""
        return _mean((self.weights * function(self.nodes)).sum(1))

    def moment(self, power: int) -> Estimate:
        """Estimate tr A^power / n; the only error up to power 2·steps − 1 is that of the random probes."""
        return self.mean_of(lambda nodes: nodes**power)

    def density(self, grid: Tensor, width: float | None = None) -> tuple[Tensor, Tensor]:
        """Density of eigenvalues on a grid, each Ritz value drawn as a Gaussian; its integral is 1.

        Args:
            grid: where to evaluate it, ``(m,)``.
            width: standard deviation of the Gaussians; 1 % of the range of the Ritz values by default.

        Returns:
            The density and its standard error over the probes, each ``(m,)``.
        """
        if width is None:
            width = 0.01 * float(self.nodes.max() - self.nodes.min()) or 1.0
        z = (grid.double().cpu()[:, None, None] - self.nodes) / width
        per_probe = (self.weights * torch.exp(-0.5 * z**2)).sum(-1) / (width * math.sqrt(2 * math.pi))
        count = per_probe.shape[1]
        error = (
            per_probe.std(1) / math.sqrt(count) if count > 1 else torch.full_like(per_probe[:, 0], math.nan)
        )
        return per_probe.mean(1), error


def _mean(values: Tensor) -> Estimate:
    """Mean and standard error; the error of a single value is not known (nan)."""
    count = values.numel()
    return Estimate(float(values.mean()), float(values.std()) / math.sqrt(count) if count > 1 else math.nan)


def spectral_density(
    op: LinearOperator, steps: int = 30, probes: int = 4, *, generator: torch.Generator | None = None
) -> SpectralDensity:
    """Distribution of the eigenvalues of a symmetric operator, by stochastic Lanczos quadrature.

    Each probe is a uniform random unit vector v; ``steps`` Lanczos steps give the Gauss quadrature of its
    spectral measure, whose expectation over v is the spectral density. Costs ``steps`` products a probe
    (fewer where the Krylov space ends early).

    Args:
        op: the operator.
        steps: m, Lanczos steps a probe; resolves the density to about range / m, and finer at the ends.
        probes: random vectors; the error bars are over them, and fall as 1/√(n · probes).
        generator: of the probes.

    Returns:
        SpectralDensity.

    Raises:
        ArgumentError: steps or probes below 1.

    Reference: Ubaru, Chen and Saad (2017), algorithm 1. Departure: probes on the sphere, which keep the
    weights of a row at exactly 1, and full reorthogonalisation.
    """
    if steps < 1 or probes < 1:
        raise ArgumentError(f"steps is {steps} and probes {probes}: both must be at least 1")
    n, steps = op.size, min(steps, op.size)
    eps = torch.finfo(op.dtype).eps
    nodes = torch.zeros(probes, steps, dtype=torch.float64)
    weights = torch.zeros(probes, steps, dtype=torch.float64)
    products = 0
    rows: Tensor | None = None
    for probe in range(probes):
        v = _random(n, 1, op, generator)[:, 0]
        rows = v.new_empty(steps, n) if rows is None else rows
        rows[0] = v / v.norm()
        diagonal: list[float] = []
        off: list[float] = []
        scale = 0.0
        for step in range(steps):
            w = op @ rows[step]
            products += 1
            scale = max(scale, float(_norm(w)))
            w, h = _orthogonalise(w[:, None], rows[: step + 1])
            diagonal.append(float(h[step, 0]))
            norm = float(_norm(w))
            if step + 1 == steps or norm <= 10 * eps * scale:
                break
            off.append(norm)
            rows[step + 1] = w[:, 0] / norm
        t = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        if off:
            beta = torch.tensor(off, dtype=torch.float64)
            t = t + torch.diag(beta, 1) + torch.diag(beta, -1)
        theta, s = torch.linalg.eigh(t)
        nodes[probe, : len(diagonal)], weights[probe, : len(diagonal)] = theta, s[0] ** 2
        nodes[probe, len(diagonal) :] = theta[-1]
    return SpectralDensity(nodes, weights, n, products)


def trace(op: LinearOperator, products: int = 60, *, generator: torch.Generator | None = None) -> Estimate:
    r"""Trace of a symmetric operator, by Hutch++, with a standard error.

        tr A = tr Qᵀ A Q + E[gᵀ (I − QQᵀ) A (I − QQᵀ) g],   Q an orthonormal basis of A S

    A third of the products finds Q, a third evaluates the first term exactly, a third averages the
    second over random signs g; the error bar is that of the average. Exact when 3n products are allowed
    or the operator has rank at most a third of ``products``.

    Args:
        op: the operator.
        products: budget of products, at least 6.
        generator: of the random signs.

    Returns:
        Estimate.

    Raises:
        ArgumentError: fewer than 6 products.

    Reference: Meyer et al. (2021), algorithm 1.

    Example:
        >>> op = LinearOperator.from_matrix(torch.diag(torch.tensor([5.0, 1.0] + [0.0] * 98)))
        >>> round(trace(op, products=9, generator=torch.Generator().manual_seed(0)).value, 4)
        6.0
    """
    if products < 6:
        raise ArgumentError(f"products is {products}: Hutch++ needs at least 6")
    n = op.size
    if products >= n:
        return Estimate(float(op.dense().diagonal().double().sum()))
    third = products // 3
    sketch = op @ _signs(n, third, op, generator)
    q = torch.linalg.qr(sketch).Q
    exact = float((q * (op @ q)).double().sum())
    g = _signs(n, third, op, generator)
    g = g - q @ (q.T @ g)
    rest = _mean((g * (op @ g)).double().sum(0))
    return Estimate(exact + rest.value, rest.error)


def _signs(size: int, count: int, op: LinearOperator, generator: torch.Generator | None) -> Tensor:
    """Independent random signs ``(size, count)``."""
    device = torch.device("cpu") if generator is None else generator.device
    bits = torch.randint(0, 2, (size, count), device=device, generator=generator)
    return (2 * bits - 1).to(op.device, op.dtype)
