"""The folder of a run: recipe.yaml, plan.json, tokenizer.json, metrics.jsonl, checkpoints/, tensorboard/, load.png."""

from __future__ import annotations

import errno
import math
import os
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from trainer.common.atomic import atomic_write
from trainer.common.errors import Unavailable, UserError, os_reason
from trainer.common.safe_read import lines, open_file, read_bytes
from trainer.common.strict_json import dumps, loads, name_not_finite
from trainer.common.versions import software
from trainer.config.lock import OWNERSHIP_FILE
from trainer.config.recipe import Recipe, save_recipe
from trainer.telemetry.console import say
from trainer.telemetry.step_scalars import parse_record

STARTED = "started"
"""Key of plan.json: Unix time at which the run was started for the first time."""

RECORDED = "recorded"
"""Key of plan.json: the most optimizer steps that the starts before the last one had done."""


class RunFolder:
    """The paths of a run, and what rank 0 writes there.

    Attributes:
        recorded: The most optimizer steps that any start before `begin` had done, after its checkpoint too.

    Raises:
        UserError: `run.dir` is not a possible folder.
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
        self._created = self._announced = False
        self.recorded = 0
        self._started = self._counted = 0.0
        try:  # nothing is created yet
            self.checkpoints.lstat()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise self._not_writable(error) from None

    def _not_writable(self, error: OSError) -> UserError:
        return UserError(f"run.dir = {self.path}: cannot be written ({error.strerror}); choose another folder")

    def refuse_export(self) -> None:
        """Raise a UserError if the folder is an export, which commands would read instead of the run."""
        if (self.path / "config.json").is_file():
            raise UserError(f"run.dir = {self.path}: is an export (it has a config.json); choose another folder")

    def make(self) -> None:
        """Create the folder.

        Raises:
            UserError: It cannot be created or written, or is an export.
        """
        self.refuse_export()
        self._created = not self.path.exists()
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.path).close()
        except OSError as error:
            raise self._not_writable(error) from None

    @contextmanager
    def removed_if_unused(self) -> Iterator[None]:
        """Remove the folder after an exception in the `with` block, if `make` created it and it is still empty.

        A user's mistake also takes back what `announce` wrote: such a run has not begun.

        Raises:
            Unavailable: The system says that there is no space left, whatever was to be written. TensorBoard, for one,
                does not say where, and other limits of the system have the same number (`inotify_add_watch`).
        """
        try:
            yield
        except BaseException as error:
            if self._announced and isinstance(error, UserError):
                self.withdraw()
            if self._created:
                with suppress(OSError):
                    self.checkpoints.rmdir()
                    self.path.rmdir()
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                where, mend = str(error.filename), "free some space or choose another folder"
                if error.filename is None:
                    frame = traceback.extract_tb(error.__traceback__)[-1]
                    where = f"{frame.name} in {Path(frame.filename).name} names no file"
                    mend = f"if the disk of this folder or of {tempfile.gettempdir()} is full, {mend}"
                raise Unavailable(f"run.dir = {self.path}: {error.strerror} ({where}); {mend}") from None
            raise

    def begin(self, recipe: Recipe, schedule: str, devices: str, tokenizer: Mapping[str, str], done_steps: int) -> None:
        """Save the resolved recipe, the schedule and the tokenizer, and drop metrics of later steps than `done_steps`.

        plan.json also keeps when the run was started for the first time, which `goodput` needs, `recorded`, and the
        versions of the software.

        The evaluation and the probe after these steps are dropped too, because the checkpoint was saved before them.

        Args:
            schedule: The JSON text of the schedule.
            devices: The devices of the run's ranks, which plan.json names too.
            tokenizer: The texts of the tokenizer's files, by name.
        """
        started, recorded = (self._kept(key) for key in (STARTED, RECORDED))
        earlier = self._lines()
        last, _ = (earlier and parse_record(earlier[-1])) or (0, {})
        self.recorded = max(last, int(recorded or 0))
        self._started = psutil.Process().create_time() if started is None else started
        more = {"devices": devices, "software": software(), STARTED: self._started, RECORDED: self.recorded}
        plan = dumps(loads(schedule) | more)
        atomic_write(self.plan_file, lambda path: path.write_text(plan))
        for name, text in tokenizer.items():
            atomic_write(self.path / name, partial(Path.write_text, data=text, encoding="utf-8"))
        atomic_write(self.recipe_file, lambda path: save_recipe(recipe, path))
        kept = [line for line in earlier if _is_before(line, done_steps)]
        atomic_write(self.metrics_file, lambda path: path.write_text("".join(kept), encoding="utf-8"))
        self._counted = 0.0 if started is None else sum(map(_counted_seconds, kept))

    def _kept(self, key: str) -> float | None:
        """Return a number that an earlier start has kept in plan.json, if it has."""
        try:
            number = float(loads(read_bytes(self.plan_file))[key])
        except (OSError, ValueError, TypeError, LookupError, OverflowError):
            return None
        return number if math.isfinite(number) else None

    def goodput(self, seconds: float) -> float:
        """Count a step of `seconds`, 0 if it was skipped; return the goodput, as docs/operations/watching.md says."""
        self._counted += seconds
        return self._counted / max(time.time() - self._started, self._counted)

    def _lines(self) -> list[str]:
        try:
            with open_file(self.metrics_file) as file:
                # A killed run may leave an incomplete last line.
                return [line.decode("utf-8", "replace") for line in lines(file) if line.endswith(b"\n")]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"{self.metrics_file}: cannot be read ({os_reason(error)}); remove it") from None

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Append one JSON object. Floats keep their full precision; those that are not finite become null.

        If the disk is full or gone, lines are lost with a single warning, and training continues.
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
        """Write where each rank serves its metrics, in the format of Prometheus' file_sd, until the run ends.

        A rank that has no address cannot listen, which ends the job before it begins: nothing is written.
        """
        if not all(addresses):
            return
        targets = [{"targets": list(addresses), "labels": {"run": self.path.name}}]
        self._announced = True
        for file in self.targets_files:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(file, lambda path: path.write_text(dumps(targets) + "\n"))
            except OSError as error:
                say(f"warning: {file}: cannot be written ({error.strerror}); Prometheus cannot find the run by it")

    def withdraw(self) -> None:
        """Remove what `announce` wrote, at the regular end of the run."""
        for file in self.targets_files:
            with suppress(OSError):
                file.unlink(missing_ok=True)

    def save_load(self, load_LM: NDArray[np.int64]) -> None:
        """Save the assignments per step by layer and expert. A full or missing disk does not end training."""

        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.save(file, load_LM)

        with suppress(OSError):
            atomic_write(self.load_file, write)

    def save_ownership(self, text: str) -> None:
        """Save which layer owns which expert, as JSON. A full or missing disk does not end training."""
        with suppress(OSError):
            atomic_write(self.path / OWNERSHIP_FILE, lambda path: path.write_text(text))

    def drop_ownership(self) -> None:
        """Remove what `save_ownership` wrote, of a run that resumes from before the assignment."""
        with suppress(OSError):
            (self.path / OWNERSHIP_FILE).unlink(missing_ok=True)


def _counted_seconds(line: str) -> float:
    """Return the duration of a record's step, 0 if it is the record of something else or of a step that was skipped."""
    _, record = parse_record(line) or (0, {})
    seconds = record.get("seconds")
    return float(seconds) if record.get("applied") and isinstance(seconds, int | float) else 0.0


def _is_before(line: str, done_steps: int) -> bool:
    """Return whether a record precedes the checkpoint after `done_steps`; a damaged one does not."""
    step, record = parse_record(line) or (done_steps + 1, {})
    return step < done_steps + ("loss" in record)
