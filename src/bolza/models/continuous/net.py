r"""ContinuousNet: residual networks whose graph is a choice, not a property of the weights.

The parameters live on K cells of depth. A *manifestation* is a numerical method with a number of steps; one set of
parameters has many. Where the method is of high order, the network trained with it hardly depends on the steps, and
may be evaluated with other methods and other depths. *Refinement* doubles the cells during training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError
from bolza.core.reference import Reference, cites
from bolza.models.continuous.block import ContinuousBlock
from bolza.models.continuous.trajectories import Piecewise
from bolza.models.mlp import activation_module, positive
from bolza.systems.ode import RungeKutta

__all__ = ["ContinuousNet", "continuous_cnn", "continuous_mlp"]

QUEIRUGA = Reference(
    "queiruga2020continuous",
    "Queiruga, Alejandro F. and Erichson, N. Benjamin and Taylor, Dane and Mahoney, Michael W.",
    "Continuous-in-Depth Neural Networks",
    2020,
    arxiv="2008.02389",
)


@cites(QUEIRUGA)
class ContinuousNet(nn.Sequential):
    r"""A chain with blocks of continuous depth: trained at one depth, run at any.

    An ``nn.Sequential`` whose :class:`ContinuousBlock` entries take method and steps from the call. See
    :func:`continuous_mlp` and :func:`continuous_cnn` for ready ones.

    Args:
        *layers: modules, at least one of them a :class:`ContinuousBlock`.

    Raises:
        ArgumentError: there is no such block among the layers.

    Reference: Queiruga, Erichson, Taylor & Mahoney (2020), arXiv:2008.02389, §3 to §5. Departure: the copies that
    refinement makes carry over no state of the optimizer.

    Example:
        >>> net = continuous_mlp(64, 10, cells=2)
        >>> x = torch.zeros(5, 64)
        >>> bool(torch.equal(net(x), net(x, method="rk4", steps=2)))
        True
        >>> net.refine()
        >>> net.blocks[0].steps
        4
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        if not self.blocks:
            raise ArgumentError(
                f"none of the {len(layers)} layers is a ContinuousBlock: there is no depth to choose"
            )

    @property
    def blocks(self) -> list[ContinuousBlock]:
        """The blocks of continuous depth, in order."""
        return [layer for layer in self if isinstance(layer, ContinuousBlock)]

    def forward(  # type: ignore[override]
        self, x: Tensor, method: str | RungeKutta | None = None, steps: int | None = None
    ) -> Tensor:
        """The output, by the blocks' own methods and steps or by those given.

        Args:
            x: batch of inputs.
            method: for every block, instead of its own.
            steps: for every block, instead of its own.
        """
        for layer in self:
            x = layer(x, method, steps) if isinstance(layer, ContinuousBlock) else layer(x)
        return x

    def refine(self, factor: int = 2, noise: float = 0.0, generator: torch.Generator | None = None) -> None:
        """Cut every cell of every block into several with the same parameters, and take as many more steps.

        At an equal number of steps the output is the same to the last bit. There are new parameters then: make a new
        optimizer.

        Args:
            factor: new cells for each old one.
            noise: relative noise on the copies, so that they need not learn alike.
            generator: for the noise.

        Raises:
            UnsupportedError: a block's parameters do not come in cells.
        """
        for block in self.blocks:
            block.refine(factor, noise, generator)

    @torch.no_grad()
    def recalibrate(
        self,
        batches: Iterable[Any],
        method: str | RungeKutta | None = None,
        steps: int | None = None,
    ) -> None:
        """Take the running statistics of all normalisation layers anew, for another manifestation.

        Running means and variances are averages over the states that one method and number of steps pass through;
        with another, the states are others.

        Args:
            batches: batches of inputs, or pairs of inputs and targets.
            method: as in the call.
            steps: as in the call.

        Raises:
            ArgumentError: there is no batch.
        """
        layers = [
            m
            for m in self.modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
        ]
        rest = iter(batches)
        first = next(rest, None)
        if first is None:
            raise ArgumentError("batches is empty: there is nothing to take the statistics from")
        kept = [(m, m.momentum) for m in layers]
        modes = [(m, m.training) for m in self.modules()]
        self.eval()
        try:
            for m in layers:
                m.reset_running_stats()
                m.momentum = None  # an average over all calls, each of the same weight
                m.train()
            for batch in chain([first], rest):
                self(batch[0] if isinstance(batch, (tuple, list)) else batch, method, steps)
        finally:
            for m, momentum in kept:
                m.momentum = momentum
            for module, training in modes:
                module.training = training


