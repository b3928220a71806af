r"""Feed-forward nets that take their input again at every block: non-amplifying (NAIS), and residual.

    NAIS:      z ← z + φ(−A z + U x + b),   A = min(1, δ/‖RᵀR‖_F) RᵀR + ε I,   δ = 1 − 2ε
    residual:  z ← z + φ(  W z + U x + b)

With 0 ≤ φ′ ≤ 1 and the input held, the Jacobian I − D A of a NAIS block (D = diag φ′) has its eigenvalues in
[0, 1]: repeated, it settles. Its largest singular value may exceed 1, as D A is not symmetric.

Reference: Ciccone, Gallieri, Masci, Osendorfer & Gomez (2018), arXiv:1804.07209; used for forward–backward stochastic
equations by Güler, Laignelet & Parpas (2019), arXiv:1910.11623.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError
from bolza.core.reference import Reference, cites
from bolza.models.mlp import activation_module, positive

__all__ = ["InputResidualNet", "NAISBlock", "NAISNet", "Sine"]

REFERENCE = Reference(
    "ciccone2018naisnet",
    "Ciccone, Marco and Gallieri, Marco and Masci, Jonathan and Osendorfer, Christian and Gomez, Faustino",
    "NAIS-Net: Stable Deep Networks from Non-Autonomous Differential Equations",
    2018,
    arxiv="1804.07209",
)


class Sine(nn.Module):
    """The activation sin x: smooth, so that a network has a gradient and a curvature to speak of.

    Example:
        >>> Sine()(torch.zeros(2))
        tensor([0., 0.])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return sin x."""
        return torch.sin(x)


@cites(REFERENCE)
class NAISBlock(nn.Module):
    r"""A residual block that, applied again and again with its input held, settles.

        z ← z + φ(−A z + U x + b),   A = min(1, δ/‖RᵀR‖_F) RᵀR + ε I,   δ = 1 − 2ε

    Args:
        width: entries of the state z.
        in_features: entries of the input x.
        epsilon: ε in (0, 1/2): least damping.
        activation: φ, by name or class; with 0 ≤ φ′ ≤ 1 for the statement on eigenvalues (tanh, ReLU;
            a sine only near zero).

    Raises:
        ArgumentError: a size is not positive or ε is outside (0, 1/2).

    Reference: Ciccone et al. (2018), arXiv:1804.07209, §3. The scale is δ/‖RᵀR‖: a code in circulation divides by
    √‖RᵀR‖, which leaves a norm of √(δ‖RᵀR‖) > δ and no bound.

    Example:
        >>> block = NAISBlock(4, 2, activation="tanh")
        >>> bool(torch.linalg.matrix_norm(block.damping(), 2) <= 1)
        True
    """

    def __init__(
        self,
        width: int,
        in_features: int,
        epsilon: float = 0.01,
        activation: str | Callable[[], nn.Module] = Sine,
    ) -> None:
        super().__init__()
        positive(width=width, in_features=in_features)
        if not 0 < epsilon < 0.5:
            raise ArgumentError(f"epsilon={epsilon} must lie between 0 and 1/2")
        self.epsilon = epsilon
        self.R = nn.Parameter(torch.empty(width, width))
        nn.init.xavier_uniform_(self.R)
        self.input = nn.Linear(in_features, width)
        self.activation = activation_module(activation)

    def damping(self) -> Tensor:
        """Return A, symmetric with eigenvalues in [ε, 1 − ε]."""
        gram = self.R.mT @ self.R
        scale = (1 - 2 * self.epsilon) / torch.linalg.matrix_norm(gram).clamp_min(1 - 2 * self.epsilon)
        return scale * gram + self.epsilon * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Return the next state for z of shape ``(*batch, width)`` and x of shape ``(*batch, in_features)``."""
        return z + self.activation(self.input(x) - z @ self.damping())


class _ResidualBlock(nn.Module):
    def __init__(self, width: int, in_features: int, activation: str | Callable[[], nn.Module]) -> None:
        super().__init__()
        self.state = nn.Linear(width, width, bias=False)
        self.input = nn.Linear(in_features, width)
        self.activation = activation_module(activation)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return z + self.activation(self.state(z) + self.input(x))


class _InputNet(nn.Module):
    """First layer, blocks that see the input again, last layer."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        width: int,
        depth: int,
        activation: str | Callable[[], nn.Module],
        block: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        positive(in_features=in_features, out_features=out_features, width=width, depth=depth)
        self.first = nn.Linear(in_features, width)
        self.activation = activation_module(activation)
        self.blocks = nn.ModuleList(block() for _ in range(depth - 1))
        self.last = nn.Linear(width, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for x of shape ``(*batch, in_features)``."""
        z = self.activation(self.first(x))
        for block in self.blocks:
            z = block(z, x)
        return self.last(z)


@cites(REFERENCE)
class NAISNet(_InputNet):
    """A net of non-amplifying blocks, each of which takes the input again.

    Args:
        in_features: entries of the input.
        out_features: entries of the output.
        width: entries of the state.
        depth: hidden layers: one that makes the state, and ``depth − 1`` :class:`NAISBlock`.
        epsilon: least damping ε of each block.
        activation: name or class; a sine by default.

    Raises:
        ArgumentError: a size is not positive or ε is outside (0, 1/2).

    Reference: Ciccone et al. (2018), arXiv:1804.07209. Departure: blocks have weights of their own and act once.

    Example:
        >>> NAISNet(3, width=8, depth=2)(torch.zeros(5, 3)).shape
        torch.Size([5, 1])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int = 1,
        width: int = 64,
        depth: int = 4,
        epsilon: float = 0.01,
        activation: str | Callable[[], nn.Module] = Sine,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            width,
            depth,
            activation,
            lambda: NAISBlock(width, in_features, epsilon, activation),
        )


class InputResidualNet(_InputNet):
    """A residual net of which each block takes the input again.

    Args:
        in_features: entries of the input.
        out_features: entries of the output.
        width: entries of the state.
        depth: hidden layers: one that makes the state, and ``depth − 1`` residual blocks.
        activation: name or class; a sine by default.

    Raises:
        ArgumentError: a size is not positive.

    Reference: the residual net of Güler, Laignelet & Parpas (2019), arXiv:1910.11623.

    Example:
        >>> InputResidualNet(3, width=8, depth=2)(torch.zeros(5, 3)).shape
        torch.Size([5, 1])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int = 1,
        width: int = 64,
        depth: int = 4,
        activation: str | Callable[[], nn.Module] = Sine,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            width,
            depth,
            activation,
            lambda: _ResidualBlock(width, in_features, activation),
        )
