"""The phase diagram of a random network: regimes, critical line and depth scales over (σ_w², σ_b²).

Shared by ``bolza phase`` and by the studies; the numbers are those of `bolza.meanfield`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bolza.meanfield import critical_weight_var, fixed_point, resolve_activation
from bolza.meanfield.phase import TRAINABLE_DEPTH_SCALES
from bolza.ops.errors import ArgumentError
from bolza.report import Cell, Document, Figure, Table, Text, Tile, Tiles, number, role

__all__ = ["PhaseMap", "phase_document", "profile"]

_LEVELS = (1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0)  # ξ_c contours, in layers
_TONES: dict[str, Any] = {"ordered": "info", "critical": "good", "chaotic": "warn"}
_MEANING = {
    "ordered": "inputs grow alike, gradients vanish",
    "critical": "signals and gradients get through at any depth",
    "chaotic": "near inputs are torn apart, gradients explode",
}


@dataclass(frozen=True)
class PhaseMap:
    """Regimes and depth scales on a grid.

    Args:
        activation: anything that `bolza.meanfield.resolve_activation` reads.
        name: its name, for titles.
        weight_vars: σ_w² of the columns.
        bias_vars: σ_b² of the rows.
        xi_c: depth scale, shape (bias_vars, weight_vars).
        chi_1: slope of the correlation map at c = 1, same shape; 1 on the critical line.
        line: critical σ_w² of each row, nan where a row has none.
    """

    activation: Any
    name: str
    weight_vars: Tensor
    bias_vars: Tensor
    xi_c: Tensor
    chi_1: Tensor
    line: Tensor

    @classmethod
    def compute(
        cls,
        activation: Any,
        weight_range: tuple[float, float],
        bias_range: tuple[float, float],
        points: int = 121,
    ) -> PhaseMap:
        """Solve for the fixed points on a grid.

        Args:
            activation: anything that `bolza.meanfield.resolve_activation` reads.
            weight_range: lowest and highest σ_w².
            bias_range: lowest and highest σ_b².
            points: columns of the grid; the rows are two thirds of them. Half as many for a function with
                kinks and a quarter for one that is sampled, which take longer.

        Raises:
            ArgumentError: a range is empty or negative, or the activation is not known.
        """
        for which, (low, high) in (("weight_var_range", weight_range), ("bias_var_range", bias_range)):
            if not 0 <= low < high < math.inf:
                raise ArgumentError(
                    f"{which} runs from {low:g} to {high:g}: variances are not negative, and the second number "
                    "must be the larger one."
                )
        act = resolve_activation(activation)
        if act.replicas:
            act, points = act.replicas[0], points // 4
        elif act.kinks and act.closed is None:
            points //= 2
        weights = torch.linspace(*weight_range, points, dtype=torch.float64)
        share = torch.linspace(0, 1, 2 * points // 3, dtype=torch.float64)
        biases = (
            bias_range[0] + (bias_range[1] - bias_range[0]) * share**2
        )  # the line bends most near σ_b² = 0
        point = fixed_point(act, weights, biases[:, None])
        return cls(act, _name(activation), weights, biases, point.xi_c, point.chi_1, _line(act, biases))

    def figure(self, line_at: float | None = None, here: tuple[float, float] | None = None) -> Figure:
        """The diagram.

        Args:
            line_at: σ_b² at which a dashed line is drawn to the critical σ_w².
            here: (σ_w², σ_b²) of a network, marked *you are here*.
        """
        return Figure(
            f"Order and chaos of {self.name} networks",
            partial(_draw, phase=self, line_at=line_at, here=here),
            caption=(
                "Left of the heavy line signals die out (ordered), right of it they are scrambled (chaotic). Thin "
                "lines join networks of equal ξ_c, the layers in which the trace of an input falls by a factor e; "
                "networks a few times deeper than that do not train. On the heavy line ξ_c is infinite."
            ),
            alt=f"Phase diagram of {self.name} over weight and bias variance with contours of the depth scale.",
            size=(9.2, 5.0),
            key="phase-diagram",
        )


def profile(activation: Any, bias_var: float, weight_range: tuple[float, float], rows: int = 9) -> Table:
    """Fixed point and depth scales along one σ_b², as a table; the critical σ_w² is one of its rows.

    Args:
        activation: anything that `bolza.meanfield.resolve_activation` reads.
        bias_var: σ_b².
        weight_range: lowest and highest σ_w².
        rows: about how many values of σ_w².
    """
    act = resolve_activation(activation)
    critical = _critical(act, bias_var)
    values = _round_values(*weight_range, rows)
    if weight_range[0] <= critical <= weight_range[1]:
        values = sorted([v for v in values if abs(v - critical) > 1e-6] + [critical])
    at = torch.tensor(values, dtype=torch.float64)
    p = fixed_point(act, at, bias_var)
    body = []
    for i, weight in enumerate(values):
        regime = "critical" if weight == critical else str(p.regime[i])
        fields = [p.q[i], p.chi_1[i], p.c[i], p.xi_q[i], p.xi_c[i], p.xi_grad[i]]
        if weight == critical:  # solved to rounding; what is infinite there is shown so
            fields[4] = fields[5] = torch.tensor(math.inf)
        numbers = [number(float(v), 4) for v in fields]
        body.append(
            (f"{weight:.6f}" if weight == critical else f"{weight:g}", Cell(regime, _TONES[regime]), *numbers)
        )
    return Table(
        f"{_name(activation)}, σ_b² = {bias_var:g}",
        ("σ_w²", "regime", "q*", "χ₁", "c*", "ξ_q", "ξ_c", "ξ_∇"),
        body,
        caption=(
            "q*: variance that deep layers settle at.  χ₁: factor on the distance of near inputs, and, unless the "
            "function jumps or is noisy, on the gradient's variance.  c*: correlation of two inputs deep down.\n"
            "ξ: layers in which the variance (q), the correlation (c), the gradient (∇) changes by a factor e."
        ),
        align=("right", "left", "right", "right", "right", "right", "right", "right"),
    )


def phase_document(
    activation: Any,
    bias_var: float,
    weight_range: tuple[float, float] = (0.5, 4.0),
    bias_range: tuple[float, float] = (0.0, 0.25),
    here: tuple[float, float] | None = None,
    points: int = 121,
) -> tuple[Document, dict[str, Any]]:
    """The answer of ``bolza phase``.

    Args:
        activation: anything that `bolza.meanfield.resolve_activation` reads.
        bias_var: σ_b² of the table.
        weight_range: σ_w² of diagram and table.
        bias_range: σ_b² of the diagram.
        here: (σ_w², σ_b²) of a network to place in the diagram.
        points: columns of the diagram's grid.

    Returns:
        The report, and the record for JSON.

    Raises:
        ArgumentError: a variance or a range makes no sense, or the activation is not known.
    """
    if not (math.isfinite(bias_var) and bias_var >= 0):
        raise ArgumentError(f"bias_var is {bias_var:g}: a variance must be finite and not negative.")
    phase = PhaseMap.compute(activation, weight_range, bias_range, points)
    critical = _critical(phase.activation, bias_var)
    parts: list[Any] = [profile(activation, bias_var, weight_range)]
    record: dict[str, Any] = {
        "schema": "bolza.phase/1",
        "activation": phase.name,
        "bias_var": bias_var,
        "critical_weight_var": critical,
    }
    if math.isnan(critical):
        summary = f"No σ_w² is critical here: {_why_none(phase.activation, bias_var)}"
    else:
        summary = f"At σ_b² = {bias_var:g} the critical σ_w² of {phase.name} is {critical:.6f}."
    if here is not None:
        tiles, record["here"] = _here(phase.activation, here)
        parts.insert(0, tiles)
    grid = {
        "weight_vars": phase.weight_vars,
        "bias_vars": phase.bias_vars,
        "xi_c": phase.xi_c,
        "chi_1": phase.chi_1,
    }
    record["grid"] = {key: value.tolist() for key, value in grid.items()}
    record["critical_line"] = phase.line.tolist()
    shown = bias_var if phase.bias_vars[0] <= bias_var <= phase.bias_vars[-1] else None
    parts += [phase.figure(shown, here), Text(_READING, "How to read it")]
    return Document(f"Order and chaos of {phase.name} networks", summary, parts), record


_READING = (
    "The weights of a layer have variance σ_w²/fan-in and its biases σ_b². Initialise on the critical line to train "
    f"deep networks; away from it, keep the depth below about {TRAINABLE_DEPTH_SCALES:g} ξ_c."
)


def _here(act: Any, here: tuple[float, float]) -> tuple[Tiles, dict[str, Any]]:
    p = fixed_point(act, *here)
    regime = str(p.regime)
    record = {"weight_var": here[0], "bias_var": here[1], "regime": regime}
    record |= {
        key: float(getattr(p, key))
        for key in ("q", "c", "chi_q", "chi_1", "chi_c", "xi_q", "xi_c", "xi_grad")
    }
    return Tiles(
        [
            Tile("you are here", regime, _MEANING[regime], _TONES[regime]),
            Tile("χ₁", number(float(p.chi_1), 4), "factor on the gradient's variance per layer"),
            Tile(
                "ξ_c",
                f"{number(float(p.xi_c), 4)} layers",
                f"keep the depth below about {TRAINABLE_DEPTH_SCALES:g} of these",
            ),
        ]
    ), record


def _critical(act: Any, bias_var: float) -> float:
    try:
        return float(critical_weight_var(act, bias_var))
    except ArgumentError:
        return math.nan


def _why_none(act: Any, bias_var: float) -> str:
    try:
        critical_weight_var(act, bias_var)
    except ArgumentError as error:
        return str(error)
    return ""


def _line(act: Any, biases: Tensor) -> Tensor:
    """Critical σ_w² of each σ_b², nan where there is none."""
    try:
        return critical_weight_var(act, biases)
    except ArgumentError:  # some have none
        return torch.tensor([_critical(act, float(bias)) for bias in biases], dtype=torch.float64)


def _name(activation: Any) -> str:
    if isinstance(activation, str):
        return activation.rpartition(":")[2]
    return str(
        getattr(activation, "name", None) or getattr(activation, "__name__", type(activation).__name__)
    )


def _round_values(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers from ``low`` to ``high``."""
    rough = (high - low) / max(count - 1, 1)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _draw(canvas: Any, phase: PhaseMap, line_at: float | None, here: tuple[float, float] | None) -> None:
    from matplotlib.patheffects import withStroke

    axes = canvas.subplots()
    axes.grid(False)
    halo = [withStroke(linewidth=3, foreground=role("ground"))]
    x, y = phase.weight_vars.numpy(), phase.bias_vars.numpy()
    chi = phase.chi_1.nan_to_num(posinf=10.0)
    axes.contourf(
        x, y, chi.numpy(), levels=[-1.0, 1.0, math.inf], colors=[role("cool"), role("warm")], zorder=0
    )
    _draw_contours(axes, phase, [at for at in (line_at, here and here[1]) if at is not None], halo)
    known = ~phase.line.isnan()
    inside = known & (phase.line >= x[0]) & (phase.line <= x[-1])
    if bool(inside.any()):
        axes.plot(phase.line[inside], phase.bias_vars[inside], color=role("ink"), linewidth=2.6, zorder=3)
    axes.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))
    axes.set(
        xlabel="weight variance $\\sigma_w^2$  (= fan-in × variance of a weight)",
        ylabel="bias variance $\\sigma_b^2$",
    )
    for spine in ("top", "right"):
        axes.spines[spine].set_visible(False)
    if line_at is not None:
        _mark_line(axes, phase, line_at, halo)
    if here is not None:
        _mark_here(axes, here, halo)
    _name_sides(axes, phase)


