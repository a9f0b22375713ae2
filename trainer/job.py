"""A rank finds its place in the job: launcher environment, role-local torch world, cross-role groups."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pool.topology import Topology
from trainer.config import Recipe
from trainer.errors import UserError
from trainer.launch import free_port
from trainer.peers import PeerLost, Peers, reach
from trainer.schedule import Schedule, make_schedule


@dataclass(frozen=True)
class Launch:
    """What the launcher says of this process."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int


def launched() -> bool:
    """Whether a launcher (deepspeed, torchrun, MPI) started this process as one rank of a job."""
    return "RANK" in os.environ or _mpi_launched()


def _mpi_launched() -> bool:
    return "OMPI_COMM_WORLD_SIZE" in os.environ or "PMI_SIZE" in os.environ


def read_launch() -> Launch:
    """Read the launcher's environment; under MPI ask mpi4py for it, as DeepSpeed's MPI discovery does."""
    env = os.environ
    if "RANK" not in env:
        return _discover_mpi()
    try:
        world_size = int(env["WORLD_SIZE"])
        return Launch(
            rank=int(env["RANK"]),
            world_size=world_size,
            local_rank=int(env.get("LOCAL_RANK", "0")),
            local_world_size=int(env.get("LOCAL_SIZE") or env.get("LOCAL_WORLD_SIZE") or world_size),
            master_addr=env["MASTER_ADDR"],
            master_port=int(env["MASTER_PORT"]),
        )
    except (KeyError, ValueError) as error:
        raise UserError(
            f"launcher environment: {error} (RANK is set, so WORLD_SIZE, MASTER_ADDR and MASTER_PORT must be numbers "
            f"and names too; start with deepspeed, torchrun or mpirun)"
        ) from None


def _discover_mpi() -> Launch:
    try:
        from mpi4py import MPI
    except ImportError:
        raise UserError("started by mpirun, but mpi4py is not installed: pip install mpi4py") from None
    world = MPI.COMM_WORLD
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    address, port = world.bcast((socket.gethostbyname(socket.gethostname()), free_port()), root=0)
    return Launch(
        rank=world.Get_rank(),
        world_size=world.Get_size(),
        local_rank=local.Get_rank(),
        local_world_size=local.Get_size(),
        master_addr=os.environ.get("MASTER_ADDR", address),
        master_port=int(os.environ.get("MASTER_PORT", port)),
    )


class Job:
    """This rank's place in the job and the groups that join the roles.

    Its torch.distributed world is role-local: all trunk ranks, or all replicas of one shard. Cross-role groups span
    all ranks and are made by hand: `control` and `host` (gloo), and one a lane for payloads.

    Args:
        make: makes the schedule that all ranks use, called on rank 0; None: made from the recipe.
    Raises:
        PeerLost: another rank died, stands still or did not come within `parallel.start_timeout_seconds`.
    """

    def __init__(self, recipe: Recipe, launch: Launch, make: Callable[[], Schedule] | None = None):
        self.topology: Topology = recipe.topology
        if self.topology.world_size != launch.world_size:
            t = self.topology
            raise UserError(
                f"the launcher started {launch.world_size} ranks, parallel.trunk_ranks + parallel.pool_ranks = "
                f"{t.trunk_ranks} + {t.pool_ranks} = {t.world_size}: make them equal"
            )
        self.rank = launch.rank
        self.local_rank = launch.local_rank
        self.device = _pick_device(launch)
        self.timeout = timedelta(seconds=recipe.parallel.timeout_seconds)
        self.start_timeout = timedelta(seconds=recipe.parallel.start_timeout_seconds)
        # Heartbeats have a connection of their own: one that hangs must not hold up the rest.
        stores = reach(lambda: _open_stores(launch, self.start_timeout), self.topology.describe(0), self.start_timeout)
        self.store, beats = (
            dist.PrefixStore(_attempt() + path, s) for path, s in zip(("", "/beat"), stores, strict=True)
        )
        self.peers = Peers(self.topology, self.rank, self.store, beats)
        try:
            self.peers.patiently(lambda: self._join(recipe, launch, make), self.start_timeout)
        except PeerLost:
            raise
        except RuntimeError as error:
            if lost := self.peers.explain(error):
                raise PeerLost(f"{lost} ({error})") from error
            raise
        self.peers.stop_starting()

    def _join(self, recipe: Recipe, launch: Launch, make: Callable[[], Schedule] | None) -> None:
        """Meet the other ranks: agree on the schedule, make the groups. Runs in a thread of its own."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.peers.call_roll()
        text = self.agree("schedule", lambda: (make() if make else make_schedule(recipe)).to_json())
        agreed = Schedule.from_json(recipe, text)
        if agreed is None:
            raise UserError("the ranks were started with different recipes: give all of them the same")
        self.schedule = agreed
        self.role_name, self.role_rank, self.role_size = self.topology.role_world(self.rank)
        os.environ.update(RANK=str(self.role_rank), WORLD_SIZE=str(self.role_size))
        os.environ.update(LOCAL_RANK=str(launch.local_rank))
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
            store=dist.PrefixStore(self.role_name, self.store),
            rank=self.role_rank,
            world_size=self.role_size,
            timeout=self.timeout,
        )
        self.payload_device = self.device if recipe.parallel.wire == "auto" else torch.device("cpu")
        self._cross_groups: list[Any] = []
        self._control = self._cross_group("control", torch.device("cpu"))
        if not self.topology.colocated:
            self.host_group = self._cross_group("host", torch.device("cpu"))
            lanes = range(self.schedule.lanes)
            self.lane_groups = [self._cross_group(f"lane{lane}", self.payload_device) for lane in lanes]

    @property
    def is_trunk(self) -> bool:
        return self.topology.is_trunk(self.rank)

    @property
    def name(self) -> str:
        return self.topology.describe(self.rank)

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
        self.barrier()
        for group in self._cross_groups:
            group.shutdown()
        self._cross_groups.clear()
        dist.destroy_process_group()


def _pick_device(launch: Launch) -> torch.device:
    if torch.cuda.is_available():
        device = torch.device("cuda", launch.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // launch.local_world_size))
    return torch.device("cpu")


def _attempt() -> str:
    """Keys of one start of the job; torchrun keeps its store over restarts."""
    return f"unipool/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _open_stores(launch: Launch, timeout: timedelta) -> tuple[dist.TCPStore, dist.TCPStore]:
    """Two connections to the job's store, which rank 0 holds unless the launcher's agent does."""
    agent_has_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        launch.master_addr,
        launch.master_port,
        is_master=launch.rank == 0 and not agent_has_it,
        timeout=timeout,
        wait_for_workers=False,  # the roll call waits for them, and can say who is missing
    )
    return store, store.clone()  # type: ignore[attr-defined]
