r"""Critical initialisation of a given network, in place.

Every layer with weights gets the variance that keeps χ_1 = 1 for the activation that feeds it:
(σ_w², σ_b²) on the critical line, at a variance q of pre-activations that fits the depth. With
φ'² of relative variance μ₂/μ₁² - 1 (8 q² for tanh) the squared singular values of an orthogonal
network spread by L(μ₂/μ₁² - 1) over L layers, so q = 1/√L keeps that spread the same at all depths.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from bolza.core.errors import ArgumentError
from bolza.core.reference import Reference, cites
from bolza.meanfield.activations import Activation
from bolza.meanfield.critical import critical_line
from bolza.meanfield.fixed_point import SCHOENHOLZ
from bolza.meanfield.isometry import PENNINGTON
from bolza.meanfield.sites import NORMS, Site, find_sites, padding_loss
from bolza.ops.replay import frozen_statistics

__all__ = ["Initialisation", "LayerInit", "critical_init_"]

Scheme = Literal["gaussian", "orthogonal", "delta_orthogonal"]

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


@dataclass(frozen=True)
class LayerInit:
    """What was done to one layer.

    Args:
        name: path of the module.
        kind: its class.
        sigma_w2: fan_in · mean(W²) now; ``nan`` for layers without a weight matrix.
        sigma_b2: variance its biases were drawn with.
        scheme: how the weights were drawn, ``"unchanged"`` if they were not.
        reason: why, in one sentence.

    Example:
        >>> row = critical_init_(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))).layers[1]
        >>> row.name, row.sigma_w2, row.reason
        ('2', 2.0, 'χ_1 = 1 after relu: critical at every variance; read-out')
    """

    name: str
    kind: str
    sigma_w2: float
    sigma_b2: float
    scheme: str
    reason: str


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


@dataclass(frozen=True)
class _Point:
    """Where an activation is to work: variance of its input, and the weights that follow it."""

    q: float
    weight_var: float
    bias_var: float
    power: float  # E φ²
    text: str


@cites(SCHOENHOLZ, PENNINGTON, XIAO, YANG)
@torch.no_grad()
def critical_init_(
    model: nn.Module,
    example: Any = None,
    *,
    scheme: Scheme = "orthogonal",
    bias_var: float | None = None,
    q: float | None = None,
    generator: torch.Generator | None = None,
) -> Initialisation:
    r"""Initialise a network in place so that signals and gradients keep their size through its depth.

    Linear and convolutional layers get (σ_w², σ_b²) on the critical line of the activation that feeds
    them (ReLU: He's 2; tanh: 1 + 2q + …); the first layer brings the data to the variance q; the last
    layer of a residual branch is scaled by 1/√blocks, so that all blocks together multiply a squared
    gradient by e at most; embeddings, attention, recurrent layers and norms get their usual values.
    With an example, layers that theory does not cover are measured and rescaled in one forward pass.

    Args:
        model: the network; weights change in place, dtype and device stay.
        example: a batch ``(batch, …)`` of real inputs, or the tuple of the arguments of ``forward``. It gives
            the data-flow graph (which layer feeds which, residual sums) and the scale of the inputs. Without
            it the order of the modules counts, and inputs are taken to have mean square 1.
        scheme: ``"orthogonal"`` (default; dynamical isometry), ``"gaussian"``, or ``"delta_orthogonal"``:
            orthogonal, and convolutions act at their centre only.
        bias_var: σ_b² to use; it sets the point on the critical line. Default: as follows from ``q``.
        q: variance of pre-activations to work at. Default: 1/√depth for saturating activations, 1 else.
        generator: source of the random numbers.

    Returns:
        A record of what was done, and why.

    Raises:
        ArgumentError: unknown scheme, both or negative ``bias_var`` and ``q``, or no layer with weights.

    Reference: Schoenholz et al. (2017); Pennington et al. (2017) and Xiao et al. (2018) for orthogonal
    weights; Yang & Schoenholz (2017) for residual branches. Departure: q = 1/√L and not 1/L, which
    keeps the spread of singular values constant; on real data it trains better.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))
        >>> record = critical_init_(net, torch.randn(16, 8), q=0.1)
        >>> print(f"{record.layers[1].sigma_w2:.6f} {record.layers[1].sigma_b2:.3e}")
        1.177569 8.323e-04
    """
    if scheme not in ("gaussian", "orthogonal", "delta_orthogonal"):
        raise ArgumentError(f"scheme is {scheme!r}; choose 'gaussian', 'orthogonal' or 'delta_orthogonal'.")
    if bias_var is not None and q is not None:
        raise ArgumentError("give bias_var or q, not both: each fixes the point on the critical line.")
    for name, value in (("bias_var", bias_var), ("q", q)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ArgumentError(f"{name} is {value}; a variance must be finite and not negative.")
    sites, blocks, found_by = find_sites(model, example)
    if not sites:
        raise ArgumentError(f"{type(model).__name__} has no layer with weights to initialise.")
    layers: list[LayerInit] = _reset_norms(model)
    plan = _Plan(sites, blocks, scheme, bias_var, q, generator, _mean_square(example))
    measured: dict[nn.Module, tuple[int, float]] = {}
    for site in sites:
        record, target = plan.apply(site, _tied(model, site.layer))
        if target is not None and example is not None:
            measured[site.layer] = (len(layers), target)
        layers.append(record)
    layers += plan.scale_norms(model)
    if measured:
        _correct(model, example, measured, layers)
    return Initialisation(tuple(layers), len(sites), blocks, found_by)


def _mean_square(example: Any) -> float:
    for leaf in _pytree.tree_leaves(example):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            square = float(leaf.double().square().mean())
            if not math.isfinite(square):
                raise ArgumentError("example holds numbers that are not finite.")
            return square or 1.0
    return 1.0


def _tied(model: nn.Module, layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    return (
        sum(getattr(m, "weight", None) is weight for m in model.modules()) > 1
        if weight is not None
        else False
    )


def _reset_norms(model: nn.Module) -> list[LayerInit]:
    rows = []
    for name, m in model.named_modules():
        if isinstance(m, NORMS):
            if hasattr(m, "reset_parameters"):
                m.reset_parameters()
            rows.append(LayerInit(name, type(m).__name__, math.nan, 0.0, "γ = 1, β = 0",
                                  "a norm fixes the scale of what it gives, whatever feeds it"))  # fmt: skip
    return rows


class _Plan:
    """Variances for every site of one network."""

    def __init__(
        self, sites: list[Site], blocks: int, scheme: str, bias_var: float | None, q: float | None,
        generator: torch.Generator | None, mean_square: float,
    ) -> None:  # fmt: skip
        self.blocks, self.scheme, self.bias_var, self.q = blocks, scheme, bias_var, q
        self.generator, self.mean_square = generator, mean_square
        fed = sum(s.source == "activation" for s in sites)
        self.run = max(1.0, fed / (1 + blocks))  # layers in a row without a sum
        self.points: dict[tuple[str, float], _Point] = {}
        self.branch_norms: set[str] = set()

    # -- points on the critical line

    def point(self, act: Activation, after_norm: bool = False) -> _Point:
        key = (act.name, float(after_norm))
        if key not in self.points:
            self.points[key] = self._point(act, after_norm)
        return self.points[key]

    def _point(self, act: Activation, after_norm: bool) -> _Point:
        linear = act.closed is not None and act.name != "erf"
        if after_norm:
            return _at(act, 1.0, "reads a norm, so its input has variance 1")
        if linear:
            b = self.bias_var or 0.0
            if b > 0:
                raise ArgumentError(f"bias_var is {b}, but {act.name} is critical at bias_var = 0 only.")
            return _at(act, 1.0 if self.q is None else self.q, "critical at every variance")
        if self.bias_var is not None:
            q = float(critical_line(act, bias_var=self.bias_var).q)
            return _at(act, max(q, 1e-6), f"on the critical line at σ_b² = {self.bias_var:g}")
        q = self.q if self.q is not None else 1 / math.sqrt(self.run)
        line = critical_line(act, q=q)
        stable = float(line.weight_var * act.second_rate(torch.tensor(q))) < 1 + 1e-9
        if float(line.bias_var) >= -1e-12 and stable:
            return _at(act, q, f"on the critical line at q = {q:.3g}")
        try:
            q = float(critical_line(act, bias_var=0.0).q)
            if q > 0:
                return _at(act, q, f"its critical point without bias, q = {q:.3g}")
        except ArgumentError:
            pass
        return self._preserving(act)

    def _preserving(self, act: Activation) -> _Point:
        """No critical point (GELU, SiLU): keep the variance; χ_1 nears 1 for large q, where it is a ReLU."""
        q = torch.tensor(self.q if self.q is not None else 1.0, dtype=torch.float64)
        while True:
            weight = q / act.second(q)
            # what a deviation of the gradient, or of the variance, grows to over the layers
            rate = max(float(weight * act.slope(q)), float(weight * act.second_rate(q)))
            drift = abs(math.log(rate)) * self.run
            if self.q is not None or drift <= 1 or q >= 64:
                break
            q = q * 2
        chi = float(weight * act.slope(q))
        text = f"no critical point; the variance q = {float(q):.3g} is kept, χ_1 = {chi:.3g}"
        return _Point(float(q), float(weight), 0.0, float(act.second(q)), text)

    # -- one site

    def apply(self, site: Site, tied: bool) -> tuple[LayerInit, float | None]:
        """Initialise one layer; also the mean square its output is to have, if only data can tell."""
        layer, name = site.layer, site.name
        kind = type(layer).__name__
        if isinstance(layer, nn.Embedding):
            return self._embedding(name, layer, tied), None
        if isinstance(layer, nn.MultiheadAttention):
            return self._attention(site, layer), None
        if isinstance(layer, nn.RNNBase | nn.RNNCellBase):
            return self._recurrent(name, layer), None
        assert isinstance(layer, nn.Linear | nn.modules.conv._ConvNd)
        w, b, why, target = self._variances(site)
        if site.sink == "sum" and self.blocks:
            w, b = w / self.blocks, 0.0
            why += (
                f"; last of a residual branch, 1/{self.blocks} of the variance so that all blocks add up to 1"
            )
            target = None if target is None else target / self.blocks
        if site.sink == "normed sum" and self.blocks and site.sink_norm:
            self.branch_norms.add(site.sink_norm)
        if site.sink == "output":
            b = 0.0
            why += "; read-out"
        if tied:
            w, why = 1.0, "shares its matrix with the embedding: 1/width, so that scores have variance 1"
            target = None
        scheme = self._draw(layer, w, site)
        if isinstance(layer, nn.modules.conv._ConvNd) and scheme != "delta_orthogonal":
            kept = padding_loss(layer, site.space)
            if kept < 1 - 1e-9:
                layer.weight.mul_(kept**-0.5)
                why += f"; zero padding keeps {kept:.3f} of the variance, made up for"
                w /= kept
        if layer.bias is not None:
            layer.bias.normal_(0, math.sqrt(b), generator=self.generator) if b > 0 else layer.bias.zero_()
        else:
            b = 0.0
        return LayerInit(name, kind, w, b, scheme, why), target

    def _variances(self, site: Site) -> tuple[float, float, str, float | None]:
        """σ_w², σ_b², the reason, and the mean square of the output if it has to be measured."""
        goal = self.point(site.reading) if site.reading is not None else None
        if site.source == "activation" and site.feeding is not None:
            here = self.point(site.feeding, site.feeding_norm)
            w, b = here.weight_var, here.bias_var
            why = f"χ_1 = 1 after {site.feeding.name}: {here.text}"
            if goal is not None and abs(w * here.power + b - goal.q) > 1e-9 * goal.q:
                b = goal.q - w * here.power
                if b < 0:
                    w, b = goal.q / here.power, 0.0
                    why = f"brings {site.feeding.name} to the variance of the next activation"
            return w, max(b, 0.0), why, None
        if goal is None:
            if site.source == "input":
                return 1 / self.mean_square, 0.0, "brings the data to variance 1", None
            reasons = {
                "norm": "reads a norm: variance 1 is kept",
                "weights": "linear after linear: variance is kept",
            }
            return 1.0, 0.0, reasons.get(site.source, "variance is kept"), None
        b = goal.bias_var if goal.bias_var < goal.q else 0.0
        if site.source == "input":
            w = (goal.q - b) / self.mean_square
            return w, b, f"brings the data to q = {goal.q:.3g}, where {site.reading.name} works", goal.q  # type: ignore[union-attr]
        w = goal.q - b
        why = f"brings a signal of variance 1 to q = {goal.q:.3g}"
        return w, b, why, goal.q if site.source in ("sum", "other") else None

    # -- drawing weights

    def _draw(self, layer: Any, variance: float, site: Site) -> str:
        weight = layer.weight
        fan_in = weight[0].numel()
        scheme = self.scheme
        if scheme == "delta_orthogonal" and weight.ndim > 2 and any(s > 1 for s in layer.stride):
            scheme = "orthogonal"  # at its centre alone a strided layer would skip inputs
        if scheme == "gaussian":
            weight.normal_(0, math.sqrt(variance / fan_in), generator=self.generator)
            return scheme
        groups = getattr(layer, "groups", 1)
        for part in weight.chunk(groups):
            if scheme == "delta_orthogonal" and weight.ndim > 2:
                part.zero_()
                centre = tuple(k // 2 for k in part.shape[2:])
                matrix = self._orthogonal(part.shape[0], part.shape[1], part, variance)
                part[(slice(None), slice(None), *centre)] = matrix
            else:
                part.copy_(self._orthogonal(part.shape[0], fan_in, part, variance).reshape(part.shape))
        return scheme if weight.ndim > 2 or scheme != "delta_orthogonal" else "orthogonal"

    def _orthogonal(self, rows: int, columns: int, like: Tensor, variance: float) -> Tensor:
        """Orthonormal rows or columns, scaled so that columns · mean(W²) is the variance."""
        matrix = torch.empty(
            rows, columns, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32)
        )
        nn.init.orthogonal_(matrix, generator=self.generator)
        return (matrix * math.sqrt(variance * rows / min(rows, columns))).to(like.dtype)

    # -- layers with several matrices

    def _embedding(self, name: str, layer: nn.Embedding, tied: bool) -> LayerInit:
        variance = 1 / layer.embedding_dim if tied else 1.0
        layer.weight.normal_(0, math.sqrt(variance), generator=self.generator)
        if layer.padding_idx is not None:
            layer.weight[layer.padding_idx].zero_()
        why = (
            "shares its matrix with the read-out: 1/width" if tied else "tokens get independent unit vectors"
        )
        return LayerInit(name, "Embedding", variance, 0.0, "gaussian", why)

    def _attention(self, site: Site, layer: nn.MultiheadAttention) -> LayerInit:
        out = 1 / self.blocks if site.sink == "sum" and self.blocks else 1.0
        matrices = [m for m in (layer.in_proj_weight, layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
                    if m is not None]  # fmt: skip
        for m in matrices:
            for part in m.chunk(3) if m is layer.in_proj_weight else [m]:
                part.copy_(self._matrix(part, 1.0))
        layer.out_proj.weight.copy_(self._matrix(layer.out_proj.weight, out))
        for bias in (layer.in_proj_bias, layer.out_proj.bias):
            if bias is not None:
                bias.zero_()
        why = "scores of variance 1; out-projection " + (
            f"1/{self.blocks} (residual branch)" if out < 1 else "1"
        )
        return LayerInit(site.name, "MultiheadAttention", 1.0, 0.0, self.scheme, why)

    def _matrix(self, like: Tensor, variance: float) -> Tensor:
        if self.scheme == "gaussian":
            return torch.empty_like(like).normal_(
                0, math.sqrt(variance / like.shape[1]), generator=self.generator
            )
        return self._orthogonal(like.shape[0], like.shape[1], like, variance)

    def _recurrent(self, name: str, layer: nn.Module) -> LayerInit:
        kind = type(layer).__name__
        gates = {"LSTM": 4, "LSTMCell": 4, "GRU": 3, "GRUCell": 3}.get(kind, 1)
        for key, p in layer.named_parameters():
            if key.startswith("weight"):
                for part in p.chunk(gates):
                    part.copy_(self._orthogonal(part.shape[0], part.shape[1], part, 1.0))
            elif key.startswith("bias"):
                p.zero_()
                if gates > 1 and key.startswith("bias_ih"):  # gates open towards memory: a region, not a line
                    p.chunk(gates)[1].fill_(1.0)
        why = (
            "orthogonal recurrence; the gate that keeps memory starts open (bias 1)"
            if gates > 1
            else "orthogonal"
        )
        return LayerInit(name, kind, 1.0, 0.0, "orthogonal", why)

    def scale_norms(self, model: nn.Module) -> list[LayerInit]:
        """The last norm of a residual branch takes the scale that the weights before it cannot."""
        rows = []
        for name in sorted(self.branch_norms):
            norm = model.get_submodule(name)
            weight = getattr(norm, "weight", None)
            if weight is not None:
                weight.fill_(self.blocks**-0.5)
                rows.append(LayerInit(name, type(norm).__name__, math.nan, 0.0, f"γ = 1/√{self.blocks}",
                                      "last of a residual branch: each of the blocks adds 1/blocks"))  # fmt: skip
        return rows


def _at(act: Activation, q: float, text: str) -> _Point:
    line = critical_line(act, q=q)
    b = max(float(line.bias_var), 0.0)
    return _Point(q, float(line.weight_var), b, float(act.second(torch.tensor(q, dtype=torch.float64))), text)


# -------------------------------------------------------------------------- correction from data


@contextmanager
def _hooks(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _correct(
    model: nn.Module, example: Any, measured: dict[nn.Module, tuple[int, float]], layers: list[LayerInit]
) -> None:
    """One forward pass; each layer in question is rescaled to its target as soon as it has spoken."""
    done: set[nn.Module] = set()

    def hook(layer: Any, _: Any, output: Tensor) -> Tensor | None:
        if layer in done or not isinstance(output, Tensor):
            return None
        done.add(layer)
        place, target = measured[layer]
        row = layers[place]
        plain = output
        bias = layer.bias
        if bias is not None:
            shape = [-1] + [1] * (output.ndim - 2) if layer.weight.ndim > 2 else [-1]
            plain = output - bias.reshape(shape)
        square = float(plain.double().square().mean())
        if not (math.isfinite(square) and square > 0) or target <= row.sigma_b2:
            return None
        scale = math.sqrt((target - row.sigma_b2) / square)
        layer.weight.mul_(scale)
        layers[place] = LayerInit(row.name, row.kind, row.sigma_w2 * scale**2, row.sigma_b2, row.scheme,
                                  f"{row.reason}; scaled by {scale:.3g} to the measured signal")  # fmt: skip
        return plain * scale + (output - plain)

    args = example if isinstance(example, tuple) else (example,)
    with _hooks([layer.register_forward_hook(hook) for layer in measured]), frozen_statistics(model):
        with torch.random.fork_rng(devices=[]):
            model(*args)
