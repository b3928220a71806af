r"""Critical initialisation of a given network, in place.

Every layer with weights gets the variance that keeps χ_1 = 1 for the activation that feeds it:
(σ_w², σ_b²) on the critical line, at a variance q of pre-activations that fits the depth. With
φ'² of relative variance μ₂/μ₁² - 1 (8 q² for tanh) the squared singular values of an orthogonal
network spread by L(μ₂/μ₁² - 1) over L layers, so q = 1/√L keeps that spread the same at all depths.

Width is finite: after L layers of n units the logarithm of a squared norm has fluctuated by
√(5L/n) for Gaussian weights after ReLU. A factor 3 in norm is safe (two standard deviations) for
n ≥ 5L; narrower networks need ``scheme="mirrored"`` (which the default picks for them where it can),
or ``correct="all"``, which halves it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree

from bolza.core.errors import ArgumentError, BolzaError
from bolza.core.reference import Reference, cites
from bolza.meanfield.activations import resolve_activation
from bolza.meanfield.fixed_point import SCHOENHOLZ
from bolza.meanfield.initialisation.correction import (
    MISHKIN,
    Goal,
    balance,
    correct_forward,
    loose_parameters,
)
from bolza.meanfield.initialisation.plan import LayerInit, Plan, too_narrow
from bolza.meanfield.initialisation.sites import NORMS, WEIGHTED, Site, _Graph, find_sites
from bolza.meanfield.initialisation.weights import Drawer
from bolza.meanfield.isometry import PENNINGTON
from bolza.ops.replay import frozen_statistics, same_randomness
from bolza.systems.trace import trace

__all__ = ["Initialisation", "LayerInit", "critical_init_"]

Scheme = Literal["gaussian", "orthogonal", "delta_orthogonal", "mirrored"]
_SCHEMES = ("gaussian", "orthogonal", "delta_orthogonal", "mirrored")

XIAO = Reference(
    "xiao2018dynamical",
    "Xiao, Lechao and Bahri, Yasaman and Sohl-Dickstein, Jascha and Schoenholz, Samuel S. and Pennington, Jeffrey",
    "Dynamical Isometry and a Mean Field Theory of CNNs: How to Train 10,000-Layer Vanilla CNNs",
    2018,
    venue="ICML",
    arxiv="1806.05393",
)
YANG = Reference(
    "yang2017residual",
    "Yang, Greg and Schoenholz, Samuel S.",
    "Mean Field Residual Networks: On the Edge of Chaos",
    2017,
    venue="NeurIPS",
    arxiv="1712.08969",
)
BALDUZZI = Reference(
    "balduzzi2017shattered",
    "Balduzzi, David and Frean, Marcus and Leary, Lennox and Lewis, J. P. and Ma, Kurt Wan-Duo and McWilliams, Brian",
    "The Shattered Gradients Problem: If resnets are the answer, then what is the question?",
    2017,
    venue="ICML",
    arxiv="1702.08591",
)
CHEN = Reference(
    "chen2018recurrent",
    "Chen, Minmin and Pennington, Jeffrey and Schoenholz, Samuel S.",
    "Dynamical Isometry and a Mean Field Theory of RNNs: Gating Enables Signal Propagation in Recurrent "
    "Neural Networks",
    2018,
    venue="ICML",
    arxiv="1806.05394",
)


@dataclass(frozen=True)
class Initialisation:
    """What `critical_init_` did.

    Args:
        layers: one record a layer.
        depth: layers with weights.
        blocks: residual sums found.
        found_by: ``"the data-flow graph"`` or ``"the order of its modules"``.

    Example:
        >>> record = critical_init_(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(4, 8))
        >>> record.depth, record.blocks, record.found_by
        (2, 0, 'the data-flow graph')
    """

    layers: tuple[LayerInit, ...]
    depth: int
    blocks: int
    found_by: str

    def __str__(self) -> str:
        """One line a layer."""
        return "\n".join(
            f"{r.name}: {r.scheme}, σ_w² = {r.sigma_w2:.4g}, σ_b² = {r.sigma_b2:.3g}: {r.reason}"
            for r in self.layers
        )


@cites(SCHOENHOLZ, PENNINGTON, XIAO, YANG, CHEN, BALDUZZI, MISHKIN)
@torch.no_grad()
def critical_init_(
    model: nn.Module,
    example: Any = None,
    *,
    scheme: Scheme | None = None,
    correct: bool | Literal["all"] = True,
    bias_var: float | None = None,
    q: float | None = None,
    generator: torch.Generator | None = None,
) -> Initialisation:
    r"""Initialise a network in place so that signals and gradients keep their size through its depth.

    Linear and (transposed, grouped, depthwise) convolutional layers get (σ_w², σ_b²) on the critical line of
    the activation that feeds them (ReLU: He's 2; tanh: 1 + 2q + …); the first layer brings the data to the
    variance q; the last layer of a residual branch is scaled by 1/√blocks, so that all blocks together multiply
    a squared gradient by e at most; embeddings, attention and norms get their usual values; gates of recurrent
    layers open until memory spans the sequence, and plain recurrence sits on the critical line in time.

    Args:
        model: the network; weights change in place, dtype and device stay. Frozen ones (``requires_grad=False``)
            change too, as in ``torch.nn.init``: give the parts that are to be new.
        example: a batch ``(batch, …)`` of real inputs, or the tuple of the arguments of ``forward``. It gives
            the data-flow graph (which layer feeds which, residual sums), the scale of the inputs, and what the
            correction needs. Without it the order of the modules counts, and inputs are taken to have mean
            square 1.
        scheme: ``"orthogonal"`` (dynamical isometry for tanh-like activations), ``"gaussian"``,
            ``"delta_orthogonal"``: orthogonal, and convolutions act at their centre only; or ``"mirrored"``:
            units in pairs (h, −h), so that ReLU, leaky ReLU, GELU, SiLU and softplus networks start as
            isometries too, at any width and depth (other activations: as delta_orthogonal). A mirrored
            network starts as a linear function, which under a global average of an image sees its mean only;
            its weights are not independent, so that theory's correlations of samples are not its own.
            Default: orthogonal; mirrored for a plain fully connected network that allows it and has
            fewer than 5 units a layer for each layer.
        correct: what a pass of the example may rescale. ``True``: layers that theory does not vouch for
            (attention, recurrent layers, custom modules, what reads a sum), forward variance only; ``"all"``:
            every layer, and in networks without sums the gradient too, which halves what a narrow network
            fluctuates; ``False``: nothing.
        bias_var: σ_b² to use; it sets the point on the critical line. Default: as follows from ``q``.
        q: variance of pre-activations to work at. Default: 1/√depth for saturating activations, 1 else.
        generator: source of the random numbers.

    Returns:
        A record of what was done, and why. Weights that no rule covers are among it as ``"unchanged"``.

    Raises:
        ArgumentError: no network, complex or meta weights, unknown scheme, both or negative ``bias_var`` and
            ``q`` or a ``q`` of 0, no layer with weights, lazy layers, a parametrization that takes no value, or
            ``correct="all"`` without an example.

    Reference: Schoenholz et al. (2017); Pennington et al. (2017) and Xiao et al. (2018) for orthogonal
    weights; Yang & Schoenholz (2017) for residual branches; Chen et al. (2018) for gates; Balduzzi et al. (2017)
    for mirrored weights; Mishkin & Matas (2016) for the correction. Departure: q = 1/√L and not 1/L, which
    keeps the spread of singular values constant; on real data it trains better.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))
        >>> record = critical_init_(net, torch.randn(16, 8), q=0.1)
        >>> print(f"{record.layers[1].sigma_w2:.6f} {record.layers[1].sigma_b2:.3e}")
        1.177569 8.323e-04
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise ArgumentError(
            f"model is a {type(model).__name__}: give an nn.Module, and initialise it before scripting it"
        )
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps; its weights are these
    _check(model, example, scheme, correct, bias_var, q)
    if isinstance(model, WEIGHTED):
        model = nn.Sequential(model)  # a graph shows layers inside a network, not the network as a layer
    sites, blocks, found_by = find_sites(model, example)
    sites, blocks, missed = _with_encoders(model, sites, blocks)
    if scheme is None:
        mirrored = not blocks and not bias_var and too_narrow(sites)
        scheme = "mirrored" if mirrored else "orthogonal"
    loose = loose_parameters(model)
    if not sites and not loose:
        raise ArgumentError(f"{type(model).__name__} has no layer with weights to initialise.")
    layers: list[LayerInit] = _reset_norms(model)
    args = example if isinstance(example, tuple) else (example,)
    lengths = _sequence_lengths(model, args) if example is not None else {}
    plan = Plan(sites, blocks, Drawer(scheme, generator), bias_var, q, _mean_square(example), lengths)
    goals: dict[nn.Module, Goal] = {}
    places: dict[Any, int] = {}
    for site in sites:
        twin = _twin(model, site, sites)
        if isinstance(twin, Site):
            layers.append(
                replace(_unchanged(site.name, site.layer), reason=f"shares its matrix with {twin.name}")
            )
            continue
        record, goal, vouched = plan.apply(site, twin)
        if goal is not None and (correct == "all" or not vouched):
            goals[site.layer], places[site.layer] = goal, len(layers)
        layers.append(record)
    layers += plan.scale_norms(model)
    layers += [_unchanged(name, layer) for name, layer in missed]
    for name, p in loose.items():
        places[name] = len(layers)
        layers.append(
            LayerInit(name, type(p).__name__, math.nan, 0.0, "unchanged", "no theory for what holds it")
        )
    if example is not None and correct:
        targets = _loose_goals(model, example, loose, plan)
        scales = correct_forward(model, args, goals, targets)
        _note(layers, places, scales, "to the measured signal")
        for key in set(goals) - set(scales):
            row = layers[places[key]]
            why = f"{row.reason}; not corrected: the example gave nothing finite and not zero there"
            layers[places[key]] = replace(row, reason=why)
        if correct == "all" and not blocks:
            chain = [s.layer for s in sites if isinstance(s.layer, nn.Linear | nn.modules.conv._ConvNd)]
            _note(layers, places, balance(model, args, chain), "to the measured gradient")
    return Initialisation(tuple(layers), len(sites), blocks, found_by)


