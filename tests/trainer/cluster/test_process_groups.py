"""The groups that join the roles: waits inside a step have a short limit, those outside a long one."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from queue import Queue
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist

from pool.placement import contiguous
from pool.schedule import Kind, RequestKey
from pool.wire import both_ends, pool_wire, trunk_wire
from pool.wire.nccl import MAX_CTAS
from tests.distributed import join, run_ranks
from tests.pool.host_streams import HostStreams, HostWork
from tests.training import tiny
from trainer.cluster.process_groups import Job, add_up
from trainer.config.recipe import Recipe
from trainer.engine.experts import wire_settings
from trainer.planning.network.step_end import rounds_of_a_sum
from trainer.planning.schedule import make_schedule


def test_only_a_step_s_waits_have_its_limit() -> None:
    """Neither the forming of the groups nor a barrier has it."""
    first, second = run_ranks(2, _late, tiny(parallel={"pool_ranks": 1, "timeout_seconds": STEP_LIMIT}))
    assert (first, second) == ("Timed out", "")


STEP_LIMIT = 8.0


def _late(recipe: Recipe) -> str:
    """Rank 1 comes late, by more than the step's time limit, to the groups and to a barrier, and to no sum."""
    from trainer.cluster.process_groups import Job
    from trainer.cluster.rendezvous import read_launch, rendezvous

    member, said = rendezvous(recipe, read_launch()), ""
    if member.rank == 1:
        time.sleep(STEP_LIMIT + 1)
    job = Job(recipe, member, make_schedule(recipe).lanes)
    if job.rank == 1:
        time.sleep(STEP_LIMIT + 1)
    job.barrier()
    if job.rank == 0:
        with pytest.raises(RuntimeError) as error:
            job.sum_over_ranks([1.0])
        said = "Timed out" if "Timed out" in str(error.value) else str(error.value)
    job.shared.broadcast("rank 0 has given up", str)
    if job.rank == 0:  # which hosts the store
        job.shared.get("heard")
    else:
        job.shared.set("heard", "")
    return said


def test_a_group_of_deepspeeds_waits_as_long_as_a_start() -> None:
    """It is made without a time limit, and torch's own is half an hour."""
    (said, _) = run_ranks(2, _alone, tiny(parallel={"trunk_ranks": 2, "pool_ranks": 0}))
    assert "timeout" in said.lower() or "timed out" in said.lower()


def _alone(recipe: Recipe) -> str:
    """Rank 1 does not come to a new group of its role."""
    job = join(recipe)
    if job.rank == 1:
        return ""
    job.timeout, job.start_timeout = timedelta(seconds=1), timedelta(seconds=2)  # only now: both ranks are there
    job._limit_groups_of_others()
    with pytest.raises(RuntimeError) as error:
        dist.new_group([0, 1])
    return str(error.value)


def test_a_group_of_deepspeeds_waits_no_less_than_a_step() -> None:
    """On a GPU its limit stays; and the backend's name there is not NCCL's, for which torch has another default."""
    alone = {"pool_ranks": 0, "timeout_seconds": 50.0, "start_timeout_seconds": 40.0}
    assert run_ranks(1, _limits, tiny(parallel=alone)) == [(50.0, 50.0)]


def _limits(recipe: Recipe) -> tuple[float, float]:
    join(recipe)
    group = dist.new_group([0])._get_backend(torch.device("cpu"))
    with_a_gpu = dist.distributed_c10d._get_default_timeout(dist.Backend("cpu:gloo,cuda:nccl"))
    return group.options._timeout.total_seconds(), with_a_gpu.total_seconds()


class Backend:
    """In the place of one of torch's."""

    def __init__(self, name: str):
        self.name, self.limit = lambda: name, timedelta(minutes=30)

    def _set_default_timeout(self, limit: timedelta) -> None:
        self.limit = limit


def test_limits_of_torch_s_groups_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs a reduction whose peer has stopped would otherwise hang for as long as a start may take."""
    gloo, on_host, nccl = Backend("gloo"), Backend("gloo"), Backend("nccl")
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    groups = [
        SimpleNamespace(_device_types=list(backends), _get_backend=backends.__getitem__)
        for backends in ({cpu: gloo, gpu: gloo}, {cpu: on_host, gpu: nccl})
    ]
    monkeypatch.setattr(dist.distributed_c10d, "_world", SimpleNamespace(pg_map=groups))
    arrived: list[timedelta | None] = []
    liveness = SimpleNamespace(arrive=arrived.append)
    job: Any = SimpleNamespace(timeout=timedelta(seconds=60), liveness=liveness, _patience=None)
    Job.reducing(job)
    Job.limit_waits(job)
    Job.reducing(job)
    assert arrived == [None, timedelta(seconds=120)]
    assert [backend.limit.total_seconds() for backend in (gloo, on_host, nccl)] == [60, 60, 300]


def test_limits_of_gloo_in_a_step() -> None:
    """The same with torch's own groups."""
    assert run_ranks(1, _limits_in_a_step, tiny(parallel={"pool_ranks": 0, "timeout_seconds": 50.0})) == [[50.0] * 2]


