"""Which variances every layer of one network is to have: its point on the critical line, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from bolza.core.errors import ArgumentError
from bolza.meanfield.activations import Activation
from bolza.meanfield.critical import critical_line
from bolza.meanfield.initialisation.correction import Goal
from bolza.meanfield.initialisation.sites import Site, padding_loss
from bolza.meanfield.initialisation.weights import Drawer, assign, mirror_slope
from bolza.ops.gaussian import expectation

__all__ = ["LayerInit", "Plan", "too_narrow"]

_PROBE = torch.linspace(-2.5, 3, 7, dtype=torch.float64)  # tells activations of the same name apart


@dataclass(frozen=True)
class LayerInit:
    """What was done to one layer.

    Args:
        name: path of the module, or of a parameter that no layer with theory holds.
        kind: its class.
        sigma_w2: fan_in · mean(W²) now; ``nan`` for layers without a weight matrix.
        sigma_b2: variance its biases were drawn with.
        scheme: how the weights were drawn, ``"unchanged"`` if they were not.
        reason: why, in one sentence.

    Example:
        >>> from bolza.meanfield import critical_init_
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
class _Point:
    """Where an activation is to work: variance of its input, and the weights that follow it."""

    q: float
    weight_var: float
    bias_var: float
    power: float  # E φ²
    text: str


@dataclass(frozen=True)
class _Choice:
    """Variances of one layer."""

    weight_var: float
    bias_var: float
    reason: str
    square: float | None  # mean square its output is to have, where that is known
    theory: bool = True  # whether theory vouches for it, or only data can tell


