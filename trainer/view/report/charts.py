"""Curves of a run and its heat map as SVG elements in the colours of the page, light or dark.

matplotlib draws with fixed colours. Afterwards each colour is replaced by a variable of report.css, fonts by those of
the page, and what only a separate SVG file needs is removed.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from trainer.common.figure_style import FAINT, INK, QUIET, SERIES, add_legend, new_figure, style_axes
from trainer.telemetry.expert_heatmap import draw_heat_map
from trainer.view.records import Numbers

POINTS = 400
"""Points of a curve at most; if there are more records, several share a point."""

_MARKED = 30
"""Points of a curve up to which each one is marked."""

COLOURS = {
    INK: "var(--ink)",
    "#000000": "var(--ink)",
    QUIET: "var(--quiet)",
    FAINT: "var(--absent)",
    **dict(zip(SERIES, ("var(--first)", "var(--second)", "var(--third)", "var(--fourth)"), strict=True)),
}
"""The page's variable for each colour that matplotlib draws with."""

STYLES = tuple((colour, dashes) for dashes in ("-", "--") for colour in SERIES)
"""Colour and dashes of each line of a chart."""

_SIZE = (4.3, 2.6)
_LEAST_SCALE = 0.85
"""Smallest scale of the heat map, below which its text is unreadable; where there is less room it is scrolled."""


@dataclass(frozen=True)
class Thinned:
    """Points of a curve, each for several records: their mean, smallest and largest value."""

    steps: Numbers
    mean: Numbers
    low: Numbers
    high: Numbers


def thin(steps: Numbers, values: Numbers, points: int = POINTS) -> Thinned:
    """Reduce a curve to at most `points` points, each for equally many neighbours; drop values that are not finite."""
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    if len(values) <= points:
        return Thinned(steps, values, values, values)
    starts = np.arange(points) * len(values) // points
    sizes = np.diff(np.append(starts, len(values)))
    return Thinned(
        np.add.reduceat(steps, starts) / sizes,
        np.add.reduceat(values, starts) / sizes,
        np.minimum.reduceat(values, starts),
        np.maximum.reduceat(values, starts),
    )


def draw_chart(
    title: str,
    curves: Mapping[str, tuple[Numbers, Numbers]],
    log: bool = False,
    clip: bool = False,
    from_zero: bool = False,
    lines: Mapping[str, float] = MappingProxyType({}),
    over: str = "step",
) -> str:
    """Draw curves over the steps as an SVG element.

    Args:
        title: Title on the page, which has no other chart of this title.
        curves: Steps, or what `over` says, and values of its lines by their names in the legend, as many as STYLES has.
            A line may have no points, but not all; each other has a finite value.
        log: Use a logarithmic scale if the values are far apart.
        clip: Cut off the few highest values if they would flatten all others.
        from_zero: Begin the scale at 0.
        lines: Horizontal lines by name.
        over: What the curves are over, as written below the axis.
    """
    figure, axes = _figure(over)
    styled = [
        (name, thin(*curve), style)
        for (name, curve), style in zip(curves.items(), STYLES, strict=False)
        if len(curve[0])
    ]
    for name, thinned, (colour, dashes) in styled:
        mark = "o" if len(thinned.steps) <= _MARKED else None
        shape: dict[str, Any] = {"marker": mark, "ms": 3, "color": colour, "ls": dashes, "lw": 1.4}
        axes.plot(thinned.steps, thinned.mean, label=_plain(name), **shape)
        if thinned.low is not thinned.high:
            axes.fill_between(thinned.steps, thinned.low, thinned.high, color=colour, alpha=0.25, lw=0)
    for name, value in lines.items():
        axes.axhline(value, color=QUIET, ls="--", lw=1, label=_plain(name))
    drawn = [thinned for _, thinned, _ in styled]
    low, high = min(t.low.min() for t in drawn), max(t.high.max() for t in drawn)
    if log and low > 0 and high > 30 * low:
        axes.set_yscale("log")
    elif clip:
        _clip(axes, np.concatenate([t.mean for t in drawn]))
    if from_zero:
        axes.set_ylim(0, 1.08 * max(float(high), 1e-9))
    if axes.get_yscale() == "linear":
        _label_values(axes)
    if len(curves) + len(lines) > 1:
        add_legend(axes, fontsize=8.5, loc="best")
    return _svg(figure, title)


