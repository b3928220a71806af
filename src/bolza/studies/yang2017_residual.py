r"""Residual networks live between the phases: what depth costs them is not exponential.

With x ← x + V φ(W x + b) + a the mean square p of the stream and the gradient follow

    p' = p + σ_v² E φ(u)² + σ_a²,   u ~ N(0, σ_w² p + σ_b²),        χ = 1 + σ_v² σ_w² E φ'(u)².

With ReLU both grow by the same factor 1 + σ_w² σ_v²/2 a block. With tanh the stream grows linearly, so that
the slopes φ' die out and the gradient grows only like exp(8 σ_w √L / (3 √(2π))). A network of L blocks whose
branches have variances of order 1/L is bounded at any depth, which is why Xavier's and He's variances, made
for plain networks, are not the best ones here.

Reference: Yang & Schoenholz (2017), arXiv:1712.08969.

Departures. Moments, not training: the paper's accuracy maps are not repeated. Networks are measured at a
width of some hundreds, with linear layers before the first and after the last block.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bolza.meanfield import propagate, residual_map, resolve_activation
from bolza.meanfield.residual import YANG_RESIDUAL
from bolza.report import Figure, role
from bolza.studies._study import Progress, Row, Scale, StudyResult

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "yang2017_residual"
TITLE = "Residual networks on the edge of chaos"
CLAIM = (
    "Skip connections turn the exponential growth of signals and gradients with depth into a polynomial one, and "
    "variances of order 1/depth bound it"
)
REFERENCE = YANG_RESIDUAL

DEPTH = 4000  # at which the growth with √L is read off
SLOPES = {1.0: 1.080, 2.0: 1.496}  # σ_w² → log gradient over √L at that depth, of the recursion itself
BUDGETS = {"small": (300, 12, 4), "full": (1000, 40, 10)}  # width, blocks, networks


class Block(nn.Module):
    """x + V φ(W x)."""

    def __init__(self, width: int, activation: nn.Module, inner: float, outer: float) -> None:
        super().__init__()
        self.w, self.v = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.activation = activation
        nn.init.normal_(self.w.weight, std=math.sqrt(inner / width))
        nn.init.normal_(self.v.weight, std=math.sqrt(outer / width))

    def forward(self, x: Tensor) -> Tensor:
        """The block."""
        return x + self.v(self.activation(self.w(x)))


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Recompute the growth laws and measure them on random networks.

    Args:
        scale: ``"small"``: width 300, 12 blocks, four networks, some seconds; ``"full"``: width 1000, 40
            blocks, ten networks.
        progress: called with the share done and a few words.

    Returns:
        Rows for both activations and both laws, and how the gradient grows with depth as a figure.

    Example:
        >>> from bolza.studies import get
        >>> get("yang2017_residual").title
        'Residual networks on the edge of chaos'
    """
    width, blocks, networks = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    report(0.0, "recursion")
    gains = log_gain(torch.tensor(list(SLOPES), dtype=torch.float64), DEPTH) / math.sqrt(DEPTH)
    slopes = dict(zip(SLOPES, gains.tolist(), strict=True))
    limit = 8 / (3 * math.sqrt(2 * math.pi))
    rows = [
        Row(
            f"tanh, σ_w² = {w:g}: log of the squared gradient grows like √L; over √L at L = {DEPTH}",
            limit * math.sqrt(w), slopes[w], None, abs(slopes[w] / (limit * math.sqrt(w)) - 1) < 0.03,
            f"the recursion gives {SLOPES[w]} there, the limit 8 σ_w/(3 √(2π)) is approached like 1/√L",
        )
        for w in SLOPES
    ]  # fmt: skip
    report(0.3, "networks with ReLU")
    forward, backward, _ = measured(nn.ReLU(), 1.0, 1.0, width, blocks, networks)
    for what, found in (("stream", forward), ("squared gradient", backward)):
        mean, error = (
            float(found[:, -1].mean()) / blocks,
            float(found[:, -1].std()) / math.sqrt(networks) / blocks,
        )
        factor = math.exp(mean)
        rows.append(Row(
            f"ReLU, σ_w² = σ_v² = 1: the {what} grows by 1 + σ_w² σ_v²/2 a block",
            1.5, factor, factor * error, abs(factor / 1.5 - 1) < max(0.03, 3 * error),
            f"{networks} networks of width {width} and {blocks} blocks",
        ))  # fmt: skip
    report(0.6, "networks with tanh")
    growth, gradient, theory = measured(nn.Tanh(), 1.0, 1.0, width, blocks, networks)
    for what, found, exact in (("stream", growth, theory[0]), ("squared gradient", gradient, theory[1])):
        mean, error = float(found[:, -1].mean()), float(found[:, -1].std()) / math.sqrt(networks)
        want = float(exact[-1])
        rows.append(Row(
            f"tanh, σ_w² = σ_v² = 1: growth of the {what} over {blocks} blocks",
            math.exp(want), math.exp(mean), math.exp(mean) * error,
            abs(mean - want) < 3 * error + 2 * blocks / width,
            "within three standard errors and depth/width of the recursion",
        ))  # fmt: skip
    report(0.9, "variances of order 1/depth")
    for depth in (10, 100, 1000):
        orbit = residual_map("relu", 1.0, depth=depth, out_weight_var=1 / depth)
        gain = float(orbit.p[-1])
        rows.append(Row(
            f"ReLU, σ_v² = 1/L, L = {depth}: the stream grows by at most √e",
            f"at most {math.exp(0.5):.4f}", gain, None, 1 <= gain <= math.exp(0.5),
        ))  # fmt: skip
    curves = growth_curves(300)
    figure = Figure(
        "What depth does to the gradient",
        partial(_draw, curves=curves, measured=(backward, gradient)),
        caption=(
            "Growth of the squared gradient on its way back through L blocks. A plain chaotic network and a "
            "residual one with ReLU explode exponentially, one with tanh like exp(√L), and with σ_v² = 1/L nothing "
            "explodes. Dots: random networks, with their spread."
        ),
        alt="Logarithm of gradient growth over depth for four kinds of networks, with measured points.",
        size=(8.2, 4.4),
        key="growth",
    )
    report(1.0, "done")
    return StudyResult(
        KEY, TITLE, REFERENCE, CLAIM, scale, rows, (figure,),
        ("Moments of random networks; the paper's training experiments are not repeated.",),
        {"slopes": slopes, "relu": backward.tolist(), "tanh": gradient.tolist()},
    )  # fmt: skip


