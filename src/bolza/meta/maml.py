r"""Model-agnostic meta-learning: an initial point from which a few gradient steps go far.

    min_θ (1/M) Σ_τ Φ_τ(θ^τ_K),   θ^τ_{k+1} = θ^τ_k − α ∇ℓ_τ(θ^τ_k),   θ^τ_0 = θ

Reference: Finn, Abbeel & Levine (2017), arXiv:1703.03400; first-order form §5.2 there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bolza.core.reference import cites
from bolza.meta.adaptation import draw_seed
from bolza.meta.learner import Learner, Loss, Statistics, TaskData, check_tasks
from bolza.meta.meta_gradient import FINN, Mode, carry, check_finite, check_mode, sweep
from bolza.ops.trees import Tree, float_leaves
from bolza.systems.training import UpdateRule

__all__ = ["MAML", "outer_loss"]


def outer_loss(
    learner: Learner, support: TaskData, query: TaskData, mode: Mode, controls: dict[str, Tree]
) -> Tensor:
    """Mean loss on the query sets after adaptation, as something to call ``backward()`` on."""
    check_tasks(support, query)
    params, shared = learner.split()
    device = next(iter(params.values())).device
    seed = draw_seed(device) if mode == "checkpointed" and torch.is_grad_enabled() else None
    adaptation = learner.adaptation(support, mode == "first_order", seed)
    losses = learner.outer_losses()
    with learner.evaluation():
        if seed is None:
            state = adaptation.run(adaptation.initial_state(params, shared), controls)
            value = losses(state["params"], shared, support, query).mean()
            check_finite(value)
            return value
        found = sweep(
            adaptation,
            lambda p, s: losses(p, s, support, query),
            params,
            shared,
            mode,
            controls=controls,
        )
    trees = [(params, found.gradient), (shared, found.shared), (controls, found.rule_gradient)]
    pairs = [
        (p, g)
        for tree, slopes in trees
        for p, g in zip(float_leaves(tree), float_leaves(slopes), strict=True)
        if p.requires_grad
    ]
    return carry(found.value, [g for _, g in pairs], [p for p, _ in pairs])


@cites(FINN)
class MAML(Learner):
    r"""Meta-learning of the initial parameters: a few gradient steps on a new task go far.

        min_θ (1/M) Σ_τ Φ_τ(θ^τ_K),   θ^τ_{k+1} = θ^τ_k − α ∇ℓ_τ(θ^τ_k),   θ^τ_0 = θ

    ``maml(support, query)`` is the outer loss of a batch of tasks; call ``backward()`` on it and step any
    ``torch.optim`` optimizer over ``model.parameters()``. All tasks of a batch run in one batched evaluation, on
    kernels with second derivatives (attention included). Buffers of the network never change.

    Args:
        model: the network; the outer optimizer moves its parameters, nothing else touches it.
        lr: α, rate of the inner steps.
        steps: K, inner steps.
        first_order: count inner gradients as constants (FOMAML): no Hessians, less time and memory.
        loss: loss(output, y), a mean over the samples of a task; by default cross-entropy for integer targets and
            mean square error for others.
        checkpointed: find the gradient by the costate sweep, in the memory of √K steps instead of K, for one
            evaluation of each step more; then ``backward()`` can be called once, for first derivatives.
        params: names of parameters or modules to adapt (a head alone is ANIL); the others are learned too, by the
            outer loop alone. All by default.
        rule: inner optimizer in place of plain descent at ``lr`` (`bolza.systems.SGD`, `bolza.systems.Adam`).
        statistics: for batch normalisation in training mode. ``"batch"``: each set by its own statistics, so that a
            prediction depends on the other queries; ``"support"``: the query by the statistics of the support
            set, task by task. In evaluation mode the running averages are used as they are.
        vectorized: batch the tasks by ``torch.func.vmap``, or go through them one by one, for networks that it cannot
            batch; by default it batches all but recurrent layers of torch.

    Raises:
        ArgumentError: lr or steps is not positive, or an argument is unknown.
        DataError: (when called) support and query are not pairs ``(x, y)`` of the same number of tasks.
        DivergenceError: (when called) the outer loss is not finite.

    Reference: Finn, Abbeel & Levine (2017), algorithm 1; a mean over tasks in place of their sum.

    Example:
        >>> from bolza.data import Sinusoids
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch._C.Generator object at ...>
        >>> net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 1))
        >>> maml, tasks = MAML(net, lr=0.01, steps=5), Sinusoids(shots=5, queries=10)
        >>> outer = torch.optim.Adam(net.parameters(), lr=1e-3)
        >>> for step in range(3):
        ...     outer.zero_grad()
        ...     maml(*tasks.sample(8)).backward()
        ...     outer.step()
        >>> one = tasks.sample(1)
        >>> learned = maml.adapt(one.support[0][0], one.support[1][0])       # an ordinary network
        >>> learned(one.query[0][0]).shape
        torch.Size([10, 1])
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.01,
        steps: int = 5,
        first_order: bool = False,
        *,
        loss: Loss | None = None,
        checkpointed: bool = False,
        params: Iterable[str] | None = None,
        rule: UpdateRule | None = None,
        statistics: Statistics = "batch",
        vectorized: bool | None = None,
    ) -> None:
        super().__init__(model, loss, lr if rule is None else rule, steps, params, statistics, vectorized)
        self.mode: Mode = "first_order" if first_order else "checkpointed" if checkpointed else "reverse"
        check_mode(self.mode)

    def forward(self, support: TaskData, query: TaskData) -> Tensor:
        """Mean loss on the query sets after adaptation to the support sets.

        Args:
            support: ``(x, y)``, each tensor ``(tasks, shots, …)``.
            query: ``(x, y)``, each tensor ``(tasks, queries, …)``.
        """
        return outer_loss(self, support, query, self.mode, self.controls())

    def controls(self) -> dict[str, Any]:
        """Hyper-parameters of an inner step."""
        found = self.rule.controls()
        plain = getattr(self.rule, "lr", None)
        return (
            {**found, "lr": plain}
            if isinstance(plain, int | float) and self.mode != "checkpointed"
            else found
        )
