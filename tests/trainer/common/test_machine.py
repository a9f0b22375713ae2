"""Cores and memory under the limits of made-up cgroups of both versions."""

from __future__ import annotations

import gc
import os
import re
from pathlib import Path

import pytest

from trainer.common.machine import cgroup_cores, first_import_of, usable_cores, usable_memory

ROOT = Path(__file__).parents[3]


def process_in(folder: Path, groups: str, mounts: str, files: dict[str, str]) -> Path:
    """A folder as /proc/self is, of a process in a made-up tree of cgroups. MNT in the texts is where they are mounted.

    Args:
        files: contents by path below the mount.
    """
    mount, process = folder / "mnt dir", folder / "proc"
    process.mkdir(parents=True)
    for name, text in files.items():
        (mount / name).parent.mkdir(parents=True, exist_ok=True)
        (mount / name).write_text(text)
    (process / "cgroup").write_text(groups)
    (process / "mountinfo").write_text(
        f"22 1 8:1 / / rw,relatime - ext4 /dev/sda rw\n{mounts}".replace("MNT", str(mount).replace(" ", "\\040"))
    )
    return process


V2 = "31 22 0:26 / MNT rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "33 22 0:28 / MNT/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
    "34 22 0:29 / MNT/memory rw - cgroup cgroup rw,memory\n"
)
CASES = {
    "v2 without a limit": ("0::/a/b\n", V2, {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "max 100000\n"}, None),
    "v2": ("0::/a/b\n", V2, {"a/b/cpu.max": "250000 100000\n"}, 2.5),
    "v2, a group above is narrower": (
        "0::/a/b\n",
        V2,
        {"a/b/cpu.max": "800000 100000\n", "a/cpu.max": "150000 50000\n", "cpu.max": "max 100000\n"},
        3.0,
    ),
    "v2, only a group above has a limit": ("0::/a/b/c\n", V2, {"a/cpu.max": "400000 100000\n"}, 4.0),
    "v2, in a namespace of its own": ("0::/\n", V2, {"cpu.max": "50000 100000\n"}, 0.5),
    "v2, the mount is the container's group": (
        "0::/kubepods/pod1/c1\n",
        V2.replace("0:26 /", "0:26 /kubepods/pod1"),
        {"c1/cpu.max": "600000 100000\n", "cpu.max": "300000 100000\n"},
        3.0,
    ),
    "v1": (
        "5:memory:/a\n3:cpu,cpuacct:/a\n1:name=systemd:/a\n",
        V1,
        {"cpu,cpuacct/a/cpu.cfs_quota_us": "150000\n", "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n"},
        1.5,
    ),
    "v1 without a limit": (
        "3:cpu,cpuacct:/a\n",
        V1,
        {"cpu,cpuacct/a/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n"},
        None,
    ),
    "v1, docker: /proc has the machine's path": (
        "3:cpu,cpuacct:/docker/0123\n",
        V1.replace("0:28 /", "0:28 /docker/0123"),
        {"cpu,cpuacct/cpu.cfs_quota_us": "200000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
        2.0,
    ),
    "both versions, the cpu controller is v1's": (
        "3:cpu,cpuacct:/a\n0::/b\n",
        V1 + V2.replace("MNT", "MNT/unified"),
        {"cpu,cpuacct/a/cpu.cfs_quota_us": "700000\n", "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n"},
        7.0,
    ),
    "nothing that can be read": ("rubbish\n", "rubbish\n - cgroup2\n", {}, None),
    "a limit that is none": ("0::/a\n", V2, {"a/cpu.max": "few 0\n", "cpu.max": "100000 0\n"}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_quotas(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, mounts, files, quota = CASES[case]
    process = process_in(tmp_path, groups, mounts, files)
    assert cgroup_cores(process) == quota
    for affinity in (1, 2, 64):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=affinity: set(range(cores)))
        assert usable_cores(process) == (affinity if quota is None else max(1, min(affinity, int(quota))))


def test_memory(tmp_path: Path) -> None:
    v2 = process_in(tmp_path / "2", "0::/a/b\n", V2, {"a/b/memory.max": "max\n", "a/memory.max": "1048576\n"})
    files = {"memory/a/memory.limit_in_bytes": "2097152\n", "memory/memory.limit_in_bytes": "9223372036854771712\n"}
    v1 = process_in(tmp_path / "1", "4:memory:/a\n", V1, files)
    assert (usable_memory(v2), usable_memory(v1)) == (2**20, 2**21)


def test_without_proc(tmp_path: Path) -> None:
    assert cgroup_cores(tmp_path) is None
    assert usable_memory(tmp_path) == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_cores_are_counted_in_one_place() -> None:
    counting = re.compile(r"sched_getaffinity|cpu_count|SC_PHYS_PAGES")
    files = (path for package in ("trainer", "pool", "router") for path in (ROOT / package).rglob("*.py"))
    assert [path.name for path in files if counting.search(path.read_text())] == ["machine.py"]


def test_a_first_import_is_not_collected() -> None:
    """Nor is what it made, later. What is imported again may have made garbage since."""
    before = gc.get_freeze_count()
    with first_import_of("not imported"):
        assert not gc.isenabled()
        made = [[] for _ in range(1000)]  # type: ignore[var-annotated]
    assert gc.isenabled() and gc.get_freeze_count() >= before + len(made)
    frozen = gc.get_freeze_count()
    with first_import_of("pytest"):
        assert gc.isenabled()
    assert gc.get_freeze_count() <= frozen
