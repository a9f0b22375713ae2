"""The picture of a step: what each rank does when, as a replay of the service plan has it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from pool.schedule_timing import Intervals, Replay, Work
from pool.topology import Topology
from trainer.common.atomic import atomic_write

_INK, _QUIET, _IDLE = "#222222", "#8a8a8a", "#e8e8e8"
_FORWARD, _BACKWARD, _HEAD, _WEIGHT_GRADIENTS = "#31688e", "#e08a3c", "#440154", "#35a06b"
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
    """World ranks that a picture has room for, evenly spaced within each role: all of them, or about 24."""
    trunk_ranks, pool_ranks = topology.trunk_ranks, topology.pool_ranks
    if trunk_ranks + pool_ranks <= _ROWS:
        return tuple(range(trunk_ranks + pool_ranks))
    share = round(_ROWS * trunk_ranks / (trunk_ranks + pool_ranks))
    trunk_rows = min(max(share, _ROWS // 4), _ROWS - _ROWS // 4, trunk_ranks)
    pool_rows = min(_ROWS - trunk_rows, pool_ranks)
    trunk = np.linspace(0, trunk_ranks - 1, trunk_rows).round().astype(int)
    pool = trunk_ranks + np.linspace(0, pool_ranks - 1, pool_rows).round().astype(int)
    return (*trunk.tolist(), *pool.tolist())


def draw_timeline(replay: Replay, topology: Topology, path: Path, title: str, unit: str = "nominal units") -> None:
    """Write a PNG: a row a rank of `replay.ranks`, trunk ranks above pool ranks, coloured by what it does.

    Bars too short to be seen one by one show as their shares of the time, stacked within the height of the row. At the
    right of a row is its busy share. The file appears whole or not at all.

    Args:
        replay: made with `ranks=shown_ranks(topology)`; at least one rank of each role.
        unit: of the replay's times.
    """
    trunk = [rank for rank in replay.ranks if topology.is_trunk(rank)]
    pool = [rank for rank in replay.ranks if not topology.is_trunk(rank)]
    height = 1.9 + 0.22 * len(replay.ranks)
    figure = Figure(figsize=(13, height), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    trunk_axes, pool_axes = figure.subplots(2, 1, sharex=True, height_ratios=(len(trunk), len(pool)))
    _draw_rows(trunk_axes, replay, trunk, replay.trunk_busy_T[trunk])
    _draw_rows(pool_axes, replay, pool, replay.pool_busy_P[np.array(pool) - topology.trunk_ranks])
    _name(trunk_axes, "trunk", [str(rank) for rank in trunk], replay.trunk_busy_T)
    _name(pool_axes, "pool", [str(rank - topology.trunk_ranks) for rank in pool], replay.pool_busy_P)
    trunk_axes.tick_params(labelbottom=False, bottom=False)
    pool_axes.xaxis.set_major_locator(MaxNLocator(12))
    pool_axes.set_xlabel(f"time, in {unit}", color=_INK)
    figure.suptitle(title, x=0.01, ha="left", color=_INK, fontsize=12)
    handles = [Patch(facecolor=colour, label=name) for name, colour in _LEGEND.items()]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9, labelcolor=_INK
    )
    atomic_write(path, lambda temporary: canvas.print_figure(temporary, format="png"))


def _name(axes: Axes, role: str, names: Sequence[str], busy: NDArray[np.float64]) -> None:
    shown = f"{len(names)} of {len(busy)} ranks" if len(names) < len(busy) else "all ranks"
    heading = f"{role}: {shown}, busy {busy.mean():.0%}"
    if busy.max() - busy.min() > 0.005:
        heading += f" on average ({busy.min():.0%} to {busy.max():.0%})"
    axes.set_title(heading, loc="left", color=_INK, fontsize=9)
    axes.set_yticks(range(len(names)), [f"{role} {name}" for name in names], fontsize=8, color=_INK)


def _draw_rows(axes: Axes, replay: Replay, ranks: Sequence[int], busy: NDArray[np.float64]) -> None:
    for row, rank in enumerate(ranks):
        picture = row_picture(replay.intervals, rank, replay.seconds)
        axes.imshow(picture, extent=(0, replay.seconds, row + 0.4, row - 0.4), aspect="auto")
        axes.text(
            1.005, row, f"{busy[row]:.0%}", transform=axes.get_yaxis_transform(), va="center", fontsize=8, color=_INK
        )
    axes.set_xlim(0, replay.seconds)
    axes.set_ylim(len(ranks) - 0.4, -0.6)
    axes.tick_params(left=False)
    axes.spines[:].set_visible(False)


def row_picture(intervals: Intervals, rank: int, seconds: float) -> NDArray[np.float64]:
    """RGB of a rank's row (_PIXELS, _COLUMNS, 3): in each column its kinds of work stacked from below, idle on top."""
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
    """Share of each of `columns` equal parts of [0, seconds] that intervals in order, without overlaps, cover."""
    times = np.stack((start_I, end_I), axis=1).ravel()
    covered_until = np.cumsum(np.stack((np.zeros_like(start_I), end_I - start_I), axis=1).ravel())
    edges = np.linspace(0, seconds, columns + 1)
    at_edges = np.interp(edges, np.append(0.0, times), np.append(0.0, covered_until))
    shares: NDArray[np.float64] = np.diff(at_edges) * (columns / seconds)
    return shares
