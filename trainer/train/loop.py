"""`train`: one rank of a job, from the launcher's environment to the summary."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from pool.placement import Placement
from trainer.checkpoint import format as checkpoint
from trainer.checkpoint.resume import check_data, choose, early_check
from trainer.checkpoint.save import Saver
from trainer.cluster.fault_watch import FaultWatch
from trainer.cluster.launch import DONE_FILE
from trainer.cluster.process_groups import Job
from trainer.cluster.rendezvous import Launch, Member, provisional_names, rendezvous
from trainer.common.errors import DIVERGED, START_AGAIN, JobError, UserError
from trainer.common.strict_json import dumps, loads
from trainer.config.recipe import Recipe
from trainer.data.batches import evaluation_steps
from trainer.data.prepared import PreparedData
from trainer.data.recipe_data import prepare_for
from trainer.export.initial import load_initial
from trainer.model.document_mask import document_end
from trainer.planning.schedule import ScheduleSpec, schedule_of
from trainer.telemetry.console import say
from trainer.telemetry.prometheus import StepScalars
from trainer.telemetry.run_folder import RunFolder
from trainer.train.pool_rank import PoolRank
from trainer.train.reporter import Telemetry
from trainer.train.summary import Summary, write_summary
from trainer.train.trunk_rank import TrunkRank

SAMPLE_TOKENS = 64

LAST_SAVE_TRIES = 5
LAST_SAVE_PAUSE = 30.0
"""Seconds between two tries to save the last checkpoint."""


def train(recipe: Recipe, launch: Launch, force: bool = False) -> int:
    """Run one rank of the job to its end. Does not return on a fault: the process ends with a message.

    Args:
        force: go on from a checkpoint though the recipe changes the mathematics.
    Returns:
        the exit status: 0, DIVERGED, or START_AGAIN after a signal that asks for a checkpoint.
    """
    watch = FaultWatch(launch.rank, provisional_names(recipe, launch.world_size)[launch.rank])
    try:
        return _train(recipe, launch, watch, force)
    except BaseException as error:
        watch.fail(error)


def _train(recipe: Recipe, launch: Launch, watch: FaultWatch, force: bool) -> int:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # we write before we read
    folder = RunFolder(recipe)
    resume = early_check(recipe, folder.checkpoints, force)
    member = rendezvous(recipe, launch)
    watch.joined_as(member)
    if member.rank == 0:
        folder.make()
        say(f"ranks by host: {member.roster}")
    prepared = None
    if member.is_trunk:
        watch.phase = "data preparation"
        prepared = prepare_for(recipe, progress=member.leads_machine)
    watch.phase = "start-up"
    schedule = agreed_schedule(member, recipe, folder, resume)
    job = Job(recipe, member, schedule.lanes)
    watch.joined = True
    watch.phase = "reading checkpoints"
    newest = choose(job, recipe, folder.checkpoints, force)
    data = agreed_data(job, prepared)
    if newest:
        check_data(recipe, newest[1], data, force)
    watch.phase = "start-up"
    status = _Loop(recipe, job, schedule, folder, prepared, data, watch, newest).run()
    watch.phase = "the end"
    if status == DIVERGED:  # at the first rank that ends so, a launcher ends the others
        _mark_end(launch)
    job.close()
    if status == 0:
        _mark_end(launch)
    return status


def _mark_end(launch: Launch) -> None:
    """Tell `trainer.cluster.launch` that all steps are done."""
    if launch.local_rank == 0 and DONE_FILE in os.environ:
        Path(os.environ[DONE_FILE]).touch()


def agreed_schedule(member: Member, recipe: Recipe, folder: RunFolder, resume: bool) -> ScheduleSpec:
    """Return the schedule that rank 0 reads from the run's folder or makes, the same on all ranks.

    Raises:
        UserError: this rank was started with another recipe than rank 0.
    """
    text = member.shared.broadcast("schedule", lambda: schedule_of(recipe, folder.plan_file, resume).to_json())
    agreed = ScheduleSpec.from_json(recipe, text)
    if agreed is None:
        raise UserError("the ranks were started with different recipes: give all of them the same")
    return agreed


def agreed_data(job: Job, prepared: PreparedData | None) -> str:
    """What identifies the prepared data, the same on all trunk ranks."""
    own = prepared.identity if prepared else ""
    agreed = job.shared.broadcast("data", lambda: own)  # rank 0 is a trunk rank
    if prepared and own != agreed:
        raise UserError(
            f"data: {job.name} has other prepared data ({prepared.files('train')}) than rank 0: give all nodes the "
            "same source, or share data.dir"
        )
    return agreed


def agreed_placement(job: Job, recipe: Recipe, resumed: Path | None) -> Placement | None:
    """Where the experts live, the same on all ranks; None for a dense model."""

    def choose() -> str:
        chosen = checkpoint.choose_placement(recipe, resumed)
        return dumps(list(chosen.order) if chosen else None)

    order = loads(job.shared.broadcast("placement", choose))
    return Placement(tuple(order), recipe.grid.expert_parallel) if order else None


@dataclass(frozen=True)
class StepOutcome:
    """An optimizer step as all ranks know it.

    Attributes:
        scalars: a trunk rank's.
        finite: whether the gradients were, and the step was applied.
        votes: sums over the ranks of what each had to say.
    """

    scalars: StepScalars | None
    finite: bool
    votes: list[float]


def optimizer_step(job: Job, role: TrunkRank | PoolRank, step: int) -> StepScalars | None:
    """One step of all ranks: gradients, one norm over both roles, update. Returns a trunk rank's scalars."""
    return update(job, role, step, role.accumulate(step)).scalars


