"""The rendezvous: from the launcher's environment to this rank's number, role and store.

It comes before everything else a rank does, because all of that depends on its role.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from pool.topology import Topology
from trainer.cluster.devices import Devices, Sight, assign_devices, sight, tell_deepspeed
from trainer.cluster.launch import free_port
from trainer.cluster.liveness import Arrival, Liveness, reach
from trainer.cluster.network import address_towards, choose_gloo_interface, loopback_listener, wait_for_listener
from trainer.cluster.rank_assignment import (
    ROLE,
    assign_ranks,
    number_of_ranks,
    payload_device,
    provisional_names,
    roster,
)
from trainer.common.errors import SharedUserError, UserError
from trainer.common.machine import limit_threads
from trainer.config.recipe import Recipe

DIFFERENT_RECIPES = "the ranks were started with different recipes: start all of them with the same recipe"


@dataclass(frozen=True)
class Launch:
    """What the launcher says about this process."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int


def read_launch() -> Launch:
    """Read the launcher's environment, or ask mpi4py under MPI, as DeepSpeed's MPI discovery does.

    Raises:
        UserError: The environment is incomplete, or mpi4py is not installed.
    """
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
            f"launcher environment: {error} (with RANK, the launcher must also set WORLD_SIZE, MASTER_ADDR and "
            "MASTER_PORT; start with deepspeed, torchrun or mpirun)"
        ) from None


def _discover_mpi() -> Launch:
    try:
        from mpi4py import MPI
    except ImportError:
        raise UserError("mpirun started this process, but mpi4py is not installed: pip install mpi4py") from None
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


class KeyValueStore:
    """Short texts that the ranks of a job share through its store.

    Args:
        rank: This process's rank in the job.
        world_size: Number of ranks of the job.
        limit: How long a read waits for its key.
    """

    def __init__(self, store: dist.Store, liveness: Liveness, rank: int, world_size: int, limit: timedelta):
        self._store, self._liveness, self._rank, self._world_size = store, liveness, rank, world_size
        self._limit = limit
        self._broadcasts: Counter[str] = Counter()

    def set(self, key: str, value: str) -> None:
        """Set a key that one rank writes and any rank may `get`."""
        self._store.set(key, value)

    def get(self, key: str) -> str:
        """Return the value of a key, once some rank has set it.

        Raises:
            PeerLost: A rank died or does not respond, or the time limit has passed.
        """
        return self._liveness.meet(lambda: self._store.get(key), self._limit).decode()

    def broadcast(self, key: str, make: Callable[[], str]) -> str:
        """Return what `make` returns on rank 0, on all ranks. A later call with the same key makes it anew."""
        self._broadcasts[key] += 1
        key = f"{key}/{self._broadcasts[key]}"  # a rank that comes first shall not get what the last call left
        if self._rank == 0:
            self.set(key, make())
        return self.get(key)

    def put(self, key: str, value: str) -> None:
        """Set this rank's part of a key that other ranks `gather`."""
        self.set(f"{key}/{self._rank}", value)

    def gather(self, key: str) -> list[str]:
        """Return every rank's part of a key, by rank."""
        return [self.get(f"{key}/{rank}") for rank in range(self._world_size)]


@dataclass(frozen=True)
class Member:
    """A rank's place in the job, and how it reaches the other ranks.

    Attributes:
        rank: Its number in the job.
        leads_machine: Whether it is the first trunk rank of its machine.
        device: Where it computes.
        devices: Where all ranks compute.
        sight: The devices that it may use.
        payload_device: Where the wire takes its payloads from; the same type on all ranks.
        store: The job's store, on which process groups are set up.
        shared: Short texts for the other ranks, in the same store.
        roster: Which ranks run where, in one line.
    """

    topology: Topology
    rank: int
    local_rank: int
    leads_machine: bool
    device: torch.device
    devices: Devices
    sight: Sight
    payload_device: torch.device
    store: dist.Store
    shared: KeyValueStore
    liveness: Liveness
    roster: str

    @property
    def is_trunk(self) -> bool:
        return self.topology.is_trunk(self.rank)

    @property
    def name(self) -> str:
        return self.topology.describe(self.rank)


