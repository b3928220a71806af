"""Draw the figure of the page on propagation: ``python docs/figures_propagation.py``, some seconds.

Left: how many layers deep the trace of an input reaches, by activation. Right: what 50 layers make of the norm of a
gradient on either side of the critical line.
"""

from pathlib import Path
from typing import Any

import torch

from bolza.meanfield import critical_weight_var, fixed_point
from bolza.report import Figure, log_axis, role, to_png

WEIGHTS = torch.linspace(0.3, 4.0, 400, dtype=torch.float64)
NAMES = (("tanh", "first", "-"), ("erf", "second", "--"), ("hardtanh", "third", "-."))


def draw(fig: Any) -> None:
    """Depth scale and gradient factor over the weight variance."""
    left, right = fig.subplots(1, 2)
    for name, colour, dash in NAMES:
        point = fixed_point(name, WEIGHTS, 0.05)
        for axes, values in ((left, point.xi_c), (right, point.chi_1**25)):
            axes.plot(WEIGHTS, values, dash, color=role(colour), label=name)
            critical = float(critical_weight_var(name, bias_var=0.05))
            axes.axvline(critical, color=role(colour), linewidth=0.8, linestyle=":")
    left.set(
        title="Layers until an input is forgotten", ylabel=r"depth scale $\xi_c$, layers", ylim=(0.5, 1e3)
    )
    right.set(title="Gradient norm, layer 1 over layer 51", ylabel="factor χ₁²⁵", ylim=(1e-12, 1e5))
    for axes in (left, right):
        log_axis(axes)
        axes.set_xlabel(r"weight variance × fan-in, $\sigma_w^2$  ($\sigma_b^2$ = 0.05)")
    left.legend(loc="upper right")


figure = Figure("Depth scales", draw, size=(9.2, 3.6), key="depth-scales")
path = Path(__file__).parent / "images" / "depth-scales.png"
path.write_bytes(to_png(figure, dpi=130))
