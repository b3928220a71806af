"""One forward and one backward pass through a system, as a record."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bolza.core.errors import ArgumentError
from bolza.ops.trees import Tree

__all__ = ["Trajectory"]


@dataclass(frozen=True)
class Trajectory:
    """States, controls and, after a backward pass, costates of one run of a system.

    Attributes:
        states: x_0 … x_T, trees of tensors.
        controls: u_0 … u_{T−1}.
        costates: p_0 … p_T with p_t = ∂J/∂x_t; the leaves that have no derivative hold ``None``.
        gradients: ∂J/∂u_t = ∇_u H_t, one tree a step.
        value: the cost J, a scalar.

    Example:
        >>> import torch
        >>> Trajectory(states=(torch.zeros(1), torch.ones(1)), controls=({},)).horizon
        1
    """

    states: tuple[Tree, ...]
    controls: tuple[Tree, ...]
    costates: tuple[Tree, ...] | None = None
    gradients: tuple[Tree, ...] | None = None
    value: Tensor | None = None

    @property
    def horizon(self) -> int:
        """Number of steps."""
        return len(self.controls)

    def gradient_by_name(self) -> dict[str, Tensor]:
        """Gradient of J by parameter name: a parameter that several steps share gets the sum.

        Needs controls that are dicts of tensors, as those of a network are.

        Raises:
            ArgumentError: there was no backward pass, or the controls are not dicts.
        """
        if self.gradients is None:
            raise ArgumentError(
                "the trajectory has no gradients: call adjoint(system, cost, trajectory) first"
            )
        total: dict[str, Tensor] = {}
        for gradient in self.gradients:
            if not isinstance(gradient, dict):
                raise ArgumentError(
                    f"the controls are of type {type(gradient).__name__}, not dicts of tensors"
                )
            for name, value in gradient.items():
                total[name] = total[name] + value if name in total else value
        return total
