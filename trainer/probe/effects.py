"""The effect of random experts in one layer on a measured value: its table and its plot, by layer."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from trainer.common.figure_style import SERIES, style_axes
from trainer.common.format import plus_minus
from trainer.common.tables import new_table

if TYPE_CHECKING:
    from rich.table import Table

Over = Literal["layer", "pool", "matched"]
OVERS: tuple[Over, ...] = ("layer", "pool", "matched")
OVER_LABELS = {"layer": "the layer's experts", "pool": "the full pool", "matched": "its most used experts"}

Effects = Mapping[tuple[int | None, Over], tuple[float, float | None]]
"""Mean and standard deviation over the draws (None for one draw), by layer (None: mean over layers) and protocol."""


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the standard deviation, which is None for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def over_layers(by_layer: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean over the layers of each draw."""
    return [statistics.fmean(values) for values in zip(*by_layer, strict=True)]


def effect_table(title: str, effects: Effects, form: str) -> Table:
    """Make a table with a row per layer and a column per protocol; `form` formats the numbers."""
    overs = dict.fromkeys(over for _, over in effects)
    made = new_table(title, "layer", *(f"over {OVER_LABELS[over]}" for over in overs))
    for layer in dict.fromkeys(layer for layer, _ in effects):
        if layer is None:
            made.add_section()
        shown = (plus_minus(*effects[layer, over], form) for over in overs)
        made.add_row("mean" if layer is None else str(layer), *shown)
    return made


def plot_effects(axes: Axes, effects: Effects, labels: Mapping[Over, str]) -> None:
    """Draw a line with error bars per protocol, and its mean; protocols without a label are not in the legend."""
    for over, colour in zip(dict.fromkeys(over for _, over in effects), SERIES, strict=False):
        own = [
            (layer, mean, spread or 0.0)
            for (layer, protocol), (mean, spread) in effects.items()
            if protocol == over and layer is not None
        ]
        layers, means, spreads = zip(*own, strict=True)
        axes.errorbar(layers, means, spreads, marker="o", ms=5, capsize=3, color=colour, label=labels.get(over, "_"))
        axes.axhline(effects[None, over][0], color=colour, linestyle="--", linewidth=1)
    style_axes(axes)
    low, high = (f(0.0, limit) for f, limit in zip((min, max), axes.get_ylim(), strict=True))
    axes.set_ylim(low, high + 0.05 * (high - low))
    seen = [layer for layer, _ in effects if layer is not None]
    axes.set_xlim(min(seen) - 0.5, max(seen) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