def continuous_mlp(
    in_features: int,
    out_features: int,
    *,
    width: int = 32,
    hidden: int | None = None,
    cells: int = 4,
    horizon: float = 1.0,
    method: str | RungeKutta = "rk4",
    steps: int | None = None,
    activation: str | Callable[[], nn.Module] = "tanh",
    gradient: str = "autograd",
) -> ContinuousNet:
    r"""A :class:`ContinuousNet` of vectors: linear, a block with the field W₂ σ(W₁ x + b₁) + b₂, linear.

    Args:
        in_features: length of the input.
        out_features: length of the output.
        width: length of the state.
        hidden: neurons in the field; ``width`` by default.
        cells: cells of depth, each with its own field.
        horizon: time that the block covers; each step of K steps moves the state by horizon / K times the field.
        method: integrator.
        steps: number of steps, one a cell by default.
        activation: name or class.
        gradient: as for :class:`ContinuousBlock`.

    Returns:
        The network, in PyTorch's default initialisation.

    Raises:
        ArgumentError: a size is not positive.

    Example:
        >>> continuous_mlp(64, 10, cells=4, horizon=8.0)(torch.zeros(2, 64)).shape
        torch.Size([2, 10])
    """
    hidden = width if hidden is None else hidden
    positive(in_features=in_features, out_features=out_features, width=width, hidden=hidden, cells=cells)

    def field() -> nn.Module:
        return nn.Sequential(
            nn.Linear(width, hidden), activation_module(activation), nn.Linear(hidden, width)
        )

    block = ContinuousBlock(
        Piecewise(field, cells),
        horizon=horizon,
        method=method,
        steps=cells if steps is None else steps,
        gradient=gradient,
    )
    return ContinuousNet(nn.Linear(in_features, width), block, nn.Linear(width, out_features))


def continuous_cnn(
    in_channels: int = 1,
    out_features: int = 10,
    *,
    widths: tuple[int, ...] = (16, 32),
    cells: int = 2,
    horizon: float = 1.0,
    method: str | RungeKutta = "rk4",
    steps: int | None = None,
    scale: float = 1.0,
    gradient: str = "autograd",
) -> ContinuousNet:
    r"""A :class:`ContinuousNet` of images: blocks of continuous depth, with residual units of stride 2 between them.

    The field is conv, ReLU, norm, conv, ReLU, norm, times ``scale``, with norms that keep statistics of their own in
    every cell. Between blocks a residual unit halves the image and changes the number of channels.

    Args:
        in_channels: channels of the image.
        out_features: length of the output.
        widths: channels of each block.
        cells: cells of each block.
        horizon: time that each block covers.
        method: integrator.
        steps: number of steps of each block, one a cell by default.
        scale: factor of the field.
        gradient: as for :class:`ContinuousBlock`.

    Returns:
        The network; inputs ``(batch, in_channels, height, width)``.

    Raises:
        ArgumentError: a size is not positive, or no width is given.

    Reference: Queiruga, Erichson, Taylor & Mahoney (2020), arXiv:2008.02389, §3. Departure: the stem is one
    convolution with a norm, the head an average over the image.

    Example:
        >>> continuous_cnn(widths=(4, 8))(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    if not widths:
        raise ArgumentError("widths is empty: give the channels of at least one block")
    positive(in_channels=in_channels, out_features=out_features, cells=cells, **{"widths": min(widths)})
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False),
        nn.BatchNorm2d(widths[0]),
        nn.ReLU(),
    ]
    for i, width in enumerate(widths):
        if i:
            layers.append(_Stitch(widths[i - 1], width))
        layers.append(
            ContinuousBlock(
                Piecewise(partial(_ConvField, width, scale), cells),
                horizon=horizon,
                method=method,
                steps=cells if steps is None else steps,
                gradient=gradient,
            )
        )
    return ContinuousNet(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], out_features))


class _ConvField(nn.Module):
    """Twice conv, ReLU, norm; times a scale."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(torch.relu(self.conv1(x)))
        h = self.norm2(torch.relu(self.conv2(h)))
        return h if self.scale == 1 else self.scale * h


class _Stitch(nn.Module):
    """A residual unit of stride 2 between two blocks."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.skip = nn.Conv2d(channels, width, 1, stride=2, bias=False)
        self.conv1 = nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(torch.relu(self.conv1(x)))
        return self.skip(x) + self.norm2(torch.relu(self.conv2(h)))
