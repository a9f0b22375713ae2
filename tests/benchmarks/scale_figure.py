"""The picture of `tests.benchmarks.scale`: weak scaling, and how a step grows with the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from tests.benchmarks.scale import GROWTH, RANKS, Scaling, parts_of
from trainer.common.figure_style import (
    FAINT,
    INK,
    QUIET,
    SERIES,
    figure_title,
    label_ends,
    new_figure,
    panel_title,
    style_axes,
    write_png_and_svg,
)

PARTS = (
    "attention, norms, head",
    "router",
    "permutation, combination",
    "experts",
    "waiting for the wire",
    "step's end",
)
COLOURS = (SERIES[0], SERIES[1], SERIES[2], SERIES[3], QUIET, FAINT)
NAMES = {"pool.experts": "experts", "model.layers": "layers", "router.top_k": "experts of a token"}


def draw(results: Sequence[Scaling], path: Path) -> None:
    """Draw the results for the first hardware, and the growth, as SVG and PNG."""
    figure = new_figure(10, 6.4)
    figure_title(figure, "Simulated steps of unipool on nodes of 8 GPUs")
    panels = figure.subplots(2, 2)
    _draw_scaling(panels[0, 0], [result for result in results if result.hardware == results[0].hardware])
    for axes, key in zip((panels[0, 1], panels[1, 0], panels[1, 1]), GROWTH, strict=True):
        _draw_growth(axes, key)
    handles = panels[0, 1].containers
    figure.legend(handles, PARTS, loc="outside lower center", ncols=6, frameon=False, fontsize=8.5, labelcolor=INK)
    write_png_and_svg(figure, path)


def _draw_scaling(axes: Axes, results: Sequence[Scaling]) -> None:
    ends = []
    for place, result in enumerate(results):
        colour = SERIES[place % 3]
        dashed = result.layout == "dedicated"
        heights = [result.efficiency(ranks, placed=True) for ranks in RANKS]
        axes.plot(range(len(RANKS)), heights, color=colour, linestyle="--" if dashed else "-", marker="o", markersize=3)
        name = result.model.removeprefix("unipool-") + (", dedicated" if dashed else "")
        ends.append((len(RANKS) - 1.0, heights[-1], name, colour))
    axes.axhline(0.9, color=QUIET, linewidth=0.8)
    axes.set_ylim(0.85, 1.005)
    axes.set_xticks(range(len(RANKS)), [f"{ranks:,}" for ranks in RANKS])
    axes.set_xlabel(f"ranks ({results[0].hardware.name.upper()})", fontsize=9)
    style_axes(axes)
    label_ends(axes, ends)
    panel_title(axes, f"Tokens/s of a rank, over those with {RANKS[0]}", 10)


def _draw_growth(axes: Axes, key: str) -> None:
    parts = [parts_of(key, value) for value in GROWTH[key]]
    bottoms = [0.0] * len(parts)
    for number, colour in enumerate(COLOURS):
        heights = [1000 * max(0.0, part.shares[number]) for part in parts]
        axes.bar(range(len(parts)), heights, 0.6, bottom=bottoms, color=colour)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    labels = [f"{value:,}\n{part.shards} shards" for value, part in zip(GROWTH[key], parts, strict=True)]
    axes.set_xticks(range(len(parts)), labels)
    axes.set_xlabel(NAMES[key], fontsize=9)
    style_axes(axes)
    panel_title(axes, "Step of 182m on 64 H200, milliseconds", 10)
