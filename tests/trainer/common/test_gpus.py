"""Why a process can use no GPU, on made-up machines; and what torch is asked."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.distributed import TIME_LIMIT
from tests.trainer.job import ROOT
from trainer.common import machine
from trainer.common.errors import UserError
from trainer.common.gpus import (
    Gpu,
    GpuFacts,
    boot_id,
    check_queues,
    load_kernels_at_start,
    look,
    share_of_gpus,
    use_many_queues,
    why_none,
)

NONE = GpuFacts((), "2.13.0+cu130", "13.0", 13000, on_machine=2)
"""A machine with GPUs, a driver and a torch for CUDA 13.0, none of which is to blame."""


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (replace(NONE, built_for=None, torch="2.13.0+cpu"), "torch 2.13.0+cpu is built without CUDA"),
        (replace(NONE, visible=""), "CUDA_VISIBLE_DEVICES= hides all GPUs"),
        (replace(NONE, visible="-1,0"), "CUDA_VISIBLE_DEVICES=-1,0 hides all GPUs"),
        (replace(NONE, visible="NoDevFiles"), "CUDA_VISIBLE_DEVICES=NoDevFiles hides all GPUs"),
        (replace(NONE, driver=0, on_machine=0), "there is no NVIDIA driver"),
        (replace(NONE, driver=0), "the NVIDIA driver's library is not found (libcuda.so.1; a container needs"),
        (
            replace(NONE, driver=12040, message="CUDA initialization: The NVIDIA driver on your system is too old"),
            "the NVIDIA driver supports CUDA 12.4, but torch 2.13.0+cu130 is built for CUDA 13.0: update the driver, "
            "or install a torch for CUDA 12.4",
        ),
        # Within a major version an older driver is enough, so something else is wrong.
        (
            replace(NONE, driver=12040, built_for="12.8", message="CUDA initialization:\nsystem not yet initialized"),
            "torch says: CUDA initialization:\\nsystem not yet initialized",
        ),
        (replace(NONE, visible="7"), "CUDA_VISIBLE_DEVICES=7 names no GPU of this machine"),
        (replace(NONE, visible="MIG-1"), "CUDA_VISIBLE_DEVICES=MIG-1 names no GPU of this machine"),
        (NONE, "the driver finds no GPU"),
    ],
)
def test_why_there_is_none(facts: GpuFacts, reason: str) -> None:
    assert why_none(facts).startswith(reason)
    assert "\n" not in why_none(facts)


def cuda(monkeypatch: pytest.MonkeyPatch, **functions: object) -> None:
    """A made-up torch.cuda."""
    for name, function in functions.items():
        monkeypatch.setattr(torch.cuda, name, function)


def test_what_torch_says_of_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def properties(i: int) -> SimpleNamespace:
        return SimpleNamespace(name="NVIDIA H100", uuid=f"u{i}", pci_domain_id=0, pci_bus_id=26 + i, pci_device_id=0)

    cuda(
        monkeypatch,
        is_available=lambda: True,
        init=lambda: None,
        device_count=lambda: 2,
        get_device_properties=properties,
    )
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13010, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    facts = look()
    boot = boot_id()
    assert facts.gpus == (Gpu("NVIDIA H100", "u0", f"{boot} 0:1a:0"), Gpu("NVIDIA H100", "u1", f"{boot} 0:1b:0"))
    assert (facts.built_for, facts.driver, facts.visible, facts.message) == ("13.0", 13010, "4,5", "")


def test_what_torch_says_of_a_driver_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """It warns and counts none, or counts some that it then cannot initialise."""

    def none() -> bool:
        warnings.warn("CUDA initialization: unknown error", stacklevel=1)
        return False

    def fail() -> None:
        raise RuntimeError("system not yet initialized")

    cuda(monkeypatch, is_available=none)
    assert (look().gpus, look().message) == ((), "CUDA initialization: unknown error")
    cuda(monkeypatch, is_available=lambda: True, init=fail)
    assert (look().gpus, look().message) == ((), "system not yet initialized")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_this_machine_has_none() -> None:
    facts = look()
    assert facts.gpus == ()
    assert why_none(facts)


def test_the_device_of_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """No command computes silently on the CPU of a machine with GPUs."""
    facts = replace(NONE, driver=12040)
    monkeypatch.setattr(machine, "look", lambda: facts)
    with pytest.raises(UserError, match="^--device cuda: the NVIDIA driver supports CUDA 12.4.* allowed here: cpu"):
        machine.pick_device("cuda")
    assert machine.pick_device("cpu") == torch.device("cpu")
    assert capsys.readouterr().err == ""
    assert machine.pick_device(None) == torch.device("cpu")
    assert capsys.readouterr().err.startswith("warning: on the CPU, although this machine has GPUs: the NVIDIA driver")
    facts = replace(facts, on_machine=0)
    assert machine.pick_device(None) == torch.device("cpu")
    assert capsys.readouterr().err == ""
    facts = replace(facts, gpus=(Gpu("a", "b", "c"),))
    assert machine.pick_device(None) == machine.pick_device("cuda") == torch.device("cuda")


def test_a_sandbox_that_does_not_tell_its_boot(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> str:
        raise PermissionError

    monkeypatch.setattr(Path, "read_text", refuse)
    assert boot_id() == socket.gethostname()


def test_the_allocator_is_configured_before_torch_reads_it() -> None:
    """And the user's configuration holds, also under the older name."""
    code = (
        "import os, sys; from trainer.common.gpus import set_allocator as s; s(); assert 'torch' not in sys.modules\n"
        "print([os.environ.get(f'PYTORCH_{n}ALLOC_CONF') for n in ('', 'CUDA_')])"
    )
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    rest = {name: value for name, value in os.environ.items() if name not in names}
    for own, told in (
        ({}, ["expandable_segments:True", None]),
        ({names[0]: "backend:native"}, ["backend:native", None]),
        ({names[1]: "backend:native"}, [None, "backend:native"]),
    ):
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, env=rest | own, cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT, check=True
        )
        assert done.stdout == f"{told}\n"


