"""What a page measures when it is asked for: the memory of the rank's own GPU, a disk that may not answer, the node."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.distributed import TIME_LIMIT
from trainer.telemetry import measured
from trainer.telemetry.measured import DiskSpace, Place, device_memory, node_name, peak_memory, process_age
from trainer.telemetry.prometheus import MetricsServer

STATS = {"allocated_bytes.all.current": 5e9, "reserved_bytes.all.current": 7e9, "num_alloc_retries": 3}


@pytest.fixture
def gpu_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that uses the third GPU it sees: what torch knows of others is an error."""

    def of_gpu_2(found: Any) -> Any:
        return lambda device: found if device == 2 else pytest.fail(f"asked about GPU {device}")

    cuda = SimpleNamespace(
        memory_stats=of_gpu_2(STATS),
        get_device_properties=of_gpu_2(SimpleNamespace(total_memory=8e10)),
        max_memory_allocated=of_gpu_2(6e9),
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))


@pytest.mark.usefixtures("gpu_2")
def test_memory_is_that_of_the_rank_s_own_gpu() -> None:
    assert device_memory(2) == ({"allocated": 5e9, "reserved": 7e9, "total": 8e10}, 3)
    assert peak_memory(2)["gpu"] == 6e9
    assert set(peak_memory(None)) == {"host"}


@pytest.mark.usefixtures("gpu_2")
def test_a_rank_says_where_it_runs_and_what_its_gpu_has() -> None:
    server = MetricsServer("pool", 5)
    server.joined("pool", 5, Place(1, "NVIDIA H100 80GB HBM3", "GPU-1234", 2, 0, "node-7"))
    found = {s.name: s for family in server.collect() for s in family.samples if "kind" not in s.labels}
    assert found["unipool_rank_info"].labels == {
        "role": "pool",
        "rank": "5",
        "local_rank": "1",
        "node": "node-7",
        "device": "NVIDIA H100 80GB HBM3",
        "gpu_uuid": "GPU-1234",
    }
    assert found["unipool_build_info"].labels["device"] == "NVIDIA H100 80GB HBM3"
    assert found["unipool_device_allocation_retries_total"].value == 3
    memory = {s.labels["kind"]: s.value for f in server.collect() for s in f.samples if "kind" in s.labels}
    assert memory == {"allocated": 5e9, "reserved": 7e9, "total": 8e10}


def test_a_rank_on_the_cpu_has_no_numbers_of_a_device() -> None:
    server = MetricsServer("trunk", 0)
    server.joined("trunk", 0, Place(0, "CPU", "", None, 8, "here"))
    found = {s.name: s for family in server.collect() for s in family.samples}
    assert found["unipool_unused_gpus"].value == 8
    assert found["unipool_rank_info"].labels["device"] == "CPU"
    assert not [name for name in found if "device_" in name]


def free_space(disk: DiskSpace) -> int:
    """What it finds; a busy machine may be slower than a page may wait."""
    deadline = time.monotonic() + TIME_LIMIT
    while disk.free() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert disk._thread
    disk._thread.join(TIME_LIMIT)
    assert disk._free is not None
    return disk._free


def test_free_space(tmp_path: Path) -> None:
    assert free_space(DiskSpace(tmp_path)) == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.2)
    assert DiskSpace(tmp_path / "gone").free() is None


def test_a_disk_that_does_not_answer_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last free space stays, and one thread waits for it, however often it is asked."""
    disk, hangs, asked = DiskSpace(tmp_path), threading.Event(), []
    before = free_space(disk)

    def never(folder: Path) -> Any:
        asked.append(folder)
        hangs.wait(60)
        return SimpleNamespace(f_bavail=0, f_frsize=1)

    monkeypatch.setattr(os, "statvfs", never)
    assert [disk.free() for _ in range(3)] == [before] * 3
    hangs.set()
    assert disk._thread
    disk._thread.join(TIME_LIMIT)
    assert asked == [tmp_path] and disk._free == 0


def test_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NODE_NAME", "SLURMD_NODENAME"):
        monkeypatch.delenv(name, raising=False)
    assert node_name() == socket.gethostname()
    monkeypatch.setenv("SLURMD_NODENAME", "slurm-3")
    assert node_name() == "slurm-3"
    monkeypatch.setenv("NODE_NAME", "gke-pool-7")
    assert node_name() == "gke-pool-7"


def test_a_clock_that_was_set_back_gives_no_negative_age(monkeypatch: pytest.MonkeyPatch) -> None:
    assert process_age() > 0
    monkeypatch.setattr(measured.time, "time", lambda: 0.0)
    assert process_age() == 0