class Plan:
    """Variances for every site of one network, drawn as they are planned.

    Args:
        sites: layers with weights.
        blocks: residual sums.
        drawer: of the weights.
        bias_var: σ_b², or none.
        q: variance of pre-activations, or none.
        mean_square: of the inputs.
        lengths: steps in time that each recurrent layer sees, where known.
    """

    def __init__(
        self, sites: list[Site], blocks: int, drawer: Drawer, bias_var: float | None, q: float | None,
        mean_square: float, lengths: Mapping[nn.Module, int],
    ) -> None:  # fmt: skip
        self.blocks, self.drawer, self.bias_var, self.q = blocks, drawer, bias_var, q
        self.mean_square, self.lengths = mean_square, lengths
        fed = sum(s.source == "activation" for s in sites)
        self.run = max(1.0, fed / (1 + blocks))  # layers in a row without a sum
        self.points: dict[tuple[Any, ...], _Point] = {}
        self.branch_norms: set[str] = set()
        self.mirrored: set[str] = set()
        if drawer.scheme == "mirrored":
            self.mirrored = _mirrored_outputs(sites)

    # -- points on the critical line

    def point(self, act: Activation, after_norm: bool = False, mirrored: bool = False) -> _Point:
        """Where this activation is to work."""
        key = (act.name, *act.phi(_PROBE).tolist(), after_norm, mirrored)  # two lambdas share a name
        if key not in self.points:
            self.points[key] = self._mirror_point(act) if mirrored else self._point(act, after_norm)
        return self.points[key]

    def _mirror_point(self, act: Activation) -> _Point:
        slope = mirror_slope(act)
        assert slope is not None
        if self.bias_var:
            raise ArgumentError(
                f"bias_var is {self.bias_var}, but biases would part the pairs of mirrored units: use 0."
            )
        q = 1.0 if self.q is None else self.q
        power = float(act.second(torch.tensor(q, dtype=torch.float64)))
        return _Point(q, 2 / slope**2, 0.0, power, "its mirrored units make it linear")

    def _point(self, act: Activation, after_norm: bool) -> _Point:
        if after_norm:
            return _at(act, 1.0, "reads a norm, so its input has variance 1")
        if act.scale_free:
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

    def apply(self, site: Site, tied: str) -> tuple[LayerInit, Goal | None, bool]:
        """Initialise one layer.

        Args:
            site: the layer in its surroundings.
            tied: ``"embedding"`` if an embedding shares its matrix, else empty.

        Returns:
            The record, the goal that data can check, and whether theory vouches for it anyway.
        """
        layer, name = site.layer, site.name
        kind = type(layer).__name__
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
            return self._embedding(name, layer, tied), None, True
        if isinstance(layer, nn.MultiheadAttention):
            share = 1 / self.blocks if site.sink == "sum" and self.blocks else 1.0
            return self._attention(name, layer, share), Goal(share, relative=True), False
        if isinstance(layer, nn.RNNBase | nn.RNNCellBase):
            return self._recurrent(name, layer), Goal(math.nan), False
        choice = self._choose(site)
        if site.sink == "sum" and self.blocks:
            why = (
                f"; last of a residual branch, 1/{self.blocks} of the variance so that all blocks add up to 1"
            )
            square = None if choice.square is None else choice.square / self.blocks
            choice = _Choice(choice.weight_var / self.blocks, 0.0, choice.reason + why, square, choice.theory)
        if site.sink == "normed sum" and self.blocks and site.sink_norm:
            self.branch_norms.add(site.sink_norm)
        if site.sink == "output":
            square = None if choice.square is None else choice.square - choice.bias_var
            choice = replace(choice, bias_var=0.0, square=square, reason=choice.reason + "; read-out")
        if tied:
            why = "shares its matrix with the embedding: 1/width, so that scores have variance 1"
            choice = _Choice(1.0, 0.0, why, None)
        row = self._write(site, choice, kind)
        goal = None if choice.square is None else Goal(choice.square, row.sigma_b2)
        return row, goal, choice.theory

    def _write(self, site: Site, choice: _Choice, kind: str) -> LayerInit:
        layer: Any = site.layer
        w, b, why = choice.weight_var, choice.bias_var, choice.reason
        weight, scheme = self.drawer.kernel(
            layer, w, site.feeder in self.mirrored, site.name in self.mirrored
        )
        if isinstance(layer, nn.modules.conv._ConvNd) and not layer.transposed and "delta" not in scheme:
            kept = padding_loss(layer, site.space)
            if kept < 1 - 1e-9:
                weight, w = weight * kept**-0.5, w / kept
                why += f"; zero padding keeps {kept:.3f} of the variance, made up for"
        remark = assign(layer, weight)
        if layer.bias is None:
            b = 0.0
        elif site.name in self.mirrored or b <= 0:
            layer.bias.zero_()
            b = 0.0
        else:
            layer.bias.copy_(self.drawer.normal(layer.bias.shape, layer.bias, b))
        return LayerInit(site.name, kind, w, b, scheme, f"{why}; {remark}" if remark else why)

    def _goal(self, site: Site) -> _Point | None:
        return None if site.reading is None else self.point(site.reading, mirrored=site.name in self.mirrored)

    def _choose(self, site: Site) -> _Choice:
        """σ_w², σ_b², the reason, and the mean square that the output is to have."""
        goal = self._goal(site)
        if site.source == "activation" and site.feeding is not None:
            mirrored = site.feeder in self.mirrored
            here = self.point(site.feeding, site.feeding_norm and not mirrored, mirrored)
            w, b = here.weight_var, here.bias_var
            why = f"χ_1 = 1 after {site.feeding.name}: {here.text}"
            if mirrored:
                q = here.q if goal is None else goal.q
                return _Choice(w * q / here.q, 0.0, why, q)
            square = w * here.power + b
            if goal is not None and abs(square - goal.q) > 1e-9 * goal.q:
                b = goal.q - w * here.power
                if b < 0:
                    w, b = goal.q / here.power, 0.0
                    why = f"brings {site.feeding.name} to the variance of the next activation"
                square = goal.q
            return _Choice(w, max(b, 0.0), why, square)
        if goal is None:
            if site.source == "input":
                return _Choice(1 / self.mean_square, 0.0, "brings the data to variance 1", 1.0)
            if site.source == "norm":
                return _Choice(1.0, 0.0, "reads a norm: variance 1 is kept", 1.0)
            if site.source == "weights":
                return _Choice(1.0, 0.0, "linear after linear: variance is kept", None)
            return _Choice(1.0, 0.0, "variance is kept", 1.0 if site.source == "other" else None, False)
        b = goal.bias_var if goal.bias_var < goal.q else 0.0
        if site.source == "input":
            why = f"brings the data to q = {goal.q:.3g}, where {site.reading.name} works"  # type: ignore[union-attr]
            return _Choice((goal.q - b) / self.mean_square, b, why, goal.q, False)
        why = f"brings a signal of variance 1 to q = {goal.q:.3g}"
        return _Choice(goal.q - b, b, why, goal.q, site.source not in ("sum", "other"))

    # -- layers with several matrices

    def _embedding(self, name: str, layer: Any, tied: str) -> LayerInit:
        variance = 1 / layer.embedding_dim if tied else 1.0
        weight = self.drawer.normal(layer.weight.shape, layer.weight, variance)
        if layer.padding_idx is not None:
            weight[layer.padding_idx] = 0
        assign(layer, weight)
        why = (
            "shares its matrix with the read-out: 1/width" if tied else "tokens get independent unit vectors"
        )
        return LayerInit(name, type(layer).__name__, variance, 0.0, "gaussian", why)

    def _attention(self, name: str, layer: nn.MultiheadAttention, share: float) -> LayerInit:
        for key in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            m = getattr(layer, key)
            if m is not None:
                for part in m.chunk(3) if key == "in_proj_weight" else [m]:
                    part.copy_(self.drawer.matrix(part, 1.0))
        out = layer.out_proj.weight
        assign(layer.out_proj, self.drawer.matrix(out, share))
        for bias in (layer.in_proj_bias, layer.out_proj.bias):
            if bias is not None:
                bias.zero_()
        part = f"1/{self.blocks} (residual branch)" if share < 1 else "1"
        why = f"scores of variance 1; out-projection {part}"
        scheme = "gaussian" if self.drawer.scheme == "gaussian" else "orthogonal"
        return LayerInit(name, "MultiheadAttention", share, 0.0, scheme, why)

    def _recurrent(self, name: str, layer: Any) -> LayerInit:
        """Memory over the steps in time: gates open towards memory, plain recurrence on the critical line."""
        kind = type(layer).__name__
        steps = self.lengths.get(layer, 0)
        gates = 4 if "LSTM" in kind else 3 if "GRU" in kind else 1
        w, v, biases, why = _memory(layer, gates, steps, self.q)
        orthogonal = Drawer("orthogonal", self.drawer.generator)
        for key, p in layer.named_parameters():
            if key.startswith("weight_hr"):  # the projection of an LSTM
                p.copy_(orthogonal.matrix(p, 1.0))
            elif key.startswith("weight"):
                for part in p.chunk(gates):
                    part.copy_(orthogonal.matrix(part, w if "_hh" in key else v))
            elif key.startswith("bias"):
                p.zero_()
                if key.startswith("bias_ih"):
                    for part, bias in zip(p.chunk(gates), biases, strict=True):
                        part.fill_(bias)
        return LayerInit(name, kind, w, 0.0, "orthogonal", why)

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


