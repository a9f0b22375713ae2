"""`train`: one rank of a job, from the launcher's environment to the summary."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pool.placement import Placement
from trainer import checkpoint
from trainer.config import Recipe
from trainer.data.batches import SequenceStream, evaluation_steps
from trainer.data.prepare import PreparedData
from trainer.faults import FaultWatch
from trainer.job import Job, Launch
from trainer.launch import DONE_FILE
from trainer.metrics import StepScalars
from trainer.pool_rank import PoolRank
from trainer.prepare import prepare_for
from trainer.progress import Progress
from trainer.run_folder import RunFolder
from trainer.schedule import schedule_of
from trainer.summary import Summary, write_summary
from trainer.trunk_rank import TrunkRank

SAMPLE_TOKENS = 64


def train(recipe: Recipe, launch: Launch) -> None:
    """Run one rank of the job to its end. Does not return on a fault: the process ends with a message."""
    watch = FaultWatch(launch.rank)
    try:
        _train(recipe, launch, watch)
    except BaseException as error:
        watch.fail(error)


def _train(recipe: Recipe, launch: Launch, watch: FaultWatch) -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # we write before we read
    folder = RunFolder(recipe)
    newest = checkpoint.to_resume(recipe, folder.checkpoints)
    if launch.rank == 0:
        folder.make()
    prepared = None
    if recipe.topology.is_trunk(launch.rank):
        watch.phase = "data preparation"
        prepared = prepare_for(recipe, progress=launch.local_rank == 0)
    watch.phase = "start-up"
    job = Job(recipe, launch, lambda: schedule_of(recipe, folder.plan_file, resume=newest is not None))
    watch.joined(job)
    loop = _Loop(recipe, job, folder, prepared, watch, newest)
    loop.run()
    watch.phase = "the end"
    job.close()
    if launch.rank == 0 and DONE_FILE in os.environ:
        Path(os.environ[DONE_FILE]).touch()


def agreed_placement(job: Job, recipe: Recipe, resumed: Path | None) -> Placement | None:
    """Where the experts live, the same on all ranks; None for a dense model."""

    def choose() -> str:
        chosen = checkpoint.choose_placement(recipe, resumed)
        return json.dumps(list(chosen.order) if chosen else None)

    order = json.loads(job.agree("placement", choose))
    return Placement(tuple(order), recipe.topology.expert_parallel) if order else None


def optimizer_step(job: Job, role: TrunkRank | PoolRank, step: int) -> StepScalars | None:
    """One step of all ranks: gradients, one norm over both roles, update. Returns a trunk rank's scalars."""
    squared = role.accumulate(step)
    # Every rank knows the norm of its role's (of its shard's) gradients; one rank of each counts.
    (total,) = job.sum_over_ranks([squared if job.role_rank == 0 else 0.0])
    return role.step(step, math.sqrt(total))


