"""The result of a sweep: collected from the finished runs, written as result.json and result.csv, and read again."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from trainer.common.atomic import atomic_write
from trainer.common.errors import UserError
from trainer.common.safe_read import Unreadable, read_text
from trainer.common.strict_json import dumps, loads
from trainer.config.recipe import Recipe
from trainer.config.sections import source_names
from trainer.planning.model_costs import count_parameters
from trainer.sweep.runs import is_done, records_of
from trainer.sweep.spec import Cell, Experiment, Picture, Run
from trainer.sweep.statistics import CONFIDENCE, Difference, Number, Spread, paired, spread
from trainer.view.records import RECENT

JSON_FILE, CSV_FILE = "result.json", "result.csv"
_LARGEST_FILE = 2**28
"""Bytes of result.json at most; it holds the curves of all runs."""

_POOL_MEASURES = ("load_imbalance", "dead_experts", "distinct_experts", "specialisation")

SETTINGS = (
    *("model.ffn", "model.groups", "model.ffn_hidden", "model.vocab", "model.seq_len"),
    *("router.kind", "router.top_k", "router.constant_factor", "balance.layer", "balance.pool", "balance.scores"),
    *("balance.scope", "balance.delay", "train.lr", "data.source", "data.tokenizer"),
)
"""Recipe keys that result.json repeats, so that results of several sweeps can be compared."""


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What is measured besides the validation loss; NaN where there is no such number.

    Attributes:
        train_loss: Training loss, nats per token, mean over the last steps; so are the next four.
        load_imbalance: Load of the pool's fullest expert over the mean; NaN for a dense model, as the next three.
        dead_experts: Experts without a token in a step.
        distinct_experts: Different experts that a token meets in all layers.
        specialisation: How much the layers' loads differ, bits.
        random_routing: Nats that random experts in one layer add to the loss, by the last probe.
        tokens_per_second: Training throughput over the whole run.
    """

    train_loss: Number
    load_imbalance: Number
    dead_experts: Number
    distinct_experts: Number
    specialisation: Number
    random_routing: Number
    tokens_per_second: Number


MEASURES = tuple(field.name for field in fields(Measures))


@dataclass(frozen=True, kw_only=True)
class RunResult(Measures):
    """A finished run, with its last validation loss in nats per token, and all of them with their steps."""

    seed: int
    folder: str
    val_loss: Number
    val_steps: tuple[int, ...]
    val_losses: tuple[Number, ...]


@dataclass(frozen=True, kw_only=True)
class VariantResult(Measures):
    """A variant at one point of the grid; its measures are means over the finished runs.

    Attributes:
        name: Name of the variant with the values of the point; `variant` is the name alone.
        point: Values of the axes of the grid, by key.
        compared_with: Name of the baseline at this point; None for the baseline itself and if there is none.
        experts: Experts in the whole pool, M.
        parameters: `total`, and `active` for a token.
        tokens: Tokens trained.
        settings: Values of SETTINGS in the recipe, by key.
        planned_runs: Number of seeds, finished or not.
        runs: The finished runs.
        tokens_to_baseline: Tokens to the baseline's last loss, over the seeds that reach it; None as `difference`, and
            in results of older versions.
    """

    name: str
    variant: str
    point: dict[str, Any]
    compared_with: str | None
    layers: int
    hidden: int
    experts: int
    parameters: dict[str, int]
    tokens: int
    settings: dict[str, Any]
    planned_runs: int
    val_loss: Spread
    difference: Difference | None
    runs: tuple[RunResult, ...]
    tokens_to_baseline: Spread | None = None

    @property
    def losses(self) -> dict[int, float]:
        """Validation loss by seed, nats per token."""
        return {run.seed: run.val_loss for run in self.runs}


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """The result of a sweep, as result.json holds it; `axes` is the grid of the sweep's file."""

    sweep: str
    folder: str
    baseline: str
    axes: dict[str, list[Any]]
    seeds: list[int]
    confidence: float
    variants: tuple[VariantResult, ...]
    picture: Picture = field(default_factory=Picture)

    def baseline_of(self, variant: VariantResult) -> VariantResult | None:
        """Return what a variant is compared with."""
        return next((other for other in self.variants if other.name == variant.compared_with), None)


def collect(experiment: Experiment) -> SweepResult:
    """Collect the result from the finished runs of a sweep."""
    runs = {cell.name: tuple(_run(run) for run in cell.runs if is_done(run)) for cell in experiment.cells}
    return SweepResult(
        sweep=experiment.name,
        folder=str(experiment.folder),
        baseline=experiment.sweep.baseline,
        axes=experiment.sweep.grid,
        seeds=experiment.sweep.seeds,
        confidence=CONFIDENCE,
        variants=tuple(
            variant_result(cell, runs[cell.name], runs.get(cell.baseline or "")) for cell in experiment.cells
        ),
        picture=experiment.sweep.picture,
    )


