"""Checks of GPUs on made-up machines: what torch says, and a stand-in for nvidia-smi."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trainer.common.errors import UserError
from trainer.common.gpus import Gpu, GpuFacts
from trainer.config.recipe import load_recipe
from trainer.doctor import gpus
from trainer.doctor.findings import Finding

NAME = "NVIDIA H100 80GB HBM3"
DRIVER = GpuFacts(torch="2.13.0+cu130", built_for="13.0", driver=13000, on_machine=2)


def by_torch(monkeypatch: pytest.MonkeyPatch, number: int, *sets: str, memory: int = 80 * 10**9) -> dict[str, Finding]:
    """What is found with a recipe on a machine with so many GPUs."""
    facts = replace(DRIVER, gpus=tuple(Gpu(NAME, f"GPU-{i}", f"boot {i}") for i in range(number)))
    monkeypatch.setattr(gpus, "look", lambda: facts)
    properties = SimpleNamespace(name=NAME, major=9, minor=0, total_memory=memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "nccl", SimpleNamespace(version=lambda: (2, 28, 9)))
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    return {finding.about: finding for finding in gpus.torch_and_gpus(load_recipe("unipool-182m", sets))}


FOUR = ("parallel.trunk_ranks=2", "parallel.pool_ranks=2")


def test_gpus_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    found = by_torch(monkeypatch, 4, *FOUR)
    assert found["torch"].found == "2.13.0+cu130, built for CUDA 13.0, NCCL 2.28.9"
    assert found["GPUs"] == Finding("GPUs", "ok", f"4 x {NAME}, compute capability 9.0, 80 GB")
    assert found["ranks"].found == f"4 ranks of runs/unipool-182m on 4 x {NAME}"
    assert found["fit"].status == "ok" and " of 80 GB on a GPU, " in found["fit"].found


def test_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    few = by_torch(monkeypatch, 1, *FOUR)
    assert few["ranks"].status == "error" and "would share a GPU" in few["ranks"].found and "fit" not in few
    small = by_torch(monkeypatch, 4, *FOUR, memory=8 * 10**9)["fit"]
    assert small.status == "error" and "rank needs " in small.mend and "needs" in small.mend
    # Alone each of the two would fit.
    alone = by_torch(monkeypatch, 2, "parallel.trunk_ranks=1", "parallel.pool_ranks=1", memory=50 * 10**9)["fit"]
    shared = by_torch(monkeypatch, 1, "parallel.trunk_ranks=1", "parallel.pool_ranks=1", memory=50 * 10**9)["fit"]
    assert (alone.status, shared.status) == ("ok", "error")
    assert shared.mend.startswith("give each rank a GPU of its own")
    monkeypatch.setattr(gpus, "usable_memory", lambda: 10**9)
    assert by_torch(monkeypatch, 0, *FOUR)["fit"].mend.startswith("lower train.micro_batch, or use a machine with more")


def test_gpus_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    none = by_torch(monkeypatch, 0)["GPUs"]
    assert (none.status, none.found) == ("error", "torch can use none of 2: the driver finds no GPU")
    assert by_torch(monkeypatch, 0, "parallel.device=cpu")["GPUs"].status == "ok"
    assert by_torch(monkeypatch, 0, "parallel.device=cuda")["ranks"].status == "error"


def test_what_kernels_need(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "")
    found = by_torch(monkeypatch, 4, *FOUR)
    assert found["environment"].status == "error"
    assert found["compiler"].status == "warning" and found["compiler"].found.startswith("no C compiler")


TOPOLOGY = """\
	\x1b[4mGPU0	GPU1	NIC0	CPU Affinity	NUMA Affinity\x1b[0m
GPU0	 X 	{link}	PIX	0-63	0
GPU1	{link}	 X 	SYS	64-127	1
NIC0	PIX	SYS	 X

Legend:
  X    = Self
"""
GPU = "{}, 580.65.06, 81559, 4, Disabled, Enabled, 0"


def by_smi(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *gpus_: str, link: str = "NV18", apps: str = "", status: int = 0
) -> list[Finding]:
    """What is found with a stand-in for nvidia-smi, which prints what is given."""
    for name, text in (("gpus", "\n".join(gpus_)), ("apps", apps), ("topo", TOPOLOGY.format(link=link))):
        (folder / name).write_text(text + "\n")
    program = folder / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n"
        f"[ {status} = 0 ] || {{ echo 'Failed to initialize NVML: Driver/library version mismatch'; exit {status}; }}\n"
        f'case "$1" in --query-gpu=*) cat {folder}/gpus;; --query-compute-apps=pid) cat {folder}/apps;; '
        f"topo) cat {folder}/topo;; esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(gpus, "gpus_on_machine", lambda: 2)
    return list(gpus.state(None))


def test_a_machine_that_is_well(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = by_smi(monkeypatch, tmp_path, GPU.format(0), GPU.format(1))
    assert [(f.about, f.status, f.found) for f in found] == [
        ("driver", "ok", "NVIDIA 580.65.06"),
        ("GPUs in use", "ok", "none by others"),
        ("ECC", "ok", "on, no errors that could not be corrected"),
        ("links", "ok", "NVLink (NV18 between 1 pair)"),
    ]


def test_a_machine_that_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = "0, 580.65.06, 81559, 30000, Enabled, Enabled, 3", "1, 580.65.06, 81559, [N/A], [N/A], Disabled, [N/A]"
    in_use, instances, ecc, links = by_smi(monkeypatch, tmp_path, *rows, link="SYS", apps="17\n42\n17")[1:]
    assert in_use.status == "warning" and in_use.found == "31.5 GB of GPU 0 by process 17, 42"
    assert instances.found == "on GPU 0, whose instances count as one GPU"
    assert (ecc.status, ecc.found) == ("error", "errors that could not be corrected on GPU 0")
    assert links.found == "SYS between 1 pair of GPUs: not all by NVLink, so tokens and gradients take PCIe"
    off = "0, 580.65.06, 81559, 4, Disabled, Disabled, [N/A]"
    assert [(f.about, f.status) for f in by_smi(monkeypatch, tmp_path, off)[2:]] == [("ECC", "warning")]
    with pytest.raises(UserError, match="nvidia-smi --query-gpu=.*: Failed to initialize NVML"):
        by_smi(monkeypatch, tmp_path, status=18)
    monkeypatch.setenv("PATH", "")
    assert [(f.about, f.status) for f in gpus.state(None)] == [("driver", "warning")]
    monkeypatch.setattr(gpus, "gpus_on_machine", lambda: 0)
    assert list(gpus.state(None)) == []
