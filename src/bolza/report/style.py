"""One palette and one look for every figure.

The colours keep their distance for the three common kinds of colour blindness and in grey; every series
also has its own marker or dash. In a page, each colour becomes a CSS variable, so figures follow the
reader's light or dark mode.
"""

from __future__ import annotations

from typing import Any

__all__ = ["PALETTE", "rc", "role"]

# role: (in light, in dark). The light value is what matplotlib draws and what a PNG shows.
PALETTE: dict[str, tuple[str, str]] = {
    "ink": ("#1b1f24", "#e6edf3"),
    "muted": ("#57606b", "#9aa7b4"),
    "grid": ("#e3e6ea", "#2b323b"),
    "ground": ("#fefefe", "#161b22"),
    "first": ("#c2410c", "#ff9d5c"),
    "second": ("#0b62b8", "#66b3ff"),
    "third": ("#00795c", "#3fd0a5"),
    "fourth": ("#93419b", "#d69be0"),
    "cool": ("#d7e7f6", "#17324d"),
    "warm": ("#fbe3d3", "#4a2a17"),
    "accent": ("#8a6100", "#e7bd4d"),
}


def role(name: str) -> str:
    """The colour of a role, as matplotlib wants it.

    Args:
        name: ``ink``, ``muted``, ``grid``, ``ground``, four series ``first`` … ``fourth``, two areas
            ``cool`` and ``warm``, or ``accent``.

    Example:
        >>> role("ink").startswith("#")
        True
    """
    return PALETTE[name][0]


def rc() -> Any:
    """Settings for ``matplotlib.rc_context``; nothing global is changed."""
    from cycler import cycler

    ink, muted = role("ink"), role("muted")
    return {
        "font.family": ["DejaVu Sans"],
        "font.size": 10.0,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlecolor": ink,
        "axes.titlepad": 8.0,
        "axes.labelsize": 10.0,
        "axes.labelcolor": muted,
        "axes.edgecolor": muted,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": role("ground"),
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.unicode_minus": True,
        "axes.prop_cycle": cycler(color=[role(n) for n in ("first", "second", "third", "fourth")]),
        "grid.color": role("grid"),
        "grid.linewidth": 0.8,
        "xtick.color": muted,
        "ytick.color": muted,
        "xtick.labelcolor": muted,
        "ytick.labelcolor": muted,
        "xtick.labelsize": 9.5,
        "ytick.labelsize": 9.5,
        "xtick.major.size": 3.0,
        "ytick.major.size": 3.0,
        "xtick.minor.size": 0.0,
        "ytick.minor.size": 0.0,
        "text.color": ink,
        "lines.linewidth": 1.6,
        "lines.markersize": 3.6,
        "lines.solid_capstyle": "round",
        "legend.frameon": False,
        "legend.fontsize": 9.5,
        "legend.handlelength": 1.8,
        "figure.facecolor": role("ground"),
        "figure.edgecolor": role("ground"),
        "figure.dpi": 100.0,
        "savefig.facecolor": role("ground"),
        "savefig.dpi": 100.0,
        "svg.fonttype": "none",
        "svg.hashsalt": "bolza",
        "text.usetex": False,
        "axes.formatter.use_mathtext": False,
        "path.simplify": True,
    }