def _check(
    model: nn.Module, example: Any, scheme: str | None, correct: Any, bias_var: float | None, q: float | None
) -> None:
    if scheme is not None and scheme not in _SCHEMES:
        raise ArgumentError(f"scheme is {scheme!r}; choose one of {', '.join(map(repr, _SCHEMES))}.")
    if correct not in (True, False, "all"):
        raise ArgumentError(f"correct is {correct!r}; choose True, False or 'all'.")
    if correct == "all" and example is None:
        raise ArgumentError("correct='all' measures the network: give an example batch.")
    if bias_var is not None and q is not None:
        raise ArgumentError("give bias_var or q, not both: each fixes the point on the critical line.")
    for name, value in (("bias_var", bias_var), ("q", q)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ArgumentError(f"{name} is {value}; a variance must be finite and not negative.")
    if q == 0:
        raise ArgumentError("q is 0: no signal would enter the network; give a positive variance, say 0.1.")
    for name, p in model.named_parameters():
        if p.is_meta:
            raise ArgumentError(
                f"{name} is on the meta device and holds no numbers: use to_empty(device=...) first."
            )
        if p.is_complex() and isinstance(model.get_submodule(name.rpartition(".")[0]), WEIGHTED):
            raise ArgumentError(f"{name} is complex: the theory here is that of real weights.")
        if is_lazy(p):
            raise ArgumentError(f"{name} has no shape yet: run one batch through the lazy layers first.")


def _mean_square(example: Any) -> float:
    for leaf in _pytree.tree_leaves(example):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            if not leaf.numel():
                raise ArgumentError(f"example has shape {tuple(leaf.shape)}: give at least one sample.")
            square = float(leaf.double().square().mean())
            if not math.isfinite(square):
                raise ArgumentError("example holds numbers that are not finite.")
            return square or 1.0
    return 1.0


def _twin(model: nn.Module, site: Site, sites: list[Site]) -> str | Site:
    """``"embedding"`` if matrix and embedding are one; an earlier layer with the same weight; or nothing."""
    weight = site.layer._parameters.get("weight")
    if weight is None:
        return ""
    same = [m for m in model.modules() if m._parameters.get("weight") is weight]
    if len(same) < 2:
        return ""
    if any(isinstance(m, nn.Embedding | nn.EmbeddingBag) for m in same):
        return "embedding"
    first = next(s for s in sites if s.layer._parameters.get("weight") is weight)
    return "" if first.layer is site.layer else first


def _reset_norms(model: nn.Module) -> list[LayerInit]:
    rows = []
    for name, m in model.named_modules():
        if isinstance(m, NORMS):
            if hasattr(m, "reset_parameters"):
                m.reset_parameters()
            rows.append(LayerInit(name, type(m).__name__, math.nan, 0.0, "γ = 1, β = 0",
                                  "a norm fixes the scale of what it gives, whatever feeds it"))  # fmt: skip
    return rows


def _unchanged(name: str, layer: nn.Module) -> LayerInit:
    return LayerInit(name, type(layer).__name__, math.nan, 0.0, "unchanged", "the example does not reach it")


def _with_encoders(
    model: nn.Module, sites: list[Site], blocks: int
) -> tuple[list[Site], int, list[tuple[str, nn.Module]]]:
    """Also the layers inside PyTorch's transformer layers, whose sums and activations no graph shows."""
    inside: list[Site] = []
    kinds = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    for name, module in model.named_modules():
        if not isinstance(module, kinds):
            continue
        prefix = f"{name}." if name else ""
        act = resolve_activation(module.activation)
        source = "norm" if module.norm_first else "other"
        attentions = ["self_attn", "multihead_attn"][: 1 if isinstance(module, kinds[0]) else 2]
        inside += [Site(prefix + a, getattr(module, a), source, "sum") for a in attentions]
        first = prefix + "linear1"
        inside.append(Site(first, module.linear1, "norm", "activation", reading=act))
        inside.append(
            Site(prefix + "linear2", module.linear2, "activation", "sum", feeding=act, feeder=first)
        )
        blocks += len(attentions) + 1
    own = {s.layer for s in inside}
    sites = [s for s in sites if s.layer not in own] + inside
    held = {s.layer for s in sites} | {
        m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)
    }
    missed = [(n, m) for n, m in model.named_modules() if isinstance(m, WEIGHTED) and m not in held]
    return sites, blocks, missed


