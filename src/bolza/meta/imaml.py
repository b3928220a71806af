r"""Meta-gradients from the end of the inner run alone.

    φ^τ = argmin_φ ℓ_τ(φ) + (λ/2)‖φ − θ‖²,   dΦ_τ/dθ = (I + ∇²ℓ_τ(φ^τ)/λ)⁻¹ ∇Φ_τ(φ^τ)

The inner run is forgotten: whatever brought it to the minimum, the gradient is the solution of one linear system, by
conjugate gradients on Hessian-vector products, all tasks at once.

Reference: Rajeswaran, Finn, Kakade & Levine (2019), arXiv:1909.04630.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError, ConvergenceWarning
from bolza.core.reference import Reference, cites
from bolza.meta.learner import Learner, Loss, Statistics, TaskData, check_tasks
from bolza.meta.meta_gradient import carry, check_finite
from bolza.ops.trees import Tree, tree_detach, tree_map
from bolza.systems.training import UpdateRule

__all__ = ["iMAML", "conjugate_gradients"]

RAJESWARAN = Reference(
    "rajeswaran2019imaml",
    "Rajeswaran, Aravind and Finn, Chelsea and Kakade, Sham and Levine, Sergey",
    "Meta-Learning with Implicit Gradients",
    2019,
    venue="NeurIPS",
    arxiv="1909.04630",
)


def conjugate_gradients(
    product: Callable[[list[Tensor]], list[Tensor]], b: list[Tensor], iterations: int, tol: float = 1e-6
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Solve A_τ x_τ = b_τ for every task τ at once, each with step sizes of its own.

    Args:
        product: x ↦ A x, each tensor ``(tasks, …)``; A is positive definite.
        b: right-hand sides, each ``(tasks, …)``.
        iterations: products, at most; a task stops where its residual is ``tol`` · ‖b‖ or A proves indefinite.
        tol: relative residual at which a task is done.

    Returns:
        The solutions, the relative residuals ``(tasks,)``, and which tasks met a direction of curvature ≤ 0.
    """

    def dot(u: list[Tensor], v: list[Tensor]) -> Tensor:
        return torch.stack([(a * c).flatten(1).sum(1) for a, c in zip(u, v, strict=True)]).sum(0)

    def add(u: list[Tensor], by: Tensor, v: list[Tensor]) -> list[Tensor]:
        return [a + by.reshape(-1, *[1] * (a.ndim - 1)) * c for a, c in zip(u, v, strict=True)]

    x, r, p = [torch.zeros_like(c) for c in b], b, b
    square = size = dot(b, b)
    indefinite = torch.zeros_like(size, dtype=torch.bool)
    for _ in range(iterations):
        live = (square > tol**2 * size) & ~indefinite
        if not bool(live.any()):
            break
        q = product(p)
        curvature = dot(p, q)
        indefinite = indefinite | (live & (curvature <= 0))
        live = live & ~indefinite
        step = torch.where(live, square / torch.where(live, curvature, 1.0), 0.0)
        x, r = add(x, step, p), add(r, -step, q)
        after = dot(r, r)
        ratio = torch.where(live, after / torch.where(live, square, 1.0), 0.0)
        p, square = add(r, ratio, p), torch.where(live, after, square)
    return x, (square / size.clamp_min(torch.finfo(size.dtype).tiny)).sqrt(), indefinite


