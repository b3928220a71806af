r"""Residual networks in the mean-field limit: blocks of size 1/L, drawn from one law per depth.

    x_{l+1} = x_l + (a/L) U_l σ(W_l x_l),   l = 0 … L−1

which is forward Euler for ẋ = U(τ) σ(W(τ) x) over the time a. As L grows the blocks become samples of a distribution
of parameters over depth, ẋ = ∫ f(x, θ) ρ(θ, τ) dθ, and neighbours are exchangeable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError
from bolza.core.reference import Reference, cites
from bolza.models.continuous.block import ContinuousBlock
from bolza.models.continuous.trajectories import Piecewise
from bolza.models.mlp import activation_module, positive

__all__ = ["MeanFieldResNet"]

LU = Reference(
    "lu2020mean",
    "Lu, Yiping and Ma, Chao and Lu, Yulong and Lu, Jianfeng and Ying, Lexing",
    "A Mean-field Analysis of Deep ResNet and Beyond: Towards Provable Optimization Via Overparameterization "
    "From Depth",
    2020,
    venue="International Conference on Machine Learning",
    arxiv="2003.05508",
)


class _Ordered(Piecewise):
    """Cells that are visited in an order of their own; the order is a buffer."""

    order: Tensor

    def __init__(self, field: Callable[[], nn.Module], cells: int) -> None:
        super().__init__(field, cells)
        self.register_buffer("order", torch.arange(cells))
        self._places = list(range(cells))

    def arrange(self, order: Sequence[int]) -> None:
        self.order.copy_(torch.as_tensor(list(order)))
        self._places = [int(k) for k in order]

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        self._places = [int(k) for k in self.order.tolist()]

    def forward(self, s: float, x: Tensor, u: int) -> Tensor:
        return self.cells[self._places[u]](x)

    def refine(self, factor: int = 2, noise: float = 0.0, generator: torch.Generator | None = None) -> None:
        self.cells = nn.ModuleList([self.cells[k] for k in self._places])
        super().refine(factor, noise, generator)
        self.register_buffer("order", torch.arange(len(self.cells), device=self.order.device))
        self._places = list(range(len(self.cells)))


@cites(LU)
class MeanFieldResNet(nn.Module):
    r"""A residual network with blocks of size a/L, whose hyper-parameters do not depend on its depth L.

    A linear layer, L blocks x ← x + (a/L) U σ(W x + b), a linear layer. The gradient of one block scales as 1/L, so
    its learning rate must be multiplied by L: :meth:`parameter_groups` does that.

    Args:
        in_features: length of the input.
        out_features: length of the output.
        width: length of the state.
        hidden: neurons of a block.
        depth: number of blocks L.
        scale: a; ``a = L`` gives an ordinary residual network, with blocks of size 1.
        activation: name or class.

    Raises:
        ArgumentError: a size or the scale is not positive.

    Reference: Lu, Ma, Lu, Lu & Ying (2020), arXiv:2003.05508, §2 and §5. Departure: the input and output layers are
    trained as well.

    Example:
        >>> net = MeanFieldResNet(64, 10, depth=16)
        >>> groups = net.parameter_groups(lr=0.05)
        >>> [group["lr"] for group in groups]
        [0.05, 0.8]
        >>> optimizer = torch.optim.SGD(groups, momentum=0.9)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        width: int = 32,
        hidden: int = 16,
        depth: int = 16,
        scale: float = 1.0,
        activation: str | Callable[[], nn.Module] = "tanh",
    ) -> None:
        super().__init__()
        positive(in_features=in_features, out_features=out_features, width=width, hidden=hidden, depth=depth)
        if not (math.isfinite(scale) and scale > 0):
            raise ArgumentError(f"scale={scale}: the size of all blocks together must be positive")

        def field() -> nn.Module:
            layers = (
                nn.Linear(width, hidden),
                activation_module(activation),
                nn.Linear(hidden, width, bias=False),
            )
            return nn.Sequential(*layers)

        self.stem = nn.Linear(in_features, width)
        self.body = ContinuousBlock(_Ordered(field, depth), horizon=scale, method="euler", steps=depth)
        self.head = nn.Linear(width, out_features)

    @property
    def depth(self) -> int:
        """Number of blocks L."""
        return len(self._cells.cells)

    @property
    def _cells(self) -> _Ordered:
        cells = self.body.trajectory
        assert isinstance(cells, _Ordered)
        return cells

    @property
    def order(self) -> list[int]:
        """Which block stands at each depth."""
        return list(self._cells._places)

    def forward(self, x: Tensor) -> Tensor:
        """Batch of inputs to batch of scores."""
        return self.head(self.body(self.stem(x)))

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Groups for an optimizer of the gradient-descent family: rate ``lr``, and ``lr`` times L for the blocks.

        Adaptive optimizers such as Adam divide the size of the gradient out and need no such factor.

        Args:
            lr: learning rate of the input and output layers.
        """
        outer = [*self.stem.parameters(), *self.head.parameters()]
        return [{"params": outer, "lr": lr}, {"params": list(self.body.parameters()), "lr": lr * self.depth}]

    def permute(self, order: Sequence[int]) -> None:
        """Put the blocks into another order; parameters keep their names and their optimizer's state.

        Args:
            order: the block for each depth.

        Raises:
            ArgumentError: it is no permutation of the blocks.

        Example:
            >>> net = MeanFieldResNet(4, 2, depth=3)
            >>> net.permute([2, 0, 1])
            >>> net.order
            [2, 0, 1]
        """
        if sorted(order) != list(range(self.depth)):
            raise ArgumentError(f"order={list(order)} is no permutation of the {self.depth} blocks")
        self._cells.arrange(order)

    def swap_neighbours(self, generator: torch.Generator | None = None) -> None:
        """Swap each pair of neighbouring blocks with probability 1/2, the pairs starting at depth 0 or 1 at random.

        Called before each step of training it makes the network insensitive to the order of near blocks.

        Args:
            generator: for the draws.
        """
        order, first = self.order, int(torch.randint(2, (), generator=generator))
        coins = torch.rand(self.depth, generator=generator) < 0.5
        for at in range(first, self.depth - 1, 2):
            if coins[at]:
                order[at], order[at + 1] = order[at + 1], order[at]
        self.permute(order)

    def refine(self, factor: int = 2, noise: float = 0.0, generator: torch.Generator | None = None) -> None:
        """Make each block several of the same parameters, each a part of its size; make a new optimizer then.

        Args:
            factor: new blocks for each old one.
            noise: relative noise on the copies.
            generator: for the noise.
        """
        self.body.refine(factor, noise, generator)
