"""The result of a sweep as pictures, PNG and SVG: the effect of every variant, and the curves of validation loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from trainer.common.figure_style import (
    INK,
    QUIET,
    SERIES,
    Colour,
    add_legend,
    figure_title,
    label_ends,
    new_figure,
    panel_title,
    style_axes,
    write_png_and_svg,
)
from trainer.common.format import count, plural
from trainer.sweep.result import RunResult, SweepResult, VariantResult
from trainer.sweep.statistics import CONFIDENCE, Difference, Spread, spread

RESULT, CURVES = "result", "curves"
_LOSS = "validation loss, nats per token"
_LOG_FROM = 8.0
"""Ratio of an axis' last to its first value from which on it is logarithmic."""
_DODGE = 0.04
"""Distance between the points of two variants at one value, as a share of the axis."""


def write_pictures(folder: Path, result: SweepResult) -> list[Path]:
    """Write the result, and the curves if they are known, as PNG and SVG; nothing while no run is finished."""
    done = [variant for variant in result.variants if variant.runs]
    if not done:
        return []
    axis = numeric_axis(result)
    figures = {RESULT: draw_axis(result, done, axis) if axis else draw_variants(result, done)}
    if curves := [variant for variant in done if variant.runs[0].val_steps]:
        figures[CURVES] = draw_curves(result, curves)
    return [path for name, figure in figures.items() for path in write_png_and_svg(figure, folder / name)]


def numeric_axis(result: SweepResult) -> str | None:
    """Return the first axis of several numbers."""
    for key, values in result.axes.items():
        if len(values) > 1 and all(type(value) in (int, float) for value in values):
            return key
    return None


def draw_variants(result: SweepResult, variants: Sequence[VariantResult]) -> Figure:
    """Draw the losses on the left and the differences to the baseline on the right, the best variant on top."""
    variants = sorted(variants, key=lambda v: v.difference.mean if v.difference else 0.0)
    figure = new_figure(11, 1.9 + 0.36 * len(variants))
    losses, differences = figure.subplots(1, 2, sharey=True)
    baselines = [v for v in variants if v.variant == result.baseline]
    for place, v in enumerate(variants):
        colour = INK if v in baselines else SERIES[0]
        _draw_point(losses, place, v.val_loss, list(v.losses.values()), colour, across=True)
        if v.difference:
            _draw_point(differences, place, v.difference, _paired_losses(result, v), colour, across=True)
    if len(baselines) == 1:
        losses.axvline(baselines[0].val_loss.mean, color=INK, linestyle="--", linewidth=1)
    differences.axvline(0, color=INK, linestyle="--", linewidth=1)
    reference = result.picture.reference
    if known := {place: reference[v.variant] for place, v in enumerate(variants) if v.variant in reference}:
        look = {"color": SERIES[1], "markerfacecolor": "none", "label": result.picture.reference_name}
        differences.plot(list(known.values()), list(known), "D", **look)
        add_legend(figure, loc="outside upper right")
    losses.set_yticks(range(len(variants)), [_label(result, v) for v in variants])
    losses.set_ylim(len(variants) - 0.5, -0.5)
    losses.set_xlabel(_LOSS)
    differences.set_xlabel(f"minus {_name(result, result.baseline)}, same seed")
    for axes in (losses, differences):
        axes.xaxis.set_major_locator(MaxNLocator(6))
        style_axes(axes, "x")
    figure_title(figure, _title(result, variants))
    return figure


def _draw_point(
    axes: Axes,
    place: float,
    s: Spread | Difference,
    seeds: Sequence[float],
    colour: Colour,
    across: bool = False,
    label: str | None = None,
) -> None:
    """Draw the mean at a place with its confidence interval, and a small point for each seed, `across` or upwards."""

    def plot(values: Sequence[float], style: str, **settings: Any) -> None:
        fixed = [place] * len(values)
        axes.plot(*((values, fixed) if across else (fixed, values)), style, color=colour, **settings)

    if not math.isnan(s.low):
        plot([s.low, s.high], "-", linewidth=3, alpha=0.3, solid_capstyle="butt")
    plot(seeds, "o", markersize=3.5, alpha=0.6, markeredgewidth=0)
    plot([s.mean], "|" if across else "_", markersize=11, markeredgewidth=2, label=label)


