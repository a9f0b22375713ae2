"""What heartbeats tell about ranks that are alive."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from unittest.mock import MagicMock

import pytest
import torch.distributed as dist

from tests.distributed import TIME_LIMIT
from trainer.cluster import fault_watch, liveness
from trainer.cluster.devices import Sight
from trainer.cluster.fault_watch import FaultWatch
from trainer.cluster.liveness import SOMEBODY_IS_LATE, Arrival, Liveness, PeerLost


def test_a_rank_that_others_wait_for_is_late() -> None:
    """It has come to fewer meetings; a rank that waits is not late itself, and whoever has arrived no longer is."""
    store = dist.HashStore()
    ranks = [Liveness(rank, ["trunk", "pool"], store, store) for rank in range(2)]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda rank: rank.exchange_arrivals(Arrival("", "", Sight("host", 0))), ranks))
    assert [rank.late() for rank in ranks] == [[], []]
    ranks[0].arrive()
    assert [rank.late() for rank in ranks] == [[1], []]
    ranks[1].arrive()
    deadline = time.monotonic() + TIME_LIMIT
    while ranks[0].late():  # until the next heartbeat
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for rank in ranks:
        rank.stop()


def two_ranks() -> Liveness:
    """Rank 0's, whose own heartbeat does not run either."""
    store = dist.HashStore()
    for rank in range(2):
        store.set(str(rank), "5 0")
    return Liveness(0, ["trunk", "pool"], store, store)


def test_a_rank_is_overdue_until_it_comes_to_another_meeting() -> None:
    rank = two_ranks()
    assert not rank.overdue
    rank.arrive(timedelta(seconds=-1))
    assert rank.overdue
    rank.arrive(timedelta(hours=1))
    assert not rank.overdue
    rank.arrive(timedelta(seconds=-1))
    rank.arrive()
    assert not rank.overdue


def test_a_rank_that_ends_once_all_have_met_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that finds a user's mistake in what all have told, while another has not yet read its last answer."""
    ranks, answered = two_ranks(), threading.Event()
    monkeypatch.setattr(ranks, "dead", lambda: [1] if answered.set() is None else [])
    monkeypatch.setattr(liveness, "_LAST_WORDS_SECONDS", 60.0)
    assert ranks.meet(lambda: answered.wait(60), timedelta(seconds=60))


def test_a_rank_that_asks_who_is_silent_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread for the heartbeat may have been as late as it was itself."""
    monkeypatch.setattr(liveness, "BEAT_SECONDS", 0.01)
    assert two_ranks()._without_heartbeat() == [1]


@pytest.mark.parametrize(
    "silent, late, said",
    [([1], [1, 2], "trunk 1 does not respond"), ([], [2], "trunk 2 has not reached this point")],
)
def test_a_rank_that_waits_too_long_for_a_gpu_says_for_whom(
    silent: list[int], late: list[int], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its main thread waits for NCCL, without a limit. As long as nobody is missing, it goes on."""
    watch = FaultWatch.__new__(FaultWatch)  # its constructor takes over signals
    watch.name, watch.phase, watch._leaving, watch._launchers = "rank 0 (trunk 0)", "the step", False, []
    answers = iter([[], late])
    watch._liveness = MagicMock(
        overdue=True,
        silent=lambda: silent,
        late=lambda: next(answers),
        describe=lambda ranks: " and ".join(f"trunk {rank}" for rank in ranks),
    )
    monkeypatch.setattr(fault_watch.os, "_exit", MagicMock(side_effect=SystemExit))
    read_end, write_end = os.pipe()
    with pytest.raises(SystemExit):
        watch._watch(read_end)
    os.close(read_end)
    os.close(write_end)
    assert capsys.readouterr().err == f"unipool: rank 0 (trunk 0) stopped during the step: {said}\n"
    assert fault_watch.os._exit.call_args.args == (1,)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "error, said",
    [
        (RuntimeError("wait timeout after 60000ms"), f"({SOMEBODY_IS_LATE})"),
        (PeerLost("rank 2 (pool 0, shard 0) has not joined: waited for 60 s (timed out)"), "for 60 s (timed out)"),
        (RuntimeError("shape mismatch"), "RuntimeError: shape mismatch"),
        (OSError("the read operation timed out"), "OSError: the read operation timed out"),
    ],
)
def test_a_time_limit_whose_cause_is_unknown_is_explained(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every rank is alive and has come to as many meetings."""
    watch = FaultWatch.__new__(FaultWatch)  # its constructor takes over signals
    watch.name, watch.phase, watch._leaving = "rank 1 (trunk 1)", "start-up", False
    watch._liveness = MagicMock(dead=list, silent=list, late=list, describe=lambda ranks: "")
    monkeypatch.setattr(fault_watch, "_COURTESY_SECONDS", 0.0)
    monkeypatch.setattr(fault_watch.os, "_exit", MagicMock(side_effect=SystemExit))
    with pytest.raises(SystemExit):
        watch.fail(error)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("unipool: rank 1 (trunk 1) failed during start-up: ") and last.endswith(said)