def _limits_in_a_step(recipe: Recipe) -> list[float]:
    job, cpu = join(recipe), torch.device("cpu")
    dist.new_group([0], timeout=timedelta(seconds=70))
    job.limit_waits()
    assert job._patience is None
    return [group._get_backend(cpu).options._timeout.total_seconds() for group in dist.distributed_c10d._world.pg_map]


class Mailboxes:
    """In the place of a group of gloo: ranks are threads, and what they send is noted."""

    def __init__(self, ranks: int):
        self.ranks, self.hops = ranks, [0] * ranks  # the longest chain of messages up to now, by rank
        self._box = {(source, to): Queue[Any]() for source in range(ranks) for to in range(ranks)}

    def of(self, rank: int) -> Any:
        def send(tensors: list[torch.Tensor], peer: int, tag: int) -> Any:
            self._box[rank, peer].put((tensors[0].clone(), self.hops[rank] + 1))
            return SimpleNamespace(wait=lambda limit: None)

        def receive(tensors: list[torch.Tensor], peer: int, tag: int) -> Any:
            def wait(limit: timedelta) -> None:
                values, hops = self._box[peer, rank].get(timeout=limit.total_seconds())
                tensors[0].copy_(values)
                self.hops[rank] = max(self.hops[rank], hops)

            return SimpleNamespace(wait=wait)

        return SimpleNamespace(rank=lambda: rank, size=lambda: self.ranks, send=send, recv=receive)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 6, 7, 8, 13, 64, 67])
def test_sums_take_few_rounds(ranks: int) -> None:
    """All ranks get the same bits, after at most as many messages in a row as the planner counts."""
    boxes, generator = Mailboxes(ranks), torch.Generator().manual_seed(ranks)
    own = torch.randn(ranks, 5, dtype=torch.float64, generator=generator)
    values = [row.clone() for row in own]
    limit = timedelta(seconds=30)
    with ThreadPoolExecutor(ranks) as pool:
        list(pool.map(lambda rank: add_up(boxes.of(rank), values[rank], limit), range(ranks)))
    assert all(row.equal(values[0]) for row in values)
    torch.testing.assert_close(values[0], own.sum(0), rtol=1e-13, atol=1e-13)
    rounds = rounds_of_a_sum(ranks)
    assert max(boxes.hops) == rounds if ranks in (1, 2, 4, 8, 64) else rounds - 1 <= max(boxes.hops) <= rounds


def test_sums_over_gloo() -> None:
    """Over all ranks, and over those of the role."""
    for summed, over_role in run_ranks(3, _sums, tiny(parallel={"trunk_ranks": 2, "pool_ranks": 1})):
        assert summed == [6.0, 0.75]
        assert over_role in ([3.0, 8.0], [3.0, 4.0])


def _sums(recipe: Recipe) -> tuple[list[float], list[float]]:
    job = join(recipe)
    values = torch.tensor([float(job.rank + 1), 4.0])
    job.sum_over_role(values)
    return job.sum_over_ranks([job.rank + 1, 0.25]), values.tolist()


class Nccl:
    """In the place of `ProcessGroupNCCL`: gloo, with a note of how it is used."""

    made: ClassVar[list[Nccl]] = []

    class Options(SimpleNamespace):
        def __init__(self, is_high_priority_stream: bool):
            super().__init__(is_high_priority_stream=is_high_priority_stream, config=SimpleNamespace())

    def __init__(self, store: Any, rank: int, size: int, options: Any):
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=60))
        self._works: list[Any] = []
        self.options, self.log = options, ["made"]
        Nccl.made.append(self)

    def eager_connect_single_device(self, device: torch.device) -> None:
        self.log.append(f"connected {device}")

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> None:
        self._works.append(self._gloo.send(tensors, peer, tag))
        self.log.append(f"send to {peer}")

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> None:
        self._works.append(self._gloo.recv(tensors, peer, tag))
        self.log.append(f"receive from {peer}")

    def _start_coalescing(self) -> None:
        self._works = []

    def _end_coalescing(self) -> Any:
        work = HostWork(self._works)
        return SimpleNamespace(wait=work.wait, synchronize=work.wait, is_completed=work.is_completed)

    def abort(self) -> None:
        self.log.append("aborted")


