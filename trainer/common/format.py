"""Numbers as text, for tables, logs, notes and pictures: every command writes the same quantity in the same way.

A value that is not known (None or NaN) is written as ABSENT. Nothing here is for files that programs read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import groupby

ABSENT = "-"
"""Text of a value that is not known."""

_LARGE = ("", "K", "M", "B", "T")
_SI = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0), ("m", 1e-3), ("u", 1e-6), ("n", 1e-9))


def number(value: float | None, spec: str) -> str:
    """Format a value by a format specification such as `.4f`, `+.4f` or `,.0f`."""
    return ABSENT if value is None or math.isnan(value) else format(value, spec)


def count(value: float, digits: int = 4) -> str:
    """Abbreviate a count of things to `digits` (at least 3) significant digits: 147.5K, 777.9M, 5.742B, 31.46T."""
    for unit in _LARGE:
        text = f"{value:.{digits}g}"
        if abs(float(text)) < 1000 or unit == _LARGE[-1]:
            break
        value /= 1000
    return text + unit


def quantity(value: float, unit: str) -> str:
    """Format a physical quantity with an SI prefix and three significant digits: 12.3 GB/s, 1.5 TFLOP/s, 350 us."""
    for prefix, scale in _SI:
        rounded = float(f"{value:.3g}")
        if abs(rounded) >= scale or prefix == "n":
            break
    if rounded == 0:
        return f"0 {unit}"
    return f"{value / scale:.3g} {prefix}{unit}"


def size(number_of_bytes: float) -> str:
    """Format a number of bytes with a decimal prefix: 114 MB, 12.3 GB."""
    return quantity(number_of_bytes, "B")


def seconds(value: float) -> str:
    """Format a measured or predicted time with three significant digits: 350 us, 12.5 ms, 1.23 s, 125 s."""
    return quantity(value, "s") if value < 999.5 else f"{value:,.0f} s"


def duration(value: float) -> str:
    """Format a waiting time or an age in seconds as a person would say it: 45 s, 12 min, 3 h 20 min."""
    if value < 99.5:
        return f"{value:.0f} s"
    minutes = round(value / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def loss(nats: float | None) -> str:
    """Format a loss in nats per token: 3.0992."""
    return number(nats, ".4f")


def loss_change(nats: float | None) -> str:
    """Format a difference between two losses, with its sign: +0.0087."""
    return number(nats, "+.4f")


def perplexity(nats: float) -> str:
    """Format the perplexity of a loss in nats per token: 22.2; `inf` where a float cannot hold it."""
    value = math.exp(nats) if nats < 700 else math.inf
    return f"{value:,.1f}" if value < 1e9 else f"{value:.3g}"


def interval(low: float | None, high: float | None, spec: str = "+.4f") -> str:
    """Format a confidence interval: -0.0310 to +0.0494; its ends may be infinite."""
    ends = number(low, spec), number(high, spec)
    return ABSENT if ABSENT in ends else " to ".join(ends)


def p_value(value: float | None) -> str:
    """Format the p-value of a test: 0.0443, or <0.0001."""
    return "<0.0001" if value is not None and value < 1e-4 else number(value, ".4f")


def percent(share: float | None, digits: int = 0) -> str:
    """Format a share between 0 and 1 as a percentage: 97%."""
    return number(share, f".{digits}%")


def plus_minus(value: float | None, error: float | None, spec: str = ".4f") -> str:
    """Format a value with its standard error, if that is known: 0.4321 ± 0.0120."""
    text, spread = number(value, spec), number(error, spec)
    return text if ABSENT in (text, spread) else f"{text} ± {spread}"


def plural(n: int, noun: str) -> str:
    """Format a number of things with a regular noun: 1 seed, 3 seeds, 1,024 seeds."""
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def spans(numbers: Iterable[int], between: str = ",") -> str:
    """Abbreviate ascending numbers: 0-2,5,7-8."""
    runs = [[n for _, n in own] for _, own in groupby(enumerate(numbers), lambda placed: placed[1] - placed[0])]
    return between.join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
