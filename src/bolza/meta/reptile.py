r"""Reptile: move the initial point towards where the tasks lead it.

    θ ← θ + ε (1/M) Σ_τ (θ^τ_K − θ)

Expanded in the inner rate the update holds the gradient of the mean loss and, from the second inner step on, a part
that aligns the gradients of successive steps; no Hessian is ever formed.

Reference: Nichol, Achiam & Schulman (2018), arXiv:1803.02999.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from bolza.core.reference import Reference, cites
from bolza.meta.learner import Learner, Loss, Statistics, TaskData, check_pair
from bolza.meta.meta_gradient import carry, check_finite
from bolza.ops.trees import tree_detach
from bolza.systems.training import UpdateRule

__all__ = ["Reptile"]

NICHOL = Reference(
    "nichol2018reptile",
    "Nichol, Alex and Achiam, Joshua and Schulman, John",
    "On First-Order Meta-Learning Algorithms",
    2018,
    arxiv="1803.02999",
)


@cites(NICHOL)
class Reptile(Learner):
    r"""Meta-learning without second derivatives: the gradient is the way back from where the tasks lead.

        ∇ := θ − (1/M) Σ_τ θ^τ_K

    so that ``torch.optim.SGD(lr=ε)`` on it is θ ← θ + ε · mean(θ^τ_K − θ); any other optimizer will do. The scalar that
    ``reptile(support)`` returns is the mean loss after adaptation, for the log; its gradient is the one above.

    Args:
        model: the network.
        lr: α, rate of the inner steps.
        steps: K, inner steps; with one, the gradient is α times that of the mean loss.
        loss: as for :class:`MAML`.
        params: as for :class:`MAML`; what is not adapted has no gradient and stays.
        rule: inner optimizer in place of plain descent at ``lr``.
        statistics: as for :class:`MAML`, for predictions.
        vectorized: as for :class:`MAML`.

    Raises:
        ArgumentError: lr or steps is not positive, or an argument is unknown.

    Reference: Nichol, Achiam & Schulman (2018), algorithms 1 and 2. Departure: each inner step sees the whole support
    set of its task, where the paper draws minibatches of a larger one.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> learner, outer = Reptile(net, lr=0.25, steps=1), torch.optim.SGD(net.parameters(), lr=1.0)
        >>> _ = nn.init.ones_(net.weight)
        >>> learner((torch.ones(2, 5, 1), torch.zeros(2, 5, 1))).backward()      # each task: w ← w − 0.25 · 2w
        >>> outer.step()
        >>> net.weight.item()
        0.5
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.01,
        steps: int = 5,
        *,
        loss: Loss | None = None,
        params: Iterable[str] | None = None,
        rule: UpdateRule | None = None,
        statistics: Statistics = "batch",
        vectorized: bool | None = None,
    ) -> None:
        super().__init__(model, loss, lr if rule is None else rule, steps, params, statistics, vectorized)

    def forward(self, support: TaskData, query: TaskData | None = None) -> Tensor:
        """Mean loss after adaptation, on the query sets if they are given; its gradient is θ − mean θ_K.

        Args:
            support: ``(x, y)``, each tensor ``(tasks, shots, …)``.
            query: ``(x, y)``, each tensor ``(tasks, queries, …)``; only the value depends on it.
        """
        check_pair(support if query is None else query, "support" if query is None else "query")
        params, shared = self.split()
        adaptation = self.adaptation(support)
        with torch.no_grad(), self.evaluation():
            adapted = self._adapt(adaptation)
            fixed = tree_detach(shared)
            if query is None:
                losses = self.inner_losses()(adapted, fixed, support)
            else:
                losses = self.outer_losses()(adapted, fixed, support, query)
            value = losses.mean()
            check_finite(value)
            gradients = [p - adapted[name].mean(0) for name, p in params.items()]
        return carry(value, gradients, list(params.values()))
