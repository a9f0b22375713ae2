"""How a run ends: with its last step, before that, or because it cannot go on."""

from __future__ import annotations

import time
from typing import NoReturn

from torch import Tensor

from trainer.checkpoint import format as checkpoint
from trainer.common.errors import DIVERGED, START_AGAIN, JobError
from trainer.telemetry.console import say
from trainer.train.ends.summary import write_summary
from trainer.train.pool_rank import PoolRank
from trainer.train.start import Run
from trainer.train.trunk_rank import TrunkRank

PROMPT_TOKENS, SAMPLE_TOKENS = 32, 64

LAST_SAVE_TRIES = 5
LAST_SAVE_PAUSE = 30.0
"""Seconds between two attempts to save the last checkpoint."""


class Ending:
    """The ends of a run on one rank. All ranks call the same."""

    def __init__(self, run: Run):
        self._r = run

    def stop(self, done: int) -> int:
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

    def end(self, done: int, saved: bool, val_loss: float) -> int:
        """End the run because of the lock, and save a checkpoint unless `saved`; return the exit status."""
        r = self._r
        r.stage.enter("stopping", f"the checkpoint after step {done}, before the end")
        kept = r.saver.finish() if saved else r.saver.save(done)
        r.reporter.close()
        if r.job.rank == 0 and isinstance(r.role, TrunkRank) and r.role.lock:
            say(r.role.lock.why_it_ends(done, val_loss, kept))
        return DIVERGED

    def give_up(self, step: int, skipped: int) -> NoReturn:
        """End the job because `skipped` steps in a row were skipped, up to `step`, and say on which data."""
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
            f"{skipped} steps in a row, up to step {step + 1}, were skipped because gradients were not finite "
            "(train.max_skipped_steps); the weights are those from before these steps. Check this data, or lower "
            "train.lr and resume with --force"
        )

    def finish_saving(self, done: int) -> None:
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

    def finish(self, saved_at: int, val_loss: float, held_out_LM: Tensor | None) -> None:
        """Write the generated sample, the load picture and the summary."""
        r = self._r
        r.stage.enter("stopping", "the sample at the end")
        if isinstance(r.role, PoolRank):
            r.role.generate(SAMPLE_TOKENS, saved_at)
            return
        assert r.prepared, "trunk ranks have data"
        tokenizer = r.prepared.tokenizer()
        (sequence_1S1,) = r.prepared.stream("validation", None).micro_batches(0, 1, 0, 1, 1)
        prompt = sequence_1S1[0, :PROMPT_TOKENS].tolist()
        sample = r.role.generate(prompt, SAMPLE_TOKENS, saved_at)
        r.reporter.close()
        if r.job.rank == 0:
            load_LM = held_out_LM if r.recipe.model.ffn == "pool" else None
            write_summary(
                r.recipe,
                r.folder,
                devices=r.job.devices.summary,
                checkpoint=checkpoint.folder_of(r.folder.checkpoints, saved_at),
                val_loss=val_loss,
                unigram_entropy=r.prepared.unigram_entropy,
                prompt=tokenizer.decode(prompt),
                sample=None if sample is None else tokenizer.decode(sample),
                load_LM=None if load_LM is None else load_LM.numpy(),
                owners=r.role.ownership.owners if r.role.ownership else None,
            )
