"""How the hyper-parameters of a run went, as one figure of small panels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bolza.report import Figure
    from bolza.training import Run

__all__ = ["controls_figure"]

_MOST = 6
_TITLES = {"lr": "learning rate"}
_MEANINGS = {  # of what the controllers of this library log
    "u": "mean factor on the update",
    "mu": "mean momentum",
    "significant": "share of entries whose curvature stands out of the noise",
    "guard": "share of the update that the loss allows",
    "sharpness": "largest curvature",
    "edge": "curvature as a share of the limit of stability at the given rate",
    "noise": "variance of the gradient, tr Σ",
    "signal": "squared mean gradient, estimated without bias, so that it may fall below 0",
    "wanted_batch_size": "batch that the law asks for, before its bounds",
    "planned_loss": "loss above the bottom that the plan expects",
    "spent": "gradients spent on measuring, in batches",
    "cosine_lr": "cosine between the gradient and what a larger rate would have changed",
    "retracted": "steps taken back",
}
_STYLES = ("-", "--", ":", "-.")


def controls_figure(run: Run) -> Figure | None:
    """The trajectory of what changed during a run; nothing where all stayed as it was.

    Args:
        run: its ``controls`` are drawn, at most six panels; groups of parameters share one.

    Returns:
        A figure with a sketch for the terminal, or None.

    Example:
        >>> from bolza.training import Run
        >>> run = Run(control_steps=[1, 2], controls={"lr": [0.1, 0.05], "momentum": [0.9, 0.9]})
        >>> controls_figure(run).sketch
        'learning rate  █▁  0.100 → 0.0500'
        >>> controls_figure(Run(control_steps=[1, 2], controls={"lr": [0.1, 0.1]}))
    """
    from bolza.report import Figure

    panels = _panels(run)
    if not panels:
        return None
    shown, left = panels[:_MOST], panels[_MOST:]
    rows = 1 if len(shown) <= 3 else 2
    caption = "What changed during the run, at the steps at which it was in force"
    constant = _names(run, changing=False)
    if constant:
        caption += f"; constant: {', '.join(_title(name) for name in constant)}"
    if left:
        caption += f"; in the JSON record only: {', '.join(title for title, _ in left)}"
    shown_titles = [title for title, _ in shown]
    meanings = [f"{_title(n)}: {words}" for n, words in _MEANINGS.items() if _title(n) in shown_titles]
    return Figure(
        "Controls",
        lambda canvas: _draw(canvas, run.control_steps, shown, rows),
        ". ".join([caption, *meanings]) + ".",
        size=(9.2, 0.5 + 2.5 * rows),
        sketch="\n".join([_sketch(shown), *meanings]),
        key="controls",
    )


Panel = tuple[str, list[tuple[str, list[float]]]]


def _names(run: Run, *, changing: bool) -> list[str]:
    """Names of the readings that change, or that do not: settings first, in the order of the run."""
    first = [name for name in run.controls if _base(name) in ("lr", "momentum", "weight_decay", "batch_size")]
    ordered = [*first, *(name for name in run.controls if name not in first)]
    return [name for name in ordered if _changes(run.controls[name]) is changing]


def _panels(run: Run) -> list[Panel]:
    """Titles, and the lines of each."""
    found: dict[str, list[tuple[str, list[float]]]] = {}
    for name in _names(run, changing=True):
        base, values = _base(name), run.controls[name]
        group = name[len(base) + 1 :]
        found.setdefault(_title(base), []).append((f"group {int(group or 0) + 1}", values))
    return list(found.items())


def _base(name: str) -> str:
    """The reading without the number of its group: ``lr_1`` is one of ``lr``."""
    base, _, group = name.rpartition("_")
    return base if base and group.isdecimal() else name


def _title(name: str) -> str:
    base = _base(name)
    group = f", group {int(name[len(base) + 1 :]) + 1}" if base != name else ""
    return _TITLES.get(base, base.replace("_", " ")) + group


def _changes(values: Sequence[float]) -> bool:
    known = _known(values)
    return bool(known) and max(known) - min(known) > 1e-9 * max(abs(v) for v in known)


def _known(values: Sequence[float]) -> list[float]:
    return [v for v in values if v is not None and math.isfinite(v)]


def _over_decades(values: Sequence[float]) -> bool:
    """Whether most of it would be lost at the foot of a linear axis: all positive, but for an end at zero."""
    known = sorted(_known(values))
    if not known or known[0] < 0 or (len(known) > 1 and known[1] <= 0):
        return False
    median, fifth = known[len(known) // 2], known[len(known) // 5]
    return known[-1] >= 10 * median or 10 * fifth <= median


def _sketch(panels: Sequence[Panel]) -> str:
    from bolza.report import number, sparkline

    width = max(len(title) for title, _ in panels)
    lines = []
    for title, series in panels:
        values = series[0][1]
        known = _known(values)
        bars = sparkline(values, log=_over_decades(values))
        lines.append(f"{title:{width}}  {bars}  {number(known[0])} → {number(known[-1])}")
    return "\n".join(lines)


def _draw(canvas: Any, steps: Sequence[int], panels: Sequence[Panel], rows: int) -> None:
    from bolza.report import log_axis

    columns = math.ceil(len(panels) / rows)
    grid = canvas.subplots(rows, columns, squeeze=False, sharex=True).flatten()
    for axes in grid[len(panels) :]:
        axes.remove()
    for place, (axes, (title, series)) in enumerate(zip(grid, panels, strict=False)):
        for index, (label, values) in enumerate(series):
            axes.plot(steps[-len(values) :], values, _STYLES[index % len(_STYLES)], label=label)
        if _over_decades([v for _, values in series for v in values]):
            log_axis(axes)
        axes.set_title(title)
        if place + columns >= len(panels):
            axes.set_xlabel("step")
            axes.tick_params(labelbottom=True)
        if len(series) > 1:
            axes.legend()
