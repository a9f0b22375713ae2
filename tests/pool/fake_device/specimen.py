"""How payloads travelled before `pool.wire.device`: a specimen whose deadlocks the fake must see.

Each pair of ranks has a communicator per lane, on a stream of its own for both directions. A trunk rank launches the
receives of an answer together with the sends of its request, so that they hold SMs until the pool has computed. A
pool rank's thread receives slots in the schedule's order and waits for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pool.schedule import Kind, PoolSchedule, RequestKey
from pool.topology import Topology
from tests.pool.fake_device.communicators import CTAS, FakeWork, Meeting, group
from tests.pool.fake_device.devices import Device, Part, Stream
from tests.pool.fake_device.gloo import FakeGloo, Mail
from tests.pool.fake_device.streams import FakeEvent, FakeStreams
from tests.pool.fake_device.threads import Executor
from tests.pool.fake_device.world import Policy, World


class Pairs:
    """A process group of NCCL with a communicator for each pair of ranks, made when it is first used."""

    def __init__(self, device: Device, lane: int, meeting: Meeting | None, host_waits: bool):
        self._device, self._name, self._meeting = device, f"lane{lane}", meeting
        self._host_waits = host_waits
        self._streams: dict[int, Stream] = {}

    def send(self, tensor: Tensor, peer: int) -> Callable[[], object]:
        return self._launch(peer, Part(True, (self._name, self._device.rank, peer), tensor))

    def receive(self, tensor: Tensor, peer: int) -> Callable[[], object]:
        return self._launch(peer, Part(False, (self._name, peer, self._device.rank), tensor))

    def _launch(self, peer: int, part: Part) -> Callable[[], object]:
        if peer not in self._streams:
            low, high = sorted((peer, self._device.rank))
            if self._meeting:
                self._meeting.join([f"{self._name} {low}:{high}"], self._device.rank, 2)
            self._streams[peer] = self._device.new_stream(f"{self._name} with {peer}")
        work = FakeWork(self._device, group(self._device, self._streams[peer], [part], CTAS))

        def wait() -> None:
            work.wait()
            if self._host_waits:
                FakeEvent(self._device, work.operation).synchronize()

        return wait


class Specimen:
    """A job with the old protocol.

    Args:
        streams: Streams of a device for communicators.
        sms: SMs of a device.
        buffered: Whether sends end without their receives.
        lazy: Whether the first message of two ranks makes their communicator.
        host_waits: Whether waiting for a work blocks the host, as a limit makes torch do.
    """

    def __init__(
        self,
        topology: Topology,
        schedule: PoolSchedule,
        *,
        streams: int = 32,
        sms: int = 10_000,
        buffered: bool = True,
        lazy: bool = False,
        host_waits: bool = True,
        policy: Policy = "host",
        seed: int = 0,
    ):
        self.topology, self.schedule, self.host_waits = topology, schedule, host_waits
        self.world = World(topology.world_size, policy, seed)
        self.meeting = Meeting(self.world) if lazy else None
        self.devices = [Device(self.world, rank, streams, sms, buffered) for rank in range(topology.world_size)]
        self.mail = Mail(self.world)

    def run(self) -> None:
        """Run a step to its end."""
        ranks = {r: self._trunk if self.topology.is_trunk(r) else self._pool for r in range(self.topology.world_size)}
        self.world.run({rank: lambda run=run, rank=rank: run(rank) for rank, run in ranks.items()})
        if self.world.errors:
            raise self.world.errors[0]

    def _groups(self, rank: int) -> tuple[Device, FakeGloo, list[Pairs]]:
        lanes = 1 + max(lane for order in self.schedule.lane_order for lane in order)
        device = self.devices[rank]
        pairs = [Pairs(device, lane, self.meeting, self.host_waits) for lane in range(lanes)]
        return device, FakeGloo(self.mail, rank), pairs

    def _trunk(self, rank: int) -> None:
        device, gloo, pairs = self._groups(rank)
        streams = FakeStreams(device)
        requests: dict[int, list[RequestKey]] = {}
        for key in (key for slot in self.schedule.slots for key in slot if key.trunk_rank == rank):
            requests.setdefault(key.lane, []).append(key)
        answers: dict[int, list[Callable[[], object]]] = {}
        last: dict[int, int] = {}
        for lane in self.schedule.lane_order[rank]:
            for wait in answers.pop(lane, ()):
                wait()
            coming = requests.get(lane, [])
            device.kernel(f"segment of lane {lane}")
            if last.get(lane) is not None and (not coming or coming[0].micro_batch != last[lane]):
                last.pop(lane)  # the end of a micro-batch
                continue
            key = coming.pop(0)
            last[lane] = key.micro_batch
            if key.kind != Kind.BACKWARD:
                streams.record().synchronize()  # the counts go to the host
            answers[lane] = []
            for shard in range(self.topology.expert_parallel):
                peer = self.topology.pool_rank(shard, rank)
                answers[lane].append(gloo.send([torch.zeros(1)], peer, lane).wait)
                answers[lane].append(pairs[lane].send(torch.zeros(1), peer))
                answers[lane].append(pairs[lane].receive(torch.zeros(1), peer))

    def _pool(self, rank: int) -> None:
        device, gloo, pairs = self._groups(rank)
        streams, receiver = FakeStreams(device), Executor(1, "receiver")
        receiver.submit(streams.enter)
        aside = streams.new()
        mine = [
            [k for k in slot if k.trunk_rank in self.topology.served_trunk_ranks(rank)] for slot in self.schedule.slots
        ]

        def receive(keys: Sequence[RequestKey]) -> None:
            with streams.on(aside):
                headers = [gloo.recv([torch.zeros(1)], key.trunk_rank, key.lane) for key in keys]
                works = []
                for key, header in zip(keys, headers, strict=True):
                    header.wait()
                    works.append(pairs[key.lane].receive(torch.zeros(1), key.trunk_rank))
                for wait in works:
                    wait()
                streams.record().synchronize()

        sending: dict[tuple[int, int], Callable[[], object]] = {}
        coming = [receiver.submit(receive, keys) for keys in mine if keys]
        for keys in (keys for keys in mine if keys):
            coming.pop(0).result()
            for key in keys:
                if (key.trunk_rank, key.lane) in sending:
                    sending.pop((key.trunk_rank, key.lane))()
            device.kernel("experts")
            for key in keys:
                sending[key.trunk_rank, key.lane] = pairs[key.lane].send(torch.zeros(1), key.trunk_rank)
