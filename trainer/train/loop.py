"""`train`: one rank of a job, from the launcher's environment to the summary."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from trainer.checkpoint import format as checkpoint
from trainer.checkpoint.reshard import move_experts
from trainer.checkpoint.resume import check_data, choose, early_check, load_checkpoint
from trainer.checkpoint.save import Saver
from trainer.cluster.fault_watch import FaultWatch
from trainer.cluster.launch import mark_end
from trainer.cluster.process_groups import Job
from trainer.cluster.rank_assignment import provisional_names
from trainer.cluster.rendezvous import Launch, rendezvous
from trainer.common.errors import DIVERGED, START_AGAIN, JobError
from trainer.common.gpus import check_queues, load_kernels_at_start, use_many_queues
from trainer.config.recipe import Recipe
from trainer.data.batches import evaluation_steps
from trainer.data.prepare import prepare_for
from trainer.data.prepared_data import PreparedData
from trainer.engine.deterministic import use_deterministic_kernels
from trainer.export.initial import load_initial
from trainer.model.document_mask import document_end
from trainer.telemetry.console import say
from trainer.telemetry.measured import DiskSpace
from trainer.telemetry.run_folder import RunFolder
from trainer.telemetry.serving import Stage, serve_early, serve_joined
from trainer.telemetry.step_scalars import StepScalars
from trainer.train.agreement import agreed_data, agreed_move, agreed_placement, agreed_schedule
from trainer.train.lock import after_evaluation, assigns
from trainer.train.pool_rank import PoolRank
from trainer.train.profile import StepProfile
from trainer.train.reporter import Reporter, warn_of_memory
from trainer.train.summary import write_summary
from trainer.train.trunk_rank import TrunkRank

PROMPT_TOKENS, SAMPLE_TOKENS = 32, 64

LAST_SAVE_TRIES = 5
LAST_SAVE_PAUSE = 30.0
"""Seconds between two attempts to save the last checkpoint."""


@dataclass(frozen=True)
class Run:
    """A run on one rank, ready for its next step.

    Attributes:
        prepared: The data; None on pool ranks.
        start: Optimizer steps done.
        recorded: Optimizer steps that an earlier start had done, of which those after `start` are done again.
        held_out_rows: Rows of held-out text, which bound an evaluation.
    """

    recipe: Recipe
    job: Job
    folder: RunFolder
    prepared: PreparedData | None
    role: TrunkRank | PoolRank
    saver: Saver
    reporter: Reporter
    profile: StepProfile
    stage: Stage
    start: int
    recorded: int
    held_out_rows: int


def train(recipe: Recipe, launch: Launch, force: bool = False) -> int:
    """Run one rank of the job to its end. On a fault the process ends with a message instead of returning.

    Args:
        force: Whether to resume even if settings that affect results have changed.

    Returns:
        The exit status: 0, DIVERGED, or START_AGAIN after a signal that asks for a checkpoint.
    """
    names = provisional_names(recipe.grid, recipe.topology.order, launch.world_size)
    watch = FaultWatch(launch.rank, names[launch.rank])
    stage = Stage(watch, serve_early(recipe, launch))
    try:
        folder = RunFolder(recipe)
        with folder.removed_if_unused():
            run = start(recipe, launch, folder, stage, force)
        status = Loop(run).run()
        stage.end(status)
        if status == DIVERGED:  # the launcher ends all ranks as soon as the first one ends with this status
            mark_end(launch.local_rank)
        run.job.close()
        if status == 0:
            mark_end(launch.local_rank)
        return status
    except BaseException as error:
        stage.metrics.time.enter("failed")
        watch.fail(error)


def start(recipe: Recipe, launch: Launch, folder: RunFolder, stage: Stage, force: bool) -> Run:
    """Bring one rank up to the run's next step. A collective of all ranks."""
    use_deterministic_kernels()
    if not recipe.grid.colocated:
        load_kernels_at_start()
        use_many_queues()
    if recipe.train.compile is False and torch.cuda.is_available():
        torch.compiler.set_stance("force_eager")

    # Which rank of the job is this?
    resume = early_check(recipe, folder.checkpoints, force)
    watch, metrics = stage.watch, stage.metrics
    stage.enter("rendezvous", "start-up")
    member = rendezvous(recipe, launch)
    watch.joined_as(member)
    serve_joined(recipe, member, metrics)
    if not recipe.grid.colocated and member.payload_device.type == "cuda":
        check_queues()
    if member.rank == 0:
        folder.make()
        metrics.disk = DiskSpace(folder.path)
        folder.announce(member.shared.gather("metrics"))
        for line in (f"ranks by host: {member.roster}", *member.devices.lines):
            say(line)

    # Trunk ranks prepare the data. All ranks agree on the schedule, then form their process groups.
    prepared = None
    if member.is_trunk:
        stage.enter("preparing", "data preparation")
        prepared = prepare_for(recipe, progress=member.leads_machine)
    stage.enter("starting", "start-up")
    schedule = agreed_schedule(member, recipe, folder, resume)
    job = Job(recipe, member, schedule.lanes)
    watch.joined = True
    warn_of_memory(job, recipe, schedule.lanes)

    # Where does the run start, and on which data?
    stage.enter("loading", "reading checkpoints")
    done, saved = choose(job, recipe, folder.checkpoints, force) or (0, None)
    data = agreed_data(job, prepared)
    if saved:
        check_data(recipe, saved, data, force)
    stage.enter("starting", "start-up")

    # Build this rank's role: model, engine, wire, metrics.
    placement = agreed_placement(job, recipe, saved, schedule.step)
    role: TrunkRank | PoolRank
    if prepared:
        training = prepared.stream("train", recipe.run.seed)
        validation = prepared.stream("validation", None)
        end = document_end(recipe, prepared)
        role = TrunkRank(recipe, job, schedule, placement, training, validation, end, metrics)
        job.shared.set("held-out rows", str(validation.rows))
    else:
        assert placement is not None, "a dense model has no pool ranks"
        role = PoolRank(recipe, job, schedule, placement, metrics)
    held_out_rows = int(job.shared.get("held-out rows"))  # pool ranks have no data
    saver = Saver(job, recipe, folder.checkpoints, role, data, metrics)
    job.barrier()
    (gpus,) = job.sum_over_ranks([float(job.device.type == "cuda")])
    if placement and gpus:
        stage.enter("warming_up", "warm-up")
        role.warm_up(job.start_timeout)
        stage.enter("starting", "start-up")

    # Load its state.
    if saved:
        stage.enter("loading", "loading the checkpoint")
        load_checkpoint(job, recipe, saved, role)
    elif recipe.train.init_from:
        stage.enter("loading", f"reading {recipe.train.init_from}")
        load_initial(recipe, role)
    if job.rank == 0:
        assert prepared, "rank 0 is a trunk rank"
        folder.begin(recipe, schedule.to_json(), job.devices.summary, prepared.tokenizer_files(), done)
        saver.clean()
    recorded = int(job.shared.broadcast("recorded", lambda: str(folder.recorded)))
    job.barrier()  # loading may take longer on one rank than a step may wait
    job.limit_waits()
    reporter = Reporter(recipe, job, folder, role, done, schedule.lanes)
    profile = StepProfile(recipe, job, folder, isinstance(role, TrunkRank) and role.trunk.compiled)
    return Run(recipe, job, folder, prepared, role, saver, reporter, profile, stage, done, recorded, held_out_rows)


