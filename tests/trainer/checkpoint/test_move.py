"""Experts move to other shards while a run goes on: no number changes, and a resume decides and computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from pool.placement import contiguous, more_even
from tests.training import assert_same, run_training, tiny
from trainer.checkpoint import reshard
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


def test_without_room_for_the_conversion_nothing_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On any rank: all go on with the experts where they are, and leave nothing on the disk."""

    def full(_: Path, work: Path, *rest: object, **named: object) -> None:
        work.mkdir()
        raise RuntimeError("unexpected pos 704 vs 598\nand where")

    monkeypatch.setattr(reshard, "convert", full)
    job, role = MagicMock(rank=0, **{"sum_over_ranks.return_value": [1.0]}), MagicMock()
    move_experts(job, MagicMock(checkpoints=tmp_path), role, contiguous(8, 1, 2), 2)
    assert not role.move_to.called and not list(tmp_path.iterdir())
    assert "No experts move" in capsys.readouterr().err
