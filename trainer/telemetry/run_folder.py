"""The run's folder: recipe.yaml, plan.json, tokenizer.json, metrics.jsonl, checkpoints/, tensorboard/, load.png ..."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.common.atomic import atomic_write
from trainer.common.errors import UserError
from trainer.common.strict_json import dumps, loads, name_not_finite
from trainer.config.recipe import Recipe, save_recipe
from trainer.telemetry.console import say

TOKENIZER_FILE = "tokenizer.json"


class RunFolder:
    """Paths of a run, and its metrics file. Only rank 0 writes.

    Raises:
        UserError: run.dir cannot be a folder's path.
    """

    def __init__(self, recipe: Recipe):
        self.path = Path(recipe.run.dir)
        self.recipe_file = self.path / "recipe.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.plan_file = self.path / "plan.json"
        self.load_picture = self.path / "load.png"
        self.load_file = self.path / "load.npy"
        self.targets_files = [self.path / "targets.json"]
        if recipe.metrics.targets_dir:
            self.targets_files.append(Path(recipe.metrics.targets_dir) / f"{self.path.name}.json")
        self._warned = False
        self._check_path()

    def _check_path(self) -> None:
        """Whether there can be such a folder: nothing is made yet."""
        try:
            self.checkpoints.lstat()
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._not_writable(error) from None

    def _not_writable(self, error: OSError) -> UserError:
        return UserError(f"run.dir = {self.path}: cannot be written ({error.strerror}); choose another")

    def make(self) -> None:
        """Make the folder.

        Raises:
            UserError: it cannot be made or written.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.path).close()
        except OSError as error:
            raise self._not_writable(error) from None

    def begin(self, recipe: Recipe, schedule: str, tokenizer: str, done_steps: int) -> None:
        """Save the resolved recipe, the schedule and the tokenizer, and cut the metrics after `done_steps`.

        The evaluation and the probe after these steps are cut too: a checkpoint is of before them.

        Args:
            schedule: the text of plan.json.
            tokenizer: the text of tokenizer.json.
        """
        atomic_write(self.plan_file, lambda path: path.write_text(schedule))
        atomic_write(self.path / TOKENIZER_FILE, lambda path: path.write_text(tokenizer, encoding="utf-8"))
        atomic_write(self.recipe_file, lambda path: save_recipe(recipe, path))
        kept = [line for line in self._lines() if _is_before(line, done_steps)]
        atomic_write(self.metrics_file, lambda path: path.write_text("".join(kept), encoding="utf-8"))

    def _lines(self) -> list[str]:
        if not self.metrics_file.exists():
            return []
        lines = self.metrics_file.read_text("utf-8", "replace").splitlines(keepends=True)
        return [line for line in lines if line.endswith("\n")]  # a killed run may leave half a line at the end

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Append one JSON object; floats keep their full precision, and those that are not finite are null.

        A disk that is full or gone loses lines, and a warning says so once; training goes on.
        """
        try:
            with self.metrics_file.open("ab", buffering=0) as file:
                size = file.tell()
                line = (dumps(name_not_finite(record)) + "\n").encode()
                if file.write(line) != len(line):
                    file.truncate(size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if not self._warned:
                say(f"warning: {self.metrics_file}: lines are lost ({error.strerror})")
            self._warned = True
        else:
            self._warned = False

    def announce(self, addresses: Sequence[str]) -> None:
        """Where each rank serves its metrics, in the form of Prometheus' file_sd, for as long as the run lasts."""
        targets = [{"targets": list(addresses), "labels": {"run": self.path.name}}]
        for file in self.targets_files:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(file, lambda path: path.write_text(dumps(targets) + "\n"))
            except OSError as error:
                say(f"warning: {file}: cannot be written ({error.strerror}): Prometheus will not find the run by it")

    def withdraw(self) -> None:
        """The run has ended as it should."""
        for file in self.targets_files:
            with suppress(OSError):
                file.unlink(missing_ok=True)

    def save_load(self, load_LM: NDArray[np.int64]) -> None:
        """Assignments a step by layer and expert. A disk that is full or gone loses them; training goes on."""

        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.save(file, load_LM)

        with suppress(OSError):
            atomic_write(self.load_file, write)


def _is_before(line: str, done_steps: int) -> bool:
    """Whether a record is of before; one that cannot be read is not."""
    try:
        record = loads(line)
        return int(record["step"]) < done_steps + ("loss" in record)
    except (ValueError, TypeError, LookupError, OverflowError):
        return False