def log_gain(weight_vars: Tensor, depth: int) -> Tensor:
    """Σ log χ of x ← x + tanh(W x) over ``depth`` blocks, from p = 1."""
    act = resolve_activation("tanh")
    p, total = torch.ones_like(weight_vars), torch.zeros_like(weight_vars)
    for _ in range(depth):
        q = weight_vars * p
        total += torch.log1p(weight_vars * act.slope(q))
        p = p + act.second(q)
    return total


def measured(
    activation: nn.Module, inner: float, outer: float, width: int, blocks: int, networks: int
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Logarithms of how much the stream and the squared gradient grow over the first l blocks.

    Returns:
        Both measured, ``(networks, blocks)``, and the recursion from the same start, ``(blocks,)`` each.
    """
    forward, backward, start = [], [], []
    for seed in range(networks):
        torch.manual_seed(seed)
        chain = nn.Sequential(
            nn.Linear(width, width), *(Block(width, activation, inner, outer) for _ in range(blocks)),
            nn.Linear(width, width),
        )  # fmt: skip
        nn.init.normal_(chain[0].weight, std=math.sqrt(1 / width))  # type: ignore[arg-type]
        nn.init.zeros_(chain[0].bias)  # type: ignore[arg-type]
        layers = propagate(chain, torch.randn(4, width), seed=seed).layers
        stream = [layers[0], *(row for row in layers if row.kind == "add")]
        start.append(stream[0].q_measured)
        forward.append([math.log(row.q_measured / stream[0].q_measured) for row in stream[1:]])
        backward.append([math.log(stream[0].grad_measured / row.grad_measured) for row in stream[1:]])
    name = type(activation).__name__.lower()
    orbit = residual_map(name, inner, depth=blocks, out_weight_var=outer, p0=sum(start) / networks)
    exact = (orbit.p[1:] / orbit.p[0]).log(), orbit.log_gain[1:]
    return torch.tensor(forward), torch.tensor(backward), exact


def growth_curves(depth: int) -> dict[str, list[float]]:
    """log₁₀ of the growth of the squared gradient over l blocks, l = 0, …, depth."""
    inside = residual_map("relu", 1.0, depth=depth).log_gain
    smooth = residual_map("tanh", 1.0, depth=depth).log_gain
    scaled = torch.arange(depth + 1) * math.log1p(0.5 / depth)
    plain = torch.arange(depth + 1) * math.log(1.133516)  # tanh at (2.5, 0.05)
    named = {
        "residual, ReLU": inside,
        "plain, tanh, σ_w² = 2.5": plain,
        "residual, tanh": smooth,
        f"residual, ReLU, σ_v² = 1/{depth}": scaled,
    }
    return {name: (t.double() / math.log(10)).tolist() for name, t in named.items()}


def _draw(canvas: Any, curves: dict[str, list[float]], measured: tuple[Tensor, Tensor]) -> None:
    axes = canvas.subplots()
    roles = ("first", "fourth", "second", "third")
    for (name, curve), colour in zip(curves.items(), roles, strict=True):
        axes.plot(range(len(curve)), curve, color=role(colour), linewidth=2)
        at = min(len(curve) - 1, next((i for i, v in enumerate(curve) if v > 11), len(curve) - 1))
        axes.annotate(
            name, (at, curve[at]), xytext=(-6, 6) if at > 200 else (6, -2), textcoords="offset points",
            ha="right" if at > 200 else "left", color=role(colour),
        )  # fmt: skip
    for found, colour in zip(measured, ("first", "second"), strict=True):
        t = found / math.log(10)
        places = range(1, t.shape[1] + 1)
        axes.errorbar(places, t.mean(0), t.std(0), fmt="o", markersize=3.5, color=role(colour), elinewidth=1)
    axes.set(
        xlim=(0, 300), ylim=(-0.5, 12), xlabel="depth L, blocks", ylabel="log₁₀ of the growth of |gradient|²"
    )