def test_kernels_are_loaded_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the user says otherwise."""
    for own, told in ((None, "EAGER"), ("LAZY", "LAZY")):
        monkeypatch.setenv("CUDA_MODULE_LOADING", own or "")
        if own is None:
            monkeypatch.delenv("CUDA_MODULE_LOADING")
        load_kernels_at_start()
        assert os.environ["CUDA_MODULE_LOADING"] == told


def test_streams_have_queues_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the user says otherwise, but not fewer than are needed."""
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    monkeypatch.setenv(name, "1")
    use_many_queues()
    with pytest.raises(UserError, match=r"CUDA_DEVICE_MAX_CONNECTIONS=1 in the environment: .* parallel\.wire=gloo"):
        check_queues()
    monkeypatch.setenv(name, "8")
    use_many_queues()
    check_queues()
    assert os.environ[name] == "8"
    monkeypatch.delenv(name)
    use_many_queues()
    check_queues()
    assert os.environ[name] == "32"


@pytest.mark.parametrize(
    ("visible", "files", "shares"),
    [
        (None, 8, ["0,1,2,3", "4,5,6,7"]),
        (None, 3, ["0", "1"]),
        (None, 1, ["0", "0"]),
        (None, 0, [None, None]),
        ("", 8, [None, None]),
        ("6,7", 8, ["6", "7"]),
        ("GPU-a,GPU-b,GPU-c,GPU-d", 8, ["GPU-a,GPU-b", "GPU-c,GPU-d"]),
    ],
)
def test_jobs_divide_the_gpus(
    visible: str | None, files: int, shares: list[str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for name in ("nvidiactl", "nvidia-uvm", *(f"nvidia{number}" for number in range(files))):
        (tmp_path / name).touch()
    monkeypatch.setattr("trainer.common.gpus._DEVICES", tmp_path)
    assert [share_of_gpus(place, 2) for place in range(2)] == shares
    assert look().on_machine == files


@pytest.mark.parametrize(
    ("granted", "number"),
    [("GPU-8f2a,GPU-91bc", 2), ("MIG-77aa", 1), ("all", 0), ("void", 0), ("", 0), (None, 0), ("0,1", 0)],
)
def test_gpus_that_a_container_was_granted_but_cannot_see(
    granted: str | None, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kubernetes' device plugin names them by UUID; without NVIDIA's runtime there are no device files. An image of
    CUDA says "all" on any machine."""
    monkeypatch.delenv("NVIDIA_VISIBLE_DEVICES", raising=False)
    if granted is not None:
        monkeypatch.setenv("NVIDIA_VISIBLE_DEVICES", granted)
    monkeypatch.setattr("trainer.common.gpus._DEVICES", tmp_path)
    assert look().on_machine == number


@pytest.mark.parametrize(
    ("name", "uuid", "written"),
    [
        ("NVIDIA H100 80GB HBM3", "6a7f-01", "GPU-6a7f-01"),
        ("NVIDIA H100 80GB HBM3", "GPU-6a7f-01", "GPU-6a7f-01"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "77aa", "MIG-77aa"),
    ],
)
def test_a_uuid_as_dcgm_has_it(name: str, uuid: str, written: str) -> None:
    assert Gpu(name, uuid, "somewhere").uuid_of_tools == written
