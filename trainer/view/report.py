"""The page that `report` writes: a run as one HTML file that needs nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from html import escape
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.common.atomic import atomic_write
from trainer.common.errors import UserError
from trainer.common.figure_style import SERIES
from trainer.config.recipe import Recipe
from trainer.telemetry.console import describe
from trainer.telemetry.time_breakdown import ACTIVITIES
from trainer.view import facts
from trainer.view.charts import COLOURS, POINTS, Chart, Curve, Numbers, draw_chart, draw_load, draw_shares
from trainer.view.records import RECIPE_FILE, ROLES, Records, facts_of, is_run, recorded_load, saved_recipe
from trainer.view.view import who_waits

REPORT_FILE = "report.html"
_FEW = 40
"""Number of evaluations up to which each one is marked."""
# Whatever a recipe contains, the browser must neither load nor run it.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page of a run, by default as report.html in its folder; the file appears whole or not at all.

    Raises:
        UserError: The folder is not that of a run, or the file cannot be written.
    """
    if not is_run(run):
        raise UserError(f"{run}: not a run; give the folder of a run (run.dir)")
    path = out or run / REPORT_FILE
    page = make_page(run)
    try:
        atomic_write(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    return path


def make_page(run: Path) -> str:
    """Return the HTML of the page."""
    records = Records(run)
    records.read()
    recipe, load_LM = saved_recipe(run), recorded_load(run)
    name = escape(run.resolve().name)
    steps = np.array(records.steps, dtype=float)
    sections = [
        _section("Learning", _thinned(steps) + _grid(_figures(_learning(records, recipe, steps)))),
        _section("Time", _sentence(records, recipe, run) + _grid([*_shares(records, steps), *_speed(records, steps)])),
        _section("Experts", _grid(_figures(_experts(records, recipe, steps)))),
        _section("Load of the experts, by layer", _load(load_LM, recipe)),
        _section("Facts", _facts(run, records, recipe)),
        _section("Recipe", _recipe_text(run)),
    ]
    style = (resources.files("trainer.view") / "report.css").read_text()
    return "\n".join(
        (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            f"<title>{name}</title><style>{style}</style></head><body><main>",
            f"<header><h1>{name}</h1>{_about(recipe)}{_missing(records, recipe, load_LM)}</header>",
            _tiles(facts.headline(records, recipe)),
            *sections,
            "</main></body></html>\n",
        )
    )


def _about(recipe: Recipe | None) -> str:
    made = time.strftime("%Y-%m-%d %H:%M %Z")
    what = f"<p>{escape(describe(recipe).removeprefix(f'{recipe.run.dir}: '))}</p>" if recipe else ""
    return f'{what}<p class="quiet">As of {made}</p>'


def _missing(records: Records, recipe: Recipe | None, load_LM: NDArray[np.int64] | None) -> str:
    """Say what the page cannot show, and why."""
    pooled = recipe is None or recipe.model.ffn == "pool"
    lines = []
    if recipe is None:
        lines.append(f"{RECIPE_FILE} is missing or of another version, so there are no facts about model and layout.")
    if not records.steps:
        lines.append("No step is recorded yet, so there are no curves.")
    elif recipe and records.steps[-1] < recipe.train.steps:
        lines.append(f"The run is not finished: it has made {records.steps[-1]:,} of {recipe.train.steps:,} steps.")
    if not records.val_losses:
        lines.append("No evaluation is recorded yet, so there is no validation loss.")
    if pooled and load_LM is None:
        lines.append("No load of the experts is recorded yet; it is saved with the first evaluation or checkpoint.")
    if records.steps and not records.has("trunk_computing"):
        lines.append("No shares of time are recorded, because an older version trained this run.")
    return f'<div class="missing">{"".join(f"<p>{escape(line)}</p>" for line in lines)}</div>' if lines else ""


def _learning(records: Records, recipe: Recipe | None, steps: Numbers) -> list[Chart]:
    few = len(records.val_steps) <= _FEW
    validation = Curve("validation", np.array(records.val_steps, float), np.array(records.val_losses), points=few)
    losses = [Curve("training", steps, np.array(records.columns["loss"])), validation]
    clip = {"clipping norm": recipe.train.clip} if recipe and recipe.train.clip else {}
    norm = _chart("Gradient norm, before clipping", records, steps, {"grad_norm": "norm"})
    charts = [
        Chart("Loss, nats per token", tuple(losses), clip=True),
        replace(norm, log=True, clip=True, lines=clip),
        _chart("Learning rate", records, steps, {"lr": "rate"}, from_zero=True),
    ]
    return _with_data(charts)


def _speed(records: Records, steps: Numbers) -> list[str]:
    charts = [_chart("Tokens per second", records, steps, {"tokens_per_second": "tokens"}, from_zero=True)]
    return _figures(_with_data(charts))


def _experts(records: Records, recipe: Recipe | None, steps: Numbers) -> list[Chart]:
    if recipe and recipe.model.ffn == "dense":
        return []
    imbalance = {"load_imbalance": "pool", "layer_imbalance": "layers, mean", "shard_imbalance": "shards"}
    in_use = {"dead_experts": "dead", "effective_experts": "effective"}
    gates = {"layer_gate": "layers, mean", "smallest_gate": "smallest"}
    probes = Curve("mean", np.array(records.probe_steps, float), np.array(records.random_routing), points=True)
    charts = [
        _chart("Load imbalance, max / mean", records, steps, imbalance),
        _chart("Dead experts, and effective number", records, steps, in_use, from_zero=True),
        _chart("Different experts that a token meets", records, steps, {"distinct_experts": "experts"}),
        _chart("How the layers' loads differ, bits", records, steps, {"specialisation": "divergence"}, from_zero=True),
        _chart("Gate values of a token, summed", records, steps, gates, from_zero=True),
        Chart("Loss that random experts in a layer add, nats", (probes,), lines={"nothing": 0.0}),
    ]
    return _with_data(charts)


def _thinned(steps: Numbers) -> str:
    """Say what a point is, if it is not a single step."""
    if len(steps) <= POINTS:
        return ""
    each = f"{len(steps) / POINTS:,.0f}"
    return f'<p class="quiet">A point is the mean of about {each} steps; the band shows their least and largest.</p>'


def _chart(title: str, records: Records, steps: Numbers, names: dict[str, str], from_zero: bool = False) -> Chart:
    curves = [Curve(label, steps, np.array(records.columns[name])) for name, label in names.items()]
    return Chart(title, tuple(curves), from_zero=from_zero)


def _with_data(charts: Iterable[Chart]) -> list[Chart]:
    """Drop curves without any value, and charts without any curve."""
    kept = []
    for chart in charts:
        curves = tuple(curve for curve in chart.curves if np.isfinite(curve.values).any())
        if curves:
            kept.append(replace(chart, curves=curves))
    return kept


def _figures(charts: Iterable[Chart]) -> list[str]:
    return [_figure(f"<b>{escape(chart.title)}</b>", draw_chart(chart)) for chart in charts]


def _grid(figures: Iterable[str]) -> str:
    inside = "".join(figures)
    return f'<div class="curves">{inside}</div>' if inside else ""


def _figure(caption: str, picture: str) -> str:
    return f"<figure><figcaption>{caption}</figcaption>{picture}</figure>"


def _sentence(records: Records, recipe: Recipe | None, run: Path) -> str:
    roles = {role: records.shares(role) for role in ROLES}
    said = who_waits(roles, facts_of(recipe, run) if recipe else {}) if roles["trunk"] else ""
    return f"<p>{escape(said)}</p>" if said else ""


def _shares(records: Records, steps: Numbers) -> list[str]:
    """Draw a figure for each role whose shares of time are recorded."""
    figures = []
    for role in ROLES:
        mean = records.shares(role)
        if not mean:
            continue
        columns = {activity: np.array(records.columns[f"{role}_{activity}"]) for activity in ACTIVITIES}
        keys = "".join(
            f'<span class="key" style="--key: {COLOURS[colour]}">{activity} {mean[activity]:.0%}</span>'
            for activity, colour in zip(ACTIVITIES, SERIES, strict=True)
        )
        caption = f"<b>Time of a {role} rank</b><br>{keys}"
        figures.append(_figure(caption, draw_shares(f"{role} time", steps, columns)))
    return figures


def _load(load_LM: NDArray[np.int64] | None, recipe: Recipe | None) -> str:
    if load_LM is None:
        return ""
    caption = (
        "Above: each layer's share of tokens by expert, coloured by its square root. Below: each expert's share of all "
        "tokens beside a uniform load. Means over about the last 100 steps."
    )
    groups = recipe.model.groups if recipe else 1
    return _figure(caption, f'<div class="scroll">{draw_load(load_LM, groups)}</div>')


def _facts(run: Path, records: Records, recipe: Recipe | None) -> str:
    groups = [("Results", _list(facts.outcome(run, records)))]
    if recipe:
        groups.append(("Model", _list(facts.model_facts(recipe))))
        groups.append(("Training and layout", _list(facts.training_facts(run, recipe))))
    rows = "".join(f"<tr><td>{step:,}</td><td>{loss:.4f}</td></tr>" for step, loss in facts.evaluations(records))
    if rows:
        groups.append(("Evaluations", f"<table><tr><th>step</th><th>validation loss</th></tr>{rows}</table>"))
    inside = "".join(f"<section><h3>{title}</h3>{body}</section>" for title, body in groups)
    return f'<div class="facts">{inside}</div>'


def _list(found: facts.Facts) -> str:
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in found) + "</dl>"


def _tiles(found: facts.Facts) -> str:
    tiles = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in found)
    return f'<dl class="tiles">{tiles}</dl>' if tiles else ""


def _recipe_text(run: Path) -> str:
    try:
        return f"<pre>{escape((run / RECIPE_FILE).read_text(errors='replace'))}</pre>"
    except OSError:
        return ""


def _section(title: str, *bodies: str) -> str:
    """Make a section; nothing if it would be empty."""
    body = "".join(bodies)
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""
