r"""Training with or without the steep directions of the loss.

    bulk   g − V Vᵀ g          top   V Vᵀ g          V = (u₁, …, u_k), refreshed every few steps

At the edge of stability the gradient lies almost wholly in the span V of the steepest directions, and yet little is
learned there: without it the loss falls as before, with it alone it does not fall.

Reference: Lowell (2022), *There is a Singularity in the Loss Landscape*.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError, ShapeError, UnsupportedError
from bolza.core.reference import cites
from bolza.stability.landscape import LOWELL

__all__ = ["ProjectOut", "Subspace", "project"]

Keep = Literal["bulk", "top"]


class Subspace(Protocol):
    """Directions of some parameters: ``params``, and ``subspace()`` → orthonormal columns ``(n, k)``.

    :class:`~bolza.stability.Sharpness` is one.
    """

    params: list[Tensor]

    def subspace(self) -> Tensor:
        """Directions at the present parameters, flat in the order of ``params``."""
        ...


def project(g: Tensor, V: Tensor, keep: Keep = "bulk") -> Tensor:
    """Part of g outside of the span of V (``"bulk"``), or inside (``"top"``).

    Args:
        g: flat vector ``(n,)``.
        V: orthonormal columns ``(n, k)``.
        keep: which part.

    Example:
        >>> project(torch.tensor([3.0, 4.0]), torch.tensor([[1.0], [0.0]]))
        tensor([0., 4.])
    """
    top = V @ (V.T @ g)
    return top if keep == "top" else g - top


@cites(LOWELL)
class ProjectOut(torch.optim.Optimizer):
    r"""Any optimizer, fed with the gradient outside of the steep directions, or with that inside alone.

    Momentum and other averages of the optimizer see projected gradients only; its weight decay is not projected. Cost:
    the optimizer's, 2nk operations for the projection, and a measurement of V every so many steps.

    Args:
        optimizer: does the steps; its groups are those of this one, so that schedulers work.
        subspace: measures V, for example ``Sharpness(model, loss, data, k=10)``. Parameters that it does not know count
            as outside of V.
        every: steps between two measurements.
        keep: ``"bulk"`` for g − VVᵀg, ``"top"`` for VVᵀg.

    Attributes:
        share: share of the gradient inside V at the last step.

    Raises:
        ArgumentError: ``every`` not positive, an unknown ``keep``, or no common parameter.
        UnsupportedError: the optimizer evaluates the loss itself (L-BFGS).

    Reference: Lowell (2022).

    Example:
        >>> from bolza.stability import Sharpness
        >>> net, x, y = torch.nn.Linear(2, 1), torch.randn(8, 2), torch.randn(8, 1)
        >>> loss = torch.nn.functional.mse_loss
        >>> optimizer = ProjectOut(torch.optim.SGD(net.parameters(), lr=0.1), Sharpness(net, loss, (x, y)), every=5)
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     loss(net(x), y).backward()
        ...     optimizer.step()
        >>> 0 <= optimizer.share <= 1
        True
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        subspace: Subspace,
        *,
        every: int = 20,
        keep: Keep = "bulk",
    ) -> None:
        if every < 1 or keep not in ("bulk", "top"):
            raise ArgumentError(f"every is {every} and keep {keep!r}: a positive number, and 'bulk' or 'top'")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise UnsupportedError(
                "LBFGS evaluates the loss itself, between projections: take another optimizer"
            )
        self._base = optimizer
        super().__init__(optimizer.param_groups, dict(optimizer.defaults))
        self.param_groups = optimizer.param_groups  # one list: schedulers change what the optimizer reads
        self.state = optimizer.state
        self.subspace, self.every, self.keep = subspace, every, keep
        self.share = float("nan")
        self._taken = 0
        self._vectors: Tensor | None = None
        if not self._known():
            raise ArgumentError(
                "subspace knows none of the optimizer's parameters: make it for the same model"
            )

    def _known(self) -> set[int]:
        return {id(p) for p in self.subspace.params} & {id(p) for g in self.param_groups for p in g["params"]}

    def __getstate__(self) -> dict[str, Any]:  # type: ignore[override]
        """What a copy needs: more than torch copies of an optimizer."""
        own = ("_base", "subspace", "every", "keep", "share", "_taken", "_vectors")
        return {**super().__getstate__(), **{name: vars(self)[name] for name in own}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Hand the group on to the optimizer."""
        if hasattr(self, "subspace"):
            self._base.add_param_group(param_group)
        else:  # while torch constructs this one from groups that the optimizer has
            super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step of the optimizer on the projected gradient.

        Args:
            closure: evaluates loss and gradient.

        Returns:
            What the closure returns.
        """
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        params = self.subspace.params
        if all(p.grad is None for g in self.param_groups for p in g["params"]):
            return value
        if self._vectors is None or self._taken % self.every == 0:
            vectors = self.subspace.subspace().detach()
            size = sum(p.numel() for p in params)
            if vectors.ndim != 2 or vectors.shape[0] != size:
                raise ShapeError(f"subspace gave the shape {tuple(vectors.shape)}: give columns ({size}, k)")
            self._vectors = vectors
        self._taken += 1
        with self._projected(params, self._vectors):
            self._base.step()
        return value

    @contextmanager
    def _projected(self, params: list[Tensor], vectors: Tensor) -> Iterator[None]:
        """Put projected gradients in the place of the true ones, for a moment."""
        held = [(p, p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
        mine = self._known()
        flat = torch.cat(
            [
                (torch.zeros_like(p) if p.grad is None or id(p) not in mine else p.grad).reshape(-1)
                for p in params
            ]
        ).to(vectors)
        inside = vectors @ (vectors.T @ flat)
        whole = sum(float(g.double().square().sum()) for _, g in held)
        self.share = float(inside.double().square().sum()) / whole if whole > 0 else float("nan")
        parts = dict(zip(map(id, params), inside.split([p.numel() for p in params]), strict=True))
        try:
            for p, g in held:
                top = parts[id(p)].view_as(p).to(g) if id(p) in mine else torch.zeros_like(g)
                p.grad = top if self.keep == "top" else g - top
            yield
        finally:
            for p, g in held:
                p.grad = g

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """State of the optimizer, with V and the number of steps."""
        measure: dict[str, Any] = getattr(self.subspace, "state_dict", dict)()
        return {
            **self._base.state_dict(),
            "project_out": {
                "taken": self._taken,
                "vectors": self._vectors,
                "subspace": copy.deepcopy(measure),
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Go on from a state of :meth:`state_dict`."""
        rest = {name: value for name, value in state_dict.items() if name != "project_out"}
        self._base.load_state_dict(rest)
        self.param_groups, self.state = self._base.param_groups, self._base.state
        mine = state_dict["project_out"]
        self._taken = mine["taken"]
        vectors = mine["vectors"]
        p = self.subspace.params[0]
        self._vectors = None if vectors is None else vectors.to(p.device)
        if hasattr(self.subspace, "load_state_dict"):
            self.subspace.load_state_dict(mine["subspace"])
