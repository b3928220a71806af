r"""The two learning rates of MAML: how large may they be together?

One Hessian H for all tasks, K inner steps of rate α: the outer loss has the Hessian H(I − αH)^{2K}, so

    outer steps converge  ⇔  β < 2 / max_i λ_i (1 − αλ_i)^{2K},      inner steps  ⇔  α < 2/λ_max

The bound of β grows with α as long as αλ_max is not far above 1: raise α first, then tune β. For a network the two
sharpnesses are measured where it is, by Lanczos iterations on Hessian-vector products: of every task's loss, for α,
and of the outer loss itself, through the inner steps, for β.

Reference: Takagi, Nagano, Yoshida & Okada (2019).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError
from bolza.core.reference import Reference, cites
from bolza.meta.adaptation import count_tasks
from bolza.meta.learner import Learner, TaskData, check_tasks
from bolza.meta.maml import MAML
from bolza.meta.meta_gradient import check_finite
from bolza.meta.meta_sgd import MetaSGD
from bolza.ops.batches import unflatten
from bolza.ops.krylov import top_eigenpairs
from bolza.ops.operators import LinearOperator
from bolza.ops.trees import tree_detach
from bolza.systems.training import SGD

__all__ = ["RateReport", "check_rates", "meta_rate_bound"]

TAKAGI = Reference(
    "takagi2019rates",
    "Takagi, Shiro and Nagano, Yoshihiro and Yoshida, Yuki and Okada, Masato",
    "Role of Two Learning Rates in Convergence of Model-Agnostic Meta-Learning",
    2019,
)


@cites(TAKAGI)
def meta_rate_bound(
    eigenvalues: Tensor | Sequence[float],
    lr: float,
    steps: int = 1,
    *,
    first_order: bool = False,
    momentum: float = 0.0,
) -> float:
    r"""Largest outer rate with which MAML converges, for tasks that share one Hessian.

    β_max = 2 (1 + μ) / max_i λ_i (1 − αλ_i)^{2K}, and the power K without second derivatives.

    Args:
        eigenvalues: λ_i, of the Hessian of the inner loss; those ≤ 0 set no bound.
        lr: α, rate of the inner steps.
        steps: K, inner steps.
        first_order: the outer gradient counts the inner ones as constants (FOMAML).
        momentum: μ of a heavy-ball outer loop.

    Returns:
        β_max; ``inf`` where nothing bounds it, and 0 where a first-order outer step climbs at any rate (αλ > 1 and an
        odd number of inner steps).

    Raises:
        ArgumentError: lr or steps is negative, or momentum outside 0 … 1.

    Reference: Takagi, Nagano, Yoshida & Okada (2019). Departures: any number of inner steps and no expansion in α.

    Example:
        >>> [round(meta_rate_bound([0.5, 1.0, 2.0], lr), 4) for lr in (0.0, 0.1, 0.2, 0.3, 0.4)]
        [1.0, 1.5625, 2.7778, 4.0816, 5.5556]
    """
    if lr < 0 or steps < 0 or not 0 <= momentum < 1:
        raise ArgumentError(
            f"lr={lr} and steps={steps} must not be negative, and momentum={momentum} lie in 0 … 1"
        )
    values = torch.as_tensor(eigenvalues, dtype=torch.float64).flatten()
    values = values[values > 0]
    if not len(values):
        return float("inf")
    curvature = values * (1 - lr * values) ** (steps if first_order else 2 * steps)
    if float(curvature.min()) < 0:
        return 0.0
    largest = float(curvature.max())
    return 2 * (1 + momentum) / largest if largest else float("inf")


@dataclass(frozen=True)
class RateReport:
    """The two rates of a meta-learner beside what its tasks allow, where the network is now.

    Attributes:
        inner_lr: α; None where the inner rule is not plain descent at one rate.
        inner_limit: 2/λ_max over the tasks: with a larger α the inner steps diverge.
        useful_lr: 1/λ_max over the tasks: above it a step jumps beyond the minimum along the sharpest direction.
        task_sharpness: λ_max, the largest over the tasks.
        outer_lr: β, None if it was not given.
        outer_limit: 2(1 + μ)/λ_max(∇²J): with a larger β plain outer steps diverge; None for first-order learners.
        outer_sharpness: λ_max(∇²J), through the inner steps.
        shared_limit: β that is safe whatever the spectrum below, if all tasks had the mean Hessian.
        warnings: what is violated, one sentence each.
    """

    inner_lr: float | None
    inner_limit: float
    useful_lr: float
    task_sharpness: float
    outer_lr: float | None
    outer_limit: float | None
    outer_sharpness: float | None
    shared_limit: float | None
    warnings: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether both rates are within their limits."""
        return not self.warnings


