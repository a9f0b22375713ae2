"""Draws what each rank does in a step that follows the pool's schedule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from pool.schedule_timing import Intervals, StepTiming, Work
from pool.topology import Topology
from trainer.common.figure_style import INK, SERIES, add_legend, figure_title, new_figure, panel_title, write_png
from trainer.common.format import percent

_FORWARD, _BACKWARD, _WEIGHT_GRADIENTS, _ = SERIES
_HEAD, _IDLE = "#440154", "#e8e8e8"
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
_ROWS = 24
_COLUMNS, _PIXELS = 2400, 20


def shown_ranks(topology: Topology) -> tuple[int, ...]:
    """Choose the world ranks to draw, evenly spaced within each role: all of them, or about 24."""
    trunk_ranks, pool_ranks = topology.trunk_ranks, topology.pool_ranks
    if trunk_ranks + pool_ranks <= _ROWS:
        return tuple(range(trunk_ranks + pool_ranks))
    share = round(_ROWS * trunk_ranks / (trunk_ranks + pool_ranks))
    trunk_rows = min(max(share, _ROWS // 4), _ROWS - _ROWS // 4, trunk_ranks)
    pool_rows = min(_ROWS - trunk_rows, pool_ranks)
    trunk = np.linspace(0, trunk_ranks - 1, trunk_rows).round().astype(int)
    pool = trunk_ranks + np.linspace(0, pool_ranks - 1, pool_rows).round().astype(int)
    return (*trunk.tolist(), *pool.tolist())


def draw_timeline(step: StepTiming, topology: Topology, path: Path, title: str, unit: str = "nominal units") -> None:
    """Write a PNG with one row per rank, trunk ranks above pool ranks, coloured by what the rank does.

    Work that is too short to be seen is shown as its share of the time, stacked within the height of the row. At the
    right of each row is the rank's busy share. The file appears whole or not at all.

    Args:
        step: Timing with the intervals of `shown_ranks(topology)`.
        topology: The layout.
        path: Where to write the picture.
        title: Title of the picture.
        unit: Unit of the times.
    """
    figure = new_figure(13, 1.9 + 0.22 * len(step.ranks))
    trunk = [rank for rank in step.ranks if topology.is_trunk(rank)]
    pool = [rank - topology.trunk_ranks for rank in step.ranks if not topology.is_trunk(rank)]
    trunk_axes, pool_axes = figure.subplots(2, 1, sharex=True, height_ratios=(len(trunk), len(pool)))
    _draw_role(trunk_axes, "trunk", step, trunk, 0, step.trunk_busy_T)
    _draw_role(pool_axes, "pool", step, pool, topology.trunk_ranks, step.pool_busy_P)
    trunk_axes.tick_params(labelbottom=False, bottom=False)
    pool_axes.xaxis.set_major_locator(MaxNLocator(12))
    pool_axes.set_xlabel(f"time, in {unit}", color=INK)
    figure_title(figure, title)
    handles = [Patch(facecolor=colour, label=name) for name, colour in _LEGEND.items()]
    add_legend(figure, handles=handles, loc="outside lower center", ncols=len(handles))
    write_png(figure, path)


def _draw_role(
    axes: Axes, role: str, step: StepTiming, ranks: Sequence[int], first: int, busy: NDArray[np.float64]
) -> None:
    """Draw some ranks of a role.

    Args:
        axes: Where to draw.
        role: Name of the role.
        step: The timing.
        ranks: Ranks within the role.
        first: World rank of the role's first rank.
        busy: Busy share of all ranks of the role.
    """
    for row, rank in enumerate(ranks):
        picture = row_picture(step.intervals, first + rank, step.seconds)
        axes.imshow(picture, extent=(0, step.seconds, row + 0.4, row - 0.4), aspect="auto")
        place = axes.get_yaxis_transform()
        axes.text(1.005, row, percent(busy[rank]), transform=place, va="center", fontsize=8, color=INK)
    heading = f"{role}: {len(ranks)} of {len(busy)} ranks" if len(ranks) < len(busy) else f"{role}: all ranks"
    heading += f", busy {percent(busy.mean())}"
    if busy.max() - busy.min() > 0.005:
        heading += f" on average ({percent(busy.min())} to {percent(busy.max())})"
    panel_title(axes, heading, size=9)
    axes.set_yticks(range(len(ranks)), [f"{role} {rank}" for rank in ranks], fontsize=8, color=INK)
    axes.set_xlim(0, step.seconds)
    axes.set_ylim(len(ranks) - 0.4, -0.6)
    axes.tick_params(left=False)
    axes.spines[:].set_visible(False)


def row_picture(intervals: Intervals, rank: int, seconds: float) -> NDArray[np.float64]:
    """RGB of a rank's row (_PIXELS, _COLUMNS, 3); each column stacks its kinds of work from below, idle on top."""
    mine = intervals.rank_I == rank
    shares = []
    for work in Work:
        chosen = mine & (intervals.work_I == work)
        shares.append(covered(intervals.start_I[chosen], intervals.end_I[chosen], seconds, _COLUMNS))
    heights = (np.arange(_PIXELS)[::-1] + 0.5) / _PIXELS
    kind = (np.cumsum(shares, axis=0)[:, None] <= heights[:, None]).sum(axis=0)
    colours = np.array([to_rgb(_COLOURS[work]) for work in Work] + [to_rgb(_IDLE)])
    picture: NDArray[np.float64] = colours[kind]
    return picture


def covered(
    start_I: NDArray[np.float64], end_I: NDArray[np.float64], seconds: float, columns: int
) -> NDArray[np.float64]:
    """Share of each of `columns` equal parts of [0, seconds] that ordered, disjoint intervals cover."""
    times = np.stack((start_I, end_I), axis=1).ravel()
    covered_until = np.cumsum(np.stack((np.zeros_like(start_I), end_I - start_I), axis=1).ravel())
    edges = np.linspace(0, seconds, columns + 1)
    at_edges = np.interp(edges, np.append(0.0, times), np.append(0.0, covered_until))
    shares: NDArray[np.float64] = np.diff(at_edges) * (columns / seconds)
    return shares
