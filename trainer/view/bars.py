"""Bars and sparklines made of characters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_EIGHTHS = " ▁▂▃▄▅▆▇█"
_PARTS = " ▏▎▍▌▋▊▉█"


def gauge(share: float, width: int) -> str:
    """A bar from the left that fills `share` of `width` characters."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    full, part = divmod(eighths, 8)
    return ("█" * full + (_PARTS[part] if part else "")).ljust(width)


def stacked(shares: Mapping[str, float], width: int) -> dict[str, int]:
    """Characters for each share of a bar of `width`; they sum to it, and what there is at all shows if it can."""
    total = sum(shares.values())
    exact = {name: width * share / total for name, share in shares.items()}
    cells = {name: int(size) for name, size in exact.items()}
    by_rest = sorted(exact, key=lambda name: cells[name] - exact[name])
    for name in by_rest[: width - sum(cells.values())]:
        cells[name] += 1
    return cells


def column(level: float, height: int) -> str:
    """A bar that fills `level` (0 to 1) of `height` lines, from the top line to the bottom one; never quite nothing."""
    eighths = min(max(round(level * height * 8), 1), height * 8)
    return "".join(_EIGHTHS[min(max(eighths - 8 * line, 0), 8)] for line in range(height - 1, -1, -1))


def spark(values: Sequence[float], width: int, height: int) -> list[str]:
    """A curve as `height` lines of `width` characters, from its least to its largest value.

    Numbers that share a character are averaged, few ones have several; where none is finite it is empty.
    """
    means = _means(values, width)
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return [""] * height
    low, span = min(finite), max(finite) - min(finite)
    bars = [column((m - low) / span if span else 0.5, height) if math.isfinite(m) else " " * height for m in means]
    return ["".join(bar[line] for bar in bars) for line in range(height)]


def _means(values: Sequence[float], width: int) -> list[float]:
    means = []
    for place in range(width if values else 0):
        first = place * len(values) // width
        part = values[first : max((place + 1) * len(values) // width, first + 1)]
        finite = [number for number in part if math.isfinite(number)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    return means


@dataclass(frozen=True)
class Grid:
    """How a bar an expert fits into lines.

    Attributes:
        merged: experts that share a bar.
        a_line: bars in a line.
        lines: lines of bars.
        width: characters of a bar.
        height: text lines of a bar.
    """

    merged: int
    a_line: int
    lines: int
    width: int
    height: int


GROUP = 8
"""Bars between two gaps, so that the eye can count."""


def grid(experts: int, width: int, height: int, tallest: int = 4) -> Grid:
    """The most telling way to show `experts` bars in `width` characters and about `height` lines.

    Bars are as equally spread over the lines as multiples of GROUP can be. If there is no room for all, several experts
    share a bar.
    """
    largest = max((width + 1) // (GROUP + 1), 1) * GROUP
    merged = 1
    while math.ceil(math.ceil(experts / merged) / largest) > max(height, 1):
        merged *= 2
    bars = math.ceil(experts / merged)
    lines = math.ceil(bars / largest)
    a_line = min(bars, math.ceil(bars / lines / GROUP) * GROUP)
    gaps = (a_line - 1) // GROUP
    return Grid(
        merged=merged,
        a_line=a_line,
        lines=lines,
        width=min(max((width - gaps) // a_line, 1), 4),
        height=min(max(height // lines, 1), tallest),
    )
