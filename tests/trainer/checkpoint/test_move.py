"""Experts move to other shards while a run goes on: no number changes, and a resume decides and computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pool.placement import contiguous, more_even
from tests.training import assert_same, run_training, tiny
from trainer.checkpoint.format import newest, read_load, read_placement
from trainer.checkpoint.reshard import move_experts

pytestmark = pytest.mark.slow

LAYOUTS: dict[str, dict[str, Any]] = {
    "replicas": {"trunk_ranks": 2, "pool_ranks": 4, "expert_parallel": 2, "pool_zero": 2, "check": True},
    "every rank": {"layout": "every_rank", "trunk_ranks": 2, "pool_zero": 0},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_move_changes_no_number(layout: str, tmp_path: Path) -> None:
    uneven: dict[str, Any] = {"router": {"top_k": 1}, "balance": {"pool": 0.0}}
    moves = tiny(pool={"placement": "auto"}, parallel=LAYOUTS[layout], **uneven)
    moved = run_training(moves, save_to=tmp_path, save_after=2)
    found = newest(tmp_path)
    assert found
    before = read_placement(found[1])
    assert before and more_even(torch.from_numpy(read_load(found[1])), before) != before, "nothing has moved"
    assert_same(run_training(tiny(**uneven)), moved)
    resumed = run_training(moves, resume_from=tmp_path)
    assert resumed.scalars == moved.scalars[2:]
    for name, weight in moved.weights.items():
        assert weight.equal(resumed.weights[name]), name


class Stub:
    """Stands for a job, a saver whose save has failed, and a role that must not move."""

    def finish(self) -> bool:
        return False


def test_without_a_checkpoint_nothing_moves() -> None:
    stub: Any = Stub()
    move_experts(stub, stub, stub, contiguous(8, 1, 2), 2)  # would need attributes that it has not