@cites(RAJESWARAN)
class iMAML(Learner):
    r"""Implicit MAML: meta-gradients by one linear solve at the end of a long inner run, in constant memory.

        φ^τ = argmin_φ ℓ_τ(φ) + (λ/2)‖φ − θ‖²,   dΦ_τ/dθ = (I + ∇²ℓ_τ(φ^τ)/λ)⁻¹ ∇Φ_τ(φ^τ)

    The gradient is that of the minimum, not of the inner run: take enough ``steps`` to get there. What is not adapted
    (``params``) gets only its direct gradient ∂Φ/∂shared.

    Args:
        model: the network.
        lr: α, rate of the inner steps, on the loss with its pull towards θ.
        steps: K, inner steps; costs time but no memory.
        regularization: λ, strength of the pull; larger is easier to solve and adapts less.
        solves: Hessian-vector products of the conjugate gradients, at most.
        tol: relative residual at which they stop.
        loss: as for :class:`MAML`.
        params: as for :class:`MAML`.
        rule: inner optimizer in place of plain descent at ``lr``.
        statistics: as for :class:`MAML`.
        vectorized: as for :class:`MAML`.

    Raises:
        ArgumentError: an argument is not positive, or unknown.
        ConvergenceWarning: (as a warning, when called) ∇²ℓ + λ is not positive definite at the end of an inner run,
            so that it is no minimum: raise ``regularization`` or ``steps``.

    Reference: Rajeswaran, Finn, Kakade & Levine (2019), algorithms 1 and 2, eq. 6.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> learner = iMAML(net, lr=0.3, steps=40, regularization=1.0)
        >>> support = query = torch.ones(1, 5, 1), torch.zeros(1, 5, 1)
        >>> _ = nn.init.ones_(net.weight)
        >>> learner(support, query).backward()          # φ = θ/3, Φ = φ²: dΦ/dθ = 2θ/9
        >>> round(net.weight.grad.item(), 4)
        0.2222
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.01,
        steps: int = 20,
        *,
        regularization: float = 1.0,
        solves: int = 20,
        tol: float = 1e-6,
        loss: Loss | None = None,
        params: Iterable[str] | None = None,
        rule: UpdateRule | None = None,
        statistics: Statistics = "batch",
        vectorized: bool | None = None,
    ) -> None:
        super().__init__(model, loss, lr if rule is None else rule, steps, params, statistics, vectorized)
        if not (regularization > 0 and solves >= 1 and tol > 0):
            raise ArgumentError(
                f"regularization={regularization}, solves={solves} and tol={tol} must all be positive"
            )
        self.regularization, self.solves, self.tol = regularization, solves, tol

    def inner_losses(self) -> Callable[..., Tensor]:
        """Loss of every task with its pull ½λ‖φ − θ‖² towards where it started."""
        plain = super().inner_losses()
        start = tree_detach(self.split()[0])

        def losses(params: Tree, shared: Tree, support: TaskData) -> Tensor:
            pulls = [(params[name] - p).square().flatten(1).sum(1) for name, p in start.items()]
            return plain(params, shared, support) + self.regularization / 2 * torch.stack(pulls).sum(0)

        return losses

    def forward(self, support: TaskData, query: TaskData) -> Tensor:
        """Mean loss on the query sets after adaptation to the support sets.

        Args:
            support: ``(x, y)``, each tensor ``(tasks, shots, …)``.
            query: ``(x, y)``, each tensor ``(tasks, queries, …)``.
        """
        check_tasks(support, query)
        params, shared = self.split()
        adaptation = self.adaptation(support)
        with self.evaluation():
            with torch.no_grad():
                adapted = self._adapt(adaptation)
            if not torch.is_grad_enabled():
                value = self.outer_losses()(adapted, tree_detach(shared), support, query).mean()
                check_finite(value)
                return value
            end = tree_map(lambda p: p.detach().requires_grad_(), adapted)
            fixed = tree_map(lambda p: p.detach().requires_grad_(), shared)
            leaves = list(end.values())
            value = self.outer_losses()(end, fixed, support, query).mean()
            check_finite(value)
            found = torch.autograd.grad(
                value, [*leaves, *fixed.values()], allow_unused=True, materialize_grads=True
            )
            inner = adaptation.losses(end, tree_detach(shared), support).sum()
            slopes = torch.autograd.grad(
                inner, leaves, create_graph=True, allow_unused=True, materialize_grads=True
            )
        live = [(i, g) for i, g in enumerate(slopes) if g.requires_grad]

        def product(v: list[Tensor]) -> list[Tensor]:
            # the Hessian of the loss with its pull is ∇²ℓ + λ
            curved = torch.autograd.grad(
                [g for _, g in live],
                leaves,
                [v[i] for i, _ in live],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            return [c / self.regularization for c in curved]

        solved, _, indefinite = conjugate_gradients(
            product, list(found[: len(leaves)]), self.solves, self.tol
        )
        if bool(indefinite.any()):
            warnings.warn(
                f"{int(indefinite.sum())} of {len(indefinite)} inner runs ended where the curvature of the loss with "
                f"its pull is not positive: raise regularization={self.regularization:g} or steps={self.steps}, or "
                "the gradient is not that of a minimum",
                ConvergenceWarning,
                stacklevel=2,
            )
        gradients = [g.sum(0) for g in solved] + list(found[len(leaves) :])
        return carry(value, gradients, [*params.values(), *shared.values()])
