"""What a sweep's runs have come to, as far as they are done: rows, and the files result.json and result.csv."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.common.atomic import write_whole
from trainer.common.strict_json import dumps, finite
from trainer.config.recipe import Recipe
from trainer.config.sections import source_names
from trainer.planning.model_costs import count_parameters
from trainer.sweep.runs import is_done, records_of
from trainer.sweep.spec import Cell, Experiment, Run
from trainer.sweep.statistics import CONFIDENCE, Difference, Spread, paired, spread
from trainer.view.records import RECENT

JSON_FILE, CSV_FILE = "result.json", "result.csv"

_OF_A_POOL = ("load_imbalance", "dead_experts", "distinct_experts", "specialisation")
MEASURES = ("train_loss", *_OF_A_POOL, "random_routing", "tokens_per_second")
"""Of a run, besides its validation loss."""

SETTINGS = (
    *("model.ffn", "model.groups", "model.ffn_hidden", "model.vocab", "model.seq_len"),
    *("router.kind", "router.top_k", "router.constant_factor", "balance.layer", "balance.pool", "balance.scores"),
    *("balance.scope", "balance.delay", "train.lr", "data.source", "data.tokenizer"),
)
"""Keys of a variant's recipe that result.json has, for those who compare results of several sweeps."""


@dataclass(frozen=True)
class RunResult:
    """A run that is done.

    Attributes:
        val_loss: the last validation's, nats a token.
        train_loss, load_imbalance, dead_experts, distinct_experts, specialisation: means over the last steps; NaN where
            a dense model has none.
        random_routing: nats that random experts in one layer add, of the last probe; NaN without one.
        tokens_per_second: over the whole run.
        val_steps, val_losses: its curve.
    """

    seed: int
    val_loss: float
    train_loss: float
    load_imbalance: float
    dead_experts: float
    distinct_experts: float
    specialisation: float
    random_routing: float
    tokens_per_second: float
    val_steps: tuple[int, ...]
    val_losses: tuple[float, ...]


@dataclass(frozen=True)
class Row:
    """A variant at one point of the grid.

    Attributes:
        cell: its recipe, name, point and baseline.
        runs: those that are done, by seed.
        val_loss: over the seeds.
        difference: to the baseline; None for the baseline itself, and where it has no such cell.
        measures: means over the runs by name of MEASURES.
    """

    cell: Cell
    runs: tuple[RunResult, ...]
    val_loss: Spread
    difference: Difference | None
    measures: dict[str, float]

    @property
    def losses(self) -> dict[int, float]:
        """Validation losses by seed."""
        return {run.seed: run.val_loss for run in self.runs}


def collect(experiment: Experiment) -> tuple[Row, ...]:
    """A row for every cell, with the runs that are done."""
    results = {cell.name: tuple(_run(run) for run in cell.runs if is_done(run)) for cell in experiment.cells}
    losses = {name: {run.seed: run.val_loss for run in runs} for name, runs in results.items()}
    return tuple(
        Row(
            cell,
            runs=results[cell.name],
            val_loss=spread(list(losses[cell.name].values())),
            difference=paired(losses[cell.name], losses[cell.baseline]) if cell.baseline else None,
            measures={name: _mean([getattr(run, name) for run in results[cell.name]]) for name in MEASURES},
        )
        for cell in experiment.cells
    )


def _run(run: Run) -> RunResult:
    records = records_of(run)
    recent = {
        name: math.nan if name in _OF_A_POOL and run.recipe.model.ffn == "dense" else records.mean(name, RECENT)
        for name in _OF_A_POOL
    }
    return RunResult(
        run.seed,
        val_loss=records.val_losses[-1],
        train_loss=records.mean("loss", RECENT),
        **recent,
        random_routing=records.random_routing[-1] if records.random_routing else math.nan,
        tokens_per_second=records.mean("tokens") / records.mean("seconds"),
        val_steps=tuple(records.val_steps),
        val_losses=tuple(records.val_losses),
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def to_json(experiment: Experiment, rows: Sequence[Row]) -> dict[str, Any]:
    """All of it, NaN as null."""
    tree = {
        "sweep": experiment.name,
        "folder": str(experiment.folder),
        "baseline": experiment.sweep.baseline,
        "axes": experiment.sweep.grid,
        "seeds": experiment.sweep.seeds,
        "confidence": CONFIDENCE,
        "variants": [_row_json(row) for row in rows],
    }
    return finite(tree)  # type: ignore[no-any-return]  # a tree stays one


def _row_json(row: Row) -> dict[str, Any]:
    r = row.cell.recipe
    parameters = count_parameters(r)
    return {
        "name": row.cell.name,
        "variant": row.cell.variant,
        "point": row.cell.point,
        "compared_with": row.cell.baseline,
        "layers": r.model.layers,
        "hidden": r.model.hidden,
        "experts": r.pool.experts,
        "parameters": {"total": parameters.total, "active": parameters.active},
        "tokens": r.train.steps * r.train.global_batch * r.model.seq_len,
        "settings": {key: _setting(r, key) for key in SETTINGS},
        "planned_runs": len(row.cell.runs),
        "val_loss": asdict(row.val_loss),
        "difference": asdict(row.difference) if row.difference else None,
        **row.measures,
        "runs": [
            asdict(run) | {"folder": str(planned.folder)}
            for run in row.runs
            for planned in row.cell.runs
            if planned.seed == run.seed
        ],
    }


def _setting(recipe: Recipe, key: str) -> Any:
    if key == "data.source":
        return source_names(recipe.data.source)
    section, _, name = key.partition(".")
    return getattr(getattr(recipe, section), name)


def write_files(experiment: Experiment, rows: Sequence[Row]) -> list[Path]:
    """Write result.json and result.csv, which has a line a variant; each appears whole or not at all."""
    tree = to_json(experiment, rows)
    json_file, csv_file = experiment.folder / JSON_FILE, experiment.folder / CSV_FILE
    write_whole(json_file, lambda path: path.write_text(dumps(tree, indent=1) + "\n"))
    lines = [_flat(variant) for variant in tree["variants"]]

    def write(path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)

    write_whole(csv_file, write)
    return [json_file, csv_file]


def _flat(variant: dict[str, Any]) -> dict[str, Any]:
    spread_names = ("n", "mean", "sd", "low", "high")
    difference_names = ("n", "mean", "low", "high", "p")
    return {
        **{name: variant[name] for name in ("name", "variant", "compared_with", "layers", "hidden", "experts")},
        "total_parameters": variant["parameters"]["total"],
        "active_parameters": variant["parameters"]["active"],
        **{f"val_loss_{name}": variant["val_loss"][name] for name in spread_names},
        **{f"difference_{name}": (variant["difference"] or {}).get(name) for name in difference_names},
        **{name: variant[name] for name in MEASURES},
    }
