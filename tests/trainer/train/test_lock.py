"""UniPool-lock: layouts agree over its boundaries, runs resume there bit for bit, and a run that gets worse ends."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from pool.placement import contiguous, more_even
from router import random_ownership
from tests.distributed import TIME_LIMIT
from tests.trainer.forked import TRUNK, Fault, ForkedJob, Place
from tests.trainer.job import write_recipe
from tests.training import Outcome, assert_same, run_training, tiny
from trainer.checkpoint.format import complete, folder_of, read_load, read_ownership, read_placement
from trainer.checkpoint.resume import check
from trainer.common.errors import DIVERGED, UserError
from trainer.common.strict_json import dumps, loads
from trainer.config.lock import OWNERSHIP_FILE
from trainer.config.recipe import load_recipe
from trainer.telemetry.run_folder import RunFolder
from trainer.train.lock import RunLock
from trainer.train.loop import Loop
from trainer.train.pool_rank import PoolRank
from trainer.train.reporter import Reporter
from trainer.train.trunk_rank import TrunkRank

ZERO_0 = {"trunk_zero": 0, "pool_zero": 0}
LOCK_STEP = {"lanes": 1, "stagger": False}
EVERY = {"layout": "every_rank", "trunk_ranks": 2}
LOCK = {"full_fraction": 0.4, "anneal_fraction": 0.3, "entropy": 0.3, "evaluations": 2}  # 2 steps, 2 of 6, 2


def locked(**sections: Any) -> Any:
    """6 steps: two of each stage; 4 experts a layer; an evaluation after each step."""
    train = {"steps": 6, **sections.pop("train", {})}
    lock = {**LOCK, **sections.pop("lock", {})}
    return tiny(pool={"experts": 12, **sections.pop("pool", {})}, train=train, lock=lock, **sections)


@cache
def reference() -> Outcome:
    """One process, ZeRO 0, one lane."""
    return run_training(locked(parallel={**ZERO_0, **LOCK_STEP}))


def test_a_run_goes_through_all_stages() -> None:
    found = reference()
    assert [scalars["lock_stage"] for scalars in found.scalars] == [0, 0, 1, 1, 2, 2]
    assert all(("own_share" in scalars) == (step >= 2) for step, scalars in enumerate(found.scalars))
    assert [scalars.get("foreign_assignments") for scalars in found.scalars] == [None] * 4 + [0, 0]
    assert found.scalars[-1]["own_share"] == 1 > found.scalars[2]["own_share"]
    assert all(scalars["entropy_loss"] > 0 for scalars in found.scalars)
    assert found.owners and sorted(found.owners) == [0] * 4 + [1] * 4 + [2] * 4
    foreign_LM = torch.tensor(found.owners) != torch.arange(3)[:, None]
    for load_LM in (found.load_LM, found.held_out_LM):
        assert load_LM[foreign_LM].sum() == 0 < load_LM.sum()


def test_the_assignment_changes_nothing_at_first() -> None:
    """The evaluation after it, of the first annealed step, is to the bit the one that has decided it."""
    found = run_training(locked(parallel=ZERO_0), steps=2)
    assert found.owners and found.val_loss == found.val_losses[-1]


@pytest.mark.parametrize(
    "parallel, sections",
    [
        ({"trunk_ranks": 2, "pool_ranks": 2, "lanes": 3}, {}),
        ({"trunk_ranks": 2, "pool_ranks": 2, "expert_parallel": 1, "trunk_zero": 2, "pool_zero": 2}, {}),
        ({**EVERY, "lanes": 2}, {"train": {"recompute": True}, "pool": {"recompute": True}}),
        ({"trunk_ranks": 2, "trunk_zero": 3}, {}),
    ],
    ids=["dedicated", "replicas zero 2", "every_rank recompute", "zero 3"],
)
def test_layouts_agree(parallel: dict[str, Any], sections: dict[str, Any]) -> None:
    assert_same(reference(), run_training(locked(parallel={**ZERO_0, **parallel}, **sections)))


@pytest.mark.parametrize("after", [1, 2, 3, 4, 5])
def test_resume_is_exact_on_either_side_of_each_boundary(after: int, tmp_path: Path) -> None:
    """The checkpoint at a boundary is saved before the evaluation that assigns experts, which is then repeated."""
    recipe = locked(parallel={"pool_ranks": 1})
    whole = run_training(recipe, save_to=tmp_path, save_after=after)
    record = read_ownership(next(tmp_path.glob("step_*")))
    assert (record and record.owners) == (whole.owners if after > 2 else None)
    resumed = run_training(recipe, resume_from=tmp_path)
    assert_same(_rest(whole, after), resumed, tolerance=0.0)


def test_experts_move_when_layers_are_locked(tmp_path: Path) -> None:
    """By the load of the locked steps alone, at their first checkpoint; a resume decides the same."""
    recipe = locked(parallel={**ZERO_0, "pool_ranks": 2})
    moved = run_training(recipe, save_to=tmp_path, save_after=5)
    folder = next(tmp_path.glob("step_*"))
    placement, load_LM, record = read_placement(folder), torch.from_numpy(read_load(folder)), read_ownership(folder)
    assert placement == contiguous(12, 1, 2) and record
    own_LM = torch.tensor(record.owners) == torch.arange(3)[:, None]
    assert load_LM[own_LM].sum() == load_LM.sum() > 0
    assert placement.order != more_even(load_LM, placement).order, "nothing has moved"
    assert_same(reference(), moved)
    assert_same(_rest(moved, 5), run_training(recipe, resume_from=tmp_path), tolerance=0.0)


@pytest.mark.parametrize(("before", "after"), [("1+1", "every rank"), ("zero 3", "1+1")])
def test_a_checkpoint_of_another_layout(before: str, after: str, tmp_path: Path) -> None:
    """Before and after the assignment."""
    layouts = {"1+1": {"pool_ranks": 1}, "every rank": EVERY, "zero 3": {"trunk_ranks": 2, "trunk_zero": 3}}
    steps = 1 if before == "1+1" else 3
    run_training(locked(parallel=layouts[before]), steps, save_to=tmp_path)
    rest = run_training(locked(parallel=layouts[after]), resume_from=tmp_path)
    whole = _rest(reference(), steps)
    assert_same(whole, rest)


def test_a_random_allocation_is_locked_from_the_first_step(tmp_path: Path) -> None:
    """It depends on the seed alone, and nothing is asked of its loss."""
    recipe = locked(lock={"allocation": "random"}, parallel={"pool_ranks": 1})
    found = run_training(recipe, steps=2, save_to=tmp_path)
    assert [scalars["lock_stage"] for scalars in found.scalars] == [2, 2]
    assert [scalars["foreign_assignments"] for scalars in found.scalars] == [0, 0]
    record = read_ownership(next(tmp_path.glob("step_*")))
    assert record and record.owners == found.owners == random_ownership(3, 12, recipe.run.seed).owners
    assert (record.step, record.val_loss) == (0, None)


def test_keys_that_may_change_on_resume(tmp_path: Path) -> None:
    """Not those that decide the assignment, as evaluations do until it is made; the limit of the loss may."""
    run_training(locked(), 1, save_to=tmp_path)
    before = folder_of(tmp_path, 1)
    assert check(locked(lock={"stop_above": 1.0}), before, force=False) == ["lock.stop_above 0.05 -> 1.0"]
    for changed in ({"lock": {"coverage": 0.5}}, {"eval": {"every": 1}}, {"train": {"micro_batch": 4}}):
        with pytest.raises(UserError, match=r"different settings: (lock.coverage|eval.every|train.micro_batch)"):
            check(locked(**changed), before, force=False)
    run_training(locked(), 3, save_to=tmp_path, resume_from=tmp_path)
    assert check(locked(eval={"every": 1}), folder_of(tmp_path, 3), force=False) == ["eval.every 0 -> 1"]


def test_a_lock_cannot_begin_after_its_assignment(tmp_path: Path) -> None:
    run_training(locked(lock={"full_fraction": 0.6}), 3, save_to=tmp_path)
    assert read_ownership(folder_of(tmp_path, 3)) is None
    with pytest.raises(UserError, match="no experts assigned to layers, and .* would have assigned them after step 2"):
        check(locked(), folder_of(tmp_path, 3), force=True)


def test_what_is_assigned_is_not_assigned_again_later(tmp_path: Path) -> None:
    """A longer run would go back to its full stage; with a smaller share for it the stages stay where they are."""
    run_training(locked(), 3, save_to=tmp_path)
    folder, longer = folder_of(tmp_path, 3), {"steps": 12}
    for changed in ({"train": longer}, {"lock": {"full_fraction": 0.6}}, {"lock": {"allocation": "random"}}):
        with pytest.raises(UserError, match=r"assigned to layers after step 2, but .* assigns them after step [450]:"):
            check(locked(**changed), folder, force=True)
    assert check(locked(train=longer, lock={"full_fraction": 0.2}), folder, force=True)


def test_a_run_that_resumes_from_before_the_assignment_forgets_it(tmp_path: Path) -> None:
    recipe = locked(run={"dir": str(tmp_path)})
    (tmp_path / OWNERSHIP_FILE).write_text("left by the steps that are trained again")
    job = MagicMock(rank=0, **{"shared.gather.return_value": []})
    job.topology.world_size = 0
    Reporter(recipe, job, RunFolder(recipe), MagicMock(ownership=None), 1, 1)
    assert read_ownership(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{}", '{"owners": [0, 0, 1], "shares": [1, 1], "shortfalls": [], "feasible": 1}'])
def test_a_damaged_ownership_is_one_line(text: str, tmp_path: Path) -> None:
    assert read_ownership(tmp_path) is None
    (tmp_path / OWNERSHIP_FILE).write_text(text)
    with pytest.raises(UserError, match="ownership.json: damaged; use another checkpoint"):
        read_ownership(tmp_path)


def counted(*per_layer: float) -> Tensor:
    """A load in which expert e has `per_layer[e]` tokens of every layer but 100 more of layer e % 3."""
    load_LM = torch.tensor(per_layer).expand(3, 12).clone()
    load_LM[torch.arange(12) % 3, torch.arange(12)] += 100
    return load_LM.long()


def test_the_newest_evaluations_decide_by_their_weights() -> None:
    lock = RunLock(locked(lock={"evaluations": 2, "coverage": 0.0}), torch.device("cpu"))
    old_LM, new_LM = counted(*[0.0] * 12).roll(1, 0), counted(*[0.0] * 12)
    for load_LM in (1000 * old_LM, old_LM, new_LM):  # the first is too old
        lock.keep(load_LM)
    record = lock.choose(2, 3.5)
    assert record.owners == tuple(range(3)) * 4 and record.shares == pytest.approx([2 / 3] * 3)
    assert (record.step, record.val_loss, record.feasible) == (2, 3.5, True)
    resumed = RunLock(locked(lock={"evaluations": 2, "coverage": 0.0}), torch.device("cpu"))
    resumed.restore(lock.state_dict())
    assert resumed.choose(2, 3.5) == record
    lock.keep(new_LM)
    assert lock.choose(2, 3.5).shares == pytest.approx([1.0] * 3)


def test_two_losses_in_a_row_end_a_run() -> None:
    lock = RunLock(locked(lock={"stop_above": 0.5}), torch.device("cpu"))
    lock.keep(counted(*[0.0] * 12))
    assert not lock.exceeds(9.0)
    lock.use(dumps(lock.choose(2, 3.0).model_dump()))
    assert [lock.exceeds(loss) for loss in (3.6, 3.5, 3.6)] == [False, False, False]
    again = RunLock(locked(lock={"stop_above": 0.5}), torch.device("cpu"))
    again.restore(lock.state_dict())
    assert [again.exceeds(loss) for loss in (math.nan, 3.6, 3.4)] == [True, True, False]


def worse_with_every_step() -> None:
    """Add to the validation loss of this process as many nats as steps are done."""
    evaluate = TrunkRank.evaluate

    def worse(self: TrunkRank, batches: int, step: int, random_layer: int | None = None) -> tuple[float, Tensor]:
        loss, load_LM = evaluate(self, batches, step, random_layer)
        return loss + step, load_LM

    TrunkRank.evaluate = worse  # type: ignore[method-assign]


def test_a_run_that_gets_worse_ends_and_does_not_go_on(tmp_path: Path) -> None:
    """With a checkpoint, a line that says why, and a status of which no launcher makes a restart."""
    lock = "lock={full_fraction: 0.1, stop_above: 0.5}"
    sets = [f"run.dir={tmp_path / 'run'}", lock, "train.steps=10", "eval.every=2", "probe.every=0"]
    recipe = load_recipe(str(write_recipe(tmp_path)), sets)
    assert recipe.lock
    for start in ("step 1/10", None):
        fault = Fault(TRUNK, Place("trainer.train.loop:Loop.run"), worse_with_every_step)
        job = ForkedJob(recipe, tmp_path, fault)
        assert job.end(TIME_LIMIT) == [DIVERGED, DIVERGED], job.log(0)
        log = job.log(0)
        assert "Traceback" not in log + job.log(1)
        assert ("step 1/10" in log) == (start is not None)
        assert re.search(r"^unipool: ended after step 4: two validation losses .* saved; .* Exit status 3$", log, re.M)
        assert [folder.name for folder in complete(tmp_path / "run" / "checkpoints")] == ["step_00000004"]
    record = read_ownership(tmp_path / "run")
    assert record and record.step == 1 and record == read_ownership(folder_of(tmp_path / "run" / "checkpoints", 4))
    lines = [loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val_loss" in line] == [1, 2, 4]
    assert [line["lock_stage"] for line in lines if "loss" in line] == [0, 2, 2, 2]


def test_a_finished_run_does_not_end_in_another_way_when_it_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss after the last step may exceed the limit: the run has had all its steps."""
    run = MagicMock(start=4, role=MagicMock(spec=PoolRank), saver=MagicMock(saved=4))
    run.recipe.train.steps = 4
    run.job.sum_over_ranks.return_value = (0.0,)
    monkeypatch.setattr(Loop, "_measure", lambda *_: True)
    assert Loop(run).run() == 0


def _rest(whole: Outcome, after: int) -> Outcome:
    """What a run that resumes after some steps still sees."""
    return replace(
        whole,
        scalars=whole.scalars[after:],
        gradients=whole.gradients[after:],
        val_losses=whole.val_losses[after - 1 :],
    )
