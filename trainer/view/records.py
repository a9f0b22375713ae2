"""What a run's folder holds: the records of its steps, its recipe and the load of its experts."""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.checkpoint import format as checkpoint
from trainer.common.errors import UserError
from trainer.common.safe_read import LARGEST_TEXT, lines, open_file, read_array, read_bytes
from trainer.common.strict_json import loads
from trainer.config.recipe import Recipe, load_recipe
from trainer.telemetry.step_scalars import Efficiency, StepScalars, parse_record
from trainer.telemetry.time_breakdown import ACTIVITIES
from trainer.view.pages import TARGETS_FILE
from trainer.view.rates import ROLES, Shares, known_shares

Numbers = NDArray[np.float64]

METRICS_FILE = "metrics.jsonl"
RECIPE_FILE = "recipe.yaml"
CHECKPOINTS = "checkpoints"

SCALARS = [field for table in (StepScalars, Efficiency) for field in fields(table) if not field.metadata["each"]]
"""Fields of a step's record that are single numbers, besides the shares of time."""

BY_LAYER = [field.name for field in fields(StepScalars) if field.metadata["each"]]
"""Fields of a step's record that have a number per layer."""

RECENT = 20
"""Number of last steps over which values are averaged."""


def finite(values: Sequence[float]) -> Numbers:
    """Return the finite ones of some values."""
    numbers = np.asarray(values, float)
    return np.extract(np.isfinite(numbers), numbers)


def finite_mean(values: Sequence[float]) -> float:
    """Average the finite ones of some values; NaN without any."""
    numbers = finite(values)
    return float(numbers.mean()) if len(numbers) else math.nan


class Records:
    """The contents of metrics.jsonl as columns; `read` continues where it ended, or starts over after a resume.

    Attributes:
        steps: Step of each record, counted from 1.
        columns: Values by name, one per step; NaN where a record has none.
        val_steps: Steps of the evaluations.
        val_losses: Validation losses of the evaluations.
        probe_steps: Steps of the routing probes.
        random_routing: Nats that random experts in a layer add to the loss, mean over the probed layers.
        val_tokens: Tokens of each evaluation.
        by_layer: The last values of metrics that have one per layer, by name: of up to RECENT steps.
    """

    def __init__(self, run: Path):
        self._file = run / METRICS_FILE
        self._clear(-1)

    def _clear(self, inode: int) -> None:
        self._inode, self._read = inode, 0
        self.steps, self.val_steps, self.val_losses = array("q"), array("q"), array("d")
        self.probe_steps, self.random_routing = array("q"), array("d")
        self.val_tokens = array("d")
        self.by_layer = {name: deque[Numbers](maxlen=RECENT) for name in BY_LAYER}
        shares = [f"{role}_{activity}" for role in ROLES for activity in ACTIVITIES]
        self.columns = {name: array("d") for name in (*(field.name for field in SCALARS), *shares)}
        self._rare = {
            "val_loss": (self.val_steps, self.val_losses),
            "random_routing": (self.probe_steps, self.random_routing),
        }

    def read(self) -> None:
        """Read the lines that are new; without a file there are no records."""
        try:
            with open_file(self._file) as file:
                status = self._file.stat()
                if status.st_ino != self._inode or status.st_size < self._read:
                    self._clear(status.st_ino)
                file.seek(self._read)
                for line in lines(file):
                    if not line.endswith(b"\n") and len(line) < LARGEST_TEXT:
                        break  # it is still being written
                    self._read += len(line)
                    self._add(line)
        except OSError:
            return

    def _add(self, line: bytes) -> None:
        parsed = parse_record(line)
        if parsed is None:
            return
        step, record = parsed
        for name in self._rare.keys() & record.keys():
            steps, values = self._rare[name]
            steps.append(step)
            values.append(_number(record[name]))
        if "val_loss" in record:
            self.val_tokens.append(_number(record.get("val_tokens")))
        if "loss" in record:
            self.steps.append(step)
            for name, rows in self.by_layer.items():
                if (row := record.get(name)) and isinstance(row, list):
                    rows.append(np.array([_number(value) for value in row]))
            for name, column in self.columns.items():
                column.append(_number(record.get(name)))

    def series(self, name: str) -> tuple[Numbers, Numbers]:
        """Return steps and values of a column, of `val_loss`, or of `random_routing`."""
        steps, values = self._rare[name] if name in self._rare else (self.steps, self.columns[name])
        return np.array(steps, float), np.array(values)

    def finite(self, name: str) -> Numbers:
        """Return the finite values of a column."""
        return finite(self.columns[name])

    def mean(self, name: str, last: int = 0) -> float:
        """Average the finite values of the last records, or of all; NaN without any."""
        return finite_mean(self.columns[name][-last:])

    def layers(self, name: str, layers: int) -> Numbers:
        """Average a metric by layer over the last records, (L); NaN where it is not recorded."""
        rows = [row for row in self.by_layer[name] if len(row) == layers]
        return np.array([finite_mean(column) for column in zip(*rows, strict=True)] or [math.nan] * layers)

    def last(self) -> dict[str, float]:
        """Return the scalars of the last step that are recorded."""
        ends = {field.name: self.columns[field.name][-1:] for field in SCALARS}
        return {name: end[0] for name, end in ends.items() if end and not math.isnan(end[0])}

    def shares(self, role: str, last: int = 0) -> Shares:
        """Return how a role's ranks spent their time, mean over the last records or all; empty if not recorded."""
        return known_shares([self.mean(f"{role}_{activity}", last) for activity in ACTIVITIES])