def _join_on_gpus(recipe: Recipe) -> Any:
    """Join a job whose ranks would have GPUs."""
    from trainer.cluster import process_groups
    from trainer.cluster.rendezvous import read_launch, rendezvous

    dist.ProcessGroupNCCL, process_groups.CudaStreams = Nccl, lambda device: HostStreams()  # type: ignore
    member = replace(rendezvous(recipe, read_launch()), payload_device=torch.device("cuda", 3))
    return process_groups.Job(recipe, member, lanes=2)


def _on_gpus(recipe: Recipe) -> Any:
    """A request and its answer, and how NCCL is used."""
    job = _join_on_gpus(recipe)
    ends = wire_settings(recipe, job, contiguous(8, 1, 2))
    key = RequestKey(0, 1, 0, 2, Kind.FORWARD)
    same = None
    if job.is_trunk:
        trunk = trunk_wire(ends, job.wire_groups)
        rows_ND = torch.randn(6, ends.hidden)
        same = trunk.request(key, 0, rows_ND, torch.tensor([1, 0, 2, 0, 0, 3, 0, 0])).wait().equal(rows_ND)
        trunk.settle()
    else:
        pool = pool_wire(ends, job.wire_groups)
        ((rows, counts),) = pool.receive([key], 0).ready()
        pool.answer([key], 0, [rows], [counts.listed])
        pool.settle()
    job.close()
    limits = [(g.options.config.max_ctas, g.options.is_high_priority_stream, g.options._timeout) for g in Nccl.made]
    return same, limits, [g.log for g in Nccl.made]


def _exchange_on_gpus(recipe: Recipe) -> Any:
    """The same where every rank has both roles: each makes a request and serves those of its group."""
    job = _join_on_gpus(recipe)
    ends = wire_settings(recipe, job, contiguous(8, 1, 2))
    trunk, pool = both_ends(ends, job.wire_groups)
    keys = [RequestKey(rank, 0, 0, 2, Kind.FORWARD) for rank in job.topology.served_trunk_ranks(job.rank)]
    arrived = pool.receive(keys, 0)
    rows_ND = torch.randn(6, ends.hidden)
    counts_M = torch.tensor([1, 0, 2, 0, 0, 3, 0, 0])
    (own,) = [key for key in keys if key.trunk_rank == job.rank]
    answer = trunk.request(own, 0, rows_ND, counts_M)
    rows, counts = zip(*arrived.ready(), strict=True)
    pool.answer(keys, 0, rows, [served.listed for served in counts])
    same = answer.wait().equal(rows_ND)
    trunk.settle()
    job.close()
    traffic = trunk.bytes_sent, trunk.bytes_received, pool.bytes_sent, pool.bytes_received
    return same, traffic, [g.log for g in Nccl.made]


def test_the_wire_of_gpus_with_both_roles() -> None:
    """Communicators join the ranks of a replica, by their ranks there; what a rank sends to itself does not travel."""
    grid = {"layout": "every_rank", "trunk_ranks": 4, "pool_ranks": 0, "expert_parallel": 2, "timeout_seconds": 20.0}
    recipe = tiny(parallel=grid)
    row = 4 * recipe.model.hidden  # bytes
    header = 8 * (5 + 4)
    for rank, (same, traffic, logs) in enumerate(run_ranks(4, _exchange_on_gpus, recipe)):
        assert same
        own, other = 3, 3  # rows for each of the two shards
        assert traffic == (other * row + header, other * row + header, own * row + header, own * row + header)
        peer = 1 - rank % 2
        step = [f"send to {peer}", f"receive from {peer}"]
        assert logs == [["made", "connected cuda:3", *step, *step, "aborted"]] * 2


def test_the_wire_of_gpus() -> None:
    """Both communicators are connected, rank by rank, before the first header; they leave the wire its limit."""
    ranks = run_ranks(3, _on_gpus, tiny(parallel={"pool_ranks": 2, "expert_parallel": 2, "timeout_seconds": 20.0}))
    for _, limits, _ in ranks:
        assert limits == [(MAX_CTAS, True, timedelta(seconds=100))] * 2
    (same, _, (requests, answers)), *shards = ranks
    assert same
    start = ["made", "connected cuda:3"]
    sends, receives = ["send to 1", "send to 2"], ["receive from 1", "receive from 2"]
    assert requests == [*start, *sends, *sends, "aborted"]
    assert answers == [*start, *receives, *receives, "aborted"]
    for _, _, (requests, answers) in shards:
        assert requests == [*start, "receive from 0", "receive from 0", "aborted"]
        assert answers == [*start, "send to 0", "send to 0", "aborted"]
