"""The page that `report` writes of several runs: what differs between them, over tokens, over hours and by depth."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.common.errors import UserError
from trainer.common.format import ABSENT, duration, loss_change, number, percent
from trainer.common.strict_json import dumps
from trainer.config.recipe import Recipe
from trainer.view.rates import ROLES
from trainer.view.records import Numbers, Records, is_run, recorded_load, recorded_owners, saved_recipe
from trainer.view.report import facts
from trainer.view.report.charts import STYLES, draw_chart
from trainer.view.report.depth import by_depth
from trainer.view.report.page import about_run, load_picture, ownership_picture, what_is_missing, write_page
from trainer.view.report.parts import curves, fill_page, key, missing, quiet, table, titled
from trainer.view.report.phases import PHASES, TRAINING, Phase, elapsed, phases, step_seconds

COMPARISON_FILE = "comparison.html"

BINS = 60
"""Points of the difference of two training losses."""

Curves = dict[str, tuple[Numbers, Numbers]]
"""Places and values of a line, by the name of its run."""


@dataclass(frozen=True)
class Compared:
    """One of the runs: its folder, its name on the page, and what it has recorded."""

    path: Path
    name: str
    records: Records
    recipe: Recipe | None
    load_LM: NDArray[np.int64] | None

    @cached_property
    def tokens(self) -> Numbers:
        """Tokens seen after each step."""
        tokens: Numbers = np.nan_to_num(np.array(self.records.columns["tokens"])).cumsum()
        return tokens

    @cached_property
    def hours(self) -> Numbers:
        """Hours after each step since the first start; NaN if that is not recorded."""
        return elapsed(self.records) / 3600

    @cached_property
    def training_hours(self) -> Numbers:
        """Hours in training steps after each step."""
        return step_seconds(self.records).cumsum() / 3600

    def series(self, name: str, places: Numbers) -> tuple[Numbers, Numbers]:
        """Return a column of the records, or `val_loss`, over `places`, which has one for each recorded step."""
        steps, values = self.records.series(name)
        return (np.interp(steps, self.records.steps, places), values) if len(places) else (steps[:0], values[:0])


def write_comparison(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of several runs, by default as comparison.html in the folder of the first.

    Raises:
        UserError: A folder is not that of a run, one is given twice, there are too many, or the file cannot be written.
    """
    for run in runs:
        if not is_run(run):
            raise UserError(f"{run}: not a run; give the folders of runs (run.dir)")
    if len(runs) > len(STYLES):
        raise UserError(f"{len(runs)} runs: a report compares at most {len(STYLES)}; `unipool sweep` compares more")
    if twice := [run for place, run in enumerate(runs) if run.resolve() in [other.resolve() for other in runs[:place]]]:
        raise UserError(f"{twice[0]}: is given twice; give different runs")
    return write_page(make_comparison(runs), out or runs[0] / COMPARISON_FILE)


def make_comparison(runs: Sequence[Path]) -> str:
    """Return the HTML of the page; differences are to the first of the runs."""
    compared = [read_run(run, name) for run, name in zip(runs, names(runs), strict=True)]
    notes = [f"{c.name}: {line}" for c in compared for line in what_is_missing(c.records, c.recipe, c.load_LM)]
    about = "".join(
        f'<div class="run">{key(c.name, place)}{about_run(c.recipe)}</div>' for place, c in enumerate(compared)
    )
    sections = [
        ("Results", _facts(compared)),
        ("What differs in the recipes", differing_keys(compared)),
        ("Over tokens", curves(*_over_tokens(compared))),
        ("Over hours", _over_hours(compared)),
        ("Time", _time(compared)),
        ("Experts", curves(*_experts(compared))),
        ("By depth", curves(*_depth(compared))),
        ("Load of the experts, by layer", _pictures(compared, _load)),
        ("Who owns which expert", _pictures(compared, lambda c: ownership_picture(c.path, f"owners {c.name}"))),
        ("Model, training and layout", _setup(compared)),
    ]
    about += quiet(f"As of {time.strftime('%Y-%m-%d %H:%M %Z')}. Differences are to {compared[0].name}.")
    title = ", ".join(c.name for c in compared[:-1]) + f" and {compared[-1].name}"
    return fill_page(title, about + missing(notes), sections)


def names(runs: Sequence[Path]) -> list[str]:
    """Name each run by its folder, and where two have the same name, by as many folders above as tell them apart."""
    parts = [run.resolve().parts for run in runs]
    for last in range(1, max(map(len, parts)) + 1):
        found = ["/".join(own[-last:]) for own in parts]
        if len(set(found)) == len(found):
            break
    return found


