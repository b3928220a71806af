"""A watched run in four strips: loss, stability, signal to noise, drift."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bolza.diagnosis.watch.record import WatchRecord
from bolza.report import Figure, log_axis, role, sparkline

__all__ = ["strips"]

_COLOURS = {
    "unstable": "first",
    "edge": "accent",
    "plateau": "muted",
    "stationary": "third",
    "heavy-tailed": "fourth",
    "loops": "second",
}


def strips(record: WatchRecord) -> Figure | None:
    """Draw the run, one strip a question; None where nothing was noted.

    Args:
        record: of the run.
    """
    panels: list[tuple[str, Callable[[Any], None]]] = []
    loss = [v for v in record.curves.get("loss", []) if _known(v)]
    if loss:
        panels.append(("Loss", lambda axes: _loss(axes, record)))
    sharp = [r for r in record.readings.get("sharpness", []) if _known(r["fraction"])]
    if sharp:
        panels.append(("Sharpness over its limit: stable below 1", lambda axes: _sharpness(axes, sharp)))
    noise = [r for r in record.readings.get("noise", []) if _known(r.get("batch_snr"))]
    if noise:
        panels.append(
            ("Signal over noise of a step: drift above 1, diffusion below", lambda axes: _noise(axes, noise))
        )
    drift = [r for r in record.readings.get("drift", []) if _known(r["z_norm"])]
    if drift:
        panels.append(("Drift in standard errors: at rest within the band", lambda axes: _drift(axes, drift)))
    if not panels:
        return None
    end = max(record.steps, 1)

    def draw(canvas: Any) -> None:
        grid = canvas.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (title, paint) in zip(grid, panels, strict=True):
            paint(axes)
            axes.set_title(title)
            for event in record.events:
                axes.axvline(event.step, color=role(_COLOURS[event.kind]), linewidth=1.2, linestyle=":")
        _label_events(grid[0], record, end)
        grid[-1].set_xlabel("step")
        grid[-1].set_xlim(0, end * 1.01)

    said = "; ".join(f"{e.kind} at step {e.step}" for e in record.events) or "no event"
    return Figure(
        "The run in strips",
        draw,
        "Dotted lines mark when something was found; bars are one standard error, and a triangle is a signal that "
        "cannot be told from noise.",
        alt=f"Loss and readings along {record.steps} steps: {said}.",
        size=(9.2, 1.0 + 1.75 * len(panels)),
        sketch=f"loss  {sparkline(loss, log=min(loss) > 0)}" if loss else "",
        key="strips",
    )


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _label_events(axes: Any, record: WatchRecord, end: int) -> None:
    """Names beside their lines, one below the other where they crowd."""
    last, row = -math.inf, 0
    for event in sorted(record.events, key=lambda e: e.step)[:12]:
        row = (row + 1) % 4 if event.step - last < 0.16 * end else 0
        last = event.step
        right = event.step > 0.85 * end
        axes.annotate(
            event.kind,
            (event.step, 0.97 - 0.15 * row),
            xycoords=("data", "axes fraction"),
            xytext=(-4 if right else 4, 0),
            textcoords="offset points",
            ha="right" if right else "left",
            va="top",
            color=role(_COLOURS[event.kind]),
            fontsize=9,
            bbox={"facecolor": role("ground"), "edgecolor": "none", "alpha": 0.8, "pad": 0.8},
        )


def _loss(axes: Any, record: WatchRecord) -> None:
    steps, values = record.curves["step"], record.curves["loss"]
    points = [(s, v) for s, v in zip(steps, values, strict=True) if _known(v)]
    axes.plot(*zip(*points, strict=True), color=role("second"), linewidth=0.9)
    seen = [v for _, v in points]
    if min(seen) > 0 and max(seen) > 10 * min(seen):
        log_axis(axes)


def _bars(axes: Any, rows: Sequence[Mapping[str, Any]], name: str, colour: str) -> list[float]:
    xs = [r["step"] for r in rows]
    ys = [r[name] for r in rows]
    errors = [r.get(f"{name}_error") or 0.0 for r in rows]
    axes.errorbar(xs, ys, yerr=errors, color=role(colour), marker="o", elinewidth=0.9, linewidth=1.2)
    return ys


def _sharpness(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    values = _bars(axes, rows, "fraction", "first")
    axes.axhline(1.0, color=role("muted"), linewidth=1)
    axes.set_ylim(0, max(1.15, 1.1 * max(values)))


def _noise(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    shown = [r for r in rows if r["batch_snr"] > 0]
    values = [r["batch_snr"] for r in shown]
    errors = [min(r["batch_snr_error"] or 0.0, 0.99 * r["batch_snr"]) for r in shown]
    axes.errorbar(
        [r["step"] for r in shown],
        values,
        yerr=errors,
        color=role("third"),
        marker="o",
        elinewidth=0.9,
        linewidth=1.2,
    )
    axes.axhline(1.0, color=role("muted"), linewidth=1)
    if values:
        log_axis(axes)
        axes.set_ylim(0.4 * min(*values, 1.0), 2.5 * max(*values, 1.0))
    lost = [r["step"] for r in rows if r["batch_snr"] <= 0]  # the gradient is not told from noise
    axes.plot(
        lost,
        [0.06] * len(lost),
        color=role("third"),
        marker="v",
        linestyle="none",
        transform=axes.get_xaxis_transform(),
    )


def _drift(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    xs = [r["step"] for r in rows]
    limit = rows[-1]["limit"]
    axes.axhspan(-limit, limit, color=role("cool"), zorder=0)
    axes.plot(xs, [r["z_norm"] for r in rows], color=role("fourth"), marker="o", label="‖θ‖²")
    if all(_known(r["z_loss"]) for r in rows):
        axes.plot(
            xs, [r["z_loss"] for r in rows], color=role("second"), marker="s", linestyle="--", label="loss"
        )
    axes.set_yscale("symlog", linthresh=4)
    axes.set_yticks([-100, -10, -2, 0, 2, 10, 100], ["−100", "−10", "−2", "0", "2", "10", "100"])
    top = max(6.0, *(abs(r[n]) for r in rows for n in ("z_norm", "z_loss") if _known(r[n])))
    axes.set_ylim(-1.4 * top, 1.4 * top)
    axes.legend(loc="upper left", ncols=2)
