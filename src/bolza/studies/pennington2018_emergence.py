r"""Spectral universality: which limits the Jacobian's spectrum can have in very deep networks.

With orthogonal weights and the variance σ₀² = L (μ₂/μ₁² − 1) held fixed, the spectrum of s² tends with L to a law
that knows the activation only by its class. With M the moment function of the law,

    smooth (tanh, erf):              x(M) = (1 + M)/M · exp(σ₀² M),
    Bernoulli (hard tanh):           x(M) = (1 + M)/M · exp(σ₀² M/(1 + M)).

The law's density at λ is |Im M|/(π λ) with x(M) = λ. For σ₀² < 1 the Bernoulli law has an atom of mass 1 − σ₀² at
exp(σ₀²), the directions that no layer cuts, and the rest below e σ₀²; there M/(1 + M) = −W(−σ₀²/λ)/σ₀² with
Lambert's W.

Reference: Pennington, Schoenholz & Ganguli (2018), *The Emergence of Spectral Universality in Deep Networks*.

Departures. Finite networks and the finite-depth edge beside the limit.
"""

from __future__ import annotations

import cmath
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bolza.meanfield import critical_init_, isometry, isometry_theory, resolve_activation
from bolza.meanfield.isometry import EMERGENCE
from bolza.ops.roots import bracketed_root
from bolza.report import Figure, role
from bolza.studies._study import Progress, Row, Scale, StudyResult

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "pennington2018_emergence"
TITLE = "Two universal spectra of deep networks"
CLAIM = (
    "At fixed variance of s², the Jacobian's spectrum of very deep orthogonal networks depends on the class of the "
    "activation, smooth or Bernoulli, and on nothing else"
)
REFERENCE = EMERGENCE
SPREAD = 0.25  # σ₀²


class Erf(nn.Module):
    """erf as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return torch.erf(x)


KINDS: dict[str, tuple[type[nn.Module], str]] = {
    "tanh": (nn.Tanh, "smooth"),
    "erf": (Erf, "smooth"),
    "hard tanh": (nn.Hardtanh, "Bernoulli"),
}


@dataclass(frozen=True)
class Budget:
    """Size of the networks."""

    width: int
    depth: int
    draws: int


BUDGETS = {"small": Budget(150, 48, 2), "full": Budget(400, 128, 6)}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Measure spectra of deep orthogonal networks with one variance against both laws.

    Args:
        scale: ``"small"``: 48 layers of 150; ``"full"``: 128 layers of 400.
        progress: called with the share done and a few words.

    Returns:
        Rows on variances, edges and densities, and the spectra.

    Example:
        >>> from bolza.studies import get
        >>> get("pennington2018_emergence").reference.arxiv
        '1802.09979'
    """
    budget = BUDGETS[scale]
    rows: list[Row] = []
    samples: dict[str, Tensor] = {}
    for i, (name, (activation, kind)) in enumerate(KINDS.items()):
        if progress:
            progress(i / len(KINDS), f"spectra of {name} networks")
        q = variance_for(name, SPREAD / budget.depth)
        s2, variances = squares(budget, activation, q)
        samples[name] = s2
        mean = float(variances.mean())
        error = float(variances.std() / math.sqrt(len(variances))) if len(variances) > 1 else None
        rows.append(Row(f"{name}, {budget.depth} layers at q = {q:.3g}: Var[s²]", SPREAD, mean, error,
                        abs(mean / SPREAD - 1) < 0.2))  # fmt: skip
        top = float(s2.max())
        edge = isometry_theory(_name(name), q=q, depth=budget.depth).largest ** 2
        rows.append(Row(f"{name}: upper edge of s² at this depth", edge, top, None, abs(top / edge - 1) < 0.1,
                        f"limit of the {kind} class: {limit_edge(kind, SPREAD):.3f}"))  # fmt: skip
    same = distance(samples["tanh"], samples["erf"])
    other = distance(samples["tanh"], samples["hard tanh"])
    rows.append(Row("tanh and erf have one spectrum: largest gap of their distributions", "0", same, None,
                    same < 0.08, "smooth class both"))  # fmt: skip
    rows.append(Row("hard tanh has another: largest gap from tanh, over that of erf", "more than 1",
                    other / max(same, 1e-9), None, other > 1.5 * same, f"gap {other:.3f}"))  # fmt: skip
    for name, (_, kind) in KINDS.items():
        own = law_gap(samples[name], kind)
        wrong = law_gap(samples[name], "smooth" if kind == "Bernoulli" else "Bernoulli")
        rows.append(Row(f"{name}: the {kind} law is the nearer of the two, area between the distributions",
                        f"less than {wrong:.3f}", own, None, own < wrong))  # fmt: skip
    figure = Figure(
        "Spectra of s² and the two laws",
        partial(_draw, samples=samples),
        caption=f"{budget.depth} layers of {budget.width}, orthogonal weights, σ₀² = {SPREAD}. Bars: measured; lines: "
        "the limits of the two classes; the vertical line is the atom of the Bernoulli law.",
        alt="Histograms of squared singular values of three networks with the densities of the two laws.",
        size=(9.6, 3.6),
        key="spectra",
    )
    notes = (
        f"σ₀² = L (μ₂/μ₁² − 1) = {SPREAD} for all three by the choice of q; weights are critical, so that mean "
        "s² = 1, and spectra are taken relative to their own mean.",
        "A hard tanh differs from the identity only beyond ±1; at this σ₀² a few units a layer are cut, which is the "
        "Bernoulli class.",
    )
    facts = {"s2": {name: s.tolist() for name, s in samples.items()}, "spread": SPREAD}
    return StudyResult(KEY, TITLE, REFERENCE, CLAIM, scale, rows, (figure,), notes, facts)


