"""The process groups of a job: one for the ranks of a role, and others that join both roles."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pool.topology import Topology
from pool.wire import DeviceGroups, WireGroups
from pool.wire.nccl import MAX_CTAS, NcclCommunicator, members, peers
from pool.wire.streams import CudaStreams
from trainer.cluster.liveness import PeerLost
from trainer.cluster.rendezvous import Member
from trainer.config.recipe import Recipe

_WATCHDOG_LIMITS, _REDUCTION_LIMITS = 5, 2
"""Limits of torch's own watchdog of NCCL, and of this rank's patience with a reduction by NCCL, in limits of a step.

The waits of a step name most, so they end first. The watchdog names nothing, and ends the process last.
"""


class Job:
    """This rank's place in the job, and the groups that join the roles.

    The default group of torch.distributed, which DeepSpeed uses, is local to the role: all trunk ranks, or all replicas
    of one shard. Where every rank has both roles, it is that of the trunk, and the replicas of a shard form a subgroup.
    Groups across the roles span all ranks and are built by hand: `control` (gloo) and those of the wire.

    Args:
        lanes: Micro-batches in flight on each trunk rank.

    Attributes:
        shard_group: The replicas of this rank's shard, where every rank has both roles; otherwise None.
        wire_groups: The groups that carry tokens, unless the layout is colocated.

    Raises:
        PeerLost: Another rank died, does not respond, or did not join within `parallel.start_timeout_seconds`.
    """

    def __init__(self, recipe: Recipe, member: Member, lanes: int):
        self.topology: Topology = member.topology
        self.rank, self.local_rank = member.rank, member.local_rank
        self.name, self.is_trunk = member.name, member.is_trunk
        self.device, self.payload_device, self.devices = member.device, member.payload_device, member.devices
        self.shared, self.liveness, self._store = member.shared, member.liveness, member.store
        self.timeout = timedelta(seconds=recipe.parallel.timeout_seconds)
        self._patience: timedelta | None = None
        self.start_timeout = timedelta(seconds=recipe.parallel.start_timeout_seconds)
        self._choose_gpu()
        self._wait_for_all()
        self.liveness.meet(lambda: self._join(lanes), self.start_timeout)

    def _wait_for_all(self) -> None:
        """Wait until all ranks are about to create their groups, which wait for each other no longer than in a step."""
        self.shared.put("before the groups", "")
        self.shared.broadcast("all before the groups", lambda: "".join(self.shared.gather("before the groups")))

    def _choose_gpu(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def _join(self, lanes: int) -> None:
        """Create the groups, for which all ranks wait. Runs in a thread of its own."""
        self._choose_gpu()
        self.role_name, self.role_rank, self.role_size = self.topology.role_world(self.rank)
        os.environ.update(RANK=str(self.role_rank), WORLD_SIZE=str(self.role_size))
        self._limit_groups_of_others()
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
            store=dist.PrefixStore(self.role_name, self._store),
            rank=self.role_rank,
            world_size=self.role_size,
            timeout=self.timeout,
        )
        self.shard_group = self._new_shard_group() if self.topology.every_rank else None
        self._cross_groups: list[Any] = []
        self._communicators: list[NcclCommunicator] = []
        self._control = self._cross_group("control")
        if not self.topology.colocated:
            host = self._cross_group("host")
            if self.payload_device.type == "cuda":
                self.wire_groups = WireGroups(host, device=self._device_groups())
            else:
                self.wire_groups = WireGroups(host, [self._cross_group(f"lane{lane}") for lane in range(lanes)])

    def _limit_groups_of_others(self) -> None:
        """Let groups that DeepSpeed makes wait as long as a start may, and no less than a step; torch has 30 minutes.

        NCCL is only a part of the default group's backend, so that torch's default for NCCL alone applies to no group.
        """
        dist.distributed_c10d.default_pg_timeout = max(self.start_timeout, self.timeout)

    def _new_shard_group(self) -> Any:
        """Create the groups of all shards, in the same order on all ranks, and return this rank's."""
        t = self.topology
        ranks_of = [[r for r in range(t.world_size) if t.shard(r) == shard] for shard in range(t.expert_parallel)]
        groups = [dist.new_group(ranks, timeout=self.timeout) for ranks in ranks_of]
        return groups[t.shard(self.rank)]

    def _cross_group(self, name: str) -> Any:
        group = dist.ProcessGroupGloo(
            dist.PrefixStore(name, self._store), self.rank, self.topology.world_size, self.timeout
        )
        self._cross_groups.append(group)
        return group

    def _device_groups(self) -> DeviceGroups:
        """Create the wire's communicators and connect every trunk rank with the pool ranks that serve it."""
        streams = CudaStreams(self.payload_device)
        requests, answers = self._communicator("requests"), self._communicator("answers")
        shards, trunk_ranks = peers(self.topology, self.rank)
        requests.connect(streams, sends_to=shards, receives_from=trunk_ranks)
        answers.connect(streams, sends_to=trunk_ranks, receives_from=shards)
        return DeviceGroups(requests, answers, streams, lambda: self.liveness.describe(self.liveness.dead()))

    def _communicator(self, name: str) -> NcclCommunicator:
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options.config.max_ctas = MAX_CTAS
        options._timeout = _WATCHDOG_LIMITS * self.timeout
        ranks = members(self.topology, self.rank)
        store = dist.PrefixStore(f"{name}{ranks[0]}", self._store)
        group = dist.ProcessGroupNCCL(store, ranks.index(self.rank), len(ranks), options)
        group.eager_connect_single_device(self.payload_device)
        self._communicators.append(NcclCommunicator(group, ranks))
        return self._communicators[-1]

    def limit_waits(self) -> None:
        """Let all groups that exist wait on the host for at most `parallel.timeout_seconds`, as in a step.

        Until then, those that DeepSpeed has made for the replicas of a role wait as long as a start may. No host waits
        for NCCL: torch's watchdog ends the process without a word, so it leaves time to those who can name the cause.
        """
        for group in dist.distributed_c10d._world.pg_map:
            for device in group._device_types:
                backend = group._get_backend(device)
                limits = 1
                if backend.name() == "nccl":
                    limits, self._patience = _WATCHDOG_LIMITS, _REDUCTION_LIMITS * self.timeout
                backend._set_default_timeout(limits * self.timeout)

    def reducing(self) -> None:
        """Note that this rank is about to wait for others of its role. All ranks do so at the same points of a step.

        Nothing that NCCL reduces has a limit on the host, so that the fault watch ends a rank which waits too long.
        """
        self.liveness.arrive(self._patience)

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Return the sum of every rank's values, in float64, the same on all ranks. A collective of all ranks."""
        self.liveness.arrive()
        total = torch.tensor(values, dtype=torch.float64)
        add_up(self._control, total, self.timeout)
        return total.tolist()

    def sum_over_role(self, values: torch.Tensor) -> None:
        """Sum a tensor of the host over the ranks of the role's group, in place. A collective of these ranks."""
        assert dist.group.WORLD is not None
        add_up(dist.group.WORLD, values, self.timeout)

    def barrier(self) -> None:
        """Wait for all ranks with the start-up's time limit: at the start, around checkpoints, at the end."""
        self.liveness.arrive()
        options = dist.AllreduceOptions()
        options.timeout = self.start_timeout
        self._control.allreduce([torch.zeros(1)], options).wait(self.start_timeout)

    def close(self) -> None:
        """Leave the job. Threads of a group that is open when the interpreter exits would abort the process.

        Raises:
            PeerLost: Not all ranks have come here, or NCCL's groups do not end, within
                `parallel.start_timeout_seconds`.
        """
        self.barrier()  # rank 0 draws pictures meanwhile; whoever never comes is known by its heartbeats
        self.liveness.stop()
        self.barrier()  # rank 0 hosts the store, where heartbeats go
        leaving = threading.Thread(target=self._leave, daemon=True, name="leave")
        leaving.start()
        leaving.join(self.start_timeout.total_seconds())
        if leaving.is_alive():
            limit = self.start_timeout.total_seconds()
            raise PeerLost(f"{self.name} could not close its process groups within {limit:g} s (timed out)")

    def _leave(self) -> None:
        """Close the groups, in the same order on all ranks. Nothing is on the wire, so its communicators are aborted,
        which waits for no peer."""
        self._choose_gpu()
        for communicator in self._communicators:
            communicator.abort()
        for group in self._cross_groups:
            group.shutdown()
        self._cross_groups.clear()
        dist.destroy_process_group()


def add_up(group: Any, values: torch.Tensor, limit: timedelta) -> None:
    """Sum a tensor of the host over a group's ranks, in place, with the same bits on all of them.

    In each round ranks exchange sums in pairs, twice as far apart as in the last. gloo's own reduction sends messages
    round a ring, of which 2 (n - 1) follow each other: with a thousand ranks they would take as long as a small step.
    """
    rank, ranks = group.rank(), group.size()
    paired = 1 << (ranks.bit_length() - 1)
    received = torch.empty_like(values)
    beyond = rank + paired  # a rank that takes part in no round; its partner adds its values, and returns the sum
    if rank >= paired:
        group.send([values], rank - paired, 0).wait(limit)
        group.recv([values], rank - paired, 0).wait(limit)
        return
    if beyond < ranks:
        group.recv([received], beyond, 0).wait(limit)
        values += received
    for distance in (1 << number for number in range(paired.bit_length() - 1)):
        sending = group.send([values], rank ^ distance, 0)
        group.recv([received], rank ^ distance, 0).wait(limit)
        sending.wait(limit)
        values += received
    if beyond < ranks:
        group.send([values], beyond, 0).wait(limit)
