r"""The information plane: (I(X;T), I(T;Y)) of each layer T along a training run.

The estimator, with its bins or its noise, is an argument: what is drawn is a property of it as much as of the
network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError
from bolza.core.reference import cites
from bolza.information.estimators import SHWARTZ_ZIV, InformationEstimate

__all__ = ["InformationPlane", "layer_information", "layer_states"]

Estimator = Callable[[Tensor, Tensor], InformationEstimate]


def layer_states(
    model: nn.Module, x: Tensor, layers: Iterable[str] | None = None, chunk: int = 1024
) -> dict[str, Tensor]:
    """What each layer gives for a batch of inputs, in evaluation mode; the model is left as it was.

    Args:
        model: the network.
        x: inputs, ``(inputs, ...)``.
        layers: names of modules; the activation modules and the last leaf by default, or all leaves where the
            network has no activation modules.
        chunk: inputs in one forward pass.

    Returns:
        Name → ``(inputs, units)``, in the order in which they are first called; where a module is called more than
        once, its last call counts.

    Raises:
        ArgumentError: a name is no module of the network, or the module is never called.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> {name: tuple(t.shape) for name, t in layer_states(net, torch.randn(5, 3)).items()}
        {'1': (5, 4), '2': (5, 2)}
    """
    modules = dict(model.named_modules())
    leaves = {name: m for name, m in modules.items() if not any(True for _ in m.children())}
    if layers is None:
        active = [n for n, m in leaves.items() if type(m).__module__ == nn.modules.activation.__name__]
        wanted = set(active) if active else set(leaves)
    else:
        wanted = set(layers)
        unknown = sorted(wanted - set(modules))
        if unknown:
            raise ArgumentError(
                f"layers names {', '.join(map(repr, unknown))}, which the network does not have"
            )
    found: dict[str, list[Tensor]] = {}
    last: list[str] = []

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            tensor = _first_tensor(out)
            if tensor is not None and len(tensor) == size:
                part[name] = tensor.detach().reshape(size, -1)
                last[:] = [name]

        return hook

    watched = modules if layers is not None else leaves
    handles = [m.register_forward_hook(note(name)) for name, m in watched.items()]
    try:
        with torch.no_grad(), _evaluating(model):
            for piece in x.split(chunk):
                part: dict[str, Tensor] = {}
                size = len(piece)
                model(piece)
                for name, value in part.items():
                    if name in wanted or (layers is None and name == last[0]):
                        found.setdefault(name, []).append(value)
    finally:
        for handle in handles:
            handle.remove()
    missing = sorted(set(layers or ()) - set(found))
    if missing:
        raise ArgumentError(f"the layers {', '.join(map(repr, missing))} were not called, or gave no tensor")
    return {name: torch.cat(parts) for name, parts in found.items()}


@cites(SHWARTZ_ZIV)
def layer_information(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    estimator: Estimator,
    layers: Iterable[str] | None = None,
) -> dict[str, InformationEstimate]:
    """I(X;T) and I(T;Y) of each layer T of a network as it is.

    Args:
        model: the network; evaluated without dropout, and left as it was.
        x: inputs, each as likely as the others; all of them where they can be listed.
        y: label of each input, integers.
        estimator: (states, labels) → :class:`InformationEstimate`, such as
            ``partial(binned_information, width=1/15)``.
        layers: as in :func:`layer_states`.

    Returns:
        Name → estimate, in the order of the layers.

    Reference: Shwartz-Ziv & Tishby (2017), §3.

    Example:
        >>> from functools import partial
        >>> from bolza.information import binned_information
        >>> bits = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
        >>> net = nn.Sequential(nn.Identity())
        >>> layer_information(net, bits, bits[:, 0].long(), partial(binned_information, width=0.5))["0"].input
        3.0
    """
    return {name: estimator(t, y) for name, t in layer_states(model, x, layers).items()}


@dataclass
class InformationPlane:
    """Reads the information plane at chosen steps of a run; may be given to ``train`` as ``progress``.

    Args:
        model: the network that is being trained; it is only read.
        x: inputs, all of them where they can be listed.
        y: label of each input.
        estimator: as in :func:`layer_information`.
        at: steps at which to read; every step by default.
        names: layers to read, as in :func:`layer_states`.

    Attributes:
        steps: steps that were read.
        readings: for each of them, name → estimate.

    Example:
        >>> from functools import partial
        >>> from bolza.information import binned_information
        >>> bits = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
        >>> net = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
        >>> plane = InformationPlane(net, bits, bits[:, 0].long(), partial(binned_information, width=0.1), at=[0])
        >>> plane.note(0)
        >>> plane.layers, plane.curve("1")[0] <= 3
        (['1'], tensor([True]))
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    estimator: Estimator
    at: Sequence[int] | None = None
    names: Sequence[str] | None = None
    steps: list[int] = field(default_factory=list)
    readings: list[dict[str, InformationEstimate]] = field(default_factory=list)

    def __call__(self, step: int, steps: int, values: Mapping[str, float] | None = None) -> None:
        """The form of a ``progress`` callback."""
        self.note(step)

    def note(self, step: int) -> None:
        """Read the plane now, if ``step`` is one of those wanted and was not read yet."""
        if (self.at is not None and step not in self.at) or step in self.steps:
            return
        self.steps.append(step)
        self.readings.append(layer_information(self.model, self.x, self.y, self.estimator, self.names))

    @property
    def layers(self) -> list[str]:
        """Names of the layers, first to last."""
        return list(self.readings[0]) if self.readings else []

    def curve(self, layer: str) -> tuple[Tensor, Tensor]:
        """I(X;T) and I(T;Y) of one layer at each reading, in bits: two tensors ``(readings,)``."""
        if layer not in self.layers:
            raise ArgumentError(f"layer {layer!r} was not read: choose one of {', '.join(self.layers)}")
        found = [reading[layer] for reading in self.readings]
        return torch.tensor([e.input for e in found]), torch.tensor([e.output for e in found])


def _first_tensor(out: Any) -> Tensor | None:
    if isinstance(out, tuple | list) and out:
        return _first_tensor(out[0])
    return out if isinstance(out, Tensor) and out.ndim > 0 else None


@contextmanager
def _evaluating(model: nn.Module) -> Any:
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode
