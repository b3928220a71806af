"""The pictures of a diagnosis. Orange crosses are the network as it is, blue dots the treated one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bolza.report import Figure, log_axis, role, sparkline

__all__ = ["gradient", "noise", "phase", "signal", "spectra", "training"]

Facts = Mapping[str, Any]

_BEFORE = {"color": role("first"), "marker": "x", "markersize": 4.5, "markeredgewidth": 1.4}
_AFTER = {"color": role("second"), "marker": "o", "markersize": 3.6}
_THIRD = {"color": role("third"), "marker": "^", "markersize": 4.0}
_LEGEND = (
    "Crosses and dots are measured on the batch, with one standard error; broken lines are mean-field theory, "
    "with a gap where a layer has none."
)


def signal(facts: Facts, treated: Facts | None) -> Figure | None:
    """Variance and correlation of the signal, layer by layer."""
    runs = _runs(facts, treated)
    if not runs or not any(_known(rows, "q") for _, rows, _ in runs):
        return None

    def draw(fig: Any) -> None:
        left, right = fig.subplots(1, 2)
        _series(left, runs, "q")
        _log_if_wide(
            left, [v for _, rows, _ in runs for v in (*_values(rows, "q"), *_values(rows, "q_theory"))]
        )
        left.set_title("Variance of the signal")
        left.set_ylabel("mean square pre-activation q")
        _series(right, runs, "c", legend=False)
        right.set_title("Correlation of two inputs")
        right.set_ylabel("cosine c between pre-activations")
        cs = [v for _, rows, _ in runs for v in (*_values(rows, "c"), *_values(rows, "c_theory"))]
        right.set_ylim(min(0.0, *cs) - 0.03 if cs else 0, 1.03)
        for axes in (left, right):
            _layer_axis(axes)

    rows = runs[0][1]
    return Figure(
        "How far the signal gets",
        draw,
        f"{_LEGEND} A variance that falls to zero or a correlation that runs to one means that different "
        "inputs look the same to later layers.",
        alt=_spoken("The variance of the signal", rows, "q", runs)
        + " "
        + _spoken("The correlation", rows, "c", runs),
        sketch=f"variance     {_span(rows, 'q')}\ncorrelation  {_span(rows, 'c', log=False)}",
        key="signal",
    )


def gradient(facts: Facts, treated: Facts | None) -> Figure | None:
    """Gradient norm by layer on a logarithmic axis."""
    runs = _runs(facts, treated)
    if not runs or not any(_known(rows, "gradient") for _, rows, _ in runs):
        return None

    def draw(fig: Any) -> None:
        axes = fig.subplots()
        _series(axes, runs, "gradient")
        log_axis(axes)
        _layer_axis(axes)
        axes.set_ylabel("norm of ∂loss/∂pre-activation")
        axes.set_title("Gradient that reaches each layer")

    rows = runs[0][1]
    point = facts.get("phase") or {}
    slope = "In a chain of equal layers it is a straight line, √χ₁ a layer." if point.get("plain") else ""
    return Figure(
        "How much gradient comes back",
        draw,
        f"Root mean square over the samples. {_LEGEND} {slope} Level is healthy.",
        alt=_spoken("The gradient norm", rows, "gradient", runs),
        size=(9.2, 3.2),
        sketch=f"gradient     {_span(rows, 'gradient')}",
        key="gradient",
    )


def phase(facts: Facts, treated: Facts | None) -> Figure | None:
    """Phase diagram of the activation, with the network before and after."""
    diagram = facts.get("phase_diagram")
    here = facts.get("phase")
    if not diagram or not here or not here["plain"]:
        return None
    there = (treated or {}).get("phase")
    there = there if there and there["plain"] else None

    def draw(fig: Any) -> None:
        import numpy as np

        axes = fig.subplots()
        ws, bs = np.asarray(diagram["sigma_w2"]), np.asarray(diagram["sigma_b2"])
        axes.set_xlim(ws[0], ws[-1])
        axes.set_ylim(bs[0], bs[-1])
        axes.grid(False)
        xi, chi = (_grid(diagram[name]) for name in ("xi_c", "chi_1"))
        top = max(float(np.nanmax(chi)), 1.0) + 1
        axes.contourf(
            ws, bs, np.ma.masked_invalid(chi), [-1.0, 1.0, top], colors=[role("cool"), role("warm")]
        )
        depths = np.ma.masked_invalid(np.log(np.minimum(xi, 1e4)))
        contours = axes.contour(
            ws, bs, depths, np.log([3, 6, 12, 25, 50]), colors=[role("muted")], linewidths=0.7
        )
        axes.clabel(contours, fmt=lambda v: f"{math.exp(v):.0f}", fontsize=8, colors=[role("muted")])
        axes.contour(ws, bs, np.ma.masked_invalid(chi), [1.0], colors=[role("ink")], linewidths=1.8)
        axes.annotate(
            "ordered: signals merge,\ngradients vanish",
            (0.03, 0.96),
            xycoords="axes fraction",
            va="top",
            color=role("muted"),
        )
        axes.annotate(
            "chaotic: signals part,\ngradients explode",
            (0.97, 0.05),
            xycoords="axes fraction",
            ha="right",
            color=role("muted"),
        )
        _place(axes, here, "you are here", _BEFORE, 9)
        if there and (there["sigma_w2"], there["sigma_b2"]) != (here["sigma_w2"], here["sigma_b2"]):
            _place(axes, there, "after the remedy", _AFTER, 8)
        axes.set_xlabel(r"weight variance × fan-in, $\sigma_w^2$")
        axes.set_ylabel(r"bias variance, $\sigma_b^2$")
        axes.set_title(f"Phase diagram of {here['activation']}")

    return Figure(
        "Where the network stands",
        draw,
        "The heavy line is the critical line, where gradients keep their size. Thin lines: ξ_c, the number of "
        "layers over "
        "which information about the input fades by a factor e; networks a few ξ_c deep can be trained.",
        alt=f"Phase diagram over weight and bias variance. The network is at {here['sigma_w2']:.3g}, "
        f"{here['sigma_b2']:.3g}, "
        f"in the {here['regime']} phase"
        + (f"; the treated network at {there['sigma_w2']:.3g}, {there['sigma_b2']:.3g}." if there else "."),
        size=(9.2, 4.0),
        key="phase",
    )


def spectra(facts: Facts, treated: Facts | None) -> Figure | None:
    """Singular values of the Jacobian, and the largest eigenvalues of Hessian and Gauss–Newton matrix."""
    panels = []
    for data, style, label in ((facts, _BEFORE, "as it is"), (treated or {}, _AFTER, "treated")):
        jacobian = (data.get("propagation") or {}).get("jacobian") or {}
        landscape = data.get("landscape") or {}
        panels.append((jacobian.get("singular_values"), landscape, style, label))
    if not any(values or landscape for values, landscape, _, _ in panels):
        return None

    def draw(fig: Any) -> None:
        left, right = fig.subplots(1, 2)
        for values, _, style, label in panels:
            shown = [v for v in values or [] if v is not None and v > 0]
            if shown:
                left.plot(
                    range(1, len(shown) + 1),
                    sorted(shown, reverse=True),
                    linestyle="none",
                    label=label,
                    **style,
                )
        log_axis(left)
        left.axhline(1.0, color=role("muted"), linewidth=0.8, linestyle="--")
        left.set_title("Input–output Jacobian")
        left.set_xlabel("singular value, from the largest")
        _whole_numbers(left)
        left.set_ylabel("size (1 = isometry)")
        if left.get_legend_handles_labels()[0]:
            left.legend()
        names = (("hessian", "Hessian"), ("ggn", "Gauss–Newton"))
        for place, (name, _) in enumerate(names):
            for shift, (_, landscape, style, label) in zip((-0.08, 0.08), panels, strict=True):
                values = [v for v in (landscape.get(name) or {}).get("eigenvalues") or [] if v and v > 0]
                if values:
                    right.plot([place + shift] * len(values), values, linestyle="none", label=label, **style)
        log_axis(right)
        right.set_xticks(range(len(names)), [title for _, title in names])
        right.set_xlim(-0.5, len(names) - 0.5)
        right.set_title("Largest curvatures of the loss")
        right.set_ylabel("eigenvalue λ")

    return Figure(
        "Spectra",
        draw,
        "Left: all singular values should lie near one; many decades below it, directions of the input are "
        "lost. Right: the "
        "largest one limits the learning rate to 2/λ.",
        alt="Two panels: singular values of the Jacobian by rank, and the largest eigenvalues of Hessian and "
        "Gauss–Newton "
        "matrix, for the network as it is and treated.",
        size=(9.2, 3.4),
        key="spectra",
    )


def noise(facts: Facts, treated: Facts | None) -> Figure | None:
    """Spectrum of the gradient covariance, and signal-to-noise by layer."""
    runs = [
        (data, style, label)
        for data, style, label in ((facts, _BEFORE, "as it is"), (treated, _AFTER, "treated"))
        if data and data.get("layers")
    ]
    if not runs:
        return None

    def draw(fig: Any) -> None:
        left, right = fig.subplots(1, 2)
        for data, style, label in runs:
            eigenvalues = [v for v in data.get("eigenvalues") or [] if v and v > 0]
            if eigenvalues:
                left.plot(range(1, len(eigenvalues) + 1), eigenvalues, linestyle="none", label=label, **style)
            known = [
                (i, row["snr"], row.get("snr_error") or 0.0)
                for i, row in enumerate(data["layers"], 1)
                if row["snr"]
            ]
            if shown := [(i, v, min(e, 0.8 * v)) for i, v, e in known if v > 0]:
                xs, ys, errors = zip(*shown, strict=True)
                right.errorbar(xs, ys, yerr=errors, linestyle="none", elinewidth=0.9, label=label, **style)
        log_axis(left)
        log_axis(right)
        left.set_title("Covariance of the per-sample gradient")
        left.set_xlabel("eigenvalue, from the largest")
        left.set_ylabel("size")
        _whole_numbers(left)
        if left.get_legend_handles_labels()[0]:
            left.legend()
        right.set_title("Signal to noise, by layer")
        _layer_axis(right)
        right.set_ylabel("|mean gradient|² / trace of covariance")

    return Figure(
        "Noise of the gradient",
        draw,
        "Left: few large values mean that the noise lives in few directions. Right: the inverse of a value is "
        "the batch size "
        "at which signal and noise of that layer are equal; layers whose mean gradient cannot be told from "
        "zero are missing.",
        alt="Two panels: eigenvalues of the gradient covariance, and signal-to-noise ratio of each layer.",
        size=(9.2, 3.4),
        key="noise",
    )


def training(trials: Mapping[str, Any]) -> Figure | None:
    """Test metric and training loss of all runs of the trial."""
    styles = {"before": _BEFORE, "after": _AFTER, "before_with_prescribed_lr": _THIRD}
    shown = [(key, trials[key]) for key in styles if key in trials]
    if not shown:
        return None
    metric = next(
        (m for m in ("test_accuracy", "test_r2", "test_loss") if m in shown[0][1].curves), "test_loss"
    )
    words = {"test_accuracy": "test accuracy", "test_r2": "R² on test data", "test_loss": "test loss"}

    def draw(fig: Any) -> None:
        left, right = fig.subplots(1, 2)
        for key, trial in shown:
            style = styles[key] | {"markevery": max(len(trial.curves["step"]) // 12, 1)}
            for axes, name in ((left, metric), (right, "train_loss")):
                points = [
                    (s, v)
                    for s, v in zip(trial.curves["step"], trial.curves.get(name, []), strict=False)
                    if v is not None and math.isfinite(v)
                ]
                if points:
                    axes.plot(*zip(*points, strict=True), label=trial.label, **style)
        left.set_title(words[metric][0].upper() + words[metric][1:])
        left.set_ylabel(words[metric])
        if metric == "test_accuracy":
            left.set_ylim(0, 1.02)
        right.set_title("Training loss")
        right.set_ylabel("mean loss of the batch")
        for axes in (left, right):
            axes.set_xlabel("step")
        fig.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)

    known = [v for _, trial in shown for v in trial.curves.get(metric, []) if _finite(v)]
    limits = (0.0, 1.0) if metric == "test_accuracy" or not known else (min(known), max(known))

    def line(trial: Any) -> str:
        return sparkline(trial.curves.get(metric, []), limits=limits)

    ends = "; ".join(f"{trial.label}: {_word(trial.metrics.get(metric))}" for _, trial in shown)
    first, last = (
        shown[0][1],
        next(trial for key, trial in shown if key == "after") if "after" in trials else shown[-1][1],
    )
    return Figure(
        "Before and after",
        draw,
        "All runs share steps, batch size, order of the data and optimizer.",
        alt=f"Training curves. Last {words[metric]}: {ends}.",
        size=(9.2, 3.7),
        sketch=f"before       {line(first)}\nafter        {line(last)}",
        key="training",
    )


def course(trials: Mapping[str, Any]) -> Figure | None:
    """Maximum principle, signal to noise and Gram matrix along the runs before and after."""
    styles = {"before": _BEFORE, "after": _AFTER}
    shown = [
        (key, trials[key]) for key in styles if key in trials and len(trials[key].course.get("step", [])) > 1
    ]
    candidates = (
        ("stationarity", "Distance from stationarity", "‖∂H/∂u‖ over all stages"),
        ("signal_to_noise", "Drift (above 1) or diffusion", "B |g|² / tr Σ of a batch"),
        ("gram_condition", "Spread of the rates of fitting", "condition of the Gram matrix"),
    )
    panels = [p for p in candidates if any(any(_finite(v) for v in t.course[p[0]]) for _, t in shown)]
    if not shown or not panels:
        return None

    def draw(fig: Any) -> None:
        all_axes = fig.subplots(1, len(panels), squeeze=False)[0]
        for axes, (name, title, label) in zip(all_axes, panels, strict=True):
            seen: list[float] = []
            for key, trial in shown:
                pairs = zip(trial.course["step"], trial.course[name], strict=True)
                points = [(step, value) for step, value in pairs if _finite(value) and value > 0]
                if points:
                    axes.plot(*zip(*points, strict=True), label=trial.label, **styles[key])
                    seen += [value for _, value in points]
            if name == "signal_to_noise":
                axes.axhline(1.0, color=role("muted"), linewidth=1)
            _log_if_wide(axes, seen)
            axes.set_title(title)
            axes.set_ylabel(label)
            axes.set_xlabel("step")
        handles, labels = max(
            (axes.get_legend_handles_labels() for axes in all_axes), key=lambda h: len(h[0])
        )
        fig.legend(handles, labels, loc="outside lower center", ncols=2)

    spoken = []
    for _, trial in shown:
        for name, _, label in panels:
            known = [v for v in trial.course[name] if _finite(v)]
            if known:
                spoken.append(f"{trial.label}, {label}: {_word(known[0])} to {_word(known[-1])}")
    return Figure(
        "What the runs did",
        draw,
        "Read on one fixed batch at five steps of each run. By Pontryagin's principle ∂H/∂u vanishes at an optimum; "
        "where noise outweighs signal, more samples a step or a smaller rate help; the wider the spread, the later "
        "the last samples are fitted.",
        alt=f"{'; '.join(spoken)}.",
        size=(9.2, 3.5),
        key="course",
    )


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _runs(facts: Facts, treated: Facts | None) -> list[tuple[str, Sequence[Facts], dict[str, Any]]]:
    runs = [("as it is", facts.get("layers") or [], _BEFORE)]
    if treated and treated.get("layers"):
        runs.append(("treated", treated["layers"], _AFTER))
    return [run for run in runs if run[1]]


def _layer_axis(axes: Any) -> None:
    axes.set_xlabel("layer, from the input")
    _whole_numbers(axes)


def _whole_numbers(axes: Any) -> None:
    low, high = axes.get_xlim()
    if high - low < 1.5:  # one value alone
        axes.set_xlim(math.floor(low), math.ceil(high))
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def _known(rows: Sequence[Facts], name: str) -> bool:
    return any(row.get(name) is not None for row in rows)


def _values(rows: Sequence[Facts], name: str) -> list[float]:
    return [row[name] for row in rows if row.get(name) is not None and math.isfinite(row[name])]


def _series(axes: Any, runs: Sequence[Any], name: str, legend: bool = True) -> None:
    for label, rows, style in runs:
        points = [
            (i, row[name], row.get(f"{name}_error") or 0.0)
            for i, row in enumerate(rows, 1)
            if row.get(name) is not None
        ]
        positive = [(i, v, min(e, 0.99 * v) if v > 0 else e) for i, v, e in points if math.isfinite(v)]
        if name != "c":
            positive = [p for p in positive if p[1] > 0]
        if positive:
            xs, ys, errors = zip(*positive, strict=True)
            axes.errorbar(
                xs, ys, yerr=errors, linestyle="none", elinewidth=0.9, label=f"{label}, measured", **style
            )
        theory = [row.get(f"{name}_theory") for row in rows]
        if _known(rows, f"{name}_theory"):
            alone = [  # a layer between two that are not covered would be a line of no length
                v is not None and all(w is None for w in (*theory[max(i - 1, 0) : i], *theory[i + 1 : i + 2]))
                for i, v in enumerate(theory)
            ]
            axes.plot(
                range(1, len(rows) + 1),
                [math.nan if v is None else v for v in theory],  # broken where a layer is not covered
                linestyle="--",
                marker="_",
                markersize=9,
                markevery=alone,
                linewidth=1.3,
                color=style["color"],
                label=f"{label}, theory",
            )
    if legend:
        axes.legend()


def _log_if_wide(axes: Any, values: Sequence[float]) -> None:
    positive = [v for v in values if v > 0]
    if positive and max(positive) > 30 * min(positive):
        log_axis(axes)
    else:
        axes.set_ylim(bottom=0)


def _grid(rows: Sequence[Sequence[float | None]]) -> Any:
    import numpy as np

    return np.asarray([[math.nan if v is None else v for v in row] for row in rows], dtype=float)


def _place(axes: Any, point: Facts, label: str, style: Mapping[str, Any], size: float) -> None:
    (w0, w1), (b0, b1) = axes.get_xlim(), axes.get_ylim()
    w, b = min(max(point["sigma_w2"], w0), w1), min(max(point["sigma_b2"], b0), b1)
    axes.plot(
        [w],
        [b],
        linestyle="none",
        clip_on=False,
        **{**style, "markersize": size, "markeredgewidth": 2.2, "zorder": 5},
    )
    right = w < (w0 + w1) / 2
    axes.annotate(
        label,
        (w, b),
        xytext=(10 if right else -10, 9),
        textcoords="offset points",
        ha="left" if right else "right",
        weight="bold",
        color=style["color"],
        bbox={"facecolor": role("ground"), "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
        zorder=6,
    )


def _span(rows: Sequence[Facts], name: str, log: bool = True) -> str:
    values = [row.get(name) for row in rows]
    known = _values(rows, name)
    if not known:
        return "not measured"
    return f"{sparkline(values, log=log)}  {_word(known[0])} → {_word(known[-1])}"


def _spoken(what: str, rows: Sequence[Facts], name: str, runs: Sequence[Any]) -> str:
    known = _values(rows, name)
    if not known:
        return ""
    text = f"{what} goes from {_word(known[0])} in the first of {len(rows)} layers to {_word(known[-1])} in the last"
    if len(runs) > 1 and (after := _values(runs[1][1], name)):
        text += f"; treated, from {_word(after[0])} to {_word(after[-1])}"
    return text + "."


def _word(value: float | None) -> str:
    from bolza.report import number

    return number(value)
