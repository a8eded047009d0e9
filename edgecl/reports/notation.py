"""How numbers are written: percent with one decimal, milliseconds with three digits, none as an en dash."""

from __future__ import annotations

import math
from collections.abc import Callable

from edgecl.storage.records import Interval

MISSING = "–"
MINUS = "−"


def fixed(value: float, decimals: int = 1) -> str:
    """Write a number with so many decimals and a true minus sign."""
    text = f"{value:,.{decimals}f}"
    if float(text.replace(",", "")) == 0:
        text = text.removeprefix("-")
    return text.replace("-", MINUS)


def percent(value: float | None) -> str:
    """Write a percentage, 0..100, without its sign."""
    return MISSING if value is None else fixed(value)


def points(value: float) -> str:
    """Write a difference of two percentages, always with its sign."""
    text = fixed(value)
    return text if text.startswith(MINUS) else "+" + text


def milliseconds(value: float | None) -> str:
    """Write a time with three significant digits."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    rounded = float(f"{value:.3g}")
    decimals = max(0, 2 - math.floor(math.log10(abs(rounded))))
    return fixed(rounded, decimals)


def scientific(value: float | None) -> str:
    """Write a small difference with two digits: 3.4e−7."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits}e{int(exponent)}".replace("-", MINUS)


def scaled(value: float | None) -> str:
    """Write a large count with its SI prefix: 4.7 M, 156 k, 0.4 G only from 1,000 M on."""
    if value is None:
        return MISSING
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        # 999,950 reads "1.0 M", not "1,000 k".
        if abs(value) >= limit * 0.9995:
            size = value / limit
            return f"{fixed(size, 1 if abs(size) < 99.95 else 0)} {unit}"
    return fixed(value, 0)


def megabytes(value: float | None) -> str:
    """Write bytes as MB (10^6 bytes), without the unit."""
    if value is None:
        return MISSING
    return fixed(value / 1e6, 2 if value < 1e7 else 1)


def per_second(value: float | None) -> str:
    """Write a rate: whole above 100, else three significant digits."""
    if value is None:
        return MISSING
    return fixed(value, 0) if abs(value) >= 99.5 else milliseconds(value)


def duration(seconds: float) -> str:
    """Write a duration as a person says it: 42 s, 4 min 10 s, 2 h 05 min."""
    if seconds < 60:
        return f"{milliseconds(seconds) if seconds < 10 else fixed(seconds, 0)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def between(interval: Interval | None, write: Callable[[float], str] = percent) -> str:
    """Write an interval as [low, high], or nothing."""
    return "" if interval is None else f"[{write(interval[0])}, {write(interval[1])}]"


def shortened(text: str, length: int) -> str:
    """Cut a long name in its middle, for places with room for so many characters."""
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return text[:head] + "…" + text[len(text) - (length - 1 - head) :]