def read_run(run: Path, name: str) -> Compared:
    """Read what a run has recorded."""
    records = Records(run)
    records.read()
    return Compared(run, name, records, saved_recipe(run), recorded_load(run))


def _facts(compared: Sequence[Compared]) -> str:
    found = [[*facts.progress(c.records, c.recipe), *facts.outcome(c.path, c.records)] for c in compared]
    last = [c.records.val_losses[-1] if c.records.val_losses else math.nan for c in compared]
    for place, own in enumerate(found):
        own.insert(2, ("last validation loss, difference", loss_change(last[place] - last[0]) if place else ABSENT))
    return _side_by_side(compared, found, mark=False)


def _setup(compared: Sequence[Compared]) -> str:
    found = [
        [*facts.model_facts(c.recipe), *facts.training_facts(c.path, c.recipe)] if c.recipe else [] for c in compared
    ]
    return _side_by_side(compared, found, mark=True)


def _side_by_side(compared: Sequence[Compared], found: Sequence[facts.Facts], mark: bool) -> str:
    """Return a table with a row for each fact and a column for each run."""
    by_name = [dict(own) for own in found]
    order = list(dict.fromkeys(name for own in found for name, _ in own))
    rows = [[name, *(own.get(name, ABSENT) for own in by_name)] for name in order]
    marked = [mark and len(set(row[1:])) > 1 for row in rows]
    return table(["", *(c.name for c in compared)], rows, marked, keys=True)


def differing_keys(compared: Sequence[Compared]) -> str:
    """Return the table of the recipe keys whose values differ, defaults among them."""
    flat = [_flat(c.recipe.model_dump(mode="json")) if c.recipe else {} for c in compared]
    if not all(flat):
        return quiet("The recipes cannot be compared, because one is missing or of another version.")
    keys = [name for name in dict.fromkeys(name for own in flat for name in own) if name != "run.dir"]
    rows = [[name, *(own.get(name, ABSENT) for own in flat)] for name in keys]
    different = [row for row in rows if len({ABSENT if text == "null" else text for text in row[1:]}) > 1]
    return table(["", *(c.name for c in compared)], different, keys=True) or quiet("Nothing but run.dir.")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the values of a recipe by their keys, as YAML would write them in one line."""
    flat: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, str) else dumps(value)
    return flat


def _chart(title: str, by_run: Curves, **options: Any) -> str:
    """Draw each run's finite values at finite places; nothing if there are none. A run without any keeps its colour."""
    finite = {name: np.isfinite(places) & np.isfinite(values) for name, (places, values) in by_run.items()}
    if not any(known.any() for known in finite.values()):
        return ""
    kept = {name: (by_run[name][0][known], by_run[name][1][known]) for name, known in finite.items()}
    return titled(title, draw_chart(title, kept, **options))


def _over_tokens(compared: Sequence[Compared]) -> list[str]:
    first, others = compared[0], compared[1:]
    change = {first.name: (np.zeros(0), np.zeros(0))}
    tokens = {"over": "tokens"}
    zero = {"lines": {f"like {first.name}": 0.0}, **tokens}
    return [
        _chart("Training loss, nats per token", _lines(compared, "loss"), clip=True, **tokens),
        _chart("Validation loss, nats per token", _lines(compared, "val_loss"), clip=True, **tokens),
        _chart("Training loss, difference", change | {c.name: training_change(first, c) for c in others}, **zero),
        _chart("Validation loss, difference", change | {c.name: validation_change(first, c) for c in others}, **zero),
        _chart("Gradient norm, before clipping", _lines(compared, "grad_norm"), log=True, clip=True, **tokens),
        _chart("Learning rate", _lines(compared, "lr"), from_zero=True, **tokens),
    ]


def _lines(compared: Sequence[Compared], name: str) -> Curves:
    return {c.name: c.series(name, c.tokens) for c in compared}


def training_change(first: Compared, other: Compared) -> tuple[Numbers, Numbers]:
    """Return the difference of the mean losses in BINS stretches of tokens that both runs have seen."""
    lines = [c.series("loss", c.tokens) for c in (first, other)]
    finite = [(places[np.isfinite(values)], values[np.isfinite(values)]) for places, values in lines]
    if not all(len(places) for places, _ in finite):
        return np.zeros(0), np.zeros(0)
    most = min(float(places[-1]) for places, _ in finite)
    bins = min(BINS, *(int((places <= most).sum()) for places, _ in finite))
    edges = np.linspace(0, most * (1 + 1e-12), max(bins, 1) + 1)
    means = []
    for places, values in finite:
        counts = np.histogram(places, edges)[0]
        sums = np.histogram(places, edges, weights=values)[0]
        means.append(np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0))
    return (edges[:-1] + edges[1:]) / 2, means[1] - means[0]


