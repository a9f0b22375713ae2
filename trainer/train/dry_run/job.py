"""One rank of a dry run."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.checkpoint.resume import choose, load_checkpoint
from trainer.cluster.fault_watch import FaultWatch
from trainer.cluster.launch import mark_end
from trainer.cluster.process_groups import Job
from trainer.cluster.rank_assignment import provisional_names
from trainer.cluster.rendezvous import Launch
from trainer.common.errors import JobError
from trainer.common.format import size
from trainer.common.tables import new_table, print_tables
from trainer.config.recipe import Recipe
from trainer.planning.memory import estimate_memory
from trainer.telemetry.measured import peak_memory
from trainer.telemetry.rank_time import Phase
from trainer.telemetry.run_folder import RunFolder
from trainer.telemetry.serving import Stage, serve_early
from trainer.train.dry_run.rehearsal import nothing_left
from trainer.train.evaluation.samples import continued, serve_samples
from trainer.train.loop import update
from trainer.train.pool_rank import PoolRank
from trainer.train.start import Run, start

TOKENS = 4
"""Tokens that are generated."""

_OF_START: dict[Phase, tuple[str, ...]] = {
    "starting": ("schedule and process groups", "model, optimizer and connections"),
    "rendezvous": ("the ranks meet",),
    "preparing": ("data",),
    "loading": ("look for checkpoints", "initial weights"),
    "warming_up": ("warm-up",),
}
"""The parts of a start by phase, in which it may be several times; the last one may take several turns."""


@dataclass(frozen=True)
class Parts(Stage):
    """A stage that keeps how long each part has taken.

    Attributes:
        seconds: By part, in their order; the last one is not over.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    _turns: dict[Phase, int] = field(default_factory=dict)
    _since: list[float] = field(default_factory=lambda: [time.perf_counter()])

    def enter(self, phase: Phase, doing: str) -> None:
        """Begin something, and end the part before."""
        super().enter(phase, doing)
        turn = self._turns[phase] = self._turns.get(phase, -1) + 1
        names = () if "training" in self._turns else _OF_START.get(phase, ())
        self.begin(names[min(turn, len(names) - 1)] if names else doing)

    def begin(self, part: str) -> None:
        """Begin a part, or continue it, and end the one before."""
        self.stop()
        self.seconds[part] = self.seconds.pop(part, 0.0)

    def stop(self) -> None:
        """End the part, after which none has begun."""
        now = time.perf_counter()
        if self.seconds:
            self.seconds[next(reversed(self.seconds))] += now - self._since[-1]
        self._since.append(now)

    def report(self, fault: str = "", notes: Sequence[str] = ()) -> None:
        """Print the table of the parts; with a fault, that of the last one."""
        self.stop()
        table = new_table("dry run", "part", "seconds", "")
        for part, seconds in self.seconds.items():
            failed = fault and part == next(reversed(self.seconds))
            table.add_row(part, f"{seconds:.2f}", f"FAILED: {fault}" if failed else "works")
        print_tables(table, notes=notes)


def dry_run(original: Recipe, recipe: Recipe, launch: Launch) -> int:
    """Run one rank of a dry run; return the exit status. On a fault the process ends with a message instead.

    Args:
        original: The recipe that would be trained.
        recipe: What `rehearsal` made of it.
    """
    names = provisional_names(recipe.grid, recipe.topology.order, launch.world_size)
    watch = FaultWatch(launch.rank, names[launch.rank])
    try:
        parts = Parts(watch, serve_early(recipe, launch))
        leaves: AbstractContextManager[None] = nothing_left(Path(recipe.run.dir)) if launch.rank == 0 else nullcontext()
        with leaves:
            try:
                folder = RunFolder(recipe)
                if launch.rank == 0:  # a dry run that was killed may have left some; the data may be of this one
                    shutil.rmtree(folder.checkpoints, ignore_errors=True)
                with folder.removed_if_unused():
                    run = start(recipe, launch, folder, parts, False)
                _rehearse(run, parts)
                notes = _memory(run.job, recipe, run.role.schedule.lanes)
                if launch.rank == 0:
                    parts.report(notes=[*notes, f"Nothing was written to run.dir {original.run.dir}."])
                run.reporter.close()
                run.job.close()
            except BaseException as error:
                if launch.rank == 0:
                    parts.report(fault=f"{type(error).__name__}: {error}".splitlines()[0])
                raise
        mark_end(launch.local_rank, 0)
    except BaseException as error:
        watch.fail(error)
    return 0


def _rehearse(run: Run, parts: Parts) -> None:
    """Do once what a run does many times. A collective of all ranks."""
    recipe, job, role = run.recipe, run.job, run.role
    parts.enter("training", "an optimizer step")
    squared_norm = role.accumulate(0)
    outcome = update(job, role, 0, squared_norm, run.reporter.usage())
    run.reporter.step(1, outcome.scalars, outcome.votes)
    if not outcome.finite:
        raise JobError("the gradients of the first step are not finite")

    parts.enter("evaluating", "an evaluation")
    loss, load_LM = role.evaluate(1, 1)
    tokens = recipe.train.global_batch * recipe.model.seq_len
    run.reporter.evaluation(1, loss, tokens, load_LM)
    if recipe.probe.every:
        parts.enter("evaluating", "a probe")
        random = {layer: role.evaluate(1, 1, layer)[0] for layer in recipe.probed_layers}
        run.reporter.probe(1, loss, random, tokens)
    parts.enter("evaluating", "generated text")
    if isinstance(role, PoolRank):
        role.generate(TOKENS, 1)
        serve_samples(recipe, role, 1)
    else:
        assert run.prepared, "trunk ranks have data"
        role.generate([run.prepared.end_id], TOKENS, 1)
        run.reporter.samples(1, continued(recipe, run.prepared, role, 1))

    parts.enter("saving", "a checkpoint")
    if not run.saver.save(1):
        raise JobError("the checkpoint could not be saved" + (f": {run.saver.error}" if run.saver.error else ""))
    parts.enter("loading", "the checkpoint read back")
    # A pool rank that does not see the trunk's prepared data has a recipe with less: see `rehearsal`.
    found: Any = choose(job, recipe, run.folder.checkpoints, force=True)
    load_checkpoint(job, recipe, found[1], role)
    again, _ = role.evaluate(1, 1)
    (changed,) = job.sum_over_ranks([float(job.is_trunk and again != loss)])
    if changed:
        raise JobError(f"the weights read back have another validation loss, {again}, than those saved, {loss}")


def _memory(job: Job, recipe: Recipe, lanes: int) -> list[str]:
    """Return lines with the memory of a step: as predicted, and as measured. A collective of all ranks."""
    gpu = job.device.type == "cuda"
    own = [0.0] * job.topology.world_size
    own[job.rank] = float(peak_memory(job.device.index)["gpu" if gpu else "host"])
    peaks = job.sum_over_ranks(own)
    lines = []
    for memory in estimate_memory(recipe, lanes):
        trunk = memory.role.startswith("trunk")
        peak = max(peaks[: job.topology.trunk_ranks] if trunk else peaks[job.topology.trunk_ranks :])
        predicted = memory.total if gpu else memory.tensors
        what = "allocated by torch" if gpu else "resident, with all libraries"
        lines.append(
            f"A step needs {size(predicted)} on a {memory.role} rank, as predicted"
            f"{'' if gpu else ' for its tensors'}; the peak was {size(peak)} ({what})."
        )
    return lines
