"""Numbers as people read them: 11,510, a loss with four digits behind the point, 9 min 10 s."""

import math
import re


def duration(seconds: float) -> str:
    """Return a time in its two largest units, as in "8 s", "9 min 10 s" or "2 h 5 min"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(whole / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(whole / 3600)
    return f"{hours // 24} d {hours % 24} h"


def short_duration(seconds: float) -> str:
    """Return a time in one unit, of which there are less than a hundred: "8 s", "73 min", "5 h", "12 d"."""
    for size, unit in ((1, "s"), (60, "min"), (3600, "h")):
        if round(seconds / size) < 100:
            return f"{max(0, round(seconds / size))} {unit}"
    return f"{round(seconds / 86400):,} d"


def short_count(value: float) -> str:
    """Return a count to two or three digits, as in "950", "2.4k", "12k", "1.3M"."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size * 0.9995:
            return f"{value / size:.{1 if value < 9.95 * size else 0}f}{letter}"
    return f"{value:.0f}"


def number(value: float) -> str:
    """Return a number with separators from 1,000 on, as in "11,510"; smaller ones have four digits that count.

    A number below a thousandth is written with an exponent, as in "2e-4".
    """
    if isinstance(value, int) or (math.isfinite(value) and abs(value) >= 999.95):
        return f"{value:,.0f}"
    if value and abs(value) < 1e-3:
        return exponent(value)
    return f"{value:.4g}"


def exponent(value: float, digits: int = 3) -> str:
    """Return a learning rate or another small number to so many digits, as in "1.95e-4"; 0 is "0"."""
    if not value or not math.isfinite(value):
        return f"{value:g}"
    mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"


def loss(value: float) -> str:
    """Return a loss in nats with four digits behind the point."""
    return f"{value:.4f}"


def natural_order(text: str) -> list[str | int]:
    """Return a key to sort words by so that numbers inside them count as numbers: r4, r8, r16."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split("([0-9]+)", text))]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's words, else its kind."""
    return str(error).strip().split("\n")[0] or type(error).__name__
