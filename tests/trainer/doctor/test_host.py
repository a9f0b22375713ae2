"""Checks of the host, its folders, network and packages, on made-up limits."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import socket
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from tests.distributed import TIME_LIMIT
from trainer.cluster.network import INTERFACE
from trainer.common.errors import UserError
from trainer.config.recipe import Recipe, load_recipe
from trainer.doctor import host, network, software, storage


def two_ranks(*sets: str) -> Recipe:
    return load_recipe("quickstart", sets)


def test_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "usable_cores", lambda: 4)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 0, 0))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(host, "cgroup_cores", lambda: 4.5)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    (found,) = host.cores(two_ranks())
    assert (found.status, found.found) == ("ok", "4 cores of 64 (cgroup quota 4.5), load 0.5, OMP_NUM_THREADS=2")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    (found,) = host.cores(two_ranks())
    assert found.status == "warning" and found.found.endswith(": 2 ranks would have 6 threads")
    assert found.mend == "unset OMP_NUM_THREADS, or lower it to 2"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for _ in ("as few threads as possible", "no number of threads"):
        (found,) = host.cores(two_ranks("parallel.pool_ranks=4"))
        assert found.status == "warning" and found.found.endswith("for 5 ranks") and "fewer ranks" in found.mend
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "getloadavg", lambda: (6, 0, 0))
    (found,) = host.cores(None)
    assert found.status == "warning" and "others compute here" in found.found


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, status in ((50, "ok"), (5, "warning")):
        monkeypatch.setattr(
            psutil, "virtual_memory", lambda free=free: SimpleNamespace(total=100 * 10**9, available=free * 10**9)
        )
        monkeypatch.setattr(host, "usable_memory", lambda: 20 * 10**9)
        (found,) = host.memory(None)
        assert found.status == status
        assert found.found == f"20 GB, {min(20, free)} GB free (cgroup limit; the machine has 100 GB)"


def test_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    allowed = {resource.RLIMIT_NOFILE: 1024, resource.RLIMIT_NPROC: 9999, resource.RLIMIT_MEMLOCK: 8 << 20}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (allowed[kind], -1))
    monkeypatch.setattr(host, "cgroup_tasks", lambda: None)
    monkeypatch.setattr(host, "_INFINIBAND", tmp_path)
    assert [f.status for f in host.limits(None)] == ["ok", "ok", "ok"]
    (tmp_path / "mlx5_0").mkdir()
    monkeypatch.setattr(host, "cgroup_tasks", lambda: 100)
    files, tasks, locked = host.limits(two_ranks())
    assert (files.status, files.mend) == ("warning", "ulimit -n 65536")
    assert tasks.status == "warning" and tasks.found.startswith("limit 100 processes")
    assert locked.status == "warning" and locked.found == "limit 8.39 MB"
    allowed |= dict.fromkeys(allowed, resource.RLIM_INFINITY)
    monkeypatch.setattr(host, "cgroup_tasks", lambda: None)
    assert [f.status for f in host.limits(two_ranks())] == ["ok", "ok", "ok"]


def test_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    small = SimpleNamespace(f_blocks=16384, f_frsize=4096, f_bavail=16384)
    monkeypatch.setattr(os, "statvfs", lambda place: small)
    for number, status in ((0, "ok"), (1, "ok"), (2, "warning")):
        monkeypatch.setattr(host, "gpus_on_machine", lambda number=number: number)
        (found,) = host.shared_memory(None)
        assert (found.status, found.found) == (status, "67.1 MB, 67.1 MB free")


def test_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real call answers; made-up kernels say yes and no."""
    (real,) = host.clock(None)
    assert real.found.startswith(("synchronised, ", "not synchronised", "not known (Operation not permitted)"))

    class Kernel:
        def __init__(self, status: int) -> None:
            self.status = status

        def adjtimex(self, pointer: object) -> int:
            time = pointer._obj  # type: ignore[attr-defined]
            assert time.modes == 0  # which changes nothing
            time.status, time.maxerror = self.status, 12_345
            return 0

    for status, found in ((0x2001, "synchronised, by its own estimate to 12 ms"), (0x41, "not synchronised")):
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, status=status, **__: Kernel(status))
        assert [f.found for f in host.clock(None)] == [found]


