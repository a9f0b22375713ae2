"""Laws as a picture: a panel a family, a curve for each of the other factors' values, with its band."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from trainer.scaling_law.report import FORMS, count
from trainer.scaling_law.result import FARTHEST, Group, Law
from trainer.sweep.plot import INK, Colour, quiet, write_figure
from trainer.sweep.statistics import CONFIDENCE

_ROOM = 0.07
"""Share of the axis that a label takes."""


def write_picture(laws: Sequence[Law], path: Path) -> list[Path]:
    """Write it as PNG and SVG.

    Args:
        path: without its suffix, or with either.
    """
    return write_figure(draw(laws), path)


def draw(laws: Sequence[Law]) -> Figure:
    """Points are runs and their means; bands the intervals of the law; dashed beyond what was tried."""
    figure = Figure(figsize=(2 + 6.5 * len(laws), 5.2), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(laws), sharey=True, squeeze=False)[0]
    for axes, law in zip(panels, laws, strict=True):
        _panel(axes, law)
    panels[0].set_ylabel("validation loss, nats a token")
    figure.suptitle(
        f"{_title(laws)}: bands {CONFIDENCE:.0%}, but for what a seed's runs share; dashed: not tried",
        x=0.01,
        ha="left",
        color=INK,
        fontsize=12,
    )
    return figure


def _title(laws: Sequence[Law]) -> str:
    """How much it rests on."""
    most = max(law.seeds[1] for law in laws)
    return f"{most} seed{'s' * (most > 1)}, {laws[0].family.points[0].tokens:,} tokens"


def _panel(axes: Axes, law: Law) -> None:
    first = law.terms[0]
    colours = colormaps["viridis"]
    if baseline := {group.crossing.baseline for group in law.groups if group.crossing}:
        axes.plot([], [], color=INK, linestyle=":", linewidth=1.3, label=", ".join(sorted(baseline)))
    for place, group in enumerate(law.groups):
        _group(axes, group, colours(0.35 if len(law.groups) == 1 else 0.85 * place / (len(law.groups) - 1)))
    axes.set_xscale("log")
    axes.set_xlim(first.values[0] / 1.1, first.values[-1] * FARTHEST)
    axes.set_xticks(_apart(first.values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    axes.set_xlabel(first.factor)
    axes.set_title(f"{law.family.name}\n{FORMS[first.form]}", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    quiet(axes, "y")


def _apart(sizes: Sequence[float]) -> list[float]:
    """Those that have room for a label."""
    shown = [sizes[0]]
    for size in sizes:
        if math.log(size / shown[-1]) > _ROOM * math.log(FARTHEST * sizes[-1] / sizes[0]):
            shown.append(size)
    return shown


def _group(axes: Axes, group: Group, colour: Colour) -> None:
    name = ", ".join(f"{count(value)} {key}" for key, value in group.at.items()) or "law"
    within = group.xs <= group.x[-1]
    axes.plot(group.xs[within], group.law[within], color=colour, linewidth=1.8, label=name)
    axes.plot(group.xs[~within], group.law[~within], color=colour, linewidth=1.4, linestyle=(0, (4, 3)))
    axes.fill_between(group.xs, group.low, group.high, color=colour, alpha=0.15, linewidth=0)
    for x, point in zip(group.x, group.points, strict=True):
        losses = list(point.losses.values())
        axes.plot([x] * len(losses), losses, "o", color=colour, markersize=3.5, alpha=0.6, markeredgewidth=0)
        axes.plot([x], [point.mean], "_", color=colour, markersize=14, markeredgewidth=2)
    if c := group.crossing:
        quiet_ink: Colour = INK if not group.at else colour
        axes.axhline(c.loss, color=quiet_ink, linestyle=":", linewidth=1.3)
        if c.smallest:
            low, high = max(c.smallest.low, group.xs[0]), min(c.smallest.high, group.xs[-1])
            axes.plot([low, high], [c.loss, c.loss], color=quiet_ink, linewidth=5, alpha=0.3, solid_capstyle="butt")
