"""The picture of what holds: bounds on the accuracy under attack, accuracy in noise, and confidence beside truth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bolza.report import Figure, percent, role, sparkline

__all__ = ["hold"]

Facts = Mapping[str, Any]


def hold(facts: Facts) -> Figure | None:
    """Accuracy under attack between its bounds, accuracy in noise, and the reliability diagram."""
    margin, confidence = facts.get("margin"), facts.get("confidence")
    panels = [
        (draw, part) for draw, part in ((_attack, margin), (_noise, margin), (_trust, confidence)) if part
    ]
    if not panels:
        return None

    def draw(fig: Any) -> None:
        for axes, (panel, part) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            panel(axes, part)
        if margin:
            fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=2)

    spoken, sketch, caption = [], [], []
    if margin:
        ends = ", ".join(
            f"{percent(a)} at {percent(r)}" for r, a in zip(margin["radii"], margin["attacked"], strict=True)
        )
        spoken.append(f"Accuracy under attack: {ends} of the range.")
        noisy = ", ".join(
            f"{percent(a)} at {percent(s)}" for s, a in zip(margin["noise"], margin["noisy"], strict=True)
        )
        spoken.append(f"Accuracy in noise: {noisy} of the range.")
        sketch += [f"attacked  {sparkline(margin['attacked'], limits=(0, 1))}",
                   f"in noise  {sparkline([margin['attacked'][0], *margin['noisy']], limits=(0, 1))}"]  # fmt: skip
        caption.append(
            "The truth lies in the shaded band: above, what attacks left; below, what is certified."
            if margin["certified"]
            else "The truth lies below what attacks left; there is no certificate."
        )
    if confidence:
        spoken.append(
            f"Mean confidence {percent(confidence['mean_confidence'])}, accuracy {percent(confidence['accuracy'])}."
        )
        caption.append(
            "Probabilities are true where the points lie on the diagonal; bars are one standard error."
        )
    return Figure(
        "What holds",
        draw,
        " ".join(caption),
        alt=" ".join(spoken),
        size=(3.2 * len(panels) + 0.8 * (len(panels) == 1), 3.8),
        sketch="\n".join(sketch),
        key="hold",
    )


def _attack(axes: Any, m: Facts) -> None:
    import numpy as np

    radii, upper = np.asarray(m["radii"]), np.asarray(m["attacked"])
    axes.errorbar(
        radii, upper, yerr=m["attacked_error"], color=role("first"), marker="o", markersize=3.8, elinewidth=0.9,
        label="attacked (upper bound)",
    )  # fmt: skip
    if m["certified"]:
        grid = np.linspace(0, np.sqrt(radii[-1]), 400) ** 2
        lower = (np.asarray(m["certified"])[None] > grid[:, None]).mean(1)
        lower[0] = upper[0]
        above = np.interp(grid, radii, upper)
        axes.fill_between(grid, np.minimum(lower, above), above, color=role("cool"), linewidth=0)
        axes.plot(grid, lower, color=role("second"), linestyle="--", label="certified (lower bound)")
    axes.axvline(m["eps"], color=role("muted"), linewidth=0.8, linestyle=":")
    _roots(axes, radii)
    axes.set_xlabel("largest change of an entry,\n% of the range")
    axes.set_title("Accuracy under attack")


def _noise(axes: Any, m: Facts) -> None:
    axes.errorbar(
        (0.0, *m["noise"]), (m["attacked"][0], *m["noisy"]), yerr=(0.0, *m["noisy_error"]),
        color=role("third"), marker="^", markersize=4.2, elinewidth=0.9,
    )  # fmt: skip
    _roots(axes, (0.0, *m["noise"]))
    axes.set_xlabel("standard deviation of the noise,\n% of the range")
    axes.set_title("Accuracy in noise")


def _trust(axes: Any, c: Facts) -> None:
    most = max(c["bins_count"])
    axes.plot([0, 1], [0, 1], color=role("muted"), linewidth=1.0, linestyle="--")
    axes.errorbar(
        c["bins_confidence"], c["bins_accuracy"], yerr=c["bins_error"], color=role("fourth"), linestyle="-",
        linewidth=0.9, elinewidth=0.9,
    )  # fmt: skip
    sizes = [12 + 70 * count / most for count in c["bins_count"]]
    axes.scatter(c["bins_confidence"], c["bins_accuracy"], s=sizes, color=role("fourth"), zorder=3)
    axes.set_xlim(0, 1.03)
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("confidence\n(area: number of samples)")
    axes.set_ylabel("share of right answers")
    axes.set_title("Can its confidence be trusted?")


def _roots(axes: Any, ticks: Any) -> None:
    """A square-root axis with a tick at each value, so that small and large radii are both seen."""
    import numpy as np

    axes.set_xscale("function", functions=(lambda v: np.sqrt(np.maximum(v, 0)), np.square))
    axes.set_xlim(0, 1.02 * ticks[-1])
    shown, last = [], -1.0
    for tick in ticks:  # a label needs room
        root = float(np.sqrt(tick / ticks[-1]))
        shown.append(f"{100 * tick:.2g}" if root - last > 0.085 else "")
        last = root if shown[-1] else last
    axes.set_xticks(ticks, shown)
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("share of right answers")