def _name(name: str) -> Any:
    return {"hard tanh": nn.Hardtanh()}.get(name, name)


def variance_for(name: str, spread: float) -> float:
    """The q at which μ₂/μ₁² − 1 is ``spread``.

    Args:
        name: key of ``KINDS``.
        spread: wanted relative variance of φ'².

    Example:
        >>> round(8 * variance_for("tanh", 1e-6) ** 2 / 1e-6, 1)   # 8 q² for small q
        1.0
    """
    act = resolve_activation(_name(name))
    z = torch.arange(-9 + 9 / 8000, 9, 18 / 8000, dtype=torch.float64)
    w = torch.exp(-z.square() / 2)
    w = w / w.sum()

    def gap(log_q: Tensor, _: Tensor) -> Tensor:
        d = act.derivative(torch.exp(log_q / 2)[:, None] * z).square()
        return (d.square() @ w) / (d @ w) ** 2 - 1 - spread

    low, high = torch.tensor([-12.0], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
    return float(torch.exp(bracketed_root(gap, low, high)))


def squares(budget: Budget, activation: type[nn.Module], q: float) -> tuple[Tensor, Tensor]:
    """All s² relative to their mean, and the relative variance of each draw of the weights."""
    values, variances = [], []
    for draw in range(budget.draws):
        layers = [
            m for _ in range(budget.depth) for m in (nn.Linear(budget.width, budget.width), activation())
        ]
        net = nn.Sequential(*layers).double()
        critical_init_(
            net,
            torch.ones(2, budget.width, dtype=torch.float64),
            scheme="orthogonal",
            q=q,
            generator=torch.Generator().manual_seed(draw),
        )
        x = torch.randn(
            2, budget.width, dtype=torch.float64, generator=torch.Generator().manual_seed(77 + draw)
        )
        result = isometry(net, x / x.norm(dim=1, keepdim=True) * math.sqrt(budget.width))
        s2 = result.singular_values.square()
        values.append((s2 / s2.mean(1, keepdim=True)).flatten())
        variances.append(result.relative_variance)
    return torch.cat(values), torch.tensor(variances)


def distance(a: Tensor, b: Tensor) -> float:
    """Largest gap of two empirical distribution functions."""
    grid = torch.cat([a, b]).sort().values
    at = [torch.searchsorted(v.sort().values, grid, right=True) / len(v) for v in (a, b)]
    return float((at[0] - at[1]).abs().max())


def limit_edge(kind: str, spread: float) -> float:
    """Upper edge of s² in the limit; the Bernoulli law has an atom there while σ₀² < 1.

    Args:
        kind: ``"smooth"`` or ``"Bernoulli"``.
        spread: σ₀².
    """
    if kind == "smooth":
        m = (-1 + math.sqrt(1 + 4 / spread)) / 2
        return (1 + m) / m * math.exp(spread * m)
    return math.exp(spread)


def density(kind: str, spread: float, at: Tensor) -> Tensor:
    """Density of the law at λ, by Newton's method for x(M) = λ along a path from above the edge.

    Args:
        kind: ``"smooth"`` or ``"Bernoulli"``.
        spread: σ₀².
        at: values λ, increasing.
    """
    if kind == "Bernoulli":
        from scipy.special import lambertw

        u = -lambertw((-spread / at).tolist(), 0) / spread
        return torch.from_numpy(abs((1 / (1 - u)).imag)) / (math.pi * at)
    found, m = [], complex(0.02, 0.0)
    path = [*torch.linspace(60.0, float(at[-1]), 400, dtype=torch.float64).tolist(), *at.flip(0).tolist()]
    for i, value in enumerate(path):
        target = complex(math.log(value), -1e-4)  # just off the axis
        for _ in range(40):
            step = (cmath.log((1 + m) / m) + spread * m - target) / (1 / (1 + m) - 1 / m + spread)
            m -= step * min(1.0, 0.3 / max(abs(step), 1e-12))
            if abs(step) < 1e-11:
                break
        if i >= 400:
            found.append(abs(m.imag) / (math.pi * value))
    return torch.tensor(found[::-1], dtype=torch.float64)


def law_gap(samples: Tensor, kind: str) -> float:
    """Area between the distribution function of the samples and that of the law.

    Args:
        samples: values of s².
        kind: ``"smooth"`` or ``"Bernoulli"``.
    """
    grid = torch.linspace(0.004, 1.2 * limit_edge("smooth", SPREAD), 900, dtype=torch.float64)
    law = torch.cumulative_trapezoid(density(kind, SPREAD, grid), grid)
    if kind == "Bernoulli":  # near 0 the density is that of 1/log, so what is missing sits below the grid
        law = law + (SPREAD - law[-1]) + (grid[1:] >= limit_edge(kind, SPREAD)) * (1 - SPREAD)
    measured = torch.searchsorted(samples.sort().values, grid[1:], right=True) / len(samples)
    return float((law - measured).abs().sum() * (grid[1] - grid[0]))


def _draw(canvas: Any, samples: dict[str, Tensor]) -> None:
    panels = canvas.subplots(1, len(samples), sharey=True)
    edges = torch.linspace(0, 1.15 * limit_edge("smooth", SPREAD), 40)
    grid = torch.linspace(0.05, float(edges[-1]), 500, dtype=torch.float64)
    laws = {kind: density(kind, SPREAD, grid) for kind in ("smooth", "Bernoulli")}
    for axes, (name, s2) in zip(panels, samples.items(), strict=True):
        axes.hist(s2.numpy(), bins=edges.numpy(), density=True, color=role("cool"), edgecolor=role("ground"))
        for kind, colour, dash in (("smooth", "first", "-"), ("Bernoulli", "second", "--")):
            axes.plot(grid, laws[kind], dash, color=role(colour), label=f"{kind} law")
        atom = limit_edge("Bernoulli", SPREAD)
        axes.plot([atom, atom], [0, 3], "--", color=role("second"))
        axes.set(title=f"{name} ({KINDS[name][1]})", xlabel="s²", ylim=(0, 3))
    panels[0].set(ylabel="density")
    panels[0].legend(loc="upper right")
