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
        name: of the module; ``name#2`` for its second call.
        kind: class of the module.
        units: width: channels, or features.
        numbers: pre-activations of one sample: units times positions.
        q: mean square of the pre-activations.
        q_error: its standard error over the units.
        c: mean cosine of two samples.
        c_error: its jackknife error over groups of units.
        gradient: root mean square over the samples of the norm of the loss gradient.
        gradient_error: its standard error over the samples.
        steps: of a recurrent module, norm of the gradient at its input, step by step.
        of_state: whether a recurrent module was measured at its last state, the output not being used.
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
    steps: list[float] | None = None
    of_state: bool = False
    _gradients: list[Tensor] = field(default_factory=list, repr=False)
    _state: _State | None = field(default=None, repr=False)


def measure(problem: Problem) -> list[Layer]:
    """Run one forward and one backward pass and measure every layer that has weights.

    Args:
        problem: network, batch and loss.

    Returns:
        The layers in the order in which they ran.
    """
    rows: list[Layer] = []
    with torch.enable_grad(), frozen_statistics(problem.model), _hooks(problem.model, rows) as leaves:
        loss = problem.loss(problem.model(problem.x), problem.y)
        torch.autograd.grad(loss, [*problem.parameters, *leaves], allow_unused=True)
    for row in rows:
        if not row._gradients and row._state is not None:  # the network reads the last state, not the output
            _move_to_state(row)
        if row._gradients:
            _note_gradient(row, row._gradients.pop(), len(problem.x))
    return rows


@dataclass
class _State:
    value: Tensor
    gradients: list[Tensor] = field(default_factory=list)


def _move_to_state(row: Layer) -> None:
    state = row._state
    if state is None or not state.gradients:
        return
    there = _describe(row.name, row.kind, state.value)
    row.q, row.q_error, row.c, row.c_error, row.numbers = (
        there.q, there.q_error, there.c, there.c_error, there.numbers,
    )  # fmt: skip
    row.of_state = True
    row._gradients.append(state.gradients.pop())


@contextmanager
def _hooks(model: nn.Module, rows: list[Layer]) -> Iterator[list[Tensor]]:
    """Watch all layers; what is given collects the inputs that are to be differentiated besides the parameters."""
    leaves: list[Tensor] = []
    calls: dict[str, int] = {}
    inputs: dict[str, Tensor] = {}
    handles = []

    def watch(module: nn.Module, name: str, kind: str) -> None:
        def hook(_: nn.Module, __: object, output: object) -> None:
            h = output[0] if isinstance(output, tuple) and output else output
            if not isinstance(h, Tensor) or not h.is_floating_point() or h.ndim < 2:
                return
            calls[name] = calls.get(name, 0) + 1
            # the same names as in `bolza.meanfield.propagate`, so that each call finds its theory
            row = _describe(name if calls[name] == 1 else f"{name}#{calls[name]}", kind, h.detach())
            rows.append(row)
            if h.requires_grad:
                h.register_hook(lambda g: row._gradients.append(g.detach()))
            if isinstance(module, nn.RNNBase):
                _watch_state(row, module, output)
                if name in inputs:
                    inputs.pop(name).register_hook(lambda g: setattr(row, "steps", _by_step(module, g)))

        def before(_: nn.Module, args: tuple[object, ...]) -> tuple[object, ...] | None:
            x = args[0] if args else None
            if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim != 3:
                return None
            if not x.requires_grad:
                x = x.detach().requires_grad_()
                leaves.append(x)
            inputs[name] = x
            return (inputs[name], *args[1:])

        if isinstance(module, nn.RNNBase):
            handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(hook))

    for name, module in model.named_modules():
        if _has_weights(module):
            watch(module, name or type(module).__name__, type(module).__name__)
    try:
        yield leaves
    finally:
        for handle in handles:
            handle.remove()


def _watch_state(row: Layer, module: nn.RNNBase, output: object) -> None:
    """Follow the last hidden state, ``(layers, samples, units)``, with the samples first."""
    state = output[1] if isinstance(output, tuple) and len(output) == 2 else None
    h = state[0] if isinstance(state, tuple) else state
    if not isinstance(h, Tensor) or h.ndim != 3 or not h.requires_grad:
        return
    kept = row._state = _State(h.detach().movedim(1, 0))
    h.register_hook(lambda g: kept.gradients.append(g.detach().movedim(1, 0)))


def _by_step(module: nn.RNNBase, g: Tensor) -> list[float]:
    g = g.detach().double() if module.batch_first else g.detach().double().movedim(1, 0)
    scale = float(g.abs().max()) or 1.0  # squares of vanishing gradients underflow
    return [float(v) for v in scale * (g / scale).square().sum(dim=(0, 2)).sqrt()]


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
