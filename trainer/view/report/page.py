"""The page that `report` writes of a run: one HTML file that needs nothing else."""

from __future__ import annotations

import time
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.common.atomic import atomic_write
from trainer.common.errors import UserError
from trainer.common.figure_style import SERIES
from trainer.common.format import duration, number, percent, seconds
from trainer.common.safe_read import read_bytes
from trainer.config.recipe import Recipe
from trainer.telemetry.console import describe
from trainer.telemetry.time_breakdown import ACTIVITIES
from trainer.train.ends.early_stop import ended_early
from trainer.view.rates import ROLES, Shares
from trainer.view.records import RECIPE_FILE, Records, facts_of, is_run, recorded_load, recorded_owners, saved_recipe
from trainer.view.report import facts
from trainer.view.report.charts import COLOURS, POINTS, draw_chart, draw_load, draw_map, draw_shares
from trainer.view.report.depth import by_depth
from trainer.view.report.parts import curves, fact_list, figure, fill_page, missing, quiet, table, titled, wide
from trainer.view.report.phases import Phase, elapsed, phases
from trainer.view.view import who_waits

REPORT_FILE = "report.html"


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page of a run, by default as report.html in its folder; the file appears whole or not at all.

    Raises:
        UserError: The folder is not that of a run, or the file cannot be written.
    """
    if not is_run(run):
        raise UserError(f"{run}: not a run; give the folder of a run (run.dir)")
    return write_page(make_page(run), out or run / REPORT_FILE)


def write_page(page: str, path: Path) -> Path:
    """Write a page whole or not at all; return its path.

    Raises:
        UserError: It cannot be written.
    """
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
    sections = [
        ("Learning", _thinned(records) + curves(*_learning(records, recipe))),
        ("Time", _time(records, recipe, run)),
        ("Experts", curves(*_experts(records, recipe))),
        ("By depth", curves(*_depth(records, recipe, load_LM))),
        ("Load of the experts, by layer", load_picture(load_LM, recipe, recorded_owners(run, recipe))),
        ("Who owns which expert", ownership_picture(run)),
        ("Facts", _facts(run, records, recipe)),
        ("Recipe", _recipe_text(run)),
    ]
    about = about_run(recipe) + quiet(f"As of {time.strftime('%Y-%m-%d %H:%M %Z')}")
    top = fact_list(facts.headline(records, recipe), "tiles")
    return fill_page(run.resolve().name, about + missing(what_is_missing(records, recipe, load_LM)), sections, top)


def about_run(recipe: Recipe | None) -> str:
    """Describe a run in a line; nothing without its recipe."""
    return f"<p>{escape(describe(recipe).removeprefix(f'{recipe.run.dir}: '))}</p>" if recipe else ""


def what_is_missing(records: Records, recipe: Recipe | None, load_LM: NDArray[np.int64] | None) -> list[str]:
    """Say what a page cannot show, and why."""
    pooled = recipe is None or recipe.model.ffn == "pool"
    lines = []
    if recipe is None:
        lines.append(f"{RECIPE_FILE} is missing or of another version, so there are no facts about model and layout.")
    if not records.steps:
        lines.append("No step is recorded yet, so there are no curves.")
    elif recipe and records.steps[-1] < recipe.train.steps:
        early = ended_early(recipe.eval, records.val_losses)
        state = "has ended early (eval.patience or eval.stop_below)" if early else "is not finished"
        lines.append(f"The run {state}: it has made {records.steps[-1]:,} of {recipe.train.steps:,} steps.")
    if not records.val_losses:
        lines.append("No evaluation is recorded yet, so there is no validation loss.")
    if pooled and load_LM is None:
        lines.append("No load of the experts is recorded yet; it is saved with the first evaluation or checkpoint.")
    if records.steps and not len(records.finite("trunk_computing")):
        lines.append("No shares of time are recorded, because an older version trained this run.")
    return lines


def _learning(records: Records, recipe: Recipe | None) -> list[str]:
    clip = {"clipping norm": recipe.train.clip} if recipe and recipe.train.clip else {}
    losses = {"loss": "training", "val_loss": "validation"}
    return [
        _chart(records, "Loss, nats per token", losses, clip=True),
        _chart(records, "Gradient norm, before clipping", {"grad_norm": "norm"}, log=True, clip=True, lines=clip),
        _chart(records, "Learning rate", {"lr": "rate"}, from_zero=True),
    ]


def _experts(records: Records, recipe: Recipe | None) -> list[str]:
    if recipe and recipe.model.ffn == "dense":
        return []
    imbalance = {"load_imbalance": "pool", "layer_imbalance": "layers, mean", "shard_imbalance": "shards"}
    in_use = {"dead_experts": "dead", "effective_experts": "effective"}
    gates = {"layer_gate": "layers, mean", "smallest_gate": "smallest"}
    random = {"random_routing": "mean"}
    return [
        _chart(records, "Load imbalance, max / mean", imbalance),
        _chart(records, "Dead experts, and effective number", in_use, from_zero=True),
        _chart(records, "Different experts that a token meets", {"distinct_experts": "experts"}),
        _chart(records, "How the layers' loads differ, bits", {"specialisation": "divergence"}, from_zero=True),
        _chart(records, "Gate values of a token, summed", gates, from_zero=True),
        _chart(records, "Loss that random experts in a layer add, nats", random, lines={"nothing": 0.0}),
    ]


def _depth(records: Records, recipe: Recipe | None, load_LM: NDArray[np.int64] | None) -> list[str]:
    known = by_depth(records, recipe, load_LM)
    layers = {title: np.arange(len(values), dtype=float) for title, values in known.items()}
    return [
        titled(title, draw_chart(title, {"": (layers[title], values)}, from_zero=True, over="layer"))
        for title, values in known.items()
    ]


def _time(records: Records, recipe: Recipe | None, run: Path) -> str:
    """Say who waits for whom, draw what the roles did with their time, and say what the time went into."""
    shares = {role: records.shares(role) for role in ROLES}
    said = who_waits(shares, facts_of(recipe, run) if recipe else {}) if shares["trunk"] else ""
    both = recipe is not None and not recipe.grid.dedicated
    figures = [_shares(records, role, mean, both) for role, mean in shares.items() if mean]
    speed = _chart(records, "Tokens per second", {"tokens_per_second": "tokens"}, from_zero=True)
    drawn = (f"<p>{escape(said)}</p>" if said else "") + curves(*figures, speed)
    return drawn + _phases(phases(run, records, recipe), elapsed(records))


def _phases(found: list[Phase], ends: NDArray[np.float64]) -> str:
    """Return the table of what the time until the last step went into."""
    if not found:
        return ""
    known = sum(phase.seconds for phase in found)
    total = float(ends[-1]) if np.isfinite(ends).all() else known
    tokens = sum(phase.tokens for phase in found[:1])
    rows = [
        (
            phase.name,
            duration(phase.seconds),
            percent(phase.seconds / known if known else None),
            f"{len(phase.pauses):,}",
            seconds(float(np.median(phase.pauses))),
            seconds(float(phase.pauses.max())),
            number(phase.tokens / phase.seconds if phase.tokens and phase.seconds else None, ",.0f"),
        )
        for phase in found
    ]
    rows.append(("in all", duration(total), "", "", "", "", number(tokens / total if total else None, ",.0f")))
    head = ("until the last step", "time", "share", "how often", "median", "longest", "tokens per second")
    return table(head, rows)


def _shares(records: Records, role: str, mean: Shares, both: bool) -> str:
    """Draw what a role did with its time, or ranks that have both roles."""
    columns = {activity: records.series(f"{role}_{activity}")[1] for activity in ACTIVITIES}
    keys = "".join(
        f'<span class="key" style="--key: {COLOURS[colour]}">{activity} {mean[activity]:.0%}</span>'
        for activity, colour in zip(ACTIVITIES, SERIES, strict=True)
    )
    picture = draw_shares(f"{role} time", np.array(records.steps, float), columns)
    return figure(f"<b>Time of a {'' if both else f'{role} '}rank</b><br>{keys}", picture)


def _thinned(records: Records) -> str:
    """Say what a point is, if it is not a single step."""
    if len(records.steps) <= POINTS:
        return ""
    each = f"{len(records.steps) / POINTS:,.0f}"
    return quiet(f"A point is the mean of about {each} steps; the band shows the whole range.")


def _chart(records: Records, title: str, names: Mapping[str, str], **options: Any) -> str:
    """Draw those of the named series that have a value; nothing if none has.

    Args:
        records: The records of the run.
        title: Title of the chart.
        names: What the series are called in the legend.
        options: Those of `draw_chart`.
    """
    series = {label: records.series(name) for name, label in names.items()}
    known = {label: (steps, values) for label, (steps, values) in series.items() if np.isfinite(values).any()}
    return titled(title, draw_chart(title, known, **options)) if known else ""


def load_picture(
    load_LM: NDArray[np.int64] | None, recipe: Recipe | None, owners: tuple[int, ...] | None, salt: str = "load"
) -> str:
    """Return the heat map of layers and experts; nothing without a load."""
    if load_LM is None:
        return ""
    caption = (
        "Above: each layer's share of tokens by expert, coloured by its square root. Below: each expert's share of all "
        "tokens beside a uniform load. Means over about the last 100 steps."
    )
    if owners:
        caption += " Framed: the experts that each layer owns."
    known = recipe and load_LM.shape == (recipe.model.layers, recipe.pool.experts)
    return figure(caption, wide(draw_load(load_LM, recipe.model.groups if recipe and known else 1, owners, salt)))


def ownership_picture(run: Path, salt: str = "owners") -> str:
    """Return who owns which expert, or would by the recorded load, as `own` does; nothing where that has no meaning."""
    from trainer.view.ownership import read_ownership

    try:
        found = read_ownership(run, None)
    except UserError:  # no pool that all layers share evenly, or no load yet
        return ""
    return figure(escape(" ".join(found.notes())), wide(draw_map(found.draw(), salt)))


def _facts(run: Path, records: Records, recipe: Recipe | None) -> str:
    groups = [("Results", fact_list(facts.outcome(run, records)))]
    if recipe:
        groups.append(("Model", fact_list(facts.model_facts(recipe))))
        groups.append(("Training and layout", fact_list(facts.training_facts(run, recipe))))
    rows = "".join(f"<tr><td>{step:,}</td><td>{loss:.4f}</td></tr>" for step, loss in facts.evaluations(records))
    if rows:
        groups.append(("Evaluations", f"<table><tr><th>step</th><th>validation loss</th></tr>{rows}</table>"))
    inside = "".join(f"<section><h3>{title}</h3>{body}</section>" for title, body in groups)
    return f'<div class="facts">{inside}</div>'


def _recipe_text(run: Path) -> str:
    try:
        return f"<pre>{escape(read_bytes(run / RECIPE_FILE).decode(errors='replace'))}</pre>"
    except (OSError, ValueError):
        return ""
