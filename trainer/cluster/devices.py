"""Which rank computes on which device: every rank says what it sees, and all ranks come to the same assignment.

NCCL refuses two ranks of a group on one GPU ("Duplicate GPU detected"), and a rank may see one GPU of several under
Slurm or Kubernetes. So nothing follows from a rank's number on its machine alone.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from pool.topology import Topology
from trainer.common.errors import SharedUserError
from trainer.common.format import plural
from trainer.common.gpus import Gpu, GpuFacts, look, why_none

if TYPE_CHECKING:
    import torch

CPU = "CPU"

Wanted = Literal["auto", "cuda", "cpu"]
"""`parallel.device`."""


@dataclass(frozen=True)
class Sight:
    """The devices that a rank may use, as it tells the others.

    Attributes:
        host: Name of its machine.
        local_rank: Its number there, as the launcher says.
        gpus: Its GPUs, by ordinal.
        why_cpu: Why it has none; "" if it has.
        unused: Number of GPUs of its machine of which torch can use none.
    """

    host: str
    local_rank: int
    gpus: tuple[Gpu, ...] = ()
    why_cpu: str = ""
    unused: int = 0


def sight(wanted: Wanted, host: str, local_rank: int, facts: GpuFacts | None = None) -> Sight:
    """Find out which devices this rank may use.

    Args:
        facts: What torch and the system say; by default they are asked.
    """
    if wanted == "cpu":
        return Sight(host, local_rank, why_cpu="parallel.device = cpu")
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return Sight(host, local_rank, why_cpu="DS_ACCELERATOR=cpu in the environment")
    facts = facts or look()
    if facts.gpus:
        return Sight(host, local_rank, facts.gpus)
    return Sight(host, local_rank, (), why_none(facts), facts.on_machine)


@dataclass(frozen=True)
class Devices:
    """Where the ranks of a job compute.

    Attributes:
        ordinals: The GPU of each job rank among those that it sees; None: it computes on the CPU.
        names: The name of each job rank's device.
        shared: Whether ranks share a GPU, so that the roles cannot exchange tokens by NCCL.
        summary: All devices, such as "8 x NVIDIA H100 80GB HBM3" or "CPU".
        lines: What a person should know of them at the start.
    """

    ordinals: tuple[int | None, ...]
    names: tuple[str, ...]
    shared: bool
    summary: str
    lines: tuple[str, ...]

    @property
    def types(self) -> list[str]:
        """Return each job rank's device type, as torch calls it."""
        return ["cpu" if ordinal is None else "cuda" for ordinal in self.ordinals]


def assign_devices(grid: Topology, sights: Sequence[Sight], wanted: Wanted) -> Devices:
    """Assign a device to every rank.

    Ranks spread over the GPUs that they see: first away from ranks with which they average gradients, then away from
    ranks of their role, then to the GPU with the fewest ranks. Ranks of one machine that all see its GPUs get the GPU
    of their local rank, if there are enough.

    Args:
        sights: What each job rank sees.

    Raises:
        SharedUserError: A rank has no GPU although `parallel.device` is `cuda`, or ranks that average gradients with
            each other would share a GPU.
    """
    if wanted == "cuda" and (without := [rank for rank, own in enumerate(sights) if not own.gpus]):
        first = sights[without[0]]
        more = f" and {plural(len(without) - 1, 'other rank')}" if without[1:] else ""
        raise SharedUserError(
            f"parallel.device = cuda, but {grid.describe(without[0])} on {first.host}{more} can use no GPU: "
            f"{first.why_cpu}"
        )
    ordinals: list[int | None] = [None] * len(sights)
    held: dict[str, list[int]] = {}  # the ranks of a GPU, by its UUID and by its place
    for rank in sorted(range(len(sights)), key=lambda rank: (len(sights[rank].gpus), sights[rank].local_rank, rank)):
        gpus = sights[rank].gpus
        if not gpus:
            continue
        holders = [{*held.get(gpu.uuid, ()), *held.get(gpu.place, ())} for gpu in gpus]
        ordinal = min(range(len(gpus)), key=lambda i: (_crowd(grid, rank, holders[i]), i))
        _refuse_duplicates(grid, rank, holders[ordinal], sights[rank].host, gpus[ordinal])
        ordinals[rank] = ordinal
        for key in {gpus[ordinal].uuid, gpus[ordinal].place}:
            held.setdefault(key, []).append(rank)
    used = [None if i is None else own.gpus[i] for i, own in zip(ordinals, sights, strict=True)]
    shared = any(len(ranks) > 1 for ranks in held.values())
    summary = _summary(used)
    lines = tuple(_lines(sights, summary, shared))
    return Devices(tuple(ordinals), tuple(gpu.name if gpu else CPU for gpu in used), shared, summary, lines)


