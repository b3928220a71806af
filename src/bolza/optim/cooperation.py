r"""Players that decide together: joint steps by block elimination, dense and in Kronecker form.

Where several layers act at one stage (the branches of an inception block, the convolution and the skip of a residual
block) the value of the next stage couples them. The cooperating players minimise the joint quadratic model

    Σ_u ⟨Q_u, δu⟩ + ½ Σ_uv δuᵀ Q_uv δv,     so     Σ_v Q_uv δv = −Q_u,

and block elimination gives each player's step from its Schur complement Q̃_uu = Q_uu − Q_uv Q_vv⁻¹ Q_vu. With blocks
that are Kronecker products of input and signal covariances, Q_uv = A_uv ⊗ B_uv, the products are

    (A_uv ⊗ B_uv) vec(G) = vec(B_uv G A_vu),

and the Schur complement is a *difference* of two Kronecker products, A_uu ⊗ B_uu − S_A ⊗ S_B. One simultaneous
diagonalisation of each pair (A_uu, S_A) and (B_uu, S_B) inverts it exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from bolza.core import Reference, cites
from bolza.core.errors import ArgumentError, DivergenceError, ShapeError
from bolza.systems.aligned import REFERENCE

__all__ = ["KroneckerGame", "Schur", "damped_blocks", "fork", "join", "joint_step"]

GAME_THEORETIC = Reference(
    "liu2020game",
    "Liu, Guan-Horng and Chen, Tianrong and Theodorou, Evangelos A.",
    "Differential Game Theoretic Neural Optimizer",
    2020,
    arxiv="2007.08880",
)

Schur = Literal["exact", "factored"]
Blocks = Sequence[Sequence[Tensor]]


@cites(GAME_THEORETIC)
def joint_step(blocks: Blocks, right: Sequence[Tensor]) -> list[Tensor]:
    r"""Joint step of cooperating players, by block elimination.

    Solves Σ_v Q_uv δ_v = −r_u for all players u at once. With r_u = [Q_u, Q_ux] the columns are the open step
    k_u and the gain K_u of each player. The players are eliminated one by one,

        Q_ij ← Q_ij − Q_iN Q_NN⁻¹ Q_Nj,     r_i ← r_i − Q_iN Q_NN⁻¹ r_N.

    Args:
        blocks: ``blocks[u][v]`` of shape ``(n_u, n_v)``; together symmetric and positive definite.
        right: ``right[u]`` of shape ``(n_u,)`` or ``(n_u, k)``.

    Returns:
        The step of each player, with the shape of its right-hand side.

    Raises:
        ShapeError: there is not one block for each pair of players.
        DivergenceError: the joint matrix is not positive definite.

    Reference: Liu, Chen & Theodorou (2020), arXiv:2007.08880, block elimination of two players; here any number.

    Example:
        >>> one, half = torch.eye(1), 0.5 * torch.eye(1)
        >>> steps = joint_step([[one, half], [half, one]], [torch.tensor([3.0]), torch.tensor([0.0])])
        >>> [round(step.item(), 4) for step in steps]
        [-4.0, 2.0]
    """
    n = len(right)
    if len(blocks) != n or any(len(row) != n for row in blocks):
        raise ShapeError(
            f"blocks has rows of {[len(row) for row in blocks]} blocks for {n} players: give one a pair"
        )
    columns = [r[:, None] if r.ndim == 1 else r for r in right]
    found = _eliminate([list(row) for row in blocks], columns)
    return [step.reshape(r.shape) for step, r in zip(found, right, strict=True)]


def _eliminate(blocks: list[list[Tensor]], right: list[Tensor]) -> list[Tensor]:
    if not right:
        return []
    *rest, last = range(len(right))
    factor = _root(blocks[last][last])
    weights = [torch.cholesky_solve(blocks[i][last].mT, factor).mT for i in rest]  # Q_iN Q_NN⁻¹
    reduced = [[blocks[i][j] - weights[i] @ blocks[last][j] for j in rest] for i in rest]
    steps = _eliminate(reduced, [right[i] - weights[i] @ right[last] for i in rest])
    pull = right[last]
    for i in rest:
        pull = pull + blocks[last][i] @ steps[i]
    return [*steps, -torch.cholesky_solve(pull, factor)]


@cites(GAME_THEORETIC)
def fork(values: Sequence[Tensor], hessian: Blocks | None = None) -> tuple[Tensor, Tensor | None]:
    r"""Value of a state that is copied, from the value of its copies.

        V_x ← Σ_i V_i,     V_xx ← Σ_ij V_ij

    At the entry of a residual block the state is copied into the path and the skip; gradients, and rank-one
    factors z of the value Hessian, add there.

    Args:
        values: gradient of the value in each copy, ``(…, n)`` each.
        hessian: its second derivatives, ``hessian[i][j]`` of shape ``(…, n, n)``.

    Returns:
        Gradient and, where given, Hessian in the state before it was copied.

    Reference: Liu, Chen & Theodorou (2020), arXiv:2007.08880, augmented state of a residual block.

    Example:
        >>> fork([torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])])
        (tensor([11., 22.]), None)
    """
    gradient = torch.stack(list(values)).sum(0)
    if hessian is None:
        return gradient, None
    return gradient, torch.stack([block for row in hessian for block in row]).sum(0)


@cites(GAME_THEORETIC)
def join(
    gradient: Tensor, hessian: Tensor | None, jacobians: Sequence[Tensor]
) -> tuple[list[Tensor], list[list[Tensor]] | None]:
    r"""Bellman terms at x⁺ = f(x, u) + g(x_r, v), for everything that enters the sum.

        Q_a = F_aᵀ V_x,     Q_ab = F_aᵀ V_xx F_b,     a, b ∈ {x, x_r, u, v}

    with F_x = f_x, F_{x_r} = g_x, F_u = f_u, F_v = g_v (Gauss–Newton: no second derivatives of f and g).

    Args:
        gradient: V_x after the join, ``(…, n)``.
        hessian: V_xx there, ``(…, n, n)``; or ``None`` for the first order alone.
        jacobians: F_a of shape ``(…, n, n_a)``, as many as are wanted, in any order.

    Returns:
        Q_a for each Jacobian, and the blocks Q_ab.

    Reference: Liu, Chen & Theodorou (2020), arXiv:2007.08880, expansion at a join.

    Example:
        >>> q, q2 = join(torch.tensor([2.0]), torch.eye(1), [torch.tensor([[3.0]]), torch.tensor([[5.0]])])
        >>> [a.item() for a in q], [[b.item() for b in row] for row in q2]
        ([6.0, 10.0], [[9.0, 15.0], [15.0, 25.0]])
    """
    first = [(j.mT @ gradient[..., None])[..., 0] for j in jacobians]
    if hessian is None:
        return first, None
    return first, [[a.mT @ hessian @ b for b in jacobians] for a in jacobians]


# ------------------------------------------------------------------------------------ Kronecker form


def damped_blocks(
    inputs: Blocks, signals: Blocks, damping: float
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    r"""Covariances with factored Tikhonov damping of each player's own blocks.

        A_uu + π_u √λ I,     B_uu + (√λ / π_u) I,     π_u² = (tr A_uu / dim) / (tr B_uu / dim)

    The cross blocks stay as they are: the joint matrix remains positive definite.

    Args:
        inputs: ``inputs[u][v]`` = A_uv, covariances of what enters the players.
        signals: ``signals[u][v]`` = B_uv, of what comes back to them.
        damping: λ > 0, in the units of A ⊗ B.

    Returns:
        Damped ``inputs`` and ``signals``.

    Example:
        >>> a, b = damped_blocks([[torch.eye(2)]], [[torch.eye(1)]], 0.01)
        >>> a[0][0]
        tensor([[1.1000, 0.0000],
                [0.0000, 1.1000]])
    """
    left, right = [list(row) for row in inputs], [list(row) for row in signals]
    for u in range(len(left)):
        a, b = left[u][u], right[u][u]
        tiny = torch.finfo(a.dtype).tiny
        ratio = (_mean_diagonal(a).clamp(min=tiny) / _mean_diagonal(b).clamp(min=tiny)).sqrt()
        left[u][u] = a + torch.eye(len(a), dtype=a.dtype, device=a.device) * ratio * damping**0.5
        right[u][u] = b + torch.eye(len(b), dtype=b.dtype, device=b.device) / ratio * damping**0.5
    return left, right


def _mean_diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal().mean()


@cites(REFERENCE)
class KroneckerGame:
    r"""Cooperating players whose joint curvature has Kronecker blocks Q_uv = A_uv ⊗ B_uv.

    One player: G = B⁻¹ R A⁻¹. Two: block elimination, where the Schur complement A ⊗ B − S_A ⊗ S_B with
    S_A = A_uv A_vv⁻¹ A_vu is inverted exactly by T_Aᵀ A T_A = I, T_Aᵀ S_A T_A = diag(α), and the same for B:

        Q̃_uu⁻¹ R = T_B [(T_Bᵀ R T_A)_jk / (1 − β_j α_k)] T_Aᵀ.

    More: conjugate gradients on the joint system, preconditioned by the blocks of the single players.

    Args:
        inputs: ``inputs[u][v]`` = A_uv of shape ``(i_u, i_v)``; own blocks positive definite (see
            :func:`damped_blocks`).
        signals: ``signals[u][v]`` = B_uv of shape ``(o_u, o_v)``.
        schur: ``'exact'``, or ``'factored'``: each player by (A − S_A) ⊗ (B − S_B), the paper's form. That is an
            approximation, and singular up to damping where the players read the same input, because then S_A = A.
        iterations: most conjugate gradient steps, for more than two players.
        tolerance: relative residual at which they stop.

    Raises:
        ArgumentError: ``schur`` is unknown, or ``'factored'`` with more than two players.
        DivergenceError: a block is not positive definite or not finite.

    Reference: Liu, Chen & Theodorou (2021), arXiv:2105.03788, cooperative preconditioner. Departure: the exact Schur
        complement by default, and any number of players.

    Example:
        >>> game = KroneckerGame([[2 * torch.eye(1)]], [[torch.eye(2)]])
        >>> (step,) = game.solve([torch.tensor([[4.0], [6.0]])])
        >>> [round(entry, 4) for entry in step.flatten().tolist()]
        [2.0, 3.0]
    """

    def __init__(
        self,
        inputs: Blocks,
        signals: Blocks,
        *,
        schur: Schur = "exact",
        iterations: int = 20,
        tolerance: float = 1e-6,
    ) -> None:
        if schur not in ("exact", "factored"):
            raise ArgumentError(f"schur is {schur!r}: choose 'exact' or 'factored'")
        self.players = len(inputs)
        if schur == "factored" and self.players > 2:
            raise ArgumentError(
                f"schur is 'factored', which is for two players, but there are {self.players}: choose 'exact'"
            )
        self.inputs, self.signals = inputs, signals
        self.schur = schur
        self.iterations, self.tolerance = iterations, tolerance
        self._a = [_inverse(inputs[u][u]) for u in range(self.players)]
        self._b = [_inverse(signals[u][u]) for u in range(self.players)]
        if self.players == 2 and schur == "exact":
            self._exact = (_pencil(inputs, self._a), _pencil(signals, self._b))
        elif self.players == 2:
            self._factored = [
                tuple(
                    _inverse(block[u][u] - block[u][1 - u] @ inverse[1 - u] @ block[1 - u][u])
                    for block, inverse in ((inputs, self._a), (signals, self._b))
                )
                for u in (0, 1)
            ]

    def product(self, steps: Sequence[Tensor]) -> list[Tensor]:
        """Joint curvature times steps: Σ_v B_uv G_v A_vu."""
        n = range(self.players)
        return [_sum([self.signals[u][v] @ steps[v] @ self.inputs[v][u] for v in n]) for u in n]

    def alone(self, right: Sequence[Tensor]) -> list[Tensor]:
        """Each player by itself: B_uu⁻¹ R_u A_uu⁻¹."""
        return [b @ r @ a for a, b, r in zip(self._a, self._b, right, strict=True)]

    def solve(self, right: Sequence[Tensor]) -> list[Tensor]:
        """Steps G with Σ_v B_uv G_v A_vu = R_u.

        Args:
            right: R_u of shape ``(o_u, i_u)`` for each player.
        """
        if self.players == 1:
            return self.alone(right)
        if self.players > 2:
            return self._iterate(right)
        if self.schur == "factored":
            return [b @ self._reduced(u, right) @ a for u, (a, b) in enumerate(self._factored)]
        (t_a, alpha), (t_b, beta) = self._exact
        gap = (1 - beta[:, None] * alpha).clamp(min=torch.finfo(alpha.dtype).eps)
        first = t_b @ ((t_b.mT @ self._reduced(0, right) @ t_a) / gap) @ t_a.mT
        pulled = right[1] - self.signals[1][0] @ first @ self.inputs[0][1]
        return [first, self._b[1] @ pulled @ self._a[1]]

    def _reduced(self, u: int, right: Sequence[Tensor]) -> Tensor:
        """R_u − Q_uv Q_vv⁻¹ R_v."""
        v = 1 - u
        other = self._b[v] @ right[v] @ self._a[v]
        return right[u] - self.signals[u][v] @ other @ self.inputs[v][u]

    def _iterate(self, right: Sequence[Tensor]) -> list[Tensor]:
        x = self.alone(right)
        residual = [r - q for r, q in zip(right, self.product(x), strict=True)]
        z = self.alone(residual)
        direction, power = z, _dot(residual, z)
        goal = self.tolerance**2 * _dot(right, right)
        for _ in range(self.iterations):
            if not _dot(residual, residual) > goal:
                break
            q = self.product(direction)
            rate = power / _dot(direction, q)
            x = [a + rate * b for a, b in zip(x, direction, strict=True)]
            residual = [a - rate * b for a, b in zip(residual, q, strict=True)]
            z = self.alone(residual)
            power, before = _dot(residual, z), power
            direction = [a + power / before * b for a, b in zip(z, direction, strict=True)]
        return x


def _sum(terms: list[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def _root(matrix: Tensor) -> Tensor:
    root, info = torch.linalg.cholesky_ex(matrix)
    if bool(info) or not bool(torch.isfinite(root[-1, -1])):
        raise DivergenceError(
            f"the joint curvature of players is not finite or not positive definite (a factor of size {len(matrix)}): "
            "lower lr or raise damping"
        )
    return root


def _inverse(matrix: Tensor) -> Tensor:
    return torch.cholesky_inverse(_root(matrix))


def _pencil(blocks: Blocks, inverses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """T and α with Tᵀ C T = I and Tᵀ S T = diag(α), for C the first player's block and S = C₀₁ C₁₁⁻¹ C₁₀."""
    lower = _root(blocks[0][0])
    half = torch.linalg.solve_triangular(lower, blocks[0][1], upper=False)
    alpha, basis = torch.linalg.eigh(half @ inverses[1] @ half.mT)
    return torch.linalg.solve_triangular(lower.mT, basis, upper=True), alpha.clamp(0.0, 1.0)
