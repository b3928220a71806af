"""Numbers in words: three figures, true signs, powers of ten that everybody can read."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["number", "percent", "plus_minus", "power", "sparkline"]

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_BARS = "▁▂▃▄▅▆▇█"


def power(exponent: int) -> str:
    """Power of ten: ``10⁻³``."""
    return f"10{str(int(exponent)).translate(_SUPERSCRIPT)}"


def number(value: float | int | None, digits: int = 3) -> str:
    """A number to ``digits`` figures: plain between 0.001 and 100 000, else with a power of ten.

    Example:
        >>> number(0.00012345), number(1234.5678), number(float("inf")), number(None)
        ('1.23×10⁻⁴', '1230', '∞', '–')
    """
    if value is None:
        return "–"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**6:
        return str(value).replace("-", "−")
    value = float(value)
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    mantissa_text, exponent_text = f"{value:.{digits - 1}e}".split("e")
    exponent = int(exponent_text)
    if -3 <= exponent < 5:
        rounded = float(f"{value:.{digits - 1}e}")
        text = f"{rounded:.{max(digits - 1 - exponent, 0)}f}"
    else:
        text = f"{mantissa_text}×{power(exponent)}"
    return text.replace("-", "−")


def plus_minus(value: float | int | None, error: float | None, unit: str = "") -> str:
    """A number with its error, rounded so that the error keeps two figures at most.

    An error below the fourth figure of the number is not shown.

    Example:
        >>> plus_minus(1.23456, 0.0123), plus_minus(96.4, None, "%"), plus_minus(2500.0, 130.0)
        ('1.235 ± 0.012', '96.4 %', '2500 ± 130')
    """
    tail = f" {unit}" if unit else ""
    if (
        value is None
        or error is None
        or isinstance(value, int)
        or not math.isfinite(value)
        or not math.isfinite(error)
        or error <= 0
    ):
        return number(value) + tail
    if error < 5e-4 * abs(value):
        return number(value, 4) + tail
    scale = max(abs(value), error)
    exponent = math.floor(math.log10(scale))
    if exponent < -3 or exponent >= 5:
        factor = 10.0**exponent
        places = _places(error / factor)
        body = f"({value / factor:.{places}f} ± {error / factor:.{places}f})×{power(exponent)}"
    else:
        places = _places(error)
        step = 10.0 ** (-_exponent_of_second_figure(error)) if places == 0 else 1.0
        body = (
            f"{value:.{places}f} ± {error:.{places}f}"
            if places
            else f"{round(value / step) * step:.0f} ± {round(error / step) * step:.0f}"
        )
    return body.replace("-", "−") + tail


def _exponent_of_second_figure(error: float) -> int:
    return -(math.floor(math.log10(error)) - 1)


def _places(error: float) -> int:
    return min(max(_exponent_of_second_figure(error), 0), 6)


def percent(fraction: float | None) -> str:
    """A fraction as per cent with one decimal.

    Example:
        >>> percent(0.975), percent(None)
        ('97.5 %', '–')
    """
    return "–" if fraction is None or not math.isfinite(fraction) else f"{100 * fraction:.1f} %"


def sparkline(
    values: Sequence[float | None],
    width: int = 40,
    log: bool = False,
    limits: tuple[float, float] | None = None,
) -> str:
    """A row of block characters, one a value, at most ``width``; gaps where a value is missing.

    Args:
        values: what to draw.
        width: characters.
        log: draw the logarithm.
        limits: lowest and highest value; those of the data by default.

    Example:
        >>> sparkline([0, 1, 2, 3])
        '▁▃▆█'
    """
    points = [
        None
        if v is None or not math.isfinite(v) or (log and v <= 0)
        else (math.log10(v) if log else float(v))
        for v in values
    ]
    if len(points) > width:
        points = [points[round(i * (len(points) - 1) / (width - 1))] for i in range(width)]
    known = [p for p in points if p is not None]
    if not known:
        return ""
    low, high = limits or (min(known), max(known))
    span = high - low if high - low > 1e-12 * max(abs(high), abs(low), 1e-300) else 0.0
    return "".join(
        " " if p is None else _BARS[min(max(round((p - low) / span * (len(_BARS) - 1)), 0), 7) if span else 3]
        for p in points
    )
