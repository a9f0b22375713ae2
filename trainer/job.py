"""The job as one of its ranks has it: role-local torch world, cross-role groups, short texts for all."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pool.topology import Topology
from trainer.config import Recipe
from trainer.errors import UserError
from trainer.schedule import Schedule, make_schedule
from trainer.seat import Seat


class Job:
    """This rank's place in the job and the groups that join the roles.

    Its torch.distributed world is role-local: all trunk ranks, or all replicas of one shard. Cross-role groups span
    all ranks and are made by hand: `control` and `host` (gloo), and one a lane for payloads.

    Args:
        make: makes the schedule that all ranks use, called on rank 0; None: made from the recipe.
    Raises:
        PeerLost: another rank died, stands still or did not come within `parallel.start_timeout_seconds`.
    """

    def __init__(self, recipe: Recipe, seat: Seat, make: Callable[[], Schedule] | None = None):
        self.topology: Topology = seat.topology
        self.rank, self.local_rank = seat.rank, seat.local_rank
        self.name, self.is_trunk = seat.name, seat.is_trunk
        self.device, self.payload_device = seat.device, seat.payload_device
        self.store, self.peers = seat.store, seat.peers
        self.timeout = timedelta(seconds=recipe.parallel.timeout_seconds)
        self.start_timeout = timedelta(seconds=recipe.parallel.start_timeout_seconds)
        self._choose_gpu()
        self.peers.meet(lambda: self._join(recipe, seat, make), self.start_timeout)

    def _choose_gpu(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def _join(self, recipe: Recipe, seat: Seat, make: Callable[[], Schedule] | None) -> None:
        """Meet the other ranks: agree on the schedule, make the groups. Runs in a thread of its own."""
        self._choose_gpu()
        text = self.agree("schedule", lambda: (make() if make else make_schedule(recipe)).to_json())
        agreed = Schedule.from_json(recipe, text)
        if agreed is None:
            raise UserError("the ranks were started with different recipes: give all of them the same")
        self.schedule = agreed
        self.role_name, self.role_rank, self.role_size = self.topology.role_world(self.rank)
        os.environ.update(RANK=str(self.role_rank), WORLD_SIZE=str(self.role_size))
        os.environ.update(LOCAL_RANK=str(seat.local_rank))
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
            store=dist.PrefixStore(self.role_name, self.store),
            rank=self.role_rank,
            world_size=self.role_size,
            timeout=self.timeout,
        )
        self._cross_groups: list[Any] = []
        self._control = self._cross_group("control", torch.device("cpu"))
        if not self.topology.colocated:
            self.host_group = self._cross_group("host", torch.device("cpu"))
            lanes = range(self.schedule.lanes)
            self.lane_groups = [self._cross_group(f"lane{lane}", self.payload_device) for lane in lanes]

    def _cross_group(self, name: str, device: torch.device) -> Any:
        store = dist.PrefixStore(name, self.store)
        size = self.topology.world_size
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = self.timeout
            group: Any = dist.ProcessGroupNCCL(store, self.rank, size, options)
        else:
            group = dist.ProcessGroupGloo(store, self.rank, size, self.timeout)
        self._cross_groups.append(group)
        return group

    def agree(self, key: str, make: Callable[[], str]) -> str:
        """A short text that rank 0 makes for all ranks; waits for it."""
        if self.rank == 0:
            self.tell(key, make())
        return self.ask(key)

    def tell(self, key: str, value: str) -> None:
        """Leave a short text for all ranks to `ask` for: one rank's part."""
        self.store.set(key, value)

    def ask(self, key: str) -> str:
        """What some rank told; waits for it."""
        value = self.peers.patiently(lambda: self.store.get(key), self.start_timeout)
        return value.decode()

    def publish(self, key: str, value: str) -> None:
        """Leave a short text for other ranks to `look_up`."""
        self.tell(f"{key}/{self.rank}", value)

    def look_up(self, key: str) -> list[str]:
        """What every rank published under `key`, by rank; waits for it."""
        return [self.ask(f"{key}/{rank}") for rank in range(self.topology.world_size)]

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Sum of every rank's values, in float64, the same on all ranks. A collective of all ranks."""
        total = torch.tensor(values, dtype=torch.float64)
        self._control.allreduce([total]).wait(self.timeout)
        return total.tolist()

    def barrier(self) -> None:
        """Wait, with the long limit, until all ranks are here: at the start, after a checkpoint, at the end."""
        options = dist.AllreduceOptions()
        options.timeout = self.start_timeout
        self._control.allreduce([torch.zeros(1)], options).wait(self.start_timeout)

    def close(self) -> None:
        """Leave the job. Threads of a group that is still open at the interpreter's end would abort the process."""
        self.peers.leave()
        self.barrier()
        for group in self._cross_groups:
            group.shutdown()
        self._cross_groups.clear()
        dist.destroy_process_group()
