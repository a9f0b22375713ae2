"""What random experts in one layer do to a number: its table and its panel, layer by layer."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from trainer.probe.output import INK, SERIES, quiet, table

if TYPE_CHECKING:
    from rich.table import Table

Over = Literal["layer", "pool", "matched"]
OVERS: tuple[Over, ...] = ("layer", "pool", "matched")
WHAT = {"layer": "the layer's experts", "pool": "the full pool", "matched": "its most used experts"}


@dataclass(frozen=True)
class Effect:
    """By how much the number changes: mean and standard deviation (None for one) over the draws.

    `layer` is None for the mean over the layers.
    """

    layer: int | None
    over: Over
    mean: float
    spread: float | None


def spread_of(values: Sequence[float]) -> float | None:
    """Standard deviation; None for one value."""
    return statistics.stdev(values) if len(values) > 1 else None


def show_effect(mean: float, spread: float | None, form: str) -> str:
    """In a table; `form` is the numbers' format."""
    return f"{mean:{form}}" + ("" if spread is None else f" ± {spread:{form.lstrip('+')}}")


def over_layers(by_layer: Sequence[Sequence[float]]) -> list[float]:
    """The mean over the layers, by draw."""
    return [statistics.fmean(values) for values in zip(*by_layer, strict=True)]


def effect_table(title: str, effects: Sequence[Effect], form: str) -> Table:
    """A line a layer and one for the mean, a column a protocol; `form` is the numbers' format."""
    overs = dict.fromkeys(effect.over for effect in effects)
    made = table(title, "layer", *(f"over {WHAT[over]}" for over in overs))
    cells = {(e.layer, e.over): show_effect(e.mean, e.spread, form) for e in effects}
    for layer in sorted({e.layer for e in effects if e.layer is not None}):
        made.add_row(str(layer), *(cells[layer, over] for over in overs))
    made.add_section()
    made.add_row("mean", *(cells[None, over] for over in overs))
    return made


def plot_effects(axes: Axes, effects: Sequence[Effect], labels: Mapping[Over, str]) -> None:
    """A line a protocol with its spread by layer, and its mean. A protocol without a label is not in the legend."""
    for over, colour in zip(dict.fromkeys(effect.over for effect in effects), SERIES, strict=False):
        own = [(e.layer, e.mean, e.spread or 0.0) for e in effects if e.over == over and e.layer is not None]
        layers, means, spreads = zip(*own, strict=True)
        axes.errorbar(
            layers,
            means,
            spreads,
            marker="o",
            ms=5,
            capsize=3,
            color=colour,
            label=labels.get(over, "_"),
        )
        for mean in (e.mean for e in effects if e.over == over and e.layer is None):
            axes.axhline(mean, color=colour, linestyle="--", linewidth=1)
    quiet(axes)
    low, high = (f(0.0, limit) for f, limit in zip((min, max), axes.get_ylim(), strict=True))
    axes.set_ylim(low, high + 0.05 * (high - low))
    seen = [e.layer for e in effects if e.layer is not None]
    axes.set_xlim(min(seen) - 0.5, max(seen) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
    axes.yaxis.label.set_color(INK)
