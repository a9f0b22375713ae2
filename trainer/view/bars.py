"""Bars and curves made of characters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from trainer.view.records import finite, finite_mean

_EIGHTHS = " ▁▂▃▄▅▆▇█"
_PARTS = " ▏▎▍▌▋▊▉█"


def gauge(share: float, width: int) -> str:
    """Draw a horizontal bar that fills `share` of `width` characters."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    full, part = divmod(eighths, 8)
    return ("█" * full + (_PARTS[part] if part else "")).ljust(width)


def column(level: float, height: int) -> str:
    """Draw a vertical bar, one character per line from the top; it fills a share of them, at least an eighth of one."""
    eighths = min(max(round(level * height * 8), 1), height * 8)
    return "".join(_EIGHTHS[min(max(eighths - 8 * line, 0), 8)] for line in range(height - 1, -1, -1))


def spark(values: Sequence[float], width: int, height: int) -> list[str]:
    """Draw a curve as `height` lines of `width` characters, between its smallest and its largest value.

    Values that share a character are averaged; a single value may fill several. At least one has to be finite.
    """
    edges = [place * len(values) // width for place in range(width + 1)]
    means = [finite_mean(values[start : max(end, start + 1)]) for start, end in pairwise(edges)]
    low, high = min(finite(means)), max(finite(means))
    span = high - low
    bars = [" " * height if math.isnan(m) else column((m - low) / span if span else 0.5, height) for m in means]
    return ["".join(bar[line] for bar in bars) for line in range(height)]


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
