r"""On the edge of chaos smooth activations keep information longer than ReLU.

On the critical line the correlation of two inputs tends to 1 by a power of depth, not exponentially, and
the power depends on how smooth the activation is:

    twice differentiable φ:  1 - c_l ≃ κ/l,       κ = 2/(σ_w² q* E φ''(√q* z)²)
    ReLU and its like:       1 - c_l ≃ (9π²/2)/l² = 44.413/l²

The constant κ grows without bound as σ_b → 0: among smooth activations a small bias variance keeps
correlations apart for longest.

Reference: Hayou, Doucet & Rousseau (2019), *On the Impact of the Activation function on Deep Neural
Networks Training*.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bolza.core.reference import Reference
from bolza.meanfield import correlation_map, critical_line, fixed_point, resolve_activation
from bolza.report import Figure, role
from bolza.studies._study import Progress, Row, Scale, StudyResult

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "hayou2019_activation"
TITLE = "Smooth activations on the edge of chaos"
CLAIM = (
    "On the critical line correlations close like κ/l for smooth activations and like 1/l² for ReLU, "
    "so smooth activations keep inputs apart at greater depth"
)
REFERENCE = Reference(
    "hayou2019impact",
    "Hayou, Soufiane and Doucet, Arnaud and Rousseau, Judith",
    "On the Impact of the Activation function on Deep Neural Networks Training",
    2019,
    venue="ICML",
    arxiv="1902.06853",
)

# σ_b² → κ of tanh on the critical line, solved to all digits shown.
KAPPA = {0.05: 6.1711, 0.2: 2.5872}
RELU = 9 * math.pi**2 / 2
START = 0.0  # correlation of the two inputs


@dataclass(frozen=True)
class Budget:
    """Size of the study."""

    layers: int
    relu_layers: int
    width: int
    depth: int
    networks: int


BUDGETS = {"small": Budget(400, 4000, 300, 40, 24), "full": Budget(4000, 20_000, 1500, 60, 64)}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Iterate the correlation map on the critical line, and send pairs of inputs through networks.

    Args:
        scale: ``"small"``: 400 layers of theory, 24 networks of width 300, some seconds; ``"full"``: 4,000
            layers, 64 networks of width 1500.
        progress: called with the share done and a few words.

    Returns:
        The rows, and how correlations close by layer.

    Example:
        >>> from bolza.studies import get
        >>> get("1902.06853").title
        'Smooth activations on the edge of chaos'
    """
    budget, report = BUDGETS[scale], progress or (lambda share, text: None)
    rows, gaps = [], {}
    for k, (bias, kappa) in enumerate(KAPPA.items()):
        report(0.3 * k, f"tanh on its critical line, σ_b² = {bias:g}")
        line = critical_line("tanh", bias_var=bias)
        found = 2 / float(line.weight_var * line.q * resolve_activation("tanh").curvature(line.q))
        rows.append(Row(f"κ of tanh at σ_b² = {bias:g}", kappa, found, None, abs(found - kappa) < 6e-5))
        gap = _gaps("tanh", float(line.weight_var), bias, float(line.q), budget.layers)
        gaps[f"tanh, $\\sigma_b^2$ = {bias:g}"] = gap
        rows.append(_rate_row(gap, kappa, bias))
    report(0.6, "ReLU at (2, 0)")
    gap = _gaps("relu", 2.0, 0.0, 1.0, budget.relu_layers)
    gaps["ReLU"] = gap[: budget.layers + 1]
    rows += _relu_rows(gap)
    far = {name: float(values[100]) for name, values in gaps.items()}
    smooth = far[f"tanh, $\\sigma_b^2$ = {0.05:g}"]
    rows.append(
        Row("after 100 layers tanh (σ_b² = 0.05) keeps inputs further apart than ReLU, by", "> 1 ×",
            smooth / far["ReLU"], None, smooth > far["ReLU"], "ratio of the two 1 − c, theory")
    )  # fmt: skip
    rows.append(_bias_row())
    report(0.7, "networks")
    measured = {name: _networks(name, budget) for name in ("tanh", "relu")}
    rows += _network_rows(measured, budget)
    report(1.0, "done")
    figure = Figure(
        "How inputs grow alike on the critical line",
        partial(_draw, gaps=gaps, measured=measured),
        caption=(
            "1 − c over depth, both axes logarithmic. Lines: theory. Dots: mean over networks, with two standard "
            "errors. Dotted: κ/l and 44.4/l². ReLU falls one power of depth faster."
        ),
        alt="Distance of correlation from one over depth for tanh with two bias variances and for ReLU.",
        size=(9.2, 4.6),
        key="approach",
    )
    notes = (
        f"The networks have width {budget.width} and depth {budget.depth}; {budget.networks} of each kind. At "
        "criticality corrections of order depth/width add up, so their depth is kept small beside their width.",
        "The paper's training runs are not repeated here; the trainability study has the effect of the phase.",
    )
    facts = {
        "gap": {k: v.tolist()[:: max(1, len(v) // 200)] for k, v in gaps.items()},
        "budget": vars(budget),
    }
    return StudyResult(KEY, TITLE, REFERENCE, CLAIM, scale, rows, (figure,), notes, facts)


def _gaps(name: str, weight_var: float, bias_var: float, q: float, layers: int) -> Tensor:
    """1 - c_l, l = 0, …, layers."""
    return 1 - correlation_map(name, weight_var, bias_var, q, q, START, layers)[2]


def _rate_row(gap: Tensor, kappa: float, bias: float) -> Row:
    """Each layer adds 1/κ to 1/(1 - c), up to a term that dies out."""
    half, last = (len(gap) - 1) // 2, len(gap) - 1
    found = (last - half) / float(1 / gap[last] - 1 / gap[half])
    return Row(
        f"layers over growth of 1/(1 − c), tanh at σ_b² = {bias:g}", kappa, found, None, abs(found / kappa - 1) < 0.02,
        f"between layers {half} and {last}; within 2 %",
    )  # fmt: skip


def _relu_rows(gap: Tensor) -> list[Row]:
    last = len(gap) - 1
    times = float(gap[last]) * last**2
    # 1/√(1-c) grows by 1/√44.413 a layer; its slope has forgotten where the orbit started.
    half = last // 2
    slope = ((last - half) / float(gap[last].rsqrt() - gap[half].rsqrt())) ** 2
    expected = {1: 0.318310, 2: 0.493731, 3: 0.604826, 5: 0.735946, 10: 0.871536}
    worst = max(abs(1 - float(gap[t]) - c) for t, c in expected.items())
    return [
        Row("c after 1, 2, 3, 5, 10 ReLU layers, largest difference", 0.0, worst, None, worst < 1e-6),
        Row(
            f"l² (1 − c) of ReLU at layer {last}",
            RELU,
            times,
            None,
            abs(times / RELU - 1) < 0.02,
            "within 2 %",
        ),
        Row(
            "constant of ReLU's law from the slope of 1/√(1 − c)",
            RELU,
            slope,
            None,
            abs(slope / RELU - 1) < 0.005,
        ),
    ]


def _bias_row() -> Row:
    biases = torch.tensor([0.5, 0.2, 0.05, 0.01, 1e-4], dtype=torch.float64)
    line = critical_line("tanh", bias_var=biases)
    kappa = 2 / (line.weight_var * line.q * resolve_activation("tanh").curvature(line.q))
    words = ", ".join(f"{k:.3g}" for k in kappa.tolist())
    return Row("κ of tanh rises as σ_b falls", "rising", words, None, bool((kappa.diff() > 0).all()),
               "σ_b² = 0.5, 0.2, 0.05, 0.01, 0.0001")  # fmt: skip


def _networks(name: str, budget: Budget) -> Tensor:
    """1 - c by layer of pairs of inputs in random critical networks, ``(networks, depth + 1)``."""
    bias = 0.05 if name == "tanh" else 0.0
    weight = float(critical_line("tanh", bias_var=bias).weight_var) if name == "tanh" else 2.0
    q = float(fixed_point("tanh", weight, bias).q) if name == "tanh" else 1.0
    draw, n, k = torch.Generator().manual_seed(0), budget.width, budget.networks
    h = torch.linalg.qr(torch.randn(k, n, 2, generator=draw)).Q.transpose(1, 2) * math.sqrt(n * q)
    out = [_gap(h)]
    f = getattr(torch, name)
    for _ in range(budget.depth):
        w = torch.randn(k, n, n, generator=draw) * math.sqrt(weight / n)
        h = f(h) @ w + math.sqrt(bias) * torch.randn(k, 1, n, generator=draw)
        out.append(_gap(h))
    return torch.stack(out, 1)


def _gap(h: Tensor) -> Tensor:
    """1 - cosine of the two rows of each network, without cancellation."""
    unit = h.double() / h.double().norm(dim=-1, keepdim=True)
    return (unit[:, 0] - unit[:, 1]).square().sum(-1) / 2


def _network_rows(measured: dict[str, Tensor], budget: Budget) -> list[Row]:
    rows = []
    finite = budget.depth / budget.width
    line = critical_line("tanh", bias_var=0.05)
    for name, word in (("tanh", "tanh"), ("relu", "ReLU")):
        last = measured[name][:, -1]
        mean, error = float(last.mean()), float(last.std()) / len(last) ** 0.5
        weight, bias, q = (float(line.weight_var), 0.05, float(line.q)) if name == "tanh" else (2.0, 0.0, 1.0)
        want = float(_gaps(name, weight, bias, q, budget.depth)[-1])
        rows.append(
            Row(f"1 − c after {budget.depth} layers of {word} networks", want, mean, error,
                abs(mean - want) < 3 * error + finite * want, "theory; within 3 standard errors + depth/width")
        )  # fmt: skip
    ratio = measured["tanh"][:, -1].mean() / measured["relu"][:, -1].mean()
    rows.append(
        Row(
            "networks of tanh keep inputs further apart than networks of ReLU, by",
            "> 1 ×",
            float(ratio),
            None,
            bool(ratio > 1),
        )
    )
    return rows


def _draw(canvas: Any, gaps: dict[str, Tensor], measured: dict[str, Tensor]) -> None:
    axes = canvas.subplots()
    for (name, gap), colour in zip(gaps.items(), ("second", "third", "first"), strict=True):
        layer = torch.arange(1, len(gap))
        axes.plot(layer, gap[1:], color=role(colour), linewidth=1.9, label=name)
        law = RELU / layer**2.0 if name == "ReLU" else KAPPA[0.05 if "0.05" in name else 0.2] / layer
        late = layer >= 20
        axes.plot(layer[late], law[late], ":", color=role("ink"), linewidth=1.2)
        values = measured["relu"] if name == "ReLU" else measured["tanh"] if "0.05" in name else None
        if values is not None:
            at = [1, 2, 3, 5, 8, 12, 20, 30, values.shape[1] - 1]
            error = 2 * values[:, at].std(0) / len(values) ** 0.5
            axes.errorbar(at, values[:, at].mean(0), error, fmt="o", color=role(colour), markersize=5)
    axes.set(xscale="log", yscale="log", xlabel="layer", ylabel="1 − correlation of two inputs")
    axes.legend(loc="lower left")