def _draw_contours(axes: Any, phase: PhaseMap, taken: list[float], halo: list[Any]) -> None:
    """Lines of equal ξ_c, labelled along one row that stays clear of the marks at the σ_b² in ``taken``."""
    unbounded = ~torch.isfinite(phase.xi_c) & ((phase.chi_1 - 1).abs() > 1e-6)
    # 1/ξ_c with the sign of the side is smooth through the critical line, where ξ_c itself is not.
    rate = ((phase.chi_1 - 1).sign() / phase.xi_c).masked_fill(unbounded, math.nan)
    low, high = float(phase.bias_vars[0]), float(phase.bias_vars[-1])
    row_at = max(
        (0.75, 0.5, 0.3), key=lambda f: min([1.0] + [abs(low + f * (high - low) - at) for at in taken])
    )
    row = int((phase.bias_vars - low - row_at * (high - low)).abs().argmin())
    for sign, colour in ((-1, role("second")), (1, role("first"))):
        side = (
            rate.where(rate * sign >= 0, torch.tensor(math.nan, dtype=torch.float64))
            if bool(unbounded.any())
            else rate
        )
        seen = side[side * sign > 0]
        levels = sorted(sign / v for v in _LEVELS if seen.numel() and seen.min() < sign / v < seen.max())
        if not levels:
            continue
        lines = axes.contour(
            phase.weight_vars,
            phase.bias_vars,
            side.numpy(),
            levels=levels,
            colors=colour,
            linewidths=1.1,
            linestyles="-",
            zorder=2,
        )
        spots = [
            (x, float(phase.bias_vars[row]))
            for x in (_crossing(phase.weight_vars, side[row], v) for v in levels)
        ]
        spots = [spot for spot in spots if not math.isnan(spot[0])]
        if not spots:
            continue
        first = sign / 10
        for text in axes.clabel(
            lines,
            fmt=lambda v, f=first: "$\\xi_c$ = 10" if abs(v - f) < 1e-9 else f"{abs(1 / v):.0f}",
            fontsize=9,
            inline=True,
            inline_spacing=4,
            manual=spots,
        ):
            text.set_path_effects(halo)