def draw_axis(result: SweepResult, variants: Sequence[VariantResult], axis: str) -> Figure:
    """Draw points over an axis of numbers, with one panel for each point of the other axes and one scale for all.

    The values are differences to the baseline if all other variants have one, otherwise losses. A variant without a
    value on the axis is a level line.
    """
    others = [{key: value for key, value in v.point.items() if key != axis} for v in variants]
    panels = [point for v, point in zip(variants, others, strict=True) if axis in v.point]
    panels = [point for n, point in enumerate(panels) if point not in panels[:n]] or [{}]
    compared = all(v.difference for v in variants if v.variant != result.baseline)
    names = list(dict.fromkeys(v.variant for v in variants if v.variant != result.baseline or not compared))
    colours = dict(zip(names, (SERIES * len(names))[: len(names)], strict=True)) | {result.baseline: INK}
    values = sorted(float(value) for value in result.axes[axis])
    scale = math.log if values[0] > 0 and values[-1] / values[0] >= _LOG_FROM else float
    ticks = [scale(value) for value in values]
    figure = new_figure(2 + 4.4 * len(panels), 5.2)
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, panel in zip(all_axes, panels, strict=True):
        shown = [v for v, point in zip(variants, others, strict=True) if point.items() <= panel.items()]
        for v in shown:
            s = v.difference if compared else v.val_loss
            label = _name(result, v.variant)
            if axis not in v.point:
                axes.axhline(s.mean if s else 0.0, color=colours[v.variant], linestyle="--", linewidth=1.2, label=label)
            elif s:
                shift = (names.index(v.variant) - (len(names) - 1) / 2) * _DODGE * (ticks[-1] - ticks[0])
                seeds = _paired_losses(result, v) if compared else list(v.losses.values())
                place = scale(float(v.point[axis])) + shift
                first = v.point[axis] == next(w for w in shown if w.variant == v.variant).point.get(axis)
                _draw_point(axes, place, s, seeds, colours[v.variant], label=label if first else None)
        axes.set_xticks(ticks, [f"{value:g}" for value in values])
        axes.set_xlabel(_name(result, axis))
        panel_title(axes, ", ".join(_setting(result, shown[-1], key) for key in panel), size=10)
        style_axes(axes)
    baseline = _name(result, result.baseline)
    all_axes[0].set_ylabel(f"{_LOSS.partition(',')[0]} minus {baseline}, same seed, nats" if compared else _LOSS)
    add_legend(all_axes[0], loc="best")
    figure_title(figure, _title(result, variants))
    return figure