def _sequence_lengths(model: nn.Module, args: tuple[Any, ...]) -> dict[nn.Module, int]:
    """Steps in time that each recurrent layer sees."""
    layers = [m for m in model.modules() if isinstance(m, nn.RNNBase)]
    lengths: dict[nn.Module, int] = {}
    if not layers:
        return lengths

    def hook(layer: Any, inputs: Any) -> None:
        x = inputs[0] if inputs else None
        if isinstance(x, Tensor):
            lengths[layer] = x.shape[1 if layer.batch_first and x.ndim == 3 else 0]
        elif isinstance(x, nn.utils.rnn.PackedSequence):
            lengths[layer] = len(x.batch_sizes)

    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    try:
        with frozen_statistics(model), same_randomness(0, next(model.parameters()).device):
            model(*args)
    finally:
        for handle in handles:
            handle.remove()
    return lengths


def _loose_goals(
    model: nn.Module, example: Any, loose: dict[str, nn.Parameter], plan: Plan
) -> dict[str, tuple[nn.Parameter, float]]:
    """What the product with each parameter that no layer holds is to have: what its reader works at, or 1."""
    found = {name: (p, 1.0) for name, p in loose.items()}
    if not found:
        return found
    try:
        traced = trace(model, example, check=False)
    except BolzaError:
        return found
    graph = _Graph(model)
    for node in traced.nodes if traced.kind == "fx" else ():
        name = str(node.target)
        if node.op != "get_attr" or name not in found:
            continue
        for user in node.users:
            for reader in graph.beyond(user):
                act = graph.activation(reader) if graph.kind(reader) == "activation" else None
                if act is not None:
                    found[name] = (loose[name], plan.point(act).q)
    return found


def _note(layers: list[LayerInit], places: dict[Any, int], scales: dict[Any, float], to: str) -> None:
    for key, scale in scales.items():
        if key not in places:
            continue
        row = layers[places[key]]
        if isinstance(key, nn.RNNBase | nn.RNNCellBase):  # σ_w² is that of the recurrent weights
            layers[places[key]] = replace(
                row, reason=f"{row.reason}; input weights scaled by {scale:.3g} {to}"
            )
            continue
        layers[places[key]] = replace(
            row, sigma_w2=row.sigma_w2 * scale**2, reason=f"{row.reason}; scaled by {scale:.3g} {to}"
        )
