"""Laws as a picture: a panel per family, and in it a curve with its band for every value of the other factors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from trainer.common.figure_style import (
    INK,
    Colour,
    add_legend,
    figure_title,
    label_ends,
    new_figure,
    panel_title,
    style_axes,
)
from trainer.common.format import count, plural
from trainer.scaling_law.law import FORMS, interval
from trainer.scaling_law.result import FARTHEST, Law, log_sizes
from trainer.sweep.statistics import CONFIDENCE

_ROOM = 0.07
"""Share of the axis that a tick's label takes."""


def draw(laws: Sequence[Law]) -> Figure:
    """Draw runs as points, their means as dashes, laws with their intervals, and dashed what was not measured."""
    figure = new_figure(3 + 6.5 * len(laws), 5.2)
    panels = figure.subplots(1, len(laws), sharey=True, squeeze=False)[0]
    for axes, law in zip(panels, laws, strict=True):
        _draw_law(axes, law)
    panels[0].set_ylabel("validation loss, nats per token")
    most, tokens = max(len(point.runs) for law in laws for point in law.family.points), laws[0].family.points[0].tokens
    about = f"{plural(most, 'seed')}, {count(tokens, digits=3)} tokens"
    figure_title(figure, f"{about}; bands: {CONFIDENCE:.0%} intervals; dashed: not measured")
    return figure


def _draw_law(axes: Axes, law: Law) -> None:
    first, *rest = law.terms
    groups = sorted(set(map(tuple, law.x_nK[:, 1:].tolist())))
    ends = []
    for place, others in enumerate(groups):
        at = {term.factor: x for term, x in zip(rest, others, strict=True)}
        colour = colormaps["viridis"](0.35 if len(groups) == 1 else 0.75 * place / (len(groups) - 1))
        name = ", ".join(f"{count(x, digits=3)} {factor.removesuffix(' parameters')}" for factor, x in at.items())
        ends.append((*_draw_group(axes, law, at, colour), name, colour))
    for place, crossing in enumerate(law.crossings):
        label = None if place else crossing.name
        axes.axhline(crossing.loss, color=INK, linestyle=":", linewidth=1.3, label=label)
    if law.crossings:
        add_legend(axes)
    axes.set_xscale("log")
    axes.set_xlim(first.values[0] / 1.1, first.values[-1] * FARTHEST)
    ticks = _apart(first.values)
    axes.set_xticks(ticks, [count(size, digits=3) for size in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(first.factor)
    panel_title(axes, f"{law.family.name}: {FORMS[first.form]}", size=10)
    style_axes(axes)
    if rest:
        label_ends(axes, ends)


def _apart(sizes: Sequence[float]) -> list[float]:
    """Choose the sizes that have room for a label."""
    shown = [sizes[0]]
    for size in sizes:
        if math.log(size / shown[-1]) > _ROOM * math.log(FARTHEST * sizes[-1] / sizes[0]):
            shown.append(size)
    return shown


def _draw_group(axes: Axes, law: Law, at: dict[str, float], colour: Colour) -> tuple[float, float]:
    """Draw the points whose other factors have these values, and their curve; return where the curve ends."""
    own_n = np.all(law.x_nK[:, 1:] == list(at.values()), axis=1)
    measured = law.x_nK[own_n, 0]
    xs = np.geomspace(measured.min(), FARTHEST * measured.max(), 120)
    u = log_sizes(law.terms, xs, at)
    losses = law.curve(u)
    low, high = np.array([interval(column) for column in np.array([curve(u) for curve in law.replicates]).T]).T
    within = xs <= measured.max()
    axes.plot(xs[within], losses[within], color=colour, linewidth=1.8)
    axes.plot(xs[~within], losses[~within], color=colour, linewidth=1.4, linestyle=(0, (4, 3)))
    axes.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
    for n in np.flatnonzero(own_n):
        point, x = law.family.points[n], law.x_nK[n, 0]
        axes.plot(
            [x] * len(point.runs),
            list(point.losses.values()),
            "o",
            color=colour,
            markersize=3.5,
            alpha=0.6,
            markeredgewidth=0,
        )
        axes.plot([x], [point.val_loss.mean], "_", color=colour, markersize=14, markeredgewidth=2)
    return float(xs[-1]), float(losses[-1])