def rendezvous(recipe: Recipe, launch: Launch) -> Member:
    """Wait for all other ranks on the job's store, and find out the rank and role of each.

    Raises:
        UserError: The launcher's ranks, or the devices that they see, do not fit the recipe.
        PeerLost: Another rank died, does not respond, or did not join within `parallel.start_timeout_seconds`.
    """
    grid, order = recipe.grid, recipe.topology.order
    if grid.world_size != launch.world_size:
        raise SharedUserError(
            f"the launcher started {launch.world_size} ranks, but {number_of_ranks(grid)}: make them equal"
        )
    limit = timedelta(seconds=recipe.parallel.start_timeout_seconds)
    names = provisional_names(grid, order, launch.world_size)
    # Heartbeats have a connection of their own, which calls that block do not hold up.
    stores = reach(lambda: _open_stores(launch, limit), names[0], limit)
    store, beats = (dist.PrefixStore(_attempt() + path, s) for path, s in zip(("", "/beat"), stores, strict=True))
    liveness = Liveness(launch.rank, names, store, beats)
    own = Arrival(
        os.environ.get(ROLE, ""),
        f"{grid} {order}",
        sight(recipe.parallel.device, socket.gethostname(), launch.local_rank),
        address_towards(launch.master_addr),
    )
    arrivals = liveness.meet(lambda: liveness.exchange_arrivals(own), limit)
    if any(arrival.numbering != own.numbering for arrival in arrivals):
        raise SharedUserError(DIFFERENT_RECIPES)
    ranks = assign_ranks(grid, order, [arrival.role for arrival in arrivals])
    liveness.names = [grid.describe(rank) for rank in ranks]
    by_rank = [arrivals[ranks.index(rank)] for rank in range(grid.world_size)]
    machines = [arrival.machine for arrival in by_rank]
    rank = ranks[launch.rank]
    devices = assign_devices(grid, [arrival.sight for arrival in by_rank], recipe.parallel.device)
    device = _take_device(devices.ordinals[rank], launch)
    choose_gloo_interface(own.address, [arrival.address for arrival in by_rank])
    on_gpu = payload_device(grid, devices.types, recipe.parallel.wire, devices.shared) == "cuda"
    return Member(
        topology=grid,
        rank=rank,
        local_rank=launch.local_rank,
        leads_machine=machines.index(machines[rank]) == rank and grid.is_trunk(rank),
        device=device,
        devices=devices,
        sight=own.sight,
        payload_device=device if on_gpu else torch.device("cpu"),
        store=store,
        shared=KeyValueStore(store, liveness, rank, grid.world_size, limit),
        liveness=liveness,
        roster=roster(grid, [arrival.sight.host for arrival in by_rank], devices.types),
    )


def _take_device(ordinal: int | None, launch: Launch) -> torch.device:
    """Return the GPU with this ordinal, or the CPU, where this rank's threads are limited."""
    if ordinal is None:
        limit_threads(launch.local_world_size)
    device = torch.device("cpu") if ordinal is None else torch.device("cuda", ordinal)
    tell_deepspeed(device, launch.local_rank)
    return device


def _attempt() -> str:
    """Return the prefix of this attempt's keys, because torchrun keeps its store over restarts."""
    return f"unipool/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _open_stores(launch: Launch, timeout: timedelta) -> tuple[dist.TCPStore, dist.TCPStore]:
    """Open two connections to the job's store, which launcher rank 0 hosts unless the launcher's agent does."""
    agent_hosts_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if launch.rank:
        wait_for_listener(launch.master_addr, launch.master_port)
    hosts_it = launch.rank == 0 and not agent_hosts_it
    # Node 0 of several may know itself by a loopback address, while the others have its name.
    alone = launch.local_world_size == launch.world_size
    store = dist.TCPStore(
        launch.master_addr,
        launch.master_port,
        is_master=hosts_it,
        master_listen_fd=loopback_listener(launch.master_addr, launch.master_port) if hosts_it and alone else None,
        timeout=timeout,
        wait_for_workers=False,  # the exchange of arrivals waits for them, and can name the missing ones
    )
    return store, store.clone()  # type: ignore[attr-defined]