def variant_result(cell: Cell, runs: Sequence[RunResult], baseline: Sequence[RunResult] | None) -> VariantResult:
    """Summarise the finished runs of a variant, also in comparison with those of the baseline, if there is one."""
    r = cell.recipe
    parameters = count_parameters(r)
    losses = {run.seed: run.val_loss for run in runs}
    means = {name: float(np.mean([getattr(run, name) for run in runs])) if runs else math.nan for name in MEASURES}
    # Some runs may have ended early.
    steps = max((run.val_steps[-1] for run in runs if run.val_steps), default=r.train.steps)
    return VariantResult(
        name=cell.name,
        variant=cell.variant,
        point=cell.point,
        compared_with=cell.baseline,
        layers=r.model.layers,
        hidden=r.model.hidden,
        experts=r.pool.experts,
        parameters={"total": parameters.total, "active": parameters.active},
        tokens=steps * r.train.global_batch * r.model.seq_len,
        settings={key: attrgetter(key)(r) for key in SETTINGS} | {"data.source": source_names(r.data.source)},
        planned_runs=len(cell.runs),
        val_loss=spread(list(losses.values())),
        difference=None if baseline is None else paired(losses, {run.seed: run.val_loss for run in baseline}),
        runs=tuple(runs),
        tokens_to_baseline=None if baseline is None else _tokens_to_baseline(r, runs, baseline),
        **means,
    )


def _tokens_to_baseline(recipe: Recipe, runs: Sequence[RunResult], baseline: Sequence[RunResult]) -> Spread:
    targets = {run.seed: run.val_loss for run in baseline}
    reached = [steps_to_reach(run, targets[run.seed]) for run in runs if run.seed in targets]
    per_step = recipe.train.global_batch * recipe.model.seq_len
    return spread([steps * per_step for steps in reached if not math.isnan(steps)])


def steps_to_reach(run: RunResult, loss: float) -> float:
    """Return the step at which a run's validation loss first is `loss` or lower; NaN if it never is.

    Between two validations the loss is taken to be a straight line. Before the first one nothing is known, so that the
    step is at least that of the first.
    """
    place = next((place for place, value in enumerate(run.val_losses) if value <= loss), None)
    if not place:
        return math.nan if place is None else float(run.val_steps[0])
    (before, after), (above, below) = run.val_steps[place - 1 : place + 1], run.val_losses[place - 1 : place + 1]
    return before + (after - before) * (above - loss) / (above - below)


def _run(run: Run) -> RunResult:
    records = records_of(run)
    dense = run.recipe.model.ffn == "dense"
    pool = {name: math.nan if dense else records.mean(name, RECENT) for name in _POOL_MEASURES}
    return RunResult(
        seed=run.seed,
        folder=str(run.folder),
        val_loss=records.val_losses[-1],
        train_loss=records.mean("loss", RECENT),
        random_routing=records.random_routing[-1] if records.random_routing else math.nan,
        tokens_per_second=records.mean("tokens") / records.mean("seconds"),
        val_steps=tuple(records.val_steps),
        val_losses=tuple(records.val_losses),
        **pool,
    )


_RESULT = TypeAdapter(SweepResult)


def to_json(result: SweepResult) -> dict[str, Any]:
    """Convert a result to what result.json holds; NaN becomes null."""
    tree: dict[str, Any] = loads(_RESULT.dump_json(result))
    return tree


def read_result(file: Path) -> SweepResult:
    """Read a result.json.

    Raises:
        UserError: The file cannot be read, or it is not a sweep's result.
    """
    again = f"make it with: unipool sweep {file.parent} --report"
    try:
        return _RESULT.validate_json(read_text(file, _LARGEST_FILE))
    except Unreadable as error:
        raise UserError(f"{file}: cannot be read ({error}); {again}") from None
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"])) or "its top level"
        raise UserError(
            f"{file}: not a sweep's result, or one of an older version ({where} is missing or wrong); {again}"
        ) from None


def write_files(folder: Path, result: SweepResult) -> list[Path]:
    """Write result.json, and result.csv with a line per variant; each appears whole or not at all."""
    tree = to_json(result)
    json_file, csv_file = folder / JSON_FILE, folder / CSV_FILE
    atomic_write(json_file, lambda path: path.write_text(dumps(tree, indent=1) + "\n"))
    lines = [_flat(variant) for variant in tree["variants"]]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(lines[0]))
    writer.writeheader()
    writer.writerows(lines)
    atomic_write(csv_file, lambda path: path.write_text(text.getvalue(), newline=""))
    return [json_file, csv_file]


def _flat(variant: dict[str, Any]) -> dict[str, Any]:
    return {
        **{name: variant[name] for name in ("name", "variant", "compared_with", "layers", "hidden", "experts")},
        **{f"{kind}_parameters": number for kind, number in variant["parameters"].items()},
        **{f"val_loss_{field.name}": variant["val_loss"][field.name] for field in fields(Spread)},
        **{f"difference_{field.name}": (variant["difference"] or {}).get(field.name) for field in fields(Difference)},
        **{f"tokens_to_baseline_{name}": (variant["tokens_to_baseline"] or {}).get(name) for name in ("n", "mean")},
        **{name: variant[name] for name in MEASURES},
    }