@dataclass(frozen=True)
class StepOutcome:
    """An optimizer step, as all ranks know it.

    Attributes:
        scalars: The step's scalars, on a trunk rank only.
        finite: Whether the gradients were finite, so that the step was applied.
        votes: Sums over the ranks of the numbers that each contributed.
    """

    scalars: StepScalars | None
    finite: bool
    votes: list[float]


def update(
    job: Job, role: TrunkRank | PoolRank, step: int, squared_norm: float, votes: Sequence[float] = ()
) -> StepOutcome:
    """Update the weights, clipping by the norm over both roles.

    Args:
        squared_norm: What this rank contributes to the squared norm of the reduced gradients.
        votes: Numbers to sum over the ranks in the same collective.
    """
    total, *sums = job.sum_over_ranks([squared_norm, *votes])
    norm = math.sqrt(total)
    return StepOutcome(role.step(step, norm), math.isfinite(norm), sums)


class Loop:
    """The steps of a run on one rank. All ranks do the same in the same order."""

    def __init__(self, run: Run):
        self._r = run
        self._skipped = 0
        self._val_loss = math.nan
        self._held_out_LM: Tensor | None = None

    def run(self) -> int:
        """Train to the end, or until a signal asks for a stop; return the exit status."""
        r, last = self._r, self._r.recipe.train.steps
        r.stage.watch.may_stop = True
        # The checkpoint was saved before its evaluation. After the last step nothing is left to end.
        if r.start and self._measure(r.start) and r.start < last:
            return self._end(r.start, True)
        for step in range(r.start, last):
            with r.profile.step(step + 1):
                stop = self._step(step)
            done = step + 1
            if stop and done < last:
                r.profile.finish()
                return self._stop(done)
            save = done == last or _due(done, r.recipe.checkpoint.every)
            if save:
                r.stage.enter("saving", f"the checkpoint after step {done}")
                r.saver.start(done)
                if done < last:
                    r.stage.watch.phase = f"moving the experts after step {done}"
                    move_experts(r.job, r.saver, r.role, agreed_move(r.job, r.recipe, r.role, done), done)
            if self._measure(done) and done < last:
                return self._end(done, save)
        r.stage.enter("saving", "the last checkpoint")
        self._finish_saving(last)
        r.stage.watch.may_stop = False
        r.stage.watch.saved = True
        # While all ranks are here: rank 0 then draws pictures for longer than a step may wait.
        (diverged,) = r.job.sum_over_ranks([float(r.job.is_trunk and not math.isfinite(self._val_loss))])
        self._finish(max(r.start, last))
        if diverged and r.job.rank == 0:
            say(
                f"unipool: all steps are done, but the model has diverged (validation loss {self._val_loss}): lower "
                f"train.lr, or go back to an earlier checkpoint. Exit status {DIVERGED}"
            )
        return DIVERGED if diverged else 0

    def _step(self, step: int) -> bool:
        """Run an optimizer step; return whether some rank has been asked to stop."""
        r = self._r
        r.stage.enter("training", f"the forward and backward of step {step}")
        squared_norm = r.role.accumulate(step)
        r.stage.watch.phase = f"the optimizer of step {step}"
        votes = (float(r.stage.watch.stop_asked), r.saver.vote(), *r.reporter.usage())
        outcome = update(r.job, r.role, step, squared_norm, votes)
        stop, writing, *usage = outcome.votes
        r.saver.settle(writing)
        r.reporter.step(step + 1, outcome.scalars, usage)
        lost = step < r.recorded
        r.stage.metrics.time.stepped("lost" if lost else "training" if outcome.finite else "skipped")
        self._skipped = 0 if outcome.finite else self._skipped + 1
        if self._skipped >= r.recipe.train.max_skipped_steps:
            self._give_up(step)
        return stop > 0

    def _measure(self, done: int) -> bool:
        """Evaluate and probe if they are due after `done` steps; return whether the lock is to end the run."""
        r, recipe, worse = self._r, self._r.recipe, False
        if done >= recipe.train.steps or _due(done, recipe.eval.every) or assigns(recipe, done):
            r.stage.enter("evaluating", f"the evaluation after step {done}")
            self._val_loss, self._held_out_LM, tokens = self._held_out(recipe.eval.batches, done)
            r.reporter.evaluation(done, self._val_loss, tokens, self._held_out_LM)
            if recipe.lock:
                worse = after_evaluation(r.job, recipe, r.role, done, self._val_loss, self._held_out_LM)
                r.reporter.assigned(done)
        if _due(done, recipe.probe.every):
            r.stage.enter("evaluating", f"the probe after step {done}")
            batches = recipe.probe.batches
            loss, _, tokens = self._held_out(batches, done)
            random = {layer: self._held_out(batches, done, layer)[0] for layer in recipe.probed_layers}
            r.reporter.probe(done, loss, random, tokens)
        return worse

    def _held_out(self, batches: int, done: int, random_layer: int | None = None) -> tuple[float, Tensor | None, int]:
        """Evaluate on at most `batches` global batches of held-out text.

        Args:
            random_layer: A layer that uses random experts.

        Returns:
            Loss in nats and load by layer and expert (pool ranks know neither), and the number of tokens.
        """
        recipe = self._r.recipe
        batches = evaluation_steps(self._r.held_out_rows, batches, recipe.train.global_batch)
        loss, load_LM = self._r.role.evaluate(batches, done, random_layer)
        return loss, load_LM, batches * recipe.train.global_batch * recipe.model.seq_len

    def _stop(self, done: int) -> int:
        """Save a checkpoint, and end with the status that asks for a restart."""
        r = self._r
        r.stage.enter("stopping", f"the checkpoint after step {done}, before a stop")
        if not r.saver.save(done):
            raise JobError(f"asked to stop after step {done}, but its checkpoint could not be saved")
        r.stage.watch.saved = True
        r.reporter.close()
        if r.job.rank == 0:
            say(f"unipool: asked to stop: the checkpoint after step {done} is saved; run the same command to resume")
        return START_AGAIN

    def _end(self, done: int, saved: bool) -> int:
        """End the run because of the lock, and save a checkpoint unless `saved`; return the exit status."""
        r = self._r
        r.stage.enter("stopping", f"the checkpoint after step {done}, before the end")
        kept = r.saver.finish() if saved else r.saver.save(done)
        r.reporter.close()
        if r.job.rank == 0 and isinstance(r.role, TrunkRank) and r.role.lock:
            say(r.role.lock.why_it_ends(done, self._val_loss, kept))
        return DIVERGED

    def _give_up(self, step: int) -> NoReturn:
        """End the job because too many steps in a row were skipped, and say on which data."""
        r = self._r
        r.saver.finish()
        if isinstance(r.role, TrunkRank):
            r.job.shared.put("nonfinite_rows", r.role.nonfinite_rows(step))
        if r.job.rank == 0 and r.prepared:
            named = [r.job.shared.get(f"nonfinite_rows/{rank}") for rank in range(r.job.topology.trunk_ranks)]
            where = "; ".join(text for text in named if text) or "all losses are finite, only gradients are not"
            say(f"unipool: step {step + 1} on {r.prepared.files('train')}: {where}")
        r.job.barrier()
        raise JobError(
            f"{self._skipped} steps in a row, up to step {step + 1}, were skipped because gradients were not finite "
            "(train.max_skipped_steps); the weights are those from before these steps. Check this data, or lower "
            "train.lr and resume with --force"
        )

    def _finish_saving(self, done: int) -> None:
        """Wait for the last checkpoint, and try again if that fails: the disk may have room by then."""
        r = self._r
        for left in range(LAST_SAVE_TRIES - 1, -1, -1):
            if r.saver.finish():
                return
            if left:
                if r.job.rank == 0:
                    say(f"unipool: all steps are done; the last save is tried again in {LAST_SAVE_PAUSE:g} s")
                time.sleep(LAST_SAVE_PAUSE)
                r.saver.start(done)
        raise JobError(
            "all steps are done, but the last checkpoint could not be saved; the same command resumes from the newest "
            "checkpoint that was saved"
        )

    def _finish(self, saved_at: int) -> None:
        """Write the generated sample, the load picture and the summary."""
        r, steps = self._r, self._r.recipe.train.steps
        r.stage.enter("stopping", "the sample at the end")
        if isinstance(r.role, PoolRank):
            r.role.generate(SAMPLE_TOKENS, steps)
            return
        assert r.prepared, "trunk ranks have data"
        tokenizer = r.prepared.tokenizer()
        (sequence_1S1,) = r.prepared.stream("validation", None).micro_batches(0, 1, 0, 1, 1)
        prompt = sequence_1S1[0, :PROMPT_TOKENS].tolist()
        sample = r.role.generate(prompt, SAMPLE_TOKENS, steps)
        r.reporter.close()
        if r.job.rank == 0:
            load_LM = self._held_out_LM if r.recipe.model.ffn == "pool" else None
            write_summary(
                r.recipe,
                r.folder,
                devices=r.job.devices.summary,
                checkpoint=checkpoint.folder_of(r.folder.checkpoints, saved_at),
                val_loss=self._val_loss,
                unigram_entropy=r.prepared.unigram_entropy,
                prompt=tokenizer.decode(prompt),
                sample=None if sample is None else tokenizer.decode(sample),
                load_LM=None if load_LM is None else load_LM.numpy(),
            )


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
