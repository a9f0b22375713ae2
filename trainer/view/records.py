"""What a run's folder has to show: the records of its steps, its recipe, its load, its checkpoints."""

from __future__ import annotations

import math
from array import array
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.checkpoint import format as checkpoint
from trainer.common.errors import UserError
from trainer.common.safe_read import read_array
from trainer.common.strict_json import loads
from trainer.config.recipe import Recipe, load_recipe
from trainer.telemetry.time_breakdown import ACTIVITIES
from trainer.view.pages import TARGETS_FILE
from trainer.view.rates import Shares

METRICS_FILE = "metrics.jsonl"
RECIPE_FILE = "recipe.yaml"
LOAD_FILE = "load.npy"
CHECKPOINTS = "checkpoints"
ROLES = ("trunk", "pool")

SCALARS = (
    *("loss", "grad_norm", "lr", "tokens", "seconds", "tokens_per_second", "applied"),
    *("load_imbalance", "layer_imbalance", "shard_imbalance"),
    *("dead_experts", "effective_experts", "distinct_experts", "specialisation"),
    *("layer_gate", "smallest_gate"),
)
"""Columns of a step's record that are shown, besides the shares of time."""

RECENT = 20
"""Steps over which the latest shares of time are means."""


class Records:
    """metrics.jsonl as columns, read on as it grows and again when a resume has cut it.

    Attributes:
        steps: of each record, counted from 1.
        columns: a number a step by name; NaN where a record lacks it.
        val_steps, val_losses: of the evaluations.
        probe_steps, random_routing: of the probes: nats that random experts in a layer add, mean over the layers.
    """

    def __init__(self, run: Path):
        self._file = run / METRICS_FILE
        self._names = (*SCALARS, *(f"{role}_{activity}" for role in ROLES for activity in ACTIVITIES))
        self._clear(-1)

    def _clear(self, inode: int) -> None:
        self._inode, self._read = inode, 0
        self.steps, self.val_steps, self.val_losses = array("q"), array("q"), array("d")
        self.probe_steps, self.random_routing = array("q"), array("d")
        self.columns = {name: array("d") for name in self._names}

    def read(self) -> None:
        """Take what has come since the last time; no file is no records."""
        try:
            with self._file.open("rb") as file:
                status = self._file.stat()
                if status.st_ino != self._inode or status.st_size < self._read:
                    self._clear(status.st_ino)
                file.seek(self._read)
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # half written
                    self._read += len(line)
                    self._add(line)
        except OSError:
            return

    def _add(self, line: bytes) -> None:
        try:
            record = loads(line)
            step = int(record["step"])
        except (ValueError, TypeError, KeyError):
            return
        if "val_loss" in record:
            self.val_steps.append(step)
            self.val_losses.append(_number(record["val_loss"]))
        elif "random_routing" in record:
            self.probe_steps.append(step)
            self.random_routing.append(_number(record["random_routing"]))
        elif "loss" in record:
            self.steps.append(step)
            for name, column in self.columns.items():
                number = record.get(name)
                column.append(number if type(number) is float else _number(number))  # mostly; there are many

    def has(self, name: str) -> bool:
        """Whether any record has a number of this name."""
        return not bool(np.isnan(self.columns[name]).all())

    def mean(self, name: str, last: int | None = None) -> float:
        """Mean of the numbers that there are, over the last records or over all; NaN without any."""
        column = self.columns[name]
        numbers = np.array(column if last is None else column[-last:])
        finite = numbers[np.isfinite(numbers)]
        return float(finite.mean()) if len(finite) else math.nan

    def shares(self, role: str, last: int | None = None) -> Shares:
        """How a role's ranks spent their time, mean over the last records or over all; empty if not recorded."""
        parts = {activity: self.mean(f"{role}_{activity}", last) for activity in ACTIVITIES}
        total = sum(parts.values())
        return {activity: part / total for activity, part in parts.items()} if total > 0 else {}


def is_run(path: Path) -> bool:
    """Whether a folder has anything of a run, if only of one that starts."""
    return any((path / name).exists() for name in (RECIPE_FILE, METRICS_FILE, TARGETS_FILE, CHECKPOINTS))


def saved_recipe(run: Path) -> Recipe | None:
    """The run's recipe; None where it has none, or one that this version does not read."""
    try:
        return load_recipe(str(run / RECIPE_FILE))
    except UserError:
        return None


def recorded_load(run: Path) -> NDArray[np.int64] | None:
    """Assignments a step by layer and global expert (L, M): the run's own, else its newest checkpoint's; or None."""
    found = checkpoint.newest(run / CHECKPOINTS)
    for file in (run / LOAD_FILE, *([found[1] / checkpoint.LOAD_FILE] if found else [])):
        try:
            load_LM = read_array(file)
        except (OSError, ValueError):
            continue
        if load_LM.ndim == 2 and load_LM.dtype.kind in "iu":
            return load_LM.astype(np.int64)
    return None


def facts_of(recipe: Recipe, run: Path) -> dict[str, str]:
    """The recipe under the labels of unipool_run_info, as far as a folder knows them."""
    t = recipe.grid
    try:
        lanes = str(loads((run / "plan.json").read_text())["lanes"])
    except (OSError, ValueError, KeyError, TypeError):
        lanes = ""
    return {
        "layers": str(recipe.model.layers),
        "experts": str(recipe.pool.experts),
        "top_k": str(recipe.router.top_k),
        "router": recipe.router.kind,
        "trunk_ranks": str(t.trunk_ranks),
        "pool_ranks": str(t.pool_ranks),
        "expert_parallel": str(t.expert_parallel),
        "lanes": lanes,
        "precision": recipe.train.precision,
    }


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