def _mirrored_outputs(sites: list[Site]) -> set[str]:
    """Layers whose outputs can come as (h, −h): every reader's activation acts linearly on such pairs."""
    by_name = {s.name: s for s in sites}
    readers = {s.feeder for s in sites if s.feeder and _takes_pairs(s)}
    refused = {s.feeder for s in sites if s.feeder and not _takes_pairs(s)}
    found = set()
    for name in readers - refused:
        site = by_name.get(name)
        if site is None or site.sink != "activation" or not _makes_pairs(site.layer):
            continue
        found.add(name)
    return found


def too_narrow(sites: list[Site]) -> bool:
    """Whether this is a plain fully connected network, fit for mirrored units, with fewer than 5 L of them.

    After L layers of n units the log of a squared norm has fluctuated by √(5 L/n).

    Args:
        sites: layers with weights.
    """
    fed = [s for s in sites if s.source == "activation"]
    pairs = _mirrored_outputs(sites)
    if not fed or any(s.feeder not in pairs for s in fed):
        return False
    if not all(isinstance(s.layer, nn.Linear) for s in sites):
        return False
    widths = [s.layer.weight.shape[0] for s in sites if s.name in pairs and isinstance(s.layer, nn.Linear)]
    return min(widths) < 5 * len(fed)


def _takes_pairs(site: Site) -> bool:
    layer: Any = site.layer
    return (
        site.source == "activation" and site.feeding is not None and mirror_slope(site.feeding) is not None
        and isinstance(layer, nn.Linear | nn.modules.conv._ConvNd)
        and getattr(layer, "groups", 1) == 1
        and (layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels) > 1
    )  # fmt: skip


def _makes_pairs(layer: Any) -> bool:
    if not isinstance(layer, nn.Linear | nn.modules.conv._ConvNd) or getattr(layer, "groups", 1) != 1:
        return False
    return (layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels) > 1


def _memory(
    layer: Any, gates: int, steps: int, q: float | None
) -> tuple[float, float, tuple[float, ...], str]:
    """Variances of recurrent and input weights, biases of the gates, and the reason."""
    if gates == 1:
        T = steps or 100
        if layer.nonlinearity == "relu":
            return 2.0, 1 / T, (0.0,), f"χ_1 = 1 in time; inputs add up to variance 1 over {T} steps"
        q = 1 / math.sqrt(T) if q is None else q
        line = critical_line("tanh", q=q)
        why = f"χ_1 = 1 in time at q = {q:.3g}, where the inputs take the place of the bias"
        return float(line.weight_var), max(float(line.bias_var), 1e-6), (0.0,), why
    if steps < 2:
        biases = (0.0, 1.0, 0.0, 0.0)[:gates]
        return 1.0, 1.0, biases, "orthogonal recurrence; the gate that keeps memory starts open (bias 1)"
    keep = _gate_bias(1 - 1 / steps)
    if gates == 3:
        why = f"orthogonal recurrence; update gate E z² = 1 − 1/{steps}, so that memory spans the sequence"
        return 1.0, 1.0, (0.0, keep, 0.0), why
    power = float(expectation(lambda h: torch.tanh(h) ** 2, torch.ones((), dtype=torch.float64)))
    write = _gate_bias(min(1 / (steps * power), 0.293))  # E i² E g² = 1 − E f²: the cell has variance 1
    why = f"orthogonal recurrence; forget gate E f² = 1 − 1/{steps}, and the cell keeps variance 1"
    return 1.0, 1.0, (write, keep, 0.0, 0.0), why


def _gate_bias(square: float) -> float:
    """The bias μ of a sigmoid gate with E σ(μ + z)² = square, z ~ N(0, 1)."""
    one = torch.ones((), dtype=torch.float64)

    def gap(mu: float) -> float:
        return float(expectation(lambda h: torch.sigmoid(h + mu) ** 2, one)) - square

    low, high = -20.0, 20.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if gap(middle) < 0 else (low, middle)
    return round((low + high) / 2, 6)
