"""Bars and curves made of characters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_EIGHTHS = " ▁▂▃▄▅▆▇█"
_PARTS = " ▏▎▍▌▋▊▉█"


def gauge(share: float, width: int) -> str:
    """Draw a horizontal bar that fills `share` of `width` characters."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    full, part = divmod(eighths, 8)
    return ("█" * full + (_PARTS[part] if part else "")).ljust(width)


def stacked(shares: Mapping[str, float], width: int) -> dict[str, int]:
    """Divide a bar of `width` characters by shares; the parts add up to the width."""
    total = sum(shares.values())
    exact = {name: width * share / total for name, share in shares.items()}
    cells = {name: int(size) for name, size in exact.items()}
    by_rest = sorted(exact, key=lambda name: cells[name] - exact[name])
    for name in by_rest[: width - sum(cells.values())]:
        cells[name] += 1
    return cells


def column(level: float, height: int) -> str:
    """Draw a vertical bar, one character per line from the top; it fills a share of them, at least an eighth of one."""
    eighths = min(max(round(level * height * 8), 1), height * 8)
    return "".join(_EIGHTHS[min(max(eighths - 8 * line, 0), 8)] for line in range(height - 1, -1, -1))


def spark(values: Sequence[float], width: int, height: int) -> list[str]:
    """Draw a curve as `height` lines of `width` characters, between its smallest and its largest value.

    Values that share a character are averaged. Without any finite value the lines are empty.
    """
    means = _means(values, width)
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return [""] * height
    low, span = min(finite), max(finite) - min(finite)
    bars = [column((m - low) / span if span else 0.5, height) if math.isfinite(m) else " " * height for m in means]
    return ["".join(bar[line] for bar in bars) for line in range(height)]


def _means(values: Sequence[float], width: int) -> list[float]:
    """Average neighbours so that `width` values remain; few values are repeated."""
    means = []
    for place in range(width if values else 0):
        first = place * len(values) // width
        part = values[first : max((place + 1) * len(values) // width, first + 1)]
        finite = [number for number in part if math.isfinite(number)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    return means


@dataclass(frozen=True)
class Grid:
    """How bars are arranged in rows: experts per bar, bars per row, rows, and the size of a bar in characters."""

    merged: int
    per_row: int
    rows: int
    width: int
    height: int


GROUP = 8
"""Bars between two gaps, which help to count them."""


def grid(experts: int, width: int, height: int, tallest: int = 4) -> Grid:
    """Arrange bars of experts so that they show as much as possible.

    Rows have about equally many bars, a multiple of GROUP. If there is no room for all, several experts share one.
    """
    largest = max((width + 1) // (GROUP + 1), 1) * GROUP
    merged = 1
    while math.ceil(math.ceil(experts / merged) / largest) > max(height, 1):
        merged *= 2
    bars = math.ceil(experts / merged)
    rows = math.ceil(bars / largest)
    per_row = min(bars, math.ceil(bars / rows / GROUP) * GROUP)
    gaps = (per_row - 1) // GROUP
    bar_width = min(max((width - gaps) // per_row, 1), 4)
    return Grid(merged, per_row, rows, bar_width, height=min(max(height // rows, 1), tallest))
