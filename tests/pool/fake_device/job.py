"""A step of training in a world: the product's own wire, service, lanes and schedules, with toys that compute.

Their arithmetic is launched on the devices of the world, so that it happens when its stream gets there. Its results
depend on the order of everything that is added up.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import pool.service
import pool.wire
import trainer.model.pool_client
from pool.counts import Counts
from pool.schedule import Kind
from pool.service import PoolService
from pool.wire.clock import StreamClock
from pool.wire.contract import DeviceGroups, PoolWire, WireGroups, WireSettings
from pool.wire.nccl import MAX_CTAS, NcclCommunicator, members, peers
from tests.pool.fake_device.communicators import FakeNccl, Meeting
from tests.pool.fake_device.devices import Device
from tests.pool.fake_device.gloo import FakeGloo, Mail
from tests.pool.fake_device.plans import Case
from tests.pool.fake_device.streams import FakeStreams, TimedEvent
from tests.pool.fake_device.threads import installed
from tests.pool.fake_device.world import Policy, World
from trainer.model.micro_batch import Request
from trainer.model.pool_client import RemotePool, SharedPool

D = 3
EXPERTS = 2
"""Experts of a shard."""
STEP = 5
LIMIT = 60.0
Run = Callable[..., None]


class OnDevice:
    """Memory and arithmetic of a rank whose payloads are on a device."""

    def __init__(self, device: Device):
        self.streams = FakeStreams(device)
        self.empty, self.kernel = self.streams.empty, device.kernel

    def read(self, tensor: Tensor) -> Tensor:
        """Wait for a tensor and return its values."""
        pinned = self.streams.to_host(tensor)
        self.streams.record().synchronize()
        return pinned.clone()


class OnHost:
    """Memory and arithmetic of a rank whose payloads are in host memory: they happen at once."""

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def kernel(self, name: str, run: Run, reads: Sequence[Tensor] = (), writes: Sequence[Tensor] = ()) -> None:
        run(*reads, *writes)

    def read(self, tensor: Tensor) -> Tensor:
        return tensor.clone()


class Server:
    """In the place of `ExpertServer`: experts that scale rows, and add up gradients of their scales in fp32."""

    def __init__(self, shard: Any):
        self._on, self._scales_e, self.gradients_e = shard.on, shard.scales_e, shard.gradients_e
        self._saved: dict[object, tuple[Tensor, Counts]] = {}

    def forward(
        self, keys: Sequence[object], batches: Sequence[tuple[Tensor, Counts]], keep_for_backward: bool
    ) -> list[Tensor]:
        if keep_for_backward:
            self._saved.update(zip(keys, batches, strict=True))
        return [self._launch("forward", _forward, (x_ND, counts.rows_e)) for x_ND, counts in batches]

    def backward(self, keys: Sequence[object], dys: list[Tensor]) -> list[Tensor]:
        saved = [self._saved.pop(key) for key in keys]
        return [
            self._launch("backward", _backward, (dy_ND, counts.rows_e, x_ND), (self.gradients_e,))
            for dy_ND, (x_ND, counts) in zip(dys, saved, strict=True)
        ]

    def counts(self, key: object) -> Counts | None:
        return self._saved[key][1] if key in self._saved else None

    @property
    def open_forwards(self) -> int:
        return len(self._saved)

    def _launch(self, name: str, run: Run, reads: tuple[Tensor, ...], changes: tuple[Tensor, ...] = ()) -> Tensor:
        answer_ND = self._on.empty(*reads[0].shape, dtype=reads[0].dtype)
        self._on.kernel(f"experts' {name}", run, (*reads, self._scales_e), (*changes, answer_ND))
        return answer_ND


class NothingDeferred:
    """In the place of `DeferredWeightGradients`: there is never anything to do."""

    peak_bytes = 0

    def __getattr__(self, name: str) -> Callable[..., bool]:
        return lambda *_: False


def _forward(x_ND: Tensor, rows_e: Tensor, scales_e: Tensor, y_ND: Tensor) -> None:
    torch.mul(x_ND, scales_e.repeat_interleave(rows_e)[:, None], out=y_ND)


def _backward(
    dy_ND: Tensor, rows_e: Tensor, x_ND: Tensor, scales_e: Tensor, gradients_e: Tensor, dx_ND: Tensor
) -> None:
    expert_N = torch.arange(len(rows_e)).repeat_interleave(rows_e)
    torch.mul(dy_ND, scales_e[expert_N][:, None], out=dx_ND)
    gradients_e.index_add_(0, expert_N, (x_ND * dy_ND).sum(1))


@dataclass
class Step:
    """A step to run in a world.

    Attributes:
        case: Its schedule.
        queues, sms, buffered, ctas: See `Device` and `FakeNccl`.
        connects: Whether communicators exchange a first message at the start.
        on_device: Whether payloads are on devices, or in host memory.
    """

    case: Case
    world: World
    queues: int = 32
    sms: int = 132
    buffered: bool = False
    ctas: int = MAX_CTAS
    connects: bool = True
    on_device: bool = True
    check: bool = False
    mail: Mail = field(init=False)
    devices: list[Device] = field(init=False)

    def __post_init__(self) -> None:
        self.topology, self.schedule = self.case.topology, self.case.schedule
        ranks = range(self.topology.world_size)
        self.mail, self._meeting = Mail(self.world), Meeting(self.world)
        self._lanes = [Mail(self.world) for _ in range(1 + max(map(max, self.schedule.lane_order)))]
        self.devices = [Device(self.world, rank, self.queues, self.sms, self.buffered) for rank in ranks]

    def run(self) -> dict[int, list[Tensor]]:
        """Run it to its end; return what each rank has computed.

        Raises:
            Exception: What the first rank that failed has raised.
        """
        actors = self.attempt()
        if self.world.errors:
            raise self.world.errors[0]
        return {actor.rank: actor.value for actor in actors}

    def attempt(self) -> list[Any]:
        """Run it until all ranks have ended in one way or another; return their threads."""
        roles = {rank: self._role(rank) for rank in range(len(self.devices))}
        wires = [module for name, module in sys.modules.items() if name.startswith("pool.wire")]
        modules = [*wires, pool.service, trainer.model.pool_client]
        with installed(*modules, ExpertServer=Server, clock_of=lambda device: StreamClock(TimedEvent)):
            before = set(threading.enumerate())
            actors = self.world.run({rank: lambda rank=rank, role=role: role(rank) for rank, role in roles.items()})
            assert before.issuperset(threading.enumerate()), (
                "the product has started a thread that is not of this world"
            )
            return actors

    def _settings(self, rank: int) -> WireSettings:
        place = torch.device("cuda" if self.on_device else "cpu")
        limit = timedelta(seconds=LIMIT)
        return WireSettings(self.topology, rank, EXPERTS, D, torch.float32, place, place, limit, self.check)

    def _groups(self, rank: int, on: OnDevice | OnHost) -> WireGroups:
        host = FakeGloo(self.mail, rank)
        if not isinstance(on, OnDevice):
            return WireGroups(host, [FakeGloo(mail, rank) for mail in self._lanes])
        t, device = self.topology, self.devices[rank]
        ranks = members(t, rank)
        names = (f"requests{ranks[0]}", f"answers{ranks[0]}") if t.replicas > 1 else ("requests", "answers")
        requests, answers = (
            NcclCommunicator(FakeNccl(device, name, self._meeting, self.ctas, ranks), ranks) for name in names
        )
        if self.connects:
            shards, trunks = peers(t, rank)
            requests.connect(on.streams, shards, trunks)
            answers.connect(on.streams, trunks, shards)
        return WireGroups(host, device=DeviceGroups(requests, answers, on.streams, self._lost))

    def _lost(self) -> str:
        return ", ".join(self.topology.describe(rank) for rank in sorted(self.world.dead_ranks))

    def _on(self, rank: int) -> OnDevice | OnHost:
        return OnDevice(self.devices[rank]) if self.on_device else OnHost()

    def _role(self, rank: int) -> Callable[[int], list[Tensor]]:
        if self.topology.every_rank:
            return self._both
        return self._trunk if self.topology.is_trunk(rank) else self._pool

    def _trunk(self, rank: int) -> list[Tensor]:
        on = self._on(rank)
        wire = pool.wire.trunk_wire(self._settings(rank), self._groups(rank, on))
        values = RemotePool(wire, rank).run(self._micro_batches(on, rank), self.schedule.lane_order[rank], STEP)
        wire.settle()
        return [on.read(value) for value in values]

    def _pool(self, rank: int) -> list[Tensor]:
        on = self._on(rank)
        wire = pool.wire.pool_wire(self._settings(rank), self._groups(rank, on))
        service, gradients_e = self._service(on, rank, wire)
        service.serve(self.schedule.slots, STEP)
        wire.settle()
        return [on.read(gradients_e)]

    def _both(self, rank: int) -> list[Tensor]:
        on = self._on(rank)
        trunk, wire = pool.wire.both_ends(self._settings(rank), self._groups(rank, on))
        service, gradients_e = self._service(on, rank, wire)
        client = SharedPool(trunk, rank, service)
        s = self.schedule
        values = client.run(self._micro_batches(on, rank), s.lane_order[rank], STEP, s.slots)
        return [on.read(value) for value in [*values, gradients_e]]

    def _service(self, on: OnDevice | OnHost, rank: int, wire: PoolWire) -> tuple[PoolService, Tensor]:
        scales_e = on.empty(EXPERTS, dtype=torch.float32)
        gradients_e = on.empty(EXPERTS, dtype=torch.float32)
        values = [1 + 0.1 * expert - 0.01 * self.topology.shard(rank) for expert in range(EXPERTS)]
        on.kernel("weights", lambda s, g: (s.copy_(torch.tensor(values)), g.zero_()), writes=[scales_e, gradients_e])
        shard = SimpleNamespace(
            on=on, scales_e=scales_e, gradients_e=gradients_e, expert_ids=range(EXPERTS), deferred_dw=NothingDeferred()
        )
        shard.w2_eDF = scales_e
        return PoolService(shard, wire, self.case.layers), gradients_e  # type: ignore[arg-type]

    def _micro_batches(self, on: OnDevice | OnHost, rank: int) -> Iterator[Generator[Request, Tensor, Tensor]]:
        return (self._micro_batch(on, rank, number) for number in range(self.case.micro_batches))

    def _micro_batch(self, on: OnDevice | OnHost, rank: int, number: int) -> Generator[Request, Tensor, Tensor]:
        """Forward and backward of a micro-batch, whose state is a row that every segment adds to."""
        state_D = on.empty(D, dtype=torch.float32)
        start = 1 + 0.3 * rank + 0.7 * number
        on.kernel("start", lambda s: s.fill_(start), writes=[state_D])
        steps = [(Kind.FORWARD, layer) for layer in range(self.case.layers)]
        steps += [(Kind.BACKWARD, layer) for layer in reversed(range(self.case.layers))]
        for kind, layer in steps:
            counts = self._counts(rank, number, layer)
            rows_ND = on.empty(sum(counts), D, dtype=torch.float32)
            counts_M = on.empty(len(counts), dtype=torch.int64)
            on.kernel(f"{kind.name} of layer {layer}", _segment(counts), [state_D], [counts_M, rows_ND])
            answer_ND = yield Request(kind, number, layer, rows_ND, counts_M)
            del rows_ND, counts_M
            on.kernel("combine", _combine, [answer_ND], [state_D])
            del answer_ND
        return state_D

    def _counts(self, rank: int, micro_batch: int, layer: int) -> list[int]:
        """Rows of each expert; some shards get none."""
        mixed = 5 * rank + 3 * micro_batch + 7 * layer
        empty = [(mixed + shard) % 4 == 0 for shard in range(self.topology.expert_parallel)]
        experts = range(EXPERTS * self.topology.expert_parallel)
        return [0 if empty[expert // EXPERTS] else (mixed + expert * expert) % 3 for expert in experts]


def _segment(counts: list[int]) -> Run:
    def run(state_D: Tensor, counts_M: Tensor, rows_ND: Tensor) -> None:
        counts_M.copy_(torch.tensor(counts))
        torch.add(state_D, torch.arange(len(rows_ND))[:, None], alpha=0.01, out=rows_ND)

    return run


def _combine(answer_ND: Tensor, state_D: Tensor) -> None:
    state_D.mul_(0.5).add_(answer_ND.mean(0) if len(answer_ND) else 0.1, alpha=0.4)


def step(case: Case, policy: Policy = "host", seed: int = 0, races: bool = False, **settings: Any) -> Step:
    """A step in a world of its own; see `World` and `Step`."""
    return Step(case, World(case.topology.world_size, policy, seed, races), **settings)


def equal(one: dict[int, list[Tensor]], other: dict[int, list[Tensor]]) -> bool:
    """Whether two steps have computed the same, bit for bit."""
    return one.keys() == other.keys() and all(
        len(one[rank]) == len(other[rank]) and all(map(torch.equal, one[rank], other[rank])) for rank in one
    )
