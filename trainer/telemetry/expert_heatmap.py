"""The picture of which layer uses which expert, and how much of all tokens each expert gets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PatchCollection
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from trainer.common.figure_style import FAINT, INK, SERIES, add_legend, new_figure, panel_title, style_axes, write_png


def write_heat_map(
    tokens_per_expert_LM: NDArray[np.integer],
    path: Path,
    title: str,
    groups: int = 1,
    owners: Sequence[int] | None = None,
) -> None:
    """Write the picture as PNG, see `draw_heat_map`; the file appears whole or not at all."""
    write_png(draw_heat_map(tokens_per_expert_LM, title, groups, owners), path)


def heat_map_image(
    tokens_per_expert_LM: NDArray[np.integer], title: str, groups: int = 1, owners: Sequence[int] | None = None
) -> NDArray[np.uint8]:
    """Return the picture as RGB, (height, width, 3), see `draw_heat_map`."""
    canvas = FigureCanvasAgg(draw_heat_map(tokens_per_expert_LM, title, groups, owners))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def draw_heat_map(
    tokens_per_expert_LM: NDArray[np.integer], title: str, groups: int = 1, owners: Sequence[int] | None = None
) -> Figure:
    """Draw each layer's share of tokens by expert, and below it the totals of the pool beside a uniform load.

    Colour follows the square root of the share, so that weakly used experts can be told from unused ones.

    Args:
        tokens_per_expert_LM: Assignments of each layer to the experts that it sees, (L, M / groups).
        title: Text above the picture.
        groups: Sub-pools across depth. The picture shows all M experts, grey where a layer does not reach.
        owners: The layer that owns each expert (M), which the picture frames.
    """
    tokens_LM = over_all_experts(tokens_per_expert_LM, groups)
    layers, experts = tokens_LM.shape
    width, height = float(np.clip(3 + 0.09 * experts, 8, 20)), float(np.clip(2.6 + 0.24 * layers, 4.2, 12))
    figure = new_figure(width, height)
    map_axes, bar_axes = figure.subplots(2, 1, sharex=True, height_ratios=(height - 2.1, 1.3))
    draw_shares(figure, map_axes, tokens_LM)
    draw_totals(bar_axes, tokens_LM)
    panel_title(map_axes, title)
    if owners is not None:
        frame_cells(map_axes, [(expert, owner, 1) for expert, owner in enumerate(owners)])
        map_axes.set_ylabel("layer; framed: its own experts", color=INK)
    return figure


def draw_ownership(
    tokens_LM: NDArray[np.float64], owners: Sequence[int], title: str, own_shares: Sequence[float], coverage: float
) -> Figure:
    """Draw who owns what by depth: the experts ordered by owner, and beside them what each layer finds in its own set.

    Args:
        tokens_LM: Assignments of each layer to all experts.
        owners: The layer that owns each expert (M).
        title: Text above the picture.
        own_shares: Share of each layer's tokens inside its own set, as it is to be shown.
        coverage: The share that was wanted, drawn as a line.
    """
    layers, experts = tokens_LM.shape
    own_M = tokens_LM[list(owners), np.arange(experts)]
    order = np.lexsort((-own_M, np.asarray(owners)))  # within a layer, the most used first
    width, height = float(np.clip(5 + 0.09 * experts, 9, 20)), float(np.clip(1.6 + 0.24 * layers, 3.4, 12))
    figure = new_figure(width, height)
    map_axes, bar_axes = figure.subplots(1, 2, sharey=True, width_ratios=(width - 2.4, 1.6))
    draw_shares(figure, map_axes, tokens_LM[:, order])
    map_axes.set_xlabel("experts, ordered by the layer that owns them", color=INK)
    per_layer = experts // layers
    frame_cells(map_axes, [(layer * per_layer, layer, per_layer) for layer in range(layers)])
    panel_title(map_axes, title)
    bar_axes.barh(np.arange(layers), own_shares, height=0.8, color=SERIES[0])
    bar_axes.axvline(coverage, color=INK, linestyle="--", linewidth=1.2, label=f"wanted, {coverage:.0%}")
    bar_axes.set_xlim(0, 1)
    bar_axes.xaxis.set_major_locator(MaxNLocator(2))
    bar_axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    bar_axes.tick_params(labelleft=False)
    bar_axes.set_xlabel("inside its own", color=INK)
    style_axes(bar_axes, "x")
    add_legend(bar_axes, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def over_all_experts(tokens_per_expert_LM: NDArray[np.integer], groups: int) -> NDArray[np.float64]:
    """Spread counts of the experts that a layer sees, (L, M / groups), over all M experts; NaN for the others."""
    layers, experts_per_layer = tokens_per_expert_LM.shape
    tokens_LM = np.full((layers, groups * experts_per_layer), np.nan)
    for layer, row in enumerate(tokens_per_expert_LM):
        first = (layer * groups // layers) * experts_per_layer
        tokens_LM[layer, first : first + experts_per_layer] = row
    return tokens_LM


def draw_shares(figure: Figure, axes: Axes, tokens_LM: NDArray[np.float64]) -> None:
    """Draw each layer's share of tokens by expert; NaN in `tokens_LM` is where a layer does not reach."""
    totals_L1 = np.nansum(tokens_LM, axis=1, keepdims=True)
    shares_LM = tokens_LM / np.maximum(totals_L1, 1)
    top = max(float(np.nanmax(shares_LM)), 1e-6)
    axes.set_facecolor(FAINT)
    image = axes.imshow(shares_LM, aspect="auto", interpolation="nearest", cmap="magma", norm=PowerNorm(0.5, 0, top))
    bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=18)
    bar.set_label("share of the layer's tokens", color=INK)
    bar.ax.yaxis.set_major_locator(MaxNLocator(5))
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel("layer", color=INK)
    axes.yaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.tick_params(labelbottom=False, bottom=False)


def frame_cells(axes: Axes, cells: Sequence[tuple[int, int, int]]) -> None:
    """Frame cells of a map: (first column, row, number of columns) each."""
    frames = [Rectangle((column - 0.5, row - 0.5), columns, 1) for column, row, columns in cells]
    axes.add_collection(PatchCollection(frames, facecolor="none", edgecolor=SERIES[2], linewidth=1.2))


def draw_totals(axes: Axes, tokens_LM: NDArray[np.float64]) -> None:
    """Draw each expert's share of all tokens beside a uniform load."""
    totals_M = np.nansum(tokens_LM, axis=0)
    shares_M = totals_M / max(totals_M.sum(), 1)
    uniform = 1 / len(shares_M)
    axes.bar(np.arange(len(shares_M)), shares_M, width=0.9, color=SERIES[0])
    axes.axhline(uniform, color=INK, linestyle="--", linewidth=1.2, label=f"uniform, {uniform:.2%}")
    axes.set_ylim(0, 1.3 * max(float(shares_M.max()), uniform))
    add_legend(axes, loc="upper right")
    axes.set_xlabel("expert", color=INK)
    axes.set_ylabel("share of all", color=INK)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    style_axes(axes)
