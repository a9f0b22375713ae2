"""What a rank's page of metrics measures when it is asked for: memory, disk, the age of the process; and its place."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from trainer.common.machine import peak_resident_memory

_NODE_NAMES = ("NODE_NAME", "SLURMD_NODENAME")
"""Environment variables that name the node: by Kubernetes' downward API, by Slurm."""


@dataclass(frozen=True)
class Place:
    """Where a rank runs.

    Attributes:
        local_rank: Its number on its machine.
        device: The name of its GPU, or CPU.
        gpu_uuid: Its GPU as NVIDIA's tools name it, so that its metrics can be joined with those of DCGM; "" on a CPU.
        ordinal: Its GPU among those that it sees; None: it computes on the CPU.
        unused_gpus: Number of GPUs of its machine that it cannot use, on a CPU.
        node: The name of its machine; in a container that of the node, if the environment tells.
    """

    local_rank: int
    device: str
    gpu_uuid: str
    ordinal: int | None
    unused_gpus: int
    node: str


def node_name() -> str:
    """Return the name of this node: Kubernetes' or Slurm's, where the environment has it, otherwise the host's."""
    return next((name for variable in _NODE_NAMES if (name := os.environ.get(variable))), socket.gethostname())


def process_age() -> float:
    """Return the seconds since this process began."""
    return max(0.0, time.time() - psutil.Process().create_time())


def peak_memory(device: int | None) -> dict[str, int]:
    """Return the most bytes that this process has had so far: on the "host", and on the "gpu" if it uses one.

    Args:
        device: The ordinal of the GPU. A thread's current one would be the first, whichever the rank uses.
    """
    peak = {"host": peak_resident_memory()}
    if device is not None:
        peak["gpu"] = sys.modules["torch"].cuda.max_memory_allocated(device)
    return peak


def device_memory(device: int) -> tuple[dict[str, int], int]:
    """Return the bytes of a GPU by the kinds of `DEVICE_MEMORY`, and how often torch has had to empty its cache."""
    cuda = sys.modules["torch"].cuda
    stats = cuda.memory_stats(device)
    memory = {
        "allocated": stats.get("allocated_bytes.all.current", 0),
        "reserved": stats.get("reserved_bytes.all.current", 0),
        "total": cuda.get_device_properties(device).total_memory,
    }
    return memory, stats.get("num_alloc_retries", 0)


class DiskSpace:
    """The free space of a file system. A disk that does not answer, as over a network, holds nobody up.

    Args:
        folder: A folder on it.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._free: int | None = None
        self._thread: threading.Thread | None = None

    def free(self) -> int | None:
        """Return the free bytes at the time of the last call; None if they are not known yet, or no longer."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._look, daemon=True, name="disk space")
            self._thread.start()
            self._thread.join(0.1)
        return self._free

    def _look(self) -> None:
        try:
            found = os.statvfs(self._folder)
            self._free = found.f_bavail * found.f_frsize
        except OSError:
            self._free = None
