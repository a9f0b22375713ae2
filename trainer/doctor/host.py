"""Checks of the host: cores, memory, limits, shared memory, clock, and what else starts jobs here."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from trainer.common.format import plural, size
from trainer.common.gpus import gpus_on_machine
from trainer.common.machine import all_cores, cgroup_cores, cgroup_tasks, usable_cores, usable_memory
from trainer.config.recipe import Recipe
from trainer.doctor.findings import Finding, ok, warning

_FILES, _FILES_OF_RANK = 1024, 64
"""Open files that any run may need, and that each rank may."""
_TASKS_OF_RANK = 128
"""Threads that each rank may need besides those that compute."""
_SHARED_MEMORY = 10**9
"""Bytes of /dev/shm that NCCL should have between the GPUs of a machine."""
_LOW_MEMORY = 0.1
_INFINIBAND = Path("/sys/class/infiniband")
_SHM = "/dev/shm"
_ASK_SECONDS = 5.0


def cores(recipe: Recipe | None) -> Iterator[Finding]:
    """Cores, the share of them that cgroups allow, and the threads of the ranks."""
    usable, quota = usable_cores(), cgroup_cores()
    found = plural(usable, "core")
    if usable != all_cores():
        found += f" of {all_cores()}" + (f" (cgroup quota {quota:.1f})" if quota else "")
    load = os.getloadavg()[0]
    found += f", load {load:.1f}"
    threads, ranks = os.environ.get("OMP_NUM_THREADS", ""), _ranks(recipe)
    if threads:
        found += f", OMP_NUM_THREADS={threads}"
    if threads.isdecimal() and int(threads) > max(1, usable // ranks):
        mend = f"unset OMP_NUM_THREADS, or lower it to {max(1, usable // ranks)}"
        yield warning("CPU", f"{found}: {plural(ranks, 'rank')} would have {ranks * int(threads)} threads", mend)
    elif ranks > usable:
        mend = "use fewer ranks; a rank on a GPU needs a core of its own too"
        yield warning("CPU", f"{found} for {plural(ranks, 'rank')}", mend)
    elif load > usable + 1:
        yield warning("CPU", f"{found}: others compute here", "top shows who; steps are slower meanwhile")
    else:
        yield ok("CPU", found)


def memory(recipe: Recipe | None) -> Iterator[Finding]:
    """Memory of the machine, or the limit that cgroups set."""
    usable, machine = usable_memory(), psutil.virtual_memory()
    found = f"{size(usable)}, {size(min(usable, machine.available))} free"
    if usable < machine.total:
        found += f" (cgroup limit; the machine has {size(machine.total)})"
    if machine.available < _LOW_MEMORY * machine.total:
        yield warning("memory", found, "end what else needs it, or a rank may be killed (see dmesg)")
    else:
        yield ok("memory", found)


def limits(recipe: Recipe | None) -> Iterator[Finding]:
    """Open files, processes and threads, locked memory."""
    ranks = _ranks(recipe)
    files, tasks = _FILES + _FILES_OF_RANK * ranks - _FILES_OF_RANK, _TASKS_OF_RANK * ranks + usable_cores()
    opened, allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0], resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if _exceeds(files, opened):
        yield warning("open files", f"limit {opened:,}, fewer than {files:,}", f"ulimit -n {max(65_536, files)}")
    else:
        yield ok("open files", f"limit {_limit(opened)}")
    if (group := cgroup_tasks()) is not None:
        allowed = group if allowed == resource.RLIM_INFINITY else min(group, allowed)
    if _exceeds(tasks, allowed):
        mend = "ulimit -u, or the container's limit (docker run --pids-limit, the pod's pids limit)"
        yield warning("processes", f"limit {allowed:,} processes and threads, fewer than {tasks:,}", mend)
    else:
        yield ok("processes", f"limit {_limit(allowed)} processes and threads")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    shown = "unlimited" if locked == resource.RLIM_INFINITY else size(locked)
    if _INFINIBAND.is_dir() and any(_INFINIBAND.iterdir()) and locked != resource.RLIM_INFINITY:
        mend = "ulimit -l unlimited (docker run --ulimit memlock=-1): InfiniBand needs it"
        yield warning("locked memory", f"limit {shown}", mend)
    else:
        yield ok("locked memory", f"limit {shown}")


def shared_memory(recipe: Recipe | None) -> Iterator[Finding]:
    """/dev/shm, through which NCCL sends between GPUs without peer access."""
    place = os.statvfs(_SHM)
    total, free = place.f_blocks * place.f_frsize, place.f_bavail * place.f_frsize
    found = f"{size(total)}, {size(free)} free"
    if free < _SHARED_MEMORY and gpus_on_machine() > 1:
        yield warning(_SHM, found, "NCCL may need 1 GB: docker run --shm-size 1g, or an emptyDir of medium Memory")
    else:
        yield ok(_SHM, found)


class _Timex(ctypes.Structure):
    """`struct timex` of adjtimex(2) up to the status, and room for the rest."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_byte * 512),
    )


_UNSYNCHRONISED = 0x40
"""STA_UNSYNC of adjtimex(2)."""


def clock(recipe: Recipe | None) -> Iterator[Finding]:
    """Whether the kernel's clock follows others."""
    time = _Timex()
    if ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(time)) < 0:
        yield ok("clock", f"not known ({os.strerror(ctypes.get_errno())})")
    elif time.status & _UNSYNCHRONISED:
        mend = "start chronyd or systemd-timesyncd on the machine, or times of several machines cannot be compared"
        yield warning("clock", "not synchronised", mend)
    else:
        yield ok("clock", f"synchronised, by its own estimate to {max(1, time.maxerror // 1000)} ms")


def launchers(recipe: Recipe | None) -> Iterator[Finding]:
    """What else than `unipool train` can start jobs here."""
    found = ["unipool train"]
    if shutil.which("srun"):
        job = os.environ.get("SLURM_JOB_ID")
        found.append(f"srun (Slurm, {f'job {job}' if job else 'not inside a job'})")
    if shutil.which("kubectl"):
        context = _ask("kubectl", "config", "current-context")
        found.append(f"kubectl ({f'context {context}' if context else 'without a context'})")
    if shutil.which("mpirun"):
        found.append("mpirun")
    yield ok("launchers", ", ".join(found))


def _ask(*command: str) -> str:
    """Return the first line that a program says; "" if it fails."""
    with suppress(OSError, subprocess.SubprocessError):
        asked = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_SECONDS, check=True)
        return asked.stdout.partition("\n")[0].strip()
    return ""


def _ranks(recipe: Recipe | None) -> int:
    return recipe.grid.world_size if recipe else 1


def _exceeds(needed: int, limit: int) -> bool:
    return limit != resource.RLIM_INFINITY and needed > limit


def _limit(number: int) -> str:
    return "unlimited" if number == resource.RLIM_INFINITY else f"{number:,}"