def _crossing(x: Tensor, values: Tensor, level: float) -> float:
    """First place where a row passes a level, away from the ends of the row; nan if it does not."""
    above = values > level
    change = ((above[1:] != above[:-1]) & ~values[1:].isnan() & ~values[:-1].isnan()).nonzero().flatten()
    margin = len(x) // 30
    change = change[(change >= margin) & (change < len(x) - margin)]
    if not len(change):
        return math.nan
    i = int(change[0])
    return float(x[i] + (level - values[i]) / (values[i + 1] - values[i]) * (x[i + 1] - x[i]))


def _mark_line(axes: Any, phase: PhaseMap, line_at: float, halo: list[Any]) -> None:
    weight = _critical(phase.activation, line_at)
    if not phase.weight_vars[0] <= weight <= phase.weight_vars[-1]:
        return
    style = {"color": role("ink"), "linewidth": 1.0, "linestyle": (0, (4, 3)), "zorder": 3}
    axes.plot([float(phase.weight_vars[0]), weight], [line_at, line_at], **style)
    axes.plot([weight, weight], [float(phase.bias_vars[0]), line_at], **style)
    at_floor = line_at - phase.bias_vars[0] < 0.05 * (phase.bias_vars[-1] - phase.bias_vars[0])
    axes.plot([weight], [line_at], "o", color=role("ink"), markersize=6, zorder=4, clip_on=False)
    axes.annotate(
        f"critical at $\\sigma_b^2$ = {line_at:g}:\n$\\sigma_w^2$ = {weight:.4f}",
        (weight, line_at),
        xytext=(12, 5 if at_floor else 0),
        textcoords="offset points",
        va="bottom" if at_floor else "center",
        color=role("ink"),
        path_effects=halo,
        zorder=5,
    )