def update(
    job: Job, role: TrunkRank | PoolRank, step: int, squared_norm: float, votes: Sequence[float] = ()
) -> StepOutcome:
    """Step with the norm over both roles.

    Args:
        squared_norm: of this rank's reduced gradients.
        votes: numbers to sum over the ranks on this occasion.
    """
    # Every rank knows the norm of its role's (of its shard's) gradients; one rank of each counts.
    total, *sums = job.sum_over_ranks([squared_norm if job.role_rank == 0 else 0.0, *votes])
    norm = math.sqrt(total)
    return StepOutcome(role.step(step, norm), math.isfinite(norm), sums)


class _Loop:
    """The steps of one rank; all ranks go through the same ones in the same order."""

    def __init__(
        self,
        recipe: Recipe,
        job: Job,
        schedule: ScheduleSpec,
        folder: RunFolder,
        prepared: PreparedData | None,
        data: str,
        watch: FaultWatch,
        newest: tuple[int, Path] | None,
    ):
        self._recipe, self._job, self._folder, self._prepared, self._watch = recipe, job, folder, prepared, watch
        self._newest, self._schedule = newest, schedule
        placement = agreed_placement(job, recipe, newest[1] if newest else None)
        self._trunk: TrunkRank | None = None
        if prepared:
            training = prepared.stream("train", recipe.run.seed)
            validation = prepared.stream("validation", None)
            self._trunk = TrunkRank(
                recipe, job, schedule, placement, training, validation, document_end(recipe, prepared)
            )
            job.shared.set("held-out rows", str(validation.rows))
        # Pool ranks have no data: they are told how long an evaluation can be.
        self._held_out_rows = int(job.shared.get("held-out rows"))
        self._role: TrunkRank | PoolRank
        if self._trunk:
            self._role = self._trunk
        else:
            assert placement is not None, "a dense model has no pool ranks"
            self._role = PoolRank(recipe, job, schedule, placement)
        self._saver = Saver(job, recipe, folder.checkpoints, self._role, data, self._role.metrics)
        self._skipped = 0
        self._held_out_LM = torch.zeros(0)
        job.shared.put("metrics", self._role.metrics.address)
        job.barrier()

    def run(self) -> int:
        """Train to the end or to a stop that somebody asked for; returns the exit status."""
        recipe, job = self._recipe, self._job
        start, last = 0, recipe.train.steps
        if self._newest:
            self._watch.phase = "loading the checkpoint"
            start, saved = self._newest
            checkpoint.load(job, recipe, saved, self._role)
        elif recipe.train.init_from:
            self._watch.phase = f"reading {recipe.train.init_from}"
            load_initial(recipe, self._role)
        if job.rank == 0:
            assert self._prepared, "rank 0 is a trunk rank"
            self._folder.begin(recipe, self._schedule.to_json(), self._prepared.tokenizer().to_str(), start)
            self._saver.clean()
        job.barrier()  # loading may take longer on one rank than a step may wait
        self._telemetry = Telemetry(recipe, job, self._folder, self._role, start, self._schedule.lanes)
        val_loss = math.nan
        self._watch.may_stop = True
        if start and (start >= last or _due(start, recipe.eval.every)):
            val_loss = self._evaluate(start)  # a checkpoint is of before it
        if start and _due(start, recipe.probe.every):
            self._probe(start)
        for step in range(start, last):
            stop = self._step(step)
            done = step + 1
            if stop and done < last:
                return self._stop(done)
            if done == last or _due(done, recipe.checkpoint.every):
                self._watch.phase = f"the checkpoint after step {done}"
                self._saver.start(done)
            if done == last or _due(done, recipe.eval.every):
                val_loss = self._evaluate(done)
            if _due(done, recipe.probe.every):
                self._probe(done)
        self._watch.phase = "the last checkpoint"
        self._finish_saving(last)
        self._watch.may_stop = False
        self._watch.saved = True
        # While all are here: at the end rank 0 draws pictures, for longer than a step may wait.
        own = self._trunk is not None and not math.isfinite(val_loss)  # a pool rank knows no loss
        (diverged,) = self._job.sum_over_ranks([float(own)])
        self._finish(val_loss, max(start, last))
        if diverged and self._job.rank == 0:
            say(
                f"unipool: all steps are done, but the validation loss is {val_loss}: the model has diverged; lower "
                f"train.lr, or go back to an earlier checkpoint. Exit status {DIVERGED}"
            )
        return DIVERGED if diverged else 0

    def _finish_saving(self, done: int) -> None:
        """Wait for the last checkpoint; a disk that is full may be mended meanwhile."""
        for left in range(LAST_SAVE_TRIES - 1, -1, -1):
            if self._saver.finish():
                return
            if left:
                if self._job.rank == 0:
                    say(f"unipool: all steps are done; the last save is tried again in {LAST_SAVE_PAUSE:g} s")
                time.sleep(LAST_SAVE_PAUSE)
                self._saver.start(done)
        raise JobError(
            "all steps are done, but the last checkpoint could not be saved; the same command trains again from the "
            "newest one that there is"
        )

    def _step(self, step: int) -> bool:
        """One optimizer step; whether some rank has been asked to stop."""
        self._watch.phase = f"the forward and backward of step {step}"
        squared_norm = self._role.accumulate(step)
        self._watch.phase = f"the optimizer of step {step}"
        votes = (float(self._watch.stop_asked), self._saver.vote(), *self._telemetry.usage())
        outcome = update(self._job, self._role, step, squared_norm, votes)
        stop, writing, *usage = outcome.votes
        self._saver.settle(writing)
        self._telemetry.step(step + 1, outcome.scalars, usage)
        self._skipped = 0 if outcome.finite else self._skipped + 1
        if self._skipped >= self._recipe.train.max_skipped_steps:
            self._give_up(step)
        return stop > 0

    def _stop(self, done: int) -> int:
        """Save a checkpoint and leave, to be started again."""
        self._watch.phase = f"the checkpoint after step {done}, before a stop"
        if not self._saver.save(done):
            raise JobError(f"asked to stop after step {done}, but its checkpoint could not be saved")
        self._watch.saved = True
        self._telemetry.close()
        if self._job.rank == 0:
            say(f"unipool: asked to stop: checkpoint after step {done} saved; start again with the same command")
        return START_AGAIN

    def _give_up(self, step: int) -> NoReturn:
        """Too many steps in a row were skipped: say on which data."""
        self._saver.finish()
        if self._trunk and self._prepared:
            self._job.shared.put("nonfinite_rows", self._trunk.nonfinite_rows(step))
        if self._job.rank == 0:
            trunk_ranks = range(self._recipe.parallel.trunk_ranks)
            nonfinite_rows = [self._job.shared.get(f"nonfinite_rows/{rank}") for rank in trunk_ranks]
            where = (
                "; ".join(text for text in nonfinite_rows if text) or "the losses are finite, only gradients are not"
            )
            data = self._prepared.files("train") if self._prepared else ""
            say(f"unipool: step {step + 1}, of {data}: {where}")
        self._job.barrier()
        raise JobError(
            f"{self._skipped} steps in a row, the last is step {step + 1}, had gradients that are not finite and were "
            f"skipped (train.max_skipped_steps); the weights are those of before. Look at this data, or lower train.lr "
            f"and go on with --force"
        )

    def _evaluate(self, done: int) -> float:
        self._watch.phase = f"the evaluation after step {done}"
        val_loss, load_LM, tokens = self._held_out_loss(self._recipe.eval.batches, done)
        if self._trunk:
            self._held_out_LM = load_LM
            self._telemetry.evaluation(done, val_loss, tokens, load_LM)
        return val_loss

    def _probe(self, done: int) -> None:
        """What the learned routing is worth: the loss with random experts in one layer, each layer in turn."""
        self._watch.phase = f"the probe after step {done}"
        batches = self._recipe.probe.batches
        loss, _, tokens = self._held_out_loss(batches, done)
        random = {layer: self._held_out_loss(batches, done, layer)[0] for layer in self._recipe.probed_layers}
        if self._trunk:
            self._telemetry.probe(done, loss, random, tokens)

    def _held_out_loss(self, batches: int, done: int, random_layer: int | None = None) -> tuple[float, Tensor, int]:
        """(loss in nats, load (L, M), tokens) of at most so many global batches; a pool rank serves, and has no loss.

        Args:
            random_layer: a layer that has random experts.
        """
        recipe = self._recipe
        batches = evaluation_steps(self._held_out_rows, batches, recipe.train.global_batch)
        tokens = batches * recipe.train.global_batch * recipe.model.seq_len
        if self._trunk:
            return *self._trunk.evaluate(batches, done, random_layer), tokens
        assert isinstance(self._role, PoolRank)
        self._role.serve(self._schedule.evaluation(batches * recipe.micro_batches), done)
        return math.nan, self._held_out_LM, tokens

    def _finish(self, val_loss: float, saved_at: int) -> None:
        """The generated sample, the load picture and the summary."""
        self._watch.phase = "the sample at the end"
        if self._trunk is None or self._prepared is None:
            assert isinstance(self._role, PoolRank)
            self._role.serve(self._schedule.generation(SAMPLE_TOKENS), self._recipe.train.steps)
            return
        tokenizer = self._prepared.tokenizer()
        (sequence_1S1,) = self._prepared.stream("validation", None).micro_batches(0, 1, 0, 1, 1)
        prompt = sequence_1S1[0, :32].tolist()
        sample = self._trunk.generate(prompt, SAMPLE_TOKENS, self._recipe.train.steps)
        self._telemetry.close()
        if self._job.rank == 0:
            write_summary(
                Summary(
                    recipe=self._recipe,
                    folder=self._folder,
                    checkpoint=checkpoint.folder_of(self._folder.checkpoints, saved_at),
                    val_loss=val_loss,
                    unigram_entropy=self._prepared.unigram_entropy,
                    prompt=tokenizer.decode(prompt),
                    sample=None if sample is None else tokenizer.decode(sample),
                    load_LM=self._held_out_LM.numpy() if self._recipe.model.ffn == "pool" else None,
                )
            )


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