def draw_shares(title: str, steps: Numbers, shares: Mapping[str, Numbers]) -> str:
    """Draw shares of time, stacked up to 100%, as an SVG element; at least one step must have all shares."""
    figure, axes = _figure()
    known = np.isfinite(np.stack(list(shares.values()))).all(0)
    thinned = {name: thin(steps[known], values[known]) for name, values in shares.items()}
    at = next(iter(thinned.values())).steps
    axes.stackplot(at, *(t.mean for t in thinned.values()), colors=SERIES, lw=0, alpha=0.85)
    axes.set_ylim(0, 1)
    if len(at) > 1:
        axes.set_xlim(at[0], at[-1])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(False)
    return _svg(figure, title)


def draw_load(load_LM: NDArray[np.int64], groups: int, owners: Sequence[int] | None = None, salt: str = "load") -> str:
    """Draw the heat map of layers and experts as an SVG element.

    Args:
        load_LM: Assignments of each layer to all experts of the pool, (L, M), also where a layer does not reach.
        groups: Sub-pools across depth.
        owners: The layer that owns each expert, framed.
        salt: Another text for each picture of a page.
    """
    layers = np.arange(len(load_LM))
    reached = load_LM.reshape(len(layers), groups, -1)[layers, layers * groups // len(layers)]
    return draw_map(draw_heat_map(reached, "", groups, owners), salt)


def draw_map(figure: Figure, salt: str) -> str:
    """Convert a figure whose first panel is a map to an SVG element; `salt` is another one for each of a page."""
    figure.patch.set_alpha(0)
    for axes in figure.axes[1:]:  # but not the map, whose background shows where a layer does not reach
        axes.patch.set_alpha(0)
    least = round(_LEAST_SCALE * figure.get_figwidth() * 72)
    return _svg(figure, salt).replace("<svg", f'<svg style="min-width: {least}px"', 1)


def _figure(over: str = "step") -> tuple[Figure, Axes]:
    figure = new_figure(*_SIZE)
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    style_axes(axes)
    axes.tick_params(labelsize=8.5, length=3)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=over in ("step", "layer")))
    if over != "hours":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel(over, color=INK, fontsize=8.5)
    axes.margins(x=0.01)
    return figure, axes


def _plain(name: str) -> str:
    """Return a name as matplotlib shows it in a legend: without formulas, and also if it begins with an underscore."""
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")


def _label_values(axes: Axes) -> None:
    """Write thousands as 20k, and the power of ten of very small values once, above the axis."""
    if axes.get_ylim()[1] >= 10_000:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    else:
        axes.ticklabel_format(axis="y", scilimits=(-2, 4), useMathText=False)
        axes.yaxis.get_offset_text().set(color=INK, fontsize=8.5)


def _clip(axes: Axes, means: Numbers) -> None:
    """Cut off the few highest points if they are far above all others, like the first losses of a long run."""
    low, most, high = float(means.min()), float(np.percentile(means, 97)), float(means.max())
    if high - low > 3 * (most - low) > 0:
        axes.set_ylim(low - 0.05 * (most - low), low + 1.6 * (most - low))
        axes.annotate(f"up to {high:.3g}", (0.02, 0.94), xycoords="axes fraction", color=QUIET, fontsize=8.5)


def _svg(figure: Figure, salt: str) -> str:
    """Convert a figure to an element that the page scales; `salt` keeps its ids different from other figures' ids."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        FigureCanvasSVG(figure).print_figure(file, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace("xlink:href", "href")
    svg = re.sub(r"<!--.*?-->|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # figure_1, axes_1: the same in every figure
    svg = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", svg)
    for colour, variable in COLOURS.items():
        svg = svg.replace(colour, variable)
    head, rest = svg.split(">", 1)
    head = re.sub(r' (width|height|version|xmlns(:\w+)?)="[^"]*"', "", head)
    return f'{head} role="img">{rest}'