def validation_change(first: Compared, other: Compared) -> tuple[Numbers, Numbers]:
    """Return the difference at the other run's evaluations, to the first's loss between its evaluations."""
    (places, values), (at, losses) = (c.series("val_loss", c.tokens) for c in (first, other))
    known = np.isfinite(values)
    if not known.any():
        return np.zeros(0), np.zeros(0)
    return at, losses - np.interp(at, places[known], values[known], left=np.nan, right=np.nan)


def _over_hours(compared: Sequence[Compared]) -> str:
    known = all(len(c.hours) and np.isfinite(c.hours).all() for c in compared)
    places = {c.name: c.hours if known else c.training_hours for c in compared}
    hours: dict[str, Any] = {"over": "hours"}
    said = "Hours since the first start of each run, with everything that it did besides training."
    if not known:
        said = "Hours in training steps; the time since its first start is not recorded of every run."
    drawn = curves(
        _chart("Training loss over hours", {c.name: c.series("loss", places[c.name]) for c in compared}, **hours),
        _chart("Validation loss over hours", {c.name: c.series("val_loss", places[c.name]) for c in compared}, **hours),
        _chart("Tokens seen", {c.name: (places[c.name], c.tokens) for c in compared}, from_zero=True, **hours),
    )
    return quiet(said) + drawn if drawn else ""


def _time(compared: Sequence[Compared]) -> str:
    """Draw throughput and waiting, and say what the time of each run went into."""
    tokens: dict[str, Any] = {"from_zero": True, "over": "tokens"}
    speed = _chart("Tokens per second", _lines(compared, "tokens_per_second"), **tokens)
    waiting = [
        _chart(f"Waiting, share of a {role} rank's time", _lines(compared, f"{role}_waiting"), **tokens)
        for role in ROLES
    ]
    spent = [{phase.name: phase for phase in phases(c.path, c.records, c.recipe)} for c in compared]
    totals = [sum(phase.seconds for phase in own.values()) for own in spent]
    rows = [
        [name, *(_spent(own.get(name), total) for own, total in zip(spent, totals, strict=True))]
        for name in PHASES
        if any(name in own for own in spent)
    ]
    trained = [(own[TRAINING].tokens, own[TRAINING].seconds) if TRAINING in own else (0.0, 0.0) for own in spent]
    rows.append(["tokens per second of training", *(_rate(*own) for own in trained)])
    rows.append(["tokens per second in all", *(_rate(t, total) for (t, _), total in zip(trained, totals, strict=True))])
    return curves(speed, *waiting) + table(["until the last step", *(c.name for c in compared)], rows, keys=True)


def _spent(phase: Phase | None, total: float) -> str:
    return f"{duration(phase.seconds)}, {percent(phase.seconds / total if total else None)}" if phase else ABSENT


def _rate(tokens: float, seconds: float) -> str:
    return number(tokens / seconds if seconds else None, ",.0f")


def _experts(compared: Sequence[Compared]) -> list[str]:
    if all(c.recipe and c.recipe.model.ffn == "dense" for c in compared):
        return []
    titles = {
        "load_imbalance": "Load imbalance of the pool, max / mean",
        "layer_imbalance": "Load imbalance of a layer, mean",
        "effective_experts": "Effective number of experts",
        "dead_experts": "Dead experts",
        "distinct_experts": "Different experts that a token meets",
        "specialisation": "How the layers' loads differ, bits",
        "layer_gate": "Gate values of a token, summed, mean over layers",
        "random_routing": "Loss that random experts in a layer add, nats",
        "own_share": "Share of a layer's load on its own experts",
    }
    return [_chart(title, _lines(compared, name), over="tokens") for name, title in titles.items()]


def _depth(compared: Sequence[Compared]) -> list[str]:
    known = {c.name: by_depth(c.records, c.recipe, c.load_LM) for c in compared}
    titles = dict.fromkeys(title for own in known.values() for title in own)
    nothing = np.zeros(0)
    lines = {
        title: {
            name: (np.arange(len(own.get(title, nothing)), dtype=float), own.get(title, nothing))
            for name, own in known.items()
        }
        for title in titles
    }
    return [_chart(title, own, from_zero=True, over="layer") for title, own in lines.items()]


def _load(c: Compared) -> str:
    return load_picture(c.load_LM, c.recipe, recorded_owners(c.path, c.recipe), f"load {c.name}")


def _pictures(compared: Sequence[Compared], draw: Callable[[Compared], str]) -> str:
    """Return a picture of each run that has one, below its name."""
    drawn = [(key(c.name, place), draw(c)) for place, c in enumerate(compared)]
    return "".join(f"<h3>{name}</h3>{picture}" for name, picture in drawn if picture)
