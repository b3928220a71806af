r"""The gradient of what tasks have learned, in the point they all started from.

    J(θ) = (1/M) Σ_τ Φ_τ(θ^τ_K),   θ^τ_{k+1} = θ^τ_k − α ∇ℓ_τ(θ^τ_k),   θ^τ_0 = θ
    p^τ_K = ∇Φ_τ(θ^τ_K),   p^τ_k = (I − α ∇²ℓ_τ(θ^τ_k)) p^τ_{k+1},   ∇J = (1/M) Σ_τ p^τ_0

The meta-gradient is the costate of the training clock at time 0: the shared initial condition is the control. Three
ways to the same number: reverse mode through the whole run, the costate sweep that keeps √K states, and, when the
Hessians are dropped, p_0 = p_K (first order).

Reference: Finn, Abbeel & Levine (2017), arXiv:1703.03400, eq. 1; Liu & Theodorou (2019), arXiv:1908.10920, §7.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bolza.core import CallableCost, checkpointed_adjoint
from bolza.core.errors import ArgumentError, DataError, DivergenceError
from bolza.core.reference import Reference, cites
from bolza.meta.adaptation import Adaptation, batched, count_tasks, draw_seed
from bolza.ops.trees import Tree, float_leaves, tree_add, tree_detach, tree_map, with_float_leaves
from bolza.systems.training import SGD, UpdateRule

__all__ = [
    "FINN",
    "MODES",
    "MetaGradient",
    "Mode",
    "carry",
    "check_finite",
    "check_mode",
    "meta_gradient",
    "sweep",
]

Mode = Literal["reverse", "checkpointed", "first_order"]
MODES = ("reverse", "checkpointed", "first_order")

FINN = Reference(
    "finn2017maml",
    "Finn, Chelsea and Abbeel, Pieter and Levine, Sergey",
    "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks",
    2017,
    venue="ICML",
    arxiv="1703.03400",
)


@dataclass(frozen=True)
class MetaGradient:
    """What a sweep over the training clock of many tasks found.

    Attributes:
        value: J, mean over the tasks of the loss on the query set after adaptation.
        gradient: ∇J in the initial parameters, a tree like them.
        rule_gradient: ∂J in the hyper-parameters of the inner rule, summed over the steps (``lr`` is that of Meta-SGD).
        params: adapted parameters of every task, ``(tasks, …)``.
        shared: ∂J in what all tasks share and none adapts.
        states_held: largest number of states that were held at once; 0 where a graph of the whole run was.
    """

    value: Tensor
    gradient: Tree
    rule_gradient: dict[str, Tree]
    params: Tree
    shared: Tree
    states_held: int = 0


@cites(FINN)
def meta_gradient(
    loss: Callable[[Tree, Any], Tensor],
    params: Tree,
    support: Any,
    query: Any,
    rule: UpdateRule | float,
    steps: int = 1,
    *,
    mode: Mode = "reverse",
    every: int | None = None,
    vectorized: bool = True,
) -> MetaGradient:
    r"""Gradient in a shared initial point of the loss after K inner steps, averaged over tasks.

    p_k = (I − α∇²ℓ) p_{k+1} from p_K = ∇Φ, for all tasks at once; the numbers of the modes ``"reverse"`` and
    ``"checkpointed"`` are the same to rounding.

    Args:
        loss: (params, data) → scalar, the loss of **one** task on its data.
        params: the shared initial point, a tree of tensors.
        support: data of the inner steps, each tensor ``(tasks, …)``.
        query: data of the loss at the end, each tensor ``(tasks, …)``.
        rule: inner optimizer (`bolza.systems.SGD`, `bolza.systems.Adam`), or a learning rate.
        steps: K, inner steps.
        mode: ``"reverse"``: one graph of the whole run, the fastest, memory ∝ K; ``"checkpointed"``: memory ∝ √K
            for one evaluation of each step more; ``"first_order"``: no Hessians.
        every: distance of the states that ``"checkpointed"`` keeps, ⌈√K⌉ by default.
        vectorized: all tasks in one batched evaluation; else one by one.

    Returns:
        :class:`MetaGradient`.

    Raises:
        ArgumentError: the mode is unknown, or ``steps`` is negative.
        DataError: support and query have different numbers of tasks.
        DivergenceError: the loss at the end is not finite.

    Reference: Finn, Abbeel & Levine (2017), eq. 1, where J is the sum over tasks instead of their mean.

    Example:
        >>> task = lambda w, c: (w - c).square().sum() / 2
        >>> centres = torch.tensor([[1.0], [3.0]])
        >>> found = meta_gradient(task, torch.zeros(1), centres, centres, rule=0.5, steps=2)
        >>> found.value, found.gradient                # (1 − 0.5)² of the way left: ∇J = −(1/16) · mean c
        (tensor(0.1562), tensor([-0.1250]))
    """
    check_mode(mode)
    rule = SGD(lr=rule) if isinstance(rule, int | float) else rule
    many = batched(lambda p, _, data: loss(p, data), vectorized)
    if count_tasks(support, "support") != count_tasks(query, "query"):
        raise DataError(
            f"support has {count_tasks(support, 'support')} tasks and query {count_tasks(query, 'query')}: give both "
            "for the same tasks"
        )
    seed = draw_seed(float_leaves(params)[0].device) if mode == "checkpointed" else None
    adaptation = Adaptation(many, support, rule, steps, mode == "first_order", seed)
    return sweep(adaptation, lambda p, shared: many(p, shared, query), params, {}, mode, every)


def sweep(
    adaptation: Adaptation,
    final: Callable[[Tree, Tree], Tensor],
    params: Tree,
    shared: Tree,
    mode: Mode,
    every: int | None = None,
    controls: dict[str, Tree] | None = None,
) -> MetaGradient:
    """Value and all gradients of ``final``(adapted, shared).mean(), by a graph or by the costate sweep."""
    leaf = lambda p: p.detach().requires_grad_()  # noqa: E731
    chosen = controls or (adaptation.rule.controls() if adaptation.horizon else {})
    if mode != "checkpointed":
        with torch.enable_grad():
            params, shared, u = tree_map(leaf, params), tree_map(leaf, shared), tree_map(leaf, chosen)
            state = adaptation.run(adaptation.initial_state(params, shared), u)
            value = final(state["params"], shared).mean()
            check_finite(value)
            trees = [params, shared, u]
            slopes = iter(
                torch.autograd.grad(
                    value,
                    [p for tree in trees for p in float_leaves(tree)],
                    allow_unused=True,
                    materialize_grads=True,
                )
            )
        found = [with_float_leaves(tree, [next(slopes) for _ in float_leaves(tree)]) for tree in trees]
        return MetaGradient(value.detach(), found[0], found[2], tree_detach(state["params"]), found[1])
    total: list[Tree] = []

    def visit(t: int, x: Tree, p: Tree, gradient: Tree) -> None:
        total[:] = [tree_add(gradient, total[0]) if total else gradient]

    cost = CallableCost(terminal=lambda x: final(x["params"], x["shared"]).mean())
    start = adaptation.initial_state(tree_detach(params), tree_detach(shared))
    used = [chosen] * adaptation.horizon
    found_all = checkpointed_adjoint(adaptation, cost, start, used, every=every, gradients=False, visit=visit)  # type: ignore[arg-type]
    check_finite(found_all.value)
    costate = found_all.costate
    return MetaGradient(
        found_all.value,
        tree_map(lambda p: p.sum(0), costate["params"]),
        total[0] if total else {},
        found_all.final["params"],
        costate["shared"],
        found_all.most_states,
    )


def check_mode(mode: str) -> None:
    """Raise an ArgumentError unless the mode is one of :data:`MODES`."""
    if mode not in MODES:
        raise ArgumentError(f"mode={mode!r} is unknown: choose one of {', '.join(MODES)}")


def check_finite(value: Tensor) -> None:
    """Raise a DivergenceError unless a meta-loss is finite."""
    if not bool(torch.isfinite(value.detach()).all()):
        raise DivergenceError(
            f"the loss after adaptation is {value.detach().tolist()}: the inner steps diverged, so lower their lr "
            "(bolza.meta.check_rates says how far), or the data are not finite"
        )


class _Known(torch.autograd.Function):
    """A value whose gradient was found before."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *leaves: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(slope * g for g in ctx.gradients))


def carry(value: Tensor, gradients: list[Tensor], leaves: list[Tensor]) -> Tensor:
    """A scalar that hands ``gradients`` to ``leaves`` when ``backward()`` is called on it."""
    found: Tensor = _Known.apply(value.detach(), gradients, *leaves)  # type: ignore[no-untyped-call]
    return found
