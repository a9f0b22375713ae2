"""Draws what each rank does in a step that follows the pool's schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, PercentFormatter
from numpy.typing import NDArray

from pool.schedule_timing import StepTiming, Work
from pool.topology import Topology
from trainer.common.figure_style import INK, SERIES, add_legend, figure_title, new_figure, panel_title, write_png
from trainer.common.format import percent

_FORWARD, _BACKWARD, _WEIGHT_GRADIENTS, _ = SERIES
_HEAD, _IDLE = "#440154", "#e8e8e8"
_EXPERTS_FORWARD, _EXPERTS_BACKWARD = "#9ec3dd", "#f2c9a0"
_COLOURS = {
    Work.TRUNK_FORWARD: _FORWARD,
    Work.TRUNK_BACKWARD: _BACKWARD,
    Work.HEAD: _HEAD,
    Work.POOL_FORWARD: _FORWARD,
    Work.POOL_BACKWARD: _BACKWARD,
    Work.WEIGHT_GRADIENTS: _WEIGHT_GRADIENTS,
}
_LEGEND = {
    "forward": _FORWARD,
    "backward": _BACKWARD,
    "head and loss": _HEAD,
    "weight gradients": _WEIGHT_GRADIENTS,
    "idle": _IDLE,
}
_COLOURS_OF_BOTH = _COLOURS | {Work.POOL_FORWARD: _EXPERTS_FORWARD, Work.POOL_BACKWARD: _EXPERTS_BACKWARD}
_LEGEND_OF_BOTH = {
    "trunk forward": _FORWARD,
    "trunk backward": _BACKWARD,
    "head and loss": _HEAD,
    "experts forward": _EXPERTS_FORWARD,
    "experts backward": _EXPERTS_BACKWARD,
    "weight gradients": _WEIGHT_GRADIENTS,
    "idle": _IDLE,
}
_ROWS = 24


def shown_ranks(topology: Topology) -> tuple[int, ...]:
    """Choose the world ranks to draw, evenly spaced within each role: all of them, or about 24."""
    trunk_ranks, pool_ranks = topology.trunk_ranks, topology.pool_ranks
    if topology.world_size <= _ROWS:
        return tuple(range(topology.world_size))
    if topology.every_rank:
        return tuple(np.linspace(0, trunk_ranks - 1, _ROWS).round().astype(int).tolist())
    share = round(_ROWS * trunk_ranks / (trunk_ranks + pool_ranks))
    trunk_rows = min(max(share, _ROWS // 4), _ROWS - _ROWS // 4, trunk_ranks)
    pool_rows = min(_ROWS - trunk_rows, pool_ranks)
    trunk = np.linspace(0, trunk_ranks - 1, trunk_rows).round().astype(int)
    pool = trunk_ranks + np.linspace(0, pool_ranks - 1, pool_rows).round().astype(int)
    return (*trunk.tolist(), *pool.tolist())


def draw_timeline(step: StepTiming, topology: Topology, path: Path, title: str, in_seconds: bool) -> None:
    """Write a PNG with one row per rank, coloured by what the rank does; trunk ranks are above dedicated pool ranks.

    Work that is too short to be seen blends with its neighbours. At the right of each row is the rank's busy share. The
    file appears whole or not at all.

    Args:
        step: Timing with recorded intervals.
        topology: The layout of the step.
        path: Where to write the picture.
        title: Title of the picture.
        in_seconds: Whether the times are seconds; otherwise the axis shows shares of the step.
    """
    ranks = shown_ranks(topology)
    figure = new_figure(13, 1.9 + 0.22 * len(ranks))
    if topology.every_rank:
        lowest, legend = figure.subplots(), _LEGEND_OF_BOTH
        _draw_role(lowest, "rank", step, ranks, 0, step.trunk_busy_T + step.pool_busy_P, _COLOURS_OF_BOTH)
    else:
        legend = _LEGEND
        trunk = [rank for rank in ranks if topology.is_trunk(rank)]
        pool = [rank - topology.trunk_ranks for rank in ranks if not topology.is_trunk(rank)]
        upper, lowest = figure.subplots(2, 1, sharex=True, height_ratios=(len(trunk), len(pool)))
        _draw_role(upper, "trunk", step, trunk, 0, step.trunk_busy_T, _COLOURS)
        _draw_role(lowest, "pool", step, pool, topology.trunk_ranks, step.pool_busy_P, _COLOURS)
        upper.tick_params(labelbottom=False, bottom=False)
    if in_seconds:
        lowest.xaxis.set_major_formatter(EngFormatter("s"))
    else:
        lowest.xaxis.set_major_formatter(PercentFormatter(step.seconds))
        lowest.set_xticks(np.linspace(0, step.seconds, 11))
    lowest.set_xlabel("time" if in_seconds else "time, as a share of the step", color=INK)
    figure_title(figure, title)
    handles = [Patch(facecolor=colour, label=name) for name, colour in legend.items()]
    add_legend(figure, handles=handles, loc="outside lower center", ncols=len(handles))
    write_png(figure, path)


def _draw_role(
    axes: Axes,
    role: str,
    step: StepTiming,
    ranks: Sequence[int],
    first: int,
    busy: NDArray[np.float64],
    colours: Mapping[Work, str],
) -> None:
    """Draw the rows of some `ranks` of a role, whose first rank has the world rank `first`."""
    intervals = step.intervals
    for row, rank in enumerate(ranks):
        axes.barh(row, step.seconds, height=0.8, color=_IDLE)
        for work in Work:
            chosen = (intervals.rank_I == first + rank) & (intervals.work_I == work)
            start_I = intervals.start_I[chosen]
            bars = list(zip(start_I, intervals.end_I[chosen] - start_I, strict=True))
            axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=colours[work], linewidth=0, snap=False)
        place = axes.get_yaxis_transform()
        axes.text(1.005, row, percent(busy[rank]), transform=place, va="center", fontsize=8, color=INK)
    shown = f"{len(ranks)} of {len(busy)} ranks" if len(ranks) < len(busy) else "all ranks"
    heading = f"{'both roles' if role == 'rank' else role}: {shown}"
    heading += f", busy {percent(busy.mean())}"
    if busy.max() - busy.min() > 0.005:
        heading += f" on average ({percent(busy.min())} to {percent(busy.max())})"
    panel_title(axes, heading, size=9)
    axes.set_yticks(range(len(ranks)), [f"{role} {rank}" for rank in ranks], fontsize=8, color=INK)
    axes.set_xlim(0, step.seconds)
    axes.set_ylim(len(ranks) - 0.4, -0.6)
    axes.tick_params(left=False)
    axes.spines[:].set_visible(False)
