"""`train`: one rank of a job, from the launcher's environment to the summary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from trainer.checkpoint.reshard import move_experts
from trainer.cluster.fault_watch import FaultWatch
from trainer.cluster.launch import mark_end
from trainer.cluster.process_groups import Job
from trainer.cluster.rank_assignment import provisional_names
from trainer.cluster.rendezvous import Launch
from trainer.common.errors import DIVERGED
from trainer.config.recipe import Recipe
from trainer.data.batches import evaluation_steps
from trainer.telemetry.console import say
from trainer.telemetry.run_folder import RunFolder
from trainer.telemetry.serving import Stage, serve_early
from trainer.telemetry.step_scalars import StepScalars
from trainer.train.agreement import agreed_move
from trainer.train.ends.early_stop import enough
from trainer.train.ends.ending import Ending
from trainer.train.evaluation.samples import continued, serve_samples
from trainer.train.lock import after_evaluation, assigns
from trainer.train.pool_rank import PoolRank
from trainer.train.start import Run, start
from trainer.train.trunk_rank import TrunkRank


def train(recipe: Recipe, launch: Launch, force: bool = False) -> int:
    """Run one rank of the job to its end. On a fault the process ends with a message instead of returning.

    Args:
        force: Whether to resume even if settings that affect results have changed.

    Returns:
        The exit status: 0, DIVERGED, or START_AGAIN after a signal that asks for a checkpoint.
    """
    names = provisional_names(recipe.grid, recipe.topology.order, launch.world_size)
    watch = FaultWatch(launch.rank, names[launch.rank])
    stage: Stage | None = None
    try:
        stage = Stage(watch, serve_early(recipe, launch))
        folder = RunFolder(recipe)
        with folder.removed_if_unused():
            run = start(recipe, launch, folder, stage, force)
        loop = Loop(run)
        status = loop.run()
        stage.end(status)
        if status:  # the launcher ends all ranks as soon as the first one ends with this status
            mark_end(launch.local_rank, status)
        run.job.close()
        run.reporter.end(status, loop.done)
        if status == 0:
            mark_end(launch.local_rank, status)
        return status
    except BaseException as error:
        if stage:
            stage.metrics.time.enter("failed")
        watch.fail(error)


@dataclass(frozen=True)
class StepOutcome:
    """An optimizer step, as all ranks know it.

    Attributes:
        scalars: The step's scalars, on a trunk rank only.
        finite: Whether the gradients were finite.
        applied: Whether the step was applied, rather than skipped.
        votes: Sums over the ranks of the numbers that each contributed.
    """

    scalars: StepScalars | None
    finite: bool
    applied: bool
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
    finite, skip = math.isfinite(norm), role.norms is not None and role.norms.add(norm) is not None
    return StepOutcome(role.step(step, norm, skip), finite, finite and not skip, sums)


class Loop:
    """The steps of a run on one rank. All ranks do the same in the same order.

    Attributes:
        done: Optimizer steps done.
    """

    def __init__(self, run: Run):
        self._r, self._ending = run, Ending(run)
        self._skipped, self._enough = 0, ""
        self.done = run.start
        self._val_loss = math.nan
        self._held_out_LM: Tensor | None = None

    def run(self) -> int:
        """Train to the end, or until a signal asks for a stop; return the exit status."""
        r, last = self._r, self._r.recipe.train.steps
        r.stage.watch.may_stop = True
        # The checkpoint was saved before its evaluation. After the last step nothing is left to end.
        if r.start and self._measure(r.start) and r.start < last:
            return self._ending.end(r.start, True, self._val_loss)
        last = r.start if self._enough else last
        for step in range(r.start, last):
            with r.profile.step(step + 1):
                stop = self._step(step)
            done = self.done = step + 1
            if stop and done < last:
                r.profile.finish()
                return self._ending.stop(done)
            save = done == last or _due(done, r.recipe.checkpoint.every)
            if save:
                r.stage.enter("saving", f"the checkpoint after step {done}")
                r.saver.start(done)
                if done < last:
                    r.stage.watch.phase = f"moving the experts after step {done}"
                    move_experts(r.job, r.saver, r.role, agreed_move(r.job, r.recipe, r.role, done), done)
            if self._measure(done) and done < last:
                return self._ending.end(done, save, self._val_loss)
            if self._enough and done < last:
                r.profile.finish()
                if not save:
                    r.saver.start(done)
                last = done
                break
        r.stage.enter("saving", "the last checkpoint")
        self._ending.finish_saving(last)
        r.stage.watch.may_stop = False
        r.stage.watch.saved = True
        r.reporter.tasks(last, max(r.saver.saved, r.start))
        # While all ranks are here: rank 0 then draws pictures for longer than a step may wait.
        (diverged,) = r.job.sum_over_ranks([float(r.job.is_trunk and not math.isfinite(self._val_loss))])
        if last < r.recipe.train.steps and r.job.rank == 0:
            say(f"unipool: ended after step {last} of {r.recipe.train.steps}: {self._enough}")
        self._ending.finish(max(r.start, last), self._val_loss, self._held_out_LM)
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
        r.reporter.tasks(step + 1, max(r.saver.saved, r.start))
        lost = step < r.recorded
        r.stage.metrics.time.stepped("lost" if lost else "training" if outcome.applied else "skipped")
        self._skipped = 0 if outcome.finite else self._skipped + 1
        if self._skipped >= r.recipe.train.max_skipped_steps:
            self._ending.give_up(step, self._skipped)
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
            self._enough = enough(r.job, recipe, r.role, done, self._val_loss)
            if recipe.eval.prompts:
                self._sample(done)
        if _due(done, recipe.probe.every):
            r.stage.enter("evaluating", f"the probe after step {done}")
            batches = recipe.probe.batches
            loss, _, tokens = self._held_out(batches, done)
            random = {layer: self._held_out(batches, done, layer)[0] for layer in recipe.probed_layers}
            r.reporter.probe(done, loss, random, tokens)
        return worse

    def _sample(self, done: int) -> None:
        """Let the model continue the prompts, and report that."""
        r = self._r
        if isinstance(r.role, PoolRank):
            serve_samples(r.recipe, r.role, done)
        else:
            assert r.prepared, "trunk ranks have data"
            r.reporter.samples(done, continued(r.recipe, r.prepared, r.role, done))

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


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
