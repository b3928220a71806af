"""Weight matrices with the layers that apply them, and sums over what passes those layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.core.errors import UnsupportedError
from bolza.systems.trace import library_runs

__all__ = ["Field", "Hook", "Site", "counter", "counts", "precision", "rows_of", "sites_of", "watcher"]


@dataclass
class Field:
    """What a continuous-depth block integrates, and how often it was evaluated since the last step."""

    block: nn.Module
    module: nn.Module
    evaluations: int = 0

    def per_evaluation(self, passes: int) -> float:
        """What turns a signal into one of a single evaluation; not 1 where signals are per unit of time."""
        if getattr(self.block, "gradient", None) != "adjoint":
            return 1.0
        return abs(float(self.block.horizon)) * passes / max(self.evaluations, 1)  # type: ignore[arg-type]


@dataclass
class Site:
    """A weight matrix with the layers that apply it, and sums over their calls since the last step."""

    name: str
    weight: nn.Parameter
    layers: list[nn.Module]
    bias: nn.Parameter | None  # preconditioned together with the weight
    inside: Field | None  # of the continuous-depth block that calls the layers
    diagonal: tuple[bool, bool]  # sides (in, out) that are too long for a matrix
    sums: list[Tensor] = field(default_factory=list)  # Σ a aᵀ, Σ g gᵀ
    rows: int = 0

    def clear(self) -> None:
        """Forget the calls."""
        self.sums, self.rows = [], 0

    def receive(self, layer: nn.Module, entered: Tensor, signal: Tensor) -> None:
        """Add one call: what entered it, and what came back to it."""
        a, g = (part.to(precision(self.weight)) for part in rows_of(layer, entered, signal))
        if self.bias is not None:
            a = F.pad(a, (0, 1), value=1.0)
        pair = [
            s.square().sum(0) if long else s.mT @ s for s, long in zip((a, g), self.diagonal, strict=True)
        ]
        if self.sums:
            for total, new in zip(self.sums, pair, strict=True):
                total += new
        else:
            self.sums = pair
        self.rows += len(a)


class Hook:
    """A hook of a module; a copy or pickle of the module has one that does nothing."""

    def __init__(self, function: Callable[..., Any] | None = None) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return None if self.function is None else self.function(*args, **kwargs)

    def __reduce__(self) -> Any:
        return Hook, ()


def precision(p: Tensor) -> torch.dtype:
    """Eigenvectors need more than half precision."""
    return torch.promote_types(p.dtype, torch.float32)


def rows_of(layer: nn.Module, entered: Tensor, signal: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and signals as rows, one for each sample and place."""
    if isinstance(layer, nn.Linear):
        return entered.reshape(-1, entered.shape[-1]), signal.reshape(-1, signal.shape[-1])
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)
    one = isinstance(layer, nn.Conv1d)
    if any(layer._reversed_padding_repeated_twice):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        entered = F.pad(entered, layer._reversed_padding_repeated_twice, mode=mode)
    kernel, dilation, stride = (
        (1, *value) if one else value for value in (layer.kernel_size, layer.dilation, layer.stride)
    )
    columns = F.unfold(entered[:, :, None] if one else entered, kernel, dilation=dilation, stride=stride)
    return columns.mT.flatten(0, 1), signal.flatten(2).mT.flatten(0, 1)


def sites_of(module: nn.Module, largest: int) -> list[Site]:
    """The weights that have a rule: those of Linear and ungrouped Conv1d and Conv2d layers."""
    found: dict[int, Site] = {}
    holders: dict[int, int] = {}
    names = {id(p): name for name, p in module.named_parameters()}
    fields = [
        (f"{path}.{name}" if path else name, Field(block, part))
        for path, block in module.named_modules()
        if hasattr(block, "horizon")
        for name, part in block.named_children()
    ]
    for path, layer in module.named_modules():
        for p in layer._parameters.values():
            holders[id(p)] = holders.get(id(p), 0) + 1
        if not _has_rule(layer):
            continue
        # the innermost one is the last
        around = [f for name, f in fields if path == name or path.startswith(f"{name}.")]
        site = found.get(id(layer.weight))
        if site is None:
            bias = layer.bias if layer.bias is not None and layer.bias.requires_grad else None
            found[id(layer.weight)] = Site(
                names[id(layer.weight)],
                layer.weight,
                [layer],
                bias,
                around[-1] if around else None,
                (False, False),
            )
        else:
            site.layers.append(layer)
    for site in found.values():
        if len(site.layers) > 1 or (site.bias is not None and holders[id(site.bias)] > 1):
            site.bias = None  # layers that share the weight have biases of their own, or the other way round
        out, into = site.weight.flatten(1).shape
        site.diagonal = into + (site.bias is not None) > largest, out > largest
    return list(found.values())


def _has_rule(layer: nn.Module) -> bool:
    weight = layer._parameters.get("weight")  # not one that is computed, as by weight_norm
    if type(layer) not in (nn.Linear, nn.Conv1d, nn.Conv2d) or weight is None:
        return False
    return weight.requires_grad and getattr(layer, "groups", 1) == 1


def watcher(due: Callable[[Tensor], bool], site: Site, layer: nn.Module) -> Callable[..., None]:
    """Hook of a layer: where the factors are due, add what enters the layer and what comes back to the sums."""

    def called(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # not a copy of the layer, which carries its hooks
        if module is not layer or len(args) != 1 or not counts():
            return
        if not isinstance(output, Tensor) or not output.requires_grad or not due(site.weight):
            return
        entered = args[0].detach()
        version = entered._version

        def came_back(signal: Tensor) -> None:
            if entered._version != version:
                raise UnsupportedError(
                    f"what entered the layer of {site.name!r} was overwritten before its signal came back: "
                    "set inplace=False in the layer before it"
                )
            with torch.no_grad():
                site.receive(layer, entered, signal.detach())

        output.register_hook(came_back)

    return called


def counter(watched: Field) -> Callable[..., None]:
    """Hook of what a block integrates."""

    def called(module: nn.Module, args: Any, output: Any) -> None:
        if module is watched.module and counts():
            watched.evaluations += 1

    return called


def counts() -> bool:
    """Whether a backward of the user's may follow: not in evaluation, nor inside transforms of ``torch.func``."""
    inside_transform = torch._C._functorch.peek_interpreter_stack() is not None
    return torch.is_grad_enabled() and not inside_transform and not library_runs.get()