@cites(TAKAGI)
def check_rates(
    learner: MAML | MetaSGD,
    support: TaskData,
    query: TaskData,
    outer_lr: float | None = None,
    *,
    momentum: float = 0.0,
    tol: float = 0.05,
    max_products: int = 60,
    generator: torch.Generator | None = None,
) -> RateReport:
    r"""Measure how large the inner and the outer rate of a meta-learner may be, and warn when one is too large.

    α < 2/λ_max(∇²ℓ_τ) for every task, β < 2 (1 + μ)/λ_max(∇²J) for the outer loss J through the inner steps. Both are
    those of the quadratic model where the network is now: check again after a while. For an adaptive outer optimizer
    the limit of β says nothing.

    Args:
        learner: the meta-learner; it is not changed.
        support: ``(x, y)``, each tensor ``(tasks, shots, …)``.
        query: ``(x, y)``, each tensor ``(tasks, queries, …)``.
        outer_lr: β, rate of the outer optimizer; only measured against if given.
        momentum: μ of the outer optimizer.
        tol: relative accuracy of the eigenvalues.
        max_products: Hessian-vector products for each of them, at most.
        generator: of the random start.

    Returns:
        :class:`RateReport`.

    Raises:
        ArgumentError: the learner is neither MAML nor MetaSGD.
        UserWarning: (as a warning) a rate is beyond its limit.

    Reference: Takagi, Nagano, Yoshida & Okada (2019). Departure: the Hessians are measured and not shared.

    Example:
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> points = torch.ones(3, 5, 1), torch.zeros(3, 5, 1)                       # ℓ = w²: λ = 2
        >>> report = check_rates(MAML(net, lr=0.25, steps=1), points, points, outer_lr=0.1)
        >>> [round(limit, 4) for limit in (report.inner_limit, report.outer_limit)], report.holds
        ([1.0, 4.0], True)
    """
    if not isinstance(learner, MAML | MetaSGD):
        raise ArgumentError(
            f"learner is a {type(learner).__name__}: only MAML and MetaSGD differentiate their inner steps"
        )
    check_tasks(support, query)
    options = {"tol": tol, "max_products": max_products, "generator": generator}
    params, shared = learner.split()
    rule = learner.rule
    plain = isinstance(learner, MAML) and type(rule) is SGD and isinstance(rule.lr, int | float)
    lr = float(rule.lr) if plain and rule.momentum == 0 else None  # type: ignore[attr-defined, arg-type]
    with learner.evaluation():
        blocks, mean = _task_operators(learner, support)
        sharpest, average = (
            float(top_eigenpairs(op, which="largest algebraic", **options).eigenvalues[0])  # type: ignore[arg-type]
            for op in (blocks, mean)
        )
        outer = None
        if learner.mode != "first_order":
            op = _outer_operator(learner, support, query)
            outer = float(top_eigenpairs(op, which="largest algebraic", **options).eigenvalues[0])  # type: ignore[arg-type]
    limit = 2 / sharpest if sharpest > 0 else float("inf")
    outer_limit = None if outer is None else 2 * (1 + momentum) / outer if outer > 0 else float("inf")
    whole = None
    if lr is not None and average > 0:
        power = learner.steps * (1 if learner.mode == "first_order" else 2)
        peak = 1 / (lr * (power + 1)) if lr else average
        whole = meta_rate_bound(
            [average, min(peak, average)],
            lr,
            learner.steps,
            first_order=learner.mode == "first_order",
            momentum=momentum,
        )
    said = []
    if lr is not None and lr > limit:
        said.append(
            f"the inner steps diverge along the sharpest direction of a task: lr={lr:g} is above 2/λ_max = "
            f"{limit:.3g}; below {limit / 2:.3g} no step jumps beyond the minimum"
        )
    if outer_lr is not None and outer_limit is not None and outer_lr > outer_limit:
        said.append(
            f"the outer steps diverge: outer_lr={outer_lr:g} is above {outer_limit:.3g}; lower it, or first raise the "
            f"inner lr towards {limit / 2:.3g}, which flattens the outer loss"
        )
    for sentence in said:
        warnings.warn(sentence, UserWarning, stacklevel=2)
    return RateReport(lr, limit, limit / 2, sharpest, outer_lr, outer_limit, outer, whole, tuple(said))


def _task_operators(learner: Learner, support: TaskData) -> tuple[LinearOperator, LinearOperator]:
    """Hessians of all inner losses, as one block diagonal matrix and as their mean."""
    params, shared = learner.split()
    tasks = count_tasks(support, "support")
    with torch.enable_grad():
        point = {n: p.detach().expand(tasks, *p.shape).clone().requires_grad_() for n, p in params.items()}
        value = learner.inner_losses()(point, tree_detach(shared), support).sum()
        product = _products(value, list(point.values()))
    first = next(iter(params.values()))
    size = sum(p.numel() for p in params.values())

    def stacked(v: Tensor) -> Tensor:
        rows = v.reshape(tasks, size)
        parts = product(unflatten(rows, list(params.values())))
        return torch.cat([part.reshape(tasks, -1) for part in parts], 1)

    blocks = LinearOperator(lambda v: stacked(v).flatten(), tasks * size, first.dtype, first.device)
    mean = LinearOperator(lambda v: stacked(v.expand(tasks, -1)).mean(0), size, first.dtype, first.device)
    return blocks, mean


def _outer_operator(learner: MAML | MetaSGD, support: TaskData, query: TaskData) -> LinearOperator:
    """Hessian of the outer loss in all that is trainable in the network."""
    with torch.enable_grad():
        params, shared = (
            {n: p.detach().requires_grad_() for n, p in part.items()} for part in learner.split()
        )
        adaptation = learner.adaptation(support)
        state = adaptation.run(adaptation.initial_state(params, shared), tree_detach(learner.controls()))
        value = learner.outer_losses()(state["params"], shared, support, query).mean()
        check_finite(value)
        leaves = [*params.values(), *shared.values()]
        product = _products(value, leaves)

    def flat(v: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in product(unflatten(v, leaves))])

    return LinearOperator(flat, sum(p.numel() for p in leaves), leaves[0].dtype, leaves[0].device)


def _products(value: Tensor, leaves: list[Tensor]):  # type: ignore[no-untyped-def]
    """V ↦ ∇²value · v on lists of tensors; the graph of the gradient is kept."""
    slopes = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
    live = [(i, g) for i, g in enumerate(slopes) if g.requires_grad]

    def product(v: list[Tensor]) -> list[Tensor]:
        if not live:
            return [torch.zeros_like(p) for p in leaves]
        return list(
            torch.autograd.grad(
                [g for _, g in live],
                leaves,
                [v[i] for i, _ in live],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        )

    return product
