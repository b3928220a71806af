r"""How fast an optimizer is certain to converge: first-order methods as feedback loops around a gradient.

A first-order method is a linear system in a loop with the gradient of the loss,

    ξ⁺ = Aξ + B∇f(y),   y = Cξ,

a Lur'e system. All that is known of ∇f is a sector: f is m-strongly convex and has an L-Lipschitz gradient. The
distance to the minimum falls by a factor ρ a step for every such f if there are P ≻ 0 and λ ≥ 0 with

    [AᵀPA − ρ²P, AᵀPB; BᵀPA, BᵀPB] + Σ_j λ_j [C_j D_j]ᵀ M [C_j D_j] ⪯ 0,

a semidefinite programme; the smallest such ρ is found by bisection. What the solver returns is not taken on its
word: a rate counts only if the eigenvalues of both matrices, computed afterwards, have the right sign.

The same view covers algorithms in a loop with a plant: feedback optimisation, at the end of this file.

Reference: Lessard, Recht & Packard (2016), arXiv:1408.3595; Dörfler, He, Belgioioso, Bolognani, Lygeros & Muehlebach
(2024), *Toward a Systems Theory of Algorithms*, arXiv:2401.14029.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bolza.core import Reference, cites
from bolza.core.errors import ArgumentError, ShapeError, UnsupportedError

__all__ = [
    "FeedbackOptimization",
    "FirstOrderMethod",
    "RateCertificate",
    "certified_rate",
    "first_order_method",
    "gradient_descent",
    "heavy_ball",
    "nesterov",
    "quadratic_rate",
]

IQC = Reference(
    "lessard2016analysis",
    "Lessard, Laurent and Recht, Benjamin and Packard, Andrew",
    "Analysis and Design of Optimization Algorithms via Integral Quadratic Constraints",
    2016,
    venue="SIAM Journal on Optimization",
    arxiv="1408.3595",
)
SYSTEMS = Reference(
    "dorfler2024systems",
    "Dörfler, Florian and He, Zhiyu and Belgioioso, Giuseppe and Bolognani, Saverio and Lygeros, John "
    "and Muehlebach, Michael",
    "Toward a Systems Theory of Algorithms",
    2024,
    venue="IEEE Control Systems Letters",
    arxiv="2401.14029",
)


@dataclass(frozen=True)
class FirstOrderMethod:
    """A method ξ⁺ = Aξ + B∇f(y), y = Cξ, for one coordinate; each coordinate of a network has the same.

    Args:
        A: shape ``(n, n)``.
        B: shape ``(n, 1)``.
        C: shape ``(1, n)``.

    Raises:
        ShapeError: the shapes do not belong together.
    """

    A: Tensor
    B: Tensor
    C: Tensor

    def __post_init__(self) -> None:
        n = self.A.shape[0]
        shapes = tuple(self.A.shape), tuple(self.B.shape), tuple(self.C.shape)
        if shapes != ((n, n), (n, 1), (1, n)):
            raise ShapeError(f"A, B and C have shapes {shapes}: they must be (n, n), (n, 1) and (1, n)")


@dataclass(frozen=True)
class RateCertificate:
    """The smallest rate that was certified, with its proof.

    Attributes:
        rate: ρ, so that the distance to the minimum falls as cond(P)^½ ρᵏ; infinite if none below 1 was found.
        lower: rate on the worst quadratic of the class: no certificate can be below.
        P: matrix of the Lyapunov function, in the state with the gradient in units of L; None without certificate.
        multipliers: λ of the constraints; empty without certificate.
        margin: largest eigenvalue of the matrix inequality, negative; computed afterwards.
    """

    rate: float
    lower: float
    P: Tensor | None
    multipliers: tuple[float, ...]
    margin: float

    @property
    def stable(self) -> bool:
        """Whether convergence is certain."""
        return self.rate < 1


def gradient_descent(lr: float) -> FirstOrderMethod:
    """Gradient descent x⁺ = x − η∇f(x).

    Args:
        lr: learning rate η.

    Example:
        >>> gradient_descent(0.1).B
        tensor([[-0.1000]], dtype=torch.float64)
    """
    return _method([[1.0]], [[-lr]], [[1.0]])


def heavy_ball(lr: float, momentum: float) -> FirstOrderMethod:
    """Polyak's heavy ball x⁺ = x − η∇f(x) + β(x − x⁻).

    Args:
        lr: learning rate η.
        momentum: β.

    Example:
        >>> heavy_ball(0.1, 0.5).A
        tensor([[ 1.5000, -0.5000],
                [ 1.0000,  0.0000]], dtype=torch.float64)
    """
    return _method([[1 + momentum, -momentum], [1.0, 0.0]], [[-lr], [0.0]], [[1.0, 0.0]])


def nesterov(lr: float, momentum: float) -> FirstOrderMethod:
    """Nesterov's method x⁺ = y − η∇f(y), y = x + β(x − x⁻).

    Args:
        lr: learning rate η; 1/L as it is usually taken.
        momentum: β; (√κ − 1)/(√κ + 1) with κ = L/m.

    Example:
        >>> nesterov(0.1, 0.5).C
        tensor([[ 1.5000, -0.5000]], dtype=torch.float64)
    """
    return _method([[1 + momentum, -momentum], [1.0, 0.0]], [[-lr], [0.0]], [[1 + momentum, -momentum]])


def first_order_method(optimizer: torch.optim.Optimizer, group: int = 0) -> FirstOrderMethod:
    """Read the loop of an optimizer: ``torch.optim.SGD`` with momentum, dampening, Nesterov, weight decay.

    Args:
        optimizer: an instance of ``torch.optim.SGD``.
        group: which of its parameter groups.

    Returns:
        FirstOrderMethod whose state is (parameter, momentum buffer).

    Raises:
        UnsupportedError: another optimizer: its loop is not linear, or not known.

    Example:
        >>> sgd = torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.5)
        >>> first_order_method(sgd).A
        tensor([[ 1.0000, -0.0500],
                [ 0.0000,  0.5000]], dtype=torch.float64)
    """
    if type(optimizer) is not torch.optim.SGD:
        raise UnsupportedError(
            f"optimizer is {type(optimizer).__name__}: only torch.optim.SGD is read; give the loop of another "
            "linear method as FirstOrderMethod(A, B, C)"
        )
    options = optimizer.param_groups[group]
    lr, beta, decay = float(options["lr"]), float(options["momentum"]), float(options["weight_decay"])
    fresh = -1.0 if options["maximize"] else 1.0
    if beta == 0:
        return _method([[1 - lr * decay]], [[-lr * fresh]], [[1.0]])
    kept = 1 - float(options["dampening"])
    # g = ∇f(x) + decay·x;  v⁺ = βv + kept·g;  x⁺ = x − lr·v⁺, or x − lr·(g + βv⁺)
    if options["nesterov"]:
        to_g, to_v = 1 + beta * kept, beta**2
    else:
        to_g, to_v = kept, beta
    return _method(
        [[1 - lr * to_g * decay, -lr * to_v], [kept * decay, beta]],
        [[-lr * to_g * fresh], [kept * fresh]],
        [[1.0, 0.0]],
    )


def quadratic_rate(method: FirstOrderMethod, m: float, L: float, points: int = 2001) -> float:
    """Rate of convergence on the worst quadratic with curvatures in [m, L].

    The largest spectral radius of A + λBC over λ from m to L; exact for quadratics, and a lower bound for any larger
    class of functions.

    Args:
        method: the loop.
        m: smallest curvature, positive.
        L: largest curvature.
        points: curvatures between m and L that are tried, on a logarithmic grid with both ends.

    Example:
        >>> round(quadratic_rate(gradient_descent(2 / 11), 1, 10), 4)
        0.8182
    """
    _check_sector(m, L)
    curvatures = torch.logspace(math.log10(m), math.log10(L), points, dtype=torch.float64)
    curvatures[0], curvatures[-1] = m, L
    loops = method.A + curvatures[:, None, None] * (method.B @ method.C)
    return float(torch.linalg.eigvals(loops).abs().max())


@cites(IQC, SYSTEMS)
def certified_rate(
    method: FirstOrderMethod | torch.optim.Optimizer,
    m: float,
    L: float,
    *,
    functions: Literal["sector", "convex"] = "convex",
    tol: float = 1e-7,
) -> RateCertificate:
    r"""Smallest rate at which an optimizer is certain to converge, by a semidefinite programme.

    The rate holds for every m-strongly convex f with an L-Lipschitz gradient, in any dimension. It needs the extra
    ``certify``. Gradient descent gives max(|1 − ηm|, |1 − ηL|), which is exact; Nesterov's method with its usual
    parameters a little less than √(1 − 1/√κ); the heavy ball tuned for quadratics none, once κ = L/m is large: there
    are convex functions on which it cycles.

    Args:
        method: the loop, or a ``torch.optim.SGD``, which is read by :func:`first_order_method`.
        m: constant of strong convexity, positive.
        L: Lipschitz constant of the gradient, at least m.
        functions: what is known of the gradient. ``"sector"``: at each step (Ly − u)(u − my) ≥ 0, which also holds
            for gradients that change from step to step; ``"convex"``: beside it, that two steps see the same convex
            function (weighted off-by-one constraint).
        tol: width at which the bisection stops, positive.

    Returns:
        RateCertificate, verified by eigenvalues; its rate is infinite where none below 1 is certain.

    Raises:
        ArgumentError: the sector or the tolerance makes no sense.
        UnsupportedError: the extra ``certify`` is missing, or the optimizer is not linear.

    Reference: Lessard, Recht & Packard (2016), arXiv:1408.3595, Theorem 4, with the sector and the weighted
    off-by-one constraint together.

    Example:
        >>> certificate = certified_rate(gradient_descent(2 / 11), m=1, L=10)
        >>> round(certificate.rate, 4), certificate.margin < 0
        (0.8182, True)
    """
    _check_sector(m, L)
    if functions not in ("sector", "convex"):
        raise ArgumentError(f"functions is {functions!r}: it must be 'sector' or 'convex'")
    if not 0 < tol < 1:
        raise ArgumentError(f"tol is {tol}: the bisection needs a width between 0 and 1")
    if not isinstance(method, FirstOrderMethod):
        method = first_order_method(method)
    lower = quadratic_rate(method, m, L)
    # the lower bound is often attained, and a method without any certificate is found out at once
    low, high = lower, 1 - tol
    best = _prove(method, m / L, L, lower + tol, functions) if lower < high else None
    if best is not None:
        high = lower + tol
    elif lower < high:
        best = _prove(method, m / L, L, high, functions)
    if best is None:
        return RateCertificate(math.inf, lower, None, (), math.nan)
    while high - low > 2 * tol:
        rate = (low + high) / 2
        if not low < rate < high:  # a width below rounding
            break
        proof = _prove(method, m / L, L, rate, functions)
        if proof is None:
            low = rate
        else:
            best, high = proof, rate
    return RateCertificate(
        high, lower, torch.from_numpy(best.P), tuple(best.multipliers.tolist()), best.margin
    )


@dataclass(frozen=True)
class _Proof:
    P: np.ndarray
    multipliers: np.ndarray
    margin: float


def _prove(method: FirstOrderMethod, m: float, L: float, rate: float, functions: str) -> _Proof | None:
    """P and λ for a rate, verified; the gradient is in units of L, so that its sector is [m, 1]."""
    A, B, C = (M.double().numpy() for M in (method.A, method.B * L, method.C))
    n = len(A)
    if functions == "convex":  # one more state, y − u of the step before
        A = np.block([[A, np.zeros((n, 1))], [-C, np.zeros((1, 1))]])
        B = np.vstack([B, np.ones((1, 1))])
        C = np.hstack([C, np.zeros((1, 1))])
        n += 1
    upper, lower = np.hstack([C, [[-1.0]]]), np.hstack([-m * C, [[1.0]]])  # y − u and u − my
    constraints = [upper.T @ lower + lower.T @ upper]
    if functions == "convex":
        memory = np.zeros((1, n + 1))
        memory[0, n - 1] = rate**2
        constraints.append((upper + memory).T @ lower + lower.T @ (upper + memory))
    flow, state = np.hstack([A, B]), np.eye(n, n + 1)

    def inequality(P: np.ndarray, multipliers: np.ndarray) -> np.ndarray:
        value = flow.T @ P @ flow - rate**2 * state.T @ P @ state
        return value + sum(weight * M for weight, M in zip(multipliers, constraints, strict=True))

    found = _solve(inequality, n, len(constraints))
    if found is None:
        return None
    P, multipliers = found
    margin = float(np.linalg.eigvalsh(inequality(P, multipliers)).max())
    # trace P + Σλ is 1, so that rounding in these eigenvalues is below 1e-14
    if margin < -1e-13 and np.linalg.eigvalsh(P).min() > 1e-13 and (multipliers >= 0).all():
        return _Proof(P, multipliers, margin)
    return None


def _solve(inequality: Any, n: int, count: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Minimise s with inequality(P, λ) ⪯ sI, P ⪰ −sI, λ ≥ 0, tr P + Σλ = 1."""
    try:
        import clarabel
    except ImportError as error:
        raise UnsupportedError(
            "a certificate needs the solver clarabel, which is not installed: pip install 'bolza[certify]'"
        ) from error
    from scipy import sparse

    basis = []
    for i in range(n):
        for j in range(i + 1):
            E = np.zeros((n, n))
            E[i, j] = E[j, i] = 1.0
            basis.append(E)
    none, units = np.zeros(count), np.eye(count)
    rows = [(inequality(E, none), E, none) for E in basis]
    rows += [(inequality(np.zeros((n, n)), unit), np.zeros((n, n)), unit) for unit in units]
    rows.append((-np.eye(n + 1), -np.eye(n), none))  # s
    large = np.array([_triangle(a) for a, _, _ in rows]).T
    small = np.array([-_triangle(b) for _, b, _ in rows]).T
    signs = np.array([-c for _, _, c in rows]).T
    total = np.array([[np.trace(b) + c.sum() for _, b, c in rows[:-1]] + [0.0]])
    constraints = sparse.csc_matrix(np.vstack([total, signs, large, small]))
    right = np.zeros(constraints.shape[0])
    right[0] = 1.0
    cones = [
        clarabel.ZeroConeT(1),
        clarabel.NonnegativeConeT(count),
        clarabel.PSDTriangleConeT(n + 1),
        clarabel.PSDTriangleConeT(n),
    ]
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-11
    size = len(rows)
    objective = np.zeros(size)
    objective[-1] = 1.0
    solution = clarabel.DefaultSolver(
        sparse.csc_matrix((size, size)), objective, constraints, right, cones, settings
    ).solve()
    x = np.asarray(solution.x)
    if not np.isfinite(x).all():
        return None
    P = sum(value * E for value, E in zip(x, basis, strict=False))
    return np.asarray(P), np.maximum(x[len(basis) : len(basis) + count], 0.0)


