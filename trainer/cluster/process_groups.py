"""The process groups of a job: one for the ranks of a role, and others that join both roles."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pool.topology import Topology
from trainer.cluster.rendezvous import Member
from trainer.config.recipe import Recipe


class Job:
    """This rank's place in the job, and the groups that join the roles.

    The default group of torch.distributed, which DeepSpeed uses, is local to the role: all trunk ranks, or all replicas
    of one shard. Groups across the roles span all ranks and are built by hand: `control` and `host` (gloo), and one
    group per lane for payloads.

    Args:
        lanes: Micro-batches in flight on each trunk rank.

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
        self.start_timeout = timedelta(seconds=recipe.parallel.start_timeout_seconds)
        self._choose_gpu()
        self.liveness.meet(lambda: self._join(lanes), self.start_timeout)

    def _choose_gpu(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def _join(self, lanes: int) -> None:
        """Create the groups, for which all ranks wait. Runs in a thread of its own."""
        self._choose_gpu()
        self.role_name, self.role_rank, self.role_size = self.topology.role_world(self.rank)
        os.environ.update(RANK=str(self.role_rank), WORLD_SIZE=str(self.role_size))
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
            store=dist.PrefixStore(self.role_name, self._store),
            rank=self.role_rank,
            world_size=self.role_size,
            timeout=self.timeout,
        )
        self._cross_groups: list[Any] = []
        self._control = self._cross_group("control", torch.device("cpu"))
        if not self.topology.colocated:
            self.host_group = self._cross_group("host", torch.device("cpu"))
            self.lane_groups = [self._cross_group(f"lane{lane}", self.payload_device) for lane in range(lanes)]

    def _cross_group(self, name: str, device: torch.device) -> Any:
        store = dist.PrefixStore(name, self._store)
        size = self.topology.world_size
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = self.timeout
            group: Any = dist.ProcessGroupNCCL(store, self.rank, size, options)
        else:
            group = dist.ProcessGroupGloo(store, self.rank, size, self.timeout)
        self._cross_groups.append(group)
        return group

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Return the sum of every rank's values, in float64, the same on all ranks. A collective of all ranks."""
        total = torch.tensor(values, dtype=torch.float64)
        self._control.allreduce([total]).wait(self.timeout)
        return total.tolist()

    def sum_over_role(self, values: torch.Tensor) -> None:
        """Sum a tensor over the ranks of the role's group, in place. A collective of these ranks."""
        if self.role_size > 1:
            dist.all_reduce(values)

    def barrier(self) -> None:
        """Wait for all ranks with the start-up's time limit: at the start, around checkpoints, at the end."""
        options = dist.AllreduceOptions()
        options.timeout = self.start_timeout
        self._control.allreduce([torch.zeros(1)], options).wait(self.start_timeout)

    def close(self) -> None:
        """Leave the job. Threads of a group that is open when the interpreter exits would abort the process."""
        self.liveness.stop()
        self.barrier()
        for group in self._cross_groups:
            group.shutdown()
        self._cross_groups.clear()
        dist.destroy_process_group()