def test_launchers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, text in (("srun", "exit 1"), ("kubectl", "echo minikube")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(host, "_ASK_SECONDS", TIME_LIMIT)
    (found,) = host.launchers(None)
    assert found.found.startswith("unipool train, srun (Slurm, job 7), kubectl (context minikube)")


def test_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (found,) = storage.folder_of_run(two_ranks(f"run.dir={tmp_path}/a/b", "checkpoint.keep=3"))
    assert found.status in ("ok", "warning") and "; 4 checkpoints of 119 MB need 474 MB; writes" in found.found
    zero_0 = ("parallel.trunk_zero=0", "parallel.pool_zero=0")
    (found,) = storage.folder_of_run(two_ranks(f"run.dir={tmp_path}/a/b", *zero_0))
    assert "; 3 checkpoints of 88.9 MB need 267 MB; writes" in found.found
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    (found,) = storage.folder_of_data(two_ranks(f"data.dir={tmp_path}/file/data"))
    assert found.status == "error" and found.found.endswith("file cannot be written (not a directory)")
    monkeypatch.setattr(os, "statvfs", lambda place: SimpleNamespace(f_bavail=2, f_frsize=10**8))
    (found,) = storage.folder_of_run(two_ranks(f"run.dir={tmp_path}/run"))
    assert found.status == "error" and "200 MB free" in found.found and "lower checkpoint.keep" in found.mend
    (tmp_path / "run/checkpoints/step_1").mkdir(parents=True)  # has some of what it needs
    with open(tmp_path / "run/checkpoints/step_1/model", "wb") as file:
        file.truncate(2 * 10**8)
    (found,) = storage.folder_of_run(two_ranks(f"run.dir={tmp_path}/run"))
    assert found.status != "error"
    monkeypatch.setenv("XDG_CACHE_HOME", f"{tmp_path}/file")
    assert {f.about: f.status for f in storage.temporary(None)} == {"/tmp": "ok", "cache": "error"}


def test_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.source .*none: cannot be read"):
        list(storage.text(two_ranks(f"data.source={tmp_path}/none")))
    assert [f.about for f in storage.text(two_ranks())] == ["data.source"]
    from_hub = two_ranks("data.source=hub:some/text", "data.tokenizer=some-tokenizer")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for reached, status in ((True, "ok"), (False, "warning")):
        monkeypatch.setattr(storage, "can_connect", lambda reached=reached: reached)
        (found,) = storage.text(from_hub)
        assert (found.about, found.status) == ("hub", status) and "for hub:some/text, some-tokenizer" in found.found
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert [f.mend for f in storage.text(from_hub)] == ["unset HF_HUB_OFFLINE"]


def test_interfaces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    states = {name: SimpleNamespace(isup=name != "eth1") for name in ("lo", "eth0", "eth1", "ib0")}
    monkeypatch.setattr(psutil, "net_if_stats", lambda: states)
    monkeypatch.setattr(network, "_INFINIBAND", tmp_path)
    for variable, about, values in (
        (INTERFACE, "gloo", {"eth0": "ok", "eth1": "error", "eth": "error"}),
        (
            "NCCL_SOCKET_IFNAME",
            "NCCL",
            {
                "eth": "ok",
                "ib,eth9": "ok",
                "=eth0": "ok",
                "=eth": "error",
                "en": "error",
                "^lo,ib": "ok",
                "^lo,eth,ib": "error",
            },
        ),
    ):
        for value, status in values.items():
            monkeypatch.setenv(variable, value)
            found = {f.about: f for f in network.interfaces(None)}
            assert found[about].status == status, value
        monkeypatch.delenv(variable)
    state = tmp_path / "mlx5_0/ports/1/state"
    state.parent.mkdir(parents=True)
    for text, status in (("4: ACTIVE", "ok"), ("1: DOWN", "warning")):
        state.write_text(text)
        assert {f.about: f.status for f in network.interfaces(None)}["InfiniBand"] == status


def test_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        (found,) = network.ports(load_recipe("small", [f"metrics.port={port}"]))
    assert (found.status, found.found) == ("error", f"{port} on 127.0.0.1: {port} in use")

    class Socket(socket.socket):
        def bind(self, address: tuple[str, int]) -> None:  # type: ignore[override]
            if address == ("0.0.0.0", 9401):
                raise OSError(errno.EADDRINUSE, "in use")

    monkeypatch.setattr(socket, "socket", Socket)
    for sets, status, text in (
        (("metrics.port=9400", "metrics.host=0.0.0.0"), "error", "9400 to 9401 on 0.0.0.0: 9401 in use"),
        (("metrics.port=9400",), "ok", "9400 to 9401 on 127.0.0.1: free"),
        ((), "ok", "0: each rank takes a free one"),
    ):
        (found,) = network.ports(two_ranks(*sets))
        assert (found.status, found.found) == (status, text)


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["click>=8", "numpy<1", "not-there-at-all>=1", 'nor-this>=1; extra == "dev"']
    monkeypatch.setattr(metadata, "requires", lambda name: wanted)
    absent, outside, rest = software.packages(None)
    assert (absent.status, absent.found) == ("error", "not installed: not-there-at-all")
    assert outside.status == "warning" and outside.found.endswith(f"numpy {metadata.version('numpy')} (tested: <1)")
    assert rest.status == "ok" and "; 1 packages in the tested ranges" in rest.found
