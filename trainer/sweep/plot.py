"""A sweep's rows as pictures, PNG and SVG: losses beside the baseline, or over an axis of numbers; and the curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullLocator

from trainer.common.atomic import atomic_write
from trainer.sweep.result import Row
from trainer.sweep.spec import Experiment
from trainer.sweep.statistics import CONFIDENCE, Spread

RESULT, CURVES = "result", "curves"

INK, _QUIET, _FIRST = "#222222", "#8a8a8a", "#31688e"
_SQUEEZED = 5
"""Parts of its height that a panel may be squeezed to for the sake of one scale."""
Colour = str | tuple[float, ...]

_LOG_FROM = 8.0
"""Ratio of an axis' last to its first value from which it is drawn as powers."""


def write_pictures(experiment: Experiment, rows: Sequence[Row]) -> list[Path]:
    """Write result.png, result.svg, and the same of the curves; none while no run is done."""
    done = [row for row in rows if row.runs]
    if not done:
        return []
    axis = numeric_axis(experiment)
    main = draw_axis(experiment, done, axis) if axis else draw_rows(experiment, done)
    figures = {RESULT: main, CURVES: draw_curves(experiment, done)}
    return [path for name, figure in figures.items() for path in write_figure(figure, experiment.folder / name)]


def write_figure(figure: Figure, path: Path) -> list[Path]:
    """Write it as PNG and SVG, each whole; the suffix of `path` is replaced."""
    png, svg = path.with_suffix(".png"), path.with_suffix(".svg")
    atomic_write(png, lambda file: FigureCanvasAgg(figure).print_figure(file, format="png"))
    # Without a date, and with ids that are not drawn by chance, the same rows make the same file.
    with rc_context({"svg.hashsalt": "unipool"}):
        atomic_write(
            svg, lambda file: FigureCanvasSVG(figure).print_figure(file, format="svg", metadata={"Date": None})
        )
    return [png, svg]


def numeric_axis(experiment: Experiment) -> str | None:
    """The first axis of several numbers."""
    for key, values in experiment.sweep.grid.items():
        numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
        if len(numbers) == len(values) > 1:
            return key
    return None


def draw_rows(experiment: Experiment, rows: Sequence[Row]) -> Figure:
    """Left the losses, each seed a point; right the paired differences. Bars are confidence intervals."""
    names = [row.cell.name for row in rows]
    baselines = sum(row.cell.variant == experiment.sweep.baseline for row in rows)
    height = 1.9 + 0.34 * len(rows)
    figure = Figure(figsize=(11, height), dpi=120, layout="constrained")
    losses, differences = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1))
    for place, row in enumerate(rows):
        is_baseline = row.cell.variant == experiment.sweep.baseline
        colour = INK if is_baseline else _FIRST
        _point(losses, place, row.val_loss, [run.val_loss for run in row.runs], colour)
        if is_baseline and baselines == 1:
            losses.axvline(row.val_loss.mean, color=INK, linestyle="--", linewidth=1)
        if d := row.difference:
            _point(differences, place, Spread(d.n, d.mean, math.nan, d.low, d.high), _differences(row, rows), colour)
    differences.axvline(0, color=INK, linestyle="--", linewidth=1)
    losses.set_yticks(range(len(rows)), names)
    losses.set_ylim(len(rows) - 0.5, -0.5)
    losses.set_xlabel("validation loss, nats a token")
    differences.set_xlabel(f"minus {experiment.sweep.baseline} of the same seed")
    for axes in (losses, differences):
        axes.xaxis.set_major_locator(MaxNLocator(6))
        quiet(axes, "x")
    _title(figure, experiment, rows)
    return figure


def _differences(row: Row, rows: Sequence[Row]) -> list[float]:
    for other in rows:
        if other.cell.name == row.cell.baseline:
            return [loss - other.losses[seed] for seed, loss in row.losses.items() if seed in other.losses]
    return []


