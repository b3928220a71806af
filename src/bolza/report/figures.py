"""Figures to SVG and PNG through matplotlib's objects: no pyplot, no global state."""

from __future__ import annotations

import io
import math
import re
from html import escape
from typing import TYPE_CHECKING, Any

from bolza.report.document import Figure
from bolza.report.numbers import power
from bolza.report.style import PALETTE, rc

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["log_axis", "to_png", "to_svg"]


def _rendered(figure: Figure, **options: Any) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    buffer = io.BytesIO()
    with matplotlib.rc_context(rc()):
        canvas = Canvas(figsize=figure.size, layout="constrained")
        FigureCanvasAgg(canvas)
        figure.draw(canvas)
        canvas.savefig(buffer, **options)
    return buffer.getvalue()


def to_png(figure: Figure, dpi: int = 160) -> bytes:
    """The figure as PNG, in light colours.

    Args:
        figure: what to draw.
        dpi: dots an inch.

    Returns:
        The bytes of the image.

    Example:
        >>> figure = Figure("A line", lambda fig: fig.subplots().plot([0, 1]), key="line")
        >>> to_png(figure, dpi=40)[1:4]
        b'PNG'
    """
    return _rendered(figure, format="png", dpi=dpi, metadata={"Software": None})


def to_svg(figure: Figure, prefix: str = "") -> str:
    """The figure as one ``<svg>`` element to put into a page.

    Text stays text, colours of the palette become ``var(--role, #light)``, and identifiers carry a prefix
    so that several figures can share a page.

    Args:
        figure: what to draw.
        prefix: put before each identifier; the figure's name where it is empty.

    Returns:
        The element, with ``role="img"`` and the alternative text as its label.

    Example:
        >>> figure = Figure("A line", lambda fig: fig.subplots().plot([0, 1]), key="line")
        >>> to_svg(figure).startswith("<svg")
        True
    """
    prefix = prefix or figure.name
    text = _rendered(figure, format="svg", metadata={"Date": None, "Creator": None}).decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text))
    text = re.sub(r'\s\bid="([^"]+)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', text)
    for name, (light, _) in PALETTE.items():
        text = re.sub(rf"(?<![&\w]){light}\b", f"var(--{name}, {light})", text, flags=re.I)
    box = re.search(r'viewBox="([^"]+)"', text)
    label = escape(figure.alt or figure.caption or figure.title, quote=True)
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    head = f'<svg {spaces} role="img" aria-label="{label}"'
    if box:
        head += f' viewBox="{box.group(1)}"'
    return re.sub(r"<svg\b[^>]*>", lambda _: head + ">", text, count=1).strip()


def log_axis(axes: Axes, which: str = "y") -> None:
    """Set a logarithmic axis whose ticks read 10⁻³ in plain text.

    Powers of ten are labelled; where the axis shows less than a decade and a half, values between them too.

    Args:
        axes: matplotlib axes.
        which: ``"x"`` or ``"y"``.

    Example:
        >>> from matplotlib.figure import Figure as Canvas
        >>> axes = Canvas().subplots()
        >>> log_axis(axes)
        >>> axes.get_yscale()
        'log'
    """
    from matplotlib.ticker import FuncFormatter, Locator, LogLocator, MaxNLocator

    class Between(Locator):
        """Ticks between powers of ten, if there are too few of those; settled when the limits are known."""

        def __call__(self) -> Any:
            low, high = sorted(float(v) for v in self.axis.get_view_interval())  # type: ignore[union-attr]
            decades = math.log10(high / low) if low > 0 else math.inf
            if decades >= 1.5:
                return []
            ticks = (
                LogLocator(base=10, subs=(2.0, 5.0)).tick_values(low, high)
                if decades > 0.6
                else MaxNLocator(4).tick_values(low, high)
            )
            return [t for t in ticks if low <= t <= high and not _is_power(t)]

    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(base=10, numticks=8))
    axis.set_major_formatter(FuncFormatter(_power_label))
    axis.set_minor_locator(Between())
    axis.set_minor_formatter(FuncFormatter(_power_label))


def _is_power(value: float) -> bool:
    return value > 0 and abs(math.log10(value) - round(math.log10(value))) < 1e-6


def _power_label(value: float, _: Any = None) -> str:
    if value <= 0:
        return ""
    exponent = round(math.log10(value)) if _is_power(value) else math.floor(math.log10(value))
    if -2 <= exponent <= 3:
        return f"{value:.4g}"
    return power(exponent) if _is_power(value) else f"{value / 10.0**exponent:.3g}×{power(exponent)}"