def _mark_here(axes: Any, here: tuple[float, float], halo: list[Any]) -> None:
    axes.plot(
        [here[0]],
        [here[1]],
        "*",
        color=role("fourth"),
        markeredgecolor=role("ground"),
        markersize=17,
        zorder=6,
        clip_on=False,
    )
    axes.annotate(
        "you are here",
        here,
        xytext=(0, 12),
        textcoords="offset points",
        ha="center",
        weight="bold",
        color=role("fourth"),
        path_effects=halo,
        zorder=6,
        annotation_clip=False,
    )


def _name_sides(axes: Any, phase: PhaseMap) -> None:
    """Names of the regimes, above the plot so that they hide nothing."""
    top = (
        float(phase.line[-1])
        if not phase.line[-1].isnan()
        else float(phase.line.nan_to_num(math.nan).nanmean())
    )
    low, high = float(phase.weight_vars[0]), float(phase.weight_vars[-1])
    if math.isnan(top) or not low < top < high:
        axes.set_title("contours: $\\xi_c$ in layers")
        return
    at = min(max((top - low) / (high - low), 0.2), 0.78)
    style = {"transform": axes.transAxes, "va": "bottom", "fontsize": 10.5}
    axes.text(0.0, 1.075, "ordered", color=role("second"), weight="bold", **style)
    axes.text(0.0, 1.02, "gradients vanish", color=role("muted"), **style)
    axes.text(1.0, 1.075, "chaotic", color=role("first"), weight="bold", ha="right", **style)
    axes.text(1.0, 1.02, "gradients explode", color=role("muted"), ha="right", **style)
    axes.text(at, 1.075, "critical", color=role("ink"), weight="bold", ha="center", **style)
    axes.text(at, 1.02, "$\\chi_1 = 1$,  $\\xi_c = \\infty$", color=role("muted"), ha="center", **style)
