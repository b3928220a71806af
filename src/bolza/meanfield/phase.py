r"""From layers to a verdict: phase, χ_1, depth scales, and the depth that can be trained.

A plain network (weights and one activation in turn) is a point of the phase diagram. Any other network
gets the geometric mean of what each layer does to the norm of the gradient.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import torch

from bolza.meanfield.activations import Activation
from bolza.meanfield.fixed_point import fixed_point

if TYPE_CHECKING:
    from bolza.meanfield.layers.walk import Visit
    from bolza.meanfield.propagate import LayerMoments

__all__ = ["TRAINABLE_DEPTH_SCALES", "Phase", "phase_of"]

# Depth over ξ_c at which training fails: 7.5 on the ordered side, 4.7 deep in the chaotic phase
# (measured on the review's own experiment); Schoenholz et al. quote 6.
TRAINABLE_DEPTH_SCALES = 6.0
_HARMLESS = frozenset({"Dropout", "dropout", "Flatten", "mean"})


@dataclass(frozen=True)
class Phase:
    """What depth does in this network.

    Args:
        phase: ``"ordered"``, ``"critical"`` or ``"chaotic"``; ``"undetermined"`` with fewer than two layers.
        chi_1: factor by which a layer changes the squared norm of a gradient: at the fixed point for a
            plain network, else the geometric mean over the layers, measured.
        chi_1_error: standard error: of the sampled weights for a plain network, else over the layers.
        chi_1_measured: geometric mean over the layers of this network, measured.
        chi_1_measured_error: its standard error over the layers.
        xi_q: depth scale of the variance; ``nan`` if the network is not plain.
        xi_c: depth scale of correlations; for other networks that of gradients, counted in blocks if the
            network has sums or concatenations.
        xi_grad: depth scale of gradients, 1/|log χ_1|.
        trainable_depth: 6 ξ_c layers: information about the input survives a few ξ_c.
        depth: layers with weights, counted along the order of computation.
        sigma_w2: effective σ_w² of a plain network (mean over its hidden layers, less what zero padding
            takes away), else ``nan``.
        sigma_b2: effective σ_b².
        activation: its activation, else empty.
        reason: the verdict in one sentence.

    Example:
        >>> from torch import nn
        >>> from bolza.meanfield import propagate
        >>> net = nn.Sequential(*(layer for _ in range(9) for layer in (nn.Linear(90, 90), nn.Tanh())))
        >>> phase = propagate(net, torch.randn(8, 90)).phase   # PyTorch's default: σ_w² = 1/3
        >>> phase.phase, phase.activation, round(phase.chi_1, 1)
        ('ordered', 'tanh', 0.3)
    """

    phase: str
    chi_1: float
    chi_1_error: float
    chi_1_measured: float
    chi_1_measured_error: float
    xi_q: float
    xi_c: float
    xi_grad: float
    trainable_depth: float
    depth: int
    sigma_w2: float
    sigma_b2: float
    activation: str
    reason: str

    @property
    def plain(self) -> bool:
        """Whether the network is a point of the phase diagram."""
        return self.activation != ""


def phase_of(pairs: list[tuple[LayerMoments, Visit]]) -> Phase:
    """Judge a network by its layers."""
    weighted = [(row, visit) for row, visit in pairs if visit.has_weights and not _is_norm(visit)]
    layers = [(row, visit) for row, visit in weighted if row.kind not in ("Embedding", "embedding")]
    here = _plain(pairs, layers)
    if here is not None:
        measured, error = _measured_gain(layers)
        return _plain_phase(here, measured, error, len(weighted))
    trunk = [(row, visit) for row, visit in pairs if row.kind in ("add", "cat")]
    unit = "block" if len(trunk) > 2 else "layer"
    measured, error = _measured_gain(trunk, read_out=False) if unit == "block" else _measured_gain(layers)
    depth = len(trunk) if unit == "block" else len(weighted)
    rate = abs(math.log(measured)) if measured > 0 else math.nan
    xi = math.inf if rate == 0 else 1 / rate
    phase = _label(measured, error, 2 * math.log(3) / max(depth, 1))
    text = {
        "critical": "the gradient keeps its size through the network",
        "ordered": "the gradient shrinks on its way back",
        "chaotic": "the gradient grows on its way back",
        "undetermined": "there are too few layers to tell",
    }[phase]
    reason = (
        f"each {unit} multiplies the squared gradient by {measured:.3g} ± {error:.1g}: {text}; "
        "the network is not a chain of one layer type, so it is no point of a phase diagram"
    )
    return Phase(phase, measured, error, measured, error, math.nan, xi, xi, TRAINABLE_DEPTH_SCALES * xi,
                 len(weighted), math.nan, math.nan, "", reason)  # fmt: skip


def _is_norm(visit: Visit) -> bool:
    return visit.layer is not None and "Norm" in type(visit.layer).__name__


def _label(chi: float, error: float, allowed: float) -> str:
    """Critical if |log χ| is within twice its error, or within what is harmless over the whole depth.

    Harmless: for a point of the phase diagram a change of the squared gradient by e^¼; for other
    networks, whose blocks are meant to add up to about e, a factor 3 in norm.
    """
    if math.isnan(chi):
        return "undetermined"
    if chi <= 0:
        return "ordered"
    margin = max(2 * (0.0 if math.isnan(error) else error) / chi, allowed)
    if abs(math.log(chi)) <= margin:
        return "critical"
    return "ordered" if chi < 1 else "chaotic"


def _measured_gain(layers: list[tuple[LayerMoments, Visit]], read_out: bool = True) -> tuple[float, float]:
    """Geometric mean and error of what a layer does to the squared norm of the gradient on its way back."""
    norms = [float(v.gradient.double().square().sum()) for _, v in layers if v.gradient is not None]
    inner = norms[:-1] if read_out and len(norms) > 3 else norms  # the last gradient comes from the loss
    steps = [math.log(a / b) for a, b in zip(inner, inner[1:], strict=False) if a > 0 and b > 0]
    if not steps:
        return math.nan, math.nan
    mean = fmean(steps)
    spread = math.sqrt(sum((s - mean) ** 2 for s in steps) / max(len(steps) - 1, 1) / len(steps))
    return math.exp(mean), math.exp(mean) * spread if len(steps) > 1 else math.nan


@dataclass(frozen=True)
class _Here:
    activation: Activation
    rows: list[LayerMoments]
    kept: list[float]
    keep_prob: float
    q0: float


def _plain(pairs: list[tuple[LayerMoments, Visit]], layers: list[tuple[LayerMoments, Visit]]) -> _Here | None:
    """The repeated layer of a plain network: no sums, norms, products or layers without a map."""
    keep = 1.0
    for row, visit in pairs:
        step = visit.step
        if (
            step is None
            or visit.sampled
            or not (
                step.weight_var is not None
                or step.gain is not None
                or "Pool" in row.kind
                or row.kind in _HARMLESS
            )
        ):
            return None
        if row.kind == "Dropout" and visit.layer is not None and visit.layer.training:
            keep = 1 - float(visit.layer.p)  # type: ignore[arg-type]
    weighted = [row for row, _ in layers]
    kept = {row.name: v.step.kept for row, v in layers if v.step is not None}
    acts = [v for _, v in pairs if v.step is not None and v.step.activation is not None]
    acts = [v for v in acts if v.step.activation.name != "linear"]  # type: ignore[union-attr]
    hidden = weighted[1:-1] or weighted[1:]
    if not acts or not hidden:
        return None
    (name, count), *_ = Counter(v.step.activation.name for v in acts).most_common(1)  # type: ignore[union-attr]
    (kind, same), *_ = Counter(r.kind for r in hidden).most_common(1)
    if count < 0.8 * len(acts) or same < 0.8 * len(hidden):
        return None
    found = next(v.step.activation for v in acts if v.step.activation.name == name)  # type: ignore[union-attr]
    assert found is not None
    repeated = [r for r in hidden if r.kind == kind]
    return _Here(found, repeated, [kept[r.name] for r in repeated], keep, weighted[0].q_measured)


def _plain_phase(here: _Here, measured: float, error: float, depth: int) -> Phase:
    w = fmean(r.sigma_w2 * kept for r, kept in zip(here.rows, here.kept, strict=True))
    b = fmean(r.sigma_b2 for r in here.rows)
    n = len(here.rows)
    # Sampled variances: relative error √(2/numbers); fan_in · units weights a layer, units biases.
    units = fmean(r.units for r in here.rows)
    dw, db = w * math.sqrt(2 / (n * units * units)), b * math.sqrt(2 / (n * units))
    options = {"keep_prob": here.keep_prob, "q0": max(here.q0, 1e-12)}
    ws = torch.tensor([w, w + dw, w], dtype=torch.float64)
    bs = torch.tensor([b, b, b + db], dtype=torch.float64)
    point = fixed_point(here.activation, ws, bs, **options)
    gain = point.chi_1 / here.keep_prob
    chi = float(gain[0])
    chi_error = math.hypot(float(gain[1] - gain[0]), float(gain[2] - gain[0]))
    xi_c, xi_q, xi_grad = (float(t[0]) for t in (point.xi_c, point.xi_q, point.xi_grad))
    phase = _label(chi, chi_error, 0.25 / max(depth, 1))
    trainable = TRAINABLE_DEPTH_SCALES * xi_c
    if not math.isfinite(float(point.q[0])):
        trainable = TRAINABLE_DEPTH_SCALES * xi_grad
    verdict = {
        "critical": "signals and gradients keep their size and their angles",
        "ordered": "all inputs become alike and gradients vanish",
        "chaotic": "similar inputs become unlike and gradients explode",
        "undetermined": "no verdict",
    }[phase]
    reach = f"{trainable:.3g}" if math.isfinite(trainable) else "unlimited"
    reason = (
        f"σ_w² = {w:.4g}, σ_b² = {b:.3g} with {here.activation.name} gives χ_1 = {chi:.4g}: {phase}, {verdict}; "
        f"depth that can be trained ≈ 6 ξ_c = {reach} layers, this network has {depth}"
    )
    return Phase(phase, chi, chi_error, measured, error, xi_q, xi_c, xi_grad, trainable, depth, w, b,
                 here.activation.name, reason)  # fmt: skip
