"""What ranks tell each other at a step's end: shares of time, memory, who is a straggler."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from tests.training import tiny
from trainer.telemetry.run_folder import RunFolder
from trainer.telemetry.time_breakdown import Usage
from trainer.train import reporter
from trainer.train.pool_rank import PoolRank
from trainer.train.reporter import Reporter
from trainer.train.trunk_rank import TrunkRank

COMPUTING = (1.0, 3.0, 1.0, 10.0, 20.0)
"""Seconds of three trunk and two pool ranks in a step."""
MEMORY = (5, 9, 7, 2, 4)


@pytest.fixture
def reporters(tmp_path: Path) -> list[Reporter]:
    """Of all ranks."""
    recipe = tiny(parallel={"trunk_ranks": 3, "pool_ranks": 2}, train={"global_batch": 6}, run={"dir": str(tmp_path)})
    found = []
    for rank, seconds in enumerate(COMPUTING):
        job = MagicMock(rank=rank, is_trunk=rank < 3, topology=recipe.grid, device=torch.device("cpu"))
        job.devices = SimpleNamespace(shared=False, names=["CPU"] * 5, summary="CPU")
        job.shared.gather.return_value = ["host:1"] * 5
        role = MagicMock(spec=TrunkRank if rank < 3 else PoolRank)
        role.ownership, role.metrics, role.monitors = None, MagicMock(), MagicMock()
        role.clock = SimpleNamespace(total=Usage(seconds, waiting=2.0), served=Usage())
        found.append(Reporter(recipe, job, RunFolder(recipe), role, 0, 1))
    return found


def test_every_rank_knows_how_it_compares_with_its_role(
    reporters: list[Reporter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From one sum of numbers over all ranks, which also has each role's time and each rank's memory."""
    usages = []
    for own, memory in zip(reporters, MEMORY, strict=True):
        monkeypatch.setattr(reporter, "peak_memory", lambda device, memory=memory: {"host": memory})
        usages.append(own.usage())
    total = [sum(numbers) for numbers in zip(*usages, strict=True)]
    assert total == [5.0, 6.0, 0.0, 0.0, 30.0, 4.0, 0.0, 0.0, *MEMORY, *COMPUTING]
    scalars = MagicMock(tokens_per_second=10.0, seconds=1.0, applied=True)
    scalars.flat.return_value, scalars.record.return_value = {}, {}
    scalars.console.return_value = ""
    for own in reporters:
        own.step(1, scalars if own._job.is_trunk else None, total)
    scores = [
        call.args[1]
        for own in reporters
        for call in own._role.metrics.set.call_args_list  # type: ignore[attr-defined]
        if call.args[0] == "unipool_straggler_score"
    ]
    assert scores == pytest.approx([1.0, 3.0, 1.0, 10 / 15, 20 / 15])
    shown = reporters[1]._role.monitors.write.call_args.args[0]  # type: ignore[attr-defined, union-attr]
    assert shown["train/trunk_memory"] == 9 and shown["train/pool_memory"] == 4
    assert shown["train/pool_waiting"] == pytest.approx(4 / 34)


def test_what_a_rank_tells_is_of_the_time_since_the_last_step(reporters: list[Reporter]) -> None:
    own = reporters[3]
    own.usage()
    own._role.clock.total = Usage(10.5, waiting=2.25)
    assert own.usage()[4:8] == [0.5, 0.25, 0.0, 0.0]
    assert own.usage()[-5:] == [0.0] * 5


def test_the_first_step_of_a_spike_is_reported_with_its_rows(
    reporters: list[Reporter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All trunk ranks tell their highest loss, and rank 0 reports the highest of these, once."""
    store: dict[str, str] = {}
    said: list[str] = []
    monkeypatch.setattr("trainer.telemetry.console.say", said.append)
    for own in reporters[:3]:
        job, role = own._job, own._role
        job.role_size = 3
        job.shared.put.side_effect = lambda key, text, rank=job.rank: store.update({f"{key}/{rank}": text})  # type: ignore[attr-defined]
        job.shared.get.side_effect = store.__getitem__  # type: ignore[attr-defined]
        losses = [(1.0, "rows 4"), (5.0 + job.rank, f"rows {job.rank}")]
        role.losses_by_rows.return_value = losses  # type: ignore[attr-defined, union-attr]
    for step, (loss, norm) in enumerate([(2.0, 1.0)] * 30 + [(6.0, 1.0), (6.0, 9.0), (2.0, 1.0), (9.0, 1.0)], 1):
        for own in reversed(reporters[:3]):
            own._look_for_spikes(step, {"loss": loss, "gradient norm": norm})
    assert [line[:41] for line in said if "spike" in line] == [
        "step 31: the loss has a spike: 6.0000, wh",
        "step 32: the gradient norm has a spike: 9",
        "step 34: the loss has a spike: 9.0000, wh",
    ]
    assert said[-1].endswith("the highest loss of a micro-batch is 7.0000 on rows 2")
    lines = [json.loads(line) for line in reporters[0]._folder.metrics_file.read_text().splitlines()]
    assert [(line["step"], line["spike"]["of"]) for line in lines] == [
        (31, "loss"),
        (32, "gradient norm"),
        (34, "loss"),
    ]
    assert lines[0]["spike"]["highest"] == {"loss": 7.0, "rows": "rows 2"} and lines[0]["spike"]["median"] == 2.0
