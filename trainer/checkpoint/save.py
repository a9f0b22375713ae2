"""Saving while training continues: training waits only while a checkpoint's state is copied to the host's memory.

A thread of each rank writes, syncs and hashes that rank's files. In every step's reduction over the ranks, each rank
says whether it is still writing; when none is, rank 0's thread writes the manifest and the marker and renames the
folder. A save that fails on any rank is abandoned, reported in one line and counted; training continues, and the next
interval tries again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch

from trainer.checkpoint import format as checkpoint
from trainer.cluster.process_groups import Job
from trainer.common.atomic import fsync, naming
from trainer.common.strict_json import dumps, loads
from trainer.config.lock import OWNERSHIP_FILE
from trainer.config.recipe import Recipe, recipe_text
from trainer.telemetry.console import say

if TYPE_CHECKING:
    from trainer.checkpoint.format import Role
    from trainer.telemetry.prometheus import MetricsServer


class _HashedFile:
    """A file for writing that keeps its size, its SHA-256, and the error that writing raised."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._hash = hashlib.sha256()
        self._bytes = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self._bytes += len(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()

    @property
    def facts(self) -> dict[str, Any]:
        return {"bytes": self._bytes, "sha256": self._hash.hexdigest()}


def _write(path: Path, write: Callable[[Any], object]) -> dict[str, Any]:
    """Write a file through to the disk; return its size and checksum."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), path.open("wb") as file:
        hashed = _HashedFile(file)
        try:
            write(hashed)
        except RuntimeError as error:  # torch's writer turns an OSError into one
            raise hashed.error or error from None
        file.flush()
        os.fsync(file.fileno())
    return hashed.facts


def _write_text(path: Path, text: str) -> dict[str, Any]:
    return _write(path, lambda file: file.write(text.encode()))


@dataclass
class _Pending:
    """A checkpoint that is being written.

    Attributes:
        started: When the copying began, on `time.perf_counter`'s clock.
        stalled: How long training waited, in seconds.
        files: The results of this rank's writes, by file name.
        reported: Whether this rank has reported to rank 0 what it wrote.
        written: Whether all ranks have written their files.
        commit: Rank 0's last part of the work.
    """

    steps: int
    folder: Path
    started: float
    stalled: float = 0.0
    files: dict[str, Future[dict[str, Any]]] = field(default_factory=dict)
    reported: bool = False
    written: bool = False
    commit: Future[None] | None = None


class Saver:
    """Saves checkpoints of a run. All ranks create one and call it in the same order.

    Args:
        data: What identifies the prepared data.
        metrics: Where rank 0 counts and times the checkpoints.

    Attributes:
        checkpoints: The folder of the run's checkpoints.
        error: On rank 0, why the last save failed.
        saved: On rank 0, the steps done at the newest checkpoint that has been saved; 0 without one.
    """

    def __init__(
        self,
        job: Job,
        recipe: Recipe,
        checkpoints: Path,
        role: Role,
        data: str = "",
        metrics: MetricsServer | None = None,
    ):
        self._job, self._recipe, self.checkpoints, self._role, self._data = job, recipe, checkpoints, role, data
        self._metrics = metrics if job.rank == 0 else None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: _Pending | None = None
        self.error: str | None = None
        self.saved = 0

    def clean(self) -> None:
        """Remove what interrupted saves have left. Called by rank 0 before the first save."""
        for leftover in self.checkpoints.glob(".step_*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def start(self, steps: int) -> None:
        """Copy the state and begin to write it, after waiting for an unfinished save. All ranks call this together."""
        asked = time.perf_counter()
        self.finish()
        job, final = self._job, checkpoint.folder_of(self.checkpoints, steps)
        pending = _Pending(steps, self.checkpoints / f".{final.name}.partial", time.perf_counter())
        problem = self._make(pending.folder) if job.rank == 0 else None
        job.barrier()  # a slow disk gets more time than a step
        (failed,) = job.sum_over_ranks([float(problem is not None)])
        if failed:
            if problem is not None:
                self._report_failure(steps, problem)
            return
        for name, engine in self._role.engines.items():
            engine.save(pending.folder / name, lambda path, state: self._add_tensors(pending, path, state))
        if job.is_trunk:
            self._add_tensors(pending, checkpoint.state_file(pending.folder, job.rank), self._role.state_dict())
        if job.rank == 0:
            self._describe(pending)
        pending.stalled = time.perf_counter() - asked
        self._pending = pending

    def _make(self, folder: Path) -> str | None:
        """Make the folder to write to; return why that failed, or None."""
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        except OSError as error:
            return f"{self._job.name} could not make {folder}: {error.strerror}"
        return None

    def _describe(self, pending: _Pending) -> None:
        """Write, on rank 0, the recipe, the layout and the load."""
        info = {
            "layout": checkpoint.layout_of(self._recipe, self._role.placement).model_dump(),
            "data": self._data,
            "steps": pending.steps,
            "updates": next(iter(self._role.engines.values())).updates,
            "micro_batches": self._recipe.micro_batches,
        }
        texts = {checkpoint.RECIPE_FILE: recipe_text(self._recipe), checkpoint.LAYOUT_FILE: dumps(info)}
        if self._role.ownership:
            texts[OWNERSHIP_FILE] = dumps(self._role.ownership.model_dump())
        for name, text in texts.items():
            pending.files[name] = self._thread.submit(_write_text, pending.folder / name, text)
        load_LM = self._role.recorded_load()
        if load_LM is not None:
            self._add(pending, pending.folder / checkpoint.LOAD_FILE, lambda file: np.save(file, load_LM))

    def _add(self, pending: _Pending, path: Path, write: Callable[[Any], object]) -> None:
        name = str(path.relative_to(pending.folder))
        pending.files[name] = self._thread.submit(_write, path, write)

    def _add_tensors(self, pending: _Pending, path: Path, state: Any) -> None:
        self._add(pending, path, partial(torch.save, state))

    def vote(self) -> float:
        """Return, for the step's sum over ranks, 1 while this rank is still writing or committing, else 0."""
        pending = self._pending
        if pending is None:
            return 0.0
        if pending.reported:
            return float(pending.commit is not None and not pending.commit.done())
        if not all(future.done() for future in pending.files.values()):
            return 1.0
        self._report(pending)
        return 0.0

    def _report(self, pending: _Pending) -> None:
        """Tell rank 0 what this rank has written, or why it could not."""
        report: dict[str, Any] = {"files": {}, "error": None}
        for name, future in pending.files.items():
            try:
                report["files"][name] = future.result()
            except OSError as error:
                report["error"] = report["error"] or f"{self._job.name} could not write {name}: {error.strerror}"
        self._job.shared.put("saved", dumps(report))
        pending.reported = True

    def settle(self, writing: float) -> None:
        """Continue with the checkpoint that is being written, if no rank is still writing.

        Args:
            writing: The sum of all ranks' votes.
        """
        pending = self._pending
        if pending is None or writing:
            return
        if pending.written:
            self._end(pending)
        else:
            self._begin_commit(pending)

    def _begin_commit(self, pending: _Pending) -> None:
        pending.written = True
        if self._job.rank == 0:
            pending.commit = self._thread.submit(self._conclude, pending)

    def _end(self, pending: _Pending) -> None:
        if pending.commit:
            pending.commit.result()
        self._pending = None

    def finish(self) -> bool:
        """Wait until nothing is being written; return whether the last save succeeded. All ranks call this together."""
        pending = self._pending
        if pending is not None:
            if not pending.reported:
                self._report(pending)
            self._job.barrier()
            if not pending.written:
                self._begin_commit(pending)
            self._end(pending)
        self._job.barrier()
        (failed,) = self._job.sum_over_ranks([float(self.error is not None)])
        return not failed

    def save(self, steps: int) -> bool:
        """Save and wait for it; return whether it succeeded. All ranks call this together."""
        self.start(steps)
        return self.finish()

    def _conclude(self, pending: _Pending) -> None:
        """Commit what all ranks have written, or abandon it; runs in rank 0's thread."""
        reports = [loads(text) for text in self._job.shared.gather("saved")]
        problem = next((report["error"] for report in reports if report["error"]), None)
        if problem is None:
            files = {name: facts for report in reports for name, facts in report["files"].items()}
            try:
                self._commit(pending, files)
            except OSError as error:
                problem = f"{self._job.name} could not write {error.filename}: {error.strerror}"
        if problem is not None:
            shutil.rmtree(pending.folder, ignore_errors=True)
            self._report_failure(pending.steps, problem)
            return
        self.error, self.saved = None, pending.steps
        if self._metrics:
            seconds = time.perf_counter() - pending.started
            size = sum(own["bytes"] for own in files.values())
            self._metrics.checkpoint_saved(pending.steps, seconds, pending.stalled, size)
        try:
            self._rotate()
        except OSError as error:
            say(f"warning: an old checkpoint could not be removed: {error.filename}: {error.strerror}")

    def _commit(self, pending: _Pending, files: dict[str, Any]) -> None:
        folder = pending.folder
        for name, facts in files.items():
            if (folder / name).stat().st_size != facts["bytes"]:
                raise OSError(0, "its size has changed; all nodes must share run.dir", name)
        manifest = dumps({"steps": pending.steps, "files": files}, indent=1)
        facts = _write_text(folder / checkpoint.MANIFEST_FILE, manifest)
        for inner in (path for path in folder.rglob("*") if path.is_dir()):
            fsync(inner)
        _write_text(folder / checkpoint.MARKER_FILE, facts["sha256"])
        fsync(folder)
        final = checkpoint.folder_of(self.checkpoints, pending.steps)
        if final.exists():
            self._remove(final)
        folder.rename(final)
        fsync(self.checkpoints)

    def _report_failure(self, steps: int, problem: str) -> None:
        self.error = problem
        if self._metrics:
            self._metrics.add("unipool_checkpoint_failures", 1)
        say(
            f"warning: the checkpoint after step {steps} failed: {problem}; training continues, and the next interval "
            "tries again"
        )

    def _rotate(self) -> None:
        """Remove all but the newest `keep` checkpoints of different weights and every `keep_every`-th step.

        While steps are skipped nothing is learned: such checkpoints count as one, and the newest of them is kept.
        """
        c = self._recipe.checkpoint
        newest = {checkpoint.weights_of(folder): folder for folder in checkpoint.complete(self.checkpoints)}
        kept = list(newest.values())[-c.keep :]
        for old in checkpoint.complete(self.checkpoints):
            if old not in kept and not (c.keep_every and checkpoint.steps_of(old) % c.keep_every == 0):
                self._remove(old)

    def _remove(self, folder: Path) -> None:
        """Rename the folder, then remove it: if killed meanwhile, it leaves nothing that looks like a checkpoint."""
        doomed = folder.with_name(f".{folder.name}.removed")
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
