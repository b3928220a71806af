r"""Where an adversary may go: balls around the samples, cut with the range of the data.

    ‖x' − x‖ ≤ ε in the largest entry ("linf") or in Euclid's norm ("l2"),   low ≤ x' ≤ high

Each sample has a ball of its own, and may have its own ε.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from bolza.core.errors import ArgumentError, DataError
from bolza.ops.trees import is_differentiable
from bolza.systems.trace import library_runs

__all__ = ["Ball", "Clip", "Norm", "attacked_input", "parameters_at_rest"]

Norm: TypeAlias = Literal["linf", "l2"]
Clip: TypeAlias = tuple[float | Tensor, float | Tensor] | None


class Ball:
    """The balls of a batch of samples.

    Args:
        x: their centres, shape ``(n, *input)``, floating.
        eps: radius in the units of x, one number or one a sample.
        norm: ``"linf"`` or ``"l2"``.
        clip: smallest and largest value of the data, numbers or tensors that broadcast against x; None for no limits.

    Raises:
        ArgumentError: the radius is negative or not finite, or the norm is unknown.
        DataError: x is not finite, or lies outside the range.
    """

    def __init__(self, x: Tensor, eps: float | Tensor, norm: Norm, clip: Clip) -> None:
        if norm not in ("linf", "l2"):
            raise ArgumentError(f"norm={norm!r} is unknown: choose 'linf' or 'l2'")
        self.x, self.norm = x.detach(), norm
        if not x.numel():
            raise DataError(f"x has shape {tuple(x.shape)}: there is nothing to attack")
        self.eps = self.per_sample(eps, "eps")
        if not bool(torch.isfinite(self.x).all()):
            raise DataError("x has entries that are not finite: clean the inputs before attacking them")
        low: Tensor | None = None
        high: Tensor | None = None
        if clip is not None:
            low, high = (torch.as_tensor(end, dtype=x.dtype, device=x.device) for end in clip)
            slack = 1e-5 * (high - low).abs()
            if not bool((low < high).all()):
                raise ArgumentError(f"clip={clip!r}: the first end must lie below the second")
            if not bool(((self.x >= low - slack) & (self.x <= high + slack)).all()):
                raise DataError(
                    f"x ranges from {float(x.min()):.4g} to {float(x.max()):.4g}, outside of clip={_words(clip)}: "
                    "give the range of your data, clip=(low, high), or clip=None for no limits"
                )
        if norm == "linf":
            low = self.x - self.eps if low is None else torch.maximum(self.x - self.eps, low)
            high = self.x + self.eps if high is None else torch.minimum(self.x + self.eps, high)
        self.low, self.high = low, high

    def per_sample(self, value: float | Tensor, name: str) -> Tensor:
        """A number, or one number a sample, so that it broadcasts against x."""
        numbers = torch.as_tensor(value, dtype=self.x.dtype, device=self.x.device)
        if numbers.ndim > 1 or (numbers.ndim == 1 and len(numbers) != len(self.x)):
            raise ArgumentError(
                f"{name} has shape {tuple(numbers.shape)}: give one number, or one for each of "
                f"the {len(self.x)} samples"
            )
        if not bool((torch.isfinite(numbers) & (numbers >= 0)).all()):
            raise ArgumentError(f"{name}={value!r} must be finite and not negative")
        return numbers.reshape(-1, *[1] * (self.x.ndim - 1)) if numbers.ndim else numbers

    def random(self, generator: torch.Generator | None) -> Tensor:
        """A point drawn uniformly from each ball, then clipped to the range."""
        if self.norm == "linf":
            u = torch.empty_like(self.x).uniform_(-1, 1, generator=generator)
            return self.project(self.x + self.eps * u)
        g = torch.empty_like(self.x).normal_(generator=generator)
        d = max(1, self.x[0].numel())
        radius = torch.empty(
            len(self.x), *[1] * (self.x.ndim - 1), dtype=self.x.dtype, device=self.x.device
        ).uniform_(generator=generator)
        return self.project(self.x + self.eps * radius.pow(1 / d) * g / lengths(g))

    def ascend(self, at: Tensor, slope: Tensor, step: Tensor) -> Tensor:
        """The point one steepest step along the slope, back in the ball; a slope of zero moves nothing."""
        if self.norm == "linf":
            return self.project(torch.addcmul(at, slope.sign(), step))
        return self.project(at + step * unit(slope))

    def project(self, at: Tensor) -> Tensor:
        """The nearest point of the ball, then of the range: in Euclid's norm a point of both, not the nearest."""
        if self.norm == "l2":
            delta = at - self.x
            at = self.x + delta * (self.eps / lengths(delta)).clamp(max=1)
        if self.low is None and self.high is None:
            return at
        return torch.clamp(at, self.low, self.high)


def lengths(delta: Tensor) -> Tensor:
    """Euclid's norm of each sample, never quite zero."""
    norms = torch.linalg.vector_norm(delta.flatten(1), dim=1).reshape(-1, *[1] * (delta.ndim - 1))
    return norms.clamp_min(torch.finfo(delta.dtype).tiny)


def unit(slope: Tensor) -> Tensor:
    """The slope of each sample over its norm; scaled by its largest entry first, so that no square underflows."""
    largest = slope.abs().flatten(1).amax(1).reshape(-1, *[1] * (slope.ndim - 1))
    scaled = slope / largest.clamp_min(torch.finfo(slope.dtype).tiny)
    return scaled / lengths(scaled)


def _words(clip: Any) -> str:
    return "(" + ", ".join(f"{e:.4g}" if isinstance(e, (int, float)) else "a tensor" for e in clip) + ")"


def attacked_input(x: Any) -> tuple[Tensor, Any]:
    """The one floating tensor of an input, and a function that puts another in its place.

    Raises:
        ArgumentError: torch is in inference mode, where nothing has a gradient.
        DataError: there is none (tokens), or there are several.
    """
    if torch.is_inference_mode_enabled():
        raise ArgumentError(
            "attacks need gradients, which torch.inference_mode() rules out: call this outside of it; "
            "torch.no_grad() does no harm"
        )
    if isinstance(x, Tensor) and is_differentiable(x):
        return x, lambda other: other
    leaves, spec = _pytree.tree_flatten(x)
    places = [i for i, leaf in enumerate(leaves) if is_differentiable(leaf)]
    if not places:
        raise DataError(
            "x holds no floating tensor: give numbers as a floating tensor, x.float(); tokens cannot be moved by "
            "little, so wrap the model in a function of its embeddings and attack these"
        )
    if len(places) > 1:
        raise DataError(
            f"x holds {len(places)} floating tensors: wrap the model in a function of the one to attack"
        )
    place = places[0]

    def put(other: Tensor) -> Any:
        return _pytree.tree_unflatten([*leaves[:place], other, *leaves[place + 1 :]], spec)

    return leaves[place], put


@contextmanager
def parameters_at_rest(model: Any) -> Iterator[None]:
    """A context in which parameters get no gradients, and recorders see no passes; the flags come back."""
    outer = library_runs.set(True)
    moving = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else []
    try:
        for p in moving:
            p.requires_grad_(False)
        yield
    finally:
        library_runs.reset(outer)
        for p in moving:
            p.requires_grad_(True)
