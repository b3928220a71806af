r"""Signals and gradients through a given network: measured on a batch, beside mean-field theory.

Theory carries K_ab = (1/n) Σ_i h_i^a h_i^b, the kernel of the samples of a small batch, through the
traced graph, with each layer's actual weight and bias variances, and the kernel of gradients back. What has
no closed form (gates, products, sums of dependent values) is predicted by running the network's own functions
on units drawn from the kernels. A layer of weights without a map is measured, named, and theory goes on from
what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from bolza.core.errors import ArgumentError, DataError, DivergenceError, TraceError
from bolza.core.reference import cites
from bolza.meanfield.fixed_point import POOLE, SCHOENHOLZ
from bolza.meanfield.layers.moments import estimate
from bolza.meanfield.layers.predict import theory_pass
from bolza.meanfield.layers.walk import Visit, fallback_visits, real_pass
from bolza.meanfield.phase import Phase, phase_of

__all__ = ["LayerMoments", "Propagation", "propagate"]


@dataclass(frozen=True)
class LayerMoments:
    """One layer: theory beside measurement. Numbers that do not exist are ``nan``.

    Args:
        name: path of the module, or name of the function in the graph.
        kind: class of the module, or name of the function.
        units: number of units.
        q_theory: mean square of the output; with ``source == "measured"`` equal to the measurement.
        q_measured: the same, measured.
        q_error: standard error of ``q_measured`` over the units of this layer.
        c_theory: mean correlation of two samples (or positions).
        c_measured: the same, measured.
        c_error: its standard error.
        c_samples: theory's mean correlation of two samples taken whole, over all their positions together.
        grad_theory: mean square of the gradient at the output, from theory's recursion that starts at the
            network's output, and again from the measurement before a layer where theory stops.
        grad_measured: the same, measured.
        grad_error: its standard error over the units.
        sigma_w2: fan_in · mean(W²) of a layer with weights.
        sigma_b2: mean(b²).
        chi_1: σ_w² E φ'² for a layer with weights and the activation that feeds it.
        source: ``"theory"``, or ``"measured"`` where theory has no map.
        note: remark, such as the reason for measuring, or ``"by sampling"`` where theory comes from virtual
            units and errs as they do.

    Example:
        >>> row = propagate(nn.Sequential(nn.Linear(8, 64), nn.Tanh()), torch.randn(10, 8)).layers[0]
        >>> row.name, row.kind, row.units, row.source
        ('0', 'Linear', 64, 'theory')
    """

    name: str
    kind: str
    units: int
    q_theory: float
    q_measured: float
    q_error: float
    c_theory: float
    c_measured: float
    c_error: float
    c_samples: float
    grad_theory: float
    grad_measured: float
    grad_error: float
    sigma_w2: float
    sigma_b2: float
    chi_1: float
    source: str
    note: str


@dataclass(frozen=True)
class Propagation:
    """Signals and gradients of a network, layer by layer.

    Args:
        layers: one row a layer, in the order of computation.
        phase: what follows for depth.
        samples: how many samples were used.
        notes: remarks about the whole.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.MaxPool1d(2), nn.Linear(32, 5))
        >>> [(row.kind, row.note) for row in propagate(net, torch.randn(10, 8)).layers][2:]
        [('MaxPool1d', 'by sampling'), ('Linear', '')]
    """

    layers: tuple[LayerMoments, ...]
    phase: Phase
    samples: int
    notes: tuple[str, ...] = ()

    @property
    def unmapped(self) -> tuple[LayerMoments, ...]:
        """Layers that theory does not cover."""
        return tuple(row for row in self.layers if row.source == "measured" and row.kind != "input")


@cites(POOLE, SCHOENHOLZ)
def propagate(
    model: nn.Module,
    x: Any,
    y: Any = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    *,
    max_samples: int = 16,
    seed: int = 0,
) -> Propagation:
    """Variance and correlation of signals, and gradients, layer by layer: measured and predicted.

    Args:
        model: any network, in the mode (training or evaluation) that is meant. It is not changed.
        x: a batch of inputs ``(batch, …)``, or a tuple of the arguments of ``forward``.
        y: targets, for ``loss``.
        loss: ``loss(output, y)``, a scalar. Without it a random direction of unit variance is sent back
            from the output, which shows the same layer-to-layer ratios.
        max_samples: at most so many samples are used (fewer where there are many positions); theory
            looks at all their pairs.
        seed: of dropout masks, of the random direction and of virtual units.

    Returns:
        The layers and the phase. Errors of measured numbers are standard errors over the units of a
        layer: given the layer before, they are independent draws. What finite width accumulates over
        depth, about depth/width, is not in them.

    Raises:
        ArgumentError: ``x`` is not a batch, or the loss is not a scalar.
        DataError: ``x`` is not finite.
        DivergenceError: a signal is not finite; the error names the layer.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))
        >>> result = propagate(net, torch.randn(10, 8))
        >>> [row.kind for row in result.layers]
        ['Linear', 'Tanh', 'Linear', 'Tanh', 'Linear']
    """
    args = x if isinstance(x, tuple) else (x,)
    args, y, samples = _sub_batch(args, y, max_samples)
    notes: tuple[str, ...] = ()

    def objective(output: Any) -> Tensor:
        if loss is not None:
            return loss(output, y)
        generator = torch.Generator().manual_seed(seed)
        outs = [t for t in _pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
        if not outs:
            raise ArgumentError("the model's output holds no floating-point tensor.")
        total = outs[0].new_zeros(())
        for out in outs:
            noise = torch.randn(out.shape, generator=generator, dtype=torch.float64)
            total = total + (out * noise.to(out.device, out.dtype)).sum()
        return total

    try:
        visits: dict[Any, Visit] = real_pass(model, args, objective, seed)
    except TraceError as error:
        visits, note = fallback_visits(model, args, objective, seed, error)
        notes = (note,)
    _check_finite(visits)
    theory_pass(visits, model.training, seed)
    pairs = [(row, visit) for visit in visits.values() if (row := _row(visit, visits)) is not None]
    pairs = _distinct(pairs)
    return Propagation(tuple(row for row, _ in pairs), phase_of(pairs), samples, notes)


def _distinct(pairs: list[tuple[LayerMoments, Visit]]) -> list[tuple[LayerMoments, Visit]]:
    """Number the calls of a layer that is called more than once."""
    seen: dict[str, int] = {}
    out = []
    for row, visit in pairs:
        seen[row.name] = seen.get(row.name, 0) + 1
        name = row.name if seen[row.name] == 1 else f"{row.name}#{seen[row.name]}"
        out.append((replace(row, name=name), visit))
    return out


def _sub_batch(args: tuple[Any, ...], y: Any, limit: int) -> tuple[tuple[Any, ...], Any, int]:
    tensors = [t for t in _pytree.tree_leaves(args) if isinstance(t, Tensor)]
    if not tensors or tensors[0].ndim == 0:
        raise ArgumentError("x must be a batch of inputs (batch, …), or a tuple of the arguments of forward.")
    first = tensors[0]
    batch = first.shape[0]
    if batch == 0:
        raise DataError("x holds no samples.")
    for t in tensors:
        if t.is_floating_point() and not bool(torch.isfinite(t).all()):
            raise DataError(f"x holds {int((~torch.isfinite(t)).sum())} numbers that are not finite.")
    if first.ndim >= 4:
        positions = math.prod(first.shape[2:])
    elif first.ndim == 3:
        positions = first.shape[1]
    else:
        positions = 1 if first.is_floating_point() else math.prod(first.shape[1:])
    keep = min(batch, max(min(limit, 512 // max(positions, 1)), min(4, limit)))

    def cut(t: Tensor) -> Tensor:
        return t[:keep] if t.ndim and t.shape[0] == batch else t

    args = _pytree.tree_map_only(Tensor, cut, args)
    return args, _pytree.tree_map_only(Tensor, cut, y), keep


def _check_finite(visits: dict[Any, Visit]) -> None:
    for visit in visits.values():
        value = visit.value
        if visit.node.meta["role"] != "data" or not isinstance(value, Tensor):
            continue
        if value.is_floating_point() and bool(torch.isnan(value).any()):
            raise DivergenceError(
                f"layer {visit.name!r} ({visit.kind}) gives numbers that are not finite.", layer=visit.name
            )


def _row(visit: Visit, visits: dict[Any, Visit]) -> LayerMoments | None:
    m, step = visit.moments, visit.step
    if m is None or visit.node.op == "placeholder":
        return None
    reported = visit.calls is not None and not isinstance(
        visit.calls, nn.Flatten | nn.Identity | nn.Unflatten
    )
    if visit.missing is not None:
        reported = reported or visit.missing.layer
    if step is not None:
        reported = reported or step.weight_var is not None or step.gain is not None
        reported = reported or visit.kind in ("add", "sub", "cat")
    if not reported:
        return None
    got = estimate(visit.value, m.unit_dim, m.full)
    grad = grad_error = math.nan
    if visit.gradient is not None:
        back = estimate(visit.gradient, m.unit_dim, m.full)
        grad, grad_error = back.q, back.q_error
    theory = None if step is not None and step.shared else visit.theory_gradient
    note = step.note if step is not None else visit.missing.reason if visit.missing is not None else ""
    c = m.c
    return LayerMoments(
        name=visit.name,
        kind=visit.kind,
        units=m.units,
        q_theory=m.q,
        q_measured=got.q,
        q_error=got.q_error,
        c_theory=c,
        c_measured=got.c,
        c_error=got.c_error,
        c_samples=c if m.positions == 1 else m.c_samples,
        grad_theory=math.nan if theory is None else float(theory.diagonal(dim1=-2, dim2=-1).mean()),
        grad_measured=grad,
        grad_error=grad_error,
        sigma_w2=math.nan if step is None or step.weight_var is None else step.weight_var,
        sigma_b2=math.nan if step is None or step.bias_var is None else step.bias_var,
        chi_1=_chi(visit, visits),
        source="theory" if step is not None else "measured",
        note=note,
    )


def _chi(visit: Visit, visits: dict[Any, Visit]) -> float:
    """σ_w² E φ'² with the activation that feeds this layer, through layers that only move numbers."""
    if visit.step is None or visit.step.weight_var is None:
        return math.nan
    node = feeding_activation(visit, visits)
    gain = 1.0 if node is None or node.step is None or node.step.gain is None else node.step.gain
    return visit.step.weight_var * gain


def feeding_activation(visit: Visit, visits: dict[Any, Visit]) -> Visit | None:
    """The activation whose output this layer reads, if one does without a norm, a sum or weights between."""
    for _ in range(16):
        data = [n for n in visit.inputs if visits[n].moments is not None]
        if len(data) != 1:
            return None
        visit = visits[data[0]]
        step = visit.step
        if step is None or step.weight_var is not None:
            return None
        if step.gain is not None and (step.activation is None or step.activation.name != "linear"):
            return visit
        if visit.kind in ("LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d"):
            return None
    return None
