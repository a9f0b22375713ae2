"""Ranks that talk over the wire, for its tests: their groups, and the requests of a small step.

Every job makes its groups as `trainer.cluster.process_groups.Job` does: gloo by hand over one TCPStore.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pool.placement import Placement, contiguous
from pool.schedule import Kind, RequestKey, Slot
from pool.service import PoolService
from pool.shard import ExpertShard
from pool.topology import Topology
from pool.wire import DeviceGroups, PoolWire, WireError, WireGroups, WireSettings
from tests.pool.host_streams import HostCommunicator, HostStreams

M, D, F, L = 6, 5, 7, 2
MICRO_BATCHES = 2
STEP = 7
LONG = 60.0
GROUP = 600.0
"""Limit of the groups themselves, longer than a job may last: a wait that forgets the wire's own limit fails."""


def connect() -> dist.Store:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    size = int(os.environ["WORLD_SIZE"])
    return dist.TCPStore(host, port, size, is_master=my_rank() == 0, timeout=timedelta(seconds=LONG))


def my_rank() -> int:
    return int(os.environ["RANK"])


def barrier(store: dist.Store, name: str) -> None:
    """Every rank leaves when every rank has come; rank 0, which hosts the store and may end then, leaves last."""
    for phase in ("come", "gone"):
        store.set(f"{name}/{phase}/{my_rank()}", "")
        if phase == "come" or my_rank() == 0:
            store.wait([f"{name}/{phase}/{rank}" for rank in range(int(os.environ["WORLD_SIZE"]))])


def groups(store: dist.Store, name: str, topology: Topology, lanes: int, on_device: bool = False) -> WireGroups:
    """Groups of its own for every `name`: an error of gloo takes a group's connections with it."""

    def group(which: str) -> Any:
        prefix = dist.PrefixStore(f"{name}/{which}", store)
        return dist.ProcessGroupGloo(prefix, my_rank(), topology.world_size, timedelta(seconds=GROUP))

    if on_device:
        requests, answers = (HostCommunicator(group(which)) for which in ("requests", "answers"))
        return WireGroups(group("host"), device=DeviceGroups(requests, answers, HostStreams(), lambda: ""))
    return WireGroups(group("host"), [group(f"lane{lane}") for lane in range(lanes)])


def settings(topology: Topology, dtype: torch.dtype, timeout: float) -> WireSettings:
    cpu = torch.device("cpu")
    local = M // topology.expert_parallel
    return WireSettings(topology, my_rank(), local, D, dtype, cpu, cpu, timedelta(seconds=timeout))


def make_shard(expert_ids: tuple[int, ...], dtype: torch.dtype = torch.float32) -> ExpertShard:
    shard = ExpertShard(expert_ids, D, F, dtype)
    shard.reset_parameters(0.5, 0.4, seed=3)
    return shard


def placement_of(topology: Topology) -> Placement:
    return contiguous(M, 1, topology.expert_parallel)


def make_service(topology: Topology, wire: PoolWire, dtype: torch.dtype = torch.float32) -> PoolService:
    shard = make_shard(placement_of(topology).experts_of(topology.shard(my_rank())), dtype)
    return PoolService(shard, wire, L)


def counts_of(key: RequestKey) -> Tensor:
    """Tokens of each expert. Trunk rank 0 leaves the second half of the pool without any in layer 0, all of it in
    micro-batch 1; every other request is random."""
    if key.trunk_rank == 0 and key.layer == 0:
        return torch.tensor([[2, 0, 3, 0, 0, 0], [0, 0, 0, 0, 0, 0]][key.micro_batch % 2])
    if key.trunk_rank == 1 and key.layer == 1:
        return torch.tensor([0, 0, 0, 0, 5, 0])
    seed = 100 * key.trunk_rank + 10 * key.micro_batch + key.layer
    return torch.randint(0, 4, (M,), generator=torch.Generator().manual_seed(seed))


def rows_of(key: RequestKey, dtype: torch.dtype) -> Tensor:
    seed = 1000 * key.trunk_rank + 100 * key.micro_batch + 10 * key.layer + key.kind
    rows = int(counts_of(key).sum())
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


Keys = tuple[RequestKey, ...]


def train_plan(trunk_ranks: int, lanes: int) -> Iterator[Keys]:
    """The requests of each slot of a step, in lock step; with two lanes the two micro-batches side by side."""
    for first in range(0, MICRO_BATCHES, lanes):
        for kind, layers in ((Kind.FORWARD, range(L)), (Kind.BACKWARD, reversed(range(L)))):
            for layer in layers:
                yield tuple(
                    RequestKey(t, lane, first + lane, layer, kind) for t in range(trunk_ranks) for lane in range(lanes)
                )


def evaluation_plan(trunk_ranks: int) -> Iterator[Keys]:
    for layer in range(L):
        yield tuple(RequestKey(t, 0, 0, layer, Kind.FORWARD_ONLY) for t in range(trunk_ranks))


def slots(plan: Iterable[Keys]) -> Iterator[Slot]:
    """`plan` as the service takes it."""
    return iter(plan)


def error_of(wait: Callable[[], object]) -> str:
    try:
        wait()
    except WireError as error:
        return str(error)
    return "no error"
