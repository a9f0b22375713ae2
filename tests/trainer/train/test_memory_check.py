"""A job says at its start if GPUs seem too small; torch reads the variables of its allocator as expected."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pool.topology import Topology
from trainer.config.recipe import load_recipe
from trainer.train.reporter import warn_of_memory


def job_on(device: str, rank: int) -> Any:
    grid = Topology(4, 4, 4)
    return SimpleNamespace(
        device=torch.device(device), rank=rank, topology=grid, is_trunk=grid.is_trunk(rank), name=grid.describe(rank)
    )


@pytest.mark.parametrize(
    ("device", "rank", "free", "role"),
    [
        ("cuda", 0, 5e9, "a trunk rank needs"),
        ("cuda", 4, 5e9, "a pool rank needs"),
        ("cuda", 1, 5e9, None),  # one rank of each role is enough
        ("cuda", 5, 5e9, None),
        ("cuda", 0, 75e9, None),
        ("cuda", 4, 75e9, None),
        ("cpu", 0, 0, None),
    ],
)
def test_the_first_rank_of_a_role_warns(
    device: str,
    rank: int,
    free: float,
    role: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free), int(80e9)))
    job = job_on(device, rank)
    warn_of_memory(job, load_recipe("unipool-182m"), 2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (1 if role else 0)
    if role:
        assert lines[0].startswith(f"warning: {role} ") and f"of {job.name}'s GPU: " in lines[0]


def test_torch_reads_these_variables() -> None:
    """In this order: the older name first."""
    source = Path(torch.__file__).parent / "include/c10/cuda/CUDAAllocatorConfig.h"
    text = source.read_text()
    older, newer = text.index('get_env("PYTORCH_CUDA_ALLOC_CONF")'), text.index('get_env("PYTORCH_ALLOC_CONF")')
    assert older < newer