def _point(axes: Axes, place: float, s: Spread, seeds: Sequence[float], colour: Colour) -> None:
    """A mean with its interval, and below it a point a seed."""
    if not math.isnan(s.low):
        axes.plot([s.low, s.high], [place, place], color=colour, linewidth=3, alpha=0.3, solid_capstyle="butt")
    axes.plot([s.mean, s.mean], [place - 0.26, place + 0.26], color=colour, linewidth=2)
    axes.plot(seeds, [place] * len(seeds), "o", color=colour, markersize=4.5, alpha=0.75, markeredgewidth=0)


def draw_axis(experiment: Experiment, rows: Sequence[Row], axis: str) -> Figure:
    """The losses over an axis of numbers: a line a variant; variants without that axis are level lines.

    There is a panel for each point of the other axes.
    """
    points = [{key: value for key, value in row.cell.point.items() if key != axis} for row in rows]
    across = [point for place, point in enumerate(points) if axis in rows[place].cell.point]
    panels = [point for place, point in enumerate(across) if point not in across[:place]] or [{}]
    size = (2 + 6.5 * len(panels), 5)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    colours = _colours(experiment, [(name, name) for name in experiment.sweep.variants])
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, panel in zip(all_axes, panels, strict=True):
        shown = [row for row, point in zip(rows, points, strict=True) if point.items() <= panel.items()]
        for variant in experiment.sweep.variants:
            if found := [row for row in shown if row.cell.variant == variant]:
                _series(axes, axis, found, variant, colours[variant])
        _number_scale(axes, sorted(float(value) for value in experiment.sweep.grid[axis]))
        axes.set_title(", ".join(f"{key}={value}" for key, value in panel.items()), loc="left", fontsize=10)
        axes.set_xlabel(axis)
        quiet(axes, "y")
    _share_scale(all_axes)
    all_axes[0].set_ylabel("validation loss, nats a token")
    all_axes[0].legend(frameon=False, fontsize=9, labelcolor=INK)
    _title(figure, experiment, rows)
    return figure


def _share_scale(all_axes: Sequence[Axes]) -> None:
    """One scale for all panels, if it leaves the lines of each room: losses of two lengths lie too far apart."""
    lows, highs = zip(*(axes.get_ylim() for axes in all_axes), strict=True)
    if max(highs) - min(lows) <= _SQUEEZED * min(high - low for low, high in zip(lows, highs, strict=True)):
        for axes in all_axes:
            axes.set_ylim(min(lows), max(highs))


def _series(axes: Axes, axis: str, rows: Sequence[Row], variant: str, colour: Colour) -> None:
    if axis in rows[0].cell.point:
        _line(axes, [float(row.cell.point[axis]) for row in rows], rows, variant, colour)
        return
    s = rows[0].val_loss
    axes.axhline(s.mean, color=colour, linestyle="--", linewidth=1.3, label=variant)
    if not math.isnan(s.low):
        axes.axhspan(s.low, s.high, color=colour, alpha=0.08, linewidth=0)


def _number_scale(axes: Axes, values: Sequence[float]) -> None:
    if values[0] > 0 and values[-1] / values[0] >= _LOG_FROM:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(values)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _line(axes: Axes, xs: Sequence[float], rows: Sequence[Row], name: str, colour: Colour) -> None:
    means = [row.val_loss.mean for row in rows]
    axes.plot(xs, means, "-", color=colour, linewidth=1.8, label=name)
    for x, row in zip(xs, rows, strict=True):
        s = row.val_loss
        if not math.isnan(s.low):
            axes.plot([x, x], [s.low, s.high], color=colour, linewidth=3, alpha=0.3, solid_capstyle="butt")
        axes.plot([x] * len(row.runs), list(row.losses.values()), "o", color=colour, markersize=4.5, markeredgewidth=0)


