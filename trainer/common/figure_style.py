"""The style of every picture: colours, axes, legends, and how a figure is written to disk.

matplotlib is imported here at the top, so import this module only where a picture is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from trainer.common.atomic import atomic_write

INK, QUIET, FAINT = "#222222", "#8a8a8a", "#dddddd"
"""Text and reference lines; grids and what is in the background; areas without data."""

SERIES = ("#31688e", "#e08a3c", "#35a06b", "#8d5a97")
"""Colours of data, in the order of their importance."""

Colour = str | tuple[float, ...]


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure, in inches, whose layout leaves room for all labels."""
    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def style_axes(axes: Axes, grid: Literal["x", "y", "both", "none"] = "y") -> None:
    """Draw a faint grid at the ticks of an axis, remove the upper and right edges, and colour all labels."""
    if grid != "none":
        axes.grid(axis=grid, color=QUIET, alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(colors=INK)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(INK)


def figure_title(figure: Figure, text: str) -> None:
    """Put a title at the upper left of a figure with several panels."""
    figure.suptitle(text, x=0.01, ha="left", color=INK, fontsize=12)


def panel_title(axes: Axes, text: str, size: float = 12) -> None:
    """Put a title at the upper left of a panel."""
    axes.set_title(text, loc="left", color=INK, fontsize=size)


def add_legend(owner: Axes | Figure, **settings: Any) -> None:
    """Add a legend without a frame to a panel or a figure; settings are those of matplotlib's `legend`."""
    owner.legend(frameon=False, labelcolor=INK, **{"fontsize": 9, **settings})


def spread_labels(heights: Sequence[float], gap: float) -> list[float]:
    """Move labels that are closer than `gap` apart, each as little as possible; return their new heights."""
    blocks: list[list[int]] = []  # labels that touch, from the lowest up; a block is centred on its lines
    bottoms: list[float] = []
    for place in sorted(range(len(heights)), key=lambda place: heights[place]):
        blocks.append([place])
        bottoms.append(heights[place])
        while len(blocks) > 1 and bottoms[-2] + gap * len(blocks[-2]) > bottoms[-1]:
            blocks[-2:] = [blocks[-2] + blocks[-1]]
            mean = sum(heights[own] for own in blocks[-1]) / len(blocks[-1])
            bottoms[-2:] = [mean - gap * (len(blocks[-1]) - 1) / 2]
    spread = [0.0] * len(heights)
    for block, bottom in zip(blocks, bottoms, strict=True):
        for step, place in enumerate(block):
            spread[place] = bottom + gap * step
    return spread


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, Colour]], size: float = 8.5) -> None:
    """Write the names of lines beside their last points, instead of a legend. Call it when all lines are drawn.

    Args:
        axes: The panel.
        ends: x, y, name and colour of each line's last point.
        size: Size of the text in points.
    """
    low, high = axes.get_ylim()
    axes.set_xlim(right=max(x for x, _, _, _ in ends))
    inches = axes.figure.get_size_inches()[1] * axes.get_position().height  # type: ignore[union-attr]
    gap = (high - low) * 1.25 * size / 72 / inches
    heights = spread_labels([y for _, y, _, _ in ends], gap)
    for (x, y, name, colour), height in zip(ends, heights, strict=True):
        axes.annotate(
            name,
            (x, y),
            xytext=(1.05, height),
            textcoords=("axes fraction", "data"),
            va="center",
            color=INK if colour == QUIET else colour,
            fontsize=size,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 0,
            },
        )


def write_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG; the file appears whole or not at all."""
    canvas = FigureCanvasAgg(figure)
    atomic_write(path, lambda file: canvas.print_figure(file, format="png"))


def write_png_and_svg(figure: Figure, path: Path) -> list[Path]:
    """Write a figure as PNG and as SVG, each whole or not at all, beside each other; equal figures make equal files."""
    png, svg = path.with_suffix(".png"), path.with_suffix(".svg")
    write_png(figure, png)
    write_svg(figure, svg)
    return [png, svg]


def write_svg(figure: Figure, path: Path) -> None:
    """Write a figure as SVG, whole or not at all; equal figures make equal files."""
    canvas = FigureCanvasSVG(figure)
    with rc_context({"svg.hashsalt": "unipool"}):  # else matplotlib draws ids by chance
        atomic_write(path, lambda file: canvas.print_figure(file, format="svg", metadata={"Date": None}))
