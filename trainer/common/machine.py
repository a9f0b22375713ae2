"""How much of the machine this process may use: a container sees all of it, its cgroups say how much is its own.

Threads beyond a CPU limit are all stopped for the rest of each period, and with them whoever waits for one of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from trainer.common.errors import UserError

if TYPE_CHECKING:
    import torch


def usable_cores(process: Path = Path("/proc/self")) -> int:
    """The number of cores to plan threads for, at least 1: the smaller of the CPU affinity and the cgroups' quota.

    A quota of one and a half cores counts as one.

    Args:
        process: the process's folder in /proc.
    """
    quota = cgroup_cores(process)
    cores = len(os.sched_getaffinity(0))
    return cores if quota is None else max(1, min(cores, int(quota)))


def cgroup_cores(process: Path = Path("/proc/self")) -> float | None:
    """Cores that the quotas of the process's cgroup and of all groups above it allow; None without a quota.

    Versions 1 and 2 (`cpu.cfs_quota_us`, `cpu.max`), see cgroups(7) and the kernel's admin-guide/cgroup-v2. Whatever of
    it cannot be read is no limit.
    """
    quotas = [quota for folder in _folders(process, "cpu") if (quota := _quota(folder)) is not None]
    return min(quotas, default=None)


def usable_memory(process: Path = Path("/proc/self")) -> int:
    """Bytes of memory: the machine's, or the least that a cgroup allows (`memory.max`, `memory.limit_in_bytes`)."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for folder in _folders(process, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):  # "max" is no limit
                limits.append(int((folder / name).read_text()))
    return min(limits)


def _quota(folder: Path) -> float | None:
    """Of one group, in cores."""
    with suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text().split()
        return _cores(quota, period)
    with suppress(OSError, ValueError):
        return _cores((folder / "cpu.cfs_quota_us").read_text(), (folder / "cpu.cfs_period_us").read_text())
    return None


def _cores(quota: str, period: str) -> float | None:
    """A quota of "max" (version 2) or -1 (version 1) is none."""
    if quota == "max" or int(quota) <= 0 or int(period) <= 0:
        return None
    return int(quota) / int(period)


def _folders(process: Path, controller: str) -> Iterator[Path]:
    """The folders of the process's group for a controller and of the groups above, as far as they are mounted."""
    with suppress(OSError, ValueError):
        groups = dict(_groups(process))
        for root, mount, controllers in _mounts(process):
            if controllers and controller not in controllers:
                continue
            group = groups.get(controller if controllers else "")
            if group is None:
                continue
            # A container may see its own group as the mount's root while /proc names the path from the machine's.
            inside = group.relative_to(root) if group.is_relative_to(root) else PurePosixPath()
            folder = mount / inside
            yield folder
            yield from (above for above in folder.parents if above.is_relative_to(mount))


def _groups(process: Path) -> Iterator[tuple[str, PurePosixPath]]:
    """(controller, path of the process's group): "" is the one hierarchy of version 2."""
    for line in (process / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        yield from ((controller, PurePosixPath(path)) for controller in controllers.split(","))


def _mounts(process: Path) -> Iterator[tuple[PurePosixPath, Path, tuple[str, ...]]]:
    """(root within the hierarchy, mount point, controllers) of each hierarchy; version 2 names no controllers."""
    for line in (process / "mountinfo").read_text().splitlines():
        before, separator, after = line.partition(" - ")
        fields, (kind, *rest) = before.split(), after.split() or [""]
        if not separator or kind not in ("cgroup", "cgroup2"):
            continue
        root, mount = (field.replace("\\040", " ") for field in fields[3:5])
        options = tuple(rest[-1].split(",")) if kind == "cgroup" and rest else ()
        yield PurePosixPath(root), Path(mount), options


def pick_device(name: str | None) -> torch.device:
    """Return the device that `--device` names, or CUDA where there is one.

    Raises:
        UserError: CUDA is asked for and not available.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device; allowed here: cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def limit_threads(processes: int = 1) -> None:
    """Let torch compute with this process's share of the cores, unless OMP_NUM_THREADS says how many threads it has.

    Args:
        processes: that share the cores.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, usable_cores() // processes))
