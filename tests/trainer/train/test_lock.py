"""UniPool-lock: layouts agree over its boundaries, runs resume there bit for bit, and a run that gets worse ends."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.training import Outcome, assert_same, run_training, tiny
from trainer.checkpoint.format import read_ownership

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
    own_LM = [[owner == layer for owner in found.owners] for layer in range(3)]
    assert [bool(n) for row in found.load_LM.tolist() for n in row] <= [own for row in own_LM for own in row]


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


def _rest(whole: Outcome, after: int) -> Outcome:
    """What a run that resumes after some steps still sees."""
    from dataclasses import replace

    return replace(
        whole,
        scalars=whole.scalars[after:],
        gradients=whole.gradients[after:],
        val_losses=whole.val_losses[after - 1 :],
    )
