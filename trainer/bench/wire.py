"""The wire between a trunk rank and a pool rank, measured in two processes of this machine with the trainer's own ends.

CPUs use gloo; one GPU too, with copies through the host; two GPUs use NCCL.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pool.schedule import Kind, RequestKey
from pool.wire import PoolWire, TrunkWire, WireSettings
from trainer.cluster.launch import free_port
from trainer.config.recipe import Recipe
from trainer.planning.hardware import Figure
from trainer.planning.model_costs import FP32

if TYPE_CHECKING:
    from trainer.cluster.process_groups import Job

SMALL, LARGE, BESIDE = 60, 12, 12
"""Requests of one row, large ones, and large ones with computing beside them; a quarter of each warms up."""
TIME_LIMIT = 120.0


@dataclass(frozen=True)
class WireFigures:
    """What was measured.

    Attributes:
        latency: seconds of a small request, one way: header and one row.
        bandwidth: bytes/s of large messages, one way.
        hidden: share of a large request's time and its answer's that goes by beside computing.
    """

    latency: float
    bandwidth: float
    hidden: float

    def beside(self, limit: str, bytes_a_second: float) -> list[Figure]:
        """The figures, with the bandwidth's share of a limit."""
        return [
            Figure("wire latency, one way", None, self.latency, "s", None, None),
            Figure("wire, one way", None, self.bandwidth, "bytes/s", self.bandwidth / bytes_a_second, limit),
            Figure("transfer hidden by computing", None, self.hidden, "of its time", self.hidden, "its time"),
        ]


def measure_wire(recipe: Recipe, device: torch.device, message_bytes: int) -> WireFigures:
    """Start a trunk rank and a pool rank and let them exchange requests and answers, in fp32.

    Raises:
        RuntimeError: a rank failed, or was not done in time; with the rank's traceback.
    """
    pair = _pair(recipe, device)
    environment = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "DS_ACCELERATOR": device.type}
    context = multiprocessing.get_context("spawn")
    port = free_port()
    ranks = []
    for rank in range(2):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_rank, args=(rank, port, environment, pair, message_bytes, theirs), daemon=True
        )
        process.start()
        theirs.close()
        ranks.append((process, ours))
    try:
        deadline = time.monotonic() + TIME_LIMIT
        figures, _ = (_result(rank, connection, deadline) for rank, (_, connection) in enumerate(ranks))
    finally:
        for process, _ in ranks:
            process.join(5.0)
            process.kill()
    return figures  # type: ignore[no-any-return]


def _pair(recipe: Recipe, device: torch.device) -> Recipe:
    """One trunk rank and one pool rank of the recipe's width, with one lane."""
    two_gpus = device.type == "cuda" and torch.cuda.device_count() > 1
    layout: dict[str, int | str] = {"trunk_ranks": 1, "pool_ranks": 1, "expert_parallel": 1, "lanes": 1}
    layout["wire"] = "auto" if two_gpus else "gloo"
    return recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update=layout)})


def _result(rank: int, connection: Any, deadline: float) -> Any:
    try:
        if not connection.poll(max(0.0, deadline - time.monotonic())):
            raise RuntimeError(f"bench: rank {rank} of the wire's pair was not done within {TIME_LIMIT:g} s")
        ok, value = connection.recv()
    except EOFError:
        raise RuntimeError(f"bench: rank {rank} of the wire's pair ended without a result") from None
    if not ok:
        raise RuntimeError(f"bench: rank {rank} of the wire's pair failed:\n{value}")
    return value


def _rank(rank: int, port: int, environment: dict[str, str], pair: Recipe, message_bytes: int, connection: Any) -> None:
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    from trainer.cluster.process_groups import Job
    from trainer.cluster.rendezvous import Launch, rendezvous

    try:
        job = Job(pair, rendezvous(pair, Launch(rank, 2, rank, 2, "127.0.0.1", port)), lanes=1)
        settings = _settings(pair, job)
        # Either end lives until the job is closed: with the pool's its last answer would be gone before it is sent.
        end: TrunkWire | PoolWire
        value = None
        if job.is_trunk:
            end = TrunkWire(settings, job.host_group, job.lane_groups)
            value = _Trunk(end).measure(message_bytes)
        else:
            end = PoolWire(settings, job.host_group, job.lane_groups)
            _serve(end)
        job.close()
        connection.send((True, value))
    except Exception:
        connection.send((False, traceback.format_exc()))


def _settings(pair: Recipe, job: Job) -> WireSettings:
    return WireSettings(
        topology=job.topology,
        rank=job.rank,
        num_local_experts=1,
        hidden=pair.model.hidden,
        dtype=torch.float32,
        device=job.device,
        payload_device=job.payload_device,
        timeout=job.timeout,
    )


_KEY = RequestKey(trunk_rank=0, lane=0, micro_batch=0, layer=0, kind=Kind.FORWARD_ONLY)


def _serve(wire: PoolWire) -> None:
    """The pool rank: give every request back as it came."""
    for step in range(SMALL + LARGE + BESIDE):
        ((rows_ND, counts),) = wire.receive([_KEY], step)
        wire.answer(_KEY, step, rows_ND, counts)


class _Trunk:
    """The trunk rank: ask, and take the time."""

    def __init__(self, wire: TrunkWire):
        self._wire = wire
        self._hidden, self._device = wire.settings.hidden, wire.settings.device
        self._step = 0

    def measure(self, message_bytes: int) -> WireFigures:
        small = self._round_trip(1, SMALL)
        rows = max(2, message_bytes // (FP32 * self._hidden))
        large = self._round_trip(rows, LARGE)
        products, alone = self._as_long_as(large)
        both = self._round_trip(rows, BESIDE, products)
        hidden = (large + alone - both) / min(large, alone)
        one_way = max(large - small, 0.1 * large) / 2
        return WireFigures(small / 2, FP32 * self._hidden * rows / one_way, min(1.0, max(0.0, hidden)))

    def _round_trip(self, rows: int, times: int, beside: Callable[[], None] = lambda: None) -> float:
        """Median seconds of a request and its answer, with some computing done while they are under way."""
        rows_ND = torch.ones(rows, self._hidden, device=self._device)
        taken = []
        for _ in range(times):
            self._synchronize()
            started = time.perf_counter()
            answer = self._wire.request(_KEY, self._step, rows_ND, torch.tensor([rows]))
            beside()
            answer.wait()
            self._synchronize()
            taken.append(time.perf_counter() - started)
            self._step += 1
        return statistics.median(taken[times // 4 :])

    def _as_long_as(self, seconds: float) -> tuple[Callable[[], None], float]:
        """Products that last about so long, and how long they last with nothing beside them."""
        a = torch.randn(256, 256, device=self._device)
        number = 1

        def products() -> None:
            for _ in range(number):
                torch.mm(a, a)

        while self._seconds(products) < seconds and number < 2**20:
            number *= 2
        return products, statistics.median(self._seconds(products) for _ in range(5))

    def _seconds(self, function: Callable[[], None]) -> float:
        self._synchronize()
        started = time.perf_counter()
        function()
        self._synchronize()
        return time.perf_counter() - started

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
