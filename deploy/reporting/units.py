"""Numbers as a person reads them: sizes in decimal units, milliseconds, percent and points."""

import math
from collections.abc import Sequence

MINUS = "\u2212"
UNMEASURED = "unmeasured"

# Fractions of a whole: shown in percent, their differences in points.
FRACTIONS = frozenset({"accuracy", "top1", "top5", "f1", "mean-iou"})

NEGLIGIBLE = 1e-6
"""A drop below this, in the metric's own unit, is shown as none: it is rounding."""


def number(value: float, digits: int = 3) -> str:
    """`value` to so many significant digits, never in scientific notation."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")  # 9.996 becomes 10.0, which has a decimal less
    decimals = digits - 1 - math.floor(math.log10(abs(rounded)))
    return fixed(rounded, max(decimals, 0))


def trimmed(value: float) -> str:
    """As `number`, without closing zeros: 8, not 8.00, for what a person wrote."""
    text = number(value)
    return text.rstrip("0").rstrip(".") if "." in text else text


def fixed(value: float, decimals: int) -> str:
    """`value` with so many decimals, a true minus sign, and no negative zero."""
    text = f"{abs(value):.{decimals}f}"
    return f"{MINUS}{text}" if value < 0 and float(text) != 0 else text


def size(size_bytes: float | None) -> str:
    """Bytes in B, kB, MB or GB (decimal), three significant digits."""
    return UNMEASURED if size_bytes is None else _scaled(size_bytes, ("B", "kB", "MB", "GB"))


def count(value: float) -> str:
    """A count in thousands, millions or billions, three significant digits."""
    return _scaled(value, ("", "k", "M", "G")).rstrip()


def _scaled(value: float, names: tuple[str, ...]) -> str:
    # 999.5 of a unit would round to a fourth digit, so it moves to the next one.
    power = next((at for at in range(len(names)) if abs(value) < 999.5 * 1000.0**at), len(names) - 1)
    return f"{number(value / 1000.0**power) if power else fixed(value, 0)} {names[power]}"


def milliseconds(value_ms: float | None) -> str:
    """Milliseconds, three significant digits."""
    return UNMEASURED if value_ms is None else f"{number(value_ms)} ms"


def seconds(value: float) -> str:
    """A duration in ms, s, min or h."""
    if value < 1:
        return milliseconds(value * 1000)
    if value < 60:
        return f"{number(value)} s"
    minutes = round(value / 60)
    if minutes < 60:
        return f"{int(value // 60)} min {int(value % 60)} s"
    return f"{minutes // 60} h {minutes % 60} min"


def between(interval: Sequence[float], digits: int = 3) -> str:
    """An interval of latencies, in ms."""
    return f"[{', '.join(number(end, digits) for end in interval)}]"


def score(metric: str | None, value: float | None) -> str:
    """A metric's value: percent for fractions of a whole, four significant digits otherwise."""
    if value is None:
        return UNMEASURED
    return f"{fixed(100 * value, 2)}%" if metric in FRACTIONS else number(value, 4)


def drop(metric: str | None, value: float | None, unit: bool = True) -> str:
    """A drop of a metric: in points for fractions of a whole, in the metric's own unit otherwise."""
    if value is None:
        return UNMEASURED
    if metric not in FRACTIONS:
        return number(0.0 if abs(value) < NEGLIGIBLE else value)
    return f"{fixed(100 * value, 2)}{' points' if unit else ''}"


def drop_between(metric: str | None, interval: Sequence[float]) -> str:
    """The interval of a drop, without its unit."""
    return f"[{', '.join(drop(metric, end, unit=False) for end in interval)}]"


def limit(name: str, value: float | None, metric: str | None = None) -> str:
    """A value of the budget line called `name`, its unit read from the name."""
    if value is None:
        return UNMEASURED
    if name.endswith("_ms"):
        return f"{trimmed(value)} ms"
    if name.endswith("_bytes"):
        return size(value)
    if name.endswith("_mb"):
        return f"{trimmed(value)} MB"
    if name == "max_drop":
        return drop(metric, value)
    return f"{trimmed(value)}×" if name == "speedup" else trimmed(value)
