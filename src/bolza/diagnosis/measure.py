"""Signals and gradients of one real batch, layer by layer, by hooks: works on any network that runs.

    q_l = ⟨h_l²⟩,   c_l = mean over pairs a ≠ b of  h_l(a)·h_l(b) / (|h_l(a)| |h_l(b)|),
    g_l = sqrt( mean over samples a of |∂ loss_a / ∂ h_l(a)|² )

``h_l`` is what a layer with weights puts out: a pre-activation. Errors of q and c are over the units of the
layer, because finite width is what separates a network from its theory; errors of g are over the samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bolza.diagnosis.problem import Problem
from bolza.ops.replay import frozen_statistics

__all__ = ["Layer", "measure"]

_GROUPS = 10
_PAIRS_FROM = 64


@dataclass
class Layer:
    """What was measured on one layer.

    Args:
        name: of the module; ``name[2]`` for its third call.
        kind: class of the module.
        units: width: channels, or features.
        numbers: pre-activations of one sample: units times positions.
        q: mean square of the pre-activations.
        q_error: its standard error over the units.
        c: mean cosine of two samples.
        c_error: its jackknife error over groups of units.
        gradient: root mean square over the samples of the norm of the loss gradient.
        gradient_error: its standard error over the samples.
    """

    name: str
    kind: str
    units: int
    numbers: int
    q: float
    q_error: float
    c: float | None
    c_error: float | None
    gradient: float | None = None
    gradient_error: float | None = None
    _gradients: list[Tensor] = field(default_factory=list, repr=False)


def measure(problem: Problem) -> list[Layer]:
    """Run one forward and one backward pass and measure every layer that has weights.

    Args:
        problem: network, batch and loss.

    Returns:
        The layers in the order in which they ran.
    """
    rows: list[Layer] = []
    with torch.enable_grad(), frozen_statistics(problem.model), _hooks(problem.model, rows):
        loss = problem.loss(problem.model(problem.x), problem.y)
        torch.autograd.grad(loss, problem.parameters, allow_unused=True)
    for row in rows:
        if row._gradients:
            _note_gradient(row, row._gradients.pop(), len(problem.x))
    return rows


@contextmanager
def _hooks(model: nn.Module, rows: list[Layer]) -> Iterator[None]:
    calls: dict[str, int] = {}
    handles = []

    def watch(module: nn.Module, name: str, kind: str) -> None:
        def hook(_: nn.Module, __: object, output: object) -> None:
            h = output[0] if isinstance(output, tuple) and output else output
            if not isinstance(h, Tensor) or not h.is_floating_point() or h.ndim < 2:
                return
            calls[name] = calls.get(name, 0) + 1
            row = _describe(name if calls[name] == 1 else f"{name}[{calls[name] - 1}]", kind, h.detach())
            rows.append(row)
            if h.requires_grad:
                h.register_hook(lambda g: row._gradients.append(g.detach()))

        handles.append(module.register_forward_hook(hook))

    for name, module in model.named_modules():
        if _has_weights(module):
            watch(module, name or type(module).__name__, type(module).__name__)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _has_weights(module: nn.Module) -> bool:
    """Whether a module multiplies by weights itself, rather than through the modules inside it."""
    if isinstance(module, nn.MultiheadAttention):  # calls its output layer without its hooks
        return True
    inside = any(True for child in module.children() for p in child.parameters() if p.ndim >= 2)
    return not inside and any(p.ndim >= 2 for p in module.parameters(recurse=False))


def _describe(name: str, kind: str, h: Tensor) -> Layer:
    # (samples, units, positions); convolutions have the units second, all others last
    units_second = h.ndim > 3 or (h.ndim == 3 and "Conv1d" in kind)
    flat = (h if units_second else h.movedim(-1, 1)).flatten(2) if h.ndim > 2 else h.unsqueeze(-1)
    flat = flat.double()
    units = flat.shape[1]
    squares = flat.square().mean(dim=(0, 2))  # one number a unit
    q = float(squares.mean())
    q_error = float(squares.std() / math.sqrt(units)) if units > 1 else math.nan
    c, c_error = _correlation(flat[:_PAIRS_FROM])
    return Layer(name, kind, units, h[0].numel(), q, q_error, c, c_error)


def _correlation(h: Tensor) -> tuple[float | None, float | None]:
    samples, units, _ = h.shape
    groups = min(_GROUPS, units)
    if samples < 2:
        return None, None
    grams = torch.stack([part.flatten(1) @ part.flatten(1).T for part in h.tensor_split(groups, dim=1)])
    whole = _mean_cosine(grams.sum(0))
    if groups < 2:
        return whole, None
    left_out = torch.tensor([_mean_cosine(grams.sum(0) - gram) for gram in grams], dtype=torch.float64)
    error = float(((groups - 1) / groups * (left_out - left_out.mean()).square().sum()).sqrt())
    return whole, error


def _mean_cosine(gram: Tensor) -> float:
    norms = gram.diagonal().clamp_min(1e-300).sqrt()
    cosines = gram / norms[:, None] / norms[None, :]
    n = len(gram)
    return float((cosines.sum() - cosines.diagonal().sum()) / (n * (n - 1)))


def _note_gradient(row: Layer, g: Tensor, samples: int) -> None:
    if len(g) != samples:  # the layer works on something else than one row a sample
        row.gradient = float(g.double().norm() * math.sqrt(samples))
        return
    # the loss is a mean, so the gradient of one sample's own loss is `samples` times its share; the largest
    # entry is divided out because squares of vanishing gradients underflow
    scale = float(g.abs().max())
    if scale == 0 or not math.isfinite(scale):
        row.gradient, row.gradient_error = (0.0 if scale == 0 else math.nan), None
        return
    squares = (g.double() / scale * samples).flatten(1).square().sum(1)
    rms = float(squares.mean().sqrt())
    row.gradient = scale * rms
    row.gradient_error = (
        scale * float(squares.std() / math.sqrt(samples)) / (2 * rms) if samples > 1 else None
    )