def is_run(path: Path) -> bool:
    """Return whether a folder is that of a run, even of one that is just starting."""
    return any((path / name).exists() for name in (RECIPE_FILE, METRICS_FILE, TARGETS_FILE, CHECKPOINTS))


def saved_recipe(run: Path) -> Recipe | None:
    """Return the run's recipe; None if there is none, or none that this version can read."""
    try:
        return load_recipe(str(run / RECIPE_FILE))
    except UserError:
        return None


def recorded_load(run: Path) -> NDArray[np.int64] | None:
    """Return assignments per step by layer and expert, (L, M), from the run or its newest checkpoint; or None."""
    loads = map(read_load, (run, *checkpoint.complete(run / CHECKPOINTS)[-1:]))
    return next((load_LM for load_LM in loads if load_LM is not None), None)


def read_load(folder: Path) -> NDArray[np.int64] | None:
    """Return what `folder`, that of a run or of a checkpoint, has in load.npy, (L, M); None if it is not readable."""
    try:
        load_LM = read_array(folder / checkpoint.LOAD_FILE)
    except (OSError, ValueError):
        return None
    return load_LM.astype(np.int64) if load_LM.ndim == 2 and load_LM.dtype.kind in "iu" else None


def recorded_owners(run: Path, recipe: Recipe | None) -> tuple[int, ...] | None:
    """Return the layer that owns each expert; None without a lock, before the assignment, or if it is unreadable."""
    try:
        record = checkpoint.read_ownership(run) if recipe and recipe.lock else None
    except UserError:
        return None
    shape = recipe and (recipe.model.layers, recipe.pool.experts)
    return record.owners if record and (len(record.shares), len(record.owners)) == shape else None


def facts_of(recipe: Recipe, run: Path) -> dict[str, str]:
    """Return what a folder knows of the labels of the metric unipool_run_info."""
    t = recipe.grid
    try:
        plan = loads(read_bytes(run / "plan.json"))
        lanes, devices = str(plan["lanes"]), str(plan.get("devices", ""))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        lanes = devices = ""
    return {
        "layers": str(recipe.model.layers),
        "experts": str(recipe.pool.experts),
        "top_k": str(recipe.router.top_k),
        "router": recipe.router.kind,
        "layout": t.layout,
        "trunk_ranks": str(t.trunk_ranks),
        "pool_ranks": str(t.world_size - t.trunk_ranks),
        "expert_parallel": str(t.expert_parallel),
        "lanes": lanes,
        "precision": recipe.train.precision,
        "devices": devices,
    }


def _number(value: Any) -> float:
    """Return a number of a record; NaN for what is none."""
    return float(value) if isinstance(value, float | int) else math.nan