def _crowd(grid: Topology, rank: int, holders: Collection[int]) -> tuple[int, int, int]:
    """Count the ranks of `rank`'s group, of its role, and all, among those that a GPU has."""
    group, is_trunk = grid.role_world(rank)[0], grid.is_trunk(rank)
    same_group = sum(grid.role_world(other)[0] == group for other in holders)
    return same_group, sum(grid.is_trunk(other) == is_trunk for other in holders), len(holders)


def _refuse_duplicates(grid: Topology, rank: int, holders: Collection[int], host: str, gpu: Gpu) -> None:
    group = grid.role_world(rank)[0]
    for other in sorted(holders):
        if grid.role_world(other)[0] == group:
            fewer = "parallel.trunk_ranks" if grid.is_trunk(rank) else "parallel.pool_ranks"
            first, second = sorted((rank, other))
            raise SharedUserError(
                f"{grid.describe(first)} and {grid.describe(second)} on {host} would share a GPU ({gpu.name}, "
                f"{gpu.uuid}): ranks that average gradients with each other need a GPU each (instances of one GPU "
                f"count as one), because NCCL refuses two on one; lower {fewer}, or set parallel.device=cpu"
            )


def _summary(used: Sequence[Gpu | None]) -> str:
    """Count the GPUs by name: "2 x A, 1 x B, CPU"."""
    names = {gpu.uuid: gpu.name for gpu in used if gpu}
    counted = [f"{number} x {name}" for name, number in Counter(names.values()).items()]
    return ", ".join(counted + [CPU] * (None in used))


def _lines(sights: Sequence[Sight], summary: str, shared: bool) -> Iterator[str]:
    reasons = {own.why_cpu for own in sights if own.why_cpu and not own.unused}
    why = f" ({'; '.join(sorted(reasons))})" if reasons else ""
    yield f"devices: {summary}{why}" + ("; ranks share a GPU, so tokens go through the host" if shared else "")
    for host, unused, reason in dict.fromkeys((own.host, own.unused, own.why_cpu) for own in sights if own.unused):
        yield (
            f"warning: {host} trains on the CPU although it has {plural(unused, 'GPU')}: {reason} (parallel.device=cpu "
            "chooses the CPU without this warning, parallel.device=cuda requires GPUs)"
        )


def check_machine(grid: Topology, wanted: Wanted, facts: GpuFacts | None = None) -> Devices:
    """Return where the ranks of a whole job would compute on this machine.

    Args:
        facts: What torch and the system say; by default they are asked.

    Raises:
        UserError: `wanted` is "cuda" and there are no GPUs, or there are too few.
    """
    own = sight(wanted, socket.gethostname(), 0, facts)
    return assign_devices(grid, [replace(own, local_rank=rank) for rank in range(grid.world_size)], wanted)


def tell_deepspeed(device: torch.device, local_rank: int) -> None:
    """Set in the environment what DeepSpeed takes the device from.

    Its engine calls `set_device(LOCAL_RANK)` on CUDA, so that must be an ordinal among the GPUs that this process sees.
    It also requires the local rank of Open MPI to be the same.
    """
    ordinal = str(local_rank if device.index is None else device.index)
    os.environ.update(DS_ACCELERATOR=device.type, LOCAL_RANK=ordinal)
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:
        os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = ordinal
