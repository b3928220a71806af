r"""Meta-SGD: the rates of the inner steps are learned with the initial point.

    θ^τ_{k+1} = θ^τ_k − α ∘ ∇ℓ_τ(θ^τ_k),   min over θ and α of (1/M) Σ_τ Φ_τ(θ^τ_K)

The rates are ordinary controls of the training clock: ∂J/∂α = −Σ_τ Σ_k p^τ_{k+1} ∘ ∇ℓ_τ(θ^τ_k).

Reference: Li, Zhou, Chen & Li (2017), arXiv:1707.09835.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from bolza.core.reference import Reference, cites
from bolza.meta.learner import Learner, Loss, Statistics, TaskData
from bolza.meta.maml import outer_loss
from bolza.meta.meta_gradient import Mode
from bolza.ops.trees import Tree

__all__ = ["MetaSGD"]

LI = Reference(
    "li2017metasgd",
    "Li, Zhenguo and Zhou, Fengwei and Chen, Fei and Li, Hang",
    "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning",
    2017,
    arxiv="1707.09835",
)


@cites(LI)
class MetaSGD(Learner):
    r"""Meta-learning of the initial parameters and of one inner rate for each of them.

        θ^τ_{k+1} = θ^τ_k − α ∘ ∇ℓ_τ(θ^τ_k),   min over θ and α

    Give the outer optimizer ``metasgd.parameters()``: those of the network and ``rates``. Rates may become negative.

    Args:
        model: the network.
        lr: what all rates α begin with.
        steps: K, inner steps; the rates are the same in all of them.
        first_order: count inner gradients as constants; the rates still have theirs.
        loss: as for :class:`MAML`.
        checkpointed: as for :class:`MAML`.
        params: as for :class:`MAML`.
        statistics: as for :class:`MAML`.
        vectorized: as for :class:`MAML`.

    Attributes:
        rates: α, one parameter for each adapted one, of its shape.

    Raises:
        ArgumentError: lr or steps is not positive, or an argument is unknown.

    Reference: Li, Zhou, Chen & Li (2017), algorithm 1. Departures: several inner steps; rates that begin equal.

    Example:
        >>> learner = MetaSGD(nn.Linear(1, 1), lr=0.1)
        >>> support = torch.ones(2, 5, 1), torch.zeros(2, 5, 1)
        >>> learner(support, support).backward()
        >>> [rate.grad.shape for rate in learner.rates]
        [torch.Size([1, 1]), torch.Size([1])]
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.01,
        steps: int = 1,
        first_order: bool = False,
        *,
        loss: Loss | None = None,
        checkpointed: bool = False,
        params: Iterable[str] | None = None,
        statistics: Statistics = "batch",
        vectorized: bool | None = None,
    ) -> None:
        super().__init__(model, loss, lr, steps, params, statistics, vectorized)
        self.mode: Mode = "first_order" if first_order else "checkpointed" if checkpointed else "reverse"
        self.rates = nn.ParameterList(
            nn.Parameter(torch.full_like(p, lr, requires_grad=True)) for p in self.split()[0].values()
        )

    def controls(self) -> dict[str, Tree]:
        """Hyper-parameters of an inner step: the rates by the names of their parameters."""
        return {"lr": dict(zip(self._adapted, self.rates, strict=True))}

    def forward(self, support: TaskData, query: TaskData) -> Tensor:
        """Mean loss on the query sets after adaptation to the support sets.

        Args:
            support: ``(x, y)``, each tensor ``(tasks, shots, …)``.
            query: ``(x, y)``, each tensor ``(tasks, queries, …)``.
        """
        return outer_loss(self, support, query, self.mode, self.controls())
