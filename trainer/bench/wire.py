"""The wire between a trunk rank and a pool rank, measured in two processes of this machine with the trainer's own ends.

CPUs use gloo, and so does a single GPU, which copies through the host; two GPUs use NCCL.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import multiprocessing

from pool.placement import contiguous
from pool.schedule import Kind, RequestKey
from pool.wire import PoolWire, TrunkWire, pool_wire, trunk_wire
from trainer.cluster.launch import free_port
from trainer.common.gpus import load_kernels_at_start, use_many_queues
from trainer.config.recipe import Recipe
from trainer.planning.model_costs import FP32

if TYPE_CHECKING:
    from multiprocessing.queues import SimpleQueue

SMALL, LARGE, BESIDE = 60, 12, 12
"""Numbers of requests: of one row, large ones, and large ones during computation; a quarter of each is a warm-up."""
TIME_LIMIT = 120.0
_KEY = RequestKey(trunk_rank=0, lane=0, micro_batch=0, layer=0, kind=Kind.FORWARD_ONLY)


@dataclass(frozen=True)
class WireFigures:
    """What was measured.

    Attributes:
        latency: Seconds that a small request, a header and one row, takes one way.
        bandwidth: Bytes/s of large messages, one way.
        hidden: Share of the time of a large request and its answer that overlaps with computation.
    """

    latency: float
    bandwidth: float
    hidden: float


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Run a function, and return how many seconds it and its work on the device took."""
    synchronize(device)
    started = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - started


def measure_wire(recipe: Recipe, device: torch.device, message_bytes: int) -> WireFigures:
    """Start a trunk rank and a pool rank that exchange rows of the recipe's width in fp32.

    Raises:
        ProcessRaisedException: A rank failed; the message has its traceback.
        RuntimeError: The ranks were not done in time.
    """
    environment = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "DS_ACCELERATOR": device.type}
    figures: SimpleQueue[WireFigures] = multiprocessing.get_context("spawn").SimpleQueue()
    arguments = (free_port(), environment, _pair(recipe, device), message_bytes, figures)
    ranks = multiprocessing.spawn(_rank, arguments, nprocs=2, join=False, daemon=True)
    deadline = time.monotonic() + TIME_LIMIT
    try:
        while not ranks.join(max(0.0, deadline - time.monotonic())):
            if time.monotonic() > deadline:
                raise RuntimeError(f"bench: the two ranks that measure the wire were not done within {TIME_LIMIT:g} s")
    finally:
        for process in ranks.processes:
            process.kill()
    return figures.get()


def _pair(recipe: Recipe, device: torch.device) -> Recipe:
    """The recipe in fp32 with one trunk rank, one pool rank and one lane."""
    two_gpus = device.type == "cuda" and torch.cuda.device_count() > 1
    layout: dict[str, int | str] = {"trunk_ranks": 1, "pool_ranks": 1, "expert_parallel": 1, "lanes": 1}
    layout |= {"wire": "auto" if two_gpus else "gloo", "device": device.type, "check": False}
    return recipe.changed("train", precision="fp32").changed("parallel", **layout)


def _rank(
    rank: int,
    port: int,
    environment: dict[str, str],
    pair: Recipe,
    message_bytes: int,
    figures: SimpleQueue[WireFigures],
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    from trainer.cluster.process_groups import Job
    from trainer.cluster.rendezvous import Launch, rendezvous
    from trainer.engine.experts import wire_settings

    load_kernels_at_start()
    use_many_queues()
    job = Job(pair, rendezvous(pair, Launch(rank, 2, rank, 2, "127.0.0.1", port)), lanes=1)
    settings = wire_settings(pair, job, contiguous(1, 1, 1))
    # Either end must live until the job is closed, or the pool's last answer could be lost before it is sent.
    end: TrunkWire | PoolWire
    if job.is_trunk:
        end = trunk_wire(settings, job.wire_groups)
        figures.put(_Trunk(end).measure(message_bytes))
    else:
        end = pool_wire(settings, job.wire_groups)
        for step in range(SMALL + LARGE + BESIDE):
            ((rows_ND, counts),) = end.receive([_KEY], step).ready()
            end.answer([_KEY], step, [rows_ND], [counts.listed])  # every request is answered with its own rows
    end.settle()
    job.close()


class _Trunk:
    """The trunk rank, which sends requests and measures the time until the answer."""

    def __init__(self, wire: TrunkWire):
        self._wire = wire
        self._hidden, self._device = wire.settings.hidden, wire.settings.device
        self._step = 0

    def measure(self, message_bytes: int) -> WireFigures:
        small = self._round_trip(1, SMALL)
        rows = max(2, message_bytes // (FP32 * self._hidden))
        large = self._round_trip(rows, LARGE)
        products, alone = self._products_of(large)
        both = self._round_trip(rows, BESIDE, products)
        hidden = (large + alone - both) / min(large, alone)
        one_way = max(large - small, 0.1 * large) / 2
        return WireFigures(small / 2, FP32 * self._hidden * rows / one_way, min(1.0, max(0.0, hidden)))

    def _round_trip(self, rows: int, times: int, beside: Callable[[], None] = lambda: None) -> float:
        """Median seconds of a request and its answer, during which `beside` runs."""
        rows_ND = torch.ones(rows, self._hidden, device=self._device)
        rows_e = torch.tensor([rows], device=self._device)

        def request() -> None:
            answer = self._wire.request(_KEY, self._step, rows_ND, rows_e)
            beside()
            answer.wait()
            self._step += 1

        return statistics.median([timed(request, self._device) for _ in range(times)][times // 4 :])

    def _products_of(self, seconds: float) -> tuple[Callable[[], None], float]:
        """Matrix products that take at least `seconds`, and the time that they take alone."""
        a = torch.randn(256, 256, device=self._device)
        number = 1

        def products() -> None:
            for _ in range(number):
                torch.mm(a, a)

        while timed(products, self._device) < seconds and number < 2**20:
            number *= 2
        return products, statistics.median(timed(products, self._device) for _ in range(5))