def _triangle(matrix: np.ndarray) -> np.ndarray:
    """Upper triangle by columns, off-diagonal entries times √2: inner products are kept."""
    j, i = np.tril_indices(len(matrix))
    return matrix[i, j] * np.where(i == j, 1.0, math.sqrt(2))


def _method(A: list[list[float]], B: list[list[float]], C: list[list[float]]) -> FirstOrderMethod:
    return FirstOrderMethod(*(torch.tensor(M, dtype=torch.float64) for M in (A, B, C)))


def _check_sector(m: float, L: float) -> None:
    if not 0 < m <= L < math.inf:
        raise ArgumentError(f"m is {m} and L is {L}: the sector needs 0 < m ≤ L < ∞")


@cites(SYSTEMS)
class FeedbackOptimization:
    r"""Gradient steps on a running plant, from its measured output: algorithm and plant as one loop.

        y⁺ = Ay + (I − A)(Gu + d)        plant with the steady state Gu + d
        u⁺ = u − η(Gᵀ(y − r) + λu)        gradient of ½‖y − r‖² + ½λ‖u‖², with y as it is measured

    The disturbance d need not be known. Descent is stable for a plant at rest up to 2/(σ_max(G)² + λ); in the loop
    with a slow plant the limit is lower, and ``rate`` tells where it is.

    Args:
        A: plant, shape ``(p, p)``, stable.
        G: sensitivity of its steady state, shape ``(p, m)``.
        lr: learning rate η.
        regularization: weight λ of the input.

    Raises:
        ShapeError: the shapes do not belong together.

    Reference: Dörfler et al. (2024), arXiv:2401.14029, the case study of online feedback optimisation.

    Example:
        >>> G = torch.tensor([[1.0, 0.5], [0.2, 2.0]])
        >>> slow, fast = (FeedbackOptimization(0.9 * torch.eye(2), G, lr, 0.01) for lr in (0.04, 0.3))
        >>> round(slow.rate, 3), round(fast.rate, 3)
        (0.958, 1.016)
    """

    def __init__(self, A: Tensor, G: Tensor, lr: float, regularization: float = 0.0) -> None:
        if A.ndim != 2 or A.shape[0] != A.shape[1] or G.ndim != 2 or G.shape[0] != A.shape[0]:
            raise ShapeError(
                f"A has shape {tuple(A.shape)} and G {tuple(G.shape)}: they must be (p, p) and (p, m)"
            )
        self.A, self.G, self.lr, self.regularization = A, G, lr, regularization

    @property
    def matrix(self) -> Tensor:
        """Closed loop of (y, u), shape ``(p + m, p + m)``."""
        p, m = self.G.shape
        eye_p, eye_m = torch.eye(p).to(self.G), torch.eye(m).to(self.G)
        plant = torch.cat([self.A, (eye_p - self.A) @ self.G], dim=1)
        controller = torch.cat([-self.lr * self.G.mT, (1 - self.lr * self.regularization) * eye_m], dim=1)
        return torch.cat([plant, controller])

    @property
    def rate(self) -> float:
        """Spectral radius of the closed loop: it converges if and only if this is below 1."""
        return float(torch.linalg.eigvals(self.matrix).abs().max())

    def step(self, y: Tensor, u: Tensor, r: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """Output and input after one step, for the reference r and the disturbance d."""
        steady = self.G @ u + d
        slope = self.G.mT @ (y - r) + self.regularization * u
        return self.A @ y + steady - self.A @ steady, u - self.lr * slope

    def optimum(self, r: Tensor, d: Tensor) -> Tensor:
        """The input that minimises ½‖Gu + d − r‖² + ½λ‖u‖²."""
        m = self.G.shape[1]
        H = self.G.mT @ self.G + self.regularization * torch.eye(m).to(self.G)
        return torch.linalg.solve(H, self.G.mT @ (r - d))