def draw_curves(experiment: Experiment, rows: Sequence[Row]) -> Figure:
    """Validation loss over tokens: the mean over seeds, and thin each seed's; beside it the same minus the baseline."""
    against = {row.cell.name: curve for row in rows if (curve := _minus_baseline(row, rows))}
    panels = 2 if against else 1
    figure = Figure(figsize=(3.5 + 6 * panels, max(5.0, 1.2 + 0.24 * len(rows))), dpi=120, layout="constrained")
    axes, *right = figure.subplots(1, panels, squeeze=False)[0]
    colours = _colours(experiment, [(row.cell.name, row.cell.variant) for row in rows])
    for row in rows:
        own = [(run.val_steps, run.val_losses) for run in row.runs]
        _curve(axes, row, own, colours[row.cell.name], row.cell.name)
        if row.cell.name in against:
            _curve(right[0], row, against[row.cell.name], colours[row.cell.name], "_")
    for panel, what in zip((axes, *right), ("", f", minus {experiment.sweep.baseline} of the same seed"), strict=False):
        panel.xaxis.set_major_formatter(EngFormatter(sep=" "))
        panel.set_xlabel("tokens")
        panel.set_ylabel(f"validation loss, nats a token{what}")
        quiet(panel, "both")
    for panel in right:
        panel.axhline(0, color=INK, linestyle="--", linewidth=1)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9, labelcolor=INK)
    figure.suptitle(f"{experiment.name}: mean over seeds, thin each seed", x=0.01, ha="left", color=INK, fontsize=12)
    return figure


_Seeds = Sequence[tuple[Sequence[int], Sequence[float]]]
"""Steps and values of each seed."""


def _minus_baseline(row: Row, rows: Sequence[Row]) -> _Seeds:
    """Of the seeds that both have, where they were validated after the same steps."""
    baseline = {run.seed: run for other in rows if other.cell.name == row.cell.baseline for run in other.runs}
    pairs = [(run, baseline[run.seed]) for run in row.runs if run.seed in baseline]
    return [
        (run.val_steps, [a - b for a, b in zip(run.val_losses, other.val_losses, strict=True)])
        for run, other in pairs
        if run.val_steps == other.val_steps
    ]


def _curve(axes: Axes, row: Row, seeds: _Seeds, colour: Colour, label: str) -> None:
    """The mean over the seeds that have the first one's steps, and thin each seed."""
    step_tokens = row.cell.recipe.train.global_batch * row.cell.recipe.model.seq_len
    for steps, values in seeds:
        axes.plot(np.array(steps) * step_tokens, values, color=colour, linewidth=0.7, alpha=0.35)
    steps = seeds[0][0]
    mean = np.mean([values for own, values in seeds if own == steps], axis=0)
    marks = "o-" if len(steps) < 30 else "-"
    axes.plot(np.array(steps) * step_tokens, mean, marks, color=colour, markersize=3.5, label=label)


def _colours(experiment: Experiment, names: Sequence[tuple[str, str]]) -> dict[str, Colour]:
    """A colour for each (name, variant); the baseline is the ink."""
    others = [name for name, variant in names if variant != experiment.sweep.baseline]
    colours = colormaps["tab10" if len(others) <= 10 else "tab20"]
    chosen: dict[str, Colour] = dict.fromkeys((name for name, _ in names), INK)
    return chosen | {name: colours(place % colours.N) for place, name in enumerate(others)}


def quiet(axes: Axes, grid: str) -> None:
    """A faint grid along x, y or both, and no frame on the right and above."""
    axes.grid(axis=grid, color=_QUIET, alpha=0.3, linewidth=0.6)  # type: ignore[arg-type]  # one of x, y, both
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)


def _title(figure: Figure, experiment: Experiment, rows: Sequence[Row]) -> None:
    seeds = max(len(row.runs) for row in rows)
    bars = f"{seeds} seeds, bars {CONFIDENCE:.0%} confidence of the mean" if seeds > 1 else "1 seed"
    figure.suptitle(f"{experiment.name}: {bars}", x=0.01, ha="left", color=INK, fontsize=12)