def draw_curves(result: SweepResult, variants: Sequence[VariantResult]) -> Figure:
    """Draw validation loss over tokens, the mean over seeds, and on the right the same minus the baseline.

    The baseline and one more variant stand out and have a band, the confidence interval of the mean. Curves are named
    at their ends, those in grey only in the last panel.
    """
    others = [v for v in variants if v.variant != result.baseline] or variants
    highlighted = result.picture.highlight or min(others, key=lambda v: v.val_loss.mean).variant
    looks: dict[str, tuple[Colour, float]] = {highlighted: (SERIES[1], 2.2), result.baseline: (INK, 2.2)}
    losses = [(v, _spread_curve([(run.val_steps, run.val_losses) for run in v.runs])) for v in variants]
    differences = [(v, _spread_curve(pairs)) for v in variants if (pairs := _minus_baseline(result, v))]
    panels = [losses, differences] if differences else [losses]
    figure = new_figure(1 + 6 * len(panels), max(5.0, 1.2 + 0.26 * len(variants)))
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, curves in zip(all_axes, panels, strict=True):
        ends = []
        for v, (steps, spreads) in curves:
            colour, width = looks.get(v.variant, (QUIET, 1.0))
            tokens = np.array(steps) * (v.tokens / max(run.val_steps[-1] for run in v.runs))
            means = [s.mean for s in spreads]
            axes.plot(tokens, means, color=colour, linewidth=width, zorder=2 + (v.variant in looks))
            if v.variant in looks and spreads[0].n > 1:
                low, high = [s.low for s in spreads], [s.high for s in spreads]
                axes.fill_between(tokens, low, high, color=colour, alpha=0.15, linewidth=0)
            if v.variant in looks or axes is all_axes[-1]:
                ends.append((float(tokens[-1]), means[-1], _label(result, v), colour))
        label_ends(axes, ends)
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.set_xlabel("tokens")
        style_axes(axes)
    all_axes[0].set_ylabel(_LOSS)
    if differences:
        all_axes[1].set_ylabel(f"minus {_name(result, result.baseline)}, same seed, nats per token")
        all_axes[1].axhline(0, color=INK, linestyle="--", linewidth=1)
    mean = f", mean over {_seeds(variants)}" if _are_repeated(variants) else ""
    figure_title(figure, f"{result.sweep}: validation loss{mean}")
    return figure


_Curve = tuple[Sequence[int], Sequence[float]]
"""Steps and values."""


def _spread_curve(curves: Sequence[_Curve]) -> tuple[Sequence[int], list[Spread]]:
    """Return the steps of the first curve, and the spread at each of them over the curves that have the same steps."""
    steps = curves[0][0]
    by_step = zip(*(values for own, values in curves if own == steps), strict=True)
    return steps, [spread(values) for values in by_step]


def _pairs(result: SweepResult, v: VariantResult) -> list[tuple[RunResult, RunResult]]:
    """Return the runs of a variant whose seed the baseline has as well, each with that run of the baseline."""
    other = result.baseline_of(v)
    baseline = {run.seed: run for run in other.runs} if other else {}
    return [(run, baseline[run.seed]) for run in v.runs if run.seed in baseline]


def _minus_baseline(result: SweepResult, v: VariantResult) -> list[_Curve]:
    """Return the differences to the baseline of every seed that both have, validated after the same steps."""
    return [
        (own.val_steps, np.subtract(own.val_losses, other.val_losses).tolist())
        for own, other in _pairs(result, v)
        if own.val_steps == other.val_steps
    ]


def _paired_losses(result: SweepResult, v: VariantResult) -> list[float]:
    """Return the loss minus the baseline's for every seed that both have."""
    return [own.val_loss - other.val_loss for own, other in _pairs(result, v)]


def _name(result: SweepResult, key: str) -> str:
    return result.picture.labels.get(key, key)


def _label(result: SweepResult, v: VariantResult) -> str:
    return ", ".join([_name(result, v.variant), *(_setting(result, v, key) for key in v.point)])


def _setting(result: SweepResult, v: VariantResult, key: str) -> str:
    """Name the value of a key of the grid; a number of steps is told as tokens."""
    if key == "train.steps":
        return f"{count(v.tokens, digits=3)} tokens"
    return f"{_name(result, key)} = {v.point[key]}"


def _title(result: SweepResult, variants: Sequence[VariantResult]) -> str:
    bars = f", {CONFIDENCE:.0%} confidence intervals of the mean" if _are_repeated(variants) else ""
    return f"{result.sweep}: {_seeds(variants)}{bars}"


def _are_repeated(variants: Sequence[VariantResult]) -> bool:
    return any(len(v.runs) > 1 for v in variants)


def _seeds(variants: Sequence[VariantResult]) -> str:
    """Return how many seeds of each variant are finished, as in "3 to 5 seeds"."""
    fewest, most = (of(len(v.runs) for v in variants) for of in (min, max))
    return plural(most, "seed") if fewest == most else f"{fewest} to {plural(most, 'seed')}"
