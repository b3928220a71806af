r"""Batch norm makes gradients explode, at any initialisation.

A layer  h' = W φ(BN(h))  multiplies the mean square of the gradient, on its way back, by a number that does
not depend on σ_w² or σ_b² at all. For batches of B samples it is (B - 2)/(B - 3) without an activation; with
ReLU it falls to π/(π - 1) = 1.4669 as B grows. So a plain batch-normed network of some ten layers more has
gradients ten times as large at its first layer. With skip connections the branch counts ever less, and the
gradient grows by a power of the depth only.

The theory here is exact in B: batch norm divides each unit by its own spread over the batch, and both the
kernel of its outputs and that of its gradients are one-dimensional integrals
(`bolza.meanfield.layers.norm_maps.BatchStatistics`).

Reference: Yang, Pennington, Rao, Sohl-Dickstein & Schoenholz (2019), arXiv:1902.08129.

Departures. Random networks of some hundreds of units, not trained.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bolza.core.reference import Reference
from bolza.meanfield.closed_forms import RectifierForm
from bolza.meanfield.layers.norm_maps import BatchStatistics
from bolza.report import Figure, role
from bolza.studies._study import Progress, Row, Scale, StudyResult

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "yang2019_batchnorm"
TITLE = "Batch norm makes gradients explode"
CLAIM = (
    "A batch-normed layer multiplies the squared gradient by a number above 1 that no initialisation changes: "
    "(B − 2)/(B − 3) without activation, π/(π − 1) with ReLU and large batches"
)
REFERENCE = Reference(
    "yang2019batchnorm",
    "Yang, Greg and Pennington, Jeffrey and Rao, Vinay and Sohl-Dickstein, Jascha and Schoenholz, Samuel S.",
    "A Mean Field Theory of Batch Normalization",
    2019,
    venue="International Conference on Learning Representations",
    arxiv="1902.08129",
)

LIMIT = math.pi / (math.pi - 1)
MEASURED = {256: 1.464, 64: 1.493, 16: 1.588}  # of simulated networks of width 600
BUDGETS = {"small": (400, 10, 4), "full": (1000, 14, 8)}  # width, layers, networks


class Skip(nn.Module):
    """x + branch(x)."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        """The block."""
        return x + self.branch(x)


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Compute the factors and measure them on random networks.

    Args:
        scale: ``"small"``: width 400, 10 layers, four networks, some seconds; ``"full"``: width 1000, 14
            layers, eight networks.
        progress: called with the share done and a few words.

    Returns:
        Rows for linear and ReLU networks, other variances and skip connections, and the factor over B.

    Example:
        >>> from bolza.studies import get
        >>> get("yang2019_batchnorm").title
        'Batch norm makes gradients explode'
    """
    width, layers, networks = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    rows, points = [], {"linear": {}, "relu": {}}  # type: tuple[list[Row], dict[str, dict[int, tuple[float, float]]]]
    for i, batch in enumerate((5, 8, 16, 64)):
        report(0.1 * i, f"linear, B = {batch}")
        exact, want = rate(batch, relu=False), (batch - 2) / (batch - 3)
        found, error = measured(batch, width, layers, networks, relu=False)
        points["linear"][batch] = found, error
        close = abs(found / want - 1) < max(0.03, 3 * error / want)
        rows.append(Row(
            f"no activation, B = {batch}: the squared gradient grows by (B − 2)/(B − 3) a layer",
            want, found, error, abs(exact / want - 1) < 1e-4 and close,
            f"theory here {exact:.6f}; {networks} networks of width {width}, within 3 % or three standard errors",
        ))  # fmt: skip
    for i, (batch, known) in enumerate(sorted(MEASURED.items())):
        if batch > 64 and scale == "small":
            continue
        report(0.4 + 0.15 * i, f"ReLU, B = {batch}")
        found, error = measured(batch, width, layers, networks, relu=True)
        points["relu"][batch] = found, error
        rows.append(Row(
            f"ReLU, B = {batch}: growth a layer", known, found, error,
            abs(found / known - 1) < max(0.03, 3 * error / known), "expected: simulated networks of width 600",
        ))  # fmt: skip
    small, large = rate(256, relu=True), rate(512, relu=True)
    rows.append(Row(
        "ReLU, B → ∞: growth a layer is π/(π − 1)", LIMIT, 2 * large - small, abs(large - small),
        abs((2 * large - small) / LIMIT - 1) < 2e-3, "from B = 256 and 512, less the term in 1/B",
    ))  # fmt: skip
    report(0.8, "other variances")
    plain = points["relu"][64]
    for weight_var, bias_var in ((0.5, 0.0), (8.0, 1.0)):
        found, error = measured(
            64, width, layers, networks, relu=True, weight_var=weight_var, bias_var=bias_var
        )
        rows.append(Row(
            f"ReLU, B = 64, σ_w² = {weight_var:g}, σ_b² = {bias_var:g}: the same growth",
            plain[0], found, math.hypot(error, plain[1]),
            abs(found - plain[0]) < 3 * math.hypot(error, plain[1]) + 0.02,
        ))  # fmt: skip
    report(0.9, "skip connections")
    found, error = measured(64, width, layers, networks, relu=True, skip=True)
    streams = [1 + (1 - 1 / math.pi) * block for block in range(layers - 1)]
    want = math.exp(sum(math.log1p(1 / v) for v in streams) / len(streams))
    rows.append(Row(
        "ReLU, B = 64, σ_w² = 2, with skip connections: block l grows by 1 + 1/(1 + (1 − 1/π) l); geometric mean",
        want, found, error, abs(found / want - 1) < max(0.03, 3 * error / want),
        "expected: for large batches; L blocks grow by a power of L, L^{π/(π − 1)}, not exponentially",
    ))  # fmt: skip
    curves = {
        name: {b: rate(b, relu=name == "relu") for b in (5, 6, 8, 11, 16, 23, 32, 64, 128, 256)}
        for name in points
    }
    figure = Figure(
        "Growth of the squared gradient a layer",
        partial(_draw, curves=curves, points=points),
        caption=(
            "Batches of a few samples explode fastest; with ReLU even the largest ones grow by π/(π − 1). Lines: "
            "theory (with ReLU, of Gaussian outputs, which for few samples they are not). Dots: random networks."
        ),
        alt="Growth of the gradient per layer over the batch size, without activation and with ReLU.",
        size=(7.6, 4.2),
        key="growth",
    )
    report(1.0, "done")
    return StudyResult(
        KEY, TITLE, REFERENCE, CLAIM, scale, rows, (figure,),
        ("Random networks, not trained ones.",),
        {"points": {k: {str(b): v for b, v in d.items()} for k, d in points.items()}, "curves": curves},
    )  # fmt: skip


