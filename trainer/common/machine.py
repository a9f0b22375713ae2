"""How much of the machine this process may use: a container sees all of it, but cgroups limit its share.

Threads in excess of a CPU limit are paused for the rest of each period, and so is everything that waits for them.
"""

from __future__ import annotations

import gc
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from trainer.common.errors import UserError
from trainer.common.gpus import boot_id, look, why_none

if TYPE_CHECKING:
    import torch

_SELF = Path("/proc/self")


def process_namespace() -> str:
    """Identify where process numbers are the same: containers on one host may share its name, but not its numbers."""
    return boot_id() + os.readlink("/proc/self/ns/pid")


def usable_cores(process: Path = _SELF) -> int:
    """Return the number of cores to plan threads for: the smaller of the CPU affinity and the cgroups' quota.

    A quota of one and a half cores counts as one; the result is at least 1.

    Args:
        process: The process's folder in /proc.
    """
    quota = cgroup_cores(process)
    cores = len(os.sched_getaffinity(0))
    return cores if quota is None else max(1, min(cores, int(quota)))


def all_cores() -> int:
    """Return the number of cores of the machine, whether this process may use them or not."""
    return os.cpu_count() or usable_cores()


def cgroup_cores(process: Path = _SELF) -> float | None:
    """Return the cores that the quotas of the process's cgroup and its parents allow, or None without a quota.

    Reads versions 1 and 2 (`cpu.cfs_quota_us`, `cpu.max`); see cgroups(7) and the kernel's admin-guide/cgroup-v2. What
    cannot be read does not count as a limit.
    """
    quotas = [quota for folder in _cgroup_folders(process, "cpu") if (quota := _quota(folder)) is not None]
    return min(quotas, default=None)


def usable_memory(process: Path = _SELF) -> int:
    """Return bytes of memory: the machine's, or the smallest cgroup limit (`memory.max`, `memory.limit_in_bytes`)."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *_limits(process, "memory", "memory.max", "memory.limit_in_bytes")])


def cgroup_tasks() -> int | None:
    """Return the processes and threads that cgroups allow (`pids.max`), or None without a limit."""
    return min(_limits(_SELF, "pids", "pids.max"), default=None)


def peak_resident_memory() -> int:
    """Return the most bytes of memory that this process has had resident."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _limits(process: Path, controller: str, *files: str) -> list[int]:
    """Return the limits that the process's cgroup and its parents have in these files; "max" is none."""
    limits = []
    for folder in _cgroup_folders(process, controller):
        for name in files:
            with suppress(OSError, ValueError):
                limits.append(int((folder / name).read_text()))
    return limits


def _quota(folder: Path) -> float | None:
    """Return one group's quota in cores; "max" (version 2) and -1 (version 1) stand for none."""
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with suppress(OSError, ValueError):
            quota, period = (int(word) for file in files for word in (folder / file).read_text().split())
            return quota / period if quota > 0 and period > 0 else None
    return None


def _cgroup_folders(process: Path, controller: str) -> Iterator[Path]:
    """Yield the mounted folders of the process's group for a controller, and of that group's parents."""
    with suppress(OSError, ValueError):
        groups = dict(_groups(process))
        for root, mount, controllers in _mounts(process):
            if controllers and controller not in controllers:
                continue
            group = groups.get(controller if controllers else "")
            if group is None:
                continue
            # A container may see its own group as the mount's root while /proc gives the path on the host.
            inside = group.relative_to(root) if group.is_relative_to(root) else PurePosixPath()
            folder = mount / inside
            yield folder
            yield from (parent for parent in folder.parents if parent.is_relative_to(mount))


def _groups(process: Path) -> Iterator[tuple[str, PurePosixPath]]:
    """Yield (controller, path of the process's group); "" stands for the single hierarchy of version 2."""
    for line in (process / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        yield from ((controller, PurePosixPath(path)) for controller in controllers.split(","))


def _mounts(process: Path) -> Iterator[tuple[PurePosixPath, Path, tuple[str, ...]]]:
    """Yield (root within the hierarchy, mount point, controllers); version 2 has no controllers."""
    for line in (process / "mountinfo").read_text().splitlines():
        before, separator, after = line.partition(" - ")
        fields, (kind, *rest) = before.split(), after.split() or [""]
        if not separator or kind not in ("cgroup", "cgroup2"):
            continue
        root, mount = (field.replace("\\040", " ") for field in fields[3:5])
        options = tuple(rest[-1].split(",")) if kind == "cgroup" and rest else ()
        yield PurePosixPath(root), Path(mount), options


def pick_device(name: str | None, setting: str = "--device") -> torch.device:
    """Return the device that a setting names, or by default CUDA where it is available.

    A machine whose GPUs cannot be used is reported on stderr.

    Args:
        name: "cpu", "cuda", or None for the default.
        setting: Where the name is from, for messages.

    Raises:
        UserError: CUDA was requested and is not available.
    """
    import torch

    if name == "cpu":
        return torch.device("cpu")
    facts = look()
    if facts.gpus:
        return torch.device("cuda")
    if name == "cuda":
        raise UserError(f"{setting} cuda: {why_none(facts)}; allowed here: cpu")
    if facts.on_machine:
        print(f"warning: on the CPU, although this machine has GPUs: {why_none(facts)}", file=sys.stderr)
    return torch.device("cpu")


def limit_threads(processes: int = 1) -> None:
    """Let torch compute with this process's share of the cores, unless OMP_NUM_THREADS is set.

    Args:
        processes: The number of processes that share the cores.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, usable_cores() // processes))


@contextmanager
def first_import_of(package: str) -> Iterator[None]:
    """Collect no garbage while a large package is imported, and let later collections skip what exists by then.

    They would find nothing, but visit every object of torch and deepspeed each time: for a second in each rank.
    """
    if package in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
