"""Saving: exact copies while training continues, atomic under kill -9; training survives failures of the disk."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import TIME_LIMIT, fork_rank, join, run_ranks
from tests.training import optimizer_step, run_training, tiny, tokens
from trainer.checkpoint import format as checkpoint
from trainer.checkpoint import save
from trainer.config.recipe import Recipe
from trainer.planning.schedule import make_schedule

pytestmark = pytest.mark.slow

ROUNDS = 8

EXACT: dict[str, dict[str, Any]] = {
    "1+1 lanes bf16 zero 1": {"pool_ranks": 1, "lanes": 2, "trunk_zero": 1, "pool_zero": 1},
    "2+1 stagger zero 2": {"trunk_ranks": 2, "pool_ranks": 1, "lanes": 2, "trunk_zero": 2, "pool_zero": 2},
    "every rank zero 1": {"layout": "every_rank", "trunk_ranks": 2, "lanes": 2, "trunk_zero": 1, "pool_zero": 1},
}


@pytest.mark.parametrize("layout", EXACT)
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(layout: str, tmp_path: Path) -> None:
    """20 steps, saved beside training after 10, against 10 more from that checkpoint."""
    precision = "bf16" if "bf16" in layout else "fp32"
    recipe = tiny(
        parallel=EXACT[layout], model={"hidden": 32, "ffn_hidden": 24}, train={"steps": 20, "precision": precision}
    )
    undisturbed = run_training(recipe, save_to=tmp_path, save_after=10)
    resumed = run_training(recipe, resume_from=tmp_path)
    assert len(undisturbed.scalars) == 20
    assert resumed.scalars == undisturbed.scalars[10:]
    assert resumed.val_loss == undisturbed.val_loss
    assert resumed.weights.keys() == undisturbed.weights.keys()
    for name, weight in undisturbed.weights.items():
        assert weight.equal(resumed.weights[name]), name


def build(recipe: Recipe, checkpoints: Path) -> tuple[Any, Any, Any]:
    """(job, role, saver) of this rank."""
    from trainer.checkpoint.save import Saver
    from trainer.data.batches import SequenceStream
    from trainer.train.agreement import agreed_placement
    from trainer.train.pool_rank import PoolRank
    from trainer.train.trunk_rank import TrunkRank

    job = join(recipe)
    placement = agreed_placement(job, recipe, None)
    if job.is_trunk:
        stream = SequenceStream([tokens(recipe)], 0)
        role: Any = TrunkRank(recipe, job, make_schedule(recipe), placement, stream, stream)
    else:
        assert placement
        role = PoolRank(recipe, job, make_schedule(recipe), placement)
    return job, role, Saver(job, recipe, checkpoints, role, metrics=role.metrics)


def save_without_end(recipe: Recipe, checkpoints: Path) -> None:
    """Resume from what is there, then train and save after every step until killed."""
    from trainer.checkpoint.resume import choose, load_checkpoint

    fsync = os.fsync

    def slow_fsync(descriptor: int) -> None:  # most of the time is spent within saves
        time.sleep(0.005)
        fsync(descriptor)

    os.fsync = slow_fsync
    job, role, saver = build(recipe, checkpoints)
    start, found = choose(job, recipe, checkpoints, force=False) or (0, None)
    if found:
        load_checkpoint(job, recipe, found, role)
    saver.clean()
    for step in range(start, 10_000):
        optimizer_step(job, role, step)
        saver.start(step + 1)


def test_killed_at_any_moment_the_newest_complete_checkpoint_is_whole(tmp_path: Path) -> None:
    """kill -9 at random moments of saves; each round resumes from what the one before has left."""
    seed = random.randrange(2**32)
    moments = random.Random(seed)
    recipe = tiny(run={"dir": str(tmp_path)}, train={"steps": 10_000}, checkpoint={"keep": 2, "keep_every": 10})
    interrupted, last = 0, 0
    number = 0
    while number < ROUNDS or (not interrupted and number < 5 * ROUNDS):
        number += 1
        where = f"seed {seed}, round {number}"
        with fork_rank(save_without_end, recipe, tmp_path) as process:
            deadline = time.monotonic() + TIME_LIMIT
            while _newest_step(tmp_path) < last + 2:
                assert process.is_alive() and time.monotonic() < deadline, where
                time.sleep(0.005)
            time.sleep(moments.uniform(0, 0.15))
            os.kill(process.pid, signal.SIGKILL)
        interrupted += any(tmp_path.glob(".step_*.partial"))
        found = checkpoint.newest(tmp_path)
        assert found and found[0] > last, where
        last = found[0]
        folders = sorted(tmp_path.glob("step_*"))
        assert folders == checkpoint.complete(tmp_path), where
        assert [checkpoint.damage(folder) for folder in folders] == [None] * len(folders), where
        assert {10 * n for n in range(1, (last - 3) // 10 + 1)} <= {checkpoint.steps_of(f) for f in folders}, where
        assert len([f for f in folders if checkpoint.steps_of(f) % 10]) <= 3, where
    assert interrupted, "no save was hit"


def _newest_step(folder: Path) -> int:
    found = checkpoint.newest(folder)
    return found[0] if found else 0


def fail_and_recover(recipe: Recipe, checkpoints: Path) -> dict[str, Any]:
    """One save where the pool rank's disk is full, one onto a path that is no folder, and one that succeeds."""

    job, role, saver = build(recipe, checkpoints)
    found: dict[str, Any] = {"saved": [], "errors": [], "losses": []}

    def attempt(step: int) -> None:
        scalars = optimizer_step(job, role, step)
        found["losses"].append(scalars and scalars.loss)
        found["saved"].append(saver.save(step + 1))
        found["errors"].append(saver.error)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not job.is_trunk:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    attempt(0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    if job.rank == 0:
        checkpoints.rmdir()
        checkpoints.write_text("no folder")
    attempt(1)
    if job.rank == 0:
        checkpoints.unlink()
    attempt(2)
    if job.rank == 0:
        found["metrics"] = {m.name: m.samples[0].value for m in role.metrics.collect() if "checkpoint" in m.name}
    job.close()
    return found


def test_a_save_that_fails_costs_nothing_but_the_save(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    trunk, pool = run_ranks(
        2, fail_and_recover, tiny(run={"dir": str(tmp_path)}, parallel={"pool_ranks": 1}), checkpoints
    )
    assert trunk["saved"] == pool["saved"] == [False, False, True]
    full, gone, fine = trunk["errors"]
    assert "rank 1 (pool 0, shard 0) could not write pool/shard_0/" in full and "File too large" in full
    assert "Not a directory" in gone
    assert fine is None
    assert trunk["metrics"]["unipool_checkpoint_failures"] == 2
    assert trunk["metrics"]["unipool_checkpoint_step"] == 3
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000003"]
    assert checkpoint.damage(checkpoints / "step_00000003") is None
    undisturbed = run_training(tiny(), 3)
    assert trunk["losses"] == pytest.approx([s["loss"] for s in undisturbed.scalars], rel=1e-5)


def skip_and_learn(recipe: Recipe, checkpoints: Path, steps: str) -> list[list[str]]:
    """A step and a save for every letter: l learns, s is skipped. Which checkpoints there are after each."""
    import math

    from trainer.checkpoint.resume import load_checkpoint
    from trainer.train.loop import update

    job, role, saver = build(recipe, checkpoints)
    start, found = checkpoint.newest(checkpoints) or (0, None)
    if found:
        load_checkpoint(job, recipe, found, role)
    kept = []
    for number, letter in enumerate(steps, start):
        squared_norm = role.accumulate(number)
        outcome = update(job, role, number, squared_norm if letter == "l" else math.inf)
        assert outcome.finite == (letter == "l")
        assert saver.save(number + 1)
        kept.append([str(checkpoint.steps_of(folder)) for folder in checkpoint.complete(checkpoints)])
    job.close()
    return kept


@pytest.mark.parametrize("zero", [0, 1], ids=["zero 0", "zero 1"])
def test_skipped_steps_do_not_push_out_what_was_learned(zero: int, tmp_path: Path) -> None:
    """Also after a resume; `keep_every` holds whatever was learned."""
    recipe = tiny(
        run={"dir": str(tmp_path)},
        checkpoint={"keep": 2, "keep_every": 7},
        parallel={"trunk_zero": zero, "pool_zero": zero},
    )
    (kept,) = run_ranks(1, skip_and_learn, recipe, tmp_path, "llsss")
    assert kept == [["1"], ["1", "2"], ["1", "3"], ["1", "4"], ["1", "5"]]
    (kept,) = run_ranks(1, skip_and_learn, recipe, tmp_path, "ssll")
    assert kept == [["1", "6"], ["1", "7"], ["7", "8"], ["7", "8", "9"]]


def test_checkpoints_of_an_older_version_are_each_counted(tmp_path: Path) -> None:
    layout = {"ranks": [1, 0, 1], "zero": [1, 1], "freeze": "none", "placement": [1, 0]}
    old = {"layout": layout, "data": "", "steps": 5, "micro_batches": 2}
    for text in (json.dumps(old), "[", json.dumps(old | {"updates": 3})):
        (tmp_path / "layout.json").write_text(text)
        assert checkpoint.weights_of(tmp_path) == ("3 updates" if "updates" in text else tmp_path.name)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """Such an error does not know its file."""
    file = tmp_path / "manifest.json"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            save._write(file, lambda opened: opened.write(b"longer than that"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.filename == str(file)