def rate(batch: int, relu: bool) -> float:
    """Growth of the squared gradient a layer at the fixed point, all samples alike; exact for no activation."""
    kernel = torch.eye(batch, dtype=torch.float64)
    form = RectifierForm(0.0)
    off = torch.as_tensor(-1 / (batch - 1), dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    y = torch.full_like(kernel, float(off)).fill_diagonal_(1.0)
    if relu:
        kernel = torch.full_like(kernel, 2 * float(form.cross(one, one, off))).fill_diagonal_(1.0)
        slope = torch.full_like(kernel, 2 * float(form.cross_slope(one, one, off))).fill_diagonal_(1.0)
    else:
        kernel, slope = y, torch.ones_like(kernel)
    norm = BatchStatistics(kernel, 0.0)
    g, factor = torch.eye(batch, dtype=torch.float64), 1.0
    for _ in range(12):
        g = norm.backward(slope * g)
        factor = float(g.trace()) / batch
        g = g / factor
    return factor


def measured(
    batch: int, width: int, layers: int, networks: int, relu: bool, weight_var: float = 2.0,
    bias_var: float = 0.0, skip: bool = False,
) -> tuple[float, float]:  # fmt: skip
    """Growth of the squared gradient a layer and its standard error, past the first layers."""
    found = []
    for seed in range(networks):
        torch.manual_seed(seed)
        blocks: list[nn.Module] = []
        for _ in range(layers):
            linear = nn.Linear(width, width)
            nn.init.normal_(linear.weight, std=math.sqrt(weight_var / width))
            nn.init.normal_(linear.bias, std=math.sqrt(bias_var))
            parts = (nn.BatchNorm1d(width), nn.ReLU() if relu else nn.Identity(), linear)
            blocks.append(Skip(nn.Sequential(*parts)) if skip else nn.Sequential(*parts))
        x = torch.randn(batch, width, requires_grad=True)
        values = [x]
        for block in blocks:
            values.append(block(values[-1]))
        grads = torch.autograd.grad((values[-1] * torch.randn(batch, width)).sum(), values)
        squares = [float(g.double().square().sum()) for g in grads]
        first = 0 if skip else 3  # the inputs' own correlation is forgotten after that
        found.append(math.log(squares[first] / squares[-2]) / (layers - 1 - first))
    t = torch.tensor(found, dtype=torch.float64)
    mean = float(t.mean().exp())
    return mean, mean * float(t.std()) / math.sqrt(networks)


def _draw(
    canvas: Any, curves: dict[str, dict[int, float]], points: dict[str, dict[int, tuple[float, float]]]
) -> None:
    axes = canvas.subplots()
    for name, colour, label in (
        ("relu", "first", "ReLU"),
        ("linear", "second", "no activation, (B − 2)/(B − 3)"),
    ):
        curve = curves[name]
        axes.plot(list(curve), list(curve.values()), color=role(colour), linewidth=2)
        at = list(points[name])
        axes.errorbar(
            at, [points[name][b][0] for b in at], [points[name][b][1] for b in at], fmt="o", color=role(colour),
            markersize=5,
        )  # fmt: skip
        axes.annotate(
            label,
            (100, curve[128]),
            xytext=(0, 9),
            textcoords="offset points",
            color=role(colour),
            ha="center",
        )
    axes.axhline(LIMIT, color=role("muted"), linewidth=1, linestyle=":")
    axes.annotate("π/(π − 1)", (11, LIMIT), xytext=(0, 5), textcoords="offset points", color=role("muted"))
    axes.axhline(1.0, color=role("muted"), linewidth=0.8)
    axes.set(xscale="log", xlabel="batch size B", ylabel="growth a layer", ylim=(0.95, 2.1))
    axes.set_xticks([5, 8, 16, 32, 64, 128, 256], labels=["5", "8", "16", "32", "64", "128", "256"])
    axes.minorticks_off()