class _Loop:
    """The steps of one rank; all ranks go through the same ones in the same order."""

    def __init__(
        self,
        recipe: Recipe,
        job: Job,
        folder: RunFolder,
        prepared: PreparedData | None,
        watch: FaultWatch,
        newest: tuple[int, Path] | None,
    ):
        self._recipe, self._job, self._folder, self._prepared, self._watch = recipe, job, folder, prepared, watch
        self._newest = newest
        placement = agreed_placement(job, recipe, newest[1] if newest else None)
        self._trunk: TrunkRank | None = None
        if prepared:
            training = SequenceStream(prepared.dataset("train"), recipe.run.seed)
            validation = SequenceStream(prepared.dataset("validation"), None)
            self._trunk = TrunkRank(recipe, job, placement, training, validation)
            job.tell(
                "evaluations", str(evaluation_steps(validation.rows, recipe.eval.batches, recipe.train.global_batch))
            )
        # Pool ranks have no data: they are told how long an evaluation is.
        self._evaluations = int(job.ask("evaluations"))
        self._role: TrunkRank | PoolRank
        if self._trunk:
            self._role = self._trunk
        else:
            assert placement is not None, "a dense model has no pool ranks"
            self._role = PoolRank(recipe, job, placement)
        self._held_out_LM = torch.zeros(0)
        job.publish("metrics", f"{job.name}: http://127.0.0.1:{self._role.metrics.port}/metrics")
        job.barrier()

    def run(self) -> None:
        recipe, job = self._recipe, self._job
        start = 0
        if self._newest:
            start, saved = self._newest
            checkpoint.load(job, recipe, saved, self._role)
        if job.rank == 0:
            self._folder.begin(recipe, job.schedule, start)
        progress = Progress(recipe, start, job.look_up("metrics")) if job.rank == 0 else None
        val_loss, saved_at = math.nan, start
        for step in range(start, recipe.train.steps):
            self._watch.phase = f"step {step}"
            scalars = self._step(step)
            done = step + 1
            last = done == recipe.train.steps
            if progress and scalars:
                progress.step(done, scalars)
                self._folder.append_metrics({"step": done, **scalars})
            if last or _due(done, recipe.eval.every):
                val_loss = self._evaluate(done, progress)
            if last or _due(done, recipe.checkpoint.every):
                self._watch.phase = f"the checkpoint after step {step}"
                checkpoint.save(job, recipe, self._folder.checkpoints, done, self._role)
                saved_at = done
        if start >= recipe.train.steps:
            val_loss = self._evaluate(start, progress)
        self._finish(val_loss, saved_at, progress)

    def _step(self, step: int) -> dict[str, Any] | None:
        """One optimizer step; a trunk rank's scalars."""
        scalars = optimizer_step(self._job, self._role, step)
        if scalars is None or self._trunk is None:
            return None
        values = asdict(scalars)
        self._trunk.write_scalars({f"train/{name}": float(value) for name, value in values.items()}, step + 1)
        return values

    def _evaluate(self, done: int, progress: Progress | None) -> float:
        self._watch.phase = f"the evaluation after step {done}"
        recipe = self._recipe
        if self._trunk is None:
            assert isinstance(self._role, PoolRank)
            self._role.serve(self._job.schedule.evaluation(self._evaluations * recipe.micro_batches), done)
            return math.nan
        val_loss, self._held_out_LM = self._trunk.evaluate(self._evaluations, done)
        self._trunk.write_scalars({"eval/val_loss": val_loss}, done)
        if progress:
            progress.evaluation(done, val_loss)
            tokens = self._evaluations * recipe.train.global_batch * recipe.model.seq_len
            self._folder.append_metrics({"step": done, "val_loss": val_loss, "val_tokens": tokens})
        return val_loss

    def _finish(self, val_loss: float, saved_at: int, progress: Progress | None) -> None:
        """The generated sample, the load picture and the summary."""
        self._watch.phase = "the sample at the end"
        if self._trunk is None or self._prepared is None:
            assert isinstance(self._role, PoolRank)
            self._role.serve(self._job.schedule.generation(SAMPLE_TOKENS), self._recipe.train.steps)
            return
        tokenizer = self._prepared.tokenizer()
        prompt = self._prepared.dataset("validation")[0]["tokens"][:32]
        sample = self._trunk.generate(list(prompt), SAMPLE_TOKENS, self._recipe.train.steps)
        if progress:
            progress.close()
            write_summary(
                Summary(
                    recipe=self._recipe,
                    folder=self._folder,
                    checkpoint=self._folder.checkpoints / f"step_{saved_at:08d}",
                    val_loss=val_loss,
                    unigram_entropy=self._prepared.train.unigram_entropy,
                    prompt=tokenizer.decode(list(prompt)),
                    sample=tokenizer.decode(sample),
                    load_LM=self._held_out_LM.numpy() if self._recipe.model.ffn == "pool" else None,
                )
            )


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
